"""Slab caches against a model, for every size; what they refuse and what they give back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from alloc.arena import SLAB_SIZES, Arena, Slab
from alloc.gfp import MEMALLOC, MOVABLE, NOWAIT
from alloc.page import SLAB


def record(size: int) -> np.dtype:
    return np.dtype([("key", "u8"), ("rest", "u1", (size - 8,))])


def take(slab: Slab) -> int:
    i = slab.try_alloc(NOWAIT)
    assert i is not None
    return i


class SlabMachine(RuleBasedStateMachine):
    """Objects of three caches, each stamped with a key that nobody else may disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(8 << 20)
        self.slabs = [self.arena.slab(f"s{size}", record(size)) for size in (32, 512, 4096)]
        self.held: dict[tuple[int, int], int] = {}
        self.stamp = 1

    @rule(which=st.integers(0, 2), count=st.integers(1, 150))
    def take(self, which: int, count: int) -> None:
        slab = self.slabs[which]
        for _ in range(count):
            i = take(slab)
            assert (which, i) not in self.held
            assert not slab.table.view(np.uint8).reshape(-1, slab.size)[i].any()
            slab.table["key"][i] = self.stamp
            slab.table["rest"][i] = 0xEE
            self.held[which, i] = self.stamp
            self.stamp += 1

    @precondition(lambda self: self.held)
    @rule(every=st.integers(1, 3), offset=st.integers(0, 2))
    def give_back(self, every: int, offset: int) -> None:
        for which, i in sorted(self.held)[offset::every]:
            assert self.slabs[which].table["key"][i] == self.held.pop((which, i))
            self.slabs[which].free(i)

    @invariant()
    def counts(self) -> None:
        for which, slab in enumerate(self.slabs):
            mine = [i for w, i in self.held if w == which]
            assert slab.nr_objects == len(mine)
        self.arena.check()
        self.arena.drain_all()
        for which, slab in enumerate(self.slabs):
            mine = [i for w, i in self.held if w == which]
            assert slab.nr_slabs == len({slab.addr(i) >> 12 for i in mine})

    def teardown(self) -> None:
        self.arena.check()
        for which, i in list(self.held):
            assert self.slabs[which].table["key"][i] == self.held[which, i]
            self.slabs[which].free(i)
        self.arena.drain_all()
        assert self.arena.free_pages == self.arena.nr_pages - 1
        self.arena.check()
        self.arena.close()


SlabMachine.TestCase.settings = settings(
    max_examples=6, stateful_step_count=10, deadline=None, derandomize=True
)
TestSlab = SlabMachine.TestCase


@pytest.mark.parametrize("size", SLAB_SIZES)
def test_every_size_fills_its_slab_exactly(arena: Arena, size: int) -> None:
    slab = arena.slab("objects", record(size))
    per_slab = 4096 // size
    held = [take(slab) for _ in range(3 * per_slab)]
    assert len(set(held)) == len(held)
    arena.drain_all()
    assert slab.nr_slabs == 3
    assert {slab.addr(i) >> 12 for i in held} == set(np.flatnonzero(arena.pages.flags & SLAB))
    assert all(slab.addr(i) == i * size for i in held)
    slab.table["key"][held[-1]] = 99
    assert arena.mem[slab.addr(held[-1])] == 99
    arena.check()
    for i in held[1:]:
        slab.free(i)
    arena.drain_all()
    assert slab.nr_slabs == 1
    slab.free(held[0])
    arena.drain_all()
    assert arena.free_pages == arena.nr_pages - 1


def test_an_object_comes_back_zeroed(arena: Arena) -> None:
    slab = arena.slab("objects", record(64))
    i = take(slab)
    slab.table["rest"][i] = 7
    slab.free(i)
    j = take(slab)
    assert j == i
    assert not slab.table["rest"][j].any()
    slab.free(j)


def test_slabs_gather_in_pageblocks_and_at_the_bottom(arena: Arena) -> None:
    """The first slabs get a pageblock; in an arena full of folios each takes the lowest page."""
    slab = arena.slab("pages", record(4096))
    held = [take(slab) for _ in range(16)]
    assert len({i // 16 for i in held}) == 1
    folios = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT | MEMALLOC | MOVABLE)) is not None:
        arena.lru.add(pfn)
        folios.append(pfn)
    free = sorted(folios)[7::20]
    for pfn in free:
        arena.put_folio(pfn)
        folios.remove(pfn)
    arena.drain_all()
    more = [take(slab) for _ in range(10)]
    assert more == free[:10]
    arena.check()
    for pfn in folios:
        arena.put_folio(pfn)
    for i in held + more:
        slab.free(i)


def test_mistakes_are_noticed(arena: Arena) -> None:
    slab, other = arena.slab("a", record(64)), arena.slab("b", record(64))
    i, j = take(slab), take(slab)
    slab.free(i)
    with pytest.raises(AssertionError, match="freed twice"):
        slab.free(i)
    with pytest.raises(AssertionError, match="not one of slab b"):
        other.free(j)
    with pytest.raises(AssertionError, match="not one of slab a"):
        slab.free(0)
    slab.free(j)


@pytest.mark.parametrize("size", [16, 48, 8192])
def test_a_size_that_is_no_slab_size_is_refused(arena: Arena, size: int) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        arena.slab("odd", np.dtype((np.void, size)))


def test_a_name_is_one_cache(arena: Arena) -> None:
    assert arena.slab("a", record(64)) is arena.slab("a", record(64))
    with pytest.raises(AssertionError, match="another type"):
        arena.slab("a", record(128))
    assert [slab.name for slab in arena.slab_caches] == ["a"]


def test_the_reserve_is_for_memalloc(arena: Arena) -> None:
    slab = arena.slab("pages", record(4096))
    held = []
    while (i := slab.try_alloc(NOWAIT)) is not None:
        held.append(i)
    assert arena.free_pages == arena.marks.min
    while (i := slab.try_alloc(NOWAIT | MEMALLOC)) is not None:
        held.append(i)
    assert arena.free_pages == 0
    for i in held:
        slab.free(i)
