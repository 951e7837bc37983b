"""Memory: what a call allocates beside its results, and the most that a process holds."""

from __future__ import annotations

import tracemalloc

import numpy as np

import fastlstm

from .common import SEQUENCES, Benchmark, make_lstm, make_problem


class Call(Benchmark):
    """Bytes that a call allocates at the most, through NumPy and Python, beside what it returns."""

    params = [SEQUENCES]
    param_names = ["case"]
    unit = "bytes"

    def prepare(self, case):
        self.problem = make_problem(case)
        self.lstm = make_lstm(self.problem)
        self.lstm(self.problem.x)

    def track_beside_results(self, case):
        tracemalloc.start()
        try:
            output, state = self.lstm(self.problem.x)
            _, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        return most - sum(array.nbytes for array in (output, *state))


class Process:
    """The most memory a process holds: with a call, and without one as a control."""

    version = "1"
    params = [["vad", "b256", "b1024", "wide"]]
    param_names = ["case"]

    def setup_cache(self):
        fastlstm.LSTM(64, 64)(np.zeros((8, 64, 64), np.float32))  # compiling would be the most, so it is done before

    def setup(self, case):
        self.problem = make_problem(case)
        self.lstm = make_lstm(self.problem)

    def peakmem_call(self, case):
        self.lstm(self.problem.x)

    def peakmem_empty(self, case):
        pass
