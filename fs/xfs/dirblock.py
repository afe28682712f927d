"""Block-form directories: one data block with its leaf inside, as pure kernels.

The block starts like any data block (`dirdata`) and ends with a tail {count, stale} that the leaf
array (`dirleaf`) grows down from, into the unused region that borders on it. So adding a name may
need room twice: for the entry, and 8 bytes of the bordering region for its leaf slot, unless a
stale slot can be reused.

Also here: the conversions in which a block form takes part, other than shortform's (`dirsf`).
Kernels trust blocks that `verify` has accepted; callers hold the directory's ILOCK.

XFS format: magic XDB3; u32 count and u32 stale in the last 8 bytes, leaf entries before them.
"""

from __future__ import annotations

import numpy as np

from alloc.jit import helper, kernel
from fs.xfs import dirdata as D
from fs.xfs import dirleaf as F
from fs.xfs import layout as L
from fs.xfs.be import get16, get32, put16, put32
from fs.xfs.danode import hash_bytes

TAIL = L.DIR_BLOCK_TAIL.itemsize


@helper
def count_of(mem, addr, size):
    return get32(mem, addr + size - TAIL)


@helper
def stale_of(mem, addr, size):
    return get32(mem, addr + size - TAIL + 4)


@helper
def set_counts(mem, addr, size, count, stale):
    put32(mem, addr + size - TAIL, count)
    put32(mem, addr + size - TAIL + 4, stale)


@helper
def leaf_base(mem, addr, size):
    """Address of the first leaf slot."""
    return addr + size - TAIL - F.ENTRY * count_of(mem, addr, size)


# -- checking -----------------------------------------------------------------------------------


@helper
def _has_slot(mem, base, count, hash_value, place):
    i = F.array_search(mem, base, count, hash_value)
    while i < count and F.hash_of(mem, base, i) == hash_value:
        if F.addr_of(mem, base, i) == place:
            return True
        i += 1
    return False


@helper
def _check_names(mem, addr, end, base, count):
    """Number of entries, or -1 when one lacks its leaf slot."""
    offset = np.int64(D.HEADER)
    n = np.int64(0)
    while offset < end:
        length = D.region(mem, addr, offset, end)
        if length > 0:
            namelen = np.int64(mem[addr + offset + 8])
            hash_value = hash_bytes(mem, addr + offset + D.NAME_AT, namelen)
            if not _has_slot(mem, base, count, hash_value, offset >> 3):
                return np.int64(-1)
            n += 1
        offset += abs(length)
    return n


@kernel(lambda: (D.MEM, D.INT, D.INT, D.LIMITS))
def verify(mem, addr, size, limits):
    """Index into `dirdata.REASONS`: regions, bestfree, leaf order, and each name's leaf slot."""
    if get32(mem, addr) != L.MAGIC_DIR_BLOCK:
        return D.BAD_MAGIC
    count = count_of(mem, addr, size)
    if count > (size - D.HEADER - TAIL) // F.ENTRY:
        return D.BAD_COUNT
    end = D.area_end(mem, addr, size)
    fault = D.check_area(mem, addr, end, limits)
    if fault != D.GOOD:
        return fault
    base = leaf_base(mem, addr, size)
    stale = F.array_order(mem, base, count)
    if stale < 0:
        return D.BAD_ORDER
    if stale != stale_of(mem, addr, size):
        return D.BAD_STALE
    names = _check_names(mem, addr, end, base, count)
    if names < 0:
        return D.BAD_LEAF
    return D.GOOD if names == count - stale else D.BAD_COUNT


# -- lookup -------------------------------------------------------------------------------------


