"""What is seen of frozen tensors while optimizers step: the evidence that names a cause."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...frameworks.pytorch import as_dtensor, local_of, unreadable
from ...manifest import Manifest
from ...report import Report
from ...settling import moving_buffer
from ...tensors import TensorSource
from ...verifying import verify
from .fingerprint import Fingerprint, fingerprints
from .holds import mover, moves_in_training, shrinks_rows
from .live import LiveModel, Roles
from .shares import Shares
from .steps import stepped_by

__all__ = ["Witness", "rows_that_others_train", "tied_to_trainable"]


class Witness:
    """Looks at a model before each step of an optimizer.

    It reads no frozen tensor, but for one without a gradient that an optimizer of somebody else's steps (torch's own
    leave those alone), and once, at the beginning, embeddings with max_norm. Besides it reads gradients that should not
    be there, with the optimizer's averages, and the counters of BatchNorm.

    Attributes:
        causes: What was seen to move a frozen tensor, or about to, by the live name; the first that was seen, but one
            that a gradient of zero left open gives way to a later one.
    """

    def __init__(self, live: LiveModel, roles: Roles, shares: Shares, *, rows_are_held: bool = True) -> None:
        """Begin to look.

        Args:
            live: The model.
            roles: What is frozen of it.
            shares: Who knows whose share of a tensor moved.
            rows_are_held: Whether somebody holds the rows of what is frozen in a part: then it may have a gradient.
        """
        self._live, self._frozen, self._partly = live, roles.frozen, roles.rows
        self._shares = shares
        self._rows = {} if rows_are_held else roles.rows
        now = live.now()
        self.causes: dict[str, str] = {}
        self._trained = {name for name in roles.frozen if name in now and now[name].requires_grad}
        self._were: dict[str, tuple[int, ...]] = {}
        self._note(now)
        self._tied = dict(tied_to_trainable(now, roles.frozen, roles.trainable))
        self._shrinking = {path for path, module in live.model.named_modules() if shrinks_rows(module)}
        self._counts = {path: count.clone() for path, count in self._counters().items()}
        self._training: set[str] = set()
        self._bracketed: dict[str, Fingerprint] = {}
        self._look_at_modes()

    def look(self, optimizer: torch.optim.Optimizer) -> dict[str, str]:
        """Look before a step.

        Returns:
            What is about to move, or to be stepped in the place of what the model has, or is in the wrong mode: cause
            codes by live name.
        """
        now, stepped = self._live.now(), stepped_by(optimizer)
        about: dict[str, str] = {}
        without_gradient: list[str] = []
        for name in self._frozen:
            tensor = now.get(name)
            if tensor is None or not tensor.is_leaf:
                continue
            if tensor.requires_grad and name not in self._trained:
                about[name] = "reenabled"
            if id(tensor) not in stepped:
                continue
            if tensor.grad is None:
                without_gradient.append(name)
            else:
                about[name] = self._moved_by_step(name, tensor, tensor.grad, optimizer)
        for name, rows in self._rows.items():
            tensor = now.get(name)
            if tensor is not None and id(tensor) in stepped and tensor.grad is not None:
                about[name] = self._moved_by_step(name, tensor, _rows_of(tensor.grad, rows), optimizer)
        for one, other in self._tied.items():
            if other in now and id(now[other]) in stepped and now[other].grad is not None:
                about[one] = "tied"
        about |= dict.fromkeys(self._replaced(now, stepped), "stale_optimizer")
        self._note(now)
        for name, code in about.items():
            if self.causes.get(name) in (None, "zero_grad_not_none", "weight_decay"):
                self.causes[name] = code
        if not type(optimizer).__module__.startswith("torch.optim."):  # torch's own leave alone what has no gradient
            self._bracketed = fingerprints({name: now[name] for name in without_gradient})
        self._look_at_modes()
        return about | self._moving_buffers(now)

    def after(self) -> None:
        """Look after the step."""
        if self._bracketed:
            now = self._live.now()
            for name, mark in fingerprints({name: now[name] for name in self._bracketed}).items():
                if mark != self._bracketed[name]:
                    self.causes.setdefault(name, "optimizer_ignores_none")
            self._bracketed = {}

    def _moved_by_step(
        self, name: str, tensor: torch.Tensor, gradient: torch.Tensor, optimizer: torch.optim.Optimizer
    ) -> str:
        """Why a step is about to move a frozen tensor that has a gradient."""
        if name in self._tied:
            return "tied"
        if bool(local_of(gradient).any()):
            if not tensor.requires_grad:
                return "late_freeze"
            return "never_frozen" if name in self._trained or name in self._rows else "reenabled"
        if not tensor.requires_grad:
            return "zero_grad_not_none"
        rows = slice(*self._rows.get(name, (None,)))
        averages = [one[rows] for one in optimizer.state.get(tensor, {}).values() if _has_shape(one, tensor.shape)]
        if any(bool(one.any()) for one in averages):  # they move it, whether or not it decays besides
            return "zero_grad_not_none"
        group = next(group for group in optimizer.param_groups if any(one is tensor for one in group["params"]))
        return "weight_decay" if group.get("weight_decay") else "zero_grad_not_none"

    def _replaced(self, now: Mapping[str, torch.Tensor], stepped: Mapping[int, torch.Tensor]) -> Iterable[str]:
        """Parameters that the optimizer steps although the model has others in their place by now."""
        there = {id(tensor) for tensor in now.values()}
        strangers = {_identity(one) for one in stepped.values() if id(one) not in there}
        for name, was in self._were.items():
            if was in strangers and name in now and id(now[name]) not in stepped:
                yield name

    def _note(self, now: Mapping[str, torch.Tensor]) -> None:
        """Note which parameters the model has; one that is replaced stays noted.

        Not by weak references, which forbid torch to swap a parameter for its converted self.
        """
        for name, tensor in now.items():
            known = self._were.get(name)
            if isinstance(tensor, nn.Parameter) and (known is None or known[0] == id(tensor)):
                self._were[name] = _identity(tensor)

    def _moving_buffers(self, now: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Frozen buffers that the forward pass writes to, since their layer is in training mode: causes by name."""
        frozen = {id(now[name]): name for name in (*self._frozen, *self._partly) if name in now}
        return {
            frozen[id(buffer)]: cause
            for module in self._live.model.modules()
            if module.training and (cause := moves_in_training(module))
            for buffer in module._buffers.values()
            if id(buffer) in frozen
        }

    def _counters(self) -> dict[str, torch.Tensor]:
        """What counts the batches of each BatchNorm; InstanceNorm has a counter too, and never counts."""
        return {
            path: module.num_batches_tracked.detach()
            for path, module in self._live.model.named_modules()
            if isinstance(module, _BatchNorm)
            and module.num_batches_tracked is not None
            and not unreadable(module.num_batches_tracked)
        }

    def _look_at_modes(self) -> None:
        """Note which modules are in training mode."""
        self._training.update(path for path, module in self._live.model.named_modules() if module.training)

    def verify(self, manifest: Manifest, baseline: TensorSource | None, *, expect_trained: bool) -> Report:
        """Prove that every frozen tensor of the model has its bits, with what was seen for the causes.

        Where the model is sharded, every process has to ask.
        """
        with self._live.whole():
            report = self._verified(manifest, baseline, expect_trained=expect_trained)
        return self._shares.blamed(report)

    def verify_moved(self, manifest: Manifest, moved: Collection[str]) -> Report:
        """Prove what this process found to have moved, with causes.

        Only those have to ask that share what moved: with the others nothing is gathered. What this process has whole
        is proven too, for causes are settled by it.

        Args:
            manifest: What must hold.
            moved: Live names.
        """
        held = {name: self._live.holding(name).live for name in self._live.partners}
        asked = {name for name, live in held.items() if not set(live).isdisjoint(moved)}
        asked.update(*(group for group in manifest.tied if not asked.isdisjoint(group)))
        alone = self._shares.unreadable_alone()
        shared = {name for name, live in held.items() if not alone.isdisjoint(live)}
        without = {one for one in shared - asked if shared.isdisjoint(asked) or manifest.tensors[one].frozen}
        with self._shares.whole_for(moved):
            report = self._verified(manifest, None, without=without)
        drifted = tuple(one for one in report.drifted if one.name not in without)
        ok = all(one.verdict == "dtype_only" for one in drifted)
        return self._shares.blamed(report.model_copy(update={"ok": ok, "drifted": drifted}))

    def _verified(
        self,
        manifest: Manifest,
        baseline: TensorSource | None,
        *,
        expect_trained: bool = False,
        without: Collection[str] = (),
    ) -> Report:
        return verify(
            manifest,
            self._live.source(without),
            baseline=baseline,
            allow_widened=True,
            expect_trained=expect_trained,
            witnessed=self.by_saved_name(),
            saved=False,
            also_given=self._live.names,
        )

    def by_saved_name(self) -> dict[str, str]:
        """What is known of every frozen tensor, were it to have moved, by the checkpoint's names."""
        self._look_at_modes()
        found = self._by_owner() | self.causes
        now = self._live.now()
        for name in self._frozen:
            if name not in self._trained and name in now and now[name].is_leaf and now[name].requires_grad:
                found.setdefault(name, "reenabled")
        saved: dict[str, str] = {}
        for name in self._live.partners:
            if code := next((found[one] for one in self._live.holding(name).live if one in found), None):
                saved[name] = code
        return saved

    def _by_owner(self) -> dict[str, str]:
        """What writes to a tensor outside optimizers, told by the module that has it."""
        found: dict[str, str] = {}
        owners = {
            id(tensor): (path, module)
            for path, module in self._live.model.named_modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
        }
        now = self._live.now()
        counts = self._counters()
        stood = {path for path, then in self._counts.items() if path in counts and torch.equal(counts[path], then)}
        for name in (*self._frozen, *self._rows):
            if name not in now or id(now[name]) not in owners:
                continue
            path, module = owners[id(now[name])]
            if isinstance(now[name], nn.Parameter):
                if path in self._shrinking:
                    found[name] = "embedding_max_norm"
                continue
            code = mover(module)
            if code is not None and path not in stood and (path in self._training or moves_in_training(module) is None):
                found[name] = code
            elif (by_name := moving_buffer(name, now.keys())) in ("router_bias", "observer"):
                found[name] = by_name
        return found


