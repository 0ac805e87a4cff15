"""What integrations are given, made into what they work on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UsageError
from ..manifest import Manifest, load_manifest
from ..tensors import TensorSource
from ..wording import shown

__all__ = ["as_manifest", "checked_every", "checked_extra", "opened"]


def as_manifest(given: Manifest | str | os.PathLike[str]) -> Manifest:
    """A manifest; its path, or that of the output that it stands by.

    Raises:
        ManifestError: if it is not valid.
        UsageError: if there is none.
    """
    if not isinstance(given, Manifest | str | os.PathLike):
        kind = shown(type(given).__name__)
        hint = "make_manifest(patterns, model) makes one"
        raise UsageError(f"expected a manifest or its path, found {kind}", hint=hint)
    return given if isinstance(given, Manifest) else load_manifest(Path(given))


def checked_every(every: int | None) -> int | None:
    """The number of steps between readings.

    Raises:
        UsageError: if it is neither None nor a whole number from 1.
    """
    if every is not None and (type(every) is not int or every < 1):
        raise UsageError(f"every: expected a whole number from 1, found {shown(every, 40)}")
    return every


def checked_extra(extra: str) -> str:
    """What is done with parameters that the manifest lacks.

    Raises:
        UsageError: if it is neither ``keep`` nor ``error``.
    """
    if extra not in ("keep", "error"):
        raise UsageError(f'extra: expected "keep" or "error", found {shown(extra)}')
    return extra


@contextmanager
def opened(given: str | os.PathLike[str] | TensorSource) -> Iterator[TensorSource]:
    """A checkpoint by path, closed at the end; or what is open already, as it is.

    Raises:
        UsageError: if there is no checkpoint at the path.
        CheckpointError: if it is malformed.
        SystemFailure: if it cannot be read.
    """
    if not isinstance(given, str | os.PathLike):
        yield given
        return
    from ..formats import open_checkpoint

    with open_checkpoint(Path(given)) as checkpoint:
        yield checkpoint
