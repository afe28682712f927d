"""Dirty accounting: Linux's threshold formulas, what follows memory and how fast."""

from __future__ import annotations

import pytest

from tests.writeback import counts
from writeback import dirty
from writeback.bandwidth import INTERVAL_MS
from writeback.dirty import LIMIT_MIN, Dirty, thresholds


def make(pages: int = 10_000) -> Dirty:
    return Dirty(lambda: pages)


def test_golden_thresholds() -> None:
    assert thresholds(100_000, 10, 20) == (9985, 19995)


def test_bytes_instead_of_ratios() -> None:
    assert thresholds(100_000, 10, 20, 0, 1 << 20) == (128, 256)  # background above it: half
    assert thresholds(100_000, 10, 20, 5000, 1 << 20) == (2, 256)
    assert thresholds(100_000, 0, 0, 4096, 1 << 60) == (1, 100_000)  # no more than there is


def test_background_is_half_when_it_would_be_above() -> None:
    background, limit = thresholds(10_000, 50, 20)
    assert background == limit // 2


def test_something_can_always_be_dirtied() -> None:
    nothing = make(0)
    assert nothing.limit == LIMIT_MIN
    assert 0 < nothing.background < nothing.freerun < nothing.limit


def test_flusher_is_woken_above_background_only() -> None:
    some = make()
    woken: list[int] = []
    some.wake_flusher = lambda: woken.append(some.nr_dirty)
    counts.dirtied(some, some.background)
    assert not woken
    counts.dirtied(some, 1)
    assert woken == [some.background + 1]
    assert some.over_background()


def test_limits_follow_memory() -> None:
    memory = [10_000]
    some = Dirty(lambda: memory[0])
    before = some.limit
    memory[0] = 5_000
    counts.dirtied(some, dirty.RATELIMIT_PAGES)
    assert some.limit == pytest.approx(before / 2, abs=1)


def test_the_limit_follows_up_at_once_and_down_slowly() -> None:
    """Within 1 % after half a minute, when the threshold is halved."""
    memory = [100_000]
    some = Dirty(lambda: memory[0])
    some.smooth()
    assert some.limit == some.thresh == 19995
    memory[0] = 50_000
    some.update()
    assert some.limit == 19995 > some.thresh
    times = 0
    while some.limit > some.thresh * 1.01:
        some.smooth()
        times += 1
    assert 27 <= times * INTERVAL_MS / 1000 <= 33
    memory[0] = 200_000
    some.update()
    assert some.limit == some.thresh == 39990


def test_the_limit_does_not_fall_below_what_is_dirty() -> None:
    memory = [100_000]
    some = Dirty(lambda: memory[0])
    some.smooth()
    counts.dirtied(some, 15_000)
    memory[0] = 50_000
    some.update()
    for _ in range(1000):
        some.smooth()
    assert 15_000 <= some.limit < 15_000 + 32


def test_the_devices_share() -> None:
    some = make()
    some.max_ratio, some.strict_limit = 10, 1
    some.update()
    assert some.limit == some.thresh // 10
    assert some.freerun == (some.limit + some.limit * some.background // some.thresh) // 2
    assert some.counts[dirty.COUNT_FREERUN] == some.freerun


def test_the_flusher_goes_by_the_devices_share() -> None:
    """Else nobody would write what writers wait for."""
    some = make()
    some.max_ratio, some.strict_limit = 10, 1
    counts.dirtied(some, some.limit)
    assert some.nr_dirty < some.background
    assert some.over_background()


def test_free_run_begins_again_at_the_background_threshold() -> None:
    some = make()
    ceiling = some.freerun
    for dirtied, free_below in [
        (ceiling, ceiling),
        (ceiling + 1, some.background),
        (some.background + 1, some.background),
        (some.background, ceiling),
        (some.background + 1, ceiling),
    ]:
        some.counts[dirty.NR_DIRTY] = dirtied
        some.update()
        assert some.freerun == free_below


def test_what_lanes_look_at() -> None:
    memory = [10_000]
    some = Dirty(lambda: memory[0])
    woken: list[int] = []
    some.wake_flusher = lambda: woken.append(some.nr_dirty)
    assert some.counts[dirty.COUNT_BACKGROUND] == some.background
    assert some.counts[dirty.COUNT_FREERUN] == (some.background + some.limit) // 2
    some.counts[dirty.NR_DIRTY] += 600  # a lane
    some.poke()
    assert not woken
    memory[0] = 5_000
    some.poke()  # the thresholds follow memory, and it is above them now
    assert woken == [600]
    assert some.counts[dirty.COUNT_FREERUN] == (some.background + some.limit) // 2
