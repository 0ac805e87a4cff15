"""In which way a tensor changed: what tells one cause from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .numpy_types import element_type
from .tensors import FLOATS

__all__ = ["FEW_ULPS", "SCATTERED", "Traits", "differ", "values"]

#: Fewer elements than so many may share a ratio by chance.
_LEAST_RATED = 8
#: Rounding at every step takes up to so many times as much from one value as from another.
_UNEVEN = 3
#: So much larger the largest value has to be than the least, or a step of one size for all would pass for one ratio.
_LEAST_SPREAD = 4
#: No single step decays by more, and no run worth its name.
_AT_ONCE, _MOST_DECAYED = 0.9, 0.5
#: Tensors that were trained from another seed point elsewhere: their cosine is near zero.
_AKIN_COSINE = 0.5
#: Rounding leaves a good part of the values as they were; what computes them anew leaves next to none.
SCATTERED = 0.7
#: So near a value, rounding goes either way.
FEW_ULPS = 4
#: A change of fewer places is too short to show a grid.
_COARSE_ULPS = 8
#: So many roundings one way; beyond a quarter, which coarse dtypes would reach, it is no rounding.
_DRIFT_STEPS, _MOST_DRIFT = 1e3, 0.25

_NARROWER = {"F32": ("F16", "BF16"), "F64": ("F16", "BF16", "F32")}


def differ(old: NDArray[np.generic], new: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Where two arrays of one dtype have other bits; same shape."""
    raw = f"V{old.dtype.itemsize}" if old.dtype.itemsize not in (1, 2, 4, 8) else f"u{old.dtype.itemsize}"
    return np.asarray(old.view(raw) != new.view(raw))


