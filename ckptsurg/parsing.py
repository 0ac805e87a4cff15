"""The text of a document, and the line on which each thing stands.

YAML is read as the 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema), except that a number
with a leading zero stays text; a document is at most 1 MiB unless its kind says otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import yaml

from .errors import DocumentError, Problem, SystemFailure, UsageError
from .wording import shown

__all__ = ["Place", "Text", "describe_place", "parse_json", "read_bytes", "read_text"]

MAX_DOCUMENT_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_DIGITS = 100

#: Where something stands in a document: keys and positions from the top.
Place: TypeAlias = tuple[str | int, ...]


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
                keys = {key if isinstance(key, str) else json.dumps(key): key for key in value}
                if part == 0 and "0" not in keys:
                    continue  # a lone item stands for a list of one
                if str(part) not in keys:
                    break
                value = value[keys[str(part)]]
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
            raw = file.read(limit + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{label}: no such file") from None
    except IsADirectoryError:
        raise UsageError(f"{label}: is a folder; expected a document") from None
    except OSError as failure:
        raise SystemFailure(f"{label}: cannot be read: {failure.strerror}") from None
    if len(raw) > limit:
        raise error(label, [Problem("", f"larger than {limit:,} bytes")])
    return raw


def read_text(path: Path, error: type[DocumentError], *, limit: int = MAX_DOCUMENT_BYTES) -> Text:
    """Read a YAML document, or a JSON one where the name ends in ``.json``.

    Args:
        path: The file.
        error: What to raise for text that is not a document.
        limit: Largest size, in bytes.

    Raises:
        UsageError: if there is no such file.
        SystemFailure: if it cannot be read.
    """
    label = shown(path)

    def refuse(message: str, line: int | None = None) -> NoReturn:
        raise error(label, [Problem("", message, line)])

    raw = read_bytes(path, limit, error)
    try:
        content = raw.decode("utf-8")
    except UnicodeDecodeError as failure:
        refuse(f"not UTF-8: byte {failure.start} is 0x{raw[failure.start]:02x}", raw[: failure.start].count(b"\n") + 1)
    if path.suffix == ".json":
        return Text(label, *_parse_json_text(content, refuse))
    return Text(label, *_Builder(content.removeprefix("\ufeff"), refuse).build())


def parse_json(content: str, *, floats: bool = True) -> Any:
    """JSON as RFC 8259 has it: a key stands once, numbers are finite, nothing is nested without end.

    Args:
        content: The text.
        floats: Whether numbers with a fraction or exponent are allowed.

    Raises:
        ValueError: with a message that says what is wrong.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) != len(pairs):
            seen: set[str] = set()
            repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f'the key "{shown(repeated)}" stands twice')
        return mapping

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
        raise ValueError(f"not JSON: {failure.msg} at character {failure.pos:,}") from None
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


def _parse_json_text(content: str, refuse: Callable[..., NoReturn]) -> tuple[Any, dict[Place, int]]:
    try:
        data = parse_json(content)
    except ValueError as failure:
        at = re.search(r"at character ([0-9,]+)$", str(failure))
        refuse(str(failure), content.count("\n", 0, int(at[1].replace(",", ""))) + 1 if at else None)
    # JSON is YAML but for tabs between tokens, so the same reader finds the lines; where it does
    # not (an escape that only JSON has), messages do without.
    try:
        lines = _Builder(content.replace("\t", " "), refuse).build()[1] if len(content) <= MAX_DOCUMENT_BYTES else {}
    except DocumentError:
        lines = {}
    return data, lines


_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
#: Tokens that YAML takes for tags, aliases or lists although a pattern was meant.
_WORD = r"[^\s,\[\]{}\"'#]"
_UNQUOTED = re.compile(
    rf"(?P<before>^|[\s,\[{{])(?P<token>(?:[!*]{_WORD}*|[^-\s,\[\]{{}}\"'#!*&]{_WORD}*(?=\[-?[0-9]*[\]:]))(?:\[[-0-9:]*\]{_WORD}*)*"
    rf"|\[-?[0-9]*:[-0-9:]*\]|\{{[^{{}}\s:]*\}}{_WORD}+)"
)


