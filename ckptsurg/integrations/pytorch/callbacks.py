"""What the callbacks of trainers have in common."""

from __future__ import annotations

import os
from typing import Literal

from torch import nn

from ...manifest import Manifest
from ...renaming import Renaming
from ..arguments import as_manifest, checked_every
from .freezing import FrozenModel, freeze

__all__ = ["ManifestCallback"]


class ManifestCallback:
    """Holds a manifest, and freezes the model that a trainer comes with.

    Attributes:
        manifest: The manifest.
        frozen: The frozen model; None before there is one.
    """

    def __init__(
        self,
        manifest: Manifest | str | os.PathLike[str],
        *,
        every: int | None = 1,
        expect_trained: bool = False,
        names: Renaming | None = None,
        extra: Literal["keep", "error"] = "keep",
        allow_widened: bool = False,
    ) -> None:
        """Prepare the callback.

        Args:
            manifest: The manifest; its path, or that of the output that it stands by.
            every: Read the frozen tensors after every so many steps; None does not.
            expect_trained: Whether the end of the training also proves that each trainable tensor moved.
            names: As ``ckptsurg.freeze`` takes it.
            extra: Likewise.
            allow_widened: Likewise.

        Raises:
            ManifestError: if the manifest is not valid.
            UsageError: if there is none, or ``every`` is no number of steps.
        """
        super().__init__()
        self.manifest = as_manifest(manifest)
        self.frozen: FrozenModel | None = None
        self._every, self._expect_trained = checked_every(every), expect_trained
        self._names, self._extra, self._allow_widened = names, extra, allow_widened

    def _freeze(self, model: nn.Module) -> FrozenModel:
        self.frozen = freeze(model, self.manifest, self._names, self._extra, allow_widened=self._allow_widened)
        return self.frozen
