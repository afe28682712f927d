"""Directory data blocks: entries, unused regions and the bestfree table, as pure kernels.

A data block holds names in the order in which they found room. The area behind the 64-byte header
is tiled without gaps by entries and unused regions; each ends with its own offset (the tag), so
that a removal finds the region before it. No two unused regions touch. `bestfree` names the three
largest. A block-form directory is one such block whose end holds the leaf (see `dirblock`), so
its data area is shorter: every kernel that walks gets the area's end from `area_end`.

Kernels take `(mem, addr)` and trust a block that `verify` has accepted; offsets that come from
another block (a leaf entry, a readdir cookie) are checked with `entry_at` first. Callers hold the
directory's ILOCK and do not await between a kernel's answer and its use.

XFS format: entry = ino u64, namelen u8, name, ftype u8, pad, tag u16, rounded up to 8 bytes;
unused = 0xffff u16, length u16, ..., tag u16; bestfree 3 x {offset u16, length u16}, descending.
"""

from __future__ import annotations

import numpy as np
from numba import typeof, types

from alloc.jit import helper, kernel
from fs.xfs import extents as X
from fs.xfs import layout as L
from fs.xfs.be import get16, get32, get64, put16, put32, put64
from fs.xfs.danode import hash_bytes

NAME = typeof(b"")  # numba's type of the names that kernels get
MEM, INT = types.uint8[::1], types.int64
LIMITS = types.int64[::1]

HEADER = L.DIR_DATA_HEADER.itemsize
BEST = L.off(L.DIR_DATA_HEADER, "bestfree")
TAIL = L.DIR_BLOCK_TAIL.itemsize
LEAF_ENTRY = L.DIR_LEAF_ENTRY.itemsize
BESTS = 3
FREE_TAG = 0xFFFF
ENTRY_MIN = 16
NAME_AT = 9  # name's offset in an entry, behind ino and namelen
MAXLEN = 255

REASONS = (
    "",
    "magic",
    "bestfree order",
    "bestfree does not match the unused regions",
    "unused region",
    "adjacent unused regions",
    "entry",
    "entry tag",
    "inode number of an entry",
    "file type of an entry",
    "leaf entry count",
    "leaf hash order",
    "leaf stale count",
    "leaf entry of a name",
)
(
    GOOD,
    BAD_MAGIC,
    BAD_BEST_ORDER,
    BAD_BEST,
    BAD_UNUSED,
    BAD_ADJACENT,
    BAD_ENTRY,
    BAD_TAG,
    BAD_INO,
    BAD_FTYPE,
    BAD_COUNT,
    BAD_ORDER,
    BAD_STALE,
    BAD_LEAF,
) = range(14)


# -- parts --------------------------------------------------------------------------------------


@helper
def entry_size(namelen):
    """Bytes of an entry: 8 ino, 1 length, name, 1 ftype, 2 tag, rounded up to 8."""
    return (np.int64(namelen) + 19) & ~7


def entry_bytes(namelen: int) -> int:
    """The same for Python, which must not call a helper: it would compile while others wait."""
    return (namelen + 19) & ~7


@kernel(lambda: (NAME,))
def name_hash(name):
    """The hash under which a name is found."""
    return hash_bytes(name, 0, len(name))


@helper
def ino_ok(value, limits):
    """May an entry name this inode: inside an AG and clear of its headers?"""
    if value >= np.uint64(1 << 56):
        return False
    ino = np.int64(value)
    agno = ino >> limits[X.AGINO_LOG]
    agino = ino & ((np.int64(1) << limits[X.AGINO_LOG]) - 1)
    agbno = agino >> (limits[X.AGINO_LOG] - limits[X.AG_BLOCK_LOG])
    if agno >= limits[X.AGCOUNT] or agbno < limits[X.AG_HEADER_BLOCKS]:
        return False
    if agno == limits[X.AGCOUNT] - 1:
        return agbno < limits[X.LAST_AG_BLOCKS]
    return agbno < limits[X.AG_BLOCKS]


@helper
def same_name(mem, at, name):
    """Are the bytes at `at` this name? The caller has compared the lengths."""
    i = 0
    while i < len(name) and mem[at + i] == name[i]:
        i += 1
    return i == len(name)


@helper
def _block_form(mem, addr):
    return get32(mem, addr) == L.MAGIC_DIR_BLOCK


@kernel("b1(u1[::1], i8)")
def is_block_form(mem, addr):
    """Is it the only block of its directory, with the leaf behind its data?"""
    return _block_form(mem, addr)


@helper
def area_end(mem, addr, size):
    """Offset behind the data area: the leaf's first entry in block form, else the block's end."""
    if _block_form(mem, addr):
        return size - TAIL - LEAF_ENTRY * get32(mem, addr + size - TAIL)
    return np.int64(size)


@helper
def best_offset(mem, addr, i):
    return get16(mem, addr + BEST + 4 * i)


@helper
def best_length(mem, addr, i):
    return get16(mem, addr + BEST + 4 * i + 2)


