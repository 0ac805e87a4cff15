"""How the work on an output is dealt out to ranks: by bytes, neighbours together.

Files lie one behind the other as one line of bytes, and every rank gets a range of it; so a file is touched by few, and
each reads and writes in order. A range ends between two tensors, or within one that is copied, where the ranks would
be uneven otherwise. Who has a tensor's last byte makes its record: it reads the bytes before its range too, for a
digest is made of all of them in their order.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .checkpoints import Extent
    from .layout import OutputFile

__all__ = ["Deal", "Item", "deal", "deal_out", "unevenness"]

#: Where in its file a tensor is cut, in bytes: file systems share and write whole blocks.
_BLOCK = 4096
#: What of a rank's work may be left undone by not cutting a tensor.
_SLACK = 0.02
#: How close to the least possible the work of the busiest rank is brought.
_CLOSE = 0.002

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Item:
    """What is dealt out.

    Attributes:
        nbytes: Its size.
        cut_from: Where it begins in its file, in bytes, if several ranks may bring a part of it each.
    """

    nbytes: int
    cut_from: int | None = None

    def cut(self, most: int) -> int:
        """Where it is cut if a rank brings at most so many bytes of it; 0 where that brings none."""
        if self.cut_from is None:
            return 0
        return max(0, (self.cut_from + min(most, self.nbytes - 1)) // _BLOCK * _BLOCK - self.cut_from)


@dataclass(frozen=True, slots=True)
class Deal:
    """Who does what.

    Attributes:
        shares: Of every rank, its range of every file that it has a part of, by the file's name; in bytes.
        loads: What that is for each rank, in bytes read and written.
    """

    shares: Sequence[Mapping[str, range]]
    loads: Sequence[int]

    @property
    def unevenness(self) -> float:
        """The largest load over the mean; 1.0 is even."""
        return unevenness(self.loads)


def unevenness(loads: Sequence[int]) -> float:
    """The largest load over the mean; 1.0 where there is none."""
    return max(loads) * len(loads) / sum(loads) if any(loads) else 1.0


def deal(files: Sequence[OutputFile], ranks: int, extents: Mapping[str, Extent]) -> Deal:
    """Deal the files of an output out.

    Args:
        files: The files.
        ranks: How many ranks there are.
        extents: Where in files the base has its tensors: of what is copied from there, a part can be brought without
            the rest.
    """
    items = []
    for file in files:
        position = len(file.header)
        items.append(Item(position))
        for one in file.tensors:
            items.append(Item(one.info.nbytes, position if one.is_copied and one.name in extents else None))
            position += one.info.nbytes
    ends = _ends(items, ranks)
    shares: list[dict[str, range]] = [{} for _ in range(ranks)]
    start = 0
    for file in files:
        stop = start + file.size
        for rank, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
            if max(first, start) < min(last, stop):
                shares[rank][file.name] = range(max(first, start) - start, min(last, stop) - start)
        start = stop
    return Deal(shares, _loads(items, ends))


def deal_out(sizes: Mapping[_Key, int], ranks: int) -> list[list[_Key]]:
    """Deal out what cannot be cut, neighbours together.

    Args:
        sizes: In bytes, in their order.
        ranks: How many ranks there are.

    Returns:
        What each rank has, in its order.
    """
    items = [Item(nbytes) for nbytes in sizes.values()]
    ends = _ends(items, ranks)
    shares: list[list[_Key]] = [[] for _ in range(ranks)]
    for key, end in zip(sizes, accumulate(sizes.values()), strict=True):
        shares[bisect_left(ends, end)].append(key)
    return shares


def _ends(items: Sequence[Item], ranks: int) -> list[int]:
    """Where on the line of bytes each rank's range ends, so that the busiest has as little to do as may be."""
    starts = [0, *accumulate(item.nbytes for item in items)]
    least = -(-2 * starts[-1] // ranks)
    most = max(least, 1)
    while (ends := _filled(items, starts, most, ranks)) is None:
        least, most = most, 2 * most
    while most - least > max(1, _CLOSE * least):
        middle = (least + most) // 2
        if (found := _filled(items, starts, middle, ranks)) is None:
            least = middle
        else:
            ends, most = found, middle
    return ends


def _filled(items: Sequence[Item], starts: Sequence[int], capacity: int, ranks: int) -> list[int] | None:
    """Where ranges end if each rank takes on as much as it can; None if that is not all there is.

    Args:
        items: What is dealt out.
        starts: Where each begins, and where the last one ends.
        capacity: Of a rank, in bytes read and written.
        ranks: How many ranks there are.
    """
    ends: list[int] = []
    at = given = 0  # the next item, and how much of it was given to ranks before
    while len(ends) < ranks:
        left, began = capacity, starts[at] + given
        if given:
            size = items[at].nbytes
            if (cost := 2 * (size - given) + given) > left:
                given = items[at].cut(given + left // 2)
                ends.append(starts[at] + given)
                continue
            left, at, given = left - cost, at + 1, 0
        after = bisect_right(starts, starts[at] + left // 2, lo=at) - 1
        left, at = left - 2 * (starts[after] - starts[at]), after
        if at == len(items):
            return ends + [starts[-1]] * (ranks - len(ends))
        if items[at].nbytes <= capacity and left > _SLACK * capacity:
            given = items[at].cut(left // 2)
        if starts[at] + given == began:
            return None
        ends.append(starts[at] + given)
    return None


def _loads(items: Sequence[Item], ends: Sequence[int]) -> list[int]:
    starts = [0, *accumulate(item.nbytes for item in items)]
    loads = []
    for first, last in zip([0, *ends], ends, strict=False):
        held = bisect_right(starts, first) - 1  # the item that the range begins in
        ends_here = held < len(items) and starts[held + 1] <= last
        loads.append(2 * (last - first) + (first - starts[held] if ends_here and last > first else 0))
    return loads
