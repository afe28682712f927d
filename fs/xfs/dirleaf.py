"""Directory leaves and free index blocks: hash -> place of a name, as pure kernels.

A leaf is an array of {hash, addr} sorted by hash; addr is the entry's byte address in the
directory divided by 8, and 0 marks a stale slot, which keeps its hash until it is reused or
compacted away. The same array is used in three places: inside a block-form directory (`dirblock`),
in the single leaf of leaf form (LEAF1, which also ends with the bests table), and in the leaves
under da nodes (LEAFN). Helpers named `array_*` work on the array itself, `(mem, base, count)`.

The bests table says how long the largest unused region of each data block is, 0xffff for a block
that does not exist. In node form it lives in free index blocks, each for a fixed range of data
blocks, whose `nused` counts the existing ones.

Kernels trust blocks that the verifiers have accepted. Callers hold the directory's ILOCK.

XFS format: leaf header 64 bytes (count at 56, stale at 58); LEAF1 tail = u16 bests[], u32
bestcount at the block's end; free index header 64 bytes, then u16 bests[].
"""

from __future__ import annotations

import numpy as np

from alloc.jit import helper, kernel
from fs.xfs import layout as L
from fs.xfs.be import get16, get32, put16, put32

HEADER = L.DIR_LEAF_HEADER.itemsize
ENTRY = L.DIR_LEAF_ENTRY.itemsize
MAGIC = L.off(L.DIR_LEAF_HEADER, "magic")
COUNT = L.off(L.DIR_LEAF_HEADER, "count")
STALE = L.off(L.DIR_LEAF_HEADER, "stale")
TAIL = L.DIR_LEAF_TAIL.itemsize
BEST = 2  # bytes of a slot of the bests table
NULL_BEST = 0xFFFF  # no such data block

FREE_HEADER = L.DIR_FREE_HEADER.itemsize
FIRSTDB = L.off(L.DIR_FREE_HEADER, "firstdb")
NVALID = L.off(L.DIR_FREE_HEADER, "nvalid")
NUSED = L.off(L.DIR_FREE_HEADER, "nused")

LEAF_REASONS = ("", "magic", "entry count", "hash order", "stale count", "bests table")
FREE_REASONS = ("", "magic", "nvalid", "nused", "firstdb")


# -- the sorted array ---------------------------------------------------------------------------


@helper
def hash_of(mem, base, i):
    return get32(mem, base + i * ENTRY)


@helper
def addr_of(mem, base, i):
    return get32(mem, base + i * ENTRY + 4)


@helper
def put_slot(mem, base, i, hash_value, place):
    put32(mem, base + i * ENTRY, hash_value)
    put32(mem, base + i * ENTRY + 4, place)


@helper
def copy_slot(mem, source, i, target, j):
    for b in range(ENTRY):
        mem[target + j * ENTRY + b] = mem[source + i * ENTRY + b]


@helper
def array_search(mem, base, count, hash_value):
    """First index whose hash is >= hash_value; count when there is none."""
    low = np.int64(0)
    high = np.int64(count)
    while low < high:
        middle = (low + high) >> 1
        if hash_of(mem, base, middle) < hash_value:
            low = middle + 1
        else:
            high = middle
    return low


@helper
def array_candidate(mem, base, count, start, hash_value):
    """First live index at or behind `start` with exactly this hash, or -1."""
    i = np.int64(start)
    while i < count and hash_of(mem, base, i) == hash_value:
        if addr_of(mem, base, i) != 0:
            return i
        i += 1
    return np.int64(-1)


@helper
def array_order(mem, base, count):
    """Number of stale slots, or -1 when the hashes are not in order."""
    stale = np.int64(0)
    last = np.int64(0)
    for i in range(count):
        h = hash_of(mem, base, i)
        if h < last:
            return np.int64(-1)
        last = h
        if addr_of(mem, base, i) == 0:
            stale += 1
    return stale


@helper
def array_reuse(mem, base, count, index, hash_value, place):
    """Insert before `index` by using up the nearest stale slot. One must exist."""
    low = index - 1
    high = np.int64(index)
    while True:
        if low >= 0 and addr_of(mem, base, low) == 0:
            for i in range(low, index - 1):
                copy_slot(mem, base, i + 1, base, i)
            put_slot(mem, base, index - 1, hash_value, place)
            return
        if high < count and addr_of(mem, base, high) == 0:
            for i in range(high, index, -1):
                copy_slot(mem, base, i - 1, base, i)
            put_slot(mem, base, index, hash_value, place)
            return
        if low < 0 and high >= count:
            return
        low -= 1
        high += 1


