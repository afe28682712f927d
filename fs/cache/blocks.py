"""Per-block state of folios, and the kernels that move file data in and out of them.

Every page descriptor has a word of bits for the filesystem blocks in its page, in groups of four:
UPTODATE (content valid), DIRTY (to be written), RESERVED (a free block is promised to it), MAPPED
(it has a written block of its own: overwriting needs nothing more) and PENDING (its write-back
changes the extent map; counted in the mapping). Blocks larger than a page use the first bit of
each group in all their pages, which always change together. A *unit* is the smaller of block and
page; kernels loop over units and take blocks by number in the file.

A write may be copied into a block that is DIRTY, RESERVED, MAPPED or PENDING, and UPTODATE if the
write does not cover all of it. A DIRTY block stays RESERVED or PENDING until its write-back is
done. Bits change under the mapping's spin lock; kernels here take it. So do the size and the time
stamps that a write changes (`note_write`): a lane changes them in the section of the lock in which
it copies, so that write-back finds with each dirty block the size that covers it.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numba.core import types

from alloc.atomic import fetch_add, fetch_and, fetch_or, spin_lock, spin_unlock
from alloc.jit import helper, kernel
from alloc.libc import memcmp, memcpy, memset
from alloc.page import ACTIVE, DIRTY, LOCKED, LRU, READAHEAD, REFERENCED
from fs.cache import radix
from fs.cache.incore import (
    I4_MAPPING,
    I8_CHANGECOUNT,
    I8_CTIME,
    I8_MTIME,
    I8_SIZE,
    INODE_LONGS,
    INODE_WORDS,
)
from fs.cache.mapping import W_FLAGS, W_NDIRTY
from fs.cache.radix import R_LOCK, clear_tag, find_entry, set_tag
from writeback.dirty import NR_DIRTIED, NR_DIRTY
from writeback.mapping import INODE_DIRTY

UPTODATE = 1 << 0
DIRTY_BLOCK = 1 << 4
RESERVED = 1 << 8
MAPPED = 1 << 12
PENDING = 1 << 16
CLAIMED = DIRTY_BLOCK | RESERVED | MAPPED | PENDING
EVERY = UPTODATE | CLAIMED

_READ_ONLY = types.Array(types.uint8, 1, "C", readonly=True)
_FOLIOS = (types.uint32[::1], types.uint8[::1], types.int64[::1], types.uint32[::1])
_I8 = types.int64
_OUT = types.int64[::1]


@helper
def unit_log_of(block_log):
    return min(block_log, 12)


@helper
def block_bits(blocks, pfn, base, block_log, block):
    """The bits of one block, shifted down to the group positions."""
    unit_log = unit_log_of(block_log)
    unit = ((block << block_log) - base) >> unit_log
    in_page = 12 - unit_log
    return np.int64(blocks[pfn + (unit >> in_page)]) >> (unit & ((1 << in_page) - 1))


@helper
def change_bits(blocks, pfn, base, block_log, first, last, add, remove):
    """Change the bits of blocks [first, last)."""
    unit_log = unit_log_of(block_log)
    in_page = 12 - unit_log
    unit = ((first << block_log) - base) >> unit_log
    end = ((last << block_log) - base) >> unit_log
    while unit < end:
        page = pfn + (unit >> in_page)
        shift = unit & ((1 << in_page) - 1)
        blocks[page] = (np.int64(blocks[page]) & ~(remove << shift)) | (add << shift)
        unit += 1


@helper
def _writable(blocks, pfn, base, block_log, at, stop):
    """How far a copy into [at, stop) may go; `at` if it may not begin."""
    block = at >> block_log
    while block << block_log < stop:
        start = block << block_log
        bits = block_bits(blocks, pfn, base, block_log, block)
        partial = at > start or stop < start + (1 << block_log)
        if bits & CLAIMED == 0 or (partial and bits & UPTODATE == 0):
            return max(at, start)
        block += 1
    return stop


@helper
def has_dirty(blocks, pfn, pages):
    """Whether any block in so many pages is dirty."""
    bits = np.int64(0)
    for page in range(pfn, pfn + pages):
        bits |= np.int64(blocks[page])
    return bits & (DIRTY_BLOCK * 15) != 0


@helper
def readable(blocks, pfn, base, block_log, at, stop):
    """How far [at, stop) is up to date."""
    block = at >> block_log
    while block << block_log < stop:
        if block_bits(blocks, pfn, base, block_log, block) & UPTODATE == 0:
            return max(at, block << block_log)
        block += 1
    return stop


@helper
def _touch(flags, pfn, out):
    """First use: REFERENCED; the second asks, in out[1], for the folio to be activated."""
    if flags[pfn] & REFERENCED == 0:
        fetch_or(flags, pfn, REFERENCED)
    elif flags[pfn] & (LRU | ACTIVE) == LRU:
        out[1] = pfn


@helper
def take_marker(flags, pfn):
    """Whether a folio had readahead's marker, which is gone now: one reader gets it."""
    if flags[pfn] & READAHEAD == 0:
        return False
    return fetch_and(flags, pfn, 0xFFFFFFFF ^ READAHEAD) & READAHEAD != 0


