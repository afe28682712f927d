"""The seven kinds of B+tree: records as tuples, keys, buffer operations and size limits.

A `Kind` says everything in which the trees differ; cursor and kernels are the same for all.
Records are plain tuples in Python and big-endian bytes in blocks:

    bno, cnt    (start, len)                                        blocks of an AG
    ino, fino   (startino, holemask, count, freecount, free mask)   count 0 without sparse inodes
    rmap        (start, len, owner, offset)                         owner signed, offset with flags
    refc        (start, len, refcount)
    bmap        (offset, fsbno, count, unwritten)

`limits(geo)` gives record counts and the height limits of XFS (computed from minimum fill, as the
format prescribes). Verifiers run after the CRC check, whenever a block comes from the device.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fs.cache.buf import Buf, BufOps
from fs.xfs import btblock as bt
from fs.xfs import layout as L
from fs.xfs.geometry import Geometry

LEVELS_MAX = 9  # XFS format: no tree of any kind may be higher

Record = tuple[int, ...]
Mem = np.ndarray[Any, np.dtype[np.uint8]]

_SHORT = struct.Struct(">IHHIIQ")
_LONG = struct.Struct(">IHHQQQ")
_U32, _U64 = struct.Struct(">I"), struct.Struct(">Q")
_PAIR = struct.Struct(">QQ")
_SHIFT, _LOW43, _LOW54, _LOW21 = 43, (1 << 43) - 1, (1 << 54) - 1, (1 << 21) - 1

REASONS = (
    "",
    "keys out of order",
    "records overlap",
    "record of no length",
    "record beyond the AG's end",
    "impossible value in a record",
    "impossible block pointer",
)


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of tree. `key` gives a record's search key as up to three words."""

    id: int
    name: str
    magic: int
    layout: struct.Struct
    key: Callable[[Record], tuple[int, int, int]]
    ops: BufOps
    long: bool = False
    overlapping: bool = False

    @property
    def header_bytes(self) -> int:
        return bt.HEADER_BYTES[self.id]

    @property
    def rec_bytes(self) -> int:
        return bt.REC_BYTES[self.id]

    def pack(self, target: Mem, at: int, rec: Record) -> None:
        """Write a record's bytes at target[at]."""
        if self.long:
            pack_extent(target, at, rec)
        else:
            self.layout.pack_into(target, at, *rec)

    def unpack(self, mem: Mem, at: int) -> Record:
        """The record at mem[at]."""
        if self.long:
            return unpack_extent(mem, at)
        return self.layout.unpack_from(mem, at)

    def leaf_max(self, block_size: int) -> int:
        """Records that a leaf holds."""
        return (block_size - self.header_bytes) // self.rec_bytes

    def node_max(self, block_size: int) -> int:
        """Entries that a node holds."""
        width = bt.KEY_BYTES[self.id] + bt.PTR_BYTES[self.id]
        return (block_size - self.header_bytes) // width


def pack_extent(target: Mem, at: int, rec: Record) -> None:
    """Write (offset, fsbno, count, unwritten) as the 128-bit extent record."""
    offset, fsbno, count, unwritten = rec
    high = (unwritten & 1) << 63 | offset << 9 | fsbno >> _SHIFT
    _PAIR.pack_into(target, at, high, (fsbno & _LOW43) << 21 | count)


def unpack_extent(mem: Mem, at: int) -> Record:
    """The extent record at mem[at] as (offset, fsbno, count, unwritten)."""
    high, low = _PAIR.unpack_from(mem, at)
    return high >> 9 & _LOW54, (high & 0x1FF) << _SHIFT | low >> 21, low & _LOW21, high >> 63


# -- verifiers ------------------------------------------------------------------------------------


def _verify_short(kind_id: int, magic: int, geo: Geometry, buf: Buf, owner: int | None) -> str:
    """Check a block of a tree inside an AG; `owner` is the agno."""
    found, level, numrecs, left, right, blkno = _SHORT.unpack_from(buf.mem, buf.addr)
    agno = _U32.unpack_from(buf.mem, buf.addr + bt.SHORT_OWNER)[0]
    if found != magic:
        return f"magic {found:#x} instead of {magic:#x}"
    if bytes(buf.mem[buf.addr + bt.SHORT_UUID :][:16]) != geo.uuid:
        return "uuid of another filesystem"
    if blkno != buf.daddr:
        return f"block number {blkno} is another block's"
    if agno >= geo.agcount or (owner is not None and agno != owner):
        return f"owner is AG {agno}"
    length = geo.ag_length(agno)
    for sibling in (left, right):
        if sibling != L.NULL32 and not 0 < sibling < length:
            return f"sibling {sibling} outside the AG"
    return _verify_body(kind_id, level, numrecs, buf, length)


def _verify_long(kind_id: int, magic: int, geo: Geometry, buf: Buf, owner: int | None) -> str:
    """Check a block of a file's extent tree; `owner` is the ino."""
    found, level, numrecs, left, right, blkno = _LONG.unpack_from(buf.mem, buf.addr)
    ino = _U64.unpack_from(buf.mem, buf.addr + bt.LONG_OWNER)[0]
    if found != magic:
        return f"magic {found:#x} instead of {magic:#x}"
    if bytes(buf.mem[buf.addr + bt.LONG_UUID :][:16]) != geo.uuid:
        return "uuid of another filesystem"
    if blkno != buf.daddr:
        return f"block number {blkno} is another block's"
    if owner is not None and ino != owner:
        return f"owner is inode {ino}"
    for sibling in (left, right):
        if sibling != L.NULL64 and not geo.valid_fsb(sibling):
            return f"sibling {sibling} outside the filesystem"
    return _verify_body(kind_id, level, numrecs, buf, 0)


