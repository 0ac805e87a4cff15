"""Patterns against names: which names does a pattern select, and what was meant when it selects none.

A name is segments joined by ``.`` or ``/``, so names are a tree. The steps of a pattern lead from its root to some
nodes: each step is taken from all nodes at once that the steps before it lead to, so that the cost is at most the
pattern's length times the number of nodes, never exponential.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cache, cached_property
from itertools import islice, pairwise
from typing import Any

from .layers import Layer, LayerPaths
from .patterns import (
    CHILD_NUMBER,
    SLICE_TEXT,
    AnyDepth,
    Children,
    PatternError,
    Segment,
    Step,
    braced,
    expand_braces,
    parse,
    pick,
    split_name,
)
from .trees import Module, Tree
from .wording import closest, shown

__all__ = ["Names", "escape_regex", "regex_options"]

#: From how many modules a step may be taken by all patterns together: so often, and so much oftener for each name. One
#: ``**`` takes a step from every module. Some ten million are taken in a few seconds.
_STEPS = 10_000_000
_STEPS_PER_NAME = 2_000
#: What an alternative costs besides, and a glob that is compiled.
_STEPS_PER_ALTERNATIVE = 50
#: That are kept compiled, at some 3 kB each.
_MOST_GLOBS = 256


class Names:
    """A fixed set of names that patterns are matched against.

    Args:
        names: The names, each once.
        layers: The layers of the model, where their order is known: a pattern that selects nothing by name is tried on
            where the tensors stand in the model.
        children: How many numbered children a module has, by its name, where some have no tensors.
        among: More names, of which these are some: slices count the children of all.
    """

    def __init__(
        self,
        names: Iterable[str],
        layers: Sequence[Layer] = (),
        children: Mapping[str, int] | None = None,
        among: Names | None = None,
    ) -> None:
        self._names = dict.fromkeys(names)
        self._children_of = children or {}
        self._among = among
        self._layers = layers
        self._globs: dict[str, Callable[[str], bool]] = {}
        self._steps_left = _STEPS + _STEPS_PER_NAME * len(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def in_order(self, some: Collection[str]) -> list[str]:
        """Those of the names that are among some, in their order."""
        return [name for name in self._names if name in some]

    def part(self, some: Iterable[str]) -> Names:
        """Some of the names; slices go on counting the children of all of them."""
        return Names(some, self._layers, among=self)

    def match(self, pattern: str) -> list[tuple[str, list[str]]]:
        """What each brace alternative of a pattern selects.

        Returns:
            Pairs of the alternative and the names that it selects, each once.

        Raises:
            PatternError: if the pattern cannot be read or a slice is out of range.
        """
        # Braces of a regular expression, or of a name, are its own.
        whole = pattern in self._names or pattern.startswith("re:")
        return [(one, self._alternative(one)) for one in ([pattern] if whole else expand_braces(pattern))]

    def _spend(self, steps: int) -> None:
        """Short patterns can be made to take long: many alternatives, each looked for in every module."""
        self._steps_left -= steps
        if self._steps_left < 0:
            raise PatternError(
                "is one too many for these names: with those before it, it takes too long; make it narrower"
            )

    def _alternative(self, pattern: str) -> list[str]:
        self._spend(_STEPS_PER_ALTERNATIVE)
        if pattern in self._names:
            return [pattern]
        if pattern.startswith("re:"):
            return self._regex(pattern.removeprefix("re:"))
        steps = parse(pattern)
        selected = self._select(steps)
        if not self._layers or not _is_a_path(steps):
            return selected
        if not selected:
            return self._select_by_path(steps)
        if _slices_layers(steps) and set(selected) != set(self._select_by_path(steps)):
            raise PatternError("a layer is called layers, and the model has layers in an order; name those you mean")
        return selected

    def _select_by_path(self, steps: Sequence[Step]) -> list[str]:
        """The names of tensors that stand where the steps lead."""
        paths, owners = self._paths
        return list(dict.fromkeys(name for path in paths._select(steps) for name in owners[path]))

    @cached_property
    def _paths(self) -> tuple[Names, Mapping[str, Sequence[str]]]:
        """Where tensors stand in the model, and the names of those that stand at each path."""
        paths = LayerPaths(self._layers)
        owners: dict[str, list[str]] = defaultdict(list)
        for path, name in paths.tensors:
            if name in self._names:
                owners[path].append(name)
        return Names(owners, children=paths.children), owners

    def count(self, pattern: str) -> int:
        """How many names a pattern selects; 0 where it cannot be read."""
        try:
            return len({name for _, selected in self.match(pattern) for name in selected})
        except PatternError:
            return 0

    def _regex(self, expression: str) -> list[str]:
        matches = _compile_regex(expression)
        if not self._names or self._lines is None or _SEES_LINES.search(expression):
            return [name for name in self._names if matches(name)]
        # All names at once, a line each: most of a single match is the way in and out of the library.
        return _matching_lines(expression, self._lines)

    @cached_property
    def _lines(self) -> str | None:
        """The names as lines; None if a name has a line feed in it."""
        return None if any("\n" in name for name in self._names) else "\n".join(self._names)

    @cached_property
    def _tree(self) -> Tree:
        return Tree(self._names)

    def _select(self, steps: Sequence[Step]) -> list[str]:
        """The names that the steps lead to, or that lie below a module which they lead to."""
        modules, names = self._walk(steps[:-1] if isinstance(steps[-1], AnyDepth) else steps)
        below = self._tree.names_below(modules)
        return list(dict.fromkeys(below + names)) if below and names else below or names

    def _walk(self, steps: Sequence[Step]) -> tuple[list[Module], list[str]]:
        """The modules, each once, and the names of tensors that the steps lead to."""
        modules, names = [self._tree.root], list[str]()
        for step in steps:
            self._spend(len(modules))
            if isinstance(step, AnyDepth):
                names += self._tree.names_below(modules)
                modules = self._tree.modules_below(modules)
            elif isinstance(step, Segment) and not step.is_glob:
                key = step.text
                names = [name for module in modules if key in module.tensors for name in module.tensors[key]]
                modules = [module.modules[key] for module in modules if key in module.modules]
            else:
                self._spend(sum(len(module.modules) + len(module.tensors) for module in modules))
                tested = [(module, self._test(step, module)) for module in modules]
                names = [
                    n for module, fits in tested for key, some in module.tensors.items() if fits(key) for n in some
                ]
                modules = [one for module, fits in tested for key, one in module.modules.items() if fits(key)]
            if not modules and not names:
                break
        return modules, names

    def _test(self, step: Segment | Children, module: Module) -> Callable[[str], bool]:
        """Which segments a step takes from a module."""
        if isinstance(step, Segment):
            return self._glob(step.text)
        numbers = _numbers_in(module)
        if not numbers:
            return frozenset[str]().__contains__
        if self._among is not None:
            numbers = _numbers_in(self._counterparts[module])
        there = self._children_of.get(self._tree.path(module)) if self._children_of else None
        children = sorted(numbers) if there is None else range(there)
        picked = pick(children, step.text, lambda: self._tree.path(module))
        return frozenset(map(str, picked)).__contains__

    @cached_property
    def _counterparts(self) -> Mapping[Module, Module]:
        """For each module that of all names, of which these are some."""
        assert self._among is not None
        pending, found = [(self._tree.root, self._among._tree.root)], {}
        while pending:
            module, other = pending.pop()
            found[module] = other
            pending += [(one, other.modules[key]) for key, one in module.modules.items()]
        return found

    def _glob(self, text: str) -> Callable[[str], bool]:
        """A test of segments, of which many are alike."""
        if text not in self._globs:
            self._spend(_STEPS_PER_ALTERNATIVE)
            if len(self._globs) >= _MOST_GLOBS:
                self._globs.clear()
            parts = (
                ".*" if part == "*" else "." if part == "?" else escape_regex(part) for part in re.split("([*?])", text)
            )
            self._globs[text] = cache(_compile_regex("(?s)" + "".join(parts)))
        return self._globs[text]

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
            found += _close(pattern, self._names)
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
            modules, _ = self._walk(steps)
        except PatternError:
            return []
        found = {segment for module in modules for segment in (*module.modules, *module.tensors)}
        return sorted(found, key=self._segments.__getitem__)

    @cached_property
    def _segments(self) -> Mapping[str, int]:
        """All segments, numbered in the order in which they first stand in a name."""
        found = dict.fromkeys(segment for name in self._names for segment in split_name(name))
        return {segment: number for number, segment in enumerate(found)}

    def _braces_for_brackets(self, pattern: str) -> list[str]:
        """``layer[3:]`` -> ``layer{3..4}``, where the numbers are part of the segment's name."""
        sliced = re.fullmatch(rf"(.*?)([^./\[\]]+)({SLICE_TEXT})(.*)", pattern)
        if not sliced:
            return []
        stem = sliced[2]
        tails = (segment[len(stem) :] for segment in self._segments if segment.startswith(stem))
        numbers = sorted({int(tail) for tail in tails if CHILD_NUMBER.fullmatch(tail)})
        try:
            picked = sorted(pick(numbers, sliced[3], lambda: stem)) if numbers else []
        except PatternError:
            return []
        if not picked:
            return []
        braces = f"{sliced[1]}{stem}{braced(picked)}{sliced[5]}"
        return [braces] if self.count(braces) else []


