"""A network as the kernels see it: packed weights, a plan for each call, and how the call is shared out."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.call import bind
from fastlstm.kernels.compile import entry
from fastlstm.kernels.panels import (
    Packing,
    Spare,
    address,
    aligned,
    columns_panel,
    cut_columns,
    cut_units,
    gates_panel,
    natural_panel,
)
from fastlstm.kernels.product import L2_BYTES
from fastlstm.kernels.region import run_region
from fastlstm.kernels.sequence import PLAN, TABLES_AT, WEIGHT_FIELDS, forward_kernel
from fastlstm.kernels.team import LINE
from fastlstm.kernels.tile import (
    GATES,
    advance_kernel,
    advance_row_kernel,
    blocking,
    most_blocks,
    project_kernel,
    record_kernel,
)

__all__ = ["Network", "Sizes", "Strategy", "StreamRunner"]

Array = NDArray[Any]

PARALLEL_WORK = 2 << 20  # multiply-adds of a call below which a parallel region does not pay
UNITS_WORK = 16 << 10  # multiply-adds of a step below which the team's barrier costs more than it gains
SMALL_LAYER = 256 << 10  # bytes of weights that each core can hold for itself
LARGE_LAYER = 4 << 20  # bytes of weights that each core had better not read in full at every step
HUGE_LAYER = 16 << 20  # bytes of weights that come from memory: W_ih x for several steps at once
HUGE_HOISTED_BYTES = 4 << 20
ROWS_IN_CACHE = 96  # rows of a group whose state and x stay in L2 from step to step
MIN_FULL = 6  # rows: as many as a tile has; from there on the step's own tile is full
HOISTED_BYTES = 256 << 10  # of z for the steps of a chunk
GIVEN = [list(PLAN.names or ()).index(name) for name in ("weights", "h_0", "c_0", "saved")]  # may differ in each call
KEPT_WORKSPACES, KEPT_SCRATCH = 4, 2 << 20  # how many, and up to how many bytes each, outlive their call
KEPT_PANELS = 128 << 20  # bytes of training's panels that outlive their weights


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
    """Packed weights of one network, and its forward pass.

    Parameters
    ----------
    sizes : Sizes
        Its sizes.
    dtype : numpy.dtype
        float32 or float64.
    params : mapping of str to ndarray
        Weights under PyTorch's names, of that dtype.
    reverse : bool, default False
        Whether the one direction runs from the last step to the first.
    natural : bool, default False
        Whether the backward's panels are wanted too, of W_ih, W_hh and, where there is a projection, W_hr.
    """

    def __init__(
        self, sizes: Sizes, dtype: np.dtype[Any], params: Mapping[str, Array], reverse: bool = False,
        natural: bool = False,
    ) -> None:  # fmt: skip
        self.sizes, self.dtype = sizes, dtype
        self.cut, self.p_cut = cut_units(sizes.H, dtype), cut_columns(sizes.P, dtype)
        self.projected = sizes.P != sizes.H
        self.width = GATES * self.cut.padded
        self.state_width = GATES * self.p_cut.padded if self.projected else self.cut.padded
        self._zeros = aligned(GATES * self.p_cut.padded, dtype)
        self._zeros[:] = 0
        self._idle: dict[tuple[Any, ...], Workspace] = {}  # of calls before, for calls like them
        plan: dict[str, int] = dict.fromkeys(PLAN.names or (), 0)
        plan |= {
            "kernel": entry(forward_kernel, dtype), "H": sizes.H, "P": sizes.P, "L": sizes.L, "D": sizes.D,
            "blocks": self.cut.blocks, "tail": int(self.cut.tail_units > 0), "units": self.cut.padded,
            "width": self.width, "state_width": self.state_width, "projected": int(self.projected),
            "p_blocks": self.p_cut.blocks, "p_tail": int(self.p_cut.tail_units > 0),
            "zeros": address(self._zeros), "reverse": int(reverse),
        }  # fmt: skip
        self._plan = plan
        self._natural = natural
        self._spare = Spare(KEPT_PANELS) if natural else None
        self._packing = self._describe_packing(natural)
        self._depths = [
            sizes.I if layer == 0 else sizes.D * sizes.P for layer in range(sizes.L) for _ in range(sizes.D)
        ]
        self._pack(params)

    def repacked(self, params: Mapping[str, Array]) -> Network:
        """Return a network like this one with other weights."""
        network = copy.copy(self)
        network._pack(params)
        return network

    def _describe_packing(self, natural: bool) -> Packing:
        """Describe the panels of all weights in the order of `_pack`; `natural`: the backward's behind them."""
        s, panels, others = self.sizes, [], []
        for layer in range(s.L):
            I = s.I if layer == 0 else s.D * s.P
            for _ in range(s.D):
                panels += [gates_panel(s.H, K, self.cut) for K in (1, I, s.P)]
                others += [natural_panel(GATES * s.H, K, self.dtype) for K in (I, s.P)]
                if self.projected:
                    panels.append(columns_panel(s.P, s.H, self.p_cut))
                    others.append(natural_panel(s.P, s.H, self.dtype))
        self.weight_bytes = sum(panel.size for panel in panels) * self.dtype.itemsize
        return Packing(panels + others * natural, self.dtype)

    def _pack(self, params: Mapping[str, Array]) -> None:
        s = self.sizes
        found, others = [], []
        for layer in range(s.L):
            for suffix in ("", "_reverse")[: s.D]:
                name = f"_l{layer}{suffix}"
                if "bias_ih" + name in params:
                    bias = params["bias_ih" + name] + params["bias_hh" + name]
                else:
                    bias = np.zeros(GATES * s.H, self.dtype)
                matrices = [params["weight_ih" + name], params["weight_hh" + name]]
                if self.projected:
                    matrices.append(params["weight_hr" + name])
                found += [bias, *matrices]
                others += matrices
        self._buffer, addresses = self._packing.make(found + others * self._natural, self._spare)
        if self._spare and self._buffer.nbytes > L2_BYTES:
            weakref.finalize(self, self._spare.give_back, self._buffer).atexit = False
        self.natural_panels = addresses[len(found) :].tolist()
        each = len(found) // (s.L * s.D)
        self._weights = np.empty((s.L * s.D, len(WEIGHT_FIELDS)), np.int64)
        self._weights[:, 0] = self._depths
        self._weights[:, 1 : 1 + each] = addresses[: len(found)].reshape(-1, each)
        self._weights_at = address(self._weights)

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
        counters = (2 + 2 * how.shares) * LINE
        middle = 2 * T * N * 2 * s.P * size if s.L > 1 and s.D == 2 else 0
        offsets = {"z_at": z_at, "between_at": between_at, "m_at": m_at, "scratch_rank": per_rank}
        offsets |= {"scratch": counters, "middle": counters + how.ranks * per_rank}
        return counters + how.ranks * per_rank + middle, offsets

    def plan(self, base: int, offsets: dict[str, int], how: Strategy, **values: int) -> Array:
        """Return the plan of a call with a scratch at an address."""
        plan = self._plan | offsets
        if how.hoisted or self.projected:
            plan["project"] = entry(project_kernel, self.dtype)
        if "advance" not in values:
            rows = values["N"] if how.shares > 1 else -(-values["N"] // how.groups)
            plan["advance"] = entry(advance_kernel if rows > 1 else advance_row_kernel, self.dtype)
        plan |= values
        plan["scratch"] += base
        plan["middle"] += base
        plan["counters"] = base
        plan["ranks"], plan["shares"], plan["groups"] = how.ranks, how.shares, how.groups
        plan["hoisted"], plan["chunk"] = how.hoisted, how.chunk
        plan["fetch"] = self.weight_bytes // (self.sizes.L * self.sizes.D * how.shares) > L2_BYTES
        alike = how.shares == 1 and not plan["lengths"] and not plan["reset"]
        plan["whole"] = alike and self._fits_tile(-(-plan["N"] // how.groups))
        return np.array(list(plan.values()), np.int64)

    def forward(
        self, x: Array, out: Array, strides: tuple[int, int, int, int], T: int, N: int,
        state_in: tuple[Array | None, Array | None], state_out: tuple[Array, Array],
        order: Array | None = None, lengths: Array | None = None, reset: Array | None = None,
        how: Strategy | None = None, saved: Array | None = None, dealt: bool = False,
    ) -> None:  # fmt: skip
        """Run a batch of sequences.

        x, out : contiguous, addressed by `strides` = (x_step, x_row, out_step, out_row) in numbers.
        state_in, state_out : (L*D, N, P) and (L*D, N, H); None is zeros.  order, lengths : int64 (N,), rows by falling
        length and those lengths.  reset : bool (T, N), any strides.  saved : (T, N, 5, H), rows in that order, written
        for the backward.  dealt : whether rows are dealt to the groups of `how` already.
        """
        plain = lengths is None and reset is None
        threads_now = threads.get_num_threads()
        key = (T, N, strides, threads_now, saved is None, how)
        space = self._idle.pop(key, None) if plain else None
        if space is None:
            how = how or choose_strategy(self, N, T, threads_now, lengths)
            if order is not None and lengths is not None and how.shares == 1 and how.groups > 1 and not dealt:
                order, lengths = deal_rows(order, lengths, how.groups)
            values = {
                "T": T, "N": N, "x_step": strides[0], "x_row": strides[1], "out_step": strides[2],
                "out_row": strides[3], "order": address(order), "lengths": address(lengths), "reset": address(reset),
            }  # fmt: skip
            if saved is not None:
                values["advance"] = entry(record_kernel, self.dtype)
            if reset is not None:
                values |= {"reset_step": reset.strides[0], "reset_row": reset.strides[1]}
            space = Workspace(self, N, T, how, values)
        given = self._weights_at, address(state_in[0]), address(state_in[1]), address(saved)
        if given != space.given:
            space.given = given
            space.plan[GIVEN] = given
        space.run(x, out, *state_out)
        if plain and space.buffer.nbytes <= KEPT_SCRATCH:
            self._keep(key, space)

    def _keep(self, key: tuple[Any, ...], space: Workspace) -> None:
        """Leave a workspace to the next call like this one; without a lock, which a fork could leave taken."""
        self._idle[key] = space
        if len(self._idle) > KEPT_WORKSPACES:
            with suppress(StopIteration, RuntimeError):  # another thread was faster
                self._idle.pop(next(iter(self._idle)), None)

    def stream(self, N: int) -> StreamRunner:
        """Return a runner that keeps a state."""
        return StreamRunner(self, N)


class Workspace:
    """The scratch of a call and the plan that points into it; state in buffers of its own unless the plan has them."""

    def __init__(self, network: Network, N: int, T: int, how: Strategy, values: dict[str, int]) -> None:
        self.how = how
        h_bytes, c_bytes = (0, 0) if "h" in values else network.state_bytes(N)
        scratch_bytes, offsets = network.scratch_bytes(N, T, how)
        self.buffer = aligned(h_bytes + c_bytes + scratch_bytes, np.dtype(np.uint8))
        base = address(self.buffer)
        own = {"h": base, "c": base + h_bytes} | values
        self.plan = network.plan(base + h_bytes + c_bytes, offsets, how, **own)
        self.run_serial = bind(self.plan)
        self.given = network._weights_at, 0, 0, 0
        self.plan[GIVEN] = self.given
        self._counters = self.buffer[h_bytes + c_bytes : h_bytes + c_bytes + offsets["scratch"]]

    def run(self, x: Array, out: Array, h_n: Array, c_n: Array) -> None:
        """Run the plan in a parallel region, or on this thread where one is not wanted or not to be had."""
        if self.how.ranks > 1:
            self._counters[:] = 0
            self.plan[1:5] = address(x), address(out), address(h_n), address(c_n)
            if run_region(self.plan, self.how.ranks):
                return
        self.run_serial(x, out, h_n, c_n)


class StreamRunner:
    """The state of a stream in the kernels' own buffers, so that a step copies nothing."""

    def __init__(self, network: Network, N: int) -> None:
        self.network, self.N = network, N
        s = network.sizes
        h_bytes, c_bytes = network.state_bytes(N)
        self._state = aligned(h_bytes + c_bytes, np.dtype(np.uint8))
        self._state[:] = 0
        base = address(self._state)
        self._values = {"keep": 1, "N": N, "h": base, "c": base + h_bytes, "x_row": s.I, "out_row": s.P}
        self._values |= {"x_step": N * s.I, "out_step": N * s.P}
        self._space = self._workspace(1, Strategy(1, 1, 1, False, 1))
        self._chunk, self._chunk_key = self._space, (0, 0)  # of the chunk before
        self._plan = self._space.plan
        self._parity = list(PLAN.names or ()).index("parity")
        self._h = self._state[:h_bytes].view(network.dtype)[: s.L * 2 * N * network.state_width]
        self._h = self._h.reshape(s.L, 2, N, network.state_width)
        self._c = self._state[h_bytes:].view(network.dtype)[: s.L * N * network.cut.padded]
        self._c = self._c.reshape(s.L, N, network.cut.padded)

    def _workspace(self, T: int, how: Strategy) -> Workspace:
        return Workspace(self.network, self.N, T, how, self._values | {"T": T})

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
        parity = self._plan[self._parity]
        self._chunk.plan[self._parity] = parity
        self._chunk.run(x, out, x, x)
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


def choose_strategy(network: Network, N: int, T: int, count: int, lengths: Array | None) -> Strategy:
    """Choose how a call is shared out among at most `count` threads; the numbers are from `benchmarks/peers.py`."""
    s, size = network.sizes, network.dtype.itemsize
    step = N * network.width * s.P  # multiply-adds of one step of one direction, the input product left out
    work = network.width * (s.P + s.I) * s.L * s.D * (T * N if lengths is None else int(lengths.sum()))
    layer_bytes = network.weight_bytes // (s.L * s.D)
    hoisted = T > 1 and s.I > 2 and (N < MIN_FULL or layer_bytes > HUGE_LAYER)
    ranks = shares = groups = 1
    if count > 1 and work >= PARALLEL_WORK:
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
