"""What inspect answers with: the contents of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from .checkpoints import Checkpoint
from .documents import Document, Model
from .tensors import TensorInfo
from .wording import encodable

__all__ = ["Inspection", "inspect_checkpoint"]


class FileSize(Model):
    """A file of weights and its size in bytes."""

    file: str
    size: int


class TensorPlace(Model):
    """A tensor's dtype and shape, and the file that it is in."""

    dtype: str
    shape: tuple[int, ...]
    file: str


class Inspection(Document):
    """The contents of a checkpoint.

    Attributes:
        files: Its files of weights.
        metadata: ``__metadata__`` of all files; where two differ, the first.
        tensors: Its tensors by name, or those that were asked for.
    """

    version: Literal[1] = Field(default=1, description="Version of this document's form.")
    files: tuple[FileSize, ...]
    metadata: dict[str, str]
    tensors: dict[str, TensorPlace]

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(place.dtype, place.shape) for name, place in self.tensors.items()}


def inspect_checkpoint(checkpoint: Checkpoint, patterns: Sequence[str] = ()) -> Inspection:
    """The contents of a checkpoint, or what patterns select of it.

    Raises:
        SpecError: if a pattern cannot be read or selects nothing.
    """
    names = list(checkpoint.tensors)
    if patterns:
        from .selectors import selected_names  # here, for without patterns there is no need of specs

        names = selected_names(checkpoint.tensors, patterns, checkpoint.metadata)
    infos, place = checkpoint.tensors, checkpoint.file_of
    return Inspection(
        files=tuple(FileSize(file=encodable(file.name), size=file.size) for file in checkpoint.files),
        metadata=dict(checkpoint.metadata or {}),
        tensors={
            name: TensorPlace(dtype=infos[name].dtype, shape=infos[name].shape, file=encodable(place(name)))
            for name in names
        },
    )
