"""The engines for training: a recorded call and every gradient, or the whole step of a language model in PyTorch.

What is timed is a forward pass that may be followed by a backward pass, and the gradients of the input, both initial
states and all weights, from gradients of the output and both final states. What the call before left is dropped first.
Before each call of fastlstm its weights are set again, within the timed call, so that it packs them as it must after
every step of an optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .answers import Results
from .cases import Array, LanguageProblem, Problem
from .engines import Engine, FastLSTM, Form, NumPy, PyTorch, fastlstm_layer, thread_counts, torch_layer

__all__ = ["ENGINES"]

LEARNING_RATE = 1e-5  # so small that the model does not learn its only batch by heart, which would change its numbers


class FastLSTMTraining(FastLSTM):
    """`record` and `backward`; for a language model `fastlstm.torch.accelerate`."""

    def make_forms(self, problem: Problem, threads: int) -> Iterator[tuple[str, Form]]:
        """Offer the one way there is."""
        if isinstance(problem, LanguageProblem):
            import fastlstm
            from fastlstm.torch import accelerate

            fastlstm.set_num_threads(threads)
            yield "accelerate", _LanguageModelStep(accelerate(_language_model(problem)), problem, threads)
        else:
            yield "record, backward", _FastLSTMTraining(fastlstm_layer(problem, threads), problem)


class _FastLSTMTraining(Form):
    def __init__(self, lstm: Any, problem: Problem) -> None:
        self._lstm, self._problem = lstm, problem
        self._tape: Any = None
        self._gradients: Any = None
        assert problem.cotangents is not None
        self._d_output, d_h_n, d_c_n = problem.cotangents
        self._d_state = d_h_n, d_c_n

    def feed(self, x: Array) -> None:
        self._x = x

    def call(self) -> None:
        lstm, problem = self._lstm, self._problem
        self._tape = self._gradients = None
        lstm._set_params(dict(lstm._params))  # the same numbers, to be packed again
        self._tape = lstm.record(self._x, problem.state, lengths=problem.lengths)
        self._gradients = self._tape.backward(self._d_output, self._d_state)

    def fetch(self) -> Results:
        h_n, c_n = self._tape.state
        d_h_0, d_c_0 = self._gradients.state
        results = {"output": self._tape.output, "h_n": h_n, "c_n": c_n, "d_x": self._gradients.x}
        weights = {f"d_{name}": array for name, array in self._gradients.params.items()}
        return results | {"d_h_0": d_h_0, "d_c_0": d_c_0} | weights


class PyTorchTraining(PyTorch):
    """``torch.nn.LSTM`` and ``torch.autograd.grad``, which takes the time of ``backward`` into empty ``.grad``.

    With lengths the batch goes through ``pack_padded_sequence`` and back to a padded output inside the timed call. For
    one step of one direction ``torch.lstm_cell`` is tried too.
    """

    def make_forms(self, problem: Problem, threads: int) -> Iterator[tuple[str, Form]]:
        """Offer `nn.LSTM`, and the cell for a single step, on all threads and on one."""
        for count in thread_counts(threads):
            if isinstance(problem, LanguageProblem):
                yield f"nn.LSTM, threads {count}", _LanguageModelStep(_language_model(problem), problem, count)
                continue
            form = _TorchTraining if problem.lengths is None else _TorchPackedTraining
            yield f"nn.LSTM, threads {count}", form(torch_layer(problem), problem, count)
            if problem.case.streamed and problem.lengths is None and not problem.proj_size:
                yield f"lstm_cell, threads {count}", _TorchCellTraining(torch_layer(problem), problem, count)


class _TorchForm(Form):
    def __init__(self, threads: int) -> None:
        import torch

        self._torch, self._threads = torch, threads

    @contextmanager
    def settings(self) -> Iterator[None]:
        self._torch.set_num_threads(self._threads)
        yield


class _TorchTraining(_TorchForm):
    def __init__(self, lstm: Any, problem: Problem, threads: int) -> None:
        super().__init__(threads)
        from_numpy = self._torch.from_numpy
        assert problem.state is not None
        assert problem.cotangents is not None
        self._lstm, self._names = lstm, list(problem.weights)
        weights = dict(lstm.named_parameters())
        self._weights = [weights[name] for name in self._names]
        self._state = tuple(from_numpy(array.copy()).requires_grad_() for array in problem.state)
        self._cotangents = [from_numpy(array.copy()) for array in problem.cotangents]

    def feed(self, x: Array) -> None:
        self._x = self._torch.from_numpy(x.copy()).requires_grad_()
        self._inputs = [self._x, *self._state, *self._weights]

    def forward(self) -> tuple[Any, Any]:
        return self._lstm(self._x, self._state)  # type: ignore[no-any-return]

    def call(self) -> None:
        self._outputs, self._gradients = [], ()
        output, state = self.forward()
        self._outputs = [output, *state]
        self._gradients = self._torch.autograd.grad(self._outputs, self._inputs, self._cotangents)

    def fetch(self) -> Results:
        names = ["output", "h_n", "c_n", "d_x", "d_h_0", "d_c_0", *(f"d_{name}" for name in self._names)]
        arrays = (tensor.detach().numpy() for tensor in (*self._outputs, *self._gradients))
        return dict(zip(names, arrays, strict=True))


class _TorchPackedTraining(_TorchTraining):
    def __init__(self, lstm: Any, problem: Problem, threads: int) -> None:
        super().__init__(lstm, problem, threads)
        self._lengths, self._steps = self._torch.from_numpy(problem.lengths), problem.case.T

    def forward(self) -> tuple[Any, Any]:
        rnn = self._torch.nn.utils.rnn
        packed = rnn.pack_padded_sequence(self._x, self._lengths, enforce_sorted=False)
        packed, state = self._lstm(packed, self._state)
        return rnn.pad_packed_sequence(packed, total_length=self._steps)[0], state


class _TorchCellTraining(_TorchTraining):
    def forward(self) -> tuple[Any, Any]:
        x, states = self._x[0], []
        for state, weights in zip(zip(*self._state, strict=True), self._lstm.all_weights, strict=True):
            states.append(self._torch.lstm_cell(x, state, *weights))
            x = states[-1][0]
        return x[None], [self._torch.stack(parts) for parts in zip(*states, strict=True)]


def _language_model(problem: LanguageProblem) -> Any:
    """Return an embedding, an LSTM and a linear layer as one module; `_LanguageModelStep.feed` sets the weights."""
    import torch

    case, dtype = problem.case, getattr(torch, problem.dtype)
    layers = {
        "embedding": torch.nn.Embedding(case.V, case.I, dtype=dtype),
        "lstm": torch.nn.LSTM(case.I, case.H, case.L, dtype=dtype),
        "linear": torch.nn.Linear(case.H, case.V, dtype=dtype),
    }
    return torch.nn.ModuleDict(layers)


class _LanguageModelStep(_TorchForm):
    """Loss, gradients, and a step of Adam in its fastest form, whose change of the weights is part of what is timed."""

    def __init__(self, model: Any, problem: LanguageProblem, threads: int) -> None:
        super().__init__(threads)
        self._model, self._problem = model, problem
        self._targets = self._torch.from_numpy(problem.targets).reshape(-1)

    def feed(self, x: Array) -> None:
        torch, weights = self._torch, self._problem.weights
        self._tokens = torch.from_numpy(x)
        self._model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
        self._optimiser = torch.optim.Adam(self._model.parameters(), lr=LEARNING_RATE, fused=True)

    def call(self) -> None:
        self._optimiser.zero_grad()
        model = self._model
        output, _ = model["lstm"](model["embedding"](self._tokens))
        logits = model["linear"](output).reshape(len(self._targets), -1)
        self._loss = self._torch.nn.functional.cross_entropy(logits, self._targets)
        self._loss.backward()
        self._optimiser.step()

    def fetch(self) -> Results:
        gradients = {f"d_{name}": parameter.grad.numpy() for name, parameter in self._model.named_parameters()}
        return {"loss": self._loss.detach().numpy(), **gradients}


class NumPyTraining(NumPy):
    """``fastlstm.reference``, forward and backward."""

    def make_forms(self, problem: Problem, threads: int) -> Iterator[tuple[str, Form]]:
        """Offer the reference."""
        if isinstance(problem, LanguageProblem):
            raise NotImplementedError("there is no language model in plain NumPy")
        yield from super().make_forms(problem, threads)


_CLASSES: tuple[type[Engine], ...] = (FastLSTMTraining, PyTorchTraining, NumPyTraining)
ENGINES = {engine.name: engine for engine in _CLASSES}
"""Every engine for training by its name, in the order of the tables' columns."""
