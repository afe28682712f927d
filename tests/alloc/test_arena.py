"""The arena's calls: what is refused, the fast path, waiting in order, and waking."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import trio
import trio.testing

from alloc import buddy, gfp
from alloc.arena import Arena
from alloc.gfp import KERNEL, MEMALLOC, NOFS, NOWAIT, RETRY_MAYFAIL, ZERO
from alloc.wait import POLL_S
from tests.alloc.caches import FolioCache

RECORD = np.dtype([("key", "u8"), ("rest", "u1", (4088,))])


class Hog:
    """Holds folios that nobody can reclaim."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.held: list[int] = []

    def fill(self, flags: int = NOWAIT, leave: int = 0) -> None:
        while (pfn := self.arena.try_alloc_folio(0, flags)) is not None:
            self.held.append(pfn)
        self.free(leave)

    def free(self, count: int) -> None:
        for _ in range(count):
            self.arena.put_folio(self.held.pop())


@pytest.fixture
def hog(arena: Arena) -> Hog:
    return Hog(arena)


def waiter(arena: Arena, order: int, flags: int, done: list[object], name: object) -> Callable:
    async def task() -> None:
        pfn = await arena.alloc_folio(order, flags)
        assert arena.pages.refs[pfn] == 1
        done.append(name)
        arena.put_folio(pfn)

    return task


@pytest.mark.parametrize("size", [0, (8 << 20) - 4096, (8 << 20) + 1])
def test_sizes_that_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="memory of"):
        Arena(size)


async def test_orders_that_are_refused(arena: Arena) -> None:
    for order in (-1, 11):
        with pytest.raises(ValueError, match="orders are 0 to 10"):
            await arena.alloc_folio(order)
        with pytest.raises(ValueError, match="orders are 0 to 10"):
            arena.try_alloc_folio(order, NOWAIT)


async def test_the_two_spellings_are_kept_apart(arena: Arena) -> None:
    with pytest.raises(AssertionError, match="spelled try_alloc_folio"):
        await arena.alloc_folio(0, RETRY_MAYFAIL)
    with pytest.raises(AssertionError, match="how hard to try"):
        arena.try_alloc_folio(0, KERNEL)


async def test_the_fast_path_does_not_yield(arena: Arena) -> None:
    slab = arena.slab("records", RECORD)
    with trio.testing.assert_no_checkpoints():
        pfn = await arena.alloc_folio(2)
        i = await slab.alloc()
    arena.put_folio(pfn)
    slab.free(i)


async def test_zero_clears_the_whole_folio(arena: Arena) -> None:
    pfn = await arena.alloc_folio(1)
    arena.mem[pfn * 4096 : (pfn + 2) * 4096] = 7
    arena.put_folio(pfn)
    assert await arena.alloc_folio(1, ZERO) == pfn
    assert not arena.mem[pfn * 4096 : (pfn + 2) * 4096].any()
    arena.put_folio(pfn)


async def test_waiters_are_served_in_order(arena: Arena, hog: Hog, autojump_clock: object) -> None:
    hog.fill()
    done: list[object] = []
    async with trio.open_nursery() as nursery:
        for k in range(5):
            nursery.start_soon(waiter(arena, 0, KERNEL, done, k))
            await trio.testing.wait_all_tasks_blocked()
        assert done == []
        assert len(arena.queue) == 5
        hog.free(1)
        await trio.testing.wait_all_tasks_blocked()
    assert done == [0, 1, 2, 3, 4]
    hog.free(len(hog.held))


async def test_a_newcomer_does_not_overtake(arena: Arena, hog: Hog) -> None:
    hog.fill()
    done: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter(arena, 0, KERNEL, done, "first"))
        await trio.testing.wait_all_tasks_blocked()
        arena.queue.serve = lambda: 0  # the free is noticed late
        hog.free(1)
        assert arena.free_pages == arena.marks.min + 1
        assert arena.try_alloc_folio(0, NOWAIT) is None
        del arena.queue.serve
        arena.kick()
    assert done == ["first"]
    hog.free(len(hog.held))


async def test_a_large_request_does_not_block_small_ones(arena: Arena, hog: Hog) -> None:
    hog.fill()
    for pfn in sorted(hog.held)[1::2]:
        hog.held.remove(pfn)
        arena.put_folio(pfn)
    done: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter(arena, 7, KERNEL, done, "large"))
        await trio.testing.wait_all_tasks_blocked()
        small = await arena.alloc_folio(0)
        assert done == []
        arena.put_folio(small)
        hog.free(len(hog.held))
    assert done == ["large"]


async def test_nofs_waits_may_use_half_of_the_reserve(arena: Arena, hog: Hog) -> None:
    hog.fill()
    got = []
    with gfp.nofs():
        while arena.free_pages > arena.marks.min // 2:
            got.append(await arena.alloc_folio(0))
    done: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter(arena, 0, NOFS, done, "nofs"))
        await trio.testing.wait_all_tasks_blocked()
        assert len(arena.queue) == 1
        arena.put_folio(got.pop())
    assert done == ["nofs"]
    hog.held += got
    hog.free(len(hog.held))


async def test_memalloc_overtakes_and_may_use_everything(arena: Arena, hog: Hog) -> None:
    hog.fill()
    done: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter(arena, 0, KERNEL, done, "ordinary"))
        await trio.testing.wait_all_tasks_blocked()
        with gfp.memalloc(), trio.testing.assert_no_checkpoints():
            while arena.free_pages:
                hog.held.append(await arena.alloc_folio(0))
        nursery.start_soon(waiter(arena, 0, MEMALLOC, done, "memalloc"))
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        hog.free(1)
        await trio.testing.wait_all_tasks_blocked()
        assert done == ["memalloc"]
        hog.free(len(hog.held))
    assert done == ["memalloc", "ordinary"]


