"""Log reservations: how many bytes of the log each kind of transaction may need, at most.

The numbers are those of XFS (libxfs, xfs_trans_resv.c, and `xfs_db -c logres` prints them), because
the size of every log that mkfs.xfs ever made follows from them. They cover *payload*: what is
logged with the headers of items and regions. `unit_bytes` adds what a checkpoint's records cost.

Units of cost: a buffer is logged with 128 bytes beside its own, an inode with a format, its core,
and both forks with the headers that fork trees have in memory. `ops` changes of a tree of at most
`levels` levels touch `2 * levels - 1` blocks each: a path, and a sibling on every level but the
root. Dquots count although quotas are not supported, since the kernel counts them always.

Immutable; computed once a mount.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from fs.log.record import header_bbs
from fs.xfs import btkind
from fs.xfs import layout as L
from fs.xfs.geometry import Geometry
from fs.xfs.inode import ATTR, DATA, levels_max

BUFFER_HEADERS = 128  # operation header and format of a buffer, as XFS rounds them
OP_HEADER = 12
TRANSACTION_HEADER = 16
INODE_FORMAT = 56
DQUOTS = 6 * (24 + 104)  # format and dquot, for three kinds of quota before and after
DISK_DQUOT = 104
DA_DEPTH = 5  # most levels of a directory's or an attribute's index
NAME_BYTES = 256
SYMLINK_BYTES = 1024
OLD_RMAP_LEVELS = 9  # what early kernels took for the rmapbt beside reflink
OLD_LOGCOUNT = 8  # and how often such transactions might roll
RECORD_MAX = 256 << 10  # largest iclog
SIZE_FACTOR = 3  # a log holds so many of the largest transactions


class Reservation(NamedTuple):
    """`logres` bytes for each of `logcount` transactions in a row; 0 is not permanent, as 1."""

    logres: int
    logcount: int
    permanent: bool

    @property
    def total(self) -> int:
        """Bytes of the whole chain."""
        return self.logres * max(self.logcount, 1)


class Costs:
    """What touching things costs in the log of one geometry, in bytes."""

    def __init__(self, geo: Geometry, rmap_levels: int | None = None) -> None:
        limits = btkind.limits(geo)
        self.geo = geo
        self.block = geo.block_size
        self.sector = geo.sector_size
        self.alloc_levels = limits.alloc_levels
        self.inode_levels = limits.inode_levels
        self.rmap_levels = 0
        if geo.has_rmap:
            self.rmap_levels = limits.rmap_levels if rmap_levels is None else rmap_levels
        self.refcount_levels = limits.refcount_levels if geo.has_reflink else 0
        self.fork_levels = {fork: levels_max(geo, fork) for fork in (DATA, ATTR)}
        most = btkind.BNO.leaf_max(geo.block_size)
        self._records_each = most - most // 2  # new records that surely fit a split block

    # -- pieces ---------------------------------------------------------------------------------

    def buffers(self, n: int, size: int) -> int:
        """`n` whole buffers of `size` bytes."""
        return n * (size + BUFFER_HEADERS)

    def blocks(self, n: int) -> int:
        """`n` buffers of a block."""
        return self.buffers(n, self.block)

    def sectors(self, n: int) -> int:
        """`n` AG headers or superblocks."""
        return self.buffers(n, self.sector)

    def inodes(self, n: int) -> int:
        """`n` inodes, whole."""
        forks = 2 * L.LONG_BLOCK.itemsize
        return n * (4 * OP_HEADER + INODE_FORMAT + self.geo.inode_size + forks)

    def free_space(self, ops: int) -> int:
        """Blocks of bnobt, cntbt and rmapbt that `ops` allocations or frees change."""
        n = 2 * ops * (2 * self.alloc_levels - 1)
        return n + ops * (2 * self.rmap_levels - 1) if self.geo.has_rmap else n

    def refcounts(self, ops: int) -> int:
        """Blocks of the refcountbt that `ops` changes touch."""
        return ops * (2 * self.refcount_levels - 1) if self.geo.has_reflink else 0

    def fork_blocks(self, blocks: int, fork: int) -> int:
        """Tree blocks that mapping `blocks` blocks adds to a fork."""
        return -(-blocks // self._records_each) * (self.fork_levels[fork] - 1)

    @property
    def entry_blocks(self) -> int:
        """Blocks that a directory entry can touch: data, free, leaf and index, and their maps."""
        each = self.geo.dir_block_blocks
        places = DA_DEPTH + 2
        return places * (each + self.fork_blocks(each, DATA)) + 1

    @property
    def attribute_blocks(self) -> int:
        """Blocks that an attribute's entry needs, with their maps."""
        return DA_DEPTH * (1 + self.fork_blocks(1, ATTR))

    @property
    def inobt(self) -> int:
        """Bytes: a record comes or goes in the inobt, which takes or gives a block."""
        return self.blocks(self.inode_levels) + self.blocks(self.free_space(1))

    @property
    def finobt(self) -> int:
        return self.inobt if self.geo.has_finobt else 0

    @property
    def unlink_add(self) -> int:
        """Bytes: the head of an unlinked list and one inode."""
        return self.sectors(1) + self.geo.cluster_bytes

    @property
    def unlink_remove(self) -> int:
        """Bytes: the head of an unlinked list and two inodes."""
        return self.sectors(1) + 2 * self.geo.cluster_bytes

    # -- XFS's transactions ---------------------------------------------------------------------

    def write(self) -> int:
        return DQUOTS + max(self._map_two(), self._free_two(), self._count(1))

    def itruncate(self) -> int:
        return DQUOTS + max(self._unmap(), self._free_four(), self._count(2))

    def old_write(self) -> int:
        """As write, with the reference counts in the same transaction, as kernels once had it."""
        return DQUOTS + self.blocks(self.refcounts(2)) + max(self._map_two(), self._free_two())

    def old_itruncate(self) -> int:
        """As itruncate, likewise."""
        return DQUOTS + max(self._unmap(), self._free_four() + self.blocks(self.refcounts(4)))

    def _map_two(self) -> int:
        tree = self.blocks(self.fork_levels[DATA])
        return self.inodes(1) + tree + self.sectors(3) + self.blocks(self.free_space(2))

    def _unmap(self) -> int:
        return self.inodes(1) + self.blocks(self.fork_levels[DATA] + 1)

    def _free_two(self) -> int:
        return self.sectors(5) + self.blocks(self.free_space(2))

    def _free_four(self) -> int:
        return self.sectors(9) + self.blocks(self.free_space(4))

    def _count(self, ops: int) -> int:
        return self.sectors(ops) + self.blocks(self.refcounts(ops)) if self.geo.has_reflink else 0

    def rename(self) -> int:
        entries = self.inodes(5) + self.blocks(2 * self.entry_blocks)
        return DQUOTS + max(entries, self.sectors(7) + self.blocks(self.free_space(3)))

    def link(self) -> int:
        entry = self.inodes(2) + self.blocks(self.entry_blocks)
        freed = self.sectors(3) + self.blocks(self.free_space(1))
        return DQUOTS + self.unlink_remove + max(entry, freed)

    def remove(self) -> int:
        entry = self.inodes(2) + self.blocks(self.entry_blocks)
        freed = self.sectors(4) + self.blocks(self.free_space(2))
        return DQUOTS + self.unlink_add + max(entry, freed)

    def new_inodes(self) -> int:
        """A chunk of inodes is allocated; its clusters are not logged."""
        headers = self.sectors(2) + self.sector
        return headers + self.blocks(self.free_space(1)) + self.inobt + self.finobt

    def create(self) -> int:
        entry = self.inodes(2) + self.sectors(1) + self.block + self.blocks(self.entry_blocks)
        return DQUOTS + max(self.new_inodes(), entry + self.finobt)

    def symlink(self) -> int:
        return self.create() + self.buffers(1, SYMLINK_BYTES)

    def tmpfile(self) -> int:
        return DQUOTS + self.new_inodes() + self.unlink_add

    def ifree(self) -> int:
        chunk = self.blocks(self.free_space(1)) + self.buffers(self.geo.chunk_blocks, 0)
        headers = self.inodes(1) + self.sectors(3) + self.unlink_remove
        return DQUOTS + headers + chunk + self.inobt + self.finobt

    def ichange(self) -> int:
        return DQUOTS + self.inodes(1) + self.sectors(1)

    def growdata(self) -> int:
        return self.sectors(3) + self.blocks(self.free_space(1))

    def addafork(self) -> int:
        moved = self.buffers(1, self.geo.dir_block_size)
        maps = self.fork_blocks(self.geo.dir_block_blocks, DATA) + 1
        tree = self.blocks(maps) + self.blocks(self.free_space(1))
        return DQUOTS + self.inodes(1) + self.sectors(2) + moved + tree

    def attrinval(self) -> int:
        return max(self.inodes(1) + self.blocks(self.fork_levels[ATTR]), self._free_four())

    def attrsetm(self) -> int:
        return DQUOTS + self.inodes(1) + self.sectors(1) + self.blocks(DA_DEPTH)

    def attrsetrt(self) -> int:
        return self.sectors(1) + self.blocks(self.fork_levels[ATTR])

    def attrrm(self) -> int:
        maps = self.block * self.fork_levels[ATTR] + self.buffers(self.fork_levels[DATA], 0)
        return DQUOTS + max(self.inodes(1) + self.blocks(DA_DEPTH) + maps, self._free_two())

    def growrtalloc(self) -> int:
        tree = self.blocks(self.fork_levels[DATA] + self.free_space(1))
        return self.sectors(2) + tree + self.inodes(1)

    def growrtfree(self) -> int:
        summary = self.buffers(1, 0)  # it has no bytes without a realtime device
        return self.sectors(1) + self.inodes(2) + self.blocks(1) + summary

    def dqalloc(self, write: int) -> int:
        return write + self.buffers(1, self.block - 1)


