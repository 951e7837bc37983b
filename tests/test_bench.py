"""The comparison with other libraries: cases, engines, workers, reports. No speed is asserted."""

import argparse
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastlstm.bench import command, report, training
from fastlstm.bench import compare as compare_module
from fastlstm.bench.answers import exact
from fastlstm.bench.cases import (
    CASES,
    LANGUAGE_CASES,
    MODES,
    REGIMES,
    LanguageCase,
    Problem,
    make_problem,
    parse_case,
    problems_of_model,
    select,
)
from fastlstm.bench.compare import TOLERANCES, Worker, WorkerError, compare, geometric_means
from fastlstm.bench.engines import ENGINES, Timing, time_calls
from fastlstm.bench.worker import Memory

ROOT = Path(__file__).resolve().parents[1]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="workers are stopped on Linux only")


# The table of cases


def test_names_are_unique_and_regimes_known():
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.regime for case in CASES} == set(REGIMES)


def test_flops_count_every_product():
    # Two layers, two directions: 4H(I + H) multiply-adds a step in the first, 4H(2H + H) in the second.
    case = parse_case("3,5,2,2,7,11")
    assert case.flops() == 2 * 2 * (4 * 5 * (3 + 5) + 4 * 5 * (10 + 5)) * 7 * 11
    assert case.flops(steps=2) == case.flops() // 77 * 2
    # With a projection to 2: W_hh is (4H, 2), the second layer reads 4 features, and W_hr adds 2H.
    assert case.flops(steps=1, proj_size=2) == 2 * 2 * (20 * (3 + 2) + 10 + 20 * (4 + 2) + 10)


def test_problem_is_the_same_every_time_and_in_both_dtypes():
    case = parse_case("3,5,2,2,7,11")
    first, second = make_problem(case, np.float64), make_problem(case, np.float32)
    assert list(first.weights) == list(second.weights)
    for name, array in first.weights.items():
        assert np.array_equal(array.astype(np.float32), second.weights[name])
        assert np.abs(array).max() <= 1 / math.sqrt(5)
    assert np.array_equal(first.x.astype(np.float32), second.x)
    assert second.dtype == "float32"
    assert not np.array_equal(first.x, make_problem(parse_case("3,5,1,2,7,11"), np.float64).x)


def test_uniform_lengths_are_within_bounds_and_count_in_flops():
    problem = make_problem(parse_case("3,5,1,1,200,9"), lengths="uniform")
    assert set(problem.lengths) == set(range(1, 10))
    assert problem.flops == problem.case.flops(int(problem.lengths.sum()))


def test_training_problem_adds_state_and_cotangents_to_the_same_numbers():
    case = parse_case("3,5,2,2,7,11")
    infer, train = (make_problem(case, np.float64, "uniform", mode) for mode in MODES)
    assert [infer.mode, train.mode] == list(MODES)
    assert np.array_equal(infer.x, train.x)
    assert np.array_equal(infer.lengths, train.lengths)
    assert [array.shape for array in train.state] == [(4, 7, 5)] * 2
    assert [array.shape for array in train.cotangents] == [(11, 7, 10), (4, 7, 5), (4, 7, 5)]
    assert train.flops == 3 * infer.flops
    step = make_problem(parse_case("3,5,1,1,2,1"), mode="train")
    assert not step.streamed
    assert step.x.shape == (1, 2, 3)


def test_language_model_counts_its_linear_layer_and_has_no_lengths():
    case = LanguageCase("lm", "language", 3, 5, 2, 1, 7, 11, V=13)
    problem = make_problem(case)
    assert problem.flops == 3 * (parse_case("3,5,2,1,7,11").flops() + 2 * 5 * 13 * 7 * 11)
    assert np.array_equal(problem.x[1:], problem.targets[:-1])
    assert problem.dtype == "float32"
    with pytest.raises(ValueError, match="lm has no lengths"):
        make_problem(case, lengths="uniform")


