"""Modules of torch that write to their buffers while they train, and how they are kept from it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

__all__ = ["StaysInEvaluation", "moves_in_training"]


class StaysInEvaluation:
    """Takes the place of a module's ``train`` method: whatever the mode, the module itself evaluates.

    It is bound to this one module. A copy of the module, by pickle or deepcopy, gets its class's own method.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.was_training = module.training
        self.replaced = module.__dict__.get("train")

    def hold(self) -> None:
        self.module.training = False
        self.module.__dict__["train"] = self

    def release(self) -> None:
        current = self.module.__dict__.get("train")
        if current is not self:  # another freeze came later and holds on to this one
            while isinstance(current, StaysInEvaluation) and current.replaced is not self:
                current = current.replaced
            if isinstance(current, StaysInEvaluation):
                current.replaced, current.was_training = self.replaced, self.was_training
            return
        del self.module.__dict__["train"]
        if self.replaced is not None:
            self.module.__dict__["train"] = self.replaced
        self.module.training = self.was_training

    def __call__(self, mode: bool = True) -> nn.Module:
        method = self.replaced or type(self.module).train.__get__(self.module)
        method(mode)
        self.was_training = mode  # what a release gives back
        self.module.training = False
        return self.module

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.module, "train")


def moves_in_training(module: nn.Module) -> bool:
    """Whether the forward pass writes to the module's buffers in training mode, and only then."""
    if isinstance(module, _NormBase | _SpectralNorm):
        return True
    return any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