@helper
def array_compact(mem, base, count):
    """Squeeze the stale slots out towards the front; returns how many live ones there are."""
    n = np.int64(0)
    for i in range(count):
        if addr_of(mem, base, i) != 0:
            if n != i:
                copy_slot(mem, base, i, base, n)
            n += 1
    return n


# -- leaf blocks --------------------------------------------------------------------------------


@helper
def count_of(mem, addr):
    return get16(mem, addr + COUNT)


@helper
def stale_of(mem, addr):
    return get16(mem, addr + STALE)


@helper
def set_counts(mem, addr, count, stale):
    put16(mem, addr + COUNT, count)
    put16(mem, addr + STALE, stale)


@helper
def is_leaf1(mem, addr):
    return get16(mem, addr + MAGIC) == L.MAGIC_DIR_LEAF1


@helper
def bestcount_of(mem, addr, size):
    return get32(mem, addr + size - TAIL)


@helper
def bests_at(mem, addr, size):
    """Address of the bests table of a LEAF1 block."""
    return addr + size - TAIL - BEST * bestcount_of(mem, addr, size)


@helper
def capacity(mem, addr, size):
    """Slots that fit this leaf beside what else it holds."""
    end = bests_at(mem, addr, size) - addr if is_leaf1(mem, addr) else np.int64(size)
    return (end - HEADER) // ENTRY


@kernel("i8(u1[::1], i8, i8)")
def verify_leaf(mem, addr, size):
    """Index into LEAF_REASONS. O(count)."""
    magic = get16(mem, addr + MAGIC)
    if magic != L.MAGIC_DIR_LEAF1 and magic != L.MAGIC_DIR_LEAFN:
        return 1
    if magic == L.MAGIC_DIR_LEAF1:
        bestcount = bestcount_of(mem, addr, size)
        if bestcount < 1 or bestcount > (size - HEADER - TAIL) // BEST:
            return 5
    count = count_of(mem, addr)
    if count > capacity(mem, addr, size):
        return 2
    stale = array_order(mem, addr + HEADER, count)
    if stale < 0:
        return 3
    if stale != stale_of(mem, addr):
        return 4
    return 0


@kernel("UniTuple(i8, 2)(u1[::1], i8, i8)")
def find(mem, addr, hash_value):
    """(index, place) of the first live slot with this hash; index -1 when there is none."""
    base = addr + HEADER
    count = count_of(mem, addr)
    i = array_candidate(mem, base, count, array_search(mem, base, count, hash_value), hash_value)
    return i, (addr_of(mem, base, i) if i >= 0 else np.int64(0))


@kernel("UniTuple(i8, 2)(u1[::1], i8, i8)")
def find_next(mem, addr, index):
    """The same for the next live slot behind `index` that has its hash: a collision."""
    base = addr + HEADER
    i = array_candidate(mem, base, count_of(mem, addr), index + 1, hash_of(mem, base, index))
    return i, (addr_of(mem, base, i) if i >= 0 else np.int64(0))


@kernel("i8(u1[::1], i8)")
def last_hash(mem, addr):
    """Largest hash, stale slots included; -1 for a leaf without slots."""
    count = count_of(mem, addr)
    return hash_of(mem, addr + HEADER, count - 1) if count else np.int64(-1)


@kernel("i8(u1[::1], i8)")
def live(mem, addr):
    """Number of slots that are not stale."""
    return count_of(mem, addr) - stale_of(mem, addr)


@kernel("b1(u1[::1], i8, i8, b1)")
def fits(mem, addr, size, longer):
    """Is there room in a LEAF1 for one more slot, and for one more best if `longer`?"""
    slots = count_of(mem, addr) - stale_of(mem, addr) + 1
    bests = bestcount_of(mem, addr, size) + (1 if longer else 0)
    return HEADER + ENTRY * slots + BEST * bests + TAIL <= size


@kernel("i8(u1[::1], i8, i8, i8, i8)")
def insert(mem, addr, size, hash_value, place):
    """Insert a slot, reusing a stale one if there is any; 0 done, -1 the leaf is full."""
    base = addr + HEADER
    count, stale = count_of(mem, addr), stale_of(mem, addr)
    index = array_search(mem, base, count, hash_value)
    if stale:
        array_reuse(mem, base, count, index, hash_value, place)
        set_counts(mem, addr, count, stale - 1)
        return 0
    if count >= capacity(mem, addr, size):
        return -1
    for i in range(count, index, -1):
        copy_slot(mem, base, i - 1, base, i)
    put_slot(mem, base, index, hash_value, place)
    set_counts(mem, addr, count + 1, 0)
    return 0


@kernel("void(u1[::1], i8, i8)")
def make_stale(mem, addr, index):
    """Give up the live slot at index."""
    put32(mem, addr + HEADER + index * ENTRY + 4, 0)
    put16(mem, addr + STALE, stale_of(mem, addr) + 1)


