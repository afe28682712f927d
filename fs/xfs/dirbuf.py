"""Directory blocks as buffers: their kinds and verifiers, and how they are found, made and freed.

A directory's data fork has three spaces: data blocks from file block 0, the hash tree (leaves and
da nodes) from 32 GiB, the free index from 64 GiB. Everywhere a unit is one directory block, which
is one or more filesystem blocks; da nodes and extent maps count filesystem blocks, `db` and `fb`
number directory blocks inside their space.

One BufOps serves all magics that may stand at a place, so a block that changes its form keeps its
ops; its magic says what it is, and callers ask for the one they need.

Locking: the directory's ILOCK, shared to read, exclusive for the rest. Blocks are freed only where
that needs no new block of the extent map, or where one was reserved (`can_free`).

XFS format: directories, address space of the data fork.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np

from fs.cache.buf import Buf, BufOps, Runs
from fs.xfs import bmap, danode
from fs.xfs import dirblock as B
from fs.xfs import dirdata as D
from fs.xfs import dirleaf as F
from fs.xfs import layout as L
from fs.xfs.inode import limits

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.errors import Corrupt
    from fs.log.transaction import Transaction
    from fs.xfs.geometry import Geometry

SPACE_LOG = 35  # each space spans 32 GiB
LEAF_SPACE, FREE_SPACE = 1 << SPACE_LOG, 2 << SPACE_LOG


def _header_fault(geo: Geometry, buf: Buf, owner: int | None) -> str:
    """The header that data blocks and free index blocks share."""
    header = buf.rec(L.DIR_DATA_HEADER)
    if header["uuid"].tobytes() != geo.uuid:
        return "uuid"
    if header["blkno"] != buf.daddr:
        return "block number"
    if owner is not None and header["owner"] != owner:
        return "owner"
    return ""


def _data_fault(geo: Geometry, buf: Buf, owner: int | None) -> str:
    check = B.verify if D.is_block_form(buf.mem, buf.addr) else D.verify_data
    fault = D.REASONS[check(buf.mem, buf.addr, buf.size, limits(geo))]
    return fault or _header_fault(geo, buf, owner)


def _leaf_fault(geo: Geometry, buf: Buf, owner: int | None) -> str:
    if danode.magic(buf.mem, buf.addr) == L.MAGIC_DA_NODE:
        return danode.node_fault(geo, buf, owner)
    fault = F.LEAF_REASONS[F.verify_leaf(buf.mem, buf.addr, buf.size)]
    return fault or danode.header_fault(geo, buf, owner)


def _free_fault(geo: Geometry, buf: Buf, owner: int | None) -> str:
    fault = F.FREE_REASONS[F.verify_free(buf.mem, buf.addr, buf.size)]
    return fault or _header_fault(geo, buf, owner)


_CRC, _LSN = L.off(L.DIR_DATA_HEADER, "crc"), L.off(L.DIR_DATA_HEADER, "lsn")
DATA_OPS = BufOps("directory data block", _CRC, _data_fault, _LSN)
LEAF_OPS = BufOps("directory leaf", danode.CRC, _leaf_fault, danode.LSN)
FREE_OPS = BufOps("directory free index", _CRC, _free_fault, _LSN)


def leaf_root(geo: Geometry) -> int:
    """File block where the hash tree is rooted."""
    return LEAF_SPACE >> geo.block_log


def free_root(geo: Geometry) -> int:
    """File block of the first free index block."""
    return FREE_SPACE >> geo.block_log


def fault(tp: Transaction, dp: Inode, reason: str) -> Corrupt:
    """The error for what a directory's blocks say about each other; writes the log line."""
    return tp.vol.corrupt("directory", f"inode {dp.ino}", reason)


# -- reading ------------------------------------------------------------------------------------


async def read(tp: Transaction, dp: Inode, block: int, ops: BufOps) -> Buf | None:
    """The verified directory block at a file block, None in a hole."""
    key = dp.handle, block
    runs = tp.places.get(key)
    if runs is None:
        runs = await _place(tp, dp, block)
        if not runs:
            return None
        tp.places[key] = runs
    bbs = tp.vol.geo.dir_block_size >> L.BB_LOG
    return await tp.read(runs[0][0], bbs, ops, dp.ino, runs if len(runs) > 1 else ())


