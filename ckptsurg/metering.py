"""How far along a task is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from .tensors import Buffer

__all__ = ["Meter", "Progress"]

#: Called with the number of bytes done and of bytes in all.
Progress: TypeAlias = Callable[[int, int], None]


class Meter:
    """Counts bytes and tells whom it may concern.

    Args:
        total: Bytes in all.
        progress: Who is told.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        self._done += count
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)

    def over(self, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
        """The chunks, each counted after it was used."""
        for chunk in chunks:
            yield chunk
            self.advance(len(chunk))
