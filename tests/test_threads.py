"""When a run goes alone because other programs keep the CPUs busy; how many threads there are is in test_config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Case, allows_region, assert_same_bits, draw, forced

from fastlstm import Linear, threads
from fastlstm.kernels import region
from fastlstm.threads import UNCOMPARED, Pace

MS = 1_000_000
ALONE, TOGETHER = 2 * MS, 1 * MS


@pytest.fixture(autouse=True)
def rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs go alone, which no other test wants."""
    monkeypatch.setattr(Pace, "allows_region", allows_region)


def run(pace: Pace, now: int, together: int = TOGETHER, alone: int = ALONE) -> tuple[bool, int]:
    """Run once, in a region that takes so long if one is allowed; return whether it was, and the time after."""
    allowed = pace.allows_region(now)
    now += together if allowed else alone
    if allowed:
        pace.note_region(together, now)
    else:
        pace.note_alone(alone)
    return allowed, now


def runs(pace: Pace, now: int, *together: int) -> tuple[list[bool], int]:
    """Run with regions that take so long; return which were allowed, and the time after."""
    allowed = []
    for took in together:
        was, now = run(pace, now, took)
        allowed.append(was)
    return allowed, now


def measured() -> tuple[Pace, int]:
    """Return a pace that knows how long a run takes alone, and the time."""
    pace = Pace()
    allowed, now = runs(pace, 0, *[TOGETHER] * (UNCOMPARED + 2))
    assert allowed == [True] * UNCOMPARED + [False, True]
    return pace, now


def rest_after(pace: Pace, now: int, together: int) -> tuple[int, int]:
    """Run until there is a rest, and through it; return how long it was, and the time after."""
    allowed = True
    while allowed:
        begun = now
        allowed, now = run(pace, now, together)
    end = now
    while not pace.allows_region(end):
        end += MS // 10
    return end - begun, end


