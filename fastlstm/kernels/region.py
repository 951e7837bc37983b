"""Running a plan: on several threads, or on the caller's where they are not wanted or not to be had."""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numba
import numpy as np
from numba.np.ufunc import parallel
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.call import FIRST, address, bind
from fastlstm.kernels.compile import compiling, parallel_region
from fastlstm.kernels.team import run_parallel

__all__ = ["Prepared", "run_region"]

Array = NDArray[Any]

_SIGNATURE = numba.void(numba.int64, numba.int64)
_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
_pool: ThreadPoolExecutor | None = None


@functools.cache
def _launch() -> None:
    """Have Numba choose the threading layer, if nothing has yet; it imports multiprocessing for that."""
    with compiling:
        parallel._launch_threads()


def run_region(plan: NDArray[np.int64], ranks: int) -> bool:
    """Run a plan once for each rank, in one parallel region; return False where none is to be had.

    GNU OpenMP does not survive a fork: there is none in a forked child. Whoever comes while a region runs does without.
    Numba's workqueue aborts the process when two threads enter regions at once, and the other may be the host's own:
    where that is the threading layer, the ranks run on threads of ours.
    """
    if not threads.may_run_parallel() or not threads.region.acquire(blocking=False):
        return False
    try:
        _launch()
        if numba.threading_layer() == "workqueue":
            _run_on_own_threads(plan, ranks)
        else:
            parallel_region(run_parallel, _SIGNATURE)(plan.ctypes.data, ranks)
    finally:
        threads.region.release()
    return True


class _Call:
    """A kernel on several Python threads, which it frees of the GIL; it ends with none of them inside.

    Whoever comes when it has ended finds the door closed: a thread that started late, or that the pool could not start.
    """

    def __init__(self, plan: NDArray[np.int64]) -> None:
        self._kernel, self._plan = _KERNEL(int(plan[0])), plan
        self._door = threading.Condition()
        self._inside, self._ended = 0, False

    def run(self, rank: int) -> None:
        """Do the work of a rank."""
        with self._door:
            if self._ended:
                return
            self._inside += 1
        self._kernel(self._plan.ctypes.data, rank)
        with self._door:
            self._inside -= 1
            self._door.notify_all()

    def end(self) -> None:
        """Wait for those who are inside; for all, even if this thread is interrupted meanwhile."""
        interrupt = None
        while self._inside or not self._ended:
            try:
                with self._door:
                    self._ended = True
                    while self._inside:
                        self._door.wait()
            except KeyboardInterrupt as raised:
                interrupt = raised
        if interrupt:
            raise interrupt


def _run_on_own_threads(plan: NDArray[np.int64], ranks: int) -> None:
    """Run the ranks on Python threads; the caller is rank 0."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max(1, numba.config.NUMBA_NUM_THREADS - 1), "fastlstm")
    call = _Call(plan)
    try:
        with suppress(RuntimeError):  # no new thread at the interpreter's exit: the caller does all shares
            for rank in range(1, ranks):
                _pool.submit(call.run, rank)
        call.run(0)
    finally:
        call.end()


class Prepared:
    """A plan that is run again and again with other arrays, by one caller at a time.

    Parameters
    ----------
    numbers : iterable of int
        The fields of the plan, the addresses of the arrays first (behind the kernel's).
    counters : ndarray of uint8
        The team's, which start at zero.
    ranks : int
        Threads.
    alike : bool, default True
        Whether each run does the same work, so that their times can be compared.
    """

    def __init__(self, numbers: Iterable[int], counters: Array, ranks: int, alike: bool = True) -> None:
        self.plan = np.array(list(numbers), np.int64)
        self._counters, self._ranks = counters, ranks
        self._pace = threads.Pace() if alike else None
        self.run_serial = bind(self.plan)
        self.run: Callable[..., Any] = self.run_serial if ranks == 1 else self._run
        """Run the plan with the addresses of these arrays, 0 for None, in a parallel region or on this thread."""

    def _run(self, *arrays: Array | None) -> None:
        begun, pace = time.perf_counter_ns(), self._pace
        self._counters[:] = 0
        if pace is None or pace.allows_region(begun):
            self.plan[FIRST : FIRST + len(arrays)] = [address(array) for array in arrays]
            if run_region(self.plan, self._ranks):
                now = time.perf_counter_ns()
                if pace is not None:
                    pace.note_region(now - begun, now)
                return
        self.run_serial(*arrays)
        if pace is not None:
            pace.note_alone(time.perf_counter_ns() - begun)