def _has_shape(state: object, shape: torch.Size) -> bool:
    return isinstance(state, torch.Tensor) and state.shape == shape


def tied_to_trainable(
    now: Mapping[str, torch.Tensor], frozen: Collection[str], trainable: Collection[str]
) -> Iterator[tuple[str, str]]:
    """Frozen tensors that share memory with one that trains, each with that one.

    Args:
        now: All tensors of a model by live name.
        frozen: Names of what is frozen.
        trainable: Names of what is meant to train. What is named nowhere trains if its ``requires_grad`` is on;
            a second name of the very same parameter is no second parameter.
    """
    in_storage: dict[int, list[str]] = defaultdict(list)
    for name, tensor in now.items():
        if not unreadable(tensor) and tensor.numel():
            in_storage[_storage(tensor)].append(name)
    held, moving = set(frozen), set(trainable)
    for sharing in in_storage.values():
        if len(sharing) == 1 or held.isdisjoint(sharing):
            continue
        open_spans: list[tuple[int, str]] = []
        for (start, end), name in sorted((_span(now[name]), name) for name in sharing):
            open_spans = [(last, other) for last, other in open_spans if last > start]
            for _, other in open_spans:
                if (name in held) == (other in held):
                    continue
                one, free = (name, other) if name in held else (other, name)
                if free in moving or (now[free] is not now[one] and now[free].requires_grad):
                    yield one, free
            open_spans.append((end, name))


