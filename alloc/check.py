"""The arena's validator: every list against every descriptor, and the counts against both.

For tests and for a look at a stopped arena; costs about 1 us a page. It reads without locks, so
nothing may be allocating meanwhile. Raises AssertionError with the first contradiction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alloc.page import (
    ACTIVE,
    BUDDY,
    FREE_SHIFT,
    HEAD,
    HIGHATOMIC,
    LRU,
    LRU_HEAD,
    LRU_PAGES,
    LRU_STRIDE,
    LRU_TAIL,
    MAGAZINE_WORDS,
    MIGRATETYPES,
    ORDERS,
    P_COUNT,
    P_LISTS,
    P_LOCK,
    P_MAGAZINES,
    PAGE_SIZE,
    PCP,
    PCP_ORDERS,
    RESERVED,
    ROW_WORDS,
    ROWS,
    S_LIMIT,
    S_LOCK,
    S_OBJECTS,
    S_PARTIAL,
    S_SLABS,
    SLAB,
    SLAB_WORDS,
    TAIL,
    TYPES,
    W_BLOCK_ORDER,
    W_BOOST,
    W_BOOST_MAX,
    W_BUDDY_LOCK,
    W_END,
    W_FREE,
    W_FREE_HEAD,
    W_FREE_HIGHATOMIC,
    W_FREE_ORDERS,
    W_FREE_TAIL,
    W_HIGHATOMIC,
    W_LOWEST,
    W_LRU,
    W_LRU_LOCK,
    W_NR_FREE,
    W_PGALLOC,
    W_PGFREE,
    W_ROWS,
    W_SLAB,
    W_START,
    Z_COUNT,
    Z_OBJECTS,
    Words,
)
from alloc.rows import nr_pages_listed, pages_given_back, pages_handed_out
from alloc.zone import block_types

if TYPE_CHECKING:
    from alloc.arena import Arena, Slab


def check(arena: Arena) -> None:
    """Everything. See `Arena.check`."""
    free: dict[int, int] = {}
    listed: set[int] = set()
    allocated = 0
    for words in arena.nodes:
        assert int(words[W_BUDDY_LOCK]) == 0, "the buddy lock is held"
        assert int(words[W_LRU_LOCK]) == 0, "the LRU lock is held"
        allocated += _check_sum(words)
        _check_zone(words)
        free |= _check_free_lists(arena, words)
        listed |= _check_rows(arena, words)
        _check_lru(arena, words)
    _check_pages(arena, free, listed)
    _check_deferred(arena, allocated)
    _check_vmalloc(arena)
    for slab in arena.slab_caches:
        for words in arena.nodes:
            _check_slab(arena, words, slab)
            _check_magazines(arena, words, slab)


def _check_sum(words: Words) -> int:
    """free + on rows' lists + allocated = all pages of a node, by the counters; the last."""
    taken = int(words[W_PGALLOC]) + pages_handed_out(words)
    given = int(words[W_PGFREE]) + pages_given_back(words)
    parts = int(words[W_FREE]), nr_pages_listed(words), taken - given
    pages = int(words[W_END]) - max(int(words[W_START]), 1)
    assert sum(parts) == pages, "{} free, {} in rows, {} allocated".format(*parts)
    return taken - given


def _check_deferred(arena: Arena, allocated: int) -> None:
    """What waits for a grace period is counted, and allocated still."""
    deferred = arena.rcu.deferred_bytes
    assert deferred == arena.rcu.pending_bytes(), "bytes that wait for a grace period"
    assert deferred <= allocated * PAGE_SIZE, f"{deferred} bytes deferred were freed already"


def _check_vmalloc(arena: Arena) -> None:
    """Areas show allocated pages, each once, and nobody else has a reference."""
    shown = arena.vmalloc.shown()
    assert len(set(shown)) == len(shown) == arena.vmalloc.nr_pages, "a page is shown twice"
    for pfn in shown:
        assert int(arena.pages.flags[pfn]) == HEAD, f"page {pfn} is shown: it has other flags"
        order, refs = int(arena.pages.order[pfn]), int(arena.pages.refs[pfn])
        assert (order, refs) == (0, 1), f"page {pfn} is shown: order {order}, {refs} references"


def _walk(arena: Arena, head: int, what: str) -> list[int]:
    """The pfns of a doubly linked list, with its back links checked."""
    found: list[int] = []
    before, pfn = 0, head
    while pfn:
        assert len(found) < arena.nr_pages, f"{what}: the list has a cycle"
        assert int(arena.pages.lru_prev[pfn]) == before, f"{what}: back link of {pfn}"
        found.append(pfn)
        before, pfn = pfn, int(arena.pages.lru_next[pfn])
    return found


