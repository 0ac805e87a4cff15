"""Patterns against names: which names does a pattern select, and what was meant when it selects none.

A name is segments joined by ``.`` or ``/``. All names are kept as columns of segment numbers, so that a
pattern is matched against every name at once: one pass over the columns, whose cost is the pattern's
length times the number of segments, never exponential.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, count, pairwise
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .layers import Layer, LayerPaths
from .patterns import (
    CHILD_NUMBER,
    SEPARATOR,
    SLICE_TEXT,
    AnyDepth,
    Children,
    PatternError,
    Segment,
    Step,
    expand_braces,
    parse,
    pick,
    split_name,
)
from .wording import closest, shown

__all__ = ["BoolArray", "IntArray", "Names"]

BoolArray: TypeAlias = NDArray[np.bool_]
IntArray: TypeAlias = NDArray[np.int64]


class Names:
    """A fixed set of names that patterns are matched against.

    Args:
        names: The names, each once. Masks and indices of this class follow their order.
        layers: The layers of the model, where their order is known: a pattern that selects nothing by name is tried on
            where the tensors stand in the model.
        children: How many numbered children a module has, by its name, where some have no tensors.
    """

    def __init__(
        self, names: Sequence[str], layers: Sequence[Layer] = (), children: Mapping[str, int] | None = None
    ) -> None:
        self.names = tuple(names)
        self._children_of = children or {}
        self._layers = layers
        self._index = {name: position for position, name in enumerate(self.names)}
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        dotted = [name.replace("/", ".") for name in self.names]
        segments = chain.from_iterable(name.split(".") for name in dotted)
        numbered = np.fromiter(map(numbers.__getitem__, segments), np.int64)
        self._vocabulary = dict(numbers)
        # Deepest names first: the names that have a column d are then a prefix of the rows, and the
        # columns together are no larger than the names, however deep a single one is.
        depths = np.fromiter((name.count(".") + 1 for name in dotted), np.int64, len(dotted))
        self._order = np.argsort(-depths, kind="stable")
        firsts = (np.cumsum(depths) - depths)[self._order]
        ends = np.searchsorted(-depths[self._order], -np.arange(depths.max(initial=0)), side="left")
        self._columns: list[IntArray] = [numbered[firsts[:end] + depth] for depth, end in enumerate(ends.tolist())]
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
        # Braces of a regular expression, or of a name, are its own.
        whole = pattern in self._index or pattern.startswith("re:")
        return [(one, self._alternative(one)) for one in ([pattern] if whole else expand_braces(pattern))]

    def _alternative(self, pattern: str) -> BoolArray:
        if pattern in self._index:
            return self._only(pattern)
        if pattern.startswith("re:"):
            return self._regex(pattern.removeprefix("re:"))
        steps = parse(pattern)
        selected = self._select(steps)
        if not self._layers or not _is_a_path(steps):
            return selected
        if not selected.any():
            return self._select_by_path(steps)
        if _slices_layers(steps) and not np.array_equal(selected, self._select_by_path(steps)):
            raise PatternError("a layer is called layers, and the model has layers in an order; name those you mean")
        return selected

    def _select_by_path(self, steps: Sequence[Step]) -> BoolArray:
        """The names of tensors that stand where the steps lead."""
        paths, owners = self._paths
        mask = np.zeros(len(self), np.bool_)
        mask[owners[paths._select(steps)]] = True
        return mask

    @cached_property
    def _paths(self) -> tuple[Names, IntArray]:
        """Where tensors stand in the model, and whose path each is, shape [paths]."""
        paths = LayerPaths(self._layers)
        known = [(path, self._index[name]) for path, name in paths.tensors if name in self._index]
        owners = np.fromiter((owner for _, owner in known), np.int64, len(known))
        return Names([path for path, _ in known], children=paths.children), owners

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
        if not self.names or self._lines is None or _SEES_LINES.search(expression):
            return np.fromiter(map(matches, self.names), np.bool_, len(self))
        # All names at once, a line each: most of a single match is the way in and out of the library.
        text, starts = self._lines
        mask = np.zeros(len(self), np.bool_)
        mask[np.searchsorted(starts, _matching_lines(expression, text))] = True
        return mask

    @cached_property
    def _lines(self) -> tuple[str, IntArray] | None:
        """The names as lines and where each begins; None if a name has a line feed in it."""
        if any("\n" in name for name in self.names):
            return None
        lengths = np.fromiter(map(len, self.names), np.int64, len(self)) + 1
        return "\n".join(self.names), np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)

    def _select(self, steps: Sequence[Step]) -> BoolArray:
        """The names that the steps match, or that lie below a module which they match."""
        selected = np.zeros(len(self), np.bool_)
        for _, accepted in self._walk(steps):
            selected[: len(accepted)] |= accepted
        mask = np.empty_like(selected)
        mask[self._order] = selected
        return mask

    def _walk(self, steps: Sequence[Step]) -> Iterator[tuple[int, BoolArray]]:
        """Run the steps over the columns.

        Yields:
            Pairs (depth, mask over the first rows): names whose first ``depth`` segments match all steps.
        """
        last = len(steps)
        if any(isinstance(s, Segment) and not s.is_glob and s.text not in self._vocabulary for s in steps):
            return
        # states[p]: names of which the segments so far match the first p steps.
        states: list[BoolArray | None] = [None] * (last + 1)
        states[0] = np.ones(len(self), np.bool_)
        for depth in range(len(self._columns) + 1):
            for position, step in enumerate(steps):
                if isinstance(step, AnyDepth):
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
                if isinstance(step, AnyDepth):
                    following[position] = _union(following[position], state)
                    continue
                hit = state & self._test(step, depth, state)
                if hit.any():
                    following[position + 1] = _union(following[position + 1], hit)
            states = following
            if not any(state is not None for state in states):
                return

    def _test(self, step: Segment | Children, depth: int, state: BoolArray) -> BoolArray:
        column = self._columns[depth]
        if isinstance(step, Children):
            return self._slice(step.text, depth, state)
        if not step.is_glob:
            return np.asarray(column == self._vocabulary[step.text])
        if step.text == "*":
            return np.ones(len(column), np.bool_)
        return self._glob(step.text)[column]

    def _glob(self, text: str) -> BoolArray:
        """Which segments of the vocabulary a glob matches, shape [len(vocabulary)]."""
        if text not in self._tables:
            parts = (
                ".*" if part == "*" else "." if part == "?" else _escape(part) for part in re.split("([*?])", text)
            )
            matches = _compile_regex("(?s)" + "".join(parts))
            self._tables[text] = np.fromiter(map(matches, self._vocabulary), np.bool_, len(self._vocabulary))
        return self._tables[text]

    @cached_property
    def _numbers(self) -> IntArray:
        """The number of each segment of the vocabulary; -1 where it is none."""
        return np.array([int(s) if CHILD_NUMBER.fullmatch(s) else -1 for s in self._vocabulary], np.int64)

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
            there = self._children_of.get(module)
            picked = pick(np.unique(children).tolist() if there is None else range(there), text, module)
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
            steps = parse(pattern)
        except PatternError:
            return found[:limit]
        segments = split_name(pattern)
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
        else:
            length = 0
        if not found and length == 0:  # further in, what there is at that place says more
            found += _close(pattern, list(self.names[:5000]))
        return list(dict.fromkeys(found))[:limit]

    def choices(self, pattern: str, limit: int = 6) -> list[str]:
        """What stands where a pattern stops to match: the segments that it could go on with."""
        try:
            steps = parse(pattern)
        except PatternError:
            return []
        for length in range(len(steps) - 1, -1, -1):
            if children := self._children(steps[:length]):
                return children[:limit] + (["…"] if len(children) > limit else [])
        return []

    def _children(self, steps: Sequence[Step]) -> list[str]:
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
        sliced = re.fullmatch(rf"(.*?)([^./\[\]]+)({SLICE_TEXT})(.*)", pattern)
        if not sliced:
            return []
        stem = sliced[2]
        tails = (s[len(stem) :] for s in self._vocabulary if s.startswith(stem))
        numbers = sorted({int(tail) for tail in tails if CHILD_NUMBER.fullmatch(tail)})
        try:
            picked = sorted(pick(numbers, sliced[3], stem)) if numbers else []
        except PatternError:
            return []
        if not picked:
            return []
        contiguous = picked[-1] - picked[0] + 1 == len(picked)
        inside = f"{picked[0]}..{picked[-1]}" if contiguous else ",".join(map(str, picked))
        braces = f"{sliced[1]}{stem}" + (str(picked[0]) if len(picked) == 1 else f"{{{inside}}}") + sliced[5]
        return [braces] if self.count(braces) else []


def _is_a_path(steps: Sequence[Step]) -> bool:
    """Whether steps speak of a model's layers by their order, or name a model: ``base.layers[:-5]``, ``base``."""
    return _slices_layers(steps) or all(isinstance(step, Segment) and not step.is_glob for step in steps)


