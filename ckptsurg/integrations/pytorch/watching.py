"""Watching a model that other code freezes, or claims to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...errors import FreezeError, UsageError
from ...frameworks.pytorch import TorchTensors, whole_of
from ...manifest import Manifest
from ...renaming import Renaming
from ...report import Report
from ...verifying import verify
from ..messages import not_as_published, the_model
from .live import LiveModel
from .shares import Shares, this_rank
from .steps import goes_backward, uncompiled, under_way
from .witness import Witness

__all__ = ["Watch"]


class Watch:
    """Watches a model without changing it, and proves at the end of its ``with`` that frozen tensors kept their bits.

    It keeps a copy of them, and looks at every step of every optimizer of torch: so it says where a tensor moved, by
    how much, and in most cases why.

    Attributes:
        report: What became of the frozen tensors; None before the end.
    """

    def __init__(
        self, model: nn.Module, manifest: Manifest, names: Renaming | None = None, *, expect_trained: bool = False
    ) -> None:
        """Prepare to watch.

        Args:
            model: The model.
            manifest: What must hold.
            names: From the model's names to the manifest's, where they differ.
            expect_trained: Whether each trainable tensor has to move.

        Raises:
            ManifestError: if nothing is frozen.
        """
        manifest.require_frozen()
        self._model, self._manifest, self._names, self._expect_trained = model, manifest, names, expect_trained
        self.report: Report | None = None
        self._handles: list[Any] = []
        self._live: LiveModel | None = None

    def __enter__(self) -> Self:
        """Begin.

        Raises:
            FreezeError: if the model does not hold what the manifest freezes.
            UsageError: if names do not fit, or the watch was used before.
        """
        if self._live is not None:
            raise UsageError("a watch is used once")
        manifest, live = self._manifest, LiveModel(self._model, self._manifest.tensors, self._names)
        with live.whole():
            source = live.source()
            found = verify(manifest, source, allow_widened=True, saved=False)
            if not found.ok:
                raise FreezeError(
                    f"{the_model(self._model, this_rank())} does not hold what the manifest freezes, "
                    f"or has changed since it was described: {found.summary(5)}"
                )
            if others := not_as_published(found.mismatched_trainable):
                warnings.warn(others, UserWarning, stacklevel=2)
            copies = {name: whole_of(source.tensor(live.partners[name])).clone() for name in manifest.frozen}
            # What is in a wider dtype than the manifest's is no baseline of it.
            self._before = None if found.drifted else TorchTensors(copies, "the model before")
        self._live, roles = live, live.roles(manifest)
        shares = Shares(live, roles)
        shares.note()
        self._witness = Witness(live, roles, shares, rows_are_held=False)
        self._handles = [
            register_optimizer_step_pre_hook(uncompiled(self._before_step)),
            register_optimizer_step_post_hook(uncompiled(self._after_step)),
        ]
        return self

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if under_way(optimizer) <= 1:  # a step may call the one that it inherits
            self._witness.look(optimizer)

    def _after_step(
        self, optimizer: torch.optim.Optimizer, args: Sequence[object], options: Mapping[str, object]
    ) -> None:
        if under_way(optimizer) > 1:
            return
        self._witness.after()
        if goes_backward(args, options):
            self._witness.look(optimizer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if error is not None or self._live is None:
            return
        self.report = self._witness.verify(self._manifest, self._before, expect_trained=self._expect_trained)
        self.report.raise_if_changed()