def test_exact_language_model_has_the_slope_of_its_loss():
    problem = make_problem(LanguageCase("lm", "language", 3, 4, 2, 1, 2, 3, V=5), np.float64)
    results, rng = exact(problem), np.random.default_rng(0)
    direction = {name: rng.standard_normal(array.shape) for name, array in problem.weights.items()}
    losses = []
    for step in (1e-5, -1e-5):
        weights = {name: array + step * direction[name] for name, array in problem.weights.items()}
        losses.append(exact(dataclasses.replace(problem, weights=weights))["loss"])
    slope = sum(np.vdot(results[f"d_{name}"], array) for name, array in direction.items())
    # a central difference: off by 1e-10 of a third derivative, and by 1e-16 / 1e-5 of rounding
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(slope, rel=1e-8)


def test_cases_need_nothing_but_numpy():
    script = "import runpy, sys; runpy.run_path(sys.argv[1]); assert 'fastlstm' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", script, ROOT / "fastlstm" / "bench" / "cases.py"], check=True, cwd=ROOT.anchor
    )


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,a,5,6", "1,2,1,1,1,1,1", "0,2,1,1,1,1", "1,2,1,3,1,1"])
def test_bad_shape_is_refused(text):
    with pytest.raises(ValueError, match="I,H,L,D,N,T"):
        parse_case(text)


def test_select_by_regime_and_name():
    assert {case.regime for case in select(["mid"])} == {"mid"}
    assert select(["mid", "latency", "throughput"]) == select(["all"]) == list(CASES)
    with pytest.raises(ValueError, match="no regime 'fast'"):
        select(["fast"])
    assert select(["all"], mode="train") == [*CASES, *LANGUAGE_CASES]
    assert select(names=["lm128"], mode="train") == select(["language"], mode="train")[:1]
    with pytest.raises(ValueError, match="no case 'lm128'"):
        select(names=["lm128"])
    with pytest.raises(ValueError, match="no case 'b513'"):
        select(names=["b513"])


class Model:
    """Stands for a Sequential: what `problems_of_model` needs is the state dict."""

    def __init__(self, **layers):
        self._layers = layers

    def state_dict(self):
        return {f"{prefix}.{name}": array for prefix, layer in self._layers.items() for name, array in layer.items()}


def test_problems_of_model_takes_the_lstm_layers():
    weights = make_problem(parse_case("3,5,2,2,1,2"), np.float64).weights
    problems = problems_of_model(Model(a=weights, b={"weight": np.zeros((4, 10))}), N=6, T=7)
    assert [problem.case.shape for problem in problems] == ["3,5,2,2,6,7"]
    assert problems[0].x.shape == (7, 6, 3)
    assert problems[0].dtype == "float64"
    with pytest.raises(ValueError, match="no LSTM layer"):
        problems_of_model(Model(b={"weight": np.zeros((4, 10))}), N=6, T=7)


# The engines


def engine_class(name, engines=ENGINES):
    if not engines[name].available():
        pytest.skip(f"{name} is not installed")
    return engines[name]


def assert_all_forms_agree(engine, problem):
    assert engine.forms
    expected = exact(problem)
    # A few steps of rounding, far below what a wrong gate order, direction or state would give.
    tolerance = 2e-6 if problem.dtype == "float32" else 1e-13
    for form in engine.forms:
        for _ in range(2):  # timing must leave nothing behind that changes the next result
            results = engine.run(form, problem.x)
            assert results.keys() == expected.keys()
            for name, wanted in expected.items():
                assert results[name].shape == wanted.shape
                limit = tolerance * max(1, np.abs(wanted).max())
                np.testing.assert_allclose(results[name], wanted, rtol=0, atol=limit, err_msg=name)
            assert engine.time(form, 0).calls >= 2


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", ["full", "uniform"])
@pytest.mark.parametrize("shape", ["5,7,1,1,3,6", "5,7,2,1,3,6", "5,7,1,2,3,6", "3,8,3,2,1,4", "5,7,1,2,3,1"])
@pytest.mark.parametrize("name", ENGINES)
def test_engine_agrees_with_reference(name, shape, lengths, threads):
    problem = make_problem(parse_case(shape), lengths=lengths)
    assert_all_forms_agree(engine_class(name)(problem, threads), problem)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", ["5,7,1,1,1,1", "5,7,1,1,3,1", "5,7,2,1,3,1"])
