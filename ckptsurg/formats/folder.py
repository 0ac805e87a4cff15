"""A model folder in the layout of Hugging Face: one file, or shards and their index, and the files beside them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from ..checkpoints import Checkpoint, Index
from ..errors import CheckpointError, UsageError
from ..header import open_file
from ..manifest import MANIFEST_NAME
from ..wording import enumerate_names, shown
from . import endings
from .endings import INDEX_NAME, SINGLE_NAME
from .indexes import contained, joined, read_index, refuse_both

__all__ = ["INDEX_NAME", "SINGLE_NAME", "companions", "holds_safetensors", "open_folder", "open_index"]

_OPENED = (*endings.SAFETENSORS, *endings.TORCH, *endings.KERAS, ".index.json")


def holds_safetensors(path: Path) -> bool:
    """Whether a folder holds a checkpoint in safetensors, if one that is no good."""
    return any(os.path.lexists(path / name) for name in (SINGLE_NAME, INDEX_NAME))


def open_folder(path: Path) -> Checkpoint:
    """Open a folder with ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        UsageError: if there is neither.
        CheckpointError: if the checkpoint is malformed, or there are both.
    """
    single, index = path / SINGLE_NAME, path / INDEX_NAME
    refuse_both(single, index)
    if os.path.lexists(index):
        return open_index(index)
    if not os.path.lexists(single):
        others = sorted(p.name for p in path.iterdir() if p.name.endswith(_OPENED))
        raise UsageError(
            f"{shown(path)}: no checkpoint in this folder: expected {SINGLE_NAME} or {INDEX_NAME}, "
            "pytorch_model.bin or its index, or a distributed checkpoint",
            hint=f"give the path of the file: {enumerate_names(others)}" if others else None,
        )
    opened = open_file(contained(single, path), SINGLE_NAME, os.O_NOFOLLOW, called=single)
    return Checkpoint(path, [opened.file], opened.tensors, opened.extents, folder=path)


def open_index(path: Path) -> Checkpoint:
    """Open a sharded checkpoint by its index.

    Every shard's path is checked before any is opened, and every shard is opened before any tensor is read.

    Raises:
        CheckpointError: if the index or a shard is malformed, or they disagree.
        UsageError: if there is no such index.
    """
    folder = path.parent
    index = read_index(path, ".safetensors")
    files, tensors, extents = joined(
        index,
        ((name, open_file(shard, name, os.O_NOFOLLOW, called=folder / name)) for name, shard in index.paths.items()),
    )
    is_default = path.name == INDEX_NAME
    return Checkpoint(
        folder if is_default else path,
        files,
        tensors,
        extents,
        folder,
        Index(path.name, index.metadata),
        index.warnings(tensors.values()),
    )


# --- The files beside the weights -------------------------------------------------------------------

_WEIGHT_FILES = (*endings.SAFETENSORS, *endings.TORCH, *endings.KERAS, endings.PART_OF_DISTRIBUTED, *endings.OTHERS)
_OTHER_WEIGHTS = (*_WEIGHT_FILES, *(f"{ending}.index.json" for ending in _WEIGHT_FILES), "/.metadata")
_log = logging.getLogger("ckptsurg")


def companions(checkpoint: Checkpoint, *, keep_other_weights: bool = False) -> dict[str, Path]:
    """The files of a checkpoint's folder that come along. Those that do not are logged.

    Args:
        checkpoint: An opened checkpoint.
        keep_other_weights: Whether other files of weights come along.

    Returns:
        Where they are, with no link left in the path, by name inside the folder.

    Raises:
        CheckpointError: if a file is none, or a link that leaves the folder.
        UsageError: if the folder is on another machine.
    """
    checkpoint.refuse_remote_folder()
    if checkpoint.folder is None:
        return {}
    own = {file.name for file in checkpoint.files}
    if checkpoint.index is not None:
        own.add(checkpoint.index.name)
    taken: dict[str, Path] = {}
    weights: list[str] = []
    others: list[str] = []
    for name, path in _walk(checkpoint.folder):
        if name in own:
            continue
        if name.endswith("/") or name == MANIFEST_NAME:
            others.append(name)
        elif f"/{name}".endswith(_OTHER_WEIGHTS) and not keep_other_weights:
            weights.append(name)
        else:
            real = contained(path, checkpoint.folder)
            if not real.is_file():
                raise CheckpointError(f"{shown(path)}: is no regular file and cannot come along", hint="move it away")
            taken[name] = real
    for what, names in (("other weights, not brought along", weights), ("not brought along", others)):
        if names:
            _log.warning("%s: %s", what, ", ".join(map(shown, names)))
    return taken


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Every file below a folder by its name inside; a hidden folder only as its name and a slash."""
    for place, folders, names in os.walk(folder):
        inside = Path(place).relative_to(folder)
        folders.sort()
        for name in folders:
            if name.startswith("."):
                yield f"{(inside / name).as_posix()}/", Path(place, name)
            elif Path(place, name).is_symlink():
                raise CheckpointError(f"{shown(Path(place, name))}: is a link to a folder and cannot come along")
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in sorted(names):
            yield (inside / name).as_posix(), Path(place, name)
