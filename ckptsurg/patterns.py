"""Patterns over tensor names: which names does a pattern select, and what was meant when none.

A name is segments joined by ``.`` or ``/``. All names are kept as columns of segment numbers, so that a
pattern is matched against every name at once: one pass over the columns, whose cost is the pattern's
length times the number of segments, never exponential.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import shown

__all__ = ["BoolArray", "IntArray", "Names", "PatternError", "expand_braces"]

BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.int64]

MAX_ALTERNATIVES = 10_000
_SEPARATOR = re.compile(r"[./]")
_BRACES = re.compile(r"\{([^{}]*)\}")
_INTEGER_RANGE = re.compile(r"(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.(-?[0-9]+))?")
_LETTER_RANGE = re.compile(r"([A-Za-z])\.\.([A-Za-z])")
_SLICE_TEXT = r"\[(-?[0-9]{1,9}|(?:-?[0-9]{1,9})?:(?:-?[0-9]{1,9})?(?::(?:-?[0-9]{1,9})?)?)\]"
_SLICED = re.compile(rf"(.*?)((?:{_SLICE_TEXT})+)$")
_CHILD_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")


class PatternError(ValueError):
    """A pattern that cannot be read, or whose slice is out of range."""


# --- Expansion -------------------------------------------------------------------------------------


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
    total, end = 1, 0
    for match in _BRACES.finditer(pattern):
        written_out = _alternatives(match[1])
        literal = pattern[end : match.start()]
        if "{" in literal or "}" in literal:
            break
        parts += [[literal], [match[0]] if written_out is None else written_out]
        total *= len(parts[-1])
        end = match.end()
    if "{" in pattern[end:] or "}" in pattern[end:]:
        raise PatternError("braces that are nested or not closed; write each set side by side: {a,b}.{0..5}")
    if total > MAX_ALTERNATIVES:
        raise PatternError(f"expands to {total:,} alternatives; at most {MAX_ALTERNATIVES:,} are allowed")
    return ["".join(combination) + pattern[end:] for combination in product(*parts)]


@dataclass(frozen=True, slots=True)
class _AnyDepth:
    """``**``: any number of whole segments."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """One segment: literal text, or a glob of ``*`` and ``?``."""

    text: str

    @property
    def is_glob(self) -> bool:
        return "*" in self.text or "?" in self.text


@dataclass(frozen=True, slots=True)
class _Children:
    """``[-2:]``: a slice over the numbered children of the module matched so far."""

    text: str


_Step: TypeAlias = _AnyDepth | _Segment | _Children


def _split(pattern: str) -> list[str]:
    return _SEPARATOR.split(pattern)


@lru_cache(maxsize=4096)
def _parse(pattern: str) -> tuple[_Step, ...]:
    """The steps of a pattern without braces."""
    steps: list[_Step] = []
    for position, text in enumerate(_split(pattern)):
        if text == "**":
            if not steps or not isinstance(steps[-1], _AnyDepth):
                steps.append(_AnyDepth())
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
            steps.append(_Segment(name))
        elif position > 0:
            raise PatternError(f'"{shown(text)}": a slice follows its module directly: layers[-2:], not layers.[-2:]')
        if sliced:
            steps += [_Children(found[0]) for found in re.finditer(_SLICE_TEXT, sliced[2])]
    return tuple(steps)


def _pick(numbers: Sequence[int], text: str, module: str) -> set[int]:
    """The numbers that a slice such as ``[-2:]`` picks of the sorted numbers of a module's children."""
    where = f'"{shown(module)}"' if module else "the model"
    end = numbers[-1] + 1
    children = f"{where} has children {_ranges(numbers)}"
    contiguous = end - numbers[0] == len(numbers)

    def bound(part: str) -> int:
        value = int(part)
        if value < 0 and not contiguous:
            raise PatternError(f"{text} counts from the end, but {children}, with gaps; name them: {{2,5}}")
        return value + end if value < 0 else value

    inside = text[1:-1]
    if ":" not in inside:
        index = bound(inside)
        if index not in numbers:
            raise PatternError(f"{text} is out of range: {children}")
        return {index}
    start_text, stop_text, *step_text = inside.split(":")
    step = int(step_text[0]) if step_text and step_text[0] else 1
    if step == 0:
        raise PatternError(f"{text}: the step of a slice is not zero")
    if step != 1 and not contiguous:
        raise PatternError(f"{text} has a step, but {children}, with gaps; name them: {{2,5}}")
    low, high = (bound(part) if part else None for part in (start_text, stop_text))
    for value in (low, high):
        if value is not None and not 0 <= value <= end:
            raise PatternError(f"{text} is out of range: {children}")
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


# --- Matching --------------------------------------------------------------------------------------


