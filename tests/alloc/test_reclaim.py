"""Reclaim: it converges, respects scopes, calls the cleaners, and kswapd works low to high."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from alloc import gfp
from alloc.arena import Arena
from alloc.gfp import KERNEL, NOFS, NORETRY, NOWAIT, RETRY_MAYFAIL
from tests.alloc.caches import FolioCache


@pytest.fixture
def cache(arena: Arena):
    made = FolioCache(arena)
    yield made
    made.drop()


async def test_a_waiting_request_reclaims_clean_memory_itself(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    cache.fill()
    for _ in range(100):
        cache.insert(await arena.alloc_folio(0), dirty=False)
    assert trio.current_time() == 0
    assert arena.vmstat["allocstall_normal"] > 0
    assert arena.vmstat["pgsteal_direct"] > 0
    assert arena.vmstat["pgscan_direct"] > 0


async def test_the_last_clean_folio_is_found(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    cache.fill(dirty=True)
    (youngest,) = [pfn for pfn in cache.folios if pfn == max(cache.folios)]
    cache.folios[youngest] = False
    cache.insert(await arena.alloc_folio(0), dirty=True)
    assert trio.current_time() == 0


async def test_cleaners_are_called_and_their_end_wakes_the_waiter(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    cache.fill(dirty=True)
    wanted = trio.Event()
    arena.register_cleaner(wanted.set)

    async def flusher() -> None:
        await wanted.wait()
        cache.clean(40)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(flusher)
        cache.insert(await arena.alloc_folio(0), dirty=True)
    assert trio.current_time() == 0
    assert arena.vmstat["cleaner_wakeups"] > 0


async def test_a_nofs_request_leaves_the_filesystem_alone(
    arena: Arena, autojump_clock: object
) -> None:
    inner = FolioCache(arena, needs_fs=True)
    inner.fill()
    with gfp.nofs():
        assert arena.try_alloc_folio(0, RETRY_MAYFAIL) is None
    assert inner.scans == []
    got = []

    async def transaction() -> None:
        with gfp.nofs():
            while arena.free_pages > arena.marks.min // 2:
                got.append(await arena.alloc_folio(0))
            got.append(await arena.alloc_folio(0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(transaction)
        await trio.testing.wait_all_tasks_blocked()
        assert len(arena.queue) == 1
        assert inner.scans == []
        nursery.start_soon(arena.kswapd)
        with trio.fail_after(5):
            while arena.queue:
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert inner.scans
    for pfn in got:
        arena.put_folio(pfn)
    inner.drop()


def test_an_arena_outlives_a_loop(arena: Arena, cache: FolioCache) -> None:
    """Clocks of different loops have nothing in common; a vain look in one means nothing later."""
    cache.fill(dirty=True)

    async def in_vain() -> None:
        await trio.sleep(1000)
        with trio.move_on_after(1):
            await arena.alloc_folio(0)

    async def served() -> int:
        return await arena.alloc_folio(0)

    trio.run(in_vain, clock=trio.testing.MockClock(autojump_threshold=0))
    for pfn in cache.folios:
        cache.folios[pfn] = False
    arena.put_folio(trio.run(served, clock=trio.testing.MockClock(autojump_threshold=0)))


async def test_kswapd_wakes_below_low_and_stops_at_high(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        await trio.testing.wait_all_tasks_blocked()
        while arena.free_pages > arena.marks.low:
            cache.insert(await arena.alloc_folio(0), dirty=False)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.vmstat["pageoutrun"] == 0
        cache.insert(await arena.alloc_folio(0), dirty=False)
        assert arena.free_pages < arena.marks.low
        await trio.testing.wait_all_tasks_blocked()
        assert arena.marks.high <= arena.free_pages <= arena.marks.high + 128
        assert arena.vmstat["pageoutrun"] == 1
        assert arena.vmstat["pgsteal_kswapd"] > 0
        assert arena.vmstat["pgscan_kswapd"] > 0
        nursery.cancel_scope.cancel()
    assert arena.vmstat["allocstall_normal"] == 0


async def test_kswapd_rests_when_everything_is_dirty(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    """Requests below low keep waking it; what it costs must not keep the cleaner from running."""
    cache.fill(dirty=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        for _ in range(50):
            arena.reclaim.wake_kswapd()
            await trio.testing.wait_all_tasks_blocked()
        assert arena.vmstat["pageoutrun"] <= 2
        cache.clean(1000)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.free_pages >= arena.marks.high
        nursery.cancel_scope.cancel()


async def test_kswapd_calls_the_cleaners(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    cache.fill(dirty=True)
    wanted = trio.Event()
    arena.register_cleaner(wanted.set)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        arena.reclaim.wake_kswapd()
        await wanted.wait()
        nursery.cancel_scope.cancel()
    assert trio.current_time() == 0


async def test_many_waiters_share_one_vain_look(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    cache.fill(dirty=True)
    async with trio.open_nursery() as nursery:

        async def one() -> None:
            cache.insert(await arena.alloc_folio(0), dirty=True)

        for _ in range(30):
            nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        assert sum(cache.scans) <= 4 * len(cache.folios)
        cache.clean(200)
    assert trio.current_time() == 0


async def test_a_larger_block_is_freed_on_purpose(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    """Every fourth folio is pinned below the middle; above it a block of 64 can be made."""
    pinned = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT)) is not None:
        if pfn % 4 == 0 and pfn < 1024:
            pinned.append(pfn)
        else:
            cache.insert(pfn, dirty=False)
    got = await arena.alloc_folio(6)
    assert got >= 1024
    assert len(cache.folios) > 1000, "it did not take dropping everything"
    arena.put_folio(got)
    for pfn in pinned:
        arena.put_folio(pfn)


@pytest.mark.parametrize(
    ("flags", "scans"), [(NOWAIT, False), (NORETRY, True), (RETRY_MAYFAIL, True)]
)
def test_how_hard_try_alloc_tries(arena: Arena, cache: FolioCache, flags: int, scans: bool) -> None:
    cache.fill()
    pfn = arena.try_alloc_folio(0, flags)
    assert (pfn is not None) == scans
    assert bool(cache.scans) == scans
    if pfn is not None:
        arena.put_folio(pfn)


def test_mayfail_ends_when_nothing_is_left(arena: Arena, cache: FolioCache) -> None:
    cache.fill(dirty=True)
    assert arena.try_alloc_folio(0, RETRY_MAYFAIL) is None
    assert arena.try_alloc_folio(10, RETRY_MAYFAIL | NOFS) is None
    assert arena.vmstat["try_alloc_failed"] >= 2


async def test_a_shrinker_may_not_reclaim(arena: Arena, cache: FolioCache) -> None:
    """A shrinker that allocates with NORETRY causes no second pass inside the first."""

    class Recursive:
        name = "recursive"
        depth = calls = 0

        def count_objects(self) -> int:
            return 1

        def scan_objects(self, nr: int, flags: int) -> int:
            self.depth += 1
            self.calls += 1
            assert self.depth == 1
            arena.try_alloc_folio(10, NORETRY)
            self.depth -= 1
            return 0

    cache.fill(dirty=True)
    shrinker = Recursive()
    arena.register_shrinker(shrinker)
    assert arena.try_alloc_folio(0, RETRY_MAYFAIL) is None
    assert shrinker.calls > 0
    arena.unregister_shrinker(shrinker)


async def test_more_than_the_memory_passes_through(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    """Writers, a flusher and kswapd, everything dirty at first: every request is served."""
    work = trio.Event()
    served = 0

    def wake() -> None:
        work.set()

    async def flusher() -> None:
        nonlocal work
        while True:
            await work.wait()
            work = trio.Event()
            with gfp.memalloc():
                scratch = await arena.alloc_folio(0)
            await trio.sleep(0.001)
            arena.put_folio(scratch)
            cache.clean(64)

    async def writer(count: int) -> None:
        nonlocal served
        for _ in range(count):
            cache.insert(await arena.alloc_folio(0, KERNEL), dirty=True)
            served += 1

    arena.register_cleaner(wake)
    async with trio.open_nursery() as background:
        background.start_soon(arena.kswapd)
        background.start_soon(flusher)
        async with trio.open_nursery() as writers:
            for _ in range(4):
                writers.start_soon(writer, arena.nr_pages // 3)
        background.cancel_scope.cancel()
    assert served == 4 * (arena.nr_pages // 3)
    assert arena.vmstat["alloc_stall_reports"] == 0
