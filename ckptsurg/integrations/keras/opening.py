"""Checkpoints by path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...tensors import TensorSource

__all__ = ["opened"]


@contextmanager
def opened(given: str | os.PathLike[str] | TensorSource) -> Iterator[TensorSource]:
    """A checkpoint by path, closed at the end; or what is open already, as it is."""
    if not isinstance(given, str | os.PathLike):
        yield given
        return
    from ...formats import open_checkpoint

    with open_checkpoint(Path(given)) as checkpoint:
        yield checkpoint
