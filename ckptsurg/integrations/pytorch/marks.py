"""What frozen tensors of a live model were like, and which of them are not so any more."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ...frameworks.pytorch import as_dtensor, bytes_of
from ...tensors import digest_of
from .fingerprint import Fingerprint, ReplicasDiffer, fingerprints
from .live import LiveModel, Roles
from .shares import Shares

__all__ = ["Marks"]


class Marks:
    """Marks of frozen tensors, or of the frozen rows of one, by live name.

    What one processor has whole is marked by its digest, which is the faster there; all else by its fingerprint, which
    is computed where the shards live. Fingerprints are kept of everything, for a tensor may be sharded or moved later.

    Args:
        live: The model.
        roles: What is frozen of it.
        shares: Who knows whose share moved.
    """

    def __init__(self, live: LiveModel, roles: Roles, shares: Shares) -> None:
        self._live, self._names, self._rows = live, (*roles.frozen, *roles.rows), roles.rows
        self._shares = shares
        self._fingerprints: dict[str, Fingerprint] = {}
        self._digests: dict[str, str] = {}
        with live.whole():
            self._take(self._names)
        shares.note()

    def take_again(self, names: Collection[str]) -> None:
        """Mark these as they are now. Where they are sharded, every process has to."""
        with self._shares.whole_for(names):
            self._take(names)
        self._shares.note(anew=names)

    def _take(self, names: Collection[str]) -> None:
        tensors = self._tensors()
        tensors = {name: tensors[name] for name in names if name in tensors}
        for name in names:
            self._fingerprints.pop(name, None)
            self._digests.pop(name, None)
        self._fingerprints |= fingerprints(tensors, rows=self._rows)
        self._digests |= {name: self._digest(name, one) for name, one in tensors.items() if _on_processor(one)}

    def moved(self) -> list[str]:
        """Tensors that are not what they were, or not there, since the marks were taken.

        Each is read once. Where the model is sharded, every process has to ask.

        Raises:
            ReplicasDiffer: on all processes that share a tensor of which some have other replicas.
        """
        with self._live.whole():
            tensors = self._tensors()
            digested = {name for name, one in tensors.items() if _on_processor(one) and name in self._digests}
            others = {name: one for name, one in tensors.items() if name not in digested}
            try:
                now = fingerprints(others, rows=self._rows)
            except ReplicasDiffer as torn:
                raise ReplicasDiffer(torn.names, self._shares.whose(torn.names, replicas=True)) from None
            changed = [name for name in digested if self._digest(name, tensors[name]) != self._digests[name]]
            return changed + [name for name in self._names if name not in digested and self._differs(name, now)]

    def _differs(self, name: str, now: Mapping[str, Fingerprint]) -> bool:
        # On a process outside of a tensor's mesh there is nothing to compare.
        return name in self._fingerprints and now.get(name) != self._fingerprints[name]

    def _tensors(self) -> dict[str, torch.Tensor]:
        now = self._live.now()
        return {name: now[name] for name in self._names if name in now}

    def _digest(self, name: str, tensor: torch.Tensor) -> str:
        return digest_of(bytes_of(tensor[slice(*self._rows[name])] if name in self._rows else tensor))


def _on_processor(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and as_dtensor(tensor) is None
