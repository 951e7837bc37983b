"""How many threads a call may use, and when it may use more than one."""

from __future__ import annotations

import math
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path

from fastlstm.checks import as_size

__all__ = ["get_num_threads", "set_num_threads"]

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
    import numba

    return int(numba.config.NUMBA_NUM_THREADS)


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
        count = int(wanted) if wanted.isascii() and wanted.isdigit() and int(wanted) > 0 else _available()
        _threads = min(count, _pool_size())
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
