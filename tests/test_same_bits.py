"""A row's output has the same bits whatever surrounds it: batch, neighbours, threads, strategy, chunks, streaming."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import (
    BOTH,
    Case,
    Problem,
    assert_close,
    assert_same_bits,
    draw,
    forced,
    grid,
    random_cases,
    tolerance,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastlstm
from fastlstm import threads

by_name = {"ids": str}
MIXED = Case(T=9, N=13, I=3, H=21, L=2, D=2, P=6, lengths=True, reset=True)
REMAINDERS = [  # every lane remainder of H and of P, alone and with all else
    *grid(Case(T=3, N=7, I=3), H=range(1, 34), dtype=BOTH),
    *[replace(case, H=case.P + 2) for case in grid(Case(T=3, N=7, I=3), P=range(1, 66, 3), dtype=BOTH)],
    *grid(replace(MIXED, N=7, P=0, L=1), H=range(1, 34, 2), dtype=BOTH),
    *[replace(case, H=case.P + 5) for case in grid(replace(MIXED, N=7), P=range(1, 34, 2), dtype=BOTH)],
    *grid(Case(T=3, N=7, I=5), H=(47, 64, 65, 72, 96, 127, 130), dtype=BOTH),
]
# (ranks, shares, groups, hoisted, chunk); among them more threads than cores, a group for each row, steps one by one
ROWS = [
    (1, 1, 1, False, 16),
    (1, 1, 99, True, 5),
    (2, 1, 4, True, 1),
    (2, 1, 99, False, 3),
    (3, 1, 6, True, 7),
    (5, 1, 2, False, 1),
]
UNITS = [
    (2, 2, 1, True, 4),
    (2, 2, 1, False, 1),
    (2, 3, 1, True, 1),
    (3, 7, 1, True, 16),
    (7, 2, 1, False, 5),
    (2, 64, 1, True, 3),
]


def rows_alone(problem: Problem, **changed: Any) -> tuple[Any, tuple[Any, Any]]:
    """Compute each row in a call of its own, cut to its length, and put the results together."""
    outputs, states = [], []
    for n in range(problem.case.N):
        length = problem.case.T if problem.lengths is None else problem.lengths[n]
        output, state = problem.call(**problem.row(n, 0, length), **changed)
        outputs.append(np.concatenate([output, np.zeros((problem.case.T - length, 1, output.shape[2]), output.dtype)]))
        states.append(state)
    h_n, c_n = (np.concatenate(parts, axis=1) for parts in zip(*states, strict=True))
    return np.concatenate(outputs, axis=1), (h_n, c_n)


# Batch


@pytest.mark.parametrize("case", REMAINDERS, **by_name)
def test_each_row_alone(case: Case) -> None:
    problem = draw(case)
    assert_same_bits(problem.call(), rows_alone(problem))


@pytest.mark.parametrize("case", grid(Case(T=3, H=21), P=(0, 5), D=(1, 2), dtype=BOTH), **by_name)
def test_every_batch_size(case: Case) -> None:
    problem = draw(replace(case, N=40))
    output, state = problem.call()
    for N in range(1, 40):
        part = problem.call(x=problem.x[:, :N], state=tuple(array[:, :N] for array in problem.state))
        assert_same_bits(part, (output[:, :N], tuple(array[:, :N] for array in state)))


@pytest.mark.parametrize("case", grid(MIXED, D=(1, 2), P=(0, 6), lengths=(False, True), dtype=BOTH), **by_name)
def test_every_place_in_the_batch(case: Case) -> None:
    problem = draw(case)
    output, state = problem.call()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(case.N)
        permuted = problem.call(
            x=problem.x[:, order],
            state=tuple(part[:, order] for part in problem.state),
            lengths=None if problem.lengths is None else problem.lengths[order],
            reset=problem.reset[:, order],
        )
        assert_same_bits(permuted, (output[:, order], tuple(part[:, order] for part in state)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, 1e-41])
@pytest.mark.parametrize("case", grid(MIXED, D=(1, 2), P=(0, 6), L=(1, 2), dtype=BOTH), **by_name)
def test_whatever_the_neighbours_hold(case: Case, value: float) -> None:
    problem = draw(case)
    output, state = problem.call()
    kept = np.arange(case.N) % 3 == 1
    problem.x[:, ~kept] = value
    for part in problem.state:
        part[:, ~kept] = value
    other_output, other_state = problem.call()
    assert_same_bits(other_output[:, kept], output[:, kept])
    for part, expected in zip(other_state, state, strict=True):
        assert_same_bits(part[:, kept], expected[:, kept])
    longest = problem.lengths.argmax()
    if not kept[longest]:
        assert (other_output[:, longest] != output[:, longest]).any()


@pytest.mark.parametrize("case", grid(MIXED, P=(0, 6), dtype=BOTH), **by_name)
def test_whatever_the_call_before_left_behind(case: Case) -> None:
    """Scratch is used again without being cleared: what does not come from the arguments must not matter."""
    problem = draw(case)
    poison = {
        "x": np.full_like(problem.x, np.nan),
        "state": tuple(np.full_like(part, np.nan) for part in problem.state),
    }
    plain = {"state": None, "lengths": None, "reset": None}
    expected, expected_plain = problem.call(), problem.call(**plain)
    for how in [None, *ROWS, *UNITS]:
        with forced(*how) if how else nullcontext():
            problem.call(**plain | poison)
            assert_same_bits(problem.call(), expected)
            problem.call(**plain | {"x": poison["x"]})
            assert_same_bits(problem.call(**plain), expected_plain)


@pytest.mark.parametrize("case", grid(Case(T=7, N=6, H=19, L=2), D=(1, 2), P=(0, 5), dtype=BOTH), **by_name)
def test_every_layout(case: Case) -> None:
    problem = draw(case)
    expected = problem.call()
    swapped = Problem(
        **{**vars(problem), "case": replace(case, layout="NTI"), "layer": draw(replace(case, layout="NTI")).layer}
    )
    swapped.layer.load_state_dict(problem.layer.state_dict())
    assert_same_bits(swapped.call(), expected)
    single = Problem(**{**vars(problem), "case": replace(case, layout="TI")})
    assert_same_bits(rows_alone(single), expected)


# Threads and strategies


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize(
    "case",
    [
        *grid(MIXED, D=(1, 2), P=(0, 6), dtype=BOTH),
        *grid(Case(T=12, N=64, I=32, H=128), D=(1, 2), L=(1, 2), dtype=BOTH),
        *grid(Case(T=12, N=1, I=32, H=512), D=(1, 2), dtype=BOTH),
        *grid(Case(T=40, N=300, I=16, H=40, L=2, lengths=True), D=(1, 2), dtype=BOTH),
    ],
    **by_name,
)
def test_every_number_of_threads(case: Case) -> None:
    problem = draw(case)
    results = []
    for n in (1, 2, 64):
        fastlstm.set_num_threads(n)
        results.append(problem.call())
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])
    if case.dtype is np.float32:  # longdouble takes its time at these sizes
        assert_close(results[0], problem.exact(), tolerance(case))


@pytest.mark.parametrize("how", [*ROWS, *UNITS], **by_name)
@pytest.mark.parametrize(
    "case",
    [
        *grid(
            Case(T=9, N=13, H=21), L=(1, 3), D=(1, 2), P=(0, 6), lengths=(False, True), reset=(False, True), dtype=BOTH
        ),
        *grid(Case(T=4, N=1), H=(1, 15, 16, 17, 40, 130), dtype=BOTH),
        *grid(replace(MIXED, N=2, L=3), H=(9, 34), dtype=BOTH),
    ],
    **by_name,
)
def test_every_strategy(case: Case, how: tuple[int, int, int, bool, int]) -> None:
    problem = draw(case)
    expected = problem.call()
    with forced(*how):
        assert_same_bits(problem.call(), expected)


@pytest.mark.parametrize(
    "case", grid(Case(T=9, N=13, H=21, L=2), D=(1, 2), P=(0, 6), lengths=(False, True), dtype=BOTH), **by_name
)
@pytest.mark.parametrize("why", ["region taken", "forked child"])
def test_the_serial_kernel_where_no_parallel_region_is_to_be_had(
    case: Case, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = draw(case)
    expected = problem.call()
    if why == "forked child":
        monkeypatch.setattr(threads, "_in_forked_child", True)
    with threads.region if why == "region taken" else nullcontext():
        for how in [*ROWS, *UNITS]:
            with forced(*how):
                assert_same_bits(problem.call(), expected)


@pytest.mark.parametrize("case", REMAINDERS, **by_name)
def test_units_shared_out_for_every_remainder(case: Case) -> None:
    problem = draw(case)
    expected = problem.call()
    for how in [(2, 1, 3, False, 2), (2, 2, 1, True, 2), (2, 5, 1, False, 2)]:
        with forced(*how):
            assert_same_bits(problem.call(), expected)


# Time: chunks, streams, lengths, resets


@pytest.mark.parametrize("how", [None, (2, 1, 4, True, 1), (2, 2, 1, True, 4)], ids=str)
def test_one_layer_takes_each_calls_own_lengths(how: tuple[int, int, int, bool, int] | None) -> None:
    problem, rng = draw(Case(T=9, N=13, H=21, D=2)), np.random.default_rng(0)
    with nullcontext() if how is None else forced(*how):
        for _ in range(10):
            for lengths in (rng.integers(0, 10, 13), None):
                fresh = draw(problem.case)
                assert_same_bits(problem.call(lengths=lengths), fresh.call(lengths=lengths))
                if how is None:  # a record has its own
                    tape, fresh_tape = (p.layer.record(p.x, p.state, lengths=lengths) for p in (problem, fresh))
                    assert_same_bits(tape.output, fresh_tape.output)


@pytest.mark.parametrize(
    "case", grid(Case(T=20, N=3, H=21), L=(1, 3), P=(0, 6), reset=(False, True), dtype=BOTH), **by_name
)
@pytest.mark.parametrize("size", [1, 3, 19])
def test_a_sequence_in_pieces(case: Case, size: int) -> None:
    problem = draw(case)
    output, state = problem.call()
    pieces, carried = [], problem.state
    for start in range(0, case.T, size):
        reset = None if problem.reset is None else problem.reset[start : start + size]
        piece, carried = problem.call(x=problem.x[start : start + size], state=carried, reset=reset)
        pieces.append(piece)
    assert_same_bits((np.concatenate(pieces), carried), (output, state))


@pytest.mark.parametrize(
    "case",
    [
        *grid(Case(T=12, I=3, H=21), N=(1, 2, 7), L=(1, 3), P=(0, 6), state=(False, True), dtype=BOTH),
        *grid(Case(T=4, N=1, I=1), H=range(1, 34), dtype=BOTH),
        *[replace(case, H=case.P + 4) for case in grid(Case(T=4, N=3, I=1, L=2), P=range(1, 34), dtype=BOTH)],
        *grid(Case(T=4, I=32, H=130), N=(1, 8), dtype=BOTH),
    ],
    **by_name,
)
def test_a_stream_step_by_step_and_in_chunks(case: Case) -> None:
    problem = draw(case)
    output, state = problem.call()
    stream = problem.layer.stream(case.N, problem.state)
    assert_same_bits((np.stack([stream(x) for x in problem.x]), stream.state), (output, state))
    for seed in range(4):
        stream = problem.layer.stream(case.N, problem.state)
        cuts = np.sort(np.random.default_rng(seed).integers(0, case.T + 1, 4))
        pieces = [stream(x) if len(x) != 1 else stream(x[0])[None] for x in np.split(problem.x, cuts)]
        assert_same_bits((np.concatenate(pieces), stream.state), (output, state))


@pytest.mark.parametrize("how", [*ROWS, *UNITS], **by_name)
@pytest.mark.parametrize("case", grid(Case(T=12, N=5, H=37), L=(1, 3), P=(0, 6), dtype=BOTH), **by_name)
def test_a_stream_with_every_strategy(case: Case, how: tuple[int, int, int, bool, int]) -> None:
    problem = draw(case)
    expected = problem.call()
    with forced(*how):
        stream = problem.layer.stream(case.N, problem.state)
        pieces = [stream(problem.x[0])[None], stream(problem.x[1:4]), stream(problem.x[4])[None], stream(problem.x[5:])]
        assert_same_bits((np.concatenate(pieces), stream.state), expected)


@pytest.mark.parametrize(
    "case", grid(MIXED, L=(1, 2, 3), D=(1, 2), P=(0, 6), reset=(False, True), dtype=BOTH), **by_name
)
@pytest.mark.parametrize("seed", range(3))
def test_lengths_are_each_row_alone(case: Case, seed: int) -> None:
    problem = draw(case)
    problem.lengths = np.random.default_rng(seed).integers(0, case.T + 1, case.N)
    output, (h_n, c_n) = problem.call()
    assert_same_bits((output, (h_n, c_n)), rows_alone(problem))
    full = problem.call(lengths=np.full(case.N, case.T))
    assert_same_bits(full, problem.call(lengths=None))


@pytest.mark.parametrize(
    "case", grid(MIXED, L=(1, 2, 3), D=(1, 2), P=(0, 6), lengths=(False, True), dtype=BOTH), **by_name
)
def test_resets_are_segments_alone(case: Case) -> None:
    """A state enters the first segment in the forward direction, and the last one in the reverse direction."""
    problem = draw(case)
    output, (h_n, c_n) = problem.call()
    reverse = np.arange(case.L * case.D) % case.D == 1
    for n in range(case.N):
        length = case.T if problem.lengths is None else problem.lengths[n]
        bounds = [0, *(t for t in range(1, length) if problem.reset[t, n]), length]
        for start, stop in itertools.pairwise(bounds if length else []):
            arguments = problem.row(n, start, stop)
            enters = np.where(reverse, stop == length, start == 0 and not problem.reset[0, n])[:, None, None]
            state = tuple(np.where(enters, part, 0).astype(case.dtype) for part in arguments["state"])
            segment, (h, c) = problem.call(x=arguments["x"], state=state, lengths=None, reset=None)
            assert_same_bits(output[start:stop, n], segment[:, 0])
            leaves = np.where(reverse, start == 0, stop == length)
            assert_same_bits((h_n[leaves, n], c_n[leaves, n]), (h[leaves, 0], c[leaves, 0]))


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("dtype", BOTH)
def test_nan_does_not_cross_a_reset(D: int, dtype: Any) -> None:
    problem = draw(Case(T=8, N=7, H=21, D=D, L=2, dtype=dtype))
    reset = np.zeros((8, 7), bool)
    reset[3, 2] = reset[5, 2] = True
    clean = problem.call(reset=reset)[0]
    problem.x[4, 2] = np.nan
    dirty = problem.call(reset=reset)[0]
    assert np.isnan(dirty[4, 2]).all()
    changed = np.zeros((8, 7), bool)
    changed[3:5, 2] = True
    assert_same_bits(dirty[~changed], clean[~changed])


# Anything


@given(
    case=random_cases(20),
    how=st.tuples(st.integers(2, 4), st.integers(1, 6), st.integers(1, 16), st.booleans(), st.integers(1, 20)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_random_calls(case: Case, how: tuple[int, int, int, bool, int], seed: int) -> None:
    problem = draw(case, seed)
    expected = problem.call()
    assert_close(expected, problem.exact(), tolerance(case))
    with forced(*how):
        assert_same_bits(problem.call(), expected)
    n = seed % case.N
    length = case.T if problem.lengths is None else problem.lengths[n]
    output, (h_n, c_n) = problem.call(**problem.row(n, 0, length))
    assert_same_bits(output[:, 0], expected[0][:length, n])
    assert_same_bits((h_n[:, 0], c_n[:, 0]), (expected[1][0][:, n], expected[1][1][:, n]))
