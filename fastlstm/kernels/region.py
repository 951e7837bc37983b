"""Running a plan on several threads, or telling the caller that they are not to be had."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numba
import numpy as np
from numba.np.ufunc import parallel
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.compile import parallel_region
from fastlstm.kernels.team import OBJECTS, run_parallel

__all__ = ["run_region"]

_SIGNATURE = numba.void(numba.int64, numba.int64)
_KERNEL = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * (2 + OBJECTS))
_pool: ThreadPoolExecutor | None = None


def run_region(plan: NDArray[np.int64], ranks: int) -> bool:
    """Run a plan once for each rank, in one parallel region; return False where none is to be had.

    GNU OpenMP does not survive a fork: there is none in a forked child. Whoever comes while a region runs does without.
    Numba's workqueue aborts the process when two threads enter regions at once, and the other may be the host's own:
    where that is the threading layer, the ranks run on threads of ours.
    """
    if not threads.may_run_parallel() or not threads.region.acquire(blocking=False):
        return False
    try:
        parallel._launch_threads()  # chooses the threading layer, if nothing has yet
        if numba.threading_layer() == "workqueue":
            _run_on_own_threads(plan, ranks)
        else:
            parallel_region(run_parallel, _SIGNATURE)(plan.ctypes.data, ranks)
    finally:
        threads.region.release()
    return True


def _run_on_own_threads(plan: NDArray[np.int64], ranks: int) -> None:
    """Run the ranks on Python threads, which the kernel frees of the GIL; the caller is rank 0."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, numba.config.NUMBA_NUM_THREADS - 1), "fastlstm")
    kernel, address = _KERNEL(int(plan[0])), plan.ctypes.data
    others = []
    with suppress(RuntimeError):  # no new thread at the interpreter's exit: the caller does all shares
        others = [_pool.submit(kernel, address, rank, *[0] * OBJECTS) for rank in range(1, ranks)]
    kernel(address, 0, *[0] * OBJECTS)
    for other in others:
        other.result()
