"""Watching an optimizer of torch while it trains a frozen model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol, Self

import torch

from ...causes import CAUSES
from ...errors import FrozenWeightsChanged, UsageError
from ...report import Report
from ...wording import enumerate_names, shown
from .rows import put_back
from .steps import goes_backward, uncompiled, under_way

__all__ = ["Guard"]


class Removable(Protocol):
    """A handle of a hook."""

    def remove(self) -> None: ...


class Watched(Protocol):
    """What a guard asks of a frozen model."""

    def before_step(self, optimizer: torch.optim.Optimizer) -> Mapping[str, str]:
        """What is wrong before a step: cause codes by name."""

    def after_step(self) -> None:
        """The step is over."""

    def moved(self) -> list[str]:
        """Frozen tensors that are not what they were when they were frozen."""

    def mark(self) -> None:
        """Take anew what ``moved`` compares with."""

    def verify(self, *, expect_trained: bool = False) -> Report: ...


class Guard:
    """Watches an optimizer, in three tiers.

    Before each step it looks at membership, flags and gradients, without reading a tensor. After every ``every``-th
    step it reads every frozen tensor once, where it lives, and compares fingerprints. At the end of the ``with`` it
    proves all digests of the manifest.

    Attributes:
        steps: Steps seen.
        seconds: Time spent watching, in seconds.
    """

    def __init__(
        self,
        frozen: Watched,
        optimizer: torch.optim.Optimizer,
        every: int | None = 1,
        *,
        expect_trained: bool = False,
    ) -> None:
        if every is not None and (type(every) is not int or every < 1):
            raise UsageError(f"every: expected a whole number from 1, found {shown(every, 40)}")
        inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate and Lightning wrap theirs
        if not isinstance(inner, torch.optim.Optimizer):
            raise UsageError(f"expected an optimizer of torch, found {shown(type(optimizer).__name__)}")
        self._frozen, self._every, self._expect_trained = frozen, every, expect_trained
        self.steps = 0
        self.seconds = 0.0
        self._doubted: str | None = None
        self._handles: list[Removable] = [
            inner.register_step_pre_hook(uncompiled(self._before)),
            inner.register_step_post_hook(uncompiled(self._after)),
        ]

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
        """Refuse a step that would move a frozen tensor, or that steps what the model no longer has.

        Raises:
            FrozenWeightsChanged: naming tensors and causes.
        """
        with self._timed():
            if self._doubted is not None:
                self._frozen.verify().raise_if_changed(self._doubted)
                self._doubted = None
            self._refuse(self._frozen.before_step(optimizer), f"before step {self.steps + 1:,}:")

    def _refuse(self, about: Mapping[str, str], when: str) -> None:
        if not about:
            return
        by_code: dict[str, list[str]] = defaultdict(list)
        for name, code in about.items():
            by_code[code].append(name)
        lines = [
            f"{enumerate_names(names)}; cause: {code} ({CAUSES[code].explanation})" for code, names in by_code.items()
        ]
        raise FrozenWeightsChanged(
            "\n  ".join([when, *lines]),
            hint="; ".join(CAUSES[code].remedy for code in by_code),
            causes=about,
        )

    def _after(self, optimizer: torch.optim.Optimizer, args: Sequence[object], options: Mapping[str, object]) -> None:
        put_back()  # this hook runs before those that put rows back
        if under_way(optimizer) > 1:
            return
        with self._timed():
            self.steps += 1
            self._frozen.after_step()
            # A closure goes backward inside of the step: what is wrong was not to be seen before.
            about = self._frozen.before_step(optimizer) if goes_backward(args, options) else {}
            if self._every is not None and self.steps % self._every == 0:
                self._compare(f"after step {self.steps:,}, ")
            self._refuse(about, f"after step {self.steps:,}:")

    def compare(self, when: str) -> None:
        """Read every frozen tensor once, where it lives, and compare fingerprints.

        Args:
            when: Said before the message: ``after step 7, ``.

        Raises:
            FrozenWeightsChanged: naming tensors, and causes where they are settled.
        """
        with self._timed():
            self._compare(when)

    def _compare(self, when: str) -> None:
        if self._frozen.moved():
            self._frozen.verify().raise_if_changed(when)
            self._frozen.mark()  # the same values in a wider dtype have another fingerprint

    def cost(self) -> str:
        """What watching costs, in words."""
        return f"{self.seconds * 1e3:.1f} ms over {self.steps:,} steps"

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

    def prove(self) -> None:
        """Prove all digests.

        Raises:
            FrozenWeightsChanged: naming every frozen tensor that moved, with its cause where that is settled.
        """
        with self._timed():
            self._frozen.verify(expect_trained=self._expect_trained).raise_if_changed()

    def __enter__(self) -> Self:
        if not self._handles:
            raise UsageError("the guard was removed; ask the frozen model for another")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
        if error is None:
            self.prove()
