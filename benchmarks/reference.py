"""Beside the NumPy reference: how many times as fast, in turns within one process, and how far from it in float64."""

from __future__ import annotations

from functools import partial

import numpy as np

from fastlstm import reference

from .backward import Recorded
from .common import SEQUENCES, Benchmark, exact, make_lstm, make_problem, ratio
from .forward import Called


class _Speedup:
    """The same ratio both ways: more is better in `speedup`, less in `relative_time`, and asv compares the latter."""

    def measure(self, threads):
        from threadpoolctl import threadpool_limits  # in asv's environment; whoever just imports this has it or not

        with threadpool_limits(1 if threads == "1" else None, user_api="blas"):
            return ratio(self.reference, self.call)

    def track_speedup(self, case, threads):
        return self.measure(threads)

    def track_relative_time(self, case, threads):
        return 1 / self.measure(threads)

    track_speedup.unit = track_relative_time.unit = "x"


class Forward(_Speedup, Called):
    """A call on a whole batch."""

    def prepare(self, case, threads):
        super().prepare(case, threads)
        self.reference = partial(reference.forward, self.problem.weights, self.problem.x)


class Training(_Speedup, Recorded):
    """A recorded call and its gradients."""

    def prepare(self, case, threads):
        super().prepare(case, threads)
        weights, x, state = self.problem.weights, self.problem.x, self.problem.state
        gradients = self.d_output, self.d_state
        self.call = lambda: self.record().backward(*gradients)
        self.reference = lambda: reference.backward(reference.forward(weights, x, state).saved, *gradients)


class Error(Benchmark):
    """The largest difference from the reference in float64, in units of the spacing of float32 numbers at 1."""

    params = [SEQUENCES]
    param_names = ["case"]
    unit = "eps"

    def prepare(self, case):
        problem = make_problem(case)
        self.output, _ = make_lstm(problem)(problem.x)
        self.want = exact(problem).output

    def track_largest(self, case):
        return float(np.abs(self.output - self.want).max() / np.finfo(np.float32).eps)
