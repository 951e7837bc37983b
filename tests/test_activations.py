"""Sigmoid and tanh: over every float32, against decimal arithmetic in float64, and their coefficients derived again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache
from typing import Any

import numba
import numpy as np
import pytest
from conftest import BOTH

from fastlstm.kernels.activations import CONSTANTS, sigmoid, tanh
from fastlstm.kernels.simd import I64, kernel, target

FUNCTIONS = {"sigmoid": sigmoid, "tanh": tanh}
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
# Error in units of the last place.  Measured: float32 2.212 and 2.498, in the tail 5.384; float64 1.653 and 2.503.
WORST_ULP = {("sigmoid", F32): 2.3, ("tanh", F32): 2.7, ("sigmoid", F64): 1.8, ("tanh", F64): 2.7}
SIGMOID_TAIL_ULP = 5.5  # float32, below -16


@cache
def apply(name: str, dtype: np.dtype[Any]) -> Callable[[Any, Any], None]:
    """Return a compiled function (x, out) for arrays whose size is a multiple of the lanes."""
    function, lanes = FUNCTIONS[name], target().lanes(dtype)

    def emit(b: Any, variant: None, x: Any, out: Any, count: Any) -> None:
        def body(k: Any, carried: list[Any]) -> list[Any]:
            at = b.ir.mul(k, I64(lanes))
            (b.pointer(out) + at).store(function((b.pointer(x) + at).load(lanes)).value())
            return carried

        b.loop(count, body)

    call = kernel(dtype, f"test_{name}", 3, emit, {0: None})

    @numba.njit(nogil=True)  # type: ignore[untyped-decorator]
    def run(x, out):  # type: ignore[no-untyped-def]
        table = np.zeros(4, np.int64)
        table[1] = x.ctypes.data
        table[2] = out.ctypes.data
        table[3] = x.size // lanes
        call(table.ctypes.data)
        table[0] = 0  # it lives until here

    return run  # type: ignore[no-any-return]


def evaluate(name: str, x: Any) -> Any:
    """Return the function of an array of any size."""
    lanes = target().lanes(x.dtype)
    padded = np.zeros(-(-x.size // lanes) * lanes, x.dtype)
    padded[: x.size] = x.ravel()
    out = np.full_like(padded, np.nan)
    apply(name, x.dtype)(padded, out)
    return out[: x.size].reshape(x.shape)


# Every float32

CHUNK = 1 << 20  # divides 2^23: the floats of a chunk have one exponent
SMALLEST_NORMAL = 2.0**-126


@numba.njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _exact_sigmoid(x, exact):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        exact[i] = 1 / (1 + math.exp(-x[i]))


@numba.njit(nogil=True, error_model="numpy")  # type: ignore[untyped-decorator]
def _exact_tanh(x, exact):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        exact[i] = math.tanh(x[i])


@numba.njit(nogil=True, error_model="numpy", fastmath=True)  # type: ignore[untyped-decorator]
def _exact_tiny(x, exact, start, slope, cubic):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        exact[i] = start + x[i] * (slope + cubic * x[i] * x[i])


@numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "nsz"})  # type: ignore[untyped-decorator]
def _errors(out, exact):  # type: ignore[no-untyped-def]
    """Return the worst error in ulp where the exact result is normal, and the worst absolute one where it is not."""
    worst = tiny = 0.0
    for i in range(out.size):
        error = abs(np.float64(out[i]) - exact[i])
        magnitude = abs(exact[i])
        # 2^-e by way of the bits, where 2^e <= magnitude < 2^(e + 1): the spacing of float32 there is 2^(e - 23)
        scale = np.int64((0x7FE << 52) - (np.float64(magnitude).view(np.int64) & (0x7FF << 52))).view(np.float64)
        error_ulp = error * scale * 2.0**23 if magnitude >= SMALLEST_NORMAL else 0.0
        error_tiny = error if magnitude < SMALLEST_NORMAL else 0.0
        worst = error_ulp if not error_ulp <= worst else worst
        tiny = error_tiny if not error_tiny <= tiny else tiny
    return worst, tiny


def sweep(name: str, first: int) -> tuple[float, float]:
    """Check the floats whose bits are first to first + CHUNK; return the errors."""
    x = np.arange(first, first + CHUNK, dtype=np.uint32).view(np.float32)
    out = np.full_like(x, 7)
    apply(name, F32)(x, out)
    if np.isnan(x[-1]):
        nan = np.isnan(x)
        assert np.isnan(out[nan]).all()
        x, out = x[~nan], out[~nan]
        if not x.size:
            return 0.0, 0.0
    exact = np.empty(x.size)
    if abs(x[0]) >= 128:
        exact[:] = np.sign(x) if name == "tanh" else x > 0
    elif abs(x[0]) < 2.0**-12:
        # The next terms are x^5 / 480 and 2 x^5 / 15: below 2^-50 of the sum.
        _exact_tiny(x.astype(np.float64), exact, *((0.0, 1.0, -1 / 3) if name == "tanh" else (0.5, 0.25, -1 / 48)))
    else:
        (_exact_tanh if name == "tanh" else _exact_sigmoid)(x.astype(np.float64), exact)
    low, high = out.min(), out.max()
    assert (-1 if name == "tanh" else 0) <= low <= high <= 1
    if name == "tanh":
        assert (np.signbit(out) == np.signbit(x)).all()
    return _errors(out, exact)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_float32(name: str) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = range(0, 1 << 32, CHUNK)
        results = np.array(list(pool.map(lambda first: sweep(name, first), starts)))
    first = np.arange(0, 1 << 32, CHUNK, dtype=np.uint32).view(np.float32)
    # Towards the end of the range of e^-x the one rounded ln 2 tells: up to 2 ulp in the exponent.
    tail = first <= -16 if name == "sigmoid" else np.zeros(first.shape, bool)
    for where, bound in ((~tail, WORST_ULP[name, F32]), (tail, SIGMOID_TAIL_ULP)):
        worst = results[where, 0].max(initial=0)
        print(f"{name}: {worst:.3f} ulp")
        assert worst <= bound
    # A sigmoid below the normal numbers may be 0, as 1 + e^-x overflows; tanh keeps them.
    assert results[:, 1].max() <= (SMALLEST_NORMAL / 2 if name == "sigmoid" else 0)


# float64


def exact_decimal(name: str, x: float) -> Decimal:
    """Return the function to 60 digits."""
    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 60, -99999, 99999
        if name == "sigmoid":
            return 1 / (1 + (-Decimal(x)).exp())
        if abs(x) < 1e-8:  # the next term is 2 x^5 / 15
            return Decimal(x) - Decimal(x) ** 3 / 3
        e = (2 * Decimal(x)).exp()
        return (e - 1) / (e + 1)


def ulps(name: str, x: float, y: float) -> float:
    """Return the error of y in units of the spacing of float64 at the exact value."""
    exact = exact_decimal(name, x)
    with localcontext() as context:
        context.prec = 60
        return float(abs(Decimal(y) - exact) / Decimal(math.ulp(float(exact))))


def dense_float64() -> Any:
    rng = np.random.default_rng(0)
    ties = (np.arange(-60, 60) + 0.5) * np.log(2)  # ends of the reduced interval, of both functions
    around = (ties[:, None] * (1 + np.arange(-2, 3) * 2.0**-52)).ravel()
    spread = [np.ldexp(rng.uniform(-1, 1, 3000), rng.integers(-60, 7, 3000)), rng.uniform(-8, 8, 6000)]
    return np.concatenate([*spread, rng.uniform(-45, 45, 2000), rng.uniform(-700, 700, 1000), around, around / 2])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_against_decimal_arithmetic(name: str) -> None:
    x = dense_float64()
    y = evaluate(name, x)
    worst = max(map(ulps, [name] * x.size, x, y))
    print(f"{name}: {worst:.3f} ulp")
    assert worst <= WORST_ULP[name, F64]


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is no wider than float64 here")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_float64_against_longdouble(name: str) -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [rng.uniform(-20, 20, 300_000), np.ldexp(rng.uniform(-1, 1, 200_000), rng.integers(-30, 9, 200_000))]
    )
    y, wide = evaluate(name, x), x.astype(np.longdouble)
    exact = np.tanh(wide) if name == "tanh" else 1 / (1 + np.exp(-wide))
    error = np.abs(y - exact) / np.spacing(np.abs(exact).astype(np.float64))
    print(f"{name}: {float(error.max()):.3f} ulp")
    assert error.max() <= WORST_ULP[name, F64]


# Special values


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(
    ("name", "x", "expected"),
    [
        ("sigmoid", [0.0, -0.0, np.inf, -np.inf, 1e30, -1e30], [0.5, 0.5, 1, 0, 1, 0]),
        ("tanh", [0.0, -0.0, np.inf, -np.inf, 1e30, -1e30], [0.0, -0.0, 1, -1, 1, -1]),
    ],
)
def test_special_values_are_exact(name: str, x: list[float], expected: list[float], dtype: Any) -> None:
    y = evaluate(name, np.array(x, dtype))
    np.testing.assert_array_equal(y, np.array(expected, dtype))
    np.testing.assert_array_equal(np.signbit(y), np.signbit(np.array(expected)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nan_of_any_payload_stays_nan(name: str) -> None:
    payloads = np.uint64(1) << np.arange(52, dtype=np.uint64)
    quiet_and_signalling = np.concatenate([payloads, payloads | np.uint64(1 << 63)]) | np.uint64(0x7FF << 52)
    assert np.isnan(evaluate(name, quiet_and_signalling.view(np.float64))).all()  # float32 has all of its own above


@pytest.mark.parametrize("dtype", BOTH)
def test_denormal_numbers(dtype: Any) -> None:
    info = np.finfo(dtype)
    tiny = info.smallest_subnormal * np.arange(1, 1000, dtype=dtype)
    x = np.concatenate([tiny, -tiny, [info.tiny, -info.tiny, np.nextafter(info.tiny, dtype(0))]]).astype(dtype)
    np.testing.assert_array_equal(evaluate("tanh", x), x)
    assert (evaluate("sigmoid", x) == 0.5).all()


@pytest.mark.parametrize("dtype", BOTH)
def test_functions_saturate_and_never_leave_their_range(dtype: Any) -> None:
    """Beyond where the exact value rounds to the limit, there is nothing but the limit."""
    digits = np.finfo(dtype).nmant + 1
    x = (2 ** np.linspace(-10, np.finfo(dtype).maxexp - 0.1, 200_000)).astype(dtype)
    positive, negative = evaluate("sigmoid", x), evaluate("sigmoid", -x)
    assert (positive <= 1).all()
    assert (negative >= 0).all()
    assert (positive[x > (digits + 2) * np.log(2)] == 1).all()
    assert (negative[x > -np.log(np.finfo(dtype).smallest_subnormal) + 2] == 0).all()
    height = evaluate("tanh", x)
    assert (height <= 1).all()
    assert (height[x > (digits + 3) * np.log(2) / 2] == 1).all()
    np.testing.assert_array_equal(evaluate("tanh", -x), -height)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_rise_but_for_their_rounding(name: str, dtype: Any) -> None:
    """From one value to the next of a fine grid, a fall is at most the two errors together."""
    x = np.linspace(-30, 30, 1_000_001).astype(dtype)
    y = evaluate(name, x)
    falls = np.flatnonzero(y[1:] < y[:-1])
    fall = (y[falls] - y[falls + 1]) / np.spacing(np.abs(y[falls + 1]))
    assert fall.max(initial=0) <= 2 * WORST_ULP[name, np.dtype(dtype)]


# The coefficients, derived again in exact arithmetic

HALF_WIDTH = Fraction(1.0001 * np.log(2.0) / 2)


def exponential_rest(r: Fraction) -> Fraction:
    """Return (e^r - 1 - r) / r^2 for |r| < 1/2 to 2^-200."""
    total = term = Fraction(1, 2)
    for k in range(3, 60):
        term *= r / k
        total += term
    return total


def interpolate(nodes: list[Fraction], values: list[Fraction]) -> list[Fraction]:
    """Return the coefficients of the polynomial through the points, by Newton's divided differences."""
    divided = list(values)
    for order in range(1, len(nodes)):
        for i in reversed(range(order, len(nodes))):
            divided[i] = (divided[i] - divided[i - 1]) / (nodes[i] - nodes[i - order])
    polynomial = [divided[-1]]
    for node, value in zip(reversed(nodes[:-1]), reversed(divided[:-1]), strict=True):
        shifted = [Fraction(0), *polynomial]
        polynomial = [a - node * b for a, b in zip(shifted, [*polynomial, Fraction(0)], strict=True)]
        polynomial[0] += value
    return polynomial


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_coefficients_are_those_of_the_interpolation(dtype: Any) -> None:
    listed = CONSTANTS[dtype].coefficients
    n = len(listed)
    nodes = [Fraction(float(HALF_WIDTH) * math.cos((2 * i + 1) * math.pi / (2 * n))) for i in range(n)]
    exact = interpolate(nodes, list(map(exponential_rest, nodes)))
    assert [dtype.type(value) for value in listed] == [dtype.type(float(value)) for value in exact]


