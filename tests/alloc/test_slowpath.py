"""The slow path's actions: golden traces by flag, order and policy, and what a large request means.

The arena is full of dirty folios unless a test says so, so reclaim finds nothing, and there is no
kswapd: a trace is the same every time.
"""

from __future__ import annotations

import logging
import random

import pytest
import trio

from alloc import gfp, slowpath
from alloc.arena import Arena
from alloc.gfp import (
    ATOMIC,
    KERNEL,
    MEMALLOC,
    MOVABLE,
    NOFAIL,
    NOFS,
    NOIO,
    NORETRY,
    NOWAIT,
    RETRY_MAYFAIL,
    ZERO,
)
from alloc.policy import AllocationFailed, parse
from tests.alloc.caches import FolioCache
from tests.alloc.movable import scatter

START = ["wake_kswapd", "freelist:min"]
RECLAIM = ["direct_reclaim", "freelist:min"]
DRAIN = ["drain", "freelist:min"]
FAIL, SLEEP = ["fail"], ["cleaners", "sleep"]
ROUND = START + RECLAIM + DRAIN
FIRST, LIGHT, FULL = ["compact:async"], ["compact:sync_light"], ["compact:sync_full"]
LARGE = START + FIRST + RECLAIM + DRAIN + LIGHT  # not movable, or above order 3


@pytest.fixture
def cache(arena: Arena):
    made = FolioCache(arena)
    made.fill(dirty=True)
    yield made
    made.drop()


def atomic(actions: list[str]) -> list[str]:
    return [action.replace(":min", ":atomic") for action in actions]


def half(actions: list[str]) -> list[str]:
    return [action.replace(":min", ":half") for action in actions]


def everything(actions: list[str]) -> list[str]:
    return [action.replace(":min", ":all") for action in actions]


def use_up(arena: Arena, cache: FolioCache, least: int) -> None:
    """Leave `least` pages free, below any mark."""
    while arena.free_pages > least:
        cache.insert(arena.try_alloc_folio(0, NOWAIT | MEMALLOC) or 0, dirty=True)


def use_up_blocks(arena: Arena, cache: FolioCache, order: int) -> None:
    """Leave no free block of this order."""
    while (pfn := arena.try_alloc_folio(order, NOWAIT | MOVABLE)) is not None:
        cache.insert(pfn, dirty=True)


async def one(arena: Arena, order: int, flags: int, seconds: float = 0.05) -> list[str]:
    """The trace of one request that is given up after a while."""
    with slowpath.traced() as trace, trio.move_on_after(seconds):
        try:
            pfn = await arena.alloc_folio(order, flags)
        except AllocationFailed as failure:
            assert trace[-1] == "fail"
            assert (failure.what, failure.gfp) == (f"order:{order}", flags)
        else:
            arena.put_folio(pfn)
    return trace


TRY_GOLDEN = {
    ("NOWAIT", 0): START + FAIL,
    ("NOWAIT", 4): START + FAIL,
    ("NORETRY", 0): START + RECLAIM + FAIL,
    ("NORETRY", 3): START + FIRST + RECLAIM + LIGHT + FAIL,
    ("NORETRY|MOVABLE", 3): START + RECLAIM + LIGHT + FAIL,
    ("NORETRY", 4): START + FIRST + FAIL,  # nothing to compact: not worth an eviction
    ("NORETRY|NOFS", 4): START + FIRST + FAIL,
    ("RETRY_MAYFAIL", 0): ROUND + FAIL,
    ("RETRY_MAYFAIL", 9): LARGE + FAIL,
    ("RETRY_MAYFAIL|NOIO", 0): ROUND + FAIL,
    ("ATOMIC", 0): atomic(START),  # served from the reserve
    ("ATOMIC", 7): atomic(START) + FAIL,
    ("RETRY_MAYFAIL|MEMALLOC", 8): everything(START) + FAIL,
}
FLAGS = {
    "NOWAIT": NOWAIT,
    "NORETRY": NORETRY,
    "NORETRY|NOFS": NORETRY | NOFS,
    "NORETRY|MOVABLE": NORETRY | MOVABLE,
    "RETRY_MAYFAIL|MOVABLE": RETRY_MAYFAIL | MOVABLE,
    "RETRY_MAYFAIL": RETRY_MAYFAIL,
    "RETRY_MAYFAIL|NOIO": RETRY_MAYFAIL | NOIO,
    "RETRY_MAYFAIL|MEMALLOC": RETRY_MAYFAIL | MEMALLOC,
    "ATOMIC": ATOMIC,
    "KERNEL": KERNEL,
    "MOVABLE": MOVABLE,
    "KERNEL|ZERO": ZERO,
    "NOFS": NOFS,
    "NOFAIL": NOFAIL,
    "MEMALLOC": MEMALLOC,
}


