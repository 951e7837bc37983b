"""The register tiles of the backward pass: products, the cell's gradient, and panels made of rows.

With d_h and d_c the gradients of h' and c', and t = tanh(c') (`reference.py` has the equations of the forward):

    d_c   += d_h * o * (1 - t^2)
    d_z_i  = d_c * g * i (1 - i)        d_z_f = d_c * c * f (1 - f)
    d_z_g  = d_c * i * (1 - g^2)        d_z_o = d_h * t * o (1 - o)
    d_c    = d_c * f                    passed on to the step before

The products are d_h = d_z W_hh, d_x = d_z W_ih, where a row of d_z is read along k, and d_W = d_z^T [x h], where d_z is
read down its columns and k counts the rows of a chunk.  Every sum is the same segments and parts added in the same
order, whatever the tile, so no result depends on how the work was cut.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llvmlite import ir
from numba import types

from fastlstm.kernels.activations import tanh
from fastlstm.kernels.panels import most_vectors
from fastlstm.kernels.simd import I1, I64, Builder, Pointer, Vec, fma, kernel, target
from fastlstm.kernels.tile import FETCHING_ROWS, GATES

__all__ = [
    "LEFT",
    "Piece",
    "add_kernel",
    "cell_kernel",
    "most_rows",
    "multiply_kernel",
    "outer_kernel",
    "pack_kernel",
    "pieces",
]

ROWS_AHEAD = 8  # that are fetched where rows lie apart: with a batch of thousands the backward gains a seventh
FEW_COLUMNS = 4  # of an input up to which d_x is made of dot products: a register for each column would be near empty
LEFT = 48  # numbers in a line of a panel that is read down its columns: a multiple of every tile's rows


@dataclass(frozen=True)
class Piece:
    """One tile of a product: rows of `vectors` registers each."""

    rows: int
    vectors: int
    down: bool = False  # `a` is read down its columns
    lockstep: bool = False  # the parts of a single row's sum side by side: one alone waits for its own latency


def most_rows(vectors: int, down: bool) -> int:
    """Return how many rows a tile of that width has at most; reading along, each takes an address register."""
    if target().registers == 32:
        return {3: 8, 2: 12 if down else 8, 1: 24 if down else 8}[vectors]
    return {2: 6, 1: 12 if down else 8}[vectors]


@functools.cache
def pieces() -> tuple[Piece, ...]:
    """Return every tile that is compiled."""
    found = []
    for vectors in range(1, most_vectors() + 1):
        found.append(Piece(1, vectors, lockstep=True))
        for down in (False, True):
            found += [Piece(rows, vectors, down) for rows in range(1, most_rows(vectors, down) + 1)]
    return tuple(found)


def _chain(
    b: Builder, count: ir.Value, rows: Sequence[Pointer], a_step: ir.Value | None, panels: Sequence[Pointer],
    line: ir.Value, vectors: int, ahead: Pointer | None = None, ahead_step: ir.Value | None = None,
) -> list[Vec]:  # fmt: skip
    """Return sums over k of rows[r][k] * panels[r][k][vector]; one panel for all rows, or one for each.

    Meanwhile a cache line for each k comes to L2, from `ahead` on in steps of so many numbers.
    """
    zeros = b.splat(ir.Constant(b.scalar, 0.0), b.lanes)
    pairs = [(r, v) for r in range(len(rows)) for v in range(vectors)]
    if len(rows) < GATES:  # rows are held and each weight is used as it comes: fewer registers
        pairs.sort(key=lambda pair: pair[1])

    def step(k: ir.Value, before: list[Vec]) -> list[Vec]:
        lines = [panel + b.ir.mul(k, line) for panel in panels]
        weights = [[(at + v * b.lanes).load(b.lanes) for v in range(vectors)] for at in lines]
        offset = k if a_step is None else b.ir.mul(k, a_step)
        a = [(row + offset).broadcast(b.lanes) for row in rows]
        if ahead is not None:
            (ahead + b.ir.mul(k, ahead_step)).prefetch()
        after = list(before)
        for r, v in pairs:
            weight = weights[r if len(panels) > 1 else 0][v]
            after[r * vectors + v] = fma(a[r], weight, before[r * vectors + v])
        return after

    return b.loop(count, step, [zeros] * (len(rows) * vectors))


def _multiply(
    b: Builder, rows: Sequence[Pointer], a_step: ir.Value | None, depth: ir.Value, panels: Sequence[Pointer],
    line: ir.Value, vectors: int, ahead: Pointer | None = None, ahead_step: ir.Value | None = None,
) -> list[Vec]:  # fmt: skip
    """Return the sums of `_chain` in segments of 64 or 128, each added when it is complete."""
    length = b.ir.select(b.ir.icmp_signed("<=", depth, I64(256)), I64(64), I64(128))

    def segment(i: ir.Value, totals: list[Vec]) -> list[Vec]:
        first = b.ir.mul(i, length)
        rest = b.ir.sub(depth, first)
        count = b.ir.select(b.ir.icmp_signed("<", rest, length), rest, length)
        offset = first if a_step is None else b.ir.mul(first, a_step)
        at = [panel + b.ir.mul(first, line) for panel in panels]
        lines = ahead if ahead is None else ahead + b.ir.mul(first, ahead_step)
        parts = _chain(b, count, [row + offset for row in rows], a_step, at, line, vectors, lines, ahead_step)
        return [total + part for total, part in zip(totals, parts, strict=True)]

    zeros = b.splat(ir.Constant(b.scalar, 0.0), b.lanes)
    count = b.ir.sdiv(b.ir.sub(b.ir.add(depth, length), I64(1)), length)
    return b.loop(count, segment, [zeros] * (len(rows) * vectors))


def _in_lockstep(b: Builder, row: Pointer, depth: ir.Value, panel: Pointer, line: ir.Value, vectors: int) -> list[Vec]:
    """Return the four parts of a single row's sum, made side by side and added in their order."""
    starts = [b.ir.mul(depth, I64(part)) for part in range(GATES)]
    panels = [panel + b.ir.mul(start, line) for start in starts]
    chains = _multiply(b, [row + start for start in starts], None, depth, panels, line, vectors)
    sums = [vec.zeros() for vec in chains[:vectors]]
    for part in range(GATES):
        sums = [total + chains[part * vectors + v] for v, total in enumerate(sums)]
    return sums