def test_a_quiet_machine_compares_once() -> None:
    pace, now = measured()
    for _ in range(1000):
        allowed, now = run(pace, now, TOGETHER + now % 7 * MS // 10)
        assert allowed


def test_a_first_region_that_compiles_costs_no_rest() -> None:
    pace = Pace()
    allowed, _ = runs(pace, 0, 900 * MS, *[TOGETHER] * 20)
    assert allowed == [True] * UNCOMPARED + [False] + [True] * (20 - UNCOMPARED)


def test_long_runs_are_not_compared() -> None:
    assert all(runs(Pace(), 0, *[110 * MS] * 100)[0])


def test_what_regions_gain_pays_for_a_late_one_now_and_then() -> None:
    pace, now = measured()
    assert all(runs(pace, now, *[15 * MS, *[TOGETHER] * 20] * 20)[0])


def test_late_ones_that_come_too_often_are_not_paid_for() -> None:
    pace, now = measured()
    assert runs(pace, now, 15 * MS, *[TOGETHER] * 5, 15 * MS, TOGETHER)[0] == [True] * 7 + [False]


def test_the_rest_doubles_while_regions_stay_late_and_is_short_again_later() -> None:
    pace, now = measured()
    found = []
    for _ in range(7):
        rest, now = rest_after(pace, now, together=30 * MS)
        found.append(rest)
    assert found == [100 * MS, 200 * MS, 400 * MS, 800 * MS, 1600 * MS, 2000 * MS, 2000 * MS]
    allowed, now = runs(pace, now, *[TOGETHER] * 3000)
    assert all(allowed)
    assert rest_after(pace, now, together=30 * MS)[0] == 100 * MS


def test_regions_that_were_late_from_the_first_on_are_left_too() -> None:
    assert (
        runs(Pace(), 0, *[9 * MS] * (UNCOMPARED + 6))[0]
        == [True] * UNCOMPARED + [False, True, True, True] + [False] * 2
    )


def test_a_machine_that_became_slower_is_no_busy_one() -> None:
    pace, now = measured()
    found = []
    for _ in range(2000):
        allowed, now = run(pace, now, 3 * TOGETHER, 3 * ALONE)
        found.append(allowed)
    assert found.count(False) * 3 * ALONE < 200 * MS
    assert all(found[200:])


def test_after_a_rest_without_a_run_it_is_compared_again() -> None:
    pace, now = measured()
    _, now = runs(pace, now, 30 * MS)
    assert not pace.allows_region(now)
    assert runs(pace, now + 1000 * MS, *[TOGETHER] * 3)[0] == [True, False, True]


class Late:
    """A clock that a region makes late, and how many regions there were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.took, self.entered = 0, 0, 0
        self.run_region = region.run_region
        monkeypatch.setattr(region, "time", self)
        monkeypatch.setattr(region, "run_region", self.enter)
        monkeypatch.setattr(threads, "get_num_threads", lambda: 2)

    def perf_counter_ns(self) -> int:
        self.now += 1000  # what a run takes alone
        return self.now

    def enter(self, plan: Any, ranks: int) -> bool:
        self.entered += 1
        self.now += self.took
        return self.run_region(plan, ranks)

    def check(self, call: Callable[[], None], regions: int = 1) -> None:
        """Call in quiet, in a crowd and after a rest; a call enters so many regions."""
        for _ in range(UNCOMPARED + 5):
            call()
        assert self.entered == regions * (UNCOMPARED + 4)
        self.took = 15 * MS
        for _ in range(20):
            call()
        assert self.entered == regions * (UNCOMPARED + 6)  # two are late
        self.now += 110 * MS
        call()
        assert self.entered == regions * (UNCOMPARED + 7)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Late:
    return Late(monkeypatch)


@pytest.mark.parametrize("shares", [1, 2])
def test_a_layer_goes_alone_to_the_same_bits(shares: int, late: Late) -> None:
    problem = draw(Case(T=9, N=13, H=21))
    expected = problem.call()
    assert not late.entered
    with forced(2, shares, 3 - shares, True, 4):
        late.check(lambda: assert_same_bits(problem.call(), expected))


def test_a_stream_goes_alone_to_the_same_bits(late: Late) -> None:
    layer, x = draw(Case(N=3, H=21)).layer, np.ones((5, 3, 3), np.float32)
    expected = layer.stream(3)(x)
    with forced(2, 2, 1, True, 4):
        stream = layer.stream(3)

        def call() -> None:
            stream.reset()
            assert_same_bits(stream(x), expected)

        late.check(call)


def test_a_linear_layer_goes_alone_to_the_same_bits(late: Late) -> None:
    layer, x = Linear(128, 128, rng=0), np.ones((300, 128), np.float32)
    expected = layer(x)
    late.entered = 0
    layer = Linear(128, 128, rng=0)
    late.check(lambda: assert_same_bits(layer(x), expected))


@pytest.mark.parametrize("lengths", [False, True])
def test_a_backward_goes_alone_to_the_same_bits_unless_its_work_varies(
    lengths: bool, late: Late, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlstm.kernels import network, training

    problem = draw(Case(T=9, N=13, H=21, lengths=lengths))
    d_output = np.ones((9, 13, 21), np.float32)

    def train() -> Any:
        tape = problem.layer.record(problem.x, problem.state, lengths=problem.lengths)
        grads = tape.backward(d_output)
        return tape.output, grads.x, grads.state, tuple(grads.params.values())

    expected = train()
    assert not late.entered
    monkeypatch.setattr(training, "choose_strategy", lambda *_: network.Strategy(2, 2, 1, True, 4))
    problem = draw(problem.case)  # the same again, with nothing chosen yet
    if not lengths:
        late.check(lambda: assert_same_bits(train(), expected), regions=2)
    late.took = 15 * MS
    for _ in range(20 if lengths else 0):
        assert_same_bits(train(), expected)
        assert late.entered % 2 == 0
    assert late.entered == 40 or not lengths
