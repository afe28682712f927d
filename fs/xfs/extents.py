"""Extent records: kernels over packed lists of them.

An extent record is 128 bits, big-endian, from the top: 1 bit unwritten, 54 bits file block, 52
bits fsbno, 21 bits length in blocks (XFS format: bmbt record). A fork in EXTENTS format is a
packed list of them sorted by file block, and so is every leaf of a fork's B+tree; nothing in
memory holds them in another form.

All kernels are pure functions over (mem, addr): they search, read, write and check, and neither
wait nor allocate. `limits` is what `fs.xfs.inode.limits` makes of a Geometry.
"""

from __future__ import annotations

import numpy as np

from alloc.jit import helper, kernel
from fs.xfs.be import get64, put64

REC_BYTES = 16

# Indices into `limits`.
INODE_SIZE, BLOCK_LOG, AGCOUNT, AG_BLOCKS, AG_BLOCK_LOG, LAST_AG_BLOCKS, AG_HEADER_BLOCKS = range(7)
FEATURES, DATA_LEVELS_MAX, ATTR_LEVELS_MAX, DIR_EXTENTS_MAX, AGINO_LOG, LIMITS = range(7, 13)
FEATURE_REFLINK, FEATURE_BIGTIME, FEATURE_NREXT64 = 1, 2, 4

FILE_OFFSET_MAX = 1 << 54

GOOD, ORDER, SHAPE, PLACE, UNWRITTEN = 0, 1, 2, 3, 4


@helper
def rec_offset(mem, at):
    return np.int64((get64(mem, at) >> np.uint64(9)) & np.uint64((1 << 54) - 1))


@helper
def rec_fsbno(mem, at):
    high = get64(mem, at) & np.uint64(0x1FF)
    low = get64(mem, at + 8) >> np.uint64(21)
    return np.int64((high << np.uint64(43)) | low)


@helper
def rec_count(mem, at):
    return np.int64(get64(mem, at + 8) & np.uint64((1 << 21) - 1))


@helper
def rec_unwritten(mem, at):
    return np.int64(get64(mem, at) >> np.uint64(63))


@kernel("UniTuple(i8, 4)(u1[::1], i8)")
def unpack(mem, at):
    """One record as (file block, fsbno, count, unwritten)."""
    return rec_offset(mem, at), rec_fsbno(mem, at), rec_count(mem, at), rec_unwritten(mem, at)


@kernel("void(u1[::1], i8, i8, i8, i8, i8)")
def pack(mem, at, offset, fsbno, count, unwritten):
    """Write one record."""
    l0 = (np.uint64(unwritten) << np.uint64(63)) | (np.uint64(offset) << np.uint64(9))
    l0 |= np.uint64(fsbno) >> np.uint64(43)
    low = np.uint64(fsbno) & np.uint64((1 << 43) - 1)
    put64(mem, at, l0)
    put64(mem, at + 8, (low << np.uint64(21)) | np.uint64(count))


@kernel("i8(u1[::1], i8, i8, i8)")
def search(mem, addr, n, offset):
    """Index of the last of n records that starts at or before a file block; -1: there is none."""
    low = np.int64(0)
    high = np.int64(n)
    while low < high:
        middle = (low + high) >> 1
        if rec_offset(mem, addr + middle * REC_BYTES) <= offset:
            low = middle + 1
        else:
            high = middle
    return low - 1


@kernel("UniTuple(i8, 4)(u1[::1], i8, i8, i8)")
def lookup(mem, addr, n, offset):
    """The record that holds a file block, else the next one; file block -1: neither exists."""
    i = search(mem, addr, n, offset)
    if i >= 0:
        at = addr + i * REC_BYTES
        if rec_offset(mem, at) + rec_count(mem, at) > offset:
            return unpack(mem, at)
    if i + 1 < n:
        return unpack(mem, addr + (i + 1) * REC_BYTES)
    return np.int64(-1), np.int64(-1), np.int64(0), np.int64(0)


@helper
def fsb_in_ag(fsbno, count, limits):
    """Is the extent inside one AG and clear of the AG headers?"""
    agno = fsbno >> limits[AG_BLOCK_LOG]
    agbno = fsbno & ((np.int64(1) << limits[AG_BLOCK_LOG]) - 1)
    if agno >= limits[AGCOUNT] or agbno < limits[AG_HEADER_BLOCKS]:
        return False
    length = limits[AG_BLOCKS]
    if agno == limits[AGCOUNT] - 1:
        length = limits[LAST_AG_BLOCKS]
    return agbno + count <= length


@kernel("UniTuple(i8, 2)(u1[::1], i8, i8, i8, i8, i8[::1])")
def check(mem, addr, n, floor, attr, limits):
    """Check n records of which none may start before file block `floor`.

    Returns (code, blocks): GOOD and the sum of their lengths, or what is wrong and with which
    record. `attr` is 1 for an attribute fork, which has no unwritten extents.
    """
    end = np.int64(floor)
    blocks = np.int64(0)
    for i in range(n):
        at = addr + i * REC_BYTES
        count = rec_count(mem, at)
        if rec_offset(mem, at) < end:
            return np.int64(ORDER), np.int64(i)
        end = rec_offset(mem, at) + count
        if count == 0 or end > FILE_OFFSET_MAX:
            return np.int64(SHAPE), np.int64(i)
        if not fsb_in_ag(rec_fsbno(mem, at), count, limits):
            return np.int64(PLACE), np.int64(i)
        if attr and rec_unwritten(mem, at):
            return np.int64(UNWRITTEN), np.int64(i)
        blocks += count
    return np.int64(GOOD), blocks


@kernel("void(u1[::1], i8, i8, i8, i8, i8[:, ::1])")
def splice(mem, addr, n, i, removed, records):
    """Replace `removed` records from index i of a list of n by the rows of `records`.

    A row is (file block, fsbno, count, unwritten). The list has space for what results; records
    that are gone at its end become zeros.
    """
    added = records.shape[0]
    tail = addr + (i + removed) * REC_BYTES
    end = addr + n * REC_BYTES
    move = (added - removed) * REC_BYTES
    if move > 0:
        for at in range(end - 1, tail - 1, -1):
            mem[at + move] = mem[at]
    elif move < 0:
        for at in range(tail, end):
            mem[at + move] = mem[at]
        for at in range(end + move, end):
            mem[at] = np.uint8(0)
    for k in range(added):
        at = addr + (i + k) * REC_BYTES
        pack(mem, at, records[k, 0], records[k, 1], records[k, 2], records[k, 3])


@kernel("i8(u1[::1], i8, i8, i8, i8)")
def first_hole(mem, addr, n, start, count):
    """Lowest file block from `start` on with `count` unmapped blocks behind it."""
    place = np.int64(start)
    for i in range(max(0, search(mem, addr, n, start)), n):
        at = addr + i * REC_BYTES
        if rec_offset(mem, at) >= place + count:
            break
        place = max(place, rec_offset(mem, at) + rec_count(mem, at))
    return place
