"""Training as the kernels see it: one direction of one layer, recorded and taken backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.backward import DOWN_DEPTH, PLAN, TABLES, TABLES_AT, backward_kernel, sums_kernel
from fastlstm.kernels.call import address, bind
from fastlstm.kernels.compile import entry
from fastlstm.kernels.gradient_tile import (
    FEW_COLUMNS,
    LEFT,
    add_kernel,
    cell_kernel,
    dots_kernel,
    multiply_kernel,
    outer_kernel,
    pack_kernel,
    retrace_kernel,
    turn_kernel,
)
from fastlstm.kernels.network import MIN_FULL, Course, Network, Sizes, Strategy, choose_strategy, deal_rows, lying, pays
from fastlstm.kernels.panels import Packing, natural_panel
from fastlstm.kernels.product import SERIAL_WORK, Product
from fastlstm.kernels.region import Prepared, Run
from fastlstm.kernels.simd import target
from fastlstm.kernels.team import LINE
from fastlstm.kernels.tile import GATES, KEPT, fits_squares
from fastlstm.memory import Lent, Own, Spare, aligned, empty, keep, maker

__all__ = ["EVERY_ROW", "Direction", "LinearGradients", "Rows", "Way", "Weights"]

Array = NDArray[Any]
CHUNK_ROWS = 256  # of d_z in a chunk, so that d_W is a product of some depth and the chunk stays in cache
LARGE_GRADIENTS = 4 << 20  # bytes of d_W that had better not be read at every chunk
LARGE_CHUNK_ROWS = 512
SMALL_GRADIENTS = 256 << 10  # bytes of d_W up to which each half of the rows has sums of its own
KEPT_WAYS = 8
NAMES = "weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"
SMALL_ROOM = 4 << 10  # numbers that are had new in a quarter of the time in which they are lent
KEPT_SPACE, KEPT_ROOM = 32 << 20, 128 << 20  # bytes of a scratch and of a tape that are left to the next call


class Rows(NamedTuple):
    """Which rows take part in which steps, and where states are cut."""

    order: Array | None  # (N,) int64, rows by falling length, perhaps dealt to groups
    lengths: Array | None  # (N,) int64, in that order
    places: Array | None  # (N,) int64, where each stands by falling length
    active: Array | None  # (T,) int64, rows that reach a step
    reset: Array | None  # (T, N) bool

    @classmethod
    def of(cls, T: int, order: Array | None, lengths: Array | None, reset: Array | None, way: Way) -> Rows:
        """Deal rows to the groups of a way: `order` (N,) by falling length, `lengths` (N,) in the batch's order."""
        if order is None or lengths is None:
            return EVERY_ROW if reset is None else EVERY_ROW._replace(reset=reset)
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        falling = lengths[order]
        active = np.searchsorted(-falling, -np.arange(T), "left")
        how = way.course.how
        if how.shares == 1 and how.groups > 1:
            order, falling = deal_rows(order, falling, how.groups)
        return cls(order, falling, places[order], active, reset)


EVERY_ROW = Rows(None, None, None, None, None)
"""All rows take part in all steps, and no state is cut."""


class Way:
    """How some steps of one direction are run forward and backward, and the scratch that a backward has left.

    threads : for this direction and those beside it.
    halved : whether each half of the rows has weight gradients of its own.
    """

    __slots__ = ("course", "halved", "idle", "threads")

    def __init__(self, course: Course, threads: int, halved: bool) -> None:
        self.course, self.threads, self.halved = course, threads, halved
        self.idle: dict[tuple[int, int], BackwardSpace] = {}  # by ranks and half


def _chunk_rows(gradients: int) -> int:
    """Return how many rows of d_z make a chunk, by the bytes of d_W; it must not depend on the number of threads."""
    return LARGE_CHUNK_ROWS if gradients > LARGE_GRADIENTS else CHUNK_ROWS


class Packed(NamedTuple):
    """Weights in panels."""

    panels: Lent
    natural: list[Array | None]  # those for the backward, which lie there too, of W_ih, W_hh and W_hr


