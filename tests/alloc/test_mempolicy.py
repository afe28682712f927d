"""Memory policies: golden sequences, who wins, and that a bond never makes a request fail."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio
import trio.testing

from alloc import mempolicy, slowpath
from alloc.arena import Arena
from alloc.gfp import KERNEL, NOWAIT
from alloc.mempolicy import NONE, applied, at_home, describe, parse
from alloc.page import W_FREE, W_MIN
from alloc.topology import topology
from tests.alloc.caches import FolioCache

MIB = 1 << 20
LINE = topology(4, [10, 15, 40, 50, 15, 10, 15, 40, 40, 15, 10, 15, 50, 40, 15, 10])


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(32 * MIB, nodes=LINE)
    yield made
    made.drain_all()
    assert made.free_pages == made.nr_pages - 1
    made.check()
    made.close()


def node_of(arena: Arena, policy: int = NONE, offset: int = -1) -> int:
    """Where one page is had, which goes back at once."""
    pfn = arena.try_alloc_folio(0, NOWAIT, policy, offset)
    assert pfn is not None
    arena.put_folio(pfn)
    return arena.node_of(pfn)


# -- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "weights", "golden"),
    [
        ("interleave", (1, 1, 1, 1), [0, 1, 2, 3, 0, 1, 2, 3, 0]),
        ("interleave:1+3", (9, 9, 9, 9), [1, 3, 1, 3, 1, 3, 1, 3, 1]),
        ("interleave:2", (1, 1, 1, 1), [2, 2, 2, 2, 2, 2, 2, 2, 2]),
        ("weighted", (1, 1, 1, 1), [0, 1, 2, 3, 0, 1, 2, 3, 0]),
        ("weighted:0-2", (3, 1, 2, 9), [0, 0, 0, 1, 2, 2, 0, 0, 0]),
        ("weighted:1+3", (9, 2, 9, 4), [1, 1, 3, 3, 3, 3, 1, 1, 3]),
    ],
)
def test_golden_interleaving(
    arena: Arena, policy: str, weights: tuple[int, ...], golden: list[int]
) -> None:
    """In turn, and the same by offset in any order."""
    arena.set_weights(weights)
    number = parse(policy, 4)
    assert [node_of(arena, number, k) for k in range(9)] == golden
    assert [node_of(arena, number, k) for k in range(8, -1, -1)] == golden[::-1]
    with applied(number):
        assert [node_of(arena) for _ in range(9)] == golden
    assert arena.vmstat["numa_interleave"] == 27


@pytest.mark.parametrize(
    ("policy", "home", "golden"),
    [
        ("local", 0, 0),
        ("local", 3, 3),
        ("prefer:2", 0, 2),
        ("prefer:1-3", 3, 1),
        ("prefer-many:2+3", 0, 2),
        ("prefer-many:0+3", 2, 3),
        ("bind:0+3", 1, 0),
        ("bind:0+3", 2, 3),
        ("bind:2", 0, 2),
    ],
)
def test_where_a_policy_begins(arena: Arena, policy: str, home: int, golden: int) -> None:
    with at_home(home):
        assert node_of(arena, parse(policy, 4)) == golden


def test_order_of_nodes_as_they_fill_up(arena: Arena) -> None:
    def nodes(policy: str) -> list[int]:
        pfns, seen = [], []
        while pfn := arena.try_alloc_folio(3, NOWAIT, parse(policy, 4)):
            pfns.append(pfn)
            if not seen or seen[-1] != arena.node_of(pfn):
                seen.append(arena.node_of(pfn))
        for pfn in pfns:
            arena.put_folio(pfn)
        return seen[: len(dict.fromkeys(seen))]

    assert nodes("local") == [0, 1, 2, 3]
    assert nodes("prefer:2") == [2, 3, 1, 0]
    assert nodes("bind:3+1") == [1, 3]
    assert nodes("prefer-many:3") == [3, 0, 1, 2]


def test_an_inode_wins_over_a_task_and_a_task_over_the_mount(arena: Arena) -> None:
    arena.set_mempolicy(parse("prefer:1", 4))
    cache = arena.slab("test", "V64")
    assert node_of(arena) == 1
    with applied(parse("prefer:2", 4)):
        assert node_of(arena) == 2
        assert node_of(arena, parse("prefer:3", 4)) == 3
        i = cache.try_alloc(NOWAIT)
        assert i is not None
        assert arena.node_of(i * 64 >> 12) == 2
        cache.free(i)
    assert node_of(arena) == 1


# -- words ---------------------------------------------------------------------------------------


def test_policies_are_written_and_read() -> None:
    for text in ("local", "prefer:1", "prefer-many:0+2", "bind:0+1+3", "interleave:1+2"):
        assert describe(parse(text, 4)) == text
    assert describe(parse("bind:1-3", 4)) == "bind:1+2+3"
    assert describe(parse("weighted", 3)) == "weighted:0+1+2"
    assert describe(NONE) == "none"


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("near", "one of local"),
        ("bind", "needs nodes"),
        ("local:1", "has no nodes"),
        ("bind:4", "node 4 of 4"),
        ("bind:a", "neither a node"),
        ("bind:1-", "neither"),
        ("prefer:1--2", "neither"),
    ],
)
def test_no_such_policy(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        parse(text, 4)


def test_weights_have_bounds(arena: Arena) -> None:
    with pytest.raises(ValueError, match="weight 256 of node 1"):
        arena.set_weights((1, 256, 1, 1))


# -- a bond and the guarantee --------------------------------------------------------------------


async def test_bound_requests_get_what_others_have_at_last(
    arena: Arena, autojump_clock: trio.testing.MockClock
) -> None:
    """Reclaim in its nodes comes first, and a sleep; then any node will do."""
    bound = parse("bind:2", 4)
    held = []
    while pfn := arena.try_alloc_folio(0, NOWAIT, bound):
        held.append(pfn)
    assert int(arena.nodes[2][W_FREE]) == int(arena.nodes[2][W_MIN])
    with slowpath.traced() as trace, trio.fail_after(5):
        pfn = await arena.alloc_folio(0, KERNEL, bound)
    assert arena.node_of(pfn) != 2
    assert trace.count("sleep") == 1
    assert trace.index("direct_reclaim") < trace.index("sleep") < len(trace) - 1
    for page in (*held, pfn):
        arena.put_folio(page)


async def test_a_bound_waiter_is_served_from_its_nodes_first(
    arena: Arena, autojump_clock: trio.testing.MockClock
) -> None:
    bound, got = parse("bind:2", 4), []
    held = []
    while pfn := arena.try_alloc_folio(0, NOWAIT, bound):
        held.append(pfn)

    async def ask() -> None:
        got.append(await arena.alloc_folio(0, KERNEL, bound))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.sleep(0)
        for _ in range(8):
            arena.put_folio(held.pop())
    assert arena.node_of(got[0]) == 2
    for page in (*held, *got):
        arena.put_folio(page)


def test_twins() -> None:
    """Naive spellings of both interleavings."""
    arena = Arena(32 * MIB, nodes=LINE)
    weights = [5, 1, 7, 2]
    arena.set_weights(weights)
    for mask in range(1, 16):
        nodes = [n for n in range(4) if mask >> n & 1]
        turns = [n for n in nodes for _ in range(weights[n])]
        plain = mempolicy.policy("interleave", nodes, 4)
        heavy = mempolicy.policy("weighted", nodes, 4)
        for k in range(0, 40, 3):
            assert node_of(arena, plain, k) == nodes[k % len(nodes)]
            assert node_of(arena, heavy, k) == turns[k % len(turns)]
    arena.close()


async def test_a_node_that_is_pinned_does_not_cost_the_others_their_cache(
    arena: Arena, autojump_clock: trio.testing.MockClock
) -> None:
    cache = FolioCache(arena)
    for k in range(1500):
        pfn = arena.try_alloc_folio(0, NOWAIT, parse("bind:0", 4), k)
        assert pfn is not None
        cache.insert(pfn, dirty=False)
    held = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        while pfn := arena.try_alloc_folio(0, NOWAIT, parse("bind:2", 4)):
            held.append(pfn)
        await trio.testing.wait_all_tasks_blocked()
        assert len(cache.folios) == 1500
        assert arena.vmstat["pageoutrun"] > 0
        nursery.cancel_scope.cancel()
    for pfn in held:
        arena.put_folio(pfn)
    cache.drop()
