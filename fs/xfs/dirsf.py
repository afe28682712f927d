"""Shortform directories: entries packed into the inode's data fork, as pure kernels.

The fork holds {count u8, i8count u8, parent ino} and entries {namelen u8, offset u16, name,
ftype u8, ino}. Inode numbers are 4 bytes wide, or all 8 (the parent's too) as soon as one of them
needs it; i8count is how many do. An entry's `offset` is where it would be in block form: it is
the readdir cookie, so it never changes while the name stays. "." is not stored, ".." is the
parent field.

Every kernel takes `(mem, addr)` of the fork; its length is di_size. `verify` is cheap (0.2 us) and
is run before each use, because the fork came with the inode and not as a block of its own. The
caller holds the ILOCK and has made sure that the fork has room for what it asks.

XFS format: first offset >= 96, ascending; shortform only if the directory would fit one block.
"""

from __future__ import annotations

import numpy as np

from alloc.jit import helper, kernel
from fs.xfs import dirblock as B
from fs.xfs import dirdata as D
from fs.xfs import dirleaf as F
from fs.xfs import layout as L
from fs.xfs.be import get16, get32, get64, put16, put32, put64
from fs.xfs.danode import hash_bytes

PARENT = 2
SHORT_INO_MAX = 0xFFFFFFFF
DOT, DOTDOT = 64, 80  # where "." and ".." are in block form
FIRST = 96
DOT_HASH, DOTDOT_HASH = 0x2E, 0x172E

REASONS = (
    "",
    "size",
    "parent inode number",
    "entry",
    "entry offset",
    "inode number of an entry",
    "file type of an entry",
    "i8count",
    "larger than a directory block",
)


@helper
def width_of(mem, addr):
    """Bytes of an inode number here."""
    return np.int64(8) if mem[addr + 1] else np.int64(4)


@helper
def get_ino(mem, at, width):
    if width == 8:
        return get64(mem, at)
    return np.uint64(get32(mem, at))


@helper
def put_ino(mem, at, width, ino):
    if width == 8:
        put64(mem, at, ino)
    else:
        put32(mem, at, ino)


@helper
def slot_size(namelen, width):
    """Bytes of an entry: namelen, offset, name, ftype, ino."""
    return np.int64(namelen) + 4 + width


@helper
def is_big(ino):
    return np.int64(1) if np.uint64(ino) > np.uint64(SHORT_INO_MAX) else np.int64(0)


@kernel(lambda: (D.MEM, D.INT, D.INT, D.INT, D.LIMITS))
def verify(mem, addr, size, block_size, limits):
    """Index into REASONS for a shortform directory of `size` bytes."""
    if size < PARENT + 4 or size < PARENT + width_of(mem, addr):
        return 1
    width = width_of(mem, addr)
    parent = get_ino(mem, addr + PARENT, width)
    if not D.ino_ok(parent, limits):
        return 2
    big = is_big(parent)
    at = np.int64(PARENT + width)
    offset = np.int64(FIRST)
    for _ in range(np.int64(mem[addr])):
        if at + 3 > size or mem[addr + at] == 0:
            return 3
        namelen = np.int64(mem[addr + at])
        after = at + slot_size(namelen, width)
        if after > size:
            return 3
        here = get16(mem, addr + at + 1)
        if here < offset or here & 7:
            return 4
        ino = get_ino(mem, addr + after - width, width)
        if not D.ino_ok(ino, limits):
            return 5
        if mem[addr + at + 3 + namelen] > L.FT_WHT:
            return 6
        big += is_big(ino)
        offset = here + D.entry_size(namelen)
        at = after
    if at != size:
        return 1
    if big != mem[addr + 1]:
        return 7
    if offset + F.ENTRY * (np.int64(mem[addr]) + 2) + B.TAIL > block_size:
        return 8
    return 0


@kernel("i8(u1[::1], i8)")
def parent(mem, addr):
    """Inode number of ".."."""
    return np.int64(get_ino(mem, addr + PARENT, width_of(mem, addr)))


@kernel("i8(u1[::1], i8)")
def count(mem, addr):
    """Number of names, without "." and ".."."""
    return np.int64(mem[addr])


@kernel(lambda: (D.MEM, D.INT, D.NAME))
def find(mem, addr, name):
    """Where the entry of a name is in the fork, or 0."""
    width = width_of(mem, addr)
    at = np.int64(PARENT + width)
    for _ in range(np.int64(mem[addr])):
        namelen = np.int64(mem[addr + at])
        if namelen == len(name) and D.same_name(mem, addr + at + 3, name):
            return at
        at += slot_size(namelen, width)
    return np.int64(0)


