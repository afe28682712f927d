"""The flusher over mappings that are only counters: when it writes, what, and for whom."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from alloc import gfp
from tests.writeback import counts
from writeback import flusher
from writeback.dirty import Dirty
from writeback.flusher import (
    CHUNK_PAGES,
    EXPIRE_S,
    PERIOD_S,
    STAMPS_EXPIRE_S,
    Flusher,
    chunk_pages,
)
from writeback.lists import DIRTY_TIME
from writeback.mapping import INODE_DIRTY, LISTED, LISTED_TIME, STATE
from writeback.throttle import Throttle

MINUTE_S = 60.0


class FakeMemory:
    """What the flusher needs of an arena."""

    def __init__(self) -> None:
        self.cleaner: Callable[[], None] = lambda: None
        self.kicks = 0

    def register_cleaner(self, wake: Callable[[], None]) -> None:
        self.cleaner = wake

    def kick(self) -> None:
        self.kicks += 1


class FakeMappings:
    """Mappings without content: dirty pages are a number, a write takes `seconds`."""

    def __init__(self) -> None:
        self.states = np.zeros(64, STATE)
        self.held = np.zeros(64, int)
        self.seconds = 0.01
        self.log: list[tuple[float, int, int, bool]] = []  # when, handle, pages, integrity
        self.objects: list[int] = []
        self.busy: set[int] = set()
        self.fail = False
        self.tries = 0
        self.while_writing: Callable[[int], None] = lambda handle: None
        self.memory = FakeMemory()
        self.dirty = Dirty(lambda: 100_000)
        self.throttle = Throttle(self.dirty, self.states["credit"])
        self.flusher = Flusher(self.memory, self, self.dirty, logging.getLogger("nofailfs.test"))

    def state(self, handle: int) -> Any:
        return self.states[handle]

    def enlist(self, handle: int) -> bool:
        before = int(self.states["flags"][handle])
        self.states["flags"][handle] |= LISTED
        self.states["flags"][handle] &= ~np.uint32(LISTED_TIME)
        return not before & LISTED

    def unlist(self, handle: int) -> bool:
        state = self.states[handle]
        listed = state["flags"] & (LISTED | LISTED_TIME)
        if not listed or state["ndirty"] or state["flags"] & INODE_DIRTY:
            return False
        state["flags"] &= ~np.uint32(LISTED | LISTED_TIME)
        return True

    def defer(self, handle: int) -> bool:
        state = self.states[handle]
        if not state["flags"] & (LISTED | LISTED_TIME) or state["ndirty"]:
            return False
        state["flags"] = state["flags"] & ~np.uint32(LISTED) | LISTED_TIME
        return True

    def hold(self, handle: int) -> None:
        self.held[handle] += 1

    def drop(self, handle: int) -> None:
        self.held[handle] -= 1

    def make_dirty(self, handle: int, pages: int = 1) -> None:
        self.states["ndirty"][handle] += pages
        self.flusher.enlist(handle)
        counts.dirtied(self.dirty, pages)
        self.throttle.dirtied(handle, pages)

    async def write_range(
        self, handle: int, start: int, end: int, *, integrity: bool, budget: int
    ) -> int:
        assert gfp.current_scope() & gfp.MEMALLOC
        assert gfp.current_scope() & gfp.NOFS
        self.tries += 1
        if self.fail:
            await trio.sleep(self.seconds)  # so that a test's time goes on
            raise OSError(5, "told to fail")
        pages = min(int(self.states["ndirty"][handle]), budget)
        self.states["ndirty"][handle] -= pages
        self.throttle.submitting()
        counts.start_writeback(self.dirty, pages)
        self.log.append((trio.current_time(), handle, pages, integrity))
        self.while_writing(handle)
        assert handle not in self.busy, "its blocks would be chosen out of order"
        self.busy.add(handle)
        await trio.sleep(self.seconds)
        self.busy.remove(handle)
        counts.end_writeback(self.dirty, pages)
        self.throttle.completed()
        return pages

    async def write_object(self, handle: int) -> None:
        self.objects.append(handle)
        self.states["flags"][handle] &= ~np.uint32(INODE_DIRTY)

    @property
    def order(self) -> list[int]:
        return [entry[1] for entry in self.log]


@asynccontextmanager
async def running() -> AsyncIterator[FakeMappings]:
    mappings = FakeMappings()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(mappings.flusher.run)
        await trio.testing.wait_all_tasks_blocked()
        try:
            yield mappings
        finally:
            mappings.fail = False  # a round is not cancelled: it ends
        nursery.cancel_scope.cancel()
    assert not mappings.held.any()


async def test_young_data_is_left_alone_and_old_data_is_not(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as m:
        start = trio.current_time()
        m.make_dirty(1)
        await trio.sleep(EXPIRE_S - PERIOD_S)
        assert not m.log
        await trio.sleep(2 * PERIOD_S + 1)
        assert m.order == [1]
        assert EXPIRE_S <= m.log[0][0] - start <= EXPIRE_S + PERIOD_S
        assert not m.states["flags"][1] & LISTED


async def test_background_threshold_wakes_it_and_it_stops_below(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as m:
        for handle in range(1, 13):
            m.make_dirty(handle, CHUNK_PAGES)
        assert m.dirty.nr_dirty > m.dirty.background
        await trio.sleep(1)
        assert m.dirty.nr_dirty <= m.dirty.background
        assert m.order == [1, 2, 3]  # oldest first, and no more than needed
        assert m.memory.kicks == 3


async def test_a_large_mapping_shares_the_flusher(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as m:
        m.make_dirty(1, 20 * CHUNK_PAGES)
        m.make_dirty(2, CHUNK_PAGES)
        await trio.sleep(1)
        assert m.order[:3] == [1, 2, 1]
        assert all(pages <= CHUNK_PAGES for _, _, pages, _ in m.log)


@pytest.mark.parametrize(
    ("bandwidth", "limit", "pages"),
    [(0, 0, 1024), (25600, 8191, 1024), (25600, 8192, 2048), (5120, 1 << 20, 3072)],
)
def test_chunks(bandwidth: int, limit: int, pages: int) -> None:
    """Half a second's writing, an eighth of the limit at most, rounded as the kernel rounds."""
    assert chunk_pages(bandwidth, limit, 1 << 60) == pages
    assert chunk_pages(bandwidth, limit, 5) == 1024, "no more than is wanted, but 4 MiB"


