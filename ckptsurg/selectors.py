"""Selectors: lists of patterns in which the later one wins, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from .documents import suggest
from .errors import Problem, SpecError
from .layers import from_metadata
from .matching import Names
from .parsing import Place, Text
from .patterns import OutOfRange, PatternError, unlike_parts
from .rules import FreezeItem, Item, Where
from .spec import Spec
from .tensors import DTYPE_BITS, TensorInfo
from .wording import counted, enumerate_names, shown

__all__ = ["Selection", "Space", "module_and_leaf", "select", "selected_names"]

#: Output heads that share their tensor with the input embeddings in many models, and what the latter are called.
_TIED_HEADS = re.compile(r"(?:^|[./])(lm_head|embed_out|output_projection|decoder|proj_out)(?=[./]|$)")
_EMBEDDINGS = "**.{embed_tokens,wte,word_embeddings,embed_in,shared,tok_embeddings}"


@dataclass(frozen=True)
class Space:
    """The tensors that patterns speak of.

    Attributes:
        names: Their names.
        tensors: Dtype and shape by name.
        dropped: Names that the spec drops: patterns do not see them, messages do.
        called: What tensors are called in the output, where that is another name; messages know it.
    """

    names: Names
    tensors: Mapping[str, TensorInfo]
    dropped: Names = field(default_factory=lambda: Names(()))
    called: Mapping[str, str] = field(default_factory=dict)

    def keeps(self, name: str, where: Where) -> bool:
        info = self.tensors[name]
        if where.dtype is not None and info.dtype != where.dtype:
            return False
        if where.ndim is not None and len(info.shape) != where.ndim:
            return False
        return where.beside is None or module_and_leaf(name)[0] + where.beside in self.tensors


def module_and_leaf(name: str) -> tuple[str, str]:
    """The module's name with its separator, and the last segment: ("layer1.0.", "weight")."""
    end = max(name.rfind("."), name.rfind("/")) + 1
    return name[:end], name[end:]


@dataclass(frozen=True, slots=True)
class Selection:
    """What a selector selects.

    Attributes:
        names: What is selected.
        item: Which item decided last, by name, of names that are selected or taken away again.
        rows: First row and the one after the last, of names of which the item selects a part.
        problems: What is wrong with the selector.
        notes: What is likely not meant.
    """

    names: Set[str]
    item: Mapping[str, int]
    rows: Mapping[str, tuple[int, int]]
    problems: Sequence[Problem]
    notes: Sequence[str]


def select(spec: Spec, place: Place, items: Sequence[Item], space: Space) -> Selection:
    """Evaluate the items in their order; the later one wins."""
    selected: set[str] = set()
    decided: dict[str, int] = {}
    rows: dict[str, tuple[int, int]] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    for position, item in enumerate(items):
        here = (*place, position)
        exact = item.match in space.tensors
        negative = item.match.startswith("!") and not exact
        pattern = item.match[1:] if negative else item.match
        if negative and position == 0:
            problems.append(
                spec.problem(
                    (*here, "match"), f'"{shown(item.match)}" only takes away; what is selected comes before it'
                )
            )
            continue
        try:
            hits = space.names.match(pattern)
        except PatternError as error:
            if item.optional and isinstance(error, OutOfRange):
                continue
            problems.append(spec.problem((*here, "match"), f'"{shown(item.match)}": {error}'))
            continue
        total: set[str] = set()
        idle: list[tuple[str, int]] = []
        for alternative, hit in hits:
            hit = _filtered(hit, item.where, space)
            taken = selected.intersection(hit) if negative else hit
            total.update(taken)
            if not taken and not item.optional and item.expect != 0:
                idle.append((alternative, len(hit)))
        if idle:
            problems.append(spec.problem((*here, "match"), _explain_nothing(item, idle, len(hits), negative, space)))
        found = len(total)
        if found and item.expect not in (None, found):
            verb = "takes away" if negative else "selects"
            message = f'"{shown(item.match)}" {verb} {counted(found)}, expected {item.expect:,}'
            problems.append(
                spec.problem((*here, "expect"), f"{message}: {enumerate_names(space.names.in_order(total), 3)}")
            )
        selected = selected - total if negative else selected | total
        decided.update(dict.fromkeys(total, position))
        names = space.names.in_order(total) if rows or _rows_of(item) else []
        for name in names:
            rows.pop(name, None)
        if (written := _rows_of(item)) is not None:
            ranges = {name: _resolved_rows(written, name, space.tensors[name]) for name in names}
            wrong = [found for found in ranges.values() if isinstance(found, str)]
            if negative:
                wrong = ["says which rows are frozen; without !, the rest of the tensor trains"]
            problems += [spec.problem((*here, "rows"), f'"{shown(written)}" {found}') for found in wrong[:3]]
            rows |= {name: found for name, found in ranges.items() if not isinstance(found, str)}
        notes += _slips(spec.written(here), item, pattern, found, space)
    return Selection(selected, decided, rows, problems, notes)


def _rows_of(item: Item) -> str | None:
    return item.rows if isinstance(item, FreezeItem) else None


