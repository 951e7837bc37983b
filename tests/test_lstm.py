"""The layer and its stream: agreement with the reference and with PyTorch, errors, weights, copies, threads."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import (
    BOTH,
    WIDER,
    ByArray,
    ByDlpack,
    Case,
    Problem,
    assert_close,
    assert_same_bits,
    draw,
    forced,
    grid,
    tolerance,
)

import fastlstm
from fastlstm import LSTM, reference

by_name = {"ids": str}
FULL = Case(T=7, N=5, I=3, H=19, L=2, D=2, P=6, lengths=True, reset=True)
STREAMED = Case(T=9, N=2, I=3, H=19, L=2)


# Against the reference

FEATURES = [
    *grid(
        Case(T=6, N=5, I=4, H=11), L=(1, 2, 3), D=(1, 2), P=(0, 3), bias=(False, True), lengths=(False, True),
        reset=(False, True), state=(False, True), layout=("TNI", "NTI"), dtype=BOTH,
    ),
    *grid(
        Case(T=6, N=1, I=4, H=11, layout="TI"), L=(1, 3), D=(1, 2), P=(0, 3), lengths=(False, True),
        reset=(False, True), state=(False, True), dtype=BOTH,
    ),
]  # fmt: skip
SIZES = [
    *grid(Case(T=5, N=3, I=3), H=range(1, 34), dtype=BOTH),  # every lane remainder of H
    *[replace(case, H=case.P + 3) for case in grid(Case(T=5, N=3, I=3), P=range(1, 34), dtype=BOTH)],
    *[replace(case, H=40) for case in grid(Case(T=5, N=3, I=3, D=2, L=2), P=range(1, 34, 4), dtype=BOTH)],
    *grid(Case(T=4, N=2, H=7), I=range(1, 20), dtype=BOTH),
    *grid(Case(T=4, H=23), N=range(1, 20), dtype=BOTH),  # every remainder of the tile's rows
    *grid(Case(N=2, H=7, D=2, L=2), T=(1, 2, 3, 15, 16, 17, 31, 33, 50), dtype=BOTH),  # ends of a chunk
    *grid(Case(T=3, N=7, I=5), H=(47, 48, 49, 64, 65, 96, 97, 127, 128, 131), dtype=BOTH),
    *grid(Case(T=1, N=1, I=1, H=1), L=(1, 3), D=(1, 2), dtype=BOTH),
    *grid(Case(T=23, N=1, I=1, H=3, L=3, D=2, lengths=True, reset=True), P=(0, 1, 2), dtype=BOTH),
    *grid(Case(T=11, N=13, I=17, H=37, L=2, lengths=True, reset=True), D=(1, 2), P=(0, 5), dtype=BOTH),
]


@pytest.mark.parametrize("case", [*FEATURES, *SIZES], **by_name)
def test_agrees_with_the_reference(case: Case) -> None:
    problem = draw(case)
    assert_close(problem.call(), problem.exact(), tolerance(case))


@pytest.mark.parametrize(
    "case", grid(Case(T=4, N=4, I=5, lengths=True, reset=True), H=(7, 16, 40), dtype=BOTH), **by_name
)
def test_agrees_where_gates_saturate(case: Case) -> None:
    """Weights 30 times as large: most gates are at 0 or 1, and a rounding error of z is 30 times as large."""
    problem = draw(case, scale=30)
    assert_close(problem.call(), problem.exact(), 30 * tolerance(case))


def test_lengths_beyond_the_first_steps_are_not_read() -> None:
    problem = draw(FULL)
    expected = problem.call()
    for n, length in enumerate(problem.lengths):
        problem.x[length:, n] = np.nan
        problem.reset[length:, n] ^= True
    assert_same_bits(problem.call(), expected)
    for n, length in enumerate(problem.lengths):
        assert not expected[0][length:, n].any()


@pytest.mark.parametrize("D", [1, 2])
def test_length_zero_returns_the_state_unchanged(D: int) -> None:
    problem = draw(replace(FULL, D=D, N=3))
    _, (h_n, c_n) = problem.call(lengths=np.array([0, 7, 0]), reset=np.ones((7, 3), bool))
    assert_same_bits((h_n[:, ::2], c_n[:, ::2]), tuple(part[:, ::2] for part in problem.state))


@pytest.mark.parametrize("layout", ["TNI", "NTI"])
@pytest.mark.parametrize(("T", "N"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("options", [False, True], ids=["", "lengths-reset"])
def test_empty_input_gives_an_empty_result(layout: str, T: int, N: int, options: bool) -> None:
    problem = draw(Case(T=T, N=N, L=2, D=2, lengths=options, reset=options, layout=layout))
    output, state = problem.call()
    assert output.shape == (T, N, 10)
    assert_same_bits(state, problem.state)
    _, state = problem.call(state=None)
    assert not state[0].any()
    assert not state[1].any()


@pytest.mark.parametrize("dtype", BOTH)
def test_output_layout_follows_batch_first(dtype: Any) -> None:
    case = Case(T=6, N=4, lengths=True, reset=True, dtype=dtype)
    problem, swapped = draw(case), draw(replace(case, layout="NTI"))
    assert_same_bits(swapped.call(), problem.call())
    x = np.ascontiguousarray(problem.x.swapaxes(0, 1))
    assert swapped.layer(x)[0].shape == (4, 6, 5)
    assert swapped.layer(x[0])[0].shape == (6, 5)  # unbatched: batch_first says nothing


def test_results_are_new_arrays_and_arguments_untouched() -> None:
    problem, untouched = draw(FULL), draw(FULL)
    first = problem.call()
    kept = (first[0].copy(), tuple(part.copy() for part in first[1]))
    problem.call(x=problem.x + 1)
    assert_same_bits(first, kept)
    assert_same_bits((problem.x, *problem.state), (untouched.x, *untouched.state))
    np.testing.assert_array_equal(problem.lengths, untouched.lengths)
    np.testing.assert_array_equal(problem.reset, untouched.reset)


@pytest.mark.parametrize("layout", ["TNI", "NTI", "TI"])
def test_out_is_written_and_nothing_beside_it(layout: str) -> None:
    problem = draw(Case(T=5, N=1, H=9, layout=layout))
    guard = 64
    memory = np.full(guard + 45 + guard, 7, np.float32)
    x = problem.x[:, 0] if layout == "TI" else problem.x.swapaxes(0, 1) if layout == "NTI" else problem.x
    state = tuple(part[:, 0] for part in problem.state) if layout == "TI" else problem.state
    expected, _ = problem.layer(x, state)
    out = memory[guard:-guard].reshape(expected.shape)
    assert problem.layer(x, state, out=out)[0] is out
    assert_same_bits(out, expected)
    assert (memory[:guard] == 7).all()
    assert (memory[-guard:] == 7).all()


def test_out_may_share_memory_with_what_is_read() -> None:
    problem = draw(Case(T=6, N=4, I=8, H=8))
    expected = problem.call()
    x = problem.x.copy()
    output, state = problem.layer(x, problem.state, out=x)
    assert output is x
    assert_same_bits((output, state), expected)
    memory = np.empty(6 * 4 * 8, np.float32)
    h_0 = memory[:32].reshape(1, 4, 8)
    h_0[:] = problem.state[0]
    out = memory.reshape(6, 4, 8)
    assert_same_bits(problem.layer(problem.x, (h_0, problem.state[1]), out=out), expected)
    chunk = problem.x.copy()
    assert_same_bits(problem.layer.stream(4, problem.state)(chunk, out=chunk), expected[0])


# Against PyTorch


def torch_twin(problem: Problem) -> Any:
    torch = pytest.importorskip("torch")
    case = problem.case
    dtype = torch.float32 if problem.layer.dtype == np.float32 else torch.float64
    twin = torch.nn.LSTM(case.I, case.H, case.L, case.bias, bidirectional=case.D == 2, proj_size=case.P, dtype=dtype)
    twin.load_state_dict({name: torch.tensor(value) for name, value in problem.layer.state_dict().items()})
    return twin


def run_torch(problem: Problem, lengths: Any = None) -> tuple[Any, tuple[Any, Any]]:
    torch = pytest.importorskip("torch")
    twin, x = torch_twin(problem), torch.tensor(problem.x)
    state = problem.state and tuple(map(torch.tensor, problem.state))
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a note on which implementation takes projections
        if lengths is None:
            output, state = twin(x, state)
        else:
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            output, state = twin(packed, state)
            output, _ = torch.nn.utils.rnn.pad_packed_sequence(output, total_length=len(x))
    return output.numpy(), tuple(part.numpy() for part in state)


@pytest.mark.parametrize(
    "case",
    grid(Case(T=6, N=5, I=4, H=13), L=(1, 3), D=(1, 2), P=(0, 3), bias=(False, True), state=(False, True), dtype=BOTH),
    **by_name,
)
@pytest.mark.parametrize("lengths", [None, [4, 6, 1, 3, 6]], ids=["", "lengths"])
def test_agrees_with_torch(case: Case, lengths: Any) -> None:
    problem = draw(case)
    # PyTorch's rounding comes on top of ours.
    assert_close(problem.call(lengths=lengths), run_torch(problem, lengths), 2 * tolerance(case))


@pytest.mark.parametrize(
    "case",
    [
        *grid(Case(N=1, state=False), I=(1, 8), H=(16, 40), T=(150,), dtype=BOTH),
        *grid(Case(T=30, N=8, I=12, state=False), H=(64,), D=(1, 2), dtype=BOTH),
        *grid(Case(T=24, N=8, I=40, H=40, L=2, state=False), dtype=BOTH),
        *grid(Case(T=20, N=4, I=20, H=64, D=2, L=2, P=24, state=False), dtype=BOTH),
        *grid(Case(T=20, N=4, I=64, H=256, state=False), dtype=[np.float32]),
        *grid(Case(T=10, N=2, I=256, H=256, state=False), dtype=[np.float32]),
    ],
    **by_name,
)
def test_error_is_at_most_that_of_torch(case: Case) -> None:
    """Root mean square of the error over a few draws; 5% are within what these draws can tell.

    In float64 small cells are on a par with PyTorch's: between 0.95 and 1.05 over 16 draws, and these are 5.
    """
    pytest.importorskip("torch")
    own, theirs = 0.0, 0.0
    for seed in range(5):
        problem = draw(case, seed)
        exact = problem.exact()[0]
        own += np.square(problem.call()[0] - exact).mean()
        theirs += np.square(run_torch(problem)[0] - exact).mean()
    assert own**0.5 <= (1.05 if case.dtype == np.float32 else 1.1) * theirs**0.5


def test_initial_weights_are_those_of_torch() -> None:
    """Names in PyTorch's order, shapes, and a uniform distribution within 1 / sqrt(H)."""
    problem = draw(Case(I=7, H=64, L=3, D=2, P=5))
    twin = torch_twin(problem)
    mine = problem.layer.state_dict()
    assert list(mine) == [name for name, _ in twin.named_parameters()]
    assert problem.layer.num_parameters == sum(parameter.numel() for parameter in twin.parameters())
    values = np.concatenate([value.ravel() for value in mine.values()])
    assert 0.124 < np.abs(values).max() <= 0.125
    assert abs(values.mean()) < 0.001
    assert values.std() == pytest.approx(0.125 / np.sqrt(3), rel=0.02)