@kernel("UniTuple(i8, 2)(u1[::1], i8, i8)")
def entry_ino(mem, addr, at):
    """(ino, ftype) of the entry at `at`."""
    width = width_of(mem, addr)
    end = at + 3 + np.int64(mem[addr + at])
    return np.int64(get_ino(mem, addr + end + 1, width)), np.int64(mem[addr + end])


@kernel("i8(u1[::1], i8, i8, i8[:, ::1])")
def list_entries(mem, addr, start, out):
    """Rows {offset, ino, namelen, ftype, name's place} of entries at or behind offset `start`."""
    width = width_of(mem, addr)
    at = np.int64(PARENT + width)
    n = np.int64(0)
    for _ in range(np.int64(mem[addr])):
        namelen = np.int64(mem[addr + at])
        offset = get16(mem, addr + at + 1)
        if offset >= start and n < out.shape[0]:
            out[n, 0] = offset
            out[n, 1] = np.int64(get_ino(mem, addr + at + 4 + namelen, width))
            out[n, 2] = namelen
            out[n, 3] = np.int64(mem[addr + at + 3 + namelen])
            out[n, 4] = at + 3
            n += 1
        at += slot_size(namelen, width)
    return n


# -- changing -----------------------------------------------------------------------------------


@helper
def _resize_inos(mem, addr, size, width):
    """Rewrite every inode number with another width; returns the new size.

    Growing, the old bytes first move up, so that reading stays ahead of writing.
    """
    old = np.int64(12) - width
    n = np.int64(mem[addr])
    gap = (width - old) * (n + 1)
    source = addr
    if gap > 0:
        for i in range(size - 1, PARENT - 1, -1):
            mem[addr + gap + i] = mem[addr + i]
        source = addr + gap
    put_ino(mem, addr + PARENT, width, get_ino(mem, source + PARENT, old))
    at = np.int64(PARENT + old)
    to = np.int64(PARENT + width)
    for _ in range(n):
        body = 4 + np.int64(mem[source + at])
        for i in range(body):
            mem[addr + to + i] = mem[source + at + i]
        put_ino(mem, addr + to + body, width, get_ino(mem, source + at + body, old))
        at += body + old
        to += body + width
    return to


@helper
def _count_big(mem, addr, size, change):
    """Adjust i8count by `change` and the width of the numbers with it; returns the size."""
    before = np.int64(mem[addr + 1])
    after = before + change
    if before == 0 and after > 0:
        size = _resize_inos(mem, addr, size, 8)
    elif before > 0 and after == 0:
        size = _resize_inos(mem, addr, size, 4)
    mem[addr + 1] = np.uint8(after)
    return size


@helper
def _hole(mem, addr, need, block_size):
    """(place, offset) for an entry that needs `need` bytes in block form, or (0, 0).

    Behind the last entry if a block has room there, else in the first hole that fits.
    """
    width = width_of(mem, addr)
    n = np.int64(mem[addr])
    at = np.int64(PARENT + width)
    offset = np.int64(FIRST)
    hole_at = hole = np.int64(0)
    for _ in range(n):
        here = get16(mem, addr + at + 1)
        if hole == 0 and here - offset >= need:
            hole_at, hole = at, offset
        namelen = np.int64(mem[addr + at])
        offset = here + D.entry_size(namelen)
        at += slot_size(namelen, width)
    used = offset + F.ENTRY * (n + 3) + B.TAIL
    if used + need <= block_size:
        return at, offset
    if hole and used <= block_size:
        return hole_at, hole
    return np.int64(0), np.int64(0)


@kernel(lambda: (D.MEM, D.INT, D.INT, D.NAME, D.INT, D.INT, D.INT))
def fits(mem, addr, size, name, ino, room, block_size):
    """May this name be added to a shortform directory in a fork of `room` bytes?"""
    n = np.int64(mem[addr])
    width = width_of(mem, addr)
    if width == 4 and is_big(ino):
        size += 4 * (n + 1)
        width = np.int64(8)
    if n == 255 or size + slot_size(len(name), width) > room:
        return False
    at, _ = _hole(mem, addr, D.entry_size(len(name)), block_size)
    return at != 0


