"""The shrinker formula: golden vectors, a twin, deferral, SHRINK_STOP."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alloc.shrinker import SHRINK_STOP, ShrinkerState
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


def test_a_cache_one_short_of_its_batch_defers_and_then_scans_once() -> None:
    """freeable 4096, seeks 0, batch 2049: the first pass defers 2048, the next one scans."""
    state = ShrinkerState(Counter(4096), seeks=0, batch=2049)
    assert state.shrink(12, 0) == (0, 0)
    assert state.deferred == 2048
    assert state.shrink(11, 0) == (2049, 0)


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
