"""What a document says and where, and JSON read strictly."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeAlias

from .errors import DocumentError, Problem, SystemFailure, UsageError
from .wording import shown

__all__ = ["MAX_DIGITS", "Place", "Text", "describe_place", "known_document", "parse_json", "read_bytes", "read_up_to"]

MAX_DIGITS = 100
_CHUNK = 1 << 16

#: Documents that are given in the place of another, by keys that they have.
_KNOWN = {
    "a JSON Schema": {"$schema", "properties"},
    "a manifest": {"tensors", "root", "frozen_root"},
    "a plan": {"tensors", "counts"},
    "a report": {"ok", "drifted"},
    "a statement": {"predicateType"},
    "an index of shards": {"weight_map"},
    "a model's config.json": {"model_type"},
}

#: Where something stands in a document: keys and positions from the top.
Place: TypeAlias = tuple[str | int, ...]


def known_document(data: object) -> str | None:
    """What a document is that is not the one expected; None if that is not known."""
    return next((what for what, keys in _KNOWN.items() if isinstance(data, dict) and keys <= data.keys()), None)


def describe_place(place: Place) -> str:
    """``reinit[0].init`` for ("reinit", 0, "init")."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{shown(part)}" if text else shown(part)
    return text


@dataclass(frozen=True, slots=True)
class Text:
    """What a document says, and where.

    Attributes:
        label: How messages call the document: its path as the user gave it.
        data: Mappings, lists, text, numbers, booleans and None.
        lines: Line number of each place, from 1.
    """

    label: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)

    def nearest(self, place: Place) -> Place:
        """The place itself, or the innermost one around it that the document has."""
        value = self.data
        here: Place = ()
        for part in place:
            if isinstance(value, dict):
                key: Any = part
                if not isinstance(part, str) or part not in value:
                    keys = {one if isinstance(one, str) else json.dumps(one): one for one in value}
                    if part == 0 and "0" not in keys:
                        continue  # a lone item stands for a list of one
                    if str(part) not in keys:
                        break
                    key = keys[str(part)]
                value = value[key]
            elif isinstance(value, list) and isinstance(part, int) and part < len(value):
                value = value[part]
            else:
                break
            here = (*here, part)
        return here

    def line(self, place: Place) -> int | None:
        here = self.nearest(place)
        while here and here not in self.lines:
            here = here[:-1]
        return self.lines.get(here)


def read_bytes(path: Path, limit: int, error: type[DocumentError]) -> bytes:
    """The bytes of a document.

    Raises:
        UsageError: if there is no such file.
        SystemFailure: if it cannot be read.
        DocumentError: (of the kind given) if it is larger than ``limit`` bytes.
    """
    label = shown(path)
    try:
        with path.open("rb") as file:
            if stat.S_ISCHR(os.fstat(file.fileno()).st_mode) and not file.isatty():
                raise error(label, [Problem("", "is a device; expected a document")])  # /dev/zero has no end
            raw = read_up_to(limit, file)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{label}: no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{label}: is a folder; expected a document") from None
    except OSError as failure:
        raise SystemFailure(f"{label}: cannot be read: {failure.strerror}") from None
    if raw is None:
        raise error(label, [Problem("", f"larger than {limit:,} bytes")])
    return raw


def read_up_to(limit: int, file: BinaryIO) -> bytes | None:
    """All that a file holds, or None if that is more than ``limit`` bytes; memory is taken for what there is."""
    raw = bytearray()
    while len(raw) <= limit:
        chunk = file.read(min(_CHUNK, limit + 1 - len(raw)))
        if not chunk:
            return bytes(raw)
        raw += chunk
    return None


def parse_json(content: str, *, floats: bool = True, finish: Callable[[dict[str, Any]], object] | None = None) -> Any:
    """JSON as RFC 8259 has it: a key stands once, numbers are finite, nothing is nested without end.

    Args:
        content: The text.
        floats: Whether numbers with a fraction or exponent are allowed.
        finish: Makes of each object, once it is read, what stands in its place.

    Raises:
        ValueError: with a message that says what is wrong.
    """

    def once(pairs: list[tuple[str, Any]]) -> object:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f'the key "{shown(repeated)}" stands twice')
        return mapping if finish is None else finish(mapping)

    def number(text: str) -> float:
        if not floats:
            raise ValueError(f"{shown(text, 40)} is not a whole number")
        value = float(text)
        if value in (float("inf"), float("-inf")):
            raise ValueError(f"the number {shown(text, 40)} is out of range")
        return value

    def integer(text: str) -> int | float:
        if len(text) > MAX_DIGITS:
            raise ValueError(f"a number of {len(text):,} digits")
        return -0.0 if text == "-0" else int(text)

    def constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(
            content, object_pairs_hook=once, parse_float=number, parse_int=integer, parse_constant=constant
        )
        if "\\u" in content:
            _refuse_surrogates(content)
    except json.JSONDecodeError as failure:
        said = "it begins with a byte order mark" if content[:1] == "\ufeff" else failure.msg.removesuffix(" at")
        raise ValueError(f"not JSON: {said} at character {failure.pos:,}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|.)", re.DOTALL)


def _refuse_surrogates(content: str) -> None:
    """Half of a surrogate pair, written as an escape, is not a character."""
    high_end = -1
    for match in _ESCAPE.finditer(content):
        code = int(match[1], 16) if match[1] else 0
        completes = high_end == match.start()
        if high_end >= 0 and not (completes and 0xDC00 <= code < 0xE000):
            raise ValueError("half of a surrogate pair in a text")
        if high_end < 0 and 0xDC00 <= code < 0xE000:
            raise ValueError("half of a surrogate pair in a text")
        high_end = match.end() if 0xD800 <= code < 0xDC00 else -1
    if high_end >= 0:
        raise ValueError("half of a surrogate pair in a text")