def _numbers_in(module: Module) -> set[int]:
    return {int(key) for key in (*module.modules, *module.tensors) if CHILD_NUMBER.fullmatch(key)}


def _is_a_path(steps: Sequence[Step]) -> bool:
    """Whether steps speak of a model's layers by their order, or name a model: ``base.layers[:-5]``, ``base``."""
    return _slices_layers(steps) or all(isinstance(step, Segment) and not step.is_glob for step in steps)


def _slices_layers(steps: Sequence[Step]) -> bool:
    return any(
        isinstance(step, Segment) and step.text == "layers" and isinstance(following, Children)
        for step, following in pairwise(steps)
    )


def _close(text: str, candidates: Iterable[str]) -> list[str]:
    """Candidates that look like the text, most alike first; letter case does not count."""
    folded: dict[str, str] = {}
    for candidate in islice(candidates, 5000):
        folded.setdefault(candidate.lower(), candidate)
    return [folded[match] for match in closest(text.lower(), folded)]


def escape_regex(text: str) -> str:
    """Text that stands for itself in RE2."""
    import re2

    escaped: str = re2.escape(text)
    return escaped


#: Syntax by which an expression could tell one text from a line of many: \\A, \\z, \\C, \\Q, and groups that set flags.
_SEES_LINES = re.compile(r"\\[AzZCQ]|\(\?(?!:|P?<)")


def regex_options(*, lines: bool = False, groups: bool = False) -> Any:
    """Of RE2: whether expressions are matched to lines, and whether what groups match is told."""
    import re2

    options = re2.Options()
    options.log_errors = False
    options.never_capture = not groups
    options.never_nl = lines
    return options


def _of_whole_lines(expression: str) -> str:
    return f"(?m)^(?:{expression})$"


def _matching_lines(expression: str, text: str) -> list[str]:
    """The lines that an expression matches as a whole."""
    import re2

    compiled = re2.compile(_of_whole_lines(expression), regex_options(lines=True))
    return list(dict.fromkeys(match.group() for match in compiled.finditer(text)))


def _compile_regex(expression: str) -> Callable[[str], bool]:
    """A test of whole strings in RE2, whose time is linear in the string (github.com/google/re2/wiki/Syntax)."""
    import re2

    try:
        compiled = re2.compile(expression, regex_options())
        re2.compile(_of_whole_lines(expression), regex_options(lines=True))
    except re2.error as error:
        reason = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise PatternError(f"not a regular expression that RE2 takes: {shown(reason)}") from None
    return lambda text: compiled.fullmatch(text) is not None