@kernel(lambda: (D.MEM, D.INT, D.INT, D.NAME, D.INT, D.INT, D.INT))
def add(mem, addr, size, name, ino, ftype, block_size):
    """Add a name that `fits`; returns the new size."""
    size = _count_big(mem, addr, size, is_big(ino))
    width = width_of(mem, addr)
    at, offset = _hole(mem, addr, D.entry_size(len(name)), block_size)
    length = slot_size(len(name), width)
    for i in range(size - 1, at - 1, -1):
        mem[addr + i + length] = mem[addr + i]
    mem[addr + at] = np.uint8(len(name))
    put16(mem, addr + at + 1, offset)
    for i in range(len(name)):
        mem[addr + at + 3 + i] = name[i]
    mem[addr + at + 3 + len(name)] = np.uint8(ftype)
    put_ino(mem, addr + at + 4 + len(name), width, ino)
    mem[addr] += np.uint8(1)
    return size + length


@kernel("i8(u1[::1], i8, i8, i8)")
def remove(mem, addr, size, at):
    """Remove the entry at `at`; returns the new size."""
    width = width_of(mem, addr)
    namelen = np.int64(mem[addr + at])
    big = is_big(get_ino(mem, addr + at + 4 + namelen, width))
    length = slot_size(namelen, width)
    for i in range(at + length, size):
        mem[addr + i - length] = mem[addr + i]
    mem[addr] -= np.uint8(1)
    return _count_big(mem, addr, size - length, -big)


@kernel("b1(u1[::1], i8, i8, i8, i8)")
def replace_fits(mem, addr, size, ino, room):
    """May some inode number here be replaced by `ino`, wide as it is?"""
    if mem[addr + 1] or not is_big(ino):
        return True
    return size + 4 * (np.int64(mem[addr]) + 1) <= room


@kernel(lambda: (D.MEM, D.INT, D.INT, D.NAME, D.INT, D.INT))
def replace(mem, addr, size, name, ino, ftype):
    """Point an existing name, or ".." (b".."), at another inode; returns the new size."""
    width = width_of(mem, addr)
    is_parent = len(name) == 2 and name[0] == 46 and name[1] == 46
    at = np.int64(0)
    if not is_parent:
        at = find(mem, addr, name)
        mem[addr + at + 3 + len(name)] = np.uint8(ftype)
    where = PARENT if is_parent else at + 4 + len(name)
    was = is_big(get_ino(mem, addr + where, width))
    if width == 8 and not (was and not is_big(ino) and mem[addr + 1] == 1):
        put_ino(mem, addr + where, width, ino)
        mem[addr + 1] = np.uint8(np.int64(mem[addr + 1]) + is_big(ino) - was)
        return size
    if width == 8:  # the last wide number goes: write, then narrow
        put_ino(mem, addr + where, width, ino)
        return _count_big(mem, addr, size, -1)
    if not is_big(ino):
        put_ino(mem, addr + where, width, ino)
        return size
    size = _count_big(mem, addr, size, 1)
    where = PARENT if is_parent else find(mem, addr, name) + 4 + len(name)
    put_ino(mem, addr + where, 8, ino)
    return size


@kernel("i8(u1[::1], i8, i8)")
def init(mem, addr, parent_ino):
    """Make an empty shortform directory; returns its size."""
    big = is_big(parent_ino)
    mem[addr] = np.uint8(0)
    mem[addr + 1] = np.uint8(big)
    put_ino(mem, addr + PARENT, 8 if big else 4, parent_ino)
    return PARENT + (8 if big else 4)


# -- conversions --------------------------------------------------------------------------------


@helper
def _sort_slots(mem, base, n):
    """Insertion sort of leaf slots by hash: n is at most 257."""
    for i in range(1, n):
        h, place = F.hash_of(mem, base, i), F.addr_of(mem, base, i)
        j = i
        while j > 0 and F.hash_of(mem, base, j - 1) > h:
            F.copy_slot(mem, base, j - 1, base, j)
            j -= 1
        F.put_slot(mem, base, j, h, place)


@helper
def _dots(mem, addr, base, ino, parent_ino):
    D.put_entry(mem, addr, DOT, b".", ino, L.FT_DIR)
    D.put_entry(mem, addr, DOTDOT, b"..", parent_ino, L.FT_DIR)
    F.put_slot(mem, base, 0, DOT_HASH, DOT >> 3)
    F.put_slot(mem, base, 1, DOTDOT_HASH, DOTDOT >> 3)