def _emit_multiply(
    b: Builder, piece: Piece, tiles, a, a_rows, a_step, depth, parts, panel, line, out, out_rows, valid, add,
    ahead, ahead_step,
) -> None:  # fmt: skip
    """Emit out[row] (+)= sum over k of a[row][k] * panel[k] for `tiles` tiles, one below the other.

    a : rows at `a_rows`, parts * depth numbers each; or, read down, (depth, rows) with lines `a_step` apart.
    panel : (parts * depth, vectors), lines `line` apart.  out : rows at `out_rows`, the first `valid` numbers of each.
    add : 1 adds to what is there, 0 does not read it.  Each part is a sum of its own.
    ahead : what comes to L2 meanwhile where there are many rows: a line for each k, `ahead_step` numbers apart.
    """
    vectors = piece.vectors

    def tile(i: ir.Value, _: list[Vec]) -> list[Vec]:
        row0 = b.ir.mul(i, I64(piece.rows))
        base = b.pointer(panel)
        if piece.down or piece.rows >= FETCHING_ROWS:
            for to in _table(b, b.pointer(out), out_rows, row0, piece.rows):
                for v in range(vectors):  # to L2: so many at once to L1 would keep the panels' lines waiting
                    (to + v * b.lanes).prefetch()
                if piece.down:  # where rows do not start on a line: d_W of 4 MB is made at 88% of peak instead of 80%
                    (to + (vectors * b.lanes - 1)).prefetch()
        if piece.down:
            first, lines = b.pointer(a) + row0, None
            if piece.rows >= FETCHING_ROWS:
                lines = b.pointer(ahead) + b.ir.mul(b.ir.mul(depth, i), ahead_step)
            rows = [first + r for r in range(piece.rows)]
            sums = _multiply(b, rows, a_step, depth, [base], line, vectors, lines, ahead_step)
        elif piece.lockstep:
            (row,) = _table(b, b.pointer(a), a_rows, row0, 1)
            sums = _in_lockstep(b, row, depth, base, line, vectors)
        else:
            rows = _table(b, b.pointer(a), a_rows, row0, piece.rows)

            def one_part(part: ir.Value, totals: list[Vec]) -> list[Vec]:
                start = b.ir.mul(part, depth)
                at = [base + b.ir.mul(start, line)]
                lines = None
                if piece.rows >= FETCHING_ROWS:
                    before = b.ir.mul(depth, b.ir.add(b.ir.mul(i, parts), part))
                    lines = b.pointer(ahead) + b.ir.mul(before, ahead_step)
                chains = _multiply(
                    b, [row + start for row in rows], None, depth, at, line, vectors, lines, ahead_step
                )  # fmt: skip
                return [total + chain for total, chain in zip(totals, chains, strict=True)]

            zeros = b.splat(ir.Constant(b.scalar, 0.0), b.lanes)
            sums = b.loop(parts, one_part, [zeros] * (piece.rows * vectors))
        places = [
            (to + v * b.lanes, b.ir.sub(valid, I64(v * b.lanes)))
            for to in _table(b, b.pointer(out), out_rows, row0, piece.rows)
            for v in range(vectors)
        ]
        with b.ir.if_else(b.ir.icmp_signed("!=", add, I64(0))) as (adding, writing):
            with adding:
                for (at, count), vec in zip(places, sums, strict=True):
                    at.store_first(vec + at.load_first(b.lanes, count), count)
            with writing:  # a load, even of no lanes, would wait for the line: outer products lose a fifth
                for (at, count), vec in zip(places, sums, strict=True):
                    at.store_first(vec, count)
        return []

    b.loop(tiles, tile)


