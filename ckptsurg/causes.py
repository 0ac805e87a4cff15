"""Why frozen tensors moved: cause codes, and what evidence settles them.

A cause that the evidence does not settle is None, never a guess.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .report import Difference

__all__ = ["CAUSES", "Cause", "with_causes"]


@dataclass(frozen=True, slots=True)
class Cause:
    """A mechanism that moves frozen tensors.

    Attributes:
        explanation: What happens, in one sentence.
        remedy: What to do about it, in one sentence.
    """

    explanation: str
    remedy: str


CAUSES = {
    "batchnorm_stats": Cause(
        "running statistics are buffers, and follow the data whenever their layer is in training mode",
        "ckptsurg.freeze keeps the layer in evaluation mode",
    ),
}

_STATISTICS = frozenset(("running_mean", "running_var", "num_batches_tracked"))


def with_causes(drifted: Sequence[Difference], names: Collection[str]) -> list[Difference]:
    """The differences with their causes, where all of them together settle one.

    Args:
        drifted: Every frozen tensor that is not what it should be.
        names: All names of the manifest.
    """
    moved = [difference for difference in drifted if difference.verdict == "changed"]
    # Optimizers and casts do not single buffers out: where nothing else moved, the forward pass moved them.
    if not moved or len(moved) < len(drifted) or not all(_is_statistic(one.name, names) for one in moved):
        return list(drifted)
    return [difference.model_copy(update={"cause": "batchnorm_stats"}) for difference in drifted]


def _is_statistic(name: str, names: Collection[str]) -> bool:
    module, separator, leaf = name.rpartition(".")
    return leaf in _STATISTICS and f"{module}{separator}running_mean" in names
