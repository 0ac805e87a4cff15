"""Folders that ``torch.distributed.checkpoint`` writes: what sharded training saves, each process its part."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import Checkpoint, StoredFile, open_stored
from ..errors import CheckpointError
from ..tensors import DTYPE_BITS, TensorInfo
from ..wording import shown
from .archive_safety import examined
from .distributed_metadata import malformed, read_metadata
from .endings import DISTRIBUTED_METADATA, PART_OF_DISTRIBUTED
from .indexes import allow_descriptors, contained, refuse_unsafe
from .saved_by_torch import AGAIN, UnchangedFiles, find_state_dict, reading

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

__all__ = ["open_distributed"]

#: Dimensions along which a tensor may be cut; meshes of processes have three or four.
_MOST_CUT = 8


def open_distributed(path: Path) -> Checkpoint:
    """Open a folder of ``torch.distributed.checkpoint``: a state dict, or one under ``model`` or like.

    Of the tensors nothing is read yet; each is put together from its pieces when it is asked for. No process group is
    needed, and none that is there takes part.

    Args:
        path: The folder.

    Raises:
        UsageError: if there is no torch that reads it safely.
        CheckpointError: if the metadata is malformed or holds anything else, or files are missing or cut short.
        SystemFailure: if the system cannot read it.
    """
    label = shown(path)
    metadata = read_metadata(path, label)
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    infos: dict[str, TensorInfo] = {}
    pieces: dict[str, list[_Piece]] = {}
    with reading(label):  # what is malformed in yet another way raises whatever it does
        found = find_state_dict(_nested(metadata, label), _Entry, label)
        for name, entry in found.tensors.items():
            said = f'{label}: tensor "{shown(name)}"'
            record = metadata.state_dict_metadata[entry.key]
            assert isinstance(record, TensorStorageMetadata)
            infos[name] = _info(record, said)
            pieces[name] = _located(metadata, entry.key, record, infos[name], said)
    held: dict[str, dict[str, TensorInfo]] = {name: {} for name in _shards_in(path)}
    for name, ones in pieces.items():
        for piece in ones:
            held.setdefault(piece.file, {})[name] = infos[name]
    with ExitStack() as stack:
        files: dict[str, StoredFile] = {}
        allow_descriptors(len(held) + 1)
        for one, inside in ((DISTRIBUTED_METADATA, infos), *sorted(held.items())):
            real = contained(path / one, path, missing=f"{label}: the file {shown(one)} is missing")
            files[one] = open_stored(real, one, inside)
            stack.callback(files[one].close)
        _refuse_cut_short(metadata, files, label)
        homes = {name: ones[0].file for name, ones in pieces.items() if ones}
        read_from = {
            name: [files[one] for one in dict.fromkeys(piece.file for piece in pieces[name])] for name in infos
        }
        source = UnchangedFiles(_Pieces(label, infos, pieces, files), read_from)
        opened = Checkpoint(
            path, list(files.values()), infos, {}, path, warnings=found.warnings, source=source, homes=homes
        )
        stack.pop_all()
    return opened


@dataclass(frozen=True, slots=True)
class _Piece:
    """A box of a tensor, and where it is: an archive of torch inside a file.

    Attributes:
        offsets: Its first element, by dimension.
        sizes: Its shape.
        file: Name of the file.
        start: Of the archive in the file, in bytes.
        length: Of the archive, in bytes.
    """

    offsets: Sequence[int]
    sizes: Sequence[int]
    file: str
    start: int
    length: int


class _Pieces:
    """A TensorSource that puts one tensor together at a time.

    Attributes:
        label: How messages call it.
        tensors: Dtype and shape by name.
        metadata: Of a file that they are written to.
    """

    def __init__(
        self,
        label: str,
        tensors: Mapping[str, TensorInfo],
        pieces: Mapping[str, Sequence[_Piece]],
        files: Mapping[str, StoredFile],
    ) -> None:
        from ..frameworks.pytorch import METADATA

        self.label, self.tensors, self.metadata = label, tensors, METADATA
        self._pieces, self._files = pieces, files

    def read(self, name: str) -> Iterator[memoryview]:
        import torch

        from ..frameworks.pytorch import bytes_of, dtype_of

        info = self.tensors[name]
        whole = torch.empty(info.shape, dtype=dtype_of(info))
        for piece in self._pieces[name]:
            said = f'{self.label}: tensor "{shown(name)}": its piece at {list(piece.offsets)} in {shown(piece.file)}'
            spans = zip(piece.offsets, piece.sizes, strict=True)
            box = tuple(slice(begin, begin + length) for begin, length in spans)
            whole[box].copy_(self._load(piece, info, said))
        yield from bytes_of(whole)

    def _load(self, piece: _Piece, info: TensorInfo, label: str) -> torch.Tensor:
        """A piece, if it is what the metadata says: copied, one of another dtype would be converted."""
        import torch

        from ..frameworks.pytorch import info_of, unreadable

        part = io.BufferedReader(_Part(self._files[piece.file].descriptor, piece.start, piece.length))
        with reading(label):
            examined(part, piece.length, label)
            part.seek(0)
            loaded = torch.load(part, map_location="cpu", weights_only=True)
        if not isinstance(loaded, torch.Tensor):
            raise CheckpointError(f"{label} is no tensor")
        if reason := unreadable(loaded):
            raise CheckpointError(f"{label} {reason}")
        found = info_of(loaded)
        if (found.dtype, found.shape) != (info.dtype, tuple(piece.sizes)):
            raise CheckpointError(
                f"{label} is {found.dtype} {list(found.shape)}, expected {info.dtype} {list(piece.sizes)}", hint=AGAIN
            )
        return loaded


class _Part(io.RawIOBase):
    """A part of a file, read from its descriptor wherever that stands."""

    def __init__(self, descriptor: int, start: int, length: int) -> None:
        self._descriptor, self._start, self._length = descriptor, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._length}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._length - self._position, 0)]
        count = os.preadv(self._descriptor, [view], self._start + self._position)
        self._position += count
        return count


# --- What the metadata says -------------------------------------------------------------------------


class _Entry:
    """A tensor of the metadata, in the place that it has in what was saved."""

    def __init__(self, key: str) -> None:
        self.key = key


def _nested(metadata: Metadata, label: str) -> dict[Any, Any]:
    """What was saved, by the path of each of its parts; of what is no tensor, only that it is there."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    saved: dict[Any, Any] = {}
    paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
    for key, record in metadata.state_dict_metadata.items():
        path = paths.get(key, (key,))
        level = saved
        for part in path[:-1]:
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                raise malformed(label, f'the path of "{shown(key)}"')
        if path[-1] in level:
            raise malformed(label, f'the path of "{shown(key)}"')
        level[path[-1]] = _Entry(key) if isinstance(record, TensorStorageMetadata) else object()
    return saved


