"""Optimisers against their equations and PyTorch, checkpoints bit for bit, clipping, learning rates, bad arguments."""

from __future__ import annotations

import copy
import math
import pickle
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from conftest import BOTH
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastlstm import LSTM, Linear, Sequential, reference
from fastlstm.losses import mse
from fastlstm.optim import SGD, Adam, clip_grad_norm, constant_lr, cosine_lr, step_lr

STEPS = 100
ADAM = [
    {},
    {"lr": 0.01},
    {"betas": (0.5, 0.6)},
    {"betas": [0.0, 0.9]},
    {"betas": (0.9, 0.0)},
    {"eps": 0.3},
    {"weight_decay": 0.5, "lr": 0.1},
    {"lr": 0.0},
]
SGDS = [
    {},
    {"lr": 0.1},
    {"momentum": 0.9},
    {"weight_decay": 0.5, "lr": 0.1},
    {"momentum": 0.9, "weight_decay": 0.5, "lr": 0.1},
    {"momentum": 0.7, "nesterov": True},
    {"momentum": 0.7, "nesterov": True, "weight_decay": 0.5, "lr": 0.1},
]
EVERY = [(Adam, options) for options in ADAM] + [(SGD, options) for options in SGDS]
BOTH_KINDS = [(Adam, {"weight_decay": 0.1}), (SGD, {"momentum": 0.9, "weight_decay": 0.1})]


def case_id(value: Any) -> str | None:
    if isinstance(value, dict):
        return "-".join(f"{name}={option}" for name, option in value.items()) or "default"
    return getattr(value, "__name__", None)


def make_model(dtype: Any = np.float32, seed: int = 0) -> Sequential:
    return Sequential(LSTM(3, 5, dtype=dtype, rng=seed), Linear(5, 2, dtype=dtype, rng=seed + 1))


def draw_grads(model: Any, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=p.shape).astype(p.dtype) for name, p in model.state_dict().items()}


def run(optimiser: Any, model: Any, steps: Any) -> None:
    for k in steps:
        optimiser.step(draw_grads(model, k))


def assert_same_bits(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(actual) == list(expected)
    for name, array in expected.items():
        assert (actual[name].dtype, actual[name].shape) == (array.dtype, array.shape)
        assert actual[name].tobytes() == array.tobytes(), name


def assert_weights_close(actual: dict[str, Any], expected: dict[str, Any], dtype: Any) -> None:
    """Compare weights after STEPS steps, each of which rounds a weight and a step of at most that size a few times."""
    assert list(actual) == list(expected)
    for name, p in expected.items():
        assert actual[name].dtype == dtype
        limit = STEPS * np.finfo(dtype).eps * np.maximum(1, np.abs(p))
        assert np.all(np.abs(actual[name] - p) <= limit), name


# Equations


def adam(p: Any, gradients: Any, lr: Any = 1e-3, betas: Any = (0.9, 0.999), eps: Any = 1e-8, weight_decay: Any = 0.0):
    """Algorithm 2 of Loshchilov & Hutter, step by step as it is printed there."""
    m = v = np.zeros_like(p)
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        p = p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)
    return p


def sgd(p: Any, gradients: Any, lr: Any = 1e-3, momentum: Any = 0.0, weight_decay: Any = 0.0, nesterov: Any = False):
    """Momentum as the sum of all gradients so far, each weighted by the steps since."""
    seen: list[Any] = []
    for gradient in gradients:
        seen.append(gradient + weight_decay * p)
        sums = sum(momentum ** (len(seen) - 1 - k) * g for k, g in enumerate(seen))
        p = p - lr * (seen[-1] + momentum * sums if nesterov else sums)
    return p


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("kind", "options"), EVERY, ids=case_id)
def test_steps_are_those_of_the_equations(kind: Any, options: Any, dtype: Any) -> None:
    model = make_model(dtype)
    equation, start = {Adam: adam, SGD: sgd}[kind], model.state_dict()
    run(kind(model, **options), model, range(STEPS))
    gradients = [draw_grads(model, k) for k in range(STEPS)]
    expected = {
        name: equation(p.astype(np.longdouble), [g[name].astype(np.longdouble) for g in gradients], **options)
        for name, p in start.items()
    }
    assert_weights_close(model.state_dict(), expected, dtype)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("kind", "options"), EVERY, ids=case_id)
