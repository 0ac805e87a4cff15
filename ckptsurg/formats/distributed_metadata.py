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
from .pickles import CarefulUnpickler
from .saved_by_torch import AGAIN, reading

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

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
        try:
            metadata = _MetadataUnpickler(file, classes).load()
        except MemoryError:  # a length that was changed
            raise malformed(label, "it cannot be that long") from None
        _refuse_malformed(metadata, label)
    found: Metadata = metadata
    return found


def malformed(label: str, what: str) -> CheckpointError:
    """What is said of metadata that torch would not have written."""
    return CheckpointError(f"{label}: the metadata is malformed: {what}", hint=AGAIN)


def _refuse_malformed(metadata: Any, label: str) -> None:
    """Every part has the type that torch gives it; what is amiss besides raises whatever it does."""
    from torch import Size, dtype
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorStorageMetadata,
    )

    if not isinstance(metadata, Metadata):
        raise malformed(label, f"expected Metadata, found {type(metadata).__name__}")
    records: dict[Any, Any] = metadata.state_dict_metadata
    for key, record in records.items():
        if type(key) is not str or not isinstance(record, BytesStorageMetadata | TensorStorageMetadata):
            raise malformed(label, shown(key))
        if isinstance(record, TensorStorageMetadata):
            kind: Any = record.properties.dtype
            sizes = [record.size, *(size for chunk in record.chunks for size in (chunk.offsets, chunk.sizes))]
            if not isinstance(kind, dtype) or any(type(size) is not Size for size in sizes):
                raise malformed(label, shown(key))
    places: dict[Any, Any] = metadata.storage_data
    for index, place in places.items():
        if not isinstance(index, MetadataIndex) or not isinstance(place, _StorageInfo):
            raise malformed(label, "storage_data")
        path: Any = place.relative_path
        if type(path) is not str or type(place.offset) is not int or type(place.length) is not int:
            raise malformed(label, "storage_data")


class _MetadataUnpickler(CarefulUnpickler):
    """An unpickler that knows the classes of the metadata, and runs nothing but their construction."""

    def __init__(self, file: BinaryIO, classes: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
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
