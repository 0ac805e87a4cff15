"""Random numbers that are the same for good: on every machine, in any order, whatever the version of numpy.

The bits are Philox4x64-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11), a
function of a key and a position. What is made of them uses addition, multiplication, division and square root
alone, which IEEE 754 defines to the last bit; libraries' logarithms and sines differ between processors.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["FloatArray", "cumulative", "quantile", "uniform", "words"]

FloatArray: TypeAlias = NDArray[np.float64]


def words(key: int, start: int, stop: int) -> NDArray[np.uint64]:
    """Random words ``start`` to ``stop`` of the stream of a key.

    Word ``i`` is word ``i mod 4`` of the Philox block with counter ``i div 4 + 1``.

    Args:
        key: 128 bits.
        start: First position.
        stop: Position after the last.

    Returns:
        Shape [stop - start].
    """
    block = start // 4
    skipped = start - 4 * block
    generator = np.random.Philox(key=key, counter=block)
    return np.asarray(generator.random_raw(stop - start + skipped), np.uint64)[skipped:]


def uniform(raw: NDArray[np.uint64]) -> FloatArray:
    """Words to numbers within (0, 1), symmetric about one half, 2^52 of them; same shape."""
    return ((raw >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def quantile(probability: FloatArray) -> FloatArray:
    """The inverse of the standard normal distribution function; same shape.

    Algorithm AS 241, PPND16 (Wichura, Applied Statistics 37, 1988), relative accuracy about 1e-16.
    """
    q = probability - 0.5
    r = 0.180625 - q * q
    result = q * _ratio(r, _CENTRE_A, _CENTRE_B)
    tail = np.flatnonzero(np.abs(q) > 0.425)
    if tail.size:
        p = probability[tail]
        r = np.sqrt(-_log(np.minimum(p, 1.0 - p)))
        near = r <= 5.0
        value = np.where(near, _ratio(r - 1.6, _NEAR_C, _NEAR_D), _ratio(r - 5.0, _FAR_E, _FAR_F))
        result[tail] = np.where(q[tail] < 0, -value, value)
    return result


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
    """The natural logarithm of positive numbers, by 2 artanh((m - 1) / (m + 1)) of the fraction m; same shape."""
    m, exponent = np.frexp(x)
    low = m < 0.7071067811865476
    m = np.where(low, 2.0 * m, m)
    e = exponent.astype(np.float64) - low
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = np.full_like(s, 1.0 / 25.0)
    for divisor in range(23, 0, -2):
        series = series * square + 1.0 / divisor
    return 2.0 * s * series + e * 0.6931471805599453


def _ratio(x: FloatArray, numerator: Sequence[float], denominator: Sequence[float]) -> FloatArray:
    return _horner(x, numerator) / _horner(x, denominator)


def _horner(x: FloatArray, coefficients: Sequence[float]) -> FloatArray:
    total = np.full_like(x, coefficients[-1])
    for coefficient in coefficients[-2::-1]:
        total *= x
        total += coefficient
    return total


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
