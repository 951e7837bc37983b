"""Training as the kernels see it: one direction of one layer, recorded and taken backward."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.backward import DOWN_DEPTH, PLAN, TABLES, TABLES_AT, backward_kernel
from fastlstm.kernels.call import bind
from fastlstm.kernels.compile import entry
from fastlstm.kernels.gradient_tile import LEFT, add_kernel, cell_kernel, multiply_kernel, pack_kernel
from fastlstm.kernels.network import Network, Sizes, Strategy, choose_strategy, deal_rows
from fastlstm.kernels.panels import Packing, Spare, address, aligned, natural_panel
from fastlstm.kernels.product import SERIAL_WORK, Product
from fastlstm.kernels.region import run_region
from fastlstm.kernels.simd import target
from fastlstm.kernels.team import LINE
from fastlstm.kernels.tile import GATES, KEPT

__all__ = ["Direction", "LinearGradients", "Rows", "Steps"]

Array = NDArray[Any]

CHUNK_ROWS = 256  # of d_z in a chunk, so that d_W is a product of some depth and the chunk stays in cache
LARGE_GRADIENTS = 4 << 20  # bytes of d_W that had better not be read at every chunk
LARGE_CHUNK_ROWS = 512
KEPT_SPACES = 4
KEPT_SPACE, KEPT_ROOM = 8 << 20, 64 << 20  # bytes of a scratch and of a tape that are left to the next call


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


def _chunk_rows(gradients: int) -> int:
    """Return how many rows of d_z make a chunk, by the bytes of d_W; it must not depend on the number of threads."""
    return LARGE_CHUNK_ROWS if gradients > LARGE_GRADIENTS else CHUNK_ROWS


def _strides(array: Array | None) -> tuple[int, int]:
    """Return the strides of steps and rows in numbers."""
    if array is None:
        return 0, 0
    return array.strides[0] // array.itemsize, array.strides[1] // array.itemsize


class Direction:
    """Weights of one direction of one layer, packed for the forward and the backward.

    Parameters
    ----------
    params : mapping of str to ndarray
        Weights under PyTorch's names.
    suffix : str
        What the names of this layer and direction end in.
    reverse : bool
        Whether it runs from the last step to the first.
    """

    def __init__(self, params: Mapping[str, Array], suffix: str, reverse: bool) -> None:
        self.suffix, self.reverse = suffix, reverse
        own = self._own(params)
        w_ih, w_hh = own["weight_ih_l0"], own["weight_hh_l0"]
        self.dtype = w_ih.dtype
        self.bias, self.projected = "bias_ih_l0" in own, "weight_hr_l0" in own
        self.I, self.P, self.H = w_ih.shape[1], w_hh.shape[1], len(w_hh) // GATES
        self.zeros = np.zeros(max(GATES * self.H, self.I), self.dtype)
        ramp = np.arange(GATES * self.H, dtype=np.int64)
        self.ramp_i, self.ramp_p, self.ramp_h = ramp * self.I, ramp * self.P, ramp[: self.P] * self.H
        self._chunk_rows = _chunk_rows(w_ih.nbytes + w_hh.nbytes)
        self._idle: dict[tuple[Any, ...], BackwardSpace] = {}
        self.spare = Spare(KEPT_ROOM)  # of tapes
        self.network = Network(Sizes(self.I, self.H, self.P, 1, 1), self.dtype, own, reverse, natural=True)

    def _own(self, params: Mapping[str, Array]) -> dict[str, Array]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
        return {name + "_l0": params[name + self.suffix] for name in names if name + self.suffix in params}

    def repacked(self, params: Mapping[str, Array]) -> Direction:
        """Return a direction like this one with other weights."""
        direction = copy.copy(self)
        direction.network = self.network.repacked(self._own(params))
        return direction

    def choose(self, N: int, T: int, lengths: Array | None) -> Strategy:
        """Choose how some steps are shared out, forward and backward."""
        return choose_strategy(self.network, N, T, threads.get_num_threads(), lengths)

    def chunk_steps(self, N: int) -> int:
        """Return how many steps of so many rows make a chunk."""
        return max(1, self._chunk_rows // max(1, N))

    def room(self, T: int, N: int) -> Array:
        """Return room for the (T, N, 5, H) that the backward needs, or more; to be given back to `spare`."""
        return self.spare.take(T * N * KEPT * self.H, self.dtype)

    def forward(self, steps: Steps, h_n: Array, c_n: Array, saved: Array | None) -> None:
        """Run some steps: writes `steps.out`, h_n (N, P), c_n (N, H), and to its `room` what the backward needs."""
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
        found: dict[str, Array] = {"weight_ih": np.empty((rows, self.I), dtype)}
        found["weight_hh"] = np.empty((rows, self.P), dtype)
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

        saved : of the forward.  d_out : (T, N, P); d_state : (N, P), (N, H), of the state after them.
        d_initial : out (N, P), (N, H), of the state before.  d_x : out (T, N, I); None: not wanted.
        d_w : out, by name.  add_x, add_w : whether to add to what is there.
        """
        T, N = steps.x.shape[:2]
        how, rows = steps.how, steps.rows
        ranks = min(how.ranks, threads.get_num_threads())
        slices, groups = 1, how.groups
        if rows.order is None:
            slices = -(-N // self._chunk_rows)
        if slices > 1:
            groups = -(-how.groups // (slices * ranks)) * ranks
        key = (T, N, slices, how.shares > 1, groups, ranks)
        space = self._idle.pop(key, None) or self._space(*key)
        panels = self.network.natural_panels
        changing = (
            address(steps.x), *_strides(steps.x), address(steps.out), *_strides(steps.out), address(saved),
            address(steps.h_0), address(steps.c_0), address(d_out), *_strides(d_out),
            address(d_state[0]), address(d_state[1]), address(d_initial[0]), address(d_initial[1]),
            address(d_x), *_strides(d_x), add_x, address(d_w["weight_ih"]), address(d_w["weight_hh"]),
            address(d_w.get("bias_ih")), address(d_w.get("weight_hr")), add_w,
            panels[0], panels[1], panels[2] if self.projected else 0,
            address(rows.order), address(rows.lengths), address(rows.places), address(rows.active),
            address(rows.reset), *((0, 0) if rows.reset is None else rows.reset.strides),
        )  # fmt: skip
        space.run(changing)
        if space.buffer.nbytes <= KEPT_SPACE:
            if len(self._idle) >= KEPT_SPACES:
                self._idle.clear()
            self._idle[key] = space

    def _space(self, T: int, N: int, slices: int, units_apart: bool, groups: int, ranks: int) -> BackwardSpace:
        """Return the scratch and the plan of a backward of so many steps and rows."""
        I, P, H, size = self.I, self.P, self.H, self.dtype.itemsize
        chunk = self.chunk_steps(N)
        most = min(chunk, T) * -(-N // slices)
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
            "zeros": address(self.zeros), "cell": entry(cell_kernel, self.dtype),
            "add": entry(add_kernel, self.dtype) if projected else 0,
            "chunk": chunk, "slices": slices, "units_apart": int(units_apart), "groups": groups,
            "ramp_p": address(self.ramp_p), "ramp_h": address(self.ramp_h),
        }  # fmt: skip
        return BackwardSpace(plan, parts, ranks, most, (GATES * H, I), self.dtype, self.ramp_i)


def _padded(columns: int, dtype: np.dtype[Any]) -> int:
    """Return a number of columns rounded up to whole registers."""
    lanes = target().lanes(dtype)
    return -(-columns // lanes) * lanes


_ones = {np.dtype(dtype): np.ones(DOWN_DEPTH, dtype) for dtype in (np.float32, np.float64)}


class BackwardSpace:
    """The scratch of a backward and the plan that points into it: what a linear layer has too, and what is given."""

    def __init__(
        self, plan: dict[str, int], parts: dict[str, int], ranks: int, most: int, shape: tuple[int, int],
        dtype: np.dtype[Any], ramp: Array,
    ) -> None:  # fmt: skip
        J, I = shape
        scratch_rank = LINE * -(-(TABLES_AT + TABLES * plan["N"] * 8) // LINE)
        parts = parts | {
            "counters": (2 + 2 * ranks) * LINE, "scratch": ranks * scratch_rank,
            "left_z": most * LEFT * -(-J // LEFT) * dtype.itemsize,
            "panel_x": most * _padded(I, dtype) * dtype.itemsize,
            "x_from": most * 8, "h_from": most * 8, "z_from": most * 8, "d_x_to": most * 8, "ramp_z": most * 8,
        }  # fmt: skip
        offsets, total = {}, 0
        for name, count in parts.items():
            offsets[name] = total
            total += -(-count // LINE) * LINE
        self.buffer = aligned(total, np.dtype(np.uint8))
        base = address(self.buffer)
        self.buffer[offsets["ramp_z"] :][: most * 8].view(np.int64)[:] = np.arange(most) * J
        self._counters = self.buffer[offsets["counters"] :][: parts["counters"]]
        values: dict[str, int] = dict.fromkeys(PLAN.names or (), 0)
        values |= {
            "kernel": entry(backward_kernel, dtype), "I": I, "J": J, "ones": address(_ones[dtype]),
            "multiply": entry(multiply_kernel, dtype), "pack": entry(pack_kernel, dtype), "most": most,
            "slices": 1, "ranks": ranks, "shares": ranks, "scratch_rank": scratch_rank, "ramp_i": address(ramp),
        }  # fmt: skip
        values |= plan | {name: base + offset for name, offset in offsets.items()}
        self.ranks = ranks
        self._kept = ramp
        self.plan = np.array(list(values.values()), np.int64)
        self._run_serial = bind(self.plan)

    def run(self, changing: tuple[int, ...]) -> None:
        """Run the plan with the fields from `x` on, in a parallel region or on this thread."""
        self.plan[FIRST_CHANGING : FIRST_CHANGING + len(changing)] = changing
        if self.ranks > 1:
            self._counters[:] = 0
            if run_region(self.plan, self.ranks):
                return
        self._run_serial(_nothing, _nothing)


_nothing = np.empty(0)
FIRST_CHANGING = list(PLAN.names or ()).index("x")


class LinearGradients:
    """The weight (outputs, I) and bias of a linear layer, packed for `product` and for its backward."""

    def __init__(self, weight: Array, bias: Array | None) -> None:
        self.weight, self.product = weight, Product(weight, bias)
        outputs, I = weight.shape
        self._panel, _ = Packing([natural_panel(outputs, I, weight.dtype)], weight.dtype).make([weight])
        self._ramp = np.arange(len(weight), dtype=np.int64) * weight.shape[1]

    def backward(self, x: Array, d_y: Array, d_bias: Array | None) -> tuple[Array, Array]:
        """Return d_x (rows, I) and d_weight (outputs, I); x (rows, I) and d_y (rows, outputs) are C-contiguous."""
        I = self.weight.shape[1]
        d_x, d_weight = np.empty_like(x), np.empty_like(self.weight)
        chunk = _chunk_rows(d_weight.nbytes)
        ranks = threads.get_num_threads() if len(x) * d_weight.size > SERIAL_WORK else 1
        plan = {"T": len(x), "N": 1, "reverse": 1, "linear": 1, "parts": 1, "chunk": chunk, "d_z": address(d_y)}
        space = BackwardSpace(plan, {}, ranks, min(chunk, len(x)), (len(d_weight), I), x.dtype, self._ramp)
        given = (address(x), I) + (0,) * 14 + (address(d_x), I, 0, 0)
        space.run((*given, address(d_weight), 0, address(d_bias), 0, 0, address(self._panel)))
        return d_x, d_weight
