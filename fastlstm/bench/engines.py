"""One class per library: how a fair expert runs an LSTM with it on a CPU; `training` has those for training.

An engine is set up for one problem and one number of threads. A library that can run the problem in several ways
(with or without preallocated outputs, as a sequence or as a cell, on all the threads it is allowed or on one) offers
each as a `Form`. All of them are checked and timed, and the fastest counts, so that every library shows its best. The
forms of fastlstm are ways to call it only: how many of the allowed threads it uses is its own decision.

What `Engine.time` times is one call: input in place, weights loaded and packed, model compiled. What is checked is the
same call: `Engine.run` puts an input in place, makes that call and fetches what it left.
"""

from __future__ import annotations

import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar, NamedTuple

import numpy as np

from .answers import Results, run_reference
from .cases import Array, Problem
from .onnx_graph import build_model

__all__ = [
    "ENGINES",
    "Engine",
    "FastLSTM",
    "Form",
    "NumPy",
    "PyTorch",
    "Timing",
    "fastlstm_layer",
    "thread_counts",
    "time_calls",
    "torch_layer",
]

SETTLE_S = 0.01  # untimed calls before timed ones: pools wake, caches fill, clocks rise
BATCH_S = 1e-4  # calls shorter than this are timed several at once, so that reading the clock does not count


OUTPUTS = ("output", "h_n", "c_n")
"""What an LSTM returns: (T, N, D*P), (L*D, N, P), (L*D, N, H)."""


class Timing(NamedTuple):
    """Seconds a call, and the number of calls they come from."""

    median: float
    minimum: float
    calls: int


def time_calls(call: Callable[[], object], seconds: float) -> Timing:
    """Time a call over and over.

    Parameters
    ----------
    call : callable
        Takes no argument.
    seconds : float
        How long to go on; at least two timings are taken. Untimed calls come first.

    Returns
    -------
    Timing
    """
    clock = time.perf_counter_ns
    settled = clock() + int(SETTLE_S * 1e9)
    latest = SETTLE_S * 1e9
    while True:
        start = clock()
        call()
        latest = min(latest, clock() - start)
        if clock() >= settled:
            break
    batch = max(1, round(BATCH_S * 1e9 / max(latest, 1)))
    timings: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = clock() + int(seconds * 1e9)
        while len(timings) < 2 or clock() < end:
            start = clock()
            for _ in range(batch):
                call()
            timings.append((clock() - start) / batch)
    finally:
        if collecting:
            gc.enable()
    return Timing(float(np.median(timings)) / 1e9, min(timings) / 1e9, batch * len(timings))


class Form(ABC):
    """One way in which a library can run a problem."""

    def settings(self) -> AbstractContextManager[None]:
        """Return the context in which it must be set up and run: process-wide settings it needs."""
        return nullcontext()

    def reset(self) -> None:  # noqa: B027
        """Zero the carried state; there is one in streamed problems only."""

    @abstractmethod
    def feed(self, x: Array) -> None:
        """Put an input (T, N, I) in place; (1, N, I) for a streamed problem."""

    @abstractmethod
    def call(self) -> object:
        """Run once on the input in place: this is what is timed."""

    @abstractmethod
    def fetch(self) -> Results:
        """Return what the latest call left."""