@helper
def dirty_folio(m4, m8, flags, orders, indices, counts, root, pfn):
    """Under the lock: flag, tag and count a folio as dirty; pages that became dirty."""
    if flags[pfn] & DIRTY != 0:
        return np.int64(0)
    fetch_or(flags, pfn, DIRTY)
    set_tag(m4, m8, orders, root, indices[pfn], radix.DIRTY)
    pages = np.int64(1) << np.int64(orders[pfn])
    m4[root + W_NDIRTY] += pages
    fetch_add(counts, NR_DIRTY, pages)
    fetch_add(counts, NR_DIRTIED, pages)
    return pages


@helper
def copy_ready(
    m4, m8, mem, flags, orders, indices, blocks, counts, root, block_log, pos, end, data, start,
    out,
):  # fmt: skip
    """Under the lock: `copy_in`'s work, from data[start:] to [pos, end); the position reached."""
    at = pos
    out[0] = 0
    out[1] = 0
    while at < end:
        pfn = find_entry(m4, root, at >> 12)
        if pfn == 0 or flags[pfn] & LOCKED != 0:
            break
        base = indices[pfn] << 12
        stop = min(end, base + (4096 << np.int64(orders[pfn])))
        ready = _writable(blocks, pfn, base, block_log, at, stop)
        if ready == at:
            break
        memcpy(mem, (pfn << 12) + at - base, data, start + at - pos, ready - at)
        first = at >> block_log
        last = ((ready - 1) >> block_log) + 1
        change_bits(blocks, pfn, base, block_log, first, last, UPTODATE | DIRTY_BLOCK, 0)
        out[0] += dirty_folio(m4, m8, flags, orders, indices, counts, root, pfn)
        _touch(flags, pfn, out)
        at = ready
        if ready < stop:
            break
    return at


@helper
def undirty_folio(m4, m8, flags, orders, indices, counts, root, pfn):
    """Under the lock: a folio without dirty blocks is clean, unwritten or written."""
    if flags[pfn] & DIRTY == 0:
        return
    pages = np.int64(1) << np.int64(orders[pfn])
    fetch_and(flags, pfn, 0xFFFFFFFF ^ DIRTY)
    clear_tag(m4, m8, orders, root, indices[pfn], radix.DIRTY)
    clear_tag(m4, m8, orders, root, indices[pfn], radix.TOWRITE)
    m4[root + W_NDIRTY] -= pages
    fetch_add(counts, NR_DIRTY, -pages)


@helper
def note_write(m4, s8, handle, end, now):
    """Under the lock: a file was written up to byte `end`, at `now` (an XFS stamp)."""
    longs = handle * INODE_LONGS
    if end > s8[longs + I8_SIZE]:
        s8[longs + I8_SIZE] = end
    s8[longs + I8_MTIME] = now
    s8[longs + I8_CTIME] = now
    s8[longs + I8_CHANGECOUNT] += 1
    m4[handle * INODE_WORDS + I4_MAPPING + W_FLAGS] |= np.uint32(INODE_DIRTY)


@kernel("void(u4[::1], i8[::1], i8, i8, i8)")
def written(m4, s8, handle, end, now):
    """Size, stamps and INODE_DIRTY of a write."""
    root = handle * INODE_WORDS + I4_MAPPING
    spin_lock(m4, root + R_LOCK)
    note_write(m4, s8, handle, end, now)
    spin_unlock(m4, root + R_LOCK)


