"""Sigmoid and tanh on vectors, as fractions whose product costs one division.

With q(r) = e^r - 1 and r = x - n ln 2, |r| <= ln 2 / 2, every exponential here is 2^n (1 + q(r)).

    sigmoid(x) = 1 / (1 + e^-x)
    tanh(x)    = sign(x) * -m / (2 + m),        m = e^(-2|x|) - 1,  exact to the last bits near 0

Both denominators are sums of positive terms and tanh's lies in (1, 2], so a product of the two cannot overflow before
the sigmoid itself does: sigmoid(a) * tanh(b) is one division.

q(r) = r + r^2 P(r), where P interpolates (e^r - 1 - r) / r^2 at the Chebyshev points of the interval; the coefficients
are rounded from exact arithmetic, and `tests/test_activations.py` derives them again.  Degree 4 leaves a relative
error of q of 2^-25 in float32, degree 9 one of 2^-54 in float64.  ln 2 is split in two so that n * ln2_high is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastlstm.kernels.simd import Vec, fma

__all__ = ["CONSTANTS", "Sigmoid", "Tanh", "sigmoid", "tanh"]


@dataclass(frozen=True)
class Exponential:
    """What e^x needs in one dtype."""

    mantissa_bits: int
    exponent_bias: int
    ln2_high: float
    ln2_low: float
    one_ln2: bool  # a fused multiply-add with ln 2 in one number is exact enough: 0.2 ulp of e^x at |x| = 10
    sigmoid_range: tuple[float, float]  # of x: below, 1 / (1 + e^-x) is subnormal and made 0; above, it is 1
    tanh_range: float  # of -|x|: below, tanh is 1
    coefficients: tuple[float, ...]  # of P

    @property
    def round_to_integer(self) -> float:
        """Adding this number leaves the integer part of a small number in the lowest bits."""
        return 1.5 * 2.0**self.mantissa_bits


CONSTANTS = {
    np.dtype(np.float32): Exponential(
        mantissa_bits=23,
        exponent_bias=127,
        ln2_high=0.693145751953125,
        ln2_low=1.428606765330187e-06,
        one_ln2=True,
        sigmoid_range=(-88.3, 87.0),
        tanh_range=-10.0,
        coefficients=(
            0.5,
            0.16666576989698775,
            0.041666554617204574,
            0.008363179052722578,
            0.0013926183587713494,
        ),
    ),
    np.dtype(np.float64): Exponential(
        mantissa_bits=52,
        exponent_bias=1023,
        ln2_high=0.6931471803691238,
        ln2_low=1.9082149292705877e-10,
        one_ln2=False,
        sigmoid_range=(-709.3, 708.0),
        tanh_range=-20.0,
        coefficients=(
            0.5000000000000001,
            0.16666666666666669,
            0.04166666666662413,
            0.008333333333330062,
            0.0013888888917213717,
            0.00019841269863053618,
            2.4801521295954376e-05,
            2.7557268459997064e-06,
            2.7620088445409746e-07,
            2.510038549551032e-08,
        ),
    ),
}


@dataclass(frozen=True)
class Sigmoid:
    """1 / denominator, kept apart until somebody needs the value; zero where x is below the range of e^-x."""

    denominator: Vec
    x: Vec

    def _exact(self) -> Vec:
        return self.denominator.unless_below(self.x, CONSTANTS[self.x.builder.dtype].sigmoid_range[0], np.inf)

    def times(self, factor: Vec | Tanh) -> Vec:
        """Return the product with a number, or with a tanh in one division."""
        if isinstance(factor, Vec):
            return factor / self._exact()
        d = self.denominator  # d (2 + m) without rounding 2 + m; it need not be infinite: the numerator is at most 1
        return factor.numerator / fma(d, factor.m, d * 2.0)

    def value(self) -> Vec:
        """Divide."""
        return 1.0 / self._exact()


@dataclass(frozen=True)
class Tanh:
    """numerator / (2 + m), kept apart until somebody needs the value."""

    numerator: Vec
    m: Vec

    def value(self) -> Vec:
        """Divide."""
        return self.numerator / (self.m + 2.0)


def _reduce(x: Vec, factor: int) -> tuple[Vec, Vec, Vec]:
    """Return s = 2^n, r = factor x - n ln 2 with |r| <= ln 2 / 2, and (e^r - 1 - r) / r^2; factor is -1 or 2.

    x must be where `s` is a normal number.
    """
    e = CONSTANTS[x.builder.dtype]
    shifted = fma(x, factor / np.log(2.0), e.round_to_integer)
    n = shifted - e.round_to_integer
    x = -x if factor == -1 else x * float(factor)
    one = x.builder.fused and e.one_ln2
    r = fma(n, -np.log(2.0), x) if one else fma(n, -e.ln2_low, fma(n, -e.ln2_high, x))
    s = ((shifted.bits() << e.mantissa_bits) + (e.exponent_bias << e.mantissa_bits)).numbers()
    return s, r, _polynomial(e.coefficients, r)


def _polynomial(coefficients: tuple[float, ...], x: Vec) -> Vec:
    """Return the polynomial by pairs of terms in x^2: half the latency of Horner's rule, one multiply more."""
    pairs = [fma(x, coefficients[k + 1], coefficients[k]) for k in range(0, len(coefficients) - 1, 2)]
    square = x * x
    total = fma(square, coefficients[-1], pairs.pop()) if len(coefficients) % 2 else pairs.pop()
    while pairs:
        total = fma(square, total, pairs.pop())
    return total


def sigmoid(x: Vec) -> Sigmoid:
    """Return 1 / (1 + e^-x); 0 where e^-x overflows, NaN for NaN."""
    low, high = CONSTANTS[x.builder.dtype].sigmoid_range
    s, r, p = _reduce(x.at_least(low).at_most(high), -1)
    denominator = fma(s, fma(p, r * r, r), s + 1.0)  # s + 1 is exact where it matters: one rounding
    return Sigmoid(denominator, x)


def tanh(x: Vec) -> Tanh:
    """Return tanh(x) = sign(x) * -m / (2 + m) with m = e^(-2|x|) - 1; NaN for NaN."""
    sign = 1 << (8 * x.builder.dtype.itemsize - 1)
    negative = (x.bits() | sign).numbers()
    s, r, p = _reduce(negative.at_least(CONSTANTS[x.builder.dtype].tanh_range), 2)
    m = fma(s, fma(p, r * r, r), s - 1.0)
    numerator = ((m.bits() & (sign - 1)) | (x.bits() & sign)).numbers()
    return Tanh(numerator, m)
