"""PyTorch: make a live model obey a manifest, and watch it while it trains."""

from __future__ import annotations

import itertools
import os
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ...errors import FreezeError, UsageError
from ...manifest import Manifest
from ...renaming import Renaming, align, common_prefix, renamed
from ...report import Report
from ...tensors import TensorSource
from ...verifying import verify
from ...wording import enumerate_names, shown
from .guard import Guard
from .holds import StaysInEvaluation, moves_in_training
from .tensors import TorchTensors, live_tensors, unreadable

__all__ = ["FrozenModel", "Guard", "freeze", "source_of"]


def source_of(model: nn.Module) -> TorchTensors:
    """A live model as a TensorSource, under its own names."""
    return TorchTensors(live_tensors(model), f"the model ({type(model).__name__})")


def freeze(
    model: nn.Module,
    manifest: Manifest,
    names: Renaming | None = None,
    extra: Literal["keep", "error"] = "keep",
    *,
    allow_widened: bool = False,
) -> FrozenModel:
    """Make a model obey a manifest. Call it before the optimizer is built.

    Frozen parameters get ``requires_grad = False`` and lose their gradient. Norm layers whose statistics are frozen
    stay in evaluation mode through every later ``model.train()``. Training is only ever turned off, never on.

    Args:
        model: A model that holds the manifest's weights.
        manifest: What must hold.
        names: From the model's names to the manifest's, where they differ: a mapping or a function.
        extra: Whether parameters that the manifest lacks are left as they are, or refused.
        allow_widened: Whether a frozen tensor may be in a wider dtype, if its values are the same.

    Raises:
        FreezeError: with the model unchanged, if a frozen tensor is absent, has another dtype, shape or other bits,
            cannot be read, or shares storage with a trainable one.
        ManifestError: if nothing is frozen.
        UsageError: if names do not fit.
    """
    if extra not in ("keep", "error"):
        raise UsageError(f'extra: expected "keep" or "error", found {shown(extra)}')
    manifest.require_frozen()
    live = live_tensors(model)
    partners = align(manifest.tensors, renamed(live, names))
    problems = list(_mismatches(manifest, live, partners, allow_widened=allow_widened))
    problems = problems or list(_entangled(manifest, live, partners))
    unknown = _extra_parameters(live, set(partners.values()))
    if extra == "error" and unknown:
        problems.append(f"parameters that the manifest lacks: {enumerate_names(unknown)}")
    if problems:
        shown_problems = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise FreezeError(
            "\n  ".join([f"the model ({type(model).__name__}) cannot be frozen:", *shown_problems]),
            hint="load the published weights first; where the model has other names than the file, give `names`",
        )
    if unknown:
        message = f"left as they are, the manifest lacks them: {enumerate_names(unknown)}"
        warnings.warn(message, UserWarning, stacklevel=3)
    return FrozenModel(model, manifest, names, unknown)


# --- What is refused --------------------------------------------------------------------------------


def _mismatches(
    manifest: Manifest, live: dict[str, torch.Tensor], partners: dict[str, str], *, allow_widened: bool
) -> Iterator[str]:
    """Frozen tensors that the model does not hold as the manifest records them."""
    if not partners and (prefix := common_prefix([{name} for name in manifest.frozen], live)):
        yield f'all stand under "{shown(prefix)}" in the model: names=lambda name: name.removeprefix("{shown(prefix)}")'
        return
    for name in manifest.frozen:
        if name in partners and (reason := unreadable(live[partners[name]])):
            yield f'"{shown(name)}" {reason}'
            del partners[name]
        elif name not in partners:
            yield f'"{shown(name)}" is not in the model{_moved_to(name, live)}'
    report = verify(manifest, TorchTensors({new: live[old] for new, old in partners.items()}, "the model"))
    for difference in report.drifted:
        if difference.name not in partners or (difference.verdict == "dtype_only" and allow_widened):
            continue
        if difference.verdict == "changed":
            yield f'"{shown(difference.name)}" has other bits: not loaded, or from another file'
        elif difference.verdict == "dtype_only":
            yield f"{difference.describe()}; `allow_widened=True` accepts it"
        else:
            yield difference.describe()


def _moved_to(name: str, live: dict[str, torch.Tensor]) -> str:
    """Where a reparametrisation has put the tensor."""
    module, _, leaf = name.rpartition(".")
    start = f"{module}." if module else ""
    for candidate in (f"{start}parametrizations.{leaf}.original", f"{start}parametrizations.{leaf}.original0"):
        if candidate in live:
            return f": it is reparametrised as {shown(candidate)}; freeze before, or without, the reparametrisation"
    for candidate in (f"{start}{leaf}_orig", f"{start}{leaf}_v"):
        if candidate in live:
            return f": it is reparametrised as {shown(candidate)}; freeze before, or without, the reparametrisation"
    return ""


