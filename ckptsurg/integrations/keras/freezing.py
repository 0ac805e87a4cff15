"""Making a live model obey a manifest."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Collection
from contextlib import ExitStack
from typing import Literal

import keras

from ...counterparts import mismatched
from ...manifest import Manifest
from ...renaming import Renaming
from ...report import Report
from ...tensors import TensorSource
from ...wording import counted, enumerate_names
from ..arguments import checked_extra, opened
from ..messages import cannot_be_frozen, described, left_as_they_are, not_as_published
from .callback import FreezeCallback
from .live import LiveModel, averages, built_with, layers_in
from .refusals import refusals
from .rows import HeldRows

__all__ = ["FrozenModel", "freeze"]


def freeze(
    model: keras.Layer,
    manifest: Manifest,
    names: Renaming | None = None,
    extra: Literal["keep", "error"] = "keep",
    *,
    allow_widened: bool = False,
) -> FrozenModel:
    """Make a model obey a manifest. Call it before ``compile``; where the model was compiled before, compile it again.

    A layer all of whose weights are frozen gets ``trainable = False``: so BatchNormalization runs in inference mode,
    as Keras defines it. Of a layer that is frozen in a part, single variables do. Of a variable that is frozen in a
    part, every optimizer of Keras leaves the frozen rows as they are. Training is only ever turned off, never on.

    Args:
        model: A model, or a layer, that holds the manifest's weights.
        manifest: What must hold.
        names: From the model's names to the manifest's, where they differ: a mapping or a function.
        extra: Whether parameters that the manifest lacks are left as they are, or refused.
        allow_widened: Whether a frozen tensor may be in a wider dtype, if its values are the same.

    Raises:
        FreezeError: with the model unchanged, if it is not built, or a frozen tensor is absent, has another dtype,
            shape or other bits, is one with a tensor that trains, or would be written to whatever is done.
        ManifestError: if nothing is frozen.
        UsageError: if names do not fit.
    """
    checked_extra(extra)
    manifest.require_frozen()
    live = LiveModel.of(model, manifest, names)
    problems, hint = refusals(live, allow_widened=allow_widened)
    unknown = _extra_parameters(live)
    if extra == "error" and unknown:
        problems.append(f"parameters that the manifest lacks: {enumerate_names(unknown)}")
    if problems:
        raise cannot_be_frozen(model, problems, hint)
    if unknown:
        warnings.warn(left_as_they_are(unknown), UserWarning, stacklevel=3)
    infos = {name: live.source.tensors[own] for name, own in live.partners.items()}
    if others := not_as_published(mismatched(manifest.tensors, infos)):
        warnings.warn(others, UserWarning, stacklevel=3)
    frozen = {id(place.variable) for place in (live.frozen | live.rows).values()}
    optimizer = getattr(model, "optimizer", None)
    if averages(optimizer) and not frozen.isdisjoint(built_with(optimizer)):
        message = (
            "the optimizer keeps averages (use_ema) of variables that are frozen now: compile again after the freeze"
        )
        warnings.warn(message, UserWarning, stacklevel=3)
    frozen_model = FrozenModel(live, unknown)
    if standing := _standing(live):
        message = (
            f"{counted(len(standing))} that the manifest leaves to train will not, their layers or variables are not "
            f"trainable: {enumerate_names(standing)}; set `trainable = True` on the layers before the freeze"
        )
        warnings.warn(message, UserWarning, stacklevel=3)
    return frozen_model


def _standing(live: LiveModel) -> list[str]:
    """What the manifest leaves to train, and the model does not, though no other freeze holds it."""
    training = live.trainable()
    parameters = {id(one) for layer in layers_in(live.model) for one in layer._trainable_variables}
    variables = {name: live.source.variables[own] for name, own in live.partners.items()}
    return [
        name
        for name, record in live.manifest.tensors.items()
        if record.trains
        and name in variables
        and id(variables[name]) in parameters - training
        and _holder(variables[name]) is None
    ]


def _extra_parameters(live: LiveModel) -> tuple[str, ...]:
    """Variables that have no partner in the manifest, but for statistics and the like."""
    known = set(live.partners.values())
    parameters = {id(variable) for layer in layers_in(live.model) for variable in layer._trainable_variables}
    return tuple(
        name for name, variable in live.source.variables.items() if name not in known and id(variable) in parameters
    )


class FrozenModel:
    """A model that obeys a manifest, until it is released.

    Attributes:
        model: The model.
        manifest: What it obeys.
        extra: Parameters that the manifest lacks; they are left as they were.
    """

    def __init__(self, live: LiveModel, extra: tuple[str, ...]) -> None:
        self.model, self.manifest, self.extra = live.model, live.manifest, extra
        self._names = live.names
        self._rows: list[tuple[keras.Variable, HeldRows]] = []
        for name, place in live.rows.items():
            rows = self.manifest.tensors[name].rows
            assert rows is not None
            self._rows.append((place.variable, HeldRows(place.variable, (rows.start, rows.stop))))
        layers, weights = layers_in(self.model), list(self.model.weights)
        trained_layers = [layer for layer in layers if layer._trainable]
        trained_weights = [one for one in weights if one.trainable]
        whole = {id(place.variable) for place in live.frozen.values()}
        frozen_layers = [layer for layer in layers if self._is_frozen(layer, whole)]
        for layer in frozen_layers:
            layer.trainable = False
        for place in live.frozen.values():
            place.variable.trainable = False
            if keras.backend.backend() == "torch":
                place.variable._value.grad = None
        for variable, held in self._rows:
            variable.constraint = held
        self._layers = [layer for layer in trained_layers if not layer._trainable]
        self._variables = [variable for variable in trained_weights if not variable.trainable]
        self._holds = whole | {id(below) for layer in frozen_layers for below in layers_in(layer)}
        self._in_inference = [layer for layer in self._layers if isinstance(layer, keras.layers.BatchNormalization)]
        if getattr(self.model, "train_function", None) is not None:
            self.model.train_function = None  # it may be compiled for the variables that trained before
        _FREEZES.add(self)

    def _is_frozen(self, layer: keras.Layer, whole: Collection[int]) -> bool:
        """Whether a layer has weights, and all are frozen; the model's own flag stays, so that a new head may train."""
        if layer is self.model and isinstance(layer, keras.Model):
            return False
        weights = layer.weights
        return bool(weights) and all(id(one) in whole for one in weights)

    def __repr__(self) -> str:
        norms = counted(len(self._in_inference), "BatchNormalization")
        return described(self.model, self.manifest, f"{norms} kept in inference mode" if self._in_inference else None)

    def trainable_variables(self) -> list[keras.Variable]:
        """The variables that train."""
        return list(self.model.trainable_variables)

    def verify(
        self,
        baseline: str | os.PathLike[str] | TensorSource | None = None,
        *,
        expect_trained: bool = False,
    ) -> Report:
        """Prove that every frozen tensor of the live model has its bits.

        Args:
            baseline: The published checkpoint, by path or opened; with it the report says where tensors differ.
            expect_trained: Whether trainable tensors that did not move count.

        Raises:
            UsageError: if there is no baseline at the path, or it is not what the manifest describes.
            CheckpointError: if it is malformed.
            SystemFailure: if it cannot be read.
        """
        live = LiveModel.of(self.model, self.manifest, self._names)
        with ExitStack() as stack:
            before = None if baseline is None else stack.enter_context(opened(baseline))
            return live.verify(baseline=before, expect_trained=expect_trained, witnessed=live.about_to_move())

    def callback(self, *, every: int | None = 1, expect_trained: bool = False) -> FreezeCallback:
        """A callback that watches while ``fit`` runs.

        Args:
            every: Read the frozen tensors after every so many batches; None does not.
            expect_trained: Whether the end of the training also proves that each trainable tensor moved.

        Raises:
            UsageError: if ``every`` is no number of batches.
        """
        return FreezeCallback(self.manifest, every=every, expect_trained=expect_trained, names=self._names)

    def release(self) -> None:
        """Give the model back as it was found; its weights stay as they are. Compile it again before it trains.

        What another freeze of the model holds too stays frozen until that one is released.
        """
        _FREEZES.discard(self)
        for held in self._rows:
            _unlink(*held)
        self._rows = []
        for layer in self._layers:
            if (other := _holder(layer)) is not None:
                other._layers.append(layer)
            else:
                layer._trainable = True  # the property would turn on what is in the layer too
        for variable in self._variables:
            if (other := _holder(variable)) is not None:
                other._variables.append(variable)
            else:
                variable.trainable = True
        self._layers, self._variables, self._in_inference = [], [], []
        if getattr(self.model, "train_function", None) is not None:
            self.model.train_function = None


def _holder(thing: object) -> FrozenModel | None:
    """A freeze that is not released, and holds a layer or variable."""
    return next((freeze for freeze in _FREEZES if id(thing) in freeze._holds), None)


def _unlink(variable: keras.Variable, held: HeldRows) -> None:
    """Take a constraint away, if it is still there; others may have been put before it since."""
    if variable.constraint is held:
        variable.constraint = held.replaced
    above = variable.constraint
    while isinstance(above, HeldRows):
        if above.replaced is held:
            above.replaced = held.replaced
        above = above.replaced


#: The freezes that were not released. They overlap, and may be released in any order: what another one still holds
#: stays frozen, and whoever goes last gives back what the first one found.
_FREEZES: weakref.WeakSet[FrozenModel] = weakref.WeakSet()
