"""The tensors block by block, sizes true to scale; and what is in each block, those that are alike together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..patterns import split_name
from .entries import DROPPED, Entry, Kind
from .places import by_block, numbers_in, place_of, starred

__all__ = ["MOST_BLOCKS", "Bar", "Content", "Contents", "Map", "Part", "draw", "kept", "parts_of"]

#: How many blocks are shown one by one; further ones are summed up.
MOST_BLOCKS = 240
#: How many groups of blocks, and how many lines of one, are listed.
_MOST_GROUPS, _MOST_LINES = 120, 60


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors of one fate in a bar: how many, and their size in bytes."""

    kind: Kind
    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Bar:
    """A block.

    Attributes:
        label: Its name.
        parts: Its tensors by fate, in the order of the legend.
        to: What the output of a plan calls it, where that is another name.
    """

    label: str
    parts: Sequence[Part]
    to: str | None = None

    @property
    def tensors(self) -> int:
        return sum(part.tensors for part in self.parts)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    @property
    def words(self) -> str:
        """The fates in it, the largest first."""
        return " + ".join(part.kind.word for part in sorted(self.parts, key=lambda part: -part.nbytes))


@dataclass(frozen=True, slots=True)
class Content:
    """Tensors of a block that are alike: their role, how many, dtype and shape in words, size in bytes, fate."""

    role: str
    tensors: int
    info: str
    nbytes: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Contents:
    """Blocks in a row that hold the same.

    Attributes:
        label: The first and the last of them.
        blocks: How many there are.
        lines: What is in each.
        left_out: How many lines there are besides.
        to: What the output of a plan calls them, where that is another name.
    """

    label: str
    blocks: int
    lines: Sequence[Content]
    left_out: int
    to: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of one block in bytes."""
        return sum(line.nbytes for line in self.lines)

    @property
    def tensors(self) -> int:
        return sum(line.tensors for line in self.lines)

    @property
    def words(self) -> str:
        """The fates in it, the largest lines first."""
        return " + ".join(dict.fromkeys(line.kind.word for line in sorted(self.lines, key=lambda line: -line.nbytes)))


@dataclass(frozen=True, slots=True)
class Map:
    """All tensors.

    Attributes:
        kinds: The fates that there are, in the order of the legend, with the tensors of each.
        bars: The blocks.
        rest: Those that are not shown one by one, in one bar; None where all are.
        contents: What is in them.
        groups_left_out: How many groups of blocks there are besides.
    """

    kinds: Sequence[Part]
    bars: Sequence[Bar]
    rest: Bar | None
    contents: Sequence[Contents]
    groups_left_out: int

    @property
    def scale(self) -> int:
        """The bytes that a bar over the full width stands for."""
        return max((bar.nbytes for bar in self.bars), default=0) or 1


def draw(entries: Sequence[Entry], order: Sequence[Kind]) -> Map:
    """The map of tensors; ``order`` is that of the legend, of which those that are there are taken."""
    stacks = by_block((entry.name, entry) for entry in entries)
    blocks = [(block, inside) for stack in stacks.values() for block, inside in stack.items()]
    shown = kept([any(entry.kind is not order[0] for _, entry in inside) for _, inside in blocks], MOST_BLOCKS)
    bars = [_bar(*blocks[i], order) for i in shown]
    visible = set(shown)
    hidden = [entry for i, (_, inside) in enumerate(blocks) if i not in visible for _, entry in inside]
    count = len(blocks) - len(shown)
    contents = [group for stack, inside in stacks.items() for group in _folded(stack, inside)]
    return Map(
        parts_of(entries, order),
        bars,
        Bar(f"{count:,} more", parts_of(hidden, order)) if hidden else None,
        contents[:_MOST_GROUPS],
        max(0, len(contents) - _MOST_GROUPS),
    )


def _bar(block: str, inside: Sequence[tuple[str, Entry]], order: Sequence[Kind]) -> Bar:
    return Bar(block, parts_of((entry for _, entry in inside), order), _to(block, inside))


def _to(block: str, inside: Sequence[tuple[str, Entry]]) -> str | None:
    """What the output calls a block; None where it is called the same there, or its tensors part."""
    if all(entry.to is None for _, entry in inside):
        return None
    blocks = {place_of(entry.to or entry.name).block for _, entry in inside if entry.kind is not DROPPED}
    return blocks.pop() if len(blocks) == 1 and block not in blocks else None


def kept(are_wanted: Sequence[bool], most: int) -> list[int]:
    """The positions of at most so many items: those that are wanted first, in their order."""
    positions = sorted(range(len(are_wanted)), key=lambda i: not are_wanted[i])
    return sorted(positions[:most])


def parts_of(entries: Iterable[Entry], order: Sequence[Kind]) -> list[Part]:
    """Tensors by fate."""
    counts: dict[Kind, tuple[int, int]] = {}
    for entry in entries:
        tensors, nbytes = counts.get(entry.kind, (0, 0))
        counts[entry.kind] = tensors + 1, nbytes + entry.nbytes
    return [Part(kind, *counts[kind]) for kind in order if kind in counts]


# --- What is in a block ------------------------------------------------------------------------------


def _folded(stack: str | None, blocks: Mapping[str, Sequence[tuple[str, Entry]]]) -> list[Contents]:
    """Blocks in a row of their numbers that hold the same are one."""
    runs: list[tuple[list[str], list[Content]]] = []
    for block, inside in blocks.items():
        lines = _lines(inside)
        if stack is not None and runs and runs[-1][1] == lines and _number(block) == _number(runs[-1][0][-1]) + 1:
            runs[-1][0].append(block)
        else:
            runs.append(([block], lines))
    return [_contents(names, lines, [_to(name, blocks[name]) for name in names]) for names, lines in runs]


def _contents(names: Sequence[str], lines: Sequence[Content], to: Sequence[str | None]) -> Contents:
    new = [name for name in to if name is not None]
    called = _range(new) if len(new) == len(names) else None
    return Contents(_range(names), len(names), lines[:_MOST_LINES], max(0, len(lines) - _MOST_LINES), called)


def _range(blocks: Sequence[str]) -> str:
    """``h.{0..11}``, of blocks in a row."""
    if len(blocks) == 1:
        return blocks[0]
    first, last = (split_name(block)[-1] for block in (blocks[0], blocks[-1]))
    return f"{blocks[0].removesuffix(first)}{{{first}..{last}}}"


def _number(block: str) -> int:
    digits = block.replace("/", ".").rpartition(".")[2]
    return int(digits) if len(digits) < 20 else -1  # a name may have more digits than Python converts


def _lines(inside: Iterable[tuple[str, Entry]]) -> list[Content]:
    """What a block holds; roles that differ in numbers alone, and are alike, are one."""
    groups: dict[tuple[str, str, Kind], list[tuple[str, Entry]]] = {}
    for role, entry in inside:
        info = "" if entry.info is None else str(entry.info)
        groups.setdefault((starred(role), info, entry.kind), []).append((role, entry))
    return [
        Content(
            _together(pattern, [role for role, _ in alike]), len(alike), info, alike[0][1].nbytes * len(alike), kind
        )
        for (pattern, info, kind), alike in groups.items()
    ]


def _together(pattern: str, roles: Sequence[str]) -> str:
    """``experts.{0..255}.w1``, or with a star where numbers are missing."""
    if len(roles) == 1:
        return roles[0]
    if pattern.count("*") != 1 or max(map(len, roles)) > len(pattern) + 18:
        return pattern
    numbers = sorted({int(numbers_in(role)[0]) for role in roles})
    if len(numbers) != numbers[-1] - numbers[0] + 1:
        return pattern
    return pattern.replace("*", f"{{{numbers[0]}..{numbers[-1]}}}")
