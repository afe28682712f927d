"""The page allocator: binary buddies of orders 0 to 10 over the page descriptors.

A block of order o starts at a multiple of 2^o; its buddy is pfn XOR 2^o, and two free buddies are
merged, so no two may be free side by side (the high-atomic reserve and others stay apart). Lists
are in freelist.py; which list serves whom, and what when it is empty, in zone.py.

Everything on the lists happens under the buddy lock, for a bounded number of steps. An allocated
block has HEAD on its first page, TAIL on the others, its order on all and one reference.

Watermark check (the kernel's): a request of order o passes when free - (2^o - 1) is above the
mark, the free pages of the high-atomic reserve not counted. What goes with a request is its
rights: MIN for ordinary ones; HALF of `min` for those that hold others up while they wait; ATOMIC
for those that can not wait (a further quarter off: 37.5 % stay) and may use the reserve; OOM for a
victim that is to get on (half of what would apply), and ALL, down to 0, for those whose work frees
memory. While anybody waits, new requests do not overtake, but for ATOMIC and ALL; they take a
ticket (RIGHTS_QUEUED is set when the queue itself asks). The upper bits are the migratetype.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import fetch_add_acq_rel, load_acquire, spin_lock, spin_unlock
from alloc.freelist import block_type, merge_and_push, push, smallest, split, unlink
from alloc.jit import helper, inlined, kernel
from alloc.lru import BUDDY_ARGS, leave_lru, try_get
from alloc.page import (
    BUSY,
    HEAD,
    HIGHATOMIC,
    LRU,
    MOVABLE,
    ORDER_MAX,
    RECLAIMABLE,
    RESERVED,
    TAIL,
    W_BOOST,
    W_BUDDY_LOCK,
    W_END,
    W_FREE,
    W_FREE_HIGHATOMIC,
    W_FREED,
    W_HIGH,
    W_LOW,
    W_LOWEST,
    W_MIN,
    W_PGALLOC,
    W_PGFREE,
    W_START,
    W_WAITERS,
    Buddy,
)
from alloc.zone import fall_back, reserve_block

RIGHTS_MIN = 0
RIGHTS_HALF = 1
RIGHTS_ALL = 2
RIGHTS_LOW = 3  # stays above `low`: for those who can do without
RIGHTS_QUEUED = 4  # bit: the wait queue asks on behalf of its oldest
RIGHTS_NONBLOCK = 8  # bit
RIGHTS_ATOMIC = RIGHTS_HALF | RIGHTS_NONBLOCK
RIGHTS_OOM = 16  # bit
MT_SHIFT = 8  # the migratetype, UNMOVABLE if nothing is said
MT_MASK = 3
RIGHTS_MOVABLE = MOVABLE << MT_SHIFT
RIGHTS_RECLAIMABLE = RECLAIMABLE << MT_SHIFT

WOULD_BLOCK = 0
STILL_USED = 0
FREED = 1
FREED_AND_WAITERS = 2
LAST = 3
NOT_ALLOCATED = -1
FREED_WHILE_BUSY = -2


@inlined
def passes_mark(words, order, rights):
    """Whether a request may be served as far as the watermarks go."""
    who = rights & 3
    free = words[W_FREE] - ((1 << order) - 1)
    if who == RIGHTS_ALL:
        return free > 0
    if rights & (RIGHTS_QUEUED | RIGHTS_NONBLOCK) == 0 and words[W_WAITERS] > 0:
        return False
    if who == RIGHTS_LOW:
        return free - words[W_FREE_HIGHATOMIC] > words[W_LOW]
    mark = words[W_MIN]
    if who == RIGHTS_HALF:
        mark -= mark >> 1
        if rights & RIGHTS_NONBLOCK != 0:
            mark -= mark >> 2
    elif rights & RIGHTS_OOM == 0:
        free -= words[W_FREE_HIGHATOMIC]
    if rights & RIGHTS_OOM != 0:
        mark -= mark >> 1
    return free > mark


@inlined
def is_low(words):
    """Whether it is time to wake kswapd."""
    return words[W_FREE] < words[W_LOW] + words[W_BOOST]


@inlined
def _find(b, order, rights):
    """Under the lock: a free block for a request that passed the mark, on its list; or 0."""
    mt = (rights >> MT_SHIFT) & MT_MASK
    reserve = rights & (RIGHTS_NONBLOCK | RIGHTS_OOM) != 0 or rights & 3 == RIGHTS_ALL
    if order > 0 and rights & RIGHTS_NONBLOCK != 0:
        pfn = smallest(b, order, HIGHATOMIC)
        if pfn != 0:
            return pfn
    pfn = smallest(b, order, mt)
    if pfn == 0:
        pfn = fall_back(b, order, mt)
    if pfn == 0 and reserve:
        pfn = smallest(b, order, HIGHATOMIC)
    return pfn


@inlined
def carve(b, pfn, order):
    """Under the lock: take 2^order pages off a free block; what is left stays free."""
    found = np.int64(b.order[pfn])
    mt = block_type(b.words, pfn)
    unlink(b, pfn, found, mt)
    split(b, pfn, found, order, mt)
    b.words[W_FREE] -= 1 << order


@helper
def take(b, order, rights):
    """A block of 2^order pages with one reference, or WOULD_BLOCK.

    The pfn is negated when the free pages are now below `low`: time to wake kswapd.
    """
    words = b.words
    spin_lock(words, W_BUDDY_LOCK)
    pfn = np.int64(0)
    if passes_mark(words, order, rights):
        pfn = _find(b, order, rights)
    if pfn == 0:
        spin_unlock(words, W_BUDDY_LOCK)
        return np.int64(WOULD_BLOCK)
    carve(b, pfn, order)
    words[W_PGALLOC] += 1 << order
    if order > 0 and rights & RIGHTS_NONBLOCK != 0:
        reserve_block(b, pfn, order)
    below_low = is_low(words)
    spin_unlock(words, W_BUDDY_LOCK)
    b.order[pfn : pfn + (1 << order)] = order
    b.flags[pfn + 1 : pfn + (1 << order)] = TAIL
    b.flags[pfn] = HEAD
    b.refs[pfn] = 1
    return -pfn if below_low else pfn


@helper
def give_back(b, pfn):
    """Free an allocated block, whose last reference is gone; FREED or FREED_AND_WAITERS."""
    order = np.int64(b.order[pfn])
    for page in range(pfn, pfn + (1 << order)):
        b.flags[page] = 0
    b.refs[pfn] = 0
    spin_lock(b.words, W_BUDDY_LOCK)
    merge_and_push(b, pfn, order)
    b.words[W_FREE] += 1 << order
    b.words[W_PGFREE] += 1 << order
    b.words[W_FREED] += 1
    spin_unlock(b.words, W_BUDDY_LOCK)
    if load_acquire(b.words, W_WAITERS) > 0:
        return FREED_AND_WAITERS
    return FREED


@inlined
def drop(b, pfn):
    """Drop a reference of an allocated block; LAST: it is off the LRU, and to be given back."""
    if b.flags[pfn] & HEAD == 0 or b.refs[pfn] <= 0:
        return NOT_ALLOCATED
    if fetch_add_acq_rel(b.refs, pfn, -1) != 1:
        return STILL_USED
    if b.flags[pfn] & BUSY != 0:
        fetch_add_acq_rel(b.refs, pfn, 1)
        return FREED_WHILE_BUSY
    if b.flags[pfn] & LRU != 0:
        leave_lru(b, pfn)
    return LAST


@helper
def put(b, pfn):
    """Drop a reference of an allocated block; the last one frees it."""
    code = drop(b, pfn)
    return give_back(b, pfn) if code == LAST else code


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
    """All pages of a node become free, in the largest aligned blocks, lowest address first.

    But for page 0.
    """
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    first = max(words[W_START], 1)
    flags[0] = RESERVED
    pfn = words[W_END]
    while pfn > first:
        size = ORDER_MAX
        while pfn & ((1 << size) - 1) != 0 or pfn - (1 << size) < first:
            size -= 1
        pfn -= 1 << size
        push(b, pfn, size, MOVABLE, False)
    words[W_FREE] = words[W_END] - first
    words[W_LOWEST] = first


@inlined
def take_chain(b, order, rights, nr, counted):
    """Up to `nr` blocks in one hold of the lock: first, last and how many; 0: WOULD_BLOCK.

    They are linked through lru_next and lru_prev, carry no flags and have no references. Only the
    first goes by the rights; the others are taken while what is left is enough for everybody, and
    while the type has blocks of its own. They are counted as handed out if they go to a caller at
    once.
    """
    first = last = taken = np.int64(0)
    words = b.words
    spin_lock(words, W_BUDDY_LOCK)
    pfn = np.int64(0)
    if passes_mark(words, order, rights):
        pfn = _find(b, order, rights)
    while pfn != 0:
        carve(b, pfn, order)
        b.order[pfn] = order
        b.lru_prev[pfn] = last
        if last != 0:
            b.lru_next[last] = pfn
        else:
            first = pfn
        last = pfn
        taken += 1
        if taken == nr or words[W_FREE] - (1 << order) < words[W_HIGH]:
            break
        pfn = smallest(b, order, (rights >> MT_SHIFT) & MT_MASK)
    if taken > 0 and order > 0 and rights & RIGHTS_NONBLOCK != 0:
        reserve_block(b, first, order)
    if counted:
        words[W_PGALLOC] += taken << order
    spin_unlock(words, W_BUDDY_LOCK)
    return first, last, taken


@inlined
def give_chain(b, first, order, counted):
    """Free blocks of one order that are linked through lru_next, in one hold of the lock.

    They are counted as given back if they come from a caller.
    """
    spin_lock(b.words, W_BUDDY_LOCK)
    pfn = first
    while pfn != 0:
        after = np.int64(b.lru_next[pfn])
        b.flags[pfn : pfn + (1 << order)] = 0
        merge_and_push(b, pfn, order)
        b.words[W_FREE] += 1 << order
        b.words[W_FREED] += 1
        if counted:
            b.words[W_PGFREE] += 1 << order
        pfn = after
    spin_unlock(b.words, W_BUDDY_LOCK)
