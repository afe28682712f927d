"""Rows' lists: their sizes against golden values, their behaviour against a naive twin."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from alloc import buddy, pcp, rows
from alloc.arena import Arena
from alloc.gfp import NOWAIT
from alloc.page import (
    MIGRATETYPES,
    ORDER_MAX,
    P_ALLOC_FACTOR,
    P_COUNT,
    P_FREE_COUNT,
    P_HIGH,
    P_LISTS,
    P_LOCK,
    P_PGFREE,
    PCP,
    ROW_WORDS,
    ROWS,
    W_BLOCK_ORDER,
    W_BLOCK_TYPES,
    W_FREE,
    W_HIGH,
    W_KSWAPD,
    W_ROWS,
    W_WAITERS,
)
from alloc.watermarks import watermarks
from alloc.zoneinfo import free_blocks

# MiB, batch, high_min with four rows
GOLDEN = ((16, 1, 40), (64, 3, 80), (256, 15, 160), (1024, 63, 321))
HIGH_ORDERS = 3


@pytest.mark.parametrize(("mib", "batch", "high_min"), GOLDEN)
def test_sizes_are_the_kernels(mib: int, batch: int, high_min: int) -> None:
    pages = mib << 8
    assert rows.batch_size(pages) == batch
    assert rows.high_bounds(pages, watermarks(pages).low, 4) == (high_min, pages // 32)


def test_bounds_of_many_rows_leave_room_for_four_batches() -> None:
    assert rows.high_bounds(2048, watermarks(2048).low, ROWS) == (6, 15)
    assert rows.high_bounds(262144, 100, ROWS) == (252, 1927)


def block_type(arena: Arena, pfn: int) -> int:
    words = arena.words
    return int(words[W_BLOCK_TYPES + (pfn >> int(words[W_BLOCK_ORDER]))])


class NaiveRow:
    """One row, its lists as Python's, newest last; the formulas once more."""

    def __init__(self, arena: Arena, batch: int, least: int, most: int) -> None:
        self.arena, self.batch, self.least, self.most = arena, batch, least, most
        self.lists: dict[tuple[int, int], list[int]] = {}
        self.high = self.factor = self.free_count = 0
        self.last_was_large = False

    @property
    def count(self) -> int:
        return sum(len(blocks) << order for (order, _), blocks in self.lists.items())

    def bounded_high(self) -> int:
        return min(max(self.high, self.least), self.most)

    def refill_size(self, order: int) -> int:
        """Blocks wanted from the buddy."""
        words = self.arena.words
        self.high = self.bounded_high()
        n = self.batch if order else self.batch << self.factor
        if words[W_FREE] >= words[W_HIGH]:
            self.high = min(self.high + n, self.most)
        if not order:
            room = max(self.high - self.count - self.batch, self.batch)
            if n <= room:
                self.factor = min(self.factor + 1, 5)
            n = min(n, room)
        n = n if n == 1 else max(n >> order, 2)
        return max(n, min(16, self.high - self.count) >> order)

    def there(self, order: int, mt: int) -> bool:
        """Whether the buddy has a block so large for the type."""
        return any(free_blocks(self.arena.words, mt)[order:])

    def freed(self, order: int, mt: int) -> None:
        """After a block was put on its list."""
        words = self.arena.words
        self.factor //= 2
        crowded = bool(order) and self.last_was_large
        crowded = crowded and self.free_count >= self.batch + self.least // 2
        self.last_was_large = bool(order)
        if self.free_count < self.batch * 32:
            self.free_count += 1 << order
        limit = self.bounded_high()
        less = max(limit - max(self.free_count, self.batch), self.least)
        if crowded:
            self.high, limit = max(limit - self.batch * 32, self.least), 0
        elif words[W_KSWAPD]:
            self.high, limit = less, min(4 * self.batch, less)
        elif words[W_FREE] < words[W_HIGH]:
            self.high, limit = less, max(self.count, self.least)
        else:
            self.high = limit
            if self.count >= limit:
                self.high = min(max(limit, self.free_count + self.batch), self.most)
        if self.count < limit:
            return
        some = max(min(self.free_count, limit - self.batch), self.batch)
        self.give(min(self.count, self.batch * 32) if crowded else some, order, mt)

    def give(self, pages: int, order: int, mt: int) -> None:
        """Blocks go to the buddy, oldest first, of this list and then of those behind it."""
        keys = [(o, t) for o in range(HIGH_ORDERS + 1) for t in range(MIGRATETYPES)]
        first = keys.index((order, mt))
        for key in keys[first:] + keys[:first]:
            blocks = self.lists.get(key, [])
            while pages > 0 and blocks:
                blocks.pop(0)
                pages -= 1 << key[0]

    def decay(self) -> None:
        if not self.count:
            return
        if self.high > self.least:
            shrunk = self.high - self.high // 8
            self.high = max(self.count - self.batch * 32, shrunk, self.least)
        self.give(self.count - self.high, 0, 0)


