"""How the bytes of an output get there: shared with the base where the file system can, written where it cannot."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator
from threading import Lock
from typing import Literal, TypeAlias, get_args

from . import disk
from .checkpoints import StoredFile
from .disk import BLOCK_BYTES
from .tensors import Buffer
from .wording import size

__all__ = ["Amounts", "Target", "outside", "within"]

#: Fewer bytes are left to the last flush, with their neighbours.
_WORTH_WRITEBACK = 256 << 10

Way: TypeAlias = Literal["kept", "linked", "reflinked", "copied", "wrote"]


class Amounts(Counter[Way]):
    """How many bytes of an output came to it in which way.

    ``kept`` are there since a run that was stopped; ``linked`` are in files that are the base's own; ``reflinked`` in
    blocks that are shared with the base, until one of the two is written to; ``copied`` were read from the base and
    written; what it ``wrote`` is new: headers and values.
    """

    def __str__(self) -> str:
        """``reflinked 13.1 GB, copied 200.0 MB, wrote 41.0 MB``."""
        return ", ".join(f"{way} {size(self[way])}" for way in get_args(Way) if self[way])


class Target:
    """A file of an output in the making. Any thread may write to any part of it; once all is there, it is on disk.

    Attributes:
        amounts: How its bytes came to it.

    Args:
        descriptor: The file, open for writing; closed here.
        length: Its size once it is whole, in bytes.
        missing: How many bytes will be brought here; None for all. The file has its size by now where others are.
    """

    def __init__(self, descriptor: int, length: int, missing: int | None = None) -> None:
        self._descriptor, self._length, self._missing = descriptor, length, length if missing is None else missing
        self._is_open = True
        self._lock = Lock()
        self.amounts = Amounts()
        if not self._missing:
            self._finish()

    def write(self, data: Buffer, at: int, way: Way = "wrote") -> None:
        """Write bytes at an offset, each byte of the file once."""
        if not data:
            return
        disk.write_all(self._descriptor, data, at)
        if len(data) >= _WORTH_WRITEBACK:
            # Not the block that others will write to as well: they would wait for the disk to have it.
            start, stop = at // BLOCK_BYTES * BLOCK_BYTES, (at + len(data)) // BLOCK_BYTES * BLOCK_BYTES
            disk.begin_writeback(self._descriptor, start, stop - start)
        self._count(len(data), way)

    def share(self, file: StoredFile, offset: int, length: int, at: int) -> range:
        """Share the blocks of a range with a file.

        Args:
            file: The file.
            offset: Where the range begins in it.
            length: Of the range, in bytes.
            at: Where the range belongs in this one.

        Returns:
            The offsets in this file that need not be written any more: whole blocks, or all of a whole file; or none.
        """
        if offset == at == 0 and length == file.size and disk.clone_range(file.descriptor, 0, 0, self._descriptor, 0):
            self._count(length, "reflinked")
            return range(length)
        skipped = -at % BLOCK_BYTES
        shared = range(at + skipped, (at + length) // BLOCK_BYTES * BLOCK_BYTES)
        if (at - offset) % BLOCK_BYTES or not shared:
            return range(0)
        if not disk.clone_range(file.descriptor, offset + skipped, len(shared), self._descriptor, shared.start):
            return range(0)
        self._count(len(shared), "reflinked")
        return shared

    def _count(self, count: int, way: Way) -> None:
        with self._lock:
            self.amounts[way] += count
            self._missing -= count
            is_whole = not self._missing
        if is_whole:
            self._finish()

    def _finish(self) -> None:
        try:
            disk.flush(self._descriptor)
            if (there := os.fstat(self._descriptor).st_size) != self._length:
                raise OSError(errno.EIO, f"a file has {there:,} bytes, where {self._length:,} were written")
        finally:
            self.close()

    def close(self) -> None:
        """Give the descriptor back, whole or not."""
        if self._is_open:
            self._is_open = False
            os.close(self._descriptor)


def within(span: range, other: range) -> range:
    """The part of a span that is in another too."""
    return range(max(span.start, other.start), min(span.stop, other.stop))


def outside(span: range, shared: range) -> Iterator[range]:
    """The parts of a span before and behind a shared range."""
    for part in (range(span.start, min(span.stop, shared.start)), range(max(span.start, shared.stop), span.stop)):
        if part:
            yield part