def _entangled(manifest: Manifest, live: dict[str, torch.Tensor], partners: dict[str, str]) -> Iterator[str]:
    """Frozen tensors that share memory with one that trains."""
    manifest_name = {old: new for new, old in partners.items()}
    in_storage: dict[int, list[str]] = defaultdict(list)
    for name, tensor in live.items():
        if not unreadable(tensor) and tensor.numel():
            in_storage[tensor.untyped_storage().data_ptr()].append(name)
    for sharing in in_storage.values():
        frozen = [name for name in sharing if name in manifest_name and manifest.tensors[manifest_name[name]].frozen]
        for one in frozen:
            for other in sharing:
                if other in frozen or not _overlap(live[one], live[other]):
                    continue
                # A second name for the very same parameter is no second parameter.
                declared = other in manifest_name
                if declared or (live[other] is not live[one] and live[other].requires_grad):
                    yield (
                        f'"{shown(one)}" is frozen and shares its storage with "{shown(other)}", which trains: '
                        "they are tied; freeze both or neither"
                    )


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and the one after its last."""
    start = int(tensor.storage_offset()) * tensor.element_size()
    last = sum((size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def _extra_parameters(live: dict[str, torch.Tensor], known: set[str]) -> tuple[str, ...]:
    """Parameters that have no partner in the manifest, and that are no second name of one that has."""
    held = {id(live[name]) for name in known}
    return tuple(
        name
        for name, tensor in live.items()
        if name not in known and isinstance(tensor, nn.Parameter) and id(tensor) not in held
    )


# --- The frozen model -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """What a tensor was like before the freeze."""

    tensor: torch.Tensor
    requires_grad: bool
    grad: torch.Tensor | None


class FrozenModel:
    """A model that obeys a manifest, until it is released.

    Attributes:
        model: The model.
        manifest: What it obeys.
        extra: Parameters that the manifest lacks; they are left as they were.
    """

    def __init__(self, model: nn.Module, manifest: Manifest, names: Renaming | None, extra: tuple[str, ...]) -> None:
        self.model, self.manifest, self.extra = model, manifest, extra
        self._names = names
        self._number = next(_NUMBERS)
        self._found: list[_Found] = []
        self._held: list[StaysInEvaluation] = []
        frozen: set[int] = set()
        for _, tensor in self.frozen_tensors():
            if tensor.is_leaf and id(tensor) not in frozen:  # a tied one has two names
                self._found.append(_Found(tensor, tensor.requires_grad, tensor.grad))
                tensor.requires_grad_(False)
                tensor.grad = None
            frozen.add(id(tensor))
        for module in model.modules():
            if moves_in_training(module) and any(id(buffer) in frozen for buffer in module._buffers.values()):
                self._held.append(StaysInEvaluation(module))
                self._held[-1].hold()
        _FREEZES.setdefault(model, weakref.WeakSet()).add(self)

    def __repr__(self) -> str:
        counts = self.manifest.counts
        return f"FrozenModel({type(self.model).__name__}: {counts['frozen']} frozen, {counts['trainable']} trainable)"

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The frozen tensors that the model has now, by the model's names; looked up afresh at every call."""
        live = live_tensors(self.model)
        partners = align(self.manifest.tensors, renamed(live, self._names))
        for name in self.manifest.frozen:
            if name in partners:
                yield partners[name], live[partners[name]]

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that train: what an optimizer is built from."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def verify(self, baseline: str | os.PathLike[str] | TensorSource | None = None) -> Report:
        """Prove that every frozen tensor of the live model has its bits.

        Args:
            baseline: The published checkpoint, by path or opened; with it the report says where tensors differ.

        Raises:
            UsageError: if the baseline is not what the manifest describes.
            CheckpointError: if it is malformed.
        """
        if isinstance(baseline, str | os.PathLike):
            from ...formats import open_checkpoint

            with open_checkpoint(Path(baseline)) as opened:
                return self.verify(opened)
        return verify(self.manifest, source_of(self.model), baseline=baseline, names=self._names, allow_widened=True)

    def guard(self, optimizer: torch.optim.Optimizer, *, every: int | None = None) -> Guard:
        """Watch the steps of an optimizer. Use the guard in a ``with``, or call its ``remove()``.

        Args:
            optimizer: The optimizer that trains the model.
            every: Prove all digests after every so many steps; None proves them once, at the end of the ``with``.
        """
        return Guard(self, optimizer, every)

    def moving_modules(self) -> list[str]:
        """Norm layers with frozen statistics that are in training mode now."""
        frozen = {id(tensor) for _, tensor in self.frozen_tensors()}
        return [
            name
            for name, module in self.model.named_modules()
            if module.training and moves_in_training(module) and any(id(b) in frozen for b in module._buffers.values())
        ]

    def release(self) -> None:
        """Give the model back as it was found; its weights stay as they are.

        What another freeze of the model holds too stays frozen until that one is released.
        """
        _FREEZES[self.model].discard(self)
        others = {id(found.tensor): (other, found) for other in _FREEZES[self.model] for found in other._found}
        for hold in reversed(self._held):
            hold.release()
        for found in self._found:
            if id(found.tensor) in others:
                other, theirs = others[id(found.tensor)]
                if other._number > self._number:  # it found what this freeze had made of the parameter
                    other._found[other._found.index(theirs)] = found
                continue
            found.tensor.requires_grad_(found.requires_grad)
            if found.tensor.grad is None:
                found.tensor.grad = found.grad
        self._held, self._found = [], []


_NUMBERS = itertools.count()
#: The freezes of each model that were not released.
_FREEZES: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[FrozenModel]] = weakref.WeakKeyDictionary()
