"""The page allocator: binary buddies of orders 0 to 10 over the page descriptors.

Free blocks are linked through their head's lru_next/lru_prev, one list per order; only the head
carries BUDDY and the order. A block of order o starts at a multiple of 2^o; its buddy is
pfn XOR 2^o, and two free buddies are always merged, so no two may be free side by side.

Everything on the lists happens under the buddy lock, for a bounded number of steps. An allocated
block has HEAD on its first page, TAIL on the others, its order on all and one reference.

Watermark check (as the kernel's): a request of order o passes when free - (2^o - 1) is above the
mark. The mark is `min` for ordinary requests, `min/2` for those that hold others up while they
wait (RIGHTS_HALF), and 0 for those whose work frees memory (RIGHTS_ALL). While anybody waits, new
requests do not overtake; they take a ticket (RIGHTS_QUEUED is set when the queue itself asks).

Slabs can not be moved nor freed on purpose, so their pages come from the bottom of the arena; what
is left above them can become large blocks again.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import fetch_add_acq_rel, load_acquire, spin_lock, spin_unlock
from alloc.jit import helper, kernel
from alloc.lru import BUDDY_ARGS, try_get, unlink_lru
from alloc.page import (
    BUDDY,
    BUSY,
    HEAD,
    LRU,
    ORDER_MAX,
    RESERVED,
    TAIL,
    W_BUDDY_LOCK,
    W_FREE,
    W_FREE_HEAD,
    W_FREED,
    W_HIGH,
    W_LOW,
    W_LOWEST,
    W_LRU_LOCK,
    W_MIN,
    W_NR_FREE,
    W_PAGES,
    W_PGALLOC,
    W_PGFREE,
    W_WAITERS,
    Buddy,
)

RIGHTS_MIN = 0
RIGHTS_HALF = 1
RIGHTS_ALL = 2
RIGHTS_LOW = 3  # stays above `low`: for those who can do without
RIGHTS_QUEUED = 4  # bit: the wait queue asks on behalf of its oldest
RIGHTS_LOWEST = 8  # bit: place it at the bottom of the arena

LOWEST_STEPS = 4096  # of the search for the lowest page, which happens under the lock

WOULD_BLOCK = 0
STILL_USED = 0
FREED = 1
FREED_AND_WAITERS = 2
NOT_ALLOCATED = -1
FREED_WHILE_BUSY = -2


@helper
def _push(b, pfn, order):
    head = np.int64(b.words[W_FREE_HEAD + order])
    b.lru_next[pfn] = head
    b.lru_prev[pfn] = 0
    if head != 0:
        b.lru_prev[head] = pfn
    b.words[W_FREE_HEAD + order] = pfn
    b.words[W_NR_FREE + order] += 1
    b.flags[pfn] = BUDDY
    b.order[pfn] = order


@helper
def _unlink(b, pfn, order):
    after = np.int64(b.lru_next[pfn])
    before = np.int64(b.lru_prev[pfn])
    if after != 0:
        b.lru_prev[after] = before
    if before != 0:
        b.lru_next[before] = after
    else:
        b.words[W_FREE_HEAD + order] = after
    b.words[W_NR_FREE + order] -= 1
    b.flags[pfn] = 0
    b.lru_next[pfn] = 0
    b.lru_prev[pfn] = 0


@helper
def passes_mark(words, order, rights):
    """Whether a request may be served as far as the watermarks go."""
    who = rights & 3
    if who == RIGHTS_ALL:
        mark = np.int64(0)
    elif rights & RIGHTS_QUEUED == 0 and words[W_WAITERS] > 0:
        return False
    elif who == RIGHTS_HALF:
        mark = words[W_MIN] >> 1
    elif who == RIGHTS_LOW:
        mark = words[W_LOW]
    else:
        mark = words[W_MIN]
    return words[W_FREE] - ((1 << order) - 1) > mark


@helper
def _best_fit(b, order):
    """Under the lock: a free block of the smallest order that fits, or 0."""
    for fitting in range(order, ORDER_MAX + 1):
        if b.words[W_FREE_HEAD + fitting] != 0:
            return np.int64(b.words[W_FREE_HEAD + fitting])
    return np.int64(0)


@helper
def _lowest(b):
    """Under the lock: the free block with the lowest address, or 0 when it is far to seek."""
    pfn = b.words[W_LOWEST]
    for _ in range(LOWEST_STEPS):
        if pfn >= b.words[W_PAGES] or b.flags[pfn] & BUDDY != 0:
            break
        # a block in the hands of `take` or `give_back` may have no flags yet: go by pages
        pfn += 1 << np.int64(b.order[pfn]) if b.flags[pfn] & HEAD != 0 else 1
    b.words[W_LOWEST] = pfn
    if pfn < b.words[W_PAGES] and b.flags[pfn] & BUDDY != 0:
        return pfn
    return np.int64(0)


@helper
def take(b, order, rights):
    """A block of 2^order pages with one reference, or WOULD_BLOCK.

    The pfn is negated when the free pages are now below `low`: time to wake kswapd. With
    RIGHTS_LOWEST (single pages only) it is the free page with the lowest address.
    """
    spin_lock(b.words, W_BUDDY_LOCK)
    pfn = np.int64(0)
    if passes_mark(b.words, order, rights):
        if rights & RIGHTS_LOWEST != 0:
            pfn = _lowest(b)
        if pfn == 0:
            pfn = _best_fit(b, order)
    if pfn == 0:
        spin_unlock(b.words, W_BUDDY_LOCK)
        return np.int64(WOULD_BLOCK)
    found = np.int64(b.order[pfn])
    _unlink(b, pfn, found)
    while found > order:
        found -= 1
        _push(b, pfn + (1 << found), found)
    b.words[W_FREE] -= 1 << order
    b.words[W_PGALLOC] += 1 << order
    below_low = b.words[W_FREE] < b.words[W_LOW]
    spin_unlock(b.words, W_BUDDY_LOCK)
    b.flags[pfn] = HEAD
    b.order[pfn] = order
    for tail in range(pfn + 1, pfn + (1 << order)):
        b.flags[tail] = TAIL
        b.order[tail] = order
    b.refs[pfn] = 1
    return -pfn if below_low else pfn


@helper
def _merge_and_push(b, pfn, order):
    """Under the lock: put a block on its list, merged with every free buddy."""
    while order < ORDER_MAX:
        buddy = pfn ^ (1 << order)
        if buddy + (1 << order) > b.words[W_PAGES]:
            break
        if b.flags[buddy] != BUDDY or b.order[buddy] != order:
            break
        _unlink(b, buddy, order)
        pfn = min(pfn, buddy)
        order += 1
    _push(b, pfn, order)
    b.words[W_LOWEST] = min(b.words[W_LOWEST], pfn)


@helper
def give_back(b, pfn):
    """Free an allocated block, whose last reference is gone; FREED or FREED_AND_WAITERS."""
    order = np.int64(b.order[pfn])
    for page in range(pfn, pfn + (1 << order)):
        b.flags[page] = 0
    b.refs[pfn] = 0
    spin_lock(b.words, W_BUDDY_LOCK)
    _merge_and_push(b, pfn, order)
    b.words[W_FREE] += 1 << order
    b.words[W_PGFREE] += 1 << order
    b.words[W_FREED] += 1
    spin_unlock(b.words, W_BUDDY_LOCK)
    if load_acquire(b.words, W_WAITERS) > 0:
        return FREED_AND_WAITERS
    return FREED


@helper
def put(b, pfn):
    """Drop a reference of an allocated block; the last one frees it, off the LRU if need be."""
    if b.flags[pfn] & HEAD == 0 or b.refs[pfn] <= 0:
        return NOT_ALLOCATED
    if fetch_add_acq_rel(b.refs, pfn, -1) != 1:
        return STILL_USED
    if b.flags[pfn] & BUSY != 0:
        fetch_add_acq_rel(b.refs, pfn, 1)
        return FREED_WHILE_BUSY
    if b.flags[pfn] & LRU != 0:
        spin_lock(b.words, W_LRU_LOCK)
        unlink_lru(b, pfn)
        spin_unlock(b.words, W_LRU_LOCK)
    return give_back(b, pfn)


@kernel(f"i8({BUDDY_ARGS}, i8, i8)")
def alloc_pages(words, flags, order, refs, lru_next, lru_prev, want, rights):
    """See `take`. The page allocator's fast path: one call."""
    return take(Buddy(words, flags, order, refs, lru_next, lru_prev), want, rights)


