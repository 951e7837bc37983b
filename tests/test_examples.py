"""The examples: what they compute is right, and they train, stop, die, go on and draw as they say."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import environment
from safetensors import safe_open

import fastlstm
from fastlstm import demo

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = ["--hidden", "4", "--seeds", "5", "6", "--epochs", "30", "--patience", "12", "--save-every", "1"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What the examples choose; the number of threads is given back afterwards."""
    before = fastlstm.get_num_threads()
    fastlstm.set_num_threads(1)
    yield
    fastlstm.set_num_threads(before)


def load_example(name: str) -> Iterator[ModuleType]:
    pytest.importorskip("matplotlib")
    pytest.importorskip("tqdm")
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def sunspots() -> Iterator[ModuleType]:
    yield from load_example("train_sunspots")


@pytest.fixture(scope="module")
def adding() -> Iterator[ModuleType]:
    yield from load_example("adding_problem")


# train_sunspots.py


def read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    with safe_open(path, framework="numpy") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same_file(path: Path, other: Path) -> None:
    """Compare contents; the order of the header is that of a hash map, and another one each time."""
    (metadata, tensors), (other_metadata, other_tensors) = read(path), read(other)
    assert metadata == other_metadata
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert tensor.tobytes() == other_tensors[name].tobytes(), name


