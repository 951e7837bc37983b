"""Weight panels: the order in which a tile reads weights, made once for each set of weights.

*Transposed* panels [block][k][number] serve out = a W^T; they are made in squares of registers.  *Natural* ones, of the
same form, serve out = a W and are copies of pieces of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, from_dtype, types
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.call import address
from fastlstm.kernels.compile import entry
from fastlstm.kernels.region import Prepared
from fastlstm.kernels.simd import I64, Builder, Vec, kernel, target, transpose
from fastlstm.kernels.team import LINE, fence, integer_at, lazy, next_task, on_stack, part, record, record_at
from fastlstm.kernels.tile import GATES, blocking, fills_line
from fastlstm.memory import CACHE_LINE, aligned

__all__ = [
    "Cut",
    "Packing",
    "Panel",
    "bias_panel",
    "columns_panel",
    "count_blocks",
    "cut_block",
    "cut_columns",
    "cut_units",
    "gates_panel",
    "most_vectors",
    "natural_panel",
]

Array = NDArray[Any]
BAND, WIDE_BAND = 128, 16  # rows that are copied block by block, before the next ones
WIDE_ROW = 3 << 10  # bytes of a row that make it wide: H = 1024 gains a third, 512 would lose as much
PARALLEL_BYTES = 4 << 20  # of panels below which a parallel region does not pay
# Bytes of panels that are written past the caches, where they would push out the weights they are made of.
LARGE_PANELS = 8 << 20


@dataclass(frozen=True)
class Cut:
    """Hidden units in blocks: `blocks` of `units` each, then a narrow one of `tail_units` (0: none)."""

    blocks: int
    units: int
    tail_units: int

    @property
    def padded(self) -> int:
        """Units with the padding."""
        return self.blocks * self.units + self.tail_units


def cut_units(count: int, dtype: np.dtype) -> Cut:
    """Cut `count` hidden units into blocks with as little padding as the tiles allow."""
    units, tail = blocking(dtype).units, blocking(dtype).tail
    blocks, rest = divmod(count, units)
    if rest > tail:
        return Cut(blocks + 1, units, 0)
    return Cut(blocks, units, tail if rest else 0)


def cut_columns(count: int, dtype: np.dtype) -> Cut:
    """Cut the outputs of a plain product: a block is 4 * units of them."""
    return cut_units(-(-count // GATES), dtype)


def most_vectors() -> int:
    """Return how many registers wide a tile on natural panels is at most: 3 leave room for 8 rows."""
    return 3 if target().registers == 32 else 2


@dataclass(frozen=True)
class Panel:
    """How a weight is packed: the size of its panel, and rows of JOB with addresses relative to weight and panel."""

    size: int
    parts: Sequence[tuple[int, ...]]
    copied: int = 0  # size of a natural panel that is made with it, where a weight is read once for both


TRANSPOSED, NATURAL, SUMMED = range(3)

# A number of blocks of one sort; of a natural panel, of bands of rows.  Offsets in bytes, all else in numbers.
JOB = record(
    "which", "weight", "out",  # the weight and an offset in it, (rows, depth) or, natural, (depth, columns); panels
    "form",  # SUMMED: transposed, of depth 1, and the next weight is added
    "narrow", "depth", "blocks",
    "units", "gate_rows", "block_rows",  # a row of the weight is gate * gate_rows + block * block_rows (+ unit)
    "rows", "gate_limit",  # how many count, and by how many fewer for each gate
    "columns",
    "copied", "copy",  # 1: the same rows are copied to a natural panel, which begins there
)  # fmt: skip
HEADER = record("count", "ranks", "counters", "past_caches")  # of the jobs, which lie behind it
PLAN = record("kernel", "out", "header")  # behind it the addresses of the weights


def _transposed(
    K: int, cut: Cut, gate_rows: int, gate_step: int, limit: int, gate_limit: int, form: int = TRANSPOSED
) -> Panel:
    """Describe panels [block][k][gate][unit]; `limit` rows count, less `gate_limit` for each gate before."""
    main = cut.blocks * cut.units
    parts = []
    if cut.blocks:
        parts.append((0, 0, form, 0, K, cut.blocks, cut.units, gate_rows, gate_step * cut.units, limit, gate_limit, 0))
    if cut.tail_units:
        units, first = cut.tail_units, main * gate_step
        step = units if gate_limit else gate_rows
        at, limit = first * K, limit - first
        parts.append((at, GATES * main * K, form, 1, K, 1, units, step, 0, limit, gate_limit and units, 0))
    return Panel(GATES * cut.padded * K, parts)


def gates_panel(H: int, K: int, cut: Cut, copied: int = 0) -> Panel:
    """Describe the panels of a weight (4H, K), gates stacked in the order i, f, g, o."""
    return replace(_transposed(K, cut, H, 1, H, 0), copied=copied)


def bias_panel(H: int, cut: Cut) -> Panel:
    """Describe the panels of the sum of two biases (4H,), this and the next."""
    return _transposed(1, cut, H, 1, H, 0, SUMMED)


def columns_panel(outputs: int, K: int, cut: Cut) -> Panel:
    """Describe the panels of a weight (outputs, K): blocks of 4 * units outputs in their own order."""
    return _transposed(K, cut, cut.units, GATES, outputs, cut.units)


def natural_panel(K: int, columns: int, dtype: np.dtype) -> Panel:
    """Describe panels [block][k][column] of a weight (K, columns) for a W, padded to whole registers."""
    lanes = target().lanes(dtype)
    vectors = -(-columns // lanes)
    band = WIDE_BAND if columns * dtype.itemsize >= WIDE_ROW else BAND
    return Panel(K * vectors * lanes, [(0, 0, NATURAL, 0, K, -(-K // band), 0, 0, band, 0, 0, columns)])


class Packing:
    """How a set of weights is packed, again and again for other values: panels side by side in one buffer.

    panels : each with the number of the weight it is made of.
    """

    def __init__(self, panels: Sequence[tuple[int, Panel]], dtype: np.dtype[Any]) -> None:
        self.dtype, self.size = dtype, 0
        self.offsets: list[int] = []
        """Where each panel lies, in numbers."""
        self.copies: list[int] = []
        """Where the natural ones lie that are made with others."""
        jobs = []
        for which, panel in panels:
            copy = self.size + -(-panel.size // CACHE_LINE) * CACHE_LINE
            for source, out, *rest in panel.parts:
                places = [place * dtype.itemsize for place in (source, self.size + out, copy)]
                jobs.append((which, *places[:2], *rest, int(panel.copied > 0), places[2]))
            self.offsets.append(self.size)
            self.copies += [copy] * (panel.copied > 0)
            self.size = copy + -(-panel.copied // CACHE_LINE) * CACHE_LINE
        self._jobs = np.array(jobs, np.int64)
        self._past_caches = self.size * dtype.itemsize > LARGE_PANELS and fills_line(blocking(dtype).units, dtype)
        self._idle: dict[int, tuple[Prepared, Array] | None] = {}  # by threads

    def make(self, weights: Sequence[Array], out: Array) -> None:
        """Write the panels of C-contiguous weights to a buffer of `size` numbers."""
        ranks = threads.get_num_threads() if out.nbytes > PARALLEL_BYTES else 1
        idle = self._idle.pop(ranks, None) or self._prepare(ranks)
        prepared, header = idle
        prepared.run(out, header, *weights)
        self._idle[ranks] = idle

    def _prepare(self, ranks: int) -> tuple[Prepared, Array]:
        counters = aligned(2 * LINE, np.dtype(np.uint8))
        header = np.array([len(self._jobs), ranks, address(counters), self._past_caches, *self._jobs.flat], np.int64)
        most = 1 + int(self._jobs[:, 0].max())
        return Prepared([entry(panels_kernel, self.dtype), 0, 0, *[0] * most], counters, ranks), header


def _emit_transposed(b: Builder, form: tuple[int, bool], source, rows, depth, out, line) -> None:
    """Emit out[k][unit] = source[unit][k]: `rows` rows of `depth` numbers count, the others are zero.

    form : how many units there are; whether whole squares of them are written past the caches.
    """
    units, past_caches = form

    def square(first: ir.Value, whole: bool) -> None:
        left = b.ir.sub(depth, first)
        loaded = []
        for unit in range(b.lanes):
            row = b.pointer(source) + b.ir.mul(depth, I64(unit)) + first
            (row + b.ir.mul(depth, I64(units))).prefetch()  # soon the source itself: n1h512 packs a sixth faster
            count = b.ir.select(b.ir.icmp_signed("<", I64(unit), rows), left, I64(0))
            loaded.append(row.load(b.lanes) if whole else row.load_first(b.lanes, count))
        for k, column in enumerate(transpose(b, loaded)):
            to = b.pointer(out) + b.ir.mul(line, b.ir.add(first, I64(k)))
            count = b.ir.select(b.ir.icmp_signed("<", I64(k), left), I64(units), I64(0))
            if whole:
                to.store(column, past_caches)
            else:
                to.store_first(column, count)

    def squares(begin: ir.Value, end: ir.Value, whole: bool) -> None:
        def one(i: ir.Value, _: list[Vec]) -> list[Vec]:
            square(b.ir.mul(b.ir.add(begin, i), I64(b.lanes)), whole)
            return []

        b.loop(b.ir.sub(end, begin), one)

    every, whole = b.ir.sdiv(b.ir.add(depth, I64(b.lanes - 1)), I64(b.lanes)), I64(0)
    if units == b.lanes:  # a fifth faster without masks
        whole = b.ir.select(b.ir.icmp_signed(">=", rows, I64(b.lanes)), b.ir.sdiv(depth, I64(b.lanes)), whole)
        squares(I64(0), whole, whole=True)
    squares(whole, every, whole=False)


def _emit_summed(b: Builder, units: int, first, second, rows, out) -> None:
    """Emit out[unit] = first[unit] + second[unit] for `rows` of the units, and zeros behind them."""
    b.pointer(out).store(b.pointer(first).load_first(units, rows) + b.pointer(second).load_first(units, rows))


def _emit_natural(b: Builder, form: tuple[int, bool], source, stride, valid, rows, out) -> None:
    """Emit out[row] = source[row], rows `stride` apart: the first `valid` numbers, and zeros behind them.

    form : how many registers a row of `out` has; whether they are written past the caches.
    """
    vectors, past_caches = form

    def one_row(row: ir.Value, _: list[Vec]) -> list[Vec]:
        from_ = b.pointer(source) + b.ir.mul(row, stride)
        to = b.pointer(out) + b.ir.mul(row, I64(vectors * b.lanes))
        for v in range(vectors):
            vec = (from_ + v * b.lanes).load_first(b.lanes, b.ir.sub(valid, I64(v * b.lanes)))
            (to + v * b.lanes).store(vec, past_caches)
        return []

    b.loop(rows, one_row)


@lazy
def count_blocks(columns, lanes, widest):
    """Return how many blocks natural columns have: an even number, so that two threads have as much, or one."""
    vectors = (columns + lanes - 1) // lanes
    blocks = (vectors + widest - 1) // widest
    return blocks + (blocks % 2 if blocks > 1 else 0)


@lazy
def cut_block(columns, block, lanes, widest):
    """Return the first register of a block of natural columns, and how many it has."""
    vectors = (columns + lanes - 1) // lanes
    blocks = count_blocks(columns, lanes, widest)
    first = vectors * block // blocks
    return first, vectors * (block + 1) // blocks - first


def panels_kernel(dtype: np.dtype):
    """Describe what packs weights: a function of the plan and the thread's rank; a block is a task."""
    size, lanes, widest, job_size = dtype.itemsize, target().lanes(dtype), most_vectors(), JOB.itemsize
    units = [blocking(dtype).units] + [blocking(dtype).tail] * bool(blocking(dtype).tail)
    forms = [(count, False) for count in units]
    widths = [(vectors, False) for vectors in range(1, widest + 1)]
    if fills_line(units[0], dtype):
        forms.append((units[0], True))
        widths += [(vectors, True) for vectors, _ in widths]
    whole_past = len(units)  # the form of whole squares past the caches
    transposed = kernel(dtype, "transposed", 5, _emit_transposed, dict(enumerate(forms)))
    summed = kernel(dtype, "summed", 4, _emit_summed, dict(enumerate(units)))
    natural = kernel(dtype, "natural", 5, _emit_natural, dict(enumerate(widths)))
    job_at, plan_at, header_at = (record_at(from_dtype(dtype_)) for dtype_ in (JOB, PLAN, HEADER))
    header_size, plan_size = HEADER.itemsize, PLAN.itemsize
    i = types.int64

    @part(types.void, *[i] * 7)
    def copy_rows(weight, depth, columns, k, rows, panels, past_caches):
        """Copy rows of a weight (depth, columns), from row k on, to its natural panels."""
        for each in range(count_blocks(columns, lanes, widest)):
            first, vectors = cut_block(columns, each, lanes, widest)
            at, line = first * lanes, vectors * lanes
            natural(on_stack((
                vectors - 1 + past_caches * widest, weight + (k * columns + at) * size, columns, columns - at, rows,
                panels + (at * depth + k * line) * size,
            )))  # fmt: skip

    @part(types.void, from_dtype(JOB), i, i, i, i, i)
    def make_block(job, start, following, base, block, past_caches):
        """Make a block of the panels, at `base`, of the weight at `start`; `following`: the next weight."""
        weight, panels, copies = start + job.weight, base + job.out, base + job.copy
        if job.form == NATURAL:
            k = block * job.block_rows
            copy_rows(weight, job.depth, job.columns, k, min(job.block_rows, job.depth - k), panels, past_caches)
            return
        for gate in range(GATES):
            rows = job.rows - block * job.block_rows - gate * job.gate_limit
            k = gate * job.gate_rows + block * job.block_rows
            offset = k * job.depth * size
            out = panels + (block * job.depth * GATES + gate) * job.units * size
            if job.form == SUMMED:
                summed(on_stack((job.narrow, weight + offset, following + offset, rows, out)))
            else:
                which = whole_past if past_caches and job.narrow == 0 else job.narrow
                transposed(on_stack((which, weight + offset, max(rows, 0), job.depth, out, GATES * job.units)))
            if job.copied:
                k += job.weight // (job.depth * size)
                copy_rows(start, GATES * job.gate_rows, job.depth, k, min(rows, job.units), copies, past_caches)

    def run(plan, rank):
        p = carray(plan_at(plan), 1)[0]
        h = carray(header_at(p.header), 1)[0]
        jobs = p.header + header_size
        task, nth, before = -1, 0, 0
        while True:
            task = next_task(h.counters) if h.ranks > 1 else task + 1
            while nth < h.count:
                blocks = carray(job_at(jobs + nth * job_size), 1)[0].blocks
                if task < before + blocks:
                    break
                before += blocks
                nth += 1
            if nth == h.count:
                break
            job = carray(job_at(jobs + nth * job_size), 1)[0]
            weight = plan + plan_size + job.which * 8
            following = integer_at(weight + 8) + job.weight if job.form == SUMMED else 0
            make_block(job, integer_at(weight), following, p.out, task - before, h.past_caches)
        if h.past_caches:
            fence()

    return run, types.void(types.int64, types.int64)