class _Builder:
    """Builds plain data from YAML events, which are read one by one: nothing recurses, nothing is constructed."""

    def __init__(self, content: str, refuse: Callable[..., NoReturn]) -> None:
        self._content = content
        self._refuse = refuse
        self.lines: dict[Place, int] = {}

    def build(self) -> tuple[Any, dict[Place, int]]:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        if re.search("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", self._content):
            self._refuse("a control character in the text")
        root: list[Any] = []
        documents = 0
        # The open collections: (the list or dict, its place, the key that waits for its value).
        stack: list[tuple[Any, Place, list[Any]]] = [(root, (), [])]
        try:
            for event in yaml.parse(self._content, Loader=loader):
                line = event.start_mark.line + 1 if event.start_mark is not None else 1
                if isinstance(event, yaml.DocumentStartEvent):
                    documents += 1
                    if documents > 1:
                        self._refuse("several documents in one file; expected one", line)
                elif isinstance(event, yaml.AliasEvent):
                    self._refuse(f"*{shown(event.anchor)} is read as an alias" + self._line_to_type(line), line)
                elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
                    stack.pop()
                elif isinstance(event, yaml.NodeEvent):
                    self._node(event, line, stack)
        except yaml.YAMLError as failure:
            mark = getattr(failure, "problem_mark", None) or getattr(failure, "context_mark", None)
            at = mark.line + 1 if mark else None
            problem = getattr(failure, "problem", None) or str(failure)
            if "escape" in problem:
                problem += "; a backslash stands for itself in single quotes: 're:.*'"
            self._refuse(f"not YAML: {shown(problem)}" + self._line_to_type(at), at)
        return (root[0] if root else None), self.lines

    def _node(self, event: yaml.NodeEvent, line: int, stack: list[tuple[Any, Place, list[Any]]]) -> None:
        tag = getattr(event, "tag", None)
        if tag is not None:
            self._refuse(f"{shown(tag)} is read as a tag" + self._line_to_type(line), line)
        if event.anchor is not None:
            self._refuse(f"&{shown(event.anchor)} is read as an anchor; a spec has none", line)
        parent, place, waiting = stack[-1]
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event, line)
        else:
            value = {} if isinstance(event, yaml.MappingStartEvent) else []
        if isinstance(parent, dict) and not waiting:
            if not isinstance(value, Hashable):
                self._refuse("a key is text or a number, not a list or mapping" + self._line_to_type(line), line)
            # As JSON spells it: 0 and "0" are one key there.
            spelled = value if isinstance(value, str) else json.dumps(value)
            if (*place, spelled) in self.lines:
                self._refuse(
                    f'the key "{shown(value)}" stands twice in {describe_place(place) or "the document"}', line
                )
            waiting.append(value)
            self.lines[(*place, spelled)] = line
            return
        if isinstance(parent, dict):
            key = waiting.pop()
            parent[key] = value
            here = (*place, key if isinstance(key, str) else json.dumps(key))
        else:
            here = (*place, len(parent)) if len(stack) > 1 else ()
            parent.append(value)
            self.lines[here] = line
        if isinstance(value, dict | list):
            if len(stack) > MAX_DEPTH:
                self._refuse(f"nested more than {MAX_DEPTH} deep", line)
            stack.append((value, here, []))

    def _scalar(self, event: yaml.ScalarEvent, line: int) -> str | int | float | bool | None:
        text: str = event.value
        if not event.implicit[0]:
            return text
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if len(text) > MAX_DIGITS and (_INT.fullmatch(text) or _FLOAT.fullmatch(text)):
            self._refuse(f"a number of {len(text):,} digits", line)
        if _INT.fullmatch(text):
            return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
        if _NOT_FINITE.fullmatch(text):
            self._refuse(f"{text} is not a number that a document may hold", line)
        # A leading zero (017, 007.5) is how names are written, not numbers.
        if _FLOAT.fullmatch(text) and not re.match(r"[-+]?0[0-9]", text):
            value = float(text)
            if value in (float("inf"), float("-inf")):
                self._refuse(f"the number {text} is out of range", line)
            return value
        return text

    def _line_to_type(self, line: int | None) -> str:
        """The user's own line with quotes around what YAML does not take for text."""
        rows = self._content.splitlines()
        if line is None or not 0 < line <= len(rows):
            return ""
        row = rows[line - 1].strip()
        quoted = _UNQUOTED.sub(lambda match: f'{match["before"]}"{match["token"]}"', row)
        return "" if quoted == row else f"; quote patterns, type: {shown(quoted)}"
