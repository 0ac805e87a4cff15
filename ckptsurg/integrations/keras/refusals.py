"""Why a live model cannot be made to obey a manifest."""

from __future__ import annotations

from collections.abc import Iterator

import keras

from ...renaming import common_prefix
from ...verifying import verify
from ...wording import enumerate_names, shown
from ..messages import loading_hint, mismatches
from .live import LiveModel, is_normalised, layers_in

__all__ = ["refusals"]


def refusals(live: LiveModel, *, allow_widened: bool) -> tuple[list[str], str | None]:
    """Everything that stands against the freeze, a line each with the tensor's name; and a hint where one helps."""
    if problems := list(_mismatches(live, allow_widened=allow_widened)):
        return problems, loading_hint(problems)
    return [*_entangled(live), *_unholdable(live)], None


def _mismatches(live: LiveModel, *, allow_widened: bool) -> Iterator[str]:
    """Frozen tensors that the model does not hold as the manifest records them."""
    manifest, source = live.manifest, live.source
    if not live.partners and (prefix := common_prefix([{name} for name in manifest.frozen], source.tensors)):
        yield f'all stand under "{shown(prefix)}": give names=lambda name: name.removeprefix("{shown(prefix)}")'
        return
    yield from mismatches(
        verify(manifest, source, names=live.names, saved=False).drifted,
        manifest,
        lambda name: source.tensors[live.partners[name]].dtype,
        allow_widened=allow_widened,
    )


def _entangled(live: LiveModel) -> Iterator[str]:
    """Frozen variables whose memory another variable trains."""
    frozen = {id(place.variable._value): name for name, place in live.frozen.items()}
    held = {id(place.variable) for place in live.frozen.values()}
    for other, variable in live.source.variables.items():
        if id(variable) not in held and id(variable._value) in frozen and variable.trainable:
            yield (
                f'"{shown(frozen[id(variable._value)])}" is frozen and shares its storage with "{shown(other)}", '
                "which trains: they are tied; freeze both or neither"
            )


def _unholdable(live: LiveModel) -> Iterator[str]:
    """Frozen tensors that layers write to in training although nothing of them is to change."""
    whole = {id(place.variable): name for name, place in live.frozen.items()}
    names = whole | {id(place.variable): name for name, place in live.rows.items()}
    for name, place in (live.frozen | live.rows).items():
        if is_normalised(place):
            yield (
                f'"{shown(name)}" is written by its SpectralNormalization in every step of training, whatever '
                "`trainable` says; let it train"
            )
    for layer in layers_in(live.model):
        if not isinstance(layer, keras.layers.BatchNormalization) or not layer.trainable:
            continue
        statistics = [names[id(one)] for one in layer._non_trainable_variables if id(one) in names]
        training = [one.name for one in layer.weights if id(one) not in whole]
        if statistics and training:
            yield (
                f"{enumerate_names(statistics)}: moving statistics, frozen in a BatchNormalization whose "
                f"{enumerate_names(training)} train: Keras moves them whenever the layer trains; "
                "freeze the whole layer, or let its statistics go"
            )
