"""Making a live model obey a manifest."""

from __future__ import annotations

import itertools
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ...counterparts import mismatched
from ...errors import FreezeError, UsageError
from ...manifest import Manifest
from ...renaming import Renaming
from ...report import Report
from ...tensors import TensorSource
from ...verifying import verify
from ...wording import counted, enumerate_names, shown
from ..arguments import checked_extra, opened
from ..messages import cannot_be_frozen, described, left_as_they_are, not_as_published
from .guard import Guard
from .holds import StaysInEvaluation, moves_in_training
from .live import LiveModel, Roles
from .marks import Marks
from .refusals import refusals
from .rows import HeldRows
from .shares import Shares, this_rank
from .witness import Witness

__all__ = ["FrozenModel", "freeze"]


def freeze(
    model: nn.Module,
    manifest: Manifest,
    names: Renaming | None = None,
    extra: Literal["keep", "error"] = "keep",
    *,
    allow_widened: bool = False,
) -> FrozenModel:
    """Make a model obey a manifest. Call it before the optimizer is built, and before DDP or FSDP wrap the model.

    Frozen parameters get ``requires_grad = False`` and lose their gradient; of one that is frozen in a part, every
    ``torch.optim.Optimizer`` leaves the frozen rows as they are. Layers that would write to frozen buffers in the
    forward pass stay in evaluation mode through every later ``model.train()``. Training is only ever turned off,
    never on.

    Args:
        model: A model that holds the manifest's weights.
        manifest: What must hold.
        names: From the model's names to the manifest's, where they differ: a mapping or a function. Models of
            transformers need none: they know what their files call a tensor.
        extra: Whether parameters that the manifest lacks are left as they are, or refused.
        allow_widened: Whether a frozen tensor may be in a wider dtype, if its values are the same.

    Raises:
        FreezeError: with the model unchanged, if a frozen tensor is absent, has another dtype, shape or other bits,
            cannot be read, is one with a tensor that trains, or would be written to whatever is done.
        FrozenWeightsChanged: if the model is sharded, and replicas of a frozen tensor differ.
        ManifestError: if nothing is frozen.
        UsageError: if names do not fit.
    """
    checked_extra(extra)
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a model of torch, found {shown(type(model).__name__)}")
    manifest.require_frozen()
    live = LiveModel(model, manifest.tensors, names)
    with live.whole():
        now, roles = live.now(), live.roles(manifest)
        problems, hint = refusals(manifest, live, now, roles, allow_widened=allow_widened)
        unknown = _extra_parameters(now, roles)
        if extra == "error" and unknown:
            problems.append(f"parameters that the manifest lacks: {enumerate_names(unknown)}")
        if problems:
            raise cannot_be_frozen(model, problems, hint, this_rank())
        if _waits_for_gradients(model, now, roles):
            raise FreezeError(
                "the model is wrapped by DistributedDataParallel already, which waits for gradients that will not come",
                hint="freeze before wrapping",
            )
        if unknown:
            warnings.warn(left_as_they_are(unknown), UserWarning, stacklevel=3)
        if others := not_as_published(mismatched(manifest.tensors, live.infos())):
            warnings.warn(others, UserWarning, stacklevel=3)
        if copies := _frozen_copies(model, now, roles):
            message = (
                f"{enumerate_names(copies)}: PEFT made a copy to train (modules_to_save), and the manifest freezes it"
            )
            warnings.warn(f"{message}; take it away from `freeze` if it is to train", UserWarning, stacklevel=3)
        return FrozenModel(live, manifest, unknown, names=names, allow_widened=allow_widened)


def _extra_parameters(now: Mapping[str, torch.Tensor], roles: Roles) -> tuple[str, ...]:
    """Parameters that have no partner in the manifest, and that are no second name of one that has."""
    known = {*roles.frozen, *roles.rows, *roles.trainable}
    held = {id(now[name]) for name in known}
    return tuple(
        name
        for name, tensor in now.items()
        if name not in known and isinstance(tensor, nn.Parameter) and id(tensor) not in held and not _is_spare(name)
    )


def _waits_for_gradients(model: nn.Module, now: Mapping[str, torch.Tensor], roles: Roles) -> bool:
    """Whether DDP has been told of gradients that a freeze does away with."""
    stopped = {id(now[name]) for name in roles.frozen if now[name].requires_grad}
    return any(
        isinstance(module, nn.parallel.DistributedDataParallel)
        and not (module.find_unused_parameters or module.static_graph)
        and any(id(parameter) in stopped for parameter in module.parameters())
        for module in model.modules()
    )


