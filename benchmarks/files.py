"""A model's file: loading and saving, from and to the page cache."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import fastlstm

from .common import Benchmark, make_lstm, make_problem, repetitions


class Files(Benchmark):
    """A .safetensors file of the weights of a case: 33 KB and 34 MB."""

    params = [["short", "b1024"]]
    param_names = ["case"]

    def prepare(self, case):
        self.folder = tempfile.TemporaryDirectory()  # removed with the benchmark
        self.path = Path(self.folder.name) / "model.safetensors"
        self.lstm = make_lstm(make_problem(case))
        self.time_save(case)
        loaded, saved = fastlstm.load(self.path).state_dict(), self.lstm.state_dict()
        assert all(np.array_equal(loaded[name], saved[name]) for name in saved)
        self.number = repetitions(lambda: self.time_load(case))

    def time_save(self, case):
        fastlstm.save(self.lstm, self.path)

    def time_load(self, case):
        fastlstm.load(self.path)
