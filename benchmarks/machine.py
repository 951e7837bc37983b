"""What the suite ran on, recorded beside its results: a number of its own, or 1 for yes and 0 for no."""

from __future__ import annotations

import numpy as np
from llvmlite import binding

import fastlstm
from fastlstm import config
from fastlstm.bench.compare import RECORDED_FEATURES

from .common import THREADS, find_peak

LAYERS = ["tbb", "omp", "workqueue"]


class Machine:
    """The sizes that the kernels choose by, and the peak."""

    version = "1"

    def track_threads(self):
        return fastlstm.get_num_threads()

    def track_lanes(self):
        return config.describe()["lanes"]["float32"]

    track_lanes.unit = "float32"


class Peak:
    """Multiply-adds in registers and L1."""

    version = "1"
    params = [THREADS]
    param_names = ["threads"]
    unit = "GFLOP/s"

    def setup(self, threads):
        self.peak = find_peak(threads)

    def track_peak(self, threads):
        return self.peak()


class Feature:
    """Whether the CPU has a feature."""

    version = "1"
    params = [list(RECORDED_FEATURES)]
    param_names = ["feature"]

    def track_feature(self, feature):
        return int(binding.get_host_cpu_features().get(feature, False))


class ThreadingLayer:
    """Which of numba's threading layers runs the threads."""

    version = "1"
    params = [LAYERS]
    param_names = ["layer"]

    def setup(self, layer):
        fastlstm.LSTM(256, 256, rng=0)(np.zeros((8, 64, 256), np.float32))  # large enough for more than one thread

    def track_threading_layer(self, layer):
        return int(config.describe()["threading_layer"] == layer)
