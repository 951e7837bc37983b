"""How many threads a call may use, and when it may use more than one."""

from __future__ import annotations

import functools
import importlib
import math
import os
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from fastlstm.checks import as_size

__all__ = ["Pace", "get_num_threads", "set_num_threads"]

UNCOMPARED = 8  # regions; of a size that is asked for less often no run goes alone
LOSS = 20_000_000  # ns; a thread that was asleep or a stray interrupt costs some milliseconds on a quiet machine too
SHORTEST_REST, LONGEST_REST = 100_000_000, 2_000_000_000  # ns without parallel regions

_in_forked_child = False
_threads: int | None = None
region = threading.Lock()
"""Held while a parallel region runs; whoever does not get it at once computes on its own thread, to the same bits."""


def _after_fork() -> None:
    global _in_forked_child, region
    _in_forked_child = True
    region = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def load(module: str) -> ModuleType:
    """Import a module, with all that it brings, when a call first needs it."""
    return importlib.import_module(module)


def may_run_parallel() -> bool:
    """Return whether a parallel region can be entered: GNU OpenMP does not survive a fork."""
    return not _in_forked_child


def _available() -> int:
    """Return the number of CPUs this process may use: its affinity and its share of the container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, math.ceil(int(quota) / int(period))))
    return count


def _pool_size() -> int:
    """Return how many threads Numba can run, fixed when its pool starts."""
    return int(load("numba").config.NUMBA_NUM_THREADS)


def get_num_threads() -> int:
    """Return how many threads a call may use.

    Returns
    -------
    int
        What `set_num_threads` was given last; before that `FASTLSTM_NUM_THREADS`, or the CPUs this process may use.

    Examples
    --------
    >>> import fastlstm
    >>> fastlstm.get_num_threads() >= 1
    True
    """
    global _threads
    if _threads is None:
        wanted = os.environ.get("FASTLSTM_NUM_THREADS", "")
        fits = wanted.isascii() and wanted.isdigit() and len(wanted) < 10 and int(wanted) > 0
        if wanted and not fits:
            warnings.warn(f"FASTLSTM_NUM_THREADS must be from 1 to 999999999, got {wanted[:40]!r}", stacklevel=2)
        _threads = min(int(wanted) if fits else _available(), _pool_size())
    return _threads


def set_num_threads(n: int) -> None:
    """Set how many threads a call may use, for this library alone.

    Parameters
    ----------
    n : int
        At least 1. More than Numba's thread pool has (`NUMBA_NUM_THREADS`, by default the number of CPUs) are not used.
        Results do not depend on it.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is less than 1.

    Examples
    --------
    >>> import fastlstm
    >>> before = fastlstm.get_num_threads()
    >>> fastlstm.set_num_threads(1)
    >>> fastlstm.get_num_threads()
    1
    >>> fastlstm.set_num_threads(before)
    """
    global _threads
    _threads = min(as_size("n", n, most=sys.maxsize), _pool_size())


class Pace:
    """Whether parallel regions gain anything in runs of the same work, beside what they cost where CPUs are busy.

    A region ends with its last thread. Where other programs keep the CPUs busy, that one may get its turn after some
    milliseconds, when the caller could have done all the work in a fraction of one. So after UNCOMPARED short regions a
    run goes alone, to know how long that takes; and when regions have lost LOSS against it, runs go on alone for a
    while: for SHORTEST_REST, and twice as long as before if it is no better soon after. What they take then is what the
    next regions are measured by, so that a machine which has become slower is not mistaken for a busy one for long.
    """

    def __init__(self) -> None:
        self._alone = 0  # ns, at best, since the last rest began; 0: not known
        self._lost = 0  # ns, less what was gained since
        self._regions, self._compare = 0, False  # how many there were; whether the next run should go alone
        self._rest = self._rest_end = 0

    def allows_region(self, now: int) -> bool:
        """Return whether the run that begins now (in ns) may use a region."""
        return now >= self._rest_end and not self._compare

    def note_alone(self, took: int) -> None:
        """Take note of a run on the caller's thread, in ns."""
        self._compare, self._alone = False, min(took, self._alone or took)

    def note_region(self, took: int, now: int) -> None:
        """Take note of a region that ended now."""
        self._regions += 1
        self._compare = self._regions >= UNCOMPARED and not self._alone and took < SHORTEST_REST
        self._lost = max(0, self._lost + took - (self._alone or took))
        if self._lost > LOSS:
            again = now < self._rest_end + self._rest
            self._rest = min(2 * self._rest, LONGEST_REST) if again else SHORTEST_REST
            self._rest_end, self._lost, self._alone = now + self._rest, 0, 0
