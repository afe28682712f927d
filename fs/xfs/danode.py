"""Da nodes: the interior blocks of directory and attribute trees, as pure kernels.

A da node (magic 0x3ebe) holds entries {hash, before}, sorted by hash: `hash` is the largest hash
below the child, `before` the child's block number in the file. Directories and attribute forks
use the same node; what differs is the leaf under it. Several children may carry one hash, so a
lookup that ends at a child's last entry goes on in the leaf's forward sibling.

Every kernel takes `(mem, addr)`, the block's bytes, and touches nothing else. A block is checked
with `verify` once, when it is read; the other kernels trust it. None of them awaits, so a caller
who holds the inode's ILOCK sees each change as one step.

XFS format: da node header 64 bytes (count at 56, level at 58, one above the children, leaves are
0), then entries of 8 bytes; root at file block 0 of an attribute fork, at 32 GiB in a directory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from alloc.jit import helper, kernel
from fs.xfs import layout as L
from fs.xfs.be import get16, get32, put16, put32

if TYPE_CHECKING:
    from fs.cache.buf import Buf
    from fs.xfs.geometry import Geometry

DEPTH_MAX = 5  # levels of nodes above the leaves
MASK32 = 0xFFFFFFFF
HEADER = L.DA_NODE_HEADER.itemsize
ENTRY = L.DA_NODE_ENTRY.itemsize
COUNT = L.off(L.DA_NODE_HEADER, "count")
LEVEL = L.off(L.DA_NODE_HEADER, "level")
FORW = L.off(L.DA_HEADER, "forw")
BACK = L.off(L.DA_HEADER, "back")
MAGIC = L.off(L.DA_HEADER, "magic")
CRC, LSN = L.off(L.DA_HEADER, "crc"), L.off(L.DA_HEADER, "lsn")

REASONS = ("", "magic", "entry count", "level", "hash order", "child block")


@helper
def hash_bytes(mem, addr, n):
    """The name hash of directories and attributes: 32 bits, seven bits a byte, rotating."""
    h = np.int64(0)
    i = addr
    left = n
    while left >= 4:
        word = (
            (np.int64(mem[i]) << 21)
            ^ (np.int64(mem[i + 1]) << 14)
            ^ (np.int64(mem[i + 2]) << 7)
            ^ np.int64(mem[i + 3])
        )
        h = word ^ (((h << 28) | (h >> 4)) & MASK32)
        i += 4
        left -= 4
    if left == 0:
        return h
    word = np.int64(0)
    for _ in range(left):
        word = (word << 7) ^ np.int64(mem[i])
        i += 1
    turn = 7 * left
    return word ^ (((h << turn) | (h >> (32 - turn))) & MASK32)


@kernel("i8(u1[::1], i8, i8)")
def da_hash(mem, addr, n):
    """Hash of the name of n bytes at addr."""
    return hash_bytes(mem, addr, n)


@helper
def capacity(size):
    """Entries that fit a node of `size` bytes."""
    return (size - HEADER) // ENTRY


@kernel("i8(u1[::1], i8, i8)")
def verify(mem, addr, size):
    """0 when the node is well formed, else an index into REASONS. O(count)."""
    if get16(mem, addr + MAGIC) != L.MAGIC_DA_NODE:
        return 1
    n = get16(mem, addr + COUNT)
    if n < 1 or n > capacity(size):
        return 2
    level = get16(mem, addr + LEVEL)
    if level < 1 or level > DEPTH_MAX:
        return 3
    at = addr + HEADER
    last = np.int64(0)
    for _ in range(n):
        h = get32(mem, at)
        if h < last:
            return 4
        if get32(mem, at + 4) == 0:  # block 0 is the root or a data block, never a child
            return 5
        last = h
        at += ENTRY
    return 0


@kernel("void(u1[::1], i8, i8)")
def init(mem, addr, level):
    """Make an empty node of a zeroed block whose common header, siblings included, is set."""
    put16(mem, addr + MAGIC, L.MAGIC_DA_NODE)
    put16(mem, addr + COUNT, 0)
    put16(mem, addr + LEVEL, level)


@kernel("i8(u1[::1], i8)")
def count(mem, addr):
    """Number of entries."""
    return get16(mem, addr + COUNT)


@kernel("i8(u1[::1], i8)")
def level(mem, addr):
    """Level: 1 just above the leaves."""
    return get16(mem, addr + LEVEL)


@kernel("i8(u1[::1], i8)")
def magic(mem, addr):
    """Magic of any block with the common da header."""
    return get16(mem, addr + MAGIC)


@kernel("i8(u1[::1], i8)")
def forw(mem, addr):
    """File block of the next sibling, 0 for none."""
    return get32(mem, addr + FORW)


@kernel("i8(u1[::1], i8)")
def back(mem, addr):
    """File block of the previous sibling, 0 for none."""
    return get32(mem, addr + BACK)


@kernel("void(u1[::1], i8, i8)")
def set_forw(mem, addr, block):
    """Set the next sibling."""
    put32(mem, addr + FORW, block)


@kernel("void(u1[::1], i8, i8)")
def set_back(mem, addr, block):
    """Set the previous sibling."""
    put32(mem, addr + BACK, block)


@kernel("i8(u1[::1], i8, i8)")
def hash_at(mem, addr, index):
    """Largest hash below the child at index."""
    return get32(mem, addr + HEADER + index * ENTRY)


@kernel("i8(u1[::1], i8, i8)")
def child_at(mem, addr, index):
    """File block of the child at index."""
    return get32(mem, addr + HEADER + index * ENTRY + 4)


@kernel("i8(u1[::1], i8)")
def last_hash(mem, addr):
    """Largest hash in the node: what its parent's entry must say."""
    n = get16(mem, addr + COUNT)
    return get32(mem, addr + HEADER + (n - 1) * ENTRY)