def values(array: NDArray[np.generic]) -> NDArray[Any]:
    """Numbers that can be subtracted; same shape."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


@dataclass(slots=True)
class Traits:
    """In which way a tensor changed, gathered over its chunks. Sizes are absolute values.

    Attributes:
        elements: Elements seen.
        changed: Elements with other bits.
        shrank: Those that are nearer to zero than they were.
        rose: Those that are farther from it.
        grew: Whether all values are larger than they were.
        zeros_held: Whether what was zero is zero.
        rated: Elements that are large enough for new/old to mean something.
        ratios: Least and largest new/old of these.
        sizes: Least and largest size of these.
        mantissas: Of these, the largest mantissa of one that held, and the least of one that changed.
        ulps: Largest change, in units in the last place of the old value.
        relative: Largest change, in sizes of the old value.
        largest: Largest change.
        coarse: Elements that moved by more than eight units in the last place of the old value.
        on_grid: Whether the new value of each of these is a multiple of its change, to a power of two.
        scale: Largest size, old or new.
        products: Sums of old x new, old x old and new x new.
        casts: Narrower dtypes such that every value is what a cast to them and back makes of the old one.
        epsilon: Distance from 1 to the next number of the dtype; 0 for dtypes that are not in ``FLOATS``.
        smallest: Its smallest normal number.
    """

    elements: int = 0
    changed: int = 0
    shrank: int = 0
    rose: int = 0
    grew: bool = True
    zeros_held: bool = True
    rated: int = 0
    ratios: tuple[float, float] = (np.inf, -np.inf)
    sizes: tuple[float, float] = (np.inf, 0)
    mantissas: tuple[float, float] = (0, 2)
    ulps: float = 0
    relative: float = 0
    largest: float = 0
    coarse: int = 0
    on_grid: bool = True
    scale: float = 0
    products: tuple[float, float, float] = (0, 0, 0)
    casts: tuple[str, ...] = ()
    epsilon: float = 0
    smallest: float = 0

    @classmethod
    def of(cls, dtype: str) -> Self:
        """Traits of a tensor of this dtype, of which nothing was seen so far."""
        if dtype not in FLOATS:
            return cls()
        from ml_dtypes import finfo

        limits = finfo(element_type(dtype))  # type: ignore[no-untyped-call]
        casts = _NARROWER.get(dtype, ())
        return cls(casts=casts, epsilon=float(limits.eps), smallest=float(limits.smallest_normal))

    @classmethod
    def of_cast(cls, dtype: str) -> Self:
        """Traits of a tensor that was cast to another dtype, and is the same but for that."""
        return cls(changed=1, casts=(dtype,))

    def see(self, old: NDArray[Any], new: NDArray[Any]) -> None:
        """Take the next elements into account: real numbers, shape [elements] both."""
        was, now = values(old), values(new)
        self.elements += len(was)
        self.grew = self.grew and bool(np.all(now > was))
        if not self.epsilon:
            return
        changed = differ(old, new)
        self.changed += int(changed.sum())
        self.casts = tuple(narrow for narrow in self.casts if _is_cast(old, new, narrow))
        self.zeros_held = self.zeros_held and not np.any(now[was == 0])
        dots = (float(was @ now), float(was @ was), float(now @ now))
        self.products = (self.products[0] + dots[0], self.products[1] + dots[1], self.products[2] + dots[2])
        self._rate(was, now, changed)
        if changed.any():
            self._measure(was[changed], now[changed])

    def _rate(self, was: NDArray[Any], now: NDArray[Any], changed: NDArray[np.bool_]) -> None:
        # Away from the smallest numbers, whose rounding is coarse.
        rated = ~(np.abs(was) <= self.smallest / self.epsilon)
        if not rated.any():
            return
        ratio, sizes = np.nan_to_num(now[rated] / was[rated], nan=-np.inf), np.abs(was[rated])
        mantissas, moved = np.frexp(sizes)[0], changed[rated]
        self.rated += len(ratio)
        self.ratios = (min(self.ratios[0], float(ratio.min())), max(self.ratios[1], float(ratio.max())))
        self.sizes = (min(self.sizes[0], float(sizes.min())), max(self.sizes[1], float(sizes.max())))
        held, least = self.mantissas
        self.mantissas = (
            max(held, float(mantissas[~moved].max(initial=0))),
            min(least, float(mantissas[moved].min(initial=2))),
        )

    def _measure(self, was: NDArray[Any], now: NDArray[Any]) -> None:
        """How far elements moved that did."""
        distance = np.nan_to_num(np.abs(now - was), nan=np.inf)
        outwards = np.abs(now) - np.abs(was)
        self.shrank += int((outwards < 0).sum())
        self.rose += int((outwards > 0).sum())
        place = self._place(was)
        self.ulps = max(self.ulps, float((distance / place).max()))
        coarse = np.isfinite(distance) & (distance > _COARSE_ULPS * place)
        grid = np.exp2(np.floor(np.log2(distance[coarse])))
        self.coarse += int(coarse.sum())
        self.on_grid = self.on_grid and bool(np.all(np.remainder(now[coarse], grid) == 0))
        self.relative = max(self.relative, float((distance / np.maximum(np.abs(was), self.smallest)).max()))
        self.largest = max(self.largest, float(distance.max()))
        self.scale = max(self.scale, float(np.abs(was).max()), float(np.abs(now).max()))

    def _place(self, values: NDArray[Any]) -> NDArray[Any]:
        """The unit in the last place of each value of the dtype; that of the smallest numbers is all the same."""
        place: NDArray[Any] = np.spacing(np.abs(values)) * (self.epsilon / np.finfo(np.float64).eps)
        return np.asarray(np.maximum(place, self.smallest * self.epsilon))

    # --- Laws ---

    @property
    def cast_to(self) -> str | None:
        """The dtype that the values went through; None if a cast does not explain them."""
        return self.casts[0] if self.casts and self.changed else None

    @property
    def shrank_by_one_ratio(self) -> bool:
        """Whether new/old is one number below one, but for rounding, in eight elements or more of many sizes.

        Rounding at every step takes up to three times as much from one value as from another. A step of one size for
        all, as Adam takes, takes far more from small values than from large ones; from equal ones it takes the same.
        Nothing decays by half in a run that is worth its name, nor by a tenth in one step, which rounds only once.
        """
        (least, most), (low, high) = self.sizes, self.ratios
        at_once = (
            high < _AT_ONCE and high - low <= 2 * self.epsilon * high
        )  # one rounding there, and one of the quotient
        telling = self.rated >= _LEAST_RATED and most >= _LEAST_SPREAD * least
        return telling and self.zeros_held and low > _MOST_DECAYED and not at_once and self._is_even

    def shrank_like(self, other: Traits) -> bool:
        """Whether all elements shrank by a ratio that elements of another tensor shrank by."""
        (low, high), (least, most) = self.ratios, other.ratios
        within = least - self.epsilon <= low and high <= most + self.epsilon
        return bool(self.rated) and self._is_even and self.zeros_held and within

    def shrank_as_much(self, other: Traits) -> bool:
        """Whether what it lost is within three times of what another tensor lost."""
        lost, others = (1 - self.ratios[0], 1 - self.ratios[1]), (1 - other.ratios[0], 1 - other.ratios[1])
        return max(lost[0], others[0]) <= _UNEVEN * min(lost[1], others[1])

    @property
    def _is_even(self) -> bool:
        low, high = self.ratios
        return 0 < low <= high < 1 and 1 - low <= _UNEVEN * (1 - high)

    @property
    def is_akin(self) -> bool:
        """Whether the new tensor still points where the old one did: their cosine is one half or more."""
        dot, old, new = self.products
        return bool(dot >= _AKIN_COSINE * np.sqrt(old * new))

    @property
    def is_rounding_of_sums(self) -> bool:
        """Whether the change is what rounding leaves of adding something of the tensor's size and taking it away.

        No value loses more than the last place of the largest then, and a good part lose nothing; a small value that
        loses many of its own places is left on the grid of the sum.
        """
        scattered = self.changed < SCATTERED * self.elements
        # The sum is at most twice the scale, so half its last place is epsilon * scale; the difference rounds again.
        small = self.largest <= 2 * self.epsilon * self.scale
        return bool(self.epsilon) and scattered and small and self.on_grid

    @property
    def is_rounding_of_products(self) -> bool:
        """Whether the change may be what rounding leaves of the sum of two shares of each value.

        What moves does so by little, and all away from zero or all towards it, since a share that rounds one way does
        so at every step. Within a few units in the last place it may go either way.
        """
        one_way = self.ulps <= FEW_ULPS or not (self.shrank and self.rose)
        return bool(self.epsilon) and one_way and self.relative <= min(_DRIFT_STEPS * self.epsilon, _MOST_DRIFT)

    @property
    def is_rounding_of_factor(self) -> bool:
        """Whether large mantissas moved and small ones held, as a factor of nearly one has it."""
        held, moved = self.mantissas
        return moved > held


def _is_cast(old: NDArray[Any], new: NDArray[Any], narrow: str) -> bool:
    return not differ(old.astype(element_type(narrow)).astype(old.dtype), new).any()
