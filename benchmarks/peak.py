"""Share of the machine's own peak of multiply-adds in registers and L1, measured in turns within one process."""

from __future__ import annotations

import statistics
import timeit
from importlib import import_module

from fastlstm import get_num_threads

from .common import SEQUENCES, THREADS, Benchmark, check, make_lstm, make_problem, repetitions


class Share(Benchmark):
    """What of the peak a call reaches; its matrix products count, sigmoid and tanh do not."""

    params = [SEQUENCES, THREADS]
    param_names = ["case", "threads"]
    unit = "%"

    def prepare(self, case, threads):
        measure_peak = getattr(import_module("fastlstm.kernels"), "measure_peak", None)
        if measure_peak is None:
            raise NotImplementedError("this commit cannot measure the peak")
        self.problem = make_problem(case)
        lstm = make_lstm(self.problem, threads)
        out, _ = lstm(self.problem.x)
        check(self.problem, out)
        self.call = lambda: lstm(self.problem.x, out=out)
        self.peak = lambda: measure_peak("float32", 1 if threads == "1" else get_num_threads())

    def track_share(self, case, threads):
        number = repetitions(self.call)
        turns = [(timeit.timeit(self.call, number=number) / number, self.peak()) for _ in range(7)]
        return 100 * statistics.median(self.problem.flops / 1e9 / seconds / peak for seconds, peak in turns)
