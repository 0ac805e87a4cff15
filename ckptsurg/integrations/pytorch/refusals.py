"""Why a live model cannot be made to obey a manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from ...causes import reparametrised_as
from ...manifest import Manifest
from ...renaming import common_prefix
from ...verifying import verify
from ...wording import enumerate_names, shown
from .holds import silenced, unholdable
from .live import LiveModel
from .tensors import unreadable
from .witness import tied_to_trainable

__all__ = ["refusals"]


def refusals(manifest: Manifest, live: LiveModel, *, allow_widened: bool) -> list[str]:
    """Everything that stands against the freeze, a line each, with the tensor's name."""
    now = live.now()
    readable = dict(live.partners)
    problems = list(_mismatches(manifest, live, now, readable, allow_widened=allow_widened))
    if not problems:
        problems += _parted(manifest, live)
        problems += _entangled(manifest, live, now)
        problems += _unholdable(manifest, live, now)
    return problems


def _mismatches(
    manifest: Manifest,
    live: LiveModel,
    now: Mapping[str, torch.Tensor],
    readable: dict[str, str],
    *,
    allow_widened: bool,
) -> Iterator[str]:
    """Frozen tensors that the model does not hold as the manifest records them."""
    if not readable and (prefix := common_prefix([{name} for name in manifest.frozen], now)):
        yield f'all stand under "{shown(prefix)}" in the model: names=lambda name: name.removeprefix("{shown(prefix)}")'
        return
    absent = {name for name in manifest.frozen if name not in readable}
    for name in manifest.frozen:
        if name in absent:
            where = reparametrised_as(name, now)
            advice = f": it is reparametrised as {shown(where)}; freeze before, or without, the reparametrisation"
            yield f'"{shown(name)}" is not in the model{advice if where else ""}'
        elif reason := next(filter(None, (unreadable(now[one]) for one in live.holding(name).live)), None):
            yield f'"{shown(name)}" {reason}'
            absent.add(name)
    source = live.source()
    source.tensors = {name: info for name, info in source.tensors.items() if name not in _own(live, absent)}
    for difference in verify(manifest, source, saved=False).drifted:
        if difference.name in absent or (difference.verdict == "dtype_only" and allow_widened):
            continue
        if difference.verdict == "changed":
            yield f'"{shown(difference.name)}" has other bits: not loaded, or from another file'
        elif difference.verdict == "dtype_only":
            yield f"{difference.describe()}; `allow_widened=True` accepts it"
        else:
            yield difference.describe()


def _own(live: LiveModel, names: set[str]) -> set[str]:
    return {live.partners[name] for name in names if name in live.partners}


def _parted(manifest: Manifest, live: LiveModel) -> Iterator[str]:
    """Live tensors that hold both frozen and trainable tensors of the checkpoint."""
    record = {own: manifest.tensors[name] for name, own in live.partners.items()}
    for part in live.parts:
        frozen = [name for name in part.saved if name in record and record[name].frozen]
        others = [name for name in part.saved if name not in record or record[name].trains]
        if not frozen or part.as_is:
            continue
        where = f"{enumerate_names(part.live, 2)} of the model"
        if others == frozen:
            yield f'"{shown(frozen[0])}" is frozen in a part, and is itself a part of {where}'
        elif others:
            yield (
                f'"{shown(frozen[0])}" is frozen and "{shown(others[0])}" trains, and both are parts of {where}; '
                "freeze both or neither"
            )


def _entangled(manifest: Manifest, live: LiveModel, now: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Frozen tensors that share memory with one that trains."""
    roles = live.roles(manifest)
    for one, other in tied_to_trainable(now, roles.frozen, {*roles.trainable, *roles.rows}):
        yield (
            f'"{shown(one)}" is frozen and shares its storage with "{shown(other)}", which trains: '
            "they are tied; freeze both or neither"
        )


def _unholdable(manifest: Manifest, live: LiveModel, now: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Frozen tensors that the forward pass writes to, whatever the mode."""
    roles = live.roles(manifest)
    names = {id(now[name]): name for name in reversed((*roles.frozen, *roles.rows))}
    frozen = set(names)
    quiet = silenced(live.model)
    for module in live.model.modules():
        if module not in quiet and (reason := unholdable(module, frozen)):
            tensors = (*module._parameters.values(), *module.buffers())
            yield f'"{shown(next(names[id(one)] for one in tensors if id(one) in names))}" {reason}'
