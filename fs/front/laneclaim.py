"""What a WRITE in the lane needs before it can copy: pages, radix nodes, claimed blocks.

Memory is taken without touching what kswapd wants left (RIGHTS_LOW), and before the mapping's spin
lock. Claiming happens under it: the blocks of the range are looked up in the extent map, with the
ILOCK held shared from the first look to the last bit; those that are written in part get their
other content (zeros, unless the device has it); space for what is not claimed yet is promised from
the stash; then the bits say so. Either all of it happens or, but for zeros, nothing.

The kinds of blocks and their bits are those of `fs/buffered.py` and `fs/cache/blocks.py`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import fetch_add
from alloc.buddy import RIGHTS_LOW, WOULD_BLOCK
from alloc.jit import helper
from alloc.libc import memset
from alloc.magazine import object_alloc
from alloc.mempolicy import NONE
from alloc.page import Slabs
from alloc.placement import place
from fs.buffered import HOLE, OWN, UNWRITTEN
from fs.cache.blocks import (
    CLAIMED,
    MAPPED,
    PENDING,
    RESERVED,
    UPTODATE,
    block_bits,
    change_bits,
)
from fs.cache.folio import PATH_NODES
from fs.cache.incore import (
    I4_MAPPING,
    I4_MODE_FLAGS,
    I8_NEXTENTS,
    I8_SIZE,
    INODE_LONGS,
    INODE_WORDS,
)
from fs.cache.radix import ANY, next_entry
from fs.delalloc import promise_words
from fs.front.lanemap import is_plain, lock_map, segment, take_folio, unlock_map
from fs.front.lanestate import (
    B_KSWAPD,
    G_BLOCK_LOG,
    G_NODE_SLAB,
    G_ORDER_MAX,
    G_ORDER_MIN,
    G_TREE_LEVELS,
    G_TREE_RECORDS_MIN,
    M_BELLS,
    M_HOME,
    M_NR_NODES,
    M_ROW,
    R_LOCK,
    R_MAP,
    R_MISS,
    R_SPACE,
)
from fs.space import T_AVAIL, T_FREE
from fs.xfs import layout as L

READY = 0  # no reason to stop: R_OPCODE is no reason of a WRITE


# -- memory ------------------------------------------------------------------------------------


@helper
def take_pages(l, handle, index, order, least):
    """A folio of at most `order` and at least `least`, without touching what kswapd wants; or 0."""
    while order >= least:
        pfn = take_folio(l, handle, index, order)
        if pfn != WOULD_BLOCK:
            return abs(pfn)
        order -= 1
    l.me[M_BELLS] |= B_KSWAPD
    return np.int64(0)


@helper
def have_nodes(l):
    """Whether the lane has the spare nodes that any insertion may want; takes what is missing."""
    slabs = Slabs(
        l.words, l.flags, l.order, l.refs, l.lru_next, l.lru_prev, l.mapping, l.free_low,
        l.free_high,
    )  # fmt: skip
    where = place(l.words, NONE, 0, l.me[M_HOME])
    while l.me[M_NR_NODES] < PATH_NODES:
        kind = l.geo[G_NODE_SLAB]
        node = abs(object_alloc(slabs, l.mem, kind, RIGHTS_LOW | where, l.me[M_ROW]))
        if node == WOULD_BLOCK:
            l.me[M_BELLS] |= B_KSWAPD
            return False
        l.nodes[l.me[M_NR_NODES]] = node
        l.me[M_NR_NODES] += 1
    return True


@helper
def fitting(l, root, pos, length):
    """The folio order for a write: as `folio.write_order` asks, where nothing is cached yet."""
    index = pos >> 12
    order = np.int64(0)
    while order < l.geo[G_ORDER_MAX] and (8192 << order) <= length:
        order += 1
    while order > 0 and index & ((1 << order) - 1) != 0:
        order -= 1
    least = l.geo[G_ORDER_MIN]
    order = max(order, least)
    while order > least:
        first = (index >> order) << order
        last = first + (1 << order) - 1
        if next_entry(l.m4, l.m8, l.order, root, first, last, ANY) == 0:
            break
        order -= 1
    return order


# -- blocks ------------------------------------------------------------------------------------


@helper
def _count_unclaimed(l, handle, pfn, base, first, last):
    """Blocks of [first, last) that need data blocks, and that change the map. ILOCKed."""
    log = l.geo[G_BLOCK_LOG]
    data = np.int64(0)
    pending = np.int64(0)
    block = first
    while block < last:
        kind, until = segment(l, handle, block)
        until = min(until, last)
        if kind != OWN:
            for b in range(block, until):
                if block_bits(l.blocks, pfn, base, log, b) & CLAIMED == 0:
                    pending += 1
                    data += kind == HOLE
        block = until
    return data, pending


@helper
def _set_claims(l, handle, pfn, base, first, last):
    """Let the blocks of [first, last) be written, whose space is promised. ILOCKed."""
    log = l.geo[G_BLOCK_LOG]
    block = first
    while block < last:
        kind, until = segment(l, handle, block)
        until = min(until, last)
        add = MAPPED
        if kind == HOLE:
            add = RESERVED | PENDING
        elif kind == UNWRITTEN:
            add = PENDING
        for b in range(block, until):
            if block_bits(l.blocks, pfn, base, log, b) & CLAIMED == 0:
                change_bits(l.blocks, pfn, base, log, b, b + 1, add, 0)
        block = until


@helper
def _complete(l, handle, pfn, base, block, at, end):
    """Whether a block has, or is given, the content around [at, end); else it must be read."""
    log = l.geo[G_BLOCK_LOG]
    start = block << log
    if at <= start and end >= start + (1 << log):
        return True
    if block_bits(l.blocks, pfn, base, log, block) & UPTODATE != 0:
        return True
    kind, _ = segment(l, handle, block)
    if kind == OWN and start < l.s8[handle * INODE_LONGS + I8_SIZE]:
        return False
    memset(l.mem, (pfn << 12) + start - base, 0, 1 << log)
    change_bits(l.blocks, pfn, base, log, block, block + 1, UPTODATE, 0)
    return True


@helper
def _has_hint(l, handle):
    """Whether a file's holes get blocks before they are written to (fs/prealloc.py)."""
    flags = np.int64(l.m4[handle * INODE_WORDS + I4_MODE_FLAGS]) >> 16
    return flags & L.DIFLAG_EXTSIZE != 0


