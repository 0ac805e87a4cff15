"""What moved, where, and by how much: blocks x roles, and how many tensors changed how much."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isinf, log10
from typing import get_args

from .entries import Entry, State
from .maps import kept
from .places import by_block, starred

__all__ = ["Bin", "Cell", "Grid", "grids", "histogram", "level"]

_MOST_ROWS, _MOST_COLUMNS, _MOST_GRIDS = 120, 32, 12
#: With more columns than so many, those that differ in numbers alone are one.
_MANY_COLUMNS = 24
_GRAVITY = {state: position for position, state in enumerate(get_args(State))}
_NOTABLE = _GRAVITY["still"]
_REST = "further ones"
#: Relative changes at which the next shade begins.
SHADES = (1e-6, 1e-4, 1e-2, 1.0)


@dataclass(frozen=True, slots=True)
class Cell:
    """The tensors of one block that have one role.

    Attributes:
        tensors: How many there are.
        state: What was found of them; where it is not the same of all, the gravest.
        alike: Of how many it was found.
        relative: Largest relative change of these; None where none was measured.
    """

    tensors: int
    state: State
    alike: int
    relative: float | None


@dataclass(frozen=True, slots=True)
class Grid:
    """A stack of blocks.

    Attributes:
        label: What the blocks are called, without their numbers; None of modules outside of any stack.
        columns: The roles.
        rows: The blocks, each with a cell, or None, for each role.
        left_out: How many blocks there are besides.
        notable_left_out: In how many of these something was found.
    """

    label: str | None
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    left_out: int
    notable_left_out: int


@dataclass(frozen=True, slots=True)
class Bin:
    """Tensors that changed about as much.

    Attributes:
        low: The least relative change; the largest is below ten times that.
        word: What else they have in common, where it is not a decade.
        frozen: How many frozen ones; of two checkpoints, none.
        others: How many others.
    """

    low: float | None
    word: str
    frozen: int
    others: int


def level(relative: float | None) -> int:
    """The shade of a relative change, from 0 to 4; what was not measured has the middle one."""
    return len(SHADES) // 2 if relative is None else sum(not relative < limit for limit in SHADES)


def grids(entries: Iterable[Entry]) -> list[Grid]:
    """Blocks x roles, a grid for each stack that has several blocks; what stands alone is in the last."""
    stacks = dict(by_block((entry.name, entry) for entry in entries))
    alone = dict(stacks.pop(None, {}))
    for stack in [stack for stack, blocks in stacks.items() if len(blocks) == 1]:
        alone |= stacks.pop(stack)
    first = sorted(stacks, key=lambda stack: -len(stacks[stack]))[:_MOST_GRIDS]
    for stack in [stack for stack in stacks if stack not in first]:
        alone |= stacks.pop(stack)
    found = [_grid(stack, blocks) for stack, blocks in stacks.items()]
    return [*found, _grid(None, alone)] if alone else found


def _grid(label: str | None, blocks: Mapping[str, Sequence[tuple[str, Entry]]]) -> Grid:
    columns = _columns(role for inside in blocks.values() for role, _ in inside)
    order = list(dict.fromkeys(columns.values()))
    rows = []
    for block, inside in blocks.items():
        cells: dict[str, list[Entry]] = {}
        for role, entry in inside:
            cells.setdefault(columns[role], []).append(entry)
        rows.append((block, [_cell(cells[column]) if column in cells else None for column in order]))
    notable = [any(cell and _GRAVITY[cell.state] <= _NOTABLE for cell in cells) for _, cells in rows]
    positions = kept(notable, _MOST_ROWS)
    left_out = len(rows) - len(positions)
    return Grid(label, order, [rows[i] for i in positions], left_out, sum(notable) - sum(notable[i] for i in positions))


def _columns(roles: Iterable[str]) -> dict[str, str]:
    """The column of each role: of its own, of all that differ in numbers alone, or the last of all."""
    columns = dict.fromkeys(roles, "")
    columns = {role: role for role in columns}
    if len(columns) > _MANY_COLUMNS:
        columns = {role: starred(role) for role in columns}
    distinct = list(dict.fromkeys(columns.values()))
    if len(distinct) > _MOST_COLUMNS:
        own = set(distinct[: _MOST_COLUMNS - 1])
        columns = {role: column if column in own else _REST for role, column in columns.items()}
    return columns


def _cell(entries: Sequence[Entry]) -> Cell:
    state = min((entry.state for entry in entries), key=_GRAVITY.__getitem__)
    alike = [entry for entry in entries if entry.state == state]
    measured = [entry.change.relative for entry in alike if entry.change is not None]
    # What is no number is larger than all that are.
    relative = max(measured, key=lambda one: (one != one, one), default=None)
    return Cell(len(entries), state, len(alike), relative)


def histogram(entries: Iterable[Entry]) -> list[Bin]:
    """How many tensors changed how much: those that did not, those of each decade, and those that no decade holds."""
    counts: dict[tuple[int, str], list[int]] = {}
    for entry in entries:
        if (key := _bin(entry)) is not None:
            counts.setdefault(key, [0, 0])[not entry.frozen] += 1
    decades = [decade for decade, word in counts if not word]
    for decade in range(min(decades, default=0), max(decades, default=-1) + 1):
        counts.setdefault((decade, ""), [0, 0])  # so that a gap is seen as one
    return [
        Bin(None if word else 10.0**decade, word, frozen, others)
        for (decade, word), (frozen, others) in sorted(counts.items())
    ]


_LEAST, _MOST = -9, 3


def _bin(entry: Entry) -> tuple[int, str] | None:
    """Which bin a tensor is in, and its word where that is no decade."""
    if entry.state in ("same", "still"):
        return _LEAST - 3, "not at all"
    if entry.state == "wider" or (entry.state == "other" and entry.change is not None and not entry.change.changed):
        return _LEAST - 2, "in dtype alone"
    if entry.change is None or entry.state == "unlike":
        return None  # in a dtype with fewer bits every value moves, trained or not
    relative = entry.change.relative
    if isinf(relative):
        return _MOST + 2, "from zero"
    if relative != relative:
        return _MOST + 3, "not finite"
    if relative < 10.0**_LEAST:
        return _LEAST - 1, f"less than 1e{_LEAST}"
    decade = floor(log10(relative))
    return (_MOST + 1, f"1e{_MOST} or more") if decade >= _MOST else (decade, "")