@pytest.mark.parametrize("name", ENGINES)
def test_streamed_step_carries_the_state(name, shape, threads):
    problem = make_problem(parse_case(shape))
    assert len(problem.x) > 1
    assert_all_forms_agree(engine_class(name)(problem, threads), problem)


@pytest.mark.parametrize("name", ENGINES)
def test_engine_agrees_in_float64_or_says_that_it_cannot(name):
    problem = make_problem(parse_case("5,7,2,2,3,6"), np.float64, "uniform")
    engine = engine_class(name)
    if "float64" in engine.dtypes:
        assert_all_forms_agree(engine(problem, 1), problem)
    else:
        with pytest.raises(NotImplementedError, match="float32 only"):
            engine(problem, 1)


@pytest.mark.parametrize("name", ENGINES)
def test_engine_without_bias(name):
    problem = make_problem(parse_case("5,7,2,2,3,6"))
    weights = {key: array for key, array in problem.weights.items() if not key.startswith("bias")}
    problem = Problem(problem.case, weights, problem.x)
    assert_all_forms_agree(engine_class(name)(problem, 1), problem)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("shape", ["5,7,1,1,3,6", "5,7,1,1,3,1"])
@pytest.mark.parametrize("name", ENGINES)
def test_engine_with_projection_agrees_or_says_that_it_cannot(name, shape):
    problem = make_problem(parse_case(shape))
    rng = np.random.default_rng(3)
    weights = dict(problem.weights)
    weights["weight_hh_l0"] = np.ascontiguousarray(weights["weight_hh_l0"][:, :4])
    weights["weight_hr_l0"] = rng.uniform(-0.5, 0.5, (4, 7)).astype(np.float32)
    problem = Problem(problem.case, weights, problem.x)
    engine = engine_class(name)
    if "onnx" in engine.modules:
        with pytest.raises(NotImplementedError, match="projection"):
            engine(problem, 1)
    else:
        assert_all_forms_agree(engine(problem, 1), problem)


# Training


def without(problem, prefix):
    weights = {name: array for name, array in problem.weights.items() if not name.startswith(prefix)}
    return dataclasses.replace(problem, weights=weights)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", ["full", "uniform"])
@pytest.mark.parametrize("shape", ["5,7,1,1,3,6", "5,7,2,2,3,6", "3,8,3,1,1,4", "5,7,2,1,3,1"])
@pytest.mark.parametrize("name", training.ENGINES)
def test_every_gradient_agrees_with_reference(name, shape, lengths, threads):
    problem = make_problem(parse_case(shape), lengths=lengths, mode="train")
    assert_all_forms_agree(engine_class(name, training.ENGINES)(problem, threads), problem)


@pytest.mark.parametrize("name", training.ENGINES)
def test_every_gradient_agrees_in_float64_and_without_bias(name):
    problem = without(make_problem(parse_case("5,7,2,2,3,6"), np.float64, "uniform", "train"), "bias")
    assert_all_forms_agree(engine_class(name, training.ENGINES)(problem, 1), problem)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("name", training.ENGINES)
def test_every_gradient_agrees_with_projection(name):
    case, rng = parse_case("5,7,1,1,3,6"), np.random.default_rng(3)
    problem = make_problem(case, mode="train")
    weights = dict(problem.weights)
    weights["weight_hh_l0"] = np.ascontiguousarray(weights["weight_hh_l0"][:, :4])
    weights["weight_hr_l0"] = rng.uniform(-0.5, 0.5, (4, 7)).astype(np.float32)
    h_0, d_output, d_h_n = (rng.standard_normal((rows, 3, 4)).astype(np.float32) for rows in (1, 6, 1))
    state, cotangents = (h_0, problem.state[1]), (d_output, d_h_n, problem.cotangents[2])
    problem = Problem(case, weights, problem.x, None, state, cotangents)
    assert_all_forms_agree(engine_class(name, training.ENGINES)(problem, 1), problem)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["fastlstm", "torch"])