def _table(b: Builder, base: Pointer, table: ir.Value, first: ir.Value, count: int) -> list[Pointer]:
    """Return a pointer for each row from `first` on, by a table of int64 offsets in numbers."""
    offsets = b.ir.gep(b.ir.inttoptr(table, I64.as_pointer()), [first])
    return [base + b.ir.load(b.ir.gep(offsets, [I64(r)])) for r in range(count)]


def _addressed(b: Builder, table: ir.Value, row: ir.Value) -> Pointer:
    """Return the pointer that stands in a table of addresses."""
    return b.pointer(b.ir.load(b.ir.gep(b.ir.inttoptr(table, I64.as_pointer()), [row])))


def _ahead(b: Builder, table: ir.Value, row: ir.Value, rows: ir.Value) -> Pointer:
    """Return the pointer in a table of addresses for a row to come, for its lines to be fetched meanwhile."""
    later = b.ir.add(row, I64(ROWS_AHEAD))
    return _addressed(b, table, b.ir.select(b.ir.icmp_signed("<", later, rows), later, row))


@dataclass(frozen=True)
class _Row:
    """Where the cells of one row and step are: what the forward saved, what comes back, what goes on."""

    gates: Pointer  # (4H,), i, f, g, o as the forward's tile leaves them
    c_new: Pointer
    c: Pointer
    d_h: Pointer
    d_out: Pointer  # added to it
    d_c: Pointer  # in/out
    d_z: Pointer  # out (4, H)
    m: tuple[Pointer, ir.Value] | None  # out, o * tanh(c'), unless the number is 0
    ahead: tuple[Pointer, ...]  # what comes to L2 meanwhile
    near: tuple[Pointer, ...]  # to L1