def _slices_layers(steps: Sequence[Step]) -> bool:
    return any(
        isinstance(step, Segment) and step.text == "layers" and isinstance(following, Children)
        for step, following in pairwise(steps)
    )


def _offset(name: str, depth: int) -> int:
    """Where the first ``depth`` segments of a name end."""
    ends = [match.start() for match in SEPARATOR.finditer(name)]
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
    return [folded[match] for match in closest(text.lower(), folded)]


def _escape(text: str) -> str:
    import re2

    escaped: str = re2.escape(text)
    return escaped


#: Syntax by which an expression could tell one text from a line of many: \\A, \\z, \\C, \\Q, and groups that set flags.
_SEES_LINES = re.compile(r"\\[AzZCQ]|\(\?(?!:|P?<)")


def _options(*, lines: bool = False) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.never_capture = True
    options.never_nl = lines
    return options


def _matching_lines(expression: str, text: str) -> list[int]:
    """Where the lines begin that an expression matches as a whole."""
    import re2

    compiled = re2.compile(f"(?m)^(?:{expression})$", _options(lines=True))
    return [match.start() for match in compiled.finditer(text)]


def _compile_regex(expression: str) -> Callable[[str], bool]:
    """A test of whole strings in RE2, whose time is linear in the string (github.com/google/re2/wiki/Syntax)."""
    import re2

    try:
        compiled = re2.compile(expression, _options())
    except re2.error as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise PatternError(f"not a regular expression that RE2 takes: {shown(reason)}") from None
    return lambda text: compiled.fullmatch(text) is not None
