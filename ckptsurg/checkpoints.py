"""A checkpoint: files held open and where in them the bytes of each tensor are, or what a framework holds of them."""

from __future__ import annotations

import json
import os
import stat
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from .errors import CheckpointError, SystemFailure, UsageError, system_failures
from .parsing import read_up_to
from .tensors import CHUNK_BYTES, Buffer, TensorInfo, TensorSource, digest_of, sections
from .urls import URL
from .wording import shown

__all__ = [
    "Checkpoint",
    "Extent",
    "Index",
    "StoredFile",
    "extents_of",
    "merged_metadata",
    "open_regular",
    "open_stored",
    "read_extent",
    "read_into",
    "read_small",
]


@dataclass(frozen=True, slots=True, eq=False)
class StoredFile:
    """One file of weights, held by its descriptor so that what was checked is what is read.

    Attributes:
        name: Path inside the checkpoint's folder, with ``/``; for a lone file its own name.
        descriptor: Open for reading.
        status: What ``fstat`` said when the file was opened.
        header: Length of the header's JSON, in bytes; it follows the eight bytes of its length. Of another format, what
            stands for a header: dtype and shape by name as JSON, sorted by name, ASCII alone, without white space.
        metadata: ``__metadata__``, or None where the file has none.
    """

    name: str
    descriptor: int
    status: os.stat_result
    header: int | bytes
    metadata: Mapping[str, str] | None

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.status.st_size

    @property
    def version(self) -> str:
        """What is another once the file was written to, as far as that is told without reading it; empty if nothing."""
        return str(self.status.st_mtime_ns)

    @property
    def data_start(self) -> int:
        """Where the tensors' bytes begin, in bytes; of another format, nowhere."""
        return 8 + self.header if isinstance(self.header, int) else self.size

    def header_digest(self, algorithm: str) -> str:
        """Digest of the header's JSON bytes, padding included."""
        if isinstance(self.header, bytes):
            return digest_of([self.header], algorithm)
        return digest_of(read_extent(Extent(self, 8, self.header), shown(self.name)), algorithm)

    def close(self) -> None:
        os.close(self.descriptor)

    def fill(self, view: memoryview, offset: int, label: str) -> None:
        """Fill a buffer with the file's bytes from an offset; errors are those of ``read_into``.

        By ``pread``: a file that is cut short is an error here, where a mapped one would kill the process.
        """
        filled = 0
        while filled < len(view):
            try:
                count = os.preadv(self.descriptor, [view[filled:]], offset + filled)
            except OSError as failure:
                raise SystemFailure(f"{label}: {shown(self.name)} cannot be read: {failure.strerror}") from None
            if count == 0:
                raise CheckpointError(
                    f"{label}: {shown(self.name)} was cut short while it was read: expected "
                    f"{self.size:,} bytes, found {os.fstat(self.descriptor).st_size:,}"
                )
            filled += count

    def conclude(self) -> None:
        """Called after the last read, where nothing failed; raises CheckpointError if what was read is not one file."""

    def refuse_if_changed(self, label: str) -> None:
        """Raise CheckpointError if somebody wrote to the file since it was opened."""
        if _identity(os.fstat(self.descriptor)) != _identity(self.status):
            raise CheckpointError(f"{label}: {shown(self.name)} was changed while it was read; nothing was published")