def _emit_units(b: Builder, row: _Row, units: ir.Value, H: ir.Value) -> None:
    """Emit the gradient of `units` cells of a row."""

    def some(unit: ir.Value, valid: ir.Value | None) -> None:
        """One register, of which `valid` units count; None: all."""

        def load(pointer: Pointer) -> Vec:
            return pointer.load(b.lanes) if valid is None else pointer.load_first(b.lanes, valid)

        def store(pointer: Pointer, vec: Vec) -> None:
            if valid is None:
                pointer.store(vec)
            else:
                pointer.store_first(vec, valid)

        for at in row.near:
            (at + unit).prefetch(near=True)
        for at in row.ahead:
            (at + unit).prefetch()
        block, width = row.gates + b.ir.mul(unit, I64(GATES)), I64(b.lanes) if valid is None else valid
        i, f, g, o = (load(block + b.ir.mul(width, I64(which))) for which in range(GATES))
        d_m = load(row.d_h + unit) + load(row.d_out + unit)
        t = tanh(load(row.c_new + unit)).value()
        d_cell = fma(d_m * o, 1.0 - t * t, load(row.d_c + unit))
        d_gates = [
            d_cell * g * (i * (1.0 - i)),
            d_cell * load(row.c + unit) * (f * (1.0 - f)),
            d_cell * i * (1.0 - g * g),
            d_m * t * (o * (1.0 - o)),
        ]
        for which, d_gate in enumerate(d_gates):
            store(row.d_z + b.ir.add(unit, b.ir.mul(H, I64(which))), d_gate)
        store(row.d_c + unit, d_cell * f)
        if row.m is not None:
            m, wanted = row.m
            with b.ir.if_then(b.ir.icmp_signed("!=", wanted, I64(0))):
                store(m + unit, o * t)

    def whole(n: ir.Value, _: list[Vec]) -> list[Vec]:
        some(b.ir.mul(n, I64(b.lanes)), None)
        return []

    registers = b.ir.sdiv(units, I64(b.lanes))
    b.loop(registers, whole)
    first = b.ir.mul(registers, I64(b.lanes))
    rest = b.ir.sub(units, first)
    with b.ir.if_then(b.ir.icmp_signed(">", rest, I64(0))):
        some(first, rest)


def _emit_cell(
    b: Builder, _: object, rows, units, H, d_h, d_h_stride, d_out, d_out_rows, d_out_next, gates, c_new, c_next, c,
    d_c, d_c_stride, d_z, d_z_rows, m, keep_m,
) -> None:  # fmt: skip
    """Emit the gradient of the cell for `units` units of each row.

    d_h : (rows, units), `d_h_stride` apart.  d_out : rows at `d_out_rows`, added to it; those of the next step,
    or slice, lie `d_out_next` numbers further and come to L2 meanwhile: ocr's backward gains 4% to 10%.
    gates : (rows, 4H).  c_new : (rows, H); what lies `c_next` numbers further comes to L2 meanwhile.
    c : a table of the rows' addresses.  d_c : in/out (rows, units), `d_c_stride` apart.
    d_z : out (4, H), rows at `d_z_rows`.
    m : out (rows, units), o * tanh(c'), rows at a quarter of `d_z_rows`; none where `keep_m` is 0.
    """

    def one_row(row: ir.Value, _: list[Vec]) -> list[Vec]:
        (given,) = _table(b, b.pointer(d_out), d_out_rows, row, 1)
        (z_at,) = _table(b, b.pointer(d_z), d_z_rows, row, 1)
        z_offset = b.ir.load(b.ir.gep(b.ir.inttoptr(d_z_rows, I64.as_pointer()), [row]))
        c_new_at = b.pointer(c_new) + b.ir.mul(row, H)
        cells = _Row(
            gates=b.pointer(gates) + b.ir.mul(row, b.ir.mul(H, I64(GATES))),
            c_new=c_new_at,
            c=_addressed(b, c, row),
            d_h=b.pointer(d_h) + b.ir.mul(row, d_h_stride),
            d_out=given,
            d_c=b.pointer(d_c) + b.ir.mul(row, d_c_stride),
            d_z=z_at,
            m=(b.pointer(m) + b.ir.sdiv(z_offset, I64(GATES)), keep_m),
            ahead=(given + d_out_next, c_new_at + c_next),
            near=(_ahead(b, c, row, rows),),
        )
        _emit_units(b, cells, units, H)
        return []

    b.loop(rows, one_row)