class Engine(ABC):
    """A library set up to run a problem with at most `threads` threads.

    Parameters
    ----------
    problem : Problem
        Weights, input and lengths.
    threads : int
        The most threads it may use.

    Attributes
    ----------
    forms : dict of str to Form
        The ways to run the problem, by name.

    Raises
    ------
    NotImplementedError
        If the library cannot run the problem.
    """

    name: ClassVar[str]
    """What options and the JSON call it."""
    title: ClassVar[str]
    """What tables call it."""
    modules: ClassVar[tuple[str, ...]]
    """Modules it needs, the one with its version first."""
    peer: ClassVar[bool] = True
    """Whether the ratio counts it among those to beat."""
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    """The dtypes it runs LSTMs in."""

    @classmethod
    def available(cls) -> bool:
        """Whether it is installed; nothing is imported to find out."""
        return all(find_spec(module) is not None for module in cls.modules)

    @classmethod
    def version(cls) -> str:
        """Return its version."""
        return str(import_module(cls.modules[0]).__version__)

    def __init__(self, problem: Problem, threads: int) -> None:
        if problem.dtype not in self.dtypes:
            raise NotImplementedError(f"{self.title} runs LSTMs in {' and '.join(self.dtypes)} only")
        self._streamed = problem.streamed
        self.forms = dict(self.make_forms(problem, threads))
        for form in self.forms.values():
            with form.settings():
                form.feed(problem.x[:1] if self._streamed else problem.x)

    @abstractmethod
    def make_forms(self, problem: Problem, threads: int) -> Iterator[tuple[str, Form]]:
        """Offer the ways to run the problem, each with its name."""

    def run(self, form: str, x: Array) -> Results:
        """Run an input through the very call that is timed.

        Parameters
        ----------
        form : str
            Which of `forms`.
        x : numpy.ndarray, (T, N, I)
            As the problem's own. Where that is streamed it goes through step by step from a zero state, and may have
            any number of steps; else its T is the problem's.

        Returns
        -------
        dict of str to numpy.ndarray
            As `Results`.
        """
        chosen = self.forms[form]
        steps = []
        with chosen.settings():
            chosen.reset()
            for part in np.split(x, len(x)) if self._streamed else [x]:
                chosen.feed(part)
                chosen.call()
                steps.append({name: np.array(array) for name, array in chosen.fetch().items()})
        return steps[-1] | ({"output": np.concatenate([step["output"] for step in steps])} if self._streamed else {})

    def time(self, form: str, seconds: float) -> Timing:
        """Time the call of a form, on the input that was put in place last."""
        with self.forms[form].settings():
            return time_calls(self.forms[form].call, seconds)


def thread_counts(threads: int) -> tuple[int, ...]:
    """Return the thread counts that are tried: all that are allowed, and one, which small problems often prefer."""
    return (threads, 1) if threads > 1 else (1,)


def _state_shapes(problem: Problem) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of h_n (L*D, N, P) and c_n (L*D, N, H)."""
    case = problem.case
    return (case.L * case.D, case.N, problem.proj_size or case.H), (case.L * case.D, case.N, case.H)


class FastLSTM(Engine):
    """The layer, with and without a preallocated output; `stream` for a streamed problem."""

    name = "fastlstm"
    title = "fastlstm"
    modules = ("fastlstm",)
    peer = False
    dtypes = ("float32", "float64")

    def make_forms(self, problem: Problem, threads: int) -> Iterator[tuple[str, Form]]:
        """Offer the call with a new output every time, and with `out`."""
        case, lstm = problem.case, fastlstm_layer(problem, threads)
        form = _FastLSTMStep if case.streamed else _FastLSTMSequence
        yield "new output", form(lstm, problem, None)
        steps = 1 if case.streamed else case.T
        out = np.empty((steps, case.N, case.D * (problem.proj_size or case.H)), problem.x.dtype)
        yield "out=", form(lstm, problem, out)


def _settings(problem: Problem) -> dict[str, Any]:
    """Return the arguments of an LSTM, which `fastlstm.LSTM` and `torch.nn.LSTM` name alike."""
    case = problem.case
    sizes = {"input_size": case.I, "hidden_size": case.H, "num_layers": case.L, "proj_size": problem.proj_size}
    return {**sizes, "bias": problem.bias, "bidirectional": case.D == 2}


def fastlstm_layer(problem: Problem, threads: int) -> Any:
    """Return the layer with the problem's weights; its calls may use so many threads."""
    import fastlstm

    fastlstm.set_num_threads(threads)
    lstm = fastlstm.LSTM(**_settings(problem), dtype=problem.x.dtype)
    lstm.load_state_dict(problem.weights)
    return lstm


class _FastLSTMSequence(Form):
    def __init__(self, lstm: Any, problem: Problem, out: Array | None) -> None:
        options = {"lengths": problem.lengths, "out": out}
        self._lstm, self._options = lstm, {name: value for name, value in options.items() if value is not None}
        self._result: Any = None

    def feed(self, x: Array) -> None:
        self._x = x

    def call(self) -> None:
        self._result = self._lstm(self._x, **self._options)

    def fetch(self) -> Results:
        output, (h_n, c_n) = self._result
        return {"output": output, "h_n": h_n, "c_n": c_n}


