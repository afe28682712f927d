"""Per-lane page lists: free blocks of orders 0 to 3 that one thread takes and gives without a wait.

A row belongs to one thread: row 0 to the trio thread, the others to lanes. It has a list for each
order and migratetype, last in, first out: what was freed last is still in the processor's cache.
An empty list is refilled, and a full row relieved, in batches in one hold of the buddy lock; from
the other end of the list, where the blocks are cold. How much, say the kernel's formulas: bounds
come from the size of the arena (alloc/rows.py), `high` grows while pages go back and forth and
decays when they do not.

A block on a row's list is free, but not the buddy's: nobody merges it and the marks do not count
it. free + pcp + allocated = arena. PCP is on its first page; tails keep TAIL and the order. So that
memory does not hide here when it is short: below `low`, and while anybody waits, frees go to the
buddy; while kswapd works a row keeps four batches at most; and before a request waits, all rows
are drained, magazines too (alloc/magazine.py).

Each node has such lists for all threads; `take`, `give_back` and `put` find the right ones. A row
has a lock, so that others can drain it. Its owner only tries it, and deals with the buddy itself if
somebody drains. Order: row -> slab -> lru -> buddy; no row is locked inside another.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import (
    fetch_add_acq_rel,
    load_acquire,
    spin_trylock,
    spin_unlock,
)
from alloc.buddy import (
    FREED,
    FREED_AND_WAITERS,
    FREED_WHILE_BUSY,
    MT_MASK,
    MT_SHIFT,
    NOT_ALLOCATED,
    RIGHTS_LOW,
    RIGHTS_MIN,
    RIGHTS_NONBLOCK,
    RIGHTS_QUEUED,
    STILL_USED,
    WOULD_BLOCK,
    give_chain,
    is_low,
    passes_mark,
    take_chain,
)
from alloc.freelist import block_type
from alloc.jit import helper, inlined, kernel
from alloc.lru import BUDDY_ARGS, leave_lru
from alloc.node import (
    PLACED,
    RIGHTS_MASK,
    SOFT,
    buddy_on,
    count_numa,
    let_go,
    may_use,
    node_of,
    nth_node,
    wanted_node,
)
from alloc.page import (
    BUSY,
    HEAD,
    HIGHATOMIC,
    LINE_BYTES,
    LRU,
    MIGRATETYPES,
    MOVABLE,
    P_ALLOC_FACTOR,
    P_COUNT,
    P_FREE_COUNT,
    P_HIGH,
    P_HIGH_ORDER,
    P_LISTS,
    P_LOCK,
    P_PGALLOC,
    P_PGFREE,
    PCP,
    PCP_ORDERS,
    ROW_WORDS,
    TAIL,
    W_END,
    W_FREE,
    W_HIGH,
    W_KSWAPD,
    W_LOW,
    W_NODES,
    W_PCP_BATCH,
    W_PCP_HIGH_MAX,
    W_PCP_HIGH_MIN,
    W_ROWS,
    W_WAITERS,
    Buddy,
)
from alloc.rows import BATCH_SCALE_MAX

LISTS = PCP_ORDERS * MIGRATETYPES
LINE_PAGES = LINE_BYTES // 4  # pages whose flags, or references, are in one line


# -- lists, under the row's lock -----------------------------------------------------------------


@inlined
def row_at(row):
    """Index in `words` of a row."""
    return W_ROWS + row * ROW_WORDS


@inlined
def _list_at(at, mt, order):
    """Index in `words` of one of the lists of the row at `at`: its head, then its tail."""
    return at + P_LISTS + 2 * (order * MIGRATETYPES + mt)


@inlined
def _push(b, where, pfn):
    head = b.words[where]
    b.lru_next[pfn] = head
    if head != 0:
        b.lru_prev[head] = pfn
    else:
        b.words[where + 1] = pfn
    b.words[where] = pfn


@inlined
def _pop(b, where, pfn):
    """Take the head off. A head's lru_prev says nothing."""
    after = np.int64(b.lru_next[pfn])
    b.words[where] = after
    if after == 0:
        b.words[where + 1] = 0


