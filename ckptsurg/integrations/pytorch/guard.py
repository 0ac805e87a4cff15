"""Watching an optimizer of torch while it trains a frozen model."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

import torch

from ...errors import UsageError
from ...report import Report
from ...wording import counted, shown
from ..arguments import checked_every
from ..messages import about_to_move
from .marks import Marks
from .rows import put_back
from .shares import this_rank
from .steps import goes_backward, uncompiled, under_way
from .witness import Witness

__all__ = ["Guard"]


class Removable(Protocol):
    """A handle of a hook."""

    def remove(self) -> None: ...


class Guard:
    """Watches an optimizer, in three tiers.

    Before each step it looks at membership, flags and gradients; it reads no tensor, but for frozen ones that an
    optimizer of somebody else's steps although they have no gradient. After every ``every``-th step it reads every
    frozen tensor once, where it lives, and compares fingerprints, or digests on a processor. At the end of the ``with``
    it proves all digests of the manifest.

    Attributes:
        steps: Steps seen.
        seconds: Time spent watching, in seconds.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        witness: Witness,
        marks: Marks,
        verify: Callable[[], Report],
        verify_moved: Callable[[Collection[str]], Report],
        *,
        every: int | None,
        at_the_end: Callable[[], Report],
    ) -> None:
        """Begin to watch; a frozen model's ``guard`` is the way to ask for it.

        Args:
            optimizer: The optimizer, or a wrapper with it as its ``optimizer``.
            witness: Who looks before each step.
            marks: What is compared after it.
            verify: Proves all digests.
            verify_moved: Proves those of what moved.
            every: As ``FrozenModel.guard`` takes it.
            at_the_end: Proves what is to be proven at the end.

        Raises:
            UsageError: if the optimizer is none of torch, or ``every`` is no number of steps.
        """
        self._every = checked_every(every)
        inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate and Lightning wrap theirs
        if not isinstance(inner, torch.optim.Optimizer):
            raise UsageError(
                f"expected an optimizer of torch, found {shown(type(optimizer).__name__)}",
                hint="give the torch.optim.Optimizer inside of it",
            )
        self._witness, self._marks, self._verify = witness, marks, verify
        self._verify_moved, self._at_the_end = verify_moved, at_the_end
        self.steps = 0
        self.seconds = 0.0
        self._before_these = 0
        self._asked = False
        self._doubted: str | None = None
        self._handles: list[Removable] = [
            inner.register_step_pre_hook(uncompiled(self._before)),
            inner.register_step_post_hook(uncompiled(self._after)),
        ]

    def count_from(self, step: int) -> None:
        """Count the steps in messages on from those that were taken before this guard was there."""
        self._before_these = step

    @property
    def _step(self) -> str:
        return f"{self._before_these + self.steps:,}"

    @contextmanager
    def _timed(self) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - begun

    def _before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if under_way(optimizer) <= 1:  # a step may call the one that it inherits
            self.before_step(optimizer)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a step before which a frozen tensor is about to move, or that steps what the model no longer has.

        Raises:
            FrozenWeightsChanged: naming tensors and causes.
        """
        self._asked = True
        with self._timed():
            if self._doubted is not None:
                self._verify().raise_if_changed(self._doubted)
                self._doubted = None
            self._refuse(self._witness.look(optimizer), f"before step {self._before_these + self.steps + 1:,}:")

    def _refuse(self, about: Mapping[str, str], when: str) -> None:
        if about:
            raise about_to_move(about, when, this_rank())

    def _after(self, optimizer: torch.optim.Optimizer, args: Sequence[object], options: Mapping[str, object]) -> None:
        put_back()  # this hook runs before those that put rows back
        if under_way(optimizer) > 1:
            return
        with self._timed():
            self.steps += 1
            self._witness.after()
            # A closure goes backward inside of the step: what is wrong was not to be seen before.
            about = self._witness.look(optimizer) if goes_backward(args, options) else {}
            if self._every is not None and self.steps % self._every == 0:
                self._compare(f"after step {self._step}, ")
            self._refuse(about, f"after step {self._step}:")

    def compare(self, when: str) -> None:
        """Do what is done after every ``every``-th step: for a trainer that has a better moment for it.

        Args:
            when: Said before the message: ``after step 7, ``.

        Raises:
            FrozenWeightsChanged: naming tensors, and causes where they are settled.
        """
        with self._timed():
            self._compare(when)

    def _compare(self, when: str) -> None:
        if moved := self._marks.moved():
            self._verify_moved(moved).raise_if_changed(when)
            self._marks.take_again(moved)  # the same values in a wider dtype have other marks

    def cost(self) -> str:
        """What watching costs, in words."""
        return f"{self.seconds * 1e3:.1f} ms over {counted(self.steps, 'step')}"

    def doubt(self, when: str) -> None:
        """Prove all digests before the next step: something is about to write to the model.

        Args:
            when: Said before the message: ``after loading, ``.
        """
        self._doubted = when

    def also_remove(self, handle: Removable) -> None:
        """Remove this too when the guard is removed."""
        self._handles.append(handle)

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
            with self._timed():
                self._at_the_end().raise_if_changed()
            if not self._asked:
                warnings.warn("no step of the guarded optimizer was seen", UserWarning, stacklevel=2)
