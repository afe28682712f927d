"""Roots of the trees whose blocks are ordinary allocations.

inobt, finobt and refcountbt are rooted in AG headers, the extent trees of files in the inode's
fork. Their blocks come from free space with an owner of their own, and each tree's block counter
follows (XFS format: AGI iblocks/fblocks, AGF refcount_blocks, inode nblocks).

The AG trees need the space lock, a file's tree its ILOCK. Blocks come out of the transaction's
reservation; the growth of finobt and refcountbt may use what the AG keeps back for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fs.cache.buf import Buf
from fs.log.transaction import Transaction
from fs.xfs import ag, btkind, freespace
from fs.xfs import layout as L
from fs.xfs import owner as own
from fs.xfs.ag import HeaderRoot
from fs.xfs.btblock import LEVEL, ROOT_HEADER
from fs.xfs.btkind import Kind
from fs.xfs.btree import Root
from fs.xfs.inode import ATTR
from fs.xfs.owner import Owner

if TYPE_CHECKING:
    from fs.cache.inode import Inode

_AREA_SHIFT = ROOT_HEADER - L.BMBT_ROOT.itemsize  # a fork's root seen as a block begins before it


def keep(tp: Transaction, blocks: int) -> None:
    """Free blocks that nobody else was promised become the transaction's reservation.

    Blocks that a file's tree gave back a moment ago are such: a tree may shrink and grow many
    times in one transaction, and must not use up a block each time.
    """
    tp.vol.space.reserved += blocks
    tp.blocks += blocks


class TreeRoot(HeaderRoot):
    """inobt, finobt or refcountbt of an AG."""

    def __init__(
        self, tp: Transaction, kind: Kind, agno: int, header: Buf, blocks: Owner, counter: int
    ) -> None:
        super().__init__(tp, kind, agno, header)
        self._blocks = blocks
        self._counter = counter  # offset of the header's count of the tree's blocks, or 0

    def _count(self, delta: int) -> None:
        if self._counter:
            ag.add(self.header, self._counter, delta)
            self.tp.log(self.header)
        if self.kind is btkind.FINO:
            self.tp.vol.ags.finobt_blocks[self.owner] += delta

    async def alloc_block(self, near: int) -> int:
        geo = self.tp.vol.geo
        if self.kind is not btkind.INO:
            # The AG keeps blocks back for this tree. They are promised to nobody else, so it may
            # grow in a transaction that has nothing reserved, as removals have.
            keep(self.tp, 1)
        fsbno, _ = await freespace.alloc(
            self.tp,
            near=geo.fsb(self.owner, near),
            minlen=1,
            maxlen=1,
            owner=self._blocks,
            this_ag=True,
            metadata=True,
        )
        self._count(1)
        return geo.agbno_of(fsbno)

    async def free_block(self, block: int) -> None:
        fsbno = self.tp.vol.geo.fsb(self.owner, block)
        self._count(-1)
        await freespace.free(self.tp, fsbno, 1, self._blocks)


def inobt_root(tp: Transaction, agno: int, agi: Buf) -> TreeRoot:
    """The inode tree of an AG."""
    counter = L.off(L.AGI, "iblocks") if tp.vol.geo.has_inobtcount else 0
    return TreeRoot(tp, btkind.INO, agno, agi, own.INOBT, counter)


def finobt_root(tp: Transaction, agno: int, agi: Buf) -> TreeRoot:
    """The tree of an AG's inode chunks that have free inodes."""
    counter = ag.AGI_FBLOCKS if tp.vol.geo.has_inobtcount else 0
    return TreeRoot(tp, btkind.FINO, agno, agi, own.INOBT, counter)


def refcount_root(tp: Transaction, agno: int, agf: Buf) -> TreeRoot:
    """The tree of an AG's shared extents."""
    return TreeRoot(tp, btkind.REFC, agno, agf, own.REFC, ag.AGF_REFCOUNT_BLOCKS)


class InodeRoot(Root):
    """The extent tree of a file's data or attribute fork, which is in BTREE format.

    The root block is the fork itself: level and numrecs, keys for as many slots as fit, pointers
    behind them (XFS format: bmbt root). It has at least one child.
    """

    kind = btkind.BMAP
    in_inode = True

    def __init__(self, tp: Transaction, ip: Inode, fork: int) -> None:
        self.tp = tp
        self.ip = ip
        self.fork = fork
        self.owner = ip.ino
        self.block_size = tp.vol.geo.block_size
        self._blocks = Owner(ip.ino, attr=fork == ATTR, bmbt=True)

    def area(self) -> tuple[int, int]:
        addr, nbytes = self.ip.attr_fork if self.fork == ATTR else self.ip.data_fork
        return addr - _AREA_SHIFT, nbytes + _AREA_SHIFT

    def log_area(self) -> None:
        self.tp.log_inode(self.ip)

    @property
    def levels(self) -> int:
        addr, _ = self.area()
        return int(self.tp.vol.arena.mem[addr + LEVEL + 1]) + 1

    @property
    def top(self) -> int:
        raise AssertionError("the root of a fork is no block")

    def set_top(self, block: int, levels: int) -> None:
        raise AssertionError("the root of a fork is no block")

    @property
    def uuid(self) -> bytes:
        return self.tp.vol.geo.uuid

    def daddr(self, block: int) -> int:
        geo = self.tp.vol.geo
        if not geo.valid_fsb(block):
            raise self.corrupt(f"block {block}", "outside any AG")
        return geo.fsb_to_daddr(block)

    async def alloc_block(self, near: int) -> int:
        fsbno, _ = await freespace.alloc(
            self.tp, near=near, minlen=1, maxlen=1, owner=self._blocks, metadata=True
        )
        self.ip.nblocks += 1
        self.tp.log_inode(self.ip)
        return fsbno

    async def free_block(self, block: int) -> None:
        self.ip.nblocks -= 1
        self.tp.log_inode(self.ip)
        await freespace.free(self.tp, block, 1, self._blocks)
        keep(self.tp, 1)

    def corrupt(self, where: str, reason: str) -> Exception:
        fork = "attr" if self.fork == ATTR else "data"
        return self.tp.vol.corrupt("bmbt", f"ino {self.owner} {fork} fork {where}", reason)
