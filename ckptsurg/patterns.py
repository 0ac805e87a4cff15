"""The syntax of patterns: brace expansion, segments, slices over numbered children."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import TypeAlias

from .wording import shown

__all__ = [
    "CHILD_NUMBER",
    "SEPARATOR",
    "SLICE_TEXT",
    "AnyDepth",
    "Children",
    "OutOfRange",
    "PatternError",
    "Segment",
    "Step",
    "braced",
    "expand_braces",
    "numbered_children",
    "numbers_below",
    "parse",
    "pick",
    "split_name",
    "unlike_parts",
]

MAX_ALTERNATIVES = 10_000
#: Of a pattern written out, in characters; of one without braces, in characters and segments.
MAX_WRITTEN_OUT = 10_000_000
MAX_LENGTH = 4096
MAX_SEGMENTS = 256
#: Children that a message names one by one.
_MOST_NAMED = 16
SEPARATOR = re.compile(r"[./]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_INTEGER_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.(-?[0-9]+))?")
_LETTER_RANGE = re.compile(r"([A-Za-z])\.\.([A-Za-z])")
SLICE_TEXT = r"\[(-?[0-9]{1,9}|(?:-?[0-9]{1,9})?:(?:-?[0-9]{1,9})?(?::(?:-?[0-9]{1,9})?)?)\]"
_SLICED = re.compile(rf"(.*?)((?:{SLICE_TEXT})+)$")
CHILD_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


class PatternError(ValueError):
    """A pattern that cannot be read, or that does not fit the names."""


class OutOfRange(PatternError):
    """A slice that reaches past the children of a module."""


def _alternatives(inside: str) -> list[str] | None:
    """What stands between two braces, written out; None where a shell would leave it alone."""
    if match := _INTEGER_RANGE.fullmatch(inside):
        if max(map(len, match.groups(""))) > 18:
            raise PatternError(f"{{{shown(inside)}}}: numbers of more than 18 digits")
        first, last = int(match[1]), int(match[2])
        step = abs(int(match[3] or 1)) or 1
        if abs(last - first) // step >= MAX_ALTERNATIVES:
            raise PatternError(f"{{{inside}}} expands to more than {MAX_ALTERNATIVES:,} alternatives")
        padded = any(re.match(r"-?0[0-9]", bound) for bound in (match[1], match[2]))
        width = max(len(match[1]), len(match[2])) if padded else 0
        numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
        return [f"{number:0{width}d}" if padded else str(number) for number in numbers]
    if match := _LETTER_RANGE.fullmatch(inside):
        first, last = ord(match[1]), ord(match[2])
        step = 1 if first <= last else -1
        return [chr(code) for code in range(first, last + step, step)]
    if "," in inside:
        return inside.split(",")
    return None


def expand_braces(pattern: str) -> list[str]:
    """Brace expansion as text, as in the shell: ``layer{1..3}``, ``{q,v}_proj``.

    Raises:
        PatternError: for nested or unbalanced braces and for more than 10,000 alternatives.
    """
    if "{" not in pattern and "}" not in pattern:
        return [pattern]
    parts: list[list[str]] = []
    total, length, end = 1, len(pattern), 0
    for match in _BRACES.finditer(pattern):
        written_out = _alternatives(match[1])
        literal = pattern[end : match.start()]
        if "{" in literal or "}" in literal:
            break
        parts += [[literal], [match[0]] if written_out is None else written_out]
        total *= len(parts[-1])
        length += max(map(len, parts[-1])) - len(match[0])
        if total > MAX_ALTERNATIVES:
            raise PatternError(f"expands to more than {MAX_ALTERNATIVES:,} alternatives")
        end = match.end()
    if "{" in pattern[end:] or "}" in pattern[end:]:
        raise PatternError("braces that are nested or not closed; write each set side by side: {a,b}.{0..5}")
    if total * length > MAX_WRITTEN_OUT:
        raise PatternError(f"expands to {total:,} alternatives of up to {length:,} characters, which is too long")
    return ["".join(combination) + pattern[end:] for combination in product(*parts)]


@dataclass(frozen=True, slots=True)
class AnyDepth:
    """``**``: any number of whole segments."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One segment: literal text, or a glob of ``*`` and ``?``."""

    text: str

    @property
    def is_glob(self) -> bool:
        return "*" in self.text or "?" in self.text


@dataclass(frozen=True, slots=True)
class Children:
    """``[-2:]``: a slice over the numbered children of the module matched so far."""

    text: str


Step: TypeAlias = AnyDepth | Segment | Children


def split_name(pattern: str) -> list[str]:
    return SEPARATOR.split(pattern)


def unlike_parts(old: str, new: str) -> tuple[str, str]:
    """Two names without what they end in alike: a module that is called otherwise is one, whatever is below it."""
    one, other = split_name(old), split_name(new)
    alike = 0
    while alike < min(len(one), len(other)) - 1 and one[-1 - alike] == other[-1 - alike]:
        alike += 1
    tail = sum(len(segment) + 1 for segment in one[len(one) - alike :])
    return (old[:-tail], new[:-tail]) if tail else (old, new)