class Names:
    """A fixed set of names that patterns are matched against.

    Args:
        names: The names, each once. Masks and indices of this class follow their order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._index = {name: position for position, name in enumerate(self.names)}
        self._vocabulary: dict[str, int] = {}
        intern = self._vocabulary.setdefault
        rows = [[intern(s, len(self._vocabulary)) for s in _split(name)] for name in self.names]
        # Deepest names first: the names that have a column d are then a prefix of the rows, and the
        # columns together are no larger than the names, however deep a single one is.
        depths = np.fromiter(map(len, rows), np.int64, len(rows))
        self._order = np.argsort(-depths, kind="stable")
        rows = [rows[position] for position in self._order]
        ends = np.searchsorted(-depths[self._order], -np.arange(depths.max(initial=0)), side="left")
        self._columns = [
            np.fromiter((rows[row][depth] for row in range(end)), np.int64, end)
            for depth, end in enumerate(ends.tolist())
        ]
        self._tables: dict[str, BoolArray] = {}

    def __len__(self) -> int:
        return len(self.names)

    def match(self, pattern: str) -> list[tuple[str, BoolArray]]:
        """What each brace alternative of a pattern selects.

        Returns:
            Pairs of the alternative and a mask over the names, shape [len(self)].

        Raises:
            PatternError: if the pattern cannot be read or a slice is out of range.
        """
        if pattern in self._index:
            return [(pattern, self._only(pattern))]
        if pattern.startswith("re:"):
            return [(pattern, self._regex(pattern.removeprefix("re:")))]
        return [
            (alternative, self._only(alternative) if alternative in self._index else self._select(_parse(alternative)))
            for alternative in expand_braces(pattern)
        ]

    def count(self, pattern: str) -> int:
        """How many names a pattern selects; 0 where it cannot be read."""
        try:
            masks = [mask for _, mask in self.match(pattern)]
        except PatternError:
            return 0
        return int(np.logical_or.reduce(masks).sum()) if masks else 0

    def _only(self, name: str) -> BoolArray:
        mask = np.zeros(len(self), np.bool_)
        mask[self._index[name]] = True
        return mask

    def _regex(self, expression: str) -> BoolArray:
        matches = _compile_regex(expression)
        return np.fromiter(map(matches, self.names), np.bool_, len(self))

    def _select(self, steps: Sequence[_Step]) -> BoolArray:
        """The names that the steps match, or that lie below a module which they match."""
        selected = np.zeros(len(self), np.bool_)
        for _, accepted in self._walk(steps):
            selected[: len(accepted)] |= accepted
        mask = np.empty_like(selected)
        mask[self._order] = selected
        return mask

    def _walk(self, steps: Sequence[_Step]) -> Iterator[tuple[int, BoolArray]]:
        """Run the steps over the columns.

        Yields:
            Pairs (depth, mask over the first rows): names whose first ``depth`` segments match all steps.
        """
        last = len(steps)
        if any(isinstance(s, _Segment) and not s.is_glob and s.text not in self._vocabulary for s in steps):
            return
        # states[p]: names of which the segments so far match the first p steps.
        states: list[BoolArray | None] = [None] * (last + 1)
        states[0] = np.ones(len(self), np.bool_)
        for depth in range(len(self._columns) + 1):
            for position, step in enumerate(steps):
                if isinstance(step, _AnyDepth):
                    states[position + 1] = _union(states[position + 1], states[position])
            if (accepted := states[last]) is not None:
                yield depth, accepted
            if depth == len(self._columns):
                return
            column = self._columns[depth]
            following: list[BoolArray | None] = [None] * (last + 1)
            for position, step in enumerate(steps):
                state = states[position]
                if state is None:
                    continue
                state = state[: len(column)]
                if isinstance(step, _AnyDepth):
                    following[position] = _union(following[position], state)
                    continue
                hit = state & self._test(step, depth, state)
                if hit.any():
                    following[position + 1] = _union(following[position + 1], hit)
            states = following
            if not any(state is not None for state in states):
                return

    def _test(self, step: _Segment | _Children, depth: int, state: BoolArray) -> BoolArray:
        column = self._columns[depth]
        if isinstance(step, _Children):
            return self._slice(step.text, depth, state)
        if not step.is_glob:
            return column == self._vocabulary[step.text]
        if step.text == "*":
            return np.ones(len(column), np.bool_)
        return self._glob(step.text)[column]

    def _glob(self, text: str) -> BoolArray:
        """Which segments of the vocabulary a glob matches, shape [len(vocabulary)]."""
        if text not in self._tables:
            parts = (".*" if part == "*" else "." if part == "?" else _escape(part) for part in re.split("([*?])", text))
            matches = _compile_regex("(?s)" + "".join(parts))
            self._tables[text] = np.fromiter(map(matches, self._vocabulary), np.bool_, len(self._vocabulary))
        return self._tables[text]

    @cached_property
    def _numbers(self) -> IntArray:
        """The number of each segment of the vocabulary; -1 where it is none."""
        return np.array([int(s) if _CHILD_NUMBER.fullmatch(s) else -1 for s in self._vocabulary], np.int64)

    @cached_property
    def _modules(self) -> list[IntArray]:
        """For each depth, which names share their first ``depth`` segments: equal numbers do."""
        modules = [np.zeros(len(self), np.int64)]
        for column in self._columns:
            keys = modules[-1][: len(column)] * len(self._vocabulary) + column
            modules.append(np.unique(keys, return_inverse=True)[1])
        return modules

    def _slice(self, text: str, depth: int, state: BoolArray) -> BoolArray:
        numbers = self._numbers[self._columns[depth]]
        hit = np.zeros(len(state), np.bool_)
        rows = np.flatnonzero(state & (numbers >= 0))
        if not rows.size:
            return hit
        rows = rows[np.argsort(self._modules[depth][rows], kind="stable")]
        modules = self._modules[depth][rows]
        for group in np.split(rows, np.flatnonzero(np.diff(modules)) + 1):
            children = numbers[group]
            name = self.names[self._order[group[0]]]
            module = name[: _offset(name, depth)]
            picked = _pick(np.unique(children).tolist(), text, module)
            hit[group] = np.isin(children, list(picked))
        return hit

    # --- Nearest names -----------------------------------------------------------------------------

    def nearest(self, pattern: str, limit: int = 3) -> list[str]:
        """Patterns that do select something and that may have been meant instead of one that does not.

        Args:
            pattern: A pattern without braces.
            limit: How many at most.
        """
        if pattern.startswith("re:"):
            return []
        found = [f"**.{pattern}"] if self.count(f"**.{pattern}") else []
        found += self._braces_for_brackets(pattern)
        try:
            steps = _parse(pattern)
        except PatternError:
            return found[:limit]
        segments = _split(pattern)
        for length in range(len(steps) - 1, -1, -1):
            children = self._children(steps[:length])
            if not children:
                continue
            if len(segments) == len(steps):
                for close in _close(segments[length], children):
                    whole = ".".join([*segments[:length], close, *segments[length + 1 :]])
                    part = ".".join([*segments[:length], close])
                    found += [whole if self.count(whole) else part]
            break
        if not found:
            found += _close(pattern, list(self.names[:5000]))
        return list(dict.fromkeys(found))[:limit]

    def _children(self, steps: Sequence[_Step]) -> list[str]:
        """The segments that follow where the steps match, in the order of the names."""
        try:
            ids = [
                self._columns[depth][accepted[: len(self._columns[depth])]]
                for depth, accepted in self._walk(steps)
                if depth < len(self._columns)
            ]
        except PatternError:
            return []
        wanted = np.unique(np.concatenate(ids)) if ids else np.empty(0, np.int64)
        vocabulary = list(self._vocabulary)
        return [vocabulary[number] for number in wanted.tolist()]

    def _braces_for_brackets(self, pattern: str) -> list[str]:
        """``layer[3:]`` -> ``layer{3..4}``, where the numbers are part of the segment's name."""
        sliced = re.fullmatch(rf"(.*?)([^./\[\]]+)({_SLICE_TEXT})(.*)", pattern)
        if not sliced:
            return []
        stem = sliced[2]
        tails = (s[len(stem) :] for s in self._vocabulary if s.startswith(stem))
        numbers = sorted({int(tail) for tail in tails if _CHILD_NUMBER.fullmatch(tail)})
        try:
            picked = sorted(_pick(numbers, sliced[3], stem)) if numbers else []
        except PatternError:
            return []
        if not picked:
            return []
        contiguous = picked[-1] - picked[0] + 1 == len(picked)
        inside = f"{picked[0]}..{picked[-1]}" if contiguous else ",".join(map(str, picked))
        braces = f"{sliced[1]}{stem}" + (str(picked[0]) if len(picked) == 1 else f"{{{inside}}}") + sliced[5]
        return [braces] if self.count(braces) else []


