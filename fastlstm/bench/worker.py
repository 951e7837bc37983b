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
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple

from . import engines, training
from .answers import Results
from .cases import Array, Mode, Problem, make_problem
from .engines import Engine, Timing

__all__ = ["ENGINES", "Memory", "Reply", "find_engine", "main"]

PR_SET_PDEATHSIG = 1

ENGINES: dict[Mode, dict[str, type[Engine]]] = {"infer": engines.ENGINES, "train": training.ENGINES}


def find_engine(name: str, mode: Mode) -> type[Engine]:
    """Return an engine by its name, or by ``module:Class`` where it is one's own.

    Raises
    ------
    ValueError
        If there is none of that name.
    """
    known = ENGINES[mode]
    if name in known:
        return known[name]
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ValueError(f"there is no engine {name!r}; there are {', '.join(known)}, and your own as module:Class")
    engine: type[Engine] = getattr(import_module(module), attribute)
    return engine


class Memory(NamedTuple):
    """Bytes of memory."""

    peak: int
    """The most that the process ever held: interpreter, libraries, weights, input and all."""
    calls: int
    """How far the calls took it above what it held before: what they save, their scratch and their results."""


class Reply(NamedTuple):
    """The result of a request, or why there is none."""

    value: Any
    reason: str | None = None


class _Session:
    """What can be asked: every public method is a request."""

    def __init__(self, engine: str, mode: Mode) -> None:
        self._class = find_engine(engine, mode)
        self._engine: Engine | None = None

    def version(self) -> str:
        """Import the library and return its version."""
        return self._class.version()

    def set_up(self, problem: Problem, threads: int) -> list[str]:
        """Make the engine ready for a problem and return the names of its forms."""
        self._engine = None
        self._engine = self._class(problem, threads)
        return list(self._engine.forms)

    def run(self, form: str, x: Array) -> Results:
        """Run an input and return what the call left."""
        assert self._engine is not None
        return self._engine.run(form, x)

    def time(self, form: str, seconds: float) -> Timing:
        """Time the call of a form."""
        assert self._engine is not None
        return self._engine.time(form, seconds)

    def memory(self, problem: Problem, threads: int, form: str) -> Memory | None:
        """Return what calls of a form need in this process, which must be fresh; None where this cannot be measured."""
        if sys.platform != "linux":
            return None
        small = make_problem(replace(problem.case, N=1, T=min(problem.case.T, 2)), problem.dtype, mode=problem.mode)
        peak = 0
        for stage in (small, problem):  # the first has the kernels loaded
            self.set_up(stage, threads)
            before, peak = _resident("VmRSS"), max(peak, _resident("VmHWM"))
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # VmHWM starts again from VmRSS
            self.time(form, 0)
        return Memory(max(peak, _resident("VmHWM")), _resident("VmHWM") - before)

    def peak(self, dtype: str, threads: int) -> float | None:
        """Return the GFLOP/s of multiply-adds in registers and L1, None where this cannot be measured."""
        measure = getattr(import_module("fastlstm.kernels"), "measure_peak", None)
        return None if measure is None else float(measure(dtype, threads))


def _resident(field: str) -> int:
    """Return a size in bytes from the status of this process."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))


def main() -> None:
    """Answer requests until there are no more; arguments are the engine, the mode and the parent's process id."""
    engine, mode, parent = sys.argv[1], sys.argv[2], int(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    _die_with_parent(parent)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    session = _Session(engine, "train" if mode == "train" else "infer")
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