def test_step_of_a_language_model_agrees_with_reference(name, dtype):
    pytest.importorskip("torch")
    problem = make_problem(LanguageCase("lm", "language", 6, 7, 2, 1, 3, 5, V=11), dtype)
    engine = training.ENGINES[name](problem, 2)
    assert_all_forms_agree(engine, problem)
    for form in engine.forms.values():
        before = {key: value.clone() for key, value in form._model.state_dict().items()}
        form.call()
        assert all((value != before[key]).any() for key, value in form._model.state_dict().items())


def test_language_model_is_accelerated():
    pytest.importorskip("torch")
    import fastlstm.torch

    problem = make_problem(LanguageCase("lm", "language", 6, 7, 2, 1, 3, 5, V=11))
    (form,) = training.ENGINES["fastlstm"](problem, 1).forms.values()
    assert isinstance(form._model["lstm"], fastlstm.torch.LSTM)
    assert not isinstance(training._language_model(problem)["lstm"], fastlstm.torch.LSTM)


def test_timed_training_call_of_fastlstm_packs_the_weights_again():
    problem = make_problem(parse_case("5,7,1,1,3,6"), mode="train")
    (form,) = training.ENGINES["fastlstm"](problem, 1).forms.values()
    form.feed(problem.x)
    for _ in range(2):
        before = form._lstm._params  # packed weights are known by its identity
        form.call()
        assert form._lstm._params is not before


def test_time_calls_counts_and_orders():
    calls = []
    timing = time_calls(lambda: calls.append(None), 0.001)
    assert 0 < timing.minimum <= timing.median
    assert 0 < timing.calls < len(calls)


# The workers

ENGINES_OF_OUR_OWN = """
import os, sys, time
from fastlstm.bench.engines import NumPy

class Dying(NumPy):
    def run(self, form, x):
        print("the last words", file=sys.stderr, flush=True)
        os._exit(7)

class Aborting(NumPy):
    def time(self, form, seconds):
        os.abort()

class Hanging(NumPy):
    def run(self, form, x):
        time.sleep(600)

class Raising(NumPy):
    def __init__(self, problem, threads):
        raise MemoryError("too big")

class Chatty(NumPy):
    def run(self, form, x):
        print("this must not get among the replies", flush=True)
        os.write(1, b"nor this")
        return super().run(form, x)

class Wrong(NumPy):
    wrong = "c_n"

    def run(self, form, x):
        results = super().run(form, x)
        results[self.wrong].flat[0] += 1e-3
        return results

    def time(self, form, seconds):
        open(os.environ["BENCH_TIMED"], "w").close()
        return super().time(form, seconds)

class NotANumber(Wrong):
    def run(self, form, x):
        results = NumPy.run(self, form, x)
        results["output"][0, 0, 0] = float("nan")
        return results

class WrongShape(Wrong):
    def run(self, form, x):
        return NumPy.run(self, form, x) | {"output": x[:0]}

class Incomplete(Wrong):
    def run(self, form, x):
        return {"output": NumPy.run(self, form, x)["output"]}

class WrongGradient(Wrong):
    wrong = "d_weight_hh_l0"
"""


