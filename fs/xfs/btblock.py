"""Kernels over single B+tree blocks, the same for all seven trees.

A block is `(mem, addr, size, kind)`: `mem` an array of bytes, `addr` the block's first byte in
it, `size` its length and `kind` a small integer that fixes header, record, key and pointer
widths and the order of keys. XFS format: level and record count are 16-bit fields at bytes 4 and
6; a leaf holds records behind its header, a node holds keys for *maxrecs* slots and the pointers
behind those. The root of a file's extent tree lives in the inode fork, where only level and count
precede the keys; seen from four bytes before the fork it is a block with an 8-byte header, kind
BMAP_ROOT, and every kernel works on it unchanged.

Keys are compared as three unsigned words. The reverse map is the overlapping tree: a node entry
carries a low and a high key, and `refresh_key` maintains both.

All kernels are pure: no waiting, no allocation, no error but a return code.
"""

from __future__ import annotations

import numpy as np

from alloc.jit import helper, kernel
from alloc.libc import memmove
from fs.xfs import layout as L
from fs.xfs.be import get16, get32, get64, put16, put32, put64

BNO, CNT, INO, FINO, RMAP, REFC, BMAP, BMAP_ROOT = range(8)

SHORT_HEADER = L.SHORT_BLOCK.itemsize
LONG_HEADER = L.LONG_BLOCK.itemsize
ROOT_HEADER = 8  # level and numrecs at bytes 4 and 6 of a header that starts before the fork
LEVEL = L.off(L.SHORT_BLOCK, "level")
NUMRECS = L.off(L.SHORT_BLOCK, "numrecs")
SIBLINGS = L.off(L.SHORT_BLOCK, "leftsib")
SHORT_BLKNO, LONG_BLKNO = L.off(L.SHORT_BLOCK, "blkno"), L.off(L.LONG_BLOCK, "blkno")
SHORT_UUID, LONG_UUID = L.off(L.SHORT_BLOCK, "uuid"), L.off(L.LONG_BLOCK, "uuid")
SHORT_OWNER, LONG_OWNER = L.off(L.SHORT_BLOCK, "owner"), L.off(L.LONG_BLOCK, "owner")

REC_BYTES = (8, 8, 16, 16, 24, 12, 16, 16)
KEY_BYTES = (8, 8, 4, 4, 40, 4, 8, 8)
PTR_BYTES = (4, 4, 4, 4, 4, 4, 8, 8)
HEADER_BYTES = (SHORT_HEADER,) * 6 + (LONG_HEADER, ROOT_HEADER)

RMAP_LOW_BYTES = L.RMAP_KEY.itemsize
OFFSET_UNWRITTEN = 1 << 61
OFFSET_BMBT = 1 << 62
OFFSET_ATTR = 1 << 63
OFFSET_MASK = (1 << 54) - 1
COW_START = 1 << 31  # refcount records of copy-on-write staging carry this bit in their start

# Reasons of `check_records`; the text is in btkind.
GOOD, UNORDERED, OVERLAP, EMPTY_REC, OUT_OF_AG, BAD_VALUE, BAD_PTR = range(7)


@helper
def header_bytes(kind):
    if kind < BMAP:
        return SHORT_HEADER
    if kind == BMAP:
        return LONG_HEADER
    return ROOT_HEADER


@helper
def rec_bytes(kind):
    if kind <= CNT:
        return 8
    if kind == RMAP:
        return 24
    if kind == REFC:
        return 12
    return 16


@helper
def key_bytes(kind):
    if kind <= CNT or kind >= BMAP:
        return 8
    if kind == RMAP:
        return 40
    return 4


@helper
def ptr_bytes(kind):
    return 8 if kind >= BMAP else 4


@helper
def node_max(size, kind):
    """Entries that a node of `size` bytes holds."""
    return (size - header_bytes(kind)) // (key_bytes(kind) + ptr_bytes(kind))


@helper
def rec_at(addr, kind, i):
    return addr + header_bytes(kind) + i * rec_bytes(kind)


