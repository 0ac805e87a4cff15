"""What inspect answers with: the contents of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from .checkpoints import Checkpoint
from .documents import Document, Model
from .errors import SpecError
from .tensors import TensorInfo

__all__ = ["Inspection", "inspect_checkpoint", "selected_names"]


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
        names = selected_names(checkpoint.tensors, patterns, checkpoint.metadata)
    infos, place = checkpoint.tensors, checkpoint.file_of
    return Inspection(
        files=tuple(FileSize(file=file.name, size=file.size) for file in checkpoint.files),
        metadata=dict(checkpoint.metadata or {}),
        tensors={
            name: TensorPlace(dtype=infos[name].dtype, shape=infos[name].shape, file=place(name)) for name in names
        },
    )


def selected_names(
    tensors: Mapping[str, TensorInfo], patterns: Sequence[str], metadata: Mapping[str, str] | None
) -> list[str]:
    """The names that patterns select, the later one winning.

    Args:
        tensors: Dtype and shape by name.
        patterns: As in a spec.
        metadata: Of the checkpoint, which may say how layers follow one another.

    Raises:
        SpecError: if a pattern cannot be read or selects nothing.
    """
    # Here, for without patterns there is no need of what they take: numpy above all.
    from .layers import from_metadata
    from .matching import Names
    from .parsing import Text
    from .selectors import Space, select
    from .spec import Spec

    spec = Spec.from_text(Text("patterns", {"version": 1, "freeze": list(patterns)}))
    space = Space(Names(list(tensors), from_metadata(metadata)), tensors)
    selection = select(spec, ("freeze",), spec.freeze or (), space)
    if selection.problems:
        raise SpecError("patterns", [replace(problem, path="") for problem in selection.problems])
    return [name for name, selected in zip(tensors, selection.mask.tolist(), strict=True) if selected]
