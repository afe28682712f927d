"""Attribute leaves: blocks of names and values sorted by hash, as pure kernels.

`(mem, addr)` is a block of `size` bytes. The entry table grows up behind the header, names and
values grow down from the end of the block. The kernel's leaves may have holes between them; every
change made here first compacts the leaf, so that afterwards there is exactly one free region,
`holes` is 0, and the free map has one line. A block is checked with `verify` when it is read; the
other kernels trust it. None of them waits, so a holder of the ILOCK sees each change as one step.

XFS format: da header (magic 0x3bee), u16 count, usedbytes, firstused (0 stands for 65536), u8
holes, free map of 3 {u16 base, u16 size}; entries {u32 hash, u16 nameidx, u8 flags, u8 pad} from
80. Local: u16 valuelen, u8 namelen, name, value, rounded up to 4. Remote: u32 valueblk, u32
valuelen, u8 namelen, name, rounded up to 4. usedbytes is the exact sum of the rounded sizes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from alloc.jit import helper, kernel
from fs.xfs import attrsf
from fs.xfs import layout as L
from fs.xfs.attrsf import INCOMPLETE, LOCAL, NAMESPACES, Bytes, one_namespace, same_bytes
from fs.xfs.be import get16, get32, put16, put32
from fs.xfs.danode import hash_bytes

HEADER = L.ATTR_LEAF_HEADER.itemsize
ENTRY = L.ATTR_LEAF_ENTRY.itemsize
MAGIC = L.off(L.DA_HEADER, "magic")
COUNT = L.off(L.ATTR_LEAF_HEADER, "count")
USED = L.off(L.ATTR_LEAF_HEADER, "usedbytes")
FIRST = L.off(L.ATTR_LEAF_HEADER, "firstused")
HOLES = L.off(L.ATTR_LEAF_HEADER, "holes")
FREEMAP = L.off(L.ATTR_LEAF_HEADER, "freemap")
LOCAL_HEADER = 3
REMOTE_HEADER = 9
VALUE_MAX = 65536

REASONS = (
    "",
    "magic",
    "entry count",
    "first used byte",
    "hash order",
    "name index",
    "flags",
    "name length",
    "value length",
    "value block",
    "used bytes",
    "free map",
)


@helper
def _first_used(mem, addr):
    first = get16(mem, addr + FIRST)
    return first if first != 0 else np.int64(VALUE_MAX)


@helper
def _slot(addr, index):
    return addr + HEADER + index * ENTRY


@helper
def _text(mem, addr, index):
    """Where the entry's name/value part begins."""
    return addr + get16(mem, _slot(addr, index) + 4)


@helper
def _local_bytes(name_length, value_length):
    return (LOCAL_HEADER + name_length + value_length + 3) & ~3


@helper
def _remote_bytes(name_length):
    # The 11 of the format's size rule is the 12-byte structure less its one name byte.
    return (11 + name_length + 3) & ~3


@helper
def _part_bytes(mem, at, flags):
    """Rounded size of a name/value part at `at`."""
    if flags & LOCAL:
        return _local_bytes(np.int64(mem[at + 2]), get16(mem, at))
    return _remote_bytes(np.int64(mem[at + 8]))


@helper
def _entry_bytes(mem, addr, index):
    return _part_bytes(mem, _text(mem, addr, index), mem[_slot(addr, index) + 6])


@helper
def _verify_part(mem, addr, size, slot, lowest):
    """Check one entry's name/value part; a reason, or minus its rounded size when good."""
    nameidx = get16(mem, slot + 4)
    flags = np.int64(mem[slot + 6])
    if flags & ~(LOCAL | NAMESPACES | INCOMPLETE) or not one_namespace(flags & NAMESPACES):
        return 6
    fixed = LOCAL_HEADER if flags & LOCAL else REMOTE_HEADER
    if nameidx < lowest or nameidx + fixed > size:
        return 5
    at = addr + nameidx
    if mem[at + fixed - 1] == 0:
        return 7
    part = _part_bytes(mem, at, flags)
    if nameidx + part > size:
        return 8
    if flags & LOCAL == 0:
        complete = flags & INCOMPLETE == 0
        if get32(mem, at + 4) > VALUE_MAX or (complete and get32(mem, at + 4) == 0):
            return 8
        if complete and get32(mem, at) == 0:
            return 9
    return -part


