"""The sequence, backward: one direction of one layer, from the gradients of its results to those of all it was given.

The steps run against the forward's order, a *chunk* of them at a time.  Of a chunk are made

    steps      d_z of every step, into one buffer for the chunk: the cell's gradient and d_h = d_z W_hh
    panels     of the chunk's rows of x, h and d_z
    gradients  d_x = d_z W_ih and d_W += d_z^T [x h], as large products

It is shared out like the forward.  Where each thread takes groups of rows through all steps of the chunk, it packs
them and makes their d_x as well, as long as they are in its cache (STEPS); the team meets before d_W (GRADIENTS), which
is shared out by rows of W, and after it.  Where the units are shared out, each step is a phase of its own (UNITS), and
panels (PACK) and d_x are shared out by rows.

Row `k` of a chunk counts its steps and, in a step, the rows in the order of falling length, so the sums over k are the
same however rows and units are shared out.  What is not summed lies in *slots*: one group's rows after the other's.
"""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, types

from fastlstm.kernels import panels
from fastlstm.kernels.gradient_tile import LEFT, most_rows, pieces
from fastlstm.kernels.panels import cut_block, most_vectors
from fastlstm.kernels.simd import target
from fastlstm.kernels.team import (
    byte_at,
    call_tile,
    clear,
    copy,
    integer_at,
    part,
    phase_part,
    record,
    record_at,
    set_integer,
)
from fastlstm.kernels.tile import FETCHING_ROWS, GATES

__all__ = ["DOWN_DEPTH", "PLAN", "STATE", "SUMS", "TABLES", "backward_kernel", "sums_kernel"]

PANEL_BYTES = 512 << 10  # of a block's panel beyond which it does not stay in L2
DOWN_DEPTH = 256  # rows of a chunk in one sum: 128 gives 90% of peak, 256 94%

# What one call is about, written by `training.py`.  Addresses in bytes, all else in numbers.
PLAN = record(
    "kernel",
    # from here to `second` the arrays of a call, in the order in which they are given
    "x", "out",  # (T, N, I), (T, N, P), the forward's input and output
    "saved",  # of the forward: the gates (T, N, 4H) and c' (T, N, H)
    "w_ih", "w_hh", "w_hr",  # natural panels
    "h_0", "c_0",  # (N, P), (N, H); 0: zeros
    "d_out",  # (T, N, P); 0: zeros
    "d_h_n", "d_c_n",  # (N, P), (N, H); 0: zeros
    "d_h_0", "d_c_0",  # (N, P), (N, H), out
    "d_x",  # (T, N, I), out; 0: not wanted
    "d_w_ih", "d_w_hh", "d_bias", "d_bias_hh", "d_w_hr",  # (4H, I), (4H, P), (4H,) twice the same, (P, H), out
    "order", "lengths", "places", "active",  # (N,), (N,), (N,): a row's place by falling length; (T,): rows of a step
    "reset",  # bytes (T, N); 0: none
    "second",  # room for the gradients of the weights of a second half of the rows, a call of its own; 0: not halved
    "reset_step", "reset_row",  # bytes
    "add_w",  # 1: add to what is in the d_w
    "raw",  # 1: w_ih and w_hh are not packed, but their rows are whole registers
    "x_step", "x_row", "out_step", "out_row",  # of x and d_x, of out and d_out
    "T", "N", "I", "P", "H", "reverse", "projected",
    "row0", "rows",  # those of the N that this call is about
    "linear",  # 1: no steps at all; d_z is given for T rows, and N is 1
    "J", "parts",  # numbers in a row of d_z, parts of a sum over them: 4H and 4; where it is linear the outputs and 1
    "zeros", "ones",  # as many as the largest row; DOWN_DEPTH
    "multiply", "cell", "pack", "add",  # the tiles
    "retrace", "dots", "turn", "outer",  # 0: not for these rows, this input, these sizes
    "chunk", "most",  # steps in a chunk, and its rows
    "units_apart",  # 1: the units are shared out; 0: the rows
    "slices",  # of a large batch, one after the other
    "groups", "ranks", "shares", "counters",  # groups in each slice
    "ramp_z", "ramp_i", "ramp_p", "ramp_h", "ramp_left",  # tables of slot * 4H, j * I, j * P, j * H, k * LEFT
    "w_ih_t",  # (I, 4H), for `dots`
    "d_h", "d_c",  # (N, P), (N, H): what is passed on to the step before
    "d_z", "m", "d_m", "d_h_out",  # (most, 4H), (most, H), (N, H), (most, P), by slot where they have `most` rows
    "left_z", "left_h", "panel_x", "panel_h", "panel_m",  # panels of the chunk, by k
    "x_from", "h_from", "z_from", "d_x_to", "k_of",  # tables (most,) of each slot: addresses, offsets, and its k
    "scratch", "scratch_rank",  # for each rank: a STATE, room for `turn` and tables (N,)
)  # fmt: skip

