"""One ``.safetensors`` file."""

from __future__ import annotations

from pathlib import Path

from ..checkpoints import Checkpoint
from ..header import open_file

__all__ = ["open_single"]


def open_single(path: Path) -> Checkpoint:
    """Open one ``.safetensors`` file as a checkpoint.

    Raises:
        UsageError: if there is no such file.
        CheckpointError: if it is malformed.
        SystemFailure: if the system cannot read it.
    """
    opened = open_file(path, path.name)
    return Checkpoint(path, [opened.file], opened.tensors, opened.extents)
