"""Reclaim throttling: each reason, what ends its wait, and who is spared; by a mock clock."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from alloc.arena import Arena
from alloc.gfp import KERNEL, MEMALLOC, NOFS, NOWAIT
from alloc.kswapd import MAX_FAILURES
from alloc.reclaim import RESERVE_WAIT_S
from alloc.throttle import (
    CONGESTED,
    ISOLATED,
    NAMES,
    NOPROGRESS,
    TICK_S,
    TIMEOUT_S,
    WRITEBACK,
)
from tests.alloc.caches import FolioCache, kswapd


class BusyCache(FolioCache):
    """A cache whose dirty folios are all on their way to the device, as reclaim is told."""

    def __init__(self, arena: Arena, marked: bool) -> None:
        super().__init__(arena)
        self.marked = marked
        arena.vmstat.gauge("nr_writeback", lambda: sum(self.folios.values()))

    def scan_objects(self, nr: int, gfp: int, nid: int) -> int:
        throttle = self.arena.reclaim.throttles[nid]
        freed = 0
        for pfn in self.arena.lru.isolate(nr, nid):
            throttle.stat.taken += 1
            if self.folios[pfn]:
                throttle.met_writeback(1, self.marked)
                self.arena.lru.putback(pfn)
            else:
                del self.folios[pfn]
                self.arena.put_folio(pfn)
                freed += self.arena.lru.release(pfn)
        return freed


async def elapsed(arena: Arena, reason: int) -> float:
    start = trio.current_time()
    await arena.reclaim.throttles[0].wait(reason)
    return trio.current_time() - start


def waits(arena: Arena, reason: int) -> int:
    return arena.vmstat[f"vmscan_throttle_{NAMES[reason]}"]


@pytest.fixture
def busy(arena: Arena):
    made = BusyCache(arena, marked=True)
    made.fill(dirty=True)
    yield made
    made.drop()


async def test_golden_times(arena: Arena, busy: BusyCache, autojump_clock: object) -> None:
    golden = {WRITEBACK: 0.1, ISOLATED: 0.02, NOPROGRESS: TICK_S, CONGESTED: TICK_S}
    for reason, seconds in golden.items():
        assert await elapsed(arena, reason) == pytest.approx(seconds)
        assert waits(arena, reason) == 1


@pytest.mark.parametrize("reason", [NOPROGRESS, CONGESTED])
async def test_skipped_unless_most_pages_are_dirty(
    arena: Arena, busy: BusyCache, autojump_clock: object, reason: int
) -> None:
    for pfn in list(busy.folios)[: len(busy.folios) // 2 + 1]:
        busy.folios[pfn] = False
    assert await elapsed(arena, reason) == 0
    assert waits(arena, reason) == 0


async def test_a_hopeless_node_is_not_waited_for(
    arena: Arena, busy: BusyCache, autojump_clock: object
) -> None:
    arena.reclaim.kswapds[0].failures = MAX_FAILURES
    assert await elapsed(arena, NOPROGRESS) == 0
    assert await elapsed(arena, ISOLATED) > 0


async def test_kswapd_waits_for_what_it_has_marked(arena: Arena, autojump_clock: object) -> None:
    """The first pass finds everything under write-back, the second the same again."""
    cache = BusyCache(arena, marked=True)
    async with kswapd(arena):
        cache.fill(dirty=True)
        arena.reclaim.wake_kswapd()
        await trio.testing.wait_all_tasks_blocked()
        throttle = arena.reclaim.throttles[0]
        assert throttle.writeback
        assert throttle.congested
        assert throttle.waiting[WRITEBACK] == 1
        assert arena.vmstat["pageoutrun"] == 1
        throttle.written(32)
        await trio.testing.wait_all_tasks_blocked()
        assert waits(arena, WRITEBACK) == 1
        throttle.written(1)  # more than 32 for the one who waits
        assert arena.vmstat["nr_throttled_written"] == 33
        await trio.testing.wait_all_tasks_blocked()
        assert throttle.waiting[WRITEBACK] == 0 or waits(arena, WRITEBACK) == 2
        assert trio.current_time() == 0
        for pfn in cache.folios:
            cache.folios[pfn] = False
        await trio.sleep(1)
        assert not throttle.writeback
        assert not throttle.congested
    cache.drop()


async def test_what_is_met_for_the_first_time_is_not_waited_for(
    arena: Arena, autojump_clock: object
) -> None:
    cache = BusyCache(arena, marked=False)
    async with kswapd(arena):
        cache.fill(dirty=True)
        arena.reclaim.wake_kswapd()
        await trio.sleep(1)
        assert arena.reclaim.throttles[0].writeback
        assert not arena.reclaim.throttles[0].congested
        assert waits(arena, WRITEBACK) == 0
    cache.drop()


async def test_no_progress_at_priority_1_costs_a_tick(
    arena: Arena, busy: BusyCache, autojump_clock: object
) -> None:
    await arena.reclaim.direct(KERNEL, 0, lambda: False)
    assert waits(arena, NOPROGRESS) == 1
    assert trio.current_time() == pytest.approx(TICK_S)


async def test_progress_of_another_ends_it(
    arena: Arena, busy: BusyCache, autojump_clock: object
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.reclaim.direct, KERNEL, 0, lambda: False)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.reclaim.throttles[0].waiting[NOPROGRESS] == 1
        for pfn in list(busy.folios)[:100]:
            busy.folios[pfn] = False
            arena.lru.rotate(pfn)
        await arena.reclaim.direct(KERNEL, 0, lambda: arena.free_pages > arena.marks.min + 50)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.reclaim.throttles[0].waiting[NOPROGRESS] == 0
        assert trio.current_time() == 0


async def test_a_congested_node_costs_each_pass_a_tick(
    arena: Arena, busy: BusyCache, autojump_clock: object
) -> None:
    arena.reclaim.shrink_all(0, KERNEL, "kswapd", 1)
    assert arena.reclaim.throttles[0].congested
    await arena.reclaim.direct(KERNEL, 0, lambda: False)
    assert waits(arena, CONGESTED) > 3
    assert trio.current_time() == pytest.approx(
        TICK_S * (waits(arena, CONGESTED) + waits(arena, NOPROGRESS))
    )


async def test_too_many_isolated_pages(arena: Arena, autojump_clock: object) -> None:
    """A transaction may isolate eight times as much as others may."""
    cache = FolioCache(arena)
    cache.fill(dirty=True)
    held = arena.lru.isolate(arena.lru.nr_inactive // 4)
    assert arena.vmstat["nr_isolated_file"] == len(held)
    await arena.reclaim.direct(NOFS, 0, lambda: False)
    assert waits(arena, ISOLATED) == 0
    await arena.reclaim.direct(KERNEL, 0, lambda: False)
    assert waits(arena, ISOLATED) == 1
    assert trio.current_time() == pytest.approx(TIMEOUT_S[ISOLATED])
    for pfn in held:
        arena.lru.putback(pfn)
    assert arena.vmstat["nr_isolated_file"] == 0
    cache.drop()


def use_up(arena: Arena, cache: FolioCache) -> None:
    """Less than half of `min` is left, and nothing can be reclaimed."""
    while arena.free_pages > arena.marks.min // 2:
        cache.insert(arena.try_alloc_folio(0, NOWAIT | MEMALLOC) or 0, dirty=True)


@pytest.mark.parametrize("flags", [KERNEL, NOFS])
async def test_direct_reclaim_spares_the_reserve(
    arena: Arena, autojump_clock: object, flags: int
) -> None:
    cache = FolioCache(arena)
    cache.fill(dirty=True)
    async with kswapd(arena):
        use_up(arena, cache)
        start = trio.current_time()
        await arena.reclaim.direct(flags, 0, lambda: False)
        waited = trio.current_time() - start
        assert arena.vmstat["pgscan_direct_throttle"] == 1
        if flags & NOFS:
            assert waited == pytest.approx(RESERVE_WAIT_S)
        else:
            assert waited > RESERVE_WAIT_S
            assert arena.reclaim.kswapds[0].hopeless
    cache.drop()


async def test_the_reserve_is_waited_for_until_kswapd_has_refilled_it(
    arena: Arena, autojump_clock: object
) -> None:
    cache = FolioCache(arena)
    cache.fill(dirty=True)
    async with kswapd(arena), trio.open_nursery() as nursery:
        use_up(arena, cache)
        nursery.start_soon(arena.reclaim.direct, KERNEL, 0, lambda: False)
        await trio.sleep(0.01)
        scanned = arena.vmstat["pgscan_direct"]
        assert scanned == 0
        cache.clean(10)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.vmstat["pgscan_direct"] > 0
        assert trio.current_time() < 0.02
    cache.drop()


async def test_without_kswapd_nobody_refills_the_reserve(
    arena: Arena, autojump_clock: object
) -> None:
    cache = FolioCache(arena)
    cache.fill(dirty=True)
    use_up(arena, cache)
    await arena.reclaim.direct(KERNEL, 0, lambda: False)
    assert trio.current_time() == 0
    assert arena.vmstat["pgscan_direct_throttle"] == 0
    cache.drop()


async def test_a_throttled_reclaimer_can_be_cancelled(
    arena: Arena, busy: BusyCache, autojump_clock: object
) -> None:
    with trio.move_on_after(0.01) as scope:
        await arena.reclaim.throttles[0].wait(WRITEBACK)
    assert scope.cancelled_caught
    assert arena.reclaim.throttles[0].waiting[WRITEBACK] == 0