def _verify_body(kind_id: int, level: int, numrecs: int, buf: Buf, ag_blocks: int) -> str:
    """Level, number of entries, order and bounds of the entries."""
    kind = KINDS[kind_id]
    if level >= LEVELS_MAX:
        return f"level {level}"
    most = kind.node_max(buf.size) if level else kind.leaf_max(buf.size)
    if numrecs > most or (level and not numrecs):
        return f"{numrecs} entries where at most {most} fit"
    return REASONS[bt.check_records(buf.mem, buf.addr, buf.size, kind_id, ag_blocks)]


def _ops(kind_id: int, name: str, magic: int, *, long: bool = False) -> BufOps:
    header = L.LONG_BLOCK if long else L.SHORT_BLOCK
    check = _verify_long if long else _verify_short

    def verify(geo: Geometry, buf: Buf, owner: int | None) -> str:
        return check(kind_id, magic, geo, buf, owner)

    return BufOps(name, L.off(header, "crc"), verify, L.off(header, "lsn"))


# -- the kinds ------------------------------------------------------------------------------------


def _first(rec: Record) -> tuple[int, int, int]:
    return rec[0], 0, 0


def _by_length(rec: Record) -> tuple[int, int, int]:
    return rec[1], rec[0], 0


def _rmap_key(rec: Record) -> tuple[int, int, int]:
    return rec[0], rec[2], rec[3] & ~bt.OFFSET_UNWRITTEN


def _kind(
    kind_id: int,
    name: str,
    magic: int,
    layout: str,
    key: Callable[[Record], tuple[int, int, int]] = _first,
    *,
    long: bool = False,
    overlapping: bool = False,
) -> Kind:
    ops = _ops(kind_id, name, magic, long=long)
    return Kind(kind_id, name, magic, struct.Struct(layout), key, ops, long, overlapping)


BNO = _kind(bt.BNO, "bnobt", L.MAGIC_BNOBT, ">II")
CNT = _kind(bt.CNT, "cntbt", L.MAGIC_CNTBT, ">II", _by_length)
INO = _kind(bt.INO, "inobt", L.MAGIC_INOBT, ">IHBBQ")
FINO = _kind(bt.FINO, "finobt", L.MAGIC_FINOBT, ">IHBBQ")
RMAP = _kind(bt.RMAP, "rmapbt", L.MAGIC_RMAPBT, ">IIqQ", _rmap_key, overlapping=True)
REFC = _kind(bt.REFC, "refcountbt", L.MAGIC_REFCOUNTBT, ">III")
BMAP = _kind(bt.BMAP, "bmbt", L.MAGIC_BMBT, ">QQ", long=True)
KINDS = (BNO, CNT, INO, FINO, RMAP, REFC, BMAP)


# -- limits ---------------------------------------------------------------------------------------


def height(leaf_min: int, node_min: int, records: int) -> int:
    """Levels that a tree of so many records can need when every block is at its minimum."""
    levels, blocks = 1, -(-records // leaf_min)
    while blocks > 1:
        blocks = -(-blocks // node_min)
        levels += 1
    return levels


def worst_blocks(leaf_min: int, node_min: int, records: int) -> int:
    """Blocks that a tree of so many records can need when every block is at its minimum."""
    total, blocks = 0, records
    least = leaf_min
    while blocks > 1:
        blocks = -(-blocks // least)
        total += blocks
        least = node_min
    return total


def _height_for_blocks(node_min: int, blocks: int) -> int:
    """Levels of a tree that fills `blocks` blocks, the root having two entries."""
    levels, nodes, left = 1, 2, blocks - 1
    while nodes < left:
        left -= nodes
        nodes *= node_min
        levels += 1
    return levels


@dataclass(frozen=True)
class Limits:
    """Height limits of the trees inside an AG, and how much of an AG their growth can need."""

    alloc_levels: int
    inode_levels: int
    rmap_levels: int
    refcount_levels: int
    rmap_reserve: int  # blocks an AG
    refcount_reserve: int
    finobt_reserve: int


def minimum(kind: Kind, block_size: int) -> tuple[int, int]:
    """Fewest entries of a leaf and of a node that is not the root (XFS format: half)."""
    return kind.leaf_max(block_size) // 2, kind.node_max(block_size) // 2


@lru_cache(maxsize=16)
def limits(geo: Geometry) -> Limits:
    """XFS format: heights follow from AG size and minimum fill; reserves are the kernel's."""
    size = geo.block_size
    alloc, inode = minimum(BNO, size), minimum(INO, size)
    rmap, refcount = minimum(RMAP, size), minimum(REFC, size)
    if geo.has_reflink:
        rmap_levels = _height_for_blocks(rmap[1], geo.ag_blocks)
    else:
        rmap_levels = height(*rmap, geo.ag_blocks)
    rmap_reserve = max(geo.ag_blocks // 100, worst_blocks(*rmap, geo.ag_blocks))
    chunks = geo.ag_blocks * geo.inopblock // 64
    return Limits(
        alloc_levels=height(*alloc, (geo.ag_blocks + 1) // 2),
        inode_levels=height(*inode, 1 << (geo.agino_log - 6)),
        rmap_levels=rmap_levels,
        refcount_levels=height(*refcount, geo.ag_blocks),
        rmap_reserve=rmap_reserve if geo.has_rmap else 0,
        refcount_reserve=worst_blocks(*refcount, geo.ag_blocks) if geo.has_reflink else 0,
        finobt_reserve=worst_blocks(*inode, chunks) if geo.has_finobt else 0,
    )