async def _place(tp: Transaction, dp: Inode, block: int) -> Runs:
    """Where the directory block at a file block is; nothing in a hole."""
    geo = tp.vol.geo
    found = await bmap.lookup(tp, dp, block)
    if found is None or found.offset > block:
        return ()
    if found.end - block >= geo.dir_block_blocks and not found.unwritten:
        daddr = geo.fsb_to_daddr(found.fsbno + block - found.offset)
        return ((daddr, geo.dir_block_size >> L.BB_LOG),)
    return _runs(tp, dp, await bmap.read(tp, dp, block, geo.dir_block_blocks))


def _runs(tp: Transaction, dp: Inode, pieces: list[bmap.Mapping]) -> Runs:
    """The parts of a block that several extent records map; neighbours on the disk are one."""
    geo = tp.vol.geo
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if piece.fsbno == bmap.HOLE or piece.unwritten:
            raise fault(tp, dp, f"file block {pieces[0].offset} is only mapped in part")
        daddr, bbs = geo.fsb_to_daddr(piece.fsbno), piece.count * geo.block_bbs
        if runs and sum(runs[-1]) == daddr:
            runs[-1] = runs[-1][0], runs[-1][1] + bbs
        else:
            runs.append((daddr, bbs))
    return tuple(runs)


async def read_data(tp: Transaction, dp: Inode, db: int) -> Buf:
    """Data block db, which must exist."""
    buf = None
    if 0 <= db < dp.size >> tp.vol.geo.dir_block_log:
        buf = await read(tp, dp, db * tp.vol.geo.dir_block_blocks, DATA_OPS)
    if buf is None:
        raise fault(tp, dp, f"data block {db} is missing")
    return buf


async def read_leaf(tp: Transaction, dp: Inode, block: int) -> Buf:
    """Leaf or da node at a file block of the hash tree's space, which must exist."""
    geo = tp.vol.geo
    buf = None
    if leaf_root(geo) <= block < free_root(geo):
        buf = await read(tp, dp, block, LEAF_OPS)
    if buf is None:
        raise fault(tp, dp, f"hash block {block} is missing")
    return buf


async def read_free(tp: Transaction, dp: Inode, fb: int) -> Buf | None:
    """Free index block fb, None if it does not exist."""
    geo = tp.vol.geo
    buf = await read(tp, dp, free_root(geo) + fb * geo.dir_block_blocks, FREE_OPS)
    if buf is not None and F.free_first(buf.mem, buf.addr) != fb * free_capacity(geo):
        raise fault(tp, dp, f"free index {fb} describes other data blocks")
    return buf


async def count_free(tp: Transaction, dp: Inode) -> int:
    """Free index blocks up to the last existing one."""
    geo = tp.vol.geo
    end = await bmap.last_offset(tp, dp)
    return max(0, end - free_root(geo)) // geo.dir_block_blocks


def free_capacity(geo: Geometry) -> int:
    """Data blocks that one free index block describes."""
    return (geo.dir_block_size - F.FREE_HEADER) // F.BEST


# -- making and freeing -------------------------------------------------------------------------


async def _new(tp: Transaction, dp: Inode, block: int, ops: BufOps) -> Buf:
    """A zeroed buffer for a newly mapped directory block, not logged yet.

    It is in one piece if the free space has such a piece.
    """
    geo = tp.vol.geo
    count, pieces = geo.dir_block_blocks, list[bmap.Mapping]()
    try:
        pieces.append(await bmap.alloc(tp, dp, block, count, contiguous=True))
    except OSError as error:
        if error.errno != errno.ENOSPC or count == 1:
            raise
        while count:
            pieces.append(await bmap.alloc(tp, dp, block + geo.dir_block_blocks - count, count))
            count -= pieces[-1].count
    tp.log_inode(dp)
    runs = tp.places[dp.handle, block] = _runs(tp, dp, pieces)
    bbs = geo.dir_block_size >> L.BB_LOG
    return await tp.get(runs[0][0], bbs, ops, dp.ino, runs if len(runs) > 1 else ())


def _init_header(tp: Transaction, dp: Inode, buf: Buf, magic: int) -> None:
    header: Any = buf.rec(L.DIR_DATA_HEADER)
    header["magic"], header["blkno"], header["owner"] = magic, buf.daddr, dp.ino
    header["uuid"] = np.void(tp.vol.geo.uuid)


async def new_data(tp: Transaction, dp: Inode, db: int, magic: int = L.MAGIC_DIR_DATA) -> Buf:
    """An empty data block at db; di_size follows."""
    geo = tp.vol.geo
    buf = await _new(tp, dp, db * geo.dir_block_blocks, DATA_OPS)
    _init_header(tp, dp, buf, magic)
    D.init(buf.mem, buf.addr, buf.size, magic)
    set_size(dp, max(dp.size, (db + 1) << geo.dir_block_log))
    tp.log_inode(dp)
    tp.log(buf)
    return buf


