"""Losses against their equations, the complex step and PyTorch; what is masked has no effect; bad arguments."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from conftest import BOTH
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlstm.losses import huber, mse, softmax_cross_entropy

STEP = 1e-100  # of the complex step
SHAPES = [(1,), (5,), (3, 1), (4, 7), (5, 3, 2), (2, 1, 3, 11), (101, 17)]


def draw(shape: Any, dtype: Any = np.float64, seed: int = 0, scale: float = 2.0) -> Any:
    return (scale * np.random.default_rng(seed).normal(size=shape)).astype(dtype)


def draw_mask(shape: Any, seed: int = 0) -> Any:
    mask = np.array(np.random.default_rng(seed).random(shape[:-1]) < 0.6)
    mask[(0,) * mask.ndim] = True
    return mask


def draw_classes(shape: Any, ignored: int = -100, seed: int = 0) -> Any:
    """Draw classes, among them `ignored`; the first row is always of class 0."""
    classes = np.array(np.random.default_rng(seed).integers(shape[-1], size=shape[:-1]))
    classes[(0,) * classes.ndim] = 0
    return np.where(draw_mask(shape, seed), classes, ignored)


# Equations; they take complex numbers, for the complex step


def mse_equation(p: Any, y: Any, mask: Any) -> Any:
    return np.mean((p - y)[mask] ** 2)


def huber_equation(p: Any, y: Any, mask: Any, delta: float) -> Any:
    e = (p - y)[mask]
    size = np.where(e.real < 0, -e, e)
    return np.mean(np.where(size.real < delta, e**2 / 2, delta * (size - delta / 2)))


def cross_entropy_equation(z: Any, classes: Any, ignored: int = -100) -> Any:
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    kept = classes != ignored
    return -np.mean(log_p[kept][np.arange(kept.sum()), classes[kept]])


def complex_step(equation: Any, x: Any) -> Any:
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[index] += STEP * 1j
        gradient[index] = equation(moved).imag / STEP
    return gradient


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("delta", [None, 0.3, 1.0, 5.0])
def test_regression_is_its_equation(shape: Any, masked: bool, delta: float | None) -> None:
    p, y = draw(shape), draw(shape, seed=1)
    mask = draw_mask(shape) if masked else None
    rows = np.ones(shape[:-1], bool) if mask is None else mask

    def equation(x: Any) -> Any:
        return mse_equation(x, y, rows) if delta is None else huber_equation(x, y, rows, delta)

    loss, d_p = mse(p, y, mask=mask) if delta is None else huber(p, y, delta, mask=mask)
    assert type(loss) is float
    assert loss == pytest.approx(equation(p), rel=1e-14)
    np.testing.assert_allclose(d_p, complex_step(equation, p), rtol=1e-14)


@pytest.mark.parametrize("shape", SHAPES[:-1], ids=str)
@pytest.mark.parametrize("ignored", [-100, 1, -1])
def test_cross_entropy_is_its_equation(shape: Any, ignored: int) -> None:
    z, classes = draw(shape), draw_classes(shape, ignored)
    loss, d_z = softmax_cross_entropy(z, classes, ignored)
    assert type(loss) is float
    assert loss == pytest.approx(cross_entropy_equation(z, classes, ignored), rel=1e-14, abs=1e-15)
    # softmax - 1 cancels, in the complex step too
    np.testing.assert_allclose(d_z, complex_step(lambda x: cross_entropy_equation(x, classes, ignored), z), atol=1e-15)


# PyTorch


def assert_as_in_pytorch(ours: Any, compute: Any, x: Any) -> None:
    """Compare loss and gradient with autograd's; each is a handful of roundings and, in PyTorch, a sum in its dtype."""
    torch = pytest.importorskip("torch")
    theirs = torch.tensor(x, requires_grad=True)
    expected = compute(theirs)
    expected.backward()
    loss, d_x = ours
    eps = float(np.finfo(x.dtype).eps)
    assert type(loss) is float
    assert loss == pytest.approx(expected.item(), rel=20 * eps, abs=20 * eps, nan_ok=True)
    assert (d_x.dtype, d_x.shape) == (x.dtype, x.shape)
    d_expected = theirs.grad.numpy()
    np.testing.assert_allclose(d_x, d_expected, rtol=10 * eps, atol=2 * eps * np.abs(d_expected).max(initial=0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", BOTH)
def test_losses_are_those_of_pytorch(shape: Any, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    p, y, mask = draw(shape, dtype), draw(shape, dtype, seed=1), draw_mask(shape)
    target, rows = torch.tensor(y), torch.tensor(mask)
    assert_as_in_pytorch(mse(p, y), lambda x: functional.mse_loss(x, target), p)
    assert_as_in_pytorch(mse(p, y, mask=mask), lambda x: functional.mse_loss(x[rows], target[rows]), p)
    for delta in (0.5, 1, 3.0):
        assert_as_in_pytorch(huber(p, y, delta), lambda x, d=delta: functional.huber_loss(x, target, delta=d), p)
    assert_as_in_pytorch(
        huber(p, y, mask=mask), lambda x: functional.huber_loss(x[rows], target[rows], reduction="mean"), p
    )
    for ignored in (-100, 1):
        classes = draw_classes(shape, ignored)
        labels = torch.tensor(classes)
        assert_as_in_pytorch(
            softmax_cross_entropy(p, classes, ignored),
            lambda x, n=ignored, k=labels: functional.cross_entropy(
                x.reshape(-1, x.shape[-1]), k.reshape(-1), ignore_index=n
            ),
            p,
        )


@pytest.mark.parametrize("dtype", BOTH)
def test_nothing_that_counts_is_nan_as_in_pytorch(dtype: Any) -> None:
    x = draw((3, 4), dtype)
    no_rows = np.zeros(3, bool)
    for loss, d_x in (
        mse(x, x + 1, mask=no_rows),
        huber(x, x + 1, mask=no_rows),
        softmax_cross_entropy(x, np.full(3, -100)),
        mse(x[:0], x[:0]),
        huber(x[:, :0], x[:, :0]),
        softmax_cross_entropy(x[:0], []),
    ):
        assert np.isnan(loss)
        assert d_x.dtype == dtype
        assert not d_x.any()
    torch = pytest.importorskip("torch")
    labels = torch.full((3,), -100)
    assert_as_in_pytorch(
        softmax_cross_entropy(x, labels.numpy()), lambda z: torch.nn.functional.cross_entropy(z, labels), x
    )


# Padding


@pytest.mark.parametrize("loss", [mse, huber])
@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("dtype", BOTH)
def test_padding_has_no_effect(loss: Any, junk: float, dtype: Any) -> None:
    T, N, P = 7, 4, 3
    lengths = np.array([7, 0, 3, 5])
    mask = np.arange(T)[:, None] < lengths
    p, y = draw((T, N, P), dtype), draw((T, N, P), dtype, seed=1)
    clean = loss(p, y, mask=mask)
    p[~mask], y[~mask] = junk, -junk
    value, d_p = loss(p, y, mask=mask)
    assert value == clean[0]
    assert d_p.tobytes() == clean[1].tobytes()
    assert not d_p[~mask].any()
    assert value == pytest.approx(loss(p[mask], y[mask])[0], rel=1e-14)


@pytest.mark.parametrize("junk", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", BOTH)
def test_ignored_rows_have_no_effect(junk: float, dtype: Any) -> None:
    z, classes = draw((6, 3, 5), dtype), draw_classes((6, 3, 5))
    clean = softmax_cross_entropy(z, classes)
    z[classes == -100] = junk
    loss, d_z = softmax_cross_entropy(z, classes)
    assert loss == clean[0]
    assert d_z.tobytes() == clean[1].tobytes()
    assert not d_z[classes == -100].any()


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1), (1, 4), (3, 4)], ids=str)
def test_mask_broadcasts(shape: Any) -> None:
    p, y = draw((3, 4, 2)), draw((3, 4, 2), seed=1)
    mask = np.random.default_rng(3).random(shape) < 0.7
    assert mask.any()
    whole = mse(p, y, mask=np.broadcast_to(mask, (3, 4)))
    loss, d_p = mse(p, y, mask=mask)
    assert loss == whole[0]
    np.testing.assert_array_equal(d_p, whole[1])
    assert loss == pytest.approx(mse_equation(p, y, np.broadcast_to(mask, (3, 4))))


# NaN, infinity, and sizes beyond a dtype


@pytest.mark.parametrize("loss", [mse, huber])
def test_nan_propagates_to_its_own_entry(loss: Any) -> None:
    p, y = draw((3, 2)), draw((3, 2), seed=1)
    clean = loss(p, y)[1]
    p[1, 0] = np.nan
    value, d_p = loss(p, y)
    assert np.isnan(value)
    assert np.isnan(d_p[1, 0])
    d_p[1, 0] = clean[1, 0]
    np.testing.assert_array_equal(d_p, clean)


def test_nan_logits_stay_in_their_row() -> None:
    z, classes = draw((3, 4)), np.array([0, 1, 2])
    clean = softmax_cross_entropy(z, classes)[1]
    z[1, 3] = np.nan
    loss, d_z = softmax_cross_entropy(z, classes)
    assert np.isnan(loss)
    assert np.isnan(d_z[1]).all()
    np.testing.assert_array_equal(d_z[[0, 2]], clean[[0, 2]])


def test_errors_beyond_float32_are_squared_in_float64() -> None:
    p, y = np.array([1e30, 0], np.float32), np.zeros(2, np.float32)
    loss, d_p = mse(p, y)
    assert loss == pytest.approx(5e59)
    assert d_p.dtype == np.float32
    np.testing.assert_array_equal(d_p, p)
    loss, d_p = huber(p, y)
    assert loss == pytest.approx(5e29)
    np.testing.assert_array_equal(d_p, np.array([0.5, 0], np.float32))
    loss, d_p = mse(np.array([3e38], np.float32), np.array([-3e38], np.float32))
    assert (loss, d_p) == (np.inf, np.inf)


@pytest.mark.parametrize("dtype", BOTH)
def test_softmax_neither_overflows_nor_underflows(dtype: Any) -> None:
    z = np.array([[1e4, 0.0], [1e4, 0.0], [-1e4, -1e4], [-np.inf, 0.0]], dtype)
    loss, d_z = softmax_cross_entropy(z, [0, 1, 0, 1])
    assert loss == pytest.approx((0 + 1e4 + np.log(2) + 0) / 4, rel=1e-6)
    np.testing.assert_array_equal(d_z * 4, [[0, 0], [1, -1], [-0.5, 0.5], [0, 0]])
    assert softmax_cross_entropy(z[3:], [0])[0] == np.inf


@settings(deadline=None)
@given(shift=st.floats(-1e3, 1e3), shape=st.tuples(st.integers(1, 5), st.integers(1, 6)), seed=st.integers(0, 2**32))
def test_softmax_knows_differences_alone(shift: float, shape: Any, seed: int) -> None:
    z, classes = draw(shape, seed=seed), draw_classes(shape, seed=seed)
    loss, d_z = softmax_cross_entropy(z, classes)
    shifted_loss, d_shifted = softmax_cross_entropy(z + shift, classes)
    limit = 4e-16 * (abs(shift) + 10)  # z + shift is rounded, to eps / 2 of its size, once for each of two logits
    assert abs(shifted_loss - loss) <= limit
    np.testing.assert_allclose(d_shifted, d_z, atol=limit)
    np.testing.assert_allclose(d_z.sum(axis=-1), 0, atol=1e-15)


# Arguments


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4", ">f8"])
def test_gradient_has_shape_and_dtype_of_the_prediction(dtype: Any) -> None:
    x = draw((6, 4, 10)).astype(dtype)
    x.flags.writeable = False
    strided = x[::2, :, ::2]
    native = np.dtype(np.dtype(dtype).type)
    for array in (x, strided, np.asfortranarray(x)):
        for target in (np.zeros(array.shape, np.float32), np.zeros(array.shape, np.int8), np.zeros(array.shape)):
            for call in (mse, huber):
                loss, d = call(array, target)
                assert (d.shape, d.dtype) == (array.shape, native)
                assert loss == call(np.array(array, native, order="C"), target)[0]
        loss, d = softmax_cross_entropy(array, np.zeros(array.shape[:-1], np.uint8))
        assert (d.shape, d.dtype) == (array.shape, native)


ONES = np.ones((3, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mse(ONES.astype(int), ONES), TypeError, "`prediction` must be of float32 or float64, got int64"),
        (lambda: mse(ONES.astype("f2"), ONES), TypeError, "`prediction` must be of float32 or float64, got float16"),
        (lambda: mse(None, ONES), TypeError, "`prediction` must be of float32 or float64, got object"),
        (lambda: mse([[1.0], [1.0, 2.0]], ONES), ValueError, "`prediction` cannot be made an array"),
        (lambda: mse(1.0, 1.0), ValueError, "`prediction` must have at least one axis, got shape ()"),
        (
            lambda: mse(ONES, ONES[:, :1]),
            ValueError,
            "`target` must have shape (3, 2), that of `prediction`, got (3, 1)",
        ),
        (lambda: mse(ONES, ONES[0]), ValueError, "`target` must have shape (3, 2), that of `prediction`, got (2,)"),
        (lambda: mse(ONES, 1.0), ValueError, "`target` must have shape (3, 2), that of `prediction`, got ()"),
        (lambda: mse(ONES, ONES * 1j), TypeError, "`target` must be of a dtype that casts to float64"),
        (lambda: mse(ONES, ONES, mask=ONES[:, 0]), TypeError, "`mask` must be booleans, got float64"),
        (lambda: mse(ONES, ONES, mask=[1, 0, 1]), TypeError, "`mask` must be booleans, got int64"),
        (lambda: mse(ONES, ONES, mask=[True, False]), ValueError, "`mask` must broadcast to (3,)"),
        (lambda: mse(ONES, ONES, mask=ONES > 0), ValueError, "`mask` must broadcast to (3,)"),
        (lambda: huber(ONES, ONES[0]), ValueError, "`target` must have shape (3, 2)"),
        (lambda: huber(ONES, ONES, 0), ValueError, "`delta` must be in (0, inf), got 0.0"),
        (lambda: huber(ONES, ONES, np.inf), ValueError, "`delta` must be in (0, inf), got inf"),
        (lambda: huber(ONES, ONES, np.nan), ValueError, "`delta` must be in (0, inf), got nan"),
        (lambda: huber(ONES, ONES, None), TypeError, "`delta` must be a number, got NoneType"),
        (lambda: softmax_cross_entropy(ONES.astype(int), [0] * 3), TypeError, "`logits` must be of float32 or float64"),
        (lambda: softmax_cross_entropy(1.0, 0), ValueError, "`logits` must have at least one axis"),
        (
            lambda: softmax_cross_entropy(ONES[:, :0], [0] * 3),
            ValueError,
            "`logits` must have shape (..., C) with C at",
        ),
        (lambda: softmax_cross_entropy(ONES, [0, 1]), ValueError, "`target` must have shape (3,), that of `logits`"),
        (lambda: softmax_cross_entropy(ONES, ONES), TypeError, "`target` must be integers, got float64"),
        (lambda: softmax_cross_entropy(ONES, [True] * 3), TypeError, "`target` must be integers, got bool"),
        (lambda: softmax_cross_entropy(ONES, [0, 2, 0]), ValueError, "0..C-1 with C = 2, or -100 to ignore, got 2"),
        (lambda: softmax_cross_entropy(ONES, [0, -1, 0]), ValueError, "0..C-1 with C = 2, or -100 to ignore, got -1"),
        (lambda: softmax_cross_entropy(ONES, [0, 1, -100], 1), ValueError, "or 1 to ignore, got -100"),
        (lambda: softmax_cross_entropy(ONES, [0] * 3, 1.0), TypeError, "`ignore_index` must be an integer, got float"),
        (lambda: softmax_cross_entropy(ONES, [0] * 3, 1 << 63), ValueError, "`ignore_index` must be at most"),
    ],
)
def test_bad_arguments(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


@pytest.mark.parametrize("wrap", [np.array, np.ma.array])
def test_arguments_are_not_modified(wrap: Any) -> None:
    p, y, mask, classes = wrap(draw((5, 3))), wrap(draw((5, 3), seed=1)), draw_mask((5, 3)), draw_classes((5, 3))
    before = [np.array(value) for value in (p, y, mask, classes)]
    mse(p, y, mask=mask)
    huber(p, y, mask=mask)
    softmax_cross_entropy(p, classes)
    for value, kept in zip((p, y, mask, classes), before, strict=True):
        np.testing.assert_array_equal(value, kept)
