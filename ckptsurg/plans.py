"""The plan: the document that says what becomes of every tensor."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypeAlias

from pydantic import ConfigDict, Field, with_config
from typing_extensions import TypedDict

from .documents import Document, Model, is_none, may_lack
from .initializer_arguments import Init
from .manifest import BaseFile
from .tensors import TensorInfo

__all__ = ["Action", "Plan", "PlannedTensor", "Reviewed"]

Action: TypeAlias = Literal["copy", "drop", "reinit", "add", "cast", "graft"]


class PlannedTensor(Model):
    """What becomes of one tensor.

    Attributes:
        name: Its name in the base; of an added tensor, in the output.
        action: What is done.
        frozen: Whether training must not change it.
        dtype: Its dtype in the output; of a dropped tensor, in the base.
        shape: Its shape there.
        rule: Where in the spec this was decided; None where no rule speaks of it.
        init: What is drawn, with ``default`` written out.
        keep: Whether the part that overlaps the old tensor keeps its bits.
        old_shape: The base's shape of a reinitialised tensor.
        rows: First of the frozen rows and the one after the last, where only a part is frozen.
        to: Its name in the output, where that is another.
        donor: Which other checkpoint its bytes come from.
        donor_name: Its name there, where that is another.
        old_dtype: What it is cast from.
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
    to: str | None = Field(default=None, exclude_if=is_none)
    donor: str | None = Field(default=None, exclude_if=is_none)
    donor_name: str | None = Field(default=None, exclude_if=is_none)
    old_dtype: str | None = Field(default=None, exclude_if=is_none)

    @property
    def output_name(self) -> str:
        """What the output calls it."""
        return self.name if self.to is None else self.to

    @property
    def is_copied(self) -> bool:
        """Whether its bytes are taken over as they are."""
        return self.action in ("copy", "graft") and self.old_dtype is None

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.dtype, self.shape)


@with_config(ConfigDict(extra="forbid", strict=True, json_schema_extra=may_lack("cast", "graft", "rename")))
class Counts(TypedDict):
    """How many tensors have each action, and how many of the output are frozen and trainable."""

    copy: int
    drop: int
    reinit: int
    add: int
    frozen: int
    trainable: int
    cast: NotRequired[int]
    graft: NotRequired[int]
    rename: NotRequired[int]


class Reviewed(Model):
    """What a plan was made of: it is carried out on the same, or not at all.

    Attributes:
        spec: The spec, as it was understood.
        spec_digest: Its digest.
        base: The files of the base.
        donors: Those of other checkpoints, by what the spec calls them.
    """

    spec: dict[str, Any]
    spec_digest: str
    base: tuple[BaseFile, ...]
    donors: dict[str, tuple[BaseFile, ...]] = Field(default_factory=dict)


class Plan(Document):
    """One action for every tensor.

    Attributes:
        counts: How many tensors have each action, and how many of the output are frozen and trainable.
        tensors: The base's tensors in their order, then the added ones.
        notes: What is allowed but likely not meant.
        seed: Seed of all drawn values.
        reviewed: What it was made of, in a plan that is kept to be carried out later.
    """

    version: Literal[1] = Field(description="Version of this document's form.")
    counts: Counts
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...] = ()
    seed: int = 0
    reviewed: Reviewed | None = Field(default=None, exclude_if=is_none)

    @property
    def output(self) -> list[PlannedTensor]:
        """The tensors that the output has."""
        return [tensor for tensor in self.tensors if tensor.action != "drop"]