def _emit_retrace(
    b: Builder, _: object, steps, H, columns, blocks, d_h, d_c, d_out, d_out_step, gates, c_new, c_step, c_last,
    d_z, d_z_step, panel, raw,
) -> None:  # fmt: skip
    """Emit steps of a single row backward: the gradient of its cells, and d_h = d_z W_hh to the step before.

    From step to step d_out, c_new and d_z move by `d_out_step`, `c_step` and `d_z_step` numbers, the gates by four
    times `c_step`.  The c of a step is the c_new of the next; of the last it is at `c_last`.
    d_h, d_c : in/out (H,).  panel : natural, of W_hh, or W_hh itself if `raw`; `columns` is H in whole registers,
    which lie in so many blocks.
    """

    def block_start(block: ir.Value) -> ir.Value:
        return b.ir.sdiv(b.ir.mul(columns, block), blocks)

    def step(s: ir.Value, _: list[Vec]) -> list[Vec]:
        offset = b.ir.mul(s, c_step)
        c_new_at = b.pointer(c_new) + offset
        last = b.ir.icmp_signed("==", b.ir.add(s, I64(1)), steps)
        z_at = b.pointer(d_z) + b.ir.mul(s, d_z_step)
        given = b.pointer(d_out) + b.ir.mul(s, d_out_step)
        cells = _Row(
            gates=b.pointer(gates) + b.ir.mul(offset, I64(GATES)),
            c_new=c_new_at,
            c=Pointer(b, b.ir.select(last, b.pointer(c_last).value, (c_new_at + c_step).value)),
            d_h=b.pointer(d_h),
            d_out=given,
            d_c=b.pointer(d_c),
            d_z=z_at,
            m=None,
            ahead=(),
            near=(),
        )
        _emit_units(b, cells, H, H)

        def one_block(nth: ir.Value, _: list[Vec]) -> list[Vec]:
            other_way = b.ir.sub(b.ir.sub(blocks, I64(1)), nth)
            block = b.ir.select(b.ir.trunc(s, I1), other_way, nth)
            first = block_start(block)
            count = b.ir.sub(block_start(b.ir.add(block, I64(1))), first)
            at = b.ir.mul(first, I64(b.lanes))
            as_it_is = b.ir.icmp_signed("!=", raw, I64(0))
            base = b.pointer(panel) + b.ir.select(as_it_is, at, b.ir.mul(b.ir.mul(at, H), I64(GATES)))
            for vectors in range(1, most_vectors() + 1):
                with b.ir.if_then(b.ir.icmp_signed("==", count, I64(vectors))):
                    line = b.ir.select(as_it_is, H, I64(vectors * b.lanes))
                    sums = _in_lockstep(b, z_at, H, base, line, vectors)
                    for v, vec in enumerate(sums):
                        begin = b.ir.add(at, I64(v * b.lanes))
                        (b.pointer(d_h) + begin).store_first(vec, b.ir.sub(H, begin))
            return []

        b.loop(blocks, one_block)
        return []

    b.loop(steps, step)


def _emit_pack(b: Builder, vectors: int, rows, source, offset, valid, out, line, places) -> None:
    """Emit out[places[row]] = source[row] from `offset` on, the first `valid` numbers and zeros behind them.

    source : a table of addresses.  out : rows of `vectors` registers, `line` apart.  places : a table of int64.
    """

    def one_row(row: ir.Value, _: list[Vec]) -> list[Vec]:
        place = b.ir.load(b.ir.gep(b.ir.inttoptr(places, I64.as_pointer()), [row]))
        from_, to = _addressed(b, source, row) + offset, b.pointer(out) + b.ir.mul(place, line)
        ahead = _ahead(b, source, row, rows) + offset
        for v in range(vectors):
            at = I64(v * b.lanes)
            (ahead + at).prefetch(near=True)
            (to + at).store((from_ + at).load_first(b.lanes, b.ir.sub(valid, at)))
        return []

    b.loop(rows, one_row)


