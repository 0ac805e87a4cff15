"""Hugging Face Trainer: a callback that makes its model obey a manifest, and proves it while it trains."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import UsageError
from ..manifest import Manifest, load_manifest
from ..renaming import Renaming
from ..wording import shown
from .pytorch import FrozenModel, Guard, freeze

__all__ = ["FreezeCallback"]

_log = logging.getLogger("ckptsurg")


class FreezeCallback(TrainerCallback):
    """Freezes the model of a Trainer before its optimizer is built, watches every step, and proves every save.

    ``Trainer(model, args, ..., callbacks=[FreezeCallback("out")])``

    What it finds raises FrozenWeightsChanged out of ``trainer.train()``: before a step, if a frozen tensor is about to
    move; after a step, if one did; at a save, if the file that was just written has not its bits; at the end.

    Attributes:
        frozen: The frozen model; None before the Trainer is made.
    """

    def __init__(
        self,
        manifest: Manifest | str | os.PathLike[str],
        *,
        every: int | None = 1,
        expect_trained: bool = False,
        names: Renaming | None = None,
        extra: Literal["keep", "error"] = "keep",
        allow_widened: bool = False,
    ) -> None:
        """Prepare the callback.

        Args:
            manifest: The manifest; its path, or that of the output that it stands by.
            every: Compare fingerprints after every so many steps; None compares none.
            expect_trained: Whether the end of the training also proves that each trainable tensor moved.
            names: As ``ckptsurg.freeze`` takes it.
            extra: Likewise.
            allow_widened: Likewise.

        Raises:
            ManifestError: if the manifest is not valid.
            UsageError: if there is none, or ``every`` is no number of steps.
        """
        if every is not None and (type(every) is not int or every < 1):
            raise UsageError(f"every: expected a whole number from 1, found {shown(every, 40)}")
        self.manifest = manifest if isinstance(manifest, Manifest) else load_manifest(Path(manifest))
        self.frozen: FrozenModel | None = None
        self._every, self._expect_trained, self._allow_widened = every, expect_trained, allow_widened
        self._names, self._extra = names, extra
        self._guard: Guard | None = None

    def _freeze(self, model: torch.nn.Module) -> FrozenModel:
        self.frozen = freeze(model, self.manifest, self._names, self._extra, allow_widened=self._allow_widened)
        _log.info("ckptsurg: %r", self.frozen)
        return self.frozen

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Freeze: the optimizer is not there yet."""
        self._freeze(given["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Audit the optimizer; and, where training resumes, what was loaded."""
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
        # Fingerprints are compared when the step is over, so that other callbacks are caught too.
        self._guard = frozen.guard(given["optimizer"], every=None, expect_trained=self._expect_trained)
        self._guard.steps = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Compare fingerprints: what the optimizer moved, or a callback before this one, is caught at this step."""
        if self.frozen is None or self._guard is None or self._every is None or state.global_step % self._every:
            return
        begun = time.perf_counter()
        if self.frozen.moved():
            self.frozen.verify().raise_if_changed(f"after step {state.global_step:,}, ")
            self.frozen.mark()  # the same values in a wider dtype have another fingerprint
        self._guard.seconds += time.perf_counter() - begun

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Prove the checkpoint that was just written."""
        folder = Path(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        if self.frozen is None or not state.is_world_process_zero:
            return
        if not any(folder.glob("*.safetensors")):
            _log.warning("ckptsurg: %s holds no .safetensors, and is not proven", shown(folder))
            return
        try:
            report = self.frozen.verify_saved(folder)
        except UsageError as error:
            if not (folder / "adapter_config.json").is_file():
                raise
            _log.warning("ckptsurg: %s; the live model is proven at the end", error.message)
            return
        report.raise_if_changed(f"{shown(folder)}: ")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Prove all digests."""
        if self._guard is not None:
            self._guard.remove()
            self._guard.prove()
            _log.info("ckptsurg: frozen weights proven; watching took %.1f ms", self._guard.seconds * 1e3)
