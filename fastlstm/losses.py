"""Losses: each returns its value and its gradient, the `d_output` of `tape.backward`.

A loss is the mean over the entries that count, as in PyTorch. Where none counts it is NaN and its gradient is zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastlstm.checks import as_array, as_bools, as_indices, as_number, as_size, check_shape, to_numpy

__all__ = ["huber", "mse", "softmax_cross_entropy"]

Array = NDArray[Any]


def mse(prediction: ArrayLike, target: ArrayLike, *, mask: ArrayLike | None = None) -> tuple[float, Array]:
    """Return the mean squared error and its gradient.

    Parameters
    ----------
    prediction : array_like, (..., P)
        float32 or float64.
    target : array_like, (..., P)
        Of the same shape; cast to the prediction's dtype where NumPy's `same_kind` rule allows.
    mask : array_like of bool, broadcastable to (...), optional
        Which rows count. What the others hold, NaN too, has no effect, and their gradient is zero. For sequences padded
        to T steps it is `np.arange(T)[:, None] < lengths`.

    Returns
    -------
    loss : float
        Summed in float64.
    d_prediction : ndarray, (..., P)
        Of the prediction's dtype.

    Raises
    ------
    TypeError
        If `prediction` is not of float32 or float64, `target` is of a dtype that does not cast, or `mask` not of bool.
    ValueError
        If a shape is wrong; `target` is not broadcast.

    Notes
    -----
    loss = sum(e^2) / K with e = prediction - target, K numbers that count; d = 2 e / K.

    Examples
    --------
    >>> from fastlstm.losses import mse
    >>> mse([[1.0, 2.0], [3.0, 9.0]], [[1.0, 4.0], [3.0, 5.0]], mask=[True, False])
    (2.0, array([[ 0., -2.],
           [ 0.,  0.]]))
    """
    error, count = _check_regression(prediction, target, mask)
    with np.errstate(all="ignore"):
        return _mean(np.square(error, dtype=np.float64), count), error * (2 / max(count, 1))


def huber(
    prediction: ArrayLike, target: ArrayLike, delta: float = 1.0, *, mask: ArrayLike | None = None
) -> tuple[float, Array]:
    """Return the mean Huber loss, quadratic for small errors and linear for large ones, and its gradient.

    Parameters
    ----------
    prediction, target, mask
        As for `mse`.
    delta : float, default 1.0
        Error from which on the loss is linear; above 0.

    Returns
    -------
    loss : float
        Summed in float64.
    d_prediction : ndarray, (..., P)
        Of the prediction's dtype.

    Raises
    ------
    TypeError, ValueError
        As for `mse`, and where `delta` is not a number above 0.

    Notes
    -----
    loss = sum(q (abs(e) - q / 2)) / K with e = prediction - target, q = min(abs(e), delta), K numbers that count;
    d = clip(e, -delta, delta) / K. Huber 1964, *Robust estimation of a location parameter*.

    Examples
    --------
    >>> from fastlstm.losses import huber
    >>> huber([1.0, 5.0], [0.0, 0.0], delta=2.0)
    (4.25, array([0.5, 1. ]))
    """
    delta = as_number("delta", delta, "(0, inf)")
    error, count = _check_regression(prediction, target, mask)
    with np.errstate(all="ignore"):
        size = np.abs(error, dtype=np.float64)
        q = np.minimum(size, delta)
        return _mean(q * (size - q / 2), count), np.clip(error, -delta, delta) * (1 / max(count, 1))


def softmax_cross_entropy(logits: ArrayLike, target: ArrayLike, ignore_index: int = -100) -> tuple[float, Array]:
    """Return the mean cross entropy between the softmax of the logits and the classes, and its gradient.

    Parameters
    ----------
    logits : array_like, (..., C)
        float32 or float64; classes are on the last axis.
    target : array_like of int, (...)
        The class of each row, in 0..C-1, or `ignore_index`.
    ignore_index : int, default -100
        Rows with this target do not count: what their logits are, NaN too, has no effect, and their gradient is zero.

    Returns
    -------
    loss : float
        In nats; summed in float64.
    d_logits : ndarray, (..., C)
        Of the logits' dtype.

    Raises
    ------
    TypeError
        If `logits` is not of float32 or float64, or `target` or `ignore_index` is not integers.
    ValueError
        If a shape is wrong, there is no class, or a target is neither a class nor `ignore_index`.

    Notes
    -----
    loss = sum(log(sum(exp(z))) - z[target]) / K, over K rows that count; d = (softmax(z) - onehot(target)) / K. The
    largest logit of a row is subtracted first, so that no exponential overflows.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.losses import softmax_cross_entropy
    >>> loss, d_logits = softmax_cross_entropy(np.log([[1.0, 3.0], [1.0, 1.0]]), [0, -100])
    >>> bool(np.isclose(loss, np.log(4))), d_logits
    (True, array([[-0.75,  0.75],
           [ 0.  ,  0.  ]]))
    """
    z, classes = _as_prediction("logits", logits), as_indices("target", target)
    ignored = as_size("ignore_index", ignore_index, least=-(1 << 63), most=(1 << 63) - 1)
    num_classes = z.shape[-1]
    if num_classes == 0:
        raise ValueError(f"`logits` must have shape (..., C) with C at least 1, got {z.shape}")
    check_shape("target", classes, z.shape[:-1], ", that of `logits` without its last axis")
    counts = classes != ignored
    wrong = classes[counts & ((classes < 0) | (classes >= num_classes))]
    if wrong.size:
        raise ValueError(
            f"`target` must be classes in 0..C-1 with C = {num_classes}, or {ignored} to ignore, got {wrong[0]}"
        )
    z, classes = z[counts], classes[counts]
    rows = np.arange(len(z))
    with np.errstate(all="ignore"):
        shifted = z - z.max(axis=-1, keepdims=True)
        exponentials = np.exp(shifted)
        totals = exponentials.sum(axis=-1, keepdims=True)
        loss = _mean(np.log(totals[:, 0], dtype=np.float64) - shifted[rows, classes], len(z))
        d_z = exponentials / totals
        d_z[rows, classes] -= 1
        d_logits = np.zeros((*counts.shape, num_classes), z.dtype)
        d_logits[counts] = d_z * (1 / max(len(z), 1))
    return loss, d_logits


def _as_prediction(name: str, value: object) -> Array:
    """Return an array of float32 or float64 with at least one axis."""
    array = to_numpy(name, value)
    if array.dtype.type not in (np.float32, np.float64):
        raise TypeError(f"`{name}` must be of float32 or float64, got {array.dtype}")
    if array.ndim == 0:
        raise ValueError(f"`{name}` must have at least one axis, got shape ()")
    return as_array(name, array, np.dtype(array.dtype.type))


def _check_regression(prediction: object, target: object, mask: object) -> tuple[Array, int]:
    """Return the errors, zero where they do not count, and how many do."""
    p = _as_prediction("prediction", prediction)
    y = as_array("target", target, p.dtype)
    check_shape("target", y, p.shape, ", that of `prediction`")
    with np.errstate(all="ignore"):
        error = p - y
    if mask is None:
        return error, error.size
    counts = as_bools("mask", mask)
    try:
        counts = np.broadcast_to(counts, p.shape[:-1])
    except ValueError:
        raise ValueError(
            f"`mask` must broadcast to {p.shape[:-1]}, the shape of `prediction` without its last axis, "
            f"got {counts.shape}"
        ) from None
    return np.where(counts[..., None], error, p.dtype.type(0)), int(np.count_nonzero(counts)) * p.shape[-1]


def _mean(losses: Array, count: int) -> float:
    return float(losses.sum() / count) if count else float("nan")
