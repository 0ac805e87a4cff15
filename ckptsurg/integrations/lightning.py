"""Lightning: a callback that makes a LightningModule obey a manifest, and proves it while it trains."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning

from ..errors import UsageError
from ..manifest import Manifest, load_manifest
from ..renaming import Renaming
from ..wording import shown
from .pytorch import FrozenModel, Guard, freeze

__all__ = ["FreezeCallback"]


class FreezeCallback(Callback):
    """Freezes a LightningModule, or a module in it, before its optimizers are built; watches every step and save.

    ``Trainer(callbacks=[FreezeCallback("out", module="model")])``

    What it finds raises FrozenWeightsChanged out of ``trainer.fit()``.

    Attributes:
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
            every: Compare fingerprints after every so many steps; None compares none.
            expect_trained: Whether the end of the fit also proves that each trainable tensor moved.
            names: As ``ckptsurg.freeze`` takes it.
            extra: Likewise.
            allow_widened: Likewise.

        Raises:
            ManifestError: if the manifest is not valid.
            UsageError: if there is none.
        """
        self.manifest = manifest if isinstance(manifest, Manifest) else load_manifest(Path(manifest))
        self.frozen: FrozenModel | None = None
        self._module, self._every, self._expect_trained = module, every, expect_trained
        self._names, self._extra, self._allow_widened = names, extra, allow_widened
        self._guards: list[Guard] = []
        self._resumed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze: the optimizers are not there yet. A checkpoint that is resumed from has to be loaded first."""
        if stage != "fit":
            return
        callbacks: list[Callback] = getattr(trainer, "callbacks", [])
        if any(isinstance(one, BaseFinetuning) for one in callbacks):
            warnings.warn(
                "BaseFinetuning is here too: what it thaws although the manifest freezes it is caught before it moves",
                UserWarning,
                stacklevel=2,
            )
        self._resumed = trainer.ckpt_path is not None
        if not self._resumed:
            self._freeze(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Freeze what was loaded: its frozen tensors have to be the manifest's, its trained ones need not."""
        if self._resumed:
            self._freeze(pl_module)

    def _freeze(self, pl_module: LightningModule) -> None:
        try:
            model = pl_module.get_submodule(self._module)
        except AttributeError:
            raise UsageError(f'module: {type(pl_module).__name__} has no "{shown(self._module)}"') from None
        if self.frozen is not None:
            self.frozen.release()
        self.frozen = freeze(model, self.manifest, self._names, self._extra, allow_widened=self._allow_widened)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the baseline, and audit the optimizers."""
        assert self.frozen is not None
        self.frozen.verify().raise_if_changed("at the beginning, ")
        self.frozen.mark()
        self._guards = [self.frozen.guard(optimizer, every=self._every) for optimizer in trainer.optimizers]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at flags and gradients once more: Lightning goes backward inside of the optimizer's step."""
        for guard in self._guards[:1]:
            guard.before_step(getattr(optimizer, "optimizer", optimizer))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Prove what is about to be written."""
        state: Mapping[str, Any] = checkpoint.get("state_dict", {})
        if self.frozen is not None and self._guards and state:
            prefix = f"{self._module}." if self._module else ""
            self.frozen.verify_saved(state, prefix).raise_if_changed("about to save: ")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prove all digests."""
        self._remove()
        if self.frozen is not None:
            self.frozen.verify(expect_trained=self._expect_trained).raise_if_changed()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching."""
        self._remove()

    def _remove(self) -> None:
        for guard in self._guards:
            guard.remove()
        self._guards = []

    def state_dict(self) -> dict[str, Any]:
        """Which manifest the run obeys."""
        return {"frozen_root": self.manifest.frozen_root}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Say so if the checkpoint comes from a run under another manifest, as that of an earlier phase does."""
        if state_dict.get("frozen_root") != self.manifest.frozen_root:
            warnings.warn(
                f"the checkpoint comes from a run under another manifest ({state_dict.get('frozen_root')}); "
                f"this one freezes {self.manifest.frozen_root}",
                UserWarning,
                stacklevel=2,
            )
