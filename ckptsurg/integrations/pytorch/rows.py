"""Parts of parameters that stand still while the rest trains.

A mask on the gradient is not enough: momentum, Adam's averages and weight decay move what has no gradient. So the rows
are set aside before each step of an optimizer, and put back after it, bit by bit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ...errors import FreezeError
from ...frameworks.pytorch import as_dtensor, live_tensors
from ...renaming import align
from ...wording import shown
from .steps import stepped_by, uncompiled, under_way

__all__ = ["HeldRows", "local_rows", "put_back"]


class HeldRows:
    """Rows of a model's parameters that every optimizer of torch leaves as they are.

    Args:
        model: The model; it is held as long as it lives, or until the release.
        rows: First row and the one after the last, by the parameter's name.
    """

    def __init__(self, model: nn.Module, rows: Mapping[str, tuple[int, int]]) -> None:
        self._model, self._rows = weakref.ref(model), dict(rows)
        self._aside = _Aside()
        self._masks: dict[str, Any] = {}
        self.mask()
        _watch_optimizers()
        _HELD.setdefault(model, []).append(self)

    def _parameters(self) -> dict[str, torch.Tensor]:
        model = self._model()
        live = live_tensors(model) if model is not None else {}
        return {name: live[own] for name, own in align(self._rows, {name: name for name in live}).items()}

    def mask(self) -> None:
        """Clear the gradients of the rows, so that they count in no norm that gradients are clipped by.

        To be called again where sharding may have put other parameters in the place of those that were masked.

        Raises:
            FreezeError: if FullyShardedDataParallel has flattened one: its pieces have no rows.
        """
        self._mask(self._parameters())

    def _mask(self, parameters: Mapping[str, torch.Tensor]) -> None:
        for name, tensor in parameters.items():
            if getattr(tensor, "_fsdp_flattened", False):
                raise FreezeError(
                    f'"{shown(name)}" is flattened by FullyShardedDataParallel: rows of it cannot be held',
                    hint="shard the model with fully_shard, which keeps rows",
                )
            masks = getattr(tensor, "_post_accumulate_grad_hooks", None) or {}
            if (
                tensor.requires_grad
                and tensor.is_leaf
                and (name not in self._masks or self._masks[name].id not in masks)
            ):
                clear = partial(_clear, self._rows[name])
                hook = tensor.register_post_accumulate_grad_hook(clear)  # type: ignore[no-untyped-call]
                self._masks[name] = hook

    def set_aside(self, stepped: Collection[int]) -> None:
        """A step begins. One inside of another finds set aside what the other stepped too."""
        parameters = {name: tensor for name, tensor in self._parameters().items() if id(tensor) in stepped}
        self._mask(parameters)
        for name, tensor in parameters.items():
            if name not in self._aside.bits:
                self._aside.bits[name] = [part.clone() for part in local_rows(tensor.detach(), self._rows[name])]

    def put_back(self, *, forget: bool) -> None:
        """A step ends. The parameters are looked up anew: some optimizers put other memory in their place."""
        if not self._aside.bits:
            return
        parameters = self._parameters()
        with torch.no_grad():
            for name, bits in self._aside.bits.items():
                if name in parameters:
                    for part, old in zip(local_rows(parameters[name].detach(), self._rows[name]), bits, strict=True):
                        part.copy_(old)
        if forget:
            self._aside.bits = {}

    def release(self) -> None:
        for mask in self._masks.values():
            mask.remove()
        self._masks = {}
        model = self._model()
        if model is not None and self in _HELD.get(model, []):
            _HELD[model].remove(self)
            if not _HELD[model]:
                del _HELD[model]
        if not _HELD:
            while _HOOKS:
                _HOOKS.pop().remove()


class _Aside(threading.local):
    """What the steps of one thread have set aside, by the parameter's name: other threads step other models."""

    def __init__(self) -> None:
        self.bits: dict[str, list[torch.Tensor]] = {}


def _clear(rows: tuple[int, int], parameter: torch.Tensor) -> None:
    if parameter.grad is not None and parameter.grad.layout is torch.strided:
        for part in local_rows(parameter.grad, rows):
            part.zero_()


def local_rows(tensor: torch.Tensor, rows: tuple[int, int]) -> list[torch.Tensor]:
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
        _HOOKS.append(register_optimizer_step_pre_hook(uncompiled(_before)))
        _HOOKS.append(register_optimizer_step_post_hook(uncompiled(_after)))


def _before(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if under_way() <= 1:
        put_back()  # what a step left that did not come to its end
    stepped = stepped_by(optimizer)
    for held in [one for holds in _HELD.values() for one in holds]:
        held.set_aside(stepped)


def _after(*_: object) -> None:
    put_back()


def put_back() -> None:
    """Put all rows back that are set aside. Whoever looks between a step and its last hooks asks for it first."""
    forget = under_way() <= 1
    for held in [one for holds in _HELD.values() for one in holds]:
        held.put_back(forget=forget)
