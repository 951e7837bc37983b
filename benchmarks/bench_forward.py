"""The forward pass over the standard sizes, with as many threads as there are."""

from fastlstm import from_torch
from fastlstm.bench.cases import CASES, make_problem, select


class Forward:
    """The layer over a whole batch."""

    params = [case.name for case in CASES if not case.streamed]
    param_names = ["case"]

    def setup(self, name):
        (case,) = select(names=[name])
        problem = make_problem(case)
        self.lstm, self.x = from_torch(problem.weights), problem.x
        self.out, _ = self.lstm(self.x)  # compiles

    def time_forward(self, name):
        self.lstm(self.x, out=self.out)


class Stream:
    """One step of a stream."""

    params = [case.name for case in CASES if case.streamed]
    param_names = ["case"]

    def setup(self, name):
        (case,) = select(names=[name])
        problem = make_problem(case)
        self.stream, self.x = from_torch(problem.weights).stream(case.N), problem.x[0]
        self.stream(self.x)  # compiles

    def time_stream_step(self, name):
        self.stream(self.x)
