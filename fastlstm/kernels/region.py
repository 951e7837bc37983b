"""Running a kernel on the thread team, or on the caller's thread where a parallel region is not to be had."""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.compile import parallel_region
from fastlstm.kernels.team import run_parallel

__all__ = ["run_region"]


def run_region(plan: NDArray[np.int64], ranks: int) -> bool:
    """Run a plan once for each rank, in a parallel region; return False where none is to be had.

    Numba's workqueue aborts the process when two threads enter regions at once, and GNU OpenMP does not survive a fork:
    one region at a time, and none in a forked child.
    """
    if not threads.may_run_parallel() or not threads.region.acquire(blocking=False):
        return False
    try:
        parallel_region(run_parallel, numba.void(numba.int64, numba.int64))(plan.ctypes.data, ranks)
    finally:
        threads.region.release()
    return True
