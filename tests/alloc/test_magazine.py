"""Magazines against a naive twin: a stack that is loaded and unloaded by half."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alloc import buddy, magazine, rows
from alloc.arena import SLAB_SIZES, Arena
from alloc.gfp import NOWAIT
from alloc.page import (
    MAGAZINE_WORDS,
    P_LOCK,
    P_MAGAZINES,
    ROW_WORDS,
    W_FREE,
    W_LOW,
    W_ROWS,
    W_WAITERS,
    Z_COUNT,
    Z_OBJECTS,
)

NR_ROWS = 2
SIZES = (32, 512, 4096)


def void(size: int) -> np.dtype:
    return np.dtype((np.void, size))


def content(arena: Arena, row: int, cache: int) -> list[int]:
    """Objects in a magazine, the next to be taken last."""
    at = W_ROWS + row * ROW_WORDS + P_MAGAZINES + cache * MAGAZINE_WORDS
    n = int(arena.words[at + Z_COUNT])
    return arena.words[at + Z_OBJECTS : at + Z_OBJECTS + n].tolist()


def alloc(arena: Arena, row: int, cache: int) -> int:
    return int(magazine.slab_alloc(*arena.slabs, arena.mem, cache, buddy.RIGHTS_MIN, row))


def free(arena: Arena, row: int, cache: int, i: int) -> int:
    return int(magazine.slab_free(*arena.slabs, cache, i, row))


def test_limits_are_even_and_hold_no_more_than_two_pages() -> None:
    limits = [rows.magazine_limit(size) for size in SLAB_SIZES]
    assert limits == [14, 14, 14, 14, 14, 8, 4, 2]


class MagazineMachine(RuleBasedStateMachine):
    """Objects of three caches that two rows take and give, each written full by its holder."""

    @initialize()
    def begin(self) -> None:
        self.arena = Arena(8 << 20)
        self.arena.set_lanes(NR_ROWS - 1)
        self.slabs = [self.arena.slab(f"s{size}", void(size)) for size in SIZES]
        self.limits = [rows.magazine_limit(size) for size in SIZES]
        self.model = {(row, cache): [] for row in range(NR_ROWS) for cache in range(len(SIZES))}
        self.used: set[tuple[int, int]] = set()
        self.held: list[tuple[int, int]] = []

    caches, row_numbers = st.integers(0, len(SIZES) - 1), st.integers(0, NR_ROWS - 1)

    @rule(row=row_numbers, cache=caches, count=st.integers(1, 60))
    def take(self, row: int, cache: int, count: int) -> None:
        arena, stack = self.arena, self.model[row, cache]
        for _ in range(count):
            i = abs(alloc(arena, row, cache))
            if i == buddy.WOULD_BLOCK:  # whoever waits comes before a new slab
                assert arena.words[W_WAITERS]
                assert not stack
                return
            if stack:
                assert i == stack.pop()
            else:
                stack += content(arena, row, cache)
                assert len(stack) < self.limits[cache] // 2
            assert (cache, i) not in self.held
            body = arena.mem[self.slabs[cache].addr(i) :][: SIZES[cache]]
            assert not body.any()
            body[:] = 0xEE
            self.held.append((cache, i))
            self.used.add((row, cache))

    @precondition(lambda self: self.held)
    @rule(row=row_numbers, every=st.integers(1, 4), newest=st.booleans())
    def give_back(self, row: int, every: int, newest: bool) -> None:
        for one in self.held[::-every] if newest else self.held[::every]:
            self.held.remove(one)
            cache, i = one
            stack = self.model[row, cache]
            if len(stack) == self.limits[cache]:
                del stack[: len(stack) // 2]
            stack.append(i)
            short = self.arena.words[W_FREE] < self.arena.words[W_LOW]
            waiting = bool(self.arena.words[W_WAITERS])
            if short or waiting:
                stack.clear()
            code = buddy.FREED_AND_WAITERS if waiting else buddy.FREED
            assert free(self.arena, row, cache, i) == code
            self.used.add((row, cache))

    @rule(waiters=st.integers(0, 1))
    def wait(self, waiters: int) -> None:
        self.arena.words[W_WAITERS] = waiters

    @rule(short=st.booleans())
    def memory_is_short(self, short: bool) -> None:
        self.arena.words[W_LOW] = self.arena.nr_pages if short else self.arena.marks.low

    @rule(wholesale=st.booleans())
    def drain(self, wholesale: bool) -> None:
        if wholesale:
            self.arena.drain_all()
        else:
            self.arena.refresh_rows()
        for key, stack in self.model.items():
            if wholesale or key not in self.used:
                stack.clear()
        self.used.clear()

    @invariant()
    def same_magazines(self) -> None:
        for (row, cache), stack in self.model.items():
            assert content(self.arena, row, cache) == stack
        for cache, slab in enumerate(self.slabs):
            assert slab.nr_objects == sum(c == cache for c, _ in self.held)
        self.arena.check()

    def teardown(self) -> None:
        self.arena.words[W_WAITERS] = 0
        for cache, i in self.held:
            free(self.arena, 0, cache, i)
        self.arena.drain_all()
        assert self.arena.words[W_FREE] == self.arena.nr_pages - 1
        self.arena.check()
        self.arena.close()


MagazineMachine.TestCase.settings = settings(
    max_examples=20, stateful_step_count=12, deadline=None, derandomize=True
)
TestMagazines = MagazineMachine.TestCase


def test_a_double_free_in_two_rows_is_found_when_it_comes_home(arena: Arena) -> None:
    arena.set_lanes(1)
    cache = arena.slab("objects", void(64)).number
    i = alloc(arena, 0, cache)
    assert free(arena, 0, cache, i) == buddy.FREED
    assert free(arena, 1, cache, i) == buddy.FREED
    with pytest.raises(AssertionError, match="lies there twice"):
        arena.check()
    with pytest.raises(AssertionError, match="was free already"):
        arena.drain_all()


async def test_what_lies_in_magazines_is_there_for_who_waits(arena: Arena) -> None:
    """The last pages are slabs whose objects are free, but in a lane's magazine."""
    slab = arena.slab("objects", void(2048))
    arena.set_lanes(1)
    held = [alloc(arena, 1, slab.number) for _ in range(4)]
    for i in held:
        free(arena, 1, slab.number, i)
    assert slab.nr_slabs == 2
    assert slab.nr_objects == 0
    folios = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT)) is not None:
        folios.append(pfn)
    for _ in range(2):
        folios.append(await arena.alloc_folio(0))
    assert slab.nr_slabs == 0
    for pfn in folios:
        arena.put_folio(pfn)


def test_a_refresh_leaves_a_row_alone_that_is_at_work(arena: Arena) -> None:
    slab = arena.slab("objects", void(64))
    i = slab.try_alloc(NOWAIT) or 0
    slab.free(i)
    arena.refresh_rows()
    arena.words[W_ROWS + P_LOCK] = 1
    arena.refresh_rows()
    assert content(arena, 0, slab.number)
    arena.words[W_ROWS + P_LOCK] = 0
    arena.refresh_rows()
    assert not content(arena, 0, slab.number)
    assert slab.nr_slabs == 0
