"""Grouping by mobility: pageblocks and their types, what happens when a type's lists are empty.

Folios of the page cache can be evicted (MOVABLE), slabs of inodes and dentries can be emptied
(RECLAIMABLE), everything else stays (UNMOVABLE). A pageblock with one page that stays never becomes
a large block again, so each type has pageblocks of its own. A request whose type has nothing
falls back: it claims a pageblock of another type if that is mostly free or of its own kind
already, the one with the largest free block first; else it takes just the pages, those of slabs
from the lowest address, so that what must mix gathers at the bottom of the arena.

Each fallback within a pageblock lifts `low` and `high` by a pageblock (the boost): kswapd frees
more than usual, once, so that the next request finds its own. It never lifts `min`: no request
waits because of it. A claim of free pageblocks mixes nothing and boosts nothing; only as many
are claimed as the request has pages, since a block of order 10 can be half of a small arena.

HIGHATOMIC pageblocks, 1 % of the arena, come into being when a request that can not wait was given
more than a page. Only such requests use them, and those that may take the whole reserve, until
direct reclaim has failed: then they are given back (`release_reserve`).

All of it runs under the buddy lock, for a bounded number of steps.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import spin_lock, spin_unlock
from alloc.freelist import (
    block_type,
    merge_and_push,
    push,
    set_block_types,
    smallest,
    split,
    unlink,
)
from alloc.jit import helper, kernel
from alloc.lru import BUDDY_ARGS
from alloc.node import spanned
from alloc.page import (
    BUDDY,
    FREE_SHIFT,
    HEAD,
    HIGHATOMIC,
    LRU,
    MOVABLE,
    ORDER_MAX,
    RECLAIMABLE,
    UNMOVABLE,
    W_BLOCK_ORDER,
    W_BLOCK_TYPES,
    W_BOOST,
    W_BOOST_MAX,
    W_BUDDY_LOCK,
    W_CLAIMED,
    W_END,
    W_FREE_HEAD,
    W_FREE_ORDERS,
    W_HIGHATOMIC,
    W_HIGHATOMIC_MAX,
    W_LOWEST,
    W_STOLEN,
    Buddy,
    Words,
)
from alloc.watermarks import boost_max

BLOCK_ORDER_MAX = 9
BLOCKS_LEAST = 128  # so that a pageblock is no more than 1 % of the node
LOWEST_STEPS = 4096  # of the search for the lowest page, which happens under the lock


def block_order(nr_pages: int) -> int:
    """Order of a pageblock: 9, or less where a node would have fewer than 128 of them."""
    return min((nr_pages // BLOCKS_LEAST).bit_length() - 1, BLOCK_ORDER_MAX)


def nr_blocks(nr_pages: int) -> int:
    """Pageblocks of a node, the last one perhaps not whole."""
    return -(-nr_pages >> block_order(nr_pages))


def highatomic_max(nr_pages: int) -> int:
    """Pages that the high-atomic reserve may have: 1 %, rounded up to pageblocks; 0 for none."""
    block_pages = 1 << block_order(nr_pages)
    share = nr_pages // 100
    return -(-share // block_pages) * block_pages if share >= block_pages else 0


def room_for_blocks(span: int) -> int:
    """The most pageblocks that a node of at most so many pages can have."""
    return max(nr_blocks(span), 2 * BLOCKS_LEAST)


def block_types(words: Words) -> Words:
    """The types of a node's pageblocks."""
    return words[W_BLOCK_TYPES : W_BLOCK_TYPES + nr_blocks(spanned(words))]


def configure(words: Words) -> None:
    """The sizes that follow from a node's; all pageblocks are MOVABLE at first."""
    words[W_BLOCK_ORDER] = block_order(spanned(words))
    words[W_HIGHATOMIC_MAX] = highatomic_max(spanned(words))
    block_types(words)[:] = MOVABLE


def limit_boost(words: Words, high: int) -> None:
    """How far fallbacks may lift this `high` mark."""
    block_pages = 1 << int(words[W_BLOCK_ORDER])
    words[W_BOOST_MAX] = boost_max(high, spanned(words), block_pages)


@helper
def _fallback(mt, second):
    """The types whose blocks a request of type `mt` takes when its own are used up, in order."""
    if mt == MOVABLE:
        return UNMOVABLE if second else RECLAIMABLE
    if second:
        return MOVABLE
    return RECLAIMABLE if mt == UNMOVABLE else UNMOVABLE


@helper
def _census(b, start, end):
    """Of a pageblock: free pages, and pages that are on the LRU."""
    free = np.int64(0)
    listed = np.int64(0)
    pfn = start
    while pfn < end:
        size = np.int64(1)
        if b.flags[pfn] & (BUDDY | HEAD) != 0:
            size <<= np.int64(b.order[pfn])
        if b.flags[pfn] & BUDDY != 0:
            free += size
        elif b.flags[pfn] & LRU != 0:
            listed += size
        pfn += size
    return free, listed


@helper
def _retype(b, start, end, mt):
    """A pageblock and its free blocks, none of which is larger, change to type `mt`."""
    old = block_type(b.words, start)
    set_block_types(b.words, start, 0, mt)
    pfn = start
    while pfn < end:
        if b.flags[pfn] & BUDDY == 0:
            pfn += 1  # page by page: the order of a block that is being handed out may be old
            continue
        order = np.int64(b.order[pfn])
        unlink(b, pfn, order, old)
        push(b, pfn, order, mt, False)
        pfn += 1 << order