class _FastLSTMStep(Form):
    def __init__(self, lstm: Any, problem: Problem, out: Array | None) -> None:
        self._stream = lstm.stream(batch_size=problem.case.N)
        self._options = {} if out is None else {"out": out[0]}
        self._y: Any = None

    def reset(self) -> None:
        self._stream.reset()

    def feed(self, x: Array) -> None:
        self._x = x[0]

    def call(self) -> None:
        self._y = self._stream(self._x, **self._options)

    def fetch(self) -> Results:
        h, c = self._stream.state
        return {"output": self._y[None], "h_n": h, "c_n": c}


class NumPy(Engine):
    """``fastlstm.reference``, plain NumPy: one product over all steps for the input, then a loop over time.

    Training is the same call: its problem says that gradients are wanted.
    """

    name = "numpy"
    title = "NumPy"
    modules = ("numpy",)
    peer = False
    dtypes = ("float32", "float64")

    def make_forms(self, problem: Problem, threads: int) -> Iterator[tuple[str, Form]]:
        """Offer the reference, on as many threads as the environment gave to NumPy's matrix product."""
        yield "reference", _NumPyForm(problem)


class _NumPyForm(Form):
    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.reset()

    def reset(self) -> None:
        self._state: Any = None

    def feed(self, x: Array) -> None:
        self._x = x

    def call(self) -> None:
        self._results = run_reference(self._problem, self._problem.weights, self._x, self._state)
        if self._problem.streamed:
            self._state = self._results["h_n"], self._results["c_n"]

    def fetch(self) -> Results:
        return self._results


class PyTorch(Engine):
    """``torch.nn.LSTM`` in inference mode.

    float32 sequences run in oneDNN, which ``nn.LSTM`` chooses by itself. With lengths the batch goes through
    ``pack_padded_sequence`` and back to a padded output inside the timed call: the input comes padded and the output is
    wanted padded, as with the other engines. One streamed step runs ``torch.lstm_cell`` (8 microseconds where
    ``nn.LSTM`` takes 45, at I = H = 32) or ``nn.LSTM``, whichever is faster. ``torch.jit`` made no difference to a
    sequence and was slower for a step.
    """

    name = "torch"
    title = "PyTorch"
    modules = ("torch",)
    dtypes = ("float32", "float64")

    def make_forms(self, problem: Problem, threads: int) -> Iterator[tuple[str, Form]]:
        """Offer `nn.LSTM`, and the cell for a streamed problem, on all threads and on one."""
        import torch

        lstm = torch_layer(problem).eval()
        for count in thread_counts(threads):
            if not problem.case.streamed:
                form = _TorchSequence if problem.lengths is None else _TorchPacked
                yield f"nn.LSTM, threads {count}", form(torch, lstm, problem, count)
                continue
            yield f"nn.LSTM, threads {count}", _TorchStep(torch, lstm, problem, count)
            if not problem.proj_size:
                yield f"lstm_cell, threads {count}", _TorchCell(torch, lstm, problem, count)


def torch_layer(problem: Problem) -> Any:
    """Return the `nn.LSTM` with copies of the problem's weights."""
    import torch

    lstm = torch.nn.LSTM(**_settings(problem), dtype=getattr(torch, problem.dtype))
    lstm.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in problem.weights.items()})
    return lstm


class _TorchSequence(Form):
    def __init__(self, torch: Any, lstm: Any, problem: Problem, threads: int) -> None:
        self._torch, self._lstm, self._problem, self._threads = torch, lstm, problem, threads
        self.reset()

    @contextmanager
    def settings(self) -> Iterator[None]:
        self._torch.set_num_threads(self._threads)
        with self._torch.inference_mode():
            yield

    def feed(self, x: Array) -> None:
        self._x = self._torch.from_numpy(x.copy())

    def call(self) -> None:
        self._output, self._state = self._lstm(self._x)

    def fetch(self) -> Results:
        return dict(zip(OUTPUTS, (array.numpy() for array in (self._output, *self._state)), strict=True))


