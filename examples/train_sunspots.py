"""Train the sunspot forecaster that ships with fastlstm.

    python examples/train_sunspots.py [OUTPUT.safetensors]

The years are split in order: 1700-1899 to train on, 1900-1948 to choose by (architecture, noise, seed, when to stop),
1949-2008 to test once, at the end. The model gets the square root of a year's sunspot number, standardised, and answers
with that of the next year; the loss is the squared error in sunspot numbers. Two things keep 200 noisy years from being
learnt by heart: noise on the inputs, and training on copies of the series scaled up or down, which also teaches cycles
larger than any before 1900. The constants below were settled the same way, in earlier runs on the years to 1948.

Needs PyTorch; repeatable for one version of it on one kind of CPU (takes about a minute).
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from fastlstm.demo import (
    AR_ORDER,
    MODEL_PATH,
    autoregressive,
    fit_autoregression,
    load_data,
    persistence,
    seasonal_naive,
)

YEARS = {"train": (1700, 1899), "validation": (1900, 1948), "test": (1949, 2008)}
BURN_IN = 12
"""First years, whose forecasts count neither in the loss nor in the errors: the model has seen too little."""

COPIES = 8
EPOCHS = 400
PATIENCE = 100
LEARNING_RATE = 0.01
WEIGHT_DECAY = 0.01
SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Choice:
    """What is chosen on the validation years; `noise` in standard deviations, `amplitude` in natural logarithms."""

    num_layers: int
    hidden_size: int
    noise: float
    amplitude: float


GRID = [Choice(*values) for values in itertools.product((1, 2), (16, 32), (0.0, 0.1, 0.2, 0.3), (0.0, 0.4))]


class Forecaster(nn.Module):
    """LSTM and Linear over standardised square roots."""

    def __init__(self, choice: Choice, mean: float, std: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, choice.hidden_size, choice.num_layers)
        self.linear = nn.Linear(choice.hidden_size, 1)
        self.mean, self.std = mean, std

    def scale(self, sunspots: Tensor) -> Tensor:
        """Sunspot numbers to model input."""
        return (sunspots.sqrt() - self.mean) / self.std

    def forward(self, x: Tensor) -> Tensor:
        """Scaled numbers (T, N, 1) to the sunspot numbers forecast for the year after each."""
        root: Tensor = self.linear(self.lstm(x)[0]) * self.std + self.mean
        return root.clamp(min=0.0).square()


@dataclass
class Run:
    """One training run, as it was when the validation error was least."""

    choice: Choice
    seed: int
    validation_rmse: float
    epoch: int
    model: Forecaster


def rmse(error: NDArray[np.float64]) -> float:
    """Root of the mean square."""
    return float(np.sqrt(np.mean(error**2)))


def one_step(model: Forecaster, sunspots: NDArray[np.float64]) -> NDArray[np.float64]:
    """Forecasts for every year but the first, each from the years before it."""
    with torch.no_grad():
        x = model.scale(torch.tensor(sunspots[:-1, None, None], dtype=torch.float32))
        forecasts: NDArray[np.float64] = model(x)[:, 0, 0].double().numpy()
    return forecasts


def train(choice: Choice, seed: int, known: NDArray[np.float64], split: int) -> Run:
    """Train on `known[:split]` and stop by the error on `known[split:]`."""
    torch.manual_seed(seed)
    series = torch.tensor(known[:split, None, None], dtype=torch.float32)
    model = Forecaster(choice, float(series.sqrt().mean()), float(series.sqrt().std(correction=0)))
    optimiser = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best = Run(choice, seed, float("inf"), 0, model)
    best_weights: dict[str, Tensor] = {}
    for epoch in range(1, EPOCHS + 1):
        amplitude = choice.amplitude * (2 * torch.rand(1, COPIES, 1) - 1)
        copies = series * amplitude.exp()
        x = model.scale(copies[:-1])
        forecast = model(x + choice.noise * torch.randn_like(x))
        loss = ((forecast - copies[1:])[BURN_IN - 1 :] / series.std()).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        error = rmse(one_step(model, known)[split - 1 :] - known[split:])
        if error < best.validation_rmse:
            best.validation_rmse, best.epoch = error, epoch
            best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        elif epoch - best.epoch >= PATIENCE:
            break
    model.load_state_dict(best_weights)
    return best


def choose(known: NDArray[np.float64], split: int) -> Run:
    """Pick the architecture by its mean validation error over the seeds, then the seed by its own."""
    candidates = []
    for choice in GRID:
        runs = [train(choice, seed, known, split) for seed in SEEDS]
        mean = float(np.mean([run.validation_rmse for run in runs]))
        best = min(runs, key=lambda run: run.validation_rmse)
        print(f"{choice}: validation RMSE {mean:.2f}, best {best.validation_rmse:.2f}", flush=True)
        candidates.append((mean, best))
    return min(candidates, key=lambda candidate: candidate[0])[1]


def baselines(sunspots: NDArray[np.float64], years: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """One-step forecasts of each baseline for every year from the twelfth on, nan before."""
    origins = np.arange(BURN_IN, len(sunspots))
    roots = np.sqrt(sunspots)
    forecasts = {
        "seasonal naive": seasonal_naive(sunspots, origins, 1)[0],
        "persistence": persistence(sunspots, origins, 1)[0],
    }
    for part in ("train", "validation"):
        fitted = years <= YEARS[part][1]
        until = f", fitted to {YEARS[part][1]}"
        linear = fit_autoregression(sunspots[fitted], AR_ORDER)
        linear_of_roots = fit_autoregression(roots[fitted], AR_ORDER)
        forecasts[f"AR({AR_ORDER}){until}"] = np.maximum(autoregressive(sunspots, origins, 1, linear)[0], 0.0)
        forecasts[f"AR({AR_ORDER}) of roots{until}"] = np.square(
            np.maximum(autoregressive(roots, origins, 1, linear_of_roots)[0], 0.0)
        )
    return forecasts


def save(run: Run, rmses: dict[str, float], maes: dict[str, float], path: Path) -> None:
    """Write the weights under the names of `torch.nn.Sequential(LSTM, Linear)`, and what is needed to use them."""
    names = {"lstm": "0", "linear": "1"}
    tensors = {}
    for name, value in run.model.state_dict().items():
        layer, parameter = name.split(".")
        tensors[f"{names[layer]}.{parameter}"] = value
    lstm = run.model.lstm
    layers = [
        {
            "type": "LSTM",
            "input_size": lstm.input_size,
            "hidden_size": lstm.hidden_size,
            "num_layers": lstm.num_layers,
            "bias": lstm.bias,
            "batch_first": lstm.batch_first,
            "dropout": lstm.dropout,
            "bidirectional": lstm.bidirectional,
            "proj_size": lstm.proj_size,
        },
        {"type": "Linear", "in_features": lstm.hidden_size, "out_features": 1, "bias": True},
    ]
    demo = {
        "data": "yearly mean sunspot numbers, 1700-2008",
        "transform": "(sqrt(x) - mean) / std",
        "mean": run.model.mean,
        "std": run.model.std,
        "years": YEARS,
        "rmse": rmses,
        "mae": maes,
        "training": {**asdict(run.choice), "seed": run.seed, "epoch": run.epoch, "torch": torch.__version__},
    }
    metadata = {"fastlstm": "1", "layers": json.dumps(layers), "demo": json.dumps(demo)}
    path.write_bytes(to_bytes(tensors, metadata=metadata))


def main(path: Path) -> None:
    """Choose, test once, print and save."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    years, sunspots = load_data()
    split, end = np.searchsorted(years, [YEARS["validation"][0], YEARS["test"][0]])
    run = choose(sunspots[:end], int(split))
    print(f"chosen: {run.choice}, seed {run.seed}, epoch {run.epoch}\n")

    forecasts = {"LSTM": one_step(run.model, sunspots)[BURN_IN - 1 :], **baselines(sunspots, years)}
    rmses: dict[str, dict[str, float]] = {}
    maes: dict[str, dict[str, float]] = {}
    print(f"{'one year ahead':<32}" + "".join(f"{part:>18}" for part in YEARS))
    print(" " * 32 + f"{'RMSE':>10}{'MAE':>8}" * len(YEARS))
    for method, forecast in forecasts.items():
        error = forecast - sunspots[BURN_IN:]
        of_part = {
            part: error[(years[BURN_IN:] >= first) & (years[BURN_IN:] <= last)] for part, (first, last) in YEARS.items()
        }
        rmses[method] = {part: rmse(values) for part, values in of_part.items()}
        maes[method] = {part: float(np.mean(np.abs(values))) for part, values in of_part.items()}
        row = "".join(f"{rmses[method][part]:>10.2f}{maes[method][part]:>8.2f}" for part in YEARS)
        print(f"{method:<32}{row}")
    save(run, rmses["LSTM"], maes["LSTM"], path)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else MODEL_PATH)
