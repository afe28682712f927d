"""The buddy's lists: free blocks by migratetype and order, all under the buddy lock.

A free block is linked through its head's lru_next/lru_prev; only the head carries BUDDY and the
order. It is on the list of its pageblock's type; of a block that is larger than a pageblock all
pageblocks have the same type. Requests take from the head; whoever puts a block at the tail thinks
that it will soon be merged. A word for each type has a bit for each order whose list has blocks.

Pageblocks are aligned groups of 2^W_BLOCK_ORDER pages, each with a type: what the requests want
that its free pages are kept for (alloc/zone.py).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import count_trailing_zeros
from alloc.jit import helper, inlined
from alloc.page import (
    BUDDY,
    FREE_SHIFT,
    HIGHATOMIC,
    ORDER_MAX,
    W_BLOCK_ORDER,
    W_BLOCK_TYPES,
    W_END,
    W_FREE_HEAD,
    W_FREE_HIGHATOMIC,
    W_FREE_ORDERS,
    W_FREE_TAIL,
    W_LOWEST,
    W_MERGED,
    W_NR_FREE,
    W_START,
)


@inlined
def block_type(words, pfn):
    """The migratetype of the pageblock that a page lies in."""
    return words[W_BLOCK_TYPES + (pfn - words[W_START] >> words[W_BLOCK_ORDER])]


@helper
def set_block_types(words, pfn, order, mt):
    """All pageblocks that begin in an aligned block get this type."""
    first = W_BLOCK_TYPES + (pfn - words[W_START] >> words[W_BLOCK_ORDER])
    for at in range(first, first + (1 << max(order - words[W_BLOCK_ORDER], 0))):
        words[at] = mt


@inlined
def push(b, pfn, order, mt, at_tail):
    """Put a free block on a list."""
    words = b.words
    at = (mt << FREE_SHIFT) + order
    head = words[W_FREE_HEAD + at]
    before = np.int64(0)
    after = np.int64(0)
    if head == 0:
        words[W_FREE_ORDERS + mt] |= np.int64(1) << order
        words[W_FREE_HEAD + at] = pfn
        words[W_FREE_TAIL + at] = pfn
    elif at_tail:
        before = words[W_FREE_TAIL + at]
        b.lru_next[before] = pfn
        words[W_FREE_TAIL + at] = pfn
    else:
        after = head
        b.lru_prev[after] = pfn
        words[W_FREE_HEAD + at] = pfn
    b.lru_next[pfn] = after
    b.lru_prev[pfn] = before
    words[W_NR_FREE + at] += 1
    if mt == HIGHATOMIC:
        words[W_FREE_HIGHATOMIC] += 1 << order
    b.flags[pfn] = BUDDY
    b.order[pfn] = order


@inlined
def unlink(b, pfn, order, mt):
    """Take a free block off its list."""
    words = b.words
    at = (mt << FREE_SHIFT) + order
    after = np.int64(b.lru_next[pfn])
    before = np.int64(b.lru_prev[pfn])
    if after != 0:
        b.lru_prev[after] = before
    else:
        words[W_FREE_TAIL + at] = before
    if before != 0:
        b.lru_next[before] = after
    else:
        words[W_FREE_HEAD + at] = after
        if after == 0:
            words[W_FREE_ORDERS + mt] &= ~(np.int64(1) << order)
    words[W_NR_FREE + at] -= 1
    if mt == HIGHATOMIC:
        words[W_FREE_HIGHATOMIC] -= 1 << order
    b.flags[pfn] = 0
    b.lru_next[pfn] = 0
    b.lru_prev[pfn] = 0


@inlined
def smallest(b, order, mt):
    """A block of the smallest order that fits, first on its list; or 0."""
    fitting = b.words[W_FREE_ORDERS + mt] >> order
    if fitting == 0:
        return np.int64(0)
    found = order + count_trailing_zeros(fitting)
    return b.words[W_FREE_HEAD + (mt << FREE_SHIFT) + found]


@inlined
def split(b, pfn, found, order, mt):
    """The first 2^order pages of a block that is on no list; the others go to the lists of `mt`."""
    while found > order:
        found -= 1
        push(b, pfn + (1 << found), found, mt, False)


@inlined
def _next_is_free(b, pfn, order):
    """Whether the neighbour of the block that this one would be merged into is free already."""
    if order >= ORDER_MAX - 1:
        return False
    larger = pfn & ~(np.int64(1) << order)
    buddy = larger ^ (np.int64(2) << order)
    if buddy + (2 << order) > b.words[W_END]:
        return False
    return b.flags[buddy] == BUDDY and b.order[buddy] == order + 1


@inlined
def merge_and_push(b, pfn, order):
    """Put a block on its list, merged with every free buddy that may be merged with it.

    From pageblocks on the type of the block that comes wins, but the high-atomic reserve neither
    grows nor shrinks that way.
    """
    words = b.words
    mt = block_type(words, pfn)
    while order < ORDER_MAX:
        buddy = pfn ^ (np.int64(1) << order)
        if buddy + (1 << order) > words[W_END]:
            break
        if b.flags[buddy] != BUDDY or b.order[buddy] != order:
            break
        other = mt
        if order >= words[W_BLOCK_ORDER]:
            other = block_type(words, buddy)
            if other != mt and (other == HIGHATOMIC or mt == HIGHATOMIC):
                break
        unlink(b, buddy, order, other)
        if other != mt:
            set_block_types(words, buddy, order, mt)
        pfn = min(pfn, buddy)
        order += 1
        words[W_MERGED + order] += 1
    push(b, pfn, order, mt, _next_is_free(b, pfn, order))
    words[W_LOWEST] = min(words[W_LOWEST], pfn)
