"""Loading a checkpoint into a live model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping

import keras

from ...errors import CheckpointError, UsageError
from ...frameworks.keras import KerasVariables, assign_bytes, bytes_of
from ...renaming import Renaming, renamed
from ...tensors import Buffer, Digester, TensorSource, digest_of
from ...wording import shown
from ..arguments import opened
from ..messages import listed
from .live import layers_in

__all__ = ["load_weights"]

_ALGORITHM = "blake3"


def load_weights(
    model: keras.Layer, ckpt: str | os.PathLike[str] | TensorSource, names: Renaming | None = None
) -> None:
    """Load a checkpoint into a model that is built: every variable, by name, bit for bit.

    Args:
        model: The model.
        ckpt: A checkpoint, by path or opened.
        names: From the model's names to the checkpoint's, where they differ: a mapping or a function.

    Raises:
        FreezeError: if the model is not built.
        UsageError: with the model unchanged, if there is nothing at the path, or model and checkpoint differ in
            names, dtypes or shapes.
        CheckpointError: if the checkpoint is malformed, or a variable does not take its bits.
        SystemFailure: if it cannot be read.
    """
    if not isinstance(model, keras.Layer):
        raise UsageError(f"expected a model of Keras, found {shown(type(model).__name__)}")
    with opened(ckpt) as source:
        variables = KerasVariables(model, source.tensors if names is None else ())
        called = renamed(variables.tensors, names)
        if problems := list(_differences(variables, called, source)):
            raise UsageError(
                listed(f"{source.label} does not fit {variables.label}:", problems),
                hint="build the model as it was when the checkpoint was made; where names differ, give `names`",
            )
        for own, name in called.items():
            variable, digester = variables.variables[own], Digester(_ALGORITHM)
            assign_bytes(variable, source.tensors[name], _through(digester, source.read(name)))
            if digest_of(bytes_of(variable), _ALGORITHM) != str(digester):
                raise CheckpointError(f'{source.label}: "{shown(name)}" did not get its bits in {variables.label}')
    _derive(model)


def _derive(model: keras.Layer) -> None:
    """Have layers compute anew what they keep of their weights besides, as Normalization does its mean and variance."""
    deriving = [layer for layer in layers_in(model) if hasattr(layer, "finalize_state")]
    for layer in deriving:
        layer.finalize_state()
    for function in ("train_function", "test_function", "predict_function"):
        if deriving and getattr(model, function, None) is not None:
            setattr(model, function, None)  # it is compiled with what they had before


def _differences(variables: KerasVariables, called: Mapping[str, str], ckpt: TensorSource) -> Iterator[str]:
    for own, name in called.items():
        info, found = variables.tensors[own], ckpt.tensors.get(name)
        if found is None:
            yield f'"{shown(name)}" is not in the checkpoint'
        elif found != info:
            yield f'"{shown(name)}": the model has {info}, the checkpoint {found}'
    taken = set(called.values())
    yield from (f'"{shown(name)}" is not in the model' for name in ckpt.tensors if name not in taken)


def _through(digester: Digester, chunks: Iterable[Buffer]) -> Iterator[Buffer]:
    for chunk in chunks:
        digester.update(chunk)
        yield chunk