def listed(arena: Arena, row: int, order: int, mt: int) -> list[int]:
    """Blocks on a list, oldest first."""
    at = W_ROWS + row * ROW_WORDS + P_LISTS + 2 * (order * MIGRATETYPES + mt)
    found, pfn = [], int(arena.words[at])
    while pfn:
        found.append(pfn)
        pfn = int(arena.pages.lru_next[pfn])
    return found[::-1]


class RowMachine(RuleBasedStateMachine):
    """Two rows that take and give blocks of every type and order, under changing conditions."""

    @initialize(mib=st.sampled_from((16, 64, 256)))
    def begin(self, mib: int) -> None:
        self.arena = Arena(mib << 20)
        self.arena.set_lanes(1)
        pages = self.arena.nr_pages
        sizes = rows.batch_size(pages), *rows.high_bounds(pages, self.arena.marks.low, 2)
        self.rows = [NaiveRow(self.arena, *sizes) for _ in range(2)]
        self.held: list[tuple[int, int]] = []
        self.free = pages - 1

    orders, types = st.integers(0, 5), st.integers(0, MIGRATETYPES - 1)

    @rule(row=st.integers(0, 1), order=orders, mt=types, count=st.integers(1, 400))
    def take(self, row: int, order: int, mt: int, count: int) -> None:
        for _ in range(count):
            if not self._take_one(row, order, mt):
                return

    def _take_one(self, row: int, order: int, mt: int) -> bool:
        model, words = self.rows[row], self.arena.words
        passes = words[W_FREE] - ((1 << order) - 1) > self.arena.marks.min
        passes = bool(passes and not words[W_WAITERS])
        blocks = model.lists.setdefault((order, mt), [])
        wanted = 0
        if passes and order <= HIGH_ORDERS:
            model.free_count //= 2
            wanted = 0 if blocks else model.refill_size(order)
        passes = passes and bool(blocks or any(model.there(order, t) for t in range(MIGRATETYPES)))
        got = abs(pcp.alloc_block(*self.arena.buddy, row, order, mt << buddy.MT_SHIFT))
        assert bool(got) == passes
        if got and blocks and order <= HIGH_ORDERS:
            assert got == blocks.pop()
        elif got and order <= HIGH_ORDERS:
            blocks += listed(self.arena, row, order, mt)
            taken = len(blocks) + 1
            enough = words[W_FREE] - (1 << order) < words[W_HIGH] or not model.there(order, mt)
            assert taken == wanted or (taken < wanted and enough)
        if got:
            self.held.append((got, order))
        return bool(got)

    @precondition(lambda self: self.held)
    @rule(row=st.integers(0, 1), every=st.integers(1, 3), newest=st.booleans())
    def put(self, row: int, every: int, newest: bool) -> None:
        some = self.held[::-every] if newest else self.held[::every]
        for block in some:
            self.held.remove(block)
            pfn, order = block
            mt = block_type(self.arena, pfn)
            words, model = self.arena.words, self.rows[row]
            short = words[W_FREE] < self.arena.marks.low or words[W_WAITERS]
            if order <= HIGH_ORDERS and not short:
                model.lists.setdefault((order, mt), []).append(pfn)
                model.freed(order, mt)
            waiting = int(words[W_WAITERS])
            code = pcp.put_block(*self.arena.buddy, row, pfn)
            assert code == (buddy.FREED_AND_WAITERS if waiting else buddy.FREED)

    @rule(works=st.booleans())
    def kswapd(self, works: bool) -> None:
        self.arena.words[W_KSWAPD] = works

    @rule(waiters=st.integers(0, 1))
    def wait(self, waiters: int) -> None:
        self.arena.words[W_WAITERS] = waiters

    @rule()
    def drain(self) -> None:
        self.arena.drain_all()
        for model in self.rows:
            model.lists.clear()

    @rule(seconds=st.integers(1, 20))
    def refresh(self, seconds: int) -> None:
        for _ in range(seconds):
            self.arena.refresh_rows()
            for model in self.rows:
                model.decay()

    @invariant()
    def same_rows(self) -> None:
        arena, words = self.arena, self.arena.words
        for row, model in enumerate(self.rows):
            at = W_ROWS + row * ROW_WORDS
            for (order, mt), blocks in model.lists.items():
                assert listed(arena, row, order, mt) == blocks
            assert words[at + P_COUNT] == model.count
            assert words[at + P_HIGH] == model.high
            assert words[at + P_ALLOC_FACTOR] == model.factor
            assert words[at + P_FREE_COUNT] == model.free_count
        held = sum(1 << order for _, order in self.held)
        assert arena.free_pages + held == arena.nr_pages - 1
        assert arena.vmstat["pgalloc_normal"] - arena.vmstat["pgfree"] == held
        arena.check()

    def teardown(self) -> None:
        self.arena.words[W_WAITERS] = 0
        for pfn, _ in self.held:
            pcp.put_block(*self.arena.buddy, 0, pfn)
        self.arena.drain_all()
        assert self.arena.words[W_FREE] == self.arena.nr_pages - 1
        self.arena.check()
        self.arena.close()


RowMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, derandomize=True
)
TestRows = RowMachine.TestCase


def take(arena: Arena, order: int = 0) -> int:
    pfn = arena.try_alloc_folio(order, NOWAIT)
    assert pfn is not None
    return pfn


def test_a_freed_page_is_the_next_to_be_taken_and_not_the_buddys(arena: Arena) -> None:
    pfn, other = take(arena), take(arena)
    free = int(arena.words[W_FREE])
    arena.put_folio(pfn)
    assert arena.words[W_FREE] == free
    assert arena.vmstat["nr_pcp_pages"] == arena.free_pages - free
    assert arena.pages.flags[pfn] == PCP
    assert not arena.try_get_folio(pfn)
    with pytest.raises(AssertionError, match="not the head"):
        arena.put_folio(pfn)
    assert take(arena) == pfn
    arena.put_folio(pfn)
    arena.put_folio(other)


def test_whoever_finds_the_row_locked_asks_the_buddy(arena: Arena) -> None:
    pfn = take(arena)
    lock, free = W_ROWS + P_LOCK, int(arena.words[W_FREE])
    arena.words[lock] = 1
    arena.put_folio(pfn)
    assert arena.words[W_FREE] == free + 1
    pfn = take(arena)
    assert arena.words[W_FREE] == free
    arena.put_folio(pfn)
    arena.words[lock] = 0


def test_rows_do_not_share_the_lines_of_descriptors() -> None:
    """Not where a refill by the formula is one page, either."""
    arena = Arena(16 << 20)
    arena.set_lanes(2)
    assert all(array.ctypes.data % 64 == 0 for array in (*arena.pages, arena.words))
    pfns = [abs(pcp.alloc_block(*arena.buddy, row, 0, buddy.RIGHTS_MIN)) for row in range(3)]
    assert len({pfn // 16 for pfn in pfns}) == 3
    for row, pfn in enumerate(pfns):
        pcp.put_block(*arena.buddy, row, pfn)
    arena.check()
    arena.close()


def test_below_low_everything_goes_to_the_buddy(arena: Arena) -> None:
    held = []
    while arena.words[W_FREE] >= arena.marks.low:
        held.append(take(arena))
    arena.put_folio(held.pop())
    assert arena.words[W_FREE] == arena.marks.low
    arena.put_folio(held.pop())
    assert arena.words[W_FREE] == arena.marks.low
    assert arena.free_pages == arena.marks.low + 1
    for pfn in held:
        arena.put_folio(pfn)


async def test_a_large_block_is_not_withheld_by_lists(arena: Arena) -> None:
    """Every page was freed, but each into a list; a request that waits gets what it needs."""
    held = [take(arena) for _ in range(arena.nr_pages - 1 - arena.marks.min)]
    for pfn in sorted(held):
        arena.put_folio(pfn)
    assert arena.vmstat["nr_pcp_pages"] > 64
    assert arena.try_alloc_folio(ORDER_MAX, NOWAIT) is None
    pfn = await arena.alloc_folio(ORDER_MAX)
    assert arena.vmstat["drain_all_pages"] == 1
    arena.put_folio(pfn)


def test_check_finds_a_block_that_is_listed_wrongly(arena: Arena) -> None:
    pfn = take(arena)
    arena.put_folio(pfn)
    arena.pages.refs[pfn] = 1
    with pytest.raises(AssertionError, match="has references"):
        arena.check()
    arena.pages.refs[pfn] = 0
    arena.words[W_ROWS + P_COUNT] += 1
    listed = arena.vmstat["nr_pcp_pages"]
    with pytest.raises(AssertionError, match=f"free, {listed} in rows, 0 allocated"):
        arena.check()
    arena.words[W_ROWS + P_PGFREE] += 1
    with pytest.raises(AssertionError, match="pages of row 0"):
        arena.check()
    arena.words[W_ROWS + P_COUNT] -= 1
    arena.words[W_ROWS + P_PGFREE] -= 1