@pytest.fixture
def our_own(tmp_path, monkeypatch):
    """Engines that misbehave, and the problem that they are given."""
    (tmp_path / "misbehaving.py").write_text(ENGINES_OF_OUR_OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("BENCH_TIMED", str(tmp_path / "timed"))
    return make_problem(parse_case("2,3,1,1,2,4"))


@pytest.mark.parametrize(
    ("engine", "reason"),
    [
        ("Dying", r"ended with exit status 7\nthe last words"),
        pytest.param("Aborting", r"ended by signal 6 \(SIGABRT\)", marks=on_linux),
        ("Raising", r"^MemoryError: too big$"),
        ("Hanging", r"killed: no answer in 4 s"),
    ],
)
def test_engine_that_fails_is_reported_and_the_others_are_timed(our_own, engine, reason):
    name = f"misbehaving:{engine}"
    result = compare([our_own, our_own], engines=[name, "numpy"], rounds=1, seconds=0, timeout=4)
    assert len(result["results"]) == 2
    for entry in result["results"]:
        assert pytest.approx(0, abs=TOLERANCES["float32"]) == entry["engines"]["numpy"]["error"]
        assert entry["engines"]["numpy"]["median"] > 0
        assert "median" not in entry["engines"][name]
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(entry["engines"][name]["reason"])
    json.dumps(result)


@pytest.mark.parametrize(
    ("engine", "what", "mode"),
    [
        ("Wrong", "c_n", "infer"),
        ("NotANumber", "output", "infer"),
        ("WrongShape", "output", "infer"),
        ("Incomplete", "set of results", "infer"),
        ("WrongGradient", "d_weight_hh_l0", "train"),
    ],
)
def test_wrong_engine_is_refused_before_timing(our_own, engine, what, mode, tmp_path):
    name = f"misbehaving:{engine}"
    problem = make_problem(our_own.case, mode=mode)
    result = compare([problem], engines=[name, "misbehaving:Chatty"], rounds=1, seconds=0)
    engines = result["results"][0]["engines"]
    assert engines[name].keys() == {"reason"}
    assert f"wrong: its {what} differs from the reference" in engines[name]["reason"]
    assert engines["misbehaving:Chatty"]["median"] > 0
    assert not (tmp_path / "timed").exists()


def state_of(pid):
    """Return the letter of /proc for a process: R, S, T for stopped, Z for dead; Z too where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def wait_until_dead(pid):
    end = time.monotonic() + 20
    while state_of(pid) != "Z":
        assert time.monotonic() < end, f"process {pid} is still there, in state {state_of(pid)}"
        time.sleep(0.02)


@on_linux
def test_worker_is_stopped_between_requests_and_dead_after_close():
    worker = Worker("numpy", 1, 60)
    try:
        for _ in range(20):
            assert worker.ask("version") == np.__version__
            assert state_of(worker.pid) == "T"
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.ask("no_such_request")
        assert worker.alive
    finally:
        worker.close()
    assert not worker.alive
    assert state_of(worker.pid) == "Z"
    worker.close()


@on_linux
def test_workers_end_when_the_comparison_is_interrupted(our_own, monkeypatch):
    workers = []

    class Recorded(Worker):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            workers.append(self)

    def interrupt(line):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare_module, "Worker", Recorded)
    with pytest.raises(KeyboardInterrupt):
        compare([our_own], engines=["numpy", "misbehaving:Chatty"], rounds=1, seconds=0, progress=interrupt)
    assert len(workers) == 2
    for worker in workers:
        assert state_of(worker.pid) == "Z"


@on_linux
def test_stopped_worker_dies_with_a_killed_parent():
    script = (
        "from fastlstm.bench.compare import Worker; import time\n"
        "worker = Worker('numpy', 1, 60); worker.ask('version'); print(worker.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    with parent:
        pid = int(parent.stdout.readline())
        assert state_of(pid) == "T"
        parent.send_signal(signal.SIGKILL)
    wait_until_dead(pid)


@on_linux
def test_worker_gets_its_number_of_threads():
    worker = Worker("numpy", 3, 60)
    try:
        worker.ask("version")
        environment = Path(f"/proc/{worker.pid}/environ").read_bytes().split(b"\0")
    finally:
        worker.close()
    for library in ("OMP", "MKL", "OPENBLAS", "NUMBA", "FASTLSTM"):
        assert f"{library}_NUM_THREADS=3".encode() in environment


@on_linux
def test_memory_is_that_of_the_calls():
    problem = make_problem(parse_case("8,256,1,1,64,100"), mode="train")
    results = exact(problem)
    needed = sum(array.nbytes for array in results.values()) / 2  # of float32
    worker = Worker("numpy", 1, 60, "train")
    try:
        worker.ask("version")
        peak, calls = worker.ask("memory", problem, 1, "reference")
    finally:
        worker.close()
    # Beside its results the reference saves 8 numbers per hidden unit and step and needs 4 for the gradients of z.
    saved = 12 * 4 * 256 * 64 * 100
    assert needed + saved < calls < 3 * (needed + saved)
    assert calls < peak < 1 << 30


# The comparison


class ScriptedCrew:
    """Answers at once: every engine takes 1 s, fastlstm 0.5 s, torch 0.75 s in one form and much more in another."""

    requests: list
    wrong: set

    def __init__(self, threads, timeout, mode):
        self.versions = {}
        self._problem = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def ask(self, engine, request, *arguments):
        self.requests.append((engine, request))
        if request == "set_up":
            self._problem = arguments[0]
            return ["slow", "quick"] if engine == "torch" else ["only"]
        if request == "run":
            results = exact(self._problem)
            return results | {"h_n": results["h_n"] + (0.1 if engine in self.wrong else 0)}
        if request == "time":
            seconds = 9.0 if arguments[0] == "slow" else {"fastlstm": 0.5, "torch": 0.75}.get(engine, 1.0)
            return Timing(seconds, seconds, 10)
        return 2e-9 * self._problem.flops

    def ask_afresh(self, engine, request, *arguments):
        self.requests.append((engine, request))
        if engine == "numpy":
            raise WorkerError("no room")
        return Memory({"fastlstm": 200_000_000, "torch": 300_000_000}[engine], 12_345_678)


@pytest.fixture
def crew(monkeypatch):
    monkeypatch.setattr(compare_module, "_Crew", ScriptedCrew)
    monkeypatch.setattr(ScriptedCrew, "requests", [], raising=False)
    monkeypatch.setattr(ScriptedCrew, "wrong", set(), raising=False)
    monkeypatch.setattr(compare_module, "_choose", lambda names, mode: {name: ENGINES[name] for name in names})
    return ScriptedCrew


def test_ratio_peak_and_rounds(crew):
    names = ["fastlstm", "torch", "onnxruntime", "numpy"]
    result = compare([make_problem(parse_case("2,3,1,1,2,4"))], threads=[1, 2, 1], engines=names, rounds=3)
    assert [entry["threads"] for entry in result["results"]] == [1, 2]
    entry = result["results"][0]
    assert entry["fastest_peer"] == "torch"
    assert entry["ratio"] == 1.5
    assert entry["peak_gflops"] == pytest.approx(2e-9 * entry["flops"])
    assert entry["share_of_peak"] == pytest.approx(1.0)
    assert entry["engines"]["torch"]["form"] == "quick"
    # The slow form is timed in the first round only; the order turns.
    timed = [engine for engine, request in crew.requests if request == "time"][:13]
    assert timed == ["fastlstm", "torch", *names[1:], *names[1:], *names[:1], *names[2:], *names[:2]]
    assert result["geometric_means"][0] == {"threads": 1, "regime": "extra", "cases": 1, "ratio": 1.5, "lowest": 1.5}
    assert result["failures"] == []


def test_wrong_fastlstm_is_a_failure(crew):
    crew.wrong = {"fastlstm", "torch"}
    problem = make_problem(parse_case("2,3,1,1,2,4"))
    result = compare([problem], engines=["fastlstm", "torch", "onnxruntime"])
    assert ("fastlstm", "time") not in crew.requests
    assert ("torch", "time") not in crew.requests
    assert ("onnxruntime", "time") in crew.requests
    assert len(result["failures"]) == 1
    assert "I2-H3-L1-D1-N2-T4, threads 1: wrong" in result["failures"][0]
    assert result["results"][0]["ratio"] is None


def test_result_names_no_host_and_no_path(crew):
    result = compare([make_problem(parse_case("2,3,1,1,2,4"))], engines=["fastlstm"])
    text = json.dumps(result)
    assert result["machine"].keys() == {"cpu", "cores", "features", "system", "environment"}
    assert str(ROOT) not in text
    assert str(Path.home()) not in text


def test_geometric_means_leave_out_what_has_no_ratio():
    results = [{"threads": 1, "case": {"regime": "mid"}, "ratio": ratio} for ratio in (0.5, None, 8.0)]
    assert geometric_means(results) == [
        {"threads": 1, "regime": "mid", "cases": 2, "ratio": pytest.approx(2.0), "lowest": 0.5}
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "at least one"),
        ({"threads": []}, "at least one"),
        ({"threads": [0]}, "at least one"),
        ({"engines": ["jax"]}, "no engine 'jax'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare([make_problem(parse_case("2,3,1,1,2,4"))], **{"engines": ["numpy"], **options})


def test_inference_and_training_are_not_mixed():
    problems = [make_problem(parse_case("2,3,1,1,2,4"), mode=mode) for mode in MODES]
    with pytest.raises(ValueError, match="all for inference or all for training"):
        compare(problems, engines=["numpy"])


def test_engines_that_cannot_train_are_not_asked_to():
    with pytest.raises(ValueError, match="no engine 'openvino'; there are fastlstm, torch, numpy"):
        compare([make_problem(parse_case("2,3,1,1,2,4"), mode="train")], engines=["openvino"])


def test_memory_is_measured_for_the_cases_named(crew):
    problems = [make_problem(case, mode="train") for case in select(names=["short", "vowels"])]
    crew.wrong = {"torch"}
    result = compare(problems, engines=["fastlstm", "torch", "numpy"], rounds=1, memory=["vowels"])
    short, vowels = (entry["engines"] for entry in result["results"])
    assert "memory" not in short["fastlstm"]
    assert vowels["fastlstm"]["memory"] == {"peak": 200_000_000, "calls": 12_345_678}
    assert vowels["numpy"]["memory"] == {"reason": "no room"}
    assert ("torch", "memory") not in crew.requests  # which was wrong
    assert result["mode"] == "train"
    text = report.terminal(json.loads(json.dumps(result)))
    assert "fastlstm 12.3 MB (process 200 MB), NumPy no room." in text
    assert "training, forward and backward; float32" in text


# The reports


@pytest.fixture
def result(crew):
    """A result with wins, a loss, an engine that was left out, and two numbers of threads."""
    crew.wrong = {"openvino"}
    names = ["fastlstm", "torch", "openvino", "numpy"]
    made = compare(
        [make_problem(case) for case in (*select(names=["short", "vowels"]), parse_case("2,3,1,2,2,4"))],
        threads=[1, 2],
        engines=names,
        command="python benchmarks/peers.py --threads 1,2",
    )
    for entry in made["results"]:
        if entry["case"]["name"] == "vowels" and entry["threads"] == 2:
            entry["engines"]["torch"]["median"], entry["ratio"] = 0.4, 0.8
    made["geometric_means"] = geometric_means(made["results"])
    made["not_installed"] = ["ONNX Runtime"]
    return json.loads(json.dumps(made))


@pytest.mark.parametrize("render", [report.markdown, report.terminal])
def test_report_shows_wins_losses_means_and_what_was_left_out(render, result):
    text = render(result)
    assert "python benchmarks/peers.py --threads 1,2" in text
    assert result["machine"]["cpu"] in text
    assert f"numba {result['versions']['numba']}" in text
    for heading in ("1 thread", "2 threads", "fastlstm", "PyTorch", "OpenVINO", "NumPy"):
        assert heading in text
    assert "vowels with 2 threads (0.80, PyTorch)" in text
    assert "the fastest in 5 of 6" in text
    assert text.count("geometric mean of 1 case") == 6
    assert "OpenVINO left out of short with 1 thread, " in text
    assert "Not installed: ONNX Runtime" in text


def test_markdown_tables_are_well_formed(result):
    tables = [line for line in report.markdown(result).splitlines() if line.startswith("|")]
    assert len(tables) == 2 * (2 + 3 + 3)
    assert {line.count("|") for line in tables} == {9}
    row = next(line for line in tables if "| short |" in line)
    assert row == "| short | 8, 32, 1, 1, 1, 100 | **500 ms** | 750 ms | – | 1.00 s | 1.50 | 100% |"


START, END = report.MARKS["infer"]


@pytest.mark.parametrize("mode", MODES)
def test_readme_gets_the_tables_between_the_marks_of_the_mode(result, tmp_path, mode):
    path, result["mode"] = tmp_path / "README.md", mode
    sections = {of: f"{start}\nold\n{end}\n" for of, (start, end) in report.MARKS.items()}
    path.write_text(f"before\n{''.join(sections.values())}after\n", encoding="utf-8")
    report.write_readme(result, path)
    once = path.read_text(encoding="utf-8")
    start, end = report.MARKS[mode]
    sections[mode] = f"{start}\n\n{report.markdown(result)}\n\n{end}\n"
    assert once == f"before\n{''.join(sections.values())}after\n"
    report.write_readme(result, path)
    assert path.read_text(encoding="utf-8") == once


@pytest.mark.parametrize("text", ["", START, f"{END}{START}", (START + END) * 2])
def test_readme_without_marks_is_left_alone(result, tmp_path, text):
    path = tmp_path / "README.md"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="once each"):
        report.write_readme(result, path)
    assert path.read_text(encoding="utf-8") == text


def test_chart_is_a_png_that_grows_with_the_cases(result, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "chart.png"
    report.write_chart(result, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for entry in result["results"]:
        entry["ratio"] = None
    with pytest.raises(ValueError, match="no ratio"):
        report.write_chart(result, path)


# The command line


def run_peers(*arguments):
    command = [sys.executable, "benchmarks/peers.py", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)


def test_peers_runs_writes_json_and_reports_from_it(tmp_path):
    path = tmp_path / "out.json"
    done = run_peers("--engines", "numpy", "--shape", "2,3,1,1,2,4", "--threads", "1", "--rounds", "1", "--json", path)
    assert done.returncode == 0, done.stderr
    assert "[1/1] I2-H3-L1-D1-N2-T4, threads 1: numpy" in done.stderr
    assert json.loads(path.read_text())["results"][0]["engines"]["numpy"]["calls"] >= 2
    again = run_peers("--from-json", path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout


def test_peers_trains(tmp_path):
    path = tmp_path / "out.json"
    options = ("--mode", "train", "--engines", "numpy", "--threads", "1", "--rounds", "1", "--lengths", "uniform")
    done = run_peers(*options, "--cases", "vowels", "--memory", "vowels", "--json", path)
    assert done.returncode == 0, done.stderr
    result = json.loads(path.read_text())
    assert result["mode"] == "train"
    assert result["lengths"] == "uniform"
    (entry,) = result["results"]
    assert entry["flops"] == 3 * entry["valid_steps"] * parse_case("12,64,1,1,1,1").flops()
    assert "memory" in entry["engines"]["numpy"]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ([], [case.name for case in CASES]),
        (["--mode", "train"], [case.name for case in (*CASES, *LANGUAGE_CASES)]),
        (["--mode", "train", "--lengths", "uniform"], [case.name for case in CASES]),
        (["--mode", "train", "--shape", "1,2,1,1,3,4"], ["I1-H2-L1-D1-N3-T4"]),
        (
            ["--mode", "train", "--shape", "1,2,1,1,3,4", "--regime", "language"],
            ["lm128", "lm10k", "I1-H2-L1-D1-N3-T4"],
        ),
    ],
)
def test_options_say_what_is_run(options, names, monkeypatch):
    monkeypatch.setattr(command, "make_problem", lambda case, *rest: case.name)
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    assert command._problems(parser.parse_args(options)) == names


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cases", "b513"),
        ("--cases", "lm128"),
        ("--mode", "train", "--cases", "lm128", "--lengths", "uniform"),
        ("--mode", "train", "--memory", "b513"),
        ("--regime", "fast"),
        ("--threads", "none"),
        ("--threads", "0"),
        ("--shape", "1,2"),
        ("--engines", "jax"),
        ("--from-json", "no-such-file.json"),
        ("--from-json", "README.md"),
    ],
)
def test_peers_answers_a_bad_option_with_one_line(arguments):
    done = run_peers(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("peers.py: ")
    assert done.stderr.count("\n") == 1


def test_importing_the_package_leaves_the_comparison_out():
    script = "import fastlstm, sys; assert not any(name.startswith('fastlstm.bench') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
