"""A product of rows with weight panels, out = start + a W^T, on its own and as a part of the sequence."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import carray, from_dtype, types
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.call import address
from fastlstm.kernels.compile import entry
from fastlstm.kernels.panels import Packing, columns_panel, cut_columns
from fastlstm.kernels.region import Prepared
from fastlstm.kernels.team import LINE, call_tile, copy, integer_at, next_task, part, record, set_integer
from fastlstm.kernels.tile import (
    EVERY,
    FETCHING_ROWS,
    GATES,
    blocking,
    most_blocks,
    project_kernel,
    shapes,
    tile_table,
)
from fastlstm.memory import aligned

__all__ = ["Product", "block_tables", "product_part", "tile_rows"]

Array = NDArray[Any]
ROWS = 96  # in a task: x and out of 256 numbers a row stay in L2 beside the panel
L2_BYTES = 768 << 10  # weights of a thread beyond which panels are fetched ahead
KEPT_PLANS = 4
SERIAL_WORK = 1 << 20  # multiply-adds below which a parallel region does not pay


PLAN = record(
    "kernel", "x", "out", "rows", "depth", "outputs", "start", "panel", "blocks", "tail", "width", "project", "fetch",
    "ranks", "counters", "scratch", "scratch_rank",
)  # fmt: skip


def tile_rows(dtype: np.dtype[Any], rows: int) -> set[int]:
    """Return how many rows the tiles have in which so many rows are cut."""
    tiles = max(1, -(-rows // blocking(dtype).rows))
    return {rows // tiles, -(-rows // tiles)}


@functools.cache
def block_tables(dtype: np.dtype[Any]) -> tuple[Array, Array]:
    """Return shape_of[fetching, rows, main blocks, tail] and most[rows] for Numba code."""
    cut, found = blocking(dtype), shapes(dtype)
    most = np.array([0] + [most_blocks(dtype, rows) for rows in range(1, cut.rows + 1)])
    shape_of = np.full((2, cut.rows + 1, max(most) + 1, 2), -1)
    for i, shape in enumerate(found):
        tail = int(bool(cut.tail) and shape.blocks[-1] == cut.tail)
        shape_of[int(shape.fetching), shape.rows, len(shape.blocks) - tail, tail] = i
    missing = shape_of[1] < 0
    shape_of[1][missing] = shape_of[0][missing]
    return shape_of, most


@functools.cache
def product_part(dtype: np.dtype[Any]):
    """Return `cut_rows`, `tile_of`, `count_groups`, `block_group` and `product` for the kernels of one dtype."""
    size = dtype.itemsize
    tile_rows = blocking(dtype).rows
    block_width = GATES * blocking(dtype).units
    shape_of, most = block_tables(dtype)

    i = types.int64

    @part(types.UniTuple(i, 3), i)
    def cut_rows(rows):
        """Return a number of tiles, their rows, and how many of them (the first) have one row more."""
        tiles = max((rows + tile_rows - 1) // tile_rows, 1)
        return tiles, rows // tiles, rows % tiles

    @part(i, i, i, i)
    def tile_of(table, rows, tail):
        """Return the address of a tile in a table of `tile_table`."""
        return integer_at(table + ((rows > 1) + (rows >= FETCHING_ROWS) + 3 * tail) * 8)

    @part(i, i, i, i, i)
    def count_groups(first, last, mains, rows):
        """Return how many tiles of `rows` rows stand side by side in blocks first to last."""
        main = min(last, mains) - first
        groups = (main + most[rows] - 1) // most[rows]
        alone = last > mains and (rows > 1 or main % most[1] == 0)
        return groups + alone

    @part(types.UniTuple(i, 3), i, i, i, i, i)
    def block_group(group, first, last, mains, rows):
        """Return the first block of such a tile, its main blocks, and whether it has the tail."""
        begin = min(first + group * most[rows], mains)
        main = min(most[rows], min(last, mains) - begin)
        tail = last > mains and begin + main == mains and (main == 0 or (rows == 1 and main < most[1]))
        return begin, main, int(tail)

    @part(types.void, *[i] * 13)
    def product(tiles_at, start, a, a_rows, rows, depth, panel, first, last, mains, out, out_stride, fetch):
        """out[row, block] = start[block] + a[row] W for blocks first to last; `fetch` 1: the panels are not in L2."""
        tiles, fewest, more = cut_rows(rows)
        widest = fewest + (more > 0)
        groups = count_groups(first, last, mains, widest)
        for group in range(groups):
            block, main, tail = block_group(group, first, last, mains, widest)
            at = block * block_width * size
            following = block_group(group + 1, first, last, mains, widest)[0] if group + 1 < groups else block
            row = 0
            for longer in range(1, -1, -1):
                here, count = fewest + longer, more if longer else tiles - more
                if here > 0 and count > 0:
                    call_tile(tile_of(tiles_at, here, tail), (
                        shape_of[fetch, here, main, tail], count, start + at, a, a_rows + row * 8, depth,
                        panel + at * depth, panel + following * block_width * size * depth,
                        out + row * out_stride * size + at, out_stride,
                    ))  # fmt: skip
                    row += here * count

    return cut_rows, tile_of, count_groups, block_group, product


def product_kernel(dtype: np.dtype[Any]):
    """Describe the kernel of a product alone: a function of the plan and the thread's rank."""
    size = dtype.itemsize
    product = product_part(dtype)[-1]

    def run(plan, rank):
        p = carray(plan, 1)[0]
        table = p.scratch + rank * p.scratch_rank
        sums = table + ROWS * 8
        for row in range(ROWS):
            set_integer(table + row * 8, row * p.depth)
        task = -1
        while True:
            task = next_task(p.counters) if p.ranks > 1 else task + 1
            row0 = task * ROWS
            if row0 >= p.rows:
                break
            rows = min(ROWS, p.rows - row0)
            blocks = p.blocks + p.tail
            product(
                p.project, p.start, p.x + row0 * p.depth * size, table, rows, p.depth, p.panel,
                0, blocks, p.blocks, sums, p.width, p.fetch,
            )  # fmt: skip
            for row in range(rows):
                to = p.out + (row0 + row) * p.outputs * size
                copy(to, sums + row * p.width * size, p.outputs * size)

    return run, types.void(types.CPointer(from_dtype(PLAN)), types.int64)


