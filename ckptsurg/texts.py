"""The text of a spec or a map of names, and the line on which each thing stands.

YAML is read as the 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema), except that a number
with a leading zero stays text; a document is at most 1 MiB unless its kind says otherwise.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import DocumentError, Problem
from .parsing import MAX_DIGITS, Place, Text, describe_place, parse_json, read_bytes
from .wording import shown

__all__ = ["read_text"]

MAX_DOCUMENT_BYTES = 1 << 20
MAX_DEPTH = 64


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
        data, lines = _parse_json_text(content, refuse)
    else:
        data, lines = _Builder(content.removeprefix("\ufeff"), refuse).build()
    return Text(label, data, lines)


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


#: The line breaks of Unicode are among them: YAML 1.1 ends lines at them, and YAML 1.2 and JSON do not.
_CONTROL = re.compile("[^\t\n\r\x20-\x7e\xa0-\u2027\u202a-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class _Builder:
    """Builds plain data from YAML events, which are read one by one: nothing recurses, nothing is constructed."""

    def __init__(self, content: str, refuse: Callable[..., NoReturn]) -> None:
        self._content = content
        self._refuse = refuse
        self.lines: dict[Place, int] = {}

    def build(self) -> tuple[Any, dict[Place, int]]:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        if odd := _CONTROL.search(self._content):
            self._refuse(f"the control character 0x{ord(odd[0]):02x}", self._content.count("\n", 0, odd.start()) + 1)
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