async def test_a_freed_object_serves_a_slab_waiter(
    arena: Arena, hog: Hog, autojump_clock: object
) -> None:
    slab = arena.slab("half", np.dtype([("key", "u8", (256,))]))
    first, second = await slab.alloc(), await slab.alloc()
    hog.fill()
    got: list[int] = []

    async def task() -> None:
        got.append(await slab.alloc())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(task)
        await trio.testing.wait_all_tasks_blocked()
        slab.free(first)
    assert got == [first]
    assert trio.current_time() == 0
    slab.free(first)
    slab.free(second)
    hog.free(len(hog.held))


async def test_a_cancelled_wait_gives_its_ticket_back(arena: Arena, hog: Hog) -> None:
    hog.fill()
    done: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter(arena, 0, KERNEL, done, "cancelled"))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert len(arena.queue) == 0
    free = arena.free_pages
    assert done == []
    hog.free(1)
    assert arena.free_pages == free + 1
    hog.held.append(await arena.alloc_folio(0))
    hog.free(len(hog.held))


async def test_a_free_on_another_thread_wakes(
    arena: Arena, hog: Hog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the posted wake-up that serves, not the oldest ticket's own look or the report's."""
    monkeypatch.setattr("alloc.wait.POLL_S", 1e6)
    arena.stall_seconds = 1e6
    hog.fill()
    done: list[object] = []
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter(arena, 0, KERNEL, done, "served"))
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(hog.free, 1)
    assert done == ["served"]
    hog.free(len(hog.held))


async def test_the_oldest_ticket_looks_again_by_itself(
    arena: Arena, hog: Hog, autojump_clock: object
) -> None:
    """A thread that frees inside a kernel can post nothing."""
    hog.fill()
    done: list[object] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiter(arena, 0, KERNEL, done, "served"))
        await trio.testing.wait_all_tasks_blocked()
        assert buddy.put_page(*arena.buddy, hog.held.pop()) == buddy.FREED_AND_WAITERS
    assert done == ["served"]
    assert 0 < trio.current_time() <= POLL_S
    hog.free(len(hog.held))


async def test_what_was_granted_is_given_back_when_the_task_dies(arena: Arena, hog: Hog) -> None:
    """A shrinker that frees a page (and so serves the ticket) and then raises."""

    class Broken:
        name = "broken"

        def count_objects(self) -> int:
            return 1

        def scan_objects(self, nr: int, flags: int) -> int:
            hog.free(1)
            raise RuntimeError("broken shrinker")

    hog.fill()
    shrinker = Broken()
    arena.register_shrinker(shrinker)
    with pytest.raises(RuntimeError, match="broken shrinker"):
        await arena.alloc_folio(0)
    arena.unregister_shrinker(shrinker)
    assert arena.free_pages == arena.marks.min + 1
    assert len(arena.queue) == 0
    hog.free(len(hog.held))


async def test_no_wake_up_is_lost(arena: Arena, hog: Hog, autojump_clock: object) -> None:
    """With a clock that only moves when everybody sleeps, a lost wake-up would move it."""
    hog.fill()
    done: list[object] = []
    async with trio.open_nursery() as nursery:
        for k in range(40):
            nursery.start_soon(waiter(arena, k % 2, KERNEL, done, k))
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        hog.free(2)
        for _ in range(200):
            await trio.lowlevel.checkpoint()
        assert len(done) >= 20
        hog.free(len(hog.held))
    assert sorted(done) == list(range(40))
    assert trio.current_time() == 0


async def test_a_stall_is_reported_once_with_names(
    arena: Arena, hog: Hog, autojump_clock: object, allow_logs, caplog
) -> None:
    allow_logs("possible memory allocation deadlock")
    hog.fill()
    done: list[object] = []
    with caplog.at_level(logging.WARNING):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiter(arena, 0, NOFS | ZERO, done, "a"), name="writer")
            nursery.start_soon(waiter(arena, 3, KERNEL, done, "b"), name="reader")
            with gfp.nofs():
                while arena.free_pages > arena.marks.min // 2:
                    hog.held.append(await arena.alloc_folio(0))
            await trio.sleep(3)
            hog.free(len(hog.held))
    (line,) = [record.getMessage() for record in caplog.records]
    assert "possible memory allocation deadlock" in line
    assert "reader order:3 mode:KERNEL" in line
    assert arena.vmstat["alloc_stall_reports"] == 1


async def test_close_releases_the_memory_under_views(arena: Arena) -> None:
    other = Arena(8 << 20)
    view = other.mem[: other.memory_bytes]
    view[:] = 1
    other.close()
    other.close()
    assert not view.any()


def test_reports(arena: Arena) -> None:
    cache = FolioCache(arena)
    cache.insert(arena.try_alloc_folio(3, NOWAIT) or 0, dirty=False)
    slab = arena.slab("records", RECORD)
    i = slab.try_alloc(NOWAIT)
    arena.drain_all()
    info = arena.meminfo()
    assert info["MemTotal"] == 8192
    assert info["MemFree"] == 8192 - 4 - 32 - 4
    assert info["Cached"] == info["Inactive(file)"] == 32
    assert info["Slab"] == 4
    blocks = [int(count) for count in arena.buddyinfo().split()[4:]]
    assert sum(count << order for order, count in enumerate(blocks)) == arena.free_pages
    assert arena.vmstat["pgalloc_normal"] == 9
    arena.vmstat.add("nr_dirty", 2)
    assert arena.meminfo()["Dirty"] == 8
    assert arena.vmstat["nr_free_pages"] == arena.free_pages
    assert set(arena.vmstat) >= {"pgfree", "nr_dirty", "allocstall_normal"}
    assert i is not None
    slab.free(i)
    cache.drop()
