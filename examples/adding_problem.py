"""Why the LSTM exists: the adding problem, which a plain recurrent network fails and an LSTM solves.

    pip install 'fastlstm[plot]'
    python examples/adding_problem.py [--steps 500]

A sequence holds at each step a random number in [0, 1] and a mark, which is 1 at one step of the first half and at one
step of the second, else 0. Asked for after the last step is the sum of the two marked numbers. Whoever always answers 1
has a mean squared error of 1/6 = 0.167. Both networks have the same task, hidden size, optimiser and number of updates.

The picture shows the errors in training, and how strongly the last output depends on the input so many steps ago: what
gradient descent can learn from. In the plain network this fades with the distance by a factor for each step. In the
LSTM the cell c' = f c + i g carries it along for as long as the forget gate f stays near 1; biases of the gates that
suit the length of the sequences let it start there.

Hochreiter & Schmidhuber 1997, *Long short-term memory*, experiment 4; in the form of Le, Jaitly & Hinton 2015, *A
simple way to initialize recurrent networks of rectified linear units*.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fastlstm import LSTM, Linear, Sequential
from fastlstm.losses import mse
from fastlstm.optim import Adam, clip_grad_norm
from fastlstm.tape import Gradients, Tape

Array = NDArray[np.float32]

BASELINE = 1 / 6
"""Mean squared error of the answer 1: the variance of the sum of two numbers drawn evenly from [0, 1]."""


class Model(Protocol):
    """What is trained here."""

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return copies of the weights."""

    def load_state_dict(self, mapping: Any) -> None:
        """Replace the weights."""

    def __call__(self, x: Array) -> tuple[Array, Any]:
        """Run over x (T, N, 2) and return the output (T, N, 1) and the state."""

    def record(self, x: Array) -> Tape:
        """Run over x and keep what the gradients need."""


class PlainNetwork:
    """A plain recurrent network under a linear layer, in NumPy.

    h_t = tanh(W_ih x_t + W_hh h_{t-1} + b), y_t = V h_t + a. Weights start out as those of `torch.nn.RNN`.
    """

    def __init__(self, hidden_size: int, rng: np.random.Generator) -> None:
        H = hidden_size
        shapes = {"w_ih": (H, 2), "w_hh": (H, H), "b": (H,), "v": (1, H), "a": (1,)}
        bound = np.float32(1 / np.sqrt(H))
        self.load_state_dict({name: bound * rng.uniform(-1, 1, shape).astype("f4") for name, shape in shapes.items()})

    def state_dict(self) -> dict[str, Array]:
        """Return copies of the weights."""
        return {name: array.copy() for name, array in self.weights.items()}

    def load_state_dict(self, mapping: dict[str, Array]) -> None:
        """Replace the weights."""
        self.weights = {name: array.copy() for name, array in mapping.items()}

    def __call__(self, x: Array) -> tuple[Array, None]:
        """Run over x (T, N, 2) and return the output (T, N, 1)."""
        return self.record(x).output, None

    def record(self, x: Array) -> Tape:
        """Run over x and keep what the gradients need."""
        (T, N, _), w = x.shape, self.weights
        H = len(w["b"])
        h = np.zeros((T + 1, N, H), x.dtype)  # h[0] is the state before the first step
        z_x = x @ w["w_ih"].T + w["b"]
        for t in range(T):
            np.tanh(z_x[t] + h[t] @ w["w_hh"].T, out=h[t + 1])

        def backward(d_y: Array, d_state: None) -> Gradients:
            d_h = d_y @ w["v"]
            d_z = np.empty((T, N, H), x.dtype)
            for t in reversed(range(T)):
                d_z[t] = d_h[t] * (1 - h[t + 1] ** 2)
                if t:
                    d_h[t - 1] += d_z[t] @ w["w_hh"]
            rows, d_rows = h[1:].reshape(T * N, H), d_z.reshape(T * N, H)
            d_w = {
                "w_ih": d_rows.T @ x.reshape(T * N, 2),
                "w_hh": d_rows.T @ h[:-1].reshape(T * N, H),
                "b": d_rows.sum(axis=0),
                "v": d_y.reshape(T * N, 1).T @ rows,
                "a": d_y.sum(axis=(0, 1)),
            }
            return Gradients(d_z @ w["w_ih"], None, d_w)

        return Tape(h[1:] @ w["v"].T + w["a"], None, backward)


def make_lstm(hidden_size: int, steps: int, rng: np.random.Generator, forget_only: bool = False) -> Sequential:
    """Return an LSTM whose units remember for 1 to T steps to begin with, under a linear layer.

    A forget gate of sigmoid(b) keeps 1/e over about exp(b) steps: b = log(uniform(1, T)), and -b is the bias of the
    input gate, so that a unit that remembers for long fills up as slowly (Tallec & Ollivier 2018, *Can recurrent neural
    networks warp time?*). In the paper of 1997, too, the input gates are nearly closed at first, against the drift of
    the cells. With `forget_only` these keep their bias, and the units remember for 1 to T / 2 steps.
    """
    lstm = LSTM(2, hidden_size, rng=rng)
    bias = lstm.state_dict()["bias_ih_l0"]
    b = np.log(rng.uniform(1, steps / 2 if forget_only else steps, hidden_size))
    bias[hidden_size : 2 * hidden_size] = b
    if not forget_only:
        bias[:hidden_size] = -b
    lstm.load_state_dict({"bias_ih_l0": bias}, strict=False)
    return Sequential(lstm, Linear(hidden_size, 1, rng=rng))


