"""Magazines: a few free objects of each slab cache in every row, taken and given without a wait.

A magazine is a stack of object indices in its row's words, guarded by the lock of the row
(alloc/pcp.py). An empty one is loaded, and a full one unloaded, by half, in one hold of the cache's
lock.
What is freed goes home to its slab at once below `low` and while anybody waits, so that slabs can
become empty; a drain empties all magazines, and a refresh those that nobody used since the last.

Each node has slabs, and magazines in its rows. `object_alloc` and `object_free` get the words of
all nodes and find the right one, as alloc/pcp.py does.

To its slab an object in a magazine is in use: its bit is clear. So a double free is found in the
magazine that the object lies in if it is the caller's own; otherwise when the second copy comes
home. Objects come zeroed; that is part of what an allocation costs.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import load_acquire, spin_lock, spin_trylock, spin_unlock
from alloc.buddy import (
    FREED,
    FREED_AND_WAITERS,
    RIGHTS_LOW,
    RIGHTS_MIN,
    RIGHTS_NONBLOCK,
    RIGHTS_QUEUED,
    WOULD_BLOCK,
)
from alloc.jit import helper, inlined, kernel
from alloc.libc import memset
from alloc.node import (
    PLACED,
    RIGHTS_MASK,
    SOFT,
    let_go,
    may_use,
    node_of,
    nth_node,
    slabs_on,
    wanted_node,
)
from alloc.page import (
    MAGAZINE_WORDS,
    P_COUNT,
    P_LOCK,
    P_MAGAZINES,
    PAGE_SHIFT,
    ROWS,
    S_LIMIT,
    S_SHIFT,
    SLAB_CACHES,
    SLAB_WORDS,
    W_END,
    W_FREE,
    W_LOW,
    W_NODES,
    W_SLAB,
    W_WAITERS,
    Z_COUNT,
    Z_OBJECTS,
    Z_USED,
    Buddy,
    Slabs,
)
from alloc.pcp import decay, drain_pages, row_at
from alloc.slab import FREE_ALREADY, claim, fault_of, restore

SLAB_ARGS = "i8[::1], u4[::1], u1[::1], i4[::1], u4[::1], u4[::1], u4[::1], u8[::1], u8[::1]"


@inlined
def _magazine_at(row_words, cache):
    """Index in `words` of a magazine of the row at `row_words`."""
    return row_words + P_MAGAZINES + cache * MAGAZINE_WORDS


@helper
def _unload(s, at, cache, nr):
    """Under the row's lock: the `nr` objects that lie longest go home; FREED or a bug's code."""
    words = s.words
    left = words[at + Z_COUNT] - nr
    code = restore(s, cache, at + Z_OBJECTS, nr)
    for i in range(at + Z_OBJECTS, at + Z_OBJECTS + left):
        words[i] = words[i + nr]
    words[at + Z_COUNT] = left
    return code


@helper
def _load(s, at, cache, rights):
    """Under the row's lock: fill an empty magazine by half; negated when below `low`."""
    wanted = s.words[W_SLAB + cache * SLAB_WORDS + S_LIMIT] >> 1
    if rights & RIGHTS_QUEUED != 0:
        wanted = np.int64(1)
    got = claim(s, cache, rights, at + Z_OBJECTS, wanted)
    s.words[at + Z_COUNT] = abs(got)
    return got


@inlined
def _alloc_here(s, mem, cache, rights, row):
    """`object_alloc` on one node."""
    words = s.words
    row_words = row_at(row)
    at = _magazine_at(row_words, cache)
    spin_lock(words, row_words + P_LOCK)
    n = words[at + Z_COUNT]
    below_low = False
    if n == 0:
        n = _load(s, at, cache, rights)
        below_low = n < 0
        n = abs(n)
    index = np.int64(WOULD_BLOCK)
    if n > 0:
        n -= 1
        index = words[at + Z_OBJECTS + n]
        words[at + Z_COUNT] = n
        words[at + Z_USED] = 1
    spin_unlock(words, row_words + P_LOCK)
    if index == WOULD_BLOCK:
        return index
    shift = words[W_SLAB + cache * SLAB_WORDS + S_SHIFT]
    memset(mem, index << shift, 0, 1 << shift)
    return -index if below_low else index


@helper
def _alloc_of(s, mem, cache, rights, row, asked):
    """Of the nodes that a request may use, the first that serves it with these rights; or 0."""
    wanted = wanted_node(asked)
    for n in range(s.words[W_NODES]):
        node = nth_node(s.words, wanted, n)
        if may_use(asked, node):
            got = _alloc_here(slabs_on(s, node), mem, cache, rights, row)
            if got != WOULD_BLOCK:
                return got
    return np.int64(WOULD_BLOCK)


