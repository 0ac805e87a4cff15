"""Named, seeded values: the bytes of a drawn tensor, in any part of it.

Names, arguments and formulas are those of ``torch.nn.init`` (https://pytorch.org/docs/stable/nn.init.html). A value
depends on (seed, name, shape, dtype, initializer) and its position alone. Draws are rounded to single precision
first and then to narrower dtypes. ``orthogonal`` goes through LAPACK and is promised to the last bit only for one
build of numpy; it and ``sparse`` hold their tensor in memory, all others are drawn part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil, prod, sqrt
from threading import BoundedSemaphore, Lock, local
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from .documents import canonical_json
from .initializer_arguments import Initializer
from .numpy_types import element_type
from .random_bits import FloatArray, Scratch, cumulative, quantile, uniform, words
from .tensors import BLOCK_ELEMENTS, Buffer, TensorInfo
from .wording import shown

__all__ = ["Drawing", "Undrawable", "rounded"]

#: Where blocks are drawn.
_memory = Scratch((BLOCK_ELEMENTS,), np.complex128)
# glibc keeps what is freed for later, up to twice the size of the largest block freed so far (mallopt(3)). One that is
# large is freed here, so that temporary arrays are not fresh memory again and again: that costs more than drawing.
np.empty(8 << 20, np.uint8)
#: How many threads draw at a time: each takes some 8 MB for it.
_at_a_time = BoundedSemaphore(8)


class Undrawable(ValueError):
    """A value that is to be drawn does not fit its dtype, or has nothing to be drawn like."""


class _Kept(local):
    """The block that a thread drew last: of a tensor that grows, rows are read one by one."""

    number = -1
    block: Buffer = b""


class Drawing:
    """A tensor that is drawn.

    Several threads may read it at once; each draws what it reads itself.

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
        self._kept = _Kept()

    def read(self, start: int, stop: int) -> Iterator[Buffer]:
        """The bytes of elements ``start`` to ``stop``, in chunks, each drawn when it is asked for."""
        size = element_type(self._info.dtype).itemsize
        for number in range(start // BLOCK_ELEMENTS, -(-stop // BLOCK_ELEMENTS)):
            low, high = max(start - number * BLOCK_ELEMENTS, 0), min(stop - number * BLOCK_ELEMENTS, BLOCK_ELEMENTS)
            is_constant, kept = isinstance(self._values, _Constant), self._kept
            if is_constant:
                number = 0  # none is longer, and all are the same
            block = kept.block if kept.number == number else self._block(number)
            if is_constant or high - low < BLOCK_ELEMENTS:
                kept.number, kept.block = number, block
            yield memoryview(block)[low * size : high * size]

    def _block(self, number: int) -> bytes:
        start = number * BLOCK_ELEMENTS
        stop = min(start + BLOCK_ELEMENTS, self._info.elements)
        with _at_a_time, _memory.lent() as memory:
            values = (memory if self.is_complex else memory.view(np.float64))[: stop - start]
            self._values(start, stop, values)
            return rounded(values, self._info.dtype, self._name)

    # --- Elements ------------------------------------------------------------------------------------

    def uniforms(self, start: int, stop: int, out: FloatArray | None = None) -> FloatArray:
        out = np.empty(stop - start) if out is None else out
        return uniform(words(self._key, start, stop, out.view(np.uint64)))

    def normals(self, start: int, stop: int, out: FloatArray | None = None) -> FloatArray:
        values = self.uniforms(start, stop, out)
        return quantile(values, out=values)

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
        # Rounding keeps the order, so nothing leaves the range unless the least or the greatest does. NaN is both.
        parts = values.view(values.real.dtype)
        extremes = np.array([parts.min(initial=0.0), parts.max(initial=0.0)])
        extremes = extremes.astype(element_type("F32" if dtype == "C64" else dtype)).astype(np.float64)
        if not np.isfinite(extremes).all():
            raise Undrawable(f'"{shown(name)}": a drawn value is out of the range of {dtype}')
        return values.astype(element_type(dtype), copy=False).tobytes()


#: Puts the values of elements start to stop into an array of doubles, or of pairs of them, shape [stop - start].
_Values = Callable[[int, int, NDArray[Any]], None]


@dataclass(frozen=True)
class _Constant:
    """The same value everywhere."""

    value: float

    def __call__(self, start: int, stop: int, out: NDArray[Any]) -> None:
        out[:] = self.value


def _constant(drawing: Drawing, val: float) -> _Values:
    return _Constant(val)


def _uniform(drawing: Drawing, a: float, b: float) -> _Values:
    def values(start: int, stop: int, out: FloatArray) -> None:
        drawing.uniforms(start, stop, out)
        out *= b - a
        out += a

    return values


def _normal(drawing: Drawing, mean: float, std: float) -> _Values:
    # As torch: of a complex number, half of the variance to the real part, half to the imaginary part.
    parts, scale = (2, std / sqrt(2)) if drawing.is_complex else (1, std)

    def values(start: int, stop: int, out: NDArray[Any]) -> None:
        normals = drawing.normals(parts * start, parts * stop, out.view(np.float64))
        normals *= scale
        out += mean

    return values


def _trunc_normal(drawing: Drawing, mean: float, std: float, a: float, b: float) -> _Values:
    if std == 0:
        return _Constant(min(max(mean, a), b))
    if a > mean:  # near one, probabilities have no digits left: the mirror image is drawn from the lower tail
        return _negative(_trunc_normal(drawing, -mean, std, -b, -a))
    low, high = cumulative((a - mean) / std), cumulative((b - mean) / std)

    def values(start: int, stop: int, out: FloatArray) -> None:
        drawing.uniforms(start, stop, out)
        out *= high - low
        out += low
        np.clip(out, 2.0**-1022, 1.0 - 2.0**-53, out=out)
        quantile(out, out=out)
        out *= std
        out += mean
        np.clip(out, a, b, out=out)

    return values


def _negative(mirrored: _Values) -> _Values:
    def values(start: int, stop: int, out: FloatArray) -> None:
        mirrored(start, stop, out)
        np.negative(out, out=out)

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

    def values(start: int, stop: int, out: NDArray[Any]) -> None:
        row, column = np.divmod(np.arange(start, stop), columns)
        out[:] = row == column

    return values


def _dirac(drawing: Drawing, groups: int) -> _Values:
    outputs, inputs, *kernel = drawing.shape
    centre = sum(size // 2 * prod(kernel[axis + 1 :]) for axis, size in enumerate(kernel))

    def values(start: int, stop: int, out: NDArray[Any]) -> None:
        channel, inside = np.divmod(np.arange(start, stop), prod(kernel))
        output, source = np.divmod(channel, inputs)
        out[:] = (output % (outputs // groups) == source) & (inside == centre)

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

    def values(start: int, stop: int, out: NDArray[Any]) -> None:
        with lock:
            out[:] = once()[start:stop]

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