async def new_leaf(tp: Transaction, dp: Inode, magic: int) -> tuple[int, Buf]:
    """A new block of the hash tree with its common header: (file block, buffer), not logged."""
    geo = tp.vol.geo
    start, count = leaf_root(geo), geo.dir_block_blocks
    block = await bmap.first_hole(tp, dp, bmap.DATA, count, start)
    buf = await _new(tp, dp, block, LEAF_OPS)
    danode.init_header(geo, buf, magic, dp.ino)
    return block, buf


async def new_free(tp: Transaction, dp: Inode, fb: int) -> Buf:
    """An empty free index block fb, not logged."""
    geo = tp.vol.geo
    buf = await _new(tp, dp, free_root(geo) + fb * geo.dir_block_blocks, FREE_OPS)
    _init_header(tp, dp, buf, L.MAGIC_DIR_FREE)
    F.init_free(buf.mem, buf.addr, fb * free_capacity(geo))
    return buf


def set_size(dp: Inode, size: int) -> None:
    """di_size of a directory: nothing of it is written late, so both sizes are one."""
    dp.size = dp.disk_size = size


async def can_free(tp: Transaction, dp: Inode, block: int) -> bool:
    """May this block be unmapped: is it at an extent's edge, or are blocks reserved for a split?"""
    geo = tp.vol.geo
    found = await bmap.lookup(tp, dp, block)
    if found is None or found.offset > block:
        raise fault(tp, dp, f"file block {block} is freed but not mapped")
    edge = found.offset == block or found.end <= block + geo.dir_block_blocks
    return edge or tp.blocks >= split_blocks(geo)


def split_blocks(geo: Geometry) -> int:
    """Blocks that cutting a hole into an extent record may need."""
    return bmap.worst_indirect(geo, 1)


async def free(tp: Transaction, dp: Inode, block: int, buf: Buf) -> None:
    """Forget the buffer of a directory block and free its blocks."""
    tp.invalidate(buf)
    tp.places.pop((dp.handle, block), None)
    while not await bmap.unmap(tp, dp, block, tp.vol.geo.dir_block_blocks):
        pass
    tp.log_inode(dp)


async def free_data(tp: Transaction, dp: Inode, db: int, buf: Buf) -> None:
    """Free an empty data block; when it was the last one, di_size goes back to the one before."""
    geo = tp.vol.geo
    await free(tp, dp, db * geo.dir_block_blocks, buf)
    if dp.size >> geo.dir_block_log == db + 1:
        set_size(dp, await _data_end(tp, dp, db) << geo.block_log)


async def _data_end(tp: Transaction, dp: Inode, db: int) -> int:
    """File block behind the last data block in front of db. Holes are few: they are searched."""
    blocks = tp.vol.geo.dir_block_blocks
    while db > 0:
        found = await bmap.lookup(tp, dp, (db - 1) * blocks)
        if found is not None and found.offset <= (db - 1) * blocks:
            break
        db -= 1
    return db * blocks


class HashTree:
    """How datree grows and shrinks a directory's hash tree (its Shape)."""

    name = "directory hash tree"

    def __init__(self, geo: Geometry) -> None:
        self.root = leaf_root(geo)

    async def read(self, tp: Transaction, ip: Inode, block: int) -> Buf:
        return await read_leaf(tp, ip, block)

    async def alloc(self, tp: Transaction, ip: Inode) -> tuple[int, Buf]:
        return await new_leaf(tp, ip, L.MAGIC_DIR_LEAFN)

    async def free(self, tp: Transaction, ip: Inode, block: int, buf: Buf) -> None:
        await free(tp, ip, block, buf)

    def count(self, buf: Buf) -> int:
        return int(F.live(buf.mem, buf.addr))

    def last_hash(self, buf: Buf) -> int:
        return int(F.last_hash(buf.mem, buf.addr))

    def joinable(self, left: Buf, right: Buf) -> bool:
        """One leaf would hold both with a quarter of it left for new entries."""
        both = F.live(left.mem, left.addr) + F.live(right.mem, right.addr)
        return bool(both <= leaf_capacity(left.size) * 3 // 4)

    def join(self, left: Buf, right: Buf) -> None:
        F.join(left.mem, left.addr, right.addr)


def leaf_capacity(size: int) -> int:
    """Entries of a leaf in node form."""
    return (size - F.HEADER) // F.ENTRY