@helper
def _end_of(words, start):
    """Where a pageblock ends, which at the end of the arena need not be whole."""
    return min(start + (np.int64(1) << words[W_BLOCK_ORDER]), words[W_END])


@helper
def _claim(b, pfn, found, order, mt):
    """Claim the pageblock of a free block of order `found` for type `mt`, if it is worth it.

    A block for the request, or 0.
    """
    words = b.words
    other = block_type(words, pfn)
    size = words[W_BLOCK_ORDER]
    if found >= size:
        claimed = max(order, size)
        unlink(b, pfn, found, other)
        split(b, pfn, found, claimed, other)
        set_block_types(words, pfn, claimed, mt)
        push(b, pfn, claimed, mt, False)
        words[W_CLAIMED] += 1 << (claimed - size)
        return pfn
    start = (pfn >> size) << size
    end = _end_of(words, start)
    free, listed = _census(b, start, end)
    alike = np.int64(0)
    if mt == MOVABLE:
        alike = listed
    elif other == MOVABLE:
        alike = (1 << size) - free - listed
    if (free + alike) << 1 < 1 << size:
        return np.int64(0)
    _retype(b, start, end, mt)
    words[W_CLAIMED] += 1
    return smallest(b, order, mt)


@helper
def _lowest(b):
    """The free block with the lowest address, or 0 when it is far to seek."""
    words = b.words
    pfn = words[W_LOWEST]
    for _ in range(LOWEST_STEPS):
        if pfn >= words[W_END] or b.flags[pfn] & BUDDY != 0:
            break
        # a block in the hands of `take` or `give_back` may have no flags yet: go by pages
        pfn += 1 << np.int64(b.order[pfn]) if b.flags[pfn] & HEAD != 0 else 1
    words[W_LOWEST] = pfn
    if pfn >= words[W_END] or b.flags[pfn] & BUDDY == 0:
        return np.int64(0)
    return pfn if block_type(words, pfn) != HIGHATOMIC else np.int64(0)


@helper
def _steal(b, order, near, far, mt):
    """A block from another type's lists, whose pageblock stays what it is."""
    b.words[W_STOLEN] += 1
    pfn = np.int64(0)
    if order == 0 and mt != MOVABLE:
        pfn = _lowest(b)
    if pfn == 0:
        pfn = smallest(b, order, near)
    if pfn == 0:
        pfn = smallest(b, order, far)
    return pfn


@helper
def fall_back(b, order, mt):
    """A block for a request whose type has none, claimed or just taken from another; or 0."""
    words = b.words
    near = _fallback(mt, False)
    far = _fallback(mt, True)
    there = words[W_FREE_ORDERS + near] | words[W_FREE_ORDERS + far]
    if there >> order == 0:
        return np.int64(0)
    size = words[W_BLOCK_ORDER]
    found = np.int64(ORDER_MAX)
    mixes = False
    pfn = np.int64(0)
    while pfn == 0 and found >= order and (mt != MOVABLE or found >= size >> 1):
        if there >> found & 1 != 0:
            other = near if words[W_FREE_ORDERS + near] >> found & 1 != 0 else far
            at = (other << FREE_SHIFT) + found
            mixes = mixes or found < size
            pfn = _claim(b, words[W_FREE_HEAD + at], found, order, mt)
        found -= 1
    if pfn == 0:
        mixes = True
        pfn = _steal(b, order, near, far, mt)
    if mixes:
        words[W_BOOST] = min(words[W_BOOST] + (1 << size), words[W_BOOST_MAX])
    return pfn


@helper
def reserve_block(b, pfn, order):
    """The pageblock around a block that has just been taken joins the high-atomic reserve."""
    words = b.words
    size = words[W_BLOCK_ORDER]
    if words[W_HIGHATOMIC] >= words[W_HIGHATOMIC_MAX] or block_type(words, pfn) == HIGHATOMIC:
        return
    if order >= size:
        set_block_types(words, pfn, order, HIGHATOMIC)
        words[W_HIGHATOMIC] += 1 << order
        return
    start = (pfn >> size) << size
    _retype(b, start, _end_of(words, start), HIGHATOMIC)
    words[W_HIGHATOMIC] += 1 << size


@kernel(f"i8({BUDDY_ARGS}, i8)")
def release_reserve(words, flags, order, refs, lru_next, lru_prev, mt):
    """All free memory of the high-atomic reserve goes to type `mt`, with its pageblocks; pages.

    Pageblocks without free pages stay, for a release that finds some.
    """
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    spin_lock(words, W_BUDDY_LOCK)
    size = words[W_BLOCK_ORDER]
    released = np.int64(0)
    pfn = smallest(b, 0, HIGHATOMIC)
    while pfn != 0:
        found = np.int64(order[pfn])
        if found >= size:
            unlink(b, pfn, found, HIGHATOMIC)
            set_block_types(words, pfn, found, mt)
            merge_and_push(b, pfn, found)
            released += 1 << found
        else:
            start = (pfn >> size) << size
            _retype(b, start, _end_of(words, start), mt)
            released += 1 << size
        pfn = smallest(b, 0, HIGHATOMIC)
    words[W_HIGHATOMIC] -= released
    spin_unlock(words, W_BUDDY_LOCK)
    return released


@kernel("i8(i8[::1])")
def take_boost(words):
    """Pages that fallbacks have added to `high` since somebody last took them."""
    spin_lock(words, W_BUDDY_LOCK)
    boost = words[W_BOOST]
    words[W_BOOST] = 0
    spin_unlock(words, W_BUDDY_LOCK)
    return boost
