"""A network as the kernels see it: packed weights, a plan for each call, and how the call is shared out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.call import address
from fastlstm.kernels.compile import entry
from fastlstm.kernels.panels import (
    Packing,
    Panel,
    bias_panel,
    columns_panel,
    cut_columns,
    cut_units,
    gates_panel,
    natural_panel,
)
from fastlstm.kernels.product import L2_BYTES, tile_rows
from fastlstm.kernels.region import Prepared
from fastlstm.kernels.sequence import PLAN, TABLES_AT, WEIGHT_FIELDS, forward_kernel
from fastlstm.kernels.team import LINE
from fastlstm.kernels.tile import (
    EVERY,
    GATES,
    KEPT,
    advance_kernel,
    blocking,
    fills_line,
    most_blocks,
    project_kernel,
    record_kernel,
    tile_table,
    unpacked_kernel,
)
from fastlstm.memory import CACHE_LINE, Lent, Spare, aligned, keep

__all__ = [
    "Course",
    "Network",
    "Sizes",
    "Strategy",
    "StreamRunner",
    "choose_strategy",
    "deal_rows",
    "load_tiles",
    "lying",
    "pays",
]

Array = NDArray[Any]

Strides = tuple[int, int, int, int]
"""x_step, x_row, out_step, out_row in bytes."""

PARALLEL_WORK = 2 << 20  # multiply-adds of a call below which a parallel region does not pay
UNITS_WORK = 16 << 10  # multiply-adds of a step below which the team's barrier costs more than it gains
SMALL_LAYER = 256 << 10  # bytes of weights that each core can hold for itself
LARGE_LAYER = 4 << 20  # bytes of weights that each core had better not read in full at every step
HUGE_LAYER = 16 << 20  # bytes of weights that come from memory: W_ih x for several steps at once
HUGE_HOISTED_BYTES = 4 << 20
ROWS_IN_CACHE = 96  # rows of a group whose state and x stay in L2 from step to step
MIN_FULL = 6  # rows: as many as a tile has; from there on the step's own tile is full
HOISTED_BYTES = 256 << 10  # of z for the steps of a chunk
PAST_CACHES = 16 << 20  # bytes saved for the backward that no cache still has then: b512 gains 8% of its forward
KEPT_WORKSPACES, KEPT_SCRATCH = 4, 2 << 20  # how many, and up to how many bytes each, outlive their call
KEPT_PANELS = 1 << 30  # bytes of panels that outlive their weights
ROWS = list(PLAN.names or ()).index("order")  # and behind it `lengths`


class Sizes(NamedTuple):
    """Sizes of a network; names as in API.md."""

    I: int
    H: int
    P: int
    L: int
    D: int


class Strategy(NamedTuple):
    """How one call is shared out; no choice changes a bit of the result."""

    ranks: int  # threads
    shares: int  # 1: each thread takes groups of rows; else each phase is cut in this many shares of the blocks
    groups: int  # of rows, as equal as can be; at most N
    hoisted: bool  # W_ih x for a chunk of steps at once
    chunk: int  # steps


def _line(size: int) -> int:
    """Round a size in bytes up to whole cache lines."""
    return -(-size // LINE) * LINE


class Network:
    """How one network is packed and run forward, whatever its weights.

    Parameters
    ----------
    sizes : Sizes
        Its sizes.
    dtype : numpy.dtype
        float32 or float64.
    suffixes : sequence of str
        What the names of the weights of each layer and direction end in.
    reverse : bool, default False
        Whether the one direction runs from the last step to the first.
    trained : bool, default False
        Whether panels for the backward of the one direction lie behind those for the forward.
    """

    def __init__(
        self, sizes: Sizes, dtype: np.dtype[Any], suffixes: Sequence[str], reverse: bool = False, trained: bool = False
    ) -> None:  # fmt: skip
        self.sizes, self.dtype, self.projected = sizes, dtype, sizes.P != sizes.H
        self.cut, self.p_cut = cut_units(sizes.H, dtype), cut_columns(sizes.P, dtype)
        self.width = GATES * self.cut.padded
        self.state_width = GATES * self.p_cut.padded if self.projected else self.cut.padded
        self._zeros = aligned(GATES * self.p_cut.padded, dtype)
        self._zeros[:] = 0
        self._no_bias = np.zeros(GATES * sizes.H, dtype)
        self._courses: dict[tuple[Any, ...], Course] = {}  # of calls before, for calls like them
        self._spare = Spare(KEPT_PANELS)
        names = ("bias_ih", "bias_hh", "weight_ih", "weight_hh", "weight_hr")[: 4 + self.projected]
        self._names = [name + suffix for suffix in suffixes for name in names]
        self._describe_packing(trained)
        plan: dict[str, int] = dict.fromkeys(PLAN.names or (), 0)
        plan |= {
            "kernel": entry(forward_kernel, dtype), "H": sizes.H, "P": sizes.P, "L": sizes.L, "D": sizes.D,
            "blocks": self.cut.blocks, "tail": int(self.cut.tail_units > 0), "units": self.cut.padded,
            "width": self.width, "state_width": self.state_width, "projected": int(self.projected),
            "p_blocks": self.p_cut.blocks, "p_tail": int(self.p_cut.tail_units > 0), "weights": address(self._weights),
            "zeros": address(self._zeros), "reverse": int(reverse),
        }  # fmt: skip
        self._plan = plan

    def _describe_packing(self, trained: bool) -> None:
        """Describe the panels of all weights, which come in the order of `_names`."""
        s = self.sizes
        panels: list[tuple[int, Panel]] = []
        depths = [s.I if layer == 0 else s.D * s.P for layer in range(s.L) for _ in range(s.D)]
        for first, I in zip(range(0, len(self._names), 4 + self.projected), depths, strict=True):
            panels.append((first, bias_panel(s.H, self.cut)))
            for k, K in enumerate((I, s.P)):
                copied = natural_panel(GATES * s.H, K, self.dtype).size if trained else 0
                panels.append((first + 2 + k, gates_panel(s.H, K, self.cut, copied)))
            if self.projected:
                panels.append((first + 4, columns_panel(s.P, s.H, self.p_cut)))
        self.weight_bytes = sum(panel.size for _, panel in panels) * self.dtype.itemsize
        forward, each = len(panels), len(panels) // len(depths)
        if trained and self.projected:
            panels.append((4, natural_panel(s.P, s.H, self.dtype)))
        self._packing = Packing(panels, self.dtype)
        self.natural = self._packing.copies + self._packing.offsets[forward:]
        """Where the panels for the backward are, of W_ih, W_hh and, where there is a projection, W_hr, in numbers."""
        self._weights = np.zeros((len(depths), len(WEIGHT_FIELDS)), np.int64)
        self._weights[:, 0] = depths
        offsets = np.reshape(self._packing.offsets[:forward], (-1, each))
        self._weights[:, 1 : 1 + each] = offsets * self.dtype.itemsize

    def pack(self, params: Mapping[str, Array]) -> Lent:
        """Return the panels of weights under PyTorch's names."""
        panels = self._spare.lend(self._packing.size, self.dtype)
        self._packing.make([params.get(name, self._no_bias) for name in self._names], panels.array)
        return panels

    def _fits_tile(self, rows: int) -> bool:
        """Return whether one tile holds all hidden units of a group of rows."""
        widest = -(-rows // -(-rows // blocking(self.dtype).rows))
        blocks = self.cut.blocks + (self.cut.tail_units > 0)
        fits = blocks <= most_blocks(self.dtype, widest)
        return fits and not self.projected and (widest == 1 or not (self.cut.tail_units and self.cut.blocks))

    def state_bytes(self, N: int) -> tuple[int, int]:
        """Return the sizes of the state buffers of h and c."""
        rows = self.sizes.L * self.sizes.D * N * self.dtype.itemsize
        return _line(2 * rows * self.state_width), _line(rows * self.cut.padded)

    def scratch_bytes(self, N: int, T: int, how: Strategy) -> tuple[int, dict[str, int]]:
        """Return the size of the scratch of a call and where its parts lie."""
        s, size = self.sizes, self.dtype.itemsize
        rows = N if how.shares > 1 else -(-N // how.groups)
        directions = s.D if how.shares > 1 else 1
        z_at = _line(TABLES_AT + (how.chunk + 2) * rows * 8)
        between_at = z_at + _line(directions * how.chunk * rows * self.width * size if how.hoisted else 0)
        m_at = between_at + _line(2 * how.chunk * rows * s.P * size if s.L > 1 and s.D == 1 else 0)
        per_rank = m_at + _line(directions * rows * self.cut.padded * size if self.projected else 0) + 2 * LINE
        counters = (2 + 2 * max(how.shares, how.groups * s.D)) * LINE
        middle = 2 * T * N * 2 * s.P * size if s.L > 1 and s.D == 2 else 0
        offsets = {"z_at": z_at, "between_at": between_at, "m_at": m_at, "scratch_rank": per_rank}
        offsets |= {"scratch": counters, "middle": counters + how.ranks * per_rank}
        return counters + how.ranks * per_rank + middle, offsets

    def plan(
        self, base: int, offsets: dict[str, int], how: Strategy, recorded: bool, unpacked: bool, **values: int
    ) -> Iterable[int]:  # fmt: skip
        """Return the plan of a call with a scratch at an address."""
        plan = self._plan | offsets
        plan |= values
        plan["scratch"] += base
        plan["middle"] += base
        plan["counters"] = base
        plan["ranks"], plan["shares"], plan["groups"] = how.ranks, how.shares, how.groups
        plan["hoisted"], plan["chunk"] = how.hoisted, how.chunk
        if unpacked:
            plan["unpacked"] = entry(unpacked_kernel, self.dtype)
            plan["b_ih"] = plan["b_hh"] = address(self._no_bias)  # unless they are given
        plan["fetch"] = self.weight_bytes // (self.sizes.L * self.sizes.D * how.shares) > L2_BYTES
        fetching = bool(plan["fetch"])
        if self.projected or (how.hoisted and not unpacked):
            tail = self.cut.tail_units + self.p_cut.tail_units * self.projected > 0
            plan["project"] = address(tile_table(project_kernel, self.dtype, EVERY, tail, fetching))
        groups = how.groups if how.shares == 1 else 1
        used = tile_rows(self.dtype, plan["N"] // groups) | tile_rows(self.dtype, -(-plan["N"] // groups))
        rows = EVERY if plan["lengths"] else frozenset(used)
        advance = record_kernel if recorded else advance_kernel
        plan["advance"] = address(tile_table(advance, self.dtype, rows, self.cut.tail_units > 0, fetching))
        c_row = self.sizes.H * self.dtype.itemsize
        large = recorded and KEPT * c_row * plan["N"] * plan["T"] > PAST_CACHES
        if large and fills_line(self.cut.units, self.dtype):
            plan["past_caches"] = sum(row % CACHE_LINE == 0 for row in (GATES * c_row, c_row))
        alike = how.shares == 1 and not plan["lengths"] and not plan["reset"]
        plan["whole"] = alike and self._fits_tile(-(-plan["N"] // how.groups))
        return plan.values()

    def forward(
        self, panels: Lent, x: Array, out: Array, strides: Strides, T: int, N: int,
        state_in: tuple[Array | None, Array | None], state_out: tuple[Array, Array],
        order: Array | None = None, lengths: Array | None = None, reset: Array | None = None,
        how: Strategy | None = None,
    ) -> None:  # fmt: skip
        """Run a batch of sequences.

        x, out : contiguous, addressed by `strides` = (x_step, x_row, out_step, out_row) in bytes.
        state_in, state_out : (L*D, N, P) and (L*D, N, H); None is zeros.  order, lengths : int64 (N,), rows by falling
        length and those lengths.  reset : bool (T, N), any strides.
        """
        threads_now = threads.get_num_threads()
        if order is not None and lengths is not None:
            how = how or choose_strategy(self, N, T, threads_now, lengths)
            if how.shares == 1 and how.groups > 1:
                order, lengths = deal_rows(order, lengths, how.groups)
        key = (T, N, strides, threads_now, how, lengths is None)
        course = self._courses.get(key)
        if course is None:
            course = Course(T, N, strides, how or choose_strategy(self, N, T, threads_now, lengths))
            keep(self._courses, key, course, KEPT_WORKSPACES)
        self.run(course, panels, x, out, state_in, state_out, order, lengths, reset)

    def run(
        self, course: Course, panels: Lent, x: Array, out: Array, state_in: tuple[Array | None, Array | None],
        state_out: tuple[Array, Array], order: Array | None, lengths: Array | None, reset: Array | None,
    ) -> None:  # fmt: skip
        """Run a batch of sequences of a course's size; rows are dealt to its groups already."""
        space = self.space(course, False, order, lengths, reset)
        space.run(x, out, *state_out, *state_in, panels.array)
        if space.keeps and reset is None:
            course.idle[False] = space

    def space(
        self, course: Course, recorded: bool, order: Array | None, lengths: Array | None, reset: Array | None
    ) -> Workspace:  # fmt: skip
        """Return a workspace that nobody uses, for rows that are dealt to the course's groups already.

        It takes x, out, the state after them and before them, the panels and, recorded, what is saved for the backward,
        and the weights where the course reads them as they are.
        """
        space = course.idle.pop(recorded, None) if reset is None else None
        if space is None:
            space = Workspace(self, course, recorded, order, lengths, reset)
        elif lengths is not None:
            space.plan[ROWS : ROWS + 2] = address(order), address(lengths)
        return space

    def stream(self, panels: Lent, N: int) -> StreamRunner:
        """Return a runner that keeps a state."""
        return StreamRunner(self, panels, N)


def lying(x: Array, out: Array) -> Strides:
    """Return how x (T, N, I) and out (T, N, P) lie in memory."""
    (x_step, x_row, _), (out_step, out_row, _) = x.strides, out.strides
    return x_step, x_row, out_step, out_row


class Course:
    """How calls of one size are run, and the workspaces that some of them have left to the next."""

    __slots__ = ("N", "T", "how", "idle", "strides", "unpacked")

    def __init__(self, T: int, N: int, strides: Strides, how: Strategy, unpacked: bool = False) -> None:
        self.T, self.N, self.strides, self.unpacked = T, N, strides, unpacked
        self.how = how._replace(hoisted=True) if unpacked else how
        self.idle: dict[bool, Workspace] = {}  # by whether the call is recorded


class Workspace(Prepared):
    """The scratch of a call and the plan that points into it; its state too unless `values`, of the plan, has it."""

    def __init__(
        self, network: Network, course: Course, recorded: bool, order: Array | None = None,
        lengths: Array | None = None, reset: Array | None = None, values: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        T, N, how, size = course.T, course.N, course.how, network.dtype.itemsize
        h_bytes, c_bytes = (0, 0) if values else network.state_bytes(N)
        scratch_bytes, offsets = network.scratch_bytes(N, T, how)
        buffer = aligned(h_bytes + c_bytes + scratch_bytes, np.dtype(np.uint8))
        base = address(buffer)
        x_step, x_row, out_step, out_row = (stride // size for stride in course.strides)
        reset_step, reset_row = (0, 0) if reset is None else reset.strides
        own = {
            "T": T, "N": N, "x_step": x_step, "x_row": x_row, "out_step": out_step, "out_row": out_row,
            "order": address(order), "lengths": address(lengths), "reset": address(reset),
            "reset_step": reset_step, "reset_row": reset_row, "h": base, "c": base + h_bytes,
        } | dict(values or {})  # fmt: skip
        counters = buffer[h_bytes + c_bytes : h_bytes + c_bytes + offsets["scratch"]]
        numbers = network.plan(base + h_bytes + c_bytes, offsets, how, recorded, course.unpacked, **own)
        self.buffer, self.keeps = buffer, buffer.nbytes <= KEPT_SCRATCH
        super().__init__(numbers, counters, how.ranks, alike=lengths is None)


class StreamRunner:
    """The state of a stream in the kernels' own buffers, so that a step copies nothing."""

    def __init__(self, network: Network, panels: Lent, N: int) -> None:
        self.network, self.N = network, N
        self._panels = panels
        s = network.sizes
        h_bytes, c_bytes = network.state_bytes(N)
        self._state = aligned(h_bytes + c_bytes, np.dtype(np.uint8))
        self._state[:] = 0
        base = address(self._state)
        i, o = s.I * network.dtype.itemsize, s.P * network.dtype.itemsize
        self._strides = N * i, i, N * o, o
        self._values = {"keep": 1, "h": base, "c": base + h_bytes, "panels": address(panels.array)}
        self._space = self._workspace(1, Strategy(1, 1, 1, False, 1))
        self._chunk, self._chunk_key = self._space, (0, 0)  # of the chunk before
        self._plan = self._space.plan
        self._parity, self._begun = (list(PLAN.names or ()).index(name) for name in ("parity", "begun"))
        self._h = self._state[:h_bytes].view(network.dtype)[: s.L * 2 * N * network.state_width]
        self._h = self._h.reshape(s.L, 2, N, network.state_width)
        self._c = self._state[h_bytes:].view(network.dtype)[: s.L * N * network.cut.padded]
        self._c = self._c.reshape(s.L, N, network.cut.padded)

    def _workspace(self, T: int, how: Strategy) -> Workspace:
        return Workspace(self.network, Course(T, self.N, self._strides, how), False, values=self._values)

    def stepper(self) -> Callable[[Array, Array], Array]:
        """Return a function that runs one step, x (N, I) -> out (N, P), and returns out."""
        how = choose_strategy(self.network, self.N, 1, threads.get_num_threads(), None)
        return self.chunk if how.ranks > 1 else self._space.run_serial

    def chunk(self, x: Array, out: Array, T: int = 1) -> Array:
        """Run T steps, x (T, N, I) -> out (T, N, P), and return out."""
        key = T, threads.get_num_threads()
        if key != self._chunk_key:
            how = choose_strategy(self.network, self.N, *key, None)
            self._chunk_key, self._chunk = key, self._workspace(T, how)
        parity, plan = self._plan[self._parity], self._chunk.plan
        plan[self._parity], plan[self._begun] = parity, 0
        try:
            self._chunk.run(x, out)
        finally:  # an interrupt comes before the kernel or after it
            if plan[self._begun]:
                self._plan[self._parity] = (parity + T) & 1
        return out

    def state(self) -> tuple[Array, Array]:
        """Return copies of h (L, N, P) and c (L, N, H)."""
        s = self.network.sizes
        return self._h[:, self._plan[self._parity], :, : s.P].copy(), self._c[:, :, : s.H].copy()

    def set_state(self, h: Array | None, c: Array | None) -> None:
        """Replace the state; None is zeros."""
        s = self.network.sizes
        self._h[:, self._plan[self._parity], :, : s.P] = 0 if h is None else h
        self._c[:, :, : s.H] = 0 if c is None else c


def pays(network: Network, N: int, T: int, lengths: Array | None, calls: int = 1) -> bool:
    """Return whether some calls at once have enough work for a parallel region."""
    s = network.sizes
    rows = T * N if lengths is None else int(lengths.sum())
    return network.width * (s.P + s.I) * s.L * s.D * rows * calls >= PARALLEL_WORK


def choose_strategy(network: Network, N: int, T: int, count: int, lengths: Array | None) -> Strategy:
    """Choose how a call is shared out among at most `count` threads; the numbers are from `benchmarks/peers.py`."""
    s, size = network.sizes, network.dtype.itemsize
    step = N * network.width * s.P  # multiply-adds of one step of one direction, the input product left out
    layer_bytes = network.weight_bytes // (s.L * s.D)
    hoisted = T > 1 and s.I > 2 and (N < MIN_FULL or layer_bytes > HUGE_LAYER)
    ranks = shares = groups = 1
    if count > 1 and pays(network, N, T, lengths):
        full_tiles = MIN_FULL * count <= N and layer_bytes <= LARGE_LAYER
        if count <= s.D * N and (full_tiles or layer_bytes <= SMALL_LAYER or count <= s.D):
            ranks, groups = count, -(-count // s.D)
        elif step >= UNITS_WORK:
            ranks = shares = count
    if layer_bytes <= SMALL_LAYER:
        groups = max(groups, -(-N // ROWS_IN_CACHE))
    groups = min(groups, N)
    rows = N if shares > 1 else -(-N // groups)
    most = HOISTED_BYTES if layer_bytes <= HUGE_LAYER else HUGE_HOISTED_BYTES
    chunk = max(1, min(T, most // (network.width * size * rows))) if hoisted else min(T, 16)
    return Strategy(ranks, shares, groups, hoisted, chunk)


def load_tiles(dtype: np.dtype[Any], training: bool) -> None:
    """Compile every tile, or load it from the cache."""
    for describe in (project_kernel, advance_kernel, record_kernel)[: 2 + training]:
        for fetching in (False, True):
            tile_table(describe, dtype, EVERY, blocking(dtype).tail > 0, fetching)


def deal_rows(order: Array, lengths: Array, groups: int) -> tuple[Array, Array]:
    """Return rows and lengths, both by falling length, dealt to groups like cards, so that each has as much work.

    Group g is N g / groups to N (g + 1) / groups of what comes back, again by falling length.
    """
    N = len(order)
    starts = N * np.arange(groups + 1) // groups
    group = np.repeat(np.arange(groups), np.diff(starts))
    dealt = np.empty(N, np.int64)
    dealt[np.lexsort((group, np.arange(N) - starts[group]))] = np.arange(N)
    return order[dealt], lengths[dealt]
