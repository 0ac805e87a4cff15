"""What frozen tensors of a live model were like, and which of them are not so any more."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...frameworks.pytorch import as_dtensor, bytes_of
from ...tensors import digest_of
from .fingerprint import Fingerprint, fingerprints
from .live import LiveModel, Roles

__all__ = ["Marks"]


class Marks:
    """Marks of frozen tensors, or of the frozen rows of one, by live name.

    What one processor has whole is marked by its digest, which is the faster there; all else by its fingerprint, which
    is computed where the shards live. Fingerprints are kept of everything, for a tensor may be sharded or moved later.

    Args:
        live: The model.
        roles: What is frozen of it.
    """

    def __init__(self, live: LiveModel, roles: Roles) -> None:
        self._live, self._names, self._rows = live, (*roles.frozen, *roles.rows), roles.rows
        self.take()

    def take(self) -> None:
        """Mark what is there now. Where the model is sharded, every process has to."""
        with self._live.whole():
            tensors = self._tensors()
            self._fingerprints = fingerprints(tensors, rows=self._rows)
            self._digests = {name: self._digest(name, one) for name, one in tensors.items() if _on_processor(one)}

    def moved(self) -> list[str]:
        """Tensors that are not what they were, or not there, since the marks were taken.

        Each is read once. Where the model is sharded, every process has to ask.
        """
        with self._live.whole():
            tensors = self._tensors()
            digested = {name for name, one in tensors.items() if _on_processor(one) and name in self._digests}
            others = {name: one for name, one in tensors.items() if name not in digested}
            now = fingerprints(others, rows=self._rows)
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
