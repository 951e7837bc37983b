"""The start: import, and the first call with and without compiled kernels on disk, each in a fresh process."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

IMPORT = """
from time import perf_counter
start = perf_counter()
import fastlstm
print(perf_counter() - start)
"""

FIRST_CALL = """
from time import perf_counter
import numpy, fastlstm
start = perf_counter()
fastlstm.LSTM(64, 64, rng=0)(numpy.zeros((10, 1, 64), numpy.float32))
print(perf_counter() - start)
"""


def run(code, cache):
    """Return the seconds that a fresh process prints; `cache` is the folder of its compiled kernels."""
    environment = os.environ | {"FASTLSTM_CACHE": cache}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


class Start:
    """Seconds of the median process."""

    version = "1"
    unit = "seconds"

    def track_import(self):
        return statistics.median(run(IMPORT, "0") for _ in range(5))


class FirstCall:
    """Seconds of the first layer and its first call, after the import."""

    version = "1"
    unit = "seconds"
    params = [["cold", "warm"]]
    param_names = ["cache"]

    def track_first_call(self, cache):
        with tempfile.TemporaryDirectory() as folder:
            cold = run(FIRST_CALL, folder)
            return cold if cache == "cold" else statistics.median(run(FIRST_CALL, folder) for _ in range(5))
