"""Training: a call that is recorded, and the gradients of all inputs and parameters."""

from __future__ import annotations

from functools import partial

import numpy as np

import fastlstm
from fastlstm import reference

from .common import SEQUENCES, THREADS, TOLERANCE, Benchmark, exact, make_lstm, make_problem, repetitions


class Recorded(Benchmark):
    """A recorded call from an initial state, and random gradients of all its results."""

    params = [SEQUENCES, THREADS]
    param_names = ["case", "threads"]

    def prepare(self, case, threads):
        if not hasattr(fastlstm.LSTM, "record"):
            raise NotImplementedError("this commit has no gradients but the reference's")
        self.problem = problem = make_problem(case, mode="train")
        self.lstm = make_lstm(problem, threads)
        self.record = partial(self.lstm.record, problem.x, problem.state)
        self.d_output, *self.d_state = problem.cotangents
        self.tape = self.record()
        self.check(self.tape.backward(self.d_output, self.d_state))

    def check(self, gradients):
        """Raise an AssertionError unless the first and the last row of d_x are those of the reference."""
        ends = [0, -1]
        saved = exact(self.problem, ends).saved
        want = reference.backward(saved, self.d_output[:, ends], [part[:, ends] for part in self.d_state]).x
        error = np.abs(gradients.x[:, ends] - want).max() / max(1, np.abs(want).max())
        assert error <= TOLERANCE, f"wrong: the gradient differs from the reference's by {error:.1e}"


class Record(Recorded):
    """The call that is recorded."""

    def prepare(self, case, threads):
        super().prepare(case, threads)
        self.number = repetitions(self.record)

    def time_record(self, case, threads):
        self.record()


class Backward(Recorded):
    """The gradients of a recorded call."""

    def prepare(self, case, threads):
        super().prepare(case, threads)
        self.backward = partial(self.tape.backward, self.d_output, self.d_state)
        self.number = repetitions(self.backward)

    def time_backward(self, case, threads):
        self.backward()
