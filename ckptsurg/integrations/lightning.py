"""Lightning: a callback that makes a LightningModule obey a manifest, and proves it while it trains."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning

from ..errors import FreezeError, UsageError
from ..manifest import Manifest
from ..renaming import Renaming
from ..wording import enumerate_names, shown
from .pytorch import Guard
from .pytorch.callbacks import ManifestCallback
from .pytorch.stand_in import StandIn

__all__ = ["FreezeCallback"]


class FreezeCallback(ManifestCallback, Callback):
    """Freezes a LightningModule, or a module in it, before its optimizers are built; watches every step and save.

    ``Trainer(callbacks=[FreezeCallback("out", module="model")])``

    What it finds raises FrozenWeightsChanged out of ``trainer.fit()``.

    Attributes:
        manifest: The manifest.
        frozen: The frozen model; None before the fit.
    """

    def __init__(
        self,
        manifest: Manifest | str | os.PathLike[str],
        *,
        module: str = "",
        every: int | None = 1,
        expect_trained: bool = False,
        names: Renaming | None = None,
        extra: Literal["keep", "error"] = "keep",
        allow_widened: bool = False,
    ) -> None:
        """Prepare the callback.

        Args:
            manifest: The manifest; its path, or that of the output that it stands by.
            module: Attribute of the LightningModule that holds the manifest's model, such as ``model``; empty for the
                LightningModule itself.
            every: Read the frozen tensors after every so many steps; None does not.
            expect_trained: Whether the end of the fit also proves that each trainable tensor moved.
            names: As ``ckptsurg.freeze`` takes it.
            extra: Likewise.
            allow_widened: Likewise.

        Raises:
            ManifestError: if the manifest is not valid.
            UsageError: if there is none, or ``every`` is no number of steps.
        """
        super().__init__(
            manifest,
            every=every,
            expect_trained=expect_trained,
            names=names,
            extra=extra,
            allow_widened=allow_widened,
        )
        self._module = module
        self._guards: dict[int, Guard] = {}
        self._saves: _Proving | None = None

    @property
    def state_key(self) -> str:
        """A Trainer may have several: one for each module that has a manifest."""
        return self._generate_state_key(module=self._module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze: the optimizers are not there yet.

        Raises:
            UsageError: if there is no such module.
        """
        if stage != "fit":
            return
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        if any(isinstance(one, BaseFinetuning) for one in callbacks):
            warnings.warn(
                "BaseFinetuning is here too: where it thaws what the manifest freezes, the next step is refused; "
                "leave frozen modules out of it",
                UserWarning,
                stacklevel=2,
            )
        self._release()
        if self._saves is not None:
            self._saves.withdraw()
        self._saves = _Proving(pl_module, self)
        with suppress(FreezeError):  # what is resumed from comes later; if nothing does, `on_train_start` says it again
            self._freeze_module(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Freeze what was loaded: its frozen tensors have to be the manifest's, its trained ones need not.

        Raises:
            FreezeError: if they are not.
        """
        if trainer.state.fn == "fit":
            self._freeze_module(pl_module)

    def _freeze_module(self, pl_module: LightningModule) -> None:
        try:
            model = pl_module.get_submodule(self._module)
        except AttributeError:
            raise UsageError(
                f'module: {type(pl_module).__name__} has no module "{shown(self._module)}"',
                hint=f"it has {enumerate_names(name for name, _ in pl_module.named_children())}; "
                "what is to be frozen has to be built in __init__",
            ) from None
        self._release()
        self._freeze(model)

    def _release(self) -> None:
        if self.frozen is not None:
            self.frozen.release()
            self.frozen = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prove what training begins with, and watch the optimizers.

        Raises:
            FreezeError: if the model does not hold what the manifest freezes.
            FrozenWeightsChanged: if it did when it was frozen.
        """
        if self.frozen is None:
            self._freeze_module(pl_module)
        assert self.frozen is not None
        self.frozen.verify().raise_if_changed("at the beginning, ")
        self._guards = {id(one): self.frozen.guard(one, every=self._every) for one in trainer.optimizers}

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at flags and gradients once more: Lightning goes backward inside of the optimizer's step."""
        if (guard := self._guards.get(id(optimizer))) is not None:
            guard.before_step(optimizer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Prove what is about to be written.

        Raises:
            FrozenWeightsChanged: if it has not the frozen bits; then nothing is written.
        """
        state: Mapping[str, Any] = checkpoint.get("state_dict", {})
        if self.frozen is not None and state:
            prefix = f"{self._module}." if self._module else ""
            self.frozen.verify_saved(state, prefix).raise_if_changed("about to save: ")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prove all digests.

        Raises:
            FrozenWeightsChanged: if the model has not the frozen bits.
        """
        self._remove()
        if self.frozen is not None:
            self.frozen.verify(expect_trained=self._expect_trained).raise_if_changed()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching the steps. What is saved of the wreck is proven all the same."""
        self._remove()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the LightningModule as it was found; the model stays frozen."""
        if stage == "fit" and self._saves is not None:
            self._saves.withdraw()
            self._saves = None

    def _remove(self) -> None:
        for guard in self._guards.values():
            guard.remove()
        self._guards = {}

    def state_dict(self) -> dict[str, Any]:
        """Which manifest the run obeys."""
        return {"frozen_root": self.manifest.frozen_root}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say so if the checkpoint comes from a run under another manifest, as that of an earlier phase does."""
        if state_dict.get("frozen_root") not in (None, self.manifest.frozen_root):
            warnings.warn(
                f"the checkpoint comes from a run under another manifest ({state_dict['frozen_root']}); "
                f"this one freezes {self.manifest.frozen_root}",
                UserWarning,
                stacklevel=2,
            )


class _Proving(StandIn):
    """Stands in for a LightningModule's ``on_save_checkpoint``: of saved weights alone no callback is told."""

    method = "on_save_checkpoint"

    def __init__(self, module: LightningModule, callback: FreezeCallback) -> None:
        super().__init__(module)
        self._callback = callback

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.original(checkpoint)
        module: Any = self.module
        callbacks: list[Callback] = getattr(module.trainer, "callbacks", [])
        if "callbacks" not in checkpoint and any(one is self._callback for one in callbacks):
            self._callback.on_save_checkpoint(module.trainer, module, checkpoint)
