"""The asv suite and pytest-benchmark: what they measure is right and complete. No speed is asserted."""

import itertools
import json
import math
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import environment
from needs import need

import fastlstm
from benchmarks import backward, common, forward, instructions, memory, peak, reference
from fastlstm.bench.cases import CASES

ROOT = Path(__file__).parents[1]

# Instructions for each multiply-add of a vector that a case cannot do without, of code for AVX2: at most these. They
# are 15% above what was counted with Python 3.11 and numba 0.68.1. A step of 32 units is mostly Python.
MOST_INSTRUCTIONS = {
    "step32": 16.5,
    "short": 7.4,
    "audio40": 5.6,
    "vad": 2.85,
    "vowels": 3.85,
    "deepar": 3.9,
    "ocr": 3.55,
    "rl": 3.25,
    "b256": 2.65,
    "short, training": 7.7,
    "vowels, training": 3.7,
    "rl, training": 3.95,
}


def discover():
    """Return every benchmark of the suite with the smallest of its parameters."""
    if find_spec("asv_runner") is None:
        return []
    from asv_runner.discovery import disc_benchmarks

    return [benchmark for benchmark in disc_benchmarks(str(ROOT / "benchmarks")) if benchmark.setup_cache_key is None]


SUITE = discover()
SMALL = {"case": {"short", "step32"}, "threads": {"1"}, "cache": {"warm"}}


@pytest.fixture(autouse=True)
def threads(restore_threads):
    """Leave the number of threads as it was."""


def test_suite_is_there():
    need("asv", SUITE, "pip install 'fastlstm[bench]'")
    kinds = {benchmark.name.rpartition(".")[2].partition("_")[0] for benchmark in SUITE}
    assert kinds == {"time", "track"}


@pytest.mark.parametrize("one", SUITE, ids=lambda one: one.name)
def test_benchmark_gives_a_number(one):
    axes = zip(one.param_names, one._params, strict=True)
    choices = [[value for value in values if value in SMALL.get(name, values)][:1] for name, values in axes]
    assert all(choices)
    combinations = list(itertools.product(*one._params))
    if combinations != [()]:
        one.set_param_idx(combinations.index(tuple(choice[0] for choice in choices)))
    one.set_cache(None)
    one._attr_sources.insert(0, type("Quick", (), {"number": 1, "repeat": 1, "rounds": 1, "warmup_time": 0}))
    assert not one.do_setup()
    result = one.do_run()
    (number,) = result["samples"] if isinstance(result, dict) else [result]
    assert math.isfinite(number)
    assert number >= 0
    assert one.version == "1"


def test_every_case_is_timed_once():
    assert sorted(common.SEQUENCES + common.STREAMS) == sorted(case.name for case in CASES)
    for timed in (forward.Forward, backward.Backward, backward.Record, reference.Forward, peak.Share):
        assert timed.params == [common.SEQUENCES, common.THREADS]
    assert forward.Stream.params == [common.STREAMS]


def test_setup_gets_ready_once_for_each_set_of_parameters(monkeypatch):
    prepared = []
    monkeypatch.setattr(forward.Forward, "prepare", lambda self, *params: prepared.append(params))
    benchmark = forward.Forward()
    for case in ("short", "short", "vad"):
        benchmark.setup(case, "1")
    assert prepared == [("short", "1"), ("vad", "1")]


@pytest.mark.parametrize("timed", [forward.Forward, reference.Forward, peak.Share])
def test_wrong_output_is_not_timed(timed, monkeypatch):
    right = fastlstm.LSTM.__call__

    def wrong(self, x, **options):
        output, state = right(self, x, **options)
        output[-1, -1, -1] += 1e-3
        return output, state

    monkeypatch.setattr(fastlstm.LSTM, "__call__", wrong)
    with pytest.raises(AssertionError, match="wrong: the output differs"):
        timed().setup("vowels", "1")


@pytest.mark.parametrize("timed", [backward.Record, backward.Backward, reference.Training])
def test_wrong_gradient_is_not_timed(timed, monkeypatch):
    monkeypatch.setattr(backward, "TOLERANCE", -1)  # nothing is right enough
    with pytest.raises(AssertionError, match="wrong: the gradient differs"):
        timed().setup("vowels", "1")


@pytest.mark.parametrize("timed", [backward.Record, backward.Backward, reference.Training])
def test_training_is_skipped_where_there_is_none(timed, monkeypatch):
    monkeypatch.delattr(fastlstm.LSTM, "record")
    with pytest.raises(NotImplementedError):
        timed().setup("short", "1")


def test_ratio_is_that_of_the_times(monkeypatch):
    class Scripted:
        """A timer of calls that return their own seconds, on a machine where all take longer and longer."""

        slowed = 1.0

        def __init__(self, call):
            self.call = call

        def timeit(self, number):
            Scripted.slowed *= 1.1
            return number * self.call() * Scripted.slowed

    monkeypatch.setattr(common.timeit, "Timer", Scripted)
    monkeypatch.setattr(common, "repetitions", lambda call: 3)
    assert common.ratio(lambda: 8.0, lambda: 2.0) == pytest.approx(4 / 1.1)


def test_allocation_beside_the_results_is_seen(monkeypatch):
    right = fastlstm.LSTM.__call__
    before = memory.Call()
    before.setup("short")
    least = before.track_beside_results("short")

    def wasteful(self, x, **options):
        waste = np.ones(1_000_000)
        return right(self, x, **options) if waste.any() else None

    monkeypatch.setattr(fastlstm.LSTM, "__call__", wasteful)
    assert before.track_beside_results("short") >= least + 8_000_000


def test_instructions_are_no_more_than_they_were():
    need("valgrind", shutil.which("valgrind"), "on Debian: apt-get install valgrind")
    counts = instructions.count_instructions(instructions.CASES)
    found = {name: instructions.per_multiply_add(name, count) for name, count in counts.items()}
    assert found.keys() == MOST_INSTRUCTIONS.keys()
    assert {name: count for name, count in found.items() if not 1 <= count <= MOST_INSTRUCTIONS[name]} == {}


# pytest-benchmark


def run_speed(folder, *options):
    command = [sys.executable, "-m", "pytest", "tests/test_speed.py", "-q", "-k", "short or step32", *options]
    command += [f"--benchmark-storage={folder}", "--benchmark-max-time=0", "--benchmark-min-rounds=1"]
    return subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


def test_timings_are_off_by_default_and_compare_with_an_earlier_run(tmp_path):
    need("pytest-benchmark", find_spec("pytest_benchmark"), "pip install 'fastlstm[bench]'")
    off = run_speed(tmp_path)
    assert "7 skipped" in off.stdout
    before = run_speed(tmp_path, "--benchmark-only", "--benchmark-save=before")
    assert before.returncode == 0, before.stdout
    after = run_speed(tmp_path, "--benchmark-only", "--benchmark-compare", "--benchmark-compare-fail=median:100000%")
    assert after.returncode == 0, after.stdout
    assert "test_forward[short-fastlstm] (0001_before)" in after.stdout
    (saved,) = tmp_path.rglob("*.json")
    groups = {timed["group"] for timed in json.loads(saved.read_text(encoding="utf-8"))["benchmarks"]}
    assert "forward short: I,H,L,D,N,T = 8,32,1,1,1,100" in groups