@helper
def _promise(l, handle, data, pending):
    """Promise space from the stash; False if it has too little."""
    root = handle * INODE_WORDS + I4_MAPPING
    nextents = l.s8[handle * INODE_LONGS + I8_NEXTENTS]
    taken = promise_words(
        l.m4, root, l.space, L.FMT_EXTENTS, nextents, data, pending, l.geo[G_TREE_LEVELS],
        l.geo[G_TREE_RECORDS_MIN],
    )  # fmt: skip
    if taken > 0:
        fetch_add(l.totals, T_FREE, -taken)
        fetch_add(l.totals, T_AVAIL, -taken)
    return taken >= 0


@helper
def claim(l, handle, pfn, at, end):
    """Under the spin lock: have [at, end) of a folio ready to be written; READY or a reason."""
    log = l.geo[G_BLOCK_LOG]
    base = l.index[pfn] << 12
    first = at >> log
    last = ((end - 1) >> log) + 1
    if not lock_map(l, handle):
        return R_LOCK
    reason = READY
    if not is_plain(l, handle):
        reason = R_MAP
    elif not (
        _complete(l, handle, pfn, base, first, at, end)
        and _complete(l, handle, pfn, base, last - 1, at, end)
    ):
        reason = R_MISS
    else:
        data, pending = _count_unclaimed(l, handle, pfn, base, first, last)
        if data > 0 and _has_hint(l, handle):
            reason = R_MAP
        elif pending > 0 and not _promise(l, handle, data, pending):
            reason = R_SPACE
        else:
            _set_claims(l, handle, pfn, base, first, last)
    unlock_map(l, handle)
    return reason
