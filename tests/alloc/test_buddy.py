"""The page allocator against a set model, and the mistakes it must notice."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alloc import buddy, zone
from alloc.arena import Arena
from alloc.gfp import NOWAIT
from alloc.page import (
    DIRTY,
    FREE_SHIFT,
    HEAD,
    LRU,
    MIGRATETYPES,
    MOVABLE,
    ORDERS,
    RECLAIMABLE,
    TAIL,
    TYPES,
    UNMOVABLE,
    W_BOOST,
    W_BOOST_MAX,
    W_CLAIMED,
    W_FREE,
    W_FREE_HEAD,
    W_HIGHATOMIC,
    W_STOLEN,
)
from alloc.vmstat import merged_blocks
from tests.alloc.naive import NaiveBuddy

RIGHTS = (buddy.RIGHTS_MIN, buddy.RIGHTS_HALF, buddy.RIGHTS_ATOMIC, buddy.RIGHTS_ALL)


def lists(arena: Arena) -> dict[tuple[int, int], list[int]]:
    """Free blocks by type and order, next to be taken first."""
    found = {}
    for mt in range(TYPES):
        for order in range(ORDERS):
            pfns, pfn = [], int(arena.words[W_FREE_HEAD + (mt << FREE_SHIFT) + order])
            while pfn:
                pfns.append(pfn)
                pfn = int(arena.pages.lru_next[pfn])
            if pfns:
                found[mt, order] = pfns
    return found


class BuddyMachine(RuleBasedStateMachine):
    """Random allocations and frees of all types; the model says which block it must be."""

    @initialize(
        pages=st.sampled_from((2048, 2500, 4096)),
        seed=st.integers(0, 1 << 30),
        left=st.sampled_from((0, 0.1, 0.5, 0.9)),
    )
    def begin(self, pages: int, seed: int, left: float) -> None:
        """An arena that was full of small blocks of all types, of which a part is left."""
        random = Random(seed)
        self.arena = Arena(pages << 12)
        marks = self.arena.marks
        boost_max = int(self.arena.words[W_BOOST_MAX])
        self.model = NaiveBuddy(pages, marks.min, marks.low, boost_max)
        half = marks.min // 2
        self.floors = dict(zip(RIGHTS, (marks.min, half, half - half // 4, 0), strict=True))

        weights = [random.random() for _ in range(MIGRATETYPES)]
        while left and self.model.free_pages > 2 * marks.high:
            (mt,) = random.choices((UNMOVABLE, MOVABLE, RECLAIMABLE), weights)
            self.take(random.choice((0, 0, 1, 3)), buddy.RIGHTS_MIN, mt)
            newest = next(reversed(self.model.allocated))
            if mt == MOVABLE:
                self.enlist(newest)
        for pfn in sorted(self.model.allocated):
            if random.random() > left:
                self._put(pfn)

    types = st.sampled_from((UNMOVABLE, MOVABLE, RECLAIMABLE))

    @rule(order=st.integers(0, 10), rights=st.sampled_from(RIGHTS), mt=types)
    def take(self, order: int, rights: int, mt: int) -> None:
        atomic = rights == buddy.RIGHTS_ATOMIC
        reserve = rights != buddy.RIGHTS_MIN
        wanted = self.model.take(order, mt, self.floors[rights], atomic, reserve)
        got = buddy.alloc_pages(*self.arena.buddy, order, rights | mt << buddy.MT_SHIFT)
        assert abs(got) == wanted
        assert got == 0 or (got < 0) == (self.model.free_pages < self.model.low + self.model.boost)

    @rule(count=st.integers(1, 600), order=st.integers(0, 2), mt=types)
    def take_many(self, count: int, order: int, mt: int) -> None:
        for _ in range(count):
            self.take(order, buddy.RIGHTS_MIN, mt)

    @rule()
    def take_all_there_is(self) -> None:
        before = len(self.model.allocated)
        self.take_many(self.model.free_pages, 0, MOVABLE)
        for pfn in sorted(self.model.allocated)[before::2]:
            self.enlist(pfn)

    def enlist(self, pfn: int) -> None:
        if pfn not in self.model.listed:
            self.arena.lru.add(pfn)
            self.model.listed.add(pfn)

    @precondition(lambda self: self.model.allocated)
    @rule(every=st.integers(1, 3))
    def enlist_many(self, every: int) -> None:
        for pfn in sorted(self.model.allocated)[::every]:
            self.enlist(pfn)

    def _put(self, pfn: int) -> None:
        assert buddy.put_page(*self.arena.buddy, pfn) == buddy.FREED
        self.model.give_back(pfn)

    @precondition(lambda self: self.model.allocated)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        self._put(data.draw(st.sampled_from(sorted(self.model.allocated))))

    @precondition(lambda self: self.model.allocated)
    @rule(every=st.integers(1, 40), offset=st.integers(0, 5))
    def give_back_many(self, every: int, offset: int) -> None:
        for pfn in sorted(self.model.allocated)[offset::every]:
            self._put(pfn)

    @rule(mt=types)
    def release_the_reserve(self, mt: int) -> None:
        zone.release_reserve(*self.arena.buddy, mt)
        self.model.release(mt)

    @rule()
    def make_good_the_boost(self) -> None:
        assert zone.take_boost(self.arena.words) == self.model.boost
        self.model.boost = 0

    @invariant()
    def same_lists(self) -> None:
        model, words = self.model, self.arena.words
        assert lists(self.arena) == {key: pfns for key, pfns in model.lists.items() if pfns}
        assert zone.block_types(words).tolist() == model.types
        assert words[W_FREE] == model.free_pages
        assert words[[W_BOOST, W_HIGHATOMIC]].tolist() == [model.boost, model.reserved]
        assert words[[W_CLAIMED, W_STOLEN]].tolist() == [model.claimed, model.stolen]
        assert merged_blocks([words]) == model.merged
        self.arena.check()

    def teardown(self) -> None:
        for pfn in list(self.model.allocated):
            self._put(pfn)
        zone.release_reserve(*self.arena.buddy, MOVABLE)
        self.arena.check()
        assert self.arena.free_pages == self.arena.nr_pages - 1
        self.arena.close()


BuddyMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=12,
    deadline=None,
    derandomize=True,
    phases=(Phase.reuse, Phase.generate),  # a state is large: to shrink it takes minutes
)
TestBuddy = pytest.mark.compiled(BuddyMachine.TestCase)


def take(arena: Arena, order: int) -> int:
    pfn = arena.try_alloc_folio(order, NOWAIT)
    assert pfn is not None
    return pfn


def test_a_fresh_arena_is_one_run_of_largest_blocks(arena: Arena) -> None:
    assert lists(arena) == {(MOVABLE, order): [1 << order] for order in range(ORDERS)}
    assert arena.free_pages == 2047


@pytest.mark.parametrize("pages", [2049, 3000, 4097])
def test_a_ragged_arena_tiles_completely(pages: int) -> None:
    arena = Arena(pages * 4096)
    arena.check()
    assert arena.free_pages == pages - 1
    arena.close()


def test_an_allocated_block_is_marked_and_found_from_its_tails(arena: Arena) -> None:
    pfn = take(arena, 3)
    assert arena.pages.flags[pfn] & HEAD
    assert (arena.pages.flags[pfn + 1 : pfn + 8] == TAIL).all()
    assert {arena.folio_head(page) for page in range(pfn, pfn + 8)} == {pfn}
    assert arena.pages.refs[pfn] == 1
    arena.put_folio(pfn)


def test_references_keep_a_folio(arena: Arena) -> None:
    pfn = take(arena, 2)
    arena.get_folio(pfn)
    assert arena.try_get_folio(pfn)
    assert not arena.put_folio(pfn)
    assert not arena.put_folio(pfn)
    assert arena.put_folio(pfn)
    assert not arena.try_get_folio(pfn)


def test_mistakes_are_noticed(arena: Arena) -> None:
    pfn = take(arena, 1)
    for wrong in (0, pfn + 1):
        with pytest.raises(AssertionError, match="not the head"):
            arena.put_folio(wrong)
    arena.pages.flags[pfn] |= DIRTY
    with pytest.raises(AssertionError, match="freed with flags"):
        arena.put_folio(pfn)
    arena.pages.flags[pfn] &= ~np.uint32(DIRTY)
    arena.put_folio(pfn)
    with pytest.raises(AssertionError, match="not the head"):
        arena.put_folio(pfn)
    with pytest.raises(AssertionError, match="not the head"):
        arena.get_folio(pfn)


def test_the_last_put_takes_a_folio_off_the_lru(arena: Arena) -> None:
    pfn = take(arena, 1)
    arena.lru.add(pfn)
    assert arena.lru.nr_inactive == 2
    assert arena.put_folio(pfn)
    assert arena.lru.nr_inactive == 0
    assert not arena.pages.flags[pfn] & LRU


def test_check_finds_a_broken_list(arena: Arena) -> None:
    head = int(arena.words[W_FREE_HEAD + (MOVABLE << FREE_SHIFT)])
    arena.pages.order[head] = 1
    with pytest.raises(AssertionError, match="order of free block"):
        arena.check()
    arena.pages.order[head] = 0