class Weights:
    """The weights of one direction, packed for the forward and the backward unless these read them as they are.

    Parameters
    ----------
    direction : Direction
        Theirs.
    params : mapping of str to ndarray
        Weights under PyTorch's names.
    """

    __slots__ = ("_packed", "_params", "as_they_are", "direction")

    def __init__(self, direction: Direction, params: Mapping[str, Array]) -> None:
        self.direction, self._params = direction, params
        self.as_they_are: tuple[Array, ...] = direction.take(params)
        """W_ih, W_hh and, where there are any, b_ih and b_hh."""
        self._packed = None if direction.fixed else self._pack()

    def packed(self) -> Packed:
        """Return the panels. Two threads may make them at once: each has what it has made.

        Those for the backward are made with the others, before there are results: among these they cost b1024 a tenth.
        """
        packed = self._packed
        if packed is None:
            packed = self._packed = self._pack()
        return packed

    def _pack(self) -> Packed:
        network = self.direction.network
        panels = network.pack(self._params)
        natural: list[Array | None] = [panels.array[start:] for start in network.natural]
        return Packed(panels, natural if network.projected else [*natural, None])


class Direction:
    """How one direction of one layer is packed and run, forward and backward, whatever its weights.

    Parameters
    ----------
    params : mapping of str to ndarray
        Weights of its sizes under PyTorch's names.
    suffix : str
        What the names of this layer and direction end in.
    reverse : bool
        Whether it runs from the last step to the first.
    fixed : bool
        Whether arrays of weights never change; else they are packed as soon as they are seen.
    beside : int
        How many directions the layer has, which are run beside each other.
    """

    def __init__(self, params: Mapping[str, Array], suffix: str, reverse: bool, fixed: bool, beside: int) -> None:
        self.reverse, self.fixed, self._beside = reverse, fixed, beside
        shapes = {name: params[name + suffix].shape for name in NAMES if name + suffix in params}
        self.dtype = params["weight_ih" + suffix].dtype
        self.projected = "weight_hr" in shapes
        self._weights = sum(math.prod(shape) for shape in shapes.values())
        self.makers = [(name + suffix, maker(shape, self.dtype)) for name, shape in shapes.items()]
        """The name of each weight, and what makes room for its gradient."""
        self._names = [name + suffix for name in NAMES]
        self.take = itemgetter(*[name for name in self._names[:4] if name in params])
        J, self.I = shapes["weight_ih"]
        self.H, self.P = J // GATES, shapes["weight_hh"][1]
        self.zeros = np.zeros(max(J, self.I), self.dtype)
        ramp = np.arange(J, dtype=np.int64)
        self.ramp_i, self.ramp_p, self.ramp_h = ramp * self.I, ramp * self.P, ramp[: self.P] * self.H
        gradients = J * (self.I + self.P) * self.dtype.itemsize
        self._chunk_rows, self._small = _chunk_rows(gradients), gradients <= SMALL_GRADIENTS
        self._ways: dict[tuple[Any, ...], Way] = {}  # of calls before, for calls like them
        self._spare = Spare(KEPT_ROOM)  # of tapes
        self._adders: list[Callable[..., Any]] = []  # of which nobody uses one
        self.network = Network(Sizes(self.I, self.H, self.P, 1, 1), self.dtype, [suffix], reverse, trained=True)
        self._unpacked = fixed and not self.projected and fits_squares((self.I, self.P), self.H, self.dtype)

    def way(self, x: Array, out: Array, lengths: Array | None, count: int) -> Way:
        """Return how steps of the size of x (T, N, I) are run on `count` threads, with results as out (T, N, P).

        x and out may have any strides in whole numbers, but for the last, which is 1; d_x lies as x, and d_out as out.
        """
        T, N, _ = x.shape
        how = None if lengths is None else self._choose(T, N, lengths, count)
        key = T, N, x.strides, out.strides, count, how
        way = self._ways.get(key)
        if way is None:
            strategy, used = how or self._choose(T, N, None, count)
            course = Course(T, N, lying(x, out), strategy, T * N == 1 and self._unpacked)
            way = Way(course, used, self.is_halved(N, lengths is None))
            keep(self._ways, key, way, KEPT_WAYS)
        return way

    def _choose(self, T: int, N: int, lengths: Array | None, count: int) -> tuple[Strategy, int]:
        """Return how steps are run, and how many of `count` threads there are for them and the directions beside."""
        if self._beside > 1 and not pays(self.network, N, T, lengths, self._beside):
            count = 1
        how = choose_strategy(self.network, N, T, count // math.gcd(count, self._beside), lengths)
        return how, min(count, how.ranks * self._beside)

    def is_halved(self, N: int, alike: bool) -> bool:
        """Return whether each half of the rows has weight gradients of its own, for any number of threads.

        Threads that share the rows of a small layer then meet once at the end, and not in each chunk: with two of
        them vowels and deepar gain 7%. `alike`: all rows take part in all steps.
        """
        return alike and self._small and N >= 2 * MIN_FULL

    def chunk_steps(self, N: int, alike: bool) -> int:
        """Return how many steps of so many rows make a chunk."""
        return max(1, self._chunk_rows // max(1, -(-N // 2) if self.is_halved(N, alike) else N))

    def room(self, T: int, N: int) -> Lent | Own:
        """Return room for what the backward needs of so many steps and rows, or more."""
        count = T * N * KEPT * self.H
        return Own(np.empty(count, self.dtype)) if count <= SMALL_ROOM else self._spare.lend(count, self.dtype)

    def forward(
        self, weights: Weights, way: Way, rows: Rows, x: Array, out: Array, state: tuple[Array | None, Array | None],
        final: tuple[Array, Array], saved: Array | None,
    ) -> Run:  # fmt: skip
        """Return the run of some steps.

        x : (T, N, I), laid out as the way says.  state : (N, P), (N, H), before them in the direction's own order.
        out, final, saved : out (T, N, P), the state after them, and what the backward needs, which is left out if None.
        """
        course, reset, recorded = way.course, rows.reset, saved is not None
        space = self.network.space(course, recorded, rows.order, rows.lengths, reset)
        home = (course.idle, recorded) if space.keeps and reset is None else None
        if course.unpacked:
            return space, (x, out, *final, *state, None, saved, *weights.as_they_are), way.threads, None, home
        panels = weights.packed().panels
        return space, (x, out, *final, *state, panels.array, saved), way.threads, panels, home

    def forward_again(
        self, weights: Weights, way: Way, rows: Rows, x: Array, like: Array, state: tuple[Array | None, Array | None]
    ) -> tuple[Lent | Own, list[Run]]:  # fmt: skip
        """Return room for what the backward needs of some steps, and the run that computes it a second time.

        like : their outputs.
        """
        course, out = way.course, np.empty_like(like)
        if out.strides != like.strides:  # of one of two directions
            way = Way(Course(course.T, course.N, lying(x, out), course.how, course.unpacked), way.threads, way.halved)
        room = self.room(course.T, course.N)
        final = np.empty((course.N, self.P), self.dtype), np.empty((course.N, self.H), self.dtype)
        return room, [self.forward(weights, way, rows, x, out, state, final, room.array)]

    def second(self) -> Array:
        """Return room for the gradients of the weights of a second half of the rows, where these are halved."""
        return np.empty(self._weights, self.dtype)

    def add_second(self, d_w: Mapping[str, Array], second: Array) -> None:
        """Add these to the gradients of the first half, once all are there."""
        try:
            add = self._adders.pop()
        except IndexError:
            sizes = GATES * self.H, self.I, self.P, self.H
            add = bind(np.array([entry(sums_kernel, self.dtype), *[0] * 6, *sizes], np.int64))
        add(*[d_w.get(name) for name in self._names], second)
        self._adders[:] = [add]

    def backward(
        self, weights: Weights, way: Way, rows: Rows, x: Array, out: Array, state: tuple[Array | None, Array | None],
        saved: Array, d_out: Array | None, d_state: tuple[Array | None, Array | None],
        d_initial: tuple[Array, Array], d_x: Array, d_w: Mapping[str, Array], second: Array | None,
        add_w: bool = False, half: int = 0,
    ) -> Run:  # fmt: skip
        """Return the run that takes some steps backward, or one half of their rows where these are halved.

        x, out, state, saved : of the forward.  d_out : (T, N, P), which lies as `out`; d_state : (N, P), (N, H), of the
            state after them.
        d_initial : out (N, P), (N, H), of the state before.  d_x : out (T, N, I), which lies as x.
        d_w : out, gradients by the names of the weights; without those of `second`, out, room for which
            `self.second` gives.
        add_w : whether to add to what is there.
        """
        count = ranks = 1
        if way.threads > 1:
            count = min(way.threads, threads.get_num_threads())
            ranks = count // math.gcd(count, self._beside * (1 + way.halved))
        packed = None if way.course.unpacked else weights.packed()  # held while its panels are read
        matrices = (*weights.as_they_are[:2], None) if packed is None else packed.natural
        w_ih, w_hh, b_ih, b_hh, w_hr = self._names
        arrays = (
            x, out, saved, *matrices, *state,
            d_out, *d_state, *d_initial, d_x,
            d_w[w_ih], d_w[w_hh], d_w.get(b_ih), d_w.get(b_hh), d_w.get(w_hr),
            *rows, second,
        )  # fmt: skip
        key = ranks, half
        space = way.idle.pop(key, None) or self._space(way, ranks, rows.lengths is None, half)
        space.lay_out(rows.reset, add_w)
        return space, arrays, count, packed, (way.idle, key) if space.keeps else None

    def _space(self, way: Way, ranks: int, alike: bool, half: int) -> BackwardSpace:
        """Return the scratch and the plan of a backward of one half of such rows; `alike`: always of all of these."""
        course, halves = way.course, 1 + way.halved
        T, N, units_apart = course.T, course.N, course.how.shares > 1
        row0 = N * half // halves
        rows = N * (half + 1) // halves - row0
        slices, groups = 1, course.how.groups
        if alike:
            slices = -(-rows // self._chunk_rows)
        if slices * halves > 1:
            groups = -(-groups // (slices * halves * ranks)) * ranks
        I, P, H, size = self.I, self.P, self.H, self.dtype.itemsize
        chunk = self.chunk_steps(N, alike)
        most = min(chunk, T) * -(-rows // slices)
        projected = int(self.projected)
        dots = I <= FEW_COLUMNS
        single = alike and not projected and not units_apart and groups * slices >= rows
        parts = {
            "d_h": rows * P * size, "d_c": rows * H * size, "d_m": projected * rows * H * size,
            "d_z": most * GATES * H * size,
            "m": projected * most * H * size, "d_h_out": projected * most * P * size,
            "left_h": projected * most * LEFT * -(-P // LEFT) * size,
            "panel_h": most * _padded(P, self.dtype) * size,
            "panel_m": projected * most * _padded(H, self.dtype) * size,
            "w_ih_t": dots * I * GATES * H * size,
        }  # fmt: skip
        plan = {
            "T": T, "N": N, "row0": row0, "rows": rows,
            "P": P, "H": H, "reverse": int(self.reverse), "projected": projected, "parts": GATES,
            "zeros": address(self.zeros), "cell": entry(cell_kernel, self.dtype),
            "add": entry(add_kernel, self.dtype) if projected else 0,
            "dots": entry(dots_kernel, self.dtype) if dots else 0,
            "retrace": entry(retrace_kernel, self.dtype) if single else 0,
            "outer": 0 if projected else entry(outer_kernel, self.dtype),
            "chunk": chunk, "slices": slices, "units_apart": int(units_apart), "groups": groups,
            "ramp_p": address(self.ramp_p), "ramp_h": address(self.ramp_h), "raw": int(course.unpacked),
        }  # fmt: skip
        plan |= {name: stride // size for name, stride in zip(LAYOUT, course.strides, strict=True)}
        space = BackwardSpace(plan, parts, ranks, most, (GATES * H, I), self.dtype, self.ramp_i, alike)
        for key in list(way.idle):
            if key[0] != ranks:  # of another number of threads
                way.idle.pop(key, None)
        return space


def _padded(columns: int, dtype: np.dtype[Any]) -> int:
    """Return a number of columns rounded up to whole registers."""
    lanes = target().lanes(dtype)
    return -(-columns // lanes) * lanes


_ramp_left = np.arange(target().lanes(np.dtype(np.float32)), dtype=np.int64) * LEFT
_ones = {np.dtype(dtype): np.ones(DOWN_DEPTH, dtype) for dtype in (np.float32, np.float64)}


class BackwardSpace(Prepared):
    """The scratch of a backward and the plan that points into it: what a linear layer has too, and what is given."""

    def __init__(
        self, plan: dict[str, int], parts: dict[str, int], ranks: int, most: int, shape: tuple[int, int],
        dtype: np.dtype[Any], ramp: Array, alike: bool = True,
    ) -> None:  # fmt: skip
        J, I = shape
        scratch_rank = LINE * -(-(TABLES_AT + TABLES * plan["N"] * 8) // LINE)
        parts = parts | {
            "counters": (2 + 2 * ranks) * LINE, "scratch": ranks * scratch_rank,
            "left_z": most * LEFT * -(-J // LEFT) * dtype.itemsize,
            "panel_x": most * _padded(I, dtype) * dtype.itemsize,
            "x_from": most * 8, "h_from": most * 8, "z_from": most * 8, "d_x_to": most * 8, "k_of": most * 8,
            "ramp_z": most * 8,
        }  # fmt: skip
        offsets, total = {}, 0
        for name, count in parts.items():
            offsets[name] = total
            total += -(-count // LINE) * LINE
        self.buffer = aligned(total, np.dtype(np.uint8))
        base = address(self.buffer)
        self.buffer[offsets["ramp_z"] :][: most * 8].view(np.int64)[:] = np.arange(most) * J
        values: dict[str, int] = dict.fromkeys(PLAN.names or (), 0)
        values |= {
            "kernel": entry(backward_kernel, dtype), "I": I, "J": J, "ones": address(_ones[dtype]),
            "multiply": entry(multiply_kernel, dtype), "pack": entry(pack_kernel, dtype), "most": most,
            "slices": 1, "ranks": ranks, "shares": ranks, "scratch_rank": scratch_rank, "ramp_i": address(ramp),
            "ramp_left": address(_ramp_left), "turn": entry(turn_kernel, dtype),
        }  # fmt: skip
        values |= plan | {name: base + offset for name, offset in offsets.items()}
        for name, line in ("d_h", values["P"]), ("d_c", values["H"]), ("d_m", values["H"]):
            values[name] -= values["row0"] * line * dtype.itemsize  # rows count in the batch
        self.keeps = total <= KEPT_SPACE
        self._laid_out: tuple[Any, ...] = None, False
        self._kept = ramp
        super().__init__(values.values(), self.buffer[offsets["counters"] :][: parts["counters"]], ranks, alike)

    def lay_out(self, reset: Array | None, add_w: bool) -> None:
        """Write to the plan how `reset` lies, and whether to add to what is in the d_w."""
        wanted = None if reset is None else reset.strides, add_w
        if wanted != self._laid_out:
            self.plan[RESET_STEP : RESET_STEP + 3] = *(wanted[0] or (0, 0)), add_w
            self._laid_out = wanted


PLAN_FIELDS = list(PLAN.names or ())
RESET_STEP = PLAN_FIELDS.index("reset_step")
LAYOUT = "x_step", "x_row", "out_step", "out_row"


class LinearGradients:
    """The weight (outputs, I) and bias of a linear layer, packed for `product` and for its backward."""

    def __init__(self, weight: Array, bias: Array | None) -> None:
        self.weight, self.product = weight, Product(weight, bias)
        outputs, I = weight.shape
        packing = Packing([(0, natural_panel(outputs, I, weight.dtype))], weight.dtype)
        self._panel = aligned(packing.size, weight.dtype)
        packing.make([weight], self._panel)
        self._ramp = np.arange(len(weight), dtype=np.int64) * weight.shape[1]

    def backward(self, x: Array, d_y: Array, d_bias: Array | None) -> tuple[Array, Array]:
        """Return d_x (rows, I) and d_weight (outputs, I); x (rows, I) and d_y (rows, outputs) are C-contiguous."""
        I = self.weight.shape[1]
        d_x, d_weight = empty(x.shape, x.dtype), empty(self.weight.shape, x.dtype)
        chunk = _chunk_rows(d_weight.nbytes)
        ranks = threads.get_num_threads() if len(x) * d_weight.size > SERIAL_WORK else 1
        plan = {
            "T": len(x), "N": 1, "rows": 1, "reverse": 1, "linear": 1, "parts": 1, "chunk": chunk, "d_z": address(d_y),
            "x_step": I,
        }  # fmt: skip
        space = BackwardSpace(plan, {}, ranks, min(chunk, len(x)), (len(d_weight), I), x.dtype, self._ramp)
        space.run(x, None, None, self._panel, *[None] * 9, d_x, d_weight, None, d_bias)
        return d_x, d_weight
