"""The comparison with other libraries: cases, engines, workers, reports. No speed is asserted."""

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

from fastlstm import reference
from fastlstm.bench import compare as compare_module
from fastlstm.bench import report
from fastlstm.bench.cases import (
    CASES,
    REGIMES,
    Problem,
    make_problem,
    parse_case,
    problems_of_model,
    select,
)
from fastlstm.bench.compare import TOLERANCES, Worker, WorkerError, compare, geometric_means
from fastlstm.bench.engines import ENGINES, Outputs, Timing, time_calls

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


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,a,5,6", "1,2,1,1,1,1,1", "0,2,1,1,1,1", "1,2,1,3,1,1"])
def test_bad_shape_is_refused(text):
    with pytest.raises(ValueError, match="I,H,L,D,N,T"):
        parse_case(text)


def test_select_by_regime_and_name():
    assert {case.regime for case in select(["mid"])} == {"mid"}
    assert select(["mid", "latency", "throughput"]) == select(["all"]) == list(CASES)
    with pytest.raises(ValueError, match="no regime 'fast'"):
        select(["fast"])
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


def expected_of(problem):
    weights = {name: array.astype(np.float64) for name, array in problem.weights.items()}
    result = reference.forward(weights, problem.x.astype(np.float64), lengths=problem.lengths)
    return Outputs(result.output, *result.state)


def engine_class(name):
    if not ENGINES[name].available():
        pytest.skip(f"{name} is not installed")
    return ENGINES[name]


def assert_all_forms_agree(engine, problem):
    assert engine.forms
    expected = expected_of(problem)
    for form in engine.forms:
        for _ in range(2):  # timing must leave nothing behind that changes the next result
            for got, wanted in zip(engine.run(form, problem.x), expected, strict=True):
                assert got.shape == wanted.shape
                # A few steps of rounding, far below what a wrong gate order, direction or state would give.
                np.testing.assert_allclose(got, wanted, atol=2e-6 if problem.dtype == "float32" else 1e-13)
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
    def run(self, form, x):
        outputs = super().run(form, x)
        outputs.c_n[0, 0, 0] += 1e-3
        return outputs

    def time(self, form, seconds):
        open(os.environ["BENCH_TIMED"], "w").close()
        return super().time(form, seconds)

class NotANumber(Wrong):
    def run(self, form, x):
        outputs = NumPy.run(self, form, x)
        outputs.output[0, 0, 0] = float("nan")
        return outputs

class WrongShape(Wrong):
    def run(self, form, x):
        return NumPy.run(self, form, x)._replace(output=x[:0])
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


@pytest.mark.parametrize("engine", ["Wrong", "NotANumber", "WrongShape"])
def test_wrong_engine_is_refused_before_timing(our_own, engine, tmp_path):
    name = f"misbehaving:{engine}"
    result = compare([our_own], engines=[name, "misbehaving:Chatty"], rounds=1, seconds=0)
    engines = result["results"][0]["engines"]
    assert engines[name].keys() == {"reason"}
    assert "differs from the reference" in engines[name]["reason"]
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


# The comparison


class ScriptedCrew:
    """Answers at once: every engine takes 1 s, fastlstm 0.5 s, torch 0.75 s in one form and much more in another."""

    requests: list
    wrong: set

    def __init__(self, threads, timeout):
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
            outputs = expected_of(self._problem)
            return outputs._replace(h_n=outputs.h_n + (0.1 if engine in self.wrong else 0))
        if request == "time":
            seconds = 9.0 if arguments[0] == "slow" else {"fastlstm": 0.5, "torch": 0.75}.get(engine, 1.0)
            return Timing(seconds, seconds, 10)
        return 2e-9 * self._problem.flops


@pytest.fixture
def crew(monkeypatch):
    monkeypatch.setattr(compare_module, "_Crew", ScriptedCrew)
    monkeypatch.setattr(ScriptedCrew, "requests", [], raising=False)
    monkeypatch.setattr(ScriptedCrew, "wrong", set(), raising=False)
    monkeypatch.setattr(compare_module, "_choose", lambda names: {name: ENGINES[name] for name in names})
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
        ({"mode": "dream"}, "`mode`"),
        ({"rounds": 0}, "at least one"),
        ({"threads": []}, "at least one"),
        ({"threads": [0]}, "at least one"),
        ({"engines": ["jax"]}, "no engine 'jax'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare([make_problem(parse_case("2,3,1,1,2,4"))], **{"engines": ["numpy"], **options})


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


def test_readme_gets_the_tables_between_its_marks(result, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n", encoding="utf-8")
    report.write_readme(result, path)
    once = path.read_text(encoding="utf-8")
    assert once == f"before\n{report.START}\n\n{report.markdown(result)}\n\n{report.END}\nafter\n"
    report.write_readme(result, path)
    assert path.read_text(encoding="utf-8") == once


@pytest.mark.parametrize("text", ["", report.START, f"{report.END}{report.START}", (report.START + report.END) * 2])
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


@pytest.mark.parametrize(
    "arguments",
    [
        ("--cases", "b513"),
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
