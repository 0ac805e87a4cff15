"""A model of Keras and what a manifest says of its variables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import keras

from ...errors import UsageError
from ...frameworks.keras import KerasVariables, Place, bytes_of
from ...manifest import Manifest, TensorRecord
from ...renaming import Renaming, align, renamed
from ...report import Report
from ...tensors import Buffer, TensorSource
from ...verifying import verify
from ...wording import shown

__all__ = ["LiveModel", "averages", "built_with", "is_normalised", "layers_in"]


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A model as it is now, beside a manifest.

    Attributes:
        model: The model.
        manifest: The manifest.
        names: From the model's names to the manifest's, where they differ.
        source: Its variables.
        partners: The model's names by the manifest's.
    """

    model: keras.Layer
    manifest: Manifest
    names: Renaming | None
    source: KerasVariables
    partners: Mapping[str, str]

    @classmethod
    def of(cls, model: keras.Layer, manifest: Manifest, names: Renaming | None) -> LiveModel:
        """Look at a model.

        Raises:
            FreezeError: if it is not built.
            UsageError: if it is none, or names do not fit.
        """
        if not isinstance(model, keras.Layer):
            raise UsageError(f"expected a model of Keras, found {shown(type(model).__name__)}")
        source = KerasVariables(model, manifest.tensors if names is None else ())
        partners = align(manifest.tensors, renamed(source.tensors, names))
        return cls(model, manifest, names, source, partners)

    @property
    def frozen(self) -> dict[str, Place]:
        """Variables that are frozen as a whole, by the manifest's names."""
        return {name: place for name, record, place in self._held() if record.rows is None}

    @property
    def rows(self) -> dict[str, Place]:
        """Variables that are frozen in a part."""
        return {name: place for name, record, place in self._held() if record.rows is not None}

    def _held(self) -> Iterator[tuple[str, TensorRecord, Place]]:
        for name, record in self.manifest.frozen.items():
            if name in self.partners:
                yield name, record, self.source.places[self.partners[name]]

    def held_bytes(self) -> Iterator[tuple[str, Iterator[Buffer]]]:
        """The bytes of what is frozen, by the manifest's names."""
        for name, record, place in self._held():
            info = self.source.tensors[self.partners[name]]
            yield name, iter(record.held_bytes(bytes_of(place.variable), info))

    def trainable(self) -> set[int]:
        """Identities of the variables that train."""
        return {id(variable) for variable in self.model.trainable_variables}

    def about_to_move(self) -> dict[str, str]:
        """Frozen tensors that a step of training would write to, by the manifest's names, with the cause code."""
        training = self.trainable()
        about: dict[str, str] = {}
        for name, record, place in self._held():
            layer = place.owners[-1] if place.owners else self.model
            is_statistic = id(place.variable) in map(id, layer._non_trainable_variables)
            if is_normalised(place):
                about[name] = "spectral_norm"
            elif isinstance(layer, keras.layers.BatchNormalization) and is_statistic:
                if layer.trainable:
                    about[name] = "batchnorm_stats"
            elif id(place.variable) in training and record.rows is None:
                about[name] = "reenabled"
        return about

    def verify(
        self,
        *,
        baseline: TensorSource | None = None,
        expect_trained: bool = False,
        witnessed: Mapping[str, str] | None = None,
    ) -> Report:
        """Prove that every frozen tensor of the model has its bits; a wider dtype with the same values is accepted."""
        return verify(
            self.manifest,
            self.source,
            baseline=baseline,
            names=self.names,
            allow_widened=True,
            expect_trained=expect_trained,
            witnessed=witnessed,
            saved=False,
        )


def is_normalised(place: Place) -> bool:
    """Whether SpectralNormalization writes to a variable in every step of training, whatever ``trainable`` says."""
    return any(
        isinstance(owner, keras.layers.SpectralNormalization)
        and any(one is place.variable for one in (owner.vector_u, owner.kernel))
        for owners in (place.owners, *place.others)
        for owner in owners
    )


def layers_in(model: keras.Layer) -> list[keras.Layer]:
    """A model and all layers in it, each once."""
    return list({id(layer): layer for layer in model._flatten_layers()}.values())


def built_with(optimizer: object) -> set[int]:
    """Identities of the variables that an optimizer of Keras was built for; none if it is not built."""
    return {id(variable) for variable in getattr(optimizer, "_trainable_variables", ())}


def averages(optimizer: object) -> bool:
    """Whether an optimizer keeps averages of the variables, and puts them in the variables' place."""
    return bool(getattr(getattr(optimizer, "inner_optimizer", optimizer), "use_ema", False))
