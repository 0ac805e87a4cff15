"""What the callbacks of trainers have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypedDict

from torch import nn

from ...errors import UsageError
from ...manifest import Manifest, load_manifest
from ...renaming import Renaming
from ...wording import shown
from .freezing import FrozenModel, freeze

__all__ = ["Freezes", "Options"]


class Options(TypedDict, total=False):
    """What every such callback takes beside its manifest."""

    every: int | None
    expect_trained: bool
    names: Renaming | None
    extra: Literal["keep", "error"]
    allow_widened: bool


class Freezes:
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
        if every is not None and (type(every) is not int or every < 1):
            raise UsageError(f"every: expected a whole number from 1, found {shown(every, 40)}")
        self.manifest = manifest if isinstance(manifest, Manifest) else load_manifest(Path(manifest))
        self.frozen: FrozenModel | None = None
        self._every, self._expect_trained = every, expect_trained
        self._names, self._extra, self._allow_widened = names, extra, allow_widened

    def _freeze(self, model: nn.Module) -> FrozenModel:
        return freeze(model, self.manifest, self._names, self._extra, allow_widened=self._allow_widened)
