"""Folios that migrate to who touches them: counters and a twin, thresholds, refusals, limits."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc import mempolicy
from alloc.arena import Arena
from alloc.balance import REST_MS, THRESHOLD, TICK_S
from alloc.gfp import MOVABLE, NOWAIT
from alloc.jit import probe
from alloc.page import ACTIVE, DIRTY, HOT, LOCKED, W_FREE, W_HIGH, W_HOT, W_HOT_NEXT, W_MIGRATE
from alloc.topology import topology
from alloc.touches import COUNTER_BITS, COUNTERS_BITS, MOVES_MASK, MOVES_SHIFT, touch
from tests.alloc.caches import checked, kswapd
from tests.alloc.movable import MovableCache

MIB = 1 << 20


@probe
def touched(words, private, pfn, home):
    touch(words, private, pfn, home)


@pytest.fixture
def arena() -> Iterator[Arena]:
    with checked(24 * MIB, topology(3)) as made:
        yield made


@pytest.fixture
def cache(arena: Arena) -> Iterator[MovableCache]:
    made = MovableCache(arena)
    yield made
    for pfn, seed in made.seeds.items():
        arena.pages.private[pfn] = seed + 1  # the counters are not the cache's
    made.verify()
    made.drop()


def folio(cache: MovableCache, node: int, order: int = 0, dirty: bool = False) -> int:
    bound = mempolicy.policy("bind", [node])
    pfn = cache.arena.try_alloc_folio(order, NOWAIT | MOVABLE, bound)
    assert pfn is not None
    cache.insert(pfn, dirty)
    cache.arena.pages.private[pfn] = 0
    return pfn


def use(arena: Arena, pfn: int, home: int, times: int) -> None:
    with mempolicy.at_home(home):
        for _ in range(times):
            arena.balancer.touch(np.array([pfn]))


def where(cache: MovableCache, pfn: int) -> int:
    """The node where a folio is by now."""
    for source, target in cache.moves:
        pfn = target if pfn == source else pfn
    return cache.arena.node_of(pfn)


def counts(arena: Arena, *names: str) -> tuple[int, ...]:
    return tuple(arena.vmstat[f"numa_{name}"] for name in names)


# -- counters ------------------------------------------------------------------------------------


def naive(nodes: int, here: int, threshold: int, homes: list[int]) -> tuple[list[int], list[int]]:
    """The counters after some touches, and who raised interrupts."""
    most = (1 << min(COUNTER_BITS, COUNTERS_BITS // nodes)) - 1
    counters, raised = [0] * nodes, []
    for home in homes:
        if counters[home] == most:
            counters = [count // 2 for count in counters]
        counters[home] += 1
        lead, need = counters[home] - counters[here], min(threshold, most)
        if home != here and lead >= need and lead % need == 0:
            raised.append(home)
    return counters, raised


@settings(max_examples=40, deadline=None)
@given(
    nodes=st.sampled_from([2, 3, 4, 7, 16]),
    here=st.integers(0, 1),
    threshold=st.integers(1, 20),
    runs=st.lists(st.tuples(st.integers(0, 15), st.integers(1, 60)), max_size=30),
)
def test_counters_are_those_of_the_twin(
    nodes: int, here: int, threshold: int, runs: list[tuple[int, int]]
) -> None:
    arena = Arena(nodes * 8 * MIB, nodes=topology(nodes))
    arena.balancer.threshold = threshold
    pfn = int(arena.words[41]) * here + 5
    homes = [home % nodes for home, times in runs for _ in range(times)]
    for home in homes:
        touched(arena.words, arena.pages.private, pfn, home)
    counters, raised = naive(nodes, here, threshold, homes)
    bits = min(COUNTER_BITS, COUNTERS_BITS // nodes)
    state = int(arena.pages.private[pfn])
    assert [state >> n * bits & (1 << bits) - 1 for n in range(nodes)] == counters
    assert state >> COUNTERS_BITS == 0
    words = arena.nodes[here]
    assert int(words[W_HOT_NEXT]) == len(raised)
    ring = [int(words[W_HOT + k % HOT]) for k in range(max(len(raised) - HOT, 0), len(raised))]
    assert ring == [pfn << 4 | home for home in raised[-HOT:]]
    arena.close()


def test_a_full_counter_halves_all() -> None:
    arena = Arena(16 * MIB, nodes=topology(2))
    for _ in range(100):
        touched(arena.words, arena.pages.private, 5, 0)
    for _ in range(2048):
        touched(arena.words, arena.pages.private, 5, 1)
    assert int(arena.pages.private[5]) == 1024 << 11 | 50
    arena.close()


def test_one_node_counts_nothing() -> None:
    arena = Arena(8 * MIB)
    touched(arena.words, arena.pages.private, 5, 0)
    assert arena.words[W_MIGRATE] == 0
    assert arena.pages.private[5] == 0
    assert not any(name.startswith("numa") for name in arena.vmstat)
    arena.close()


# -- migration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("order", "active"), [(0, False), (0, True), (3, False)])
async def test_a_folio_goes_to_who_touches_it(
    arena: Arena, cache: MovableCache, order: int, active: bool, autojump_clock: object
) -> None:
    pfn = folio(cache, 0, order, dirty=True)
    if active:
        arena.lru.activate(pfn)
    arena.pages.flags[pfn] |= DIRTY
    async with kswapd(arena):
        use(arena, pfn, 0, 4)
        use(arena, pfn, 2, THRESHOLD + 3)
        await trio.sleep(2 * TICK_S)
        assert not cache.moves, "it leads by one too few"
        use(arena, pfn, 2, 1)
        await trio.sleep(2 * TICK_S)
    ((source, target),) = cache.moves
    assert source == pfn
    assert arena.node_of(target) == 2
    state = int(arena.pages.flags[target])
    assert bool(state & ACTIVE) == active
    assert state & DIRTY
    listed = [arena.lru.active_on(2), arena.lru.inactive_on(2)]
    assert listed == ([1 << order, 0] if active else [0, 1 << order])
    assert arena.lru.active_on(0) == arena.lru.inactive_on(0) == 0
    assert counts(arena, "pages_migrated", "hint_faults") == (1 << order, 1)
    assert arena.vmstat["pgmigrate_success"] == 1
    arena.pages.flags[target] &= ~np.uint32(DIRTY)


async def test_it_is_the_last_to_be_reclaimed_there(
    arena: Arena, cache: MovableCache, autojump_clock: object
) -> None:
    old, pfn = folio(cache, 1), folio(cache, 0)
    async with kswapd(arena):
        use(arena, pfn, 1, THRESHOLD)
        await trio.sleep(2 * TICK_S)
    assert arena.lru.isolate(2, 1) == [old, cache.moves[0][1]]
    for taken in (old, cache.moves[0][1]):
        arena.lru.putback(taken)


async def test_local_touches_keep_it(
    arena: Arena, cache: MovableCache, autojump_clock: object
) -> None:
    pfn = folio(cache, 1)
    async with kswapd(arena):
        for _ in range(100):
            use(arena, pfn, 0, 1)
            use(arena, pfn, 1, 1)
            use(arena, pfn, 2, 1)
        await trio.sleep(2 * TICK_S)
    assert counts(arena, "hint_faults") == (0,)
    assert not cache.moves


async def test_what_bounces_rests_and_then_takes_twice_as_much(
    arena: Arena, cache: MovableCache, autojump_clock: object
) -> None:
    """Two nodes in turn: each move doubles the lead that the next one takes."""
    pfn = folio(cache, 0)
    async with kswapd(arena):
        use(arena, pfn, 1, THRESHOLD)
        await trio.sleep(2 * TICK_S)
        ((_, pfn),) = cache.moves
        use(arena, pfn, 0, 2 * THRESHOLD)
        await trio.sleep(2 * TICK_S)
        assert counts(arena, "migrate_bounce") == (1,)
        await trio.sleep(REST_MS / 1000)
        assert len(cache.moves) == 1
        use(arena, pfn, 0, 2 * THRESHOLD - 1)
        await trio.sleep(2 * TICK_S)
        assert len(cache.moves) == 1
        use(arena, pfn, 0, 1)
        await trio.sleep(2 * TICK_S)
        assert len(cache.moves) == 2
        pfn = cache.moves[-1][1]
        assert arena.node_of(pfn) == 0
        assert int(arena.pages.private[pfn]) >> MOVES_SHIFT & MOVES_MASK == 2
        await trio.sleep(1 + REST_MS / 1000)
        use(arena, pfn, 1, 4 * THRESHOLD)
        await trio.sleep(2 * TICK_S)
        assert len(cache.moves) == 3


async def test_what_is_in_use_stays(
    arena: Arena, cache: MovableCache, autojump_clock: object
) -> None:
    pinned, locked, gone = folio(cache, 0), folio(cache, 0), folio(cache, 0)
    cache.pin(pinned)
    arena.pages.flags[locked] |= LOCKED
    async with kswapd(arena):
        for pfn in (pinned, locked, gone):
            use(arena, pfn, 1, THRESHOLD)
        del cache.folios[gone]
        arena.put_folio(gone)
        await trio.sleep(2 * TICK_S)
        assert not cache.moves
        arena.pages.flags[locked] &= ~np.uint32(LOCKED)
        use(arena, locked, 1, THRESHOLD)
        await trio.sleep(2 * TICK_S)
        assert [source for source, _ in cache.moves] == [locked]


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("local", True),
        ("bind:0", False),
        ("bind:0+1", True),
        ("prefer:0", False),
        ("prefer-many:0", False),
        ("prefer-many:1", True),
        ("interleave", False),
        ("weighted", False),
    ],
)
@pytest.mark.parametrize("whose", ["folio", "mount"])
async def test_a_policy_that_says_where_is_kept(
    arena: Arena, cache: MovableCache, text: str, allowed: bool, whose: str, autojump_clock: object
) -> None:
    number = mempolicy.parse(text, 3)
    pfn = folio(cache, 0)
    if whose == "mount":
        arena.set_mempolicy(number)
    else:
        cache.policies[pfn] = number
    async with kswapd(arena):
        use(arena, pfn, 1, THRESHOLD)
        await trio.sleep(2 * TICK_S)
    assert len(cache.moves) == allowed
    assert counts(arena, "migrate_policy") == (not allowed,)


async def test_a_node_below_high_takes_nothing(
    arena: Arena, cache: MovableCache, autojump_clock: object
) -> None:
    pfn, held = folio(cache, 0), []
    bound = mempolicy.policy("bind", [1])
    while arena.nodes[1][W_FREE] > arena.nodes[1][W_HIGH] + 1:
        held.append(arena.try_alloc_folio(0, NOWAIT, bound) or 0)
    arena.drain_all()
    async with kswapd(arena):
        while arena.nodes[1][W_FREE] > arena.nodes[1][W_HIGH]:
            held.append(arena.try_alloc_folio(0, NOWAIT, bound) or 0)
        use(arena, pfn, 1, THRESHOLD)
        await trio.sleep(2 * TICK_S)
        assert counts(arena, "migrate_nomem") == (1,)
        assert not cache.moves
    for page in held:
        arena.put_folio(page)


async def test_no_more_moves_in_a_second_than_the_rate(
    arena: Arena, cache: MovableCache, autojump_clock: object
) -> None:
    pfns = [folio(cache, 0) for _ in range(600)]
    arena.balancer.rate_mbps = 1  # 256 pages
    async with kswapd(arena):
        await trio.sleep(TICK_S / 2)  # so that each tick finds the touches of one turn
        for _ in range(10):
            for pfn in pfns:
                if pfn in cache.folios:
                    use(arena, pfn, 1, THRESHOLD)
            await trio.sleep(TICK_S)
        moved = len(cache.moves)
        assert 230 <= moved <= 257
        assert counts(arena, "pages_migrated") == (moved,)
        assert arena.vmstat["numa_migrate_ratelimit"] > 0


async def test_it_can_be_turned_off(
    arena: Arena, cache: MovableCache, autojump_clock: object
) -> None:
    pfn = folio(cache, 0)
    arena.balancer.enable(False)
    async with kswapd(arena):
        use(arena, pfn, 1, 10 * THRESHOLD)
        await trio.sleep(2 * TICK_S)
        assert not cache.moves
        arena.balancer.enable(True)
        use(arena, pfn, 1, THRESHOLD)
        await trio.sleep(2 * TICK_S)
        assert where(cache, pfn) == 1
