"""The shrinker formula: golden vectors, a twin, deferral, SHRINK_STOP."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloc.arena import Arena
from alloc.shrinker import NO_NODE, NO_TARGET, SHRINK_STOP, ShrinkerState
from alloc.topology import topology
from tests.alloc.naive import shrink


class Counter:
    """A cache with a fixed count that frees nothing."""

    name = "counter"

    def __init__(self, freeable: int, stop_after: int | None = None) -> None:
        self.freeable, self.stop_after = freeable, stop_after
        self.scanned = 0

    def count_objects(self) -> int:
        return self.freeable

    def scan_objects(self, nr: int, gfp: int) -> int:
        if self.stop_after is not None and self.scanned >= self.stop_after:
            return SHRINK_STOP
        self.scanned += nr
        return 0


@pytest.mark.parametrize(
    ("freeable", "priority", "scanned", "deferred"),
    [
        (10000, 12, 0, 4),
        (10000, 6, 256, 56),
        (10000, 0, 19968, 32),
        (50, 12, 0, 0),
        (50, 1, 50, 0),
    ],
)
def test_golden(freeable: int, priority: int, scanned: int, deferred: int) -> None:
    cache = Counter(freeable)
    state = ShrinkerState(cache)
    assert state.shrink(priority, 0) == (scanned, 0)
    assert cache.scanned == scanned
    assert state.deferred == deferred


@pytest.mark.parametrize(
    ("priorities", "passes"),
    [
        ([12, 11, 10], [(0, 2048), (2049, 2047), (2049, 2046)]),
        ([12, 12, 12], [(0, 2048), (0, 4096), (2049, 4095)]),
    ],
)
def test_a_cache_one_short_of_its_batch(
    priorities: list[int], passes: list[tuple[int, int]]
) -> None:
    """freeable 4096, seeks 0, batch 2049: the first pass only defers, a later one scans once."""
    state = ShrinkerState(Counter(4096), seeks=0, batch=2049)
    seen = []
    for priority in priorities:
        scanned, _ = state.shrink(priority, 0)
        seen.append((scanned, state.deferred))
    assert seen == passes


def test_a_pass_over_a_node_asks_its_caches_and_those_of_no_node() -> None:
    """What is deferred on one node is not asked for on another."""
    arena = Arena(24 << 20, nodes=topology(2))
    caches = [Counter(10_000) for _ in range(3)]
    for nid, cache in zip((0, 1, NO_NODE), caches, strict=True):
        arena.register_shrinker(cache, nid=nid)
    on_node = {state.nid: state for state in arena.reclaim.shrinkers if state.shrinker in caches}
    arena.reclaim.shrink_all(6, 0, "direct", NO_TARGET, nids=(1,))
    assert [cache.scanned for cache in caches] == [0, 256, 256]
    assert [on_node[nid].deferred for nid in (0, 1, NO_NODE)] == [0, 56, 56]
    arena.reclaim.shrink_all(6, 0, "direct", NO_TARGET, nids=(0,))
    assert [cache.scanned for cache in caches] == [256, 256, 512]
    arena.reclaim.shrink_all(6, 0, "direct", NO_TARGET)
    assert [cache.scanned for cache in caches] == [512, 512, 768]
    arena.reclaim.shrink_all(6, 0, "kswapd", NO_TARGET, nids=(0,), common=False)
    assert [cache.scanned for cache in caches] == [768, 512, 768]
    arena.close()


@given(
    st.integers(1, 100_000),
    st.lists(st.integers(0, 12), min_size=1, max_size=6),
    st.sampled_from([0, 1, 2, 4]),
)
def test_twin(freeable: int, priorities: list[int], seeks: int) -> None:
    state = ShrinkerState(Counter(freeable), seeks=seeks)
    deferred = 0
    for priority in priorities:
        expected, deferred = shrink(freeable, priority, seeks, deferred)
        assert state.shrink(priority, 0) == (expected, 0)
        assert state.deferred == deferred


def test_stop_defers_the_rest() -> None:
    state = ShrinkerState(Counter(1000, stop_after=256))
    assert state.shrink(0, 0) == (256, 0)
    assert state.deferred == 2000 - 256


def test_an_empty_cache_is_left_alone() -> None:
    cache = Counter(0)
    assert ShrinkerState(cache).shrink(0, 0) == (0, 0)
    assert cache.scanned == 0
