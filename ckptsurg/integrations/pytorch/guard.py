"""Watching an optimizer of torch while it trains a frozen model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol, Self

import torch

from ...errors import FrozenWeightsChanged, UsageError
from ...report import Report
from ...wording import enumerate_names, shown

__all__ = ["Guard"]


class Watched(Protocol):
    """What a guard asks of a frozen model."""

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]: ...

    def moving_modules(self) -> list[str]: ...

    def verify(self) -> Report: ...


class Guard:
    """Watches an optimizer. Before each step it looks at flags and gradients, without reading a tensor.

    Attributes:
        steps: Steps seen.
        seconds: Time spent watching, in seconds.
    """

    def __init__(self, frozen: Watched, optimizer: torch.optim.Optimizer, every: int | None = None) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise UsageError(f"every: expected a whole number from 1, found {shown(every, 40)}")
        self._frozen, self._every = frozen, every
        self.steps = 0
        self.seconds = 0.0
        self._handles = [
            optimizer.register_step_pre_hook(self._timed(self._before)),
            optimizer.register_step_post_hook(self._timed(self._after)),
        ]

    def _timed(self, check: Callable[[], None]) -> Callable[..., None]:
        def hook(*_: object) -> None:
            begun = time.perf_counter()
            try:
                check()
            finally:
                self.seconds += time.perf_counter() - begun

        return hook

    def _before(self) -> None:
        """Refuse a step that would move a frozen tensor."""
        reenabled, with_gradient = [], []
        for name, tensor in self._frozen.frozen_tensors():
            if tensor.requires_grad and tensor.is_leaf:
                reenabled.append(name)
            elif tensor.is_leaf and tensor.grad is not None:
                with_gradient.append(name)
        if reenabled:
            raise FrozenWeightsChanged(
                f"about to change {enumerate_names(reenabled)}; cause: reenabled (requires_grad was turned on again)",
                hint="freeze after whatever turned it on, and build the optimizer after that",
            )
        if with_gradient:
            raise FrozenWeightsChanged(
                f"about to change {enumerate_names(with_gradient)}; cause: zero_grad_not_none (a gradient is set)",
                hint="freeze before the backward pass; optimizer.zero_grad(set_to_none=True) clears gradients",
            )
        if moving := self._frozen.moving_modules():
            raise FrozenWeightsChanged(
                f"the running statistics of {enumerate_names(moving)} move: put back into training mode; "
                "cause: batchnorm_stats",
                hint="call train() on the module instead of setting its `training`",
            )

    def _after(self) -> None:
        self.steps += 1
        if self._every is not None and self.steps % self._every == 0:
            self._frozen.verify().raise_if_changed()

    def cost(self) -> str:
        """What watching costs, in words."""
        return f"{self.seconds * 1e3:.1f} ms over {self.steps:,} steps"

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        if not self._handles:
            raise UsageError("the guard was removed; ask the frozen model for another")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        if error is None:
            begun = time.perf_counter()
            report = self._frozen.verify()
            self.seconds += time.perf_counter() - begun
            report.raise_if_changed()