@kernel(lambda: (D.MEM, D.INT, D.INT, D.NAME))
def find(mem, addr, size, name):
    """(leaf index, offset) of a name's entry, or (-1, 0)."""
    base = leaf_base(mem, addr, size)
    count = count_of(mem, addr, size)
    end = D.area_end(mem, addr, size)
    hash_value = hash_bytes(name, 0, len(name))
    i = F.array_search(mem, base, count, hash_value)
    i = F.array_candidate(mem, base, count, i, hash_value)
    while i >= 0:
        offset = F.addr_of(mem, base, i) << 3
        live_here = D.region(mem, addr, offset, end) > 0
        if live_here and mem[addr + offset + 8] == len(name):
            same = D.same_name(mem, addr + offset + D.NAME_AT, name)
            if same:
                return i, offset
        i = F.array_candidate(mem, base, count, i + 1, hash_value)
    return np.int64(-1), np.int64(0)


@kernel("i8(u1[::1], i8, i8)")
def live(mem, addr, size):
    """Names in the block, "." and ".." included."""
    return count_of(mem, addr, size) - stale_of(mem, addr, size)


# -- changing -----------------------------------------------------------------------------------


@helper
def bordering(mem, addr, end):
    """Length of the unused region that ends at `end`, where the leaf begins; 0 if none does."""
    start = get16(mem, addr + end - 2)
    if start >= end or get16(mem, addr + start) != D.FREE_TAG:
        return np.int64(0)
    length = -D.region(mem, addr, start, end)
    return length if start + length == end else np.int64(0)


@helper
def _shed_stale(mem, addr, size):
    """Compact the leaf; the slots that fall free join the bordering unused region."""
    count, stale = count_of(mem, addr, size), stale_of(mem, addr, size)
    base = leaf_base(mem, addr, size)
    n = np.int64(count)
    for i in range(count - 1, -1, -1):
        if F.addr_of(mem, base, i) != 0:
            n -= 1
            if n != i:
                F.copy_slot(mem, base, i, base, n)
    end = D.area_end(mem, addr, size)
    set_counts(mem, addr, size, count - stale, 0)
    D.drop(mem, addr, end + F.ENTRY * stale, end, F.ENTRY * stale)


@helper
def _pick(mem, addr, end, need):
    """Offset of an unused region for an entry when the bordering one gives up a leaf slot."""
    for i in range(D.BESTS):
        offset, length = D.best_offset(mem, addr, i), D.best_length(mem, addr, i)
        if offset and offset + length == end:
            length -= F.ENTRY
        if offset and length >= need:
            return offset
    return np.int64(0)


@helper
def _grow_leaf(mem, addr, size, hash_value, place):
    """Insert a leaf slot below the array; the bordering region has been shortened for it."""
    count = count_of(mem, addr, size)
    base = leaf_base(mem, addr, size)
    index = F.array_search(mem, base, count, hash_value)
    for i in range(index):
        F.copy_slot(mem, base, i, base - F.ENTRY, i)
    F.put_slot(mem, base - F.ENTRY, index, hash_value, place)
    put32(mem, addr + size - TAIL, count + 1)


@helper
def _add_growing(mem, addr, size, name, hash_value, ino, ftype):
    """Add a name when no stale slot is left; its offset or -1."""
    need = D.entry_size(len(name))
    end = D.area_end(mem, addr, size)
    border = bordering(mem, addr, end)
    if border < F.ENTRY:
        return np.int64(-1)
    offset = _pick(mem, addr, end, need)
    if offset == 0:
        return np.int64(-1)
    if border > F.ENTRY:
        D.make_unused(mem, addr, end - border, border - F.ENTRY)
    D.take(mem, addr, offset, need)
    D.put_entry(mem, addr, offset, name, ino, ftype)
    _grow_leaf(mem, addr, size, hash_value, offset >> 3)
    D.rebuild_best(mem, addr, end - F.ENTRY)
    return offset