class _TorchPacked(_TorchSequence):
    def __init__(self, torch: Any, lstm: Any, problem: Problem, threads: int) -> None:
        super().__init__(torch, lstm, problem, threads)
        self._rnn, self._lengths, self._steps = torch.nn.utils.rnn, torch.from_numpy(problem.lengths), problem.case.T

    def call(self) -> None:
        packed = self._rnn.pack_padded_sequence(self._x, self._lengths, enforce_sorted=False)
        packed, self._state = self._lstm(packed)
        self._output, _ = self._rnn.pad_packed_sequence(packed, total_length=self._steps)


class _TorchStep(_TorchSequence):
    def reset(self) -> None:
        shapes = _state_shapes(self._problem)
        self._state = tuple(self._torch.zeros(shape, dtype=self._lstm.weight_ih_l0.dtype) for shape in shapes)

    def call(self) -> None:
        self._output, self._state = self._lstm(self._x, self._state)


class _TorchCell(_TorchStep):
    def reset(self) -> None:
        super().reset()
        h, c = self._state
        self._cell, self._weights = self._torch.lstm_cell, self._lstm.all_weights
        self._states = list(zip(h, c, strict=True))

    def feed(self, x: Array) -> None:
        super().feed(x[0])

    def call(self) -> None:
        x, states, cell = self._x, self._states, self._cell
        for layer, weights in enumerate(self._weights):
            states[layer] = cell(x, states[layer], *weights)
            x = states[layer][0]

    def fetch(self) -> Results:
        h, c = (np.stack([state[index].numpy() for state in self._states]) for index in range(2))
        return {"output": h[-1:], "h_n": h, "c_n": c}


class ONNXRuntime(Engine):
    """A model of ONNX `LSTM` nodes with static shapes in ONNX Runtime, all graph optimisations on.

    Both ``run``, which takes and returns NumPy arrays, and ``run_with_iobinding`` on preallocated buffers are tried. A
    streamed step takes its state as an input and gives it as an output; bound, two sets of buffers take turns, so that
    nothing is copied (5 microseconds where ``run`` takes 8, at I = H = 32).
    """

    name = "onnxruntime"
    title = "ONNX Runtime"
    modules = ("onnxruntime", "onnx")

    def make_forms(self, problem: Problem, threads: int) -> Iterator[tuple[str, Form]]:
        """Offer `run` and bound buffers, on all threads and on one."""
        import onnxruntime

        case = problem.case
        model = build_model(problem, steps=1 if case.streamed else case.T, carry_state=case.streamed)
        for count in thread_counts(threads):
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = count
            options.inter_op_num_threads = 1
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            yield f"IO binding, threads {count}", _OnnxBound(onnxruntime, session, problem)
            yield f"run, threads {count}", _OnnxRun(session, problem)


class _OnnxRun(Form):
    def __init__(self, session: Any, problem: Problem) -> None:
        self._session, self._problem = session, problem
        self._inputs: dict[str, Array] = {}
        if problem.lengths is not None:
            self._inputs["lengths"] = problem.lengths.astype(np.int32)
        self._carry_state = problem.case.streamed
        self.reset()

    def reset(self) -> None:
        if self._carry_state:
            for name, shape in zip(("h_0", "c_0"), _state_shapes(self._problem), strict=True):
                self._inputs[name] = np.zeros(shape, np.float32)

    def feed(self, x: Array) -> None:
        self._inputs["x"] = x

    def call(self) -> None:
        self._outputs = self._session.run(OUTPUTS, self._inputs)
        if self._carry_state:
            self._inputs["h_0"], self._inputs["c_0"] = self._outputs[1:]

    def fetch(self) -> Results:
        return dict(zip(OUTPUTS, self._outputs, strict=True))