def test_rng_seeds_the_weights() -> None:
    same = [LSTM(3, 5, rng=1), LSTM(3, 5, rng=np.int64(1)), LSTM(3, 5, rng=np.random.default_rng(1))]
    for other in same[1:]:
        np.testing.assert_equal(other.state_dict(), same[0].state_dict())
    assert (LSTM(3, 5, rng=2).weight_ih_l0 != same[0].weight_ih_l0).all()
    assert (LSTM(3, 5).weight_ih_l0 != LSTM(3, 5).weight_ih_l0).all()


def test_takes_tensors_and_whatever_offers_dlpack_or_array() -> None:
    torch = pytest.importorskip("torch")
    problem = draw(FULL)
    expected = problem.call()
    for wrap in (torch.tensor, ByDlpack, ByArray, np.ndarray.tolist):
        state = tuple(map(wrap, problem.state))
        options = {"lengths": wrap(problem.lengths), "reset": wrap(problem.reset)}
        assert_same_bits(problem.layer(wrap(problem.x), state, **options), expected)
        layer = copy.deepcopy(problem.layer)
        layer.load_state_dict({name: wrap(value) for name, value in problem.layer.state_dict().items()})
        assert_same_bits(layer(problem.x, problem.state, lengths=problem.lengths, reset=problem.reset), expected)


