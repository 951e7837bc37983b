"""The machine's own peak: the register tile on data in L1, on every thread at once."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import carray, from_dtype, types

from fastlstm.checks import as_size, float_dtype
from fastlstm.kernels.call import bind
from fastlstm.kernels.compile import entry
from fastlstm.kernels.region import run_region
from fastlstm.kernels.simd import I64, Builder, kernel
from fastlstm.kernels.team import LINE, record, set_integer
from fastlstm.kernels.tile import GATES, Shape, blocking, chain
from fastlstm.memory import aligned

__all__ = ["measure_peak"]

DEPTH = 128  # a panel of 128 lines and its rows: at most 36 KB
PLAN = record("kernel", "repeats", "scratch", "scratch_rank")


def _emit_tile(b: Builder, shape: Shape, rows, panel, out) -> None:
    """Emit one chain of the widest tile: rows (rows, DEPTH), panel (DEPTH, 4 * units), out as many registers."""
    width = GATES * shape.blocks[0] // b.lanes
    at = [b.pointer(rows) + r * DEPTH for r in range(shape.rows)]
    start = [(b.pointer(out) + v * b.lanes).load(b.lanes) for v in range(shape.rows * width)]
    for v, vec in enumerate(chain(b, start, I64(0), I64(DEPTH), at, [b.pointer(panel)], [width])):
        (b.pointer(out) + v * b.lanes).store(vec)


def peak_kernel(dtype: np.dtype[Any]):
    """Describe a kernel that runs the widest tile `repeats` times in each thread's own scratch."""
    size, rows, width = dtype.itemsize, blocking(dtype).rows, GATES * blocking(dtype).units
    tile = kernel(dtype, "peak", 3, _emit_tile, {0: Shape(rows, (blocking(dtype).units,))})

    def run(plan, rank):
        p = carray(plan, 1)[0]
        table = p.scratch + rank * p.scratch_rank
        panel = table + LINE
        a = panel + DEPTH * width * size
        set_integer(table, 0)
        set_integer(table + 8, a)
        set_integer(table + 16, panel)
        set_integer(table + 24, a + rows * DEPTH * size)
        for _ in range(p.repeats):
            tile(table)

    return run, types.void(types.CPointer(from_dtype(PLAN)), types.int64)


def measure_peak(dtype: object = np.float32, threads: int = 1) -> float:
    """Return the multiply-add throughput of this machine in GFLOP/s, now.

    Parameters
    ----------
    dtype : dtype, default float32
        float32 or float64.
    threads : int, default 1
        How many run at once.

    Returns
    -------
    float
        The best of several rounds of a few milliseconds each.
    """
    dtype, threads = float_dtype(dtype), as_size("threads", threads)
    rows, width = blocking(dtype).rows, GATES * blocking(dtype).units
    per_rank = LINE * (3 + (width * (DEPTH + rows) + rows * DEPTH) * dtype.itemsize // LINE)
    scratch = aligned(threads * per_rank, np.dtype(np.uint8))
    scratch[:] = 0
    address = entry(peak_kernel, dtype)
    flops, repeats, best = 2 * rows * width * DEPTH, 1000, 0.0
    for _ in range(8):
        plan = np.array([address, repeats, scratch.ctypes.data, per_rank], np.int64)
        begin = time.perf_counter()
        if threads == 1 or not run_region(plan, threads):
            bind(plan)()
            ran = 1
        else:
            ran = threads
        seconds = time.perf_counter() - begin
        best = max(best, ran * repeats * flops / seconds / 1e9)
        repeats = max(repeats, int(repeats * 4e-3 / seconds))
    return best