async def test_chunks_follow_the_bandwidth(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as m:
        m.flusher.avg_bandwidth = lambda: 4096
        m.make_dirty(1, 20 * CHUNK_PAGES)
        await trio.sleep(1)
        assert m.log[0][2] == chunk_pages(4096, m.dirty.limit, 1 << 60) == 3 * CHUNK_PAGES


async def test_reclaim_gets_what_is_dirty_below_every_threshold(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """As the kernel's wakeup_flusher_threads; what becomes dirty meanwhile is left alone."""
    async with running() as m:
        m.memory.cleaner()  # nothing dirty: nothing to do
        m.make_dirty(1, 5)
        m.make_dirty(2, 5)
        await trio.sleep(1)
        assert not m.log
        m.while_writing = lambda handle: m.make_dirty(handle + 10)
        m.memory.cleaner()
        await trio.sleep(1)
        assert sorted(m.order) == [1, 2]


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mapping at a time, so that the order of slices is that of the lists."""
    monkeypatch.setattr(flusher, "MAPPINGS_AT_ONCE", 1)


async def test_reclaim_comes_before_the_background(
    one_by_one: None, autojump_clock: trio.testing.MockClock
) -> None:
    async with running() as m:
        for handle in range(1, 16):
            m.make_dirty(handle, CHUNK_PAGES)
        assert m.dirty.nr_dirty > m.dirty.background
        await trio.sleep(m.seconds / 2)
        m.memory.cleaner()
        assert m.flusher.rounds == 1
        await trio.sleep(m.seconds)
        assert m.flusher.rounds == 2, "the background stopped after its slice"
        await trio.sleep(1)
        assert m.order == list(range(1, 16)), "everything, below the threshold, too"


async def test_slices_go_round_and_the_young_come_last(
    one_by_one: None, autojump_clock: trio.testing.MockClock
) -> None:
    """What b_io has is first, then who used his slice up, then what became dirty meanwhile."""
    async with running() as m:
        m.dirty.background_bytes = 1 << 12
        m.make_dirty(1, 3 * CHUNK_PAGES)
        m.make_dirty(2, 2 * CHUNK_PAGES)
        m.make_dirty(3, CHUNK_PAGES)
        await trio.sleep(m.seconds / 2)
        m.make_dirty(4, CHUNK_PAGES)
        await trio.sleep(1)
        assert m.order == [1, 2, 3, 1, 2, 4, 1]
        assert m.flusher.nr_listed == 0


async def test_a_round_for_age_takes_the_old_only(
    one_by_one: None, autojump_clock: trio.testing.MockClock
) -> None:
    """And each until it is clean, though others are younger; a redirtied one is young again."""
    async with running() as m:
        m.make_dirty(1, 2 * CHUNK_PAGES)
        m.make_dirty(2)
        await trio.sleep(EXPIRE_S - 2 * PERIOD_S)
        m.make_dirty(3)
        m.while_writing = lambda handle: m.make_dirty(handle, int(handle == 2))
        await trio.sleep(3 * PERIOD_S + 1)
        assert m.order == [1, 2, 1]
        m.while_writing = lambda handle: None
        await trio.sleep(EXPIRE_S - 2 * PERIOD_S)
        assert m.order == [1, 2, 1, 3]
        await trio.sleep(3 * PERIOD_S)
        assert m.order == [1, 2, 1, 3, 2]
        assert m.log[-1][0] - m.log[1][0] >= EXPIRE_S


async def test_a_round_for_age_comes_each_period(autojump_clock: trio.testing.MockClock) -> None:
    """However often, and however late in a period, somebody wakes the flusher."""
    async with running() as m:
        m.flusher.expire_s = 1
        m.make_dirty(1)
        for _ in range(9):
            await trio.sleep(PERIOD_S / 10)
            m.flusher.wake()
        assert not m.order
        await trio.sleep(PERIOD_S / 5)
        assert m.order == [1]


async def test_a_mapping_that_cannot_be_written_does_not_keep_it_busy(
    autojump_clock: trio.testing.MockClock, allow_logs: Callable[[str], None]
) -> None:
    allow_logs("write-back stopped: .*told to fail")
    async with running() as m:
        m.fail = True
        for handle in range(1, 13):
            m.make_dirty(handle, CHUNK_PAGES)
        await trio.sleep(1)
        assert m.dirty.over_background()
        assert m.tries == 12, "each once; the next round when something happens"
        m.fail = False
        m.make_dirty(13)
        await trio.sleep(1)
        assert not m.dirty.over_background()


async def test_the_background_goes_on_while_a_sync_is_stuck(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as m, trio.open_nursery() as nursery:
        m.make_dirty(1)
        m.seconds = MINUTE_S
        m.while_writing = lambda handle: m.make_dirty(1, 10 * CHUNK_PAGES)
        nursery.start_soon(m.flusher.sync)
        await trio.testing.wait_all_tasks_blocked()
        m.seconds, m.while_writing = 0.01, lambda handle: None
        assert m.dirty.over_background(), "with the mapping that the sync is at"
        m.make_dirty(2)
        await trio.sleep(1)
        assert m.order == [1, 2]


async def test_sync_writes_each_mapping_once_however_busy_its_writer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as m:
        for handle in (1, 2, 3):
            m.make_dirty(handle)
        m.while_writing = lambda handle: m.make_dirty(handle)
        with trio.fail_after(1):
            await m.flusher.sync()
        waited_for = [handle for _, handle, _, integrity in m.log if integrity]
        assert sorted(waited_for) == [1, 2, 3]
        assert m.order[-3:] == waited_for, "after all that nobody waited for"
        assert len(m.log) < 3 + 3 + flusher.MAPPINGS_AT_ONCE
        assert m.flusher.nr_listed == 3


async def test_a_sync_writes_what_it_can_before_it_waits(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Several mappings at once, a slice of each in turn; nothing is left for the second pass."""
    async with running() as m:
        for handle in range(1, 9):
            m.make_dirty(handle, CHUNK_PAGES // 8)
        m.make_dirty(1, CHUNK_PAGES)
        began = trio.current_time()
        await m.flusher.sync()
        assert m.order == [*range(1, 9), 1]
        assert not any(integrity for _, _, _, integrity in m.log)
        assert m.flusher.nr_listed == 0
        assert trio.current_time() - began == pytest.approx(3 * m.seconds)


async def test_what_the_first_pass_of_a_sync_cannot_write(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A mapping that somebody is at is the second's, which waits for him."""
    async with running() as m:
        m.make_dirty(1, 2)
        m.while_writing = lambda handle: m.make_dirty(1, int(len(m.log) == 1))
        m.memory.cleaner()
        await trio.testing.wait_all_tasks_blocked()
        assert m.order == [1]
        await m.flusher.sync()
        assert [(handle, integrity) for _, handle, _, integrity in m.log] == [(1, False), (1, True)]
        assert not m.states["ndirty"].any()


async def test_sync_does_not_miss_what_the_flusher_requeued(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as m:
        m.make_dirty(1, 20 * CHUNK_PAGES)
        m.make_dirty(2)
        await trio.testing.wait_all_tasks_blocked()  # the flusher is in its first chunk
        await m.flusher.sync()
        assert not m.states["ndirty"].any()


async def test_two_syncs_at_once(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as m:
        for handle in range(1, 6):
            m.make_dirty(handle)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(m.flusher.sync)
            nursery.start_soon(m.flusher.sync)
        assert not m.states["ndirty"].any()
        assert m.flusher.nr_listed == 0


async def test_a_dirty_object_is_written_with_its_pages(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as m:
        m.states["flags"][4] |= INODE_DIRTY
        m.flusher.enlist(4)
        m.flusher.settle(4)
        assert m.flusher.nr_listed == 1  # not clean
        await trio.sleep(MINUTE_S)
        assert m.objects == [4]
        assert m.flusher.nr_listed == 0


async def test_waiting_writers_get_through(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as m:
        done: list[int] = []

        async def writer(handle: int) -> None:
            for _ in range(200):
                await m.throttle.balance(handle)
                m.make_dirty(handle, 100)
                assert m.dirty.busy <= m.dirty.limit + 500
            done.append(handle)

        async with trio.open_nursery() as nursery:
            for handle in range(1, 6):
                nursery.start_soon(writer, handle)
        assert sorted(done) == [1, 2, 3, 4, 5]
        assert m.throttle.paused > 0


async def test_a_failing_owner_does_not_stop_the_task(
    autojump_clock: trio.testing.MockClock, allow_logs: Callable[[str], None]
) -> None:
    allow_logs("write-back stopped: .*told to fail")
    async with running() as m:
        m.fail = True
        m.make_dirty(1)
        await trio.sleep(MINUTE_S)
        m.fail = False
        await trio.sleep(MINUTE_S)
        assert m.order == [1]


async def test_list_survives_leaving_in_any_order(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as m:
        for handle in range(1, 6):
            m.make_dirty(handle)
        for handle in (3, 1, 5, 2, 4):
            m.states["ndirty"][handle] = 0
            counts.throw_away(m.dirty, 1)
            m.flusher.settle(handle)
        assert m.flusher.nr_listed == 0
        m.make_dirty(2)
        await m.flusher.sync()
        assert m.order == [2]


# -- lazytime ------------------------------------------------------------------------------------


def stamp(m: FakeMappings, handle: int) -> None:
    """The time stamps of an object changed."""
    m.states["flags"][handle] |= INODE_DIRTY
    m.flusher.enlist(handle)


async def test_stamps_alone_wait_half_a_day(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as m:
        m.flusher.lazytime = True
        stamp(m, 4)
        await trio.sleep(MINUTE_S)
        assert m.states["flags"][4] == INODE_DIRTY | LISTED_TIME
        assert m.flusher.lists.length[DIRTY_TIME] == m.flusher.nr_listed == 1
        await trio.sleep(STAMPS_EXPIRE_S - MINUTE_S)
        assert not m.objects
        await trio.sleep(MINUTE_S)
        assert m.objects == [4]
        assert m.flusher.nr_listed == m.states["stamped_when"][4] == 0


async def test_stamps_of_a_file_that_is_written_all_day(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Its pages are written after 30 s each time, its stamps twice a day."""
    async with running() as m:
        m.flusher.lazytime = True
        minutes = int(STAMPS_EXPIRE_S / MINUTE_S) * 2
        for minute in range(minutes):
            stamp(m, 4)
            m.make_dirty(4)
            await trio.sleep(MINUTE_S)
            assert len(m.order) == minute + 1
        assert len(m.objects) in (1, 2)


@pytest.mark.parametrize("how", ["sync", "unused", "unused before it waits"])
async def test_stamps_wait_no_longer(how: str, autojump_clock: trio.testing.MockClock) -> None:
    async with running() as m:
        m.flusher.lazytime = True
        stamp(m, 4)
        if how != "unused before it waits":
            await trio.sleep(MINUTE_S)
            assert m.flusher.lists.length[DIRTY_TIME] == 1
        if how == "sync":
            await m.flusher.sync()
            assert m.objects == [4]
        else:
            m.flusher.unused(4)
            await trio.sleep(MINUTE_S)
            assert m.objects == [4]
        assert m.flusher.nr_listed == 0


async def test_a_sync_takes_stamps_whose_file_is_written_meanwhile(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """It was listed for its stamps before the sync began, for pages after."""
    async with running() as m, trio.open_nursery() as nursery:
        m.flusher.lazytime = True
        stamp(m, 4)
        await trio.sleep(MINUTE_S)
        m.make_dirty(1)
        nursery.start_soon(m.flusher.sync)
        await trio.testing.wait_all_tasks_blocked()
        m.make_dirty(4)
        await trio.sleep(1)
        assert m.objects == [4]


async def test_stamps_that_something_else_took_along(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running() as m:
        m.flusher.lazytime = True
        stamp(m, 4)
        await trio.sleep(MINUTE_S)
        m.states["flags"][4] &= ~np.uint32(INODE_DIRTY)  # a transaction logged the object
        m.flusher.unused(4)
        assert m.flusher.nr_listed == 0
        await trio.sleep(MINUTE_S)
        assert not m.objects
