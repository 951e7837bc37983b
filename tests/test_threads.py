"""When a run goes alone because other programs keep the CPUs busy; how many threads there are is in test_config."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Case, allows_region, assert_same_bits, draw, forced

from fastlstm import threads
from fastlstm.kernels import region
from fastlstm.threads import Pace

MS = 1_000_000
ALONE, TOGETHER = 2 * MS, 1 * MS


@pytest.fixture(autouse=True)
def rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs go alone, which no other test wants."""
    monkeypatch.setattr(Pace, "allows_region", allows_region)


def run(pace: Pace, now: int, together: int = TOGETHER, work: int = 1) -> tuple[bool, int]:
    """Run once, in a region that takes so long if one is allowed; return whether it was, and the time after."""
    allowed = pace.allows_region(now)
    now += together if allowed else ALONE * work
    if allowed:
        pace.note_region(together, work, now)
    else:
        pace.note_alone(ALONE * work, work)
    return allowed, now


def measured() -> tuple[Pace, int]:
    """Return a pace that knows how long a run takes alone and together, and the time."""
    pace, now = Pace(), 0
    allowed = []
    for _ in range(3):
        was, now = run(pace, now)
        allowed.append(was)
    assert allowed == [True, False, True]
    return pace, now


def rest_after(pace: Pace, now: int, together: int) -> tuple[int, int]:
    """Run until a region is late; return how long runs go alone then, and the time after."""
    allowed = True
    while allowed:
        begun = now
        allowed, now = run(pace, now, together)
    begun, end = begun, now
    while not pace.allows_region(end):
        end += MS // 10
    return end - begun, end


def test_a_quiet_machine_compares_once() -> None:
    pace, now = measured()
    for _ in range(1000):
        allowed, now = run(pace, now, TOGETHER + now % 7 * MS // 10)
        assert allowed


def test_a_first_region_that_compiles_is_not_compared() -> None:
    pace = Pace()
    allowed, now = run(pace, 0, together=900 * MS)
    assert allowed
    assert [run(pace, now)[0] for _ in range(3)] == [True, False, True]


def test_a_run_longer_than_any_rest_is_not_compared() -> None:
    pace, now = Pace(), 0
    for _ in range(100):
        allowed, now = run(pace, now, together=110 * MS)
        assert allowed


def test_what_regions_gain_pays_for_a_late_one_now_and_then() -> None:
    pace, now = measured()
    for _ in range(20):
        for together in (15 * MS, *[TOGETHER] * 20):
            allowed, now = run(pace, now, together)
            assert allowed


def test_late_ones_that_come_too_often_are_not_paid_for() -> None:
    pace, now = measured()
    for together in (15 * MS, *[TOGETHER] * 5, 15 * MS):
        allowed, now = run(pace, now, together)
        assert allowed
    assert not pace.allows_region(now)


def test_the_rest_doubles_while_regions_stay_late_and_is_short_again_later() -> None:
    pace, now = measured()
    found = []
    for _ in range(7):
        rest, now = rest_after(pace, now, together=30 * MS)
        found.append(rest)
    assert found == [100 * MS, 200 * MS, 400 * MS, 800 * MS, 1600 * MS, 2000 * MS, 2000 * MS]
    for _ in range(3000):
        allowed, now = run(pace, now)
        assert allowed
    assert rest_after(pace, now, together=30 * MS)[0] == 100 * MS


def test_regions_that_were_late_from_the_first_on_are_left_too() -> None:
    pace, now = Pace(), 0
    allowed = []
    for _ in range(6):
        was, now = run(pace, now, together=9 * MS)
        allowed.append(was)
    assert allowed == [True, False, True, True, True, False]


def test_what_is_compared_is_the_time_for_each_unit_of_work() -> None:
    pace, now = measured()
    for _ in range(100):
        allowed, now = run(pace, now, together=100 * TOGETHER, work=100)
        assert allowed
    assert rest_after(pace, now, together=30 * MS)[0] == 100 * MS


def test_paces_are_kept_apart_and_not_without_end() -> None:
    paces = threads.Paces()
    first = paces[1, 2]
    assert paces[1, 2] is first
    assert paces[2, 2] is not first
    for n in range(10 * threads.KEPT_PACES):
        _ = paces[n, 0]
    assert len(paces) <= threads.KEPT_PACES


@pytest.mark.parametrize("shares", [1, 2])
@pytest.mark.parametrize("lengths", [False, True])
def test_a_layer_goes_alone_to_the_same_bits(shares: int, lengths: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0

        def perf_counter_ns(self) -> int:
            self.now += 1000  # what a run takes alone
            return self.now

    clock, took, entered = Clock(), [0], []
    run_region = region.run_region

    def late(plan: Any, ranks: int) -> bool:
        entered.append(clock.now)
        clock.now += took[0]
        return run_region(plan, ranks)

    monkeypatch.setattr(region, "time", clock)
    monkeypatch.setattr(region, "run_region", late)
    problem = draw(Case(T=9, N=13, H=21, lengths=lengths))
    expected = problem.call()
    assert not entered
    with forced(2, shares, 3 - shares, True, 4):
        for _ in range(10):
            assert_same_bits(problem.call(), expected)
        assert len(entered) == 9  # all but the second
        took[0] = 15 * MS
        for _ in range(20):
            assert_same_bits(problem.call(), expected)
        assert len(entered) == 11  # two are late
        clock.now += 110 * MS
        assert_same_bits(problem.call(), expected)
        assert len(entered) == 12
