"""Naive twins of the directory kernels: slow, obvious, over bytes and lists.

A block is parsed into a list of regions from its bytes alone; everything a kernel maintains (the
bestfree table, the sorted leaf, counts) is computed again from that list.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from fs.xfs import extents as X

ROOT_INO = 128


class Region(NamedTuple):
    """A stretch of a data block: an entry (name set) or an unused region."""

    offset: int
    length: int
    name: bytes | None
    ino: int
    ftype: int


def naive_hash(name: bytes) -> int:
    """The da hash, byte group by byte group, as the format's description has it."""

    def turn(value: int, by: int) -> int:
        return (value << by | value >> (32 - by)) & 0xFFFFFFFF

    h = 0
    while len(name) >= 4:
        a, b, c, d = name[:4]
        h = (a << 21) ^ (b << 14) ^ (c << 7) ^ d ^ turn(h, 28)
        name = name[4:]
    if len(name) == 3:
        h = (name[0] << 14) ^ (name[1] << 7) ^ name[2] ^ turn(h, 21)
    elif len(name) == 2:
        h = (name[0] << 7) ^ name[1] ^ turn(h, 14)
    elif len(name) == 1:
        h = name[0] ^ turn(h, 7)
    return h


def entry_size(namelen: int) -> int:
    """8 ino, 1 length, name, 1 file type, 2 tag, rounded up to 8."""
    return -(-(12 + namelen) // 8) * 8


def regions(block: bytes, end: int) -> list[Region]:
    """All regions of a data block up to `end`; asserts that they tile it and that tags agree."""
    found: list[Region] = []
    at = 64
    while at < end:
        free, length = struct.unpack_from(">HH", block, at)
        if free == 0xFFFF:
            assert not found or found[-1].name is not None, "two unused regions touch"
            found.append(Region(at, length, None, 0, 0))
        else:
            ino, n = struct.unpack_from(">QB", block, at)
            length = entry_size(n)
            name = block[at + 9 : at + 9 + n]
            found.append(Region(at, length, name, ino, block[at + 9 + n]))
        assert struct.unpack_from(">H", block, at + length - 2)[0] == at, "tag"
        at += length
    assert at == end, "regions do not end with the area"
    return found


def bestfree(block: bytes) -> list[int]:
    """Lengths in the bestfree table."""
    return [struct.unpack_from(">HH", block, 48 + 4 * i)[1] for i in range(3)]


def three_largest(found: list[Region]) -> list[int]:
    """What the bestfree lengths must be."""
    lengths = sorted((r.length for r in found if r.name is None), reverse=True)
    return (lengths + [0, 0, 0])[:3]


def names(found: list[Region]) -> dict[bytes, tuple[int, int]]:
    return {r.name: (r.ino, r.ftype) for r in found if r.name is not None}


def slots(block: bytes, at: int, count: int) -> list[tuple[int, int]]:
    """(hash, address) of `count` leaf slots."""
    return [struct.unpack_from(">II", block, at + 8 * i) for i in range(count)]  # type: ignore


def block_leaf(block: bytes) -> list[tuple[int, int]]:
    """Leaf slots of a block-form directory; asserts their order and the stale count."""
    count, stale = struct.unpack_from(">II", block, len(block) - 8)
    found = slots(block, len(block) - 8 - 8 * count, count)
    assert [h for h, _ in found] == sorted(h for h, _ in found)
    assert sum(1 for _, place in found if not place) == stale
    return found


def easy_limits() -> np.ndarray:
    """Limits of an image with one large AG, for kernels that check inode numbers."""
    limits = np.zeros(X.LIMITS, np.int64)
    limits[X.AGCOUNT], limits[X.AG_BLOCKS], limits[X.LAST_AG_BLOCKS] = 1 << 20, 1 << 20, 1 << 20
    limits[X.AG_BLOCK_LOG], limits[X.AGINO_LOG] = 20, 23
    limits[X.AG_HEADER_BLOCKS] = 1
    return limits


def colliding(count: int, width: int = 12) -> list[bytes]:
    """Names with one and the same hash.

    Bytes enter the hash 7 bits apart, so the top bit of a byte weighs what the lowest bit of the
    byte before it does: flipping both changes nothing.
    """
    assert count <= 1 << width
    plain, flipped = b"\x40\x42", b"\x41\xc2"
    return [
        b"".join(flipped if i >> bit & 1 else plain for bit in range(width)) for i in range(count)
    ]
