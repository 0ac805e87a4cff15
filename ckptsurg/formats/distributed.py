"""Folders that ``torch.distributed.checkpoint`` writes: what sharded training saves, each process its part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import Checkpoint, StoredFile, open_stored
from ..errors import CheckpointError
from ..tensors import DTYPE_BITS, TensorInfo
from ..wording import shown
from .distributed_metadata import malformed, read_metadata
from .endings import DISTRIBUTED_METADATA, PART_OF_DISTRIBUTED
from .indexes import allow_descriptors, contained, refuse_unsafe
from .saved_by_torch import AGAIN, UnchangedFiles, find_state_dict, reading

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

__all__ = ["open_distributed"]


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
    places: dict[str, list[str]] = {}
    with reading(label):  # what is malformed in yet another way raises whatever it does
        found = find_state_dict(_nested(metadata, label), _Entry, label)
        for name, entry in found.tensors.items():
            said = f'{label}: tensor "{shown(name)}"'
            record = metadata.state_dict_metadata[entry.key]
            assert isinstance(record, TensorStorageMetadata)
            infos[name] = _info(record, said)
            places[name] = _places(metadata, entry.key, record, said)
    inside = sorted({one for ones in places.values() for one in ones} | _shards_in(path))
    with ExitStack() as stack:
        files: dict[str, StoredFile] = {}
        allow_descriptors(len(inside) + 1)
        for one in (DISTRIBUTED_METADATA, *inside):
            real = contained(path / one, path, missing=f"{label}: the file {shown(one)} is missing")
            held = (
                infos if one == DISTRIBUTED_METADATA else {name: infos[name] for name in infos if one in places[name]}
            )
            files[one] = open_stored(real, one, held)
            stack.callback(files[one].close)
        _refuse_cut_short(metadata, files, label)
        keys = {name: entry.key for name, entry in found.tensors.items()}
        read_from = {name: [files[one] for one in places[name]] for name in infos}
        source = UnchangedFiles(_Pieces(path, metadata, keys, infos), read_from)
        homes = {name: places[name][0] for name in infos if places[name]}
        opened = Checkpoint(
            path, list(files.values()), infos, {}, path, warnings=found.warnings, source=source, homes=homes
        )
        stack.pop_all()
    return opened


class _Pieces:
    """A TensorSource that puts one tensor together at a time.

    Attributes:
        label: How messages call it.
        tensors: Dtype and shape by name.
        metadata: Of a file that they are written to.
    """

    def __init__(
        self, path: Path, metadata: Metadata, keys: Mapping[str, str], tensors: Mapping[str, TensorInfo]
    ) -> None:
        from ..frameworks.pytorch import METADATA

        self.label, self.tensors, self.metadata = shown(path), tensors, METADATA
        self._path, self._stored, self._keys = path, metadata, keys

    def read(self, name: str) -> Iterator[memoryview]:
        import torch
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.planner import LoadItemType

        from ..frameworks.pytorch import bytes_of

        key = self._keys[name]
        record: Any = self._stored.state_dict_metadata[key]
        tensor = torch.empty(record.size, dtype=record.properties.dtype)
        reader = FileSystemReader(self._path)
        reader.set_up_storage_reader(self._stored, is_coordinator=True)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({key: tensor}, self._stored, is_coordinator=True)
        plan = planner.finish_plan(planner.create_local_plan())
        if any(item.type is not LoadItemType.TENSOR for item in plan.items):  # anything else would be unpickled
            raise CheckpointError(f'{self.label}: "{shown(name)}" is no tensor')
        reader.read_data(plan, planner).wait()
        yield from bytes_of(tensor)


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
        if not isinstance(path, tuple) or not path:
            raise malformed(label, f"the path of {shown(key)}")
        level = saved
        for part in path[:-1]:
            level = level.setdefault(part, {})
            if not isinstance(level, dict):
                raise malformed(label, f"the path of {shown(key)}")
        if path[-1] in level:
            raise malformed(label, f"the path of {shown(key)}")
        level[path[-1]] = _Entry(key) if isinstance(record, TensorStorageMetadata) else object()
    return saved


def _info(record: TensorStorageMetadata, label: str) -> TensorInfo:
    import torch

    from ..frameworks.pytorch import info_of

    if record.properties.layout is not torch.strided:
        raise CheckpointError(f"{label}: has the layout {record.properties.layout}; only dense tensors are compared")
    info = info_of(torch.empty(record.size, dtype=record.properties.dtype, device="meta"))
    if info.dtype not in DTYPE_BITS:
        raise CheckpointError(f"{label}: is {info.dtype}, which safetensors does not have")
    return info


def _places(metadata: Metadata, key: str, record: TensorStorageMetadata, label: str) -> list[str]:
    """The files that a tensor's pieces are in, which together are the whole of it."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    if not _is_whole(record.size, record.chunks):
        raise CheckpointError(f"{label}: its pieces are not the whole of it", hint="save the checkpoint again")
    names = []
    for chunk in record.chunks:
        stored = metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
        if stored is None:
            raise CheckpointError(f"{label}: the metadata does not say where its piece at {list(chunk.offsets)} is")
        refuse_unsafe(stored.relative_path, label, PART_OF_DISTRIBUTED)
        names.append(stored.relative_path)
    return list(dict.fromkeys(names))


def _is_whole(size: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> bool:
    """Whether pieces fill a tensor: none reaches out of it, no two overlap, and they have as many elements as it."""
    if any(not len(chunk.offsets) == len(chunk.sizes) == len(size) for chunk in chunks):
        return False
    spans = [[(a, a + length) for a, length in zip(one.offsets, one.sizes, strict=True)] for one in chunks]
    boxes = sorted(box for box in spans if all(begin < end for begin, end in box))
    if any(begin < 0 or end > limit for box in boxes for (begin, end), limit in zip(box, size, strict=True)):
        return False
    open_boxes: list[list[tuple[int, int]]] = []
    for box in boxes:
        open_boxes = [other for other in open_boxes if not box or other[0][1] > box[0][0]]
        for other in open_boxes:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, other, strict=True)):
                return False
        open_boxes.append(box)
    return sum(prod(end - begin for begin, end in box) for box in boxes) == prod(size)


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