@kernel(lambda: (D.MEM, D.INT, D.INT, D.NAME, D.INT, D.INT))
def add(mem, addr, size, name, ino, ftype):
    """Add a name: its offset, or -1 if the directory must become leaf form for it."""
    need = D.entry_size(len(name))
    hash_value = hash_bytes(name, 0, len(name))
    stale = stale_of(mem, addr, size)
    end = D.area_end(mem, addr, size)
    if stale and D.best_length(mem, addr, 0) < need:
        if bordering(mem, addr, end) + F.ENTRY * (stale - 1) < need:
            return np.int64(-1)
        _shed_stale(mem, addr, size)
        stale = np.int64(0)
    if stale == 0:
        return _add_growing(mem, addr, size, name, hash_value, ino, ftype)
    offset = D.best_offset(mem, addr, 0)
    D.take(mem, addr, offset, need)
    D.put_entry(mem, addr, offset, name, ino, ftype)
    D.rebuild_best(mem, addr, end)
    base, count = leaf_base(mem, addr, size), count_of(mem, addr, size)
    index = F.array_search(mem, base, count, hash_value)
    F.array_reuse(mem, base, count, index, hash_value, offset >> 3)
    set_counts(mem, addr, size, count, stale - 1)
    return offset


@kernel(lambda: (D.MEM, D.INT, D.INT, D.NAME))
def fits(mem, addr, size, name):
    """Would `add` of a name of this length succeed?"""
    need = D.entry_size(len(name))
    end = D.area_end(mem, addr, size)
    border = bordering(mem, addr, end)
    stale = stale_of(mem, addr, size)
    if stale:
        return D.best_length(mem, addr, 0) >= need or border + F.ENTRY * (stale - 1) >= need
    return border >= F.ENTRY and _pick(mem, addr, end, need) != 0


@kernel("void(u1[::1], i8, i8, i8, i8)")
def remove(mem, addr, size, index, offset):
    """Remove the entry at offset, whose leaf slot is `index`."""
    put32(mem, leaf_base(mem, addr, size) + index * F.ENTRY + 4, 0)
    count, stale = count_of(mem, addr, size), stale_of(mem, addr, size)
    set_counts(mem, addr, size, count, stale + 1)
    length = D.entry_size(mem[addr + offset + 8])
    D.drop(mem, addr, D.area_end(mem, addr, size), offset, length)


# -- conversions --------------------------------------------------------------------------------


@kernel("void(u1[::1], i8, i8, i8)")
def to_leaf(mem, addr, leaf, size):
    """Move the leaf out into an initialised LEAF1 block and make this block plain data (XDD3)."""
    count, stale = count_of(mem, addr, size), stale_of(mem, addr, size)
    base = leaf_base(mem, addr, size)
    end = D.area_end(mem, addr, size)
    for i in range(count):
        F.copy_slot(mem, base, i, leaf + F.HEADER, i)
    F.set_counts(mem, leaf, count, stale)
    put32(mem, addr, L.MAGIC_DIR_DATA)
    D.drop(mem, addr, size, end, size - end)
    put32(mem, leaf + size - F.TAIL, 1)
    put16(mem, leaf + size - F.TAIL - F.BEST, D.best_length(mem, addr, 0))


@kernel("i8(u1[::1], i8, i8, i8)")
def from_leaf(mem, addr, leaf, size):
    """Take the live slots of a LEAF1 into data block 0, which becomes XDB3; -1: no room there."""
    n = F.count_of(mem, leaf) - F.stale_of(mem, leaf)
    need = TAIL + F.ENTRY * n
    border = bordering(mem, addr, size)
    if border < need:
        return -1
    if border > need:
        D.make_unused(mem, addr, size - border, border - need)
    put32(mem, addr, L.MAGIC_DIR_BLOCK)
    set_counts(mem, addr, size, n, 0)
    base = leaf_base(mem, addr, size)
    count = F.count_of(mem, leaf)
    at = np.int64(0)
    for i in range(count):
        if F.addr_of(mem, leaf + F.HEADER, i) != 0:
            F.copy_slot(mem, leaf + F.HEADER, i, base, at)
            at += 1
    D.rebuild_best(mem, addr, size - need)
    return 0
