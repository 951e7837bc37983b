"""The forward pass: a call on a whole batch, and one step of a stream."""

from __future__ import annotations

from functools import partial

from .common import SEQUENCES, STREAMS, THREADS, Benchmark, check, make_lstm, make_problem, repetitions


class Called(Benchmark):
    """A call on a whole batch, into a given output."""

    params = [SEQUENCES, THREADS]
    param_names = ["case", "threads"]

    def prepare(self, case, threads):
        self.problem = problem = make_problem(case)
        lstm = make_lstm(problem, threads)
        out, _ = lstm(problem.x)
        check(problem, out)
        self.call = partial(lstm, problem.x, out=out)


class Forward(Called):
    """That call."""

    def prepare(self, case, threads):
        super().prepare(case, threads)
        self.number = repetitions(self.call)

    def time_forward(self, case, threads):
        self.call()


class Stream(Benchmark):
    """One step, the state carried from call to call."""

    params = [STREAMS]
    param_names = ["case"]

    def prepare(self, case):
        problem = make_problem(case)
        stream = make_lstm(problem).stream(problem.case.N)
        check(problem, stream(problem.x))
        self.call = partial(stream, problem.x[0])
        self.number = repetitions(self.call)

    def time_step(self, case):
        self.call()
