"""The format's dtypes as types of numpy, for those few places that look at values."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .tensors import DTYPE_BITS, Buffer

__all__ = ["element_type", "unpacked"]


def element_type(dtype: str) -> np.dtype[np.generic]:
    """The numpy type of a dtype of one byte or more; of F4 and F6, one of a byte per element."""
    native = {
        "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4", "U32": "<u4",
        "F32": "<f4", "C64": "<c8", "F64": "<f8", "I64": "<i8", "U64": "<u8",
    }  # fmt: skip
    if dtype in native:
        return np.dtype(native[dtype])
    import ml_dtypes

    extended = {
        "BF16": "bfloat16", "F8_E5M2": "float8_e5m2", "F8_E4M3": "float8_e4m3fn", "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn",
        "F6_E2M3": "float6_e2m3fn", "F6_E3M2": "float6_e3m2fn",
    }  # fmt: skip
    found: np.dtype[np.generic] = np.dtype(getattr(ml_dtypes, extended[dtype]))
    return found


def unpacked(chunk: Buffer, dtype: str) -> NDArray[np.generic]:
    """The elements of a chunk, one array item each; packed ones are unpacked, lowest bits first."""
    bits = DTYPE_BITS[dtype]
    if bits >= 8:
        return np.frombuffer(chunk, element_type(dtype))
    unpacked = np.unpackbits(np.frombuffer(chunk, np.uint8), bitorder="little").reshape(-1, bits)
    return np.packbits(unpacked, axis=1, bitorder="little").reshape(-1).view(element_type(dtype))
