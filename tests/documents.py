"""What documents show is what happens: their console blocks are run, and what stands below a command is its output.

In a document, in its order and in one folder: a block of YAML or Python whose first line is `# name` is written to that
file; of a block of `console`, each line after `$ ` is run in bash. Lines below it are what it must print; `...` stands
for any number of them, and where there are none, only the exit code counts. Numbers that training leaves behind, and
digests of what was drawn at random, may be others. Blocks of `shell` are not run.

`python -m tests.documents docs/x.md` writes what is printed today below each command that shows anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Every document, by its path from the root.
DOCUMENTS = {str(path.relative_to(ROOT)): path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NAMED = re.compile(r"# ([\w./-]+\.(?:yaml|yml|py|json))\b")
_DIGEST = re.compile(r"\b(?:blake3|sha256):[0-9a-f]{64}")
#: What is printed with an exit code that is not 0.
_BAD = re.compile(r"^(?:FAILED|error:)", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command of a document: what is typed, what is shown, and what it printed."""

    line: str
    shown: str
    printed: str
    code: int
    says_code: bool

    @property
    def right(self) -> bool:
        expected = 0 if not (_BAD.search(self.shown) or self.says_code) else None
        return (expected is None or self.code == expected) and (not self.shown or _agree(self.shown, self.printed))


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and text of every block."""
    return _BLOCK.findall(text)


def typed(block: str) -> list[tuple[str, str]]:
    """Commands of a block of `console`, each with what stands below it."""
    found = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    pairs = []
    for one in found:
        lines = one.splitlines(keepends=True)
        count = 1
        while lines[count - 1].rstrip("\n").endswith("\\"):
            count += 1
        pairs.append(("".join(lines[:count]).rstrip("\n"), "".join(lines[count:])))
    return pairs


def run(text: str, place: Path) -> list[Command]:
    """Run a document in a folder."""
    found: list[Command] = []
    code = 0
    today: dict[str, str] = {}  # of each digest that is shown: the one that was printed
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(place),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "COLUMNS": "120",
    }
    for language, block in blocks(text):
        if language in ("yaml", "python") and (named := _NAMED.match(block)):
            (place / named[1]).parent.mkdir(parents=True, exist_ok=True)
            (place / named[1]).write_text(block)
        if language != "console":
            continue
        commands = typed(block)
        for number, (line, shown) in enumerate(commands):
            typed_today = reduce(lambda typed, digest: typed.replace(*digest), today.items(), line)
            done = subprocess.run(
                ["bash", "-c", f"(exit {code})\n{typed_today}"],
                cwd=place,
                capture_output=True,
                text=True,
                env=environment,
            )
            code = done.returncode
            printed = done.stdout or done.stderr
            today |= dict(zip(_DIGEST.findall(shown), _DIGEST.findall(printed), strict=False))
            says_code = any("$?" in later for later, _ in commands[number + 1 : number + 2])
            found.append(Command(line, shown, printed, code, says_code))
    return found


def _agree(shown: str, printed: str) -> bool:
    parts = re.split(r"^\.\.\.\n", shown, flags=re.MULTILINE)
    pattern = r"(?:.*\n)*?".join(re.escape(_plain(part)) for part in parts)
    return re.fullmatch(pattern, _plain(printed)) is not None


def _plain(text: str) -> str:
    text = _DIGEST.sub("digest", text)
    text = re.sub(r"\d+\.\d{3,}(?:e[+-]?\d+)?|\d+(?:\.\d+)?e-\d+", "#", text)
    return "".join(re.sub(r"[ \t]+", " ", line).strip() + "\n" for line in text.splitlines())


def _filled(text: str, commands: list[Command]) -> str:
    """The document with what was printed, where something is shown in full."""
    rest = iter(commands)

    def fill(match: re.Match[str]) -> str:
        if match[1] != "console":
            return match[0]
        lines = []
        for line, shown in typed(match[2]):
            command = next(rest)
            printed = "".join(one.rstrip() + "\n" for one in command.printed.splitlines())
            lines.append(f"$ {line}\n" + (printed if shown and not command.right else shown))
        return "```console\n" + "".join(lines) + "```"

    return _BLOCK.sub(fill, text)


if __name__ == "__main__":
    import tempfile

    from .worlds import WORLDS

    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory() as folder:
            WORLDS[name](Path(folder))
            before = DOCUMENTS[name].read_text()
            DOCUMENTS[name].write_text(_filled(before, run(before, Path(folder))))
