"""Bad input, one small file a case, and odd input that is good; and what must be said of each.

A case is a file in the folder of its kind, or a folder of files, named by what is wrong with it. ``expected.yaml``
beside it says of each:

    input       what is in it: of a safetensors file the length, the header and the data; of a manifest the lines in
                which it differs from good.json; of an archive nothing
    about       what cannot be seen from that; written by hand
    code        what every command that reads it exits with
    message     what it says, all of it; ``since 3.13`` where Python's own words, which are part of it, have changed
    hint        and what it says to do
    reads       true where it is good, and read as others read it
    warnings    what is odd about it
    library     ``accepts`` where the safetensors library reads what is refused here

Where a wording changes, or a file is added or changed, ``python -m tests.cases accept`` writes the tables anew but for
what is written by hand, and ``git diff`` shows what is to be looked at. What is too large for a case, or is no file
(links, pipes), is made in tests/test_bad_*.py.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import yaml

import ckptsurg
from ckptsurg.cli import _run

__all__ = [
    "HOME",
    "KINDS",
    "TABLE",
    "Case",
    "Contents",
    "as_the_library_reads",
    "cases",
    "content",
    "expected",
    "library_accepts",
    "observed",
    "write_table",
]

HOME = Path(__file__).parent
TABLE = "expected.yaml"
KINDS = ("container", "dtypes", "entries", "index", "layout", "manifest", "names", "spec", "torch")

#: What is good, from the folder of a kind.
_BASE, _SPEC, _MANIFEST = "../container/base.safetensors", "../spec/good.yaml", "../manifest/good.json"
#: Of an input that is shown, in characters.
_SHOWN = 600
#: Of a difference that are shown.
_LINES = 16

Expectation = dict[str, Any]
#: Dtype, shape and bytes by name.
Contents = dict[str, tuple[str, list[int], bytes]]


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Case:
    """A file or folder.

    Attributes:
        folder: Of its kind, in which commands are run, so that messages name no place of this machine.
        name: Inside that.
    """

    folder: Path
    name: str

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def kind(self) -> str:
        return self.folder.name

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def commands(self) -> list[tuple[str, ...]]:
        """Every way to have it read."""
        name = self.name
        if self.kind == "spec":
            return [("plan", name, _BASE), ("plan", "--json", name, _BASE)]
        if self.kind == "manifest":
            return [("verify", name, _BASE), ("verify", "--json", name, _BASE)]
        looks = [("inspect", name), ("inspect", "--json", name), ("plan", _SPEC, name)]
        return [*looks, ("verify", _MANIFEST, name), ("diff", name, _BASE), ("diff", _BASE, name)]

    def run(self, *command: str) -> Outcome:
        """Run one in this process: arguments in, and out what a user would see."""
        root, said, shown = logging.getLogger(), io.StringIO(), io.StringIO()
        arguments, sys.argv = sys.argv, ["ckptsurg", *command]
        handlers, root.handlers = root.handlers, []  # as a process starts: the first command sets up its own
        try:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(shown), contextlib.redirect_stderr(said):
                code = _run()
        finally:
            sys.argv, root.handlers = arguments, handlers
        return Outcome(code, shown.getvalue(), said.getvalue())

    def read(self) -> tuple[Contents, list[str]]:
        """What a checkpoint holds, and what is odd about it."""
        with contextlib.chdir(self.folder), ckptsurg.open_checkpoint(self.name) as checkpoint:
            contents = {
                name: (info.dtype, list(info.shape), b"".join(map(bytes, checkpoint.read(name))))
                for name, info in checkpoint.tensors.items()
            }
            return contents, list(checkpoint.warnings)


def cases(kind: str, home: Path = HOME) -> list[Case]:
    """All of a kind, by name."""
    folder = home / kind
    return [Case(folder, path.name) for path in sorted(folder.iterdir()) if path.name != TABLE]


@cache
def expected(kind: str) -> dict[str, Expectation]:
    """What a kind's table says, by the name of the case."""
    table: dict[str, Expectation] = _read_table(HOME / kind)
    return table


def _read_table(folder: Path) -> dict[str, Expectation]:
    path = folder / TABLE
    table: dict[str, Expectation] = yaml.safe_load(path.read_text("utf-8")) if path.exists() else {}
    return table


# --- What is seen -----------------------------------------------------------------------------------