@kernel("i8(u1[::1], i8, i8)")
def verify(mem, addr, size):
    """0 when the leaf is well formed, else an index into REASONS. O(count)."""
    if get16(mem, addr + MAGIC) != L.MAGIC_ATTR_LEAF:
        return 1
    n = get16(mem, addr + COUNT)
    table_end = HEADER + n * ENTRY
    if table_end > size:
        return 2
    first = _first_used(mem, addr)
    if first > size or first < table_end:
        return 3
    used = np.int64(0)
    last = np.int64(0)
    for i in range(n):
        slot = _slot(addr, i)
        h = get32(mem, slot)
        if h < last:
            return 4
        last = h
        found = _verify_part(mem, addr, size, slot, first)
        if found >= 0:
            return found
        used -= found
    if used != get16(mem, addr + USED) or table_end + used > size:
        return 10
    for i in range(3):
        base = get16(mem, addr + FREEMAP + 4 * i)
        if base > size or base + get16(mem, addr + FREEMAP + 4 * i + 2) > size:
            return 11
    return 0


@helper
def _seal(mem, addr, size, n, used):
    """Header of a compact leaf with n entries."""
    first = size - used
    table_end = HEADER + n * ENTRY
    put16(mem, addr + COUNT, n)
    put16(mem, addr + USED, used)
    put16(mem, addr + FIRST, first & 0xFFFF)
    mem[addr + HOLES] = 0
    mem[addr + FREEMAP : addr + FREEMAP + 12] = 0
    put16(mem, addr + FREEMAP, table_end)
    put16(mem, addr + FREEMAP + 2, first - table_end)


@kernel("void(u1[::1], i8, i8)")
def init(mem, addr, size):
    """Make an empty leaf of a zeroed block whose common header is set already."""
    put16(mem, addr + MAGIC, L.MAGIC_ATTR_LEAF)
    _seal(mem, addr, size, 0, 0)


@helper
def _swap(mem, a, b):
    for i in range(ENTRY):
        byte = mem[a + i]
        mem[a + i] = mem[b + i]
        mem[b + i] = byte


@helper
def _key(mem, addr, index, by_hash):
    slot = _slot(addr, index)
    return get32(mem, slot) if by_hash else get16(mem, slot + 4)


@helper
def _sift(mem, addr, root, n, by_hash):
    while 2 * root + 1 < n:
        child = 2 * root + 1
        if child + 1 < n and _key(mem, addr, child, by_hash) < _key(mem, addr, child + 1, by_hash):
            child += 1
        if _key(mem, addr, root, by_hash) >= _key(mem, addr, child, by_hash):
            return
        _swap(mem, _slot(addr, root), _slot(addr, child))
        root = child