def _offset(name: str, depth: int) -> int:
    """Where the first ``depth`` segments of a name end."""
    ends = [match.start() for match in _SEPARATOR.finditer(name)]
    return ends[depth - 1] if 0 < depth <= len(ends) else (0 if depth == 0 else len(name))


def _union(one: BoolArray | None, other: BoolArray | None) -> BoolArray | None:
    if one is None or other is None:
        return one if other is None else other
    return one[: len(other)] | other[: len(one)]


def _close(text: str, candidates: Sequence[str]) -> list[str]:
    """Candidates that look like the text, most alike first; letter case does not count."""
    folded: dict[str, str] = {}
    for candidate in candidates[:5000]:
        folded.setdefault(candidate.lower(), candidate)
    return [folded[match] for match in difflib.get_close_matches(text.lower(), folded, n=3, cutoff=0.5)]


def _escape(text: str) -> str:
    import re2

    escaped: str = re2.escape(text)
    return escaped


def _compile_regex(expression: str) -> Callable[[str], bool]:
    """A test of whole strings in RE2, whose time is linear in the string (github.com/google/re2/wiki/Syntax)."""
    import re2

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    try:
        compiled = re2.compile(expression, options)
    except re2.error as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise PatternError(f"not a regular expression that RE2 takes: {shown(reason)}") from None
    return lambda text: compiled.fullmatch(text) is not None