@helper
def set_best(mem, addr, i, offset, length):
    put16(mem, addr + BEST + 4 * i, offset)
    put16(mem, addr + BEST + 4 * i + 2, length)


@helper
def make_unused(mem, addr, offset, length):
    """Turn length bytes at offset into one unused region."""
    put16(mem, addr + offset, FREE_TAG)
    put16(mem, addr + offset + 2, length)
    put16(mem, addr + offset + length - 2, offset)


@helper
def region(mem, addr, offset, end):
    """The region at offset: its length, negative if it is unused; 0 if it is malformed."""
    if offset < HEADER or offset & 7 or offset + 8 > end:
        return np.int64(0)
    if get16(mem, addr + offset) == FREE_TAG:
        length = get16(mem, addr + offset + 2)
        if length < 8 or length & 7 or offset + length > end:
            return np.int64(0)
        return -length
    namelen = np.int64(mem[addr + offset + 8]) if offset + ENTRY_MIN <= end else np.int64(0)
    if namelen == 0 or offset + entry_size(namelen) > end:
        return np.int64(0)
    return entry_size(namelen)


@helper
def rebuild_best(mem, addr, end):
    """Recompute bestfree from the regions of a sound block. O(regions): 0.3 us at 4 KiB."""
    for i in range(BESTS):
        set_best(mem, addr, i, 0, 0)
    offset = np.int64(HEADER)
    while offset < end:
        length = region(mem, addr, offset, end)
        if length == 0:
            return
        if length > 0:
            offset += length
            continue
        length = -length
        if length > best_length(mem, addr, BESTS - 1):
            i = BESTS - 1
            while i > 0 and length > best_length(mem, addr, i - 1):
                set_best(mem, addr, i, best_offset(mem, addr, i - 1), best_length(mem, addr, i - 1))
                i -= 1
            set_best(mem, addr, i, offset, length)
        offset += length


# -- checking -----------------------------------------------------------------------------------


@helper
def _check_best(mem, addr):
    """Bits of the bestfree slots that are rightly empty, or -1 when the table is no table."""
    empty = np.int64(0)
    for i in range(BESTS):
        if best_offset(mem, addr, i) == 0:
            if best_length(mem, addr, i) != 0:
                return np.int64(-1)
            empty |= 1 << i
        if i and best_length(mem, addr, i) > best_length(mem, addr, i - 1):
            return np.int64(-1)
    return empty


@helper
def _match_best(mem, addr, offset, length):
    """Bit of the bestfree slot that names this region; 0: rightly in none; -1: contradiction."""
    for i in range(BESTS):
        if best_offset(mem, addr, i) == offset:
            return np.int64(1 << i) if best_length(mem, addr, i) == length else np.int64(-1)
    return np.int64(-1) if length > best_length(mem, addr, BESTS - 1) else np.int64(0)


@helper
def check_entry(mem, at, length, offset, limits):
    """GOOD, or what is wrong with the entry of `length` bytes at mem[at]."""
    if get16(mem, at + length - 2) != offset:
        return BAD_TAG
    if not ino_ok(get64(mem, at), limits):
        return BAD_INO
    if mem[at + NAME_AT + np.int64(mem[at + 8])] > L.FT_WHT:
        return BAD_FTYPE
    return GOOD


@helper
def check_area(mem, addr, end, limits):
    """GOOD, or what is wrong with the header's bestfree or the regions up to `end`."""
    seen = _check_best(mem, addr)
    if seen < 0:
        return BAD_BEST_ORDER
    offset = np.int64(HEADER)
    after_unused = False
    while offset < end:
        length = region(mem, addr, offset, end)
        if length == 0:
            return BAD_ENTRY if get16(mem, addr + offset) != FREE_TAG else BAD_UNUSED
        if length > 0:
            fault = check_entry(mem, addr + offset, length, offset, limits)
            if fault != GOOD:
                return fault
            after_unused = False
        else:
            length = -length
            bit = _match_best(mem, addr, offset, length)
            if bit < 0:
                return BAD_BEST
            if after_unused:
                return BAD_ADJACENT
            if get16(mem, addr + offset + length - 2) != offset:
                return BAD_UNUSED
            seen |= bit
            after_unused = True
        offset += length
    return GOOD if seen == (1 << BESTS) - 1 else BAD_BEST


@kernel(lambda: (MEM, INT, INT, INT))
def entry_at(mem, addr, size, offset):
    """Is there a live entry at this offset? For offsets that come from another block."""
    end = area_end(mem, addr, size)
    length = region(mem, addr, offset, end)
    return length > 0 and get16(mem, addr + offset + length - 2) == offset


@kernel(lambda: (MEM, INT, INT, LIMITS))
def verify_data(mem, addr, size, limits):
    """Index into REASONS for a data block that has no leaf inside (XDD3)."""
    if get32(mem, addr) != L.MAGIC_DIR_DATA:
        return BAD_MAGIC
    return check_area(mem, addr, size, limits)


# -- reading ------------------------------------------------------------------------------------


