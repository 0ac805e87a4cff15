"""Two versions of one tensor, bit by bit: are they the same, where do they differ, is one the other made wider.

The bytes decide. Values are looked at only to say how large a difference is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .numpy_types import element_type, unpacked
from .report import Detail, Verdict
from .tensors import FLOATS, Buffer, Digester, TensorInfo, digest_of, same_bytes
from .traits import Traits, differ, values

__all__ = ["compare", "is_wider", "narrowed_digest", "same_bits", "was_cast"]

#: Which dtypes hold every value of a dtype.
_WIDER = {
    "F8_E4M3": ("F16", "BF16", "F32", "F64"),
    "F8_E5M2": ("F16", "BF16", "F32", "F64"),
    "F8_E4M3FNUZ": ("F16", "BF16", "F32", "F64"),
    "F8_E5M2FNUZ": ("F16", "BF16", "F32", "F64"),
    "F16": ("F32", "F64"),
    "BF16": ("F32", "F64"),
    "F32": ("F64",),
}


def is_wider(dtype: str, than: str) -> bool:
    """Whether a dtype holds every value of another one, and more."""
    return dtype in _WIDER.get(than, ())


def narrowed_digest(chunks: Iterable[Buffer], wide: str, narrow: str, algorithm: str) -> str | None:
    """The digest of a tensor after its cast to a narrower dtype; None if the cast loses a bit.

    Args:
        chunks: The tensor's bytes in the wide dtype.
        wide: Its dtype.
        narrow: The dtype to cast to.
        algorithm: Of the digest.
    """
    digester = Digester(algorithm)
    with np.errstate(all="ignore"):
        for chunk in chunks:
            values = np.frombuffer(chunk, element_type(wide))
            cast = values.astype(element_type(narrow))
            if cast.astype(element_type(wide)).tobytes() != bytes(chunk):
                return None
            digester.update(cast.tobytes())
    return str(digester)


def same_bits(one: Iterable[Buffer], other: Iterable[Buffer]) -> bool:
    """Whether two tensors of one size have the same bytes."""
    return all(same_bytes(bytearray(a), b) for a, b in zip(one, other, strict=True))


def was_cast(before: Callable[[], Iterator[Buffer]], after: Callable[[], Iterator[Buffer]], old: str, new: str) -> bool:
    """Whether a tensor is what a cast of its dtype to another makes of it.

    Args:
        before: Its bytes, in chunks.
        after: The bytes of the other, in chunks.
        old: Its dtype.
        new: The other dtype.
    """
    if old not in FLOATS or new not in FLOATS:
        return False
    with np.errstate(all="ignore"):
        cast = (np.frombuffer(chunk, element_type(old)).astype(element_type(new)).tobytes() for chunk in before())
        return digest_of(cast) == digest_of(after())


def compare(
    before: Callable[[], Iterator[Buffer]], after: Callable[[], Iterator[Buffer]], info: TensorInfo
) -> tuple[Verdict, Detail, Traits] | None:
    """Where two tensors of one dtype and shape differ, and in which way.

    Args:
        before: Bytes of the one, in chunks.
        after: Bytes of the other, in chunks of the same sizes.
        info: Dtype and shape of both.

    Returns:
        The verdict, its detail and the traits of the change; None if the bits are the same.
    """
    changed, first, position = 0, -1, 0
    largest = 0.0
    only_zeros = only_nans = True
    traits = Traits.of(info.dtype)
    for one, other in zip(before(), after(), strict=True):
        old, new = unpacked(one, info.dtype), unpacked(other, info.dtype)
        where = np.flatnonzero(differ(old, new))
        if old.dtype.kind != "c":
            with np.errstate(all="ignore"):
                traits.see(old, new)
        if where.size:
            changed += int(where.size)
            first = position + int(where[0]) if first < 0 else first
            with np.errstate(all="ignore"):  # signalling NaNs signal
                a, b = old[where], new[where]
                largest = max(largest, _largest_difference(a, b))
                only_zeros = only_zeros and not (np.any(a) or np.any(b))
                only_nans = only_nans and bool(np.all(np.isnan(values(a)) & np.isnan(values(b))))
        position += len(old)
    if not changed:
        return None
    verdict: Verdict = "sign_of_zero" if only_zeros else "nan_payload" if only_nans else "changed"
    index = tuple(int(part) for part in np.unravel_index(first, info.shape)) if info.shape else ()
    detail = Detail(elements_changed=changed, max_abs_diff=largest if np.isfinite(largest) else None, first_index=index)
    return verdict, detail, traits


def _largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest absolute difference; infinite where one is not finite."""
    if a.dtype.kind in "iu":
        # Differences modulo 2^64 are exact, where doubles would round large integers.
        low, high = (
            np.where((a < b) == flag, a, b).astype(np.int64 if a.dtype.kind == "i" else np.uint64)
            for flag in (True, False)
        )
        return float(np.max(high.view(np.uint64) - low.view(np.uint64)))
    difference = float(np.max(np.abs(values(b) - values(a))))
    return difference if np.isfinite(difference) else np.inf
