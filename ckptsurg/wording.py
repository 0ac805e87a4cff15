"""How things are put into words: names that are safe to print, counts, lists, near misses."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence

__all__ = ["closest", "counted", "encodable", "enumerate_names", "on_ranks", "quoted", "shown", "size"]

#: Of words that are compared, in characters: the time grows with the product of two lengths.
_LONGEST_SLIP = 200

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


def quoted(value: object, limit: int = 60) -> str:
    """A value as JSON has it, made safe to print: text is told from a number. Of a long list, its beginning."""
    if isinstance(value, str):
        return shown(json.dumps(value, ensure_ascii=False), limit)
    text = ""
    for part in json.JSONEncoder(ensure_ascii=False, default=str).iterencode(value):
        text += part
        if len(text) > limit:
            return shown(f"{text[: limit - 1]}…")
    return shown(text)


def enumerate_names(names: Iterable[str], limit: int = 5) -> str:
    """``a, b, c and 4 more``, each name made safe to print."""
    listed = list(names)
    text = ", ".join(shown(name) for name in listed[:limit])
    rest = len(listed) - limit
    return f"{text} and {rest} more" if rest > 0 else text


def on_ranks(name: str, ranks: Sequence[int]) -> str:
    """``layers.3.weight (rank 5)``, the name made safe to print; without ranks the name alone."""
    if not ranks:
        return shown(name)
    return f"{shown(name)} (rank{'' if len(ranks) == 1 else 's'} {enumerate_names(map(str, ranks))})"


def encodable(name: str) -> str:
    """A file's name as a document can hold it: what is not UTF-8 in it is escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def counted(count: int, thing: str = "tensor") -> str:
    """``1 tensor``, ``2,048 tensors``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def size(count: float) -> str:
    """``102.5 MB``, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def closest(word: str, known: Iterable[str], limit: int = 3, cutoff: float = 0.5) -> list[str]:
    """What looks like a word, most alike first.

    Args:
        word: What was written.
        known: What may have been meant.
        limit: How many at most.
        cutoff: The least likeness, from 0 to 1.
    """
    from difflib import get_close_matches  # here, for most runs have no slip to explain

    if len(word) > _LONGEST_SLIP:
        return []
    return get_close_matches(word, [one for one in known if len(one) <= _LONGEST_SLIP], limit, cutoff)