@kernel(f"i8({BUDDY_ARGS}, i8)")
def get_page(words, flags, order, refs, lru_next, lru_prev, pfn):
    """Add a reference to an allocated block; references before, or NOT_ALLOCATED."""
    if flags[pfn] & HEAD == 0 or refs[pfn] <= 0:
        return NOT_ALLOCATED
    return np.int64(fetch_add_acq_rel(refs, pfn, 1))


@kernel(f"b1({BUDDY_ARGS}, i8)")
def try_get_page(words, flags, order, refs, lru_next, lru_prev, pfn):
    """Add a reference unless the last one is gone; for lookups that hold no lock."""
    return try_get(Buddy(words, flags, order, refs, lru_next, lru_prev), pfn)


@kernel(f"i8({BUDDY_ARGS}, i8)")
def put_page(words, flags, order, refs, lru_next, lru_prev, pfn):
    """See `put`: STILL_USED, FREED, FREED_AND_WAITERS, or a negative code for a caller's bug."""
    return put(Buddy(words, flags, order, refs, lru_next, lru_prev), pfn)


@kernel(f"void({BUDDY_ARGS})")
def build_free_lists(words, flags, order, refs, lru_next, lru_prev):
    """All pages but page 0 become free, in the largest aligned blocks, lowest address first."""
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    nr_pages = words[W_PAGES]
    flags[0] = RESERVED
    pfn = nr_pages
    while pfn > 1:
        size = ORDER_MAX
        while pfn & ((1 << size) - 1) != 0 or pfn - (1 << size) < 1:
            size -= 1
        pfn -= 1 << size
        _push(b, pfn, size)
    words[W_FREE] = nr_pages - 1
    words[W_LOWEST] = 1


