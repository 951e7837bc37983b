"""The LSTM in plain NumPy, forward and backward: the specification that every kernel must agree with.

Dimensions
    T steps, N batch, I input size of the layer, H hidden size, P output size (H where there is no projection),
    L layers, D directions (1 or 2). Everything is time-major. Gates are stacked in the order i, f, g, o.

One step of one direction of one layer
    ::

        z = x W_ih^T + b_ih + h W_hh^T + b_hh                 (N, 4H): z_i, z_f, z_g, z_o
        i, f, g, o = sigmoid(z_i), sigmoid(z_f), tanh(z_g), sigmoid(z_o)
        c' = f * c + i * g                                    (N, H)
        m' = o * tanh(c')                                     (N, H)
        h' = m' W_hr^T, or m' where there is no projection    (N, P)

    The cell is that of Hochreiter and Schmidhuber [1]_ with the forget gate of Gers et al. [2]_ and the projection of
    Sak et al. [3]_. The second direction runs the same step from the last valid step of a row to its first. Layer
    ``k + 1`` reads the outputs of layer ``k``, the two directions side by side. In ``h_n``, ``c_n``, ``h_0``, ``c_0``
    index ``k * D + direction`` belongs to that layer and direction.

Parameters are a mapping with PyTorch's names and shapes, for each layer ``k``, with ``_reverse`` appended for the
second direction; the sizes of the network are read off it
    ::

        weight_ih_l{k}            (4H, I)
        weight_hh_l{k}            (4H, P)
        bias_ih_l{k}, bias_hh_l{k}    (4H,)     absent where there is no bias
        weight_hr_l{k}            (P, H)    absent where there is no projection

A gradient has the name of its variable with ``d_`` in front. Arguments are not checked here: the layer does that.

References
----------
.. [1] S. Hochreiter and J. Schmidhuber, "Long short-term memory", Neural Computation 9(8), 1997.
.. [2] F. A. Gers, J. Schmidhuber and F. Cummins, "Learning to forget: continual prediction with LSTM",
   Neural Computation 12(10), 2000.
.. [3] H. Sak, A. Senior and F. Beaufays, "Long short-term memory recurrent neural network architectures for large
   scale acoustic modeling", Interspeech, 2014.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Forward", "Gradients", "Saved", "backward", "forward", "sigmoid"]

Array = NDArray[Any]
Bool = NDArray[np.bool_]


class Forward(NamedTuple):
    """Result of `forward`."""

    output: Array
    """(T, N, D*P), outputs of the last layer."""
    state: tuple[Array, Array]
    """``h_n`` (L*D, N, P) and ``c_n`` (L*D, N, H), the state after the last valid step of each row."""
    saved: Saved
    """What `backward` needs."""


class Gradients(NamedTuple):
    """Result of `backward`."""

    x: Array
    """(T, N, I), zero past the length of a row."""
    state: tuple[Array, Array]
    """``d_h_0`` (L*D, N, P) and ``d_c_0`` (L*D, N, H)."""
    params: dict[str, Array]
    """A gradient for each parameter, under the same name and of the same shape."""


class Saved(NamedTuple):
    """What `forward` leaves for `backward`."""

    names: list[str]  # of the parameters
    dropout_masks: list[Array] | None
    valid: Bool | None  # (T, N)
    directions: list[_Direction]


class _Weights(NamedTuple):
    """The parameters of one direction of one layer."""

    ih: Array  # (4H, I)
    hh: Array  # (4H, P)
    bias: Array  # (4H,), b_ih + b_hh
    hr: Array | None  # (P, H)


class _Direction(NamedTuple):
    """What one direction of one layer leaves for its backward."""

    w: _Weights
    reverse: bool
    cut: Bool | None  # (T, N)
    x: Array  # (T, N, I)
    h_in: Array  # (T, N, P), the state that entered each step
    c_in: Array  # (T, N, H)
    m: Array  # (T, N, H), the outputs before the projection
    gates: list[tuple[Array, ...]]  # i, f, g, o, tanh(c') of the valid rows, in the order of computation


def sigmoid(z: ArrayLike) -> Array:
    """Logistic function 1 / (1 + exp(-z)), accurate in both tails and without warnings.

    Parameters
    ----------
    z : array_like
        Real or complex floating-point values.

    Returns
    -------
    ndarray
        Same shape and dtype as `z`.

    Notes
    -----
    A complex `z` goes through the identity ``sigmoid(z) = (1 + tanh(z / 2)) / 2``, because a complex exponential that
    overflows is not analytic.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.reference import sigmoid
    >>> sigmoid(np.array([-1000.0, 0.0, 1000.0]))
    array([0. , 0.5, 1. ])
    """
    z = np.asarray(z)
    if np.iscomplexobj(z):
        return np.asarray(0.5 + 0.5 * np.tanh(0.5 * z))
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-z)))


def _cell(z: Array, c: Array) -> tuple[Array, Array, tuple[Array, ...]]:
    """Apply the cell: z (N, 4H), c (N, H) -> m' (N, H), c' (N, H), gates."""
    H = c.shape[1]
    i = sigmoid(z[:, :H])
    f = sigmoid(z[:, H : 2 * H])
    g = np.tanh(z[:, 2 * H : 3 * H])
    o = sigmoid(z[:, 3 * H :])
    c_out = f * c + i * g
    tanh_c = np.tanh(c_out)
    return o * tanh_c, c_out, (i, f, g, o, tanh_c)


def _cell_backward(d_m: Array, d_c_out: Array, c: Array, gates: tuple[Array, ...]) -> tuple[Array, Array]:
    """Gradients of `_cell`: d_m' (N, H), d_c' (N, H) -> d_z (N, 4H), d_c (N, H)."""
    i, f, g, o, tanh_c = gates
    d_o = d_m * tanh_c
    d_c_out = d_c_out + d_m * o * (1 - tanh_c * tanh_c)
    d_i, d_f, d_g = d_c_out * g, d_c_out * c, d_c_out * i
    d_z = np.concatenate([d_i * i * (1 - i), d_f * f * (1 - f), d_g * (1 - g * g), d_o * o * (1 - o)], axis=1)
    return d_z, d_c_out * f


def _forward_direction(
    x: Array, h_0: Array, c_0: Array, w: _Weights, reverse: bool, valid: Bool | None, cut: Bool | None
) -> tuple[Array, Array, Array, _Direction]:
    """Run one direction of one layer: x (T, N, I) -> output (T, N, P), h_n (N, P), c_n (N, H), saved.

    ``valid`` (T, N) marks the steps within the length of a row, ``cut`` (T, N) the steps that no state may enter.
    """
    (T, N, I), P, H = x.shape, w.hh.shape[1], w.hh.shape[0] // 4
    h, c = h_0.copy(), c_0.copy()
    output, h_in, c_in, m = (np.zeros((T, N, size), x.dtype) for size in (P, P, H, H))
    gates = []
    z_x = (x.reshape(T * N, I) @ w.ih.T + w.bias).reshape(T, N, 4 * H)
    for t in _order(T, reverse):
        rows = slice(None) if valid is None else valid[t]
        if cut is not None:
            h[cut[t]] = 0
            c[cut[t]] = 0
        h_in[t, rows], c_in[t, rows] = h[rows], c[rows]
        m_t, c[rows], gates_t = _cell(z_x[t, rows] + h[rows] @ w.hh.T, c[rows])
        h[rows] = m_t if w.hr is None else m_t @ w.hr.T
        output[t, rows], m[t, rows] = h[rows], m_t
        gates.append(gates_t)
    return output, h, c, _Direction(w, reverse, cut, x, h_in, c_in, m, gates)


def _backward_direction(
    d_output: Array, d_h_n: Array, d_c_n: Array, saved: _Direction, valid: Bool | None
) -> tuple[Array, Array, Array, _Weights]:
    """Gradients of `_forward_direction`: d_output (T, N, P), d_h_n, d_c_n -> d_x, d_h_0, d_c_0, d_w."""
    w, reverse, cut, x, h_in, c_in, m, gates = saved
    (T, N, I), P, H = x.shape, w.hh.shape[1], w.hh.shape[0] // 4
    d_h, d_c = d_h_n.copy(), d_c_n.copy()
    d_h_out, d_z = np.zeros((T, N, P), x.dtype), np.zeros((T, N, 4 * H), x.dtype)
    for t, gates_t in zip(_order(T, not reverse), reversed(gates), strict=True):
        rows = slice(None) if valid is None else valid[t]
        d_h_out[t, rows] = d_h[rows] + d_output[t, rows]
        d_m = d_h_out[t, rows] if w.hr is None else d_h_out[t, rows] @ w.hr
        d_z[t, rows], d_c[rows] = _cell_backward(d_m, d_c[rows], c_in[t, rows], gates_t)
        d_h[rows] = d_z[t, rows] @ w.hh
        if cut is not None:
            d_h[cut[t]] = 0
            d_c[cut[t]] = 0
    d_z = d_z.reshape(T * N, 4 * H)
    d_w = _Weights(
        ih=d_z.T @ x.reshape(T * N, I),
        hh=d_z.T @ h_in.reshape(T * N, P),
        bias=d_z.sum(axis=0),
        hr=None if w.hr is None else d_h_out.reshape(T * N, P).T @ m.reshape(T * N, H),
    )
    return (d_z @ w.ih).reshape(T, N, I), d_h, d_c, d_w


def forward(
    params: Mapping[str, ArrayLike],
    x: ArrayLike,
    state: tuple[ArrayLike, ArrayLike] | None = None,
    *,
    lengths: ArrayLike | None = None,
    reset: ArrayLike | None = None,
    dropout_masks: Sequence[ArrayLike] | None = None,
) -> Forward:
    """Run the whole network over a batch of sequences.

    Parameters
    ----------
    params : mapping of str to array_like
        Parameters under PyTorch's names; see the top of this module for names and shapes.
    x : array_like, (T, N, I)
        Input, time-major.
    state : pair of array_like, optional
        ``h_0`` (L*D, N, P) and ``c_0`` (L*D, N, H). None is zeros.
    lengths : array_like of int, (N,), optional
        Valid steps of each row, from 0 to T in any order. Steps at and past it are not read, give zeros, and leave the
        state as it is; the reverse direction starts at the last valid step.
    reset : array_like of bool, (T, N), optional
        True cuts the row between steps t-1 and t, in both directions: no state crosses. ``reset[0]`` lies between the
        initial state and the first step of the forward direction. At and past the length of a row it does nothing.
    dropout_masks : sequence of L-1 array_like, (T, N, D*P), optional
        Factors for the outputs of each layer but the last: 0 for a dropped element, 1 / (1 - p) for a kept one.

    Returns
    -------
    Forward
        ``output`` (T, N, D*P), ``state`` = (``h_n`` (L*D, N, P), ``c_n`` (L*D, N, H)), and ``saved`` for `backward`.
        Their dtype is what NumPy's promotion makes of all inputs together, float32 at least; longdouble and complex
        work as well.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.reference import forward
    >>> params = {"weight_ih_l0": np.ones((4, 2)), "weight_hh_l0": np.ones((4, 1))}  # I = 2, H = 1, no bias
    >>> output, (h_n, c_n), saved = forward(params, np.ones((3, 1, 2)))
    >>> output[:, 0, 0].round(4)
    array([0.6083, 0.8726, 0.9353])
    >>> bool(h_n[0, 0, 0] == output[-1, 0, 0])
    True
    """
    dtype = np.result_type(np.float32, *map(np.asarray, (x, *params.values(), *(state or ()))))
    p = {name: np.asarray(value, dtype) for name, value in params.items()}
    layer_x = np.asarray(x, dtype)
    layers = _suffixes(p)
    (T, N, _), L, D = layer_x.shape, len(layers), len(layers[0])
    P, H = p["weight_hh_l0"].shape[1], p["weight_hh_l0"].shape[0] // 4
    h_0, c_0 = (np.zeros((L * D, N, P)), np.zeros((L * D, N, H))) if state is None else state
    h_n, c_n = np.array(h_0, dtype), np.array(c_0, dtype)
    masks = None if dropout_masks is None else [np.asarray(mask, dtype) for mask in dropout_masks]
    valid = None if lengths is None else np.arange(T)[:, None] < np.asarray(lengths)
    if valid is not None:
        layer_x = np.where(valid[:, :, None], layer_x, 0)

    directions: list[_Direction] = []
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN are data
        for layer, suffixes in enumerate(layers):
            if layer and masks is not None:
                layer_x = layer_x * masks[layer - 1]
            outputs = []
            for direction, suffix in enumerate(suffixes):
                k, reverse = layer * D + direction, direction == 1
                output, h_n[k], c_n[k], saved = _forward_direction(
                    layer_x, h_n[k], c_n[k], _weights(p, suffix), reverse, valid, _cut(reset, valid, reverse)
                )
                outputs.append(output)
                directions.append(saved)
            layer_x = np.concatenate(outputs, axis=2)
    return Forward(layer_x, (h_n, c_n), Saved(list(p), masks, valid, directions))


def backward(
    saved: Saved, d_output: ArrayLike | None = None, d_state: tuple[ArrayLike | None, ArrayLike | None] | None = None
) -> Gradients:
    """Propagate gradients of a scalar from the results of `forward` to its inputs.

    Parameters
    ----------
    saved : Saved
        From `forward`. It is not changed and may be used again; it refers to the arrays that `forward` was given, which
        must not have changed since.
    d_output : array_like, (T, N, D*P), optional
        Gradient with respect to the output. None is zeros. Not read past the length of a row.
    d_state : pair of array_like, optional
        Gradients with respect to ``h_n`` (L*D, N, P) and ``c_n`` (L*D, N, H). The pair or either of the two may be
        None, which is zeros.

    Returns
    -------
    Gradients
        ``x`` (T, N, I), ``state`` = (``d_h_0``, ``d_c_0``), and ``params`` with a gradient under the name of each
        parameter.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.reference import backward, forward
    >>> params = {"weight_ih_l0": np.ones((4, 2)), "weight_hh_l0": np.ones((4, 1))}
    >>> output, state, saved = forward(params, np.ones((3, 1, 2)))
    >>> gradients = backward(saved, np.ones_like(output))
    >>> gradients.x.shape, gradients.params["weight_hh_l0"].shape
    ((3, 1, 2), (4, 1))
    """
    names, masks, valid, directions = saved
    layers = _suffixes(names)
    (T, N, P), H, D = directions[0].h_in.shape, directions[0].c_in.shape[2], len(layers[0])
    dtype = directions[0].x.dtype
    d_h_n, d_c_n = (None, None) if d_state is None else d_state
    d_h = np.zeros((len(directions), N, P), dtype) if d_h_n is None else np.array(d_h_n, dtype)
    d_c = np.zeros((len(directions), N, H), dtype) if d_c_n is None else np.array(d_c_n, dtype)
    d_x = np.zeros((T, N, D * P), dtype) if d_output is None else np.asarray(d_output, dtype)

    d_params: dict[str, Array] = {}
    with np.errstate(over="ignore", invalid="ignore"):
        for layer in reversed(range(len(layers))):
            d_outputs, d_x = np.split(d_x, D, axis=2), np.zeros((), dtype)
            for direction, suffix in enumerate(layers[layer]):
                k = layer * D + direction
                d_x_k, d_h[k], d_c[k], d_w = _backward_direction(
                    d_outputs[direction], d_h[k], d_c[k], directions[k], valid
                )
                d_x = d_x + d_x_k
                d_params |= _named(d_w, suffix)
            if layer and masks is not None:
                d_x = d_x * masks[layer - 1]
    if valid is not None:
        d_x = np.where(valid[:, :, None], d_x, 0)
    return Gradients(d_x, (d_h, d_c), {name: d_params[name] for name in names})


def _suffixes(names: Collection[str]) -> list[list[str]]:
    """Return the suffixes of the parameter names: a list for each layer, in it one for each direction."""
    directions = ["", "_reverse"] if "weight_ih_l0_reverse" in names else [""]
    L = sum(f"weight_ih_l{k}" in names for k in range(len(names)))
    return [[f"_l{k}{direction}" for direction in directions] for k in range(L)]


def _weights(params: dict[str, Array], suffix: str) -> _Weights:
    w_ih, w_hh, w_hr = params["weight_ih" + suffix], params["weight_hh" + suffix], params.get("weight_hr" + suffix)
    if "bias_ih" + suffix in params:
        bias = params["bias_ih" + suffix] + params["bias_hh" + suffix]
    else:
        bias = np.zeros(len(w_ih), w_ih.dtype)
    return _Weights(w_ih, w_hh, bias, w_hr)


def _named(d_w: _Weights, suffix: str) -> dict[str, Array]:
    """Return the gradients of one direction under their names, those of absent parameters included."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    arrays = (d_w.ih, d_w.hh, d_w.bias, d_w.bias.copy(), d_w.hr)
    return {name + suffix: array for name, array in zip(names, arrays, strict=True) if array is not None}


def _cut(reset: ArrayLike | None, valid: Bool | None, reverse: bool) -> Bool | None:
    """Return where the state must not enter step t: (T, N), or None for nowhere."""
    if reset is None:
        return None
    cut = np.array(reset, np.bool_)
    if valid is not None:
        cut &= valid
    if reverse:  # what enters step t comes from t + 1, so that cut[t + 1] stands between; the last is never cut
        cut[:-1] = cut[1:]
        cut[-1:] = False
    return cut


def _order(T: int, reverse: bool) -> range:
    return range(T - 1, -1, -1) if reverse else range(T)
