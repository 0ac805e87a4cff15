"""Archives that ``torch.save`` writes: one file, or shards and their index as older Hugging Face models have them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..checkpoints import Checkpoint, Index, StoredFile, open_regular, open_stored
from ..errors import CheckpointError
from ..frameworks.importing import import_torch
from ..wording import enumerate_names, shown
from .archive_safety import examined
from .expanding import refuse_expanding
from .indexes import contained, read_index, refuse_both
from .saved_by_torch import UnchangedFiles, find_state_dict, reading

if TYPE_CHECKING:
    import torch

__all__ = ["holds_archive", "open_archive", "open_archive_folder", "open_archive_index"]

ARCHIVE_NAME = "pytorch_model.bin"
ARCHIVE_INDEX_NAME = "pytorch_model.bin.index.json"


def open_archive(path: Path, folder: Path | None = None) -> Checkpoint:
    """Open an archive: a state dict, or one under ``state_dict``, ``model`` or ``model_state_dict``.

    Nothing but weights is unpickled. A ZIP archive is mapped, not loaded; one in the older format is loaded whole.

    Args:
        path: Where it is.
        folder: The model folder that it is the checkpoint of; None for a lone file.

    Raises:
        UsageError: if there is no such file, or no torch that reads it safely.
        CheckpointError: if it holds anything that torch refuses, or no state dict.
        SystemFailure: if the system cannot read it.
    """
    real = path.resolve() if folder is None else contained(path, folder)
    with ExitStack() as stack:
        archive = _open(real, path.name, shown(path), stack)
        source = _source({path.name: archive}, shown(folder or path))
        opened = Checkpoint(
            folder or path,
            [archive.file],
            source.tensors,
            {},
            folder,
            warnings=archive.warnings,
            source=source,
            tied=archive.tied,
        )
        stack.pop_all()
    return opened


def holds_archive(folder: Path) -> bool:
    """Whether a folder holds an archive of a model, or its shards, if ones that are no good."""
    return any(os.path.lexists(folder / name) for name in (ARCHIVE_NAME, ARCHIVE_INDEX_NAME))


def open_archive_folder(folder: Path) -> Checkpoint:
    """Open a folder with ``pytorch_model.bin`` or its index.

    Raises:
        CheckpointError: if the checkpoint is malformed, or there are both.
        UsageError: if there is no torch that reads it safely.
        SystemFailure: if the system cannot read it.
    """
    single, index = folder / ARCHIVE_NAME, folder / ARCHIVE_INDEX_NAME
    refuse_both(single, index)
    return open_archive_index(index) if os.path.lexists(index) else open_archive(single, folder)


def open_archive_index(path: Path) -> Checkpoint:
    """Open a sharded checkpoint by its index; every shard's path is checked before any is opened.

    Raises:
        UsageError: if there is no such index, or no torch that reads the shards safely.
        CheckpointError: if the index or a shard is malformed, or they disagree.
        SystemFailure: if the system cannot read it.
    """
    index = read_index(path, ".bin")
    folder = path.parent
    label = folder if path.name == ARCHIVE_INDEX_NAME else path
    homes: dict[str, str] = {}
    archives: dict[str, _Archive] = {}
    with ExitStack() as stack:
        for name, shard in index.paths.items():
            archives[name] = _open(shard, name, shown(folder / name), stack)
            index.refuse_disagreement(name, archives[name].tensors, homes)
            homes.update(dict.fromkeys(archives[name].tensors, name))
        index.refuse_lacking(homes)
        source = _source(archives, shown(label))
        said = [*index.warnings(source.tensors.values()), *(one for each in archives.values() for one in each.warnings)]
        opened = Checkpoint(
            label,
            [archive.file for archive in archives.values()],
            source.tensors,
            {},
            folder,
            Index(path.name, index.metadata),
            warnings=said,
            source=source,
            homes=homes,
            tied=[names for archive in archives.values() for names in archive.tied],
        )
        stack.pop_all()
    return opened


@dataclass(frozen=True, slots=True)
class _Archive:
    """An opened archive.

    Attributes:
        file: Held open, so that a change to it is seen.
        tensors: Its state dict.
        warnings: What is odd about it.
        tied: Groups of names that stand for one tensor.
    """

    file: StoredFile
    tensors: Mapping[str, torch.Tensor]
    warnings: list[str]
    tied: list[list[str]]


def _source(archives: Mapping[str, _Archive], label: str) -> UnchangedFiles:
    from ..frameworks.pytorch import TorchTensors

    tensors = {name: tensor for archive in archives.values() for name, tensor in archive.tensors.items()}
    files = {name: [archive.file] for archive in archives.values() for name in archive.tensors}
    return UnchangedFiles(TorchTensors(tensors, label), files)


def _open(real: Path, name: str, label: str, stack: ExitStack) -> _Archive:
    """Open an archive; the stack closes it again."""
    descriptor, before = open_regular(real)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - of a descriptor
        saved = _load(real, file, before.st_size, label)
    import torch

    from ..frameworks.pytorch import info_of

    with reading(label):
        found = find_state_dict(saved, torch.Tensor, label)
    for tensor_name, tensor in found.tensors.items():
        if reason := _unreadable(tensor):
            raise CheckpointError(f'{label}: "{shown(tensor_name)}" {reason}')
    infos = {one: info_of(tensor) for one, tensor in found.tensors.items()}
    for tensor_name, info in infos.items():  # one number can be said to fill any shape
        refuse_expanding(f'{label}: tensor "{shown(tensor_name)}"', info.nbytes, before.st_size)
    stored = open_stored(real, name, infos, since=before)
    stack.callback(stored.close)
    tied = _tied(found.tensors)
    said = [f"{label}: {enumerate_names(names)}: one tensor in the archive; each is written" for names in tied]
    return _Archive(stored, found.tensors, [*found.warnings, *said], tied)


def _load(path: Path, file: BinaryIO, size: int, label: str) -> Any:
    """What ``torch.save`` was given, of which only weights and plain data are unpickled."""
    torch = import_torch(label)
    with reading(label), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript and odd protocols; what cannot be read is an error
        mmap = examined(file, size, label)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _unreadable(tensor: torch.Tensor) -> str | None:
    from ..frameworks.pytorch import as_dtensor, unreadable

    if as_dtensor(tensor) is not None:
        return "is a DTensor, of which each process has a piece; save with torch.distributed.checkpoint"
    return unreadable(tensor)


def _tied(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Names of tensors that are the same bytes of the archive."""
    spans: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()
            spans.setdefault(place, []).append(name)
    return [names for names in spans.values() if len(names) > 1]
