"""Formats of checkpoints: a file each, what some of them share, and the one way to open any of them.

Each is imported once there is a checkpoint of its kind.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from ..checkpoints import Checkpoint
from ..errors import UsageError, system_failures
from ..header import begins_like_safetensors
from ..urls import URL, as_url
from ..wording import shown
from . import endings
from .adapter import AdapterOverBase, adapter_in, base_of_adapter

__all__ = ["NO_MODEL", "AdapterOverBase", "is_keras_file", "open_checkpoint", "open_trained"]

#: Of a model that is given for nothing.
NO_MODEL = "{}: a model is given, and this is no file of Keras"
_TAKEN_APART = re.compile(r"[a-z][a-z0-9]+:/[^/]")


def open_checkpoint(path: str | Path | URL, *, model: Callable[[], Any] | None = None) -> Checkpoint:
    """Open a checkpoint.

    Of safetensors only headers are read. Other formats are read by their frameworks, which must be installed: archives
    and distributed checkpoints of PyTorch, files of Keras. Close the checkpoint, or use it in a ``with``.

    Args:
        path: A ``.safetensors`` file, a model folder, the index of a sharded checkpoint; a PyTorch archive, or a folder
            of ``torch.distributed.checkpoint``; a ``.keras``, ``.weights.h5`` or ``.h5`` file. Of safetensors also a
            URL that fsspec knows (``s3://``, ``https://``, ``hf://``): what is wanted is fetched, and no more.
        model: Makes the model of Keras that a file belongs to, where the file holds weights alone.

    Raises:
        UsageError: if there is nothing at the path, no checkpoint in the folder, or a framework is not installed.
        CheckpointError: if it is malformed.
        SystemFailure: if the system cannot read it.
    """
    if (url := as_url(path)) is not None:
        if model is not None:
            raise UsageError(NO_MODEL.format(url))
        from .remote import open_remote

        return open_remote(url)
    assert not isinstance(path, URL)
    path = Path(path)
    with system_failures(shown(path)):
        if model is not None and path.exists() and not is_keras_file(path):
            raise UsageError(NO_MODEL.format(shown(path)))
        return _open_folder(path) if path.is_dir() else _open_file(path, model)


def _open_file(path: Path, model: Callable[[], Any] | None) -> Checkpoint:
    if not path.exists():
        hint = "a URL is given as text; a Path takes it apart" if _TAKEN_APART.match(str(path)) else None
        raise UsageError(f"{shown(path)}: no such file or folder", hint=hint)
    if path.name == endings.DISTRIBUTED_METADATA:
        return _open_distributed(path.parent)
    if path.name.endswith(endings.PART_OF_DISTRIBUTED):
        raise UsageError(f"{shown(path)}: is a part of a distributed checkpoint", hint="give its folder")
    if path.name.endswith(".bin.index.json"):
        from .torch_archive import open_archive_index

        return open_archive_index(path)
    if path.name.endswith(".index.json"):
        from .folder import open_index

        return open_index(path)
    kind = _kind_of(path)
    if kind == "keras":
        from .keras import open_keras

        return open_keras(path, model)
    if kind == "torch":
        from .torch_archive import open_archive

        return open_archive(path)
    from .safetensors import open_single

    return open_single(path)


def _open_folder(path: Path) -> Checkpoint:
    from .folder import holds_safetensors, open_folder

    if not holds_safetensors(path):
        from .torch_archive import holds_archive, open_archive_folder

        if holds_archive(path):
            return open_archive_folder(path)
        if os.path.lexists(path / endings.DISTRIBUTED_METADATA):
            return _open_distributed(path)
    return open_folder(path)


def _open_distributed(folder: Path) -> Checkpoint:
    from .distributed import open_distributed

    return open_distributed(folder)


def is_keras_file(path: Path | URL) -> bool:
    """Whether Keras reads what is at the path."""
    return isinstance(path, Path) and _kind_of(path) == "keras"


def _kind_of(path: Path) -> Literal["safetensors", "torch", "keras"]:
    """``safetensors``, ``torch`` or ``keras``: by the content, and where that says nothing, by the name's ending."""
    if not path.is_file() or path.name.endswith(endings.SAFETENSORS):
        return "safetensors"
    with path.open("rb") as file:
        prefix = file.read(64)
    if begins_like_safetensors(prefix):
        return "safetensors"
    if prefix.startswith(b"\x89HDF\r\n\x1a\n") or path.name.endswith(endings.KERAS):
        return "keras"
    is_archive = prefix.startswith((b"PK\x03\x04", b"\x80")) or path.name.endswith(endings.TORCH)
    return "torch" if is_archive else "safetensors"


def open_trained(path: str | Path | URL) -> Checkpoint | AdapterOverBase:
    """Open what came back from training: a checkpoint, or the folder of an adapter, which is read over its base.

    Raises:
        UsageError: if there is nothing at the path, or an adapter whose base is not on this machine.
        CheckpointError: if something is malformed.
        SystemFailure: if the system cannot read it.
    """
    if (url := as_url(path)) is not None:
        return open_checkpoint(url)
    assert not isinstance(path, URL)
    path = Path(path)
    with system_failures(shown(path)):
        base = base_of_adapter(path) if path.is_dir() else None
    if base is None:
        return open_checkpoint(path)
    with ExitStack() as stack:
        adapter = stack.enter_context(open_checkpoint(adapter_in(path)))
        opened = AdapterOverBase(path, adapter, stack.enter_context(open_checkpoint(base)))
        stack.pop_all()
    return opened
