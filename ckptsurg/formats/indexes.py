"""Sharded checkpoints: an index that is read strictly, and shards that hold what it says, inside their folder."""

from __future__ import annotations

import os
import posixpath
import re
import resource
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from ..checkpoints import Extent, StoredFile, read_small
from ..containment import contained
from ..errors import CheckpointError
from ..header import OpenedFile
from ..parsing import parse_json
from ..tensors import TensorInfo
from ..wording import quoted, shown

__all__ = [
    "MAX_INDEX_BYTES",
    "ShardIndex",
    "allow_descriptors",
    "contained",
    "joined",
    "parse_index",
    "read_index",
    "refuse_both",
    "refuse_unsafe",
    "two_checkpoints",
]

MAX_INDEX_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """An index whose shards are named as files in its folder.

    Attributes:
        label: How messages call it.
        metadata: Its ``metadata`` object.
        weight_map: Name of the shard by tensor.
        shards: Names of the shards, in order.
        paths: Where each shard is here, by its name, in order; no link is left in them.
    """

    label: str
    metadata: Mapping[str, Any]
    weight_map: Mapping[str, str]
    shards: Sequence[str]
    paths: Mapping[str, Path] = field(default_factory=dict)

    def refuse_disagreement(self, name: str, tensors: Iterable[str], homes: Mapping[str, str]) -> None:
        """Raise CheckpointError if a shard holds what the index does not say.

        Args:
            name: Of the shard.
            tensors: What it holds.
            homes: In which shard the tensors of the earlier ones are.
        """
        for tensor in tensors:
            if tensor in homes:
                shards = f"{shown(homes[tensor])}, {shown(name)}"
                raise CheckpointError(f'{self.label}: tensor "{shown(tensor)}" is in two shards: {shards}')
            if self.weight_map.get(tensor) != name:
                said = self.weight_map.get(tensor)
                where = "is not in the index" if said is None else f"is in {shown(said)} by the index"
                raise CheckpointError(f'{self.label}: tensor "{shown(tensor)}" of {shown(name)} {where}')

    def refuse_lacking(self, homes: Mapping[str, str]) -> None:
        """Raise CheckpointError if a tensor of the index is in no shard."""
        for tensor, name in self.weight_map.items():
            if tensor not in homes:
                raise CheckpointError(f'{self.label}: tensor "{shown(tensor)}" is not in its shard {shown(name)}')

    def warnings(self, tensors: Iterable[TensorInfo]) -> list[str]:
        """What is odd about the size that the index gives."""
        total = sum(info.nbytes for info in tensors)
        if self.metadata.get("total_size", total) == total:
            return []
        return [f"{self.label}: total_size is {self.metadata['total_size']:,}; the tensors have {total:,} bytes"]


def read_index(path: Path, ending: str) -> ShardIndex:
    """Read an index. Every shard's path is checked before any is opened.

    Args:
        path: Of the index.
        ending: Of the shards' names, such as ``.safetensors``.

    Raises:
        CheckpointError: if the index is malformed, or a shard is missing or leaves the folder.
        UsageError: if there is no such index.
    """
    folder, label = path.parent, shown(path)
    index = parse_index(read_small(contained(path, folder), MAX_INDEX_BYTES, os.O_NOFOLLOW), label, ending)
    paths = {
        name: contained(folder / name, folder, missing=f'{label}: the shard "{shown(name)}" is missing')
        for name in index.shards
    }
    allow_descriptors(len(paths))
    return replace(index, paths=paths)


def parse_index(raw: bytes, label: str, ending: str) -> ShardIndex:
    """An index by its bytes; no shard is looked for.

    Args:
        raw: The bytes.
        label: How messages call it.
        ending: Of the shards' names, such as ``.safetensors``.

    Raises:
        CheckpointError: if it is malformed, or the name of a shard leaves the folder.
    """
    metadata, weight_map = _parse(raw, label)
    shards = sorted(set(weight_map.values()))
    for name in shards:
        refuse_unsafe(name, label, ending)
    return ShardIndex(label, metadata, weight_map, shards)


def joined(
    index: ShardIndex, opened: Iterable[tuple[str, OpenedFile]]
) -> tuple[list[StoredFile], dict[str, TensorInfo], dict[str, Extent]]:
    """The files, tensors and extents of all shards, which hold what the index says. If they do not, they are closed.

    Args:
        index: The index.
        opened: Its shards by name, in order.

    Raises:
        CheckpointError: if a shard and the index disagree, or opening one raises it.
    """
    files: list[StoredFile] = []
    tensors: dict[str, TensorInfo] = {}
    extents: dict[str, Extent] = {}
    homes: dict[str, str] = {}
    try:
        for name, shard in opened:
            files.append(shard.file)
            index.refuse_disagreement(name, shard.tensors, homes)
            tensors.update(shard.tensors)
            extents.update(shard.extents)
            homes.update(dict.fromkeys(shard.tensors, name))
        index.refuse_lacking(homes)
    except BaseException:
        for file in files:
            file.close()
        raise
    return files, tensors, extents


def _parse(raw: bytes, label: str) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    def refuse(message: str) -> NoReturn:
        raise CheckpointError(f"{label}: {message}")

    try:
        index = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as failure:
        refuse(f"the index is not UTF-8: byte {failure.start:,} is 0x{raw[failure.start]:02x}")
    except ValueError as failure:
        refuse(f"the index is malformed: {failure}")
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        refuse(f"the index must be an object with a weight_map that is one, found {quoted(index)}")
    weight_map: Mapping[str, Any] = index["weight_map"]
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            refuse(f'weight_map: tensor "{shown(tensor)}" must have a file name, found {quoted(name)}')
    if not weight_map:
        refuse("the weight_map is empty")
    metadata = index.get("metadata") or {}
    if not isinstance(metadata, dict):
        refuse(f"metadata must be an object, found {quoted(metadata)}")
    total = metadata.get("total_size", 0)
    if isinstance(total, bool) or not isinstance(total, int | float):
        refuse(f"total_size must be a number, found {quoted(total)}")
    return metadata, weight_map


def refuse_both(single: Path, index: Path) -> None:
    """Raise CheckpointError if a folder holds a checkpoint in one file, and the index of one in shards."""
    if os.path.lexists(single) and os.path.lexists(index):
        raise two_checkpoints(shown(single.parent), single.name, index.name)


def two_checkpoints(label: str, single: str, index: str) -> CheckpointError:
    """What to raise where a folder holds both."""
    message = f"{label}: holds both {single} and {index}; which one is meant?"
    return CheckpointError(message, hint="give the path of the one")


def refuse_unsafe(name: str, label: str, ending: str) -> None:
    """Raise CheckpointError if a shard's name is no plain relative path that ends as it should."""
    parts = name.split("/")
    reason = None
    if not name:
        reason = "is empty"
    elif "\\" in name or "\0" in name or re.match(r"[A-Za-z]:", name):
        reason = "is no plain file name"
    elif name.startswith("/"):
        reason = "is an absolute path"
    elif posixpath.normpath(name).startswith(".."):
        reason = "leaves the folder"
    elif any(part in ("", ".", "..") for part in parts):
        reason = "is no plain path"
    elif not name.endswith(ending):
        reason = f"is not a {ending} file"
    if reason:
        raise CheckpointError(f'{label}: the shard name "{shown(name)}" {reason}')


def allow_descriptors(count: int) -> None:
    """Every shard is held open; the usual soft limit of 1,024 is below what large checkpoints have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 256
    if soft < wanted <= hard or (soft < wanted and hard == resource.RLIM_INFINITY):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
