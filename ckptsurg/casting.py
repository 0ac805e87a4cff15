"""Values in another dtype: rounded to the nearest, to the even one of two; what is too large becomes infinite."""

from __future__ import annotations

import numpy as np

from .numpy_types import element_type
from .tensors import DTYPE_BITS, Buffer

__all__ = ["cast"]


def cast(data: Buffer, old: str, new: str) -> bytes:
    """Elements in another dtype, as ``Tensor.to`` of torch has them, but for the payload of a NaN.

    Args:
        data: Whole elements, little-endian.
        old: Their dtype, one of ``FLOATS``.
        new: The other, likewise.
    """
    values = np.frombuffer(data, element_type(old))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if old == "F64" and new != "F32":
            values = values.astype(np.float32)  # torch rounds twice, too
        result = values.astype(element_type(new))
        if DTYPE_BITS[new] <= DTYPE_BITS[old]:
            result[np.isnan(values)] = np.nan  # processors differ in which one it becomes
    return result.tobytes()
