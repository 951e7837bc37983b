"""What the benchmarks share: the table of sizes, and calls that are made ready and checked before they are timed."""

from __future__ import annotations

import os
import statistics
import sys
import timeit
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np

import fastlstm
from fastlstm import reference


def _load_cases() -> Any:
    """Load the table of this checkout: asv runs the same sizes at every commit, whatever that commit's table says."""
    path = Path(__file__).parents[1] / "fastlstm" / "bench" / "cases.py"
    spec = spec_from_file_location("fastlstm_cases", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


cases = _load_cases()

SEQUENCES = [case.name for case in cases.CASES if not case.streamed]
STREAMS = [case.name for case in cases.CASES if case.streamed]
THREADS = ["1", "all"]

TOLERANCE = 1e-4  # as in the comparison with other libraries: far above rounding, far below a wrong result
SAMPLE_S = 0.01  # of a timing: as asv's own


class Benchmark:
    """A benchmark that gets ready once for each set of parameters, though asv calls `setup` before every timed call."""

    version = "1"
    ready: tuple[Any, ...] | None = None

    def setup(self, *params):
        if self.ready != params:
            self.prepare(*params)
            self.ready = params


def make_problem(name: str, mode: str = "infer") -> Any:
    """Return the problem of a case: its weights and its input; for "train" a state and gradients of the results too."""
    (case,) = cases.select(names=[name])
    return cases.make_problem(case, mode=mode)


def make_lstm(problem: Any, threads: str = "all") -> fastlstm.LSTM:
    """Return the layer of a problem, after setting the number of threads to 1 or to as many as there are."""
    fastlstm.set_num_threads(1 if threads == "1" else os.cpu_count() or 1)
    case = problem.case
    lstm = fastlstm.LSTM(case.I, case.H, case.L, bidirectional=case.D == 2)
    lstm.load_state_dict(problem.weights)
    return lstm


def find_peak(threads: str) -> Callable[[], float]:
    """Return what measures the peak in GFLOP/s, on one thread or on as many as the layers use."""
    measure = getattr(import_module("fastlstm.kernels"), "measure_peak", None)
    if measure is None:
        raise NotImplementedError("this commit cannot measure the peak")
    return lambda: measure("float32", 1 if threads == "1" else fastlstm.get_num_threads())


def exact(problem: Any, rows: Any = slice(None)) -> Any:
    """Run the reference in float64, on all rows or some."""
    weights = {name: value.astype(np.float64) for name, value in problem.weights.items()}
    state = problem.state and [part[:, rows].astype(np.float64) for part in problem.state]
    return reference.forward(weights, problem.x[:, rows].astype(np.float64), state)


def check(problem: Any, output: Any) -> None:
    """Raise an AssertionError unless the first and the last row of an output are those of the reference."""
    ends = [0, -1]
    error = np.abs(output[:, ends] - exact(problem, ends).output).max()
    assert error <= TOLERANCE, f"wrong: the output differs from the reference by {error:.1e}"


def repetitions(call: Callable[[], object]) -> int:
    """Return how many calls make a sample: one that takes `SAMPLE_S`, or a single call."""
    once = timeit.timeit(call, number=1)
    return 1 if once > SAMPLE_S else max(1, round(SAMPLE_S / min(timeit.repeat(call, number=1, repeat=5))))


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int = 7) -> float:
    """Return how many times as long as `fast` the call `slow` takes: the median over turns.

    A neighbour that slows the machine for a while slows both.
    """
    timers = [(timeit.Timer(call), repetitions(call)) for call in (slow, fast)]
    turns = [[timer.timeit(number) / number for timer, number in timers] for _ in range(rounds)]
    return statistics.median(above / below for above, below in turns)