@helper
def key_at(addr, kind, i):
    return addr + header_bytes(kind) + i * key_bytes(kind)


@helper
def ptr_at(addr, size, kind, i):
    keys = node_max(size, kind) * key_bytes(kind)
    return addr + header_bytes(kind) + keys + i * ptr_bytes(kind)


@helper
def load_ptr(mem, addr, size, kind, i):
    at = ptr_at(addr, size, kind, i)
    if kind >= BMAP:
        return np.int64(get64(mem, at))
    return np.int64(get32(mem, at))


# -- keys -----------------------------------------------------------------------------------------


@helper
def rec_key(mem, at, kind):
    """Key of the record at byte `at` as three words."""
    zero = np.uint64(0)
    if kind >= BMAP:
        offset = (get64(mem, at) >> np.uint64(9)) & np.uint64(OFFSET_MASK)
        return offset, zero, zero
    if kind == CNT:
        return np.uint64(get32(mem, at + 4)), np.uint64(get32(mem, at)), zero
    if kind == RMAP:
        offset = get64(mem, at + 16) & ~np.uint64(OFFSET_UNWRITTEN)
        return np.uint64(get32(mem, at)), get64(mem, at + 8), offset
    return np.uint64(get32(mem, at)), zero, zero


@helper
def node_key(mem, at, kind):
    """The (low) key at byte `at` as three words."""
    zero = np.uint64(0)
    if kind >= BMAP:
        return get64(mem, at), zero, zero
    if kind == CNT:
        return np.uint64(get32(mem, at + 4)), np.uint64(get32(mem, at)), zero
    if kind == RMAP:
        offset = get64(mem, at + 12) & ~np.uint64(OFFSET_UNWRITTEN)
        return np.uint64(get32(mem, at)), get64(mem, at + 4), offset
    return np.uint64(get32(mem, at)), zero, zero


@helper
def as_key(k0, k1, k2):
    """Signed words from a caller, wrapped around to unsigned ones."""
    return np.uint64(np.int64(k0)), np.uint64(np.int64(k1)), np.uint64(np.int64(k2))


@helper
def compare(a, b):
    """Order of two keys: negative, zero, positive."""
    for i in range(3):
        if a[i] != b[i]:
            return -1 if a[i] < b[i] else 1
    return 0


@helper
def rmap_high(mem, at):
    """High key of the reverse-map record at `at`: its last block, owner, last offset."""
    last = np.uint64(get32(mem, at + 4) - 1)
    owner = get64(mem, at + 8)
    offset = get64(mem, at + 16) & ~np.uint64(OFFSET_UNWRITTEN)
    block = np.uint64(get32(mem, at)) + last
    inode = owner >> np.uint64(63) == np.uint64(0)
    if inode and offset & np.uint64(OFFSET_BMBT) == np.uint64(0):
        mask = np.uint64(OFFSET_MASK)
        offset = ((offset + last) & mask) | (offset & ~mask)
    return block, owner, offset


@helper
def put_rmap_key(mem, at, key):
    """Store three words as a reverse-map key; returns whether a byte changed."""
    before = node_key(mem, at, RMAP)
    if compare(before, key) == 0:
        return 0
    put32(mem, at, np.int64(key[0]))
    put64(mem, at + 4, key[1])
    put64(mem, at + 12, key[2])
    return 1


@helper
def block_high(mem, addr, size, kind):
    """Largest high key below a reverse-map block that is not empty."""
    n = get16(mem, addr + NUMRECS)
    leaf = get16(mem, addr + LEVEL) == 0
    best = (np.uint64(0), np.uint64(0), np.uint64(0))
    for i in range(n):
        if leaf:
            high = rmap_high(mem, rec_at(addr, kind, i))
        else:
            high = node_key(mem, key_at(addr, kind, i) + RMAP_LOW_BYTES, kind)
        if compare(high, best) > 0:
            best = high
    return best


