"""READ in the lane: the reply is written from the page cache's folios, without a copy of our own.
(A request that came through a queue has its reply copied to the queue entry's payload instead.)

The IOLOCK is held shared from the look at the size to the end of the reply, so a read is atomic
for writers. Under the mapping's spin lock the pieces of the range are collected, with one reference
for each folio; then one writev(2) answers. Holes and unwritten blocks without a folio are answered
from page 0 of the arena, which is never handed out and always zero.

A lane parks what it cannot answer at once: the IOLOCK is taken, something is to be read from the
device, the map is a tree or is being changed, or the access time needs a transaction. Nothing has
happened then, and nothing is held. The trio side has `send`, the same with the IOLOCK held by the
caller, to be called again and again until everything is there (`fs/front/laneslow.py`).
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import fetch_add, spin_lock, spin_unlock
from alloc.jit import helper, kernel
from alloc.libc import address, memcpy, realtime_ns, writev
from alloc.page import PAGE_SHIFT
from alloc.touches import touch
from fs.buffered import OWN
from fs.cache.blocks import readable, take_marker
from fs.cache.incore import (
    I4_MAPPING,
    I4_MODE_FLAGS,
    I8_ATIME,
    I8_CTIME,
    I8_INO,
    I8_MTIME,
    I8_SIZE,
    INODE_LONGS,
    INODE_WORDS,
)
from fs.cache.mapping import W_FLAGS
from fs.cache.radix import ANY, R_LOCK, find_entry, next_entry
from fs.front.atime import DAY_NS
from fs.front.handles import APART, HANDLE_MASK
from fs.front.lanemap import (
    is_list,
    lock_file,
    lock_map,
    mark_accessed,
    put_folio,
    segment,
    unlock_file,
    unlock_map,
)
from fs.front.lanereply import bell, head, note_reply, send_placed, u32, u64
from fs.front.lanestate import (
    ANSWERED,
    BROKEN,
    C_ATIME,
    C_SHUTDOWN,
    G_BLOCK_LOG,
    M_BELLS,
    M_DONE,
    M_ENTRY,
    M_FD,
    M_HOME,
    M_LEN,
    M_LOCKED,
    M_MARKED,
    M_MARKED_INO,
    M_REASON,
    N_PAYLOAD,
    PARK,
    R_MAP,
    R_MISS,
    R_OPCODE,
    R_SHUTDOWN,
    R_TIMES,
    sample,
)
from fs.front.lanestate import (
    R_LOCK as R_LOCKED,
)
from fs.front.wire import OUT_HEADER, RW_ARGS_END, RW_FH, RW_OFFSET, RW_SIZE
from fs.xfs import layout as L
from fs.xfs.stamp import EPOCH_NS
from writeback.mapping import INODE_DIRTY, LISTED, LISTED_TIME

IOVECS = 1024  # of one writev(2)
NEVER, RELATIVE = 0, 1  # control[C_ATIME]


@helper
def park(l, reason):
    """The request is trio's, with nothing done and nothing held."""
    l.me[M_DONE] = 0
    l.me[M_LOCKED] = 0
    l.me[M_REASON] = reason
    return np.int64(PARK)


@helper
def ring(l):
    """Ring for what releasing locks and references has come to."""
    if l.me[M_BELLS] != 0:
        bell(l, l.me[M_BELLS])
        l.me[M_BELLS] = 0


@helper
def _append(l, n, addr, nbytes):
    """One more piece of the reply."""
    l.iov[2 * n] = address(l.mem, addr)
    l.iov[2 * n + 1] = nbytes
    return n + 1


@helper
def _zeros_until(l, handle, at, stop):
    """How far [at, stop), not up to date in the cache, reads as zeros; and why no further."""
    log = l.geo[G_BLOCK_LOG]
    if not lock_map(l, handle):
        return at, R_LOCKED
    reason = np.int64(R_MAP)
    if is_list(l, handle):
        last = ((stop - 1) >> log) + 1
        while at < stop:
            kind, until = segment(l, handle, at >> log)
            if kind == OWN:
                reason = np.int64(R_MISS)
                break
            at = min(stop, min(until, last) << log)
    unlock_map(l, handle)
    return at, reason


@helper
def _gap(l, root, pfn, at, end):
    """Where the range from `at` on ends in which nothing is up to date, or a part of it."""
    if pfn == 0:
        pfn = next_entry(l.m4, l.m8, l.order, root, at >> 12, (end - 1) >> 12, ANY)
        return end if pfn == 0 else l.index[pfn] << 12
    log = l.geo[G_BLOCK_LOG]
    return min(end, ((at >> log) + 1) << log)


