"""A checkpoint on disk: files held open, and where in them the bytes of each tensor are."""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .errors import CheckpointError, SystemFailure, UsageError, system_failures
from .tensors import CHUNK_BYTES, TensorInfo, digest_of
from .wording import shown

__all__ = ["Checkpoint", "Extent", "Index", "StoredFile", "open_regular", "read_extent", "read_small"]


@dataclass(frozen=True, slots=True, eq=False)
class StoredFile:
    """One file of weights, held by its descriptor so that what was checked is what is read.

    Attributes:
        name: Path inside the checkpoint's folder, with ``/``; for a lone file its own name.
        descriptor: Open for reading.
        status: What ``fstat`` said when the file was opened.
        header: Length of the header's JSON, in bytes; it follows the eight bytes of its length.
        metadata: ``__metadata__``, or None where the file has none.
    """

    name: str
    descriptor: int
    status: os.stat_result
    header: int
    metadata: Mapping[str, str] | None

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.status.st_size

    def header_digest(self, algorithm: str) -> str:
        """Digest of the header's JSON bytes, padding included."""
        return digest_of(read_extent(Extent(self, 8, self.header), shown(self.name)), algorithm)

    def refuse_if_changed(self, label: str) -> None:
        """Raise CheckpointError if somebody wrote to the file since it was opened."""
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.status.st_size, self.status.st_mtime_ns):
            raise CheckpointError(f"{label}: {shown(self.name)} was changed while it was read; nothing was published")


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file: ``length`` of them from ``offset``."""

    file: StoredFile
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Index:
    """The index of a sharded checkpoint.

    Attributes:
        name: Its file name.
        metadata: Its ``metadata`` object.
    """

    name: str
    metadata: Mapping[str, Any]


@dataclass(eq=False)
class Checkpoint:
    """A TensorSource whose tensors lie in files. Close it, or use it in a ``with``.

    Attributes:
        path: As the user gave it.
        files: The files of weights, in the order of their names.
        tensors: Every tensor by name, in file order.
        extents: Where the bytes of each tensor are.
        folder: The model folder, whose other files belong to the checkpoint; None for a lone file.
        index: The index, where there is one.
        warnings: What is odd but no error.
    """

    path: Path
    files: Sequence[StoredFile]
    tensors: Mapping[str, TensorInfo]
    extents: Mapping[str, Extent]
    folder: Path | None = None
    index: Index | None = None
    warnings: Sequence[str] = ()
    _closer: weakref.finalize[Any, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._closer = weakref.finalize(self, _close, [file.descriptor for file in self.files])

    @property
    def label(self) -> str:
        return shown(self.path)

    def read(self, name: str) -> Iterator[memoryview]:
        if not self._closer.alive:  # the number of a closed descriptor may be another file's by now
            raise UsageError(f"{self.label}: the checkpoint is closed")
        return read_extent(self.extents[name], self.label)

    def refuse_if_changed(self) -> None:
        """Raise CheckpointError if a file was written to since it was opened."""
        for file in self.files:
            file.refuse_if_changed(self.label)

    def close(self) -> None:
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_regular(path: Path, flags: int = 0) -> tuple[int, os.stat_result]:
    """Open a file of a checkpoint for reading, if it is one.

    Args:
        path: Where it is.
        flags: Further flags of ``open(2)``.

    Returns:
        A descriptor and what ``fstat`` says of it.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is a folder, pipe, socket or device.
        SystemFailure: if it cannot be opened.
    """
    label = shown(path)
    try:
        # Without O_NONBLOCK, opening a FIFO waits for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{label}: no such file") from None
    except OSError as failure:
        raise SystemFailure(f"{label}: cannot be opened: {failure.strerror}") from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
        raise CheckpointError(f"{label}: is {kind}; expected a file")
    return descriptor, status


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of an index or configuration.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is no file, or larger than ``limit`` bytes.
        SystemFailure: if it cannot be read.
    """
    descriptor, _ = open_regular(path)
    with system_failures(shown(path)), os.fdopen(descriptor, "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise CheckpointError(f"{shown(path)}: is larger than {limit:,} bytes")
    return raw


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def read_extent(extent: Extent, label: str, buffer: bytearray | None = None) -> Iterator[memoryview]:
    """The bytes of an extent, in chunks of the buffer's size (``CHUNK_BYTES`` without one).

    Every chunk is a view of one buffer that the next chunk overwrites. Reads are by ``pread``: a file that is
    cut short is an error here, where a mapped one would kill the process.

    Raises:
        CheckpointError: if the file ends before the extent does.
        SystemFailure: if the system cannot read it.
    """
    view = memoryview(bytearray(min(CHUNK_BYTES, max(extent.length, 1))) if buffer is None else buffer)
    done = 0
    while done < extent.length:
        wanted = min(len(view), extent.length - done)
        filled = 0
        while filled < wanted:
            try:
                count = os.preadv(extent.file.descriptor, [view[filled:wanted]], extent.offset + done + filled)
            except OSError as failure:
                raise SystemFailure(f"{label}: {shown(extent.file.name)} cannot be read: {failure.strerror}") from None
            if count == 0:
                raise CheckpointError(
                    f"{label}: {shown(extent.file.name)} was cut short while it was read: expected "
                    f"{extent.file.size:,} bytes, found {extent.offset + done + filled:,}"
                )
            filled += count
        yield view[:wanted]
        done += wanted