@helper
def _sort(mem, addr, n, by_hash):
    """Heap sort of the entry table, in place: a leaf has no memory to spare for a copy."""
    for root in range(n // 2 - 1, -1, -1):
        _sift(mem, addr, root, n, by_hash)
    for end in range(n - 1, 0, -1):
        _swap(mem, _slot(addr, 0), _slot(addr, end))
        _sift(mem, addr, 0, end, by_hash)


@helper
def _slide_up(mem, source, target, n):
    for i in range(n - 1, -1, -1):
        mem[target + i] = mem[source + i]


@helper
def _pack(mem, addr, size, n):
    """Close every gap between name/value parts; -1 when two of them overlap."""
    _sort(mem, addr, n, False)
    end = np.int64(size)
    bad = False
    for i in range(n - 1, -1, -1):
        nameidx = get16(mem, _slot(addr, i) + 4)
        bad = bad or nameidx + _entry_bytes(mem, addr, i) > end
        end = nameidx
    end = np.int64(size)
    if not bad:
        for i in range(n - 1, -1, -1):
            slot = _slot(addr, i)
            part = _entry_bytes(mem, addr, i)
            end -= part
            _slide_up(mem, addr + get16(mem, slot + 4), addr + end, part)
            put16(mem, slot + 4, end)
    _sort(mem, addr, n, True)
    if bad:
        return -1
    table_end = HEADER + n * ENTRY
    mem[addr + table_end : addr + end] = 0
    _seal(mem, addr, size, n, size - end)
    return 0


@kernel("i8(u1[::1], i8, i8)")
def compact(mem, addr, size):
    """Make one free region of all; 0 when done, -1 when name/value parts overlap (corrupt)."""
    if mem[addr + HOLES] == 0 and size - _first_used(mem, addr) == get16(mem, addr + USED):
        return 0
    return _pack(mem, addr, size, get16(mem, addr + COUNT))


@kernel("i8(u1[::1], i8)")
def count(mem, addr):
    """Number of entries, incomplete ones included."""
    return get16(mem, addr + COUNT)


@kernel("i8(u1[::1], i8)")
def last_hash(mem, addr):
    """Largest hash, 0 in an empty leaf."""
    n = get16(mem, addr + COUNT)
    return get32(mem, _slot(addr, n - 1)) if n else np.int64(0)


@kernel("i8(u1[::1], i8, i8)")
def room(mem, addr, size):
    """Free bytes of the leaf once compacted; an entry needs 8 of them for the table."""
    return size - HEADER - get16(mem, addr + COUNT) * ENTRY - get16(mem, addr + USED)


@kernel("i8(u1[::1], i8)")
def taken(mem, addr):
    """Bytes that the entries take, table and text."""
    return get16(mem, addr + COUNT) * ENTRY + get16(mem, addr + USED)


@helper
def _first_of(mem, addr, hash_value):
    low = np.int64(0)
    high = get16(mem, addr + COUNT)
    while low < high:
        middle = (low + high) >> 1
        if get32(mem, _slot(addr, middle)) < hash_value:
            low = middle + 1
        else:
            high = middle
    return low


@kernel("i8(u1[::1], i8, i8, i8, u1[::1])")
def find(mem, addr, hash_value, flags, name):
    """Index of the entry with this name, or -1 - (where to insert it).

    `flags` is the namespace, with INCOMPLETE to find the invisible entry instead of the visible.
    """
    i = _first_of(mem, addr, hash_value)
    n = get16(mem, addr + COUNT)
    while i < n and get32(mem, _slot(addr, i)) == hash_value:
        own = np.int64(mem[_slot(addr, i) + 6])
        if own & ~LOCAL == flags:
            at = _text(mem, addr, i)
            fixed = LOCAL_HEADER if own & LOCAL else REMOTE_HEADER
            if mem[at + fixed - 1] == name.size and same_bytes(mem, at + fixed, name):
                return i
        i += 1
    return -1 - i


@helper
def _open_slot(mem, addr, index, n):
    """Shift the table up by one entry from index."""
    _slide_up(mem, _slot(addr, index), _slot(addr, index + 1), (n - index) * ENTRY)


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, u1[::1], u1[::1])")
def add_local(mem, addr, size, index, hash_value, flags, name, value):
    """Insert an entry with its value; 0, or -1 when the leaf has no room or is corrupt."""
    part = _local_bytes(name.size, value.size)
    if room(mem, addr, size) < part + ENTRY or compact(mem, addr, size) < 0:
        return -1
    n = get16(mem, addr + COUNT)
    used = get16(mem, addr + USED) + part
    at = addr + size - used
    put16(mem, at, value.size)
    mem[at + 2] = name.size
    for i in range(name.size):
        mem[at + LOCAL_HEADER + i] = name[i]
    for i in range(value.size):
        mem[at + LOCAL_HEADER + name.size + i] = value[i]
    mem[at + LOCAL_HEADER + name.size + value.size : at + part] = 0
    _open_slot(mem, addr, index, n)
    slot = _slot(addr, index)
    put32(mem, slot, hash_value)
    put16(mem, slot + 4, size - used)
    mem[slot + 6] = flags | LOCAL
    mem[slot + 7] = 0
    _seal(mem, addr, size, n + 1, used)
    return 0


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, u1[::1], i8, i8)")
def add_remote(mem, addr, size, index, hash_value, flags, name, valueblk, valuelen):
    """Insert an entry whose value lies in file blocks from valueblk; 0, or -1 as add_local."""
    part = _remote_bytes(name.size)
    if room(mem, addr, size) < part + ENTRY or compact(mem, addr, size) < 0:
        return -1
    n = get16(mem, addr + COUNT)
    used = get16(mem, addr + USED) + part
    at = addr + size - used
    mem[at : at + part] = 0
    put32(mem, at, valueblk)
    put32(mem, at + 4, valuelen)
    mem[at + 8] = name.size
    for i in range(name.size):
        mem[at + REMOTE_HEADER + i] = name[i]
    _open_slot(mem, addr, index, n)
    slot = _slot(addr, index)
    put32(mem, slot, hash_value)
    put16(mem, slot + 4, size - used)
    mem[slot + 6] = flags & ~LOCAL
    mem[slot + 7] = 0
    _seal(mem, addr, size, n + 1, used)
    return 0


