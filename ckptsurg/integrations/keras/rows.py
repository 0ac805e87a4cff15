"""Frozen rows of a variable that trains."""

from __future__ import annotations

from typing import Any

import keras

__all__ = ["HeldRows"]


class HeldRows:
    """A constraint of a variable that gives some of its rows back their bits.

    Every optimizer of Keras applies constraints to a variable after it has written to it.
    """

    def __init__(self, variable: keras.Variable, rows: tuple[int, int]) -> None:
        self.rows = rows
        self.replaced = variable.constraint
        self._values = keras.ops.stop_gradient(keras.ops.copy(variable._value[slice(*rows)]))

    def __call__(self, value: Any) -> Any:
        if self.replaced is not None:
            value = self.replaced(value)
        value = keras.ops.convert_to_tensor(value)
        start, stop = self.rows
        return keras.ops.concatenate([value[:start], self._values, value[stop:]], axis=0)