@lru_cache(maxsize=16)
def table(geo: Geometry, rmap_levels: int | None = None) -> Mapping[str, Reservation]:
    """XFS's reservations by name, in the order of its own table.

    `rmap_levels` is what another version takes for the tallest rmapbt.
    """
    return _table(geo, Costs(geo, rmap_levels))


def _table(geo: Geometry, c: Costs) -> dict[str, Reservation]:
    rolls = 2 + (geo.has_reflink or geo.has_rmap) + geo.has_reflink + geo.has_rmap
    create = c.create()
    return {
        "write": Reservation(c.write(), rolls, True),
        "itruncate": Reservation(c.itruncate(), rolls, True),
        "rename": Reservation(c.rename(), 2, True),
        "link": Reservation(c.link(), 2, True),
        "remove": Reservation(c.remove(), 2, True),
        "symlink": Reservation(c.symlink(), 3, True),
        "create": Reservation(create, 2, True),
        "tmpfile": Reservation(c.tmpfile(), 2, True),
        "mkdir": Reservation(create, 3, True),
        "ifree": Reservation(c.ifree(), 2, True),
        "ichange": Reservation(c.ichange(), 0, False),
        "growdata": Reservation(c.growdata(), 2, True),
        "addafork": Reservation(c.addafork(), 2, True),
        "writeid": Reservation(c.inodes(1), 0, False),
        "attrinval": Reservation(c.attrinval(), 1, True),
        "attrsetm": Reservation(c.attrsetm(), 3, True),
        "attrsetrt": Reservation(c.attrsetrt(), 0, False),
        "attrrm": Reservation(c.attrrm(), 3, True),
        "clearagi": Reservation(c.sectors(1), 0, False),
        "growrtalloc": Reservation(c.growrtalloc(), 2, True),
        "growrtzero": Reservation(c.blocks(1), 0, False),
        "growrtfree": Reservation(c.growrtfree(), 0, False),
        "qm_setqlim": Reservation(c.buffers(1, DISK_DQUOT), 1, False),
        "qm_dqalloc": Reservation(c.dqalloc(c.write()), rolls, True),
        "sb": Reservation(c.sectors(1), 1, False),
        "fsyncts": Reservation(c.inodes(1), 0, False),
    }