@pytest.mark.parametrize(("flags", "order"), TRY_GOLDEN)
@pytest.mark.parametrize("policy", ["irix", "linux", "mayfail"])
def test_traces_of_requests_that_may_fail(
    arena: Arena, cache: FolioCache, flags: str, order: int, policy: str
) -> None:
    arena.set_policy(parse(policy))
    with slowpath.traced() as trace:
        pfn = arena.try_alloc_folio(order, FLAGS[flags])
    assert trace == TRY_GOLDEN[flags, order]
    assert (pfn is None) == (trace[-1] == "fail")
    if pfn is not None:
        arena.put_folio(pfn)


MEMALLOC_ROUND = everything(START + DRAIN)
HELPED = ROUND + ["cleaners", "freelist:half"]
LARGE_HELPED = LARGE + ["cleaners", "freelist:half"]
WAIT_GOLDEN = {
    # irix: everything waits; what holds others up goes to half of the reserve
    ("irix", "KERNEL", 0): ROUND + SLEEP,
    ("irix", "KERNEL|ZERO", 3): LARGE + SLEEP,
    ("irix", "MOVABLE", 3): ROUND + LIGHT + SLEEP,
    ("irix", "MOVABLE", 4): LARGE + SLEEP,
    ("irix", "KERNEL", 4): LARGE + SLEEP,
    ("irix", "KERNEL", 10): LARGE + SLEEP,
    ("irix", "NOFS", 0): HELPED,
    ("irix", "NOFAIL", 0): HELPED,
    ("irix", "NOFAIL", 9): [*LARGE_HELPED, "sleep"],
    ("irix", "MEMALLOC", 0): [],  # the fast path
    ("irix", "MEMALLOC", 8): MEMALLOC_ROUND + SLEEP,
    # linux: too small to fail, too large to wait, and NOFAIL alone has a right to the reserve
    ("linux", "KERNEL", 0): ROUND + SLEEP,
    ("linux", "KERNEL", 3): LARGE + SLEEP,
    ("linux", "KERNEL", 4): LARGE + FAIL,
    ("linux", "KERNEL", 9): LARGE + FAIL,
    ("linux", "NOFS", 0): ROUND + SLEEP,
    ("linux", "NOFS", 4): LARGE + FAIL,
    ("linux", "NOFAIL", 0): HELPED,
    ("linux", "NOFAIL", 9): [*LARGE_HELPED, "sleep"],
    ("linux", "MEMALLOC", 8): MEMALLOC_ROUND + FAIL,
    # mayfail: one round, whoever asks
    ("mayfail", "KERNEL", 0): ROUND + FAIL,
    ("mayfail", "NOFS", 0): ROUND + FAIL,
    ("mayfail", "NOFAIL", 0): ROUND + FAIL,
    ("mayfail", "NOFAIL", 9): LARGE + FAIL,
    ("mayfail", "MEMALLOC", 8): MEMALLOC_ROUND + FAIL,
    # inject: what was not picked is as under irix
    ("inject:nth=9", "NOFS", 0): HELPED,
    ("inject:nth=9", "KERNEL", 4): LARGE + SLEEP,
}