@kernel("i8(u1[::1], i8, i8)")
def search(mem, addr, hash_value):
    """Index of the first entry with hash >= hash_value, or count when every one is smaller.

    For a lookup, count means "not there"; for an insertion, descend into entry count - 1.
    """
    low = np.int64(0)
    high = get16(mem, addr + COUNT)
    while low < high:
        middle = (low + high) >> 1
        if get32(mem, addr + HEADER + middle * ENTRY) < hash_value:
            low = middle + 1
        else:
            high = middle
    return low


@kernel("i8(u1[::1], i8, i8)")
def find_child(mem, addr, block):
    """Index of the entry whose child is `block`, or -1."""
    n = get16(mem, addr + COUNT)
    for i in range(n):
        if get32(mem, addr + HEADER + i * ENTRY + 4) == block:
            return i
    return -1


@kernel("void(u1[::1], i8, i8, i8)")
def set_hash(mem, addr, index, hash_value):
    """Change an entry's hash, after its child's largest hash changed."""
    put32(mem, addr + HEADER + index * ENTRY, hash_value)


@helper
def _slide(mem, source, target, n):
    """Copy n bytes inside mem; the ranges may overlap."""
    if target < source:
        for i in range(n):
            mem[target + i] = mem[source + i]
    elif target > source:
        for i in range(n - 1, -1, -1):
            mem[target + i] = mem[source + i]


@kernel("i8(u1[::1], i8, i8, i8, i8, i8)")
def insert(mem, addr, size, index, hash_value, block):
    """Insert an entry before index; 0 when done, -1 when the node is full."""
    n = get16(mem, addr + COUNT)
    if n >= capacity(size):
        return -1
    at = addr + HEADER + index * ENTRY
    _slide(mem, at, at + ENTRY, (n - index) * ENTRY)
    put32(mem, at, hash_value)
    put32(mem, at + 4, block)
    put16(mem, addr + COUNT, n + 1)
    return 0


@kernel("void(u1[::1], i8, i8)")
def delete(mem, addr, index):
    """Remove the entry at index; the slot that becomes free is zeroed."""
    n = get16(mem, addr + COUNT)
    at = addr + HEADER + index * ENTRY
    _slide(mem, at + ENTRY, at, (n - index - 1) * ENTRY)
    end = addr + HEADER + (n - 1) * ENTRY
    mem[end : end + ENTRY] = 0
    put16(mem, addr + COUNT, n - 1)


@kernel("void(u1[::1], i8, i8, i8, i8, i8)")
def move(mem, source, first, n, target, index):
    """Move n entries, from `first` of node source, to before `index` of node target.

    The caller has checked that they fit. Splitting moves the upper half into a fresh right
    node, joining moves everything behind the left node's last entry.
    """
    total = get16(mem, target + COUNT)
    at = target + HEADER + index * ENTRY
    _slide(mem, at, at + n * ENTRY, (total - index) * ENTRY)
    begin = source + HEADER + first * ENTRY
    for i in range(n * ENTRY):
        mem[at + i] = mem[begin + i]
    put16(mem, target + COUNT, total + n)
    left = get16(mem, source + COUNT)
    _slide(mem, begin + n * ENTRY, begin, (left - first - n) * ENTRY)
    end = source + HEADER + left * ENTRY
    mem[end - n * ENTRY : end] = 0
    put16(mem, source + COUNT, left - n)


def header_fault(geo: Geometry, buf: Buf, owner: int | None) -> str:
    """What is wrong with a da header's uuid, block number or owner; "" when nothing is."""
    header = buf.rec(L.DA_HEADER)
    if header["uuid"].tobytes() != geo.uuid:
        return "uuid"
    if header["blkno"] != buf.daddr:
        return "block number"
    if owner is not None and header["owner"] != owner:
        return "owner"
    return ""


def init_header(geo: Geometry, buf: Buf, magic_value: int, owner: int) -> None:
    """Common header of a new da block: the rest of the buffer is zero."""
    header: Any = buf.rec(L.DA_HEADER)
    header["magic"] = magic_value
    header["blkno"] = buf.daddr
    header["uuid"] = np.void(geo.uuid)
    header["owner"] = owner


def node_fault(geo: Geometry, buf: Buf, owner: int | None) -> str:
    """What is wrong with a da node just read; "" when nothing is."""
    reason = REASONS[verify(buf.mem, buf.addr, buf.size)]
    return reason or header_fault(geo, buf, owner)
