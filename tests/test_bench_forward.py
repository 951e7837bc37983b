"""The asv suite: every case is timed once, and what is timed runs on the smallest."""

from benchmarks import bench_forward
from fastlstm.bench.cases import CASES


def test_every_case_is_timed_once():
    timed = [*bench_forward.Forward.params, *bench_forward.Stream.params]
    assert sorted(timed) == sorted(case.name for case in CASES)


def test_forward_runs():
    suite = bench_forward.Forward()
    suite.setup("short")
    suite.out[:] = 7
    suite.time_forward("short")
    assert abs(suite.out).max() < 1


def test_stream_runs():
    suite = bench_forward.Stream()
    suite.setup("step32")
    before = suite.stream.state[1]
    suite.time_stream_step("step32")
    assert (suite.stream.state[1] != before).any()
