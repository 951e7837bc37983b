"""The register tile: rows of numbers times weight panels, and the LSTM cell while the sums are still in registers.

    z = start + a W_a + h W_h
    c = sigmoid(z_f) * c + sigmoid(z_i) * tanh(z_g)
    h = sigmoid(z_o) * tanh(c)

(Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000.)  Every element of z is the same chains of
fused multiply-adds in the order of k, whatever the tile, so no result depends on how the work was cut.

A *block* is `units` hidden units.  Its panel is [k][gate][unit]: `4 * units` numbers for each k, in so many registers.
With units == lanes a register holds one gate; a narrow block packs several gates in a register, which keeps sizes that
are no multiple of `lanes` from drowning in padding and lets 16 registers hold enough rows.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numpy.typing import NDArray

from fastlstm.kernels.activations import sigmoid, tanh
from fastlstm.kernels.compile import entry
from fastlstm.kernels.simd import I1, I64, Builder, Pointer, Vec, bundle, concat, fma, kernel, target, transpose
from fastlstm.memory import CACHE_LINE

__all__ = [
    "EVERY",
    "FETCHING_ROWS",
    "GATES",
    "Blocking",
    "Shape",
    "advance_kernel",
    "blocking",
    "chain",
    "fills_line",
    "fits_squares",
    "most_blocks",
    "project_kernel",
    "record_kernel",
    "shapes",
    "tile_table",
    "unpacked_kernel",
]

GATES = 4
KEPT = GATES + 1  # numbers that the backward needs of a hidden unit and step: i, f, g, o and c'
FETCHING_ROWS = 4  # tiles of fewer rows read their panels faster than they could fetch others
CHAINS = 4  # registers of cells in lockstep: one waits for its own latencies; six spill, 113 cycles each and not 92


@dataclass(frozen=True)
class Blocking:
    """How hidden units are cut into blocks on this target."""

    lanes: int
    units: int  # in a main block
    tail: int  # units of the narrow block that may end the row; 0: there is none
    rows: int  # most rows in a tile
    accumulators: int  # registers for sums


@dataclass(frozen=True)
class Shape:
    """One tile: `rows` rows of `blocks` (units each), side by side."""

    rows: int
    blocks: tuple[int, ...]
    fetching: bool = False  # whether it brings the next panel to L2: where weights do not stay there, b1024 gains 8%


@functools.cache
def blocking(dtype: np.dtype) -> Blocking:
    """Return the cut for a dtype: 32 registers hold 6 rows of 4 vectors, 16 registers 6 rows of 2."""
    lanes = target().lanes(dtype)
    if target().registers == 32:
        return Blocking(lanes, lanes, lanes // 2, 6, 24)
    return Blocking(lanes, lanes // 2, 0, 6, 12)


@functools.cache
def shapes(dtype: np.dtype) -> tuple[Shape, ...]:
    """Return every tile that is compiled, those of one row first: as many blocks as the registers hold side by side.

    A tail stands beside other blocks for a single row, where few sums mean waiting for each other; else alone.
    """
    cut = blocking(dtype)
    found = []
    for rows in range(1, cut.rows + 1):
        most = most_blocks(dtype, rows)
        found += [Shape(rows, (cut.units,) * main) for main in range(1, most + 1)]
        if cut.tail:
            found += [Shape(rows, (cut.units,) * main + (cut.tail,)) for main in range(most if rows == 1 else 1)]
        if rows >= FETCHING_ROWS:
            found.append(Shape(rows, (cut.units,), fetching=True))
    return tuple(found)


def most_blocks(dtype: np.dtype, rows: int) -> int:
    """Return how many main blocks stand side by side in a tile of `rows` rows."""
    cut = blocking(dtype)
    vectors = GATES * cut.units // cut.lanes
    return max(1, min(16 // vectors, cut.accumulators // (rows * vectors)))


def fills_line(units: int, dtype: np.dtype) -> bool:
    """Return whether a register of so many units is a whole cache line, as what is written past the caches must be."""
    return units * dtype.itemsize == CACHE_LINE


def chain(
    b: Builder, sums: list[Vec], first: ir.Value, count: ir.Value, rows: Sequence[Pointer], panels: Sequence[Pointer],
    widths: Sequence[int], ahead: Pointer | None = None,
) -> list[Vec]:  # fmt: skip
    """Return sums[row, vector] + rows[row][k] * panel[k][vector], a multiply-add for each k from `first` on, in order.

    Meanwhile a cache line for each k comes to L2, from `ahead` on.
    """
    total = sum(widths)
    pairs = [(r, v) for r in range(len(rows)) for v in range(total)]
    if len(rows) < FETCHING_ROWS:  # rows are held and each weight is used as it comes: fewer registers
        pairs.sort(key=lambda pair: pair[1])

    def step(i: ir.Value, before: list[Vec]) -> list[Vec]:
        k = b.ir.add(first, i)
        weights = []
        for panel, width in zip(panels, widths, strict=True):
            line = panel + b.ir.mul(k, I64(width * b.lanes))
            weights += _load_all(line, width, b.lanes)
        if ahead is not None:
            (ahead + b.ir.mul(k, I64(b.lanes))).prefetch()
        a = [(row + k).broadcast(b.lanes) for row in rows]
        after = list(before)
        for r, v in pairs:
            after[r * total + v] = fma(a[r], weights[v], before[r * total + v])
        return after

    return b.loop(count, step, sums)


SEGMENTS = (256, 64), (128, 32), (64, 16), (16, 8)
"""Up to how many terms a sum has segments of how many; beyond them 128."""


def _in_segments(
    b: Builder, totals: list[Vec], depth: ir.Value, chain_of: Callable[[ir.Value, ir.Value, list[Vec]], list[Vec]],
    go_on: bool,
) -> list[Vec]:  # fmt: skip
    """Return totals + sums of `depth` terms, in segments of 8 to 128; `chain_of(first, count, sums)` adds some terms.

    Each segment begins at zero and is added when it is complete; with `go_on` the first goes on from `totals` instead.
    A rounding error is as large as the sum it happens in, so K terms in one chain err by sqrt(K) where these err by
    sqrt(K / segments): a half, no more than PyTorch's on any size, for 13 cycles a segment (1% to 4%).
    """
    length = I64(128)
    for most, segment_length in SEGMENTS:
        length = b.ir.select(b.ir.icmp_signed("<=", depth, I64(most)), I64(segment_length), length)

    def some(i: ir.Value, before: list[Vec]) -> list[Vec]:
        first = b.ir.mul(i, length)
        rest = b.ir.sub(depth, first)
        return chain_of(first, b.ir.select(b.ir.icmp_signed("<", rest, length), rest, length), before)

    def segment(i: ir.Value, totals: list[Vec]) -> list[Vec]:
        i = b.ir.add(i, I64(1)) if go_on else i
        parts = some(i, [vec.zeros() for vec in totals])
        return [total + part for total, part in zip(totals, parts, strict=True)]

    if go_on:
        totals = some(I64(0), totals)
    whole = b.ir.sub(depth, I64(1)) if go_on else b.ir.sub(b.ir.add(depth, length), I64(1))
    return b.loop(b.ir.sdiv(whole, length), segment, totals)


def _multiply(
    b: Builder, sums: list[list[Vec]], depth: ir.Value, rows: Sequence[Pointer], panels: Sequence[Pointer],
    widths: Sequence[int], ahead: Pointer | None, go_on: bool,
) -> list[list[Vec]]:  # fmt: skip
    """Return sums[row][vector] + sum over k of rows[row][k] * panel[k][vector], as `_in_segments`."""

    def chain_of(first: ir.Value, count: ir.Value, before: list[Vec]) -> list[Vec]:
        return chain(b, before, first, count, rows, panels, widths, ahead)

    totals = _in_segments(b, [vec for row in sums for vec in row], depth, chain_of, go_on)
    width = sum(widths)
    return [totals[r * width : (r + 1) * width] for r in range(len(rows))]


def _panels(b: Builder, address: ir.Value, depth: ir.Value, shape: Shape) -> list[Pointer]:
    """Return where each block's panel starts: one after the other, `depth` lines each."""
    first, found, before = b.pointer(address), [], 0
    for units in shape.blocks:
        found.append(first + b.ir.mul(depth, I64(before)))
        before += GATES * units
    return found