@helper
def compact(mem, addr):
    """Squeeze the stale slots out of a leaf; the slots that fall free are zeroed."""
    base = addr + HEADER
    count = count_of(mem, addr)
    n = array_compact(mem, base, count)
    mem[base + n * ENTRY : base + count * ENTRY] = 0
    set_counts(mem, addr, n, 0)
    return n


@kernel("void(u1[::1], i8, i8)")
def init_leaf(mem, addr, magic):
    """Make an empty leaf of a zeroed block whose common header is set."""
    put16(mem, addr + MAGIC, magic)
    set_counts(mem, addr, 0, 0)


@kernel("void(u1[::1], i8, i8)")
def split(mem, addr, other):
    """Move the upper half of a leaf's live slots into the empty leaf `other`, to its right."""
    n = compact(mem, addr)
    keep = n >> 1
    base = addr + HEADER
    for i in range(keep, n):
        copy_slot(mem, base, i, other + HEADER, i - keep)
    mem[base + keep * ENTRY : base + n * ENTRY] = 0
    set_counts(mem, addr, keep, 0)
    set_counts(mem, other, n - keep, 0)


@kernel("void(u1[::1], i8, i8)")
def join(mem, left, right):
    """Append the live slots of the right leaf to the left one; the caller knows they fit."""
    n = compact(mem, left)
    more = compact(mem, right)
    for i in range(more):
        copy_slot(mem, right + HEADER, i, left + HEADER, n + i)
    set_counts(mem, left, n + more, 0)
    set_counts(mem, right, 0, 0)


# -- the bests table of a LEAF1 -----------------------------------------------------------------


@kernel("i8(u1[::1], i8, i8)")
def bestcount(mem, addr, size):
    """Data blocks that the table covers."""
    return bestcount_of(mem, addr, size)


@kernel("i8(u1[::1], i8, i8, i8)")
def best(mem, addr, size, db):
    """Entry of data block db, which the table covers."""
    return get16(mem, bests_at(mem, addr, size) + BEST * db)


@kernel("void(u1[::1], i8, i8, i8, i8)")
def set_best(mem, addr, size, db, length):
    """Change the entry of data block db."""
    put16(mem, bests_at(mem, addr, size) + BEST * db, length)


@helper
def first_fit(mem, table, n, need):
    """First of n bests that has `need` bytes free, or -1."""
    for i in range(n):
        length = get16(mem, table + BEST * i)
        if length >= need and length != NULL_BEST:
            return np.int64(i)
    return np.int64(-1)


@helper
def first_null(mem, table, n):
    """First of n bests without a data block, or -1."""
    for i in range(n):
        if get16(mem, table + BEST * i) == NULL_BEST:
            return np.int64(i)
    return np.int64(-1)


@kernel("i8(u1[::1], i8, i8, i8)")
def best_fit(mem, addr, size, need):
    """First data block with `need` bytes free, or -1."""
    return first_fit(mem, bests_at(mem, addr, size), bestcount_of(mem, addr, size), need)


@kernel("i8(u1[::1], i8, i8)")
def best_hole(mem, addr, size):
    """First data block that does not exist, or -1 when all that the table covers do."""
    return first_null(mem, bests_at(mem, addr, size), bestcount_of(mem, addr, size))


@kernel("i8(u1[::1], i8, i8)")
def add_best(mem, addr, size):
    """Make the table one entry longer, compacting the leaf for it; 0 done, -1 no room."""
    n = bestcount_of(mem, addr, size)
    start = bests_at(mem, addr, size)
    if start - BEST < addr + HEADER + ENTRY * count_of(mem, addr):
        if stale_of(mem, addr) == 0:
            return -1
        compact(mem, addr)
    for i in range(BEST * n):
        mem[start - BEST + i] = mem[start + i]
    put16(mem, addr + size - TAIL - BEST, NULL_BEST)
    put32(mem, addr + size - TAIL, n + 1)
    return 0


@kernel("i8(u1[::1], i8, i8)")
def trim_bests(mem, addr, size):
    """Drop entries of missing data blocks at the table's end; returns how many stay."""
    n = bestcount_of(mem, addr, size)
    start = bests_at(mem, addr, size)
    keep = n
    while keep > 1 and get16(mem, start + BEST * (keep - 1)) == NULL_BEST:
        keep -= 1
    gap = BEST * (n - keep)
    if gap:
        for i in range(BEST * keep - 1, -1, -1):
            mem[start + gap + i] = mem[start + i]
        mem[start : start + gap] = 0
        put32(mem, addr + size - TAIL, keep)
    return keep


# -- free index blocks --------------------------------------------------------------------------


@helper
def free_capacity_of(size):
    return (size - FREE_HEADER) // BEST


