"""The metadata of ``torch.distributed.checkpoint``, which torch itself reads with a full pickle."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, BinaryIO

from ..checkpoints import open_regular
from ..errors import CheckpointError, UsageError
from ..frameworks.importing import import_torch
from ..wording import shown
from .endings import DISTRIBUTED_METADATA
from .indexes import contained
from .pickles import CarefulUnpickler, memory_for
from .saved_by_torch import AGAIN, reading

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

__all__ = ["malformed", "read_metadata"]


def read_metadata(folder: Path, label: str) -> Metadata:
    """The metadata, unpickled with nothing but what torch.distributed.checkpoint writes there.

    Args:
        folder: Of the checkpoint.
        label: How messages call it.

    Raises:
        UsageError: if there is no torch that reads the checkpoint safely.
        CheckpointError: if the metadata is malformed, or holds anything else.
    """
    torch = import_torch(label)
    if not torch.distributed.is_available():
        raise UsageError(f"{label}: this PyTorch is built without torch.distributed", hint="install another build")
    try:
        classes = _classes()
    except (ImportError, AttributeError) as error:
        message = f"{label}: PyTorch {torch.__version__} keeps its metadata in another way: {shown(error)}"
        raise UsageError(message, hint="convert it with the PyTorch that wrote it") from None
    path = folder / DISTRIBUTED_METADATA
    descriptor, _ = open_regular(contained(path, folder), os.O_NOFOLLOW)
    label = shown(path)
    with open(descriptor, "rb") as file, reading(label):  # noqa: PTH123 - of a descriptor
        nbytes = sum(one.stat().st_size for one in os.scandir(folder) if one.is_file())
        metadata = _MetadataUnpickler(file, memory_for(nbytes), classes).load()
        _refuse_malformed(metadata, label)
    found: Metadata = metadata
    return found


def malformed(label: str, what: str) -> CheckpointError:
    """What is said of metadata that torch would not have written."""
    return CheckpointError(f"{label}: the metadata is malformed: {what}", hint=AGAIN)


def _refuse_malformed(metadata: Any, label: str) -> None:
    """Every part has the type that torch gives it; where one is missing, Python says so."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
    )

    if not isinstance(metadata, Metadata):
        raise malformed(label, f"expected Metadata, found {type(metadata).__name__}")
    records: Any = metadata.state_dict_metadata
    if type(records) is not dict:
        raise malformed(label, "state_dict_metadata")
    for key, record in records.items():
        if type(key) is not str or not isinstance(record, BytesStorageMetadata | TensorStorageMetadata):
            raise malformed(label, _called(key))
        if isinstance(record, TensorStorageMetadata) and not _is_described(record):
            raise malformed(label, _called(key))
    paths: Any = metadata.planner_data
    for key, path in paths.items() if type(paths) is dict else ():
        if type(path) is not tuple or not path or any(type(part) not in (str, int) for part in path):
            raise malformed(label, f"the path of {_called(key)}")
    places: Any = metadata.storage_data
    if type(places) is not dict:
        raise malformed(label, "storage_data")
    for index, place in places.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise malformed(label, "storage_data")
        wanted: Any = place.relative_path
        if type(wanted) is not str or type(place.offset) is not int or type(place.length) is not int:
            raise malformed(label, f"where {_called(index.fqn)} is")


def _called(key: object) -> str:
    """A name, if it is one: what else stands in its place may be long."""
    return f'"{shown(key)}"' if type(key) is str else f"{type(key).__name__} in place of a name"


def _is_described(record: TensorStorageMetadata) -> bool:
    """Whether a tensor has a dtype, a layout, a size, and pieces of as many dimensions."""
    from torch import Size, dtype, layout
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties

    about: Any = record.properties
    if not (isinstance(about, TensorProperties) and type(about.dtype) is dtype and type(about.layout) is layout):
        return False
    pieces: Any = record.chunks
    if type(pieces) is not list or not all(isinstance(one, ChunkStorageMetadata) for one in pieces):
        return False
    sizes: list[Any] = [record.size, *(size for one in pieces for size in (one.offsets, one.sizes))]
    return all(type(one) is Size and len(one) == len(record.size) and min(one, default=0) >= 0 for one in sizes)


class _MetadataUnpickler(CarefulUnpickler):
    """An unpickler that knows the classes of the metadata, and runs nothing but their construction."""

    def __init__(self, file: BinaryIO, memory: int, classes: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file, memory)
        self._classes = classes
        self._index = classes["torch.distributed.checkpoint.metadata", "MetadataIndex"]

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._classes[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}") from None

    def is_plain(self, key: object) -> bool:
        if type(key) is not self._index:
            return super().is_plain(key)
        state: dict[str, Any] = vars(key)
        offset = state.get("offset")
        return type(state.get("fqn")) is str and (offset is None or all(type(one) is int for one in offset))

    def may_be_built(self, one: object) -> bool:
        return is_dataclass(one) and not isinstance(one, type)


@cache
def _classes() -> dict[tuple[str, str], Any]:
    """What metadata is made of, by module and name."""
    import torch
    from torch.distributed.checkpoint import filesystem, metadata

    classes = [
        metadata.BytesStorageMetadata,
        metadata.ChunkStorageMetadata,
        metadata.Metadata,
        metadata.MetadataIndex,
        metadata.StorageMeta,
        metadata.TensorProperties,
        metadata.TensorStorageMetadata,
        metadata._MEM_FORMAT_ENCODING,
        filesystem._StorageInfo,
        filesystem._StoragePrefix,
    ]
    allowed: dict[tuple[str, str], Any] = {(one.__module__, one.__name__): one for one in classes}
    dtypes = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    for name, dtype in dtypes.items():
        allowed["torch", name.removeprefix("torch.")] = dtype
    allowed["torch", "Size"] = torch.Size
    allowed["torch.serialization", "_get_layout"] = torch.serialization._get_layout
    # Where the checkpoint was saved, which may be a path of the system that it was saved on.
    for module in ("pathlib", "pathlib._local"):
        allowed[module, "PosixPath"] = allowed[module, "PurePosixPath"] = PurePosixPath
        allowed[module, "WindowsPath"] = allowed[module, "PureWindowsPath"] = PureWindowsPath
    return allowed
