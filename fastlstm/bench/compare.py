"""The comparison: every library in a process of its own, all but one of them stopped.

For each number of threads and each problem, every engine is set up, its output is checked against the reference in
float64, and only then are the engines that agree timed, in rounds, in an order that turns by one each round. A thread
pool that waits by spinning takes time from whoever else is running, so a worker is stopped (SIGSTOP) except while it
is being asked something; between being continued and being timed it makes a few untimed calls. The time of an engine
is that of its fastest form: the median over the rounds of the median call. The ratio is the time of the fastest peer
over that of fastlstm. Training is compared in the same way, with every gradient checked; for some cases the memory that
it takes is measured too, in processes that did nothing else.
"""

from __future__ import annotations

import math
import os
import pickle
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
from llvmlite import binding

from .answers import Results, exact
from .cases import Array, Mode, Problem
from .engines import Engine, Timing
from .worker import ENGINES, Memory, Reply, find_engine

__all__ = [
    "TOLERANCES",
    "Worker",
    "WorkerError",
    "compare",
    "describe_machine",
    "geometric_means",
    "usable_cpus",
]

TOLERANCES = {"float32": 1e-4, "float64": 1e-10}
"""Largest difference from the float64 reference, relative to its largest value, of an engine that is timed: far above
rounding, which stays below 1e-5 and 1e-13 in the standard cases, and far below bfloat16's error."""

HOPELESS = 1.5  # a form whose best round is slower than the best form's best round by this factor gets no more turns

# Only Linux kills a stopped process with its parent (see `worker`); elsewhere one that nobody continues would stay.
STOPPING = sys.platform == "linux"

STDERR_TAIL = 20  # lines
THREAD_VARIABLES = tuple(f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "NUMBA", "FASTLSTM"))
RECORDED_VARIABLES = (
    "NUMBA_CPU_NAME",
    "NUMBA_CPU_FEATURES",
    "NUMBA_THREADING_LAYER",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "ONEDNN_MAX_CPU_ISA",
)
RECORDED_FEATURES = ("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512vl", "avx512bf16", "amx-tile", "neon", "sve")


class WorkerError(RuntimeError):
    """A worker could not answer."""


class Worker:
    """A process that holds one engine and is stopped while it has nothing to do.

    Parameters
    ----------
    engine : str
        Name for `find_engine`.
    threads : int
        What the environment tells the libraries.
    timeout : float
        Seconds after which a worker that does not answer is killed.
    mode : {"infer", "train"}
        What the engine is for.
    """

    def __init__(self, engine: str, threads: int, timeout: float, mode: Mode = "infer") -> None:
        self._timeout = timeout
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__package__}.worker import main; main()", engine, mode, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={
                **os.environ,
                **dict.fromkeys(THREAD_VARIABLES, str(threads)),
                "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                "PYTHONSAFEPATH": "1",
            },
        )
        self.pid = self._process.pid
        self.alive = True
        """Whether the process can be asked something."""

    def ask(self, request: str, *arguments: object) -> Any:
        """Continue the worker, have a request answered, and stop it again.

        Parameters
        ----------
        request : str
            Name of a request that the worker knows: ``version``, ``set_up``, ``run``, ``time``, ``memory`` or ``peak``.
        *arguments : object
            What the request takes.

        Returns
        -------
        object
            The answer.

        Raises
        ------
        WorkerError
            If the engine raised, or if the process ended or did not answer in time, after which it is not `alive`.
        """
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        alarm = threading.Timer(self._timeout, process.kill)
        alarm.start()
        try:
            if STOPPING:
                process.send_signal(signal.SIGCONT)
            pickle.dump((request, arguments), process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            reply: Reply = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):
            overdue = not alarm.is_alive()
            process.kill()
            reason = self._last_words(process.wait(), overdue)
            self.close()
            raise WorkerError(reason) from None
        finally:
            alarm.cancel()
        if STOPPING:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if reply.reason is not None:
            raise WorkerError(reply.reason)
        return reply.value

    def close(self) -> None:
        """Kill the process; safe to call more than once."""
        self.alive = False
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._stderr):
            assert stream is not None
            with suppress(OSError):  # what was still to be written has nobody to read it
                stream.close()

    def _last_words(self, status: int, overdue: bool) -> str:
        if overdue:
            how = f"killed: no answer in {self._timeout:g} s"
        elif status < 0:
            how = f"ended by signal {-status} ({signal.Signals(-status).name})"
        else:
            how = f"ended with exit status {status}"
        self._stderr.seek(0)
        tail = self._stderr.read().decode(errors="replace").strip().splitlines()[-STDERR_TAIL:]
        return "\n".join([how, *tail])


