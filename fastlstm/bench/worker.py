"""The process in which one library lives during a comparison.

`compare` starts it, writes one pickled request at a time to its standard input and reads the pickled reply from its
standard output; whatever a library prints goes to standard error. It ends when its standard input does, and on Linux
when its parent dies, even while it is stopped.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import traceback
from importlib import import_module
from typing import Any, NamedTuple

from .cases import Array, Problem
from .engines import Engine, Outputs, Timing, find_engine

__all__ = ["Reply", "main"]

PR_SET_PDEATHSIG = 1


class Reply(NamedTuple):
    """The result of a request, or why there is none."""

    value: Any
    reason: str | None = None


class _Session:
    """What can be asked: every public method is a request."""

    def __init__(self, engine: str) -> None:
        self._class = find_engine(engine)
        self._engine: Engine | None = None

    def version(self) -> str:
        """Import the library and return its version."""
        return self._class.version()

    def set_up(self, problem: Problem, threads: int) -> list[str]:
        """Make the engine ready for a problem and return the names of its forms."""
        self._engine = None
        self._engine = self._class(problem, threads)
        return list(self._engine.forms)

    def run(self, form: str, x: Array) -> Outputs:
        """Run an input and return the outputs."""
        assert self._engine is not None
        return self._engine.run(form, x)

    def time(self, form: str, seconds: float) -> Timing:
        """Time the call of a form."""
        assert self._engine is not None
        return self._engine.time(form, seconds)

    def peak(self, dtype: str, threads: int) -> float | None:
        """Return the GFLOP/s of multiply-adds in registers and L1, None where this cannot be measured."""
        measure = getattr(import_module("fastlstm.kernels"), "measure_peak", None)
        return None if measure is None else float(measure(dtype, threads))


def main() -> None:
    """Answer requests until there are no more; arguments are the engine and the process id of the parent."""
    engine, parent = sys.argv[1], int(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    _die_with_parent(parent)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    session = _Session(engine)
    while True:
        try:
            name, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            reply = Reply(getattr(session, name)(*arguments))
        except Exception as error:
            traceback.print_exc()
            reply = Reply(None, f"{type(error).__name__}: {error}")
        pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("the parent ended first")
