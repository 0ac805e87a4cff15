"""What a page knows of one tensor, from whichever document."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal, TypeAlias

from ..report import Difference
from ..tensors import TensorInfo

__all__ = ["CHANGED", "DROPPED", "FATES", "FOUND", "STATES", "Change", "Entry", "Hue", "Kind", "State", "fate"]

Hue: TypeAlias = Literal["blue", "orange", "purple", "green", "red", "grey"]
Texture: TypeAlias = Literal["plain", "hatch", "dots", "lines", "cross", "halves", "hollow"]
#: What a comparison found of a tensor; the graver ones first.
State: TypeAlias = Literal[
    "missing", "changed", "other", "wider", "unlike", "absent", "removed", "added", "moved", "still", "unknown", "same"
]


@dataclass(frozen=True, slots=True)
class Kind:
    """How tensors are shown that have one fate.

    Attributes:
        word: What it is called.
        meaning: What that says.
        hue: Its colour.
        texture: What tells it from others without colour.
    """

    word: str
    meaning: str
    hue: Hue
    texture: Texture


@dataclass(frozen=True, slots=True)
class Change:
    """By how much a tensor changed.

    Attributes:
        elements: How many elements it has.
        changed: How many of them have other bits; in another dtype, other values.
        largest: Largest difference of two values; NaN where one is not finite.
        relative: Length of the difference over that of the old tensor, ||new - old|| / ||old||: infinite where the old
            one was all zero; NaN where a value that changed is not finite.
    """

    elements: int
    changed: int
    largest: float
    relative: float

    @property
    def is_measurable(self) -> bool:
        """Whether its relative change is a number."""
        return isfinite(self.relative)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor.

    Attributes:
        name: Its name.
        info: Its dtype and shape; None where only its name is known.
        kind: Its fate.
        frozen: Whether training must not change it.
        state: What a comparison found of it.
        change: By how much it changed; None where that was not measured.
        difference: What the report says of it; None where it says nothing.
        to: What the output of a plan calls it, where that is another name.
    """

    name: str
    info: TensorInfo | None
    kind: Kind
    frozen: bool = False
    state: State = "unknown"
    change: Change | None = None
    difference: Difference | None = None
    to: str | None = None

    @property
    def nbytes(self) -> int:
        """Its size in bytes; zero where that is not known."""
        return 0 if self.info is None else self.info.nbytes


_FROZEN, _TRAINS = "training must not change it", "training may change it"

#: By where the bytes come from and what training may do; the order is that of a legend.
FATES = {
    ("copied", "frozen"): Kind("frozen", f"copied from the base; {_FROZEN}", "blue", "plain"),
    ("copied", "part"): Kind("frozen in part", "copied; some rows must not change, the rest trains", "blue", "halves"),
    ("copied", "trains"): Kind("trains", f"copied from the base; {_TRAINS}", "orange", "plain"),
    ("cast", "frozen"): Kind("cast, frozen", f"copied in another dtype; {_FROZEN}", "blue", "lines"),
    ("cast", "trains"): Kind("cast, trains", f"copied in another dtype; {_TRAINS}", "orange", "lines"),
    ("grafted", "frozen"): Kind("grafted, frozen", f"from another checkpoint; {_FROZEN}", "blue", "cross"),
    ("grafted", "trains"): Kind("grafted, trains", f"from another checkpoint; {_TRAINS}", "orange", "cross"),
    ("reinitialised", "frozen"): Kind("reinitialised, frozen", f"values drawn anew; {_FROZEN}", "blue", "hatch"),
    ("reinitialised", "trains"): Kind("reinitialised", f"values drawn anew; {_TRAINS}", "purple", "hatch"),
    ("added", "frozen"): Kind("added, frozen", f"new in the output; {_FROZEN}", "blue", "dots"),
    ("added", "trains"): Kind("added", f"new in the output; {_TRAINS}", "green", "dots"),
    ("dropped", "frozen"): Kind("dropped", "of the base; the output does not have it", "grey", "hollow"),
}

DROPPED = FATES["dropped", "frozen"]

#: Frozen tensors of which a comparison found something.
CHANGED: dict[State, Kind] = {
    "changed": Kind("changed", "frozen, and its bits are not those that were published", "red", "cross"),
    "other": Kind("another dtype or shape", "frozen, and not the tensor that was published", "red", "lines"),
    "missing": Kind("missing", "frozen, and the checkpoint does not have it", "red", "hollow"),
}

#: What a comparison of two checkpoints finds.
FOUND = {
    "same": Kind("identical", "the same bits in both", "blue", "plain"),
    "changed": Kind("changed", "the same dtype and shape, other bits", "orange", "cross"),
    "other": Kind("another dtype or shape", "the two cannot be compared bit by bit", "purple", "lines"),
    "removed": Kind("only in the first", "the second does not have it", "grey", "hollow"),
    "added": Kind("only in the second", "the first does not have it", "green", "dots"),
}

#: What stands in a cell without a number, and what it means.
STATES: dict[State, tuple[str, str]] = {
    "same": ("=", "the same bits"),
    "changed": ("≠", "frozen, and changed: by how much was not measured"),
    "other": ("≠", "another dtype or shape"),
    "missing": ("∅", "frozen, and missing"),
    "wider": ("w", "the same values in a wider dtype"),
    "removed": ("-", "only in the first"),
    "added": ("+", "only in the second"),
    "moved": ("≈", "changed: by how much was not measured"),
    "still": ("0", "may change, and did not"),
    "unlike": ("≠", "trainable, and in another dtype or shape"),
    "absent": ("∅", "trainable, and missing"),
    "unknown": ("·", "not compared"),
}


def fate(origin: str, *, frozen: bool, in_part: bool = False) -> Kind:
    """The fate of a tensor of an output.

    Args:
        origin: Where its bytes come from, as a manifest says it.
        frozen: Whether training must not change it.
        in_part: Whether that holds for some of its rows alone.
    """
    if in_part:
        return FATES["copied", "part"]
    return FATES[origin, "frozen" if frozen else "trains"]
