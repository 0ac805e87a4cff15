"""The syntax of patterns: brace expansion, segments, slices over numbered children."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
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
    "expand_braces",
    "numbered_children",
    "parse",
    "pick",
    "split_name",
]

MAX_ALTERNATIVES = 10_000
#: Of a pattern written out, in characters; of one without braces, in characters and segments.
MAX_WRITTEN_OUT = 10_000_000
MAX_LENGTH = 4096
MAX_SEGMENTS = 256
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


def numbered_children(name: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The numbered children on the way to a tensor, outermost first: what leads to each, and its number."""
    segments = split_name(name)
    for place, segment in enumerate(segments[:-1]):
        if CHILD_NUMBER.fullmatch(segment):
            yield tuple(segments[:place]), segment


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
    by_name = f"name those you mean: {{{','.join(map(str, numbers[-2:]))}}}"

    def children() -> str:
        where = f'"{shown(name)}"' if (name := module()) else "the model"
        return f"{where} has children {_ranges(numbers)}"

    def bound(part: str) -> int:
        value = int(part)
        if value < 0 and not contiguous:
            raise PatternError(f"{text} counts from the end, but {children()}, with gaps; {by_name}")
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
        raise PatternError(f"{text} has a step, but {children()}, with gaps; {by_name}")
    low, high = (bound(part) if part else None for part in (start_text, stop_text))
    for value in (low, high):
        if value is not None and not 0 <= value <= end:
            raise OutOfRange(f"{text} is out of range: {children()}")
    picked = range(end)[slice(low, high, step)]
    return {number for number in numbers if number in picked}


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
