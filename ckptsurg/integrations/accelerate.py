"""Accelerate: a guard that knows of its saves and loads."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from .pytorch import FrozenModel, Guard

__all__ = ["guard"]


def guard(
    accelerator: Accelerator,
    frozen: FrozenModel,
    optimizer: torch.optim.Optimizer,
    *,
    every: int | None = 1,
    expect_trained: bool = False,
) -> Guard:
    """Watch a prepared optimizer. Freeze before ``prepare``; use the guard in a ``with``, or call its ``remove()``.

    Beside what ``frozen.guard`` does, it proves all digests before ``save_state`` writes, and again before the first
    step after ``load_state``. A step that the gradient scaler skips (``optimizer_step_was_skipped``) is no step.
    ``save_model`` asks nobody: verify what it wrote. With FSDP and DeepSpeed, ``save_state`` asks after it wrote the
    weights.

    Args:
        accelerator: The accelerator.
        frozen: The frozen model.
        optimizer: The optimizer, as ``prepare`` gave it back.
        every: Read the frozen tensors after every so many steps; None does not.
        expect_trained: Whether the end also proves that each trainable tensor moved.

    Raises:
        UsageError: if the optimizer is none of torch, or ``every`` is no number of steps.
    """
    watching = frozen.guard(optimizer, every=every, expect_trained=expect_trained)

    def before_save(*_: Any) -> None:
        frozen.verify().raise_if_changed("about to save: ")

    def before_load(*_: Any) -> None:
        watching.doubt("after loading, ")

    watching.also_remove(accelerator.register_save_state_pre_hook(before_save))
    watching.also_remove(accelerator.register_load_state_pre_hook(before_load))
    return watching
