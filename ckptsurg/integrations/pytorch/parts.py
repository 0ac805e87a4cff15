"""What of a live model stands for what of its checkpoint, where the two are cut differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Part"]


@dataclass(frozen=True, slots=True)
class Part:
    """Live tensors, and the checkpoint tensors that are made of them.

    Attributes:
        live: Names in the model.
        saved: Names in the checkpoint.
        split: From these live tensors by name to the checkpoint's by name; values are moved, never computed with. None
            where one live tensor is one checkpoint tensor.
    """

    live: tuple[str, ...]
    saved: tuple[str, ...]
    split: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]] | None = None

    def cut(self, live: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The checkpoint's tensors of these live ones, by name."""
        return {self.saved[0]: live[self.live[0]]} if self.split is None else self.split(live)
