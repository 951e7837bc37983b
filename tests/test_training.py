"""Recorded calls and their gradients: against the reference and PyTorch, same bits, what a tape keeps, bad input."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
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
    assert_same_bits,
    bits,
    draw,
    grid,
    random_cases,
    run_python,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bad_arguments import JUNK, LAYOUTS, arrays, odd_arguments, refused_or, relaid, shapes_near
from test_guest import CHILD, COMPILES, COUNT_REGIONS, QUICK, can_fork

import fastlstm
from fastlstm import LSTM, Linear, Sequential, reference, threads
from fastlstm import tape as tape_module
from fastlstm.bench.cases import CASES
from fastlstm.kernels import network, panels, sequence
from fastlstm.kernels.network import Network
from fastlstm.kernels.panels import Packing
from fastlstm.kernels.tile import GATES, blocking, fills_line
from fastlstm.kernels.training import BackwardSpace
from fastlstm.memory import CACHE_LINE
from fastlstm.tape import Tape

by_name = {"ids": str}
some = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
FULL = Case(T=7, N=5, I=3, H=19, L=2, D=2, P=6, lengths=True, reset=True)
SEVERAL_CHUNKS = Case(T=53, N=13, I=3, H=21, P=6, lengths=True, reset=True)  # 19 steps each, and a rest


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compile before any test changes what NumPy does."""
    fastlstm.warmup(("float32", "float64"), training=True)


# Problems, and the gradients that they should have


@dataclass
class Training:
    """A problem, and the gradients with respect to all its results, time-major."""

    problem: Problem
    d_output: Any
    d_state: Any
    options: dict[str, Any] = field(default_factory=dict)  # of `record`

    @property
    def case(self) -> Case:
        return self.problem.case

    def given(self, array: Any) -> Any:
        """Return an array (T, N, ...) as the case lays it out; None stays None."""
        if array is None or self.case.layout == "TNI":
            return array
        return array[:, 0] if self.case.layout == "TI" else np.ascontiguousarray(array.swapaxes(0, 1))

    def taken(self, array: Any) -> Any:
        """Return an array that is laid out as the case's as (T, N, ...)."""
        if self.case.layout == "TNI":
            return array
        return array[:, None] if self.case.layout == "TI" else array.swapaxes(0, 1)

    def given_state(self, state: Any) -> Any:
        if state is None or self.case.layout != "TI":
            return state
        return tuple(None if part is None else part[:, 0] for part in state)

    def taken_state(self, state: Any) -> Any:
        return state if self.case.layout != "TI" else tuple(part[:, None] for part in state)

    def record(self, **options: Any) -> Any:
        """Record the call in the case's layout; options come before those of the problem."""
        problem = self.problem
        arguments = {"lengths": problem.lengths, "reset": self.given(problem.reset)} | self.options | options
        return problem.layer.record(self.given(problem.x), self.given_state(problem.state), **arguments)

    def results(self, tape: Any) -> tuple[Any, Any]:
        """Return output and state, time-major and batched."""
        return self.taken(tape.output), self.taken_state(tape.state)

    def backward(self, tape: Any) -> dict[str, Any]:
        """Return every gradient by the name of its variable, time-major and batched."""
        found = tape.backward(self.given(self.d_output), self.given_state(self.d_state))
        assert list(found.params) == list(self.problem.layer.state_dict())
        d_h_0, d_c_0 = self.taken_state(found.state)
        gradients = {"x": self.taken(found.x), "h_0": d_h_0, "c_0": d_c_0, **found.params}
        assert {array.dtype for array in gradients.values()} == {self.problem.layer.dtype}
        return gradients

    def gradients(self, **options: Any) -> dict[str, Any]:
        return self.backward(self.record(**options))

    def exact(self, wide: Any = None, masks: Any = None) -> dict[str, Any]:
        """Return what the reference makes of the same numbers in a wider dtype."""
        problem = self.problem
        wide = wide or WIDER[problem.layer.dtype]

        def widened(part: Any) -> Any:
            return None if part is None else np.asarray(part).astype(wide)

        params = {name: widened(value) for name, value in problem.layer.state_dict().items()}
        state = problem.state and tuple(map(widened, problem.state))
        forward = reference.forward(
            params, widened(problem.x), state, lengths=problem.lengths, reset=problem.reset, dropout_masks=masks
        )
        d_state = self.d_state and tuple(map(widened, self.d_state))
        found = reference.backward(forward.saved, widened(self.d_output), d_state)
        return {"x": found.x, "h_0": found.state[0], "c_0": found.state[1], **found.params}

    def rows(self, rows: Any, lengths: Any = None) -> Training:
        """Return the problem of some rows alone."""
        problem, index = self.problem, np.atleast_1d(rows)

        def part(array: Any) -> Any:
            return None if array is None else np.ascontiguousarray(array[:, index])

        only = replace(
            problem,
            case=replace(problem.case, N=len(index)),
            x=part(problem.x),
            state=problem.state and tuple(map(part, problem.state)),
            lengths=None if problem.lengths is None else problem.lengths[index],
            reset=part(problem.reset),
        )
        return replace(self, problem=only, d_output=part(self.d_output), d_state=tuple(map(part, self.d_state)))


def draw_training(case: Case, seed: int = 0, **settings: Any) -> Training:
    """Draw a problem and gradients of all its results; past the lengths there is NaN, which nobody may read.

    Settings go to the layer.
    """
    problem = draw(case, seed)
    if settings:
        old = problem.layer
        problem.layer = LSTM(**{**old._config, "dtype": old.dtype, "rng": 0, **settings})
        problem.layer.load_state_dict(old.state_dict())
    rng = np.random.default_rng([seed, 1, case.T, case.N, case.H])
    dtype, P = problem.layer.dtype, case.P or case.H
    shapes = [(case.T, case.N, case.D * P), *((case.L * case.D, case.N, size) for size in (P, case.H))]
    d_output, d_h_n, d_c_n = (rng.normal(size=shape).astype(dtype) for shape in shapes)
    if problem.lengths is not None:
        past = np.arange(case.T)[:, None] >= problem.lengths
        problem.x[past] = d_output[past] = np.nan
    return Training(problem, d_output, (d_h_n, d_c_n))


def limit_of(case: Case) -> float:
    """Return how far an element of a gradient may lie from the exact one, relative to the largest of its array.

    A gradient that goes back a step is a sum of 4H products, whose factors carry the rounding errors of the forward,
    sums of I + P + 1 terms: independent errors of half an eps a term make eps / 2 * sqrt(K) of a typical element, and
    the worst of some 10^5 elements lies five deviations out.  Steps before add theirs, through gates that halve them,
    and so does each layer.  A sum over T*N rows grows as its own error does.
    """
    widest = max(case.I, case.D * (case.P or case.H) if case.L > 1 else 0)
    K = 4 * case.H + widest + (case.P or case.H) + 1
    return float(np.finfo(case.dtype).eps) * 5 * np.sqrt(K) * case.L


def assert_gradients(actual: dict[str, Any], exact: dict[str, Any], limit: float) -> None:
    """Compare gradients by name; NaN and infinity must be the same, and what is 0 where all is 0."""
    assert list(actual) == list(exact)
    for name, want in exact.items():
        got = actual[name]
        assert got.shape == want.shape, name
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=name)
        finite = np.isfinite(want)
        np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
        error = np.abs(got[finite] - want[finite]).max(initial=0)
        assert error <= limit * np.abs(want[finite]).max(initial=0), f"{name}: {error}"


