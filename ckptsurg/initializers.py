"""Named, seeded values: the bytes of a drawn tensor, in any part of it.

Names, arguments and formulas are those of ``torch.nn.init`` (https://pytorch.org/docs/stable/nn.init.html). A value
depends on (seed, name, shape, dtype, initializer) and its position alone. Draws are rounded to single precision
first and then to narrower dtypes. ``orthogonal`` goes through LAPACK and is promised to the last bit only for one
build of numpy; it and ``sparse`` hold their tensor in memory, all others are drawn part by part.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from math import ceil, prod, sqrt
from threading import Lock
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from .documents import canonical_json
from .initializer_arguments import Initializer
from .numpy_types import element_type
from .random_bits import FloatArray, cumulative, quantile, uniform, words
from .tensors import Buffer, TensorInfo
from .wording import shown

__all__ = ["Drawing", "Undrawable", "rounded"]

#: Elements drawn at a time.
BLOCK = 1 << 16


class Undrawable(ValueError):
    """A value that is to be drawn does not fit its dtype, or has nothing to be drawn like."""


class Drawing:
    """A tensor that is drawn.

    Args:
        seed: The spec's seed.
        name: Name of the tensor in the output.
        info: Its dtype and shape.
        init: The initializer; not ``default`` or ``like``, which stand for others, nor ``mean``,
            which draws nothing.

    Raises:
        Undrawable: on reading, if a value does not fit the dtype.
    """

    def __init__(self, seed: int, name: str, info: TensorInfo, init: Initializer) -> None:
        self._name, self._info = name, info
        identity = canonical_json([seed, name, list(info.shape), info.dtype, {init.name: init.arguments}])
        self._key = int.from_bytes(blake3(b"ckptsurg drawing 1\n" + identity).digest(16), "little")
        self._values = _FORMULAS[init.name](self, **init.arguments)
        self._last: tuple[int, Buffer] = (-1, b"")

    def read(self, start: int, stop: int) -> Iterator[Buffer]:
        """The bytes of elements ``start`` to ``stop``, in chunks."""
        size = element_type(self._info.dtype).itemsize
        for number, block in self._blocks(start // BLOCK, -(-stop // BLOCK)):
            low, high = max(start - number * BLOCK, 0), min(stop - number * BLOCK, BLOCK)
            yield memoryview(block)[low * size : high * size]

    def _blocks(self, first: int, end: int) -> Iterator[tuple[int, Buffer]]:
        """Whole blocks, drawn on all cores and given in their order; a single one is kept for the next call."""
        if end - first == 1:
            if self._last[0] != first:
                self._last = (first, self._block(first))
            yield self._last
            return
        with ThreadPoolExecutor(cores := os.cpu_count() or 1) as pool:
            ahead: deque[tuple[int, Future[Buffer]]] = deque()
            for number in range(first, end):
                ahead.append((number, pool.submit(self._block, number)))
                if len(ahead) > 2 * cores:
                    done, future = ahead.popleft()
                    yield done, future.result()
            for done, future in ahead:
                yield done, future.result()

    def _block(self, number: int) -> Buffer:
        start = number * BLOCK
        values = self._values(start, min(start + BLOCK, self._info.elements))
        return rounded(values, self._info.dtype, self._name)

    # --- Elements ------------------------------------------------------------------------------------

    def uniforms(self, start: int, stop: int) -> FloatArray:
        return uniform(words(self._key, start, stop))

    def normals(self, start: int, stop: int) -> FloatArray:
        return quantile(self.uniforms(start, stop))

    @property
    def is_complex(self) -> bool:
        return self._info.dtype == "C64"

    @property
    def shape(self) -> tuple[int, ...]:
        return self._info.shape

    def fans(self) -> tuple[int, int]:
        """Fan-in and fan-out: ``torch.nn.init._calculate_fan_in_and_fan_out``."""
        receptive = prod(self.shape[2:])
        return self.shape[1] * receptive, self.shape[0] * receptive


def rounded(values: NDArray[Any], dtype: str, name: str) -> bytes:
    """Values as the bytes of a dtype, by way of single precision where that is narrower.

    Args:
        values: In double precision.
        dtype: One that can be drawn.
        name: For messages.

    Raises:
        Undrawable: if a value is out of the range of the dtype.
    """
    with np.errstate(over="ignore"):
        if dtype not in ("F64", "C64"):
            values = values.astype(np.float32)
        typed = values.astype(element_type(dtype))
    if not np.isfinite(typed.astype(np.complex128 if dtype == "C64" else np.float64)).all():
        raise Undrawable(f'"{shown(name)}": a drawn value is out of the range of {dtype}')
    return typed.tobytes()


#: Values of elements start to stop, shape [stop - start].
_Values = Callable[[int, int], NDArray[Any]]


def _constant(drawing: Drawing, val: float) -> _Values:
    return lambda start, stop: np.full(stop - start, val)


def _uniform(drawing: Drawing, a: float, b: float) -> _Values:
    return lambda start, stop: a + (b - a) * drawing.uniforms(start, stop)


def _normal(drawing: Drawing, mean: float, std: float) -> _Values:
    if not drawing.is_complex:
        return lambda start, stop: mean + std * drawing.normals(start, stop)

    def values(start: int, stop: int) -> NDArray[Any]:
        # As torch: half of the variance to the real part, half to the imaginary part.
        parts = std / sqrt(2) * drawing.normals(2 * start, 2 * stop)
        return np.asarray(mean + parts.view(np.complex128))

    return values


def _trunc_normal(drawing: Drawing, mean: float, std: float, a: float, b: float) -> _Values:
    if std == 0:
        return _constant(drawing, min(max(mean, a), b))
    if a > mean:  # near one, probabilities have no digits left: the mirror image is drawn from the lower tail
        mirrored = _trunc_normal(drawing, -mean, std, -b, -a)
        return lambda start, stop: np.negative(mirrored(start, stop))
    low, high = cumulative((a - mean) / std), cumulative((b - mean) / std)

    def values(start: int, stop: int) -> NDArray[Any]:
        probability = low + (high - low) * drawing.uniforms(start, stop)
        inside = np.clip(probability, 2.0**-1022, 1.0 - 2.0**-53)
        return np.clip(mean + std * quantile(inside), a, b)

    return values


def _xavier_uniform(drawing: Drawing, gain: float) -> _Values:
    bound = gain * sqrt(6.0 / max(sum(drawing.fans()), 1))
    return _uniform(drawing, -bound, bound)


def _xavier_normal(drawing: Drawing, gain: float) -> _Values:
    return _normal(drawing, 0.0, gain * sqrt(2.0 / max(sum(drawing.fans()), 1)))


def _kaiming_std(drawing: Drawing, a: float, mode: str, nonlinearity: str) -> float:
    gains = {"tanh": 5.0 / 3, "relu": sqrt(2.0), "leaky_relu": sqrt(2.0 / (1 + a * a)), "selu": 3.0 / 4}
    fan = drawing.fans()[mode == "fan_out"]
    return gains.get(nonlinearity, 1.0) / sqrt(max(fan, 1))


def _kaiming_uniform(drawing: Drawing, a: float, mode: str, nonlinearity: str) -> _Values:
    bound = sqrt(3.0) * _kaiming_std(drawing, a, mode, nonlinearity)
    return _uniform(drawing, -bound, bound)


def _kaiming_normal(drawing: Drawing, a: float, mode: str, nonlinearity: str) -> _Values:
    return _normal(drawing, 0.0, _kaiming_std(drawing, a, mode, nonlinearity))


def _eye(drawing: Drawing) -> _Values:
    columns = drawing.shape[1]

    def values(start: int, stop: int) -> NDArray[Any]:
        row, column = np.divmod(np.arange(start, stop), columns)
        return np.asarray(row == column, np.float64)

    return values


def _dirac(drawing: Drawing, groups: int) -> _Values:
    outputs, inputs, *kernel = drawing.shape
    centre = sum(size // 2 * prod(kernel[axis + 1 :]) for axis, size in enumerate(kernel))

    def values(start: int, stop: int) -> NDArray[Any]:
        channel, inside = np.divmod(np.arange(start, stop), prod(kernel))
        output, source = np.divmod(channel, inputs)
        return np.asarray((output % (outputs // groups) == source) & (inside == centre), np.float64)

    return values


def _orthogonal(drawing: Drawing, gain: float) -> _Values:
    rows, columns = drawing.shape[0], prod(drawing.shape[1:])

    def whole() -> FloatArray:
        normal = drawing.normals(0, rows * columns).reshape(rows, columns)
        q, r = np.linalg.qr(normal.T if rows < columns else normal)
        q = q * np.sign(np.diag(r))  # uniform over orthogonal matrices (Mezzadri, arXiv:math-ph/0609050)
        return np.ascontiguousarray(gain * (q.T if rows < columns else q)).reshape(-1)

    return _of_whole(whole)


def _sparse(drawing: Drawing, sparsity: float, std: float) -> _Values:
    rows, columns = drawing.shape
    zeros = ceil(sparsity * rows)

    def whole() -> FloatArray:
        count = rows * columns
        values = (std * drawing.normals(0, count)).reshape(rows, columns)
        order = np.argsort(drawing.uniforms(count, 2 * count).reshape(rows, columns), axis=0, kind="stable")
        np.put_along_axis(values, order[:zeros], 0.0, axis=0)
        return values.reshape(-1)

    return _of_whole(whole)


def _of_whole(whole: Callable[[], FloatArray]) -> _Values:
    """Parts of values that can only be made all at once."""
    once = cache(whole)
    lock = Lock()

    def values(start: int, stop: int) -> NDArray[Any]:
        with lock:
            return once()[start:stop]

    return values


_FORMULAS: dict[str, Callable[..., _Values]] = {
    "constant": _constant,
    "dirac": _dirac,
    "eye": _eye,
    "kaiming_normal": _kaiming_normal,
    "kaiming_uniform": _kaiming_uniform,
    "normal": _normal,
    "ones": lambda drawing: _constant(drawing, 1.0),
    "orthogonal": _orthogonal,
    "sparse": _sparse,
    "trunc_normal": _trunc_normal,
    "uniform": _uniform,
    "xavier_normal": _xavier_normal,
    "xavier_uniform": _xavier_uniform,
    "zeros": lambda drawing: _constant(drawing, 0.0),
}