def _identity(status: os.stat_result) -> tuple[int, ...]:
    """What is another where a file was written to, or another put in its place."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file: ``length`` of them from ``offset``."""

    file: StoredFile
    offset: int
    length: int

    def part(self, start: int, stop: int) -> Extent:
        """The bytes from one to before another, counted from its own first."""
        return Extent(self.file, self.offset + start, stop - start)


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
    """A TensorSource that can be operated on: tensors, and the files that they come from. Close it, or use a ``with``.

    Attributes:
        label: How messages call it.
        path: As the user gave it; None of what is in memory.
        files: The files of weights, in the order of their names.
        tensors: Every tensor by name, in file order.
        extents: Where the bytes of a tensor lie as they are. What has no extent is read from ``source``.
        folder: The model folder, whose other files belong to the checkpoint; None for a lone file.
        index: The index, where there is one.
        warnings: What is odd but no error.
        source: What a framework's own reader gave, or what is in memory.
        homes: In which file tensors belong, where their extents do not say so.
        tied: Groups of names that stand for one tensor.
        url: Where it is, of a checkpoint on another machine; it has neither path nor folder here.
        remote_folder: The model folder there, whose other files belong to the checkpoint; None for a lone file.
        metadata: Text by key, of all files together; None where none has any.
        clashes: Metadata that two files had and that could not both be kept.
    """

    path: Path | None
    files: Sequence[StoredFile]
    tensors: Mapping[str, TensorInfo]
    extents: Mapping[str, Extent]
    folder: Path | None = None
    index: Index | None = None
    warnings: Sequence[str] = ()
    source: TensorSource | None = None
    homes: Mapping[str, str] = field(default_factory=dict)
    tied: Sequence[Sequence[str]] = ()
    url: URL | None = None
    remote_folder: URL | None = None
    label: str = field(init=False)
    metadata: Mapping[str, str] | None = field(init=False)
    clashes: Sequence[str] = field(init=False)
    _closer: weakref.finalize[Any, Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._closer = weakref.finalize(self, _close, list(self.files))
        place = self.path if self.path is not None else self.url
        self.label = shown(place) if place is not None else self.source.label if self.source else ""
        self.metadata, self.clashes = merged_metadata(self.files)
        if self.source is not None:
            self.metadata = getattr(self.source, "metadata", None)

    @classmethod
    def over(cls, source: TensorSource) -> Self:
        """What is in memory, as a base: no file belongs to it."""
        return cls(None, [], source.tensors, {}, source=source)

    def file_of(self, name: str) -> str:
        """The name of the file that a tensor is in; empty for what is in memory."""
        if name in self.homes:
            return self.homes[name]
        if name in self.extents:
            return self.extents[name].file.name
        return self.files[0].name if self.files else ""

    @cached_property
    def counts(self) -> Mapping[StoredFile, int]:
        """How many tensors lie in each file."""
        return Counter(extent.file for extent in self.extents.values())

    def path_of(self, file: StoredFile) -> Path:
        """Where a file of the checkpoint is. One on another machine is below what is no folder: no path leads to it."""
        if self.url is not None:
            return Path(os.devnull, file.name)
        home = self.folder or (self.path.parent if self.path is not None else Path())
        return home / file.name

    def refuse_if_closed(self) -> None:
        """Raise UsageError if it is closed: the number of a closed descriptor may be another file's by now."""
        if not self._closer.alive:
            raise UsageError(f"{self.label}: the checkpoint is closed", hint="open it again")

    def read(self, name: str) -> Iterator[Buffer]:
        self.refuse_if_closed()
        if name in self.extents:
            return read_extent(self.extents[name], self.label)
        assert self.source is not None
        return self.source.read(name)

    def ranges(self, name: str) -> Callable[[int, int], Iterator[Buffer]]:
        """A reader of ranges of a tensor's bytes, by first and the one after the last, asked for in their order."""
        self.refuse_if_closed()
        if name not in self.extents:
            return sections(self.read(name))
        extent = self.extents[name]
        return lambda start, stop: read_extent(extent.part(start, stop), self.label)

    def refuse_if_changed(self) -> None:
        """Raise CheckpointError if a file was written to since it was opened."""
        self.refuse_if_closed()
        for file in self.files:
            file.refuse_if_changed(self.label)

    def refuse_remote_folder(self) -> None:
        """Raise UsageError if there are files beside the weights, and they are on another machine."""
        if self.remote_folder is not None:
            raise UsageError(
                f"{self.label}: is not on this machine: of a model folder there, only the weights are fetched",
                hint="download it and give its path; an output that ends in .safetensors takes the weights alone",
            )

    def close(self) -> None:
        self._closer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self._closer.alive:
                for file in self.files:
                    file.conclude()
        finally:
            self.close()


def extents_of(source: TensorSource) -> Mapping[str, Extent]:
    """Where the bytes of tensors lie as they are; nowhere, if a source is no checkpoint in files.

    Raises:
        UsageError: if the checkpoint is closed.
    """
    if not isinstance(source, Checkpoint):
        return {}
    source.refuse_if_closed()
    return source.extents


def open_regular(
    path: Path, flags: int = 0, label: str | None = None, *, folder: int | None = None
) -> tuple[int, os.stat_result]:
    """Open a file of a checkpoint for reading, if it is one.

    Args:
        path: Where it is.
        flags: Further flags of ``open(2)``.
        label: How messages call it; None for its path.
        folder: A descriptor of the folder that the path is relative to; None for the working one.

    Returns:
        A descriptor and what ``fstat`` says of it.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is a folder, pipe, socket or device.
        SystemFailure: if it cannot be opened.
    """
    label = label or shown(path)
    try:
        # Without O_NONBLOCK, opening a FIFO waits for somebody to write to it.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | flags, dir_fd=folder)
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


def open_stored(
    path: Path, name: str, tensors: Mapping[str, TensorInfo], since: os.stat_result | None = None
) -> StoredFile:
    """A file of a format that a framework reads, held open so that a change to it is seen.

    Args:
        path: Where it is.
        name: What it is called inside its checkpoint.
        tensors: What it holds, which stands for its header.
        since: What ``fstat`` said before the framework read it.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is none, or was changed since.
        SystemFailure: if it cannot be opened.
    """
    descriptor, status = open_regular(path)
    if since is not None and _identity(status) != _identity(since):
        os.close(descriptor)
        raise CheckpointError(f"{shown(path)}: was changed while it was read")
    header = {one: [info.dtype, list(info.shape)] for one, info in sorted(tensors.items())}
    return StoredFile(name, descriptor, status, json.dumps(header, separators=(",", ":")).encode(), None)


def merged_metadata(files: Sequence[StoredFile]) -> tuple[Mapping[str, str] | None, list[str]]:
    """The metadata of all files in one; where two say different things, the first stands, and is named."""
    merged: dict[str, str] = {}
    clashes: list[str] = []
    for file in files:
        for key, value in (file.metadata or {}).items():
            if merged.setdefault(key, value) != value:
                said, kept = shown(value, 60), shown(merged[key], 60)
                clashes.append(f"metadata '{shown(key, 60)}': {shown(file.name)} says '{said}'; kept '{kept}'")
    return (merged if any(file.metadata is not None for file in files) else None), clashes


def read_small(path: Path, limit: int, flags: int = 0) -> bytes:
    """The bytes of an index or configuration; ``flags`` as for ``open_regular``.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is no file, or larger than ``limit`` bytes.
        SystemFailure: if it cannot be read.
    """
    descriptor, _ = open_regular(path, flags)
    with system_failures(shown(path)), os.fdopen(descriptor, "rb") as file:
        raw = read_up_to(limit, file)
    if raw is None:
        raise CheckpointError(f"{shown(path)}: is larger than {limit:,} bytes")
    return raw


def _close(files: Sequence[StoredFile]) -> None:
    for file in files:
        file.close()


def read_extent(extent: Extent, label: str) -> Iterator[memoryview]:
    """The bytes of an extent, in chunks of ``CHUNK_BYTES``.

    Every chunk is a view of one buffer that the next chunk overwrites.

    Raises:
        CheckpointError: if the file ends before the extent does.
        SystemFailure: if the system cannot read it.
    """
    view = memoryview(bytearray(min(CHUNK_BYTES, max(extent.length, 1))))
    done = 0
    while done < extent.length:
        wanted = min(len(view), extent.length - done)
        read_into(view[:wanted], extent.file, extent.offset + done, label)
        yield view[:wanted]
        done += wanted


def read_into(view: memoryview, file: StoredFile, offset: int, label: str) -> None:
    """Fill a buffer with the bytes of a file from an offset.

    Raises:
        CheckpointError: if the file ends before, or on another machine is not the one that was opened.
        SystemFailure: if the system cannot read it.
    """
    file.fill(view, offset, label)