def make_batch(steps: int, rows: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw sequences x (T, N, 2), numbers and marks, and their answers (N, 1)."""
    x = np.zeros((steps, rows, 2), np.float32)
    x[:, :, 0] = rng.random((steps, rows), np.float32)
    row, half = np.arange(rows), steps // 2
    marked = rng.integers(0, half, rows), rng.integers(half, steps, rows)
    for t in marked:
        x[t, row, 1] = 1
    return x, sum(x[t, row, 0] for t in marked)[:, None]


def train(model: Model, name: str, options: argparse.Namespace, updates: int, lr: float) -> list[tuple[int, float]]:
    """Train until the test error is below the goal, for so many updates at most.

    Returns
    -------
    list of (int, float)
        Updates done, and mean squared error on 1000 sequences that are not trained on.
    """
    x_test, y_test = make_batch(options.steps, 1000, np.random.default_rng(1))
    rng = np.random.default_rng(2)
    optimiser = Adam(model, lr=lr)
    errors, start = [], time.perf_counter()
    for update in range(updates + 1):
        if update % options.every == 0 or update == updates:
            error, _ = mse(model(x_test)[0][-1], y_test)
            errors.append((update, error))
            print(f"{name:>6}, {update:5} updates, {time.perf_counter() - start:5.0f} s: error {error:.5f}", flush=True)
            if error < options.goal:
                break
        x, y = make_batch(options.steps, options.batch, rng)
        tape = model.record(x)
        _, d_last = mse(tape.output[-1], y)
        d_output = np.zeros_like(tape.output)
        d_output[-1] = d_last
        grads = tape.backward(d_output)
        clip_grad_norm(grads, 1.0)
        optimiser.step(grads)
    return errors


def sensitivity(model: Model, steps: int) -> NDArray[np.float64]:
    """Return the norm of the gradient of the last output with respect to the input k steps before, k = 0 ... T - 1.

    The root of the mean square over 1000 sequences.
    """
    rng, squares = np.random.default_rng(3), np.zeros(steps)
    for _ in range(10):
        x, _ = make_batch(steps, 100, rng)
        tape = model.record(x)
        d_output = np.zeros_like(tape.output)
        d_output[-1] = 1
        d_x = tape.backward(d_output).x.astype(np.float64)
        squares += (d_x**2).sum(axis=2).mean(axis=1) / 10
    return np.sqrt(squares)[::-1]


def plot(results: dict[str, dict[str, Any]], steps: int, path: Path) -> None:
    """Draw errors and gradients."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.2), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, result), color in zip(results.items(), ("#c0392b", "#1f4e79"), strict=False):
        left.plot(*zip(*result["errors"], strict=True), "-o", color=color, markersize=3, label=name)
        right.plot(result["before"], "--", color=color, linewidth=1.2, label=f"{name}, before training")
        right.plot(result["after"], color=color, linewidth=1.2, label=f"{name}, after")
    left.axhline(BASELINE, color="0.5", linewidth=1, linestyle=":")
    left.text(0.3, BASELINE * 0.9, "the answer 1", color="0.4", transform=left.get_yaxis_transform(), va="top")
    left.set(
        yscale="log", xlabel="updates", ylabel="mean squared error", title=f"The adding problem over {steps} steps"
    )
    right.set(yscale="log", xlabel="steps between the input and the last output", ylabel="norm of the gradient")
    right.set_ylim(1e-15, None)
    right.set_title("How strongly the last output depends on the input")
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--steps", type=int, default=200, help="length of the sequences; default %(default)s")
    add("--hidden", type=int, default=64, help="hidden size; default %(default)s")
    add("--batch", type=int, default=32, help="sequences in an update; default %(default)s")
    add("--lr", type=float, default=0.01, help="learning rate; default %(default)s")
    add("--updates", type=int, default=6000, help="at most; default %(default)s")
    add("--every", type=int, default=50, help="updates between tests; default %(default)s")
    add("--goal", type=float, default=0.005, help="error at which to stop; default %(default)s")
    add("--seed", type=int, default=0, help="of the weights; default %(default)s")
    add("--forget-only", action="store_true", help="bias the forget gates alone: learns later, best with --batch 64")
    add("--plot", type=Path, metavar="FILE.png", help="default adding_problem_STEPS.png")
    options = parser.parse_args(arguments)
    for name, least in {"steps": 2, "hidden": 1, "batch": 1, "updates": 1, "every": 1}.items():
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(options, name)}")
    options.plot = options.plot or Path(f"adding_problem_{options.steps}.png")
    if not options.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {options.plot.parent}")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train both networks, print, draw."""
    options = parse(arguments)
    T, H = options.steps, options.hidden
    results: dict[str, dict[str, Any]] = {}
    updates = options.updates
    for name in ("LSTM", "plain"):
        rng = np.random.default_rng(options.seed)
        model: Model = make_lstm(H, T, rng, options.forget_only) if name == "LSTM" else PlainNetwork(H, rng)
        before = sensitivity(model, T)
        lr = options.lr if name == "LSTM" else options.lr / 10  # at the LSTM's the plain network's error jumps about
        errors = train(model, name, options, updates, lr)
        updates = errors[-1][0]  # the plain network gets as many as the LSTM took
        results[name] = {"errors": errors, "before": before, "after": sensitivity(model, T)}
    for name, result in results.items():
        update, error = result["errors"][-1]
        print(f"{name}: mean squared error {error:.4f} after {update} updates; the answer 1 has {BASELINE:.4f}")
    plot(results, T, options.plot)
    return results


if __name__ == "__main__":
    main()