def _info(record: TensorStorageMetadata, label: str) -> TensorInfo:
    import torch

    from ..frameworks.pytorch import info_of

    if record.properties.layout is not torch.strided:
        raise CheckpointError(f"{label}: has the layout {record.properties.layout}; only dense tensors are compared")
    dtype = info_of(torch.empty(0, dtype=record.properties.dtype, device="meta")).dtype
    if dtype not in DTYPE_BITS:
        raise CheckpointError(f"{label}: is {dtype}, which safetensors does not have")
    return TensorInfo(dtype, tuple(record.size))


def _located(metadata: Metadata, key: str, record: TensorStorageMetadata, info: TensorInfo, label: str) -> list[_Piece]:
    """Where a tensor's pieces are, which together are the whole of it."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    if not _is_whole(info.shape, record.chunks, label):
        raise CheckpointError(f"{label}: its pieces are not the whole of it", hint="save the checkpoint again")
    pieces = []
    for chunk in record.chunks:
        stored = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        said = f"its piece at {list(chunk.offsets)}"
        if stored is None:
            raise CheckpointError(f"{label}: the metadata does not say where {said} is")
        refuse_unsafe(stored.relative_path, label, PART_OF_DISTRIBUTED)
        if getattr(stored, "transform_descriptors", None):  # which torch has since 2.7
            raise CheckpointError(f"{label}: {said} was saved through a transform", hint="save it without extensions")
        needed = TensorInfo(info.dtype, tuple(chunk.sizes)).nbytes
        if stored.length < needed:
            raise CheckpointError(
                f"{label}: {said} has {stored.length:,} bytes in {shown(stored.relative_path)}, expected at least "
                f"{needed:,}",
                hint=AGAIN,
            )
        pieces.append(_Piece(chunk.offsets, chunk.sizes, stored.relative_path, stored.offset, stored.length))
    return pieces


def _is_whole(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata], label: str) -> bool:
    """Whether pieces fill a tensor, each element once.

    A box is told by its corners, with a sign that changes from one to the next: summed up, those of boxes that fill a
    larger one without overlap are the corners of that one, and of no others.
    """
    chunks = [chunk for chunk in chunks if 0 not in chunk.sizes]
    if 0 in size:
        return not chunks
    cut = [
        dim
        for dim, length in enumerate(size)
        if any(chunk.offsets[dim] or chunk.sizes[dim] != length for chunk in chunks)
    ]
    if len(cut) > _MOST_CUT:
        raise CheckpointError(f"{label}: is cut along {len(cut)} dimensions; {_MOST_CUT} are allowed")
    corners: Counter[tuple[int, ...]] = Counter()
    for chunk in chunks:
        corners.update(_corners([(chunk.offsets[dim], chunk.sizes[dim]) for dim in cut], 1))
    corners.update(_corners([(0, size[dim]) for dim in cut], -1))
    return not any(corners.values())


def _corners(box: Sequence[tuple[int, int]], sign: int) -> dict[tuple[int, ...], int]:
    """The corners of a box, given its first element and length by dimension, with their signs."""
    corners: dict[tuple[int, ...], int] = {(): sign}
    for begin, length in box:
        corners = {
            (*corner, end): value * of
            for corner, value in corners.items()
            for end, of in ((begin, 1), (begin + length, -1))
        }
    return corners


def _shards_in(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.name.endswith(PART_OF_DISTRIBUTED)}


def _refuse_cut_short(metadata: Metadata, files: Mapping[str, StoredFile], label: str) -> None:
    for stored in metadata.storage_data.values():
        file = files.get(stored.relative_path)
        if file is not None and not 0 <= stored.offset <= stored.offset + stored.length <= file.size:
            raise CheckpointError(
                f"{label}: {shown(file.name)} is cut short: expected at least {stored.offset + stored.length:,} bytes, "
                f"found {file.size:,}",
                hint=AGAIN,
            )
