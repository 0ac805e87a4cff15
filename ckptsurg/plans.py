"""The plan: the document that says what becomes of every tensor."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from .documents import Document, Model, is_none
from .initializer_arguments import Init
from .tensors import TensorInfo

__all__ = ["Action", "Plan", "PlannedTensor"]

Action: TypeAlias = Literal["copy", "drop", "reinit", "add"]


class PlannedTensor(Model):
    """What becomes of one tensor.

    Attributes:
        name: Its name.
        action: What is done.
        frozen: Whether training must not change it.
        dtype: Its dtype in the output; of a dropped tensor, in the base.
        shape: Its shape there.
        rule: Where in the spec this was decided; None where no rule speaks of it.
        init: What is drawn, with ``default`` written out.
        keep: Whether the part that overlaps the old tensor keeps its bits.
        old_shape: The base's shape of a reinitialised tensor.
        rows: First of the frozen rows and the one after the last, where only a part is frozen.
    """

    name: str
    action: Action
    frozen: bool
    dtype: str
    shape: tuple[int, ...]
    rule: str | None
    init: Init | None = None
    keep: bool = False
    old_shape: tuple[int, ...] | None = None
    rows: tuple[int, int] | None = Field(default=None, exclude_if=is_none)

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.dtype, self.shape)


@with_config(ConfigDict(extra="forbid", strict=True))
class Counts(TypedDict):
    """How many tensors have each action, and how many of the output are frozen and trainable."""

    copy: int
    drop: int
    reinit: int
    add: int
    frozen: int
    trainable: int


class Plan(Document):
    """One action for every tensor.

    Attributes:
        counts: How many tensors have each action, and how many of the output are frozen and trainable.
        tensors: The base's tensors in their order, then the added ones.
        notes: What is allowed but likely not meant.
        seed: Seed of all drawn values.
    """

    version: Literal[1] = Field(description="Version of this document's form.")
    counts: Counts
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = ()
    seed: int = 0

    @property
    def output(self) -> list[PlannedTensor]:
        """The tensors that the output has."""
        return [tensor for tensor in self.tensors if tensor.action != "drop"]