@helper
def _alloc_along(s, mem, cache, asked, row):
    """`object_alloc` where there are several nodes."""
    rights = asked & RIGHTS_MASK
    while True:
        got = np.int64(WOULD_BLOCK)
        if rights & (3 | RIGHTS_QUEUED | RIGHTS_NONBLOCK) == RIGHTS_MIN:
            got = _alloc_of(s, mem, cache, rights | RIGHTS_LOW, row, asked)
        if got == WOULD_BLOCK:
            got = _alloc_of(s, mem, cache, rights, row, asked)
        if got != WOULD_BLOCK or asked & SOFT == 0:
            return got
        asked = let_go(asked)


@inlined
def object_alloc(s, mem, cache, rights, row):
    """A zeroed object's index, negated when free pages are now below `low`; or WOULD_BLOCK."""
    if rights & PLACED != 0:
        return _alloc_along(s, mem, cache, rights, row)
    return _alloc_here(s, mem, cache, rights, row)


@helper
def _lies_in(words, at, n, index):
    """Whether an object is one of the `n` in a magazine."""
    found = False
    for i in range(at + Z_OBJECTS, at + Z_OBJECTS + n):
        found |= words[i] == index
    return found


@inlined
def _free_here(s, cache, index, row):
    """`object_free` on one node."""
    code = fault_of(s, cache, index)
    if code < 0:
        return code
    words = s.words
    row_words = row_at(row)
    at = _magazine_at(row_words, cache)
    spin_lock(words, row_words + P_LOCK)
    n = words[at + Z_COUNT]
    if _lies_in(words, at, n, index):
        spin_unlock(words, row_words + P_LOCK)
        return np.int64(FREE_ALREADY)
    limit = words[W_SLAB + cache * SLAB_WORDS + S_LIMIT]
    if n == limit:
        code = _unload(s, at, cache, limit >> 1)
        n = words[at + Z_COUNT]
    words[at + Z_OBJECTS + n] = index
    words[at + Z_COUNT] = n + 1
    words[at + Z_USED] = 1
    if words[W_FREE] < words[W_LOW] or load_acquire(words, W_WAITERS) > 0:
        code = min(code, _unload(s, at, cache, n + 1))
    spin_unlock(words, row_words + P_LOCK)
    if code == FREED and load_acquire(words, W_WAITERS) > 0:
        return np.int64(FREED_AND_WAITERS)
    return code


@helper
def _free_home(s, cache, index, row, pfn):
    """`object_free` where the object is not node 0's."""
    return _free_here(slabs_on(s, node_of(s.words, pfn)), cache, index, row)


@inlined
def object_free(s, cache, index, row):
    """Give an object back: FREED, FREED_AND_WAITERS, or a negative code for a caller's bug."""
    pfn = index >> PAGE_SHIFT - s.words[W_SLAB + cache * SLAB_WORDS + S_SHIFT]
    if pfn >= s.words[W_END]:
        return _free_home(s, cache, index, row, pfn)
    return _free_here(s, cache, index, row)


@helper
def _unload_all(s, row_words, idle_only):
    """Under the row's lock: empty its magazines, or those that were idle; a bug's code or FREED."""
    code = np.int64(FREED)
    for cache in range(SLAB_CACHES):
        at = _magazine_at(row_words, cache)
        n = s.words[at + Z_COUNT]
        if n > 0 and (s.words[at + Z_USED] == 0 or not idle_only):
            code = min(code, _unload(s, at, cache, n))
        s.words[at + Z_USED] = 0
    return code


@kernel(f"i8({SLAB_ARGS}, u1[::1], i8, i8, i8)")
def slab_alloc(
    words, flags, order, refs, lru_next, lru_prev, mapping, low, high, mem, cache, rights, row
):
    """See `object_alloc`. The slab fast path: one call."""
    s = Slabs(words, flags, order, refs, lru_next, lru_prev, mapping, low, high)
    return object_alloc(s, mem, cache, rights, row)


@kernel(f"i8({SLAB_ARGS}, i8, i8, i8)")
def slab_free(words, flags, order, refs, lru_next, lru_prev, mapping, low, high, cache, index, row):
    """See `object_free`."""
    s = Slabs(words, flags, order, refs, lru_next, lru_prev, mapping, low, high)
    return object_free(s, cache, index, row)


@kernel(f"i8({SLAB_ARGS}, b1)")
def drain_rows(words, flags, order, refs, lru_next, lru_prev, mapping, low, high, wholesale):
    """All rows of a node give everything back (wholesale), or what they do not use: the refresh.

    A drain waits for each row's lock; a refresh leaves a row alone that is at work. FREED, or the
    code of a double free that came to light.
    """
    s = Slabs(words, flags, order, refs, lru_next, lru_prev, mapping, low, high)
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    code = np.int64(FREED)
    for row in range(ROWS):
        at = row_at(row)
        if wholesale:
            spin_lock(words, at + P_LOCK)
        elif not spin_trylock(words, at + P_LOCK):
            continue
        code = min(code, _unload_all(s, at, not wholesale))
        if wholesale:
            drain_pages(b, at)
        elif words[at + P_COUNT] > 0:
            decay(b, at)
        spin_unlock(words, at + P_LOCK)
    return code