def _rows(b: Builder, base: Pointer, table: ir.Value, first: ir.Value, count: int) -> list[Pointer]:
    """Return a pointer for each row from `first` on, by a table of int64 offsets in numbers."""
    offsets = b.ir.gep(b.ir.inttoptr(table, I64.as_pointer()), [first])
    return [base + b.ir.load(b.ir.gep(offsets, [I64(r)])) for r in range(count)]


def _strided(b: Builder, base: Pointer, stride: ir.Value, first: ir.Value, count: int) -> list[Pointer]:
    start = base + b.ir.mul(stride, first)
    return [start + b.ir.mul(stride, I64(r)) for r in range(count)]


def _ahead(b: Builder, shape: Shape, panel: ir.Value, depth: ir.Value, tile: ir.Value) -> Pointer | None:
    """Return which part of the next panel this tile fetches: the first tiles of a block take a part each."""
    if not shape.fetching:
        return None
    part = b.ir.select(b.ir.icmp_signed("<", tile, I64(sum(_widths(b, shape)))), tile, I64(0))
    return b.pointer(panel) + b.ir.mul(b.ir.mul(part, depth), I64(b.lanes))


def _widths(b: Builder, shape: Shape) -> list[int]:
    return [GATES * units // b.lanes for units in shape.blocks]


def _load_all(pointer: Pointer, count: int, lanes: int) -> list[Vec]:
    return [(pointer + v * lanes).load(lanes) for v in range(count)]


def _emit_project(b: Builder, shape: Shape, tiles, start, a, a_rows, depth, panel, next_panel, out, out_stride) -> None:
    """Emit out[row] = start + a[row] W for `tiles` tiles, one below the other.

    start : (4 * units,).  a : rows at `a_rows`, `depth` numbers each.  panel : (blocks, depth, 4 * units).
    out : (rows, 4 * units), `out_stride` apart.
    """
    widths = _widths(b, shape)
    panels = _panels(b, panel, depth, shape)

    def tile(i: ir.Value, _: list[Vec]) -> list[Vec]:
        row0 = b.ir.mul(i, I64(shape.rows))
        sums = [_load_all(b.pointer(start), sum(widths), b.lanes)] * shape.rows
        ahead = _ahead(b, shape, next_panel, depth, i)
        sums = _multiply(
            b, sums, depth, _rows(b, b.pointer(a), a_rows, row0, shape.rows), panels, widths, ahead, go_on=True
        )
        for row, vecs in zip(_strided(b, b.pointer(out), out_stride, row0, shape.rows), sums, strict=True):
            for v, vec in enumerate(vecs):
                (row + v * b.lanes).store(vec)
        return []

    b.loop(tiles, tile)


def fits_squares(depths: Sequence[int], H: int, dtype: np.dtype) -> bool:
    """Return whether weights (4H, depth) can be read where they are, in squares of registers that a segment holds."""
    lanes = blocking(dtype).lanes
    least = max((most + 1 for most, length in SEGMENTS if length % lanes), default=1)
    return H % blocking(dtype).units == 0 and all(depth % lanes == 0 and depth >= least for depth in depths)


def _emit_unpacked(
    b: Builder, _: object, first, last, H, b_ih, b_hh, x, x_depth, w_ih, h, h_depth, w_hh, out
) -> None:  # fmt: skip
    """Emit out = b_ih + b_hh + x W_ih^T + h W_hh^T of a single row, in blocks `first` to `last`, weights as they are.

    b_ih, b_hh : (4H,).  w_ih, w_hh : (4H, depth), of which registers are transposed: to be read but once, they are not
    worth a panel.  x, h : (depth,).  out : (blocks, 4 * units).
    """
    units, lanes = blocking(b.dtype).units, b.lanes
    vectors, gates = GATES * units // lanes, lanes // units  # registers of a block, gates in a register

    def vector(n: ir.Value, _: list[Vec]) -> list[Vec]:
        n = b.ir.add(b.ir.mul(first, I64(vectors)), n)
        gate = b.ir.mul(b.ir.srem(n, I64(vectors)), I64(gates))
        unit = b.ir.mul(b.ir.sdiv(n, I64(vectors)), I64(units))
        starts = [b.ir.add(b.ir.mul(b.ir.add(gate, I64(more)), H), unit) for more in range(gates)]
        biases = (concat([(b.pointer(bias) + start).load(units) for start in starts]) for bias in (b_ih, b_hh))
        totals = [next(biases) + next(biases)]
        for a, depth, weight, go_on in ((x, x_depth, w_ih, True), (h, h_depth, w_hh, False)):
            numbers = b.pointer(a)
            blocks = [b.pointer(weight) + b.ir.mul(start, depth) for start in starts]
            rows = [block + b.ir.mul(depth, I64(row)) for block in blocks for row in range(units)]

            def chain_of(
                begin: ir.Value, count: ir.Value, before: list[Vec], numbers: Pointer = numbers, rows: Any = rows
            ) -> list[Vec]:
                def square(i: ir.Value, sums: list[Vec]) -> list[Vec]:
                    k = b.ir.add(begin, b.ir.mul(i, I64(lanes)))
                    (total,) = sums
                    for j, column in enumerate(transpose(b, [(row + k).load(lanes) for row in rows])):
                        total = fma((numbers + k + j).broadcast(lanes), column, total)
                    return [total]

                return b.loop(b.ir.sdiv(count, I64(lanes)), square, before)

            totals = _in_segments(b, totals, depth, chain_of, go_on)
        (b.pointer(out) + b.ir.mul(n, I64(lanes))).store(totals[0])
        return []

    b.loop(b.ir.mul(b.ir.sub(last, first), I64(vectors)), vector)


@dataclass(frozen=True)
class _Cells:
    """The cells of one block in one row: where they are, and their z in registers."""

    row: int
    unit: int
    units: int
    z: list[Vec]

    def gate(self, which: int) -> Vec:
        """Return z_i, z_f, z_g or z_o, cut out of its register."""
        lanes, at = self.z[0].lanes, which * self.units
        return self.z[at // lanes].part(at % lanes, self.units)


@dataclass(frozen=True)
class _Record:
    """Where a tile writes what the backward needs.

    A row of the gates is cut in blocks of `lanes` units, [block][gate][unit], so that a tile writes whole stretches.
    """

    gates: list[Pointer]  # of each row, from its first unit on
    c: list[Pointer]  # of each row, from the tile's first unit on
    first: ir.Value  # the tile's first unit
    H: ir.Value
    whole: ir.Value  # bits: all units of the blocks that the tile touches count
    gates_past: ir.Value  # straight to memory
    c_past: ir.Value

    def gate(self, b: Builder, row: int, which: int, unit: int, whole: bool) -> Pointer:
        """Return where a gate of a row is written, from a unit of the tile on; whole: its block is."""
        place = b.ir.add(self.first, I64(unit))
        within = b.ir.and_(place, I64(b.lanes - 1))
        block, width = b.ir.sub(place, within), I64(b.lanes)
        if not whole:
            left = b.ir.sub(self.H, block)
            width = b.ir.select(b.ir.icmp_signed("<", left, width), left, width)
        block = b.ir.mul(block, I64(GATES))
        return self.gates[row] + b.ir.add(block, b.ir.add(b.ir.mul(width, I64(which)), within))


def advance_cell(
    z_i: Vec, z_f: Vec, z_g: Vec, z_o: Vec, c: Vec, keep: Callable[[int, Vec], None]
) -> tuple[Vec, Vec]:  # fmt: skip
    """Return h and c of the next step; `keep` is given i, f, g and o, numbers 0 to 3, and the new c, number 4.

    Each is kept as soon as it is there, so that its division goes on beside the next exponential: all of them at the
    end, where the compiler would put them, cost a third more.
    """
    f = sigmoid(z_f)
    keep(1, f.value())
    c = f.times(c)
    i = sigmoid(z_i)
    keep(0, i.value())
    g = tanh(z_g)
    keep(2, g.value())
    c = c + i.times(g)
    keep(4, c)
    o = sigmoid(z_o)
    keep(3, o.value())
    return o.times(tanh(c)), c


def _emit_advance(
    b: Builder, shape: Shape, tiles, steps, start, start_stride, start_step,
    a, a_rows, a_step, a_depth, a_panel, a_next_panel, h, h_stride, h_depth, h_panel, h_next_panel,
    c, c_stride, h_next, h_next_stride, out, out_rows, out_step, valid, *recorded,
) -> None:  # fmt: skip
    """Emit steps of `tiles` tiles, one below the other.

    start : (rows, 4 * units), `start_stride` apart: the bias (stride 0) or z with the input product in it.
    a : rows at `a_rows`, `a_depth` numbers each (0 where the product is in `start`).
    h : in (rows, h_depth), `h_stride` apart.  a_panel, h_panel : (blocks, depth, 4 * units); a_next_panel,
    h_next_panel : those of the blocks that come after, which a fetching tile brings to L2 meanwhile.
    c : in/out (rows, units), `c_stride` apart.  h_next : out (rows, units), `h_next_stride` apart.
    out : out rows at `out_rows`; the first `valid` units of the tile are written; none where `valid` is 0.
    recorded : nothing, or where what the backward needs goes: gates, kept_c, kept_step, H, first_unit, past_caches.
    gates : out (rows, 4H), i, f, g, o as in `_Record`.  kept_c : out (rows, H), c'.  Both from the row's first unit on.
    past_caches : 1 where they are too large for any cache and the rows of the gates are whole cache lines, 2 where
    those of c' are too, else 0.
    More than one step where the tile holds all units: from step to step `start`, `a`, `out`, `kept_c` move by
    `start_step`, `a_step`, `out_step`, `kept_step` numbers, the gates by four times that, and `h` and `h_next` change
    places.
    """
    widths = _widths(b, shape)
    a_panels, h_panels = _panels(b, a_panel, a_depth, shape), _panels(b, h_panel, h_depth, shape)

    def step(s: ir.Value, _: list[Vec]) -> list[Vec]:
        odd = b.ir.trunc(s, I1)
        h_read = b.pointer(b.ir.select(odd, h_next, h))
        h_write = b.pointer(b.ir.select(odd, h, h_next))
        start_at = b.pointer(start) + b.ir.mul(s, start_step)
        a_at, out_base = b.pointer(a) + b.ir.mul(s, a_step), b.pointer(out) + b.ir.mul(s, out_step)
        if recorded:
            gates, kept_c, kept_step, H, first_unit, past_caches = recorded
            c_step = b.ir.mul(s, kept_step)
            gates_at = b.pointer(gates) + b.ir.mul(c_step, I64(GATES))
            kept_c_at = b.pointer(kept_c) + b.ir.add(c_step, first_unit)

        def tile(i: ir.Value, _: list[Vec]) -> list[Vec]:
            row0 = b.ir.mul(i, I64(shape.rows))
            units = range(0, sum(shape.blocks), b.lanes)
            if shape.rows >= FETCHING_ROWS:  # wide gains 6%, b256 2%
                for to in _rows(b, out_base, out_rows, row0, shape.rows):
                    for unit in units:
                        (to + unit).prefetch(write=True)
            record = None
            if recorded:
                end = b.ir.add(first_unit, I64(sum(shape.blocks) + b.lanes - 1))
                whole = b.ir.icmp_signed(">=", H, b.ir.and_(end, I64(-b.lanes)))
                record = _Record(
                    _strided(b, gates_at, b.ir.mul(H, I64(GATES)), row0, shape.rows),
                    _strided(b, kept_c_at, H, row0, shape.rows), first_unit, H, whole,
                    b.ir.icmp_signed("!=", past_caches, I64(0)), b.ir.icmp_signed("==", past_caches, I64(2)),
                )  # fmt: skip
                if shape.rows >= FETCHING_ROWS:  # to L2: so many at once to L1 would keep the panels' lines waiting
                    with b.ir.if_then(b.ir.not_(b.ir.and_(whole, record.gates_past))):
                        for row, unit in itertools.product(range(shape.rows), units):
                            for which in range(GATES):
                                record.gate(b, row, which, unit, whole=True).prefetch()
                            (record.c[row] + unit).prefetch()
            sums = [_load_all(p, sum(widths), b.lanes) for p in _strided(b, start_at, start_stride, row0, shape.rows)]
            ahead = _ahead(b, shape, a_next_panel, a_depth, i)
            sums = _multiply(
                b, sums, a_depth, _rows(b, a_at, a_rows, row0, shape.rows), a_panels, widths, ahead, go_on=True
            )
            ahead = _ahead(b, shape, h_next_panel, h_depth, i)
            rows = _strided(b, h_read, h_stride, row0, shape.rows)
            sums = _multiply(b, sums, h_depth, rows, h_panels, widths, ahead, go_on=False)
            c_rows = _strided(b, b.pointer(c), c_stride, row0, shape.rows)
            h_out = _strided(b, h_write, h_next_stride, row0, shape.rows)
            out_rows_here = _rows(b, out_base, out_rows, row0, shape.rows)
            _emit_cells(b, shape, sums, c_rows, h_out, out_rows_here, valid, record)
            return []

        b.loop(tiles, tile)
        return []

    b.loop(steps, step)


def _take_alike(cells: list[_Cells], most: int) -> list[_Cells]:
    """Remove and return the first cells and those behind them of the same width: a power of two, `most` at most."""
    alike = next((i for i, cell in enumerate(cells[:most]) if cell.units != cells[0].units), min(most, len(cells)))
    count = 1 << (alike.bit_length() - 1)
    taken, cells[:] = cells[:count], cells[count:]
    return taken


def _emit_cells(
    b: Builder, shape: Shape, sums: list[list[Vec]], c: list[Pointer], h: list[Pointer], out: list[Pointer], valid,
    record: _Record | None,
) -> None:  # fmt: skip
    """Emit the cells of one tile: z in registers, c in/out, h and out written; a pointer for each row."""
    cells = []
    for row in range(shape.rows):
        vector = unit = 0
        for units, width in zip(shape.blocks, _widths(b, shape), strict=True):
            cells.append(_Cells(row, unit, units, sums[row][vector : vector + width]))
            vector, unit = vector + width, unit + units
    registers = []  # each a list of cells: narrow blocks of several rows share a register
    while cells:
        registers.append(_take_alike(cells, b.lanes // cells[0].units))
    while registers:
        lanes = [sum(cell.units for cell in register) for register in registers[:CHAINS]]
        count = next((i for i, number in enumerate(lanes) if number != lanes[0]), len(lanes))
        chains, registers = registers[:count], registers[count:]
        z_i, z_f, z_g, z_o = (
            bundle([concat([x.gate(gate) for x in register]) for register in chains]) for gate in range(GATES)
        )
        c_old = bundle([concat([(c[x.row] + x.unit).load(x.units) for x in register]) for register in chains])
        keep = functools.partial(_write_record, b, record, chains)
        h_new, c_new = advance_cell(z_i, z_f, z_g, z_o, c_old, keep)
        for register, h_vec, c_vec in zip(chains, h_new.registers(), c_new.registers(), strict=True):
            for i, x in enumerate(register):
                part = h_vec.part(i * x.units, x.units)
                (c[x.row] + x.unit).store(c_vec.part(i * x.units, x.units))
                (h[x.row] + x.unit).store(part)
                (out[x.row] + x.unit).store_first(part, b.ir.sub(valid, I64(x.unit)))


def _write_record(b: Builder, record: _Record | None, chains: list[list[_Cells]], which: int, kept: Vec) -> None:
    """Emit the stores of one of the numbers that the backward needs, of some registers of cells, all of one width."""
    if record is None:  # the compiler leaves out what nobody reads
        return
    valid = b.ir.sub(record.H, record.first)

    def write(whole: bool, past_caches: bool = False) -> None:
        for register, vec in zip(chains, kept.registers(), strict=True):
            for i, x in enumerate(register):
                part = vec.part(i * x.units, x.units)
                at = record.gate(b, x.row, which, x.unit, whole) if which < GATES else record.c[x.row] + x.unit
                if whole:
                    at.store(part, past_caches)
                else:
                    at.store_first(part, b.ir.sub(valid, I64(x.unit)))

    with b.ir.if_else(record.whole) as (whole, partly):
        with whole:
            if fills_line(chains[0][0].units, b.dtype):
                with b.ir.if_else(record.gates_past if which < GATES else record.c_past) as (past, through):
                    with past:
                        write(whole=True, past_caches=True)
                    with through:
                        write(whole=True)
            else:
                write(whole=True)
        with partly:
            write(whole=False)


CLASSES = ("row", "few", "many", "row tail", "few tail", "many tail")
"""Tiles that are compiled together, by their rows and whether there is a narrow block; a layer needs one or two."""
ROWS_OF = {"row": (1,), "few": (2, 3), "many": (4, 5, 6)}
EVERY = frozenset(rows for some in ROWS_OF.values() for rows in some)
"""How many rows a tile may have."""

_tables: dict[tuple[Any, ...], NDArray[np.int64]] = {}


def tile_table(describe: Any, dtype: np.dtype, rows: frozenset[int], tail: bool, fetching: bool) -> NDArray[np.int64]:
    """Return the addresses of the tiles of each class, 0 where none is needed for that many rows.

    describe : a kernel of the following, of a dtype and a class.  fetching : whether tiles of many rows fetch.
    The table stays where it is for ever.
    """
    key = describe, dtype, rows, tail, fetching
    if key in _tables:
        return _tables[key]
    table = np.zeros(len(CLASSES), np.int64)
    for i, which in enumerate(CLASSES):
        if rows.intersection(ROWS_OF[which.split()[0]]) and (tail or "tail" not in which):
            table[i] = entry(describe, dtype, "many fetching" if fetching and which == "many" else which)
    return _tables.setdefault(key, table)  # the same for all threads that come at once


def _in_class(dtype: np.dtype, which: str) -> dict[int, Shape]:
    """Return the tiles of a class by their place in `shapes`."""
    rows, _, kind = which.partition(" ")
    found = {}
    for i, shape in enumerate(shapes(dtype)):
        its_kind = "fetching" if shape.fetching else "" if shape.blocks[-1] == blocking(dtype).units else "tail"
        if shape.rows in ROWS_OF[rows] and its_kind == kind:
            found[i] = shape
    return found


def project_kernel(dtype: np.dtype, which: str):
    """Describe the tile that multiplies and stores: of an int64 table, the shape and what `_emit_project` takes."""
    tile = kernel(dtype, "project", 9, _emit_project, _in_class(dtype, which))

    def project(table):
        tile(table)

    return project, types.void(types.int64)


def advance_kernel(dtype: np.dtype, which: str):
    """Describe the tile that makes steps: of an int64 table, the shape and what `_emit_advance` takes."""
    tile = kernel(dtype, "advance", 24, _emit_advance, _in_class(dtype, which))

    def advance(table):
        tile(table)

    return advance, types.void(types.int64)


def unpacked_kernel(dtype: np.dtype):
    """Describe the products of a single row with weights as they are: of an int64 table, as `_emit_unpacked`."""
    tile = kernel(dtype, "unpacked", 12, _emit_unpacked, {0: None})

    def unpacked(table):
        tile(table)

    return unpacked, types.void(types.int64)


def record_kernel(dtype: np.dtype, which: str):
    """Describe the tile that makes steps and keeps what the backward needs."""
    tile = kernel(dtype, "record", 30, _emit_advance, _in_class(dtype, which))

    def record(table):
        tile(table)

    return record, types.void(types.int64)
