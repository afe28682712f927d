"""Slab caches: objects of one power-of-two size, 32 to 4096 bytes, named by their index.

A slab is one page, so objects are naturally aligned and fill it without waste, and a cache never
needs a block that fragmentation could withhold. The whole arena viewed as the record type is the
cache's table: object i lives at byte i * size, `cache.table["field"][i]` is a field of it.

Which objects of a slab are free is a bitmap of up to 128 bits in its page descriptor (a set bit
is a free object), so a double free is always noticed. Slabs with a free object are linked in a
partial list; a slab that becomes empty goes back to the buddy at once. Records fill their slab to
the last byte, so there is nothing to colour it with.

Objects leave and come back in batches: the magazines in front (alloc/magazine.py) are what others
call. Each cache has its lock; it is taken before the buddy's.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import count_trailing_zeros, mask64, spin_lock, spin_unlock
from alloc.buddy import FREED, MT_SHIFT, WOULD_BLOCK, give_back, take
from alloc.jit import helper, inlined
from alloc.page import (
    HEAD,
    PAGE_SHIFT,
    RECLAIMABLE,
    S_LOCK,
    S_OBJECTS,
    S_PARTIAL,
    S_RECLAIMABLE,
    S_SHIFT,
    S_SLABS,
    SLAB,
    SLAB_WORDS,
    UNMOVABLE,
    W_SLAB,
    Buddy,
)

NOT_OF_THIS_CACHE = -1
FREE_ALREADY = -2


@helper
def _buddy(s):
    return Buddy(s.words, s.flags, s.order, s.refs, s.lru_next, s.lru_prev)


@helper
def _link_partial(s, at, pfn):
    head = s.words[at + S_PARTIAL]
    s.lru_next[pfn] = head
    s.lru_prev[pfn] = 0
    if head != 0:
        s.lru_prev[head] = pfn
    s.words[at + S_PARTIAL] = pfn


@helper
def _unlink_partial(s, at, pfn):
    after = np.int64(s.lru_next[pfn])
    before = np.int64(s.lru_prev[pfn])
    if after != 0:
        s.lru_prev[after] = before
    if before != 0:
        s.lru_next[before] = after
    else:
        s.words[at + S_PARTIAL] = after
    s.lru_next[pfn] = 0
    s.lru_prev[pfn] = 0


@helper
def _grow(s, cache, at, rights):
    """A new empty slab on the partial list; its pfn as `take` gives it, or WOULD_BLOCK."""
    mt = RECLAIMABLE if s.words[at + S_RECLAIMABLE] != 0 else UNMOVABLE
    got = take(_buddy(s), 0, rights | mt << MT_SHIFT)
    if got == WOULD_BLOCK:
        return got
    pfn = abs(got)
    per_slab = 1 << (PAGE_SHIFT - s.words[at + S_SHIFT])
    s.free_low[pfn] = mask64(min(per_slab, 64))
    s.free_high[pfn] = mask64(max(per_slab - 64, 0))
    s.mapping[pfn] = cache
    s.flags[pfn] = HEAD | SLAB
    s.words[at + S_SLABS] += 1
    _link_partial(s, at, pfn)
    return got


@helper
def _claim_bit(s, pfn):
    """Take the lowest free object of a partial slab; its number in the slab."""
    low = s.free_low[pfn]
    if low != 0:
        s.free_low[pfn] = low & (low - np.uint64(1))
        return count_trailing_zeros(low)
    high = s.free_high[pfn]
    s.free_high[pfn] = high & (high - np.uint64(1))
    return 64 + count_trailing_zeros(high)


@helper
def claim(s, cache, rights, out, nr):
    """Up to `nr` objects, their indices in words[out:], content undefined; how many.

    Negated when free pages are now below `low`; WOULD_BLOCK if there is none. A new slab is made
    for the first only.
    """
    at = W_SLAB + cache * SLAB_WORDS
    per_shift = PAGE_SHIFT - s.words[at + S_SHIFT]
    n = np.int64(0)
    below_low = False
    spin_lock(s.words, at + S_LOCK)
    while n < nr:
        pfn = s.words[at + S_PARTIAL]
        if pfn == 0:
            if n > 0:
                break
            got = _grow(s, cache, at, rights)
            if got == WOULD_BLOCK:
                break
            below_low = got < 0
            pfn = abs(got)
        s.words[out + n] = (pfn << per_shift) + _claim_bit(s, pfn)
        if s.free_low[pfn] == 0 and s.free_high[pfn] == 0:
            _unlink_partial(s, at, pfn)
        n += 1
    s.words[at + S_OBJECTS] += n
    spin_unlock(s.words, at + S_LOCK)
    return -n if below_low else n


@inlined
def fault_of(s, cache, index):
    """FREED if an object may be freed, else what speaks against it."""
    per_shift = PAGE_SHIFT - s.words[W_SLAB + cache * SLAB_WORDS + S_SHIFT]
    pfn = index >> per_shift
    if s.flags[pfn] & SLAB == 0 or s.mapping[pfn] != cache:
        return np.int64(NOT_OF_THIS_CACHE)
    bit = index & ((1 << per_shift) - 1)
    one = np.uint64(1) << np.uint64(bit & 63)
    if (s.free_low[pfn] if bit < 64 else s.free_high[pfn]) & one != 0:
        return np.int64(FREE_ALREADY)
    return np.int64(FREED)


@helper
def _restore_one(s, cache, at, index):
    """Under the lock: an object becomes free, its slab the buddy's if that is empty now."""
    per_shift = PAGE_SHIFT - s.words[at + S_SHIFT]
    per_slab = 1 << per_shift
    pfn = index >> per_shift
    bit = index & (per_slab - 1)
    low = s.free_low[pfn]
    high = s.free_high[pfn]
    one = np.uint64(1) << np.uint64(bit & 63)
    was_full = low == 0 and high == 0
    if bit < 64:
        low = low | one
    else:
        high = high | one
    s.free_low[pfn] = low
    s.free_high[pfn] = high
    s.words[at + S_OBJECTS] -= 1
    empty = low == mask64(min(per_slab, 64)) and high == mask64(max(per_slab - 64, 0))
    if was_full and not empty:
        _link_partial(s, at, pfn)
    elif empty:
        if not was_full:
            _unlink_partial(s, at, pfn)
        s.words[at + S_SLABS] -= 1
        s.free_low[pfn] = 0
        s.free_high[pfn] = 0
        s.mapping[pfn] = 0
        give_back(_buddy(s), pfn)


@helper
def restore(s, cache, first, nr):
    """Give the objects in words[first : first + nr] back; FREED or the last code for a bug."""
    at = W_SLAB + cache * SLAB_WORDS
    code = np.int64(FREED)
    spin_lock(s.words, at + S_LOCK)
    for i in range(first, first + nr):
        index = s.words[i]
        fault = fault_of(s, cache, index)
        if fault < 0:
            code = fault
        else:
            _restore_one(s, cache, at, index)
    spin_unlock(s.words, at + S_LOCK)
    return code