@helper
def _collect(l, handle, at, end):
    """Under the spin lock: pieces of [at, end) from l.iov's second on; (pieces, position).

    Every folio among them has got a reference. me[M_REASON] says why it ended early.
    """
    root = handle * INODE_WORDS + I4_MAPPING
    n = np.int64(1)
    held = np.int64(0)
    while at < end:
        pfn = find_entry(l.m4, root, at >> 12)
        ready = at
        if pfn != 0:
            base = l.index[pfn] << 12
            stop = min(end, base + (4096 << np.int64(l.order[pfn])))
            ready = readable(l.blocks, pfn, base, l.geo[G_BLOCK_LOG], at, stop)
        if ready > at:
            n = _append(l, n, (pfn << 12) + at - base, ready - at)
            if pfn != held:
                fetch_add(l.refs, pfn, 1)
                held = pfn
            at = ready
        else:
            zeros, reason = _zeros_until(l, handle, at, _gap(l, root, pfn, at, end))
            if zeros == at:
                l.me[M_REASON] = reason
                break
            while at < zeros and n < IOVECS:
                part = min(zeros - at, 4096)
                n = _append(l, n, 0, part)
                at += part
        if n == IOVECS and at < end:
            l.me[M_REASON] = R_MISS
            break
    return n, at


@helper
def _release(l, n):
    """Drop the references behind n pieces; a use of each folio is noted first.

    me[M_MARKED] tells of a marker among them.
    """
    start = address(l.mem, 0)
    last = np.int64(0)
    for i in range(1, n):
        page = (np.int64(l.iov[2 * i]) - start) >> 12
        pfn = page & -(np.int64(1) << np.int64(l.order[page]))
        if page != 0 and pfn != last:
            last = pfn
            if take_marker(l.flags, pfn):
                l.me[M_MARKED] = l.index[pfn] + 1
            mark_accessed(l, pfn)
            touch(l.words, l.free_low, pfn, l.me[M_HOME])
            put_folio(l, pfn)


@helper
def _touch_time(l, handle):
    """Under the spin lock: move the access time if it is due; False if that takes a transaction."""
    policy = l.control[C_ATIME]
    flags = np.int64(l.m4[handle * INODE_WORDS + I4_MODE_FLAGS]) >> 16
    if policy == NEVER or flags & L.DIFLAG_NOATIME != 0:
        return True
    first = handle * INODE_LONGS
    atime = l.s8[first + I8_ATIME]
    now = realtime_ns() + EPOCH_NS
    newer = atime > l.s8[first + I8_MTIME] and atime > l.s8[first + I8_CTIME]
    if policy == RELATIVE and newer and now - atime < DAY_NS:
        return True
    word = handle * INODE_WORDS + I4_MAPPING + W_FLAGS
    if l.m4[word] & (LISTED | LISTED_TIME) == 0:
        return False
    l.s8[first + I8_ATIME] = now
    l.m4[word] |= INODE_DIRTY
    return True


@helper
def _place(l, n):
    """Copy n pieces but the first to the payload folio of the queue entry."""
    start = address(l.mem, 0)
    to = l.entries[l.me[M_ENTRY], N_PAYLOAD] << PAGE_SHIFT
    for i in range(1, n):
        nbytes = np.int64(l.iov[2 * i + 1])
        memcpy(l.mem, to, l.mem, np.int64(l.iov[2 * i]) - start, nbytes)
        to += nbytes


@helper
def _send(l, n, nbytes):
    """Answer with n pieces, the first of which is the header."""
    head(l, 0, nbytes)
    if l.me[M_ENTRY] >= 0:
        _place(l, n)
        return send_placed(l, nbytes)
    l.iov[0] = address(l.out, 0)
    l.iov[1] = OUT_HEADER
    return note_reply(l, writev(l.me[M_FD], l.iov, n))


@helper
def read_locked(l, handle, pos, size, times):
    """Answer a READ whose inode is IOLOCKed, or PARK; me[M_DONE] is then what was there of it."""
    l.me[M_MARKED] = 0
    end = min(pos + size, l.s8[handle * INODE_LONGS + I8_SIZE])
    if end <= pos:
        return _send(l, 1, 0)
    lock = handle * INODE_WORDS + I4_MAPPING + R_LOCK
    spin_lock(l.m4, lock)
    n, at = np.int64(1), pos
    if times and not _touch_time(l, handle):
        l.me[M_REASON] = R_TIMES
    else:
        n, at = _collect(l, handle, pos, end)
    spin_unlock(l.m4, lock)
    code = np.int64(PARK)
    if at == end:
        code = _send(l, n, end - pos)
    _release(l, n)
    l.me[M_DONE] = at - pos
    return code


@helper
def serve_read(l):
    """Answer the READ in hand, or park it."""
    if l.me[M_LEN] < RW_ARGS_END:
        return np.int64(BROKEN)
    fh, pos, size = u64(l, RW_FH), u64(l, RW_OFFSET), u32(l, RW_SIZE)
    if fh & APART != 0:
        return park(l, R_OPCODE)
    handle = fh & HANDLE_MASK
    if l.control[C_SHUTDOWN] != 0:
        return park(l, R_SHUTDOWN)
    if pos < 0 or not lock_file(l, handle, True):
        return park(l, R_LOCKED)
    code = read_locked(l, handle, pos, size, True)
    l.me[M_MARKED_INO] = l.s8[handle * INODE_LONGS + I8_INO]
    unlock_file(l, handle, True)
    ring(l)
    return code if code == ANSWERED else park(l, l.me[M_REASON])


@kernel(lambda: (sample(), 1, 1, 1))
def send(l, handle, pos, size):
    """read_locked for a task that holds the IOLOCK and has moved the access time."""
    code = read_locked(l, handle, pos, size, False)
    ring(l)
    return code
