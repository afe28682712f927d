"""Dirty accounting: Linux's threshold formulas, and who waits for how long."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from tests.writeback import counts
from writeback import dirty
from writeback.dirty import LIMIT_MIN, NR_DIRTY, Dirty, thresholds


def make(pages: int = 10_000) -> Dirty:
    return Dirty(lambda: pages)


def test_golden_thresholds() -> None:
    assert thresholds(100_000, 10, 20) == (9985, 19995)


def test_bytes_instead_of_ratios() -> None:
    assert thresholds(100_000, 10, 20, 0, 1 << 20) == (128, 256)  # background above it: half
    assert thresholds(100_000, 10, 20, 5000, 1 << 20) == (2, 256)
    assert thresholds(100_000, 0, 0, 4096, 1 << 60) == (1, 100_000)  # no more than there is


async def test_who_may_go_on_after_a_change_does() -> None:
    dirty = Dirty(lambda: 1000)
    dirty.counts[NR_DIRTY] = 300
    async with trio.open_nursery() as nursery:
        nursery.start_soon(dirty.balance, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert dirty.nr_waiting == 1
        dirty.ratio = 40
        dirty.retune()
    assert dirty.nr_waiting == 0


def test_background_is_half_when_it_would_be_above() -> None:
    background, limit = thresholds(10_000, 50, 20)
    assert background == limit // 2


def test_something_can_always_be_dirtied() -> None:
    nothing = make(0)
    assert nothing.limit == LIMIT_MIN
    assert nothing.background < nothing.limit
    assert not nothing.must_wait()


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


async def test_writer_below_the_limit_does_not_wait() -> None:
    some = make()
    counts.dirtied(some, some.limit - 1)
    with trio.fail_after(0):
        await some.balance(100)
    assert some.throttled == 0


async def test_writers_wait_in_line_and_leave_in_line(
    autojump_clock: trio.testing.MockClock,
) -> None:
    some = make()
    counts.dirtied(some, some.limit)
    order: list[int] = []

    async def writer(number: int) -> None:
        await some.balance(8)
        order.append(number)
        counts.dirtied(some, 8)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(writer, number)
            await trio.testing.wait_all_tasks_blocked()
        assert some.nr_waiting == 3
        counts.start_writeback(some, some.limit)
        assert some.nr_waiting == 3  # on its way is not written
        for _ in range(3):
            counts.end_writeback(some, 8)
            await trio.testing.wait_all_tasks_blocked()
    assert order == [0, 1, 2]
    assert some.throttled == 3
    assert some.nr_dirty + some.nr_writeback <= some.limit + 8


async def test_newcomers_do_not_overtake(autojump_clock: trio.testing.MockClock) -> None:
    some = make()
    counts.dirtied(some, some.limit)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(some.balance, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert some.must_wait()
        some.counts[dirty.NR_DIRTY] -= 10  # room, but somebody is in line
        assert some.must_wait()
        some.admit()
        assert not some.must_wait()


async def test_a_cancelled_writer_leaves_the_line(
    autojump_clock: trio.testing.MockClock,
) -> None:
    some = make()
    counts.dirtied(some, some.limit)
    scope = trio.CancelScope()
    done = trio.Event()

    async def first() -> None:
        with scope:
            await some.balance(1)

    async def second() -> None:
        await some.balance(1)
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert some.nr_waiting == 1
        counts.throw_away(some, 1)
        await done.wait()
    assert some.nr_waiting == 0


async def test_what_lanes_look_at(autojump_clock: trio.testing.MockClock) -> None:
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


async def test_lanes_see_the_line(autojump_clock: trio.testing.MockClock) -> None:
    some = make()
    counts.dirtied(some, some.limit)
    scope = trio.CancelScope()

    async def writer() -> None:
        with scope:
            await some.balance(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(writer)
        nursery.start_soon(some.balance, 1)
        await trio.testing.wait_all_tasks_blocked()
        assert some.counts[dirty.COUNT_WAITERS] == 2
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert some.counts[dirty.COUNT_WAITERS] == 1
        counts.throw_away(some, 1)
        assert some.counts[dirty.COUNT_WAITERS] == 0