def test_steps_are_those_of_pytorch(kind: Any, options: Any, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    model = make_model(dtype)
    optimiser = kind(model, **options)
    theirs = {name: torch.nn.Parameter(torch.tensor(p)) for name, p in model.state_dict().items()}
    peer = {Adam: torch.optim.AdamW, SGD: torch.optim.SGD}[kind](
        theirs.values(), **{"lr": 1e-3, "weight_decay": 0.0, **options}
    )
    for k in range(STEPS):
        rate = optimiser.lr * (0.5 if k == 30 else 1)  # changed on the way, as a schedule does
        optimiser.lr = peer.param_groups[0]["lr"] = rate
        grads = draw_grads(model, k)
        for name, p in theirs.items():
            p.grad = torch.tensor(grads[name])
        optimiser.step(grads)
        peer.step()
    assert_weights_close(model.state_dict(), {name: p.detach().numpy() for name, p in theirs.items()}, dtype)


def test_first_step_of_adam_is_lr_long() -> None:
    linear = Linear(3, 1, bias=False, dtype=np.float64)
    linear.load_state_dict({"weight": [[0.0, 0.0, 0.0]]})
    Adam(linear, lr=0.25, eps=0).step({"weight": np.array([[1e-9, -7.0, 1e9]])})
    np.testing.assert_allclose(linear.weight, [[-0.25, 0.25, -0.25]], rtol=1e-14)


# Training


def train(kind: Any, options: Any, steps: int, seed: int = 0) -> tuple[LSTM, list[float]]:
    """Train an LSTM to put out its input one step late."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-0.5, 0.5, size=(7, 11, 1)).astype(np.float32)
    target = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
    lstm = LSTM(1, 8, proj_size=1, rng=seed)
    optimiser, losses = kind(lstm, **options), []
    for step in range(steps):
        output, _, saved = reference.forward(lstm.state_dict(), x)
        loss, d_output = mse(output, target)
        grads = reference.backward(saved, d_output)
        clip_grad_norm(grads, 1.0)
        optimiser.lr = cosine_lr(step, options["lr"], steps, warmup_steps=5)
        optimiser.step(grads)
        losses.append(loss)
    return lstm, losses


@pytest.mark.parametrize(
    ("kind", "options", "steps"),
    [(Adam, {"lr": 0.05}, 150), (SGD, {"lr": 1.0, "momentum": 0.9, "nesterov": True}, 300)],
    ids=case_id,
)
def test_training_learns_and_repeats_to_the_bit(kind: Any, options: Any, steps: int) -> None:
    lstm, losses = train(kind, options, steps)
    assert losses[-1] < losses[0] / 5
    again, _ = train(kind, options, steps)
    assert_same_bits(again.state_dict(), lstm.state_dict())


def test_step_starts_from_the_weights_of_the_moment() -> None:
    linear = Linear(1, 1, bias=False)
    optimiser = SGD(linear, lr=1.0)
    linear.load_state_dict({"weight": [[10.0]]})
    optimiser.step({"weight": [[1.0]]})
    assert linear.weight == 9


@pytest.mark.parametrize(("kind", "options"), BOTH_KINDS, ids=case_id)
def test_gradients_may_come_in_any_form_and_are_not_written(kind: Any, options: Any) -> None:
    def one_step(change: Any) -> dict[str, Any]:
        model = make_model()
        optimiser = kind(model, **options)
        for k in range(3):
            optimiser.step(change(draw_grads(model, k)))
        return model.state_dict()

    def read_only(grads: Any) -> Any:
        for g in grads.values():
            g.flags.writeable = False
        return grads

    plain = one_step(lambda grads: grads)
    for change in (
        read_only,
        lambda grads: SimpleNamespace(params=grads),
        lambda grads: dict(reversed(grads.items())),
        lambda grads: {name: np.asfortranarray(g) for name, g in grads.items()},
        lambda grads: {name: np.repeat(g, 2, axis=0)[::2] for name, g in grads.items()},
        lambda grads: {name: g.astype(np.float64) for name, g in grads.items()},
        lambda grads: {name: g.astype(">f4") for name, g in grads.items()},
        lambda grads: {name: g.tolist() for name, g in grads.items()},
    ):
        assert_same_bits(one_step(change), plain)


@pytest.mark.parametrize(("kind", "options"), BOTH_KINDS, ids=case_id)
def test_gradients_are_not_kept(kind: Any, options: Any) -> None:
    models = make_model(), make_model()
    for model, spoil in zip(models, (False, True), strict=True):
        optimiser = kind(model, **options)
        for k in range(3):
            grads = draw_grads(model, k)
            optimiser.step(grads)
            for g in grads.values():
                g[...] = np.nan if spoil else 0
    assert_same_bits(models[1].state_dict(), models[0].state_dict())


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize(("kind", "options"), BOTH_KINDS, ids=case_id)
def test_a_gradient_beyond_float32_stays_where_it_is(kind: Any, options: Any, value: float) -> None:
    models = make_model(), make_model()
    for model in models:
        optimiser = kind(model, **options)
        for k in range(3):
            grads = draw_grads(model, k)
            if model is models[1]:
                grads["1.weight"][1, 2] = value
            optimiser.step(grads)
    clean, spoilt = (model.state_dict() for model in models)
    if not np.isfinite(value) and kind is Adam:
        assert np.isnan(spoilt["1.weight"][1, 2])
    elif kind is SGD:
        assert not abs(spoilt["1.weight"][1, 2]) < 1e25
    spoilt["1.weight"][1, 2] = clean["1.weight"][1, 2]
    assert_same_bits(spoilt, clean)


# Checkpoints


def through_npz(state: dict[str, Any], path: Any) -> Any:
    np.savez(path / "checkpoint.npz", **state)
    return np.load(path / "checkpoint.npz")


def through_safetensors(state: dict[str, Any], path: Any) -> Any:
    safetensors.numpy.save_file(state, path / "checkpoint.safetensors")
    return safetensors.numpy.load_file(path / "checkpoint.safetensors")


@pytest.mark.parametrize("through", [through_npz, through_safetensors])
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize(("kind", "options"), EVERY, ids=case_id)
def test_checkpoint_goes_on_to_the_same_bits(kind: Any, options: Any, dtype: Any, through: Any, tmp_path: Any) -> None:
    model = make_model(dtype)
    optimiser = kind(model, **options)
    optimiser.lr = 0.3
    run(optimiser, model, range(3))
    saved = model.state_dict() | optimiser.state_dict()
    loaded = through(saved, tmp_path)
    run(optimiser, model, range(3, 6))

    again = make_model(dtype, seed=7)
    resumed = kind(again, **options)
    run(resumed, again, range(9))
    again.load_state_dict(loaded, strict=False)
    resumed.load_state_dict(loaded)
    assert (resumed.num_steps, resumed.lr) == (3, 0.3)
    assert_same_bits(again.state_dict() | resumed.state_dict(), saved)
    run(resumed, again, range(3, 6))
    assert_same_bits(again.state_dict() | resumed.state_dict(), model.state_dict() | optimiser.state_dict())
    if hasattr(loaded, "close"):
        loaded.close()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_to_the_same_bits(duplicate: Any) -> None:
    model = make_model()
    optimiser = Adam(model)
    run(optimiser, model, range(3))
    twin_model, twin = duplicate((model, optimiser))
    run(optimiser, model, range(3, 6))
    run(twin, twin_model, range(3, 6))
    assert_same_bits(twin_model.state_dict() | twin.state_dict(), model.state_dict() | optimiser.state_dict())


def test_state_dict_is_a_copy_and_so_is_what_is_loaded() -> None:
    model = make_model()
    optimiser = Adam(model)
    run(optimiser, model, range(2))
    before = optimiser.state_dict()
    for array in optimiser.state_dict().values():
        array[...] = 77
    given_ = {name: array.copy() for name, array in before.items()}
    optimiser.load_state_dict(given_)
    for array in given_.values():
        array[...] = 77
    assert_same_bits(optimiser.state_dict(), before)


def without(name: str) -> Any:
    return lambda state: {key: array for key, array in state.items() if key != name}


def replaced(name: str, value: Any) -> Any:
    return lambda state: state | {name: value}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda state: list(state), TypeError, "`mapping` must map names to arrays, got list"),
        (lambda state: None, TypeError, "`mapping` must map names to arrays, got NoneType"),
        (lambda state: {}, ValueError, "missing ['adam.num_steps', 'adam.lr', 'adam.m.0.weight_ih_l0'"),
        (without("adam.v.1.bias"), ValueError, "`mapping` does not fit the optimiser: missing ['adam.v.1.bias']"),
        (without("adam.lr"), ValueError, "missing ['adam.lr']"),
        (replaced("adam.m.2.weight", np.zeros(3)), ValueError, "unexpected ['adam.m.2.weight']"),
        (replaced("adam.v.1.bias", np.zeros(3)), ValueError, "`adam.v.1.bias` must have shape (2,), got (3,)"),
        (replaced("adam.m.1.weight", np.zeros((5, 2))), ValueError, "`adam.m.1.weight` must have shape (2, 5)"),
        (replaced("adam.v.1.bias", np.zeros(2, complex)), TypeError, "`adam.v.1.bias` must be of a dtype that casts"),
        (replaced("adam.v.1.bias", "junk"), TypeError, "`adam.v.1.bias` must be of a dtype that casts"),
        (replaced("adam.num_steps", np.int64(-1)), ValueError, "`adam.num_steps` must be at least 0, got -1"),
        (replaced("adam.num_steps", 2.0), TypeError, "`adam.num_steps` must be of a dtype that casts to int64"),
        (replaced("adam.num_steps", [2]), ValueError, "`adam.num_steps` must have shape (), got (1,)"),
        (replaced("adam.lr", np.nan), ValueError, "`adam.lr` must be in [0, inf), got nan"),
        (replaced("adam.lr", [0.1]), ValueError, "`adam.lr` must have shape (), got (1,)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change: Any, error: Any, message: str) -> None:
    model = make_model()
    optimiser = Adam(model)
    run(optimiser, model, range(2))
    before = optimiser.state_dict()
    other = {name: array + np.ones((), array.dtype) for name, array in before.items()}
    with pytest.raises(error, match=re.escape(message)):
        optimiser.load_state_dict(change(other))
    assert_same_bits(optimiser.state_dict(), before)


def test_a_checkpoint_of_another_model_or_optimiser_is_refused() -> None:
    model = make_model()
    for other in (SGD(model, momentum=0.9), Adam(model[1]), Adam(Sequential(LSTM(3, 6), Linear(6, 2)))):
        with pytest.raises(ValueError, match=r"does not fit the optimiser|must have shape"):
            Adam(model).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"missing \['sgd\.b\.weight', 'sgd\.b\.bias'\]"):
        SGD(model[1], momentum=0.9).load_state_dict(SGD(model[1]).state_dict())


# Bad arguments


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Adam(None), TypeError, "`model` must be an LSTM, a Linear or a Sequential, got NoneType"),
        (lambda: Adam(LSTM), TypeError, "`model` must be an LSTM, a Linear or a Sequential, got ABCMeta"),
        (lambda: Adam([Linear(1, 1)]), TypeError, "`model` must be"),
        (lambda: Adam(Linear(1, 1), -1), ValueError, "`lr` must be in [0, inf), got -1.0"),
        (lambda: Adam(Linear(1, 1), math.nan), ValueError, "`lr` must be in [0, inf), got nan"),
        (lambda: Adam(Linear(1, 1), math.inf), ValueError, "`lr` must be in [0, inf), got inf"),
        (lambda: Adam(Linear(1, 1), 10**5000), ValueError, "`lr` must be in [0, inf), got inf"),
        (lambda: Adam(Linear(1, 1), -(10**5000)), ValueError, "`lr` must be in [0, inf), got -inf"),
        (lambda: Adam(Linear(1, 1), "0.1"), TypeError, "`lr` must be a number, got str"),
        (lambda: Adam(Linear(1, 1), True), TypeError, "`lr` must be a number, got bool"),
        (lambda: Adam(Linear(1, 1), None), TypeError, "`lr` must be a number, got NoneType"),
        (lambda: Adam(Linear(1, 1), betas=0.9), TypeError, "`betas` must be two numbers, got float"),
        (lambda: Adam(Linear(1, 1), betas=(0.9,)), ValueError, "`betas` must be two numbers, got 1"),
        (lambda: Adam(Linear(1, 1), betas=(1, 0.9)), ValueError, "`betas[0]` must be in [0, 1), got 1.0"),
        (lambda: Adam(Linear(1, 1), betas=(0.9, -0.1)), ValueError, "`betas[1]` must be in [0, 1), got -0.1"),
        (lambda: Adam(Linear(1, 1), betas=(0.9, None)), TypeError, "`betas[1]` must be a number, got NoneType"),
        (lambda: Adam(Linear(1, 1), eps=-1e-8), ValueError, "`eps` must be in [0, inf), got -1e-08"),
        (lambda: Adam(Linear(1, 1), weight_decay=-1), ValueError, "`weight_decay` must be in [0, inf), got -1.0"),
        (lambda: SGD(Linear(1, 1), -1), ValueError, "`lr` must be in [0, inf), got -1.0"),
        (lambda: SGD(Linear(1, 1), momentum=1), ValueError, "`momentum` must be in [0, 1), got 1.0"),
        (lambda: SGD(Linear(1, 1), weight_decay=-1), ValueError, "`weight_decay` must be in [0, inf), got -1.0"),
        (lambda: SGD(Linear(1, 1), nesterov=1), TypeError, "`nesterov` must be True or False, got int"),
        (lambda: SGD(Linear(1, 1), nesterov=True), ValueError, "`nesterov` must be False where `momentum` is 0"),
        (lambda: constant_lr(-1, 1.0), ValueError, "`step` must be at least 0, got -1"),
        (lambda: constant_lr(1.0, 1.0), TypeError, "`step` must be an integer, got float"),
        (lambda: constant_lr(1, -1.0), ValueError, "`lr` must be in [0, inf), got -1.0"),
        (lambda: constant_lr(1, 1.0, -1), ValueError, "`warmup_steps` must be at least 0, got -1"),
        (lambda: cosine_lr(1, 1.0, 0), ValueError, "`total_steps` must be at least 1, got 0"),
        (lambda: cosine_lr(1, 1.0, 5, 5), ValueError, "`total_steps` must be at least 6, got 5"),
        (lambda: cosine_lr(1, 1.0, 5, 2, -1), ValueError, "`final_lr` must be in [0, inf), got -1.0"),
        (lambda: cosine_lr(1, None, 5), TypeError, "`lr` must be a number, got NoneType"),
        (lambda: step_lr(1, 1.0, 0), ValueError, "`every` must be at least 1, got 0"),
        (lambda: step_lr(1, 1.0, 1, 1.5), ValueError, "`factor` must be in [0, 1], got 1.5"),
        (lambda: step_lr(1, -1.0, 1), ValueError, "`lr` must be in [0, inf), got -1.0"),
        (lambda: clip_grad_norm({}, 0), ValueError, "`max_norm` must be in (0, inf], got 0.0"),
        (lambda: clip_grad_norm({}, math.nan), ValueError, "`max_norm` must be in (0, inf], got nan"),
        (lambda: clip_grad_norm({}, 1, 1), TypeError, "`error_if_nonfinite` must be True or False, got int"),
        (
            lambda: clip_grad_norm([np.ones(3)], 1),
            TypeError,
            "`grads` must be the result of `backward` or its `params`",
        ),
        (lambda: clip_grad_norm({"w": [1.0]}, 1), TypeError, "`grads['w']` must be an array of float32 or float64"),
        (lambda: clip_grad_norm({"w": np.ones(3, int)}, 1), TypeError, "float32 or float64, got int64"),
    ],
)
def test_bad_arguments(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_a_module_of_pytorch_is_refused() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"`model.state_dict\(\)\['weight'\]` must be an array of float32 or float64"):
        Adam(torch.nn.Linear(1, 1))


def test_a_layer_in_two_places_is_refused() -> None:
    linear = Linear(3, 3)
    with pytest.raises(ValueError, match="`model` has one layer in two places"):
        Adam(Sequential(linear, LSTM(3, 3), linear))


@pytest.mark.parametrize("lr", [-1.0, math.nan, None, "0.1"])
def test_a_bad_learning_rate_is_refused_when_it_is_set(lr: Any) -> None:
    optimiser = Adam(make_model(), lr=0.25)
    with pytest.raises((TypeError, ValueError), match="`lr` must be"):
        optimiser.lr = lr
    assert optimiser.lr == 0.25


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda grads: None, TypeError, "`grads` must be the result of `backward` or its `params`, got NoneType"),
        (lambda grads: list(grads), TypeError, "`grads` must be the result of `backward` or its `params`, got list"),
        (without("1.bias"), ValueError, "`grads` does not fit the model: missing ['1.bias']"),
        (replaced("1.b", np.ones(2)), ValueError, "`grads` does not fit the model: unexpected ['1.b']"),
        (replaced("1.bias", np.ones(3)), ValueError, "`grads['1.bias']` must have shape (2,), got (3,)"),
        (replaced("1.bias", np.ones(())), ValueError, "`grads['1.bias']` must have shape (2,), got ()"),
        (replaced("1.bias", np.ones(2, complex)), TypeError, "`grads['1.bias']` must be of a dtype that casts"),
        (replaced("1.bias", None), TypeError, "`grads['1.bias']` must be an array of numbers"),
    ],
)
@pytest.mark.parametrize(("kind", "options"), BOTH_KINDS, ids=case_id)
def test_bad_gradients_change_nothing(kind: Any, options: Any, change: Any, error: Any, message: str) -> None:
    model = make_model()
    optimiser = kind(model, **options)
    run(optimiser, model, range(2))
    before = model.state_dict() | optimiser.state_dict()
    with pytest.raises(error, match=re.escape(message)):
        optimiser.step(change(draw_grads(model)))
    assert_same_bits(model.state_dict() | optimiser.state_dict(), before)


@pytest.mark.parametrize(("kind", "options"), EVERY, ids=case_id)
def test_repr_makes_the_same_optimiser(kind: Any, options: Any) -> None:
    model = make_model()
    text = repr(kind(model, **options))
    again = eval(text.replace("(", "(model, ", 1), {"Adam": Adam, "SGD": SGD, "model": model})
    assert repr(again) == text
    for name, value in options.items():
        assert f"{name}={tuple(map(float, value)) if name == 'betas' else value}" in text


# Clipping

GRADIENTS = st.dictionaries(
    st.text(max_size=3),
    st.sampled_from(BOTH).flatmap(
        lambda dtype: hnp.arrays(
            dtype,
            hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=4),
            elements=st.floats(-(2.0**50), 2.0**50, width=32).filter(lambda value: value == 0 or abs(value) > 2**-50),
        )
    ),
    max_size=3,
)


@settings(deadline=None)
@given(grads=GRADIENTS, max_norm=st.floats(1e-3, 1e3))
def test_clipping_shortens_and_keeps_the_direction(grads: Any, max_norm: float) -> None:
    before = dict(grads)
    kept = copy.deepcopy(grads)
    norm = clip_grad_norm(grads, max_norm)
    exact = math.sqrt(math.fsum(float(value) ** 2 for g in kept.values() for value in g.flat))
    assert norm == pytest.approx(exact, rel=1e-14)
    assert list(grads) == list(kept)
    for name, g in kept.items():
        np.testing.assert_array_equal(before[name], g)  # what was given is not written
        assert (grads[name].dtype, grads[name].shape) == (g.dtype, g.shape)
        if norm <= max_norm:
            assert grads[name] is before[name]
        else:  # the factor and the product are rounded, below 1e-38 to a multiple of 1e-45
            eps = np.finfo(g.dtype).eps
            np.testing.assert_allclose(grads[name], g.astype(float) * (max_norm / exact), rtol=2 * eps, atol=1e-44)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1000.0, math.inf])
def test_clipping_is_that_of_pytorch(max_norm: float, dtype: Any) -> None:
    torch = pytest.importorskip("torch")
    grads = draw_grads(make_model(dtype))
    theirs = {name: torch.nn.Parameter(torch.zeros(g.shape)) for name, g in grads.items()}
    for name, p in theirs.items():
        p.data = p.grad = torch.tensor(grads[name])
    peer = float(torch.nn.utils.clip_grad_norm_(theirs.values(), max_norm))
    norm = clip_grad_norm(SimpleNamespace(params=grads), max_norm)
    eps = float(np.finfo(dtype).eps)
    assert norm == pytest.approx(peer, rel=10 * eps)
    slack = 1 + 1e-6 / norm if norm > max_norm else 1  # PyTorch divides by norm + 1e-6
    for name, p in theirs.items():
        np.testing.assert_allclose(grads[name], p.grad.numpy() * slack, rtol=20 * eps)


def test_clipping_of_one_array_under_two_names_scales_it_once() -> None:
    g = np.array([3.0, 4.0])
    grads = {"bias_ih_l0": g, "bias_hh_l0": g}
    assert clip_grad_norm(grads, 1.0) == pytest.approx(math.sqrt(50))
    assert clip_grad_norm(grads, 1.0) == pytest.approx(1)


def test_the_norm_of_float32_does_not_overflow() -> None:
    grads = {"w": np.full(4, 1e30, np.float32)}
    assert clip_grad_norm(grads, 1.0, error_if_nonfinite=True) == pytest.approx(2e30)
    np.testing.assert_allclose(grads["w"], 0.5, rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "clipped"), [(np.nan, [np.nan, np.nan]), (np.inf, [np.nan, 0]), (-np.inf, [np.nan, 0])]
)
@pytest.mark.parametrize("dtype", BOTH)
def test_a_norm_that_is_not_finite_propagates_or_raises(value: float, clipped: Any, dtype: Any) -> None:
    grads = {"a": np.array([value, 1], dtype), "b": np.array([3], dtype)}
    kept = dict(grads)
    with pytest.raises(ValueError, match="`grads` must have a finite norm, got"):
        clip_grad_norm(grads, 1.0, error_if_nonfinite=True)
    assert all(grads[name] is array for name, array in kept.items())
    np.testing.assert_equal(clip_grad_norm(grads, 1.0), abs(value))
    np.testing.assert_array_equal(grads["a"], clipped)
    np.testing.assert_array_equal(grads["b"], clipped[1:])


# Learning rates


def test_learning_rates_are_those_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    schedulers = torch.optim.lr_scheduler

    def theirs(make: Any) -> list[float]:
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        scheduler, rates = make(optimiser), []
        for _ in range(20):
            rates.append(scheduler.get_last_lr()[0])
            optimiser.step()
            scheduler.step()
        return rates

    for ours, make in [
        (lambda k: constant_lr(k, 0.3, 7), lambda o: schedulers.LinearLR(o, 1 / 8, total_iters=7)),
        (lambda k: cosine_lr(k, 0.3, 19, final_lr=0.1), lambda o: schedulers.CosineAnnealingLR(o, 19, eta_min=0.1)),
        (lambda k: step_lr(k, 0.3, 6, 0.5), lambda o: schedulers.StepLR(o, 6, 0.5)),
    ]:
        np.testing.assert_allclose([ours(k) for k in range(20)], theirs(make), rtol=1e-13)


@settings(deadline=None)
@given(lr=st.floats(0, 1e3), final=st.floats(0, 1), warmup=st.integers(0, 50), decay=st.integers(1, 50))
def test_cosine_rises_falls_and_stays(lr: float, final: float, warmup: int, decay: int) -> None:
    final_lr, total = final * lr, warmup + decay
    rates = [cosine_lr(k, lr, total, warmup, final_lr) for k in range(total + 3)]
    assert rates[:warmup] == [constant_lr(k, lr, warmup) for k in range(warmup)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup] == pytest.approx(lr)
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert rates[total:] == [final_lr] * 3
    assert max(rates) <= lr * (1 + 1e-15)


def test_a_step_may_be_any_integer() -> None:
    assert cosine_lr(np.int32(5), np.float32(0.5), 10**12, 0) == pytest.approx(0.5)
    assert step_lr(10**15, 1.0, 1) == 0
    assert constant_lr(10**15, 1, 10**15) == 1
