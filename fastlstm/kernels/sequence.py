"""The sequence, forward: layers, directions and steps around the tile.

A *span* is what runs as one time loop: all layers of a one-directional network, a chunk of steps at a time, or one
layer of a bidirectional one.  There are two ways to share it out, with the same bits:

rows   each thread takes whole groups of rows (and one direction) through a span, first those that it takes in every
       call, which are in its cache; no thread waits for another.
units  each step is a phase of the thread team, and each thread owns a range of blocks, so that its part of the weights
       stays in its own cache: for few rows and large layers.

Where a group has few rows, W_ih x is taken for a chunk of steps at once, as one product with full tiles, into a scratch
that stays in cache (*hoisted*); else it is part of the step's own tile.  Both add the same terms in the same order.
"""

from __future__ import annotations

import numpy as np
from numba import carray, from_dtype, types

from fastlstm.kernels.product import block_tables, product_part
from fastlstm.kernels.team import (
    byte_at,
    call_tile,
    claim,
    clear,
    copy,
    fence,
    finish,
    integer_at,
    is_done,
    part,
    phase_part,
    record,
    record_at,
    set_integer,
)
from fastlstm.kernels.tile import GATES, blocking

__all__ = ["PLAN", "SPAN", "WEIGHT_FIELDS", "forward_kernel"]


# What one call is about, written by `network.py`.  Addresses in bytes, all else in numbers.
PLAN = record(
    "kernel",
    # from here to `b_hh` the arrays of a call, in the order in which they are given
    "x", "out",  # (T, N, I), (T, N, D*P), in steps and rows as below
    "h_n", "c_n",  # (L*D, N, P), (L*D, N, H)
    "h_0", "c_0",  # (L*D, N, P), (L*D, N, H); 0: zeros
    "panels",  # of all weights; 0: the call is of one step and row, and reads the weights below
    "saved",  # for the backward, rows in the order of the state: the gates (T, N, 4H) and c' (T, N, H); 0: none
    "w_ih", "w_hh", "b_ih", "b_hh",  # of the one layer and direction
    "x_step", "x_row", "out_step", "out_row",  # strides
    "T", "N", "H", "P", "L", "D",
    "blocks", "tail",  # main blocks of hidden units; 1 if a narrow block follows
    "units", "width",  # numbers in a row of c and of z, padding included
    "state_width",  # numbers in a row of the state buffer of h
    "projected", "p_blocks", "p_tail",  # 1 if there is W_hr, and its blocks
    "advance", "project",  # tables of the tiles
    "unpacked",  # the tile that reads weights as they are
    "fetch",  # 1: a thread's weights do not stay in L2
    "weights",  # (L*D, WEIGHT_FIELDS): what does not change when the weights do
    "zeros",  # a row of zeros, where a product starts that has no bias
    "h", "c",  # state: (L*D, 2, N, state_width), (L*D, N, units)
    "parity",  # which of the two h the first step reads
    "begun",  # out: 1 once a thread is in the kernel, which then runs to its end
    "keep",  # 1: the state is in h and c already and stays there (streaming)
    "order", "lengths",  # (N,): rows by falling length, and those lengths; 0: all rows have T steps, in their own order
    "reset", "reset_step", "reset_row",  # bytes (T, N); 0: none
    "reverse",  # 1: the only direction runs from the last step to the first
    "middle",  # two buffers (T, N, 2P) between the layers of a bidirectional network
    "hoisted", "chunk",  # 1: the input product is hoisted; steps in a chunk
    "past_caches",  # 1: the gates that are saved are too large for them; 2: c' goes past them too
    "whole",  # 1: one tile holds all hidden units and no row differs from another, so that it can make many steps
    "groups",  # of rows, each taken by one thread as a whole
    "ranks", "shares", "counters",  # threads; shares of a phase (1: the rows are shared out); the team's counters
    "scratch", "scratch_rank",  # for each rank `scratch_rank` bytes: a SPAN, row tables, and at
    "z_at", "between_at", "m_at",  # z of a chunk, outputs between layers, outputs before the projection
)  # fmt: skip

# One direction of one layer: its input size, and where its panels are among all.
WEIGHT_FIELDS = ("depth", "bias", "w_ih", "w_hh", "w_hr")
BIAS, W_IH, W_HH, W_HR = range(1, 5)

