"""What of a live model stands for what of its checkpoint, where the two are cut differently."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch

__all__ = ["Part", "parts_as_named"]


@dataclass(frozen=True, slots=True)
class Part:
    """Live tensors, and the checkpoint tensors that are made of them.

    Attributes:
        live: Names in the model.
        saved: Names in the checkpoint.
        split: From these live tensors by name to the checkpoint's by name; values are moved, never computed with.
        as_is: Whether it is one live tensor that is one checkpoint tensor.
    """

    live: tuple[str, ...]
    saved: tuple[str, ...]
    split: Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]
    as_is: bool = False

    @classmethod
    def one(cls, live: str, saved: str) -> Self:
        """One live tensor that is one checkpoint tensor."""
        return cls((live,), (saved,), lambda given: {saved: given[live]}, as_is=True)


def parts_as_named(live: Iterable[str]) -> list[Part]:
    """Every live tensor is the checkpoint tensor of its name."""
    return [Part.one(name, name) for name in live]
