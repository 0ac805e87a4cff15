"""Commented YAML: lines, prose, and examples that are commented out.

Prose begins with ``# ``. An example begins with ``#`` and no space: without the ``#`` it is a part of the document.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

__all__ = ["Entry", "Examples", "aligned", "plain", "prose", "quoted", "rendered"]

_WIDTH = 100


@dataclass(frozen=True, slots=True)
class Examples:
    """Parts that the document may have besides, each by itself.

    Attributes:
        intro: Prose above them.
        parts: The lines of each.
        indent: How far they stand from the margin, in spaces.
    """

    intro: str
    parts: Sequence[Sequence[str]]
    indent: int = 0


Entry: TypeAlias = str | Examples


def rendered(entries: Iterable[Entry], chosen: Sequence[Sequence[str]] = ()) -> str:
    """The text of a document, with some of its examples a part of it."""
    lines: list[str] = []
    for entry in entries:
        if isinstance(entry, str):
            lines.append(entry)
            continue
        margin = " " * entry.indent
        lines += prose(entry.intro, entry.indent) if entry.intro else []
        for part in entry.parts:
            mark = "" if any(part is one for one in chosen) else "#"
            lines += [f"{margin}{mark}{line}" for line in part]
    return "\n".join(lines) + "\n"


def prose(text: str, indent: int = 0) -> list[str]:
    """Text as comments, in lines of some 100 characters."""
    start = f"{' ' * indent}# "
    return textwrap.wrap(
        text, _WIDTH, initial_indent=start, subsequent_indent=start, break_long_words=False, break_on_hyphens=False
    )


def aligned(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Lines with what there is to say about each, in a column."""
    width = min(max((len(line) for line, _ in rows), default=0), 48)
    return [f"{line:<{width}}  # {remark}" if remark else line for line, remark in rows]


def quoted(text: str) -> str:
    """Text in double quotes, as YAML reads it."""
    escaped = (
        f"\\{character}" if character in '\\"' else character if character.isprintable() else f"\\U{ord(character):08x}"
        for character in text
    )
    return f'"{"".join(escaped)}"'


def plain(text: str) -> str:
    """A name as it is where YAML takes it for text, or else in quotes."""
    is_word = re.fullmatch(r"(?!(?:true|false|null|yes|no|on|off|[yn])$)[A-Za-z][\w./-]*", text, re.ASCII | re.I)
    return text if is_word else quoted(text)