@pytest.fixture(scope="module")
def uninterrupted(sunspots: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a short training writes that is left alone."""
    path: Path = tmp_path_factory.mktemp("uninterrupted") / "model.safetensors"
    sunspots.main([str(path), *SHORT])
    return path


def test_gradient_of_the_sunspot_loss(sunspots: ModuleType) -> None:
    _, numbers = demo.load_data()
    run = sunspots.Run(sunspots.parse(SHORT), 0, numbers[:60], 40, 1)
    rng = np.random.default_rng(0)
    output, direction = rng.standard_normal((2, 39, 3, 1))
    output[20] = -9.0  # a negative root, whose forecast is zero
    copies = numbers[:40, None, None] * np.exp(rng.standard_normal((1, 3, 1)))
    _, d_output = run.loss(output, copies)
    above, below = (run.loss(output + step * direction, copies)[0] for step in (1e-5, -1e-5))
    # a central difference: off by 1e-10 of a third derivative, and by 1e-16 / 1e-5 of rounding
    assert (above - below) / 2e-5 == pytest.approx(np.vdot(d_output, direction), rel=1e-7)
    assert not d_output[:11].any()
    assert not d_output[20].any()


def test_training_is_repeatable_and_writes_what_is_shipped(
    sunspots: ModuleType, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "again.safetensors"
    sunspots.main([str(path), *SHORT])
    assert_same_file(path, uninterrupted)
    assert "seasonal naive" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(other.name for other in tmp_path.iterdir()) == ["again.png", "again.safetensors"]
    assert isinstance(fastlstm.load(path), fastlstm.Sequential)

    (metadata, tensors), (shipped, shipped_tensors) = read(path), read(demo.MODEL_PATH)
    facts, shipped_facts = json.loads(metadata["demo"]), json.loads(shipped["demo"])
    assert tensors.keys() == shipped_tensors.keys()
    assert facts.keys() == shipped_facts.keys()
    assert facts["years"] == shipped_facts["years"]
    # The shipped model is that of the default settings.
    defaults = sunspots.parse([])
    training = shipped_facts["training"]
    assert {name: training[name] for name in vars(defaults) if name not in ("output", "save_every")} == {
        name: value for name, value in vars(defaults).items() if name not in ("output", "save_every")
    }
    assert training["seed"] in defaults.seeds
    assert json.loads(shipped["layers"])[0]["hidden_size"] == defaults.hidden


def test_training_lowers_the_errors_and_stops_early(sunspots: ModuleType, tmp_path: Path) -> None:
    years, numbers = demo.load_data()
    path = str(tmp_path / "model.safetensors")
    options = sunspots.parse([path, "--hidden", "16", "--seeds", "0", "1", "--patience", "15"])
    training = sunspots.Training(options, numbers[years < 1949], int(np.searchsorted(years, 1900)))
    training.finish()
    *tried, last = training.runs
    for run in tried:
        assert run.epoch == run.best_epoch + 15 < 400
        assert run.curve[run.best_epoch - 1, 0] < run.curve[0, 0] / 2
        assert run.curve[run.best_epoch - 1, 2] == run.curve[:, 2].min() < run.curve[0, 2] / 1.5
    best = min(tried, key=lambda run: run.curve[:, 2].min())
    assert (last.seed, last.epoch) == (best.seed, best.best_epoch)
    assert len(last.series) == 249


def test_training_that_is_killed_goes_on_to_the_same_bits(
    sunspots: ModuleType, uninterrupted: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    checkpoint = path.with_suffix(".checkpoint")
    command = [sys.executable, str(EXAMPLES / "train_sunspots.py"), str(path), *SHORT]
    epochs = []
    for delay in (0.0, 0.005, 0.02, 0.01):
        with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
            seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
            while run.poll() is None and (not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen):
                time.sleep(0.001)
            time.sleep(delay)
            run.send_signal(signal.SIGKILL)
        if run.returncode == 0:
            break  # it was quicker than this process
        _, tensors = read(checkpoint)  # whole, whenever the process died
        epochs.append(sum(len(tensor) for name, tensor in tensors.items() if name.endswith(".curve")))
    assert epochs
    assert epochs == sorted(set(epochs))  # it went on each time
    sunspots.main([str(path), *SHORT])
    assert_same_file(path, uninterrupted)
    assert not checkpoint.exists()


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_checkpoint_that_is_not_finished_leaves_the_one_before(
    sunspots: ModuleType, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    path = tmp_path / "model.safetensors"
    calls = 0

    def die(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 17:
            raise KeyboardInterrupt
        original(*arguments)

    original = getattr(os, moment)
    with monkeypatch.context() as patch:
        patch.setattr(sunspots.os, moment, die)
        with pytest.raises(KeyboardInterrupt):
            sunspots.main([str(path), *SHORT])
    _, tensors = read(path.with_suffix(".checkpoint"))
    assert len(tensors["0.curve"]) == 16
    sunspots.main([str(path), *SHORT])
    assert_same_file(path, uninterrupted)


@pytest.fixture
def checkpoint(sunspots: ModuleType, tmp_path: Path) -> Path:
    """The checkpoint of a short training that has begun."""
    years, numbers = demo.load_data()
    options = sunspots.parse([str(tmp_path / "model.safetensors"), *SHORT])
    training = sunspots.Training(options, numbers[years < 1949], int(np.searchsorted(years, 1900)))
    training.runs[-1].train_epoch()
    training.save()
    path: Path = training.path
    return path


def assert_refused(checkpoint: Path, options: list[str], reason: str) -> None:
    before = checkpoint.read_bytes()
    command = [sys.executable, str(EXAMPLES / "train_sunspots.py"), str(checkpoint.with_suffix(".safetensors"))]
    done = subprocess.run(
        [*command, *options], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith(f"train_sunspots.py: {checkpoint}: ")
    assert done.stderr.count("\n") == 1
    assert reason in done.stderr
    assert checkpoint.read_bytes() == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]


@pytest.mark.parametrize("left", [0, 7, 500, -1])
def test_checkpoint_cut_short_is_refused_and_left_alone(checkpoint: Path, left: int) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:left])
    assert_refused(checkpoint, SHORT, "cut short")


def test_checkpoint_of_another_model_is_refused_and_left_alone(checkpoint: Path) -> None:
    assert_refused(
        checkpoint, [*SHORT, "--hidden", "5"], "the checkpoint of another model, hidden 4 and not 5; delete it"
    )
    fastlstm.save(fastlstm.LSTM(1, 4), checkpoint)
    assert_refused(checkpoint, SHORT, "the checkpoint of another model")


# adding_problem.py


def test_batch_marks_a_number_in_each_half(adding: ModuleType) -> None:
    x, y = adding.make_batch(21, 5000, np.random.default_rng(0))
    values, marks = x[:, :, 0], x[:, :, 1]
    assert set(np.unique(marks)) == {0, 1}
    assert (marks[:10].sum(axis=0) == 1).all()
    assert (marks[10:].sum(axis=0) == 1).all()
    assert (marks.sum(axis=1) > 0).all()
    np.testing.assert_allclose((values * marks).sum(axis=0)[:, None], y, rtol=1e-6)
    # the standard error of the mean of 5000 squares
    assert np.mean((y - 1) ** 2) == pytest.approx(adding.BASELINE, abs=4 * float(np.std((y - 1) ** 2)) / 5000**0.5)


def test_gradients_of_the_plain_network(adding: ModuleType) -> None:
    rng = np.random.default_rng(0)
    network = adding.PlainNetwork(5, rng)
    weights = {name: array.astype(np.float64) for name, array in network.state_dict().items()}
    x, y = rng.standard_normal((7, 3, 2)), rng.standard_normal((7, 3, 1))
    network.load_state_dict(weights)
    grads = network.record(x).backward(y)
    direction = {name: rng.standard_normal(array.shape) for name, array in {"x": x, **weights}.items()}
    outputs = []
    for step in (1e-5, -1e-5):
        network.load_state_dict({name: array + step * direction[name] for name, array in weights.items()})
        outputs.append(np.vdot(network.record(x + step * direction["x"]).output, y))
    slope = sum(np.vdot(array, direction[name]) for name, array in {"x": grads.x, **grads.params}.items())
    # a central difference: off by 1e-10 of a third derivative, and by 1e-16 / 1e-5 of rounding
    assert (outputs[0] - outputs[1]) / 2e-5 == pytest.approx(slope, rel=1e-7)


def test_units_remember_for_up_to_the_length(adding: ModuleType) -> None:
    model = adding.make_lstm(64, 300, np.random.default_rng(0))
    b_i, b_f, *others = np.split(model[0].bias_ih_l0, 4)
    assert 0 <= b_f.min() < np.log(300) - 1 < b_f.max() <= np.log(300)
    np.testing.assert_array_equal(b_i, -b_f)
    assert np.abs(others).max() <= 1 / 8  # as they were
    alone = adding.make_lstm(64, 300, np.random.default_rng(0), forget_only=True)[0].bias_ih_l0
    assert np.log(150) - 1 < alone[64:128].max() <= np.log(150)
    assert np.abs(np.delete(alone, np.s_[64:128])).max() <= 1 / 8


def test_gradient_fades_in_the_plain_network_alone(adding: ModuleType) -> None:
    rng = np.random.default_rng(0)
    lstm, plain = (
        adding.sensitivity(model, 100) for model in (adding.make_lstm(32, 100, rng), adding.PlainNetwork(32, rng))
    )
    assert lstm.shape == plain.shape == (100,)
    assert lstm[90] > 1e-2 * lstm[0]
    assert plain[90] < 1e-10 * plain[0]


def test_adding_problem_is_learnt_and_drawn(
    adding: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "adding.png"
    options = [
        "--steps",
        "12",
        "--hidden",
        "24",
        "--updates",
        "1200",
        "--every",
        "200",
        "--goal",
        "0.03",
        "--lr",
        "0.01",
    ]
    results = adding.main([*options, "--plot", str(path)])
    assert results["LSTM"]["errors"][0][1] > 0.1
    assert results["LSTM"]["errors"][-1][1] < 0.03
    assert results["plain"]["errors"][-1][0] <= results["LSTM"]["errors"][-1][0]
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "the answer 1 has 0.1667" in capsys.readouterr().out
