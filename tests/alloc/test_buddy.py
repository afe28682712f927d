"""The page allocator against a set model, and the mistakes it must notice."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from alloc import buddy
from alloc.arena import Arena
from alloc.gfp import NOWAIT
from alloc.page import BUDDY, DIRTY, HEAD, LRU, ORDERS, TAIL, W_FREE_HEAD
from tests.alloc.naive import NaiveBuddy

MARKS = {buddy.RIGHTS_MIN: 1, buddy.RIGHTS_HALF: 2, buddy.RIGHTS_ALL: 0}


def free_blocks(arena: Arena) -> set[tuple[int, int]]:
    heads = np.flatnonzero(arena.pages.flags & BUDDY)
    return {(int(pfn), int(arena.pages.order[pfn])) for pfn in heads}


class BuddyMachine(RuleBasedStateMachine):
    """Random allocations and frees, followed by the model block by block."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(8 << 20)
        self.model = NaiveBuddy(self.arena.nr_pages, self.arena.marks.low, self.arena.marks.min)

    @rule(order=st.integers(0, 10), rights=st.sampled_from(sorted(MARKS)))
    def take(self, order: int, rights: int) -> None:
        mark = self.model.min // MARKS[rights] if MARKS[rights] else 0
        got = buddy.alloc_pages(*self.arena.buddy, order, rights)
        assert (got != 0) == self.model.may_take(order, mark)
        if got:
            self.model.took(abs(got), order)
            assert (got < 0) == (self.model.free_pages < self.model.low)

    @rule(count=st.integers(1, 600))
    def take_many_single_pages(self, count: int) -> None:
        for _ in range(count):
            self.take(0, buddy.RIGHTS_MIN)

    @precondition(lambda self: self.model.allocated)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        pfn = data.draw(st.sampled_from(sorted(self.model.allocated)))
        assert buddy.put_page(*self.arena.buddy, pfn) == buddy.FREED
        self.model.gave_back(pfn)

    @precondition(lambda self: self.model.allocated)
    @rule(every=st.integers(1, 3))
    def give_back_many(self, every: int) -> None:
        for pfn in sorted(self.model.allocated)[::every]:
            assert buddy.put_page(*self.arena.buddy, pfn) == buddy.FREED
            self.model.gave_back(pfn)

    @invariant()
    def same_free_blocks(self) -> None:
        assert free_blocks(self.arena) == self.model.free
        assert self.arena.free_pages == self.model.free_pages

    def teardown(self) -> None:
        self.arena.check()
        for pfn in list(self.model.allocated):
            self.arena.put_folio(pfn)
        self.arena.check()
        assert self.arena.free_pages == self.arena.nr_pages - 1
        self.arena.close()


BuddyMachine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, derandomize=True
)
TestBuddy = BuddyMachine.TestCase


def take(arena: Arena, order: int) -> int:
    pfn = arena.try_alloc_folio(order, NOWAIT)
    assert pfn is not None
    return pfn


def test_a_fresh_arena_is_one_run_of_largest_blocks(arena: Arena) -> None:
    assert free_blocks(arena) == {(1 << order, order) for order in range(ORDERS)}
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
    head = int(arena.words[W_FREE_HEAD])
    arena.pages.order[head] = 1
    with pytest.raises(AssertionError, match="order of free block"):
        arena.check()
    arena.pages.order[head] = 0
