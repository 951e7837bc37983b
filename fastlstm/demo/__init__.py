"""A small trained LSTM that forecasts the yearly sunspot numbers, shipped with its data.

`sunspots.csv` holds the yearly mean sunspot numbers of 1700 to 2008, public domain, as packaged in
`statsmodels.datasets.sunspots` (source there: NOAA National Geophysical Data Center). `forecaster.safetensors` was
written by `examples/train_sunspots.py`, which never looked at the test years.

A forecast array has shape (K, N): row k holds the forecasts k + 1 years ahead of each of N origins, and an origin n
is a number of years known, so that `forecasts[k, j]` is for `sunspots[origins[j] + k]`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from fastlstm.demo.plots import plot_png, plot_text

if TYPE_CHECKING:
    from fastlstm import Sequential

__all__ = [
    "AR_ORDER",
    "CYCLE",
    "DATA_PATH",
    "HORIZONS",
    "MODEL_PATH",
    "DemoResult",
    "ForecastError",
    "Forecaster",
    "autoregressive",
    "errors_text",
    "fit_autoregression",
    "load_data",
    "load_forecaster",
    "persistence",
    "plot_png",
    "plot_text",
    "run_demo",
    "score",
    "seasonal_naive",
]

DATA_PATH = Path(__file__).with_name("sunspots.csv")
MODEL_PATH = Path(__file__).with_name("forecaster.safetensors")

CYCLE = 11
"""Years in a solar cycle, rounded: the season of the seasonal-naive baseline."""

AR_ORDER = 9
"""Order of the linear baseline: the AIC's choice among 1 to 12 on the training years."""