def test_a_tensor_that_requires_grad_is_refused_with_the_remedy() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=re.escape("`x.detach()`")):
        LSTM(3, 5)(torch.zeros((2, 1, 3), requires_grad=True))


# Numbers that are not finite, or hardly numbers


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "h_0", "c_0"])
@pytest.mark.parametrize("case", grid(Case(T=5, N=9, H=19), L=(1, 2), P=(0, 5), dtype=BOTH), **by_name)
def test_non_finite_numbers_propagate_as_in_the_reference(case: Case, where: str, value: float) -> None:
    problem = draw(case)
    target = {"x": problem.x[2], "h_0": problem.state[0][0], "c_0": problem.state[1][0]}[where]
    target[4, 1] = value
    assert_close(problem.call(), problem.exact(), tolerance(case))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", BOTH)
def test_non_finite_weights_propagate_as_in_the_reference(dtype: Any, value: float) -> None:
    case = Case(T=4, N=3, H=19, P=5, dtype=dtype)
    for name, where in [
        ("weight_ih_l0", (20, 1)),
        ("weight_hh_l0", (3, 2)),
        ("bias_hh_l0", (40,)),
        ("weight_hr_l0", (1, 7)),
    ]:
        problem = draw(case)
        params = problem.layer.state_dict()
        params[name][where] = value
        problem.layer.load_state_dict(params)
        assert_close(problem.call(), problem.exact(), tolerance(case))


