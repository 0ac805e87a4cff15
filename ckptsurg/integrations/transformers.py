"""Hugging Face Trainer: a callback that makes its model obey a manifest, and proves it while it trains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UsageError
from ..wording import shown
from .pytorch import Guard
from .pytorch.callbacks import ManifestCallback

__all__ = ["FreezeCallback"]

_log = logging.getLogger("ckptsurg")


class FreezeCallback(ManifestCallback, TrainerCallback):
    """Freezes the model of a Trainer before its optimizer is built, watches every step, and proves every save.

    ``Trainer(model, args, ..., callbacks=[FreezeCallback("out")])``

    What it finds raises FrozenWeightsChanged out of ``trainer.train()``: before a step, if a frozen tensor is about to
    move; after a step, if one did; at a save, if the file that was just written has not its bits; at the end.

    Attributes:
        manifest: The manifest.
        frozen: The frozen model; None before the Trainer is made.
    """

    _guard: Guard | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Freeze: the optimizer is not there yet."""
        _log.info("%r", self._freeze(given["model"]))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Prove what is there before the first step, loaded or resumed from; and watch the optimizer."""
        if self._guard is not None:  # of a training that did not come to its end
            self._guard.remove()
        frozen, model = self.frozen, given["model"]
        if frozen is None or all(module is not frozen.model for module in model.modules()):
            frozen = self._freeze(model)  # `model_init` makes it anew for every training
        else:
            if frozen.model is not model:
                frozen.attach(model)
            when = f"resuming at step {state.global_step:,}, " if state.global_step else "at the beginning, "
            frozen.verify().raise_if_changed(when)
        # Frozen tensors are read when the step is over, so that other callbacks are caught too.
        self._guard = frozen.guard(given["optimizer"], every=None)
        self._guard.count_from(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Read the frozen tensors: what the optimizer moved, or a callback before this one, is caught at this step."""
        if self._guard is not None and self._every is not None and state.global_step % self._every == 0:
            self._guard.compare(f"after step {state.global_step:,}, ")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Prove the checkpoint that was just written."""
        folder = Path(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if self.frozen is None or not state.is_world_process_zero:
            return
        if not any(folder.glob("*.safetensors")):
            reason = "holds no .safetensors" if folder.is_dir() else "is not there: the Trainer saved elsewhere"
            _log.warning("%s %s; it is not proven", shown(folder), reason)
            return
        try:
            report = self.frozen.verify_saved(folder)
        except UsageError as error:
            if not (folder / "adapter_config.json").is_file():
                raise
            _log.warning("%s; the live model is proven at the end", error.message)
            return
        report.raise_if_changed(f"{shown(folder)}: ")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Prove all digests."""
        if self._guard is not None:
            self._guard.remove()
            assert self.frozen is not None
            self.frozen.verify(expect_trained=self._expect_trained).raise_if_changed()
            _log.info("frozen weights proven; watching took %s", self._guard.cost())
