"""Mempools: what an element costs whom, the line, and cleaners that get on without any memory."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import trio
import trio.testing

from alloc import gfp
from alloc.arena import Arena
from alloc.gfp import KERNEL, MEMALLOC, NORETRY, NOWAIT, ZERO
from alloc.mempool import TIMER_S, Folios, Mempool
from tests.alloc.caches import FolioCache

MIN_NR = 3


@pytest.fixture
def cache(arena: Arena):
    made = FolioCache(arena)
    yield made
    made.drop()


async def pool_of(arena: Arena, order: int = 0, min_nr: int = MIN_NR) -> Mempool:
    pool = Mempool(arena, "test", Folios(arena, order), min_nr)
    await pool.fill()
    return pool


async def test_elements_are_new_while_there_is_memory(arena: Arena) -> None:
    pool = await pool_of(arena)
    before = arena.free_pages
    taken = [await pool.alloc() for _ in range(10)]
    assert (pool.in_use, pool.aside, before - arena.free_pages) == (10, MIN_NR, 10)
    for element in taken:
        pool.free(element)
    assert (pool.in_use, pool.aside, arena.free_pages, pool.waits) == (0, MIN_NR, before, 0)


async def test_below_min_there_are_as_many_as_were_set_aside(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    """Also for who may take the whole reserve: it is not touched for an element."""
    pool = await pool_of(arena)
    cache.fill(dirty=True)
    free = arena.free_pages
    with gfp.memalloc():
        taken = [await pool.alloc() for _ in range(MIN_NR)]
        assert (pool.in_use, pool.aside, arena.free_pages) == (MIN_NR, 0, free)
        with trio.move_on_after(1):
            await pool.alloc()
    assert (pool.in_use, pool.waits, arena.vmstat["mempool_waits"]) == (MIN_NR, 1, 1)
    for element in taken:
        pool.free(element)
    assert (pool.in_use, pool.aside, arena.free_pages) == (0, MIN_NR, free)


async def test_who_may_reclaim_does_before_waiting(arena: Arena, cache: FolioCache) -> None:
    pool = await pool_of(arena)
    cache.fill(dirty=False)
    with gfp.nofs():
        taken = [await pool.alloc() for _ in range(2 * MIN_NR)]
    assert pool.aside == 0
    assert pool.waits == 0
    assert cache.scans
    scans = len(cache.scans)
    cache.fill(dirty=False)
    with gfp.memalloc(), trio.move_on_after(0):
        taken.append(await pool.alloc())
    assert len(cache.scans) == scans, "reclaim waits for this task"
    for element in taken:
        pool.free(element)


async def test_the_line_is_served_in_order(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    """Who leaves the line, even with an element in hand, takes nothing from the others."""
    pool = await pool_of(arena)
    cache.fill(dirty=True)
    taken = [await pool.alloc() for _ in range(MIN_NR)]
    served: list[int] = []
    scopes = [trio.CancelScope() for _ in range(5)]

    async def one(number: int) -> None:
        with scopes[number]:
            taken.append(await pool.alloc())
            served.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(one, number, name=f"task {number}")
            await trio.testing.wait_all_tasks_blocked()
        assert arena.waiters() == [
            f"task {number} mempool:test mode:KERNEL waits 0.0s in tests.alloc.test_mempool:"
            "test_the_line_is_served_in_order.<locals>.one: all 3 elements are in use; "
            "holds nothing"
            for number in range(5)
        ]
        scopes[1].cancel()
        await trio.testing.wait_all_tasks_blocked()
        scopes[0].cancel()
        pool.free(taken.pop(0))
        await trio.testing.wait_all_tasks_blocked()
        for number in (2, 3, 4):
            assert served[-1] == number
            pool.free(taken.pop(0))
            await trio.testing.wait_all_tasks_blocked()
    assert served == [2, 3, 4]
    assert arena.waiters() == []
    while taken:
        pool.free(taken.pop())
    assert (pool.in_use, pool.aside) == (0, MIN_NR)


async def test_nothing_comes_back_for_long(
    arena: Arena, cache: FolioCache, autojump_clock: object, allow_logs
) -> None:
    """It says so, and finds memory that has become free meanwhile."""
    allow_logs("for an element of mempool test")
    pool = await pool_of(arena)
    cache.fill(dirty=True)
    taken = [await pool.alloc() for _ in range(MIN_NR)]

    async def frees_late() -> None:
        await trio.sleep(TIMER_S + 1)
        cache.drop()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(frees_late)
        taken.append(await pool.alloc())
    assert trio.current_time() == 2 * TIMER_S
    (text,) = allow_logs.seen
    assert "waits 5 s for an element of mempool test in tests.alloc.test_mempool" in text
    for element in taken:
        pool.free(element)


async def test_elements_of_a_slab(arena: Arena, cache: FolioCache) -> None:
    slab = arena.slab("items", np.dtype([("word", "u8", (8,))]))
    pool = Mempool(arena, "items", slab, MIN_NR)
    await pool.fill()
    assert slab.nr_objects == MIN_NR
    cache.fill(dirty=True)
    with gfp.memalloc():
        taken = [await pool.alloc() for _ in range(MIN_NR)]
    for element in taken:
        pool.free(element)
    assert slab.nr_objects == MIN_NR


async def test_what_a_mempool_does_not_do(arena: Arena) -> None:
    pool = await pool_of(arena)
    for flag in (ZERO, NORETRY, NOWAIT):
        with pytest.raises(AssertionError):
            await pool.alloc(flag)
    with pytest.raises(AssertionError):
        pool.free(1)


@pytest.mark.parametrize("min_nr", [1, 2, 8])
async def test_a_cleaner_gets_on_with_the_arena_exhausted(
    arena: Arena, min_nr: int, autojump_clock: object
) -> None:
    """Not a page is free; each element in use is given back when its write ends."""
    pool = await pool_of(arena, 1, min_nr)
    held = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT | MEMALLOC)) is not None:
        held.append(pfn)
    random = Random(min_nr)
    most = done = 0

    async def write() -> None:
        nonlocal most, done
        with gfp.memalloc():
            for _ in range(5):
                element = await pool.alloc(KERNEL)
                most = max(most, pool.in_use)
                await trio.sleep(random.random())
                pool.free(element)
                done += 1

    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                nursery.start_soon(write)
    assert (most, done) == (min_nr, 100)
    for pfn in held:
        arena.put_folio(pfn)
