"""Train the sunspot forecaster that ships with fastlstm.

    pip install 'fastlstm[train]'
    python examples/train_sunspots.py [OUTPUT.safetensors]

The model gets the square root of a year's sunspot number, standardised, and answers with that of the next year; the
loss is the squared error in sunspot numbers. With each of some seeds it learns the years 1700-1899 and stops where its
errors 1, 2, 5 and 11 years ahead on 1900-1948 are least. Then it learns 1700-1948 from the start, with the best of the
seeds and for as many epochs, and is saved. The years 1949-2008 are looked at once, at the end.

Three things keep 200 noisy years from being learnt by heart: noise on the inputs, training on copies of the series
scaled up or down, which also teaches cycles larger than any before, and keeping not the weights of an epoch but their
running average. All settings were chosen on the years to 1948.

It can be killed at any moment: the same command goes on from the checkpoint beside OUTPUT, to the same bits as if it
had never been interrupted. OUTPUT.png gets the loss curves. Repeatable on one kind of CPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

import fastlstm
from fastlstm import demo
from fastlstm.losses import mse
from fastlstm.optim import Adam, clip_grad_norm

VALIDATION = (1900, 1948)
YEARS = {"train": (1700, VALIDATION[1]), "test": (1949, 2008)}
BURN_IN = 12
"""First years, whose forecasts count neither in the loss nor in the errors: the model has seen too little."""

COPIES = 8
LEARNING_RATE = 0.01
WEIGHT_DECAY = 0.01
DECAY = 0.97
"""Of the running average of the weights, in an epoch."""

Floats = NDArray[np.float64]


class Run:
    """The training of one network, in which an epoch is one step of the optimiser."""

    def __init__(self, options: argparse.Namespace, seed: int, sunspots: Floats, split: int, epochs: int) -> None:
        """Prepare to train on `sunspots[:split]` for so many epochs, fewer where there is more to validate on."""
        self.options, self.seed, self.epochs = options, seed, epochs
        self.sunspots, self.series = sunspots, sunspots[:split]
        self.rng = np.random.default_rng(seed)
        lstm = fastlstm.LSTM(1, options.hidden, options.layers, rng=self.rng)
        self.model = fastlstm.Sequential(lstm, fastlstm.Linear(options.hidden, 1, rng=self.rng))
        self.optimiser = Adam(self.model, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        roots = np.sqrt(self.series)
        averaged = copy.deepcopy(self.model)
        self.forecaster = demo.Forecaster(
            averaged, float(roots.mean()), float(roots.std()), YEARS["train"], VALIDATION, YEARS["test"], {}, {}
        )
        self.curve = np.empty((0, 3))
        """After each epoch RMSE on the copies trained on, on the validation years, and there over all horizons."""

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.curve)

    @property
    def validates(self) -> bool:
        """Whether there are years after those trained on."""
        return len(self.series) < len(self.sunspots)

    @property
    def best_epoch(self) -> int:
        """The epoch with the least validation error, from 1; the last one where there is nothing to validate on."""
        if not self.epoch or not self.validates:
            return self.epoch
        return int(self.curve[:, 2].argmin()) + 1

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the validation error has not fallen for long."""
        return self.epoch == self.epochs or self.epoch - self.best_epoch == self.options.patience

    def train_epoch(self) -> None:
        """Take one step of the optimiser, and measure the validation errors."""
        amplitude = self.options.amplitude * (2 * self.rng.random((1, COPIES, 1)) - 1)
        copies = self.series[:, None, None] * np.exp(amplitude)
        x = self.forecaster.scale(copies[:-1])
        x += np.float32(self.options.noise) * self.rng.standard_normal(x.shape, np.float32)

        tape = self.model.record(x)
        loss, d_output = self.loss(tape.output, copies)
        grads = tape.backward(d_output)
        clip_grad_norm(grads, 1.0)
        self.optimiser.step(grads)

        averaged, weights = self.forecaster.model, self.model.state_dict()
        decay = np.float32(min(DECAY, (1 + self.epoch) / (10 + self.epoch)))
        averaged.load_state_dict(
            {name: decay * old + (1 - decay) * weights[name] for name, old in averaged.state_dict().items()}
        )
        errors = self.validation_errors()
        self.curve = np.vstack([self.curve, [np.sqrt(loss) * self.series.std(), errors[0], np.mean(errors)]])

    def loss(self, output: NDArray[Any], copies: Floats) -> tuple[float, NDArray[Any]]:
        """Return the squared error in units of the series' variance, and its gradient.

        The model answers with the square root of a forecast, standardised; a negative root counts as zero.
        """
        mean, std, unit = self.forecaster.mean, self.forecaster.std, self.series.std()
        root = np.maximum(output[BURN_IN - 1 :].astype(np.float64) * std + mean, 0.0)
        loss, d_forecast = mse(root**2 / unit, copies[BURN_IN:] / unit)
        d_output = np.zeros_like(output)
        d_output[BURN_IN - 1 :] = d_forecast / unit * 2 * root * std
        return loss, d_output

    def validation_errors(self) -> list[float]:
        """Return the RMSE of each of the demo's horizons on the years after those trained on; nan if there are none."""
        split, end, horizon = len(self.series), len(self.sunspots), max(demo.HORIZONS)
        if not self.validates:
            return [np.nan]
        origins = np.arange(split + 1 - horizon, end + 1)
        forecasts = self.forecaster.forecast(self.sunspots, origins, horizon)
        errors = demo.score("LSTM", forecasts, origins, self.sunspots, np.arange(split, end), demo.HORIZONS)
        return [error.rmse for error in errors]

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Return all that is needed to go on, but for the state of the random numbers."""
        averaged = {f"averaged.{name}": array for name, array in self.forecaster.model.state_dict().items()}
        return self.model.state_dict() | self.optimiser.state_dict() | averaged | {"curve": self.curve}

    def load_state_dict(self, tensors: dict[str, NDArray[Any]]) -> None:
        """Go on from there."""
        names = self.model.state_dict()
        self.model.load_state_dict({name: tensors[name] for name in names})
        self.forecaster.model.load_state_dict({name: tensors[f"averaged.{name}"] for name in names})
        self.optimiser.load_state_dict(tensors)
        self.curve = tensors["curve"]


class Training:
    """A run with each seed, to choose one and when to stop, and a last run on all years known."""

    def __init__(self, options: argparse.Namespace, sunspots: Floats, split: int) -> None:
        """Begin, or go on from the checkpoint."""
        self.options, self.sunspots, self.split = options, sunspots, split
        self.path = options.output.with_suffix(".checkpoint")
        self.runs: list[Run] = []
        if self.path.exists():
            self._load()
        else:
            self._begin_run()

    @property
    def best(self) -> int:
        """Which of the runs with validation years had the least error."""
        return int(np.argmin([run.curve[:, 2].min() for run in self.runs[: len(self.options.seeds)]]))

    @property
    def settings(self) -> dict[str, Any]:
        """What two commands must have in common for one to go on where the other was."""
        return {name: value for name, value in vars(self.options).items() if name not in ("output", "save_every")}

    def save(self) -> None:
        """Write the checkpoint. There is a whole one at any moment: the old one until the new one takes its place."""
        tensors = {f"{k}.{name}": array for k, run in enumerate(self.runs) for name, array in run.state_dict().items()}
        progress = {"settings": self.settings, "rng": [run.rng.bit_generator.state for run in self.runs]}
        contents = safetensors.numpy.save(tensors, {"train_sunspots": json.dumps(progress)})
        new = self.path.with_suffix(".checkpoint.new")
        with open(new, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)

    def _load(self) -> None:
        remedy = "delete it to begin anew, or name another OUTPUT"
        try:
            with safe_open(self.path, framework="numpy") as file:
                progress = json.loads((file.metadata() or {}).get("train_sunspots", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"{self.path}: not a checkpoint, or one cut short ({error}); {remedy}") from None
        found = progress.get("settings", {})
        for name, value in self.settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"{self.path}: the checkpoint of another model, {name} {found.get(name)} and not {value}; {remedy}"
                )
        for k, state in enumerate(progress["rng"]):
            run = self._begin_run()
            run.load_state_dict({name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{k}.")})
            run.rng.bit_generator.state = state

    def _begin_run(self) -> Run:
        options, k = self.options, len(self.runs)
        if k < len(options.seeds):
            run = Run(options, options.seeds[k], self.sunspots, self.split, options.epochs)
        else:
            epochs = self.runs[self.best].best_epoch
            run = Run(options, options.seeds[self.best], self.sunspots, len(self.sunspots), epochs)
        self.runs.append(run)
        return run

    def finish(self) -> demo.Forecaster:
        """Do what is left, and return what the last run has trained."""
        from tqdm import tqdm

        count = len(self.options.seeds) + 1
        with tqdm(initial=sum(run.epoch for run in self.runs), unit=" epochs") as bar:
            while True:
                run = self.runs[-1]
                bar.set_description(f"run {len(self.runs)} of {count}", refresh=False)
                while not run.finished:
                    run.train_epoch()
                    bar.set_postfix(RMSE=f"{run.curve[-1, 2 if run.validates else 0]:.1f}", refresh=False)
                    bar.update()
                    if run.epoch % self.options.save_every == 0:
                        self.save()
                if len(self.runs) == count:
                    return run.forecaster
                self._begin_run()
                self.save()


def rmse(error: Floats) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(error**2)))


def one_step_forecasts(forecaster: demo.Forecaster, sunspots: Floats, fitted: int) -> dict[str, Floats]:
    """Return the forecasts of every method for every year from the twelfth on, each from the years before it."""
    origins = np.arange(BURN_IN, len(sunspots))
    roots = np.sqrt(sunspots)
    linear = demo.fit_autoregression(sunspots[:fitted], demo.AR_ORDER)
    linear_of_roots = demo.fit_autoregression(roots[:fitted], demo.AR_ORDER)
    root_forecasts = demo.autoregressive(roots, origins, 1, linear_of_roots)
    return {
        "LSTM": forecaster.forecast(sunspots, origins, 1)[0],
        f"AR({demo.AR_ORDER}) of square roots": np.maximum(root_forecasts, 0.0)[0] ** 2,
        f"AR({demo.AR_ORDER})": np.maximum(demo.autoregressive(sunspots, origins, 1, linear)[0], 0.0),
        "seasonal naive": demo.seasonal_naive(sunspots, origins, 1)[0],
        "persistence": demo.persistence(sunspots, origins, 1)[0],
    }


def plot_curves(training: Training, path: Path) -> None:
    """Draw the loss curves of the runs with validation years, that of the chosen one wider, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    labels = ("training: noisy copies, a year ahead", "validation, a year ahead", "validation, 1 to 11 years ahead")
    for k, run in enumerate(training.runs[:-1]):
        epochs, width = np.arange(1, run.epoch + 1), 1.5 if k == training.best else 0.4
        for errors, label, color in zip(run.curve.T, labels, ("#1f4e79", "#d68910", "#c0392b"), strict=True):
            axes.plot(epochs, errors, color=color, linewidth=width, label=label if k == training.best else None)
    run = training.runs[training.best]
    least = run.curve[run.best_epoch - 1, 2]
    axes.plot(run.best_epoch, least, "o", color="#c0392b", label=f"chosen: seed {run.seed}, epoch {run.best_epoch}")
    axes.set_xlabel("epoch")
    axes.set_ylabel("RMSE, sunspot numbers")
    axes.set_ylim(bottom=0.0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def positive(text: str) -> int:
    """Return a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("output", nargs="?", type=Path, default=Path("forecaster.safetensors"), help="default %(default)s")
    add("--layers", type=positive, default=1, help="default %(default)s")
    add("--hidden", type=positive, default=32, help="hidden size; default %(default)s")
    add("--noise", type=float, default=0.1, help="in standard deviations; default %(default)s")
    add("--amplitude", type=float, default=0.4, help="largest logarithm of the scale of a copy; default %(default)s")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="to choose from; default 0 1 2 3")
    add("--epochs", type=positive, default=400, help="at most; default %(default)s")
    add("--patience", type=positive, default=100, help="epochs without a new least error; default %(default)s")
    add("--save-every", type=positive, default=20, help="epochs between checkpoints; default %(default)s")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, test once, print and save."""
    options = parse(arguments)
    fastlstm.set_num_threads(1)  # so small a network gains little from more
    years, sunspots = demo.load_data()
    split, known = (int(n) for n in np.searchsorted(years, [VALIDATION[0], YEARS["test"][0]]))
    training = Training(options, sunspots[:known], split)
    forecaster = training.finish()

    rmses: dict[str, dict[str, float]] = {}
    maes: dict[str, dict[str, float]] = {}
    print(
        f"{'one year ahead':<24}" + "".join(f"{f'{part} {first}-{last}':>18}" for part, (first, last) in YEARS.items())
    )
    print(" " * 24 + f"{'RMSE':>11}{'MAE':>7}" * len(YEARS))
    for method, forecast in one_step_forecasts(forecaster, sunspots, known).items():
        error = forecast - sunspots[BURN_IN:]
        of_part = {
            part: error[(years[BURN_IN:] >= first) & (years[BURN_IN:] <= last)] for part, (first, last) in YEARS.items()
        }
        rmses[method] = {part: rmse(values) for part, values in of_part.items()}
        maes[method] = {part: float(np.mean(np.abs(values))) for part, values in of_part.items()}
        print(f"{method:<24}" + "".join(f"{rmses[method][part]:>11.1f}{maes[method][part]:>7.1f}" for part in YEARS))

    facts = {
        "data": "yearly mean sunspot numbers, 1700-2008",
        "transform": "(sqrt(x) - mean) / std",
        "mean": forecaster.mean,
        "std": forecaster.std,
        "years": {**YEARS, "validation": VALIDATION},
        "rmse": rmses["LSTM"],
        "mae": maes["LSTM"],
        "training": {
            **training.settings,
            "seed": training.runs[-1].seed,
            "epoch": training.runs[-1].epoch,
            "fastlstm": fastlstm.__version__,
        },
    }
    plot_curves(training, options.output.with_suffix(".png"))
    fastlstm.save(forecaster.model, options.output, metadata={"demo": json.dumps(facts)})
    training.path.unlink(missing_ok=True)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"train_sunspots.py: {error}")