def assert_same_gradients(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        np.testing.assert_array_equal(bits(actual[name]), bits(expected[name]), err_msg=name)


MARGIN = 128


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill what NumPy leaves uninitialised with NaN (-1 as integers), between margins that nobody may write to."""
    empty, empty_like = np.empty, np.empty_like
    framed = []

    def poisoned_empty(shape: Any, dtype: Any = float, *rest: Any, **options: Any) -> Any:
        model = empty(shape, dtype, *rest, **options)
        if model.dtype.hasobject:
            return model
        memory = empty(model.nbytes + 2 * MARGIN, np.uint8)
        memory[:] = 255
        framed.append(memory)
        inner = memory[MARGIN : MARGIN + model.nbytes].view(model.dtype)
        return np.lib.stride_tricks.as_strided(inner, model.shape, model.strides)

    def poisoned_like(prototype: Any, *rest: Any, **options: Any) -> Any:
        model = empty_like(prototype, *rest, **options)
        flat = poisoned_empty(model.size, model.dtype)
        return np.lib.stride_tricks.as_strided(flat, model.shape, model.strides)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "empty", poisoned_empty)
        patch.setattr(np, "empty_like", poisoned_like)
        yield
    for memory in framed:
        assert (memory[:MARGIN] == 255).all()
        assert (memory[-MARGIN:] == 255).all()


def framed(array: Any) -> Any:
    """Return a copy between margins of NaN."""
    memory = np.full(array.nbytes + 2 * MARGIN, 255, np.uint8)
    inner = memory[MARGIN : MARGIN + array.nbytes].view(array.dtype).reshape(array.shape)
    inner[...] = array
    return inner


@contextmanager
def shared_out(ranks: int, shares: int, groups: int, hoisted: bool, chunk: int) -> Iterator[None]:
    """Share out every recorded call in one way, in place of what the library would choose; at most N groups."""
    from fastlstm.kernels import network, training

    def how(_: Any, N: int, *rest: Any) -> Any:
        return network.Strategy(ranks, shares, min(groups, N), hoisted, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "choose_strategy", how)
        patch.setattr(threads, "_threads", ranks)
        yield


# (ranks, shares, groups, hoisted, chunk); among them more threads than cores, a group for each row, steps one by one
ROWS = [
    (1, 1, 1, False, 16),
    (1, 1, 99, True, 5),
    (2, 1, 4, True, 1),
    (2, 1, 99, False, 3),
    (3, 1, 6, True, 7),
    (5, 1, 2, False, 1),
]
UNITS = [(2, 2, 1, True, 4), (2, 2, 1, False, 1), (3, 7, 1, True, 16), (7, 2, 1, False, 5)]


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list to which each parallel region that the forward or the backward asks for is added."""
    from fastlstm.kernels import region
    from fastlstm.kernels.compile import entry
    from fastlstm.kernels.panels import panels_kernel

    granted: list[bool] = []
    run_region = region.run_region
    packing = {entry(panels_kernel, np.dtype(dtype)) for dtype in BOTH}

    def counted(plan: Any, ranks: int) -> bool:
        done = run_region(plan, ranks)
        if int(plan[0]) not in packing:
            granted.append(done)
        return done

    monkeypatch.setattr(region, "run_region", counted)
    return granted


# Against the reference

FEATURES = [
    *grid(
        Case(T=6, N=5, I=4, H=11), L=(1, 3), D=(1, 2), P=(0, 3), bias=(False, True), lengths=(False, True),
        reset=(False, True), state=(False, True), layout=("TNI", "NTI"), dtype=BOTH,
    ),
    *grid(
        Case(T=6, N=1, I=4, H=11, layout="TI"), L=(1, 2), D=(1, 2), P=(0, 3), lengths=(False, True),
        reset=(False, True), state=(False, True), dtype=BOTH,
    ),
]  # fmt: skip
MANY = Case(T=3, N=3, I=5, H=7, lengths=True, reset=True)
SIZES = [
    *grid(Case(T=5, N=3, I=3), H=range(1, 34), dtype=BOTH),  # every lane remainder of H, P and I
    *[replace(case, H=case.P + 3) for case in grid(Case(T=5, N=3, I=3), P=range(1, 34), dtype=BOTH)],
    *[replace(case, H=70) for case in grid(replace(MANY, D=2, L=2), P=range(1, 66, 7), dtype=BOTH)],
    *grid(Case(T=4, N=2, H=7), I=[*range(1, 34), 47, 48, 49, 63, 64, 65, 96, 97, 127, 129, 131], dtype=BOTH),
    *grid(Case(T=4, H=23), N=range(1, 20), dtype=BOTH),  # every remainder of the tile's rows
    *grid(MANY, N=(95, 96, 97, 193, 211, 257, 300), D=(1, 2), dtype=BOTH),  # groups of rows; steps of a chunk; beyond
    *grid(replace(MANY, lengths=False, reset=False), N=(97, 300), P=(0, 2), dtype=BOTH),
    *grid(
        Case(N=1, I=2, H=5, D=2, reset=True), T=(1, 2, 3, 255, 256, 257, 511, 513, 600), dtype=BOTH
    ),  # ends of chunks
    *grid(Case(N=1, I=2, H=21, D=2), T=(1, 2, 255, 256, 257, 513, 600), dtype=BOTH),  # in one call of the tile each
    *grid(Case(T=1, N=1), I=(1, 4, 16, 48, 160, 288), H=(16, 32, 64, 144, 272), dtype=BOTH),  # weights as they are
    *grid(
        Case(T=1, N=1, I=32, H=48),
        bias=(False, True),
        D=(1, 2),
        L=(1, 2),
        lengths=(False, True),
        reset=(False, True),
        state=(False, True),
        layout=("TNI", "NTI"),
        dtype=BOTH,
    ),
    *grid(replace(MANY, N=7, D=2), T=(1, 35, 36, 37, 72, 73, 110), P=(0, 2), dtype=BOTH),
    *grid(Case(T=150, N=5, I=3, H=9), lengths=(False, True), P=(0, 4), dtype=BOTH),
    *grid(Case(T=3, N=7, I=5), H=(47, 48, 49, 63, 64, 65, 96, 97, 127, 128, 131), dtype=BOTH),
    *grid(Case(T=1, N=1, I=1, H=1), L=(1, 3), D=(1, 2), dtype=BOTH),
    *grid(Case(T=23, N=1, I=1, H=3, L=3, D=2, lengths=True, reset=True), P=(0, 1, 2), dtype=BOTH),
    *grid(Case(T=11, N=13, I=17, H=37, L=2, lengths=True, reset=True), D=(1, 2), P=(0, 5), dtype=BOTH),
]


@pytest.mark.parametrize("case", [*FEATURES, *SIZES], **by_name)
def test_every_gradient_agrees_with_the_reference(case: Case) -> None:
    training = draw_training(case)
    training.d_output = framed(training.d_output)
    training.d_state = tuple(map(framed, training.d_state))
    with poisoned():
        tape = training.record()
        gradients = training.backward(tape)
    assert_gradients(gradients, training.exact(), limit_of(case))
    assert_same_bits(training.results(tape), training.problem.call())
    if case.lengths:
        assert not gradients["x"][np.arange(case.T)[:, None] >= training.problem.lengths].any()


LARGE = [
    *grid(Case(T=20, N=64, I=32, H=64), P=(0, 24), lengths=(False, True), dtype=BOTH),  # rows shared out
    *grid(Case(T=12, N=8, I=40, H=256), P=(0, 96), D=(1, 2), dtype=BOTH),  # units shared out
    *grid(Case(T=24, N=7, I=17, H=211, lengths=True, reset=True), P=(0, 83), dtype=BOTH),
    *grid(Case(T=9, N=1, I=40, H=301), D=(1, 2), dtype=BOTH),
    *grid(Case(T=25, N=211, I=40, H=40, L=2, lengths=True), dtype=BOTH),
    *grid(Case(T=64, N=8, I=13, H=520), dtype=BOTH),  # chunks of 512 rows, and a few columns left
]


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("case", LARGE, **by_name)
def test_large_sizes_agree_with_the_reference_and_are_shared_out(case: Case, entered: list[bool]) -> None:
    training = draw_training(case)
    fastlstm.set_num_threads(2)
    with poisoned():
        gradients = training.gradients()
    wide = np.float64  # longdouble takes its time at these sizes
    assert_gradients(gradients, training.exact(wide), (1 if case.dtype is np.float32 else 2) * limit_of(case))
    if fastlstm.get_num_threads() > 1:
        assert len(entered) >= 2 * case.L  # directions side by side
        assert all(entered)
    fastlstm.set_num_threads(1)
    entered.clear()
    assert_same_gradients(training.gradients(), gradients)
    assert not entered


@pytest.mark.parametrize("absent", ["output", "state", "h_n", "c_n", "output-h_n", "output-c_n", "h_n-c_n", "all"])
@pytest.mark.parametrize(
    "case", grid(replace(FULL, N=4), L=(1, 2), D=(1, 2), P=(0, 6), layout=("TNI", "NTI"), dtype=BOTH), **by_name
)
def test_a_gradient_that_is_none_is_zeros(case: Case, absent: str) -> None:
    training = draw_training(case)
    d_output, (d_h_n, d_c_n) = training.d_output, training.d_state
    training.d_output = None if "output" in absent or absent == "all" else d_output
    training.d_state = (None if "h_n" in absent else d_h_n, None if "c_n" in absent else d_c_n)
    if absent in ("state", "all"):
        training.d_state = None
    with poisoned():
        gradients = training.gradients()
    assert_gradients(gradients, training.exact(), limit_of(case))
    if absent == "all":
        assert not any(array.any() for array in gradients.values())
    zeros = [np.zeros_like(part) for part in (d_output, d_h_n, d_c_n)]
    training.d_output = zeros[0] if training.d_output is None else training.d_output
    parts = training.d_state or (None, None)
    training.d_state = tuple(zero if part is None else part for part, zero in zip(parts, zeros[1:], strict=True))
    assert_same_gradients(training.gradients(), gradients)


ROWS_OF_TWO_CHUNKS = 600  # what the complex step of a large size takes more than a second for


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_dot_product_at_every_benchmark_size(name: str) -> None:
    """<gradient, v> against the derivative of the loss in the direction v, by a complex step of the reference.

    Each gradient's error is a random direction of its own, so that v sees about its norm.
    """
    size = next(case for case in CASES if case.name == name)
    T = min(size.T, max(2, -(-ROWS_OF_TWO_CHUNKS // size.N)))
    case = Case(T, size.N, size.I, size.H, size.L, size.D)
    training = draw_training(case)
    problem, rng = training.problem, np.random.default_rng(0)
    given = {"x": problem.x, "h_0": problem.state[0], "c_0": problem.state[1], **problem.layer.state_dict()}
    step = 1e-100
    directions = {key: rng.normal(size=array.shape) for key, array in given.items()}
    moved = {key: array + 1j * step * directions[key] for key, array in given.items()}
    x, h_0, c_0 = (moved.pop(key) for key in ("x", "h_0", "c_0"))
    output, state, _ = reference.forward(moved, x, (h_0, c_0))
    pairs = [(output, training.d_output), *zip(state, training.d_state, strict=True)]
    exact = sum(np.vdot(cotangent, result.imag) for result, cotangent in pairs) / step
    for dtype in BOTH:
        twin = replace(case, dtype=dtype)
        layer = LSTM(size.I, size.H, size.L, bidirectional=size.D == 2, dtype=dtype)
        layer.load_state_dict(problem.layer.state_dict())
        training.problem = replace(problem, case=twin, layer=layer)
        gradients = training.gradients()
        found = sum(np.vdot(gradients[key], direction) for key, direction in directions.items())
        norm = np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in gradients.values()))
        assert abs(found - exact) <= limit_of(twin) * norm


# Against PyTorch


def torch_gradients(training: Training, lengths: Any = None) -> dict[str, Any]:
    torch = pytest.importorskip("torch")
    problem, case = training.problem, training.case
    dtype = torch.float32 if problem.layer.dtype == np.float32 else torch.float64
    twin = torch.nn.LSTM(case.I, case.H, case.L, case.bias, bidirectional=case.D == 2, proj_size=case.P, dtype=dtype)
    twin.load_state_dict({name: torch.tensor(value) for name, value in problem.layer.state_dict().items()})
    torch.set_num_threads(1)  # which spin where they wait
    x, h_0, c_0 = (torch.tensor(array, requires_grad=True) for array in (problem.x, *problem.state))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a note on which implementation takes projections
        if lengths is None:
            output, (h_n, c_n) = twin(x, (h_0, c_0))
        else:
            packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            packed, (h_n, c_n) = twin(packed, (h_0, c_0))
            output, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, total_length=len(x))
        pairs = [(output, training.d_output), *zip((h_n, c_n), training.d_state, strict=True)]
        sum((result * torch.tensor(cotangent)).sum() for result, cotangent in pairs).backward()
    found = {"x": x, "h_0": h_0, "c_0": c_0, **dict(twin.named_parameters())}
    return {name: tensor.grad.numpy() for name, tensor in found.items()}


@pytest.mark.parametrize(
    "case", grid(Case(T=6, N=5, I=4, H=13), L=(1, 3), D=(1, 2), P=(0, 3), bias=(False, True), dtype=BOTH), **by_name
)
@pytest.mark.parametrize("lengths", [None, [4, 6, 1, 3, 6]], ids=["", "lengths"])
def test_agrees_with_torch(case: Case, lengths: Any) -> None:
    training = draw_training(case)
    training.problem.lengths = None if lengths is None else np.array(lengths)
    # PyTorch's rounding comes on top of ours.
    assert_gradients(training.gradients(), torch_gradients(training, lengths), 2 * limit_of(case))


@pytest.mark.parametrize(
    "case",
    [
        *grid(Case(T=150, N=1), I=(1, 8), H=(16, 40), dtype=BOTH),
        *grid(Case(T=30, N=8, I=12, H=64), D=(1, 2), dtype=BOTH),
        *grid(Case(T=24, N=8, I=40, H=40, L=2), dtype=BOTH),
        *grid(Case(T=20, N=4, I=20, H=64, D=2, L=2, P=24), dtype=BOTH),
        *grid(Case(T=20, N=24, I=64, H=256), dtype=[np.float32]),
        *grid(Case(T=10, N=2, I=256, H=256), dtype=[np.float32]),
    ],
    **by_name,
)
def test_error_is_about_that_of_torch(case: Case) -> None:
    """Root mean square of the error of each gradient over a few draws.

    Over 6 draws it is mostly 0.5 to 1 of PyTorch's; where a gradient has few elements draws differ by a third.  With a
    projection PyTorch adds up the weights' gradients step by step: its chains are N long, ours 64, which with N = 4
    makes up to 2.6.
    """
    pytest.importorskip("torch")
    own: dict[str, float] = {}
    theirs: dict[str, float] = {}
    for seed in range(3):
        training = draw_training(case, seed)
        exact = training.exact()
        for errors, gradients in ((own, training.gradients()), (theirs, torch_gradients(training))):
            for name, want in exact.items():
                errors[name] = errors.get(name, 0.0) + float(np.square(gradients[name] - want).mean())
    for name, error in own.items():
        assert error**0.5 <= (3 if case.P else 1.5) * theirs[name] ** 0.5, name


# The same bits

MIXED = [
    *grid(SEVERAL_CHUNKS, L=(1, 2), D=(1, 2), P=(0, 6), dtype=BOTH),
    *grid(replace(SEVERAL_CHUNKS, bias=False, lengths=False), D=(1, 2), reset=(False, True), state=(False, True)),
    *grid(replace(SEVERAL_CHUNKS, T=7), H=(9, 40, 130), P=(0, 8), dtype=BOTH),
    *grid(replace(SEVERAL_CHUNKS, T=6, N=1), H=(1, 15, 16, 17, 97), P=(0,), dtype=BOTH),
    *grid(replace(SEVERAL_CHUNKS, T=1, N=1, I=32, P=0), H=(48, 64), lengths=(False, True), dtype=BOTH),
]


@pytest.mark.parametrize("how", [*ROWS, *UNITS], **by_name)
@pytest.mark.parametrize("case", MIXED, **by_name)
def test_every_strategy(case: Case, how: tuple[int, int, int, bool, int]) -> None:
    training = draw_training(case)
    expected = training.gradients()
    with shared_out(*how), poisoned():
        tape = training.record()
        gradients = training.backward(tape)
    assert_same_gradients(gradients, expected)
    assert_same_bits(training.results(tape), training.problem.call())


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("case", LARGE, **by_name)
def test_every_number_of_threads_even_between_record_and_backward(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    training = draw_training(case)
    results = {}
    for pair in itertools.product((1, 2, 5), repeat=2):
        monkeypatch.setattr(threads, "_threads", pair[0])
        tape = training.record(checkpoint_every=None if 1 in pair else 10)
        monkeypatch.setattr(threads, "_threads", pair[1])
        results[pair] = training.backward(tape)
    for pair in results:
        assert_same_gradients(results[pair], results[1, 1])


@pytest.mark.parametrize("why", ["region taken", "forked child"])
@pytest.mark.parametrize("case", grid(SEVERAL_CHUNKS, D=(1, 2), P=(0, 6), lengths=(False, True)), **by_name)
def test_the_serial_kernel_where_no_parallel_region_is_to_be_had(
    case: Case, why: str, entered: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = draw_training(case)
    expected = training.gradients()
    entered.clear()
    if why == "forked child":
        monkeypatch.setattr(threads, "_in_forked_child", True)
    with threads.region if why == "region taken" else nullcontext():
        for how in [(2, 1, 4, True, 7), (2, 2, 1, True, 7), (3, 3, 1, False, 1)]:
            with shared_out(*how):
                assert_same_gradients(training.gradients(), expected)
    assert entered
    assert not any(entered)


@pytest.mark.parametrize("how", [(2, 1, 2, True, 7), (3, 1, 3, False, 7), (4, 2, 1, True, 7)], **by_name)
def test_directions_of_which_one_has_little_work(how: tuple[int, int, int, bool, int]) -> None:
    """Segment by segment, from both ends: the rows of most lengths are in one direction's segment and not the other's.

    What one thread does for itself is not run beside what all of them share.
    """
    training = draw_training(Case(T=55, N=7, I=7, H=46, D=2, lengths=True, dtype=np.float64))
    assert training.problem.lengths is not None
    training.problem.lengths[:] = 29, 8, 13, 35, 32, 24, 52
    training.problem.x, training.d_output = np.nan_to_num(training.problem.x), np.nan_to_num(training.d_output)
    expected = training.gradients()
    assert np.isfinite(expected["weight_hh_l0"]).all()
    with shared_out(*how):
        for _ in range(5):
            assert_same_gradients(training.gradients(checkpoint_every=20), expected)


CHECKPOINTED = [
    *grid(SEVERAL_CHUNKS, L=(1, 2), D=(1, 2), P=(0, 6), lengths=(False, True), reset=(False, True)),
    *grid(SEVERAL_CHUNKS, D=(1, 2), state=(False,), layout=("TNI", "NTI"), dtype=BOTH),
    *grid(replace(SEVERAL_CHUNKS, T=600, N=1, layout="TI"), D=(1, 2), P=(0, 6), dtype=BOTH),
    *grid(replace(SEVERAL_CHUNKS, T=600, N=1, P=0, lengths=False, reset=False), I=(3, 17), D=(1, 2), dtype=BOTH),
    *grid(replace(SEVERAL_CHUNKS, T=9, N=300), D=(1, 2)),  # chunks of one step
]


@pytest.mark.parametrize("case", CHECKPOINTED, **by_name)
def test_checkpoints_change_no_bit(case: Case) -> None:
    training = draw_training(case)
    expected_tape = training.record()
    expected = training.backward(expected_tape)
    assert_gradients(expected, training.exact(np.float64), limit_of(case))
    for every in (1, 19, 20, 38, case.T - 1, case.T, 2**62):
        with poisoned():
            tape = training.record(checkpoint_every=np.int64(every))
            gradients = training.backward(tape)
        assert_same_bits(training.results(tape), training.results(expected_tape))
        assert_same_gradients(gradients, expected)
    for how in [(2, 1, 4, True, 7), (2, 2, 1, True, 7)]:
        with shared_out(*how), poisoned():
            assert_same_gradients(training.gradients(checkpoint_every=1), expected)


@pytest.mark.parametrize("H", [64, 44, 46, 36, 63])
@pytest.mark.parametrize("case", grid(SEVERAL_CHUNKS, N=(1, 3, 13), D=(1, 2), P=(0, 6), dtype=BOTH), **by_name)
def test_what_is_saved_past_the_caches_has_the_same_bits(case: Case, H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no cache holds it; of 44 and 46 the last block is cut or narrow, as of 36; some have no whole lines."""
    plan, past = Network.plan, []
    dtype = np.dtype(case.dtype)

    def watched(*arguments: Any, **values: Any) -> Any:
        numbers = list(plan(*arguments, **values))
        past.append(numbers[list(sequence.PLAN.names).index("past_caches")])
        return numbers

    monkeypatch.setattr(Network, "plan", watched)
    case = replace(case, H=H)
    expected = draw_training(case).gradients()
    assert not any(past)
    past.clear()
    monkeypatch.setattr(network, "PAST_CACHES", 0)
    with poisoned():
        gradients = draw_training(case).gradients()
    whole_lines = [rows * H * dtype.itemsize % CACHE_LINE == 0 for rows in (1, GATES)]  # of c', of the gates
    assert set(past) == {sum(whole_lines) if fills_line(blocking(dtype).units, dtype) else 0}
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize(
    "case",
    [
        *grid(
            Case(T=6, N=5, I=4, H=11), L=(1, 3), P=(0, 3), state=(False, True), layout=("TNI", "NTI"), dtype=BOTH
        ),
        *grid(Case(T=6, N=1, I=4, H=11, layout="TI"), L=(1, 2), P=(0, 3), state=(False, True), dtype=BOTH),
        *grid(Case(T=1, N=1, I=32, H=32), state=(False, True), dtype=BOTH),
        Case(T=9, N=24, I=4, H=11),  # halves
    ],
    **by_name,
)  # fmt: skip
def test_a_call_like_one_before_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arguments are not looked at closely, and it has nothing of the call before."""
    one, other = draw_training(case), draw_training(case, seed=1)
    other.problem.layer.load_state_dict(one.problem.layer.state_dict())
    expected = [[training.results(tape := training.record()), training.backward(tape)] for training in (one, other)]
    other.problem.layer = one.problem.layer = copy.deepcopy(one.problem.layer)
    check, checked = LSTM._check_call, []
    monkeypatch.setattr(LSTM, "_check_call", lambda *rest: checked.append(1) or check(*rest))
    with poisoned():
        one.record()
        tapes = [one.record(), other.record()]
        assert len(checked) == 1
        for problem in (one.problem, other.problem):
            for array in (problem.x, *(problem.state or ())):
                array[...] = np.nan
        for training, tape, (results, gradients) in zip((one, other), tapes, expected, strict=True):
            assert_same_bits(training.results(tape), results)
            assert_same_gradients(training.backward(tape), gradients)


def test_calls_of_some_sizes_in_turn_are_known_with_their_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, entered: list[bool]
) -> None:
    """Even where another thread changes that number while it is found out how they are run."""
    know, made = tape_module._Alike.__init__, []

    def interrupted(*arguments: Any) -> None:
        made.append(1)
        fastlstm.set_num_threads(2)
        know(*arguments)
        fastlstm.set_num_threads(1)

    monkeypatch.setattr(threads, "_threads", 1)
    monkeypatch.setattr(tape_module._Alike, "__init__", interrupted)
    lstm = LSTM(6, 64, rng=0)
    for _ in range(3):
        for T in range(40, 48):
            tape = lstm.record(np.ones((T, 64, 6), np.float32))
            tape.backward(tape.output)
    assert len(made) == 8
    assert not entered


def test_a_call_like_one_before_it_takes_what_any_call_takes() -> None:
    lstm, rng = LSTM(3, 5, rng=0), np.random.default_rng(0)
    x, h_0, c_0 = (rng.normal(size=shape).astype(np.float32) for shape in ((4, 2, 3), (1, 2, 5), (1, 2, 5)))
    expected = lstm.record(x, (h_0, c_0))
    d_x = expected.backward(expected.output, (h_0, None)).x
    swapped = x.astype(x.dtype.newbyteorder())
    for like_x in (x.tolist(), x.astype(np.float64), np.asfortranarray(x), swapped, x[::-1].copy()[::-1]):
        for state in ([h_0, c_0], (h_0.tolist(), c_0), (np.asfortranarray(h_0), c_0.astype(np.float64))):
            tape = lstm.record(like_x, state)
            assert_same_bits((tape.output, tape.state), (expected.output, expected.state))
            np.testing.assert_array_equal(tape.backward(tape.output, [h_0, None]).x, d_x)
    for wrong, message in [((h_0,), "pair"), ((h_0, c_0[:, :1]), "c_0 must have shape"), (h_0, "pair")]:
        with pytest.raises((TypeError, ValueError), match=message):
            lstm.record(x, wrong)
    with pytest.raises(TypeError, match="`x` must be of a dtype"):
        lstm.record(x.astype(np.complex64))


@pytest.mark.parametrize("case", grid(Case(T=3, N=2, I=5), H=(16, 37, 64), P=(0, 6), dtype=BOTH), **by_name)
def test_panels_past_the_caches(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = draw_training(case).gradients()
    prepare, past = Packing._prepare, []

    def watched(packing: Packing, ranks: int) -> Any:
        past.append(packing._past_caches)
        return prepare(packing, ranks)

    monkeypatch.setattr(Packing, "_prepare", watched)
    monkeypatch.setattr(panels, "LARGE_PANELS", 0)
    with poisoned():
        gradients = draw_training(case).gradients()
    assert set(past) == {fills_line(blocking(np.dtype(case.dtype)).units, np.dtype(case.dtype))}
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("outputs", [16, 37, 128])
def test_panels_of_a_linear_layer_past_the_caches(outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Linear(48, outputs, rng=0), np.random.default_rng(0).normal(size=(7, 3, 48)).astype(np.float32)

    def results(layer: Linear) -> dict[str, Any]:
        tape = layer.record(x)
        gradients = tape.backward(tape.output)
        return {"output": tape.output, "called": layer(x), "x": gradients.x, **gradients.params}

    expected = results(layer)
    monkeypatch.setattr(panels, "LARGE_PANELS", 0)
    with poisoned():
        assert_same_gradients(results(copy.deepcopy(layer)), expected)


@pytest.mark.parametrize("where", ["at", "before", "after"])
@pytest.mark.parametrize("case", grid(SEVERAL_CHUNKS, D=(1, 2), P=(0, 6), state=(False, True)), **by_name)
def test_lengths_and_resets_at_the_ends_of_segments(case: Case, where: str) -> None:
    training = draw_training(replace(case, lengths=False, reset=False))
    shift = {"at": 0, "before": -1, "after": 1}[where]
    problem = training.problem
    problem.lengths = np.clip(np.resize([19, 38, 53, 0, 1, 34, 15], case.N) + shift, 0, case.T)
    problem.reset = np.zeros((case.T, case.N), bool)
    problem.reset[np.clip(np.array([0, 19, 38, 34, 15]) + shift, 0, case.T - 1), 1:] = True
    expected = training.gradients()
    assert_gradients(expected, training.exact(np.float64), limit_of(case))
    for every in (1, 20):
        assert_same_gradients(training.gradients(checkpoint_every=every), expected)


@pytest.mark.parametrize("case", grid(Case(T=130, N=2, I=5, H=20), D=(1, 2), P=(0, 6), dtype=BOTH), **by_name)
def test_a_chunk_of_which_one_row_is_left(case: Case) -> None:
    """A chunk has 128 steps here; of the next one the longer row alone reaches the first step, or the first two."""
    training = draw_training(case)
    for lengths in ([129, 60], [60, 129], [130, 128]):
        training.problem.lengths = np.array(lengths)
        expected = training.gradients()
        assert_gradients(expected, training.exact(), limit_of(case))
        assert_same_gradients(training.gradients(checkpoint_every=1), expected)


@pytest.mark.parametrize(
    "case",
    [
        *grid(SEVERAL_CHUNKS, L=(1, 2), D=(1, 2), P=(0, 6), dtype=BOTH),
        *grid(Case(T=3, N=7, I=5), H=(1, 4, 15, 16, 33, 64, 130), dtype=BOTH),
        *grid(replace(SEVERAL_CHUNKS, T=5, N=40, layout="NTI"), dtype=BOTH),
    ],
    **by_name,
)
def test_each_row_alone(case: Case) -> None:
    """Gradients of x and of the initial state of a row are those of a call with that row alone."""
    training = draw_training(case)
    gradients = training.gradients()
    for n in range(case.N):
        alone = training.rows(n).gradients()
        for name in ("x", "h_0", "c_0"):
            np.testing.assert_array_equal(bits(alone[name][:, 0]), bits(gradients[name][:, n]), err_msg=name)


@pytest.mark.parametrize("every", [None, 20])
@pytest.mark.parametrize("case", grid(SEVERAL_CHUNKS, D=(1, 2), P=(0, 6)), **by_name)
def test_backward_again_gives_the_same_and_what_it_gave_is_the_callers(case: Case, every: int | None) -> None:
    training = draw_training(case)
    tape = training.record(checkpoint_every=every)
    output, state = training.results(tape)
    kept = output.copy(), tuple(part.copy() for part in state)
    expected = {name: array.copy() for name, array in training.backward(tape).items()}
    gradients = training.backward(tape)
    arrays = list(gradients.values())
    for one, other in itertools.combinations(arrays, 2):
        assert not np.may_share_memory(one, other)
    for array in [*arrays, *state]:
        array[...] = np.nan
    d_output = training.d_output
    training.d_output = 2 * d_output
    doubled = training.backward(tape)
    assert (doubled["x"][0] != expected["x"][0]).any()
    training.d_output = d_output
    assert_same_gradients(training.backward(tape), expected)
    assert_same_bits(training.taken(tape.output), kept[0])
    assert_same_bits(training.problem.call(), kept)


@pytest.mark.parametrize("case", grid(SEVERAL_CHUNKS, D=(1, 2), P=(0, 6), dtype=BOTH), **by_name)
def test_whatever_the_call_before_left_behind(case: Case) -> None:
    training = draw_training(case)
    expected = training.gradients()
    poison = replace(training, problem=replace(training.problem, x=np.full_like(training.problem.x, np.nan)))
    for how in [None, *ROWS[3:], *UNITS[::2]]:
        with shared_out(*how) if how else nullcontext():
            assert np.isnan(poison.gradients()["weight_hh_l0"]).any()
            assert_same_gradients(training.gradients(), expected)


@given(
    case=random_cases(60),
    how=st.tuples(st.integers(2, 3), st.integers(1, 3), st.integers(1, 16), st.booleans(), st.integers(1, 20)),
    every=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
@settings(some, max_examples=60)
def test_random_calls(case: Case, how: tuple[int, int, int, bool, int], every: int, seed: int) -> None:
    training = draw_training(case, seed)
    with poisoned():
        expected = training.gradients()
    assert_gradients(expected, training.exact(np.float64), 2 * limit_of(case))
    with shared_out(*how), poisoned():
        assert_same_gradients(training.gradients(checkpoint_every=every), expected)


@pytest.mark.parametrize("how", [(1, 1, 1, False, 4), (2, 1, 2, True, 4), (2, 2, 1, True, 4)], ids=str)
def test_one_layer_and_one_tape_from_many_threads(how: tuple[int, int, int, bool, int]) -> None:
    training = draw_training(replace(SEVERAL_CHUNKS, D=2))
    expected = training.gradients()
    with shared_out(*how), ThreadPoolExecutor(8) as pool:
        tape = training.record()
        for gradients in pool.map(lambda n: training.backward(tape) if n % 2 else training.gradients(), range(60)):
            assert_same_gradients(gradients, expected)


# What a tape answers for


def changed_weights(layer: Any) -> dict[str, Any]:
    return {name: -2 * value - 1 for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("how", ["load_state_dict", "assignment"])
@pytest.mark.parametrize(
    "case", grid(replace(SEVERAL_CHUNKS, T=39, L=2, D=2), layout=("TNI", "NTI"), P=(0, 6)), **by_name
)
def test_the_tape_answers_for_the_call_it_recorded(case: Case, how: str, every: int | None) -> None:
    """Whatever becomes of weights, input, states, lengths and resets afterwards."""
    training = draw_training(case)
    problem = training.problem
    problem.x = np.nan_to_num(problem.x)
    expected = training.gradients()
    problem.x, problem.reset = (np.ascontiguousarray(training.given(array)) for array in (problem.x, problem.reset))
    x, state, reset = problem.x, problem.state, problem.reset
    tape = problem.layer.record(x, state, lengths=problem.lengths, reset=reset, checkpoint_every=every)
    weights = changed_weights(problem.layer)
    if how == "assignment":
        for name, value in weights.items():
            setattr(problem.layer, name, value)
    else:
        problem.layer.load_state_dict(weights)
    x[...] = np.nan
    for part in state:
        part[...] = np.nan
    reset[...] ^= True
    problem.lengths[...] = 1
    assert_same_gradients(training.backward(tape), expected)
    problem.layer(np.ones_like(x))
    other = problem.layer.record(np.ones_like(x), rng=0)
    other.backward(np.ones_like(other.output))
    assert_same_gradients(training.backward(tape), expected)
    np.testing.assert_equal(problem.layer.state_dict(), weights)
    del problem.layer.__dict__["_packed_for_training"], other
    gc.collect()
    problem.layer.__dict__["_packed_for_training"] = None
    found = tape.backward(training.given(training.d_output), training.d_state).params
    for name, array in found.items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize(
    "case", [*grid(Case(T=7, N=2, I=5, H=6), layout=("TNI", "NTI")), Case(T=1, N=1, I=32, H=48, layout="TI")], **by_name
)
def test_the_tape_of_a_single_direction_answers_for_the_call_it_recorded(case: Case) -> None:
    """Also where weights are read as they are."""
    training = draw_training(case)
    problem = training.problem
    expected = training.gradients()
    problem.x = np.ascontiguousarray(training.given(problem.x))
    tape = problem.layer.record(problem.x, training.given_state(problem.state))
    weights = changed_weights(problem.layer)
    problem.layer.load_state_dict(weights)
    for array in (problem.x, *problem.state):
        array[...] = np.nan
    assert_same_gradients(training.backward(tape), expected)
    other = problem.layer.record(np.ones_like(problem.x))
    other.backward(np.ones_like(other.output))
    assert_same_gradients(training.backward(tape), expected)
    np.testing.assert_equal(problem.layer.state_dict(), weights)


@pytest.mark.parametrize("dtype", BOTH)
def test_a_single_step_of_a_single_row_packs_nothing(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack(*_: object) -> None:
        raise AssertionError("packed")

    lstm = LSTM(64, 32, dtype=dtype, rng=0)
    monkeypatch.setattr(Network, "pack", pack)
    all_gradients(lstm.record(np.ones((1, 1, 64), dtype)), np.ones((1, 1, 32), dtype))
    with pytest.raises(AssertionError, match="packed"):
        lstm.record(np.ones((2, 1, 64), dtype))


MODELS: dict[str, Callable[[], Any]] = {
    "LSTM": lambda: LSTM(5, 4, rng=0),
    "Linear": lambda: Linear(5, 4, rng=0),
    "Sequential-LSTM": lambda: Sequential(LSTM(5, 4, rng=0), Linear(4, 4, rng=1)),
    "Sequential-Linear": lambda: Sequential(Linear(5, 5, rng=0), LSTM(5, 4, rng=1)),
}


def all_gradients(tape: Any, d_output: Any) -> list[Any]:
    found = tape.backward(d_output)
    return [found.x, *found.params.values()]


@pytest.mark.parametrize("wrap", [np.asarray, memoryview, ByDlpack, ByArray], ids=["array", "memory", "dlpack", "by"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_x_is_copied_whatever_it_comes_in(make: Callable[[], Any], wrap: Callable[[Any], Any]) -> None:
    model, rng = make(), np.random.default_rng(0)
    x, d_output = rng.normal(size=(3, 2, 5)).astype(np.float32), rng.normal(size=(3, 2, 4)).astype(np.float32)
    expected = all_gradients(model.record(x.copy()), d_output)
    tape = model.record(wrap(x))
    x[...] = np.nan
    for got, want in zip(all_gradients(tape, wrap(d_output)), expected, strict=True):
        np.testing.assert_array_equal(got, want)


def test_x_as_a_tensor_is_copied() -> None:
    torch = pytest.importorskip("torch")
    for make in MODELS.values():
        test_x_is_copied_whatever_it_comes_in(make, torch.from_numpy)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_the_output_of_a_tape_is_read_only(make: Callable[[], Any]) -> None:
    tape = make().record(np.ones((3, 2, 5), np.float32))
    with pytest.raises(ValueError, match="read-only"):
        tape.output[0] = 0


@given(data=st.data())
@some
def test_valid_arguments_however_they_lie_in_memory(data: st.DataObject) -> None:
    names = ("x", "h_0", "c_0", "d_output", "d_h_n", "d_c_n")
    layouts = {name: data.draw(LAYOUTS, name) for name in (*names, "lengths", "reset")}
    dtypes = {name: data.draw(st.sampled_from(["f2", "f4", "f8", "i1", "u4", "i8", "?"]), name) for name in names}
    dtype = data.draw(st.sampled_from(BOTH))
    case = Case(T=5, N=4, I=3, H=7, D=2, P=data.draw(st.sampled_from([0, 4])), lengths=True, reset=True, dtype=dtype)
    training = draw_training(case)
    problem = training.problem
    values = dict(zip(names, (problem.x, *problem.state, training.d_output, *training.d_state), strict=True))
    # Small integers, so that every dtype holds them.
    values = {
        name: np.clip(np.round(2 * np.nan_to_num(value)), 0, 9).astype(dtypes[name]) for name, value in values.items()
    }
    x, h_0, c_0, d_output, d_h_n, d_c_n = (value.astype(dtype) for value in values.values())
    problem.x, problem.state, training.d_output, training.d_state = x, (h_0, c_0), d_output, (d_h_n, d_c_n)
    expected = training.gradients()
    values |= {"lengths": problem.lengths, "reset": problem.reset}
    given_ = {name: relaid(value, layouts[name]) for name, value in values.items()}
    kept = {name: np.array(value) for name, value in given_.items()}
    problem.x, problem.state = given_["x"], (given_["h_0"], given_["c_0"])
    problem.lengths, problem.reset = given_["lengths"], given_["reset"]
    training.d_output, training.d_state = given_["d_output"], [given_["d_h_n"], given_["d_c_n"]]
    assert_same_gradients(training.gradients(), expected)
    for name, value in given_.items():
        np.testing.assert_array_equal(np.asarray(value), kept[name])


@pytest.mark.parametrize("every", [None, 2])
@pytest.mark.parametrize("options", [False, True], ids=["", "lengths-reset"])
@pytest.mark.parametrize("layout", ["TNI", "NTI", "TI"])
@pytest.mark.parametrize(("T", "N"), [(0, 3), (0, 1), (4, 0), (0, 0)])
def test_nothing_in_gives_nothing_but_the_states_gradient(
    T: int, N: int, layout: str, options: bool, every: int | None
) -> None:
    if layout == "TI" and N != 1:
        pytest.skip("unbatched is one row")
    case = Case(T=T, N=N, L=2, D=2, P=3, lengths=options, reset=options, layout=layout)
    training = draw_training(case, dropout=0.5)
    with poisoned():
        tape = training.record(checkpoint_every=every)
        gradients = training.backward(tape)
    assert_same_bits(training.results(tape), training.problem.call())
    assert gradients["x"].shape == (T, N, 3)
    assert not any(gradients[name].any() for name in training.problem.layer.state_dict())
    assert_same_bits((gradients["h_0"], gradients["c_0"]), training.d_state)
    training.d_state = None
    gradients = training.gradients(checkpoint_every=every)
    assert not any(array.any() for array in gradients.values())


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_layer_that_was_recorded_can_be_copied(make: Callable[[Any], Any]) -> None:
    training = draw_training(FULL)
    expected = training.gradients()
    other = replace(training, problem=replace(training.problem, layer=make(training.problem.layer)))
    assert_same_gradients(other.gradients(), expected)
    other.problem.layer.load_state_dict(changed_weights(other.problem.layer))
    assert (other.gradients()["h_0"] != expected["h_0"]).any()
    assert_same_gradients(training.gradients(), expected)
    for build in MODELS.values():
        model, x, d_output = build(), np.ones((3, 2, 5), np.float32), np.ones((3, 2, 4), np.float32)
        want = all_gradients(model.record(x), d_output)
        for array, exact in zip(all_gradients(make(model).record(x), d_output), want, strict=True):
            np.testing.assert_array_equal(array, exact)


def test_a_copy_of_a_tape_is_the_tape() -> None:
    tape = LSTM(3, 24, rng=0).record(np.ones((5, 2, 3), np.float32))
    assert copy.copy(tape) is tape
    assert copy.deepcopy([tape])[0] is tape
    with pytest.raises(TypeError, match="a tape cannot be pickled"):
        pickle.dumps(tape)


# Dropout between layers


def find_masks(training: Training, rng: int) -> list[Any]:
    """Return the factors that dropout puts on the outputs of each layer but the last, found out by gradients.

    With a reset at every step a gradient of one step reaches the weights through that step alone, and where an output
    of the layer before was dropped the column of W_ih gets nothing.
    """
    problem, case = training.problem, training.case
    keep = 1 - problem.layer.dropout
    apart = replace(training, problem=replace(problem, lengths=None, reset=np.ones((case.T, case.N), bool), state=None))
    apart.problem.x = np.nan_to_num(problem.x)
    width = case.D * (case.P or case.H)
    masks = [np.zeros((case.T, case.N, width)) for _ in range(case.L - 1)]
    tape = apart.record(rng=rng)
    for t, n in itertools.product(range(case.T), range(case.N)):
        d_output = np.zeros((case.T, case.N, width), problem.layer.dtype)
        d_output[t, n] = 1
        apart.d_output, apart.d_state = d_output, None
        gradients = apart.backward(tape)
        for layer in range(1, case.L):
            masks[layer - 1][t, n] = gradients[f"weight_ih_l{layer}"].any(axis=0) / keep
    return masks


DROPPED = grid(
    Case(T=6, N=4, I=3, H=9), L=(2, 3), D=(1, 2), P=(0, 5), lengths=(False, True), layout=("TNI", "NTI"), dtype=BOTH
)


@pytest.mark.parametrize("case", DROPPED, **by_name)
def test_dropout_agrees_with_the_reference_under_the_same_masks(case: Case) -> None:
    training = draw_training(case, dropout=0.3)
    masks = find_masks(training, rng=7)
    kept = np.concatenate([mask.ravel() for mask in masks]) > 0
    assert not kept.all()
    assert abs(kept.mean() - 0.7) < 5 * (0.21 / kept.size) ** 0.5
    with poisoned():
        gradients = training.gradients(rng=7)
    assert_gradients(gradients, training.exact(masks=masks), limit_of(case))
    for every in (1, 4):
        assert_same_gradients(training.gradients(rng=7, checkpoint_every=every), gradients)
    for how in (ROWS[3], UNITS[0]):
        with shared_out(*how):
            assert_same_gradients(training.gradients(rng=7), gradients)


def test_dropout_follows_its_generator() -> None:
    training = draw_training(replace(FULL, T=40, N=20, H=30), dropout=0.4)

    def record(rng: Any) -> bytes:
        return bytes(training.record(rng=rng).output.tobytes())

    inference = training.problem.call()[0]
    assert record(3) == record(np.int64(3)) == record(np.random.default_rng(3))
    generator = np.random.default_rng(3)
    assert len({record(3), record(4), *(record(generator) for _ in range(3)), record(None), record(None)}) == 6
    assert_same_bits(training.problem.call()[0], inference)  # which drops nothing
    assert record(3) != inference.tobytes()
    tape = training.record(rng=5)
    assert_same_gradients(training.backward(tape), training.backward(tape))


def test_dropout_keeps_the_mean() -> None:
    """Over many masks the input of the second layer is on average what it is without dropout.

    The second layer is made linear: all its gates are open and its cell's input is small.  Its output's mean over
    40,000 elements must lie within five deviations.
    """
    layer = LSTM(2, 20, 2, dropout=0.25, dtype=np.float64, rng=0)
    weights = {name: np.zeros_like(value) for name, value in layer.state_dict().items()}
    weights |= {"bias_ih_l0": np.full(80, 2.0), "bias_ih_l1": np.repeat([30.0, -30.0, 0.0, 30.0], 20)}
    weights["weight_ih_l1"][40:60] = 1e-5 * np.eye(20)
    layer.load_state_dict(weights)
    x = np.zeros((1, 2000, 2))
    plain, dropped = layer(x)[0], layer.record(x, rng=0).output
    assert np.ptp(plain) == 0
    assert abs(dropped.mean() / plain.mean() - 1) < 5 * (0.25 / 0.75 / dropped.size) ** 0.5
    assert abs((dropped == 0).mean() - 0.25) < 5 * (0.25 * 0.75 / dropped.size) ** 0.5


@pytest.mark.parametrize("case", DROPPED, **by_name)
def test_dropout_of_nothing_and_of_all(case: Case) -> None:
    none = draw_training(case, dropout=0.0)
    assert_same_bits(none.results(none.record(rng=0)), none.problem.call())
    everything = draw_training(case, dropout=1.0)
    width = case.D * (case.P or case.H)
    masks = [np.zeros((case.T, case.N, width))] * (case.L - 1)
    assert_gradients(everything.gradients(), everything.exact(masks=masks), limit_of(case))
    everything.d_state = None
    assert not everything.gradients()["x"].any()
    one = draw_training(replace(case, L=1), dropout=1.0)  # nothing is between layers
    assert_same_bits(one.results(one.record(rng=0)), one.problem.call())


# Numbers that are not finite


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["x", "h_0", "c_0", "d_output", "d_h_n", "d_c_n"])
@pytest.mark.parametrize("case", grid(Case(T=9, N=31, H=19), D=(1, 2), P=(0, 5), dtype=BOTH), **by_name)
def test_non_finite_numbers_propagate_as_in_the_reference(case: Case, where: str, value: float) -> None:
    training = draw_training(case)
    clean = training.gradients()
    problem, (d_h_n, d_c_n) = training.problem, training.d_state
    places = {"x": problem.x[4], "h_0": problem.state[0][0], "c_0": problem.state[1][0]}
    places |= {"d_output": training.d_output[4], "d_h_n": d_h_n[0], "d_c_n": d_c_n[0]}
    places[where][17, 1] = value
    gradients = training.gradients()
    assert_gradients(gradients, training.exact(np.float64), 2 * limit_of(case))
    others = np.arange(case.N) != 17
    for name in ("x", "h_0", "c_0"):
        np.testing.assert_array_equal(bits(gradients[name][:, others]), bits(clean[name][:, others]), err_msg=name)
    if np.isnan(value):
        assert np.isnan(gradients["weight_hh_l0"]).any()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, 1e-41])
@pytest.mark.parametrize("how", [None, ROWS[3], UNITS[0]], ids=str)
@pytest.mark.parametrize("case", grid(SEVERAL_CHUNKS, L=(1, 2), D=(1, 2), P=(0, 6)), **by_name)
def test_whatever_the_neighbours_hold(case: Case, how: Any, value: float) -> None:
    training = draw_training(case)
    clean = training.gradients()
    kept = np.arange(case.N) % 3 == 1
    problem = training.problem
    for array in (problem.x, *problem.state, training.d_output, *training.d_state):
        array[:, ~kept] = value
    with shared_out(*how) if how else nullcontext():
        gradients = training.gradients()
    for name in ("x", "h_0", "c_0"):
        np.testing.assert_array_equal(bits(gradients[name][:, kept]), bits(clean[name][:, kept]), err_msg=name)


@pytest.mark.parametrize("every", [None, 1])
@pytest.mark.parametrize("where", ["x", "d_output"])
@pytest.mark.parametrize("case", grid(Case(T=53, N=7, H=21, L=2), D=(1, 2), P=(0, 6), dtype=BOTH), **by_name)
def test_nan_does_not_cross_a_reset(case: Case, where: str, every: int | None) -> None:
    training = draw_training(case)
    training.problem.reset = np.zeros((case.T, case.N), bool)
    training.problem.reset[[33, 36, 37, 39], 2] = True
    clean = training.gradients()
    (training.problem.x if where == "x" else training.d_output)[37, 2] = np.nan
    gradients = training.gradients(checkpoint_every=every)
    assert np.isnan(gradients["x"][37, 2]).all()
    changed = np.zeros((case.T, case.N), bool)
    changed[37:39, 2] = True
    np.testing.assert_array_equal(bits(gradients["x"][~changed]), bits(clean["x"][~changed]))
    for name in ("h_0", "c_0"):
        np.testing.assert_array_equal(bits(gradients[name]), bits(clean[name]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", BOTH)
def test_dropout_passes_on_what_is_not_finite_without_a_warning(dtype: Any, value: float) -> None:
    training = draw_training(replace(FULL, lengths=False, reset=False, dtype=dtype), dropout=0.5)
    training.d_output[3, 2] = value
    gradients = training.gradients(rng=0)
    others = np.arange(FULL.N) != 2
    assert np.isnan(gradients["x"][:, 2]).any()
    assert np.isfinite(gradients["x"][:, others]).all()


# A model around the layer


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize(
    ("rows", "features"),
    [
        ((), (4, 3)), ((1,), (1, 1)), ((3,), (7, 5)), ((2, 5), (17, 33)), ((97,), (65, 64)), ((4, 1, 2), (3, 130)),
        ((127,), (3, 5)), ((128,), (3, 5)), ((129,), (3, 5)), ((255,), (3, 5)), ((256,), (49, 47)), ((257,), (48, 49)),
        ((600,), (33, 97)), ((11, 61), (1, 1)), ((1000,), (64, 201)), ((5, 300), (193, 50)),
        *[((5,), (features, 2)) for features in range(1, 34)], *[((5,), (2, features)) for features in range(1, 34)],
    ],
    ids=str,
)  # fmt: skip
def test_linear_gradients_are_matrix_products(rows: Any, features: Any, bias: bool, dtype: Any) -> None:
    linear, rng = Linear(*features, bias=bias, dtype=dtype, rng=1), np.random.default_rng(0)
    x, d_output = (rng.normal(size=(*rows, size)).astype(dtype) for size in features)
    with poisoned():
        tape = linear.record(x)
        found = tape.backward(framed(d_output))
    assert_same_bits(tape.output, linear(x))
    assert tape.state is None
    assert found.state is None
    wide = WIDER[np.dtype(dtype)]
    d_y = d_output.astype(wide).reshape(-1, features[1])
    exact = {"x": (d_y @ linear.weight.astype(wide)).reshape(x.shape)}
    exact["weight"] = d_y.T @ x.astype(wide).reshape(-1, features[0])
    if bias:
        exact["bias"] = d_y.sum(axis=0)
    # A sum of K products, with partial sums of the size of the largest.
    K = max(features[1], len(d_y))
    assert_gradients({"x": found.x, **found.params}, exact, 5 * np.sqrt(K) * float(np.finfo(dtype).eps))
    for n in (1, 2):
        fastlstm.set_num_threads(n)
        again = linear.record(x).backward(d_output)
        assert_same_gradients({"x": again.x, **again.params}, {"x": found.x, **found.params})
    zeros = tape.backward(None)
    assert zeros.x.shape == x.shape
    assert not any(array.any() for array in (zeros.x, *zeros.params.values()))


def test_linear_gradient_larger_than_a_cache(entered: list[bool]) -> None:
    """More than 16 MB of weights, so that chunks are longer; d_x of a row is that of the row alone."""
    linear, rng = Linear(2111, 2003, rng=0), np.random.default_rng(0)
    x, d_output = (rng.normal(size=(700, size)).astype(np.float32) for size in (2111, 2003))
    found = linear.record(x).backward(d_output)
    wide_x, wide_d = x.astype(np.float64), d_output.astype(np.float64)
    exact = {"x": wide_d @ linear.weight.astype(np.float64), "weight": wide_d.T @ wide_x, "bias": wide_d.sum(axis=0)}
    limit = 5 * np.sqrt(2003) * float(np.finfo(np.float32).eps)
    assert_gradients({"x": found.x, **found.params}, exact, limit)
    assert entered or fastlstm.get_num_threads() == 1
    alone = linear.record(x[5]).backward(d_output[5])
    np.testing.assert_array_equal(bits(alone.x), bits(found.x[5]))


def test_linear_keeps_nan_in_its_row() -> None:
    linear, rng = Linear(5, 33, rng=0), np.random.default_rng(0)
    x, d_output = (rng.normal(size=(300, size)).astype(np.float32) for size in (5, 33))
    tape = linear.record(x)
    clean = tape.backward(d_output)
    d_output[7, 2] = np.nan
    found = tape.backward(d_output)
    assert np.isnan(found.x[7]).all()
    np.testing.assert_array_equal(np.delete(found.x, 7, 0), np.delete(clean.x, 7, 0))
    assert np.isnan(found.params["weight"][2]).all()
    np.testing.assert_array_equal(np.delete(found.params["weight"], 2, 0), np.delete(clean.params["weight"], 2, 0))
    np.testing.assert_array_equal(np.isnan(found.params["bias"]), np.arange(33) == 2)


def test_linear_of_nothing() -> None:
    tape = Linear(3, 2, rng=0).record(np.zeros((0, 4, 3)))
    found = tape.backward(np.zeros((0, 4, 2)))
    assert found.x.shape == (0, 4, 3)
    assert not any(array.any() for array in found.params.values())


def test_a_linear_tape_answers_for_the_weights_it_was_recorded_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even for weights that another thread replaces while the call is being recorded."""
    linear, x, d_output = Linear(3, 2, rng=0), np.ones((4, 3), np.float32), np.ones((4, 2), np.float32)
    tape = linear.record(x)
    output, expected = tape.output.copy(), all_gradients(tape, d_output)
    old, new = linear.state_dict(), changed_weights(linear)
    linear.load_state_dict(new)
    for got, want in zip(all_gradients(tape, d_output), expected, strict=True):
        np.testing.assert_array_equal(got, want)
    tape = linear.record(x)
    allowed = {
        output.tobytes(): expected[0].tobytes(),
        tape.output.tobytes(): all_gradients(tape, d_output)[0].tobytes(),
    }
    linear.load_state_dict(old)
    call = Linear.__call__

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        y = call(self, *arguments, **options)
        linear.load_state_dict(new)
        return y

    monkeypatch.setattr(Linear, "__call__", interrupted)
    tape = linear.record(x)
    assert all_gradients(tape, d_output)[0].tobytes() == allowed[tape.output.tobytes()]


NETWORKS: dict[str, Callable[[Any, bool], list[Any]]] = {
    "linear": lambda dtype, first: [Linear(3, 4, dtype=dtype, rng=0), Linear(4, 2, bias=False, dtype=dtype, rng=1)],
    "lstm": lambda dtype, first: [LSTM(3, 5, 2, batch_first=first, dtype=dtype, rng=0)],
    "lstm-linear": lambda dtype, first: [
        LSTM(3, 5, batch_first=first, bidirectional=True, dtype=dtype, rng=0), Linear(10, 2, dtype=dtype, rng=1),
    ],
    "linear-lstm-lstm": lambda dtype, first: [
        Linear(3, 7, dtype=dtype, rng=0), LSTM(7, 6, batch_first=first, proj_size=4, dtype=dtype, rng=1),
        LSTM(4, 5, 2, batch_first=first, bidirectional=True, dtype=dtype, rng=2),
    ],
    "lstm-linear-lstm-linear": lambda dtype, first: [
        LSTM(3, 6, batch_first=first, dtype=dtype, rng=0), Linear(6, 4, dtype=dtype, rng=1),
        LSTM(4, 5, batch_first=first, dtype=dtype, rng=2), Linear(5, 3, dtype=dtype, rng=3),
    ],
}  # fmt: skip


def exact_network(
    model: Any, x: Any, state: Any, lengths: Any, reset: Any, d_output: Any, d_state: Any
) -> dict[str, Any]:
    """Return the gradients of a Sequential: the reference and plain products one after the other, time-major."""
    wide = WIDER[model.dtype]

    def widened(pair: Any) -> Any:
        return None if pair is None else tuple(None if part is None else part.astype(wide) for part in pair)

    y, trail = x.astype(wide), []
    for layer, initial in zip(model, state, strict=True):
        params = {name: value.astype(wide) for name, value in layer.state_dict().items()}
        if isinstance(layer, Linear):
            trail.append((params, y))
            y = y @ params["weight"].T + params.get("bias", 0)
        else:
            forward = reference.forward(params, y, widened(initial), lengths=lengths, reset=reset)
            trail.append((None, forward.saved))
            y = forward.output
    d_y, gradients = d_output.astype(wide), {}
    if lengths is not None:
        d_y = np.where((np.arange(len(x))[:, None] < lengths)[:, :, None], d_y, 0)
    for i, (layer, (params, saved)) in reversed(list(enumerate(zip(model, trail, strict=True)))):
        if isinstance(layer, Linear):
            found = {"weight": np.einsum("tno,tni->oi", d_y, saved)}
            if "bias" in params:
                found["bias"] = d_y.sum(axis=(0, 1))
            d_y = d_y @ params["weight"]
        else:
            d_y, (d_h_0, d_c_0), found = reference.backward(saved, d_y, widened(d_state[i]))
            found = {"h_0": d_h_0, "c_0": d_c_0, **found}
        gradients = {f"{i}.{name}": array for name, array in found.items()} | gradients
    return {"x": d_y, **gradients}


def draw_network(name: str, dtype: Any, layout: str = "TNI", T: int = 9, N: int = 4, seed: int = 0) -> Any:
    """Return a model, x, state, and gradients of output and state, time-major; one state and one gradient is None."""
    rng = np.random.default_rng(seed)
    model = Sequential(*NETWORKS[name](dtype, layout == "NTI"))
    N = 1 if layout == "TI" else N
    x, d_output = (rng.normal(size=(T, N, size)).astype(dtype) for size in model._ends)
    state: list[Any] = []
    d_state: list[Any] = []
    for layer in model:
        if isinstance(layer, Linear):
            state.append(None)
            d_state.append(None)
            continue
        count = layer.num_layers * (1 + layer.bidirectional)
        sizes = layer.proj_size or layer.hidden_size, layer.hidden_size
        state.append(tuple(rng.normal(size=(count, N, size)).astype(dtype) for size in sizes))
        d_state.append(tuple(rng.normal(size=(count, N, size)).astype(dtype) for size in sizes))
    if isinstance(model[-1], LSTM):
        state[-1], d_state[-1] = None, (None, d_state[-1][1])
    return model, x, state, d_output, d_state


def run_network(model: Any, layout: str, arguments: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Return the tape and the gradients of a Sequential, time-major and batched."""
    x, state, lengths, reset, d_output, d_state = arguments

    def given(array: Any) -> Any:
        if array is None or layout == "TNI":
            return array
        return array[:, 0] if layout == "TI" else array.swapaxes(0, 1)

    def given_states(entries: Any) -> Any:
        return [
            pair if pair is None or layout != "TI" else tuple(None if part is None else part[:, 0] for part in pair)
            for pair in entries
        ]

    tape = model.record(given(x), given_states(state), lengths=lengths, reset=given(reset), **options)
    d_x, found_states, found = tape.backward(given(d_output), given_states(d_state))
    assert list(found) == list(model.state_dict())
    d_x = d_x[:, None] if layout == "TI" else d_x.swapaxes(0, 1) if layout == "NTI" else d_x
    gradients = {"x": d_x}
    for i, (layer, pair) in enumerate(zip(model, found_states, strict=True)):
        if isinstance(layer, Linear):
            assert pair is None
        else:
            gradients |= {f"{i}.{name}": part for name, part in zip(("h_0", "c_0"), pair, strict=True)}
            if layout == "TI":
                gradients |= {f"{i}.{name}": gradients[f"{i}.{name}"][:, None] for name in ("h_0", "c_0")}
        gradients |= {name: array for name, array in found.items() if name.startswith(f"{i}.")}
    return tape, gradients


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("options", [False, True], ids=["", "lengths-reset"])
@pytest.mark.parametrize("layout", ["TNI", "NTI", "TI"])
@pytest.mark.parametrize("name", NETWORKS)
def test_sequential_agrees_with_the_reference(name: str, layout: str, options: bool, dtype: Any) -> None:
    if name == "linear" and layout == "NTI":
        pytest.skip("a model of Linear layers alone has no `batch_first`")
    model, x, state, d_output, d_state = draw_network(name, dtype, layout)
    (T, N), rng = x.shape[:2], np.random.default_rng(0)
    lengths = rng.permutation(np.arange(N) * T // max(1, N - 1)) if options else None
    lengths = np.array([6]) if options and N == 1 else lengths
    reset = rng.random((T, N)) < 0.3 if options else None
    arguments = x, state, lengths, reset, d_output, d_state
    exact = exact_network(model, *arguments)
    with poisoned():
        _, gradients = run_network(model, layout, arguments)
    limit = limit_of(Case(I=7, H=6, D=2, L=2, dtype=dtype)) * len(model)
    assert_gradients(gradients, exact, limit)
    for every in (1, 2, T, T + 1):
        _, again = run_network(model, layout, arguments, checkpoint_every=every, rng=0)
        assert_same_gradients(again, gradients)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("lengths", [None, [9, 0, 5, 2]], ids=["", "lengths"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_results_of_a_sequential_tape_are_those_of_a_call(name: str, lengths: Any, dtype: Any) -> None:
    model, x, state, d_output, _ = draw_network(name, dtype)
    output, states = model(x, state, lengths=lengths)
    tape = model.record(x, state, lengths=lengths)
    assert_same_bits(tape.output, output)
    for pair, expected in zip(tape.state, states, strict=True):
        assert (pair is None) == (expected is None)
        if pair is not None:
            assert_same_bits(pair, expected)
    with pytest.raises(ValueError, match="read-only"):
        tape.output[...] = 0
    tape.backward(d_output)
    assert_same_bits(tape.output, output)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("what", ["x", "d_output", "bias"])
@pytest.mark.parametrize("name", NETWORKS)
def test_sequential_reads_nothing_past_the_lengths(name: str, what: str, value: float) -> None:
    model, x, state, d_output, d_state = draw_network(name, np.float32)
    lengths = np.array([9, 0, 5, 2])
    past = np.arange(9)[:, None] >= lengths
    arguments = x, state, lengths, None, d_output, d_state
    _, expected = run_network(model, "TNI", arguments)
    if what == "bias":  # all gradients are what they were, and so is the output where there is one
        if not isinstance(model[-1], Linear) or model[-1].bias is None:
            pytest.skip("the model has no bias at its end")
        model[-1].bias = np.full_like(model[-1].bias, value)
    else:
        {"x": x, "d_output": d_output}[what][past] = value
    tape, gradients = run_network(model, "TNI", arguments)
    assert not tape.output[past].any()
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_sequential_gradient_that_is_none_is_zeros(name: str) -> None:
    model, x, state, d_output, d_state = draw_network(name, np.float32)
    tape = model.record(x, state)
    assert not any(array.any() for array in all_gradients(tape, None))
    zeros = [None if pair is None else tuple(map(np.zeros_like, pair)) for pair in tape.state]
    for none in (None, [None] * len(model)):
        for got, want in zip(tape.backward(d_output, none)[::2], tape.backward(d_output, zeros)[::2], strict=True):
            np.testing.assert_equal(got, want)
    for got, want in zip(
        tape.backward(None, d_state)[::2], tape.backward(np.zeros_like(d_output), d_state)[::2], strict=True
    ):
        np.testing.assert_equal(got, want)


def test_sequential_hands_its_generator_from_layer_to_layer() -> None:
    """The second layer's masks are not those of the first, and one seed gives all of them."""
    layers = [LSTM(3, 40, 2, dropout=0.5, rng=0), LSTM(40, 40, 2, dropout=0.5, rng=1)]
    model, x = Sequential(*layers), np.ones((5, 4, 3), np.float32)
    tape = model.record(x, rng=3)
    generator = np.random.default_rng(3)
    first = layers[0].record(x, rng=generator)
    second = layers[1].record(first.output, rng=generator)
    np.testing.assert_array_equal(tape.output, second.output)
    np.testing.assert_array_equal(model.record(x, rng=3).output, tape.output)
    assert (model.record(x, rng=4).output != tape.output).any()
    d_output = np.ones_like(tape.output)
    inner = second.backward(d_output)
    np.testing.assert_array_equal(tape.backward(d_output).x, first.backward(inner.x).x)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sequential_tape_answers_for_the_call_it_recorded(name: str) -> None:
    model, x, state, d_output, _ = draw_network(name, np.float32)
    expected = [array.copy() for array in all_gradients(model.record(x, state), d_output)]
    tape = model.record(x, state)
    model.load_state_dict(changed_weights(model))
    for array in (x, *(part for pair in state if pair for part in pair)):
        array[...] = np.nan
    for got, want in zip(all_gradients(tape, d_output), expected, strict=True):
        np.testing.assert_array_equal(got, want)


# Wrong arguments

BAD_GRADIENTS: list[tuple[str, Any, Any, type[Exception], str]] = [
    ("shape", np.zeros((7, 5, 11)), None, ValueError, r"`d_output` must have shape \(T, N, D\*P\) = \(7, 5, 12\), got"),
    ("swapped", np.zeros((5, 7, 12)), None, ValueError, r"`d_output` must have shape .*, got \(5, 7, 12\)"),
    ("unbatched", np.zeros((7, 12)), None, ValueError, "`d_output` must have shape"),
    ("scalar", 1.0, None, ValueError, "`d_output` must have shape"),
    ("complex", np.zeros((7, 5, 12), complex), None, TypeError, "`d_output` must be of a dtype that casts to float32"),
    ("text", "abc", None, TypeError, "`d_output`"),
    ("ragged", [[1, 2], [3]], None, ValueError, "`d_output` cannot be made an array"),
    ("array-for-pair", None, np.zeros((4, 5, 6)), TypeError, r"`d_state` must be a pair \(d_h_n, d_c_n\), got ndarray"),
    ("one", None, [np.zeros((4, 5, 6))], ValueError, r"`d_state` must be a pair \(d_h_n, d_c_n\), got 1 arrays"),
    ("three", None, (None, None, None), ValueError, "`d_state` must be a pair"),
    ("number", None, 3, TypeError, "`d_state` must be a pair"),
    (
        "d_h_n", None, (np.zeros((4, 5, 19)), None), ValueError,
        r"`d_state`: d_h_n must have shape \(L\*D, N, P\) = \(4, 5, 6\), got \(4, 5, 19\)",
    ),
    (
        "d_c_n", None, (None, np.zeros((2, 5, 19))), ValueError,
        r"`d_state`: d_c_n must have shape \(L\*D, N, H\) = \(4, 5, 19\), got \(2, 5, 19\)",
    ),
    ("d_h_n-kind", None, (np.zeros((4, 5, 6), "M8[s]"), None), TypeError, "`d_state: d_h_n` must be of a dtype"),
    ("d_c_n-text", None, (None, "c"), TypeError, "`d_state: d_c_n`"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("d_output", "d_state", "kind", "message"),
    [row[1:] for row in BAD_GRADIENTS],
    ids=[row[0] for row in BAD_GRADIENTS],
)
def test_wrong_gradients_are_refused_and_the_tape_is_as_it_was(
    d_output: Any, d_state: Any, kind: type[Exception], message: str
) -> None:
    training = draw_training(FULL)
    tape = training.record()
    expected = training.backward(tape)
    with pytest.raises(kind, match=message):
        tape.backward(d_output, d_state)
    assert_same_gradients(training.backward(tape), expected)


def test_wrong_gradients_of_an_unbatched_call() -> None:
    training = draw_training(Case(T=7, N=1, H=9, L=2, layout="TI"))
    tape = training.record()
    with pytest.raises(ValueError, match=r"`d_output` must have shape \(T, D\*P\) = \(7, 9\), got \(7, 1, 9\)"):
        tape.backward(training.d_output)
    with pytest.raises(ValueError, match=r"`d_state`: d_h_n must have shape \(L\*D, P\) = \(2, 9\), got \(2, 1, 9\)"):
        tape.backward(None, training.d_state)


def test_wrong_gradients_of_a_linear_and_a_sequential() -> None:
    x = np.ones((3, 2, 5), np.float32)
    tape = MODELS["Linear"]().record(x)
    with pytest.raises(
        ValueError, match=r"`d_output` must have shape \(\.\.\., out_features\) = \(3, 2, 4\), got \(6, 4\)"
    ):
        tape.backward(np.zeros((6, 4)))
    with pytest.raises(TypeError, match="`d_output` must be of a dtype"):
        tape.backward(np.zeros((3, 2, 4), complex))
    with pytest.raises(ValueError, match="`d_state` must be None"):
        tape.backward(np.zeros((3, 2, 4)), (None, None))
    for name in ("Sequential-LSTM", "Sequential-Linear"):
        tape = MODELS[name]().record(x)
        with pytest.raises(ValueError, match=r"`d_output` must have shape \(T, N, O\) = \(3, 2, 4\), got \(3, 2, 5\)"):
            tape.backward(np.zeros((3, 2, 5)))
        with pytest.raises(TypeError, match="`d_output`"):
            tape.backward(np.zeros((3, 2, 4), complex))
        with pytest.raises(ValueError, match="`d_state` must have an entry a layer, 2 of them, got 1"):
            tape.backward(None, [None])
        with pytest.raises(TypeError, match="`d_state` must be a list"):
            tape.backward(None, 3)
        wrong = (np.zeros((1, 2, 3)), None)
        lstm, linear = (0, 1) if name.endswith("LSTM") else (1, 0)
        with pytest.raises(ValueError, match="`d_state`: d_h_n must have shape"):
            tape.backward(None, [wrong, None] if lstm == 0 else [None, wrong])
        with pytest.raises(ValueError, match=f"`d_state` must be None for layer {linear}, a Linear"):
            tape.backward(None, [wrong, wrong])


WRONG_OPTIONS: list[tuple[str, Any, type[Exception]]] = [
    *[("checkpoint_every", value, ValueError) for value in (0, -1, np.int64(-5), 2**200)],
    *[("checkpoint_every", value, TypeError) for value in (1.0, np.float32(2), "3", True, [1], np.zeros(2, int))],
    *[("rng", value, TypeError) for value in ("abc", 1.5, True, [1], np.random.RandomState(0))],
    *[("rng", value, ValueError) for value in (-1, -(2**70))],
]


@pytest.mark.parametrize("model", ["lstm-dropout", "lstm", "lstm-linear", "linear-lstm", "linear"])
@pytest.mark.parametrize(
    ("name", "value", "kind"), WRONG_OPTIONS, ids=[f"{name}-{value!r}"[:30] for name, value, _ in WRONG_OPTIONS]
)
def test_wrong_options_of_record(model: str, name: str, value: Any, kind: type[Exception]) -> None:
    made = {
        "lstm-dropout": lambda: LSTM(3, 3, 2, dropout=0.5),
        "lstm": lambda: LSTM(3, 3),
        "lstm-linear": lambda: Sequential(LSTM(3, 3), Linear(3, 3)),
        "linear-lstm": lambda: Sequential(Linear(3, 3), LSTM(3, 3, 2, dropout=0.5)),
        "linear": lambda: Sequential(Linear(3, 3)),
    }[model]()
    with pytest.raises(kind, match=f"`{name}` must"):
        made.record(np.ones((2, 1, 3), np.float32), **{name: value})


def test_a_refused_record_draws_no_random_numbers() -> None:
    model, x = Sequential(LSTM(3, 3, 2, dropout=0.5), LSTM(3, 3, 2, dropout=0.5)), np.ones((2, 1, 3), np.float32)
    generator = np.random.default_rng(0)
    before = generator.bit_generator.state
    for wrong in ({"checkpoint_every": 0}, {"lengths": [3]}, {"reset": [1]}, {"state": [None]}):
        for made in (model, model[0]):
            with pytest.raises((TypeError, ValueError)):
                made.record(x, rng=generator, **wrong)
    assert generator.bit_generator.state == before


@given(data=st.data())
@some
def test_any_argument_of_record(data: st.DataObject) -> None:
    training = draw_training(Case(T=4, N=3, I=2, H=5, L=2, D=2, P=3), dropout=0.5)
    problem = training.problem
    h_0, c_0 = problem.state
    valid = {
        "x": problem.x, "state": problem.state, "lengths": np.array([4, 0, 2]), "reset": np.zeros((4, 3), bool),
        "rng": 3, "checkpoint_every": 2,
    }  # fmt: skip
    odd = odd_arguments(h_0, c_0) | {
        "rng": st.one_of(JUNK, arrays(shapes_near(2))),
        "checkpoint_every": st.one_of(JUNK, arrays(shapes_near(2)), st.integers(-3, 9)),
    }  # fmt: skip
    names = data.draw(st.lists(st.sampled_from(list(odd)), min_size=1, max_size=2, unique=True))
    arguments = valid | {name: data.draw(odd[name], name) for name in names}
    model = data.draw(st.sampled_from([problem.layer, Sequential(problem.layer)]))
    if isinstance(model, Sequential):
        arguments["state"] = [arguments["state"]]
    before = model.state_dict()
    tape = refused_or(lambda: model.record(**arguments), "|".join([*valid, "h_0", "c_0"]))
    if tape is not None:
        found = tape.backward(np.ones_like(tape.output))
        assert found.x.shape == np.asarray(arguments["x"]).shape
        assert found.x.dtype == np.float32
    np.testing.assert_equal(model.state_dict(), before)


@given(data=st.data())
@some
def test_any_argument_of_backward(data: st.DataObject) -> None:
    training = draw_training(Case(T=4, N=3, I=2, H=5, L=2, D=2, P=3))
    problem, (d_h_n, d_c_n) = training.problem, training.d_state
    model = data.draw(st.sampled_from([problem.layer, Sequential(problem.layer), Linear(2, 6, rng=0)]))
    tape = model.record(problem.x)
    expected = all_gradients(tape, training.d_output)
    state = st.one_of(
        JUNK, st.tuples(arrays(shapes_near(4, 3, 3)), arrays(shapes_near(4, 3, 5))), st.tuples(st.just(d_h_n), JUNK),
        st.tuples(JUNK, st.just(d_c_n)), st.lists(st.just(d_h_n), max_size=3), st.lists(st.none(), max_size=3),
    )  # fmt: skip
    d_output = data.draw(st.one_of(JUNK, st.just(training.d_output), arrays(shapes_near(4, 3, 6))))
    d_state = data.draw(st.one_of(state, st.lists(state, max_size=2)))
    found = refused_or(lambda: tape.backward(d_output, d_state), "d_output|d_state|d_h_n|d_c_n")
    if found is not None:
        assert found.x.dtype == np.float32
        assert found.x.shape == problem.x.shape
    for got, want in zip(all_gradients(tape, training.d_output), expected, strict=True):
        np.testing.assert_array_equal(got, want)


# Memory


def traced(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """Return what a call returns, the bytes that are kept after it, and the most that it took."""
    gc.collect()
    tracemalloc.start()
    try:
        result = call()
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, kept, peak


SLACK = 60_000  # bytes: Python objects, and what dropout keeps in bits


@pytest.mark.parametrize("every", [None, 50])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["", "dropout"])
@pytest.mark.parametrize(
    "case",
    [
        *grid(Case(T=400, N=16, I=4, H=32, state=False), L=(1, 3), D=(1, 2), P=(0, 8)),
        *grid(Case(T=400, N=16, I=4, H=32, state=False, lengths=True, reset=True), L=(1, 2)),
    ],
    **by_name,
)
def test_a_tape_keeps_at_most_6_numbers_of_a_hidden_unit_and_step(
    case: Case, dropout: float, every: int | None
) -> None:
    """And a copy of x and of the resets; with checkpoints, the outputs alone and a state now and then."""
    training = draw_training(case, dropout=dropout)
    training.record(rng=0)  # packed weights stay
    _, kept, _ = traced(lambda: training.record(rng=0, checkpoint_every=every))
    x, hidden = training.problem.x.nbytes, case.T * case.N * case.L * case.D * case.H * 4
    between = (case.L - 1) * case.T * case.N * case.D * (case.P or case.H) if dropout else 0
    limit = 6 * hidden if every is None else 1.15 * hidden + 4 * between  # what dropout leaves is another layer's x
    limit += between  # a byte of the mask
    assert kept <= limit + x + case.reset * case.T * case.N + SLACK


def test_a_tape_keeps_no_argument_alive() -> None:
    """It has a copy of x, one, and nothing of the caller's; the weights it answers for it keeps."""
    training = draw_training(Case(T=2000, N=8, I=32, H=32, lengths=True, reset=True))
    problem = training.problem
    wider = problem.x.astype(np.float64)
    training.record()
    tape, kept, _ = traced(lambda: problem.layer.record(wider, problem.state, lengths=problem.lengths))
    assert kept <= 7 * problem.x.nbytes + SLACK
    for model in (problem.layer, Sequential(problem.layer), Linear(32, 3)):
        x = problem.x.copy()
        kept_alive = weakref.ref(x)
        tape = model.record(x)
        del x
        assert kept_alive() is None
    assert tape.output.shape == (2000, 8, 3)


def test_large_results_start_on_a_cache_line() -> None:
    """Else each store of a register touches two lines, and weight gradients take longer."""
    layer = LSTM(256, 512, rng=0)
    x = np.zeros((3, 200, 256), np.float32)
    tape = layer.record(x)
    gradients = tape.backward(np.ones_like(tape.output))
    large = [layer(x)[0], tape.output, gradients.x, gradients.params["weight_ih_l0"], gradients.params["weight_hh_l0"]]
    assert [array.ctypes.data % CACHE_LINE for array in large] == [0] * 5


def test_checkpoints_take_a_fraction_of_the_memory() -> None:
    case = Case(T=20_000, N=1, I=8, H=64, state=False)
    gradients, peaks = [], []
    for every in (None, 100):
        draw_training(case).record(checkpoint_every=every)  # kernels are loaded; and a layer keeps what a tape had
        training = draw_training(case)
        tape, _, peak = traced(partial(training.record, checkpoint_every=every))
        found, _, peak_backward = traced(partial(training.backward, tape))
        gradients.append(found)
        peaks.append((peak, peak_backward))
    assert_same_gradients(gradients[1], gradients[0])
    hidden, x = 20_000 * 64 * 4, training.problem.x.nbytes
    assert peaks[0][0] > 6 * hidden
    assert peaks[1][0] < 1.2 * hidden + x  # the output, and what a chunk of steps needs
    for _, peak in peaks:
        assert peak < x + 3e6  # d_x, and a chunk


def test_segments_have_one_room_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where a room is too large to be kept for the next."""
    monkeypatch.setattr("fastlstm.kernels.training.KEPT_ROOM", 0)
    training = draw_training(Case(T=96, N=40, H=64, D=2))
    tape = training.record(checkpoint_every=1)
    room = 2 * 12 * 40 * 5 * 64 * 4  # of both directions, 12 steps to a segment
    gradients, _, peak = traced(partial(training.backward, tape))
    assert gradients["x"].shape == training.problem.x.shape
    one = draw_training(Case(T=12, N=40, H=64, D=2))
    _, _, scratch = traced(partial(one.backward, one.record()))
    assert room < peak < scratch + 1.9 * room


def test_nothing_leaks() -> None:
    """200 recorded calls and their gradients, errors among them; 1 KB a call would be seen."""
    training = draw_training(FULL, dropout=0.5)
    model, x, state, d_output, d_state = draw_network("lstm-linear-lstm-linear", np.float32)
    kept = []

    def work(count: int, leak: int = 0) -> int:
        for i in range(count):
            tape = training.record(checkpoint_every=1 + i % 3, rng=i)
            training.backward(tape)
            training.backward(tape)
            run_network(model, "TNI", (x, state, None, None, d_output, d_state))
            with pytest.raises(ValueError, match="`d_output`"):
                tape.backward(x)
            if i % 20 == 0:
                training.problem.layer.bias_ih_l0 = training.problem.layer.bias_hh_l0
            if leak:
                kept.append(np.ones(leak, np.uint8))
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        marks = [work(100), work(200), work(200)]  # first Python's own stores of small objects fill up
        grown = min(marks[1] - marks[0], marks[2] - marks[1])  # once in a while a table of Python's own grows: 2 MB
        leaked = work(200, leak=1024) - marks[2]
    finally:
        tracemalloc.stop()
    assert grown < 100_000 < leaked


def test_a_tape_is_given_back_at_once() -> None:
    """Not only when Python's collector comes by, which counts objects and not their bytes."""
    training = draw_training(Case(T=500, N=8, H=64))
    model, x, state, d_output, d_state = draw_network("lstm-linear-lstm-linear", np.float32, T=2000)

    def work(count: int) -> None:
        for _ in range(count):
            training.gradients()
            training.gradients(checkpoint_every=50)
            run_network(model, "TNI", (x, state, None, None, d_output, d_state))

    work(1)  # kernels are loaded, workspaces made
    gc.disable()
    try:
        _, kept, peak = traced(lambda: work(10))
    finally:
        gc.enable()
    assert kept < 300_000
    assert peak < 20e6  # one tape has 6 MB


@pytest.mark.parametrize("N", [257, 700])
def test_large_batches_have_the_same_bits(N: int) -> None:
    """Which go backward in slices: for any number of threads, and with checkpoints."""
    layer, rng = LSTM(7, 20, 2, bidirectional=True, rng=0), np.random.default_rng(0)
    x = rng.standard_normal((3, N, 7)).astype(np.float32)
    d_output = rng.standard_normal((3, N, 40)).astype(np.float32)
    found, before = set(), threads.get_num_threads()
    try:
        for count in (1, 2):
            fastlstm.set_num_threads(count)
            for every in (None, 1, 2):
                gradients = layer.record(x, checkpoint_every=every).backward(d_output)
                found.add(b"".join(a.tobytes() for a in (gradients.x, *gradients.state, *gradients.params.values())))
    finally:
        fastlstm.set_num_threads(before)
    assert len(found) == 1


def test_a_tape_has_the_memory_of_one_that_is_gone() -> None:
    """And of none that is still there."""
    layer, rng = LSTM(3, 40, 2, bidirectional=True, rng=0), np.random.default_rng(0)
    xs = [rng.standard_normal((T, 5, 3)).astype(np.float32) for T in (9, 9, 4, 30, 9)]

    def gradients(tape: Tape) -> list[bytes]:
        found = tape.backward(tape.output)
        return [found.x.tobytes(), *(array.tobytes() for array in found.params.values())]

    def rooms(tape: Tape) -> set[int]:
        recording = tape._backward.__self__  # type: ignore[attr-defined]
        segments = [segment for layer in recording.layers for segments in layer for segment in segments]
        return {segment.room.array.ctypes.data for segment in segments}

    alone = [gradients(copy.deepcopy(layer).record(x)) for x in xs]
    tapes = [layer.record(x) for x in xs]
    assert len(set.union(*map(rooms, tapes))) == 4 * len(xs)
    assert [gradients(tape) for tape in tapes] == alone
    gone = rooms(tapes.pop(1))
    tapes.append(layer.record(xs[1]))
    assert rooms(tapes[-1]) == gone
    assert [gradients(tape) for tape in tapes] == [alone[i] for i in (0, 2, 3, 4, 1)]


def test_a_tape_in_a_cycle_never_reads_the_memory_of_another() -> None:
    """When a cycle is collected, what a tape holds may be gone before the `__del__` of another asks for it."""

    class Asking:
        def __init__(self, layer: LSTM, tape: Tape, found: list[Any]) -> None:
            self.layer, self.tape, self.found, self.itself = layer, tape, found, self

        def __del__(self) -> None:
            self.layer.record(np.zeros((9, 5, 3), np.float32))
            try:
                self.found.append(self.tape.backward(self.tape.output).params["weight_hh_l0"])
            except AttributeError:
                self.found.append(None)

    layer, found = LSTM(3, 40, rng=0), []
    tape = layer.record(np.ones((9, 5, 3), np.float32))
    expected = tape.backward(tape.output).params["weight_hh_l0"]
    gc.collect()  # the tape becomes older than what asks for it
    Asking(layer, tape, found)
    del tape
    gc.collect()
    assert len(found) == 1
    assert all(gradient is None or (gradient == expected).all() for gradient in found)


def test_panels_are_held_while_a_backward_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads may pack the same weights at once, and those of the second take the place of the first's."""
    lstm, x = LSTM(8, 16, rng=0), np.ones((3, 1, 8), np.float32)
    tape = lstm.record(x)
    (weights,) = lstm._training_weights()
    lay_out, given_back = BackwardSpace.lay_out, []

    def replaced(*arguments: Any) -> None:
        weights._packed = None
        given_back.extend(weights.direction.network._spare._kept)
        lay_out(*arguments)

    monkeypatch.setattr(BackwardSpace, "lay_out", replaced)
    tape.backward(tape.output)
    assert not given_back
    assert weights._packed is None


def test_weights_that_were_replaced_are_given_back_at_once() -> None:
    layer, x = LSTM(64, 128, rng=0), np.ones((3, 1, 64), np.float32)  # 0.4 MB, and thrice as much packed
    weights = layer.state_dict()

    def work() -> None:
        for _ in range(10):
            layer.load_state_dict(weights)
            tape = layer.record(x)
            tape.backward(tape.output)

    work()
    gc.disable()
    try:
        _, kept, peak = traced(work)
    finally:
        gc.enable()
    assert kept < 2.5e6
    assert peak < 6e6


# A good guest: each test starts its own interpreters

START = (
    COUNT_REGIONS
    + """
import contextlib, hashlib, os, sys, threading, warnings
import numpy as np
import fastlstm
from fastlstm.kernels import network, region, training

def make():
    return fastlstm.LSTM(3, 40, num_layers=2, bidirectional=True, proj_size=17, rng=0)

lstm = make()
rng = np.random.default_rng(0)
x, d_output = (rng.normal(size=(50, 9, size)).astype(np.float32) for size in (3, 34))
options = {"lengths": rng.integers(0, 51, 9), "reset": rng.random((50, 9)) < 0.1}

def train(layer=lstm, **more):
    tape = layer.record(x, **options, **more)
    found = tape.backward(d_output)
    return b"".join(array.tobytes() for array in (tape.output, found.x, *found.state, *found.params.values()))

with fastlstm.threads.region:  # taken: this call runs the serial kernels
    expected = train()

def parallel(ranks=2, shares=2, groups=1):
    how = network.Strategy(ranks, shares, groups, True, 16)
    training.choose_strategy = lambda *_: how
    if not regions:
        count_regions()

def same(**more):
    return train(**more) == expected
"""
)
TWO = {"FASTLSTM_NUM_THREADS": "2", "NUMBA_NUM_THREADS": "2"}


def test_threads_look_through_idle_scratch_while_others_take_and_leave_it() -> None:
    code = """
import time
lstm = fastlstm.LSTM(3, 4, bidirectional=True, rng=0)
x, d_output = np.ones((2, 24, 3), np.float32), np.ones((2, 24, 8), np.float32)
network.PARALLEL_WORK = 1000
fastlstm.set_num_threads(2)
sys.setswitchinterval(1e-6)
expected = lstm.record(x).backward(d_output).params["weight_hh_l0"].tobytes()
end, wrong = time.monotonic() + 5, []
def work():
    try:
        while time.monotonic() < end and not wrong:
            if lstm.record(x).backward(d_output).params["weight_hh_l0"].tobytes() != expected:
                wrong.append("bits")
    except Exception as error:
        wrong.append(repr(error))
crowd = [threading.Thread(target=work) for _ in range(16)]
[one.start() for one in crowd]
[one.join() for one in crowd]
assert not wrong, wrong
"""
    run_python(START + code, **TWO)


def test_eight_threads_train_one_layer_at_once(threading_layer: str) -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
import numba
barrier = threading.Barrier(8)
def work(_):
    barrier.wait()
    return all([same(checkpoint_every=every) for every in (None, 1) * 3])
for shares, groups in ((1, 3), (2, 1)):
    parallel(shares=shares, groups=groups)
    regions.clear()
    assert same()
    assert regions == [(os.getpid(), True)] * 4, regions  # of 2 layers: forward and backward
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
print(numba.threading_layer())
"""
    assert run_python(START + code, NUMBA_THREADING_LAYER=threading_layer, **TWO).split() == [threading_layer]


@can_fork
def test_parent_and_child_train_after_a_fork(threading_layer: str) -> None:
    """At rest, and while other threads are training."""
    code = """
parallel()
def child():
    return all([same() for _ in range(3)]) and train(make()) == expected and fork(same) == 0
assert same()
assert regions[-1] == (os.getpid(), True)
for _ in range(2):
    assert fork(child) == 0
    assert same()
stop = threading.Event()
def work():
    while not stop.is_set():
        assert same()
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
try:
    results = [fork(child) for _ in range(5)]
finally:
    stop.set()
    for thread in threads:
        thread.join()
assert results == [0] * 5, results
assert same()
assert regions[-1] == (os.getpid(), True)
"""
    run_python(START + CHILD + code, NUMBA_THREADING_LAYER=threading_layer, **TWO)


def test_more_threads_than_cores_and_fewer_than_asked_for() -> None:
    code = """
import numba
for n in (1, 2, 3, 8):
    fastlstm.set_num_threads(n)
    for how in ((n, 1, 9), (n, n, 1), (n, 1, 2)):
        parallel(*how)
        assert same(), (n, how)
numba.set_num_threads(1)  # one thread does the shares of all
for how in ((8, 1, 9), (8, 8, 1), (3, 1, 8)):
    parallel(*how)
    assert same(), how
assert all(done for _, done in regions)
"""
    run_python(START + code, FASTLSTM_NUM_THREADS="8", NUMBA_NUM_THREADS="8")


def test_a_cold_cache_is_filled_by_training_and_serves_the_next(tmp_path: Path) -> None:
    """One process compiles float32, another float64, and a third, which compiles nothing, uses both.

    Without optimisation, as compiling is what takes the time here.
    """
    code = (
        COMPILES
        + """
import hashlib, sys
import numpy as np
import fastlstm
rng = np.random.default_rng(0)
for dtype in sys.argv[1:]:
    lstm = fastlstm.LSTM(3, 40, 2, bidirectional=True, proj_size=17, dtype=dtype, rng=0)
    model = fastlstm.Sequential(lstm, fastlstm.Linear(34, 5, dtype=dtype, rng=1))
    x, d_output = (np.random.default_rng(0).normal(size=(13, 7, size)).astype(dtype) for size in (3, 5))
    tape = model.record(x, lengths=range(7))
    found = tape.backward(d_output)
    digest = hashlib.sha256()
    for array in (tape.output, found.x, *found.state[0], *found.params.values()):
        digest.update(array.tobytes())
    print(digest.hexdigest())
print(*compiled)
"""
    )
    variables = QUICK | {"FASTLSTM_CACHE": str(tmp_path)}
    digests = []
    for dtype in ("float32", "float64"):
        digest, *compiled = run_python(code, dtype, **variables).split()
        assert compiled
        digests.append(digest)
    assert run_python(code, "float32", "float64", **variables).split() == digests


@pytest.mark.parametrize("cpu", ["haswell", "generic"])
def test_other_instruction_sets_are_correct(cpu: str) -> None:
    """Registers are fewer and narrower; the tolerance has room for sums that are not fused."""
    code = """
import numpy as np
import fastlstm
from fastlstm import reference
for dtype, wide in ((np.float32, np.float64), (np.float64, np.longdouble)):
    for H, P in [(1, 0), (3, 2), (4, 0), (7, 0), (8, 5), (13, 12), (16, 0), (17, 0), (24, 9), (33, 0), (65, 31)]:
        rng = np.random.default_rng(H)
        lstm = fastlstm.LSTM(5, H, 2, bidirectional=True, proj_size=P, dtype=dtype, rng=rng)
        x, d_output = (rng.normal(size=(39, 13, size)).astype(dtype) for size in (5, 2 * (P or H)))
        options = {"lengths": rng.integers(0, 40, 13), "reset": rng.random((39, 13)) < 0.2}
        tape = lstm.record(x, **options)
        found = tape.backward(d_output)
        params = {k: v.astype(wide) for k, v in lstm.state_dict().items()}
        saved = reference.forward(params, x.astype(wide), **options).saved
        exact = reference.backward(saved, d_output.astype(wide))
        limit = 20 * np.finfo(dtype).eps * np.sqrt(5 + 7 * H)
        pairs = [(found.x, exact.x), *zip(found.state, exact.state)]
        for got, want in pairs + [(found.params[name], exact.params[name]) for name in exact.params]:
            assert np.abs(got - want).max() <= limit * np.abs(want).max(), (H, P, dtype)
        again = lstm.record(x, **options, checkpoint_every=1).backward(d_output)
        assert (again.x == found.x).all()
        assert all((again.params[name] == found.params[name]).all() for name in exact.params)
    for size in (32, 96):  # weights that are read as they are give the bits of those that are packed
        lstm = fastlstm.LSTM(64, size, dtype=dtype, rng=0)
        x, d_output = (np.random.default_rng(0).normal(size=(1, 2, n)).astype(dtype) for n in (64, size))
        both, one = lstm.record(x), lstm.record(x[:, :1])
        assert (both.output[:, :1] == one.output).all()
        assert (both.backward(d_output).x[:, :1] == one.backward(d_output[:, :1]).x).all()
"""
    run_python(code, NUMBA_CPU_NAME=cpu)