class _Crew:
    """The workers for one number of threads, one an engine; an engine whose worker died gets another."""

    def __init__(self, threads: int, timeout: float, mode: Mode) -> None:
        self._options = threads, timeout, mode
        self._workers: dict[str, Worker] = {}
        self.versions: dict[str, str] = {}

    def __enter__(self) -> _Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers.values():
            worker.close()

    def ask(self, engine: str, request: str, *arguments: object) -> Any:
        if engine not in self._workers or not self._workers[engine].alive:
            self._workers[engine] = Worker(engine, *self._options)
            self.versions[engine] = self._workers[engine].ask("version")
        return self._workers[engine].ask(request, *arguments)

    def ask_afresh(self, engine: str, request: str, *arguments: object) -> Any:
        """Ask a process that is started for this alone."""
        worker = Worker(engine, *self._options)
        try:
            return worker.ask(request, *arguments)
        finally:
            worker.close()


def compare(
    problems: Sequence[Problem],
    *,
    threads: Sequence[int] = (1,),
    engines: Sequence[str] | None = None,
    rounds: int = 5,
    seconds: float = 0.05,
    timeout: float = 300,
    memory: Collection[str] = (),
    command: str = "",
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Compare the engines on problems.

    Parameters
    ----------
    problems : sequence of Problem
        What to run: all of them for inference, or all of them for training.
    threads : sequence of int
        Numbers of threads; all problems are run with each.
    engines : sequence of str, optional
        Names for `find_engine`. All that are installed unless given.
    rounds : int
        Times each engine has its turn on each problem.
    seconds : float
        How long each form is timed in a turn; longer where two calls take longer.
    timeout : float
        Seconds after which an engine that does not answer is killed and left out.
    memory : collection of str
        Names of the cases whose memory is measured.
    command : str
        How the comparison was started, for the record.
    progress : callable
        Given a line of text after each problem.

    Returns
    -------
    dict
        What `report` reads, fit for JSON; all times in seconds. `failures` lists why fastlstm itself was left out
        where it was.

    Raises
    ------
    ValueError
        If an option makes no sense.
    """
    if rounds < 1 or not problems or not threads or min(threads) < 1:
        raise ValueError("a comparison needs a problem, a round and a number of threads, all of them at least one")
    mode = problems[0].mode
    if any(problem.mode != mode for problem in problems):
        raise ValueError("`problems` must be all for inference or all for training")
    classes = _choose(engines, mode)
    missing = [] if engines else [engine.title for engine in ENGINES[mode].values() if not engine.available()]
    expected = [exact(problem) for problem in problems]
    results, versions = [], {}
    for count in dict.fromkeys(threads):
        with _Crew(count, timeout, mode) as crew:
            for number, problem in enumerate(problems):
                result = _compare_one(crew, problem, expected[number], classes, count, rounds, seconds)
                if problem.case.name in memory:
                    _measure_memory(crew, problem, count, result["engines"])
                results.append(result)
                progress(_progress_line(result, len(results), len(problems) * len(dict.fromkeys(threads))))
            versions.update(crew.versions)
    return {
        "mode": mode,
        "dtypes": sorted({problem.dtype for problem in problems}),
        "lengths": "uniform" if any(problem.lengths is not None for problem in problems) else "full",
        "command": command,
        "rounds": rounds,
        "seconds": seconds,
        "machine": describe_machine(),
        "versions": {**_own_versions(), **versions},
        "engines": {name: {"title": engine.title, "peer": engine.peer} for name, engine in classes.items()},
        "not_installed": missing,
        "results": results,
        "geometric_means": geometric_means(results),
        "failures": [
            f"{result['case']['name']}, threads {result['threads']}: {result['engines']['fastlstm']['reason']}"
            for result in results
            if "reason" in result["engines"].get("fastlstm", {})
        ],
    }


def _choose(engines: Sequence[str] | None, mode: Mode) -> dict[str, type[Engine]]:
    """Return the classes of the engines asked for, or of all that are installed."""
    if engines is None:
        return {name: engine for name, engine in ENGINES[mode].items() if engine.available()}
    classes = {name: find_engine(name, mode) for name in engines}
    for name, engine in classes.items():
        if not engine.available():
            raise ValueError(f"engine {name!r} needs {' and '.join(engine.modules)}, not all of which are installed")
    return classes


def _compare_one(
    crew: _Crew,
    problem: Problem,
    expected: Results,
    classes: dict[str, type[Engine]],
    threads: int,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    engines: dict[str, dict[str, Any]] = {}
    turns: dict[str, dict[str, list[Timing]]] = {}  # engine, form, round
    peaks: list[float] = []
    for name in classes:
        try:
            forms = crew.ask(name, "set_up", problem, threads)
            errors = [_largest_error(crew.ask(name, "run", form, problem.x), expected) for form in forms]
        except WorkerError as reason:
            engines[name] = {"reason": str(reason)}
            continue
        error, what = max(errors)
        if error <= TOLERANCES[problem.dtype]:
            engines[name] = {"error": error}
            turns[name] = {form: [] for form in forms}
        else:
            engines[name] = {"reason": f"wrong: its {what} differs from the reference by {error:.1e}"}
    for number in range(rounds):
        names = list(turns)
        first = number % max(len(names), 1)
        for name in names[first:] + names[:first]:
            try:
                for form in _in_the_running(turns[name]):
                    turns[name][form].append(crew.ask(name, "time", form, seconds))
                if name == "fastlstm":
                    peak = crew.ask(name, "peak", problem.dtype, threads)
                    peaks += [] if peak is None else [peak]
            except WorkerError as reason:
                engines[name] = {"reason": str(reason)}
                del turns[name]
    for name, forms in turns.items():
        engines[name] |= _summary({form: forms[form] for form in _in_the_running(forms)})
    result: dict[str, Any] = {
        "case": asdict(problem.case),
        "dtype": problem.dtype,
        "threads": threads,
        "flops": problem.flops,
        "valid_steps": problem.case.N * problem.case.T if problem.lengths is None else int(problem.lengths.sum()),
        "engines": engines,
        "fastest_peer": None,
        "ratio": None,
        "peak_gflops": median(peaks) if peaks else None,
        "share_of_peak": None,
    }
    own = engines.get("fastlstm", {}).get("median")
    peers = [name for name in turns if classes[name].peer]
    if peers:
        result["fastest_peer"] = min(peers, key=lambda name: float(engines[name]["median"]))
    if own is not None and peers:
        result["ratio"] = engines[result["fastest_peer"]]["median"] / own
    if own is not None and peaks:
        result["share_of_peak"] = problem.flops / own / (result["peak_gflops"] * 1e9)
    return result


def _measure_memory(crew: _Crew, problem: Problem, threads: int, engines: dict[str, dict[str, Any]]) -> None:
    """Add the memory that calls need to each engine that was timed."""
    for name, engine in engines.items():
        if "median" in engine:
            try:
                memory: Memory | None = crew.ask_afresh(name, "memory", problem, threads, engine["form"])
            except WorkerError as error:
                engine["memory"] = {"reason": str(error)}
            else:
                engine["memory"] = None if memory is None else memory._asdict()


def _in_the_running(forms: dict[str, list[Timing]]) -> list[str]:
    """Return the forms that may still turn out the fastest: the others are not worth a turn."""
    best = {form: min((timing.median for timing in timings), default=0.0) for form, timings in forms.items()}
    return [form for form in forms if best[form] <= HOPELESS * min(best.values())]


def _summary(forms: dict[str, list[Timing]]) -> dict[str, Any]:
    """Return the figures of the fastest form."""
    medians = {form: median(timing.median for timing in timings) for form, timings in forms.items()}
    fastest = min(medians, key=medians.__getitem__)
    return {
        "form": fastest,
        "median": medians[fastest],
        "minimum": min(timing.minimum for timing in forms[fastest]),
        "rounds": [timing.median for timing in forms[fastest]],
        "calls": sum(timing.calls for timing in forms[fastest]),
        "forms": medians,
    }


def _largest_error(results: Results, expected: Results) -> tuple[float, str]:
    """Return the largest difference, as `TOLERANCES` measures it, and of what; infinite for NaN or a wrong shape."""
    if results.keys() != expected.keys():
        return math.inf, "set of results"
    return max((_error(results[name], wanted), name) for name, wanted in expected.items())


def _error(got: Array, wanted: Array) -> float:
    if got.shape != wanted.shape:
        return math.inf
    error = float(np.abs(got - wanted).max() / (np.abs(wanted).max() or 1.0))
    return error if math.isfinite(error) else math.inf


def geometric_means(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average the ratios of each regime and number of threads.

    Returns
    -------
    list of dict
        With ``threads``, ``regime``, ``cases`` (how many had a ratio), ``ratio`` and ``lowest``.
    """
    ratios: dict[tuple[int, str], list[float]] = {}
    for result in results:
        if result["ratio"] is not None:
            ratios.setdefault((result["threads"], result["case"]["regime"]), []).append(result["ratio"])
    return [
        {
            "threads": threads,
            "regime": regime,
            "cases": len(values),
            "ratio": math.exp(sum(map(math.log, values)) / len(values)),
            "lowest": min(values),
        }
        for (threads, regime), values in ratios.items()
    ]


def _progress_line(result: dict[str, Any], number: int, total: int) -> str:
    parts = [
        f"{name} {1e3 * engine['median']:.4g} ms" if "median" in engine else f"{name} LEFT OUT"
        for name, engine in result["engines"].items()
    ]
    ratio = "" if result["ratio"] is None else f" · ratio {result['ratio']:.2f}"
    return f"[{number}/{total}] {result['case']['name']}, threads {result['threads']}: {' · '.join(parts)}{ratio}"


def usable_cpus() -> int:
    """Count the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, Any]:
    """Describe the CPU and the system: no host name, no paths.

    Returns
    -------
    dict
        With ``cpu``, ``cores``, ``features``, ``system``, ``environment``.
    """
    features = binding.get_host_cpu_features()
    return {
        "cpu": _cpu_model(),
        "cores": usable_cpus(),
        "features": [name for name in RECORDED_FEATURES if features.get(name)],
        "system": f"{platform.system()} {platform.machine()}",
        "environment": {name: os.environ[name] for name in RECORDED_VARIABLES if name in os.environ},
    }


def _cpu_model() -> str:
    if sys.platform == "darwin":
        query = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        models = []
    return f"{models[0]} ({binding.get_host_cpu_name()})" if models else platform.processor()


def _own_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("fastlstm", "numba", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return versions
