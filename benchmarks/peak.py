"""Share of the machine's own peak of multiply-adds in registers and L1, measured in turns within one process."""

from __future__ import annotations

import statistics
import timeit

from .common import find_peak, repetitions
from .forward import Called


class Share(Called):
    """What of the peak a call reaches; its matrix products count, sigmoid and tanh do not."""

    unit = "%"

    def prepare(self, case, threads):
        self.peak = find_peak(threads)
        super().prepare(case, threads)

    def track_share(self, case, threads):
        number = repetitions(self.call)
        turns = [(timeit.timeit(self.call, number=number) / number, self.peak()) for _ in range(7)]
        return 100 * statistics.median(self.problem.flops / 1e9 / seconds / peak for seconds, peak in turns)