@pytest.mark.parametrize("dtype", BOTH)
def test_denormal_states_are_kept(dtype: Any) -> None:
    """With an open forget gate and nothing coming in, c stays what it was, however small."""
    layer = LSTM(2, 21, dtype=dtype)
    bias = np.zeros(84, dtype)
    bias[21:42] = 100  # f = 1
    zeros = {name: np.zeros_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(zeros | {"bias_ih_l0": bias})
    smallest = np.finfo(dtype).smallest_subnormal
    c_0 = (smallest * np.arange(1, 22, dtype=dtype)).reshape(1, 1, 21)
    output, (_, c_n) = layer(np.zeros((3, 1, 2), dtype), (np.zeros_like(c_0), c_0))
    assert_same_bits(c_n, c_0)
    # h = o * tanh(c) = c / 2, to the nearest of the few numbers that there are
    assert (np.abs(output[-1, 0] - c_0[0, 0] / 2) <= smallest).all()
    assert output[-1, 0, 1:].all()


# Streaming


@pytest.mark.parametrize(
    "case",
    grid(replace(STREAMED), L=(1, 3), P=(0, 4), N=(1, 2, 7), state=(False, True), bias=(False, True), dtype=BOTH),
    **by_name,
)
def test_stream_agrees_with_the_reference(case: Case) -> None:
    problem = draw(case)
    stream = problem.layer.stream(case.N, problem.state)
    steps = np.stack([stream(x) for x in problem.x])
    assert_close((steps, stream.state), problem.exact(), tolerance(case))


def test_stream_state_is_a_copy_and_can_be_set() -> None:
    problem = draw(STREAMED)
    stream = problem.layer.stream(2)
    stream.state = problem.state
    h, c = stream.state
    assert_same_bits((h, c), problem.state)
    h[:] = c[:] = np.nan
    assert_same_bits(stream.state, problem.state)
    given = tuple(part.copy() for part in problem.state)
    stream.state = given
    given[0][:] = given[1][:] = np.nan
    assert_same_bits(stream(problem.x), problem.call()[0])
    stream.state = None
    assert not any(part.any() for part in stream.state)


@pytest.mark.parametrize(
    ("rows", "zeroed"),
    [
        (None, [0, 1, 2, 3]), ([True, False, False, True], [0, 3]), ([1], [1]), (np.array([2, 0, 2]), [0, 2]),
        (-1, [3]), ([], []), (np.zeros(4, bool), []), (np.uint8([3]), [3]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("steps", [0, 1, 2])  # the state moves between two buffers
def test_stream_reset_zeroes_the_rows(rows: Any, zeroed: list[int], steps: int) -> None:
    problem = draw(replace(STREAMED, N=4))
    stream = problem.layer.stream(4, problem.state)
    for x in problem.x[:steps]:
        stream(x)
    h, c = stream.state
    stream.reset(rows)
    h[:, zeroed] = c[:, zeroed] = 0
    assert_same_bits(stream.state, (h, c))
    assert_same_bits(stream(problem.x), problem.layer(problem.x, (h, c))[0])


def test_stream_takes_out() -> None:
    problem = draw(STREAMED)
    expected = problem.call()[0]
    stream = problem.layer.stream(2, problem.state)
    step, chunk = np.full((2, 19), np.nan, np.float32), np.full((8, 2, 19), np.nan, np.float32)
    assert stream(problem.x[0], out=step) is step
    assert stream(problem.x[1:], out=chunk) is chunk
    assert_same_bits(np.concatenate([step[None], chunk]), expected)
    assert stream(problem.x[:0]).shape == (0, 2, 19)


def test_a_bidirectional_layer_does_not_stream() -> None:
    with pytest.raises(ValueError, match="bidirectional"):
        LSTM(3, 5, bidirectional=True).stream()


# What bad input gets: (what is called, arguments, exception, what the message holds)

X = np.ones((7, 5, 3), np.float32)
H0, C0 = np.zeros((4, 5, 6), np.float32), np.zeros((4, 5, 19), np.float32)
BAD_X: list[tuple[Any, Any, str]] = [
    (np.ones((7, 5, 4)), ValueError, "`x` must have shape (T, N, I) with I = 3, got (7, 5, 4)"),
    (np.ones(3), ValueError, "`x` must have shape (T, N, I) with I = 3, got (3,)"),
    (np.float32(1), ValueError, "`x`"),
    (np.ones((7, 5, 3, 1)), ValueError, "`x`"),
    (np.ones((7, 5, 0)), ValueError, "`x`"),
    (None, TypeError, "`x` must be an array of numbers, got NoneType"),
    (X.astype(complex), TypeError, "`x` must be of a dtype that casts to float32"),
    (X.astype(object), TypeError, "`x`"),
    (X.astype(str), TypeError, "`x`"),
    (X.astype("M8[s]"), TypeError, "`x`"),
    ("sequence", TypeError, "`x`"),
    (None, TypeError, "`x`"),
    ({1: 2}, TypeError, "`x`"),
    ([[1.0], [1.0, 2.0]], ValueError, "`x`"),
]
BAD_CALLS: list[tuple[dict[str, Any], Any, str]] = [
    *[({"x": x}, kind, message) for x, kind, message in BAD_X],
    ({"state": H0}, TypeError, "`state` must be a pair"),
    ({"state": (H0,)}, ValueError, "`state` must be a pair"),
    ({"state": (H0, C0, C0)}, ValueError, "`state` must be a pair"),
    ({"state": (C0, H0)}, ValueError, "`state`: h_0 must have shape (L*D, N, P) = (4, 5, 6), got (4, 5, 19)"),
    ({"state": (H0, C0[:, :4])}, ValueError, "`state`: c_0 must have shape (L*D, N, H) = (4, 5, 19), got (4, 4, 19)"),
    ({"state": (H0[0], C0[0])}, ValueError, "`state`"),
    ({"state": (H0, None)}, TypeError, "state: c_0"),
    ({"state": (H0.astype(complex), C0)}, TypeError, "state: h_0"),
    ({"state": 3}, TypeError, "`state`"),
    ({"lengths": [1, 2, 3]}, ValueError, "`lengths` must have shape (N,) = (5,), got (3,)"),
    ({"lengths": [[1, 2, 3, 4, 5]]}, ValueError, "`lengths`"),
    ({"lengths": 3}, ValueError, "`lengths`"),
    ({"lengths": [1, 2, 3, 4, 8]}, ValueError, "`lengths` must be from 0 to T = 7, got 8"),
    ({"lengths": [1, -1, 3, 4, 5]}, ValueError, "`lengths` must be from 0 to T = 7, got -1"),
    ({"lengths": [1.0, 2.0, 3.0, 4.0, 5.0]}, TypeError, "`lengths` must be integers"),
    ({"lengths": [True] * 5}, TypeError, "`lengths` must be integers"),
    ({"lengths": "12345"}, TypeError, "`lengths`"),
    ({"lengths": np.full(5, 2**63, np.uint64)}, ValueError, "`lengths`"),
    ({"lengths": [2**80] * 5}, TypeError, "`lengths`"),
    ({"lengths": [-(2**63)] * 5}, ValueError, "`lengths`"),
    ({"reset": np.zeros((5, 7), bool)}, ValueError, "`reset` must have shape (T, N) = (7, 5), got (5, 7)"),
    ({"reset": np.zeros(7, bool)}, ValueError, "`reset`"),
    ({"reset": np.zeros((7, 5), np.uint8)}, TypeError, "`reset` must be booleans"),
    ({"reset": np.zeros((7, 5))}, TypeError, "`reset`"),
    ({"out": np.empty((7, 5, 11), np.float32)}, ValueError, "`out` must have shape (T, N, D*P) = (7, 5, 12), got (7"),
    ({"out": np.empty((7, 5, 12))}, TypeError, "`out` must have dtype float32"),
    ({"out": np.empty((7, 5, 12), ">f4")}, TypeError, "`out`"),
    ({"out": np.empty((7, 12, 5), np.float32).swapaxes(1, 2)}, ValueError, "`out` must be C-contiguous"),
    ({"out": np.empty((14, 5, 12), np.float32)[::2]}, ValueError, "`out` must be C-contiguous"),
    ({"out": np.empty(1681, np.uint8)[1:].view(np.float32).reshape(7, 5, 12)}, ValueError, "contiguous and aligned"),
    ({"out": np.broadcast_to(np.float32(0), (7, 5, 12))}, ValueError, "`out` must be writeable"),
    ({"out": [[0.0]]}, TypeError, "`out`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "kind", "message"), BAD_CALLS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_arguments_of_a_call(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    layer = draw(FULL).layer
    before, expected = layer.state_dict(), layer(X)
    arguments = {"x": X, "out": np.full((7, 5, 12), np.nan, np.float32)} | changed
    with pytest.raises(kind, match=re.escape(message)):
        layer(**arguments)
    if "out" not in changed:
        assert np.isnan(arguments["out"]).all()
    np.testing.assert_equal(layer.state_dict(), before)
    assert_same_bits(layer(X), expected)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.ones((4, 5, 2)), {}, "`x` must have shape (N, T, I) with I = 3, got (4, 5, 2)"),
        (np.ones((4, 5, 3)), {"reset": np.zeros((5, 4), bool)}, "`reset` must have shape (N, T) = (4, 5), got (5, 4)"),
        (np.ones((4, 5, 3)), {"lengths": [1] * 5}, "`lengths` must have shape (N,) = (4,), got (5,)"),
        (np.ones((4, 5, 3)), {"lengths": [6] * 4}, "`lengths` must be from 0 to T = 5, got 6"),
        (np.ones((4, 5, 3)), {"out": np.empty((5, 4, 9), np.float32)}, "`out` must have shape (N, T, D*P) = (4, 5, 9)"),
        (np.ones((5, 3)), {"out": np.empty((5, 1, 9), np.float32)}, "`out` must have shape (T, D*P) = (5, 9)"),
        (np.ones((5, 3)), {"reset": np.zeros((5, 1), bool)}, "`reset` must have shape (T,) = (5,), got (5, 1)"),
        (np.ones((5, 3)), {"lengths": [1, 2]}, "`lengths` must have shape (N,) = (1,), got (2,)"),
        (
            np.ones((5, 3)),
            {"state": (np.zeros((1, 1, 9)),) * 2},
            "h_0 must have shape (L*D, P) = (1, 9), got (1, 1, 9)",
        ),
    ],
)
def test_messages_speak_of_the_layout(x: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LSTM(3, 9, batch_first=True)(x, **options)


BAD_LAYERS: list[tuple[dict[str, Any], Any, str]] = [
    *[
        ({name: value}, kind, f"`{name}`")
        for name in ("input_size", "hidden_size", "num_layers")
        for value, kind in [(0, ValueError), (-1, ValueError), *[(v, TypeError) for v in (2.0, "3", None, True, [3])]]
    ],
    *[({name: 1}, TypeError, f"`{name}`") for name in ("bias", "batch_first", "bidirectional")],
    *[({"dropout": value}, ValueError, "`dropout`") for value in (-0.1, 1.1, np.nan, np.inf)],
    *[({"dropout": value}, TypeError, "`dropout`") for value in ("0.5", None, True, 0.5j)],
    ({"proj_size": -1}, ValueError, "`proj_size`"),
    ({"proj_size": 5}, ValueError, "`proj_size` must be less than `hidden_size` = 5, got 5"),
    ({"proj_size": 2.0}, TypeError, "`proj_size`"),
    *[({"dtype": value}, ValueError, "`dtype`") for value in (np.float16, int, complex, "O", "U3", np.longdouble)],
    *[({"dtype": value}, TypeError, "`dtype`") for value in ("float31", 3, None)],
    ({"rng": -1}, ValueError, "`rng`"),
    *[({"rng": value}, TypeError, "`rng` must be an integer or") for value in (1.5, "seed", np.random.RandomState(0))],
]  # fmt: skip


@pytest.mark.parametrize(("changed", "kind", "message"), BAD_LAYERS, ids=str)
def test_bad_arguments_of_a_layer(changed: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        LSTM(**({"input_size": 3, "hidden_size": 5} | changed))


GOOD = LSTM(3, 5, rng=0).state_dict()
BAD_STATE_DICTS: list[tuple[Any, Any, str]] = [
    ({name: GOOD[name] for name in list(GOOD)[1:]}, ValueError, "missing ['weight_ih_l0']"),
    (GOOD | {"weight_hr_l0": np.ones((2, 5))}, ValueError, "unexpected ['weight_hr_l0']"),
    (GOOD | {3: 4}, ValueError, "unexpected [3]"),
    ({}, ValueError, "missing"),
    (
        GOOD | {"weight_hh_l0": GOOD["weight_hh_l0"].T},
        ValueError,
        "`weight_hh_l0` must have shape (20, 5), got (5, 20)",
    ),
    (GOOD | {"bias_ih_l0": np.ones((20, 1))}, ValueError, "`bias_ih_l0`"),
    (GOOD | {"bias_ih_l0": np.ones(20, complex)}, TypeError, "`bias_ih_l0`"),
    (GOOD | {"bias_ih_l0": None}, TypeError, "`bias_ih_l0`"),
    (GOOD | {"bias_ih_l0": ["a"] * 20}, TypeError, "`bias_ih_l0`"),
    (list(GOOD), TypeError, "`mapping` must map names to arrays, got list"),
    (None, TypeError, "`mapping`"),
    (LSTM(3, 5), TypeError, "`mapping`"),
]


@pytest.mark.parametrize(
    ("mapping", "kind", "message"), BAD_STATE_DICTS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_state_dicts_leave_the_layer_unchanged(mapping: Any, kind: type[Exception], message: str) -> None:
    layer = LSTM(3, 5, rng=1)
    before, expected = layer.state_dict(), layer(X)
    if isinstance(mapping, dict) and len(mapping) > 1:
        mapping = {name: value + 1 if isinstance(value, np.ndarray) else value for name, value in mapping.items()}
    with pytest.raises(kind, match=re.escape(message)):
        layer.load_state_dict(mapping)
    np.testing.assert_equal(layer.state_dict(), before)
    assert_same_bits(layer(X), expected)


BAD_STREAMS: list[tuple[Callable[[Any], Any], Any, str]] = [
    (lambda s: s(np.ones((2, 4))), ValueError, "`x` must have shape (N, I) or (T, N, I) with N = 2 and I = 3, got (2"),
    (lambda s: s(np.ones((3, 3), np.float32)), ValueError, "`x`"),
    (lambda s: s(np.ones(3)), ValueError, "`x`"),
    (lambda s: s(np.ones((1, 1, 2, 3))), ValueError, "`x`"),
    (lambda s: s(np.ones((2, 3), complex)), TypeError, "`x`"),
    (lambda s: s(None), TypeError, "`x`"),
    (lambda s: s(np.ones((2, 3)), out=np.empty((2, 18), np.float32)), ValueError, "`out` must have shape (N, P) = (2,"),
    (lambda s: s(np.ones((1, 2, 3)), out=np.empty((2, 19), np.float32)), ValueError, "`out` must have shape (T, N, P)"),
    (lambda s: s(np.ones((2, 3)), out=np.empty((2, 19))), TypeError, "`out`"),
    (lambda s: s(np.ones((2, 3)), out=0), TypeError, "`out`"),
    (lambda s: setattr(s, "state", (np.zeros((2, 2, 19)),)), ValueError, "`state`"),
    (lambda s: setattr(s, "state", (np.zeros((2, 1, 19)), np.zeros((2, 2, 19)))), ValueError, "`state`: h_0"),
    (lambda s: setattr(s, "state", 5), TypeError, "`state`"),
    (lambda s: s.reset([2]), ValueError, "`rows` must be from -N to N - 1 = 1"),
    (lambda s: s.reset([-3]), ValueError, "`rows`"),
    (lambda s: s.reset([True]), ValueError, "`rows` must have shape (2,), got (1,)"),
    (lambda s: s.reset([0.0]), TypeError, "`rows`"),
    (lambda s: s.reset("0"), TypeError, "`rows`"),
    (lambda s: s.reset([[0], [0, 1]]), ValueError, "`rows`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("act", "kind", "message"), BAD_STREAMS, ids=lambda value: value if isinstance(value, str) else ""
)
def test_bad_arguments_of_a_stream_leave_its_state(
    act: Callable[[Any], Any], kind: type[Exception], message: str
) -> None:
    problem = draw(STREAMED)
    stream = problem.layer.stream(2, problem.state)
    stream(problem.x[0])
    before = stream.state
    with pytest.raises(kind, match=re.escape(message)):
        act(stream)
    assert_same_bits(stream.state, before)
    assert_same_bits(stream(problem.x[1:]), problem.call()[0][1:])


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size`"),
        ({"batch_size": 1.0}, TypeError, "`batch_size`"),
        ({"state": (np.zeros((2, 2, 19)),) * 2}, ValueError, "`state`"),
        ({"state": "zeros"}, TypeError, "`state`"),
    ],
)
def test_bad_arguments_of_stream(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        draw(STREAMED).layer.stream(**options)


# Weights


def moved(problem: Problem) -> dict[str, Any]:
    """Return other weights for the layer."""
    rng = np.random.default_rng(9)
    return {name: value + rng.normal(size=value.shape) * 0.1 for name, value in problem.layer.state_dict().items()}


@pytest.mark.parametrize("how", ["load_state_dict", "strict=False", "attribute"])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l1_reverse", "bias_ih_l1", "bias_hh_l0", "weight_hr_l1"])
def test_a_changed_weight_takes_effect_on_the_next_call(name: str, how: str) -> None:
    problem = draw(FULL)
    before = problem.call()[0]
    value = moved(problem)[name]
    if how == "load_state_dict":
        problem.layer.load_state_dict(problem.layer.state_dict() | {name: value})
    elif how == "strict=False":
        problem.layer.load_state_dict({name: value, "another": 3}, strict=False)
    else:
        setattr(problem.layer, name, value)
    assert_same_bits(getattr(problem.layer, name), value.astype(np.float32))
    after = problem.call()
    assert (after[0] != before).any()
    assert_close(after, problem.exact(), tolerance(problem.case))


def test_weights_are_copied_and_read_only() -> None:
    problem = draw(FULL)
    expected, given = problem.call(), problem.layer.state_dict()
    problem.layer.load_state_dict(given)
    given["weight_ih_l0"][:] = np.nan
    problem.layer.state_dict()["weight_ih_l0"][:] = np.nan
    weight = problem.layer.weight_ih_l0
    with pytest.raises(ValueError, match="read-only"):
        weight[0] = np.nan
    with pytest.raises(ValueError, match="WRITEABLE"):
        weight.flags.writeable = True
    with pytest.raises(ValueError, match="read-only"):
        problem.layer.weight_ih_l0 += 1
    with pytest.raises(ValueError, match="`weight_ih_l0`"):
        problem.layer.weight_ih_l0 = np.ones(3)
    assert_same_bits(problem.call(), expected)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("chunk", [False, True])
def test_a_changed_weight_reaches_an_open_stream(steps: int, chunk: bool) -> None:
    problem = draw(STREAMED)
    stream = problem.layer.stream(2, problem.state)
    for x in problem.x[:steps]:
        stream(x)
    state = stream.state
    problem.layer.load_state_dict(moved(problem))
    assert_same_bits(stream.state, state)
    x = problem.x[steps:]
    output, state_after = problem.layer(x, state)
    assert_same_bits(stream(x) if chunk else np.stack([stream(x_t) for x_t in x]), output)
    assert_same_bits(stream.state, state_after)
    assert (output != draw(STREAMED).layer(x, state)[0]).any()


def test_a_stream_that_could_not_take_new_weights_takes_them_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes while they are packed, or later: before the stream has all that it needs."""
    from fastlstm.kernels.network import Network, StreamRunner

    def fail(*_: Any) -> None:
        raise MemoryError

    for owner, name in ((Network, "pack"), (StreamRunner, "set_state"), (StreamRunner, "stepper")):
        problem = draw(STREAMED)
        stream = problem.layer.stream(2, problem.state)
        stream(problem.x[0])
        state = stream.state
        problem.layer.load_state_dict(moved(problem))
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(MemoryError):
                stream(problem.x[1])
        output, state_after = problem.layer(problem.x[1:2], state)
        assert_same_bits(stream(problem.x[1]), output[0])
        assert_same_bits(stream.state, state_after)


SETTINGS = {
    "input_size": 3, "hidden_size": 19, "num_layers": 2, "bias": True, "batch_first": False, "dropout": 0.0,
    "bidirectional": True, "proj_size": 6, "dtype": np.dtype(np.float32), "num_parameters": 5168,
}  # fmt: skip


@pytest.mark.parametrize("name", [*SETTINGS, "weight_ih_l7", "anything"])
def test_settings_are_read_only(name: str) -> None:
    layer = draw(FULL).layer
    if name in SETTINGS:
        assert getattr(layer, name) == SETTINGS[name]
    with pytest.raises(AttributeError, match=name):
        setattr(layer, name, 3)
    if name in SETTINGS:
        assert getattr(layer, name) == SETTINGS[name]
    else:
        with pytest.raises(AttributeError, match=name):
            getattr(layer, name)


def test_representation_names_what_is_not_default() -> None:
    assert repr(LSTM(3, 5)) == "LSTM(3, 5)"
    layer = LSTM(3, 5, 2, batch_first=True, proj_size=2, dtype=np.float64)
    assert repr(layer) == "LSTM(3, 5, num_layers=2, batch_first=True, proj_size=2, dtype=float64)"
    assert repr(layer.stream(4)) == repr(layer) + ".stream(4)"


# Copies and threads

COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle{version}": lambda value, version=version: pickle.loads(pickle.dumps(value, version))
        for version in (2, 5)
    },
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
@pytest.mark.parametrize("dtype", BOTH)
def test_a_copy_gives_the_same_bits_and_is_independent(make: Callable[[Any], Any], used: bool, dtype: Any) -> None:
    problem = draw(replace(FULL, layout="NTI", dtype=dtype))
    if used:
        problem.call()
    other = replace(problem, layer=make(problem.layer))
    assert repr(other.layer) == repr(problem.layer)
    expected = problem.call()
    assert_same_bits(other.call(), expected)
    other.layer.load_state_dict(moved(problem))
    assert_same_bits(problem.call(), expected)
    assert (other.call()[0] != expected[0]).any()


def test_a_pickled_layer_keeps_no_buffer_of_somebody_else() -> None:
    layer, x, buffers = LSTM(64, 64, rng=0), np.ones((1, 1, 64), np.float32), []
    data = pickle.dumps(layer, 5, buffer_callback=buffers.append)
    lent = [bytearray(buffer.raw()) for buffer in buffers]
    other = pickle.loads(data, buffers=lent)
    for buffer in lent:
        buffer[:] = bytes(len(buffer))
    assert_same_bits(other(x), layer(x))
    assert (other.record(x).output == layer(x)[0]).all()


@pytest.mark.parametrize("make", [value for name, value in COPIES.items() if name != "copy"], ids=str)
def test_a_copy_of_a_stream_goes_on_from_its_state(make: Callable[[Any], Any]) -> None:
    problem = draw(STREAMED)
    stream = problem.layer.stream(2, problem.state)
    expected = problem.call()[0]
    stream(problem.x[:3])
    other = make(stream)
    assert_same_bits(other(problem.x[3:]), expected[3:])
    assert_same_bits(stream(problem.x[3:]), expected[3:])


@pytest.mark.parametrize("how", [(1, 1, 1, False, 4), (2, 1, 2, True, 4), (2, 4, 1, True, 4)], ids=str)
def test_one_layer_from_many_threads(how: tuple[int, int, int, bool, int]) -> None:
    problem = draw(replace(FULL, T=30))
    inputs = [problem.x + seed for seed in range(16)]
    expected = [problem.call(x=x) for x in inputs]
    with forced(*how), ThreadPoolExecutor(8) as pool:
        for results in [pool.map(lambda x: problem.call(x=x), inputs) for _ in range(20)]:
            for result, want in zip(results, expected, strict=True):
                assert_same_bits(result, want)


def test_a_call_sees_old_weights_or_new_ones_but_no_mixture() -> None:
    problem = draw(replace(FULL, T=30))
    weights = [problem.layer.state_dict(), moved(problem)]
    allowed = []
    for params in weights:
        problem.layer.load_state_dict(params)
        allowed.append(problem.call()[0].tobytes())
    with ThreadPoolExecutor(8) as pool:
        calls = []
        for params in itertools.islice(itertools.cycle(weights), 100):
            calls += [pool.submit(problem.call) for _ in range(3)]
            problem.layer.load_state_dict(params)
        assert {call.result()[0].tobytes() for call in calls} <= set(allowed)


def test_a_stream_from_many_threads_takes_one_step_at_a_time() -> None:
    problem = draw(replace(STREAMED, T=1))
    stream = problem.layer.stream(2)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(stream, [problem.x[0]] * 400))
    expected = problem.layer(np.repeat(problem.x, 400, axis=0))[0]
    assert {result.tobytes() for result in results} == {step.tobytes() for step in expected}


# Process-wide


@pytest.mark.usefixtures("restore_threads")
def test_set_num_threads() -> None:
    import numba

    fastlstm.set_num_threads(1)
    assert fastlstm.get_num_threads() == 1
    fastlstm.set_num_threads(np.int64(10**6))
    assert fastlstm.get_num_threads() == numba.config.NUMBA_NUM_THREADS
    for value, kind in [
        (0, ValueError),
        (-2, ValueError),
        (1.0, TypeError),
        ("2", TypeError),
        (None, TypeError),
        (True, TypeError),
    ]:
        with pytest.raises(kind, match="`n`"):
            fastlstm.set_num_threads(value)  # type: ignore[arg-type]
    assert fastlstm.get_num_threads() == numba.config.NUMBA_NUM_THREADS


def test_the_reference_is_wider_than_what_it_judges() -> None:
    """Where longdouble is no wider than float64, there is room in the tolerances for the reference's own rounding."""
    problem = draw(Case(dtype=np.float64))
    assert problem.exact()[0].dtype == WIDER[np.dtype(np.float64)]
    plain = reference.forward(problem.layer.state_dict(), problem.x, problem.state)
    assert_close((plain.output, plain.state), problem.exact(), tolerance(problem.case))
