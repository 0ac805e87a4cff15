"""Two versions of one tensor, bit by bit: are they the same, where do they differ, is one the other made wider.

The bytes decide. Values are looked at only to say how large a difference is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .numpy_types import element_type, unpacked
from .report import Detail, Verdict
from .tensors import Buffer, Digester, TensorInfo, digest_of

__all__ = ["FLOATS", "Traits", "compare", "is_wider", "narrowed_digest", "same_bits", "was_cast"]

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
#: Dtypes with fractions that optimizers train in.
FLOATS = frozenset(("F16", "BF16", "F32", "F64"))


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
    return all(memoryview(a) == memoryview(b) for a, b in zip(one, other, strict=True))


@dataclass(slots=True)
class Traits:
    """In which way a tensor changed, gathered over its chunks: what tells one cause from another.

    Attributes:
        elements: Elements seen.
        changed: Elements with other bits.
        ratios: Least and largest new/old, of elements that are large enough for a ratio to mean something.
        rated: How many these are.
        zeros_held: Whether what was zero is zero.
        ulps: Largest distance of old and new, in units in the last place of the old one.
        scale: Largest absolute value, old or new.
        largest: Largest absolute difference.
        grew: Whether all values are larger than they were.
        casts: Narrower dtypes such that every value is what a cast to them and back makes of the old one.
        epsilon: Distance from 1 to the next number of the dtype; 0 for dtypes without fractions.
        smallest: Its smallest normal number.
    """

    elements: int = 0
    changed: int = 0
    ratios: tuple[float, float] = (np.inf, -np.inf)
    rated: int = 0
    zeros_held: bool = True
    ulps: float = 0
    scale: float = 0
    largest: float = 0
    grew: bool = True
    casts: tuple[str, ...] = ()
    epsilon: float = 0
    smallest: float = 0

    @classmethod
    def of(cls, dtype: str) -> Self:
        """Traits of a tensor of this dtype, of which nothing was seen so far."""
        narrower = tuple(narrow for narrow in ("F16", "BF16", "F32") if dtype in _WIDER[narrow])
        if dtype not in FLOATS:
            return cls(casts=narrower)
        from ml_dtypes import finfo

        limits = finfo(element_type(dtype))  # type: ignore[no-untyped-call]
        return cls(casts=narrower, epsilon=float(limits.eps), smallest=float(limits.smallest_normal))

    def see(self, old: NDArray[Any], new: NDArray[Any]) -> None:
        """Take the next elements into account: plain numbers, shape [elements]."""
        was, now = _values(old), _values(new)
        self.elements += len(was)
        self.grew = self.grew and bool(np.all(now > was))
        if not self.epsilon:
            return
        changed = _differ(old, new)
        self.changed += int(changed.sum())
        self.casts = tuple(narrow for narrow in self.casts if _is_cast(old, new, narrow))
        self.zeros_held = self.zeros_held and not np.any(now[was == 0])
        # Away from the smallest numbers, whose rounding is coarse.
        rated = ~(np.abs(was) <= self.smallest / self.epsilon)
        if rated.any():
            ratio = np.nan_to_num(now[rated] / was[rated], nan=-np.inf)
            self.rated += len(ratio)
            self.ratios = (min(self.ratios[0], float(ratio.min())), max(self.ratios[1], float(ratio.max())))
        distance = np.nan_to_num(np.abs(now - was)[changed], nan=np.inf)
        if len(distance):
            place = np.spacing(np.abs(was[changed])) * (self.epsilon / np.finfo(np.float64).eps)
            self.ulps = max(self.ulps, float((distance / place).max()))
            self.largest = max(self.largest, float(distance.max()))
            self.scale = max(self.scale, float(np.abs(was).max()), float(np.abs(now).max()))

    @property
    def cast_to(self) -> str | None:
        """The dtype that the values went through; None if a cast does not explain them."""
        return self.casts[0] if self.casts and self.changed else None

    @property
    def shrank_by_one_ratio(self) -> bool:
        """Whether new/old is one number below one, but for rounding, in eight elements or more."""
        low, high = self.ratios
        return self.rated >= 8 and 0 < low <= high < 1 and high - low <= 0.1 * (1 - high) and self.zeros_held

    def within_ulps(self, count: int) -> bool:
        """Whether some elements, not all, moved by so many units in the last place or fewer."""
        return bool(self.epsilon) and self.changed < self.elements and self.ulps <= count

    @property
    def is_rounding_of_sums(self) -> bool:
        """Whether the change is what rounding leaves of adding something of the tensor's size and taking it away.

        Small values lose many of their last places then, and no value more than the last place of the largest.
        """
        scattered = self.changed < 0.7 * self.elements
        return bool(self.epsilon) and scattered and self.ulps > 4 and self.largest <= 2 * self.epsilon * self.scale


def _is_cast(old: NDArray[Any], new: NDArray[Any], narrow: str) -> bool:
    return not _differ(old.astype(element_type(narrow)).astype(old.dtype), new).any()


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
        where = np.flatnonzero(_differ(old, new))
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
                only_nans = only_nans and bool(np.all(np.isnan(_values(a)) & np.isnan(_values(b))))
        position += len(old)
    if not changed:
        return None
    verdict: Verdict = "sign_of_zero" if only_zeros else "nan_payload" if only_nans else "changed"
    index = tuple(int(part) for part in np.unravel_index(first, info.shape)) if info.shape else ()
    detail = Detail(elements_changed=changed, max_abs_diff=largest if np.isfinite(largest) else None, first_index=index)
    return verdict, detail, traits


def _differ(old: NDArray[np.generic], new: NDArray[np.generic]) -> NDArray[np.bool_]:
    raw = f"V{old.dtype.itemsize}" if old.dtype.itemsize not in (1, 2, 4, 8) else f"u{old.dtype.itemsize}"
    return np.asarray(old.view(raw) != new.view(raw))


def _largest_difference(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest absolute difference; infinite where one is not finite."""
    if a.dtype.kind in "iu":
        # Differences modulo 2^64 are exact, where doubles would round large integers.
        low, high = (
            np.where((a < b) == flag, a, b).astype(np.int64 if a.dtype.kind == "i" else np.uint64)
            for flag in (True, False)
        )
        return float(np.max(high.view(np.uint64) - low.view(np.uint64)))
    difference = float(np.max(np.abs(_values(b) - _values(a))))
    return difference if np.isfinite(difference) else np.inf


def _values(array: NDArray[np.generic]) -> NDArray[Any]:
    """Numbers that can be subtracted."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
