"""Stall reports: who waits, for what and why, what they hold, what cannot be freed; how often."""

from __future__ import annotations

import os

import numpy as np
import pytest
import trio
import trio.testing

from alloc.arena import Arena
from alloc.gfp import KERNEL, MEMALLOC, NOWAIT, ZERO
from tests.alloc.caches import FolioCache

REPORT = "possible memory allocation deadlock"


@pytest.fixture
def cache(arena: Arena):
    made = FolioCache(arena)
    made.fill(dirty=True)
    yield made
    made.drop()


async def wants(arena: Arena, order: int, flags: int) -> None:
    arena.put_folio(await arena.alloc_folio(order, flags))


async def test_a_report_shows_the_whole_graph(
    arena: Arena, cache: FolioCache, autojump_clock: object, allow_logs
) -> None:
    allow_logs(REPORT)
    arena.vmstat.add("nr_dirty", len(cache.folios))
    arena.vmstat.add("nr_writeback", 3)
    slab = arena.slab("items", np.dtype([("page", "u8", (512,))]))
    item = slab.try_alloc(NOWAIT | MEMALLOC)
    cached = arena.slab("cached", np.dtype([("page", "u8", (512,))]), reclaimable=True)
    kept = cached.try_alloc(NOWAIT | MEMALLOC)
    pinned = [arena.try_alloc_folio(2, NOWAIT | MEMALLOC) for _ in range(2)]
    locks = {"writer": ["iolock 131", "ilock 131"]}
    arena.holders = lambda task: locks.get(task.name, [])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wants, arena, 0, KERNEL | ZERO, name="writer")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(wants, arena, 9, MEMALLOC, name="flusher")
        await trio.sleep(2.5)
        nursery.cancel_scope.cancel()
    (text,) = allow_logs.seen
    head, memory, writer, flusher = text.split(": ", 1)[1].split("\n  ")
    assert head == (
        f"writer({os.getpid()}) {REPORT} size 4096 in tests.alloc.test_stall:wants "
        "(mode:ZERO), 2 waiting"
    )
    assert memory == (
        f"memory: free {arena.free_pages} min {arena.marks.min} of 2048 pages; "
        f"unreclaimable: dirty {len(cache.folios)} writeback 3 slab 1 pinned 8; "
        "slabs: items 1, cached 1; nothing to shed"
    )
    assert writer == (
        "writer order:0 mode:ZERO waits 2.0s in tests.alloc.test_stall:wants: "
        f"free pages at the mark of {arena.marks.min}; holds iolock 131, ilock 131"
    )
    assert flusher == (
        "flusher order:9 mode:MEMALLOC waits 2.0s in tests.alloc.test_stall:wants: "
        "free pages at the mark of 0; holds nothing"
    )
    arena.vmstat.add("nr_dirty", -len(cache.folios))
    slab.free(item or 0)
    cached.free(kept or 0)
    for pfn in pinned:
        arena.put_folio(pfn or 0)


@pytest.mark.compiled
async def test_reports_come_at_doubling_intervals(
    arena: Arena, cache: FolioCache, autojump_clock: object, allow_logs
) -> None:
    allow_logs(REPORT)
    arena.stall_seconds = 0.5
    times: list[float] = []
    report = arena.stalls.report

    def noted() -> None:
        times.append(round(trio.current_time(), 1))
        report()

    arena.stalls.report = noted  # type: ignore[method-assign]
    with trio.move_on_after(9):
        await wants(arena, 0, KERNEL)
    assert times == [0.5, 1.0, 2.0, 4.0, 8.0]
    assert arena.vmstat["alloc_stall_reports"] == len(allow_logs.seen) == 5


@pytest.mark.compiled
async def test_many_waiters_share_a_report(
    arena: Arena, cache: FolioCache, autojump_clock: object, allow_logs
) -> None:
    allow_logs(REPORT)
    with trio.move_on_after(3):
        async with trio.open_nursery() as nursery:
            for k in range(10):
                nursery.start_soon(wants, arena, k % 4, KERNEL)
    assert len(allow_logs.seen) == 1


async def test_waiters_says_why(arena: Arena, cache: FolioCache, autojump_clock: object) -> None:
    assert arena.waiters() == []
    even = [pfn for pfn in cache.folios if pfn % 2 == 0]
    for pfn in even:
        del cache.folios[pfn]
        arena.put_folio(pfn)
    while (pfn := arena.try_alloc_folio(1, NOWAIT)) is not None:  # now only single pages are free
        cache.insert(pfn, dirty=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wants, arena, 3, KERNEL, name="reader")
        await trio.testing.wait_all_tasks_blocked()
        (line,) = arena.waiters()
        assert line.startswith("reader order:3 mode:KERNEL waits 0.0s in tests.alloc.test_stall")
        assert line.endswith(": no free block is as large; holds nothing")
        nursery.cancel_scope.cancel()