def numbered_children(name: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The numbered children on the way to a tensor, outermost first: what leads to each, and its number."""
    segments = split_name(name)
    for place, segment in enumerate(segments[:-1]):
        if CHILD_NUMBER.fullmatch(segment):
            yield tuple(segments[:place]), segment


def numbers_below(names: Iterable[str]) -> Mapping[tuple[str, ...], set[str]]:
    """The numbered children on the way to any of these tensors: their numbers, by what leads to them."""
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    known: set[str] = set()  # a module is looked at once, however many tensors are below it
    for name in names:
        end = max(name.rfind("."), name.rfind("/"))
        while end >= 0 and (module := name[:end]) not in known:
            known.add(module)
            end = max(module.rfind("."), module.rfind("/"))
            if CHILD_NUMBER.fullmatch(number := module[end + 1 :]):
                found[tuple(split_name(module[:end])) if end >= 0 else ()].add(number)
    return found


@lru_cache(maxsize=4096)
def parse(pattern: str) -> tuple[Step, ...]:
    """The steps of a pattern without braces."""
    if len(pattern) > MAX_LENGTH or len(SEPARATOR.findall(pattern)) >= MAX_SEGMENTS:
        raise PatternError(f"is longer than {MAX_LENGTH:,} characters or {MAX_SEGMENTS} segments")
    steps: list[Step] = []
    for position, text in enumerate(split_name(pattern)):
        if text == "**":
            if not steps or not isinstance(steps[-1], AnyDepth):
                steps.append(AnyDepth())
            continue
        if "**" in text:
            raise PatternError(f'"**" stands alone between dots: write "**" and "{shown(text.replace("**", "*"))}"')
        sliced = _SLICED.fullmatch(text)
        name = sliced[1] if sliced else text
        if "[" in name or "]" in name:
            raise PatternError(
                f'"{shown(text)}": brackets hold a slice over numbered children, at the end of a segment: layers[-2:]'
            )
        if sliced is None or name:
            steps.append(Segment(name))
        elif position > 0:
            raise PatternError(f'"{shown(text)}": a slice follows its module directly: layers[-2:], not layers.[-2:]')
        if sliced:
            steps += [Children(found[0]) for found in re.finditer(SLICE_TEXT, sliced[2])]
    return tuple(steps)


def pick(numbers: Sequence[int], text: str, module: Callable[[], str]) -> set[int]:
    """The numbers that a slice such as ``[-2:]`` picks of the sorted numbers of a module's children.

    Args:
        numbers: Those of the children.
        text: The slice.
        module: What the module is called, for messages.
    """
    end = numbers[-1] + 1
    contiguous = end - numbers[0] == len(numbers)

    def children() -> str:
        where = f'"{shown(name)}"' if (name := module()) else "the model"
        return f"{where} has children {_ranges(numbers)}"

    def ambiguous(why: str) -> PatternError:
        meant = _by_place(numbers, text)
        path = f"{name}." if (name := module()) else ""
        by_name = f': "{shown(f"{path}{braced(meant)}")}"' if 0 < len(meant) <= _MOST_NAMED else ""
        return PatternError(f"{text} {why}, but {children()}, with gaps; name those you mean{by_name}")

    def bound(part: str) -> int:
        value = int(part)
        if value < 0 and not contiguous:
            raise ambiguous("counts from the end")
        return value + end if value < 0 else value

    inside = text[1:-1]
    if ":" not in inside:
        index = bound(inside)
        if index not in numbers:
            raise OutOfRange(f"{text} is out of range: {children()}")
        return {index}
    start_text, stop_text, *step_text = inside.split(":")
    step = int(step_text[0]) if step_text and step_text[0] else 1
    if step == 0:
        raise PatternError(f"{text}: the step of a slice is not zero")
    if step != 1 and not contiguous:
        raise ambiguous("has a step")
    low, high = (bound(part) if part else None for part in (start_text, stop_text))
    for value in (low, high):
        if value is not None and not 0 <= value <= end:
            raise OutOfRange(f"{text} is out of range: {children()}")
    picked = range(end)[slice(low, high, step)]
    return {number for number in numbers if number in picked}


def _by_place(numbers: Sequence[int], text: str) -> list[int]:
    """What a slice would pick were negative bounds and steps to count the numbers that there are."""
    bounds = [int(part) if part else None for part in text[1:-1].split(":")]
    places = [bisect_left(numbers, one) if one is not None and one >= 0 else one for one in bounds[:2]]
    if len(bounds) == 1:
        return [number for place, number in enumerate(numbers) if place - len(numbers) in places]
    return sorted(numbers[slice(*places, *bounds[2:])])


def braced(numbers: Sequence[int]) -> str:
    """``5``, ``{4..6}`` or ``{0,4,5}`` for a sorted list of numbers, which is not empty."""
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"


def _ranges(numbers: Sequence[int]) -> str:
    """``0..5, 7`` for a sorted list of numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in runs[:6])
    return text + (", …" if len(runs) > 6 else "")
