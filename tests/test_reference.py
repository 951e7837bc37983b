"""The reference against the complex step, against torch.nn.LSTM, and against its own definition of rows."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fastlstm.reference import Forward, Gradients, backward, forward, sigmoid

STEP = 1e-100  # of the complex step: no cancellation, so that it can be as small as we like


@dataclass(frozen=True)
class Case:
    """Sizes and features of one network and its call."""

    T: int = 4
    N: int = 3
    I: int = 3
    H: int = 5
    L: int = 1
    D: int = 1
    P: int = 0  # 0 is no projection, as `proj_size` of PyTorch
    bias: bool = True
    lengths: bool = False
    reset: bool = False
    state: bool = True
    dropout: bool = False

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{getattr(self, name)}" for name in "TNIHLDP")
        flags = [name for name in ("bias", "lengths", "reset", "state", "dropout") if getattr(self, name)]
        return "-".join([sizes, *flags])


@dataclass
class Call:
    """Arguments of `forward` and cotangents of all it returns."""

    params: dict[str, Any]
    x: Any
    state: tuple[Any, Any] | None
    options: dict[str, Any]
    d_output: Any
    d_state: tuple[Any, Any]

    def forward(self) -> Forward:
        return forward(self.params, self.x, self.state, **self.options)

    def backward(self) -> Gradients:
        return backward(self.forward().saved, self.d_output, self.d_state)

    def loss(self, **changed: Any) -> Any:
        """Return the scalar whose gradient `backward` gives; complex where an argument is."""
        arguments = {"params": self.params, "x": self.x, "state": self.state, **self.options, **changed}
        output, (h_n, c_n), _ = forward(**arguments)
        d_h_n, d_c_n = self.d_state
        return (output * self.d_output).sum() + (h_n * d_h_n).sum() + (c_n * d_c_n).sum()


def draw_call(case: Case, seed: int = 0) -> Call:
    rng = np.random.default_rng(seed)
    T, N, I, H, L, D = case.T, case.N, case.I, case.H, case.L, case.D
    P = case.P or H
    params = {}
    for layer, suffix in itertools.product(range(L), ["", "_reverse"][:D]):
        shapes = {"weight_ih": (4 * H, D * P if layer else I), "weight_hh": (4 * H, P)}
        if case.bias:
            shapes |= {"bias_ih": (4 * H,), "bias_hh": (4 * H,)}
        if case.P:
            shapes["weight_hr"] = (P, H)
        for name, shape in shapes.items():
            params[f"{name}_l{layer}{suffix}"] = rng.normal(size=shape) * 0.7
    options: dict[str, Any] = {}
    if case.lengths:
        options["lengths"] = rng.permutation(np.arange(N) * T // max(N - 1, 1))  # 0 and T are among them
    if case.reset:
        options["reset"] = rng.random((T, N)) < 0.4
    if case.dropout:
        options["dropout_masks"] = [(rng.random((T, N, D * P)) < 0.6) / 0.6 for _ in range(L - 1)]
    state = (rng.normal(size=(L * D, N, P)), rng.normal(size=(L * D, N, H)))
    return Call(
        params=params,
        x=rng.normal(size=(T, N, I)),
        state=state if case.state else None,
        options=options,
        d_output=rng.normal(size=(T, N, D * P)),
        d_state=(rng.normal(size=(L * D, N, P)), rng.normal(size=(L * D, N, H))),
    )


def row(call: Call, n: int, start: int = 0, stop: int | None = None) -> tuple[Any, tuple[Any, Any]]:
    """Return x and state of one row alone, from step `start` to `stop`."""
    assert call.state is not None
    return call.x[start:stop, n : n + 1], (call.state[0][:, n : n + 1], call.state[1][:, n : n + 1])


GRID = [
    Case(L=L, D=D, P=P, bias=bias, lengths=lengths, reset=reset, state=state, dropout=dropout)
    for L, D, P, bias, lengths, reset, state, dropout in itertools.product((1, 2), (1, 2), (0, 3), *[(False, True)] * 5)
    if L > 1 or not dropout
]
SIZES = [
    Case(T=1, N=1, I=1, H=1),
    Case(T=7, N=1, I=2, H=3, L=3, D=2, P=1, lengths=True, reset=True, dropout=True),
    Case(T=1, N=5, I=7, H=2, L=2, D=2, reset=True),
    Case(T=9, N=7, I=1, H=4, L=3, D=2, P=2, lengths=True, reset=True),
]
FULL = Case(L=2, D=2, P=3, lengths=True, reset=True, dropout=True)
PLAIN = Case(L=2, D=2, P=3)
by_name = {"ids": str}


# Gradients


def assert_derivative(loss: Any, gradient: Any, direction: Any) -> None:
    """Compare a gradient with the complex step along one direction, relative to the size of both."""
    bound = 1e-12 * max(1.0, np.linalg.norm(gradient) * np.linalg.norm(direction))
    assert abs(loss.imag / STEP - (gradient * direction).sum()) < bound


@pytest.mark.parametrize("case", [*GRID, *SIZES], **by_name)
def test_gradients_equal_complex_step(case: Case) -> None:
    call = draw_call(case)
    gradients = call.backward()
    rng = np.random.default_rng(1)

    v = rng.normal(size=call.x.shape)
    assert_derivative(call.loss(x=call.x + STEP * 1j * v), gradients.x, v)
    for k, d_state_k in enumerate(gradients.state):
        state = list(call.state or (np.zeros_like(d) for d in call.d_state))
        v = rng.normal(size=state[k].shape)
        state[k] = state[k] + STEP * 1j * v
        assert_derivative(call.loss(state=tuple(state)), d_state_k, v)
    assert list(gradients.params) == list(call.params)
    for name, value in call.params.items():
        v = rng.normal(size=value.shape)
        params = {**call.params, name: value + STEP * 1j * v}
        assert_derivative(call.loss(params=params), gradients.params[name], v)


def test_every_element_of_the_gradients_equals_complex_step() -> None:
    call = draw_call(FULL)
    gradients = call.backward()
    for name, value in {"x": call.x, **call.params}.items():
        gradient = gradients.x if name == "x" else gradients.params[name]
        assert gradient.shape == value.shape
        for index in np.ndindex(value.shape):
            v = np.zeros(value.shape)
            v[index] = 1
            moved = value + STEP * 1j * v
            loss = call.loss(x=moved) if name == "x" else call.loss(params={**call.params, name: moved})
            assert loss.imag / STEP == pytest.approx(gradient[index], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("case", [PLAIN, FULL], **by_name)
def test_gradients_of_single_results_add_up(case: Case) -> None:
    call = draw_call(case)
    saved, (d_h_n, d_c_n) = call.forward().saved, call.d_state
    parts = [backward(saved, call.d_output), backward(saved, None, (d_h_n, None)), backward(saved, None, (None, d_c_n))]
    whole = call.backward()
    np.testing.assert_allclose(sum(part.x for part in parts), whole.x, atol=1e-12)
    for k in (0, 1):
        np.testing.assert_allclose(sum(part.state[k] for part in parts), whole.state[k], atol=1e-12)
    for name, gradient in whole.params.items():
        np.testing.assert_allclose(sum(part.params[name] for part in parts), gradient, atol=1e-12)
    assert not backward(saved).x.any()


def test_nothing_given_is_modified_and_backward_repeats() -> None:
    call, untouched = draw_call(FULL), draw_call(FULL)
    result = call.forward()
    first = backward(result.saved, call.d_output, call.d_state)
    again = backward(result.saved, call.d_output, call.d_state)
    np.testing.assert_equal(tuple(again), tuple(first))
    np.testing.assert_equal(vars(call), vars(untouched))


# PyTorch


def run_torch(case: Case, call: Call) -> tuple[Any, tuple[Any, Any], Gradients]:
    torch = pytest.importorskip("torch")

    def leaf(value: Any) -> Any:
        return torch.tensor(value, requires_grad=True)

    lstm = torch.nn.LSTM(
        case.I, case.H, case.L, bias=case.bias, bidirectional=case.D == 2, proj_size=case.P, dtype=torch.float64
    )
    lstm.load_state_dict({name: torch.tensor(value) for name, value in call.params.items()})
    x, state = leaf(call.x), tuple(map(leaf, call.state)) if call.state else None
    if case.lengths:
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, call.options["lengths"], enforce_sorted=False)
        output, (h_n, c_n) = lstm(packed, state)
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(output, total_length=case.T)
    else:
        output, (h_n, c_n) = lstm(x, state)
    torch.autograd.backward([output, h_n, c_n], [torch.tensor(d) for d in (call.d_output, *call.d_state)])
    d_state = tuple(part.grad.numpy() for part in state) if state else ()
    d_params = {name: parameter.grad.numpy() for name, parameter in lstm.named_parameters()}
    return (
        output.detach().numpy(),
        (h_n.detach().numpy(), c_n.detach().numpy()),
        Gradients(x.grad.numpy(), d_state, d_params),
    )


@pytest.mark.parametrize(
    "case",
    [
        Case(T=6, N=5, I=4, H=7, L=L, D=D, P=P, bias=bias, lengths=lengths, state=state)
        for L, D, P, bias, lengths, state in itertools.product((1, 3), (1, 2), (0, 3), *[(False, True)] * 3)
    ],
    **by_name,
)
def test_equals_torch(case: Case) -> None:
    call = draw_call(case)
    if case.lengths:
        call.options["lengths"] = np.array([4, 6, 1, 3, 6])  # PyTorch knows no length 0
    output, state, gradients = run_torch(case, call)
    result = call.forward()
    np.testing.assert_allclose(result.output, output, atol=1e-13)
    np.testing.assert_allclose(result.state[0], state[0], atol=1e-13)
    np.testing.assert_allclose(result.state[1], state[1], atol=1e-13)
    own = backward(result.saved, call.d_output, call.d_state)
    np.testing.assert_allclose(own.x, gradients.x, rtol=1e-11, atol=1e-11)
    for k, d_state_k in enumerate(gradients.state):
        np.testing.assert_allclose(own.state[k], d_state_k, rtol=1e-11, atol=1e-11)
    assert own.params.keys() == gradients.params.keys()
    for name, gradient in gradients.params.items():
        np.testing.assert_allclose(own.params[name], gradient, rtol=1e-11, atol=1e-11)


# Rows: lengths, reset, NaN


@pytest.mark.parametrize("case", [case for case in GRID if case.lengths and case.state and not case.dropout], **by_name)
def test_lengths_equal_each_row_alone(case: Case) -> None:
    call = draw_call(case)
    output, (h_n, c_n), _ = call.forward()
    for n, length in enumerate(call.options["lengths"]):
        reset = call.options["reset"][:length, n : n + 1] if case.reset else None
        alone, (h_alone, c_alone), _ = forward(call.params, *row(call, n, 0, length), reset=reset)
        np.testing.assert_allclose(output[:length, n], alone[:, 0], atol=1e-14)
        np.testing.assert_array_equal(output[length:, n], 0)
        np.testing.assert_allclose(h_n[:, n], h_alone[:, 0], atol=1e-14)
        np.testing.assert_allclose(c_n[:, n], c_alone[:, 0], atol=1e-14)


@pytest.mark.parametrize("case", [case for case in GRID if case.reset and case.state and not case.dropout], **by_name)
def test_reset_equals_segments_alone(case: Case) -> None:
    """A state enters the first segment in the forward direction and the last one in the reverse direction."""
    call = draw_call(case)
    reset = call.options["reset"]
    output, (h_n, c_n), _ = call.forward()
    reverse = np.arange(case.L * case.D) % case.D == 1
    for n in range(case.N):
        length = call.options["lengths"][n] if case.lengths else case.T
        if length == 0:
            continue
        bounds = [0, *(t for t in range(1, length) if reset[t, n]), length]
        for start, stop in itertools.pairwise(bounds):
            x, state = row(call, n, start, stop)
            enters = np.where(reverse, stop == length, start == 0 and not reset[0, n])[:, None, None]
            segment, (h, c), _ = forward(call.params, x, (state[0] * enters, state[1] * enters))
            np.testing.assert_allclose(output[start:stop, n], segment[:, 0], atol=1e-14)
            leaves = np.where(reverse, start == 0, stop == length)
            np.testing.assert_allclose(h_n[leaves, n], h[leaves, 0], atol=1e-14)
            np.testing.assert_allclose(c_n[leaves, n], c[leaves, 0], atol=1e-14)


@pytest.mark.parametrize("D", [1, 2])
def test_reset_everywhere_makes_every_step_a_first_step(D: int) -> None:
    call = draw_call(Case(D=D, L=2))
    output = forward(call.params, call.x, reset=np.ones((4, 3), bool)).output
    for t in range(4):
        np.testing.assert_allclose(output[t], forward(call.params, call.x[t : t + 1]).output[0], atol=1e-14)


@pytest.mark.parametrize("D", [1, 2])
def test_length_zero_returns_the_state_unchanged(D: int) -> None:
    call = draw_call(Case(D=D, L=2, lengths=True, reset=True))
    call.options |= {"lengths": np.array([0, 4, 0]), "reset": np.ones((4, 3), bool)}
    output, (h_n, c_n), _ = call.forward()
    assert call.state is not None
    np.testing.assert_array_equal(output[:, [0, 2]], 0)
    np.testing.assert_array_equal(h_n[:, [0, 2]], call.state[0][:, [0, 2]])
    np.testing.assert_array_equal(c_n[:, [0, 2]], call.state[1][:, [0, 2]])
    d_x, (d_h_0, d_c_0), _ = call.backward()
    np.testing.assert_array_equal(d_x[:, [0, 2]], 0)
    np.testing.assert_array_equal(d_h_0[:, [0, 2]], call.d_state[0][:, [0, 2]])
    np.testing.assert_array_equal(d_c_0[:, [0, 2]], call.d_state[1][:, [0, 2]])


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "h_0", "c_0"])
@pytest.mark.parametrize("case", [PLAIN, Case(L=2, D=2, lengths=True, reset=True)], **by_name)
def test_non_finite_values_stay_in_their_row(case: Case, where: str, value: float) -> None:
    call, clean = draw_call(case), draw_call(case)
    n = 1
    if case.lengths:
        for each in (call, clean):
            each.options["lengths"] = np.array([2, 4, 3])
            each.options["reset"][:, n] = False
    target = {"x": call.x, "h_0": call.state[0], "c_0": call.state[1]}[where] if call.state else call.x
    target[0, n] = value
    others = [0, 2]
    result, expected = call.forward(), clean.forward()
    np.testing.assert_array_equal(result.output[:, others], expected.output[:, others])
    for part, expected_part in zip(result.state, expected.state, strict=True):
        np.testing.assert_array_equal(part[:, others], expected_part[:, others])
    gradients, expected_gradients = call.backward(), clean.backward()
    np.testing.assert_array_equal(gradients.x[:, others], expected_gradients.x[:, others])
    for part, expected_part in zip(gradients.state, expected_gradients.state, strict=True):
        np.testing.assert_array_equal(part[:, others], expected_part[:, others])
    if np.isnan(value):
        assert np.isnan(result.output[:, n]).all()
        assert np.isnan(gradients.x[:, n]).all()


def test_nan_past_the_length_of_a_row_is_not_read() -> None:
    call, clean = draw_call(FULL), draw_call(FULL)
    for n, length in enumerate(call.options["lengths"]):
        call.x[length:, n] = np.nan
        call.d_output[length:, n] = np.nan
    np.testing.assert_equal(call.forward()[:2], clean.forward()[:2])
    np.testing.assert_equal(tuple(call.backward()), tuple(clean.backward()))


@pytest.mark.parametrize("D", [1, 2])
def test_nan_does_not_cross_a_reset(D: int) -> None:
    call = draw_call(Case(T=6, N=2, D=D, L=2))
    reset = np.zeros((6, 2), bool)
    reset[3, 0] = True
    clean = forward(call.params, call.x, reset=reset)
    call.x[1, 0] = np.nan
    dirty = forward(call.params, call.x, reset=reset)
    np.testing.assert_array_equal(dirty.output[3:], clean.output[3:])
    assert np.isnan(dirty.output[1:3, 0]).all()
    d_x = backward(dirty.saved, call.d_output).x
    np.testing.assert_array_equal(d_x[3:], backward(clean.saved, call.d_output).x[3:])


def test_results_past_the_length_are_zero_whatever_the_weights() -> None:
    call = draw_call(FULL)
    call.params["weight_ih_l0"][0] = np.nan
    output, d_x = call.forward().output, call.backward().x
    for n, length in enumerate(call.options["lengths"]):
        assert np.isnan(output[:length, n]).all()
        np.testing.assert_array_equal(output[length:, n], 0)
        np.testing.assert_array_equal(d_x[length:, n], 0)


def test_nan_in_the_state_of_an_empty_row_does_not_reach_the_weights() -> None:
    call, clean = draw_call(FULL), draw_call(FULL)
    assert call.state is not None
    call.state[0][:, call.options["lengths"] == 0] = np.nan
    call.state[1][:, call.options["lengths"] == 0] = np.nan
    np.testing.assert_equal(call.backward().params, clean.backward().params)


# Layers


@pytest.mark.parametrize("D", [1, 2])
def test_dropout_scales_what_the_next_layer_reads(D: int) -> None:
    call = draw_call(Case(L=2, D=D, dropout=True))
    assert call.state is not None
    x, (h_0, c_0), (mask,) = call.x, call.state, call.options["dropout_masks"]
    for layer in (0, 1):
        params = {
            name.replace("_l1", "_l0"): value
            for name, value in call.params.items()
            if name.split("_")[2] == f"l{layer}"
        }
        k = slice(layer * D, (layer + 1) * D)
        x = forward(params, x * mask if layer else x, (h_0[k], c_0[k])).output
    np.testing.assert_array_equal(call.forward().output, x)


# Shapes and dtypes


@pytest.mark.parametrize("case", [Case(T=0), Case(N=0), Case(T=0, N=0), Case(T=0, L=2, D=2, P=3)], **by_name)
@pytest.mark.parametrize("optional", [False, True], ids=["", "lengths-reset"])
def test_empty_input(case: Case, optional: bool) -> None:
    call = draw_call(case)
    if optional:
        call.options = {"lengths": np.zeros(case.N, int), "reset": np.zeros((case.T, case.N), bool)}
    output, (h_n, c_n), _ = call.forward()
    assert output.shape == (case.T, case.N, case.D * (case.P or case.H))
    np.testing.assert_equal((h_n, c_n), call.state)
    d_x, d_state, d_params = call.backward()
    assert d_x.shape == call.x.shape
    np.testing.assert_equal(d_state, call.d_state)
    for name, d_param in d_params.items():
        np.testing.assert_array_equal(d_param, np.zeros(call.params[name].shape))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.longdouble, np.complex128])
def test_dtype_follows_the_inputs(dtype: Any) -> None:
    call, exact = draw_call(FULL), draw_call(FULL)
    call.params = {name: value.astype(dtype) for name, value in call.params.items()}
    call.x, call.state = call.x.astype(dtype), None
    exact.state = None
    result = call.forward()
    gradients = backward(result.saved, call.d_output.astype(dtype))
    arrays = [result.output, *result.state, gradients.x, *gradients.state, *gradients.params.values()]
    assert {array.dtype for array in arrays} == {np.dtype(dtype)}
    # Rounding of the float32 inputs themselves bounds its error.
    atol = 1e-5 if dtype is np.float32 else 1e-14
    np.testing.assert_allclose(result.output, exact.forward().output, atol=atol)


def test_lists_are_taken_as_arrays() -> None:
    call = draw_call(Case())
    params = {name: value.tolist() for name, value in call.params.items()}
    np.testing.assert_array_equal(forward(params, call.x.tolist()).output, forward(call.params, call.x).output)


# Elementary functions


def test_sigmoid_is_exact_in_both_tails() -> None:
    z = np.concatenate([-np.logspace(-3, 2.8, 50), [0], np.logspace(-3, 2.8, 50)])
    expected = 1 / (1 + np.exp(-z.astype(np.longdouble)))
    np.testing.assert_allclose(sigmoid(z), expected.astype(np.float64), rtol=1e-15)  # exp and two roundings
    np.testing.assert_array_equal(sigmoid(np.array([-np.inf, -1e5, 1e5, np.inf, np.nan])), [0, 0, 1, 1, np.nan])
    assert sigmoid(np.float32([-200, 0, 200])).dtype == np.float32


def test_sigmoid_is_analytic() -> None:
    z = np.array([-1000.0, -30.0, -1.0, 0.0, 2.0, 30.0, 1000.0])
    value = sigmoid(z + STEP * 1j)
    np.testing.assert_allclose(value.real, sigmoid(z), atol=1e-16)
    np.testing.assert_allclose(value.imag / STEP, sigmoid(z) * sigmoid(-z), rtol=1e-14)


def test_module_imports_numpy_alone() -> None:
    code = """
import runpy, sys
before = set(sys.modules)
runpy.run_path(sys.argv[1])
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    path = sys.modules[forward.__module__].__file__
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["numpy"]