def rows_that_others_train(
    now: Mapping[str, torch.Tensor], rows: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[str, str]]:
    """Tensors whose frozen rows share memory with another parameter that trains, each with that one."""
    for name, span in rows.items():
        if name not in now or unreadable(now[name]) or not now[name].dim() or as_dtensor(now[name]) is not None:
            continue
        part = now[name].detach()[slice(*span)]
        for other, tensor in now.items():
            if tensor is now[name] or not tensor.requires_grad or unreadable(tensor) or not tensor.numel():
                continue
            if _storage(tensor) == _storage(part) and _overlap(part, tensor):
                yield name, other


def _identity(tensor: torch.Tensor) -> tuple[int, ...]:
    """Tells a parameter from others, and from one that got its place in memory later."""
    if unreadable(tensor):
        return (id(tensor),)
    return id(tensor), local_of(tensor).data_ptr(), *tensor.shape


def _rows_of(gradient: torch.Tensor, rows: tuple[int, int]) -> torch.Tensor:
    """What a gradient has for some rows; a sparse one lists the rows that it has."""
    if not gradient.is_sparse:
        return gradient[rows[0] : rows[1]]
    listed = gradient.coalesce()
    index = listed.indices()[0]
    return listed.values()[(index >= rows[0]) & (index < rows[1])]


def _storage(tensor: torch.Tensor) -> int:
    return int(local_of(tensor).untyped_storage().data_ptr())


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    (a, b), (c, d) = _span(one), _span(other)
    return a < d and c < b


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and the one after its last."""
    tensor = local_of(tensor)
    start = int(tensor.storage_offset()) * tensor.element_size()
    last = sum((size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()
