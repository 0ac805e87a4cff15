"""How things are put into words: names that are safe to print, counts, lists."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

__all__ = ["counted", "enumerate_names", "shown"]

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def shown(text: object, limit: int = 200) -> str:
    """Foreign text made safe to print: control and bidirectional characters escaped, a long middle left out."""
    raw = str(text)
    if len(raw) > limit:
        raw = f"{raw[: limit // 2 - 1]}…{raw[-(limit // 2) :]}"
    if raw.isascii() and raw.isprintable():
        return raw
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _INVISIBLE
        else character
        for character in raw
    )


def enumerate_names(names: Iterable[str], limit: int = 5) -> str:
    """``a, b, c and 4 more``, each name made safe to print."""
    listed = list(names)
    text = ", ".join(shown(name) for name in listed[:limit])
    rest = len(listed) - limit
    return f"{text} and {rest} more" if rest > 0 else text


def counted(count: int, thing: str = "tensor") -> str:
    """``1 tensor``, ``2,048 tensors``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"