@kernel(
    lambda: (
        types.uint32[::1],
        types.uint64[::1],
        types.uint8[::1],
        *_FOLIOS,
        _OUT,
        _I8,
        _I8,
        _I8,
        _READ_ONLY,
        _I8,
        _I8,
        _OUT,
    )
)
def copy_in(
    m4, m8, mem, flags, orders, indices, blocks, counts, root, block_log, pos, data, start,
    length, out,
):  # fmt: skip
    """Copy data[start:start+length] to file position `pos` as far as folios are ready for it.

    Returns bytes copied, which are dirty then. out[0]: pages that became dirty, out[1]: a folio
    to activate, or 0.
    """
    spin_lock(m4, root + R_LOCK)
    at = copy_ready(
        m4, m8, mem, flags, orders, indices, blocks, counts, root, block_log, pos, pos + length,
        data, start, out,
    )  # fmt: skip
    spin_unlock(m4, root + R_LOCK)
    return at - pos


@kernel(
    "i8(u4[::1], u1[::1], u4[::1], u1[::1], i8[::1], u4[::1], i8, i8, i8, u1[::1], i8, i8, i8[::1])"
)
def copy_out(
    m4, mem, flags, orders, indices, blocks, root, block_log, pos, target, start, length, out
):
    """Copy from file position `pos` to target[start:start+length] as far as it is cached.

    Returns bytes copied. out[1]: a folio to activate, out[2]: one that had the marker, or 0.
    """
    at = pos
    end = pos + length
    out[1] = out[2] = 0
    spin_lock(m4, root + R_LOCK)
    while at < end:
        pfn = find_entry(m4, root, at >> 12)
        if pfn == 0:
            break
        base = indices[pfn] << 12
        stop = min(end, base + (4096 << np.int64(orders[pfn])))
        ready = readable(blocks, pfn, base, block_log, at, stop)
        memcpy(target, start + at - pos, mem, (pfn << 12) + at - base, ready - at)
        if ready > at:
            _touch(flags, pfn, out)
            if take_marker(flags, pfn):
                out[2] = pfn
        at = ready
        if ready < stop:
            break
    spin_unlock(m4, root + R_LOCK)
    return at - pos


@kernel("i8(u4[::1], u4[::1], u1[::1], i8[::1], u4[::1], i8, i8, i8, i8, i8[::1])")
def locate(m4, flags, orders, indices, blocks, root, block_log, pos, length, out):
    """Byte address of [pos, pos+length) if one folio holds all of it up to date, else -1.

    `out` as copy_out has it.
    """
    address = np.int64(-1)
    out[1] = out[2] = 0
    spin_lock(m4, root + R_LOCK)
    pfn = find_entry(m4, root, pos >> 12)
    if pfn != 0:
        base = indices[pfn] << 12
        end = pos + length
        inside = end <= base + (4096 << np.int64(orders[pfn]))
        if inside and readable(blocks, pfn, base, block_log, pos, end) == end:
            address = (pfn << 12) + pos - base
            _touch(flags, pfn, out)
            if take_marker(flags, pfn):
                out[2] = pfn
    spin_unlock(m4, root + R_LOCK)
    return address


@kernel("i8(u4[::1], u4[::1], i8, i8, i8, i8, i8, i8, i8, i8)")
def change(m4, blocks, root, pfn, base, block_log, first, last, add, remove):
    """Change the bits of blocks [first, last) of a folio that starts at byte `base`."""
    spin_lock(m4, root + R_LOCK)
    change_bits(blocks, pfn, base, block_log, first, last, add, remove)
    spin_unlock(m4, root + R_LOCK)
    return last - first


@kernel("i8(u4[::1], u4[::1], i8, i8, i8, i8, i8, i8, i8)")
def claim(m4, blocks, root, pfn, base, block_log, first, last, add):
    """Give `add` to the blocks of [first, last) that are not claimed yet; how many.

    With add = 0 they are only counted.
    """
    n = np.int64(0)
    spin_lock(m4, root + R_LOCK)
    for block in range(first, last):
        if block_bits(blocks, pfn, base, block_log, block) & CLAIMED == 0:
            n += 1
            change_bits(blocks, pfn, base, block_log, block, block + 1, add, 0)
    spin_unlock(m4, root + R_LOCK)
    return n