class _OnnxBound(Form):
    def __init__(self, onnxruntime: Any, session: Any, problem: Problem) -> None:
        self._run = session.run_with_iobinding
        self._allocate = onnxruntime.OrtValue.ortvalue_from_shape_and_type
        case, steps = problem.case, 1 if problem.case.streamed else problem.case.T
        output = self._allocate((steps, case.N, case.D * case.H), np.float32)
        shapes = _state_shapes(problem)
        states = [[self._allocate(shape, np.float32) for shape in shapes] for _ in range(2 if case.streamed else 1)]
        self._zeros = [np.zeros(shape, np.float32) for shape in shapes]
        self._turns = []  # the binding that ran last comes first
        for before, after in zip(states, reversed(states), strict=True):
            binding = session.io_binding()
            if problem.lengths is not None:
                binding.bind_ortvalue_input("lengths", self._value(problem.lengths.astype(np.int32)))
            if case.streamed:
                for name, value in zip(("h_0", "c_0"), before, strict=True):
                    binding.bind_ortvalue_input(name, value)
            for name, value in zip(OUTPUTS, (output, *after), strict=True):
                binding.bind_ortvalue_output(name, value)
            self._turns.append((binding, (output, *after)))
        self.reset()

    def _value(self, array: Array) -> Any:
        """Copy an array into memory that the library allocated and aligned."""
        value = self._allocate(array.shape, array.dtype)
        value.update_inplace(array)
        return value

    def reset(self) -> None:
        for _, (_, *state) in self._turns:
            for value, zeros in zip(state, self._zeros, strict=True):
                value.update_inplace(zeros)

    def feed(self, x: Array) -> None:
        value = self._value(x)
        for binding, _ in self._turns:
            binding.bind_ortvalue_input("x", value)

    def call(self) -> None:
        self._turns.reverse()
        self._run(self._turns[0][0])

    def fetch(self) -> Results:
        return {name: value.numpy() for name, value in zip(OUTPUTS, self._turns[0][1], strict=True)}


class OpenVINO(Engine):
    """The same ONNX model in OpenVINO: float32 arithmetic, tuned for latency, static shapes.

    Without the precision hint it would compute in bfloat16 where the CPU can. ``infer`` runs on tensors that are
    already in place and hands out views of the results. For a streamed step the state is kept inside the model (9
    microseconds where state as input and output takes 12, at I = H = 32). Threads are not pinned: pinning cost 2
    microseconds a call and gained nothing at any size.
    """

    name = "openvino"
    title = "OpenVINO"
    modules = ("openvino", "onnx")

    @classmethod
    def version(cls) -> str:
        """Return its version without the build number."""
        return super().version().partition("-")[0]

    def make_forms(self, problem: Problem, threads: int) -> Iterator[tuple[str, Form]]:
        """Offer the compiled model, on all threads and on one."""
        import openvino
        from openvino.passes import MakeStateful, Manager

        case = problem.case
        model = build_model(problem, steps=1 if case.streamed else case.T, carry_state=case.streamed)
        for count in thread_counts(threads):
            core = openvino.Core()
            graph = core.read_model(model)
            if case.streamed:
                manager = Manager()
                manager.register_pass(MakeStateful({"h_0": "h_n", "c_0": "c_n"}))
                manager.run_passes(graph)
            settings = {
                "INFERENCE_PRECISION_HINT": "f32",
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": count,
                "ENABLE_CPU_PINNING": False,
            }
            compiled = core.compile_model(graph, "CPU", settings)
            yield f"infer, threads {count}", _OpenVINOForm(openvino, compiled, problem)


class _OpenVINOForm(Form):
    def __init__(self, openvino: Any, compiled: Any, problem: Problem) -> None:
        self._openvino, self._streamed = openvino, problem.case.streamed
        self._request = compiled.create_infer_request()
        if problem.lengths is not None:
            self._request.set_tensor("lengths", openvino.Tensor(problem.lengths.astype(np.int32)))

    def reset(self) -> None:
        self._request.reset_state()

    def feed(self, x: Array) -> None:
        self._request.set_tensor("x", self._openvino.Tensor(x))

    def call(self) -> None:
        self._request.infer(share_inputs=True, share_outputs=True)

    def fetch(self) -> Results:
        if not self._streamed:
            return {name: self._request.get_tensor(name).data for name in OUTPUTS}
        states = sorted((state.name, state.state.data) for state in self._request.query_state())
        (_, c), (_, h) = states
        return {"output": self._request.get_tensor("output").data, "h_n": h, "c_n": c}


_CLASSES: tuple[type[Engine], ...] = (FastLSTM, PyTorch, ONNXRuntime, OpenVINO, NumPy)
ENGINES = {engine.name: engine for engine in _CLASSES}
"""Every engine for inference by its name, in the order of the tables' columns."""