@helper
def count_used(mem, addr, n):
    used = np.int64(0)
    for i in range(n):
        if get16(mem, addr + FREE_HEADER + BEST * i) != NULL_BEST:
            used += 1
    return used


@kernel("i8(u1[::1], i8, i8)")
def verify_free(mem, addr, size):
    """Index into FREE_REASONS. O(nvalid)."""
    if get32(mem, addr) != L.MAGIC_DIR_FREE:
        return 1
    capacity_here = free_capacity_of(size)
    nvalid = get32(mem, addr + NVALID)
    if nvalid > capacity_here:
        return 2
    if count_used(mem, addr, nvalid) != get32(mem, addr + NUSED):
        return 3
    return 0 if get32(mem, addr + FIRSTDB) % capacity_here == 0 else 4


@kernel("void(u1[::1], i8, i8)")
def init_free(mem, addr, firstdb):
    """Make an empty free index of a zeroed block whose common header is set."""
    put32(mem, addr + FIRSTDB, firstdb)
    put32(mem, addr + NVALID, 0)
    put32(mem, addr + NUSED, 0)


@kernel("i8(u1[::1], i8)")
def free_first(mem, addr):
    """First data block that this free index describes."""
    return get32(mem, addr + FIRSTDB)


@kernel("i8(u1[::1], i8)")
def free_used(mem, addr):
    """Entries of existing data blocks."""
    return get32(mem, addr + NUSED)


@kernel("i8(u1[::1], i8, i8)")
def free_best(mem, addr, i):
    """Entry i, or NULL_BEST behind the table's end."""
    if i >= get32(mem, addr + NVALID):
        return NULL_BEST
    return get16(mem, addr + FREE_HEADER + BEST * i)


@kernel("i8(u1[::1], i8, i8)")
def free_fit(mem, addr, need):
    """First entry with `need` bytes free, or -1."""
    return first_fit(mem, addr + FREE_HEADER, get32(mem, addr + NVALID), need)


@kernel("i8(u1[::1], i8, i8)")
def free_hole(mem, addr, size):
    """First entry without a data block, one behind the table's end included; -1 if full."""
    nvalid = get32(mem, addr + NVALID)
    i = first_null(mem, addr + FREE_HEADER, nvalid)
    if i >= 0:
        return i
    return nvalid if nvalid < free_capacity_of(size) else np.int64(-1)


@kernel("void(u1[::1], i8, i8, i8)")
def set_free(mem, addr, i, length):
    """Change entry i (NULL_BEST for a data block that went); counts follow, the end is trimmed."""
    nvalid = get32(mem, addr + NVALID)
    table = addr + FREE_HEADER
    while nvalid <= i:
        put16(mem, table + BEST * nvalid, NULL_BEST)
        nvalid += 1
    used = get32(mem, addr + NUSED)
    if get16(mem, table + BEST * i) != NULL_BEST:
        used -= 1
    if length != NULL_BEST:
        used += 1
    put16(mem, table + BEST * i, length)
    while nvalid > 0 and get16(mem, table + BEST * (nvalid - 1)) == NULL_BEST:
        nvalid -= 1
        put16(mem, table + BEST * nvalid, 0)
    put32(mem, addr + NVALID, nvalid)
    put32(mem, addr + NUSED, used)


# -- leaf form and node form --------------------------------------------------------------------


@kernel("void(u1[::1], i8, i8, i8)")
def leaf_to_node(mem, leaf, free, size):
    """Turn a LEAF1 into a LEAFN: its bests become the first, initialised free index block."""
    n = bestcount_of(mem, leaf, size)
    start = bests_at(mem, leaf, size)
    for i in range(BEST * n):
        mem[free + FREE_HEADER + i] = mem[start + i]
    put32(mem, free + NVALID, n)
    put32(mem, free + NUSED, count_used(mem, free, n))
    mem[start : leaf + size] = 0
    put16(mem, leaf + MAGIC, L.MAGIC_DIR_LEAFN)


@kernel("i8(u1[::1], i8, i8, i8)")
def node_to_leaf(mem, leaf, free, size):
    """Turn the only LEAFN into a LEAF1 with the bests of the only free index; -1: no room."""
    n = get32(mem, free + NVALID)
    keep = count_of(mem, leaf) - stale_of(mem, leaf)
    if n < 1 or HEADER + ENTRY * keep + BEST * n + TAIL > size:
        return -1
    compact(mem, leaf)
    mem[leaf + HEADER + ENTRY * keep : leaf + size] = 0
    start = leaf + size - TAIL - BEST * n
    for i in range(BEST * n):
        mem[start + i] = mem[free + FREE_HEADER + i]
    put32(mem, leaf + size - TAIL, n)
    put16(mem, leaf + MAGIC, L.MAGIC_DIR_LEAF1)
    return 0