@kernel("i8(u1[::1], i8, i8, i8)")
def remove(mem, addr, size, index):
    """Remove an entry; 0, or -1 when the leaf is corrupt."""
    if compact(mem, addr, size) < 0:
        return -1
    n = get16(mem, addr + COUNT)
    used = get16(mem, addr + USED)
    part = _entry_bytes(mem, addr, index)
    nameidx = get16(mem, _slot(addr, index) + 4)
    first = size - used
    _slide_up(mem, addr + first, addr + first + part, nameidx - first)
    mem[addr + first : addr + first + part] = 0
    for i in range(_slot(addr, index), _slot(addr, n - 1)):
        mem[i] = mem[i + ENTRY]
    mem[_slot(addr, n - 1) : _slot(addr, n)] = 0
    for i in range(n - 1):
        at = _slot(addr, i) + 4
        if get16(mem, at) < nameidx:
            put16(mem, at, get16(mem, at) + part)
    _seal(mem, addr, size, n - 1, used - part)
    return 0


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, i8)")
def move(mem, source, first, n, target, index, size):
    """Move n entries, from `first` of leaf source, to before `index` of leaf target.

    0, or -1 (nothing moved) when one of them is corrupt. The caller has checked the room.
    """
    if compact(mem, source, size) < 0 or compact(mem, target, size) < 0:
        return -1
    total = get16(mem, target + COUNT)
    used = get16(mem, target + USED)
    _slide_up(mem, _slot(target, index), _slot(target, index + n), (total - index) * ENTRY)
    for i in range(n):
        slot = _slot(source, first + i)
        part = _entry_bytes(mem, source, first + i)
        used += part
        begin = _text(mem, source, first + i)
        for k in range(part):
            mem[target + size - used + k] = mem[begin + k]
        to = _slot(target, index + i)
        for k in range(ENTRY):
            mem[to + k] = mem[slot + k]
        put16(mem, to + 4, size - used)
    _seal(mem, target, size, total + n, used)
    left = get16(mem, source + COUNT)
    for i in range(_slot(source, first), _slot(source, left - n)):
        mem[i] = mem[i + n * ENTRY]
    return _pack(mem, source, size, left - n)


@kernel("i8(u1[::1], i8, i8, i8, i8)")
def split_point(mem, addr, size, index, need):
    """How many of the entries stay in the left leaf when a new one of `need` bytes comes in.

    The new entry counts, at position index. The split is the most even one in which both leaves
    fit; -1 when there is none, which takes three leaves. `need` includes the table's 8 bytes.
    """
    n = get16(mem, addr + COUNT)
    total = n * ENTRY + get16(mem, addr + USED) + need
    capacity = size - HEADER
    best = np.int64(-1)
    best_gap = total + 1
    left = np.int64(0)
    for k in range(1, n + 1):
        i = k - 1
        if i == index:
            left += need
        else:
            left += ENTRY + _entry_bytes(mem, addr, i if i < index else i - 1)
        gap = abs(total - 2 * left)
        if left <= capacity and total - left <= capacity and gap < best_gap:
            best = np.int64(k)
            best_gap = gap
    return best


@kernel("i8(u1[::1], i8)")
def shortform_size(mem, addr):
    """Bytes of the leaf's visible entries as a shortform list, or -1 when one does not fit one."""
    total = np.int64(attrsf.HEADER)
    n = get16(mem, addr + COUNT)
    visible = np.int64(0)
    for i in range(n):
        flags = np.int64(mem[_slot(addr, i) + 6])
        if flags & LOCAL == 0:
            return -1
        if flags & INCOMPLETE:
            continue
        at = _text(mem, addr, i)
        if get16(mem, at) > attrsf.TEXT_MAX:
            return -1
        visible += 1
        total += attrsf.ENTRY + get16(mem, at) + np.int64(mem[at + 2])
    return total if visible <= attrsf.TEXT_MAX else -1


