"""How far along a task is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from threading import Lock, get_ident
from typing import TypeAlias

from .tensors import Buffer

__all__ = ["Meter", "Progress"]

#: Called with the number of bytes done and of bytes in all, in the thread that began the task.
Progress: TypeAlias = Callable[[int, int], None]


class Meter:
    """Counts bytes, in any thread, and tells whom it may concern, in the thread that made it.

    Args:
        total: Bytes in all.
        progress: Who is told.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self._done = self._told = 0
        self._lock, self._thread = Lock(), get_ident()

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        with self._lock:
            self._done += count
        if get_ident() == self._thread:
            self.tell()

    def tell(self) -> None:
        """Say how many bytes are done, if there are more than when it was last said."""
        if self._progress is not None and self._done != self._told:
            self._told = self._done
            self._progress(min(self._told, self._total), self._total)

    def over(self, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
        """The chunks, each counted after it was used."""
        for chunk in chunks:
            yield chunk
            self.advance(len(chunk))