@pytest.mark.parametrize(("policy", "flags", "order"), WAIT_GOLDEN)
async def test_traces_of_requests_that_wait(
    arena: Arena,
    cache: FolioCache,
    autojump_clock: object,
    allow_logs,
    policy: str,
    flags: str,
    order: int,
) -> None:
    allow_logs("page allocation failure: order:")
    arena.set_policy(parse(policy))
    assert await one(arena, order, FLAGS[flags]) == WAIT_GOLDEN[policy, flags, order]
    assert len(arena.queue) == 0


async def test_each_wake_up_begins_a_new_round(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    """The oldest ticket looks again every 0.1 s; after the first time it may use the reserve."""
    use_up(arena, cache, arena.marks.min // 2)
    trace = await one(arena, 0, NOFAIL, 0.25)
    assert trace == [*HELPED, "sleep"] + 2 * (half(ROUND) + SLEEP)


COMPACT_GOLDEN = {
    # in pieces, and all that is in use may move: compaction serves it, nothing is evicted
    ("NORETRY|MOVABLE", 4): START + FIRST,
    ("NORETRY|MOVABLE", 2): START + RECLAIM + LIGHT,
    ("NORETRY", 4): START + FIRST + ["freelist:min"] + RECLAIM + FIRST + ["freelist:min"] + FAIL,
    ("NORETRY", 2): START + FIRST + ["freelist:min"] + RECLAIM + LIGHT,
    ("RETRY_MAYFAIL|MOVABLE", 6): START + FIRST,
    ("RETRY_MAYFAIL", 6): START + FIRST + ["freelist:min"] + RECLAIM + DRAIN + LIGHT,
    ("MOVABLE", 6): START + FIRST + ["freelist:min"],
    ("KERNEL", 6): START + FIRST + ["freelist:min"] + RECLAIM + DRAIN + LIGHT + ["freelist:min"],
    ("NOFS", 3): START + FIRST + ["freelist:min"] + RECLAIM + DRAIN + LIGHT + ["freelist:min"],
    ("MEMALLOC", 6): everything(START + DRAIN) + SLEEP,
}


@pytest.mark.parametrize(("flags", "order"), COMPACT_GOLDEN)
async def test_traces_where_memory_is_in_pieces(
    arena: Arena, autojump_clock: object, flags: str, order: int
) -> None:
    """Only pageblocks of the request's type are compacted at first; here all are MOVABLE."""
    cache = scatter(arena, random.Random(order), [0], 0.4, dirty=1)
    use_up_blocks(arena, cache, order)
    evicted = arena.vmstat["pgsteal_direct"]
    if FLAGS[flags] & (NORETRY | RETRY_MAYFAIL):
        with slowpath.traced() as trace:
            got = arena.try_alloc_folio(order, FLAGS[flags])
        if got is not None:
            arena.put_folio(got)
    else:
        trace = await one(arena, order, FLAGS[flags])
    assert trace == COMPACT_GOLDEN[flags, order]
    assert arena.vmstat["pgsteal_direct"] == evicted
    cache.verify()
    cache.drop()


async def test_effort_rises_with_each_round(arena: Arena, autojump_clock: object) -> None:
    cache = scatter(arena, random.Random(9), [0], 0.4, dirty=1)
    use_up_blocks(arena, cache, 6)
    for pfn in list(cache.folios)[::4]:
        cache.pin(pfn)
    round_0 = START + FIRST + ["freelist:min"] + RECLAIM + DRAIN + LIGHT + ["freelist:min"]
    round_1 = START + FIRST + RECLAIM + DRAIN + FULL + ["freelist:min"]
    trace = await one(arena, 6, KERNEL, 0.15)
    assert trace == round_0 + SLEEP + round_1 + SLEEP, "the second asynchronous run is deferred"
    cache.drop()


async def test_nobody_takes_more_than_its_mark(arena: Arena, cache: FolioCache) -> None:
    """NOFAIL stops at half of min, ATOMIC at three quarters of that, MEMALLOC at nothing."""
    half = arena.marks.min // 2
    floors = {NOFAIL: half, ATOMIC: half - half // 4}
    for flags, floor in floors.items():
        taken = []
        while True:
            if flags == ATOMIC:
                pfn = arena.try_alloc_folio(0, flags)
            else:
                pfn = None
                with trio.move_on_after(0):
                    pfn = await arena.alloc_folio(0, flags)
            if pfn is None:
                break
            taken.append(pfn)
        assert arena.free_pages == floor
        for pfn in taken:
            arena.put_folio(pfn)
    use_up(arena, cache, 0)
    assert arena.try_alloc_folio(0, NOWAIT | MEMALLOC) is None


async def test_a_trace_ends_where_reclaim_finds_something(arena: Arena, cache: FolioCache) -> None:
    cache.clean(40)
    assert await one(arena, 0, KERNEL) == START + RECLAIM
    with slowpath.traced() as trace:
        arena.put_folio(await arena.alloc_folio(0))
    assert trace == [], "the fast path has no actions"


async def test_memalloc_never_reclaims(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    cache.clean(1000)
    use_up(arena, cache, 0)
    with gfp.memalloc(), gfp.nofs():
        trace = await one(arena, 0, KERNEL | MEMALLOC | NOFS)
        assert arena.try_alloc_folio(0, RETRY_MAYFAIL) is None
    assert trace == MEMALLOC_ROUND + SLEEP
    assert cache.scans == []


async def test_linux_gives_up_on_memalloc_when_truly_empty(
    arena: Arena, cache: FolioCache, autojump_clock: object, allow_logs
) -> None:
    allow_logs("page allocation failure: order:0, mode:MEMALLOC")
    use_up(arena, cache, 0)
    assert await one(arena, 0, MEMALLOC) == MEMALLOC_ROUND + SLEEP
    arena.set_policy(parse("linux"))
    assert await one(arena, 0, MEMALLOC) == MEMALLOC_ROUND + FAIL
    assert await one(arena, 0, MEMALLOC | NOFAIL) == MEMALLOC_ROUND + SLEEP


async def test_the_longest_wait_is_kept(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    for seconds in (0.5, 1.5, 1.0):
        await one(arena, 0, KERNEL, seconds)
    assert arena.vmstat["alloc_wait_longest_ms"] == 1500


async def test_failures_are_reported_once_in_ten_seconds(
    arena: Arena, cache: FolioCache, autojump_clock: object, allow_logs
) -> None:
    allow_logs("page allocation failure: order:4, mode:NOFS, site:tests.alloc.test_slowpath:one")
    arena.set_policy(parse("linux"))
    for _ in range(21):
        await one(arena, 4, NOFS)
        await trio.sleep(1)
    assert len(allow_logs.seen) == 3
    assert arena.vmstat["alloc_failed"] == 21


async def test_large_requests_are_named_once_for_each_site(arena: Arena, caplog) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            arena.put_folio(await arena.alloc_folio(4))
            arena.put_folio(await arena.alloc_folio(5, NOFS))
            arena.put_folio(await arena.alloc_folio(3))
            arena.put_folio(arena.try_alloc_folio(9, RETRY_MAYFAIL) or 0)
        await one(arena, 10, KERNEL)
    assert [record.getMessage() for record in caplog.records] == [
        "tests.alloc.test_slowpath:test_large_requests_are_named_once_for_each_site asks for "
        "order:4 mode:KERNEL, above order 3 and not allowed to fail",
        "tests.alloc.test_slowpath:one asks for order:10 mode:KERNEL, "
        "above order 3 and not allowed to fail",
    ]
    assert arena.vmstat["alloc_costly"] == 7


async def test_what_the_arena_could_never_serve_is_refused(arena: Arena) -> None:
    assert arena.order_max == 10
    arena.order_max = 8
    with pytest.raises(ValueError, match="order 9: orders are 0 to 8"):
        await arena.alloc_folio(9)
    with pytest.raises(ValueError, match="order 9: orders are 0 to 8"):
        arena.try_alloc_folio(9, RETRY_MAYFAIL)
