"""WRITE in the lane: the payload goes into the page cache, from memory to memory.

The IOLOCK is held exclusively. The write goes on folio by folio: what is ready takes a copy; if
nothing is, the next folio is made ready in the same section of the mapping's spin lock: pages that
the lane took before, blocks looked up in the extent map (ILOCK shared, only tried), space promised
from the stash, bits claimed, zeros where a block is written in part. Size and stamps change with
the copy that they belong to. A write of exactly one folio with nothing cached in its place puts
the payload folio itself into the mapping, and the lane takes another one.

A lane makes pages dirty only in free run, or what the file has credit for, and writes only to a
mapping that is on the flusher's list. When something is missing it parks: with nothing done and
nothing held, or, once bytes are in the cache, with the IOLOCK still held, so that the task that
goes on (`fs/front/laneslow.py`) continues the same atomic write.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import fetch_add, spin_lock, spin_unlock
from alloc.buddy import WOULD_BLOCK
from alloc.jit import helper
from alloc.libc import realtime_ns
from alloc.lru import ADD, lru_move
from alloc.page import DIRTY, LOCKED, W_MIGRATE
from alloc.touches import begin, touch
from fs.cache.blocks import (
    DIRTY_BLOCK,
    UPTODATE,
    change_bits,
    copy_ready,
    dirty_folio,
    note_write,
)
from fs.cache.incore import (
    I4_FORKOFF_FORMAT,
    I4_MAPPING,
    I4_MODE_FLAGS,
    I4_STATE,
    I8_SIZE,
    INODE_LONGS,
    INODE_WORDS,
    S_NOSEC,
)
from fs.cache.mapping import W_CREDIT, W_FLAGS
from fs.cache.radix import ANY, R_LOCK, find_entry, insert_entry, next_entry
from fs.file import S_ISGID, S_ISUID
from fs.front.handles import DATA_SYNC, FULL_SYNC, HANDLE_MASK, ORDINARY
from fs.front.laneclaim import READY, claim, fitting, have_nodes, take_pages
from fs.front.lanemap import (
    lock_file,
    mark_accessed,
    put_folio,
    take_folio,
    unlock_file,
)
from fs.front.laneread import park, ring
from fs.front.lanereply import OUT_BODY8, reply, u32, u64
from fs.front.lanestate import (
    ANSWERED,
    B_FLUSHER,
    BROKEN,
    C_READ_ONLY,
    C_SHUTDOWN,
    G_BLOCK_LOG,
    G_ORDER_MAX,
    G_ORDER_MIN,
    M_BELLS,
    M_DONE,
    M_HINT,
    M_HOME,
    M_LEN,
    M_LOCKED,
    M_NR_NODES,
    M_PAYLOAD,
    M_PAYLOAD_ORDER,
    M_QUEUE,
    M_REASON,
    PARK,
    R_DIRTY,
    R_LIST,
    R_MAP,
    R_MEMORY,
    R_MISS,
    R_PRIVILEGES,
    R_SHUTDOWN,
    R_SYNC,
)
from fs.front.lanestate import R_LOCK as R_LOCKED
from fs.front.wire import (
    RW_ARGS_END,
    RW_FH,
    RW_FLAGS,
    RW_OFFSET,
    RW_SIZE,
    WRITE_KILL_SUIDGID,
)
from fs.truncate import SIZE_MAX
from fs.xfs.stamp import EPOCH_NS
from writeback.dirty import (
    COUNT_BACKGROUND,
    COUNT_FREERUN,
    COUNT_LIMIT,
    NR_DIRTIED,
    NR_DIRTY,
    NR_WRITEBACK,
    RATELIMIT_PAGES,
)
from writeback.mapping import LISTED

LOOKS = 4  # at one folio: it is there, memory was taken, it is claimed, it is copied into


# -- folios ------------------------------------------------------------------------------------


@helper
def _dress(l, handle, pfn, at):
    """A folio of our own gets its place in the file, before it is in the mapping."""
    order = np.int64(l.order[pfn])
    l.mapping[pfn] = handle
    l.index[pfn] = (at >> 12) >> order << order
    for page in range(pfn, pfn + (1 << order)):
        l.blocks[page] = 0
    begin(l.words, l.free_low, pfn)


@helper
def _insert(l, root, pfn):
    """Put a dressed folio in, for which nodes are there and nothing is cached in its place."""
    left = l.me[M_NR_NODES]
    used, _ = insert_entry(
        l.m4, l.m8, l.order, root, l.index[pfn], np.int64(l.order[pfn]), pfn, l.nodes, left
    )
    l.me[M_NR_NODES] = left - max(used, 0)


@helper
def _is_dirty(l, root, at, end):
    """Whether one dirty folio holds [at, end): writing there makes nothing dirty."""
    pfn = find_entry(l.m4, root, at >> 12)
    if pfn == 0 or l.flags[pfn] & DIRTY == 0:
        return False
    return end <= (l.index[pfn] + (1 << np.int64(l.order[pfn]))) << 12


@helper
def _bar(l, root, at, end):
    """Under the spin lock: a reason why [at, end) may not be made dirty now, or READY."""
    if l.m4[root + W_FLAGS] & LISTED == 0:
        return R_LIST
    busy = l.dirty[NR_DIRTY] + l.dirty[NR_WRITEBACK]
    if busy < l.dirty[COUNT_FREERUN]:
        return READY
    if busy < l.dirty[COUNT_LIMIT] and np.int32(l.m4[root + W_CREDIT]) > 0:
        return READY
    return READY if _is_dirty(l, root, at, end) else R_DIRTY


@helper
def _written(l, handle, end, pages):
    """Under the spin lock: data up to `end` is in the cache, `pages` became dirty by it."""
    credit = handle * INODE_WORDS + I4_MAPPING + W_CREDIT
    l.m4[credit] = (np.int64(l.m4[credit]) - pages) & 0xFFFFFFFF
    note_write(l.m4, l.s8, handle, end, realtime_ns() + EPOCH_NS)
    dirtied = l.dirty[NR_DIRTIED]
    looks = dirtied // RATELIMIT_PAGES != (dirtied - pages) // RATELIMIT_PAGES
    if looks and l.dirty[NR_DIRTY] > l.dirty[COUNT_BACKGROUND]:
        l.me[M_BELLS] |= B_FLUSHER


@helper
def _settle(l, inserted, spare):
    """After the spin lock: the LRU, and folios that were held for it or not needed."""
    if inserted != 0:
        lru_move(l.words, l.flags, l.order, l.refs, l.lru_next, l.lru_prev, inserted, ADD)
    if l.me[M_HINT + 1] != 0:
        mark_accessed(l, l.me[M_HINT + 1])
        put_folio(l, l.me[M_HINT + 1])
    if spare != 0:
        l.mapping[spare] = 0
        put_folio(l, spare)


@helper
def _copy(l, root, at, end, source):
    """Under the spin lock: copy into what is ready; the position reached.

    The folio that me[M_HINT + 1] then asks to activate has got a reference: that is done without
    the lock, where it may be written and reclaimed meanwhile.
    """
    reached = copy_ready(
        l.m4, l.m8, l.mem, l.flags, l.order, l.index, l.blocks, l.dirty, root, l.geo[G_BLOCK_LOG],
        at, end, l.mem, source, l.me[M_HINT:],
    )  # fmt: skip
    if l.me[M_HINT + 1] != 0:
        fetch_add(l.refs, l.me[M_HINT + 1], 1)
    if l.words[W_MIGRATE] != 0 and reached > at:
        touch(l.words, l.free_low, find_entry(l.m4, root, at >> 12), l.me[M_HOME])
    return reached


@helper
def _copy_step(l, handle, at, end, source):
    """Copy to ready folios, or make the next one ready and copy to it: (position, reason)."""
    root = handle * INODE_WORDS + I4_MAPPING
    spare = np.int64(0)
    inserted = np.int64(0)
    reached = at
    reason = np.int64(READY)
    claimed = False
    l.me[M_HINT + 1] = 0
    spin_lock(l.m4, root + R_LOCK)
    for _ in range(LOOKS):
        if not claimed:
            reason = _bar(l, root, at, end)
        if reason != READY:
            break
        reached = _copy(l, root, at, end, source)
        if reached > at:
            _written(l, handle, reached, l.me[M_HINT])
            break
        pfn = find_entry(l.m4, root, at >> 12)
        if pfn == 0 and spare == 0:
            order = fitting(l, root, at, end - at)
            spin_unlock(l.m4, root + R_LOCK)
            if have_nodes(l):
                spare = take_pages(l, handle, at >> 12, order, l.geo[G_ORDER_MIN])
            spin_lock(l.m4, root + R_LOCK)
            if spare == 0:
                reason = R_MEMORY
                break
            continue
        if pfn == 0:
            _dress(l, handle, spare, at)
        elif l.flags[pfn] & LOCKED != 0:
            reason = R_MISS
            break
        folio = spare if pfn == 0 else pfn
        folio_end = (l.index[folio] + (1 << np.int64(l.order[folio]))) << 12
        reason = claim(l, handle, folio, at, min(end, folio_end))
        if reason != READY:
            break
        claimed = True  # what is claimed must become dirty
        if pfn == 0:
            _insert(l, root, spare)
            inserted, spare = spare, np.int64(0)
    spin_unlock(l.m4, root + R_LOCK)
    _settle(l, inserted, spare)
    return reached, reason


@helper
def _adopt(l, handle, pos, end):
    """Put the payload folio itself into the mapping, if it is the write's folio: whether it was."""
    root = handle * INODE_WORDS + I4_MAPPING
    order, folio = l.me[M_PAYLOAD_ORDER], l.me[M_PAYLOAD]
    size = np.int64(4096) << order
    if end - pos != size or pos & (size - 1) != 0 or l.me[M_QUEUE] >= 0:
        return False  # a queue entry keeps its folio
    if order < l.geo[G_ORDER_MIN] or order > l.geo[G_ORDER_MAX] or not have_nodes(l):
        return False
    log = l.geo[G_BLOCK_LOG]
    other = np.int64(0)
    adopted = False
    spin_lock(l.m4, root + R_LOCK)
    free = next_entry(l.m4, l.m8, l.order, root, pos >> 12, (end - 1) >> 12, ANY) == 0
    if free and _bar(l, root, pos, end) == READY:
        other = abs(take_folio(l, handle, pos >> 12, order))
    if other != WOULD_BLOCK:
        _dress(l, handle, folio, pos)
        if claim(l, handle, folio, pos, end) == READY:
            _insert(l, root, folio)
            change_bits(
                l.blocks, folio, pos, log, pos >> log, end >> log, UPTODATE | DIRTY_BLOCK, 0
            )
            pages = dirty_folio(l.m4, l.m8, l.flags, l.order, l.index, l.dirty, root, folio)
            _written(l, handle, end, pages)
            adopted = True
        else:
            l.mapping[folio] = 0
    spin_unlock(l.m4, root + R_LOCK)
    l.me[M_HINT + 1] = 0
    if adopted:
        l.me[M_PAYLOAD] = other
        _settle(l, folio, 0)
    elif other != WOULD_BLOCK:
        put_folio(l, other)
    return adopted


