"""A model folder in the layout of Hugging Face: one file, or shards and their index, and the files beside them."""

from __future__ import annotations

import logging
import os
import re
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..checkpoints import Checkpoint, Extent, Index, StoredFile, read_small
from ..errors import CheckpointError, UsageError
from ..header import open_file
from ..manifest import MANIFEST_NAME
from ..parsing import parse_json
from ..tensors import TensorInfo
from ..wording import enumerate_names, shown

__all__ = ["INDEX_NAME", "SINGLE_NAME", "companions", "open_folder", "open_index"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000


def open_folder(path: Path) -> Checkpoint:
    """Open a folder with ``model.safetensors`` or ``model.safetensors.index.json``.

    Raises:
        UsageError: if there is neither.
        CheckpointError: if the checkpoint is malformed, or there are both.
    """
    single, index = path / SINGLE_NAME, path / INDEX_NAME
    has_single, has_index = os.path.lexists(single), os.path.lexists(index)
    if has_single and has_index:
        raise CheckpointError(
            f"{shown(path)}: holds both {SINGLE_NAME} and {INDEX_NAME}; which one is meant?",
            hint="give the path of the one",
        )
    if has_index:
        return open_index(index)
    if not has_single:
        others = sorted(p.name for p in path.iterdir() if p.name.endswith((".safetensors", ".safetensors.index.json")))
        raise UsageError(
            f"{shown(path)}: no checkpoint in this folder: expected {SINGLE_NAME} or {INDEX_NAME}",
            hint=f"give the path of the file: {enumerate_names(others)}" if others else None,
        )
    _refuse_outside(single, path)
    opened = open_file(single.resolve(), SINGLE_NAME, os.O_NOFOLLOW)
    return Checkpoint(path, [opened.file], opened.tensors, opened.extents, folder=path)


def open_index(path: Path) -> Checkpoint:
    """Open a sharded checkpoint by its index.

    Every shard's path is checked before any is opened, and every shard is opened before any tensor is read.

    Raises:
        CheckpointError: if the index or a shard is malformed, or they disagree.
        UsageError: if there is no such index.
    """
    folder, label = path.parent, shown(path)
    _refuse_outside(path, folder)
    metadata, weight_map = _read_index(path)
    names = sorted(set(weight_map.values()))
    for name in names:
        _refuse_unsafe(name, label)
        _refuse_outside(folder / name, folder, missing=f'{label}: the shard "{shown(name)}" is missing')
    _allow_descriptors(len(names))
    files: list[StoredFile] = []
    tensors: dict[str, TensorInfo] = {}
    extents: dict[str, Extent] = {}
    try:
        for name in names:
            opened = open_file((folder / name).resolve(), name, os.O_NOFOLLOW)
            files.append(opened.file)
            for tensor in opened.tensors:
                if tensor in tensors:
                    first = shown(extents[tensor].file.name)
                    raise CheckpointError(f'{label}: tensor "{shown(tensor)}" is in two shards: {first}, {shown(name)}')
                if weight_map.get(tensor) != name:
                    said = weight_map.get(tensor)
                    where = "is not in the index" if said is None else f"is in {shown(said)} by the index"
                    raise CheckpointError(f'{label}: tensor "{shown(tensor)}" of {shown(name)} {where}')
            tensors.update(opened.tensors)
            extents.update(opened.extents)
        if lacking := [tensor for tensor in weight_map if tensor not in tensors]:
            raise CheckpointError(
                f'{label}: tensor "{shown(lacking[0])}" is not in its shard {shown(weight_map[lacking[0]])}'
            )
    except BaseException:
        for file in files:
            os.close(file.descriptor)
        raise
    warnings = []
    total = sum(info.nbytes for info in tensors.values())
    if "total_size" in metadata and metadata["total_size"] != total:
        warnings.append(f"{label}: total_size is {metadata['total_size']:,}; the tensors have {total:,} bytes")
    is_default = path.name == INDEX_NAME
    return Checkpoint(
        folder if is_default else path, files, tensors, extents, folder, Index(path.name, metadata), warnings
    )


def _read_index(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    label = shown(path)

    def refuse(message: str) -> NoReturn:
        raise CheckpointError(f"{label}: {message}")

    raw = read_small(path, MAX_INDEX_BYTES)
    try:
        index = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as failure:
        refuse(f"the index is not UTF-8: byte {failure.start:,}")
    except ValueError as failure:
        refuse(f"the index is malformed: {failure}")
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        refuse("the index must be an object with a weight_map that is one")
    weight_map: Mapping[str, Any] = index["weight_map"]
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            refuse(f'weight_map: tensor "{shown(tensor)}" must have a file name, found {shown(name, 60)}')
    if not weight_map:
        refuse("the weight_map is empty")
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        refuse(f"metadata must be an object, found {shown(metadata, 60)}")
    total = metadata.get("total_size", 0)
    if isinstance(total, bool) or not isinstance(total, int | float):
        refuse(f"total_size must be a number, found {shown(total, 60)}")
    return metadata, weight_map


def _refuse_unsafe(name: str, label: str) -> None:
    """A shard's name is a plain relative path that ends in ``.safetensors``."""
    parts = name.split("/")
    reason = None
    if not name:
        reason = "is empty"
    elif "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name):
        reason = "is no plain file name"
    elif name.startswith("/"):
        reason = "is an absolute path"
    elif any(part in ("", ".", "..") for part in parts):
        reason = "leaves the folder"
    elif not name.endswith(".safetensors"):
        reason = "is not a .safetensors file"
    if reason:
        raise CheckpointError(f'{label}: the shard name "{shown(name)}" {reason}')


def _refuse_outside(path: Path, folder: Path, missing: str | None = None) -> None:
    """A link may stay in the folder, or lead from a Hugging Face cache's snapshots/ to its blobs/."""
    try:
        real, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (FileNotFoundError, NotADirectoryError):
        if missing is None:
            raise UsageError(f"{shown(path)}: no such file") from None
        raise CheckpointError(missing, hint="fetch it, or save the checkpoint again") from None
    except (OSError, RuntimeError) as failure:
        raise CheckpointError(f"{shown(path)}: cannot be followed: {shown(failure)}") from None
    # models--org--name/snapshots/REVISION/... links to models--org--name/blobs/.
    snapshots = [place for place in home.parents if place.name == "snapshots"]
    allowed = [home, *(place.parent / "blobs" for place in snapshots[:1])]
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{shown(path)}: is a link that leaves the folder, to {shown(real)}",
            hint="put the file itself in its place",
        )


def _allow_descriptors(count: int) -> None:
    """Every shard is held open; the usual soft limit of 1,024 is below what large checkpoints have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft < wanted <= hard or (soft < wanted and hard == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- The files beside the weights -------------------------------------------------------------------

_WEIGHT_FILES = (".bin", ".pt", ".pth", ".h5", ".gguf", ".msgpack", ".onnx", ".safetensors")
_OTHER_WEIGHTS = (*_WEIGHT_FILES, *(f"{ending}.index.json" for ending in _WEIGHT_FILES))
_log = logging.getLogger("ckptsurg")


def companions(checkpoint: Checkpoint, *, keep_other_weights: bool = False) -> dict[str, Path]:
    """The files of a checkpoint's folder that come along. Those that do not are logged.

    Args:
        checkpoint: An opened checkpoint.
        keep_other_weights: Whether other files of weights come along.

    Returns:
        Paths by name inside the folder.

    Raises:
        CheckpointError: if a file is none, or a link that leaves the folder.
    """
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
        elif name.endswith(_OTHER_WEIGHTS) and not keep_other_weights:
            weights.append(name)
        else:
            _refuse_outside(path, checkpoint.folder)
            if not path.is_file():
                raise CheckpointError(f"{shown(path)}: is no regular file and cannot come along", hint="move it away")
            taken[name] = path
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