@pytest.mark.parametrize(("dtype", "documented"), [(F32, -25), (F64, -54)], ids=str)
def test_polynomial_is_as_exact_as_documented(dtype: Any, documented: int) -> None:
    """Relative error of q = e^r - 1 from the coefficients alone, as the kernel has them, all else exact."""
    coefficients = [Fraction(float(dtype.type(value))) for value in CONSTANTS[dtype].coefficients]
    worst = Fraction(0)
    for i in range(-300, 301):
        r = HALF_WIDTH * i / 300
        if r:
            polynomial = sum((c * r**k for k, c in enumerate(coefficients)), Fraction(0))
            exact = exponential_rest(r)
            worst = max(worst, abs((polynomial - exact) * r / (1 + r * exact)))
    assert documented - 1 < math.log2(worst) < documented


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_ln2_is_split_exactly(dtype: Any) -> None:
    """ln2_high has so many zero bits at its end that n * ln2_high is exact, and the two parts make ln 2."""
    constants = CONSTANTS[dtype]
    high, low = Fraction(constants.ln2_high), Fraction(constants.ln2_low)
    for n in range(-constants.exponent_bias - 1, constants.exponent_bias + 2):
        assert Fraction(float(dtype.type(float(n * high)))) == n * high
    with localcontext() as context:
        context.prec = 60
        error = abs(Fraction(Decimal(2).ln()) - high - Fraction(float(dtype.type(low))))
    assert error * (constants.exponent_bias + 1) < Fraction(float(np.finfo(dtype).eps)) / 1000
