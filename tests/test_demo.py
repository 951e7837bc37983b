"""The packaged data, the baselines, the shipped forecaster and its pictures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from fastlstm import demo


@pytest.fixture(scope="module")
def result() -> demo.DemoResult:
    return demo.run_demo()


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def errors_of(result: demo.DemoResult, method: str) -> dict[int, demo.ForecastError]:
    return {error.horizon: error for error in result.errors if error.method == method}


# data


def test_data_is_intact() -> None:
    years, sunspots = demo.load_data()
    np.testing.assert_array_equal(years, np.arange(1700, 2009))
    known = {1700: 5.0, 1712: 0.0, 1778: 154.4, 1816: 45.8, 1957: 190.2, 2008: 2.9}
    assert {year: sunspots[years == year].item() for year in known} == known
    assert sunspots.shape == (309,)
    assert sunspots.sum() == pytest.approx(15373.4)


# baselines


def test_persistence() -> None:
    forecasts = demo.persistence(np.array([3.0, 1.0, 4.0, 1.5]), np.array([1, 3]), 2)
    np.testing.assert_array_equal(forecasts, [[3.0, 4.0], [3.0, 4.0]])


def test_seasonal_naive_repeats_the_last_known_season() -> None:
    forecasts = demo.seasonal_naive(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([3, 5]), 4, period=3)
    np.testing.assert_array_equal(forecasts, [[1.0, 3.0], [2.0, 4.0], [3.0, 5.0], [1.0, 3.0]])


def test_fit_autoregression_recovers_coefficients() -> None:
    series = [1.0, 2.0]
    for _ in range(8):
        series.append(3.0 + 0.5 * series[-1] - 0.8 * series[-2])
    np.testing.assert_allclose(demo.fit_autoregression(np.array(series), 2), [3.0, 0.5, -0.8], rtol=1e-9)


def test_fit_autoregression_is_least_squares() -> None:
    # y = (2, 4, 0) on x = (0, 2, 4), both of mean 2: slope = (0 + 0 - 4) / (4 + 0 + 4), intercept = 2 + 0.5 * 2
    np.testing.assert_allclose(demo.fit_autoregression(np.array([0.0, 2.0, 4.0, 0.0]), 1), [3.0, -0.5], rtol=1e-12)


@pytest.mark.parametrize("transform", [np.asarray, np.sqrt], ids=["numbers", "roots"])
def test_autoregressive_order_is_the_choice_of_aic(transform: Callable[[np.ndarray], np.ndarray]) -> None:
    years, sunspots = demo.load_data()
    series = transform(sunspots[years <= demo.load_forecaster().train_years[1]])
    origins = np.arange(12, len(series))
    aic = {}
    for order in range(1, 13):
        coefficients = demo.fit_autoregression(series[12 - order :], order)
        error = demo.autoregressive(series, origins, 1, coefficients)[0] - series[12:]
        aic[order] = len(error) * np.log(np.mean(error**2)) + 2 * (order + 1)
    assert min(aic, key=aic.__getitem__) == demo.AR_ORDER


def test_autoregressive_feeds_its_own_output() -> None:
    # x_t = 1 + 2 x_{t-1} - x_{t-2}: (0, 1) -> 3 -> 6 -> 10, and (1, 5) -> 10 -> 16 -> 23
    forecasts = demo.autoregressive(np.array([0.0, 1.0, 5.0]), np.array([2, 3]), 3, np.array([1.0, 2.0, -1.0]))
    np.testing.assert_array_equal(forecasts, [[3.0, 10.0], [6.0, 16.0], [10.0, 23.0]])


def test_score_pairs_forecasts_with_their_years() -> None:
    sunspots = np.array([0.0, 0.0, 10.0, 20.0])
    forecasts = np.array([[99.0, 13.0, 24.0], [14.0, 18.0, 99.0]])
    errors = demo.score("m", forecasts, np.array([1, 2, 3]), sunspots, np.array([2, 3]), (1, 2))
    assert errors == [demo.ForecastError("m", 1, 12.5**0.5, 3.5), demo.ForecastError("m", 2, 10.0**0.5, 3.0)]


# the shipped model


def test_shipped_file_holds_what_its_metadata_says() -> None:
    metadata, tensors = read(demo.MODEL_PATH)
    lstm, linear = json.loads(metadata["layers"])
    H, L = lstm["hidden_size"], lstm["num_layers"]
    shapes = {"1.weight": (1, H), "1.bias": (1,)}
    for layer in range(L):
        shapes[f"0.weight_ih_l{layer}"] = (4 * H, H if layer else 1)
        shapes[f"0.weight_hh_l{layer}"] = (4 * H, H)
        shapes[f"0.bias_ih_l{layer}"] = shapes[f"0.bias_hh_l{layer}"] = (4 * H,)
    assert {name: tensor.shape for name, tensor in tensors.items()} == shapes
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    assert metadata["fastlstm"] == "1"
    assert lstm == {
        "type": "LSTM",
        "input_size": 1,
        "hidden_size": H,
        "num_layers": L,
        "bias": True,
        "batch_first": False,
        "dropout": 0.0,
        "bidirectional": False,
        "proj_size": 0,
    }
    assert linear == {"type": "Linear", "in_features": H, "out_features": 1, "bias": True}


def test_shipped_model_loads_with_its_weights() -> None:
    forecaster = demo.load_forecaster()
    _, tensors = read(demo.MODEL_PATH)
    weights = forecaster.model.state_dict()
    assert weights.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(weights[name], tensor)
    assert forecaster.train_years == (1700, 1948)
    assert forecaster.validation_years == (1900, 1948)
    assert forecaster.test_years == (1949, 2008)


def test_scaling_is_that_of_the_training_years() -> None:
    forecaster = demo.load_forecaster()
    years, sunspots = demo.load_data()
    scaled = forecaster.scale(sunspots)
    assert scaled.dtype == np.float32
    in_training = scaled[years <= forecaster.train_years[1]]
    assert in_training.mean() == pytest.approx(0.0, abs=1e-6)
    assert in_training.std() == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(forecaster.unscale(scaled), sunspots, rtol=1e-5, atol=1e-5)
    assert forecaster.unscale(np.array([-100.0], np.float32)) == 0.0


@pytest.mark.parametrize("part", ["train", "test"])
def test_recorded_errors_are_reproduced(part: str) -> None:
    forecaster = demo.load_forecaster()
    years, sunspots = demo.load_data()
    first, last = getattr(forecaster, f"{part}_years")
    targets = np.flatnonzero((years >= max(first, 1712)) & (years <= last))  # the first 12 years are burn-in
    forecasts = forecaster.forecast(sunspots, targets, 1)
    (error,) = demo.score("LSTM", forecasts, targets, sunspots, targets, (1,))
    # float32 round-off of two implementations: about 1e-6 of a forecast
    assert error.rmse == pytest.approx(forecaster.rmse[part], rel=1e-4)
    assert error.mae == pytest.approx(forecaster.mae[part], rel=1e-4)


def test_forecasts_do_not_see_the_future() -> None:
    forecaster = demo.load_forecaster()
    _, sunspots = demo.load_data()
    origins = np.array([100, 250])
    altered = sunspots.copy()
    altered[250:] = 50.0
    forecasts = forecaster.forecast(sunspots, origins, 3)
    np.testing.assert_array_equal(forecaster.forecast(altered, origins, 3), forecasts)
    altered[249] += 50.0
    assert np.all(forecaster.forecast(altered, origins, 3)[:, 1] != forecasts[:, 1])


def test_streaming_year_by_year_forecasts_the_same(result: demo.DemoResult) -> None:
    forecaster = result.forecaster
    stream = forecaster.model.stream()
    one_step = [forecaster.unscale(stream(x))[0, 0] for x in result.x]
    future = [one_step[-1]]
    while len(future) < len(result.future):
        future.append(forecaster.unscale(stream(forecaster.scale(np.array([[future[-1]]]))))[0, 0])
    # float32 round-off at worst, fed back eleven times
    np.testing.assert_allclose(one_step[-61:-1], result.forecast, rtol=1e-4)
    np.testing.assert_allclose(future, result.future, rtol=1e-3)


# the demo


def test_demo_covers_the_test_years_and_the_next_cycle(result: demo.DemoResult) -> None:
    years, sunspots = demo.load_data()
    np.testing.assert_array_equal(result.years, np.arange(1949, 2009))
    np.testing.assert_array_equal(result.actual, sunspots[-60:])
    np.testing.assert_array_equal(result.future_years, np.arange(2009, 2020))
    assert result.forecast.shape == result.actual.shape
    assert result.future.shape == result.future_years.shape
    assert result.x.shape == (len(years), 1, 1)
    assert result.x.dtype == np.float32


def test_demo_errors_are_those_of_the_forecasts(result: demo.DemoResult) -> None:
    _, sunspots = demo.load_data()
    lstm = errors_of(result, "LSTM")[1]
    assert lstm.rmse == pytest.approx(np.sqrt(np.mean((result.forecast - result.actual) ** 2)))
    naive = errors_of(result, "seasonal naive")
    by_hand = np.abs(sunspots[-60:] - sunspots[-71:-11]).mean()
    assert [naive[ahead].mae for ahead in demo.HORIZONS] == pytest.approx([by_hand] * len(demo.HORIZONS))
    assert errors_of(result, "persistence")[2].mae == pytest.approx(np.abs(sunspots[-60:] - sunspots[-62:-2]).mean())


@pytest.mark.parametrize("baseline", ["AR(9) of square roots", "AR(9)", "seasonal naive", "persistence"])
def test_lstm_beats_the_baseline_at_every_horizon(result: demo.DemoResult, baseline: str) -> None:
    lstm, other = errors_of(result, "LSTM"), errors_of(result, baseline)
    assert lstm.keys() == other.keys() == set(demo.HORIZONS)
    assert all(lstm[ahead].rmse < other[ahead].rmse for ahead in demo.HORIZONS)


def test_errors_text_has_a_line_for_each_method(result: demo.DemoResult) -> None:
    lines = demo.errors_text(result).splitlines()
    assert len(lines) == 2 + 5
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["LSTM"] + [
        f"{value:.1f}" for error in errors_of(result, "LSTM").values() for value in (error.rmse, error.mae)
    ]


# pictures


@pytest.mark.parametrize(("width", "height"), [(50, 8), (76, 20), (80, 20), (81, 13), (160, 40)])
def test_plot_text_fills_its_size(result: demo.DemoResult, width: int, height: int) -> None:
    lines = demo.plot_text(result, width, height).splitlines()
    assert len(lines) == height
    label_width = 5
    years = min(71, width - label_width)
    assert max(map(len, lines)) == label_width + years * max(1, (width - label_width) // 71)
    assert sum(line.count("●") for line in lines[1:]) == years
    assert "2010" in lines[-1]
    assert {line[4] for line in lines[1:-2]} == {"│", "┤"}


def test_plot_text_puts_dots_and_bars_at_their_heights(result: demo.DemoResult) -> None:
    lines = demo.plot_text(result, 76, 23).splitlines()
    rows, top = 20, 200.0
    for column, forecast in enumerate([*result.forecast, *result.future]):
        (row,) = (row for row in range(rows) if lines[1 + row][5 + column : 6 + column] == "●")
        assert rows - 1 - row == int(forecast / top * rows)
    for column, actual in enumerate(result.actual):
        full = sum(line[5 + column : 6 + column] == "█" for line in lines[1 : 1 + rows])
        assert int(actual / top * rows) - 1 <= full <= round(actual / top * rows)


@pytest.mark.parametrize(("width", "height"), [(49, 20), (80, 7)])
def test_plot_text_refuses_too_small_a_size(result: demo.DemoResult, width: int, height: int) -> None:
    with pytest.raises(ValueError, match=f"`width` and `height` must be at least 50 and 8, got {width} and {height}"):
        demo.plot_text(result, width, height)


def test_run_demo_writes_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "sunspots.png"
    demo.run_demo(plot=str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