@kernel("i8(u1[::1], i8, u1[::1])")
def to_shortform(mem, addr, out):
    """Write the visible entries as a shortform list into `out`; returns its size in bytes.

    shortform_size has agreed, and said how long `out` must be.
    """
    to = np.int64(attrsf.HEADER)
    entries_made = np.int64(0)
    for i in range(get16(mem, addr + COUNT)):
        flags = np.int64(mem[_slot(addr, i) + 6])
        if flags & INCOMPLETE:
            continue
        at = _text(mem, addr, i)
        valuelen = get16(mem, at)
        namelen = np.int64(mem[at + 2])
        out[to] = namelen
        out[to + 1] = valuelen
        out[to + 2] = flags & NAMESPACES
        for k in range(namelen + valuelen):
            out[to + attrsf.ENTRY + k] = mem[at + LOCAL_HEADER + k]
        to += attrsf.ENTRY + namelen + valuelen
        entries_made += 1
    put16(out, 0, to)
    out[2] = entries_made
    out[3] = 0
    return to


@kernel("void(u1[::1], u1[::1], i8, i8)")
def from_shortform(source, mem, addr, size):
    """Fill an empty leaf from a verified shortform list (which always fits a block)."""
    at = np.int64(attrsf.HEADER)
    used = np.int64(0)
    n = np.int64(source[2])
    for i in range(n):
        namelen = np.int64(source[at])
        valuelen = np.int64(source[at + 1])
        part = _local_bytes(namelen, valuelen)
        used += part
        to = addr + size - used
        put16(mem, to, valuelen)
        mem[to + 2] = namelen
        for k in range(namelen + valuelen):
            mem[to + LOCAL_HEADER + k] = source[at + attrsf.ENTRY + k]
        slot = _slot(addr, i)
        put32(mem, slot, hash_bytes(source, at + attrsf.ENTRY, namelen))
        put16(mem, slot + 4, size - used)
        mem[slot + 6] = source[at + 2] | LOCAL
        mem[slot + 7] = 0
        at += attrsf.ENTRY + namelen + valuelen
    _sort(mem, addr, n, True)
    _seal(mem, addr, size, n, used)


@kernel("void(u1[::1], i8, i8, i8)")
def set_flags(mem, addr, index, flags):
    """Replace an entry's namespace and INCOMPLETE bits; LOCAL stays as it is."""
    at = _slot(addr, index) + 6
    mem[at] = (mem[at] & LOCAL) | (flags & ~LOCAL)


class Entry(NamedTuple):
    """One entry, decoded: valueblk is 0 when the value is local, at byte `text` of the arena."""

    hash: int
    flags: int
    name: bytes
    valuelen: int
    valueblk: int
    text: int


def entry(mem: Bytes, addr: int, index: int) -> Entry:
    """Decode the entry at index."""
    slot = addr + HEADER + index * ENTRY
    raw = mem[slot : slot + ENTRY].tobytes()
    flags = raw[6]
    at = addr + int.from_bytes(raw[4:6], "big")
    fixed = LOCAL_HEADER if flags & LOCAL else REMOTE_HEADER
    head = mem[at : at + fixed].tobytes()
    name = mem[at + fixed : at + fixed + head[-1]].tobytes()
    hash_value = int.from_bytes(raw[:4], "big")
    if flags & LOCAL:
        valuelen = int.from_bytes(head[:2], "big")
        return Entry(hash_value, flags, name, valuelen, 0, at + fixed + len(name))
    valuelen = int.from_bytes(head[4:8], "big")
    return Entry(hash_value, flags, name, valuelen, int.from_bytes(head[:4], "big"), 0)


def entries(mem: Bytes, addr: int) -> Iterator[Entry]:
    """Every entry in hash order, incomplete ones included."""
    for index in range(int(count(mem, addr))):
        yield entry(mem, addr, index)


def local_bytes(name_length: int, value_length: int) -> int:
    """Leaf bytes of a local entry with its table slot."""
    return ((LOCAL_HEADER + name_length + value_length + 3) & ~3) + ENTRY


def remote_bytes(name_length: int) -> int:
    """Leaf bytes of a remote entry with its table slot."""
    return ((11 + name_length + 3) & ~3) + ENTRY


def is_local(size: int, name_length: int, value_length: int) -> bool:
    """Does a leaf of `size` bytes keep such a value itself? XFS: below three quarters of it."""
    return local_bytes(name_length, value_length) - ENTRY < size // 2 + size // 4
