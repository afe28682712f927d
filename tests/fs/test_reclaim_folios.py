"""What reclaim does with file folios that are not clean: marks them, wakes the flusher, goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import trio.testing

from alloc import gfp
from alloc.page import ACTIVE, DIRTY, RECLAIM, WRITEBACK
from fs import file
from fs.cache import blocks, gather, radix
from tests import support
from tests.fs.imagefiles import a_file, opened
from tests.fs.test_folio import Cached
from writeback.flusher import ALL_PAGES

KIB = 1 << 10
IMMEDIATE = "nr_vmscan_immediate_reclaim"


async def test_a_dirty_folio_is_marked_and_freed_first_once_it_is_clean(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        flags, lru = vol.arena.pages.flags, vol.arena.lru
        await file.write(vol, ip, 0, bytes(4 * KIB))
        pfn = vol.pages.find(ip.handle, 0)
        woken = []
        vol.flusher.clean_some = lambda: woken.append(True)  # type: ignore[method-assign]
        assert vol.pages.eviction.scan_objects(1, gfp.KERNEL, 0) == 0
        assert flags[pfn] & (DIRTY | WRITEBACK | RECLAIM | ACTIVE) == DIRTY | RECLAIM | ACTIVE
        assert vol.arena.vmstat[IMMEDIATE] > 0
        assert woken
        assert vol.pages.dirty.nr_dirty == 1  # nothing was written
        async with a_file(vol, b"other") as other:
            await file.write(vol, other, 0, bytes(64 * KIB))
            await file.fsync(vol, other)
            await vol.pages.write_range(ip.handle, 0, ALL_PAGES, integrity=True, budget=ALL_PAGES)
            assert not flags[pfn] & (DIRTY | WRITEBACK | RECLAIM | ACTIVE)
            (taken,) = lru.isolate(1)
            assert taken == pfn
            lru.putback(pfn)


@pytest.mark.parametrize("again", [False, True])
def test_what_was_dirtied_again_does_not_go_to_the_tail(again: bool) -> None:
    cache = Cached(12, [0, 0])
    tagged = (cache.m4, cache.m8, cache.flags, cache.orders, cache.indices)
    for block in range(2):
        cache.change(block, block + 1, blocks.RESERVED, 0, 0)
        cache.copy_in(block << 12, bytes(4096))
    folios, runs = np.zeros(16, np.int64), np.zeros((4096, 2), np.int64)
    meta, rotate = np.zeros(8, np.int64), np.zeros(64, np.int64)
    gather.gather(
        *tagged, cache.blocks, cache.refs, cache.counts, cache.root, 12, 0, 1 << 40, radix.DIRTY,
        0, folios, runs, meta,
    )  # fmt: skip
    first, second = cache.pfns
    cache.flags[[first, second]] |= RECLAIM
    if again:
        cache.copy_in(0, bytes(4096))
    n = gather.finish(*tagged, cache.counts, cache.root, folios, int(meta[0]), rotate)
    assert rotate[:n].tolist() == ([second] if again else [first, second])
    assert not (cache.flags[[first, second]] & (RECLAIM | WRITEBACK)).any()


async def test_folios_met_under_write_back_are_told_from_those_met_again(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, bytes(64 * KIB))
        pfns = vol.pages.gang(ip.handle, 0, 16)
        reclaim = vol.arena.reclaim
        vol.arena.pages.flags[pfns] |= WRITEBACK
        met = []
        for _ in range(2):
            reclaim.shrink_all(0, gfp.KERNEL, "kswapd", 1000)
            met.append(reclaim.throttles[0].stat)
        vol.arena.pages.flags[pfns] &= ~np.uint32(WRITEBACK)
        first, second = met
        assert first.taken == first.dirty == first.writeback + first.congested > 0
        assert first.writeback > 0
        assert second.taken == second.dirty == second.congested > 0
        assert reclaim.throttles[0].congested
        await file.fsync(vol, ip)


async def test_written_pages_end_the_wait_of_kswapd(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        throttle = vol.arena.reclaim.throttles[0]
        await file.write(vol, ip, 0, bytes(256 * KIB))
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(throttle.wait, 0)
                await trio.testing.wait_all_tasks_blocked()
                await file.fsync(vol, ip)
                assert vol.arena.vmstat["nr_throttled_written"] >= 64
                scope.cancel()