@helper
def _cut(b, where, order, pages):
    """Take blocks worth `pages` (or all) off the cold end; the chain's first block, and pages."""
    last = b.words[where + 1]
    first = last
    cut = np.int64(1) << order
    while first != b.words[where] and cut < pages:
        first = np.int64(b.lru_prev[first])
        cut += 1 << order
    if first == b.words[where]:
        b.words[where] = 0
        b.words[where + 1] = 0
    else:
        before = np.int64(b.lru_prev[first])
        b.words[where + 1] = before
        b.lru_next[before] = 0
    return first, cut


@helper
def _relieve(b, at, first, pages):
    """Give `pages` pages (or all) back to the buddy, of list number `first` before others."""
    batch = b.words[W_PCP_BATCH]
    for k in range(LISTS):
        index = (first + k) % LISTS
        order = index // MIGRATETYPES
        where = at + P_LISTS + 2 * index
        while pages > 0 and b.words[where] != 0:
            chain, cut = _cut(b, where, order, min(pages, batch))
            give_chain(b, chain, order, False)
            b.words[at + P_COUNT] -= cut
            pages -= cut


# -- sizes, under the row's lock -----------------------------------------------------------------


@inlined
def _high(words, at):
    """What the row may hold, within the bounds."""
    return min(max(words[at + P_HIGH], words[W_PCP_HIGH_MIN]), words[W_PCP_HIGH_MAX])


@helper
def _refill_size(words, at, order):
    """Blocks that a refill asks for: more each time while nothing is freed in between.

    Where the row may have so much, no less than the pages whose descriptors share a line: with
    neighbours in two rows each thread would take that line from the other again and again.
    """
    batch = words[W_PCP_BATCH]
    high = _high(words, at)
    nr = batch << words[at + P_ALLOC_FACTOR] if order == 0 else batch
    if words[W_FREE] >= words[W_HIGH]:
        high = min(high + nr, words[W_PCP_HIGH_MAX])
    words[at + P_HIGH] = high
    if order == 0:
        most = max(high - words[at + P_COUNT] - batch, batch)
        if nr <= most and words[at + P_ALLOC_FACTOR] < BATCH_SCALE_MAX:
            words[at + P_ALLOC_FACTOR] += 1
        nr = min(nr, most)
    nr = max(nr >> order, 2) if nr > 1 else nr
    return max(nr, min(LINE_PAGES, high - words[at + P_COUNT]) >> order)


@inlined
def _limit(words, at, batch, crowded):
    """Pages at which the row is relieved; moves `high` towards what the row needs."""
    high = _high(words, at)
    least, most = words[W_PCP_HIGH_MIN], words[W_PCP_HIGH_MAX]
    step = max(words[at + P_FREE_COUNT], batch)
    limit = high
    if crowded:
        high = max(high - (batch << BATCH_SCALE_MAX), least)
        limit = np.int64(0)
    elif words[W_KSWAPD] != 0:
        high = max(high - step, least)
        limit = min(batch << 2, high)
    elif words[W_FREE] < words[W_HIGH]:
        high = max(high - step, least)
        limit = max(words[at + P_COUNT], least)
    elif words[at + P_COUNT] >= high:
        high = min(max(high, words[at + P_FREE_COUNT] + batch), most)
    words[at + P_HIGH] = high
    return limit


@inlined
def _note_free(b, at, mt, order):
    """A block came in: relieve the row if it holds too much."""
    words = b.words
    batch = words[W_PCP_BATCH]
    crowded = False
    if order > 0:
        many = words[at + P_FREE_COUNT] >= batch + words[W_PCP_HIGH_MIN] // 2
        crowded = many and words[at + P_HIGH_ORDER] != 0
    words[at + P_HIGH_ORDER] = 1 if order > 0 else 0
    if words[at + P_FREE_COUNT] < batch << BATCH_SCALE_MAX:
        words[at + P_FREE_COUNT] += 1 << order
    limit = _limit(words, at, batch, crowded)
    if words[at + P_COUNT] >= limit:
        if crowded:
            nr = min(words[at + P_COUNT], batch << BATCH_SCALE_MAX)
        else:
            nr = max(min(words[at + P_FREE_COUNT], limit - batch), batch)
        _relieve(b, at, order * MIGRATETYPES + mt, nr)


# -- allocating and freeing ----------------------------------------------------------------------


