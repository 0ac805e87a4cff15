"""Files of Keras: ``.keras``, ``.weights.h5``, and the older ``.h5``.

Keras itself reads them, into a model, and the model's variables are the tensors.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoints import Checkpoint, open_regular, open_stored
from ..errors import CheckpointError, CkptsurgError, UsageError
from ..frameworks.importing import import_keras
from ..tensors import Buffer, TensorInfo, digest_of
from ..wording import counted, enumerate_names, shown
from .keras_safety import BUILDER_HINT, examined, malformed, refuse_reordered, said

if TYPE_CHECKING:
    import keras

    from ..frameworks.keras import KerasVariables

__all__ = ["open_keras"]


def open_keras(path: Path, model: Callable[[], Any] | None) -> Checkpoint:
    """Open a file of Keras.

    Args:
        path: The file. Keras goes by the ending of its name: ``.keras``, ``.weights.h5``, ``.h5`` or ``.hdf5``.
        model: Makes the model. A file that holds weights alone needs it, and so does one with classes of the user's own
            that are not registered.

    Raises:
        UsageError: if Keras is not installed, a model is needed, or ``model`` makes none.
        CheckpointError: if the file is malformed, unsafe, or does not fit the model.
        SystemFailure: if it cannot be opened.
    """
    label = shown(path)
    descriptor, before = open_regular(path)  # a pipe would keep Keras waiting
    os.close(descriptor)
    import_keras(label)
    layout = examined(path, label, built=model is not None)
    if model is None and layout != "model":
        raise UsageError(f"{label}: holds weights alone, which have their names from the model", hint=BUILDER_HINT)
    loaded = _loaded(path, label) if model is None else _built(model)
    variables = _variables(loaded, label, by_user=model is not None)
    if model is not None:
        _load_weights(loaded, path, label)
    _refuse_unloaded(loaded, variables, path, label)
    file = open_stored(path, path.name, variables.tensors, since=before)
    return Checkpoint(path, [file], variables.tensors, {}, source=variables)


# --- Models ------------------------------------------------------------------------------------------


def _built(function: Callable[[], Any]) -> keras.Model:
    import keras

    name = shown(getattr(function, "__qualname__", function))
    try:
        made = function()
    except (Exception, SystemExit) as error:
        raise UsageError(f"the model was not built: {name} raised {said(error)}") from error
    if not isinstance(made, keras.Model):
        raise UsageError(f"{name} returned {shown(type(made).__name__)}; expected a model of Keras")
    return made


def _loaded(path: Path, label: str) -> keras.Model:
    import keras

    with malformed(label):
        loaded = keras.saving.load_model(path, compile=False, safe_mode=True)
    if not isinstance(loaded, keras.Model):
        raise CheckpointError(f"{label}: holds {shown(type(loaded).__name__)}, which is no model")
    return loaded


def _load_weights(model: keras.Model, path: Path, label: str) -> None:
    with malformed(label, hint="is this the model whose weights were saved?"):
        refuse_reordered(model, path, label)
        model.load_weights(path)


def _variables(model: keras.Model, label: str, *, by_user: bool) -> KerasVariables:
    from ..frameworks.keras import KerasVariables

    try:
        return KerasVariables(model)
    except CkptsurgError as error:
        kind = UsageError if by_user else CheckpointError
        raise kind(f"{label}: {error.message}", hint=error.hint if by_user else None) from None


def _refuse_unloaded(model: keras.Model, variables: KerasVariables, path: Path, label: str) -> None:
    """Keras leaves a variable as it was built, and says nothing, where it finds no way to it.

    So what was loaded is turned into its complement, and loaded again: what does not come back was never in the file.
    """
    from ..frameworks.keras import assign_bytes

    loaded = {name: digest_of(variables.read(name)) for name in variables.tensors}
    for name, info in variables.tensors.items():
        assign_bytes(variables.variables[name], info, [_complement(chunk, info) for chunk in variables.read(name)])
    _load_weights(model, path, label)
    if left := [name for name, digest in loaded.items() if digest_of(variables.read(name)) != digest]:
        raise CheckpointError(f"{label}: Keras finds nothing in it for {counted(len(left))}: {enumerate_names(left)}")


def _complement(chunk: Buffer, info: TensorInfo) -> Buffer:
    """Other bits in every element, that its dtype can have."""
    return (np.frombuffer(chunk, np.uint8) ^ (1 if info.dtype == "BOOL" else 0xFF)).tobytes()
