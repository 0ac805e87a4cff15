"""What the tensors of an output are called: numbered blocks close gaps, modules get other names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from ..matching import Names, escape_regex, regex_options
from ..patterns import (
    CHILD_NUMBER,
    AnyDepth,
    Children,
    PatternError,
    Segment,
    Step,
    expand_braces,
    numbered_children,
    numbers_below,
    parse,
    split_name,
)
from ..wording import enumerate_names, quoted, shown

__all__ = ["Template", "renumbered"]


# --- Renumbering --------------------------------------------------------------------------------------


def renumbered(left: Sequence[str], dropped: Iterable[str]) -> dict[str, str]:
    """New names of tensors that are left, where numbered blocks are gone.

    Args:
        left: The names that are left.
        dropped: The names that are gone, each as a part of a block of which nothing is left.

    Returns:
        The new name of each whose name is another.

    Raises:
        PatternError: if a name that is gone is no part of such a block, or the numbers had gaps before.
    """
    whole = numbers_below(left)
    gone: dict[tuple[str, ...], set[str]] = defaultdict(set)
    strays = []
    for name in dropped:
        block = next((block for block in numbered_children(name) if block[1] not in whole.get(block[0], ())), None)
        if block is None:
            strays.append(name)
        else:
            gone[block[0]].add(block[1])
    if strays:
        raise PatternError(f"renumber: {enumerate_names(strays, 3)}: no part of a numbered block that goes as a whole")
    numbers: dict[tuple[str, ...], dict[str, str]] = {}
    for above, children in gone.items():
        kept = sorted(map(int, whole.get(above, ())))
        before = sorted([*kept, *map(int, children)])
        if before[-1] - before[0] + 1 != len(before):
            module = shown(".".join(above))
            raise PatternError(
                f"renumber: the numbers of {module} have gaps in the base; say by `rename` what they become"
            )
        numbers[above] = {str(number): str(before[0] + place) for place, number in enumerate(kept)}
    called = {name: "".join(_with_numbers(name, numbers)) for name in left}
    return {name: new for name, new in called.items() if new != name}


def _with_numbers(name: str, numbers: Mapping[tuple[str, ...], Mapping[str, str]]) -> Iterator[str]:
    parts = re.split("([./])", name)
    above: tuple[str, ...] = ()
    for part in parts:
        if part in (".", "/"):
            yield part
            continue
        yield numbers.get(above, {}).get(part, part)
        above = (*above, part)


# --- Renaming ------------------------------------------------------------------------------------------

_WILDCARD = re.compile(r"\*\*|[*?]")
_GROUP = re.compile(r"\\([1-9])")


class Template:
    """How the names that a pattern selects become others: ``h.*.attn`` becomes ``layers.*.self_attn``.

    Args:
        pattern: The pattern.
        to: What its names become.
        names: The names that it speaks of.

    Raises:
        PatternError: if the wildcards of the two do not stand for one another.
    """

    def __init__(self, pattern: str, to: str, names: Names) -> None:
        whole = pattern in names or pattern.startswith("re:")
        ones = [pattern] if whole else expand_braces(pattern)
        others = [to] if whole else expand_braces(to)
        others *= len(ones) if len(others) == 1 else 1
        if len(others) != len(ones):
            raise PatternError(f"has {len(ones):,} alternatives, and {quoted(to)} has {len(others):,}")
        self._to = dict(zip(ones, others, strict=True))
        for one in ones:
            _check(one, self._to[one], is_name=one in names)
        self._names = names

    def applied(self, alternative: str, name: str, now: str) -> str:
        """The new name of a tensor.

        Args:
            alternative: The brace alternative of the pattern that selects it.
            name: What the base calls it.
            now: What it is called once blocks are renumbered.

        Raises:
            PatternError: if that cannot be told.
        """
        to = self._to[alternative]
        if alternative in self._names:
            return to
        if alternative.startswith("re:"):
            groups = _groups(alternative.removeprefix("re:"), name)
            return _GROUP.sub(lambda found: groups[int(found[1]) - 1], to)
        segments, parts = split_name(name), re.split("([./])", now)
        aligned = _aligned(parse(alternative), segments)
        if aligned is None:
            raise PatternError(f"selects {shown(name)} by where it stands in the model; rename it by its name")
        found = iter(
            [text for step, start, stop in aligned for text in _captured(step, parts[2 * start : 2 * stop - 1])]
        )
        end = aligned[-1][2]
        return _filled(to, found) + "".join(parts[max(2 * end - 1, 0) :])


def _check(pattern: str, to: str, *, is_name: bool) -> None:
    if pattern.startswith("re:"):
        count = _grouped(pattern.removeprefix("re:")).groups
        if any(int(group) > count for group in _GROUP.findall(to)):
            raise PatternError(f"has {count} groups, and {quoted(to)} asks for more")
        return
    steps = () if is_name else parse(pattern)
    wildcards = [kind for step in steps for kind in _wildcards(step)]
    others = [] if is_name else _WILDCARD.findall(to)
    if [kind == "**" for kind in wildcards] != [kind == "**" for kind in others]:
        have, want = " ".join(wildcards) or "none", " ".join(others) or "none"
        raise PatternError(f"has these wildcards: {have}; {quoted(to)} has: {want}; they stand for one another")


def _wildcards(step: Step) -> list[str]:
    if isinstance(step, AnyDepth):
        return ["**"]
    return ["*"] if isinstance(step, Children) else _WILDCARD.findall(step.text)


def _aligned(steps: Sequence[Step], segments: Sequence[str]) -> list[tuple[Step, int, int]] | None:
    """Which segments each step of a pattern takes, from the first on; ``**`` as many as it can. None if they do not."""

    @cache
    def from_here(step: int, segment: int) -> int | None:
        """Where the segments of a step end."""
        if step == len(steps):
            return segment
        stops = range(len(segments), segment - 1, -1) if isinstance(steps[step], AnyDepth) else [segment + 1]
        if not isinstance(steps[step], AnyDepth) and not (
            segment < len(segments) and _takes(steps[step], segments[segment])
        ):
            return None
        return next((stop for stop in stops if from_here(step + 1, stop) is not None), None)

    taken: list[tuple[Step, int, int]] = []
    position = 0
    for number, step in enumerate(steps):
        stop = from_here(number, position)
        if stop is None:
            return None
        taken.append((step, position, stop))
        position = stop
    return taken


def _takes(step: Step, segment: str) -> bool:
    if isinstance(step, Segment):
        return step.text == segment or (step.is_glob and _grouped(_expression(step)).fullmatch(segment) is not None)
    return CHILD_NUMBER.fullmatch(segment) is not None


def _captured(step: Step, parts: Sequence[str]) -> Iterable[str]:
    """What the wildcards of a step stand for, of the segments that it takes, with the separators between them."""
    text = "".join(parts)
    if not isinstance(step, Segment):
        return [text]
    return _groups(_expression(step), text) if step.is_glob else []


def _filled(to: str, found: Iterator[str]) -> str:
    """A new name with what was found in the place of its wildcards; of ``**`` that is nothing, no separator is left."""
    name = ""
    separator = ""
    for part in re.split("([./])", to):
        if part in (".", "/"):
            separator = part
            continue
        text = _WILDCARD.sub(lambda _: next(found), part)
        if text or part != "**":
            name += (separator if name else "") + text
    return name


def _expression(segment: Segment) -> str:
    parts = re.split("([*?])", segment.text)
    return "(?s)" + "".join({"*": "(.*)", "?": "(.)"}.get(part) or escape_regex(part) for part in parts)


@cache
def _grouped(expression: str) -> Any:
    """A regular expression whose groups are asked for."""
    import re2

    try:
        return re2.compile(expression, regex_options(groups=True))
    except re2.error:
        raise PatternError("not a regular expression that RE2 takes") from None


def _groups(expression: str, text: str) -> Sequence[str]:
    found = _grouped(expression).fullmatch(text)
    if found is None:
        raise PatternError(f"names a part of a number, {shown(text)}, that is another one once blocks are renumbered")
    return [group or "" for group in found.groups()]