@kernel("i8(u4[::1], u4[::1], i8, i8, i8, i8, i8, i8, i8[:, ::1])")
def missing(m4, blocks, root, pfn, base, block_log, first, last, runs):
    """Runs (block, count) of [first, last) that are not up to date; how many runs."""
    n = np.int64(0)
    spin_lock(m4, root + R_LOCK)
    for block in range(first, last):
        if block_bits(blocks, pfn, base, block_log, block) & UPTODATE != 0:
            continue
        if n > 0 and runs[n - 1, 0] + runs[n - 1, 1] == block:
            runs[n - 1, 1] += 1
            continue
        if n == runs.shape[0]:
            break
        runs[n, 0] = block
        runs[n, 1] = 1
        n += 1
    spin_unlock(m4, root + R_LOCK)
    return n


@kernel("i8(u4[::1], u1[::1], u4[::1], i8, i8, i8, i8, i8, i8)")
def zero_missing(m4, mem, blocks, root, pfn, base, block_log, first, last):
    """Zero the blocks of [first, last) that are not up to date, and make them so; how many."""
    n = np.int64(0)
    spin_lock(m4, root + R_LOCK)
    for block in range(first, last):
        if block_bits(blocks, pfn, base, block_log, block) & UPTODATE == 0:
            memset(mem, (pfn << 12) + (block << block_log) - base, 0, 1 << block_log)
            change_bits(blocks, pfn, base, block_log, block, block + 1, UPTODATE, 0)
            n += 1
    spin_unlock(m4, root + R_LOCK)
    return n


@kernel("i8(u1[::1], i8, i8)")
def is_zero(mem, addr, length):
    """Whether mem[addr:addr+length] is all zero bytes."""
    if length == 0:
        return 1
    if mem[addr] != 0:
        return 0
    return np.int64(memcmp(mem, addr, mem, addr + 1, length - 1) == 0)


@kernel(
    "void(u4[::1], u8[::1], u1[::1], u4[::1], u1[::1], i8[::1], u4[::1], i8[::1], i8, i8, i8,"
    " i8, i8, i8[::1])"
)
def cut(
    m4, m8, mem, flags, orders, indices, blocks, counts, root, pfn, block_log, start, end, out
):
    """Throw away bytes [start, end) of a folio: zero them and forget the blocks wholly inside.

    A folio without dirty blocks is clean then. out[0]: RESERVED blocks forgotten, out[1]: PENDING.
    """
    out[0] = 0
    out[1] = 0
    spin_lock(m4, root + R_LOCK)
    base = indices[pfn] << 12
    memset(mem, (pfn << 12) + start - base, 0, end - start)
    first = (start + (1 << block_log) - 1) >> block_log
    last = end >> block_log
    for block in range(first, last):
        bits = block_bits(blocks, pfn, base, block_log, block)
        out[0] += (bits & RESERVED) // RESERVED
        out[1] += (bits & PENDING) // PENDING
        change_bits(blocks, pfn, base, block_log, block, block + 1, 0, EVERY)
    if not has_dirty(blocks, pfn, np.int64(1) << np.int64(orders[pfn])):
        undirty_folio(m4, m8, flags, orders, indices, counts, root, pfn)
    spin_unlock(m4, root + R_LOCK)


@kernel("i8(u4[::1], u8[::1], u4[::1], u1[::1], i8[::1], u4[::1], i8[::1], i8, i8, i8, i8, i8)")
def redirty(m4, m8, flags, orders, indices, blocks, counts, root, pfn, block_log, first, last):
    """Make blocks [first, last) of a folio dirty, whose content was changed in place; new pages."""
    spin_lock(m4, root + R_LOCK)
    base = indices[pfn] << 12
    change_bits(blocks, pfn, base, block_log, first, last, DIRTY_BLOCK, 0)
    pages = dirty_folio(m4, m8, flags, orders, indices, counts, root, pfn)
    spin_unlock(m4, root + R_LOCK)
    return pages


@kernel("void(u4[::1], i8, i8)")
def set_flags(flags, pfn, bits):
    """Set page flags of a folio."""
    fetch_or(flags, pfn, bits)


@kernel("b1(u4[::1], i8)")
def marker_taken(flags, pfn):
    """take_marker for tasks."""
    return take_marker(flags, pfn)


@kernel("void(u4[::1], i8, i8)")
def clear_flags(flags, pfn, bits):
    """Clear page flags of a folio."""
    fetch_and(flags, pfn, 0xFFFFFFFF ^ bits)