# -- requests ----------------------------------------------------------------------------------


@helper
def _hindrance(l, handle, pos, end):
    """Why an IOLOCKed inode's WRITE is not for a lane, or READY."""
    mode = np.int64(l.m4[handle * INODE_WORDS + I4_MODE_FLAGS])
    fh, flags = u64(l, RW_FH), u32(l, RW_FLAGS)
    if mode & (S_ISUID | S_ISGID) != 0 and (fh & ORDINARY != 0 or flags & WRITE_KILL_SUIDGID != 0):
        return R_PRIVILEGES
    attributes = np.int64(l.m4[handle * INODE_WORDS + I4_FORKOFF_FORMAT]) & 0xFF
    if attributes != 0 and l.m4[handle * INODE_WORDS + I4_STATE] & S_NOSEC == 0:
        return R_PRIVILEGES
    if pos > l.s8[handle * INODE_LONGS + I8_SIZE] or end > SIZE_MAX:
        return R_MAP
    return READY


@helper
def _write_locked(l, handle, pos, end):
    """Write as far as a lane can; the position reached, with me[M_REASON] if it is not the end."""
    source = l.me[M_PAYLOAD] << 12
    reason = _hindrance(l, handle, pos, end)
    at = pos
    if reason == READY and pos < end and _adopt(l, handle, pos, end):
        at = end
    while at < end and reason == READY:
        at, reason = _copy_step(l, handle, at, end, source + at - pos)
    l.me[M_REASON] = reason
    return at


@helper
def serve_write(l):
    """Answer the WRITE in hand, or park it; the payload is in the payload folio in hand."""
    fh, pos, size = u64(l, RW_FH), u64(l, RW_OFFSET), u32(l, RW_SIZE)
    if l.me[M_LEN] < RW_ARGS_END + size:
        return np.int64(BROKEN)
    if l.control[C_SHUTDOWN] != 0 or l.control[C_READ_ONLY] != 0:
        return park(l, R_SHUTDOWN)
    if fh & (DATA_SYNC | FULL_SYNC) != 0:
        return park(l, R_SYNC)
    handle = fh & HANDLE_MASK
    if pos < 0 or not lock_file(l, handle, False):
        return park(l, R_LOCKED)
    done = _write_locked(l, handle, pos, pos + size) - pos
    code = np.int64(ANSWERED)
    if 0 < done < size:
        l.me[M_DONE] = done
        l.me[M_LOCKED] = 1
        code = np.int64(PARK)
    else:
        unlock_file(l, handle, False)
        if done == size:
            l.out8[OUT_BODY8] = size  # struct fuse_write_out: size, padding
            reply(l, 0, 8)
        else:
            code = park(l, l.me[M_REASON])
    ring(l)
    return code
