"""Running a plan: on several threads, or on the caller's where they are not wanted or not to be had."""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numba
import numpy as np
from numba import carray, from_dtype, types
from numba.np.ufunc import parallel
from numpy.typing import NDArray

from fastlstm import threads
from fastlstm.kernels.call import address, bind
from fastlstm.kernels.compile import compiling, entry, parallel_region
from fastlstm.kernels.team import LINE, call_kernel, claim, integer_at, record, run_parallel
from fastlstm.memory import aligned

__all__ = ["Prepared", "Run", "run_one", "run_region", "run_together"]

Array = NDArray[Any]

_SIGNATURE = numba.void(numba.int64, numba.int64)
_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)
_REGION = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_void_p), ctypes.c_int64, ctypes.c_int64
)
_pool: ThreadPoolExecutor | None = None


@functools.cache
def _region() -> Callable[[int, int], int] | None:
    """Return what runs a plan in a parallel region and returns 0, None where Numba's threading layer is its workqueue.

    Numba chooses the layer here, if nothing has made it yet, and imports multiprocessing for that.
    """
    with compiling:
        parallel._launch_threads()
    if numba.threading_layer() == "workqueue":
        return None
    result, raised = ctypes.c_void_p(), ctypes.c_void_p()
    return functools.partial(_REGION(parallel_region(run_parallel, _SIGNATURE)), result, raised)


def run_region(plan: NDArray[np.int64], ranks: int) -> bool:
    """Run a plan once for each rank, in one parallel region; return False where none is to be had.

    GNU OpenMP does not survive a fork: there is none in a forked child. Whoever comes while a region runs does without.
    Numba's workqueue aborts the process when two threads enter regions at once, and the other may be the host's own:
    where that is the threading layer, the ranks run on threads of ours.
    """
    if not threads.may_run_parallel() or not threads.region.acquire(blocking=False):
        return False
    try:
        region = _region()
        if region is None:
            _run_on_own_threads(plan, ranks)
            return True
        return region(address(plan), ranks) == 0
    finally:
        threads.region.release()


class _Call:
    """A kernel on several Python threads, which it frees of the GIL; it ends with none of them inside.

    Whoever comes when it has ended finds the door closed: a thread that started late, or that the pool could not start.
    """

    def __init__(self, plan: NDArray[np.int64]) -> None:
        self._kernel, self._plan = _KERNEL(int(plan[0])), plan
        self._door = threading.Condition()
        self._inside, self._ended = 0, False

    def run_alone(self) -> None:
        """Do the work of rank 0 on the caller's thread, where an interrupt comes as the kernel returns."""
        self._kernel(self._plan.ctypes.data, 0)

    def run(self, rank: int) -> None:
        """Do the work of another rank on a thread of the pool, which gets no interrupts."""
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
        call.run_alone()
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
        self._counters, self.ranks, self.alike = counters, ranks, alike
        self._pace = threads.Pace() if alike else None
        self.sides: _Sides | None = None  # what has run it together with others
        self.run_serial, self._place = bind(self.plan), bind(self.plan, run=False)
        if ranks == 1:
            self.run = self.run_serial  # type: ignore[method-assign]

    def place(self, *arrays: Array | None) -> None:
        """Make ready for a run with these arrays that something else starts."""
        self._counters[:] = 0
        self._place(*arrays)

    def run(self, *arrays: Array | None) -> None:
        """Run the plan with the addresses of these arrays, 0 for None, in a parallel region or on this thread."""
        begun, pace = time.perf_counter_ns(), self._pace
        self._counters[:] = 0
        if pace is None or pace.allows_region(begun):
            self._place(*arrays)
            if run_region(self.plan, self.ranks):
                now = time.perf_counter_ns()
                if pace is not None:
                    pace.note_region(now - begun, now)
                return
        self.run_serial(*arrays)
        if pace is not None:
            pace.note_alone(time.perf_counter_ns() - begun)


# A plan to be run: a tuple, because others take longer to make.
Run = tuple[
    Prepared,
    Sequence[Array | None],  # its arrays
    int,  # threads, for it and those beside it: a multiple of its ranks
    object,  # what must live until then
    tuple[dict[Any, Any], object] | None,  # where the plan waits for the next call like this one, and under which key
]


# Plans that need nothing of each other, with as many ranks each.
SIDES = record("kernel", "plans", "ranks", "squads", "counters", "table")


def sides_kernel(_: None):
    """Describe what runs plans side by side: a function of the plan about them and the thread's rank.

    The threads come in squads, and each squad begins with plans of its own; a rank of a plan is run by whoever claims
    it first, so that nothing is left undone where a thread comes late.
    """
    plan_type = from_dtype(SIDES)

    def sides(plan, rank):
        p = carray(plan, 1)[0]
        places = p.plans * p.ranks
        begin = p.plans * (rank // p.ranks) // p.squads * p.ranks + rank % p.ranks
        for attempt in range(places):
            place = (begin + attempt) % places
            if claim(p.counters, place, 0):
                one = integer_at(p.table + place // p.ranks * 8)
                call_kernel(integer_at(one), one, place % p.ranks)

    return sides, types.void(types.CPointer(plan_type), types.int64)


class _Sides(Prepared):
    """Plans side by side on `count` threads: so many, of as many ranks each."""

    def __init__(self, plans: int, ranks: int, count: int, alike: bool) -> None:
        self.size = plans, ranks, count
        self.table = np.zeros(plans, np.int64)
        counters = aligned((2 + 2 * plans * ranks) * LINE, np.dtype(np.uint8))
        numbers = entry(sides_kernel), plans, ranks, count // ranks, address(counters), address(self.table)
        super().__init__(numbers, counters, count, alike)


def run_one(run: Run) -> None:
    """Run a plan."""
    prepared, arrays, _, _, home = run
    prepared.run(*arrays)
    if home is not None:
        idle, key = home
        idle[key] = prepared


def run_together(runs: Sequence[Run]) -> None:
    """Run plans that need nothing of each other: side by side, if they are alike in ranks and threads."""
    if len(runs) == 1:
        run_one(runs[0])
        return
    first, _, count, _, _ = runs[0]
    fit = all((prepared.ranks, threads_) == (first.ranks, count) for prepared, _, threads_, _, _ in runs)
    if count == 1 or not fit:
        for run in runs:
            run_one(run)
        return
    sides, size = first.sides, (len(runs), first.ranks, count)
    if sides is None or sides.size != size:
        sides = first.sides = _Sides(*size, all(prepared.alike for prepared, *_ in runs))
    for n, (prepared, arrays, *_) in enumerate(runs):
        prepared.place(*arrays)
        sides.table[n] = address(prepared.plan)
    sides.run()
    for prepared, _, _, _, home in runs:
        if home is not None:
            idle, key = home
            idle[key] = prepared
