"""Bytes from process to process over Gloo: what ``torch.distributed`` has below its process groups.

``torch.distributed.new_group`` calls a group by how many of them a process has made. Others may have made more of them,
and the store may still hold the addresses of one that was called the same. Connections have a place of their own in it
each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist

from ..errors import UsageError

__all__ = ["Connections", "Store", "part_of"]

#: After how long without a word a process is lost; one whose connections close is so at once to its neighbours, and to
#: the others as those close theirs.
_SILENT = timedelta(minutes=5)
#: Which way bytes go.
_TO_FIRST, _OF_FIRST = range(2)


class Store(Protocol):
    """A ``torch.distributed.Store``. All methods raise RuntimeError if it is lost."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, value: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...


def part_of(store: Store, name: str) -> Store:
    """What is in a store under a name."""
    return cast("Store", cast("Any", dist).PrefixStore(name, store))


class Connections:
    """Every process of some with every other. All of them call the same methods at the same time.

    Args:
        store: By which they connect; for these alone.
        rank: Which one this is.
        size: How many there are.

    Raises:
        RuntimeError: in all methods, if one is lost or does not come.
    """

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._group: Any = cast("Any", dist).ProcessGroupGloo(store, rank, size, _SILENT)

    def close(self) -> None:
        """Close them; others that wait for this one see it at once."""
        self._group = None

    def numbers(self, own: Sequence[int]) -> list[list[int]]:
        """The numbers of every process, as many of each."""
        boxes = [torch.empty(len(own), dtype=torch.int64) for _ in range(self._size)]
        self._group.allgather([boxes], [torch.tensor(own, dtype=torch.int64)]).wait()
        return [[int(number) for number in box] for box in boxes]

    def _sizes(self, content: bytes, way: int) -> list[int]:
        """How many bytes each process has for the others.

        Raises:
            UsageError: if they are about different things.
        """
        sizes, ways = zip(*self.numbers([len(content), way]), strict=True)
        if set(ways) != {way}:
            raise UsageError("the ranks do different things", hint="all processes of a group make the same calls")
        return list(sizes)

    def to_first(self, content: bytes) -> list[bytes]:
        """On the first the bytes of each process; on the others nothing."""
        sizes = self._sizes(content, _TO_FIRST)
        boxes = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes] if self._rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        self._group.gather([boxes] if boxes else [], [_boxed(content, max(sizes))], options).wait()
        return [box[:size].numpy().tobytes() for box, size in zip(boxes, sizes, strict=False)]

    def of_first(self, content: bytes) -> bytes:
        """The bytes of the first."""
        box = _boxed(content, self._sizes(content, _OF_FIRST)[0])
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        self._group.broadcast([box], options).wait()
        return box.numpy().tobytes()


def _boxed(content: bytes, size: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)
