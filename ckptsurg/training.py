"""The public functions on live models: what holds them to a manifest while they train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, overload

from .api import make_manifest
from .coercing import ManifestLike, as_manifest, is_keras, is_model
from .errors import UsageError
from .renaming import Renaming
from .wording import shown

if TYPE_CHECKING:
    import keras
    import torch

    from .integrations.keras import FrozenModel as FrozenKerasModel
    from .integrations.pytorch import FrozenModel, Watch

__all__ = ["freeze", "watch"]


@overload
def freeze(
    model: torch.nn.Module,
    manifest: ManifestLike,
    names: Renaming | None = None,
    extra: Literal["keep", "error"] = "keep",
    *,
    allow_widened: bool = False,
) -> FrozenModel: ...


@overload
def freeze(
    model: keras.Layer,
    manifest: ManifestLike,
    names: Renaming | None = None,
    extra: Literal["keep", "error"] = "keep",
    *,
    allow_widened: bool = False,
) -> FrozenKerasModel: ...


def freeze(
    model: torch.nn.Module | keras.Layer,
    manifest: ManifestLike,
    names: Renaming | None = None,
    extra: Literal["keep", "error"] = "keep",
    *,
    allow_widened: bool = False,
) -> FrozenModel | FrozenKerasModel:
    """Make a live model obey a manifest.

    See ``ckptsurg.integrations.pytorch.freeze``, and for models of Keras ``ckptsurg.integrations.keras.freeze``.

    Raises:
        FreezeError: if the model does not hold what the manifest freezes; it is unchanged then.
        ManifestError: if the manifest is not valid, or nothing in it is frozen.
        UsageError: if names do not fit.
    """
    if is_keras(model):
        from .integrations.keras import freeze as freeze_keras

        return freeze_keras(model, as_manifest(manifest), names, extra, allow_widened=allow_widened)
    if not is_model(model):
        raise UsageError(f"expected a model of torch or Keras, found {shown(type(model).__name__)}")
    from .integrations import pytorch

    return pytorch.freeze(model, as_manifest(manifest), names, extra, allow_widened=allow_widened)


def watch(
    model: torch.nn.Module,
    freeze: str | Iterable[str | Mapping[str, Any]] | None = None,
    *,
    manifest: ManifestLike | None = None,
    names: Renaming | None = None,
    expect_trained: bool = False,
) -> Watch:
    """Watch a model that other code freezes, without changing it; use it in a ``with``.

    At the end every frozen tensor has its bits, or FrozenWeightsChanged says which has not, where, and why.

    Args:
        model: The model.
        freeze: Patterns of what must not move, over the model's own names; ``["**", "!fc"]``.
        manifest: Instead of patterns, a manifest or its path.
        names: From the model's names to the manifest's, where they differ.
        expect_trained: Whether each trainable tensor has to move.

    Raises:
        SpecError: if the patterns do not fit.
        ManifestError: if the manifest is not valid, or nothing in it is frozen.
        UsageError: if both or neither of patterns and manifest are given.
    """
    if is_keras(model):
        hint = "ckptsurg.integrations.keras.FreezeCallback watches its fit"
        raise UsageError("expected a model of torch, found one of Keras", hint=hint)
    if not is_model(model):
        raise UsageError(f"expected a model of torch, found {shown(type(model).__name__)}")
    if (freeze is None) == (manifest is None):
        raise UsageError("give either patterns of what is frozen, or a manifest")
    document = as_manifest(manifest) if manifest is not None else make_manifest(freeze or (), model)
    from .integrations.pytorch import Watch

    return Watch(model, document, names, expect_trained=expect_trained)
