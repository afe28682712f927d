"""Reclaim where memory has nodes: a kswapd for each; direct reclaim only where it may help."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
import trio.testing

from alloc import buddy, gfp, pcp, slowpath
from alloc.arena import Arena
from alloc.gfp import KERNEL, NOWAIT, RETRY_MAYFAIL
from alloc.kswapd import MAX_FAILURES, NAP_S
from alloc.mempolicy import parse
from alloc.page import W_FREE, W_HIGH, W_KSWAPD, W_LOW, W_MIN
from alloc.topology import topology
from tests.alloc.caches import FolioCache, checked, kswapd

MIB = 1 << 20
# the nodes in a row, so that zonelists are 0 1 2, 1 0 2, 2 1 0
LINE = topology(3, [10, 15, 40, 15, 10, 20, 40, 20, 10])


@pytest.fixture
def arena() -> Iterator[Arena]:
    with checked(24 * MIB, LINE) as made:
        yield made


@pytest.fixture
def cache(arena: Arena) -> Iterator[FolioCache]:
    made = FolioCache(arena)
    yield made
    made.drop()


def fill(arena: Arena, cache: FolioCache, node: int, mark: int, dirty: bool = False) -> None:
    """Folios on one node until less than its mark is free; kswapd does not hear of it."""
    rights = buddy.RIGHTS_ALL | int(arena._place(parse(f"bind:{node}", 3)))
    while arena.nodes[node][W_FREE] >= arena.nodes[node][mark]:
        cache.insert(abs(pcp.alloc_block(*arena.buddy, 0, 0, rights)), dirty)


def on_nodes(arena: Arena, cache: FolioCache) -> list[int]:
    """Folios of the cache by node."""
    nodes = [arena.node_of(pfn) for pfn in cache.folios]
    return [nodes.count(node) for node in range(3)]


class Names:
    """A cache that knows no nodes."""

    name = "names"

    def __init__(self) -> None:
        self.scanned = 0

    def count_objects(self) -> int:
        return 1000

    def scan_objects(self, nr: int, gfp: int) -> int:
        self.scanned += nr
        return 0


# -- kswapd --------------------------------------------------------------------------------------


async def test_each_node_is_balanced_for_itself(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    names = Names()
    arena.register_shrinker(names)
    fill(arena, cache, 0, W_LOW)
    fill(arena, cache, 1, W_LOW)
    before = on_nodes(arena, cache)
    async with kswapd(arena):
        arena.reclaim.wake_kswapd(int(arena._place(parse("bind:1", 3))))
        await trio.testing.wait_all_tasks_blocked()
        assert [int(words[W_KSWAPD]) for words in arena.nodes] == [0, 0, 0]
        assert arena.nodes[0][W_FREE] < arena.nodes[0][W_LOW]
        assert arena.nodes[1][W_FREE] >= arena.nodes[1][W_HIGH]
        assert arena.vmstat["pageoutrun"] == 1
        arena.reclaim.wake_kswapd()
        await trio.testing.wait_all_tasks_blocked()
        assert arena.nodes[0][W_FREE] >= arena.nodes[0][W_HIGH]
        assert arena.vmstat["pageoutrun"] == 2, "a node that has enough was woken"
    assert before[2] == on_nodes(arena, cache)[2] == 0
    assert names.scanned == 0, "there was memory enough on the third node"
    arena.unregister_shrinker(names)


async def test_caches_without_nodes_shrink_when_all_nodes_are_short(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    names = Names()
    arena.register_shrinker(names)
    for node in range(3):
        fill(arena, cache, node, W_LOW, dirty=True)
    async with kswapd(arena):
        arena.reclaim.wake_kswapd()
        await trio.testing.wait_all_tasks_blocked()
        assert names.scanned > 0
    arena.unregister_shrinker(names)


async def test_a_request_wakes_those_who_may_serve_it(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    """And only when none of them stays above `low`."""
    fill(arena, cache, 0, W_LOW)
    fill(arena, cache, 2, W_LOW)
    async with kswapd(arena):
        cache.insert(await arena.alloc_folio(0), dirty=False)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.vmstat["pageoutrun"] == 0
        cache.insert(await arena.alloc_folio(0, KERNEL, parse("bind:0", 3)), dirty=False)
        await trio.testing.wait_all_tasks_blocked()
        assert arena.vmstat["pageoutrun"] == 1
        assert arena.nodes[0][W_FREE] >= arena.nodes[0][W_HIGH]
        assert arena.nodes[2][W_FREE] < arena.nodes[2][W_LOW]


async def test_each_node_has_its_own_hope(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    fill(arena, cache, 1, W_LOW, dirty=True)
    async with kswapd(arena):
        arena.reclaim.wake_kswapd()
        await trio.sleep((MAX_FAILURES + 2) * NAP_S)
        assert [known.hopeless for known in arena.reclaim.kswapds] == [False, True, False]
        lines = [line for line in arena.zoneinfo().splitlines() if "unreclaimable" in line]
        assert [line.split()[1] for line in lines if "node_" in line] == ["0", "1", "0"]
        fill(arena, cache, 0, W_LOW)
        arena.reclaim.wake_kswapd()
        await trio.testing.wait_all_tasks_blocked()
        assert arena.reclaim.kswapds[1].hopeless
        assert arena.nodes[0][W_FREE] >= arena.nodes[0][W_HIGH]
        arena.kick()
        assert not arena.reclaim.kswapds[1].hopeless


async def test_a_waiter_is_nothing_to_nodes_that_can_not_serve_it(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    """A block of a node that is full of what stays costs the others nothing."""
    fill(arena, cache, 0, W_HIGH)
    before = on_nodes(arena, cache)
    held = []
    while pfn := arena.try_alloc_folio(0, NOWAIT, parse("bind:2", 3)):
        held.append(pfn)
    async with kswapd(arena), trio.open_nursery() as nursery:
        nursery.start_soon(arena.alloc_folio, 9, KERNEL, parse("bind:2", 3))
        await trio.sleep(0.05)
        (line,) = arena.waiters()
        assert "free pages at the mark of" in line
        assert " on node 2;" in line
        assert [arena.slow.waiting(node) for node in range(3)] == [0, 0, 1]
        assert [arena.slow.wanted_order(node) for node in range(3)] == [0, 0, 9]
        assert on_nodes(arena, cache) == before
        nursery.cancel_scope.cancel()
    for pfn in held:
        arena.put_folio(pfn)


async def test_a_waiter_is_something_to_a_node_that_has_enough_in_pieces(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    fill(arena, cache, 2, W_MIN)
    for pfn in sorted(cache.folios)[::2]:
        del cache.folios[pfn]
        arena.put_folio(pfn)
    arena.drain_all()
    assert arena.nodes[2][W_FREE] > arena.nodes[2][W_HIGH]
    async with kswapd(arena):
        pfn = await arena.alloc_folio(7, KERNEL, parse("bind:2", 3))
        await trio.testing.wait_all_tasks_blocked()
        assert arena.vmstat["pageoutrun"] == 1
    arena.put_folio(pfn)


# -- direct reclaim ------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [KERNEL, RETRY_MAYFAIL, gfp.NORETRY])
async def test_direct_reclaim_asks_the_nodes_of_the_request(
    arena: Arena, cache: FolioCache, flags: int, autojump_clock: object
) -> None:
    for node in range(3):
        fill(arena, cache, node, W_MIN)
    before = on_nodes(arena, cache)
    bound = parse("bind:0+2", 3)
    with slowpath.traced() as trace:
        if flags == KERNEL:
            pfn = await arena.alloc_folio(0, flags, bound)
        else:
            pfn = arena.try_alloc_folio(0, flags, bound) or 0
    assert "direct_reclaim" in trace
    assert "sleep" not in trace
    arena.put_folio(pfn)
    after = on_nodes(arena, cache)
    assert after[1] == before[1]
    assert after[0] < before[0]


async def test_too_many_isolated_is_for_a_node_to_say(
    arena: Arena, cache: FolioCache, autojump_clock: object
) -> None:
    for node in range(3):
        fill(arena, cache, node, W_MIN, dirty=True)
    held = arena.lru.isolate(arena.lru.inactive_on(1) // 4, 1)
    for bound, waits in (("bind:0+2", 0), ("bind:1", 1)):
        placed = int(arena._place(parse(bound, 3)))
        await arena.reclaim.direct(KERNEL, placed, lambda: False)
        assert arena.vmstat["vmscan_throttle_isolated"] == waits
    for pfn in held:
        arena.lru.putback(pfn)
