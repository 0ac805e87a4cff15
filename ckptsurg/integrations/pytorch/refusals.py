"""Why a live model cannot be made to obey a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ...frameworks.pytorch import info_of, unreadable
from ...manifest import Manifest
from ...renaming import common_prefix
from ...settling import moving_buffer, reparametrised_as
from ...verifying import verify
from ...wording import enumerate_names, shown
from ..messages import absent, loading_hint, mismatches
from .holds import silenced, unholdable
from .live import LiveModel, Roles
from .witness import rows_that_others_train, tied_to_trainable

__all__ = ["refusals"]


def refusals(
    manifest: Manifest, live: LiveModel, now: Mapping[str, torch.Tensor], roles: Roles, *, allow_widened: bool
) -> tuple[list[str], str | None]:
    """Everything that stands against the freeze, a line each with the tensor's name; and a hint where one helps."""
    if problems := list(_mismatches(manifest, live, now, allow_widened=allow_widened)):
        return problems, loading_hint(problems)
    return [*_parted(manifest, live), *_entangled(now, roles), *_unholdable(live.model, now, roles)], None


def _mismatches(
    manifest: Manifest,
    live: LiveModel,
    now: Mapping[str, torch.Tensor],
    *,
    allow_widened: bool,
) -> Iterator[str]:
    """Frozen tensors that the model does not hold as the manifest records them."""
    if not live.partners and (prefix := common_prefix([{name} for name in manifest.frozen], now)):
        inner = prefix.rstrip(".")
        yield (
            f'all stand under "{shown(prefix)}" in the model: freeze model.{shown(inner)} instead (a callback takes '
            f'module="{shown(inner)}"), or give names=lambda name: name.removeprefix("{shown(prefix)}")'
        )
        return
    missing = {name for name in manifest.frozen if name not in live.partners}
    for name in manifest.frozen:
        if name in missing:
            where = reparametrised_as(name, now)
            advice = f": it is reparametrised as {shown(where)}; freeze before, or without, the reparametrisation"
            yield absent(name, advice if where else "")
        elif reason := next(filter(None, (unreadable(now[one]) for one in live.holding(name).live)), None):
            yield f'"{shown(name)}" {reason}'
            missing.add(name)
    drifted = verify(manifest, live.source(without=missing), saved=False).drifted
    yield from mismatches(
        (one for one in drifted if one.name not in missing),
        manifest,
        lambda name: info_of(now[live.holding(name).live[0]]).dtype,
        allow_widened=allow_widened,
    )


def _parted(manifest: Manifest, live: LiveModel) -> Iterator[str]:
    """Live tensors that hold both frozen and trainable tensors of the checkpoint."""
    record = {own: manifest.tensors[name] for name, own in live.partners.items()}
    for part in live.parts:
        frozen = [name for name in part.saved if name in record and record[name].frozen]
        others = [name for name in part.saved if name not in record or record[name].trains]
        if not frozen or part.split is None:
            continue
        where = f"{enumerate_names(part.live, 2)} of the model"
        if others == frozen:
            yield f'"{shown(frozen[0])}" is frozen in a part, and is itself a part of {where}'
        elif others:
            yield (
                f'"{shown(frozen[0])}" is frozen and "{shown(others[0])}" trains, and both are parts of {where}; '
                "freeze both or neither"
            )


def _entangled(now: Mapping[str, torch.Tensor], roles: Roles) -> Iterator[str]:
    """Frozen tensors that share memory with one that trains."""
    tied = tied_to_trainable(now, roles.frozen, {*roles.trainable, *roles.rows})
    for one, other in (*tied, *rows_that_others_train(now, roles.rows)):
        yield (
            f'"{shown(one)}" is frozen and shares its storage with "{shown(other)}", which trains: '
            "they are tied; freeze both or neither"
        )


def _unholdable(model: nn.Module, now: Mapping[str, torch.Tensor], roles: Roles) -> Iterator[str]:
    """Frozen tensors that the forward pass writes to, whatever the mode."""
    names = {id(now[name]): name for name in reversed((*roles.frozen, *roles.rows))}
    frozen = set(names)
    for name in roles.frozen:
        if moving_buffer(name, ()) == "observer":
            yield f'"{shown(name)}" is the history of an FP8 layer, which every forward pass goes on with; let it train'
    quiet = silenced(model)
    for module in model.modules():
        if module not in quiet and (reason := unholdable(module, frozen)):
            tensors = (*module._parameters.values(), *module.buffers())
            yield f'"{shown(next(names[id(one)] for one in tensors if id(one) in names))}" {reason}'
