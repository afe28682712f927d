"""The shape of one image: what the superblock says and what follows from it.

Immutable after mount. Number encodings (XFS format): fsbno = agno << ag_block_log | agbno, which
has gaps, so it is never a linear index; daddr counts 512-byte BBs from the device's start; ino =
agno << agino_log | agino, agino = agbno << inopblog | index.
"""

from __future__ import annotations

from dataclasses import dataclass

from fs.xfs import layout as L


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Units are in the names: sizes in bytes, *_blocks in filesystem blocks, *_bbs in BBs."""

    block_size: int
    block_log: int
    sector_size: int
    dblocks: int
    agcount: int
    ag_blocks: int
    ag_block_log: int
    inode_size: int
    inode_log: int
    inopblock: int
    inopblog: int
    inode_align: int  # blocks: where an inode chunk may start
    sparse_align: int  # blocks: smallest piece of a sparse chunk; 0 without sparse inodes
    imax_pct: int
    dir_block_log: int  # log2 of the directory block size in bytes
    root_ino: int
    log_start: int  # fsbno
    log_blocks: int
    log_sector_size: int
    log_sunit: int
    stripe_unit: int
    stripe_width: int
    uuid: bytes  # what metadata blocks carry
    log_uuid: bytes  # what log records carry
    label: bytes
    has_finobt: bool
    has_sparse: bool
    has_reflink: bool
    has_rmap: bool
    has_bigtime: bool
    has_inobtcount: bool
    has_nrext64: bool
    has_ftype: bool

    # -- derived sizes -------------------------------------------------------------------------

    @property
    def block_bbs(self) -> int:
        return self.block_size >> L.BB_LOG

    @property
    def sector_bbs(self) -> int:
        return self.sector_size >> L.BB_LOG

    @property
    def agino_log(self) -> int:
        return self.ag_block_log + self.inopblog

    @property
    def dir_block_size(self) -> int:
        return 1 << self.dir_block_log

    @property
    def dir_block_blocks(self) -> int:
        return 1 << (self.dir_block_log - self.block_log)

    @property
    def literal_size(self) -> int:
        """Bytes of an inode behind its core, for both forks."""
        return self.inode_size - L.LITERAL

    @property
    def chunk_inodes(self) -> int:
        """Inodes of one chunk allocation: 64, or a block's worth if that is more."""
        return max(64, self.inopblock)

    @property
    def chunk_blocks(self) -> int:
        return self.chunk_inodes // self.inopblock

    @property
    def cluster_bytes(self) -> int:
        """The unit of inode I/O (XFS format: 8192 * inodesize / 256 where alignment allows)."""
        wanted = 8192 * self.inode_size // 256
        if self.inode_align < wanted >> self.block_log:
            wanted = 8192
        return max(wanted, self.block_size)

    @property
    def cluster_blocks(self) -> int:
        return self.cluster_bytes >> self.block_log

    # -- numbers -------------------------------------------------------------------------------

    def fsb(self, agno: int, agbno: int) -> int:
        return agno << self.ag_block_log | agbno

    def agno_of(self, fsbno: int) -> int:
        return fsbno >> self.ag_block_log

    def agbno_of(self, fsbno: int) -> int:
        return fsbno & ((1 << self.ag_block_log) - 1)

    def fsb_to_block(self, fsbno: int) -> int:
        """Linear block number on the device."""
        return self.agno_of(fsbno) * self.ag_blocks + self.agbno_of(fsbno)

    def fsb_to_daddr(self, fsbno: int) -> int:
        return self.fsb_to_block(fsbno) << (self.block_log - L.BB_LOG)

    def fsb_to_bytes(self, fsbno: int) -> int:
        return self.fsb_to_block(fsbno) << self.block_log

    def daddr_to_fsb(self, daddr: int) -> int:
        agno, agbno = divmod(daddr >> (self.block_log - L.BB_LOG), self.ag_blocks)
        return self.fsb(agno, agbno)

    def agb_to_daddr(self, agno: int, agbno: int) -> int:
        return (agno * self.ag_blocks + agbno) << (self.block_log - L.BB_LOG)

    def ag_daddr(self, agno: int, sector: int) -> int:
        """daddr of an AG header: sector 0 superblock, 1 AGF, 2 AGI, 3 AGFL."""
        return self.agb_to_daddr(agno, 0) + sector * self.sector_bbs

    def ag_length(self, agno: int) -> int:
        """Blocks of this AG; the last may be short."""
        if agno < self.agcount - 1:
            return self.ag_blocks
        return self.dblocks - agno * self.ag_blocks

    def valid_fsb(self, fsbno: int, count: int = 1) -> bool:
        """Is the extent inside one AG and clear of the AG headers?"""
        agno, agbno = self.agno_of(fsbno), self.agbno_of(fsbno)
        if not 0 <= agno < self.agcount or count <= 0:
            return False
        return self.ag_header_blocks <= agbno and agbno + count <= self.ag_length(agno)

    @property
    def ag_header_blocks(self) -> int:
        """Blocks that the four header sectors of an AG occupy."""
        return (4 * self.sector_size + self.block_size - 1) >> self.block_log

    def ino(self, agno: int, agino: int) -> int:
        return agno << self.agino_log | agino

    def ino_agno(self, ino: int) -> int:
        return ino >> self.agino_log

    def ino_agino(self, ino: int) -> int:
        return ino & ((1 << self.agino_log) - 1)

    def agino_agbno(self, agino: int) -> int:
        return agino >> self.inopblog

    def agino_index(self, agino: int) -> int:
        """Index of the inode inside its block."""
        return agino & (self.inopblock - 1)

    def valid_ino(self, ino: int) -> bool:
        agno, agbno = self.ino_agno(ino), self.agino_agbno(self.ino_agino(ino))
        if not 0 <= agno < self.agcount:
            return False
        return self.ag_header_blocks <= agbno < self.ag_length(agno)