# What adds the gradients of a second half of the rows to those of the first: addresses, and the sizes.
SUMS = record("kernel", "d_w_ih", "d_w_hh", "d_bias", "d_bias_hh", "d_w_hr", "second", "J", "I", "P", "H")

STATE = record(
    "rank", "shares", "phase", "impatient", "kind",
    "first", "last",  # rows of the slice
    "done", "steps", "j", "base",  # steps of earlier chunks, steps of this one, the step, rows of the chunk before it
    "slot",  # of the next row of the group
    "rows",  # of the chunk
)  # fmt: skip
LOAD, STEPS, UNITS, OUTPUTS, PACK, GRADIENTS, SAVE = range(7)  # what a phase does
TABLES = 5  # of N int64, of each thread
TURNED_AT = -(-STATE.itemsize // 64) * 64
TABLES_AT = TURNED_AT + LEFT * 64  # a register is 64 bytes at most
Z_ROWS, H_ROWS, D_OUT_ROWS, C_ROWS, DH_ROWS = range(TABLES)


def backward_kernel(dtype: np.dtype):
    """Describe the backward kernel of one dtype: a function of the plan and the thread's rank."""
    size = dtype.itemsize
    lanes = target().lanes(dtype)
    widest = most_vectors()
    plan_type, state_type, i = from_dtype(PLAN), from_dtype(STATE), types.int64
    state_at = record_at(state_type)
    found = pieces()
    most = np.array([[most_rows(v, bool(down)) if v else 0 for v in range(widest + 1)] for down in range(2)])
    piece_of = np.full((2, widest + 1, int(most.max()) + 1), -1)
    lockstep = np.full(widest + 1, -1)
    for index, piece in enumerate(found):
        if piece.lockstep:
            lockstep[piece.vectors] = index
        else:
            piece_of[int(piece.down), piece.vectors, piece.rows] = index

    @part(i, i)
    def count_blocks(columns):
        """Return how many blocks of columns a product has."""
        return panels.count_blocks(columns, lanes, widest)

    @part(types.UniTuple(i, 2), i, i)
    def cut_columns(columns, block):
        """Return the first vector of a block of columns, and how many it has."""
        return cut_block(columns, block, lanes, widest)

    @part(types.UniTuple(i, 2), i, i, i)
    def columns_of(columns, first, last):
        """Return the first column of some blocks, and the one behind them."""
        begin = cut_columns(columns, first)[0] * lanes if first > 0 else 0
        if last == count_blocks(columns):
            return begin, columns
        return begin, cut_columns(columns, last)[0] * lanes

    @part(i, i)
    def few_of(columns):
        """Return how many columns are left that would fill little of a register: they make rows of a product instead.

        Of audio16's one column d_W is made in a tenth of the time, and of 40 columns in five sixths.
        """
        rest = columns % lanes
        return rest if rest <= 3 * lanes // 4 else 0

    @part(i, *[i] * 14)
    def along(tile, a, a_rows, rows, depth, parts, panel, raw, columns, block, out, out_rows, ahead, ahead_step):
        """out[row, block] = a[row] W for one block of columns; panel: all blocks one after the other, or W (raw).

        Returns what is to be fetched next: what is at `ahead` comes to L2, `ahead_step` numbers for each multiply-add.
        A panel that would not stay in L2 is read part by part, for all rows each: d_x of b1024 gains 20%.
        """
        first, vectors = cut_columns(columns, block)
        at, line = first * lanes, vectors * lanes
        together = parts if parts * depth * line * size <= PANEL_BYTES else 1
        start = at * parts * depth
        if raw:
            start, line = at, columns
        for part_ in range(0, parts, together):
            row = 0
            while row < rows:
                left = rows - row
                here = min(left, most[0, vectors])
                if here < left < 2 * here:
                    here = (left + 1) >> 1
                index = piece_of[0, vectors, here]
                if here == 1 and together == GATES:
                    index = lockstep[vectors]
                count = left // here if left > here else 1
                call_tile(tile, (
                    index, count, a + part_ * depth * size, a_rows + row * 8, 0, depth, together,
                    panel + (start + part_ * depth * line) * size, line,
                    out + at * size, out_rows + row * 8, columns - at, int(part_ > 0), ahead, ahead_step,
                ))  # fmt: skip
                ahead += count * together * depth * ahead_step * size
                row += here * count
        return ahead

    @part(i, *[i] * 15)
    def down(
        tile, a, a_panel_rows, first_j, last_j, depth, panel, panel_rows, columns, block, out, out_rows, add,
        ahead, ahead_step,
    ):  # fmt: skip
        """out[j, block] (+)= sum over k of a[k, j] * panel[k] for j from first to last; both are panels of rows k.

        `a` and `panel` point at the first k of theirs, which hold `a_panel_rows` and `panel_rows` rows in each block.
        Returns what is to be fetched next, as `along`.
        """
        first, vectors = cut_columns(columns, block)
        at, line = first * lanes, vectors * lanes
        j = first_j
        while j < last_j:
            within = j % LEFT
            left = min(last_j - j, LEFT - within)
            here = min(left, most[1, vectors])
            count = left // here
            call_tile(tile, (
                piece_of[1, vectors, here], count, a + ((j - within) * a_panel_rows + within) * size, 0, LEFT, depth, 1,
                panel + at * panel_rows * size, line, out + at * size, out_rows + j * 8, columns - at, add,
                ahead, ahead_step,
            ))  # fmt: skip
            ahead += count * depth * ahead_step * size
            j += here * count
        return ahead

    @part(types.void, plan_type, i, i, i, i, i)
    def pack_right(p, table, columns, first, last, out):
        """Make a panel of slots at a table of addresses, for blocks of columns, and for the few that are left."""
        whole = columns - few_of(columns)
        blocks = count_blocks(whole)
        for block in range(blocks + (whole < columns)):
            at, line = whole, lanes
            if block < blocks:
                vector, vectors = cut_columns(whole, block)
                at, line = vector * lanes, vectors * lanes
            call_tile(p.pack, (
                line // lanes - 1, last - first, table + first * 8, at, columns - at,
                out + at * p.most * size, line, p.k_of + first * 8,
            ))  # fmt: skip

    @part(types.void, plan_type, i, i, i, i, i)
    def pack_left(p, table, columns, first, last, out):
        """Make a panel of slots at a table of addresses, to be read down its columns."""
        for begin in range(0, columns, LEFT):
            at = begin
            while at < min(begin + LEFT, columns):
                vectors = min(widest, (begin + LEFT - at) // lanes)
                call_tile(p.pack, (
                    vectors - 1, last - first, table + first * 8, at, columns - at,
                    out + (begin * p.most + at - begin) * size, LEFT, p.k_of + first * 8,
                ))  # fmt: skip
                at += vectors * lanes

    @part(i, plan_type, i)
    def position(p, row):
        """Return where in the batch a row stands."""
        return integer_at(p.order + row * 8) if p.order else row

    @part(i, plan_type, i)
    def length(p, row):
        return integer_at(p.lengths + row * 8) if p.lengths else p.T

    @part(i, plan_type, state_type, i)
    def count_all(p, q, t):
        """Return how many rows of the slice reach step t; where there are lengths, the slice is the batch."""
        return integer_at(p.active + t * 8) if p.active else q.last - q.first

    @part(i, plan_type, i, i, i)
    def count_active(p, row0, rows, t):
        """Return how many rows of a group reach step t: those before the first that is too short."""
        if not p.lengths:
            return rows
        low, high = row0, row0 + rows
        while low < high:
            middle = (low + high) >> 1
            if length(p, middle) > t:
                low = middle + 1
            else:
                high = middle
        return low - row0

    @part(i, plan_type, state_type, i)
    def time(p, q, j):
        """Return the time of step j of the chunk."""
        return q.done + j if p.reverse else p.T - 1 - q.done - j

    @part(types.boolean, plan_type, i, i)
    def is_cut(p, t, row):
        """Return whether no state entered step t in this row."""
        at = t + 1 if p.reverse else t
        if not p.reset or at >= length(p, row):
            return False
        return byte_at(p.reset + at * p.reset_step + position(p, row) * p.reset_row) != 0

    @part(i, plan_type, i, i)
    def c_at(p, t, row):
        """Return where the forward saved c' of a step."""
        return p.saved + (GATES * p.T * p.N + t * p.N + row) * p.H * size

    @part(i, state_type, plan_type, i)
    def table(q, p, which):
        return p.scratch + q.rank * p.scratch_rank + TABLES_AT + which * p.N * 8

    @part(i, plan_type, state_type, i, i, i, i)
    def fill_sources(p, q, t, row, slot, k):
        """Write where a slot comes from, and where its d_x and its panels' rows go; return where its c is."""
        n = position(p, row)
        before = t + 1 if p.reverse else t - 1
        cut = is_cut(p, t, row)
        h, c = p.zeros, p.zeros
        if not cut and 0 <= before < length(p, row):
            h = p.out + (before * p.out_step + n * p.out_row) * size
            c = c_at(p, before, row)
        elif not cut:
            h = p.h_0 + n * p.P * size if p.h_0 else p.zeros
            c = p.c_0 + n * p.H * size if p.c_0 else p.zeros
        set_integer(p.x_from + slot * 8, p.x + (t * p.x_step + n * p.x_row) * size)
        set_integer(p.h_from + slot * 8, h)
        set_integer(p.d_x_to + slot * 8, t * p.x_step + n * p.x_row)
        set_integer(p.k_of + slot * 8, k)
        return c

    @part(types.void, plan_type, state_type, i, i)
    def fill_tables(p, q, row0, rows):
        """Write where the rows of one step are read and written."""
        t = time(p, q, q.j)
        first = q.base if p.units_apart else q.slot
        for r in range(rows):
            row, slot = row0 + r, first + r
            n = position(p, row)
            place = integer_at(p.places + row * 8) if p.places else row
            c = fill_sources(p, q, t, row, slot, q.base + place - q.first)
            set_integer(table(q, p, Z_ROWS) + r * 8, slot * GATES * p.H)
            set_integer(table(q, p, H_ROWS) + r * 8, r * p.P)
            set_integer(table(q, p, D_OUT_ROWS) + r * 8, t * p.out_step + n * p.out_row if p.d_out else 0)
            set_integer(table(q, p, C_ROWS) + r * 8, c)
            set_integer(table(q, p, DH_ROWS) + r * 8, slot * p.P if p.projected else 0)

    @part(types.void, plan_type, state_type, i, i, i, i)
    def pass_on(p, q, row0, rows, first, last):
        """d_h = d_z W_hh for blocks of outputs, to the step before; what was cut gets nothing.

        Every other step takes the blocks in the opposite order: what it needs first is what the cache saw last.
        Meanwhile the gates of cells to come go to L2, if this thread takes all of them: of the step after the next, or
        of the next slice.
        """
        t = time(p, q, q.j)
        d_h = p.d_h + row0 * p.P * size
        ahead, ahead_step = p.zeros, 0
        next_t, next_row = time(p, q, q.j + 2), row0
        if p.slices > 1:
            next_t, next_row = t, row0 + q.last - q.first
            if next_row + rows > p.row0 + p.rows:
                next_t, next_row = time(p, q, q.j + 1), p.row0 + row0 - q.first
        if rows >= FETCHING_ROWS and not p.units_apart and 0 <= next_t < p.T:
            ahead = p.saved + (next_t * p.N + next_row) * GATES * p.H * size
            multiplications = (rows + most[0, widest] - 1) // most[0, widest] * count_blocks(p.P) * GATES * p.H
            ahead_step = rows * GATES * p.H // multiplications + 1
        for nth in range(first, last):
            block = first + last - 1 - nth if q.j & 1 else nth
            ahead = along(
                p.multiply, p.d_z, table(q, p, Z_ROWS), rows, p.H, GATES, p.w_hh, p.raw, p.P, block,
                d_h, table(q, p, H_ROWS), ahead, ahead_step,
            )  # fmt: skip
        if p.reset:
            begin, end = columns_of(p.P, first, last)
            for r in range(rows):
                if is_cut(p, t, row0 + r):
                    clear(d_h + (r * p.P + begin) * size, (end - begin) * size)

    @part(types.void, plan_type, state_type, i, i, i, i)
    def add_output(p, q, row0, rows, first, last):
        """d_h_out = d_h + d_out for blocks of outputs, where there is a projection."""
        begin, end = columns_of(p.P, first, last)
        call_tile(p.add, (
            0, rows, end - begin, p.d_h + (row0 * p.P + begin) * size, p.P,
            (p.d_out if p.d_out else p.zeros) + begin * size, table(q, p, D_OUT_ROWS),
            p.d_h_out + begin * size, table(q, p, DH_ROWS),
        ))  # fmt: skip

    @part(types.void, plan_type, state_type, i, i, i, i)
    def differentiate(p, q, row0, rows, first, last):
        """d_z of one step for blocks of units; the cell's own gradient goes to the step before."""
        t = time(p, q, q.j)
        begin, end = columns_of(p.H, first, last)
        d_h, d_h_stride = p.d_h + row0 * p.P * size, p.P
        d_out, d_out_rows = p.d_out if p.d_out else p.zeros, table(q, p, D_OUT_ROWS)
        back = 1 if p.reverse else -1
        d_out_next, c_next = back * p.out_step, 2 * back * p.N * p.H
        if p.slices > 1:
            d_out_next, c_next = (q.last - q.first) * p.out_row, (back * p.N + q.last - q.first) * p.H
        if p.projected:  # d_m = d_h_out W_hr
            for r in range(rows):
                set_integer(table(q, p, D_OUT_ROWS) + r * 8, 0)
                set_integer(table(q, p, H_ROWS) + r * 8, (row0 + r) * p.H)
            d_h, d_h_stride, d_out, d_out_next = p.d_m + row0 * p.H * size, p.H, p.zeros, 0
            for block in range(first, last):
                along(
                    p.multiply, p.d_h_out, table(q, p, DH_ROWS), rows, p.P, 1, p.w_hr, 0, p.H, block,
                    p.d_m, table(q, p, H_ROWS), p.zeros, 0,
                )  # fmt: skip
        d_c = p.d_c + row0 * p.H * size
        if not p.projected:
            d_out += begin * size
        for r in range(rows):
            set_integer(table(q, p, C_ROWS) + r * 8, integer_at(table(q, p, C_ROWS) + r * 8) + begin * size)
        call_tile(p.cell, (
            0, rows, end - begin, p.H, d_h + begin * size, d_h_stride, d_out, d_out_rows, d_out_next,
            p.saved + ((t * p.N + row0) * p.H + begin) * GATES * size, c_at(p, t, row0) + begin * size, c_next,
            table(q, p, C_ROWS),
            d_c + begin * size, p.H, p.d_z + begin * size, table(q, p, Z_ROWS), p.m + begin * size, p.projected,
        ))  # fmt: skip
        if p.reset:
            for r in range(rows):
                if is_cut(p, t, row0 + r):
                    clear(d_c + (r * p.H + begin) * size, (end - begin) * size)

    @part(types.void, plan_type, state_type, i)
    def retrace(p, q, row):
        """Take a single row through all steps of the chunk, in one call of the tile."""
        first, c = q.slot, p.zeros
        for j in range(q.steps):
            c = fill_sources(p, q, time(p, q, j), row, q.slot, j * (q.last - q.first) + row - q.first)
            q.slot += 1
        t, back = time(p, q, 0), 1 if p.reverse else -1
        d_out, d_out_step = p.zeros, 0
        if p.d_out:
            d_out, d_out_step = p.d_out + (t * p.out_step + row * p.out_row) * size, back * p.out_step
        call_tile(p.retrace, (
            0, q.steps, p.H, (p.H + lanes - 1) // lanes, count_blocks(p.H),
            p.d_h + row * p.H * size, p.d_c + row * p.H * size,
            d_out, d_out_step, p.saved + (t * p.N + row) * GATES * p.H * size, c_at(p, t, row), back * p.N * p.H, c,
            p.d_z + first * GATES * p.H * size, GATES * p.H, p.w_hh, p.raw,
        ))  # fmt: skip

    @part(types.void, plan_type, state_type, i, i)
    def all_steps(p, q, row0, rows):
        """Take a group of rows through all steps of the chunk; their slots follow each other."""
        q.slot = q.steps * (row0 - q.first)
        if p.retrace and rows == 1 and not p.reset:
            retrace(p, q, row0)
            return
        base = 0
        for j in range(q.steps):
            q.j, q.base = j, base
            t = time(p, q, j)
            here = count_active(p, row0, rows, t)
            if here > 0:
                fill_tables(p, q, row0, here)
                if p.projected:
                    add_output(p, q, row0, here, 0, count_blocks(p.P))
                differentiate(p, q, row0, here, 0, count_blocks(p.H))
                if p.projected:
                    for r in range(here):
                        set_integer(table(q, p, H_ROWS) + r * 8, r * p.P)
                pass_on(p, q, row0, here, 0, count_blocks(p.P))
                q.slot += here
            base += count_all(p, q, t)

    @part(i, plan_type, state_type)
    def z_at(p, q):
        """Return where the chunk's d_z is."""
        return p.d_z + (q.done * p.J * size if p.linear else 0)

    @part(types.void, plan_type, state_type, *[i] * 7)
    def outer_few(p, q, left, begin, count, panel, columns, out, add):
        """out[j] (+)= as `outer`, for the columns that `few_of` leaves and `count` numbers j from `begin` on.

        left : at the first of these numbers.
        """
        few = few_of(columns)
        whole = columns - few
        alone = columns == 1  # d_W is one line then, and is written where it belongs
        to = out + begin * size if alone else p.scratch + q.rank * p.scratch_rank + TURNED_AT
        for k in range(0, max(q.rows, 1), DOWN_DEPTH):
            more = int(add or k > 0)
            for at in range(0, count, widest * lanes):
                vectors = min(widest, (LEFT - begin % LEFT - at) // lanes)
                row = 0
                while row < few:
                    here = min(few - row, most[1, vectors])
                    call_tile(p.multiply, (
                        piece_of[1, vectors, here], 1, panel + (whole * p.most + k * lanes + row) * size, 0, lanes,
                        min(DOWN_DEPTH, q.rows - k), 1, left + (k * LEFT + at) * size, LEFT,
                        to + at * size, p.ramp_left + row * 8, count - at, int(alone) * more, left, 0,
                    ))  # fmt: skip
                    row += here
            if not alone:
                call_tile(p.turn, (0, few, count, to, LEFT, out + (begin * columns + whole) * size, columns, more))

    @part(types.void, plan_type, state_type, *[i] * 9)
    def outer(p, q, left, first, last, panel, columns, out, ramp, d_bias, add):
        """out[j] (+)= sum over the chunk's k of left[k, j] * panel[k] for j from first to last; and the sum of left.

        What is written stays in L1 from one depth to the next, and a panel comes from L2 once for LEFT numbers j.
        Meanwhile `left` of the next LEFT comes to L2; after the last that of the first again, for the next product.
        """
        whole = columns - few_of(columns)
        blocks = count_blocks(whole)
        ahead_step = LEFT // (max(blocks, 1) * (LEFT // most[1, widest])) + 1
        begin = first
        while begin < last:
            within = begin % LEFT
            end = min(last, begin - within + LEFT)
            ahead = left + (end if end < last else first) * p.most * size
            here = left + ((begin - within) * p.most + within) * size
            for block in range(blocks):
                line = cut_columns(whole, block)[1] * lanes
                for k in range(0, max(q.rows, 1), DOWN_DEPTH):
                    ahead = down(
                        p.multiply, left + k * LEFT * size, p.most, begin, end, min(DOWN_DEPTH, q.rows - k),
                        panel + k * line * size, p.most, whole, block, out, ramp, int(add or k > 0),
                        ahead, ahead_step,
                    )  # fmt: skip
            if whole < columns:
                outer_few(p, q, here, begin, end - begin, panel, columns, out, add)
            at = 0
            while d_bias and at < end - begin:
                vectors = min(widest, (LEFT - within - at) // lanes)
                for k in range(0, max(q.rows, 1), DOWN_DEPTH):
                    call_tile(p.multiply, (
                        piece_of[0, vectors, 1], 1, p.ones, p.ramp_i, 0, min(DOWN_DEPTH, q.rows - k), 1,
                        here + (k * LEFT + at) * size, LEFT, d_bias + (begin + at) * size, p.ramp_i,
                        end - begin - at, int(add or k > 0), 0, 0,
                    ))  # fmt: skip
                at += vectors * lanes
            begin = end

    @part(types.boolean, plan_type, state_type)
    def is_packed(p, q):
        """Return whether d_W of the chunk is made of panels: one of a single row is an outer product."""
        return q.rows != 1 or not p.outer

    @part(types.void, plan_type, state_type, i, i)
    def pack_slots(p, q, first, last):
        """Make the rows of some slots in all panels of the chunk."""
        if not is_packed(p, q):
            return
        for slot in range(first, last):
            set_integer(p.z_from + slot * 8, z_at(p, q) + slot * p.J * size)
        pack_right(p, p.x_from, p.I, first, last, p.panel_x)
        pack_right(p, p.h_from, p.P, first, last, p.panel_h)
        pack_left(p, p.z_from, p.J, first, last, p.left_z)
        if p.projected:
            for slot in range(first, last):
                set_integer(p.z_from + slot * 8, p.d_h_out + slot * p.P * size)
            pack_left(p, p.z_from, p.P, first, last, p.left_h)
            for slot in range(first, last):
                set_integer(p.z_from + slot * 8, p.m + slot * p.H * size)
            pack_right(p, p.z_from, p.H, first, last, p.panel_m)

    @part(types.void, plan_type, state_type, i, i)
    def input_gradients(p, q, first, last):
        """d_x = d_z W_ih of some slots."""
        if p.dots and p.d_x:
            call_tile(p.dots, (
                p.I - 1, last - first, z_at(p, q), p.ramp_z + first * 8, p.J, p.w_ih_t,
                p.d_x, p.d_x_to + first * 8,
            ))  # fmt: skip
        elif p.d_x:
            for block in range(count_blocks(p.I)):
                along(
                    p.multiply, z_at(p, q), p.ramp_z + first * 8, last - first, p.J // p.parts, p.parts,
                    p.w_ih, p.raw, p.I, block,
                    p.d_x, p.d_x_to + first * 8, z_at(p, q), 0,
                )  # fmt: skip

    @part(types.UniTuple(i, 2), state_type, i, i)
    def share_of(q, numbers, share):
        """Return the first of some rows of a weight that a thread takes and the one behind them: whole registers."""
        registers = (numbers + lanes - 1) // lanes
        first, last = registers * share // q.shares, registers * (share + 1) // q.shares
        return first * lanes, min(numbers, last * lanes)

    @part(types.void, plan_type, state_type, i)
    def weight_gradients(p, q, share):
        """d_W += d_z^T [x h] and the bias, for a range of rows of the weights."""
        add = int(p.add_w != 0 or q.done > 0 or q.first > p.row0)
        first, last = share_of(q, p.J, share)
        if not is_packed(p, q):
            call_tile(p.outer, (0, first, last, p.d_z, p.I, integer_at(p.x_from), p.d_w_ih, add))
            call_tile(p.outer, (0, first, last, p.d_z, p.P, integer_at(p.h_from), p.d_w_hh, add))
            if p.d_bias:
                at = first * size
                call_tile(p.outer, (0, 0, 1, p.ones, last - first, p.d_z + at, p.d_bias + at, add))
            return
        outer(p, q, p.left_z, first, last, p.panel_x, p.I, p.d_w_ih, p.ramp_i, p.d_bias, add)
        outer(p, q, p.left_z, first, last, p.panel_h, p.P, p.d_w_hh, p.ramp_p, 0, add)
        if p.projected:
            first, last = share_of(q, p.P, share)
            outer(p, q, p.left_h, first, last, p.panel_m, p.H, p.d_w_hr, p.ramp_h, 0, add)

    @part(types.void, plan_type, state_type, i)
    def run_share(p, q, share):
        """Do one share of a phase."""
        if q.kind == LOAD or q.kind == SAVE:
            if q.kind == SAVE and share == 0 and p.d_bias_hh:
                copy(p.d_bias_hh, p.d_bias, p.J * size)
            if q.kind == LOAD and share == 0 and p.dots:
                line = p.I if p.raw else cut_columns(p.I, 0)[1] * lanes
                call_tile(p.turn, (0, p.J, p.I, p.w_ih, line, p.w_ih_t, p.J, 0))
            for row in range(p.row0 + p.rows * share // q.shares, p.row0 + p.rows * (share + 1) // q.shares):
                n = position(p, row)
                d_h, d_c = p.d_h + row * p.P * size, p.d_c + row * p.H * size
                if q.kind == SAVE:
                    copy(p.d_h_0 + n * p.P * size, d_h, p.P * size)
                    copy(p.d_c_0 + n * p.H * size, d_c, p.H * size)
                    if p.d_x and p.lengths:
                        for t in range(length(p, row), p.T):
                            clear(p.d_x + (t * p.x_step + n * p.x_row) * size, p.I * size)
                    continue
                copy(d_h, p.d_h_n + n * p.P * size if p.d_h_n else p.zeros, p.P * size)
                copy(d_c, p.d_c_n + n * p.H * size if p.d_c_n else p.zeros, p.H * size)
        elif q.kind == STEPS:
            for group in range(p.groups * share // q.shares, p.groups * (share + 1) // q.shares):
                rows = q.last - q.first
                row0 = rows * group // p.groups
                all_steps(p, q, q.first + row0, rows * (group + 1) // p.groups - row0)
                pack_slots(p, q, q.steps * row0, q.slot)
                input_gradients(p, q, q.steps * row0, q.slot)
        elif q.kind == OUTPUTS or q.kind == UNITS:
            # d_h of the step after, and with it what a step begins with; then, apart where there is a projection, d_z
            rows = count_all(p, q, time(p, q, q.j))
            blocks = count_blocks(p.P)
            first, last = blocks * share // q.shares, blocks * (share + 1) // q.shares
            begins = q.kind == OUTPUTS or not p.projected
            if begins and q.j > 0 and first < last:
                q.j -= 1
                after = count_all(p, q, time(p, q, q.j))
                q.base -= after
                fill_tables(p, q, q.first, after)
                pass_on(p, q, q.first, after, first, last)
                q.base += after
                q.j += 1
            fill_tables(p, q, q.first, rows)
            if q.kind == OUTPUTS and first < last:
                add_output(p, q, q.first, rows, first, last)
            if q.kind == UNITS:
                blocks = count_blocks(p.H)
                first, last = blocks * share // q.shares, blocks * (share + 1) // q.shares
                if first < last:
                    differentiate(p, q, q.first, rows, first, last)
        elif q.kind == PACK:
            first, last = q.rows * share // q.shares, q.rows * (share + 1) // q.shares
            if p.linear:
                for slot in range(first, last):
                    set_integer(p.x_from + slot * 8, p.x + (q.done + slot) * p.x_step * size)
                    set_integer(p.d_x_to + slot * 8, (q.done + slot) * p.x_step)
                    set_integer(p.k_of + slot * 8, slot)
            pack_slots(p, q, first, last)
        else:
            if p.units_apart:
                blocks = count_blocks(p.P)
                first, last = blocks * share // q.shares, blocks * (share + 1) // q.shares
                rows = count_all(p, q, time(p, q, q.j))
                if first < last and rows > 0:
                    fill_tables(p, q, q.first, rows)
                    pass_on(p, q, q.first, rows, first, last)
            weight_gradients(p, q, share)
            if p.units_apart or p.linear:
                input_gradients(p, q, q.rows * share // q.shares, q.rows * (share + 1) // q.shares)

    run_phase = phase_part(plan_type, state_type, run_share)

    def backward(plan, rank):
        p = carray(plan, 1)[0]
        if p.row0 > 0:  # the second half
            p.d_w_ih = p.second
            p.d_w_hh = p.d_w_ih + p.J * p.I * size
            p.d_w_hr = p.d_w_hh + p.J * p.P * size
            p.d_bias = p.d_w_hr + p.P * p.H * p.projected * size if p.d_bias else 0
            p.d_bias_hh = 0
        q = carray(state_at(p.scratch + rank * p.scratch_rank), 1)[0]
        q.rank, q.shares, q.phase, q.impatient = rank, p.shares, 0, 0
        q.kind, q.done, q.j = LOAD, 0, 0
        if not p.linear:
            run_phase(p, q)
        while q.done < p.T:
            head = p.T % p.chunk  # chunks count in the forward's order: its last, the first here, may be short
            q.steps = head if q.done == 0 and head > 0 else p.chunk
            for slice_ in range(p.slices):  # within a chunk, so that checkpoints leave the order of a sum as it is
                q.first = p.row0 + p.rows * slice_ // p.slices
                q.last = p.row0 + p.rows * (slice_ + 1) // p.slices
                q.rows = 0
                for j in range(q.steps):
                    q.rows += count_all(p, q, time(p, q, j))
                if p.linear:
                    q.rows = q.steps
                elif p.units_apart:
                    q.base = 0
                    for j in range(q.steps):
                        q.j = j
                        if p.projected:
                            q.kind = OUTPUTS
                            run_phase(p, q)
                        q.kind = UNITS
                        run_phase(p, q)
                        if j < q.steps - 1:
                            q.base += count_all(p, q, time(p, q, j))
                else:
                    q.kind = STEPS
                    run_phase(p, q)
                if (p.units_apart or p.linear) and is_packed(p, q):
                    q.kind = PACK
                    run_phase(p, q)
                q.kind = GRADIENTS
                run_phase(p, q)
            q.done += q.steps
        q.kind = SAVE
        if not p.linear:
            run_phase(p, q)

    return backward, types.void(types.CPointer(plan_type), i)


def sums_kernel(dtype: np.dtype):
    """Describe what adds the gradients of a second half of the rows to those of the first: a function of a SUMS."""
    size = dtype.itemsize
    sums_type, numbers_at = from_dtype(SUMS), record_at(from_dtype(dtype))

    @part(types.int64, types.int64, types.int64, types.int64)
    def add(total, second, count):
        """Return what lies behind those that were added."""
        a, b = carray(numbers_at(total), count), carray(numbers_at(second), count)
        for k in range(count):
            a[k] += b[k]
        return second + count * size

    def sums(plan, rank):
        p = carray(plan, 1)[0]
        second = add(p.d_w_ih, p.second, p.J * p.I)
        second = add(p.d_w_hh, second, p.J * p.P)
        if p.d_w_hr:
            second = add(p.d_w_hr, second, p.P * p.H)
        if p.d_bias:
            add(p.d_bias, second, p.J)
            copy(p.d_bias_hh, p.d_bias, p.J * size)

    return sums, types.void(types.CPointer(sums_type), types.int64)
