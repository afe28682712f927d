"""Nodes: zonelists against golden ones, borders, and who is served from where."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alloc import buddy, pcp
from alloc.arena import Arena, Slab
from alloc.mempolicy import policy
from alloc.node import (
    BOUND_SHIFT,
    HOME_SHIFT,
    NODE_SHIFT,
    NUMA_EVENTS,
    PLACED,
    SOFT,
    in_reach,
)
from alloc.page import ORDER_MAX, W_FREE, W_LOW, W_MIN, Words
from alloc.placement import placement
from alloc.topology import Topology, parse, span_pages, topology
from alloc.zoneinfo import all_free_blocks
from tests.alloc.caches import checked

MIB = 1 << 20
RING = topology(4, [10, 20, 30, 20, 20, 10, 20, 30, 30, 20, 10, 20, 20, 30, 20, 10])
LINE = topology(3, [10, 15, 40, 15, 10, 15, 40, 15, 10])
REFERENCE = 64  # bytes of an object


@pytest.fixture
def arena() -> Iterator[Arena]:
    with checked(24 * MIB, LINE) as made:
        yield made


# -- topologies ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "golden"),
    [
        (topology(1), [[0]]),
        (topology(2), [[0, 1], [1, 0]]),
        # all equally far: the higher numbers first, then those that were first less often
        (topology(4), [[0, 1, 2, 3], [1, 2, 3, 0], [2, 3, 0, 1], [3, 0, 1, 2]]),
        (LINE, [[0, 1, 2], [1, 2, 0], [2, 1, 0]]),
        (RING, [[0, 1, 3, 2], [1, 2, 0, 3], [2, 3, 1, 0], [3, 0, 2, 1]]),
        (
            topology(4, [10, 11, 20, 20, 11, 10, 20, 20, 20, 20, 10, 11, 20, 20, 11, 10]),
            [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]],
        ),
    ],
)
def test_golden_zonelists(nodes: Topology, golden: list[list[int]]) -> None:
    assert nodes.zonelists() == golden


def test_zonelists_go_by_distance() -> None:
    random = np.random.default_rng(7)
    for _ in range(50):
        n = int(random.integers(2, 9))
        matrix = random.integers(11, 60, (n, n))
        np.fill_diagonal(matrix, 10)
        for node, order in enumerate(topology(n, matrix.ravel().tolist()).zonelists()):
            assert order[0] == node
            assert sorted(order) == list(range(n))
            far = matrix[node][order[1:]].tolist()
            assert far == sorted(far)


@pytest.mark.parametrize(
    ("nodes", "distances", "wrong"),
    [
        (0, [], "0 nodes"),
        (17, [], "17 nodes"),
        (2, [10, 20, 20], "3 distances"),
        (2, [10, 20, 20, 11], "node 1 is at 11 from itself"),
        (2, [10, 10, 20, 10], "distances of node 0"),
        (2, [10, 255, 20, 10], "distances of node 0"),
    ],
)
def test_no_such_topology(nodes: int, distances: list[int], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        topology(nodes, distances)


def test_topologies_are_read() -> None:
    assert parse("2") == topology(2)
    assert parse("2", "10:31:21:10") == topology(2, [10, 31, 21, 10])
    for words in (("two",), ("2", "10,20,20,10"), ("2", "10:20::20:10")):
        with pytest.raises(ValueError, match="is not a number of nodes"):
            parse(*words)


def test_spans_are_multiples_of_the_largest_block() -> None:
    assert span_pages(4096, 1) == 4096
    assert span_pages(4096, 2) == 2048
    assert span_pages(9000, 2) == 5120
    for pages in range(6144, 20000, 777):
        span = span_pages(pages, 2)
        assert span % (1 << ORDER_MAX) == 0
        assert 2048 <= pages - span <= span
    with pytest.raises(ValueError, match="8 MiB"):
        span_pages(4095, 2)


# -- who is served from where ---------------------------------------------------------------------


def take(arena: Arena, order: int, rights: int) -> int:
    return abs(int(pcp.alloc_block(*arena.buddy, 0, order, rights)))


def on(node: int, home: int | None = None) -> int:
    return PLACED | node << NODE_SHIFT | (node if home is None else home) << HOME_SHIFT


def bound(*nodes: int) -> int:
    return sum(1 << node for node in nodes) << BOUND_SHIFT


def free_of(arena: Arena) -> list[int]:
    return [int(words[W_FREE]) for words in arena.nodes]


def test_every_node_has_its_part(arena: Arena) -> None:
    assert free_of(arena) == [2047, 2048, 2048]
    assert arena.free_pages == arena.nr_pages - 1 == arena.vmstat["nr_free_pages"]
    assert arena.meminfo()["MemTotal"] == 24 << 10
    shares = [tuple(int(words[at]) for at in (W_MIN, W_LOW)) for words in arena.nodes]
    assert shares == [(arena.marks.min // 3, arena.marks.low // 3)] * 3
    assert [arena.node_of(pfn) for pfn in (1, 2047, 2048, 6143)] == [0, 0, 1, 2]


def test_a_request_goes_down_the_zonelist(arena: Arena) -> None:
    """Each node down to `low`, nearest first; then each down to `min`, in the same order."""
    pfns: list[int] = []
    seen: list[int] = []
    while pfn := take(arena, 0, on(1)):
        pfns.append(pfn)
        node = arena.node_of(pfn)
        if not seen or seen[-1] != node:
            seen.append(node)
    assert seen == [1, 2, 0, 1, 2, 0]
    assert free_of(arena) == [int(words[W_MIN]) for words in arena.nodes]
    for pfn in pfns:
        pcp.put_block(*arena.buddy, 0, pfn)


def test_a_bound_request_stays_where_it_may_be(arena: Arena) -> None:
    pfns = []
    while pfn := take(arena, 3, on(1) | bound(0, 1)):
        pfns.append(pfn)
    assert {arena.node_of(pfn) for pfn in pfns} == {0, 1}
    assert free_of(arena)[2] == 2048
    for pfn in pfns:
        pcp.put_block(*arena.buddy, 0, pfn)


def test_a_soft_bond_goes_elsewhere_at_last(arena: Arena) -> None:
    pfns = []
    while pfn := take(arena, 3, on(2) | bound(2) | SOFT):
        pfns.append(pfn)
        if arena.node_of(pfn) != 2:
            break
    marks = int(arena.nodes[2][W_MIN])
    assert arena.node_of(pfns[-1]) == 1
    assert free_of(arena)[2] - 7 <= marks, "the others came before its own was used up to `min`"
    for pfn in pfns:
        pcp.put_block(*arena.buddy, 0, pfn)


def test_what_is_freed_goes_home(arena: Arena) -> None:
    orders = range(ORDER_MAX)
    pfns = [take(arena, o, on(n) | buddy.RIGHTS_MOVABLE) for n in range(3) for o in orders]
    assert [arena.node_of(pfn) for pfn in pfns] == [0] * 10 + [1] * 10 + [2] * 10
    for pfn in pfns:
        pcp.put_block(*arena.buddy, 0, pfn)
    arena.drain_all()
    assert free_of(arena) == [2047, 2048, 2048]
    assert take(arena, ORDER_MAX, on(2)) == 2 * 2048
    pcp.put_block(*arena.buddy, 0, 2 * 2048)


def counted(arena: Arena) -> list[dict[str, int]]:
    text = arena.zoneinfo().split("Node ")[1:]
    found = []
    for zone in text:
        words = dict(line.split() for line in zone.splitlines() if line.strip()[:5] == "numa_")
        found.append({event: int(words[f"numa_{event}"]) for event in NUMA_EVENTS})
    return found


def test_events_are_counted_as_numastat_has_them(arena: Arena) -> None:
    none = dict.fromkeys(NUMA_EVENTS, 0)
    pfns = [
        take(arena, 0, on(1)),  # a hit, at home
        take(arena, 0, on(1, home=0)),  # a hit, by somebody from elsewhere
        take(arena, 0, on(1, home=2) | bound(2)),  # wanted on 1, served at home
    ]
    assert counted(arena) == [
        none,
        none | {"hit": 2, "local": 1, "other": 1, "foreign": 1},
        none | {"miss": 1, "local": 1},
    ]
    assert arena.vmstat["numa_hit"] == 2
    assert arena.vmstat["numa_foreign"] == 1
    for pfn in pfns:
        pcp.put_block(*arena.buddy, 0, pfn)


def test_one_node_counts_none_of_it() -> None:
    arena = Arena(8 * MIB)
    assert "numa_hit" not in arena.vmstat
    assert "numa" not in arena.zoneinfo()
    arena.close()


def test_reports_have_a_block_for_each_node(arena: Arena) -> None:
    assert [line[:21] for line in arena.buddyinfo().splitlines()] == [
        f"Node {n}, zone   Normal" for n in range(3)
    ]
    assert arena.pagetypeinfo().count("type    Unmovable") == 3
    assert arena.pagetypeinfo().count("\nNode 2, zone   Normal            0          128") == 1
    assert arena.zoneinfo().count("per-node stats") == 3
    assert "start_pfn:           4096" in arena.zoneinfo()
    assert len(arena.extfrag().splitlines()) == 6


# -- at random -----------------------------------------------------------------------------------


class NodeMachine(RuleBasedStateMachine):
    """Pages and objects of all nodes, their counts beside a naive sum."""

    @initialize(nodes=st.sampled_from([topology(2), LINE, RING]), extra=st.integers(-1, 1024))
    def begin(self, nodes: Topology, extra: int) -> None:
        nr = nodes.nr_nodes
        pages = nr * 2048 + ((nr - 1) * 1024 + extra if extra >= 0 else 0)
        self.arena = Arena(pages << 12, nodes=nodes)  # the last node is smaller
        self.arena.set_lanes(1)
        self.cache: Slab = self.arena.slab("test", np.dtype((np.void, REFERENCE)))
        self.blocks: dict[int, int] = {}
        self.objects: set[int] = set()

    @rule(
        order=st.integers(0, 6),
        wanted=st.integers(0, 3),
        mask=st.integers(0, 15),
        row=st.integers(0, 1),
        mt=st.integers(0, 2),
    )
    def alloc(self, order: int, wanted: int, mask: int, row: int, mt: int) -> None:
        nr = self.arena.topology.nr_nodes
        wanted, mask = wanted % nr, mask & (1 << nr) - 1
        rights = on(wanted) | mask << BOUND_SHIFT | mt << buddy.MT_SHIFT
        order_of_nodes = self.arena.topology.zonelists()[wanted]
        usable = [n for n in order_of_nodes if not mask or mask >> n & 1]
        likely = [n for n in usable if self.has(self.arena.nodes[n], order)]
        pfn = abs(int(pcp.alloc_block(*self.arena.buddy, row, order, rights)))
        if pfn:
            self.blocks[pfn] = order
            assert self.arena.node_of(pfn) in usable
        if likely:
            assert usable.index(self.arena.node_of(pfn)) <= usable.index(likely[0])

    def has(self, words: Words, order: int) -> bool:
        """Whether a request of this order stays above `low` on a node, and there is a block."""
        enough = int(words[W_FREE] - words[W_LOW]) > (1 << order) - 1
        return enough and any(all_free_blocks(words)[order:])

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), row=st.integers(0, 1))
    def free(self, data: st.DataObject, row: int) -> None:
        pfn = data.draw(st.sampled_from(sorted(self.blocks)))
        del self.blocks[pfn]
        assert pcp.put_block(*self.arena.buddy, row, pfn) > 0

    @rule(count=st.integers(1, 80))
    def alloc_objects(self, count: int) -> None:
        for k in range(count):
            i = self.cache._take(on(k % self.arena.topology.nr_nodes))
            assert self.arena.node_of(i * REFERENCE >> 12) == k % self.arena.topology.nr_nodes
            assert i not in self.objects
            self.objects.add(i)

    @precondition(lambda self: self.objects)
    @rule(count=st.integers(1, 80))
    def free_objects(self, count: int) -> None:
        for i in sorted(self.objects)[:count]:
            self.cache.free(i)
            self.objects.remove(i)

    @rule()
    def drain(self) -> None:
        self.arena.drain_all()

    @invariant()
    def sums(self) -> None:
        if hasattr(self, "arena"):
            pages = sum(1 << order for order in self.blocks.values())
            free = self.arena.free_pages + pages + self.cache.nr_slabs
            assert free == self.arena.nr_pages - 1
            assert self.cache.nr_objects == len(self.objects)

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check()
            self.arena.close()


NodeMachine.TestCase.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
TestNodes = NodeMachine.TestCase


def test_python_knows_the_order_too(arena: Arena) -> None:
    """`in_reach` against where requests are served when the first ones are full."""
    for mode, nodes in (("local", ()), ("prefer", (2,)), ("prefer-many", (1, 2)), ("bind", (0, 2))):
        placed = int(placement(arena.words, policy(mode, nodes), 0, 1))
        held, seen = [], []
        while pfn := abs(pcp.alloc_block(*arena.buddy, 0, 0, buddy.RIGHTS_ALL | placed)):
            held.append(pfn)
            if arena.node_of(pfn) not in seen:
                seen.append(arena.node_of(pfn))
        assert seen == in_reach(arena.nodes, placed)
        for pfn in held:
            arena.put_folio(pfn)
    assert in_reach(arena.nodes, 0) == [0, 1, 2]
