"""Shortform attributes: the list that lives in the inode's attribute fork, as pure kernels.

`(mem, addr)` is the fork: a header of four bytes, then entries back to back, unaligned and in no
order. Names and values are shorter than 256 bytes each. The list is checked with `verify` when
the inode is read; the other kernels trust it. Whether a longer list still fits the fork is the
caller's business, because the fork's border can move.

XFS format: u16 totsize (header included), u8 count, u8 pad; entries u8 namelen, u8 valuelen,
u8 flags, name, value. Flags: 0 user, ROOT 2, SECURE 4, PARENT 8, one of them at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from alloc.jit import helper, kernel
from fs.xfs.be import get16, put16

Bytes = NDArray[np.uint8]

LOCAL = 0x01
ROOT = 0x02
SECURE = 0x04
PARENT = 0x08
INCOMPLETE = 0x80
NAMESPACES = ROOT | SECURE | PARENT

HEADER = 4
ENTRY = 3
TEXT_MAX = 255  # longest name and longest value of an entry

REASONS = ("", "total size", "name length", "flags", "end of the list")


@helper
def _entry_size(mem, at):
    return ENTRY + np.int64(mem[at]) + np.int64(mem[at + 1])


@helper
def one_namespace(flags):
    """May an entry have these namespace bits: none or exactly one?"""
    return flags in (0, ROOT, SECURE, PARENT)


@helper
def same_bytes(mem, at, name):
    """Does mem[at:] begin with name?"""
    i = 0
    while i < name.size and mem[at + i] == name[i]:
        i += 1
    return i == name.size


@kernel("i8(u1[::1], i8, i8)")
def verify(mem, addr, nbytes):
    """0 when the list in a fork of nbytes is well formed, else an index into REASONS."""
    if nbytes < HEADER:
        return 1
    total = get16(mem, addr)
    if total < HEADER or total > nbytes:
        return 1
    at = addr + HEADER
    end = addr + total
    for _ in range(np.int64(mem[addr + 2])):
        if at + ENTRY > end:
            return 4
        if mem[at] == 0:
            return 2
        if not one_namespace(np.int64(mem[at + 2])):
            return 3
        at += _entry_size(mem, at)
        if at > end:
            return 4
    return 0 if at == end else 4


@kernel("void(u1[::1], i8)")
def init(mem, addr):
    """Make an empty list."""
    put16(mem, addr, HEADER)
    mem[addr + 2] = 0
    mem[addr + 3] = 0


@kernel("i8(u1[::1], i8)")
def total_size(mem, addr):
    """Bytes of the list with its header."""
    return get16(mem, addr)


@kernel("i8(u1[::1], i8)")
def count(mem, addr):
    """Number of entries."""
    return np.int64(mem[addr + 2])


@kernel("i8(u1[::1], i8, i8, u1[::1])")
def find(mem, addr, flags, name):
    """Byte offset in the fork of the entry with this name and namespace, or -1."""
    at = addr + HEADER
    for _ in range(np.int64(mem[addr + 2])):
        if mem[at] == name.size and mem[at + 2] == flags and same_bytes(mem, at + ENTRY, name):
            return at - addr
        at += _entry_size(mem, at)
    return -1


@kernel("void(u1[::1], i8, i8, u1[::1], u1[::1])")
def add(mem, addr, flags, name, value):
    """Append an entry; the caller has checked the fork's room, the name and the count."""
    total = get16(mem, addr)
    at = addr + total
    mem[at] = name.size
    mem[at + 1] = value.size
    mem[at + 2] = flags
    for i in range(name.size):
        mem[at + ENTRY + i] = name[i]
    at += ENTRY + name.size
    for i in range(value.size):
        mem[at + i] = value[i]
    put16(mem, addr, total + ENTRY + name.size + value.size)
    mem[addr + 2] += 1


@kernel("i8(u1[::1], i8, i8)")
def remove(mem, addr, offset):
    """Remove the entry at `offset` and zero the bytes that become free; returns their number."""
    total = get16(mem, addr)
    at = addr + offset
    gone = _entry_size(mem, at)
    for i in range(at, addr + total - gone):
        mem[i] = mem[i + gone]
    mem[addr + total - gone : addr + total] = 0
    put16(mem, addr, total - gone)
    mem[addr + 2] -= 1
    return gone


def entry_bytes(name_length: int, value_length: int) -> int:
    """Size of an entry; see `fits` for whether there may be one."""
    return ENTRY + name_length + value_length


def value_at(mem: Bytes, addr: int, offset: int) -> bytes:
    """Value of the entry at `offset`, as `find` gave it."""
    at = addr + offset
    start = at + ENTRY + int(mem[at])
    return mem[start : start + int(mem[at + 1])].tobytes()


def entries(mem: Bytes, addr: int) -> Iterator[tuple[int, bytes]]:
    """(namespace flags, name) of each entry."""
    at = addr + HEADER
    for _ in range(int(mem[addr + 2])):
        namelen = int(mem[at])
        yield int(mem[at + 2]), mem[at + ENTRY : at + ENTRY + namelen].tobytes()
        at += ENTRY + namelen + int(mem[at + 1])
