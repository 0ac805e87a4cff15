"""Parts of parameters that stand still while the rest trains.

A mask on the gradient is not enough: momentum, Adam's averages and weight decay move what has no gradient. So the rows
are set aside before each step of an optimizer, and put back after it, bit by bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...renaming import align
from .tensors import as_dtensor, live_tensors

__all__ = ["HeldRows", "put_back"]


class HeldRows:
    """Rows of a model's parameters that every optimizer of torch leaves as they are.

    Args:
        model: The model; it is held as long as it lives, or until the release.
        rows: First row and the one after the last, by the parameter's name.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, tuple[int, int]]) -> None:
        self._model, self._rows = weakref.ref(model), dict(rows)
        self._aside: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._masks = [
            tensor.register_post_accumulate_grad_hook(self._mask(self._rows[name]))  # type: ignore[no-untyped-call]
            for name, tensor in self._parameters().items()
            if tensor.requires_grad and tensor.is_leaf
        ]
        _watch_optimizers()
        _HELD.setdefault(model, []).append(self)

    def _parameters(self) -> dict[str, torch.Tensor]:
        model = self._model()
        live = live_tensors(model) if model is not None else {}
        return {name: live[own] for name, own in align(self._rows, {name: name for name in live}).items()}

    @staticmethod
    def _mask(rows: tuple[int, int]) -> Any:
        def clear(parameter: torch.Tensor) -> None:
            """Frozen rows have no gradient, so that they count in no norm that gradients are clipped by."""
            if parameter.grad is not None and parameter.grad.layout is torch.strided:
                for part in _local(parameter.grad, rows):
                    part.zero_()

        return clear

    def set_aside(self, stepped: set[int]) -> None:
        self.put_back()  # what a step left that did not come to its end
        for name, tensor in self._parameters().items():
            if id(tensor) in stepped:
                self._aside += [(part, part.clone()) for part in _local(tensor.detach(), self._rows[name])]

    def put_back(self) -> None:
        with torch.no_grad():
            for part, bits in self._aside:
                part.copy_(bits)
        self._aside = []

    def release(self) -> None:
        for mask in self._masks:
            mask.remove()
        model = self._model()
        if model is not None and self in _HELD.get(model, []):
            _HELD[model].remove(self)


def _local(tensor: torch.Tensor, rows: tuple[int, int]) -> list[torch.Tensor]:
    """What this process has of some rows, as views."""
    sharded = as_dtensor(tensor)
    if sharded is None:
        return [tensor[rows[0] : rows[1]]]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    first, last = max(rows[0] - offset[0], 0), min(rows[1] - offset[0], shape[0])
    return [sharded.to_local()[first:last]] if first < last else []


#: What is held of each model.
_HELD: weakref.WeakKeyDictionary[nn.Module, list[HeldRows]] = weakref.WeakKeyDictionary()
_HOOKS: list[Any] = []


def _watch_optimizers() -> None:
    """Once for all models: which optimizer will train a model is not known when it is frozen."""
    if not _HOOKS:
        _HOOKS.append(register_optimizer_step_pre_hook(_before))
        _HOOKS.append(register_optimizer_step_post_hook(_after))


def _before(optimizer: torch.optim.Optimizer, *_: object) -> None:
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for held in [one for holds in _HELD.values() for one in holds]:
        held.set_aside(stepped)


def _after(*_: object) -> None:
    put_back()


def put_back() -> None:
    """Put all rows back that were set aside. Whoever looks between a step and its last hooks asks for it first."""
    for held in [one for holds in _HELD.values() for one in holds]:
        held.put_back()
