"""Formats of checkpoints: one file each, and the one way to open any of them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from ..checkpoints import Checkpoint
from ..errors import UsageError, system_failures
from ..wording import shown
from .adapter import ADAPTER_NAME, AdapterOverBase, base_of_adapter
from .folder import open_folder, open_index
from .safetensors import open_single

__all__ = ["AdapterOverBase", "open_checkpoint", "open_trained"]


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint: a ``.safetensors`` file, a model folder, or the index of a sharded checkpoint.

    Only headers are read. Close the checkpoint, or use it in a ``with``.

    Raises:
        UsageError: if there is nothing at the path, or no checkpoint in the folder.
        CheckpointError: if it is malformed.
        SystemFailure: if the system cannot read it.
    """
    path = Path(path)
    with system_failures(shown(path)):
        if path.is_dir():
            return open_folder(path)
        if not path.exists():
            raise UsageError(f"{shown(path)}: no such file or folder")
        if path.name.endswith(".index.json"):
            return open_index(path)
        return open_single(path)


def open_trained(path: str | Path) -> Checkpoint | AdapterOverBase:
    """Open what came back from training: a checkpoint, or the folder of an adapter, which is read over its base.

    Raises:
        UsageError: if there is nothing at the path, or an adapter whose base is not on this machine.
        CheckpointError: if something is malformed.
        SystemFailure: if the system cannot read it.
    """
    path = Path(path)
    with system_failures(shown(path)):
        base = base_of_adapter(path) if path.is_dir() else None
    if base is None:
        return open_checkpoint(path)
    with ExitStack() as stack:
        adapter = stack.enter_context(open_checkpoint(path / ADAPTER_NAME))
        opened = AdapterOverBase(path, adapter, stack.enter_context(open_checkpoint(base)))
        stack.pop_all()
    return opened