def _frozen_copies(model: nn.Module, now: Mapping[str, torch.Tensor], roles: Roles) -> list[str]:
    """Frozen tensors of modules that PEFT has copied to train the copy."""
    frozen = {id(now[name]): name for name in roles.frozen}
    return [
        frozen[id(parameter)]
        for name, parameter in model.named_parameters()
        if ".modules_to_save." in name and id(parameter) in frozen and parameter.requires_grad
    ]


def _is_spare(name: str) -> bool:
    """Whether it is what PEFT put aside for a copy that trains: nothing is computed with it."""
    return ".original_module." in name


@dataclass(slots=True)
class _Found:
    """What a tensor was like before the freeze."""

    identity: int
    requires_grad: bool
    grad: torch.Tensor | None


class FrozenModel:
    """A model that obeys a manifest, until it is released.

    Attributes:
        model: The model.
        manifest: What it obeys.
        extra: Parameters that the manifest lacks; they are left as they were.
        kept_in_evaluation: Names of modules that stay in evaluation mode, for their frozen buffers.
    """

    def __init__(
        self,
        live: LiveModel,
        manifest: Manifest,
        extra: tuple[str, ...],
        *,
        names: Renaming | None = None,
        allow_widened: bool = False,
    ) -> None:
        self.manifest, self.extra = manifest, extra
        self._names, self._allow_widened = names, allow_widened
        self._live = live
        self._number = next(_NUMBERS)
        roles, now = live.roles(manifest), live.now()
        self._roles = roles
        # What may fail comes before what changes the model.
        self._shares = Shares(live, roles)
        self._marks = Marks(live, roles, self._shares)
        self._rows = HeldRows(live.model, roles.rows) if roles.rows else None
        self._found: dict[str, _Found] = {}
        for name in roles.frozen:
            tensor = now[name]
            if tensor.is_leaf:
                self._found[name] = _Found(id(tensor), tensor.requires_grad, tensor.grad)
        for name in self._found:
            now[name].requires_grad_(False)
            now[name].grad = None
        frozen = {id(now[name]) for name in (*roles.frozen, *roles.rows)}
        kept = {
            path: StaysInEvaluation(module)
            for path, module in live.model.named_modules()
            if moves_in_training(module) and any(id(buffer) in frozen for buffer in module._buffers.values())
        }
        self.kept_in_evaluation = tuple(kept)
        self._stand_ins = list(kept.values())
        self._witness = Witness(live, roles, self._shares)
        _FREEZES.add(self)

    def __repr__(self) -> str:
        kept = f"{counted(len(self._stand_ins), 'layer')} kept in evaluation mode" if self._stand_ins else None
        return described(self.model, self.manifest, kept)

    @property
    def model(self) -> nn.Module:
        return self._live.model

    def attach(self, wrapped: nn.Module) -> None:
        """Tell of a wrapper that hides the parameters of the model that it wraps: FullyShardedDataParallel.

        Raises:
            UsageError: if the model is not inside it.
        """
        if not any(module is self.model for module in wrapped.modules()):
            raise UsageError(f"the frozen model is not inside this {type(wrapped).__name__}")
        self._live.model = wrapped
        self._shares.forget()
        self._shares.note()

    def frozen_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the model has now of the tensors that are frozen as a whole, by its own names; looked up every time."""
        now = self._live.now()
        return ((name, now[name]) for name in self._roles.frozen if name in now)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that train: what an optimizer is built from.

        Raises:
            FreezeError: if FullyShardedDataParallel has flattened a parameter with frozen rows.
        """
        if self._rows is not None:
            self._rows.mask()
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def verify(
        self,
        baseline: str | os.PathLike[str] | TensorSource | None = None,
        *,
        expect_trained: bool = False,
    ) -> Report:
        """Prove that every frozen tensor of the live model has its bits.

        Where the model is sharded, every process has to ask.

        Args:
            baseline: The published checkpoint, by path or opened; with it the report says where tensors differ.
            expect_trained: Whether trainable tensors that did not move count.

        Raises:
            FreezeError: if parameters were sharded by a wrapper that is not attached, or a tensor cannot be read.
            UsageError: if there is no baseline at the path, or it is not what the manifest describes.
            CheckpointError: if it is malformed.
            SystemFailure: if it cannot be read.
        """
        with ExitStack() as stack:
            before = None if baseline is None else stack.enter_context(opened(baseline))
            return self._witness.verify(self.manifest, before, expect_trained=expect_trained)

    def verify_saved(self, saved: str | os.PathLike[str] | Mapping[str, torch.Tensor], prefix: str = "") -> Report:
        """Prove that what was saved of the model, or is about to be, has the frozen bits.

        Args:
            saved: A checkpoint's path, under the manifest's names or the model's; or a state dict of the model. A state
                dict may be in a wider dtype, a file if the freeze allowed it.
            prefix: Before every name.

        Raises:
            UsageError: if there is no checkpoint at the path, names do not fit, or an adapter's base is not here.
            CheckpointError: if it is malformed.
            SystemFailure: if it cannot be read.
        """
        witnessed = self._witness.by_saved_name()
        if isinstance(saved, Mapping):
            tensors = {name.removeprefix(prefix): one for name, one in saved.items() if name.startswith(prefix)}
            source = self._live.source_of(tensors, "the state dict")
            report = verify(self.manifest, source, allow_widened=True, witnessed=witnessed)
            return self._shares.blamed(report, self._live.found_in(tensors))
        from ...formats import AdapterOverBase, open_trained

        with open_trained(Path(saved)) as opened:
            has_all = all(name in opened.tensors for name in self.manifest.frozen)
            return verify(
                self.manifest,
                opened,
                names=None if has_all else self._names,
                prefix=prefix,
                allow_widened=self._allow_widened,
                witnessed=witnessed,
                note=opened.note if isinstance(opened, AdapterOverBase) else None,
            )

    def guard(self, optimizer: torch.optim.Optimizer, *, every: int | None = 1, expect_trained: bool = False) -> Guard:
        """Watch the steps of an optimizer. Use the guard in a ``with``, or call its ``remove()``.

        Args:
            optimizer: The optimizer that trains the model.
            every: Read the frozen tensors after every so many steps; None does not. All digests are proven at the end
                of the ``with`` in any case.
            expect_trained: Whether the end also proves that each trainable tensor moved.

        Raises:
            UsageError: if the optimizer is none of torch, or ``every`` is no number of steps.
        """
        self._shares.note()  # the model may have been sharded since it was frozen
        return Guard(
            optimizer,
            self._witness,
            self._marks,
            self.verify,
            lambda moved: self._witness.verify_moved(self.manifest, moved),
            every=every,
            at_the_end=lambda: self.verify(expect_trained=expect_trained),
        )

    def moved(self) -> list[str]:
        """Frozen tensors, by the model's names, that are not what they were: what a guard looks at after a step.

        Each is read once, where it lives. Where the model is sharded, every process has to ask.

        Raises:
            FreezeError: if parameters were sharded by a wrapper that is not attached.
        """
        return self._marks.moved()

    def release(self) -> None:
        """Give the model back as it was found; its weights stay as they are.

        What another freeze of the model holds too stays frozen until that one is released.
        """
        _FREEZES.discard(self)
        for stand_in in reversed(self._stand_ins):
            stand_in.release()
        if self._rows is not None:
            self._rows.release()
        others = [(other, other._held_names()) for other in _FREEZES]
        now = self._live.now()
        for name, found in self._found.items():
            tensor = now.get(name)
            if tensor is None or not tensor.is_leaf:
                continue
            if holding := [(other, names[id(tensor)]) for other, names in others if id(tensor) in names]:
                for other, its_name in holding:
                    if other._number > self._number:  # it found what this freeze had made of the parameter
                        other._found[its_name] = found
                continue
            tensor.requires_grad_(found.requires_grad)
            if id(tensor) == found.identity and tensor.grad is None:
                tensor.grad = found.grad
        self._stand_ins, self._found, self._rows = [], {}, None

    def _held_names(self) -> dict[int, str]:
        """What this freeze turned off, by identity."""
        now = self._live.now()
        return {id(now[name]): name for name in self._found if name in now}


_NUMBERS = itertools.count()
#: The freezes that were not released. They overlap, and may be released in any order: what another one still holds
#: stays frozen, and whoever goes last gives back what the first one found.
_FREEZES: weakref.WeakSet[FrozenModel] = weakref.WeakSet()
