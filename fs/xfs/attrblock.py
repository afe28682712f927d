"""Blocks of attribute forks: their checks, where they come from, and where they go.

An attribute fork beyond shortform is a tree of fs blocks with its root at file block 0 (datree.py
has the tree, attrleaf.py the leaves). Every block is verified when it is read: CRC, magic, uuid,
block number, owner, and the structure itself. Values too large for a leaf lie in other blocks of
the same fork (attrvalue.py); those are not buffers.

A block that is freed loses its buffer in the same step, so that the cache never knows a block
that the free-space trees have back. Callers hold the ILOCK, exclusive to change anything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fs.cache.buf import Buf, BufOps
from fs.xfs import attrleaf, bmap, danode
from fs.xfs import layout as L
from fs.xfs.bmap import ATTR

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.xfs.geometry import Geometry

LEAF_FULL_SHARE = (3, 4)  # leaves are joined when the result is at most so full


def _verify(geo: Geometry, buf: Buf, owner: int | None) -> str:
    """What is wrong with a leaf or a node of an attribute tree."""
    if danode.magic(buf.mem, buf.addr) == L.MAGIC_DA_NODE:
        return danode.node_fault(geo, buf, owner)
    reason = attrleaf.REASONS[attrleaf.verify(buf.mem, buf.addr, buf.size)]
    return reason or danode.header_fault(geo, buf, owner)


ATTR_OPS = BufOps("attribute block", danode.CRC, _verify, danode.LSN)


async def map_block(tp: Transaction, ip: Inode, block: int) -> int:
    """daddr of a file block of the attribute fork. Raises Corrupt for a hole."""
    found = await bmap.lookup(tp, ip, block, ATTR)
    if found is None or found.offset > block:
        where = f"ino {ip.ino} file block {block}"
        raise tp.vol.corrupt("attribute fork", where, "not mapped")
    return tp.vol.geo.fsb_to_daddr(found.fsbno + block - found.offset)


async def unmap(tp: Transaction, ip: Inode, block: int, count: int) -> bool:
    """Free blocks of the fork and forget their buffers; True when all of the range is free.

    False: enough for one transaction, call again in another.
    """
    end = block + count
    for found in await bmap.read(tp, ip, block, count, ATTR):
        if found.fsbno != bmap.HOLE:
            forget(tp, found.fsbno, found.count)
    return await bmap.unmap(tp, ip, block, end - block, ATTR)


def forget(tp: Transaction, fsbno: int, count: int) -> None:
    """Drop the buffers, if there are any, of blocks that are about to be freed."""
    geo = tp.vol.geo
    daddr = geo.fsb_to_daddr(fsbno)
    for at in range(daddr, daddr + count * geo.block_bbs, geo.block_bbs):
        tp.forget(at, geo.block_size, logged=False)


class AttrShape:
    """An attribute fork as datree sees it."""

    name = "attribute tree"
    root = 0

    async def read(self, tp: Transaction, ip: Inode, block: int) -> Buf:
        """Verified node or leaf at a file block."""
        daddr = await map_block(tp, ip, block)
        return await tp.read(daddr, tp.vol.geo.block_bbs, ATTR_OPS, ip.ino)

    async def alloc(self, tp: Transaction, ip: Inode) -> tuple[int, Buf]:
        """A new block in the lowest hole of the fork."""
        geo = tp.vol.geo
        block = await bmap.first_hole(tp, ip, ATTR)
        found = await bmap.alloc(tp, ip, block, 1, ATTR)
        buf = await tp.get(geo.fsb_to_daddr(found.fsbno), geo.block_bbs, ATTR_OPS)
        danode.init_header(geo, buf, L.MAGIC_ATTR_LEAF, ip.ino)
        return block, buf

    async def free(self, tp: Transaction, ip: Inode, block: int, buf: Buf) -> None:
        """Give a block back."""
        tp.invalidate(buf)
        await bmap.unmap(tp, ip, block, 1, ATTR)

    def count(self, buf: Buf) -> int:
        """Entries of a leaf."""
        return int(attrleaf.count(buf.mem, buf.addr))

    def last_hash(self, buf: Buf) -> int:
        """Largest hash of a leaf."""
        return int(attrleaf.last_hash(buf.mem, buf.addr))

    def joinable(self, left: Buf, right: Buf) -> bool:
        """Would one leaf hold both and be three quarters full at most?"""
        both = attrleaf.taken(left.mem, left.addr) + attrleaf.taken(right.mem, right.addr)
        part, whole = LEAF_FULL_SHARE
        return bool(both * whole <= (left.size - attrleaf.HEADER) * part)

    def join(self, left: Buf, right: Buf) -> None:
        """Move all of the right leaf behind the left one's entries."""
        n = attrleaf.count(left.mem, left.addr)
        more = attrleaf.count(right.mem, right.addr)
        attrleaf.move(left.mem, right.addr, 0, more, left.addr, n, left.size)


SHAPE = AttrShape()