@inlined
def _dress(b, pfn, order):
    """The descriptors of a block's tails. (Slices: a loop over indices is not vectorized.)"""
    b.flags[pfn + 1 : pfn + (1 << order)] = TAIL
    b.order[pfn + 1 : pfn + (1 << order)] = order


@helper
def _refill(b, at, where, order, rights):
    """Blocks from the buddy, ascending; the first for the caller, the others on the list; or 0."""
    wanted = _refill_size(b.words, at, order)
    first, last, taken = take_chain(b, order, rights, wanted, False)
    if taken > 0:
        _dress(b, first, order)
    if taken > 1:
        rest = np.int64(b.lru_next[first])
        b.words[where] = rest
        b.words[where + 1] = last
        b.words[at + P_COUNT] += (taken - 1) << order
        while rest != 0:
            _dress(b, rest, order)
            b.flags[rest] = PCP
            rest = np.int64(b.lru_next[rest])
    return first


@helper
def _take_bare(b, order, rights):
    """`take` without a row."""
    pfn, _, _ = take_chain(b, order, rights, 1, True)
    if pfn == 0:
        return np.int64(WOULD_BLOCK)
    _dress(b, pfn, order)
    b.flags[pfn] = HEAD
    b.refs[pfn] = 1
    return -pfn if is_low(b.words) else pfn


@helper
def _give_back_bare(b, pfn, order):
    """`give_back` without a row."""
    b.refs[pfn] = 0
    b.lru_next[pfn] = 0
    give_chain(b, pfn, order, True)
    if load_acquire(b.words, W_WAITERS) > 0:
        return FREED_AND_WAITERS
    return FREED


@inlined
def _is_listed(order, rights):
    """Whether a request may be served from a row's lists."""
    return order < PCP_ORDERS and rights & (RIGHTS_QUEUED | RIGHTS_NONBLOCK | PLACED) == 0


@inlined
def _take_listed(b, row, order, rights):
    """`take` on one node, for a request that may be served from a row's lists."""
    words = b.words
    if not passes_mark(words, order, rights):
        return np.int64(WOULD_BLOCK)
    at = row_at(row)
    if not spin_trylock(words, at + P_LOCK):
        return _take_bare(b, order, rights)
    words[at + P_FREE_COUNT] >>= 1
    where = _list_at(at, (rights >> MT_SHIFT) & MT_MASK, order)
    pfn = words[where]
    if pfn != 0:
        _pop(b, where, pfn)
        words[at + P_COUNT] -= 1 << order
    else:
        pfn = _refill(b, at, where, order, rights)
    if pfn != 0:
        words[at + P_PGALLOC] += 1 << order
    spin_unlock(words, at + P_LOCK)
    if pfn == 0:
        return np.int64(WOULD_BLOCK)
    b.flags[pfn] = HEAD
    b.refs[pfn] = 1
    return -pfn if is_low(words) else pfn


@helper
def _take_of(b, row, order, rights, asked):
    """Of the nodes that a request may use, the first that serves it with these rights; or 0."""
    words = b.words
    wanted = wanted_node(asked)
    for n in range(words[W_NODES]):
        node = nth_node(words, wanted, n)
        if may_use(asked, node):
            near = buddy_on(b, node)
            if _is_listed(order, rights):
                got = _take_listed(near, row, order, rights)
            else:
                got = _take_bare(near, order, rights)
            if got != WOULD_BLOCK:
                count_numa(words, asked, node)
                return got
    return np.int64(WOULD_BLOCK)


@helper
def _take_placed(b, row, order, asked):
    """`take` where there are several nodes."""
    rights = asked & RIGHTS_MASK
    while True:
        got = np.int64(WOULD_BLOCK)
        if rights & (3 | RIGHTS_QUEUED | RIGHTS_NONBLOCK) == RIGHTS_MIN:
            got = _take_of(b, row, order, rights | RIGHTS_LOW, asked)
        if got == WOULD_BLOCK:
            got = _take_of(b, row, order, rights, asked)
        if got != WOULD_BLOCK or asked & SOFT == 0:
            return got
        asked = let_go(asked)