def observed(case: Case, former: Expectation) -> Expectation:
    """What is to be said of a case in its table, as things are.

    Args:
        case: The case.
        former: What the table says of it; what was written by hand is taken from there.
    """
    outcome = case.run(*case.commands[0])
    if outcome.code not in (0, 1, 2, 3):
        raise ValueError(f"{case}: {outcome.stderr}")
    found: Expectation = {} if (shown := content(case)) is None else {"input": shown}
    found |= {"about": former["about"]} if "about" in former else {}
    if outcome.code in (0, 1):
        warnings = [] if case.kind in ("manifest", "spec") else case.read()[1]
        return found | {"reads": True} | ({"warnings": warnings} if warnings else {})
    message, _, hint = outcome.stderr.removeprefix("error: ").removesuffix("\n").partition("\nhint: ")
    found["code"] = outcome.code
    if (later := former.get("since 3.13")) is None:
        found["message"] = message
    elif sys.version_info >= (3, 13):
        found |= {"message": former["message"], "since 3.13": message}
    else:
        found |= {"message": message, "since 3.13": later}
    found |= {"hint": hint} if hint else {}
    return found | ({"library": "accepts"} if library_accepts(case.path) else {})


def as_the_library_reads(raw: bytes) -> Contents:
    """A file as the safetensors library reads it.

    Raises:
        SafetensorError: if it does not.
    """
    tensors = safetensors.deserialize(raw)  # type: ignore[no-untyped-call]
    return {name: (one["dtype"], list(one["shape"]), bytes(one["data"])) for name, one in tensors}


def library_accepts(path: Path) -> bool:
    """Whether it is a file that the safetensors library reads."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        as_the_library_reads(path.read_bytes())
    except safetensors.SafetensorError:
        return False
    return True


# --- What is in a case ------------------------------------------------------------------------------


def content(case: Case) -> str | dict[str, str] | None:
    """What its table shows of it; None for an archive."""
    if case.kind == "manifest":
        return _difference((case.folder / "good.json").read_bytes(), case.path.read_bytes())
    if case.path.is_file():
        return _content(case.path)
    files = (path for path in sorted(case.path.rglob("*")) if path.is_file())
    return {path.relative_to(case.path).as_posix(): shown for path in files if (shown := _content(path))}


def _content(path: Path) -> str | None:
    raw = path.read_bytes()
    if path.suffix == ".safetensors":
        length = int.from_bytes(raw[:8], "little")
        if len(raw) >= 8 and (raw[8:9] == b"{" or length <= len(raw)):
            header, data = raw[8 : 8 + length], raw[8 + length :]
            return _shortened(f"{length} | {_text(header)} | {_text(data) if b'{' in data else data.hex(' ')}".rstrip())
    return None if path.suffix in (".bin", ".pth") else _shortened(_text(raw))


def _text(raw: bytes) -> str:
    """The text itself where it can be shown, and as Python writes bytes where not."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return repr(raw)
    return text if text.replace("\n", "").isprintable() else repr(raw)


def _shortened(text: str) -> str:
    text = re.sub(" {9,}", lambda match: f" ({len(match[0])} spaces) ", text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 100]}…{text[-100:]}"


def _difference(good: bytes, bad: bytes) -> str:
    new = bad.decode("utf-8", "backslashreplace").splitlines()
    lines = [line for line in difflib.ndiff(good.decode().splitlines(), new) if line[0] in "-+"]
    if len(lines) > _LINES and len(new) < _LINES:
        return _shortened(_text(bad))
    told = [f"{line[0]} {_printable(line[1:].strip())}" for line in lines[:_LINES]]
    return "\n".join(told + [f"and {len(lines) - _LINES} more"] * (len(lines) > _LINES))


def _printable(line: str) -> str:
    return line if line.isprintable() else line.encode("unicode_escape").decode()


# --- Tables -----------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Text of several lines as such."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text_node)


def write_table(kind: str, home: Path = HOME) -> None:
    """Write down for every case of a kind what is seen."""
    former = _read_table(home / kind)
    entries = (
        yaml.dump(
            {case.name: observed(case, former.get(case.name, {}))},
            Dumper=_Dumper,
            sort_keys=False,
            allow_unicode=True,
            width=118,
        )
        for case in cases(kind, home)
    )
    head = (
        "# Written by `python -m tests.cases accept`, but for `about` and `since 3.13`; see tests/cases/__init__.py.\n"
    )
    (home / kind / TABLE).write_text(head + "".join(f"\n{entry}" for entry in entries), "utf-8")
