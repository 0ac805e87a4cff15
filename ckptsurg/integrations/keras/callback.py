"""Watching a model of Keras while ``fit`` trains it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from ...errors import FreezeError
from ...manifest import Manifest
from ...renaming import Renaming
from ...tensors import digest_of
from ...wording import enumerate_names, shown
from ..arguments import as_manifest, checked_every
from ..messages import about_to_move
from .live import LiveModel, averages, built_with, layers_in
from .rows import HeldRows

__all__ = ["FreezeCallback"]


class FreezeCallback(keras.callbacks.Callback):  # type: ignore[misc]  # Keras has no type information
    """Proves while ``fit`` runs that frozen variables keep their bits; it freezes nothing itself.

    Before the first batch: that the model holds the manifest's bits, and that nothing frozen is about to train. Before
    every batch it looks at flags. After every ``every``-th it reads what is frozen and compares digests. At the end it
    proves all digests of the manifest. Put it last in the list, so that it sees what other callbacks do: what one
    after it does is found a batch later. ``train_on_batch`` calls no callbacks; ``FrozenModel.verify`` proves what it
    did.

    Attributes:
        manifest: The manifest.
    """

    def __init__(
        self,
        manifest: Manifest | str | os.PathLike[str],
        *,
        every: int | None = 1,
        expect_trained: bool = False,
        names: Renaming | None = None,
    ) -> None:
        """Prepare the callback.

        Args:
            manifest: The manifest; its path, or that of the output that it stands by.
            every: Read the frozen tensors after every so many batches; None does not.
            expect_trained: Whether the end of the training also proves that each trainable tensor moved.
            names: As ``ckptsurg.freeze`` takes it.

        Raises:
            ManifestError: if the manifest is not valid, or nothing in it is frozen.
            UsageError: if there is none, or ``every`` is no number of batches.
        """
        super().__init__()
        self.manifest = as_manifest(manifest)
        self.manifest.require_frozen()
        self._every, self._expect_trained, self._names = checked_every(every), expect_trained, names
        self._live: LiveModel | None = None
        self._made: tuple[object, ...] | None = None
        self._step = self._before_epoch = self._compared = 0

    def _look(self) -> LiveModel:
        return LiveModel.of(self.model, self.manifest, self._names)

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Prove that the training may begin.

        Raises:
            FreezeError: if the model does not hold what the manifest freezes, or would train it.
        """
        live = self._look()
        label = live.source.label
        found = live.verify()
        if not found.ok:
            raise FreezeError(
                f"{label} does not hold what the manifest freezes, or has changed since it was described: "
                f"{found.summary(5)}"
            )
        if problems := list(_would_move(live)):
            raise FreezeError(
                "\n  ".join([f"{label} would train what the manifest freezes:", *problems]),
                hint="freeze it with ckptsurg.freeze(model, manifest), then compile it",
            )
        self._refuse_stale(live)
        self._live = live
        self._marks = _marks(live)
        self._flags = [place.variable for place in live.frozen.values()]
        held = {id(place.variable) for place in (live.frozen | live.rows).values()}
        self._flags += [
            layer
            for layer in layers_in(self.model)
            if isinstance(layer, keras.layers.BatchNormalization)
            and any(id(one) in held for one in layer._non_trainable_variables)
        ]
        self._make_anew(live)
        self._step = self._before_epoch = self._compared = 0

    def _refuse_stale(self, live: LiveModel) -> None:
        optimizer = getattr(self.model, "optimizer", None)
        built = built_with(optimizer)
        stale = [name for name, place in live.frozen.items() if id(place.variable) in built]
        if stale:
            raise FreezeError(
                f"the optimizer was built when {enumerate_names(stale)} still trained",
                hint="compile again after the freeze",
            )
        if live.rows and averages(optimizer):
            raise FreezeError(
                f"{enumerate_names(live.rows)}: frozen in a part, and the optimizer puts averages (use_ema) in the "
                "place of variables: rounding would not give the frozen rows back",
                hint="train without use_ema, or freeze the whole tensor",
            )

    def _make_anew(self, live: LiveModel) -> None:
        """Have Keras make the function of a step again, if it may be compiled for what trained before."""
        function = getattr(self.model, "train_function", None)
        flags = frozenset(live.trainable()), tuple(layer.trainable for layer in layers_in(self.model))
        if function is None or self._made == (function, flags):
            return
        self.model.make_train_function(force=True)
        self._made = (self.model.train_function, flags)

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._before_epoch = self._step

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Refuse a step that would train what is frozen.

        Raises:
            FrozenWeightsChanged: naming tensors and causes.
        """
        if not any(one.trainable for one in self._flags):
            return
        if about := self._look().about_to_move():
            raise about_to_move(about, f"before step {self._before_epoch + batch + 1:,}:")

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Compare what is frozen, if it is time to.

        Raises:
            FrozenWeightsChanged: naming tensors, and causes where they are settled.
        """
        self._step = self._before_epoch + batch + 1  # of several steps in one execution, the last
        if self._every is None or self._step - self._compared < self._every:
            return
        self._compared = self._step
        assert self._live is not None
        if _marks(self._live) != self._marks:
            live = self._look()
            live.verify(witnessed=live.about_to_move()).raise_if_changed(f"after step {self._step:,}, ")
            self._live, self._marks = live, _marks(live)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Prove all digests.

        Raises:
            FrozenWeightsChanged: naming tensors, and causes where they are settled.
        """
        live = self._look()
        self._live = None
        live.verify(expect_trained=self._expect_trained, witnessed=live.about_to_move()).raise_if_changed()


def _marks(live: LiveModel) -> dict[str, str]:
    return {name: digest_of(chunks) for name, chunks in live.held_bytes()}


def _would_move(live: LiveModel) -> Iterator[str]:
    """What a step would write to although it is frozen, a line each."""
    what = {
        "spectral_norm": "written by SpectralNormalization",
        "batchnorm_stats": "moving statistics of a BatchNormalization that trains",
        "reenabled": "trainable",
    }
    about = live.about_to_move()
    for code, kind in what.items():
        if names := [name for name, its_code in about.items() if its_code == code]:
            yield f"{enumerate_names(names)}: {kind}"
    training = live.trainable()
    for name, place in live.rows.items():
        rows = live.manifest.tensors[name].rows
        held = place.variable.constraint
        if rows is not None and id(place.variable) in training and not _holds(held, (rows.start, rows.stop)):
            yield f"{shown(name)}[{rows.start}:{rows.stop}]: nobody holds the frozen rows"


def _holds(constraint: object, rows: tuple[int, int]) -> bool:
    while isinstance(constraint, HeldRows):
        if constraint.rows == rows:
            return True
        constraint = constraint.replaced
    return False
