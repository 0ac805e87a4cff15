"""Small models of Keras, digits to train them on, and their bits by another way than ckptsurg's."""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
from keras import layers
from sklearn.datasets import load_digits

import ckptsurg
from ckptsurg.manifest import Manifest

BACKEND = keras.backend.backend()


def digits(count: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Pictures, shape [count, 8, 8, 1] in [0, 1], and their digits, shape [count]."""
    pictures, numbers = load_digits(return_X_y=True)
    return (pictures[:count] / 16).astype("float32").reshape(-1, 8, 8, 1), numbers[:count]


def small(**of_norm: object) -> keras.Model:
    """A body with a convolution and a norm with statistics, and a head."""
    picture = keras.Input((8, 8, 1))
    hidden = layers.Conv2D(4, 3, name="conv")(picture)
    hidden = layers.ReLU(name="relu")(layers.BatchNormalization(name="bn", **of_norm)(hidden))
    hidden = layers.Dropout(0.1, name="dropout")(layers.GlobalAveragePooling2D(name="pool")(hidden))
    return keras.Model(picture, layers.Dense(10, name="fc", dtype="float32")(hidden), name="small")


def compiled(model: keras.Model, optimizer: object = "adam", **options: object) -> keras.Model:
    """The model, compiled; unless told otherwise without XLA, which takes seconds."""
    options = {"jit_compile": False, **options}
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def train(
    model: keras.Model, callbacks: Sequence[keras.callbacks.Callback] = (), epochs: int = 1, **options: object
) -> None:
    """A few steps of ``fit``: four an epoch."""
    pictures, numbers = digits()
    options = {"batch_size": 16, "verbose": 0, **options}
    model.fit(pictures, numbers, epochs=epochs, callbacks=list(callbacks), **options)


def raw(variable: keras.Variable) -> bytes:
    """The bytes of a variable, as the backend itself gives them."""
    if BACKEND == "torch":
        import torch

        return variable.value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return variable.value.numpy().tobytes()


def bits(model: keras.Layer) -> dict[str, bytes]:
    """The bytes of every weight by Keras's path."""
    return {variable.path: raw(variable) for variable in model.weights}


def moved(model: keras.Layer, before: dict[str, bytes]) -> set[str]:
    """Paths of the weights that are not what they were."""
    return {path for path, now in bits(model).items() if now != before[path]}


def flags(model: keras.Layer) -> dict[str, bool]:
    """Whether each layer and each weight trains."""
    found = {f"layer {layer.name}": layer.trainable for layer in model._flatten_layers()}
    return found | {variable.path: variable.trainable for variable in model.weights}


def manifest_of(model: keras.Layer, *patterns: object) -> Manifest:
    """The manifest of a live model, with these patterns of what is frozen."""
    return ckptsurg.make_manifest(list(patterns), model)
