"""Processes that do one job together: what one of them makes for all, and what each makes for the first.

One process alone is the first of one rank, so that a stage is written once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol, Self, TypeVar, runtime_checkable

from ..errors import UsageError
from ..metering import Progress

__all__ = ["ALONE", "Ranks", "refuse_unless_alike"]

_Made = TypeVar("_Made")

_ALIKE = "all ranks are given the same arguments, and see the same files, or copies with their times of change (cp -p)"


@runtime_checkable
class Ranks(Protocol):
    """The processes of a job, as one of them sees it. Every one of them calls the same methods in the same order.

    Used in a ``with`` statement: an exception that leaves it stops the others too.

    Attributes:
        rank: Which one this is, from 0.
        size: How many there are.
        on_this_host: How many of them share this machine.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    @property
    def on_this_host(self) -> int: ...

    def broadcast(self, make: Callable[[], _Made]) -> _Made:
        """What the first rank makes; the others get a copy.

        Raises:
            PeerFailed: if another rank has failed; on the first, what ``make`` raised.
            SystemFailure: if a rank is lost.
        """

    def gather(self, make: Callable[[], _Made]) -> list[_Made]:
        """On the first rank what each rank makes, in their order; on the others nothing.

        Raises:
            PeerFailed: if another rank raised; on that rank what it raised.
            SystemFailure: if a rank is lost.
        """

    def watched(self, progress: Progress | None) -> Progress | None:
        """The progress of work inside ``gather``, which is stopped once another rank has failed."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


class _Alone:
    """One process."""

    rank, size, on_this_host = 0, 1, 1

    def broadcast(self, make: Callable[[], _Made]) -> _Made:
        return make()

    def gather(self, make: Callable[[], _Made]) -> list[_Made]:
        return [make()]

    def watched(self, progress: Progress | None) -> Progress | None:
        return progress

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        pass


ALONE = _Alone()


def refuse_unless_alike(ranks: Ranks, see: Callable[[], Mapping[str, object]]) -> None:
    """Raise UsageError if the ranks are not about the same.

    Args:
        ranks: The ranks.
        see: What this one is about, by what messages call it; an error of it stops all.
    """
    seen = ranks.gather(see)

    def compare() -> None:
        for rank, things in enumerate(seen):
            for label in sorted(things.keys() | seen[0].keys()):
                if things.get(label) != seen[0].get(label):
                    raise UsageError(f"{label}: not the same for rank {rank} as for rank 0", hint=_ALIKE)

    ranks.broadcast(compare)