class Product:
    """Packed weights of y = x W^T + b.

    Parameters
    ----------
    weight : ndarray, (outputs, K)
        float32 or float64.
    bias : ndarray, (outputs,), optional
        None is zeros.
    """

    def __init__(self, weight: Array, bias: Array | None = None) -> None:
        dtype = weight.dtype
        self._cut = cut_columns(len(weight), dtype)
        self._width = GATES * self._cut.padded
        packing = Packing([(0, columns_panel(len(weight), weight.shape[1], self._cut))], dtype)
        self._panel = aligned(packing.size, dtype)
        packing.make([weight], self._panel)
        self._start = aligned(self._width, dtype)
        self._start[:] = 0
        if bias is not None:
            self._start[: len(bias)] = bias
        self._shape, self._dtype = weight.shape, dtype
        self._address = entry(product_kernel, dtype)
        self._idle: dict[tuple[int, int], Prepared] = {}  # of calls before
        fetching = self._panel.nbytes > L2_BYTES
        self._project = tile_table(project_kernel, dtype, EVERY, self._cut.tail_units > 0, fetching)

    def apply(self, x: Array, out: Array) -> None:
        """Write x W^T + b to `out`: x (rows, K), out (rows, outputs), both C-contiguous and of the weight's dtype."""
        rows = len(x)
        outputs, K = self._shape
        ranks = min(threads.get_num_threads(), -(-rows // ROWS)) if rows * K * outputs > SERIAL_WORK else 1
        prepared = self._idle.pop((rows, ranks), None) or self._prepare(rows, ranks)
        prepared.run(x, out)
        if len(self._idle) < KEPT_PLANS:
            self._idle[rows, ranks] = prepared

    def _prepare(self, rows: int, ranks: int) -> Prepared:
        """Return a plan for so many rows, the team's counters in its scratch."""
        outputs, K = self._shape
        per_rank = ROWS * (8 + self._width * self._dtype.itemsize) + LINE
        scratch = aligned(2 * LINE + ranks * per_rank, np.dtype(np.uint8))
        base = address(scratch)
        numbers = (
            self._address, 0, 0, rows, K, outputs, address(self._start), address(self._panel),
            self._cut.blocks, int(self._cut.tail_units > 0), self._width, address(self._project),
            int(self._panel.nbytes > L2_BYTES), ranks, base, base + 2 * LINE, per_rank,
        )  # fmt: skip
        return Prepared(numbers, scratch[: 2 * LINE], ranks)