# -- beside the payload -------------------------------------------------------------------------


def round_off(geo: Geometry) -> int:
    """Bytes that a write of the log is rounded up to: a stripe unit of the log, or a BB."""
    return geo.log_sunit if geo.log_sunit > 1 else L.BB_SIZE


def records(payload: int, iclog_size: int) -> tuple[int, int]:
    """Records that a payload can need, and its bytes with the headers of its operations.

    An operation that is cut at the end of a record goes on behind another header.
    """
    space = iclog_size - header_bbs(iclog_size) * L.BB_SIZE
    nbytes = payload + 2 * OP_HEADER + TRANSACTION_HEADER
    n = -(-nbytes // space)
    nbytes += n * OP_HEADER
    while -(-nbytes // space) > n:
        nbytes += OP_HEADER
        n += 1
    return n, nbytes


def unit_bytes(geo: Geometry, payload: int, iclog_size: int = RECORD_MAX) -> int:
    """Bytes of the log that a transaction's payload can take there, whatever lies around it.

    Beside the records, the commit has one, and the end of either is rounded up (XFS's
    xlog_calc_unit_res).
    """
    n, nbytes = records(payload, iclog_size)
    headers = (n + 1) * header_bbs(iclog_size) * L.BB_SIZE
    return nbytes + headers + 2 * round_off(geo)


# -- the smallest log ---------------------------------------------------------------------------


@lru_cache(maxsize=16)
def largest(geo: Geometry) -> Reservation:
    """What the smallest log is computed from: the largest chain that any kernel may reserve."""
    old = geo.has_rmap and geo.has_reflink
    costs = Costs(geo, OLD_RMAP_LEVELS if old else None)
    found = _table(geo, costs)
    count = OLD_LOGCOUNT if geo.has_reflink else 2
    write = costs.old_write()
    found["write"] = Reservation(write, count, True)
    found["itruncate"] = Reservation(costs.old_itruncate(), count, True)
    found["qm_dqalloc"] = Reservation(costs.dqalloc(write), count, True)
    most = max(found.values(), key=lambda res: res.total)
    attribute = _largest_attribute(geo)
    return most if attribute.logres <= most.total else attribute


def _largest_attribute(geo: Geometry) -> Reservation:
    """Setting the largest attribute whose value is logged: in a leaf, three quarters of a block.

    XFS's formula, which takes that many bytes for as many blocks to be mapped.
    """
    costs, known = Costs(geo), table(geo)
    nbytes = geo.block_size // 2 + geo.block_size // 4 - NAME_BYTES - 1
    blocks = costs.attribute_blocks + -(-nbytes // geo.block_size)
    blocks += costs.fork_blocks(nbytes, ATTR)
    setm = known["attrsetm"]
    return setm._replace(logres=setm.logres + known["attrsetrt"].logres * blocks)


def minimum_log_blocks(geo: Geometry, iclog_size: int = RECORD_MAX) -> int:
    """The smallest log that XFS mounts, in filesystem blocks; mkfs.xfs has further minima.

    Programs compute it for the largest iclogs, the kernel for those of the mount.
    """
    most = largest(geo)
    bbs = -(-unit_bytes(geo, most.logres, iclog_size) * max(most.logcount, 1) // L.BB_SIZE)
    if geo.log_sunit > 1:
        sunit = geo.log_sunit // L.BB_SIZE
        bbs = -(-bbs // sunit) * sunit + 2 * sunit
    else:
        bbs += 2 * L.BB_SIZE  # BBs, not bytes: XFS's formula
    return -(-SIZE_FACTOR * bbs // geo.block_bbs)