@helper
def _copy_entry(source, at, width, mem, addr, offset):
    """Write the shortform entry at source[at] as a block entry at `offset`."""
    namelen = np.int64(source[at])
    here = addr + offset
    length = D.entry_size(namelen)
    put64(mem, here, get_ino(source, at + 4 + namelen, width))
    mem[here + 8] = np.uint8(namelen)
    for i in range(namelen + 1):  # the name and the file type behind it
        mem[here + D.NAME_AT + i] = source[at + 3 + i]
    for i in range(D.NAME_AT + namelen + 1, length - 2):
        mem[here + i] = np.uint8(0)
    put16(mem, here + length - 2, offset)


@kernel(lambda: (D.NAME, D.MEM, D.INT, D.INT, D.INT))
def to_block(source, mem, addr, size, ino):
    """Build the block form of the fork bytes `source` in a block whose common header is set."""
    n = np.int64(source[0])
    width = np.int64(8) if source[1] else np.int64(4)
    put32(mem, addr, L.MAGIC_DIR_BLOCK)
    B.set_counts(mem, addr, size, n + 2, 0)
    base = B.leaf_base(mem, addr, size)
    end = D.area_end(mem, addr, size)
    _dots(mem, addr, base, ino, get_ino(source, PARENT, width))
    at = np.int64(PARENT + width)
    offset = np.int64(FIRST)
    for i in range(n):
        here = get16(source, at + 1)
        if here > offset:
            D.make_unused(mem, addr, offset, here - offset)
        _copy_entry(source, at, width, mem, addr, here)
        namelen = np.int64(source[at])
        F.put_slot(mem, base, i + 2, hash_bytes(source, at + 3, namelen), here >> 3)
        offset = here + D.entry_size(namelen)
        at += slot_size(namelen, width)
    if offset < end:
        D.make_unused(mem, addr, offset, end - offset)
    _sort_slots(mem, base, n + 2)
    D.rebuild_best(mem, addr, end)


@helper
def _is_dot(mem, at):
    """0 for a name, 1 for ".", 2 for ".."."""
    n = np.int64(mem[at + 8])
    if n > 2 or mem[at + D.NAME_AT] != 46 or (n == 2 and mem[at + D.NAME_AT + 1] != 46):
        return np.int64(0)
    return n


@helper
def _measure(mem, addr, size):
    """(names, bytes of names, wide inode numbers, entries called "..") of a block form."""
    end = D.area_end(mem, addr, size)
    offset = np.int64(D.HEADER)
    n = names = big = parents = np.int64(0)
    while offset < end:
        length = D.region(mem, addr, offset, end)
        if length > 0:
            at = addr + offset
            dot = _is_dot(mem, at)
            if dot == 2:
                parents += 1
            if dot != 1:
                big += is_big(np.int64(get64(mem, at)))
            if dot == 0:
                n += 1
                names += np.int64(mem[at + 8])
        offset += abs(length)
    return n, names, big, parents


@kernel("i8(u1[::1], i8, i8)")
def size_of_block(mem, addr, size):
    """Bytes of the shortform of a block-form directory; -1 if it has no shortform."""
    n, names, big, parents = _measure(mem, addr, size)
    width = np.int64(8) if big else np.int64(4)
    if n > 255 or parents != 1:
        return np.int64(-1)
    return PARENT + width + names + n * (4 + width)


@kernel("void(u1[::1], i8, i8, u1[::1])")
def from_block(mem, addr, size, out):
    """Build the shortform in `out`, which has `size_of_block` bytes."""
    n, _, big, _ = _measure(mem, addr, size)
    width = np.int64(8) if big else np.int64(4)
    out[0] = np.uint8(n)
    out[1] = np.uint8(big)
    end = D.area_end(mem, addr, size)
    at = np.int64(PARENT + width)
    offset = np.int64(D.HEADER)
    while offset < end:
        length = D.region(mem, addr, offset, end)
        if length > 0:
            here = addr + offset
            dot = _is_dot(mem, here)
            if dot == 2:
                put_ino(out, PARENT, width, get64(mem, here))
            elif dot == 0:
                at = _append(mem, here, offset, out, at, width)
        offset += abs(length)


@helper
def _append(mem, here, offset, out, at, width):
    """Write the entry at mem[here] as a shortform entry at out[at]; returns where the next goes."""
    namelen = np.int64(mem[here + 8])
    out[at] = np.uint8(namelen)
    put16(out, at + 1, offset)
    for i in range(namelen + 1):  # the name and the file type behind it
        out[at + 3 + i] = mem[here + D.NAME_AT + i]
    put_ino(out, at + 4 + namelen, width, get64(mem, here))
    return at + slot_size(namelen, width)