def _check_free_lists(arena: Arena, words: Words) -> dict[int, int]:
    """Free blocks of a node by pfn with their order."""
    free: dict[int, int] = {}
    of_type: dict[int, int] = {}
    for mt in range(TYPES):
        for order in range(ORDERS):
            blocks = _check_free_list(arena, words, mt, order)
            free.update(dict.fromkeys(blocks, order))
            of_type.update(dict.fromkeys(blocks, mt))
    for pfn, order in free.items():
        near = pfn ^ 1 << order
        if order < ORDERS - 1 and free.get(near) == order:
            apart = of_type[pfn] != of_type[near] and HIGHATOMIC in (of_type[pfn], of_type[near])
            assert apart, f"free block {pfn} of order {order} and its buddy are not merged"
    assert all(pfn >= int(words[W_LOWEST]) for pfn in free), "a free block below W_LOWEST"
    total = sum(1 << order for order in free.values())
    assert total == int(words[W_FREE]), f"{total} pages on lists, {int(words[W_FREE])} counted"
    kept = sum(1 << order for pfn, order in free.items() if of_type[pfn] == HIGHATOMIC)
    assert kept == int(words[W_FREE_HIGHATOMIC]), "free pages of the high-atomic reserve"
    return free


def _check_free_list(arena: Arena, words: Words, mt: int, order: int) -> list[int]:
    """One list, and that its blocks lie in pageblocks of its type."""
    pages, start = arena.pages, int(words[W_START])
    at = (mt << FREE_SHIFT) + order
    name = f"free list {order} of type {mt}"
    blocks = _walk(arena, int(words[W_FREE_HEAD + at]), name)
    assert len(blocks) == int(words[W_NR_FREE + at]), f"count of {name}"
    assert not blocks or blocks[-1] == int(words[W_FREE_TAIL + at]), f"tail of {name}"
    assert bool(blocks) == bool(int(words[W_FREE_ORDERS + mt]) >> order & 1), f"bit of {name}"
    for pfn in blocks:
        assert pfn % (1 << order) == 0, f"free block {pfn} of order {order} is not aligned"
        assert int(pages.flags[pfn]) == BUDDY, f"flags of free block {pfn}"
        assert int(pages.order[pfn]) == order, f"order of free block {pfn}"
        assert start <= pfn < int(words[W_END]), f"free block {pfn} is of another node"
        types = block_types(words)[pfn - start >> int(words[W_BLOCK_ORDER]) :]
        within = max(1 << order >> int(words[W_BLOCK_ORDER]), 1)
        assert (types[:within] == mt).all(), f"free block {pfn} is on the list of type {mt}"
    return blocks


def _check_zone(words: Words) -> None:
    """The boost, and the size of the high-atomic reserve."""
    assert 0 <= int(words[W_BOOST]) <= int(words[W_BOOST_MAX]), "the boost"
    types = block_types(words)
    assert ((types >= 0) & (types < TYPES)).all(), "a pageblock without type"
    reserved = int(np.count_nonzero(types == HIGHATOMIC)) << int(words[W_BLOCK_ORDER])
    assert reserved == int(words[W_HIGHATOMIC]), "pages of the high-atomic reserve"


def _check_rows(arena: Arena, words: Words) -> set[int]:
    """Blocks on the lists of a node's rows."""
    pages, span = arena.pages, range(int(words[W_START]), int(words[W_END]))
    listed: set[int] = set()
    for row in range(ROWS):
        at = W_ROWS + row * ROW_WORDS
        assert int(words[at + P_LOCK]) == 0, f"the lock of row {row} is held"
        total = 0
        for index in range(PCP_ORDERS * MIGRATETYPES):
            where, order = at + P_LISTS + 2 * index, index // MIGRATETYPES
            before, pfn = 0, int(words[where])
            while pfn:
                what = f"block {pfn} on list {index} of row {row}"
                assert pfn not in listed, f"{what} is listed twice"
                assert pfn in span, f"{what} is of another node"
                assert int(pages.flags[pfn]) == PCP, f"{what}: flags"
                assert int(pages.order[pfn]) == order, f"{what}: order"
                assert int(pages.refs[pfn]) == 0, f"{what} has references"
                assert before == 0 or int(pages.lru_prev[pfn]) == before, f"{what}: back link"
                listed.add(pfn)
                total += 1 << order
                before, pfn = pfn, int(pages.lru_next[pfn])
            assert before == int(words[where + 1]), f"tail of list {index} of row {row}"
        assert total == int(words[at + P_COUNT]), f"pages of row {row}"
    return listed


