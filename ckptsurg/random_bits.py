"""Random numbers that are the same for good: on every machine, in any order, whatever the version of numpy.

The bits are Philox4x64-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11), a
function of a key and a position. What is made of them uses addition, multiplication, division and square root
alone, which IEEE 754 defines to the last bit; libraries' logarithms and sines differ between processors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal, localcontext
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["FloatArray", "Scratch", "cumulative", "quantile", "uniform", "words"]

FloatArray: TypeAlias = NDArray[np.float64]

#: Numbers that go through the formulas at a time: few enough that their arrays stay in a cache, many enough that
#: threads seldom meet at the interpreter's lock between two operations.
_TILE = 1 << 17

#: Those of the tail at a time. It is 15 % of a normal distribution, but may be all of one that is cut off.
_TAIL = _TILE // 4

#: Words that numpy makes at a time, in memory of its own: so few that it is not asked of the system each time.
_WORDS = 1 << 13

#: The bits of 1.0.
_ONE = np.uint64(0x3FF << 52)


class Scratch:
    """Arrays that are used again and again, by one thread at a time: fresh memory costs more than the arithmetic on it.

    Args:
        shape: Of each.
        dtype: Of its elements.
    """

    def __init__(self, shape: tuple[int, ...], dtype: type[Any] = np.float64) -> None:
        self._shape, self._dtype = shape, dtype
        self._idle: list[NDArray[Any]] = []

    @contextmanager
    def lent(self) -> Iterator[NDArray[Any]]:
        """One that nobody uses."""
        try:
            array = self._idle.pop()
        except IndexError:
            array = np.empty(self._shape, self._dtype)
        try:
            yield array
        finally:
            self._idle.append(array)


_scratch = Scratch((3, _TILE))


def words(key: int, start: int, stop: int, out: NDArray[np.uint64] | None = None) -> NDArray[np.uint64]:
    """Random words ``start`` to ``stop`` of the stream of a key.

    Word ``i`` is word ``i mod 4`` of the Philox block with counter ``i div 4 + 1``.

    Args:
        key: 128 bits.
        start: First position.
        stop: Position after the last.
        out: Where they go, if not to a new array.

    Returns:
        Shape [stop - start].
    """
    out = np.empty(stop - start, np.uint64) if out is None else out
    block, skipped = divmod(start, 4)
    generator = np.random.Philox(key=key, counter=block)
    generator.random_raw(skipped)
    for position in range(0, len(out), _WORDS):
        part = out[position : position + _WORDS]
        part[:] = generator.random_raw(len(part))
    return out


def uniform(raw: NDArray[np.uint64]) -> FloatArray:
    """Words to numbers within (0, 1), symmetric about one half, 2^52 of them.

    The upper 52 bits of a word are the fraction of a number within [1, 2), of which 1 - 2^-53 is taken away, exactly.

    Args:
        raw: Shape [n]; overwritten, the numbers are in the same memory.

    Returns:
        Shape [n].
    """
    raw >>= np.uint64(12)
    raw |= _ONE
    numbers = raw.view(np.float64)
    numbers -= 1.0 - 2.0**-53
    return numbers


def quantile(probability: FloatArray, out: FloatArray | None = None) -> FloatArray:
    """The inverse of the standard normal distribution function.

    Algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988), relative accuracy about 1e-16.

    Args:
        probability: Shape [n].
        out: Where the result goes, if not to a new array; may be ``probability``.

    Returns:
        Shape [n].
    """
    out = np.empty_like(probability) if out is None else out
    with _scratch.lent() as rows:
        for start in range(0, len(probability), _TILE):
            part = slice(start, start + _TILE)
            _quantile(probability[part], out[part], rows)
    return out


def _quantile(p: FloatArray, out: FloatArray, rows: FloatArray) -> None:
    """The quantiles of a tile; ``out`` may be ``p``."""
    q, r, spare = rows[:, : len(p)]
    np.subtract(p, 0.5, out=q)
    tail = np.flatnonzero(np.abs(q, out=r) > 0.425)
    p_of_tail = p[tail]
    np.multiply(q, q, out=r)
    np.subtract(0.180625, r, out=r)
    _ratio(r, _CENTRE_A, _CENTRE_B, out, spare)
    out *= q
    for start in range(0, len(tail), _TAIL):
        part = slice(start, start + _TAIL)
        out[tail[part]] = np.copysign(_depth(p_of_tail[part]), p_of_tail[part] - 0.5)


def _depth(p: FloatArray) -> FloatArray:
    """How far from zero the quantiles of a tail are; shape [n]."""
    r = np.sqrt(-_log(np.minimum(p, 1.0 - p)))
    far = np.flatnonzero(r > 5.0)
    value = _ratio(r - 1.6, _NEAR_C, _NEAR_D)
    if far.size:
        value[far] = _ratio(r[far] - 5.0, _FAR_E, _FAR_F)
    return value


def cumulative(x: float) -> float:
    """The standard normal distribution function, to the last bit of a double."""
    if x < -39.0 or x > 39.0:
        return float(x > 0)
    with localcontext() as context:
        context.prec = 700  # the alternating terms of the far tails cancel to some 640 digits
        z = Decimal(x)
        term = total = z
        k = 0
        while abs(term) > Decimal(10) ** -690:
            k += 1
            term = -term * z * z * (2 * k - 1) / (2 * k * (2 * k + 1))
            total += term
        return float(Decimal("0.5") + total / (2 * _pi()).sqrt())


def _pi() -> Decimal:
    """Pi in the precision of the current context (Machin's formula)."""

    def arctan_of_inverse(n: int) -> Decimal:
        power = total = Decimal(1) / n
        k = 0
        while abs(power) > Decimal(10) ** -698:
            k += 1
            power = -power / (n * n)
            total += power / (2 * k + 1)
        return total

    return 4 * (4 * arctan_of_inverse(5) - arctan_of_inverse(239))


def _log(x: FloatArray) -> FloatArray:
    """The natural logarithm of positive numbers, by 2 artanh((m - 1) / (m + 1)) of the fraction m; shape [n]."""
    m, exponent = np.frexp(x)
    low = m < 0.7071067811865476
    m *= 1.0 + low
    s = (m - 1.0) / (m + 1.0)
    return 2.0 * s * _horner(s * s, _ARTANH) + (exponent - low) * 0.6931471805599453


def _ratio(
    x: FloatArray,
    numerator: Sequence[float],
    denominator: Sequence[float],
    out: FloatArray | None = None,
    spare: FloatArray | None = None,
) -> FloatArray:
    """The quotient of two polynomials, in ``out`` and by way of ``spare``, if given; shape [n]."""
    quotient = _horner(x, numerator, out)
    quotient /= _horner(x, denominator, spare)
    return quotient


def _horner(x: FloatArray, coefficients: Sequence[float], out: FloatArray | None = None) -> FloatArray:
    """A polynomial, from its highest coefficient down; shape [n]."""
    *lower, second, highest = coefficients
    total = np.multiply(x, highest, out=out)
    total += second
    for coefficient in reversed(lower):
        total *= x
        total += coefficient
    return total


#: Coefficients of artanh(s) / s in powers of the square of s, constant term first.
_ARTANH = [1.0 / divisor for divisor in range(1, 26, 2)]

# Coefficients of AS 241, constant term first.
_CENTRE_A = (
    3.3871328727963666080, 1.3314166789178437745e2, 1.9715909503065514427e3, 1.3731693765509461125e4,
    4.5921953931549871457e4, 6.7265770927008700853e4, 3.3430575583588128105e4, 2.5090809287301226727e3,
)  # fmt: skip
_CENTRE_B = (
    1.0, 4.2313330701600911252e1, 6.8718700749205790830e2, 5.3941960214247511077e3,
    2.1213794301586595867e4, 3.9307895800092710610e4, 2.8729085735721942674e4, 5.2264952788528545610e3,
)  # fmt: skip
_NEAR_C = (
    1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504,
    1.27045825245236838258, 2.41780725177450611770e-1, 2.27238449892691845833e-2, 7.74545014278341407640e-4,
)  # fmt: skip
_NEAR_D = (
    1.0, 2.05319162663775882187, 1.67638483018380384940, 6.89767334985100004550e-1,
    1.48103976427480074590e-1, 1.51986665636164571966e-2, 5.47593808499534494600e-4, 1.05075007164441684324e-9,
)  # fmt: skip
_FAR_E = (
    6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 2.96560571828504891230e-1,
    2.65321895265761230930e-2, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7,
)  # fmt: skip
_FAR_F = (
    1.0, 5.99832206555887937690e-1, 1.36929880922735805310e-1, 1.48753612908506148525e-2,
    7.86869131145613259100e-4, 1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15,
)  # fmt: skip