# Where a thread is in its span, in the thread's own scratch.
SPAN = record(
    "rank", "shares", "phase", "kind", "impatient",
    "layer0", "layer1", "direction0", "direction1", "row0", "rows", "steps",
    "layer", "done", "chunk", "j",  # the chunk begins at step `done`; j counts in it
    "together",  # steps that one call of the tile makes
    "a", "a_step", "a_row", "a_local",  # input of the layer; local: a buffer of this group and chunk
    "out", "out_step", "out_row", "out_local", "out_direction",
    "a_rows", "m_rows", "out_rows",  # tables of row offsets
    "z_from0", "z_from1",  # first row of z of step j, for each direction
    "z", "between", "m",
)  # fmt: skip
LOAD, HOIST, ADVANCE, PROJECT, SAVE = range(5)  # what a phase does

TABLES_AT = -(-SPAN.itemsize // 64) * 64


def forward_kernel(dtype: np.dtype):
    """Describe the forward kernel of one dtype: a function of the plan and the thread's rank."""
    size = dtype.itemsize
    block_units = blocking(dtype).units
    block_width = GATES * block_units
    shape_of = block_tables(dtype)[0]
    cut_rows, tile_of, count_groups, block_group, product = product_part(dtype)
    plan_type, span_type, i = from_dtype(PLAN), from_dtype(SPAN), types.int64
    span_at = record_at(span_type)

    @part(types.void, plan_type, span_type, *[i] * 17)
    def step(
        p, q, start, start_stride, a, depth, a_panel, h, h_panel, c, to, to_width, out, valid, kept,
        rows, first, last, sign,
    ):  # fmt: skip
        """Advance rows by `q.together` steps for blocks first to last; arguments as in the tile; kept: t * N + row.

        Every other step takes the blocks in the opposite order: what it needs first is what the cache saw last.
        """
        tiles, fewest, more = cut_rows(rows)
        widest = fewest + (more > 0)
        groups = count_groups(first, last, p.blocks, widest)
        for nth in range(groups):
            backwards = q.j & 1
            group = groups - 1 - nth if backwards else nth
            block, main, tail = block_group(group, first, last, p.blocks, widest)
            following = group if nth == groups - 1 else group - 1 if backwards else group + 1
            ahead = block_group(following, first, last, p.blocks, widest)[0] * block_width * size
            unit, at = block * block_units, block * block_width * size
            row = 0
            for longer in range(1, -1, -1):
                here, count = fewest + longer, more if longer else tiles - more
                if here > 0 and count > 0:
                    call_tile(tile_of(p.advance, here, tail), (
                        shape_of[p.fetch, here, main, tail], count, q.together,
                        start + row * start_stride * size + at, start_stride, q.rows * p.width * p.hoisted,
                        a, q.a_rows + row * 8, sign * q.a_step, depth, a_panel + at * depth, a_panel + ahead * depth,
                        h + row * p.state_width * size, p.state_width, p.P * (p.panels != 0),
                        h_panel + at * p.P, h_panel + ahead * p.P,
                        c + (row * p.units + unit) * size, p.units,
                        to + (row * to_width + unit) * size, to_width,
                        out + unit * size, q.out_rows + row * 8, sign * q.out_step, valid - unit,
                        p.saved + (kept + row) * GATES * p.H * size,
                        p.saved + (GATES * p.T * p.N + kept + row) * p.H * size, sign * p.N * p.H, p.H, unit,
                        p.past_caches,
                    ))  # fmt: skip
                    row += here * count

    @part(i, plan_type, i)
    def position(p, row):
        """Return where in the batch a row stands."""
        return integer_at(p.order + row * 8) if p.order else row

    @part(i, plan_type, i)
    def length(p, row):
        return integer_at(p.lengths + row * 8) if p.lengths else p.T

    @part(i, plan_type, span_type, i)
    def count_active(p, q, t):
        """Return how many rows of the group reach step t: those before the first that is too short."""
        if not p.lengths:
            return q.rows
        low, high = q.row0, q.row0 + q.rows
        while low < high:
            middle = (low + high) >> 1
            if length(p, middle) > t:
                low = middle + 1
            else:
                high = middle
        return low - q.row0

    @part(i, plan_type, i)
    def depth_of(p, k):
        return integer_at(p.weights + k * len(WEIGHT_FIELDS) * 8)

    @part(i, plan_type, i, i)
    def weight(p, k, field):
        return p.panels + integer_at(p.weights + (k * len(WEIGHT_FIELDS) + field) * 8)

    @part(i, plan_type, i, i, i)
    def h_at(p, k, parity, row):
        return p.h + ((2 * k + parity) * p.N + row) * p.state_width * size

    @part(i, plan_type, i, i)
    def c_at(p, k, row):
        return p.c + (k * p.N + row) * p.units * size

    @part(i, span_type, i, i)
    def time(q, d, j):
        """Return the time of step j of the chunk in a direction."""
        return q.steps - 1 - q.done - j if d else q.done + j

    @part(types.void, plan_type, i, i, i)
    def load_state(p, k, row, reverse):
        """Copy a row of h_0 and c_0 to both state buffers; a reset at the first step drops it."""
        n = position(p, row)
        h, c = h_at(p, k, 0, row), c_at(p, k, row)
        clear(h, p.state_width * size)
        clear(c, p.units * size)
        if not (p.reset and not reverse and length(p, row) > 0 and byte_at(p.reset + n * p.reset_row)):
            if p.h_0:
                copy(h, p.h_0 + (k * p.N + n) * p.P * size, p.P * size)
            if p.c_0:
                copy(c, p.c_0 + (k * p.N + n) * p.H * size, p.H * size)
        copy(h_at(p, k, 1, row), h, p.state_width * size)

    @part(types.void, plan_type, i, i, i)
    def save_state(p, k, row, steps):
        """Copy a row of the state after `steps` steps to h_n and c_n."""
        n = position(p, row)
        copy(p.h_n + (k * p.N + n) * p.P * size, h_at(p, k, (p.parity + steps) & 1, row), p.P * size)
        copy(p.c_n + (k * p.N + n) * p.H * size, c_at(p, k, row), p.H * size)

    @part(types.void, plan_type, span_type, *[i] * 8)
    def cut_state(p, q, k, t, reverse, h, h_first, h_last, c_first, c_last):
        """Zero columns of h and c in the rows whose state must not leave step t."""
        at = t if reverse else t + 1
        if at == 0 or at >= p.T:
            return
        for row in range(count_active(p, q, at)):
            if byte_at(p.reset + at * p.reset_step + position(p, q.row0 + row) * p.reset_row):
                clear(h + (row * p.state_width + h_first) * size, (h_last - h_first) * size)
                clear(c_at(p, k, q.row0 + row) + c_first * size, (c_last - c_first) * size)

    @part(types.void, plan_type, span_type, i, i, i)
    def hoist_share(p, q, d, first, last):
        """Z = bias + x W_ih^T of a chunk, rows of all its steps one after the other; without panels all of z."""
        k = q.layer * p.D + d
        if not p.panels:  # the first step, before which both buffers of h are alike
            call_tile(p.unpacked, (
                0, first, last, p.H, p.b_ih, p.b_hh, q.a, depth_of(p, k), p.w_ih, h_at(p, k, 0, q.row0), p.P, p.w_hh,
                q.z,
            ))  # fmt: skip
            return
        rows = 0
        for j in range(q.chunk):
            t = time(q, d | p.reverse, j)
            for row in range(count_active(p, q, t)):
                n = row if q.a_local else position(p, q.row0 + row) if q.layer == 0 else q.row0 + row
                set_integer(q.a_rows + rows * 8, (j if q.a_local else t) * q.a_step + n * q.a_row)
                rows += 1
        z = q.z + (d - q.direction0) * p.chunk * q.rows * p.width * size
        product(
            p.project, weight(p, k, BIAS), q.a, q.a_rows, rows, depth_of(p, k), weight(p, k, W_IH),
            first, last, p.blocks, z, p.width, p.fetch,
        )  # fmt: skip

    @part(types.void, plan_type, span_type, i, i, i)
    def advance_share(p, q, d, first, last):
        """One step of one direction for blocks first to last."""
        k, reverse = q.layer * p.D + d, d | p.reverse
        t = time(q, reverse, q.j)
        rows = count_active(p, q, t)
        parity = (p.parity + q.done + q.j) & 1
        h_next = h_at(p, k, 1 - parity, q.row0)
        start, start_stride, depth = weight(p, k, BIAS), 0, depth_of(p, k)
        if p.hoisted:
            z_from = q.z_from1 if reverse else q.z_from0
            start = q.z + ((d - q.direction0) * p.chunk * q.rows + z_from) * p.width * size
            start_stride, depth = p.width, 0
        to, to_width, valid = h_next, p.state_width, p.H
        if p.projected:
            to, to_width, valid = q.m + (d - q.direction0) * q.rows * p.units * size, p.units, 0
        a = q.a + (q.j if q.a_local else t) * q.a_step * size
        out = q.out + ((q.j if q.out_local else t) * q.out_step + d * q.out_direction) * size
        step(
            p, q, start, start_stride, a, depth, weight(p, k, W_IH), h_at(p, k, parity, q.row0), weight(p, k, W_HH),
            c_at(p, k, q.row0), to, to_width, out, valid, t * p.N + q.row0,
            rows, first, last, -1 if reverse else 1,
        )  # fmt: skip
        if p.reset and not p.projected:
            begin, end = first * block_units, min(last * block_units, p.units)
            cut_state(p, q, k, t, reverse, h_next, begin, end, begin, end)

    @part(types.void, plan_type, span_type, i, i, i)
    def project_share(p, q, d, first, last):
        """H = m W_hr^T of one step of one direction for blocks first to last of the outputs."""
        k, reverse = q.layer * p.D + d, d | p.reverse
        t = time(q, reverse, q.j)
        rows = count_active(p, q, t)
        h_next = h_at(p, k, 1 - ((p.parity + q.done + q.j) & 1), q.row0)
        m = q.m + (d - q.direction0) * q.rows * p.units * size
        product(
            p.project, p.zeros, m, q.m_rows, rows, p.H, weight(p, k, W_HR),
            first, last, p.p_blocks, h_next, p.state_width, p.fetch,
        )  # fmt: skip
        out = q.out + ((q.j if q.out_local else t) * q.out_step + d * q.out_direction) * size
        begin, end = first * block_width, min(last * block_width, p.P)
        for row in range(rows):
            source = h_next + (row * p.state_width + begin) * size
            copy(out + (integer_at(q.out_rows + row * 8) + begin) * size, source, (end - begin) * size)
        if p.reset:
            c_last = p.units if last == p.p_blocks + p.p_tail else 0
            cut_state(p, q, k, t, reverse, h_next, begin, min(last * block_width, p.state_width), 0, c_last)

    @part(types.void, plan_type, span_type, i)
    def run_share(p, q, share):
        """Do one share of a phase: of the rows, or of the blocks of all directions side by side."""
        if q.kind == LOAD or q.kind == SAVE:
            for row in range(q.row0 + q.rows * share // q.shares, q.row0 + q.rows * (share + 1) // q.shares):
                for d in range(q.direction0, q.direction1):
                    for layer in range(q.layer0, q.layer1):
                        if q.kind == LOAD:
                            load_state(p, layer * p.D + d, row, d | p.reverse)
                        elif not p.keep:
                            save_state(p, layer * p.D + d, row, q.steps if d | p.reverse else length(p, row))
                    if q.kind == SAVE and p.lengths and q.layer1 == p.L:
                        for t in range(length(p, row), p.T):
                            clear(p.out + (t * p.out_step + position(p, row) * p.out_row + d * p.P) * size, p.P * size)
            return
        blocks = p.p_blocks + p.p_tail if q.kind == PROJECT else p.blocks + p.tail
        first, last = 0, blocks
        for d in range(q.direction0, q.direction1):
            if q.shares > 1:
                everything, before = (q.direction1 - q.direction0) * blocks, (d - q.direction0) * blocks
                first = min(max(everything * share // q.shares - before, 0), blocks)
                last = min(max(everything * (share + 1) // q.shares - before, 0), blocks)
            if first < last:
                if q.kind == HOIST:
                    hoist_share(p, q, d, first, last)
                elif q.kind == ADVANCE:
                    advance_share(p, q, d, first, last)
                else:
                    project_share(p, q, d, first, last)

    run_phase = phase_part(plan_type, span_type, run_share)

    @part(types.void, plan_type, span_type)
    def connect(p, q):
        """Say where the layer reads and writes: the user's arrays at the ends, buffers between layers."""
        q.a, q.a_step, q.a_row, q.a_local = p.x, p.x_step, p.x_row, 0
        q.out, q.out_step, q.out_row, q.out_local, q.out_direction = p.out, p.out_step, p.out_row, 0, p.P
        whole, part_of = p.T * p.N * 2 * p.P * size, p.chunk * q.rows * p.P * size
        if q.layer > 0 and p.D == 2:
            q.a, q.a_step, q.a_row = p.middle + ((q.layer - 1) & 1) * whole, p.N * 2 * p.P, 2 * p.P
        elif q.layer > 0:
            q.a, q.a_step, q.a_row, q.a_local = q.between + ((q.layer - 1) & 1) * part_of, q.rows * p.P, p.P, 1
        if q.layer < p.L - 1 and p.D == 2:
            q.out, q.out_step, q.out_row = p.middle + (q.layer & 1) * whole, p.N * 2 * p.P, 2 * p.P
        elif q.layer < p.L - 1:
            q.out, q.out_step, q.out_row, q.out_local = q.between + (q.layer & 1) * part_of, q.rows * p.P, p.P, 1
        for row in range(q.rows):
            n = row if q.a_local else position(p, q.row0 + row) if q.layer == 0 else q.row0 + row
            set_integer(q.a_rows + row * 8, n * q.a_row)
            n = row if q.out_local else position(p, q.row0 + row) if q.layer == p.L - 1 else q.row0 + row
            set_integer(q.out_rows + row * 8, n * q.out_row)

    @part(types.void, plan_type, span_type)
    def run_span(p, q):
        """Run layers and directions over all steps for a group of rows."""
        q.steps = length(p, q.row0)
        q.impatient = 0
        tables = p.scratch + q.rank * p.scratch_rank + TABLES_AT
        q.a_rows = tables
        q.m_rows = tables + p.chunk * q.rows * 8
        q.out_rows = q.m_rows + q.rows * 8
        shared = p.scratch + (0 if q.shares > 1 else q.rank) * p.scratch_rank
        q.z, q.between, q.m = shared + p.z_at, shared + p.between_at, shared + p.m_at
        if p.projected:
            for row in range(q.rows):
                set_integer(q.m_rows + row * 8, row * p.units)
        if not p.keep:
            q.kind = LOAD
            run_phase(p, q)
        q.done = 0
        while q.done < q.steps:
            q.chunk = min(p.chunk, q.steps - q.done)
            for layer in range(q.layer0, q.layer1):
                q.layer = layer
                connect(p, q)
                if p.hoisted:
                    q.kind = HOIST
                    run_phase(p, q)
                    q.z_from0 = q.z_from1 = 0
                q.together = q.chunk if p.whole else 1
                for j in range(0, q.chunk, q.together):
                    q.j = j
                    q.kind = ADVANCE
                    run_phase(p, q)
                    if p.projected:
                        q.kind = PROJECT
                        run_phase(p, q)
                    if p.hoisted:
                        q.z_from0 += count_active(p, q, q.done + j)
                        q.z_from1 += count_active(p, q, q.steps - 1 - q.done - j)
            q.done += q.chunk
        if not p.keep or p.lengths:
            q.kind = SAVE
            run_phase(p, q)

    def forward(plan, rank):
        p = carray(plan, 1)[0]
        p.begun = 1
        q = carray(span_at(p.scratch + rank * p.scratch_rank), 1)[0]
        q.rank, q.shares, q.phase = rank, p.shares, 0
        together = p.shares > 1  # all threads in one task
        groups = 1 if together else p.groups
        directions = 1 if together else p.D  # that are tasks of their own
        tasks = groups * directions  # of a span
        apart = p.ranks > 1 and not together
        spans = 1 if p.D == 1 else p.L
        for layer in range(spans):
            q.layer0, q.layer1 = (0, p.L) if p.D == 1 else (layer, layer + 1)
            for attempt in range(tasks):
                task = (tasks * rank // p.ranks + attempt) % tasks if apart else attempt
                if apart and not claim(p.counters, task, layer):
                    continue
                q.direction0 = task % directions
                q.direction1 = q.direction0 + 1 if directions == p.D else p.D
                group = task // directions
                q.row0 = p.N * group // groups
                q.rows = p.N * (group + 1) // groups - q.row0
                run_span(p, q)
                if apart:
                    finish(p.counters, task, layer)
            for task in range(tasks if apart and layer < spans - 1 else 0):
                is_done(p.counters, task, layer, -1)
        if p.past_caches:
            fence()
        if p.ranks == 1:  # of a stream; where there are more threads the caller does it
            p.parity = (p.parity + p.T) & 1

    return forward, types.void(types.CPointer(plan_type), i)
