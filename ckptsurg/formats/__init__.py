"""Formats of checkpoints: one file each, and the one way to open any of them."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints import Checkpoint
from ..errors import UsageError, system_failures
from ..wording import shown
from .folder import open_folder, open_index
from .safetensors import open_single

__all__ = ["open_checkpoint"]


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
