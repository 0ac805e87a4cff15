"""Patterns over names, against the naive matcher of the oracle: the first line of an input is a pattern, each other
line a name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import re2

from ckptsurg.matching import Names
from ckptsurg.patterns import PatternError

from ..oracle import Wrong, expand, select_one
from .checking import WRITTEN_OUT, Target, attempt, require

#: What a pattern selects from where an input has no names.
NAMES = (
    "stem.weight",
    "layers.0.a.w",
    "layers.1.a.w",
    "layers.10.b/w",
    "layers.2",
    "head.x",
    "head.x.y",
    "a/b.c",
    "1.2",
)
#: The oracle tries name by name and every depth for each `**`, so it is asked of what is small.
MOST_COMPARED, MOST_STARS, LONGEST_NAME, MOST_TRIES = 20, 6, 100, 3000


def names_and_pattern(data: bytes) -> tuple[Sequence[str], str]:
    pattern, *names = data.decode("utf-8", "replace").split("\n")
    # A line feed is written \n, for a name may have one.
    return tuple(dict.fromkeys(name.replace("\\n", "\n") for name in names)) or NAMES, pattern


def holds(data: bytes) -> None:
    names, pattern = names_and_pattern(data)

    def match() -> list[tuple[str, list[str]]]:
        return Names(names).match(pattern)

    def explain() -> list[str]:
        matcher = Names(names)
        return [line for one in idle for line in (*matcher.nearest(one), *matcher.choices(one))]

    found = attempt(match, data, PatternError, WRITTEN_OUT)
    idle = [alternative for alternative, selected in found or () if not selected][:3]
    attempt(explain, data, PatternError, WRITTEN_OUT)
    check_braces(pattern, names, None if found is None else [alternative for alternative, _ in found], data)
    for alternative, selected in (found or ())[:MOST_COMPARED]:
        require(len(set(selected)) == len(selected), data, f"{alternative} selects twice: {selected}")
        expected = select(alternative, names)
        if expected is not None:
            require(set(selected) == expected, data, f"{alternative} selects {selected}, not {sorted(expected)}")


def check_braces(pattern: str, names: Sequence[str], found: list[str] | None, data: bytes) -> None:
    """Ranges the oracle has fewer kinds of."""
    if pattern in names or pattern.startswith("re:") or ".." in pattern or pattern.count(",") > 10:
        return
    try:
        expected = expand(pattern)
    except Wrong:
        require(found is None, data, f"braces that are open or nested: {found}")
    else:
        require(found in (None, expected), data, f"braces: {found}, not {expected}")


def select(pattern: str, names: Sequence[str]) -> set[str] | None:
    """What a pattern without braces selects; None where that is too much to find out naively."""
    if pattern.startswith("re:") and pattern not in names:
        options = re2.Options()
        options.log_errors = False
        expression = re2.compile(pattern[3:], options)
        return {name for name in names if expression.fullmatch(name)}
    deepest = max(len(re.split("[./]", name)) for name in names)
    if len(names) * (deepest + 1) ** pattern.count("**") > MOST_TRIES or pattern.count("*") > MOST_STARS:
        return None
    if max(map(len, names)) > LONGEST_NAME or any(
        re.search("[0-9]{6}|[^\x00-\x7f]", text) for text in (pattern, *names)
    ):
        return None  # the oracle counts from 0; a child's number has at most nine digits, and they are ASCII
    try:
        return select_one(pattern, list(names))
    except Wrong as refused:
        return {f"an error: {refused}"}


WORDS = (
    *("**", "*", "?", "[0]", "[-1]", "[1:]", "[::2]", "[:-1]", "[0:3:-1]", "{a,b}", "{0..3}"),
    *("{0..999}", "{09..1..2}", "{a..c}"),
    *("re:", "..", "/", "\n", "a.b", "a/b", "layers", ".0", ".10", "\\n", "!", "__metadata__"),
    *("\\A", "\\z", "\\C", "(?i)", "(?s:", "$", "^", "\\b", "|", "[^a]", "(", "){2}", "\\Q", "\\E"),
    *("(?:", "(?P<a>", "\\pL"),
)
SEEDS = (
    *("a.*\na.b\na/b\na.b.c\n\n.", "**.x\na.x\nx\nb/x.y", "l[0:2].w\nl.0.w\nl.1.w\nl.2.w", "{a,b}{0..3}\na0\nb3.w"),
    *("re:a.*\nab\nb\na\\nb", "**\na\n.b\n..", "*.**.?\na.b.c\n/", "l[-1][0]\nl.0.0\nl.0.1\nl.1.0", "layers[1:].**"),
    *("re:[a-z]+.(0|1).*", "re:(?i)^LAYERS\\b.*$", "layers.{0..10..5}", "{stem,head}.*", "layers[-1]"),
    *("laers.0", "a.b"),
)
TARGET = Target([seed.encode() for seed in SEEDS], WORDS, holds)
