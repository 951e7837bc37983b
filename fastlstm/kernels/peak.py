"""The machine's own peak: the register tile on data in L1, on every thread at once."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numba import carray, from_dtype, types

from fastlstm.checks import as_size, float_dtype
from fastlstm.kernels.call import bind
from fastlstm.kernels.compile import entry
from fastlstm.kernels.panels import aligned
from fastlstm.kernels.product import block_tables, record
from fastlstm.kernels.region import run_region
from fastlstm.kernels.team import LINE, OBJECTS, call_tile, set_integer
from fastlstm.kernels.tile import GATES, blocking, project_kernel

__all__ = ["measure_peak"]

DEPTH = 64  # a panel of 64 lines and its rows: at most 18 KB
PLAN = record("kernel", "project", "repeats", "scratch", "scratch_rank")


def peak_kernel(dtype: np.dtype[Any]):
    """Describe a kernel that runs the widest tile `repeats` times in each thread's own scratch."""
    size, rows, width = dtype.itemsize, blocking(dtype).rows, GATES * blocking(dtype).units
    shape = int(block_tables(dtype)[0][0, rows, 1, 0])

    def run(plan, rank, x, out_object, h_n, c_n):
        p = carray(plan, 1)[0]
        table = p.scratch + rank * p.scratch_rank
        start = table + rows * 8
        a = start + width * size
        panel = a + rows * DEPTH * size
        out = panel + DEPTH * width * size
        for row in range(rows):
            set_integer(table + row * 8, row * DEPTH)
        for _ in range(p.repeats):
            call_tile(p.project, (shape, 1, start, a, table, DEPTH, panel, panel, out, width))

    return run, types.void(types.CPointer(from_dtype(PLAN)), *[types.int64] * (1 + OBJECTS))


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
    per_rank = LINE * (2 + (rows * 8 + (width * (1 + DEPTH + rows) + rows * DEPTH) * dtype.itemsize) // LINE)
    scratch = aligned(threads * per_rank, np.dtype(np.uint8))
    scratch[:] = 0
    kernel, project = entry(peak_kernel, dtype), entry(project_kernel, dtype)
    flops, repeats, best = 2 * rows * width * DEPTH, 1000, 0.0
    for _ in range(8):
        plan = np.array([kernel, project, repeats, scratch.ctypes.data, per_rank], np.int64)
        begin = time.perf_counter()
        if threads == 1 or not run_region(plan, threads):
            bind(plan)(plan, plan)
            ran = 1
        else:
            ran = threads
        seconds = time.perf_counter() - begin
        best = max(best, ran * repeats * flops / seconds / 1e9)
        repeats = max(repeats, int(repeats * 4e-3 / seconds))
    return best