def _emit_dots(b: Builder, columns: int, rows, a, a_rows, depth, panel, out, out_rows) -> None:
    """Emit out[row] = sum over k of a[row][k] * panel[column][k] for a few columns.

    Each lane of a register has a sum of its own, and in the end they are added in pairs.
    a : rows at `a_rows`, `depth` numbers each.  panel : (columns, depth).  out : rows at `out_rows`.
    """
    weights = [b.pointer(panel) + b.ir.mul(depth, I64(column)) for column in range(columns)]
    whole = b.ir.sdiv(depth, I64(b.lanes))
    first = b.ir.mul(whole, I64(b.lanes))
    rest = b.ir.sub(depth, first)

    def one_row(row: ir.Value, _: list[Vec]) -> list[Vec]:
        (from_,) = _table(b, b.pointer(a), a_rows, row, 1)
        (to,) = _table(b, b.pointer(out), out_rows, row, 1)

        def some(n: ir.Value, sums: list[Vec]) -> list[Vec]:
            k = b.ir.mul(n, I64(b.lanes))
            numbers = (from_ + k).load(b.lanes)
            return [fma(numbers, (at + k).load(b.lanes), total) for at, total in zip(weights, sums, strict=True)]

        zeros = b.splat(ir.Constant(b.scalar, 0.0), b.lanes)
        sums = b.loop(whole, some, [zeros] * columns)
        numbers = (from_ + first).load_first(b.lanes, rest)
        for column, (at, total) in enumerate(zip(weights, sums, strict=True)):
            vec = fma(numbers, (at + first).load_first(b.lanes, rest), total)
            while vec.lanes > 1:
                half = vec.lanes // 2
                vec = vec.part(0, half) + vec.part(half, half)
            (to + column).store(vec)
        return []

    b.loop(rows, one_row)


def _emit_outer(b: Builder, _: object, first, last, a, columns, row, out, add) -> None:
    """Emit out[j] (+)= a[j] * row for j from `first` to `last`: what a product of depth 1 is, line by line.

    row : (columns,).  out : (.., columns).  add : 1 adds to what is there, 0 does not read it.
    """
    zeros = b.splat(ir.Constant(b.scalar, 0.0), b.lanes)
    adding = b.ir.icmp_signed("!=", add, I64(0))
    registers = b.ir.sdiv(columns, I64(b.lanes))
    at_rest = b.ir.mul(registers, I64(b.lanes))
    rest = b.ir.sub(columns, at_rest)

    def one_line(n: ir.Value, _: list[Vec]) -> list[Vec]:
        j = b.ir.add(first, n)
        to, number = b.pointer(out) + b.ir.mul(j, columns), (b.pointer(a) + j).broadcast(b.lanes)

        def whole(n: ir.Value, _: list[Vec]) -> list[Vec]:
            at = b.ir.mul(n, I64(b.lanes))
            product = fma(number, (b.pointer(row) + at).load(b.lanes), zeros)
            with b.ir.if_else(adding) as (add_it, write_it):
                with add_it:
                    (to + at).store(product + (to + at).load(b.lanes))
                with write_it:
                    (to + at).store(product)
            return []

        b.loop(registers, whole)
        with b.ir.if_then(b.ir.icmp_signed(">", rest, I64(0))):
            product = fma(number, (b.pointer(row) + at_rest).load_first(b.lanes, rest), zeros)
            there = b.ir.select(adding, rest, I64(0))
            (to + at_rest).store_first(product + (to + at_rest).load_first(b.lanes, there), rest)
        return []

    b.loop(b.ir.sub(last, first), one_line)


