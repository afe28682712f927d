"""The extent map of a file and its page cache, as lanes look at them.

A lane reads maps in EXTENTS format only: the records stand in the inode's image and need neither a
buffer nor a wait. It holds the ILOCK shared while it looks, which it only tries to take; whoever
changes the records or moves the forks holds it exclusively. Every lookup happens under the
mapping's spin lock, too. So what it finds for a block that is not cached, or not claimed, is true
until the spin lock is dropped: such a block gains content only through a folio.

The references and flags of folios (`take_folio`, `put_folio`, `mark_accessed`) are here as well,
because reading and writing need the same of them. Helpers only; nothing waits.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import load_acquire
from alloc.buddy import FREED_AND_WAITERS, RIGHTS_LOW, RIGHTS_MOVABLE
from alloc.jit import helper
from alloc.lru import lru_touch
from alloc.mempolicy import NONE
from alloc.page import ACTIVE, LRU, REFERENCED, Buddy
from alloc.pcp import put, take
from alloc.placement import place
from fs.buffered import HOLE, OWN, UNWRITTEN
from fs.cache.incore import (
    I4_FORKOFF_FORMAT,
    I4_ILOCK,
    I4_IMAGE,
    I4_IOLOCK,
    I4_MAPPING,
    I8_FLAGS2,
    I8_NEXTENTS,
    INODE_LONGS,
    INODE_WORDS,
)
from fs.cache.lock import SPINS, WAITED, try_lock, unlock
from fs.cache.mapping import W_POLICY
from fs.front.lanereply import u32
from fs.front.lanestate import (
    B_LOCKS,
    B_MEMORY,
    C_NR_USERS,
    G_INODE_LOG,
    M_BELLS,
    M_HOME,
    M_ROW,
)
from fs.front.userpolicy import policy_of
from fs.front.wire import H_UID
from fs.xfs import layout as L
from fs.xfs.extents import lookup

BLOCKS_END = 1 << 54  # behind every file block


@helper
def is_plain(l, handle):
    """Whether the data fork is a list of extents that no other file shares."""
    form = (np.int64(l.m4[handle * INODE_WORDS + I4_FORKOFF_FORMAT]) >> 8) & 0xFF
    flags2 = l.s8[handle * INODE_LONGS + I8_FLAGS2]
    return form == L.FMT_EXTENTS and flags2 & L.DIFLAG2_REFLINK == 0


@helper
def is_list(l, handle):
    """Whether the data fork is a list of extents."""
    return (np.int64(l.m4[handle * INODE_WORDS + I4_FORKOFF_FORMAT]) >> 8) & 0xFF == L.FMT_EXTENTS


@helper
def lock_file(l, handle, shared):
    """Take the IOLOCK if that needs no sleep: another lane has it for a few microseconds only."""
    word = handle * INODE_WORDS + I4_IOLOCK
    for _ in range(SPINS):
        if try_lock(l.m4, word, shared):
            return True
        if np.int64(load_acquire(l.m4, word)) & WAITED != 0:
            return False
    return False


@helper
def unlock_file(l, handle, shared):
    """Release the IOLOCK; the bell is rung by `ring`."""
    if unlock(l.m4, handle * INODE_WORDS + I4_IOLOCK, shared):
        l.me[M_BELLS] |= B_LOCKS


@helper
def lock_map(l, handle):
    """Take the ILOCK shared if that needs no waiting."""
    return try_lock(l.m4, handle * INODE_WORDS + I4_ILOCK, True)


@helper
def unlock_map(l, handle):
    """Release the ILOCK; the bell is rung when the spin lock is dropped."""
    if unlock(l.m4, handle * INODE_WORDS + I4_ILOCK, True):
        l.me[M_BELLS] |= B_LOCKS


@helper
def segment(l, handle, block):
    """What a file block is to a writer, HOLE, UNWRITTEN or OWN, and up to which block. ILOCKed."""
    image = np.int64(l.m4[handle * INODE_WORDS + I4_IMAGE]) << l.geo[G_INODE_LOG]
    n = l.s8[handle * INODE_LONGS + I8_NEXTENTS]
    offset, _, count, unwritten = lookup(l.mem, image + L.LITERAL, n, block)
    if offset < 0:
        return np.int64(HOLE), np.int64(BLOCKS_END)
    if offset > block:
        return np.int64(HOLE), offset
    return np.int64(UNWRITTEN if unwritten != 0 else OWN), offset + count


@helper
def _buddy(l):
    """The page allocator's arrays."""
    return Buddy(l.words, l.flags, l.order, l.refs, l.lru_next, l.lru_prev)


@helper
def take_folio(l, handle, index, order):
    """A folio for a file without touching what kswapd wants left, as `alloc.pcp.take` gives it."""
    number = np.int64(l.m4[handle * INODE_WORDS + I4_MAPPING + W_POLICY])
    if number == NONE and l.control[C_NR_USERS] != 0:
        number = policy_of(l.control, u32(l, H_UID))
    where = place(l.words, number, handle + (index >> order), l.me[M_HOME])
    return take(_buddy(l), l.me[M_ROW], order, RIGHTS_LOW | RIGHTS_MOVABLE | where)


@helper
def put_folio(l, pfn):
    """Drop a reference of a folio, maybe the last one."""
    if put(_buddy(l), l.me[M_ROW], pfn) == FREED_AND_WAITERS:
        l.me[M_BELLS] |= B_MEMORY


@helper
def mark_accessed(l, pfn):
    """A use of a folio that stays for now; the second one on the inactive list activates it."""
    state = np.int64(l.flags[pfn])
    if state & REFERENCED == 0 or state & (LRU | ACTIVE) == LRU:
        lru_touch(l.words, l.flags, l.order, l.refs, l.lru_next, l.lru_prev, pfn)
