"""What each process holds of a sharded model: whose share of a tensor moved, and what one process reads alone."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from ...frameworks.pytorch import as_dtensor, local_of
from ...report import Report
from .fingerprint import Fingerprint, fingerprints
from .live import LiveModel, Roles
from .rows import local_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Shares", "this_rank"]

#: What a rank says of its share: nothing, as it holds none; the same; another; or it cannot compare.
_SAME, _MOVED, _UNKNOWN = 1, 2, 3

#: How a tensor was cut when a share of it was marked, of what only comparing makes sense.
_Cut: TypeAlias = tuple[object, ...]


def this_rank() -> int | None:
    """Which process of several this is, from 0; None where there is one alone."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return None
    return distributed.get_rank()


@dataclass(frozen=True, slots=True)
class _Sharing:
    """How processes share a tensor.

    Attributes:
        cut: How it is cut, and which piece this process has.
        groups: Of the processes that have the other shares, one for each dimension that it is cut along; with
            ``replicas`` also of those that have the same.
        replicas: Likewise, with those.
        device: The type of device over which they can be reached.
    """

    cut: _Cut
    groups: tuple[ProcessGroup, ...]
    replicas: tuple[ProcessGroup, ...]
    device: str


class Shares:
    """Marks of this process's own shares of the frozen tensors, by live name.

    A fingerprint of a whole tensor says that it moved, and not in whose hands. So each process keeps one of its share,
    which is compared once the whole has moved, and only then: as long as nothing moves, no process hears of another's.

    Args:
        live: The model.
        roles: What is frozen of it.
    """

    def __init__(self, live: LiveModel, roles: Roles) -> None:
        self._live, self._names, self._rows = live, (*roles.frozen, *roles.rows), roles.rows
        self._marks: dict[str, tuple[_Cut, Fingerprint]] = {}

    def note(self, anew: Collection[str] = ()) -> None:
        """Mark shares that have no mark yet, or are cut otherwise by now. It asks no other process.

        Args:
            anew: Names of those to mark in any case.
        """
        now = self._live.now()
        sharing = self._sharing({name: now[name] for name in self._names if name in now})
        due = {
            name: how.cut
            for name, how in sharing.items()
            if name in anew or name not in self._marks or self._marks[name][0] != how.cut
        }
        lanes = self._lanes({name: now[name] for name in due})
        self._marks |= {name: (cut, lanes[name]) for name, cut in due.items()}

    def forget(self) -> None:
        """Forget the marks: something else cuts the model from now on."""
        self._marks = {}

    def unreadable_alone(self) -> set[str]:
        """Tensors of the model of which this process has a share alone."""
        now = self._live.now()
        shared = {name for name, how in self._sharing(now).items() if how.groups}
        return shared | {name for name, tensor in now.items() if _is_flattened(tensor)}

    def whole_for(self, names: Iterable[str]) -> AbstractContextManager[None]:
        """While these are there in one piece; other processes have to enter only if they have shares of them."""
        now = self._live.now()
        return self._live.whole() if any(name in now and _is_flattened(now[name]) for name in names) else nullcontext()

    def whose(
        self, names: Collection[str], given: Mapping[str, torch.Tensor] | None = None, *, replicas: bool = False
    ) -> dict[str, tuple[int, ...]]:
        """The ranks whose share of a tensor moved, of tensors that did; empty where shares cannot be compared.

        Of what this process has whole, that is this process. Of what is shared, all that share it have to ask, in the
        same order.

        Args:
            names: Of the tensors that moved.
            given: A state dict of the model to look into, instead of the model.
            replicas: Whether those that have the same share are asked too.
        """
        rank = this_rank()
        if rank is None:
            return {}
        now = self._live.now() if given is None else given
        tensors = {name: now[name] for name in names if name in now}
        cuts: dict[str, _Cut] = {}
        ballots: dict[tuple[tuple[ProcessGroup, ...], str], list[str]] = {}
        for name, how in self._sharing(tensors).items():
            if groups := how.replicas if replicas else how.groups:
                cuts[name] = how.cut
                ballots.setdefault((groups, how.device), []).append(name)
        found: dict[str, tuple[int, ...]] = {name: (rank,) for name in names if name not in cuts}
        if given is not None:  # what was gathered from shares does not say from whose
            found |= dict.fromkeys(found.keys() & self._marks.keys(), ())
        lanes = self._lanes({name: tensors[name] for name in cuts})
        for (groups, device), asked in ballots.items():
            votes = torch.zeros((len(asked), torch.distributed.get_world_size()), dtype=torch.uint8)
            votes[:, rank] = torch.tensor([self._vote(name, cuts[name], lanes[name]) for name in asked])
            votes = votes.to(device)
            for group in groups:
                torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=group)
            for name, row in zip(asked, votes.tolist(), strict=True):
                moved = (one for one, vote in enumerate(row) if vote == _MOVED)
                found[name] = () if _UNKNOWN in row else tuple(moved)
        return found

    def blamed(self, report: Report, given: Mapping[str, torch.Tensor] | None = None) -> Report:
        """A report with the ranks whose share moved; all that share what moved have to ask.

        Args:
            report: What was found of the model.
            given: Of this state dict of the model, if not of the model itself.
        """
        moved = [one.name for one in report.drifted if one.verdict != "dtype_only"]
        if this_rank() is None or not moved:
            return report
        live = {name: self._live.holding(name).live if name in self._live.partners else () for name in moved}
        found = self.whose(list(dict.fromkeys(one for names in live.values() for one in names)), given)
        ranks = {name: sorted({rank for one in live[name] for rank in found.get(one, ())}) for name in moved}
        for name in moved:
            # Of several tensors of a file that are one in the model, nothing tells which of them moved where.
            if len(ranks[name]) > 1 and sum(not set(live[name]).isdisjoint(others) for others in live.values()) > 1:
                ranks[name] = []
        drifted = tuple(one.on(ranks[one.name]) if ranks.get(one.name) else one for one in report.drifted)
        return report.model_copy(update={"drifted": drifted})

    def _vote(self, name: str, cut: _Cut, lanes: Fingerprint) -> int:
        if name not in self._marks or self._marks[name][0] != cut:
            return _UNKNOWN
        return _SAME if self._marks[name][1] == lanes else _MOVED

    def _lanes(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, Fingerprint]:
        """Fingerprints of this process's shares, each as if it were a tensor of its own."""
        return fingerprints({name: self._local(name, tensor) for name, tensor in tensors.items()})

    def _local(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self._rows:
            return local_of(tensor)
        rows = local_rows(tensor, self._rows[name])
        return rows[0] if rows else local_of(tensor)[:0]

    def _sharing(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, _Sharing]:
        """How those tensors are shared that are."""
        if this_rank() is None:
            return {}
        flattened = _flattened(self._live.model) if any(map(_is_flattened, tensors.values())) else {}
        found = {}
        for name, tensor in tensors.items():
            how = _flat_sharing(tensor, flattened[id(tensor)]) if id(tensor) in flattened else _mesh_sharing(tensor)
            if how is not None:
                found[name] = how
        return found


def _mesh_sharing(tensor: torch.Tensor) -> _Sharing | None:
    """How a DTensor is shared; None for any other tensor, and outside of its mesh."""
    sharded = as_dtensor(tensor)
    if sharded is None or sharded.device_mesh.get_coordinate() is None:
        return None
    mesh, placements = sharded.device_mesh, sharded.placements
    axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    cut = (placements, tuple(mesh.shape), tuple(mesh.get_coordinate()), tuple(local_of(tensor).shape))
    groups = tuple(mesh.get_group(axis) for axis in axes if not placements[axis].is_replicate())
    return _Sharing(cut, groups, tuple(map(mesh.get_group, axes)), mesh.device_type)


def _flat_sharing(tensor: torch.Tensor, wrapper: Any) -> _Sharing | None:
    """How a piece of a flat parameter is shared; None where every process has the whole (NO_SHARD)."""
    group = wrapper.process_group
    if group.size() == 1 or wrapper.sharding_strategy.name == "NO_SHARD":
        return None
    cut = (group.rank(), group.size(), tuple(tensor.shape))
    return _Sharing(cut, (group,), (group,), wrapper.compute_device.type)


def _is_flattened(tensor: torch.Tensor) -> bool:
    """Whether FullyShardedDataParallel has made it a piece of a flat parameter."""
    return getattr(tensor, "_fsdp_flattened", False)


def _flattened(model: nn.Module) -> dict[int, Any]:
    """The innermost FullyShardedDataParallel around each parameter, by the parameter's identity."""
    wrapper: Any = sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel  # whoever flattens has imported it
    return {id(parameter): one for one in wrapper.fsdp_modules(model) for parameter in one.parameters()}