@helper
def put_block_key(mem, at, kind, child, child_size):
    """Store at `at` the key that stands for block `child`; returns 1 if it was another."""
    child_kind = BMAP if kind == BMAP_ROOT else kind
    leaf = get16(mem, child + LEVEL) == 0
    if leaf:
        low = rec_key(mem, rec_at(child, child_kind, 0), child_kind)
    else:
        low = node_key(mem, key_at(child, child_kind, 0), child_kind)
    if kind == RMAP:
        high = block_high(mem, child, child_size, kind)
        changed = put_rmap_key(mem, at, low)
        return changed | put_rmap_key(mem, at + RMAP_LOW_BYTES, high)
    if compare(node_key(mem, at, kind), low) == 0 and kind != BNO:
        return 0
    if kind >= BMAP:
        put64(mem, at, low[0])
        return 1
    if kind <= CNT:  # the key is the whole record (start, len), whatever the order
        source = child + SHORT_HEADER
        changed = 0
        for i in range(8):
            if mem[at + i] != mem[source + i]:
                mem[at + i] = mem[source + i]
                changed = 1
        return changed
    put32(mem, at, np.int64(low[0]))
    return 1


# -- search ---------------------------------------------------------------------------------------


@kernel("UniTuple(i8, 3)(u1[::1], i8, i8, i8, i8, i8, i8, i8)")
def step(mem, addr, size, kind, level, k0, k1, k2):
    """One step of a descent: search the block for a key.

    In a leaf returns (index of the first record whose key is >= the key, 1 if equal, count); in a
    node (index of the last entry whose key is <= the key, or 0; its pointer; count). A negative
    index means a corrupt block: -1 another level than expected, -2 an empty node.
    """
    key = as_key(k0, k1, k2)
    n = get16(mem, addr + NUMRECS)
    if get16(mem, addr + LEVEL) != level:
        return np.int64(-1), np.int64(0), np.int64(0)
    low, high = np.int64(0), np.int64(n)
    if level == 0:
        while low < high:
            middle = (low + high) >> 1
            if compare(rec_key(mem, rec_at(addr, kind, middle), kind), key) < 0:
                low = middle + 1
            else:
                high = middle
        equal = low < n and compare(rec_key(mem, rec_at(addr, kind, low), kind), key) == 0
        return low, np.int64(1 if equal else 0), np.int64(n)
    if n == 0:
        return np.int64(-2), np.int64(0), np.int64(0)
    while low < high:
        middle = (low + high) >> 1
        if compare(node_key(mem, key_at(addr, kind, middle), kind), key) <= 0:
            low = middle + 1
        else:
            high = middle
    low = max(low - 1, 0)
    return low, load_ptr(mem, addr, size, kind, low), np.int64(n)


@kernel("i8(u1[::1], i8, i8, i8, i8)")
def pointer(mem, addr, size, kind, i):
    """Block number in entry i of a node."""
    return load_ptr(mem, addr, size, kind, i)


@kernel("b1(u1[::1], i8, i8, i8, i8, i8, i8, i8)")
def fits(mem, addr, kind, i, n, k0, k1, k2):
    """May record i of n take this key and stay between its neighbours in the leaf?

    At the leaf's edges only a key that moves inward is sure to be in order.
    """
    key = as_key(k0, k1, k2)
    now = rec_key(mem, rec_at(addr, kind, i), kind)
    if i > 0:
        if compare(rec_key(mem, rec_at(addr, kind, i - 1), kind), key) >= 0:
            return False
    elif compare(key, now) < 0:
        return False
    if i + 1 < n:
        return compare(rec_key(mem, rec_at(addr, kind, i + 1), kind), key) > 0
    return compare(key, now) <= 0


@kernel("i8(u1[::1], i8, i8, i8, i8, i8)")
def next_overlap(mem, addr, kind, i, first, last):
    """First entry from index i of a reverse-map block that overlaps blocks first..last; or n."""
    n = get16(mem, addr + NUMRECS)
    leaf = get16(mem, addr + LEVEL) == 0
    for j in range(i, n):
        if leaf:
            at = rec_at(addr, kind, j)
            start = get32(mem, at)
            end = start + get32(mem, at + 4) - 1
        else:
            at = key_at(addr, kind, j)
            start, end = get32(mem, at), get32(mem, at + RMAP_LOW_BYTES)
        if start > last:
            return n
        if end >= first:
            return np.int64(j)
    return n


