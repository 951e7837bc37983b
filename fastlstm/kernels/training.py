"""Training as the kernels see it: one direction of one layer, recorded and taken backward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.backward import DOWN_DEPTH, PLAN, TABLES, TABLES_AT, backward_kernel
from fastlstm.kernels.call import bind
from fastlstm.kernels.compile import entry
from fastlstm.kernels.gradient_tile import LEFT, add_kernel, cell_kernel, most_vectors, multiply_kernel, pack_kernel
from fastlstm.kernels.network import Network, Sizes, Strategy, choose_strategy, deal_rows
from fastlstm.kernels.panels import aligned
from fastlstm.kernels.product import SERIAL_WORK
from fastlstm.kernels.region import run_region
from fastlstm.kernels.simd import target
from fastlstm.kernels.team import LINE
from fastlstm.kernels.tile import GATES

__all__ = ["Direction", "LinearGradients", "Rows", "Steps", "chunk_steps"]

Array = NDArray[Any]

CHUNK_ROWS = 256  # of d_z in a chunk, so that d_W is a product of some depth and the chunk stays in cache
LARGE_GRADIENTS = 16 << 20  # bytes of d_W that had better not be read at every chunk
LARGE_CHUNK_ROWS = 512


class Rows(NamedTuple):
    """Which rows take part in which steps, and where states are cut."""

    order: Array | None  # (N,) int64, rows by falling length, perhaps dealt to groups
    lengths: Array | None  # (N,) int64, in that order
    places: Array | None  # (N,) int64, where each stands by falling length
    active: Array | None  # (T,) int64, rows that reach a step
    reset: Array | None  # (T, N) bool

    @classmethod
    def of(cls, T: int, order: Array | None, lengths: Array | None, reset: Array | None, groups: int) -> Rows:
        """Deal rows to groups: `order` (N,) by falling length, `lengths` (N,) in the order of the batch."""
        if order is None or lengths is None:
            return cls(None, None, None, None, reset)
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        falling = lengths[order]
        active = np.searchsorted(-falling, -np.arange(T), "left")
        if groups > 1:
            order, falling = deal_rows(order, falling, groups)
        return cls(order, falling, places[order], active, reset)


class Steps(NamedTuple):
    """What some steps of one direction were given and gave, for the backward."""

    x: Array  # (T, N, I), any strides in whole numbers but the last, which is 1
    out: Array  # (T, N, P), likewise
    h_0: Array | None  # (N, P)
    c_0: Array | None  # (N, H)
    rows: Rows
    how: Strategy


def chunk_steps(I: int, H: int, P: int, N: int, dtype: np.dtype[Any]) -> int:
    """Return how many steps make a chunk; it must not depend on the number of threads."""
    gradients = GATES * H * (I + P) * dtype.itemsize
    return max(1, (LARGE_CHUNK_ROWS if gradients > LARGE_GRADIENTS else CHUNK_ROWS) // max(1, N))


def _address(array: Array | None) -> int:
    return 0 if array is None else int(array.ctypes.data)


def _strides(array: Array) -> tuple[int, int]:
    """Return the strides of steps and rows in numbers."""
    return array.strides[0] // array.itemsize, array.strides[1] // array.itemsize


def _natural_panel(weight: Array) -> Array:
    """Return a weight (K, columns) as panels [block][k][column], padded to whole registers."""
    lanes, widest = target().lanes(weight.dtype), most_vectors()
    K, columns = weight.shape
    vectors = -(-columns // lanes)
    blocks = -(-vectors // widest)
    out = aligned(K * vectors * lanes, weight.dtype)
    for block in range(blocks):
        first, last = (vectors * edge // blocks * lanes for edge in (block, block + 1))
        lines: Any = out[K * first : K * last].reshape(K, last - first)
        valid = min(columns, last) - first
        lines[:, :valid] = weight[:, first : first + valid]
        lines[:, valid:] = 0
    return out


class Direction:
    """Weights of one direction of one layer, packed for the forward and the backward.

    Parameters
    ----------
    w_ih, w_hh, bias, w_hr : ndarray, (4H, I), (4H, P), (4H,), (P, H)
        Of one dtype; `bias` is the sum of the two. None where there is none.
    reverse : bool
        Whether it runs from the last step to the first.
    """

    def __init__(self, params: Mapping[str, Array], suffix: str, reverse: bool) -> None:
        own = {name[: -len(suffix)] + "_l0": a for name, a in params.items() if name.endswith(suffix)}
        w_ih, w_hh, w_hr = own["weight_ih_l0"], own["weight_hh_l0"], own.get("weight_hr_l0")
        self.dtype = w_ih.dtype
        self.suffix, self.bias = suffix, "bias_ih_l0" in own
        self.I, self.P, self.H = w_ih.shape[1], w_hh.shape[1], len(w_hh) // GATES
        self.network = Network(Sizes(self.I, self.H, self.P, 1, 1), self.dtype, own, reverse)
        self.reverse, self.projected = reverse, w_hr is not None
        self.w_ih, self.w_hh = _natural_panel(w_ih), _natural_panel(w_hh)
        self.w_hr = None if w_hr is None else _natural_panel(w_hr)
        self.zeros = np.zeros(GATES * self.H, self.dtype)
        ramp = np.arange(GATES * self.H, dtype=np.int64)
        self.ramp_i, self.ramp_p, self.ramp_h = ramp * self.I, ramp * self.P, ramp[: self.P] * self.H

    def choose(self, N: int, T: int, lengths: Array | None) -> Strategy:
        """Choose how some steps are shared out, forward and backward."""
        return choose_strategy(self.network, N, T, threads.get_num_threads(), lengths)

    def forward(self, steps: Steps, h_n: Array, c_n: Array, saved: Array | None) -> None:
        """Run some steps: writes `steps.out`, h_n (N, P), c_n (N, H), and what the backward needs (T, N, 5, H)."""
        T, N = steps.x.shape[:2]
        rows = steps.rows
        state = (steps.h_0, steps.c_0)
        self.network.forward(
            steps.x, steps.out, (*_strides(steps.x), *_strides(steps.out)), T, N, state, (h_n, c_n),
            rows.order, rows.lengths, rows.reset, steps.how, saved, True,
        )  # fmt: skip

    def gradients(self) -> dict[str, Array]:
        """Return room for the gradients of the weights."""
        rows, dtype = GATES * self.H, self.dtype
        found: dict[str, Array] = {
            "weight_ih": np.empty((rows, self.I), dtype),
            "weight_hh": np.empty((rows, self.P), dtype),
        }
        if self.bias:
            found["bias_ih"] = np.empty(rows, dtype)
        if self.projected:
            found["weight_hr"] = np.empty((self.P, self.H), dtype)
        return found

    def backward(
        self, steps: Steps, saved: Array, d_out: Array | None, d_state: tuple[Array | None, Array | None],
        d_initial: tuple[Array, Array], d_x: Array | None, add_x: bool, d_w: dict[str, Array], add_w: bool,
    ) -> None:  # fmt: skip
        """Take some steps backward.

        saved : (T, N, 5, H), of the forward.  d_out : (T, N, P); d_state : (N, P), (N, H), of the state after them.
        d_initial : out (N, P), (N, H), of the state before.  d_x : out (T, N, I); None: not wanted.
        d_w : out, by name.  add_x, add_w : whether to add to what is there.
        """
        T, N = steps.x.shape[:2]
        I, P, H = self.I, self.P, self.H
        how, rows = steps.how, steps.rows
        chunk = chunk_steps(I, H, P, N, self.dtype)
        most = min(chunk, T) * N
        size = self.dtype.itemsize
        projected = int(self.projected)
        parts = {
            "d_h": N * P * size, "d_c": N * H * size, "d_m": projected * N * H * size, "d_z": most * GATES * H * size,
            "m": projected * most * H * size, "d_h_out": projected * most * P * size,
            "left_h": projected * most * LEFT * -(-P // LEFT) * size,
            "panel_h": most * _padded(P, self.dtype) * size,
            "panel_m": projected * most * _padded(H, self.dtype) * size,
        }  # fmt: skip
        plan = {
            "T": T, "N": N, "P": P, "H": H, "reverse": int(self.reverse), "projected": projected, "parts": GATES,
            "saved": _address(saved), "h_0": _address(steps.h_0), "c_0": _address(steps.c_0),
            "d_out": _address(d_out), "d_h_n": _address(d_state[0]), "d_c_n": _address(d_state[1]),
            "d_h_0": _address(d_initial[0]), "d_c_0": _address(d_initial[1]), "d_x": _address(d_x),
            "add_x": int(add_x), "d_w_hh": _address(d_w["weight_hh"]), "d_w_hr": _address(d_w.get("weight_hr")),
            "add_w": int(add_w), "w_hh": _address(self.w_hh), "w_hr": _address(self.w_hr),
            "order": _address(rows.order), "lengths": _address(rows.lengths), "places": _address(rows.places),
            "active": _address(rows.active), "reset": _address(rows.reset), "zeros": _address(self.zeros),
            "cell": entry(cell_kernel, self.dtype), "add": entry(add_kernel, self.dtype) if projected else 0,
            "chunk": chunk, "units_apart": int(how.shares > 1), "groups": how.groups,
            "ramp_p": _address(self.ramp_p), "ramp_h": _address(self.ramp_h),
        }  # fmt: skip
        plan["x_step"], plan["x_row"] = _strides(steps.x)
        plan["out"], (plan["out_step"], plan["out_row"]) = _address(steps.out), _strides(steps.out)
        if d_out is not None:
            plan["d_out_step"], plan["d_out_row"] = _strides(d_out)
        if d_x is not None:
            plan["d_x_step"], plan["d_x_row"] = _strides(d_x)
        if rows.reset is not None:
            plan["reset_step"], plan["reset_row"] = rows.reset.strides
        ranks = min(how.ranks, threads.get_num_threads())
        w_ih, bias = d_w["weight_ih"], d_w.get("bias_ih")
        _run(plan, parts, ranks, most, steps.x, self.w_ih, w_ih, bias, self.ramp_i)


def _padded(columns: int, dtype: np.dtype[Any]) -> int:
    """Return a number of columns rounded up to whole registers."""
    lanes = target().lanes(dtype)
    return -(-columns // lanes) * lanes


_ones = {np.dtype(dtype): np.ones(DOWN_DEPTH, dtype) for dtype in (np.float32, np.float64)}


def _run(
    plan: dict[str, int], parts: dict[str, int], ranks: int, most: int,
    x: Array, panel: Array, d_weight: Array, d_bias: Array | None, ramp: Array,
) -> None:  # fmt: skip
    """Complete the plan of a backward with what a linear layer has too, and run it; `parts`: bytes of its scratch."""
    dtype, (J, I) = x.dtype, d_weight.shape
    scratch_rank = LINE * -(-(TABLES_AT + TABLES * plan["N"] * 8) // LINE)
    parts = parts | {
        "counters": (2 + 2 * ranks) * LINE, "scratch": ranks * scratch_rank,
        "left_z": most * LEFT * -(-J // LEFT) * dtype.itemsize, "panel_x": most * _padded(I, dtype) * dtype.itemsize,
        "x_from": most * 8, "h_from": most * 8, "z_from": most * 8, "d_x_to": most * 8, "ramp_z": most * 8,
    }  # fmt: skip
    offsets, total = {}, 0
    for name, count in parts.items():
        offsets[name] = total
        total += -(-count // LINE) * LINE
    buffer = aligned(total, np.dtype(np.uint8))
    base = _address(buffer)
    buffer[offsets["ramp_z"] :][: most * 8].view(np.int64)[:] = np.arange(most) * J
    values: dict[str, int] = dict.fromkeys(PLAN.names or (), 0)
    values |= {
        "kernel": entry(backward_kernel, dtype), "I": I, "J": J, "x": _address(x), "w_ih": _address(panel),
        "d_w_ih": _address(d_weight), "d_bias": _address(d_bias), "ones": _address(_ones[dtype]),
        "multiply": entry(multiply_kernel, dtype), "pack": entry(pack_kernel, dtype), "most": most,
        "ranks": ranks, "shares": ranks, "scratch_rank": scratch_rank, "ramp_i": _address(ramp),
    }  # fmt: skip
    values |= plan | {name: base + offset for name, offset in offsets.items()}
    array = np.array(list(values.values()), np.int64)
    if ranks > 1:
        buffer[offsets["counters"] :][: parts["counters"]] = 0
        if run_region(array, ranks):
            return
    bind(array)(_nothing, _nothing)


_nothing = np.empty(0)


class LinearGradients:
    """The weight (outputs, I) of a linear layer, packed for its backward."""

    def __init__(self, weight: Array) -> None:
        self.weight = weight
        self._panel = _natural_panel(weight)
        self._ramp = np.arange(len(weight), dtype=np.int64) * weight.shape[1]

    def backward(self, x: Array, d_y: Array, d_bias: Array | None) -> tuple[Array, Array]:
        """Return d_x (rows, I) and d_weight (outputs, I); x (rows, I) and d_y (rows, outputs) are C-contiguous."""
        I = self.weight.shape[1]
        d_x, d_weight = np.empty_like(x), np.empty_like(self.weight)
        chunk = LARGE_CHUNK_ROWS if d_weight.nbytes > LARGE_GRADIENTS else CHUNK_ROWS
        ranks = threads.get_num_threads() if len(x) * d_weight.size > SERIAL_WORK else 1
        plan = {
            "T": len(x), "N": 1, "reverse": 1, "linear": 1, "parts": 1, "x_step": I, "d_x": _address(d_x),
            "d_x_step": I, "chunk": chunk, "d_z": _address(d_y),
        }  # fmt: skip
        _run(plan, {}, ranks, min(chunk, len(x)), x, self._panel, d_weight, d_bias, self._ramp)
        return d_x, d_weight
