"""Timings at the desk: `pytest tests/test_speed.py --benchmark-only`, off otherwise. No speed is asserted.

The sizes are those of asv and of the comparison with other libraries. What is timed has been checked before.
"""

import pytest

import fastlstm
from benchmarks import backward, forward, reference
from benchmarks.common import SEQUENCES, STREAMS, cases

pytestmark = pytest.mark.skipif(
    "not config.getoption('benchmark_only', False)", reason="timing is off; pytest tests/test_speed.py --benchmark-only"
)

LIBRARIES = ["fastlstm", "numpy"]


@pytest.fixture
def measure(benchmark, restore_threads):
    """Time a call in the group of its case, with as many threads as there are."""

    def run(what, name, call):
        (case,) = cases.select(names=[name])
        benchmark.group = f"{what} {name}: I,H,L,D,N,T = {case.shape}"
        benchmark.extra_info |= {"flops": case.flops(), "threads": fastlstm.get_num_threads()}
        benchmark(call)

    return run


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("case", SEQUENCES)
def test_forward(measure, case, library):
    ready = reference.Forward()
    ready.setup(case, "all")
    measure("forward", case, ready.call if library == "fastlstm" else ready.reference)


@pytest.mark.parametrize("case", STREAMS)
def test_step(measure, case):
    ready = forward.Stream()
    ready.setup(case)
    measure("step", case, ready.call)


@pytest.mark.parametrize("part", ["record", "backward"])
@pytest.mark.parametrize("case", SEQUENCES)
def test_training_part(measure, case, part):
    ready = backward.Backward()
    ready.setup(case, "all")
    measure("training, parts", case, getattr(ready, part))


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("case", SEQUENCES)
def test_training(measure, case, library):
    ready = reference.Training()
    ready.setup(case, "all")
    measure("training", case, ready.call if library == "fastlstm" else ready.reference)
