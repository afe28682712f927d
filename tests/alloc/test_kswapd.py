"""kswapd's naps and sleeps, what the hit-quickly counters mean, and when it gives up hope."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from alloc.arena import Arena
from alloc.gfp import MEMALLOC, NOWAIT
from alloc.kswapd import MAX_FAILURES, NAP_S
from tests.alloc.caches import FolioCache, kswapd

LOW_HIT, HIGH_HIT = "kswapd_low_wmark_hit_quickly", "kswapd_high_wmark_hit_quickly"


@pytest.fixture
def cache(arena: Arena):
    made = FolioCache(arena)
    yield made
    made.drop()


def take_below(arena: Arena, cache: FolioCache, mark: int, dirty: bool = False) -> None:
    """Allocate until less than `mark` is free."""
    while arena.free_pages >= mark:
        cache.insert(arena.try_alloc_folio(0, NOWAIT | MEMALLOC) or 0, dirty)


def hits(arena: Arena) -> tuple[int, int, int]:
    return arena.vmstat["pageoutrun"], arena.vmstat[LOW_HIT], arena.vmstat[HIGH_HIT]


async def test_a_wake_up_during_the_nap_is_a_quick_hit_of_low(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    async with kswapd(arena):
        take_below(arena, cache, arena.marks.low)
        await trio.sleep(NAP_S / 2)
        assert hits(arena) == (1, 0, 0)
        take_below(arena, cache, arena.marks.low)
        await trio.sleep(NAP_S / 4)
        assert hits(arena) == (2, 1, 0)


async def test_missing_high_after_the_nap_is_a_quick_hit_of_high(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    async with kswapd(arena):
        take_below(arena, cache, arena.marks.low)
        await trio.sleep(NAP_S / 2)
        take_below(arena, cache, arena.marks.high)  # nobody is woken for that
        assert arena.free_pages >= arena.marks.low
        await trio.sleep(NAP_S)
        assert hits(arena) == (2, 0, 1)
        assert arena.free_pages >= arena.marks.high


async def test_it_sleeps_when_nothing_happened_during_the_nap(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    async with kswapd(arena):
        take_below(arena, cache, arena.marks.low)
        await trio.sleep(2 * NAP_S)
        take_below(arena, cache, arena.marks.high)
        await trio.sleep(10 * NAP_S)
        assert hits(arena) == (1, 0, 0)
        take_below(arena, cache, arena.marks.low)
        await trio.sleep(NAP_S / 2)
        assert hits(arena) == (2, 0, 0)


async def without_hope(arena: Arena, cache: FolioCache) -> None:
    """Everything is dirty, and kswapd has seen it often enough."""
    take_below(arena, cache, arena.marks.low, dirty=True)
    await trio.sleep((MAX_FAILURES + 2) * NAP_S)
    assert arena.reclaim.kswapds[0].hopeless


async def test_it_stays_down_after_sixteen_failures(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    async with kswapd(arena):
        take_below(arena, cache, arena.marks.low, dirty=True)
        await trio.sleep((MAX_FAILURES - 2) * NAP_S)
        assert not arena.reclaim.kswapds[0].hopeless
        await trio.sleep(4 * NAP_S)
        assert hits(arena)[0] == MAX_FAILURES
        for _ in range(20):
            arena.reclaim.wake_kswapd()
            await trio.sleep(NAP_S)
        assert hits(arena) == (MAX_FAILURES, 0, MAX_FAILURES - 1)


async def test_progress_of_a_direct_reclaimer_gives_it_hope(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    async with kswapd(arena):
        await without_hope(arena, cache)
        cache.folios[max(cache.folios)] = False
        assert arena.reclaim.shrink_all(0, 0, "direct", 1) == 1
        for pfn in cache.folios:
            cache.folios[pfn] = False
        assert arena.free_pages < arena.marks.high
        arena.reclaim.wake_kswapd()
        await trio.sleep(NAP_S)
        assert arena.free_pages >= arena.marks.high


async def test_the_end_of_an_io_gives_it_hope(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    async with kswapd(arena):
        await without_hope(arena, cache)
        cache.clean(200)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.free_pages >= arena.marks.high


async def test_a_request_that_may_not_reclaim_wakes_it_all_the_same(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    """What became reclaimable without an I/O would otherwise be found by nobody."""
    async with kswapd(arena):
        await without_hope(arena, cache)
        take_below(arena, cache, 1, dirty=True)
        for pfn in cache.folios:
            cache.folios[pfn] = False
        with trio.fail_after(1):
            cache.insert(await arena.alloc_folio(0, MEMALLOC), dirty=False)