# -- modification ---------------------------------------------------------------------------------


@kernel("void(u1[::1], i8, i8, i8, u1[::1])")
def write_rec(mem, addr, kind, i, rec):
    """Overwrite record i with the bytes in `rec`."""
    at = rec_at(addr, kind, i)
    for j in range(rec_bytes(kind)):
        mem[at + j] = rec[j]


@kernel("void(u1[::1], i8, i8, i8, u1[::1])")
def insert_rec(mem, addr, kind, i, rec):
    """Insert the bytes in `rec` as record i; there is room."""
    n = get16(mem, addr + NUMRECS)
    at, width = rec_at(addr, kind, i), rec_bytes(kind)
    memmove(mem, at + width, at, (n - i) * width)
    for j in range(width):
        mem[at + j] = rec[j]
    put16(mem, addr + NUMRECS, n + 1)


@kernel("void(u1[::1], i8, i8, i8)")
def delete_rec(mem, addr, kind, i):
    """Take record i out."""
    n = get16(mem, addr + NUMRECS)
    at, width = rec_at(addr, kind, i), rec_bytes(kind)
    memmove(mem, at, at + width, (n - i - 1) * width)
    put16(mem, addr + NUMRECS, n - 1)


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, i8)")
def refresh_key(mem, addr, size, kind, i, child, child_size):
    """Make entry i's key that of its child, which is not empty; returns 1 if it changed."""
    return put_block_key(mem, key_at(addr, kind, i), kind, child, child_size)


@kernel("void(u1[::1], i8, i8, i8, i8, i8, i8, i8)")
def insert_child(mem, addr, size, kind, i, block, child, child_size):
    """Insert block number `block`, whose bytes are at `child`, as entry i; there is room."""
    n = get16(mem, addr + NUMRECS)
    at, width = key_at(addr, kind, i), key_bytes(kind)
    memmove(mem, at + width, at, (n - i) * width)
    put_block_key(mem, at, kind, child, child_size)
    at, width = ptr_at(addr, size, kind, i), ptr_bytes(kind)
    memmove(mem, at + width, at, (n - i) * width)
    if kind >= BMAP:
        put64(mem, at, np.uint64(block))
    else:
        put32(mem, at, block)
    put16(mem, addr + NUMRECS, n + 1)


@kernel("void(u1[::1], i8, i8, i8, i8)")
def delete_child(mem, addr, size, kind, i):
    """Take entry i out of a node."""
    n = get16(mem, addr + NUMRECS)
    at, width = key_at(addr, kind, i), key_bytes(kind)
    memmove(mem, at, at + width, (n - i - 1) * width)
    at, width = ptr_at(addr, size, kind, i), ptr_bytes(kind)
    memmove(mem, at, at + width, (n - i - 1) * width)
    put16(mem, addr + NUMRECS, n - 1)


@kernel("void(u1[::1], i8, i8, i8, i8, i8, i8, i8, i8, i8)")
def move(mem, source, source_size, source_kind, first, n, target, target_size, target_kind, to):
    """Move n entries from index `first` of one block to index `to` of another of its level.

    Opens the gap, copies, closes the gap and keeps both counts. Records in leaves, keys and
    pointers in nodes; one of the two may be an inode's root.
    """
    have = get16(mem, source + NUMRECS)
    there = get16(mem, target + NUMRECS)
    if get16(mem, source + LEVEL) == 0:
        width = rec_bytes(source_kind)
        a, b = rec_at(source, source_kind, first), rec_at(target, target_kind, to)
        memmove(mem, b + n * width, b, (there - to) * width)
        memmove(mem, b, a, n * width)
        memmove(mem, a, a + n * width, (have - first - n) * width)
    else:
        width = key_bytes(source_kind)
        a, b = key_at(source, source_kind, first), key_at(target, target_kind, to)
        memmove(mem, b + n * width, b, (there - to) * width)
        memmove(mem, b, a, n * width)
        memmove(mem, a, a + n * width, (have - first - n) * width)
        width = ptr_bytes(source_kind)
        a = ptr_at(source, source_size, source_kind, first)
        b = ptr_at(target, target_size, target_kind, to)
        memmove(mem, b + n * width, b, (there - to) * width)
        memmove(mem, b, a, n * width)
        memmove(mem, a, a + n * width, (have - first - n) * width)
    put16(mem, source + NUMRECS, have - n)
    put16(mem, target + NUMRECS, there + n)