@helper
def take_chain(b, order, rights, nr, counted):
    """Up to `nr` blocks in one hold of the lock: first, last and how many; 0: WOULD_BLOCK.

    They are linked through lru_next and lru_prev, carry no flags and have no references. Only the
    first goes by the rights; the others are taken while what is left is enough for everybody.
    They are counted as handed out if they go to a caller at once.
    """
    first = last = taken = np.int64(0)
    spin_lock(b.words, W_BUDDY_LOCK)
    passes = passes_mark(b.words, order, rights)
    while passes and taken < nr:
        pfn = _best_fit(b, order)
        if pfn == 0:
            break
        found = np.int64(b.order[pfn])
        _unlink(b, pfn, found)
        while found > order:
            found -= 1
            _push(b, pfn + (1 << found), found)
        b.order[pfn] = order
        b.words[W_FREE] -= 1 << order
        b.lru_prev[pfn] = last
        if last != 0:
            b.lru_next[last] = pfn
        else:
            first = pfn
        last = pfn
        taken += 1
        passes = b.words[W_FREE] - (1 << order) >= b.words[W_HIGH]
    if counted:
        b.words[W_PGALLOC] += taken << order
    spin_unlock(b.words, W_BUDDY_LOCK)
    return first, last, taken


@helper
def give_chain(b, first, order, counted):
    """Free blocks of one order that are linked through lru_next, in one hold of the lock.

    They are counted as given back if they come from a caller.
    """
    spin_lock(b.words, W_BUDDY_LOCK)
    pfn = first
    while pfn != 0:
        after = np.int64(b.lru_next[pfn])
        b.flags[pfn : pfn + (1 << order)] = 0
        _merge_and_push(b, pfn, order)
        b.words[W_FREE] += 1 << order
        b.words[W_FREED] += 1
        if counted:
            b.words[W_PGFREE] += 1 << order
        pfn = after
    spin_unlock(b.words, W_BUDDY_LOCK)