HORIZONS = (1, 2, 5, 11)
"""Years ahead for which `run_demo` reports errors."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def load_data() -> tuple[Ints, Floats]:
    """Load the yearly sunspot numbers.

    Returns
    -------
    years : (309,) int64
        1700 to 2008.
    sunspots : (309,) float64
        Yearly mean of the daily international sunspot number (version 1).

    Examples
    --------
    >>> years, sunspots = load_data()
    >>> print(years[-1], sunspots[-1])
    2008 2.9
    """
    table = np.loadtxt(DATA_PATH, delimiter=",", skiprows=1, dtype=np.float64)
    return table[:, 0].astype(np.int64), table[:, 1].copy()


@dataclass(frozen=True)
class Forecaster:
    """The trained model with the scaling it was trained on.

    Attributes
    ----------
    model : Sequential
        LSTM and Linear, one number in and one out: from the scaled number of a year to that of the next.
    mean, std : float
        Of the square roots of the training years' numbers.
    train_years, validation_years, test_years : (int, int)
        First and last year of each part. The validation years, the last of the training years, were held out at first,
        to find out for how many epochs to train.
    rmse, mae : dict
        One-step errors on `"train"` and `"test"`, recorded when the model was trained.
    """

    model: Sequential
    mean: float
    std: float
    train_years: tuple[int, int]
    validation_years: tuple[int, int]
    test_years: tuple[int, int]
    rmse: dict[str, float]
    mae: dict[str, float]

    def scale(self, sunspots: Floats) -> NDArray[np.float32]:
        """Turn sunspot numbers into what the model sees: standardised square roots."""
        return ((np.sqrt(sunspots) - self.mean) / self.std).astype(np.float32)

    def unscale(self, scaled: NDArray[np.float32]) -> Floats:
        """Turn what the model says into sunspot numbers, none below zero."""
        root = np.asarray(scaled, np.float64) * self.std + self.mean
        return np.square(np.maximum(root, 0.0))

    def forecast(self, sunspots: Floats, origins: Ints, horizon: int) -> Floats:
        """Forecast from every origin, feeding the model its own output beyond the first year.

        Parameters
        ----------
        sunspots : (T,) float64
        origins : (N,) int64
            Numbers of years known, each in 1..T.
        horizon : int
            Years ahead, K.

        Returns
        -------
        (K, N) float64
        """
        N = len(origins)
        x = np.repeat(self.scale(sunspots)[:, None, None], N, axis=1)
        output, state = self.model(x, lengths=origins)
        stream = self.model.stream(batch_size=N, state=state)
        forecasts = np.empty((horizon, N))
        forecasts[0] = self.unscale(output[origins - 1, np.arange(N), 0])
        for k in range(1, horizon):
            y = stream(self.scale(forecasts[k - 1])[:, None])
            forecasts[k] = self.unscale(y[:, 0])
        return forecasts


def load_forecaster() -> Forecaster:
    """Load the model that ships with the package.

    Returns
    -------
    Forecaster
    """
    from safetensors import safe_open

    import fastlstm

    with safe_open(MODEL_PATH, framework="numpy") as file:
        facts = json.loads(file.metadata()["demo"])
    years = {name: (first, last) for name, (first, last) in facts["years"].items()}
    return Forecaster(
        model=cast("Sequential", fastlstm.load(MODEL_PATH)),
        mean=facts["mean"],
        std=facts["std"],
        train_years=years["train"],
        validation_years=years["validation"],
        test_years=years["test"],
        rmse=facts["rmse"],
        mae=facts["mae"],
    )


def persistence(sunspots: Floats, origins: Ints, horizon: int) -> Floats:
    """Forecast the last known value.

    Parameters
    ----------
    sunspots : (T,) float64
    origins : (N,) int64
    horizon : int
        Years ahead, K.

    Returns
    -------
    (K, N) float64

    Examples
    --------
    >>> persistence(np.array([3.0, 4.0, 5.0]), np.array([2, 3]), 2)
    array([[4., 5.],
           [4., 5.]])
    """
    return np.repeat(sunspots[origins - 1][None], horizon, axis=0)


def seasonal_naive(sunspots: Floats, origins: Ints, horizon: int, period: int = CYCLE) -> Floats:
    """Forecast the latest known value a whole number of periods earlier.

    Parameters
    ----------
    sunspots : (T,) float64
    origins : (N,) int64
        Each at least `period`.
    horizon : int
        Years ahead, K.
    period : int
        Years in a season.

    Returns
    -------
    (K, N) float64

    Examples
    --------
    >>> seasonal_naive(np.array([3.0, 4.0, 5.0]), np.array([2, 3]), 3, period=2)
    array([[3., 4.],
           [4., 5.],
           [3., 4.]])
    """
    ahead = np.arange(horizon)[:, None]
    forecasts: Floats = sunspots[origins - period + ahead % period]
    return forecasts


def fit_autoregression(series: Floats, order: int) -> Floats:
    """Fit `x_t = a_0 + a_1 x_{t-1} + ... + a_p x_{t-p}` by least squares.

    Parameters
    ----------
    series : (T,) float64
    order : int
        Number of lags, p.

    Returns
    -------
    (p + 1,) float64
        a_0 to a_p.

    Examples
    --------
    >>> fit_autoregression(np.array([1.0, 3.0, 7.0, 15.0, 31.0]), 1).round(6)
    array([1., 2.])
    """
    windows = np.lib.stride_tricks.sliding_window_view(series, order + 1)[:, ::-1]
    design = np.hstack([np.ones((len(windows), 1)), windows[:, 1:]])
    return np.asarray(np.linalg.lstsq(design, windows[:, 0], rcond=None)[0], np.float64)


def autoregressive(series: Floats, origins: Ints, horizon: int, coefficients: Floats) -> Floats:
    """Forecast with a linear autoregression, feeding it its own output beyond the first year.

    Parameters
    ----------
    series : (T,) float64
    origins : (N,) int64
        Each at least the order p.
    horizon : int
        Years ahead, K.
    coefficients : (p + 1,) float64
        As from `fit_autoregression`.

    Returns
    -------
    (K, N) float64

    Examples
    --------
    >>> autoregressive(np.array([1.0, 3.0, 7.0]), np.array([2, 3]), 2, np.array([1.0, 2.0]))
    array([[ 7., 15.],
           [15., 31.]])
    """
    order = len(coefficients) - 1
    lags: Floats = series[origins - 1 - np.arange(order)[:, None]]
    forecasts = np.empty((horizon, len(origins)))
    for k in range(horizon):
        forecasts[k] = coefficients[0] + coefficients[1:] @ lags
        lags = np.vstack([forecasts[k], lags[:-1]])
    return forecasts


class ForecastError(NamedTuple):
    """Errors of one method, so many years ahead, in sunspot numbers."""

    method: str
    horizon: int
    rmse: float
    mae: float


def score(
    method: str, forecasts: Floats, origins: Ints, sunspots: Floats, targets: Ints, horizons: tuple[int, ...]
) -> list[ForecastError]:
    """Measure forecasts on the same target years for every horizon.

    Parameters
    ----------
    method : str
        Name of the method.
    forecasts : (K, N) float64
    origins : (N,) int64
        Consecutive, reaching from `targets[0] + 1 - max(horizons)` or earlier to `targets[-1]` or later.
    sunspots : (T,) float64
    targets : (M,) int64
        Indices of the years to be forecast.
    horizons : tuple of int
        Years ahead, each at most K.

    Returns
    -------
    list of ForecastError
        One for each horizon.
    """
    errors = []
    for ahead in horizons:
        error = forecasts[ahead - 1, targets - (ahead - 1) - origins[0]] - sunspots[targets]
        errors.append(ForecastError(method, ahead, float(np.sqrt(np.mean(error**2))), float(np.mean(np.abs(error)))))
    return errors


@dataclass(frozen=True)
class DemoResult:
    """What the demo shows.

    Attributes
    ----------
    years, actual, forecast : (M,)
        The test years, their sunspot numbers, and the model's forecasts one year ahead.
    future_years, future : (K,)
        The years after the data ends, and the model's forecasts for them, fed with its own output.
    errors : tuple of ForecastError
        On the test years, for every method and each of 1, 2, 5 and 11 years ahead.
    forecaster : Forecaster
        The model, to be timed.
    x : (T, 1, 1) float32
        The whole series as the model takes it.
    """

    years: Ints
    actual: Floats
    forecast: Floats
    future_years: Ints
    future: Floats
    errors: tuple[ForecastError, ...]
    forecaster: Forecaster
    x: NDArray[np.float32]


def run_demo(plot: str | None = None) -> DemoResult:
    """Forecast the sunspot numbers of years the model never saw, beside the baselines.

    The autoregressions are fitted on the model's training years, on the numbers as they are and on their square roots.

    Parameters
    ----------
    plot : str, optional
        Where to write a PNG of the result (needs matplotlib).

    Returns
    -------
    DemoResult
    """
    years, sunspots = load_data()
    forecaster = load_forecaster()
    horizon = max(HORIZONS)
    first, last = np.searchsorted(years, forecaster.test_years)
    targets = np.arange(first, last + 1)
    origins = np.arange(first + 1 - horizon, len(years) + 1)

    in_training = years <= forecaster.train_years[1]
    linear = fit_autoregression(sunspots[in_training], AR_ORDER)
    roots = np.sqrt(sunspots)
    linear_of_roots = fit_autoregression(roots[in_training], AR_ORDER)
    forecasts = forecaster.forecast(sunspots, origins, horizon)
    methods = {
        "LSTM": forecasts,
        f"AR({AR_ORDER}) of square roots": np.square(
            np.maximum(autoregressive(roots, origins, horizon, linear_of_roots), 0.0)
        ),
        f"AR({AR_ORDER})": np.maximum(autoregressive(sunspots, origins, horizon, linear), 0.0),
        "seasonal naive": seasonal_naive(sunspots, origins, horizon),
        "persistence": persistence(sunspots, origins, horizon),
    }
    errors = [
        error
        for method, of_method in methods.items()
        for error in score(method, of_method, origins, sunspots, targets, HORIZONS)
    ]
    result = DemoResult(
        years=years[targets],
        actual=sunspots[targets],
        forecast=forecasts[0, targets - origins[0]],
        future_years=years[-1] + 1 + np.arange(horizon),
        future=forecasts[:, -1],
        errors=tuple(errors),
        forecaster=forecaster,
        x=forecaster.scale(sunspots)[:, None, None],
    )
    if plot is not None:
        plot_png(result, plot)
    return result


def errors_text(result: DemoResult) -> str:
    """Lay the errors out as a table of plain text.

    Parameters
    ----------
    result : DemoResult

    Returns
    -------
    str
        A line for each method under two of heading; RMSE and MAE for each horizon.
    """
    horizons = sorted({error.horizon for error in result.errors})
    methods = list(dict.fromkeys(error.method for error in result.errors))
    by_key = {(error.method, error.horizon): error for error in result.errors}
    width = max(map(len, methods))
    lines = [
        " " * width + "".join(f"{f'{ahead} year' + 's' * (ahead > 1) + ' ahead':>16}" for ahead in horizons),
        " " * width + f"{'RMSE':>9}{'MAE':>7}" * len(horizons),
    ]
    for method in methods:
        row = [by_key[method, ahead] for ahead in horizons]
        lines.append(f"{method:<{width}}" + "".join(f"{error.rmse:>9.1f}{error.mae:>7.1f}" for error in row))
    return "\n".join(lines)