@inlined
def take(b, row, order, rights):
    """As `buddy.take`, through the row's lists where there are lists for the order.

    A request that can not wait goes to the buddy, who keeps a reserve for it. Whether a request
    may be served depends on the marks alone, not on what the row has.
    """
    if _is_listed(order, rights):
        return _take_listed(b, row, order, rights)
    if rights & PLACED != 0:
        return _take_placed(b, row, order, rights)
    return _take_bare(b, order, rights)


@inlined
def _is_wanted_here(words, order):
    """Whether a block that comes back may stay on a row's list: memory is not short."""
    plenty = words[W_FREE] >= words[W_LOW] and load_acquire(words, W_WAITERS) <= 0
    return order < PCP_ORDERS and plenty


@inlined
def _give_back_listed(b, row, pfn, order):
    """`give_back` on one node, to a row's list for the pageblock's type."""
    words = b.words
    at = row_at(row)
    if not spin_trylock(words, at + P_LOCK):
        return _give_back_bare(b, pfn, order)
    mt = block_type(words, pfn)
    if mt == HIGHATOMIC:
        mt = np.int64(MOVABLE)
    b.flags[pfn] = PCP
    _push(b, _list_at(at, mt, order), pfn)
    words[at + P_COUNT] += 1 << order
    words[at + P_PGFREE] += 1 << order
    words[at + P_ALLOC_FACTOR] >>= 1
    _note_free(b, at, mt, order)
    spin_unlock(words, at + P_LOCK)
    if load_acquire(words, W_WAITERS) > 0:
        return FREED_AND_WAITERS
    return FREED


@helper
def _give_back_home(b, row, pfn, order):
    """`give_back` to another node than the first."""
    home = buddy_on(b, node_of(b.words, pfn))
    if _is_wanted_here(home.words, order):
        return _give_back_listed(home, row, pfn, order)
    return _give_back_bare(home, pfn, order)


@inlined
def give_back(b, row, pfn):
    """As `buddy.give_back`, to the row's list for the pageblock's type unless memory is short."""
    words = b.words
    order = np.int64(b.order[pfn])
    if pfn >= words[W_END]:
        return _give_back_home(b, row, pfn, order)
    if _is_wanted_here(words, order):
        return _give_back_listed(b, row, pfn, order)
    return _give_back_bare(b, pfn, order)


@inlined
def put(b, row, pfn):
    """As `buddy.put`: drop a reference; the last one gives the block back through the row."""
    if b.flags[pfn] & HEAD == 0 or b.refs[pfn] <= 0:
        return NOT_ALLOCATED
    if fetch_add_acq_rel(b.refs, pfn, -1) != 1:
        return STILL_USED
    state = b.flags[pfn]
    if state & BUSY != 0:
        fetch_add_acq_rel(b.refs, pfn, 1)
        return FREED_WHILE_BUSY
    if state & LRU != 0:
        leave_lru(b, pfn)
    return give_back(b, row, pfn)


@helper
def drain_pages(b, at):
    """Under the row's lock: everything goes back to the buddy."""
    if b.words[at + P_COUNT] > 0:
        _relieve(b, at, 0, b.words[at + P_COUNT])


@helper
def decay(b, at):
    """Under the row's lock: `high` loses an eighth, and what is above it goes back."""
    words = b.words
    excess = words[at + P_COUNT] - (words[W_PCP_BATCH] << BATCH_SCALE_MAX)
    high = words[at + P_HIGH]
    if high > words[W_PCP_HIGH_MIN]:
        words[at + P_HIGH] = max(excess, high - (high >> 3), words[W_PCP_HIGH_MIN])
    if words[at + P_COUNT] > words[at + P_HIGH]:
        _relieve(b, at, 0, words[at + P_COUNT] - words[at + P_HIGH])


@kernel(f"i8({BUDDY_ARGS}, i8, i8, i8)")
def alloc_block(words, flags, order, refs, lru_next, lru_prev, row, want, rights):
    """See `take`. The page allocator's fast path: one call."""
    return take(Buddy(words, flags, order, refs, lru_next, lru_prev), row, want, rights)


@kernel(f"i8({BUDDY_ARGS}, i8, i8)")
def put_block(words, flags, order, refs, lru_next, lru_prev, row, pfn):
    """See `put`: STILL_USED, FREED, FREED_AND_WAITERS, or a negative code for a caller's bug."""
    return put(Buddy(words, flags, order, refs, lru_next, lru_prev), row, pfn)