@kernel(lambda: (MEM, INT, INT, NAME))
def matches(mem, addr, offset, name):
    """Does the entry at a checked offset carry this name?"""
    if np.int64(mem[addr + offset + 8]) != len(name):
        return False
    return same_name(mem, addr + offset + NAME_AT, name)


@kernel("UniTuple(i8, 2)(u1[::1], i8, i8)")
def entry_ino(mem, addr, offset):
    """(ino, ftype) of the entry at a checked offset."""
    at = addr + offset
    return np.int64(get64(mem, at)), np.int64(mem[at + NAME_AT + np.int64(mem[at + 8])])


@kernel("void(u1[::1], i8, i8, i8, i8)")
def set_entry(mem, addr, offset, ino, ftype):
    """Point the entry at a checked offset at another inode."""
    at = addr + offset
    put64(mem, at, ino)
    mem[at + NAME_AT + np.int64(mem[at + 8])] = np.uint8(ftype)


@kernel(lambda: (MEM, INT, INT, INT, types.int64[:, ::1]))
def list_entries(mem, addr, size, start, out):
    """Fill rows {offset, ino, namelen, ftype} for entries at or behind `start`; returns how many.

    `start` may be any number: the walk begins at the first entry, as names come and go.
    """
    end = area_end(mem, addr, size)
    offset = np.int64(HEADER)
    n = np.int64(0)
    while offset < end and n < out.shape[0]:
        length = region(mem, addr, offset, end)
        if length == 0:
            break
        if length > 0 and offset >= start:
            at = addr + offset
            namelen = np.int64(mem[at + 8])
            out[n, 0] = offset
            out[n, 1] = np.int64(get64(mem, at))
            out[n, 2] = namelen
            out[n, 3] = np.int64(mem[at + NAME_AT + namelen])
            n += 1
        offset += abs(length)
    return n


@kernel("i8(u1[::1], i8)")
def longest(mem, addr):
    """Bytes of the largest unused region: what the bests tables record of a block."""
    return best_length(mem, addr, 0)


# -- changing -----------------------------------------------------------------------------------


@helper
def put_entry(mem, addr, offset, name, ino, ftype):
    """Write an entry over whatever was there."""
    at = addr + offset
    length = entry_size(len(name))
    put64(mem, at, ino)
    mem[at + 8] = np.uint8(len(name))
    for i in range(len(name)):
        mem[at + NAME_AT + i] = name[i]
    mem[at + NAME_AT + len(name)] = np.uint8(ftype)
    for i in range(NAME_AT + len(name) + 1, length - 2):
        mem[at + i] = np.uint8(0)
    put16(mem, at + length - 2, offset)


@helper
def take(mem, addr, offset, need):
    """Cut the first `need` bytes off the unused region at offset, for an entry to be written."""
    rest = get16(mem, addr + offset + 2) - need
    if rest > 0:
        make_unused(mem, addr, offset + need, rest)


@helper
def drop(mem, addr, end, offset, length):
    """Make length bytes at offset unused, merged with unused neighbours; bestfree follows."""
    start = np.int64(offset)
    stop = start + length
    if start > HEADER:
        before = get16(mem, addr + start - 2)
        if before < start and region(mem, addr, before, end) == before - start:
            start = before
    if stop < end:
        after = region(mem, addr, stop, end)
        if after < 0:
            stop -= after
    make_unused(mem, addr, start, stop - start)
    rebuild_best(mem, addr, end)


@kernel(lambda: (MEM, INT, INT, INT))
def init(mem, addr, size, magic):
    """Make an empty block of a zeroed buffer: magic, and one unused region up to `size`."""
    put32(mem, addr, magic)
    make_unused(mem, addr, HEADER, size - HEADER)
    rebuild_best(mem, addr, size)


@kernel(lambda: (MEM, INT, INT, NAME, INT, INT))
def add(mem, addr, size, name, ino, ftype):
    """Put an entry into the largest unused region; its offset, or -1 if it does not fit."""
    need = entry_size(len(name))
    end = area_end(mem, addr, size)
    if best_length(mem, addr, 0) < need:
        return np.int64(-1)
    offset = best_offset(mem, addr, 0)
    take(mem, addr, offset, need)
    put_entry(mem, addr, offset, name, ino, ftype)
    rebuild_best(mem, addr, end)
    return offset


@kernel("void(u1[::1], i8, i8, i8)")
def remove(mem, addr, size, offset):
    """Free the entry at a checked offset."""
    length = entry_size(mem[addr + offset + 8])
    drop(mem, addr, area_end(mem, addr, size), offset, length)


@kernel("b1(u1[::1], i8, i8, i8)")
def is_alone(mem, addr, size, offset):
    """Is the entry at a checked offset the only one of a leafless data block?

    Then there are at most two unused regions, so that bestfree knows them all.
    """
    unused = np.int64(0)
    for i in range(BESTS):
        unused += best_length(mem, addr, i)
    return unused + entry_size(mem[addr + offset + 8]) == size - HEADER
