"""What new values take from old ones: the moments for ``like``, the mean row for ``mean``.

Sums are in double precision and in an order that is fixed, so they are the same to the last bit on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import fsum, isfinite, prod, sqrt

import numpy as np

from .initializers import Undrawable, rounded
from .numpy_types import element_type
from .random_bits import FloatArray
from .tensors import Buffer, TensorInfo, sections
from .wording import shown

__all__ = ["MeanRow", "moments"]

#: Elements that ``mean`` adds at a time. Fixed for good: sums in another order have other last bits.
_BLOCK = 1 << 16


def moments(read: Callable[[], Iterable[Buffer]], info: TensorInfo, name: str) -> tuple[float, float]:
    """Mean and (population) standard deviation of a tensor.

    Args:
        read: The tensor's bytes, in chunks that are all of one size but the last; called twice.
        info: Its dtype and shape.
        name: For messages.

    Raises:
        Undrawable: if the tensor has no values, or one that is not finite.
    """
    if not info.elements:
        raise Undrawable(f'like: "{shown(name)}" has no values to be like')
    mean = _sum(read, info, lambda values: values) / info.elements
    if not isfinite(mean):
        raise Undrawable(f'like: "{shown(name)}" has values that are not finite')
    variance = _sum(read, info, lambda values: (values - mean) * (values - mean)) / info.elements
    if not isfinite(variance):
        raise Undrawable(f'like: the variance of "{shown(name)}" is out of range')
    return mean, sqrt(variance)


def _sum(read: Callable[[], Iterable[Buffer]], info: TensorInfo, term: Callable[[FloatArray], FloatArray]) -> float:
    """A sum whose order is fixed: chunks are added element by element, the last row exactly."""
    rows = np.zeros(0)
    with np.errstate(all="ignore"):  # what is not finite is found in the sum
        for chunk in read():
            values = term(np.frombuffer(chunk, element_type(info.dtype)).astype(np.float64))
            if len(values) > len(rows):
                values[: len(rows)] += rows
                rows = values
            else:
                rows[: len(values)] += values
    try:
        return fsum(rows.tolist())
    except (OverflowError, ValueError):
        return float("nan")


class MeanRow:
    """The mean of a tensor's rows, in place of each row of a new tensor.

    ``resize_token_embeddings`` of transformers draws around this mean, with a billionth of the covariance. Here it is
    the mean itself, which needs no factorisation that comes out otherwise on another machine. Only a row is in memory
    at a time, or ``_BLOCK`` elements where rows are shorter.

    Args:
        read: The bytes of the old tensor, in chunks.
        info: Its dtype and shape; it has rows, along its first dimension.
        name: For messages.

    Raises:
        Undrawable: if a value is not finite, or a sum is not.
    """

    def __init__(self, read: Callable[[], Iterator[Buffer]], info: TensorInfo, name: str) -> None:
        self._size = element_type(info.dtype).itemsize
        if info.dtype == "C64":  # the real and the imaginary part are a column each
            info = TensorInfo("F32", (*info.shape, 2))
        mean = _column_sums(sections(read()), info, name) / info.shape[0]
        # Several rows at a time: those of a bias are of one element.
        self._rows = rounded(mean, info.dtype, name) * max(1, _BLOCK // max(len(mean), 1))

    def read(self, start: int, stop: int) -> Iterator[Buffer]:
        """The bytes of elements ``start`` to ``stop`` of the new tensor, in chunks."""
        rows = memoryview(self._rows)
        position, end = start * self._size, stop * self._size
        while position < end:
            chunk = rows[position % len(rows) :][: end - position]
            yield chunk
            position += len(chunk)


def _column_sums(take: Callable[[int, int], Iterator[Buffer]], info: TensorInfo, name: str) -> FloatArray:
    """The sum of each column, shape [prod(info.shape[1:])].

    Blocks of whole rows are added element by element, in their order; the rows of what results exactly.
    """
    columns = prod(info.shape[1:])
    sums = np.zeros((max(1, _BLOCK // max(columns, 1)), columns))
    flat, kind = sums.reshape(-1), element_type(info.dtype)
    block = flat.size * kind.itemsize
    for start in range(0, info.nbytes, max(block, 1)):
        data = bytearray()
        for chunk in take(start, min(start + block, info.nbytes)):
            data += chunk  # copied: a chunk is valid until the next one
        values = np.frombuffer(data, kind)
        with np.errstate(all="ignore"):
            flat[: len(values)] += values.astype(np.float64)
    try:
        found = sums[0] if len(sums) == 1 else np.array([fsum(column) for column in sums.T.tolist()])
    except (OverflowError, ValueError):
        found = np.full(columns, np.nan)
    if not np.isfinite(found).all():
        raise Undrawable(f'mean: "{shown(name)}" has values that are not finite, or whose sum is not')
    return found