def _check_pages(arena: Arena, free: dict[int, int], listed: set[int]) -> None:
    """Blocks, free, on rows' lists and allocated, tile the arena."""
    pages = arena.pages
    assert int(pages.flags[0]) == RESERVED
    pfn = 1
    while pfn < arena.nr_pages:
        flags, order = int(pages.flags[pfn]), int(pages.order[pfn])
        if pfn in free:
            assert not pages.flags[pfn + 1 : pfn + (1 << order)].any(), f"in free block {pfn}"
        else:
            used = pfn not in listed
            what = f"page {pfn} with flags {flags:#x}"
            assert flags & HEAD or not used, f"{what} belongs to no block"
            assert not flags & (BUDDY | TAIL), what
            assert not used or int(pages.refs[pfn]) > 0, f"{what} is allocated without a reference"
            tails = slice(pfn + 1, pfn + (1 << order))
            assert (pages.flags[tails] == TAIL).all(), f"tails of block {pfn}"
            assert (pages.order[tails] == order).all(), f"orders in block {pfn}"
        pfn += 1 << order
    assert pfn == arena.nr_pages


def _check_lru(arena: Arena, words: Words) -> None:
    """Both lists of a node hold exactly its folios with LRU, each the ones its ACTIVE says."""
    pages, span = arena.pages, range(int(words[W_START]), int(words[W_END]))
    listed = 0
    for active in (0, 1):
        at = W_LRU + active * LRU_STRIDE
        folios = _walk(arena, int(words[at + LRU_HEAD]), ("inactive list", "active list")[active])
        assert (folios[-1] if folios else 0) == int(words[at + LRU_TAIL]), "tail of an LRU list"
        for pfn in folios:
            flags = int(pages.flags[pfn])
            assert flags & LRU, f"folio {pfn} is listed without LRU"
            assert pfn in span, f"folio {pfn} is listed on another node"
            assert bool(flags & ACTIVE) == bool(active), f"folio {pfn} is on the wrong list"
        size = sum(1 << int(pages.order[pfn]) for pfn in folios)
        assert size == int(words[at + LRU_PAGES]), "pages of an LRU list"
        listed += len(folios)
    marked = np.count_nonzero(pages.flags[span.start : span.stop] & LRU)
    assert listed == int(marked), "folios with LRU on no list"


def _check_slab(arena: Arena, words: Words, slab: Slab) -> None:
    """Bitmaps, counts and the partial list of one cache on a node."""
    at, start = W_SLAB + slab.number * SLAB_WORDS, int(words[W_START])
    pages, span = arena.pages, slice(start, int(words[W_END]))
    assert int(words[at + S_LOCK]) == 0, f"the lock of slab {slab.name} is held"
    ours = (pages.flags[span] & SLAB != 0) & (pages.mapping[span] == slab.number)
    slabs = (start + np.flatnonzero(ours)).tolist()
    assert len(slabs) == int(words[at + S_SLABS]), f"slabs of {slab.name}"
    per_slab = 4096 // slab.size
    partial, objects = set(), 0
    for pfn in slabs:
        low, high = int(pages.private[pfn]), int(pages.index[pfn]) & ((1 << 64) - 1)
        free = (high << 64 | low).bit_count()
        assert (high << 64 | low) >> per_slab == 0, f"bitmap of slab page {pfn}"
        assert free < per_slab, f"slab page {pfn} is empty and was not freed"
        objects += per_slab - free
        if free:
            partial.add(pfn)
    assert objects == int(words[at + S_OBJECTS]), f"objects of {slab.name}"
    listed = _walk(arena, int(words[at + S_PARTIAL]), f"partial list of {slab.name}")
    assert set(listed) == partial, f"partial list of {slab.name}"


def _check_magazines(arena: Arena, words: Words, slab: Slab) -> None:
    """What lies in magazines is in use as far as its slab knows, and lies there once."""
    pages, span = arena.pages, range(int(words[W_START]), int(words[W_END]))
    limit = int(words[W_SLAB + slab.number * SLAB_WORDS + S_LIMIT])
    seen: set[int] = set()
    for row in range(ROWS):
        at = W_ROWS + row * ROW_WORDS + P_MAGAZINES + slab.number * MAGAZINE_WORDS
        count = int(words[at + Z_COUNT])
        assert 0 <= count <= limit, f"{count} objects in a magazine of {slab.name}"
        for i in words[at + Z_OBJECTS : at + Z_OBJECTS + count].tolist():
            what = f"object {i} in a magazine of {slab.name}"
            pfn, bit = divmod(i, 4096 // slab.size)
            assert pfn in span, f"{what}: of another node"
            assert int(pages.flags[pfn]) & SLAB, f"{what}: no slab"
            assert int(pages.mapping[pfn]) == slab.number, f"{what}: not of this cache"
            bits = int(pages.private[pfn] if bit < 64 else pages.index[pfn])
            assert bits >> (bit % 64) & 1 == 0, f"{what} is free as well"
            assert i not in seen, f"{what} lies there twice"
            seen.add(i)
