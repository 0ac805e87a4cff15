"""What the recipes of Keras begin with: data, and a base that has seen some."""

from __future__ import annotations

import keras
import numpy as np

from ..architectures import digits


def images(size: int, count: int, classes: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Images [count, size, size, 3] and labels [count] of scikit-learn's digits."""
    x, y = digits(size, count)
    return x.permute(0, 2, 3, 1).contiguous().numpy(), y.numpy() % classes


def accustomed(base: keras.Model) -> keras.Model:
    """The base with statistics of the data it will see, as a trained one has; else nothing comes through its layers."""
    norms = [layer for layer in base.layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in norms:
        layer.momentum = 0.0
    base(images(base.input_shape[1], 64)[0], training=True)
    for layer in norms:
        layer.momentum = 0.99
    return base