def _resolved_rows(written: str, name: str, info: TensorInfo) -> tuple[int, int] | str:
    """A slice such as ``[:32000]`` over the rows of one tensor; or, in words, why it is none."""
    if not info.shape:
        return f"is a range of rows, and {shown(name)} has no dimensions"
    count = info.shape[0]
    first, separator, last = written[1:-1].partition(":")
    start, stop = (int(text) if text else default for text, default in ((first, 0), (last, count)))
    start, stop = (place + count if place < 0 else place for place in (start, stop))
    if not separator:
        stop = start + 1
    if not 0 <= start < stop <= count:
        return f"is no range of the {counted(count, 'row')} of {shown(name)}"
    if TensorInfo(info.dtype, info.shape[1:]).elements * DTYPE_BITS.get(info.dtype, 8) % 8:
        return f"would part a byte of {shown(name)}, whose dtype is {info.dtype}"
    return start, stop


def _filtered(hit: list[str], where: Where | None, space: Space) -> list[str]:
    return hit if where is None else [name for name in hit if space.keeps(name, where)]


def _explain_nothing(
    item: Item, idle: Sequence[tuple[str, int]], alternatives: int, negative: bool, space: Space
) -> str:
    """Why a pattern selects nothing, or takes nothing away, and what may have been meant.

    Args:
        item: The item.
        idle: Its brace alternatives that do nothing, and how many tensors each matches.
        alternatives: How many it has in all.
        negative: Whether it takes away.
        space: What it speaks of.
    """
    explained = _explain_alternative(item, *idle[0], alternatives > 1, negative, space)
    return explained + (f"; so do {len(idle) - 1:,} more of its {alternatives:,} alternatives" if len(idle) > 1 else "")


def _explain_alternative(
    item: Item, alternative: str, matched: int, of_braces: bool, negative: bool, space: Space
) -> str:
    sign = "!" if negative else ""
    what = f'"{sign}{shown(alternative)}"' + (f' (of "{shown(item.match)}")' if of_braces else "")
    if matched:
        return f"{what} takes nothing away: nothing that it matches ({counted(matched)}) is selected before it"
    if item.where is not None and (unfiltered := space.names.count(alternative)):
        where = ", ".join(f"{key}: {value}" for key, value in item.where.model_dump(exclude_none=True).items())
        leaves = sorted({module_and_leaf(name)[1] for name in space.tensors})
        known = item.where.beside is None or item.where.beside in leaves
        return f"{what} matches {counted(unfiltered)}, but none where {where}" + (
            "" if known else suggest(item.where.beside, leaves)
        )
    in_output = _in_output(alternative, space)
    if gone := space.dropped.count(alternative):
        return f"{what} matches nothing that is left: `drop` takes what it matches ({counted(gone)}){in_output}"
    message = f"{what} matches nothing"
    if in_output:
        return message + in_output
    if re.fullmatch(r"-?[0-9]*:-?[0-9]*(?::-?[0-9]*)?", alternative):
        return f'{message}; a slice keeps its brackets in quotes, type: "[{alternative}]"'
    head = _TIED_HEADS.search(alternative)
    is_there = head is not None and any(head[1] in re.split("[./]", name) for name in space.tensors)
    if head is not None and not is_there and (embeddings := _first(space.names, _EMBEDDINGS)):
        return (
            f"{message}: the checkpoint has no such tensor; where a model ties its head to its embeddings, "
            f"{shown(embeddings)} stands for both"
        )
    nearest = [f"{sign}{shown(name)}" for name in space.names.nearest(alternative)]
    if not nearest and (choices := [shown(segment) for segment in space.names.choices(alternative)]):
        return f"{message}; at that place there are: {', '.join(choices)}"
    return message + ("; nearest: " + ", ".join(nearest) if nearest else "")


def _in_output(alternative: str, space: Space) -> str:
    """What a pattern means that speaks of the output's names, and not of the base's."""
    if not space.called:
        return ""
    base = {space.called.get(name, name): name for name in space.tensors}
    output = Names(base)
    new = _first(output, alternative) if output.count(alternative) else None
    if new is None or base[new] == new:
        return ""
    old, new = unlike_parts(base[new], new)
    return f"; names are the base's, and what the output calls {shown(new)} is {shown(old)}"


def _first(names: Names, pattern: str) -> str | None:
    hits = {name for _, hit in names.match(pattern) for name in hit}
    return next(iter(names.in_order(hits)), None)


def _slips(place: str, item: Item, pattern: str, found: int, space: Space) -> list[str]:
    """A single ``*`` at the start where ``**`` selects more: the commonest slip that is no error."""
    if not pattern.startswith(("*.", "*/")):
        return []
    deeper = f"**{pattern[1:]}"
    try:
        more = len({name for _, hit in space.names.match(deeper) for name in _filtered(hit, item.where, space)})
    except PatternError:
        return []
    if more <= found:
        return []
    return [f'{place}: "{shown(item.match)}" selects {counted(found)}; "{shown(deeper)}" would select {more:,}']


def selected_names(
    tensors: Mapping[str, TensorInfo], patterns: Sequence[str], metadata: Mapping[str, str] | None
) -> list[str]:
    """The names that patterns select, the later one winning.

    Args:
        tensors: Dtype and shape by name.
        patterns: As in a spec.
        metadata: Of the checkpoint, which may say how layers follow one another.

    Raises:
        SpecError: if a pattern cannot be read or selects nothing.
    """
    spec = Spec.from_text(Text("patterns", {"version": 1, "freeze": list(patterns)}))
    space = Space(Names(tensors, from_metadata(metadata)), tensors)
    selection = select(spec, ("freeze",), spec.freeze or (), space)
    if selection.problems:
        raise SpecError("patterns", [replace(problem, path="") for problem in selection.problems])
    return space.names.in_order(selection.names)