def _emit_turn(b: Builder, _: object, rows, count, source, line, out, stride, add) -> None:
    """Emit out[j][row] (+)= source[row][j]: `rows` rows of `count` numbers, lines `line` and `stride` apart."""
    there = b.ir.select(b.ir.icmp_signed("!=", add, I64(0)), I64(1), I64(0))

    def one_line(j: ir.Value, _: list[Vec]) -> list[Vec]:
        from_, to = b.pointer(source) + j, b.pointer(out) + b.ir.mul(j, stride)

        def one(row: ir.Value, _: list[Vec]) -> list[Vec]:
            number = (from_ + b.ir.mul(row, line)).load(1)
            (to + row).store(number + (to + row).load_first(1, there))
            return []

        b.loop(rows, one)
        return []

    b.loop(count, one_line)


def _emit_add(b: Builder, _: object, rows, count, left, left_stride, right, right_rows, out, out_rows) -> None:
    """Emit out[row] = left[row] + right[row], `count` numbers each; tables of offsets for right and out."""

    def one_row(row: ir.Value, _: list[Vec]) -> list[Vec]:
        one = b.pointer(left) + b.ir.mul(row, left_stride)
        (other,) = _table(b, b.pointer(right), right_rows, row, 1)
        (to,) = _table(b, b.pointer(out), out_rows, row, 1)

        def some(n: ir.Value, _: list[Vec]) -> list[Vec]:
            at = b.ir.mul(n, I64(b.lanes))
            valid = b.ir.sub(count, at)
            total = (one + at).load_first(b.lanes, valid) + (other + at).load_first(b.lanes, valid)
            (to + at).store_first(total, valid)
            return []

        b.loop(b.ir.sdiv(b.ir.add(count, I64(b.lanes - 1)), I64(b.lanes)), some)
        return []

    b.loop(rows, one_row)


def multiply_kernel(dtype: np.dtype):
    """Describe the product's tile: of an int64 table, the piece and what `_emit_multiply` takes."""
    tile = kernel(dtype, "multiply", 14, _emit_multiply, dict(enumerate(pieces())))

    def multiply(table):
        tile(table)

    return multiply, types.void(types.int64)


def cell_kernel(dtype: np.dtype):
    """Describe the gradient of the cell: of an int64 table, a 0 and what `_emit_cell` takes."""
    tile = kernel(dtype, "cell", 18, _emit_cell, {0: None})

    def cell(table):
        tile(table)

    return cell, types.void(types.int64)


def pack_kernel(dtype: np.dtype):
    """Describe what makes panels of rows: of an int64 table, the vectors less one and what `_emit_pack` takes."""
    tile = kernel(dtype, "pack", 7, _emit_pack, dict(enumerate(range(1, most_vectors() + 1))))

    def pack(table):
        tile(table)

    return pack, types.void(types.int64)


def add_kernel(dtype: np.dtype):
    """Describe the sum of rows: of an int64 table, a 0 and what `_emit_add` takes."""
    tile = kernel(dtype, "add", 8, _emit_add, {0: None})

    def add(table):
        tile(table)

    return add, types.void(types.int64)


def retrace_kernel(dtype: np.dtype):
    """Describe the steps of a single row backward: of an int64 table, a 0 and what `_emit_retrace` takes."""
    tile = kernel(dtype, "retrace", 16, _emit_retrace, {0: None})

    def retrace(table):
        tile(table)

    return retrace, types.void(types.int64)


def dots_kernel(dtype: np.dtype):
    """Describe a product of few columns: of an int64 table, the columns less one and what `_emit_dots` takes."""
    tile = kernel(dtype, "dots", 7, _emit_dots, dict(enumerate(range(1, FEW_COLUMNS + 1))))

    def dots(table):
        tile(table)

    return dots, types.void(types.int64)


def outer_kernel(dtype: np.dtype):
    """Describe the outer product of two rows: of an int64 table, a 0 and what `_emit_outer` takes."""
    tile = kernel(dtype, "outer", 7, _emit_outer, {0: None})

    def outer(table):
        tile(table)

    return outer, types.void(types.int64)


def turn_kernel(dtype: np.dtype):
    """Describe the transpose of a few rows: of an int64 table, a 0 and what `_emit_turn` takes."""
    tile = kernel(dtype, "turn", 7, _emit_turn, {0: None})

    def turn(table):
        tile(table)

    return turn, types.void(types.int64)