@kernel("void(u1[::1], i8, i8)")
def set_level(mem, addr, level):
    """Write the level field."""
    put16(mem, addr + LEVEL, level)


# -- checks ---------------------------------------------------------------------------------------


@helper
def check_extent(start, length, ag_blocks):
    if length == 0:
        return EMPTY_REC
    if ag_blocks and start + length > ag_blocks:
        return OUT_OF_AG
    return GOOD


@helper
def check_rec(mem, at, kind, ag_blocks):
    """Is one record possible by itself?"""
    if kind >= BMAP:
        length = np.int64(get64(mem, at + 8) & np.uint64((1 << 21) - 1))
        return EMPTY_REC if length == 0 else GOOD
    start = get32(mem, at)
    if kind in (INO, FINO):
        return BAD_VALUE if mem[at + 7] > 64 else GOOD
    if kind == REFC:
        staging = start & COW_START
        count = get32(mem, at + 8)
        if count == 0 or (staging != 0) != (count == 1):
            return BAD_VALUE
        return check_extent(start & ~COW_START, get32(mem, at + 4), ag_blocks)
    return check_extent(start, get32(mem, at + 4), ag_blocks)


@helper
def span(mem, at, kind):
    """Units of the first key word that a record covers, where records must not overlap."""
    if kind in (BNO, REFC):
        return np.uint64(get32(mem, at + 4))
    if kind >= BMAP:
        return get64(mem, at + 8) & np.uint64((1 << 21) - 1)
    if kind in (INO, FINO):
        return np.uint64(64)
    return np.uint64(0)


@helper
def check_leaf(mem, addr, kind, n, ag_blocks):
    """Every record by itself, the order, and that none overlaps where none may."""
    before = (np.uint64(0), np.uint64(0), np.uint64(0))
    end = np.uint64(0)
    for i in range(n):
        at = rec_at(addr, kind, i)
        code = check_rec(mem, at, kind, ag_blocks)
        if code != GOOD:
            return code
        key = rec_key(mem, at, kind)
        if i and compare(before, key) >= 0:
            return UNORDERED
        if key[0] < end:
            return OVERLAP
        before, size = key, span(mem, at, kind)
        if size:
            end = key[0] + size
    return GOOD


@kernel("i8(u1[::1], i8, i8, i8, i8)")
def check_records(mem, addr, size, kind, ag_blocks):
    """Check order, overlap and bounds of all entries; returns GOOD or a reason.

    `ag_blocks` bounds records and pointers inside an AG; 0 leaves that check out.
    """
    n = get16(mem, addr + NUMRECS)
    if get16(mem, addr + LEVEL) == 0:
        return check_leaf(mem, addr, kind, n, ag_blocks)
    before = (np.uint64(0), np.uint64(0), np.uint64(0))
    for i in range(n):
        at = key_at(addr, kind, i)
        key = node_key(mem, at, kind)
        if i and compare(before, key) >= 0:
            return UNORDERED
        if kind == RMAP:
            high = node_key(mem, at + RMAP_LOW_BYTES, kind)
            if compare(key, high) > 0:
                return UNORDERED
        before = key
        block = load_ptr(mem, addr, size, kind, i)
        if block <= 0 or (kind < BMAP and ag_blocks and block >= ag_blocks):
            return BAD_PTR
    return GOOD
