"""What writes to buffers in the forward pass, how it is kept from it, and what cannot be."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ...frameworks.pytorch import as_dtensor, unreadable
from .stand_in import StandIn

__all__ = ["StaysInEvaluation", "mover", "moves_in_training", "shrinks_rows", "silenced", "unholdable"]


class StaysInEvaluation(StandIn):
    """Stands in for a module's ``train``: whatever the mode, the module itself evaluates."""

    method = "train"

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.was_training = module.training
        module.training = False

    def __call__(self, mode: bool = True) -> nn.Module:
        self.original(mode)
        self.was_training = mode  # what a release gives back
        self.module.training = False
        return self.module

    def release(self) -> None:
        """Give the module back, in the mode that was asked for last."""
        later = self.withdraw()
        if later is not None:
            later.was_training = self.was_training
        elif not isinstance(self.module.__dict__.get(self.method), StaysInEvaluation):
            self.module.training = self.was_training


def moves_in_training(module: nn.Module) -> str | None:
    """The cause code of what writes to the module's buffers in training mode, and only then; None for others."""
    cause = mover(module)
    return None if cause == "observer" else cause


def mover(module: nn.Module) -> str | None:
    """The cause code of what writes to a module's buffers in the forward pass; None where nothing is known to."""
    if isinstance(module, _NormBase):
        return "batchnorm_stats"
    if isinstance(module, _SpectralNorm):
        return "spectral_norm"
    if any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values()):
        return "spectral_norm"
    return "observer" if _observes(module) else None


def _observes(module: nn.Module) -> bool:
    quantization: Any = sys.modules.get("torch.ao.quantization")  # whoever has an observer has imported it
    if quantization is None:
        return False
    return isinstance(module, quantization.ObserverBase | quantization.FakeQuantizeBase)


def unholdable(module: nn.Module, frozen: set[int]) -> str | None:
    """Why frozen tensors of a module would move whatever its mode; None if they would not.

    Args:
        module: The module.
        frozen: Identities of the frozen tensors.
    """
    if shrinks_rows(module) and id(module._parameters["weight"]) in frozen:
        limit = f"the max_norm of its embedding ({module.max_norm})"
        return f"has, or may have, rows longer than {limit}, which a lookup would shrink"
    if _observes(module) and any(id(buffer) in frozen for buffer in module.buffers()):
        return "is written by a quantisation observer at every forward pass; turn it off first (disable_observer)"
    return None


def shrinks_rows(module: nn.Module) -> bool:
    """Whether it is an embedding with max_norm, some row of which a lookup would change: torch is asked, on a copy.

    Of what is sharded or cannot be read, it may be so.
    """
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag) or module.max_norm is None:
        return False
    # Not through the attribute: a parametrised one would be computed, which moves what computes it.
    weight = module._parameters.get("weight")
    if weight is None:
        return False
    if unreadable(weight) or as_dtensor(weight) is not None:
        return True
    looked_up = weight.detach().clone()
    every = torch.arange(len(looked_up), device=looked_up.device)
    torch.embedding_renorm_(looked_up, every, module.max_norm, module.norm_type)
    return bool(looked_up.view(torch.uint8).ne(weight.detach().view(torch.uint8)).any())


def silenced(model: nn.Module) -> set[nn.Module]:
    """Fake quantisers that are turned off, with the observers inside of them, which have no switch of their own."""
    quiet: set[nn.Module] = set()
    for module in model.modules():
        if _observes(module) and isinstance(switch := getattr(module, "observer_enabled", None), torch.Tensor):
            quiet.update(module.modules() if not switch.any() else ())
    return quiet
