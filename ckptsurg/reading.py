"""Tensors as they lie in files, read in threads: each byte once, neighbours together, into buffers used again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import local
from typing import Protocol, TypeAlias

from .checkpoints import Extent, StoredFile, read_into
from .metering import Meter
from .parallel import Segment, available_jobs, buffer_bytes, run
from .tensors import Buffer, Digester, same_bytes

__all__ = ["Consumer", "Reading", "Write", "digest_threads", "digests", "segments", "unequal"]

#: Neighbours are read by one thread until they are so many bytes.
_SEGMENT_BYTES = 32 << 20


class Consumer(Protocol):
    """What is told the bytes of one tensor, in their order."""

    def update(self, data: Buffer, /) -> None: ...

    def finish(self) -> None:
        """Called after the last byte."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Bytes that are to be read, and who wants to know them."""

    extent: Extent
    consumer: Consumer | None = None


#: Given bytes of a file and where in it they were: puts them where they belong.
Write: TypeAlias = Callable[[memoryview, int], None]


def segments(readings: Iterable[Reading], label: str, jobs: int, write: Write | None = None) -> Iterator[Segment]:
    """Work for ``parallel.run``: neighbours together, and every tensor in one segment.

    Args:
        readings: In the order of their bytes.
        label: How messages call the source.
        jobs: How many threads there will be.
        write: Where bytes go besides; None if they are only read.
    """
    size = buffer_bytes(jobs)
    group: list[Reading] = []
    filled = 0
    for reading in readings:
        if not reading.extent.length:
            if reading.consumer is not None:
                reading.consumer.finish()
            continue
        group.append(reading)
        filled += reading.extent.length
        if filled >= _SEGMENT_BYTES:
            yield _pieces(group, label, size, write)
            group, filled = [], 0
    if group:
        yield _pieces(group, label, size, write)


def _pieces(readings: Iterable[Reading], label: str, size: int, write: Write | None) -> Iterator[_Piece]:
    """Pieces of at most a buffer's size: several tensors, or a part of one.

    The parts of a tensor are cut at multiples of the size from its own start, where the tree of BLAKE3 has large
    subtrees: cut elsewhere, threads have half the speed on it.
    """
    piece: _Piece | None = None
    for reading in readings:
        extent = reading.extent
        position, end = extent.offset, extent.offset + extent.length
        if piece is not None and not piece.has_room(extent, size):
            yield piece
            piece = None
        while position < end:
            if piece is None:
                piece = _Piece(extent.file, position, label, write)
            stop = min(end, position + size)
            piece.add(stop, reading.consumer, is_last=stop == end)
            position = stop
            if position < end:
                yield piece
                piece = None
    if piece is not None:
        yield piece


class _Piece:
    """Bytes of a file that are read at one go."""

    def __init__(self, file: StoredFile, start: int, label: str, write: Write | None) -> None:
        self._file, self._start, self._stop = file, start, start
        self._label, self._write = label, write
        self._parts: list[tuple[Consumer, int, int, bool]] = []

    def has_room(self, extent: Extent, size: int) -> bool:
        """Whether an extent goes on where it ends, and fits into a buffer with it."""
        is_next = extent.file is self._file and extent.offset == self._stop
        return is_next and self._stop - self._start + extent.length <= size

    def add(self, stop: int, consumer: Consumer | None, *, is_last: bool) -> None:
        """Let it go on to an offset; whether that is the end of a tensor."""
        if consumer is not None:
            self._parts.append((consumer, self._stop - self._start, stop - self._start, is_last))
        self._stop = stop

    def fetch(self, buffer: memoryview) -> memoryview:
        view = buffer[: self._stop - self._start]
        read_into(view, self._file, self._start, self._label)
        if self._write is not None:
            self._write(view, self._start)
        return view

    def follow(self, data: Buffer) -> None:
        view = memoryview(data)
        for consumer, first, stop, is_last in self._parts:
            consumer.update(view[first:stop])
            if is_last:
                consumer.finish()


# --- What is read to be known -----------------------------------------------------------------------


class _Digesting:
    """The digest of a tensor in the making."""

    def __init__(self, name: str, algorithm: str, threads: int | None, found: dict[str, str]) -> None:
        self._name, self._digester, self._found = name, Digester(algorithm, threads), found
        self.update = self._digester.update

    def finish(self) -> None:
        self._found[self._name] = str(self._digester)


def digest_threads(nbytes: int, total: int, jobs: int) -> int | None:
    """How many threads may work on a digest: more than one where others would have to wait for it; None for all.

    Args:
        nbytes: Size of the tensor, in bytes.
        total: Of all tensors, in bytes.
        jobs: How many threads there are for all.
    """
    if nbytes * jobs <= total:
        return 1
    return None if jobs >= available_jobs() else jobs


def digests(wanted: Mapping[str, tuple[Extent, str]], label: str, meter: Meter, jobs: int) -> dict[str, str]:
    """The digests of tensors.

    Args:
        wanted: Where their bytes are, and the algorithm, by name.
        label: How messages call the source.
        meter: Told how many bytes are read.
        jobs: How many threads read.

    Raises:
        CheckpointError: if a file was cut short meanwhile.
        SystemFailure: if it cannot be read.
    """
    total = sum(extent.length for extent, _ in wanted.values())
    found: dict[str, str] = {}
    readings = (
        Reading(extent, _Digesting(name, algorithm, digest_threads(extent.length, total, jobs), found))
        for name, (extent, algorithm) in sorted(wanted.items(), key=lambda item: _place(item[1][0]))
    )
    run(segments(readings, label, jobs), jobs, meter)
    return found


class _Comparing:
    """A comparison with bytes of another place, in the making."""

    def __init__(self, name: str, other: Extent, label: str, found: set[str]) -> None:
        self._name, self._other, self._label, self._found = name, other, label, found
        self._position = other.offset
        self._differs = False

    def update(self, data: Buffer) -> None:
        if not self._differs:
            spare = _spare(len(data))
            read_into(memoryview(spare), self._other.file, self._position, self._label)
            self._differs = not same_bytes(spare, data)
            self._position += len(data)

    def finish(self) -> None:
        if self._differs:
            self._found.add(self._name)


def _spare(length: int) -> bytearray:
    """A buffer of a length, of the calling thread alone: the one it had last, if that has the length."""
    buffer: bytearray | None = getattr(_local, "spare", None)
    if buffer is None or len(buffer) != length:
        _local.spare = buffer = bytearray(length)
    return buffer


_local = local()


def unequal(pairs: Mapping[str, tuple[Extent, Extent]], labels: tuple[str, str], meter: Meter, jobs: int) -> set[str]:
    """The tensors that have other bytes in another place. Nothing is hashed.

    Args:
        pairs: The two places of each, of one length, by name.
        labels: How messages call the two sources.
        meter: Told how many bytes were compared.
        jobs: How many threads read.

    Raises:
        CheckpointError: if a file was cut short meanwhile.
        SystemFailure: if one cannot be read.
    """
    found: set[str] = set()
    readings = (
        Reading(one, _Comparing(name, other, labels[1], found))
        for name, (one, other) in sorted(pairs.items(), key=lambda item: _place(item[1][0]))
    )
    run(segments(readings, labels[0], jobs), jobs, meter)
    return found


def _place(extent: Extent) -> tuple[str, int]:
    return extent.file.name, extent.offset
