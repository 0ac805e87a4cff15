"""Changes to JSON that leave it JSON: what is changed in bytes seldom gets past a parser."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any


class Members(list[tuple[str, Any]]):
    """An object of JSON as pairs, for a key may stand twice."""


def parsed(text: str | bytes) -> Any:
    """JSON with its objects as Members; None where it is none."""
    try:
        return json.loads(text, object_pairs_hook=Members)
    except (ValueError, RecursionError):
        return None


def members(value: Any) -> Any:
    """Plain data with its mappings as Members."""
    if isinstance(value, dict):
        return Members((str(key), members(inner)) for key, inner in value.items())
    return [members(inner) for inner in value] if isinstance(value, list) else value


def plain(value: Any) -> Any:
    """Members as mappings; of a key that stands twice the later value."""
    if isinstance(value, Members):
        return {key: plain(inner) for key, inner in value}
    return [plain(inner) for inner in value] if isinstance(value, list) else value


def written(value: Any, rng: random.Random) -> str:
    """JSON in one of its spellings; a surrogate may stand as itself."""
    if isinstance(value, Members):
        return "{" + ",".join([f"{written(key, rng)}:{written(inner, rng)}" for key, inner in value]) + "}"
    if isinstance(value, list):
        return "[" + ",".join([written(inner, rng) for inner in value]) + "]"
    if isinstance(value, str) and value and rng.random() < 0.02:
        return f'"\\u{ord(value[0]) & 0xFFFF:04x}{json.dumps(value[1:])[1:]}'
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def edited(document: Any, rng: random.Random, words: Sequence[str]) -> Any:
    """The document after a few random edits, anywhere in it.

    Args:
        document: As ``parsed`` gives it; it is left as it is.
        rng: The source of chance.
        words: Texts that belong in such a document, and values as JSON.
    """
    root = [deepcopy(document)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _edit(root, rng, words)
    return root[0] if root else None


def _edit(root: list[Any], rng: random.Random, words: Sequence[str]) -> None:
    places = list(_places(root))
    if not places:
        return
    home, at = rng.choice(places)
    value = _get(home, at)
    match rng.randrange(8):
        case 0:
            _set(home, at, _value(rng, words))
        case 1:
            other, there = rng.choice(places)
            _set(home, at, deepcopy(_get(other, there)))
        case 2 if home is not root:
            del home[at]
        case 3 if home is not root:
            home.insert(rng.randrange(len(home) + 1), deepcopy(home[at]))
        case 4 if isinstance(home, Members):
            keys = [key for key, _ in home] + list(words)
            home[at] = (_changed(home[at][0], rng) if rng.random() < 0.3 else rng.choice(keys), value)
        case 5 if isinstance(value, Members):
            value.append((rng.choice(words), _value(rng, words)))
        case 5 if isinstance(value, list):
            value.append(_value(rng, words))
        case 6:
            _set(home, at, [value] if rng.random() < 0.5 else Members([(rng.choice(words), value)]))
        case _:
            _set(home, at, _changed(value, rng))


def _places(home: list[Any]) -> list[tuple[list[Any], int]]:
    found, waiting = [], [home]
    while waiting:
        here = waiting.pop()
        for at in range(len(here)):
            found.append((here, at))
            value = _get(here, at)
            if isinstance(value, list):
                waiting.append(value)
    return found


def _get(home: list[Any], at: int) -> Any:
    return home[at][1] if isinstance(home, Members) else home[at]


def _set(home: list[Any], at: int, value: Any) -> None:
    home[at] = (home[at][0], value) if isinstance(home, Members) else value


def _value(rng: random.Random, words: Sequence[str]) -> Any:
    word = rng.choice(words)
    value = parsed(word)
    return word if value is None and word != "null" else value


_NUMBERS = (-1, 0, 1, 2, 3, 63, 64, 65, 255, 2**31, 2**53, 2**62, 2**63, 2**64 - 1, 2**64, 10**99, 0.5, 1e300, -0.0)
_CHARACTERS = 'a0.*/!:[]{}-_ \\"\x00\x1b\n\u0085\u202e\ufeff\ud800\udc00é🙂'


def _changed(value: Any, rng: random.Random) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, rng.choice(_NUMBERS)))
    if isinstance(value, str):
        start = rng.randrange(len(value) + 1)
        stop = min(len(value), start + rng.randrange(4))
        return value[:start] + rng.choice(("", rng.choice(_CHARACTERS), value[start:stop] * 2)) + value[stop:]
    if isinstance(value, Members):
        return Members(rng.sample(value, len(value)))
    if isinstance(value, list):
        return rng.sample(value, len(value))
    return rng.choice(_NUMBERS)
