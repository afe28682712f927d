"""Halving: an allocated folio becomes two of half its size, each with a reference of its owner's.

The lower half stays what the folio was, and the upper one, the buddy that the allocator would have
split off, becomes a folio as well: owner, index, touches and what the LRU knows of it are the same,
and it follows the lower one in the same list. Nothing is copied, and no memory is needed; free
counts do not change, for both halves are in use. Who wants more pieces halves again.

Only a folio on the LRU that nobody but its owner has a reference to may be halved: then nobody
knows a page of it by number. The owner holds the lock under which it is looked up. Pages of one
block are of one node, so there is one LRU lock, under which sizes change, too: lists are counted
in pages. Who goes over descriptors without a lock (alloc/zone.py) sees one folio or two.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import load_acquire, spin_lock, spin_unlock
from alloc.jit import helper
from alloc.lru import list_of
from alloc.node import row_of
from alloc.page import (
    ACTIVE,
    DIRTY,
    HEAD,
    LOCKED,
    LRU,
    LRU_TAIL,
    REFERENCED,
    W_LRU_LOCK,
    WORKINGSET,
    WRITEBACK,
    Buddy,
)

# What both halves are; a mark for readahead or reclaim stays with the lower one, as in the kernel.
SHARED = HEAD | LRU | ACTIVE | REFERENCED | WORKINGSET | DIRTY


@helper
def may_halve(p, pfn):
    """Under the owner's lock: whether nobody but the owner uses a folio."""
    if p.flags[pfn] & (HEAD | LRU | LOCKED | WRITEBACK) != HEAD | LRU:
        return False
    return load_acquire(p.refs, pfn) == 1


@helper
def halve(words, p, pfn):
    """Under the owner's lock: halve a folio that may be; the pfn of its upper half."""
    order = np.int64(p.order[pfn]) - 1
    upper = pfn + (1 << order)
    p.mapping[upper] = p.mapping[pfn]
    p.index[upper] = p.index[pfn] + (1 << order)
    p.private[upper] = p.private[pfn]
    p.refs[upper] = 1
    row = row_of(words, pfn)
    spin_lock(words, row + W_LRU_LOCK)
    for page in range(pfn, upper + (1 << order)):
        p.order[page] = order
    p.flags[upper] = p.flags[pfn] & SHARED
    after = np.int64(p.lru_next[pfn])
    p.lru_next[pfn] = upper
    p.lru_prev[upper] = pfn
    p.lru_next[upper] = after
    if after != 0:
        p.lru_prev[after] = upper
    else:
        b = Buddy(words, p.flags, p.order, p.refs, p.lru_next, p.lru_prev)
        words[list_of(b, row, pfn) + LRU_TAIL] = upper
    spin_unlock(words, row + W_LRU_LOCK)
    return upper
