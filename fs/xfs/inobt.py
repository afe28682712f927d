"""Inode allocation: chunks of inodes, which of them are free, and where an inode lies.

The inobt of an AG has a record for every 64 inodes: which exist and which are free. The finobt
has the same record for each that has a free inode, byte for byte (XFS format: inode chunks). A
chunk is allocated as a whole, or, with sparse inodes and no room for a whole one, in pieces of
`sparse_align` blocks whose holes the record's mask names. AGI counts follow every change; the
superblock's are summed from them at unmount.

Files go where their parent is, directories in turn to all AGs. The generation of an inode that
is used again is read from its cluster, where `free` left it. Everything is under the space lock,
which the functions take. Reads come first: a corrupt record stops an operation before it changes
anything. Reserve `alloc_blocks` to allocate and `free_blocks` to free.
"""

from __future__ import annotations

import errno
import random
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from fs.log import formats
from fs.xfs import ag, btkind, freespace, inode
from fs.xfs import layout as L
from fs.xfs.btree import Cursor
from fs.xfs.btroots import finobt_root, inobt_root
from fs.xfs.geometry import Geometry
from fs.xfs.owner import OWN_INODES, Owner

if TYPE_CHECKING:
    from fs.cache.buf import Buf
    from fs.cache.inode import Inode
    from fs.errors import Corrupt
    from fs.log.transaction import Transaction
    from fs.volume import Volume

RECORD_INODES = 64
ALL_FREE = (1 << RECORD_INODES) - 1
HOLE_INODES = 4  # inodes that one bit of the hole mask stands for
OWNER = Owner(OWN_INODES)

_rotors: WeakKeyDictionary[Volume, int] = WeakKeyDictionary()
_generations = random.Random()


class Chunk(NamedTuple):
    """An inobt record. `holemask` bit b: inodes 4b..4b+3 do not exist, and count as free below."""

    startino: int  # agino
    holemask: int
    count: int  # type: ignore[assignment]  # inodes that exist
    freecount: int  # inodes that exist and are free
    free: int  # bit i: inode i is free, or a hole

    @property
    def usable(self) -> int:
        """Mask of the inodes that exist and are free."""
        return self.free & ~_hole_bits(self.holemask)


def _hole_bits(holemask: int) -> int:
    """One bit an inode from one bit a group."""
    bits = 0
    for group in range(RECORD_INODES // HOLE_INODES):
        if holemask >> group & 1:
            bits |= 0xF << group * HOLE_INODES
    return bits


def imap(geo: Geometry, ino: int) -> tuple[int, int, int]:
    """Where an inode lies: daddr and basic blocks of its cluster, byte offset in it."""
    agno, agino = geo.ino_agno(ino), geo.ino_agino(ino)
    agbno = geo.agino_agbno(agino)
    first = agbno - agbno % geo.cluster_blocks
    offset = ((agbno - first) << geo.block_log) + (geo.agino_index(agino) << geo.inode_log)
    return geo.agb_to_daddr(agno, first), geo.cluster_bytes >> L.BB_LOG, offset


def alloc_blocks(geo: Geometry) -> int:
    """Blocks to reserve for `alloc` (XFS format: a chunk, and a split of each tree)."""
    trees = 2 if geo.has_finobt else 1
    return geo.chunk_blocks + trees * btkind.limits(geo).inode_levels


def free_blocks(geo: Geometry) -> int:
    """Blocks to reserve for `free`: a split of the finobt."""
    return btkind.limits(geo).inode_levels if geo.has_finobt else 0


async def counts(tp: Transaction) -> tuple[int, int]:
    """Inodes that exist and inodes that are free, in all AGs."""
    total = free = 0
    for agno in range(tp.vol.geo.agcount):
        header = (await ag.read_agi(tp, agno)).rec(L.AGI)
        total, free = total + int(header["count"]), free + int(header["freecount"])
    return total, free


# -- allocation --------------------------------------------------------------------------------


async def alloc(tp: Transaction, parent_ino: int, is_dir: bool) -> tuple[int, int]:
    """Allocate an inode; returns its number and its generation.

    Raises OSError(ENOSPC) when no AG has a free inode or room for a chunk. Without a reservation
    of `alloc_blocks` only free inodes of existing chunks are used.
    """
    await tp.lock_space()
    geo = tp.vol.geo
    first = _next_ag(tp.vol) if is_dir else geo.ino_agno(parent_ino)
    for turn in range(geo.agcount):
        agno = (first + turn) % geo.agcount
        agi = await ag.read_agi(tp, agno)
        unused = int(agi.rec(L.AGI)["freecount"])
        if not unused and not (await _room_for_chunk(tp) and await _new_chunk(tp, agno, agi)):
            continue
        near = geo.ino_agino(parent_ino) if agno == geo.ino_agno(parent_ino) else L.NULL32
        return await _take(tp, agno, agi, near)
    raise OSError(errno.ENOSPC, "no free inode and no room for new ones")


def _next_ag(vol: Volume) -> int:
    """AGs in turn, for directories."""
    agno = (_rotors.get(vol, 0) + 1) % vol.geo.agcount
    _rotors[vol] = agno
    return agno


async def _room_for_chunk(tp: Transaction) -> bool:
    """May another chunk be made: enough blocks reserved, and the inode percentage not reached?"""
    geo = tp.vol.geo
    if tp.blocks < alloc_blocks(geo):
        return False
    if not geo.imax_pct:
        return True
    most = geo.dblocks * geo.imax_pct // 100 // geo.chunk_blocks * geo.chunk_inodes
    return (await counts(tp))[0] + geo.chunk_inodes <= most


async def _take(tp: Transaction, agno: int, agi: Buf, near: int) -> tuple[int, int]:
    """Allocate a free inode of an AG that has one, close to agino `near`."""
    geo = tp.vol.geo
    chunk = await _find_free(tp, agno, agi, near)
    bit = (chunk.usable & -chunk.usable).bit_length() - 1
    ino = geo.ino(agno, chunk.startino + bit)
    gen = tp.vol.inodes.freed(ino)
    if gen is None:
        gen = await _free_image(tp, ino)
    left = chunk._replace(freecount=chunk.freecount - 1, free=chunk.free & ~(1 << bit))
    await _update(tp, agno, agi, chunk, left)
    agi.rec(L.AGI)["freecount"] -= 1
    tp.log(agi)
    return ino, gen


async def _free_image(tp: Transaction, ino: int) -> int:
    """The generation of an inode that is not in core, and must be free. Raises Corrupt."""
    daddr, bbs, offset = imap(tp.vol.geo, ino)
    buf = await tp.read(daddr, bbs, inode.INODE_OPS)
    fault = inode.verify(tp.vol.geo, buf.mem, buf.addr + offset, ino)
    if not fault and not inode.is_free(buf.mem, buf.addr + offset):
        fault = "free in the inobt, but in use"
    if fault:
        raise tp.vol.corrupt("inode", f"ino {ino}", fault)
    return inode.generation(buf.mem, buf.addr + offset)


async def _find_free(tp: Transaction, agno: int, agi: Buf, near: int) -> Chunk:
    """A record with a free inode, the closest to agino `near` if that is given."""
    if near == L.NULL32:
        near = int(agi.rec(L.AGI)["newino"])
    near = 0 if near == L.NULL32 else near
    root = finobt_root if tp.vol.geo.has_finobt else inobt_root
    left, right = Cursor(root(tp, agno, agi)), Cursor(root(tp, agno, agi))
    more_left = await left.lookup_le(near)
    more_right = await right.lookup_ge(near + 1)
    while more_left or more_right:
        before = _chunk(tp, agno, left) if more_left else None
        behind = _chunk(tp, agno, right) if more_right else None
        closer = min(
            (c for c in (before, behind) if c is not None and c.usable),
            key=lambda c: abs(c.startino - near),
            default=None,
        )
        if closer is not None:
            return closer
        more_left = more_left and await left.prev()
        more_right = more_right and await right.next()
    raise _corrupt(tp, agno, "the AGI counts free inodes, but no record has one")


async def _update(tp: Transaction, agno: int, agi: Buf, old: Chunk, new: Chunk) -> None:
    """Change one record in both trees; the finobt has those with free inodes only."""
    record = _record(tp.vol.geo, new)
    cur = Cursor(inobt_root(tp, agno, agi))
    if not await cur.lookup_eq(old.startino) or _chunk(tp, agno, cur) != old:
        raise _corrupt(tp, agno, f"inobt and finobt differ at {old.startino}")
    free = Cursor(finobt_root(tp, agno, agi)) if tp.vol.geo.has_finobt else None
    if free is not None:
        listed = await free.lookup_eq(old.startino)
        if listed != bool(old.freecount) or (listed and _chunk(tp, agno, free) != old):
            raise _corrupt(tp, agno, f"inobt and finobt differ at {old.startino}")
    await cur.update(record)
    if free is None:
        return
    if not old.freecount:
        await free.insert(record)
    elif not new.freecount:
        await free.delete()
    else:
        await free.update(record)


# -- chunks ------------------------------------------------------------------------------------


async def _new_chunk(tp: Transaction, agno: int, agi: Buf) -> bool:
    """Make new inodes in an AG: a whole chunk, else a piece of one; False if there is no room."""
    geo = tp.vol.geo
    usable = geo.ag_length(agno) // geo.inode_align * geo.inode_align
    agbno = await _place(tp, agno, agi, geo.chunk_blocks, geo.inode_align, usable)
    if agbno is not None:
        await _init_clusters(tp, agno, agbno, geo.chunk_blocks)
        first = agbno << geo.inopblog
        for start in range(first, first + geo.chunk_inodes, RECORD_INODES):
            new = Chunk(start, 0, RECORD_INODES, RECORD_INODES, ALL_FREE)
            await _insert(tp, agno, agi, new)
        _count_new(tp, agi, first, geo.chunk_inodes)
        return True
    if not geo.has_sparse or not geo.sparse_align:
        return False
    agbno = await _place(tp, agno, agi, geo.sparse_align, geo.sparse_align, usable)
    if agbno is None:
        return False
    await _init_clusters(tp, agno, agbno, geo.sparse_align)
    piece = sparse_piece(geo, agbno)
    await _insert(tp, agno, agi, piece)
    _count_new(tp, agi, piece.startino, piece.count)
    return True


def sparse_piece(geo: Geometry, agbno: int) -> Chunk:
    """The record of a chunk of which only the piece at `agbno` exists."""
    start = agbno - agbno % geo.inode_align
    count = geo.sparse_align << geo.inopblog
    groups = (1 << count // HOLE_INODES) - 1
    shift = ((agbno - start) << geo.inopblog) // HOLE_INODES
    holemask = 0xFFFF & ~(groups << shift)
    return Chunk(start << geo.inopblog, holemask, count, count, ALL_FREE)


async def _place(
    tp: Transaction, agno: int, agi: Buf, blocks: int, align: int, usable: int
) -> int | None:
    """Blocks for inodes in one AG, by the newest chunk: their agbno, or None."""
    geo = tp.vol.geo
    newest = int(agi.rec(L.AGI)["newino"])
    target = geo.inode_align
    if newest != L.NULL32:
        target = geo.agino_agbno(newest) + geo.chunk_blocks
    try:
        fsbno, _ = await freespace.alloc(
            tp,
            near=geo.fsb(agno, min(target, usable - 1)),
            minlen=blocks,
            maxlen=blocks,
            align=align,
            owner=OWNER,
            this_ag=True,
            above=geo.inode_align,
            below=usable,
        )
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return None
    return geo.agbno_of(fsbno)


async def _init_clusters(tp: Transaction, agno: int, agbno: int, blocks: int) -> None:
    """Fill the cluster buffers of new blocks with free inodes; recovery does so by itself."""
    geo = tp.vol.geo
    gen = _generations.getrandbits(32)
    for at in range(agbno, agbno + blocks, geo.cluster_blocks):
        bbs = geo.cluster_bytes >> L.BB_LOG
        buf = await tp.get(geo.agb_to_daddr(agno, at), bbs, inode.INODE_OPS)
        count = geo.cluster_bytes >> geo.inode_log
        inode.init_chunk(geo, buf.mem, buf.addr, count, geo.ino(agno, at << geo.inopblog), gen)
        tp.order(buf)
    tp.log_also(formats.create(geo, agno, agbno, blocks, gen))


async def _insert(tp: Transaction, agno: int, agi: Buf, new: Chunk) -> None:
    """Add a record to both trees, or to the sparse record that is there already."""
    geo = tp.vol.geo
    cur = Cursor(inobt_root(tp, agno, agi))
    if await cur.lookup_eq(new.startino):
        old = _chunk(tp, agno, cur)
        if ~old.holemask & ~new.holemask & 0xFFFF:
            raise _corrupt(tp, agno, f"the inodes at {new.startino} exist already")
        await _update(tp, agno, agi, old, merge(old, new))
        return
    await cur.insert(_record(geo, new))
    if geo.has_finobt:
        await Cursor(finobt_root(tp, agno, agi)).insert(_record(geo, new))


def merge(old: Chunk, new: Chunk) -> Chunk:
    """One record for two pieces of a chunk."""
    return Chunk(
        old.startino,
        old.holemask & new.holemask,
        old.count + new.count,
        old.freecount + new.freecount,
        old.free & new.free,
    )


def _count_new(tp: Transaction, agi: Buf, first: int, count: int) -> None:
    header = agi.rec(L.AGI)
    header["count"] += count
    header["freecount"] += count
    header["newino"] = first
    tp.log(agi)


# -- freeing -----------------------------------------------------------------------------------


async def free(tp: Transaction, ip: Inode) -> None:
    """Free an inode that is off its unlinked list and has neither data nor attributes left.

    The in-core inode is free from then on, and is taken home like any other: this must be the
    last thing a transaction does to it. A chunk without inodes in use goes, too, unless a block
    holds more than one.
    """
    await tp.lock_space()
    geo, ino = tp.vol.geo, ip.ino
    agno, agino = geo.ino_agno(ino), geo.ino_agino(ino)
    agi = await ag.read_agi(tp, agno)
    cur = Cursor(inobt_root(tp, agno, agi))
    chunk = _chunk(tp, agno, cur) if await cur.lookup_le(agino) else None
    bit = agino - chunk.startino if chunk is not None else RECORD_INODES
    if chunk is None or bit >= RECORD_INODES or chunk.free >> bit & 1:
        raise _corrupt(tp, agno, f"inode {ino} is not allocated")
    _set_free(tp, ip)
    new = chunk._replace(freecount=chunk.freecount + 1, free=chunk.free | 1 << bit)
    header = agi.rec(L.AGI)
    header["freecount"] += 1
    tp.log(agi)
    if new.free == ALL_FREE and geo.inopblock <= RECORD_INODES:
        await _drop_chunk(tp, agno, agi, chunk, new)
    else:
        await _update(tp, agno, agi, chunk, new)


def _set_free(tp: Transaction, ip: Inode) -> None:
    """The in-core inode is free, of the next generation."""
    ip.mode = ip.nlink = 0
    ip.size = ip.disk_size = ip.nblocks = ip.nextents = ip.anextents = 0
    ip.forkoff, ip.flags = 0, 0
    ip.format = ip.aformat = L.FMT_EXTENTS
    ip.flags2 = inode.new_flags2(tp.vol.geo)
    ip.gen = (ip.gen + 1) & L.NULL32
    tp.log_inode(ip)


async def _drop_chunk(tp: Transaction, agno: int, agi: Buf, old: Chunk, new: Chunk) -> None:
    """Take the record of a chunk without used inodes away and free its blocks."""
    geo = tp.vol.geo
    cur = Cursor(inobt_root(tp, agno, agi))
    if not await cur.lookup_eq(old.startino):
        raise _corrupt(tp, agno, f"record {old.startino} is gone")
    await cur.delete()
    if geo.has_finobt and old.freecount:
        listed = Cursor(finobt_root(tp, agno, agi))
        if not await listed.lookup_eq(old.startino) or _chunk(tp, agno, listed) != old:
            raise _corrupt(tp, agno, f"inobt and finobt differ at {old.startino}")
        await listed.delete()
    header = agi.rec(L.AGI)
    header["count"] -= new.count
    header["freecount"] -= new.freecount
    tp.log(agi)
    tp.forget_inodes(geo.ino(agno, old.startino), RECORD_INODES)
    for agbno, blocks in pieces(geo, old):
        for at in range(agbno, agbno + blocks, geo.cluster_blocks):
            bbs = geo.cluster_bytes >> L.BB_LOG
            tp.invalidate(await tp.get(geo.agb_to_daddr(agno, at), bbs, inode.INODE_OPS))
        await freespace.free(tp, geo.fsb(agno, agbno), blocks, OWNER)


def pieces(geo: Geometry, chunk: Chunk) -> list[tuple[int, int]]:
    """The runs of blocks (agbno, count) that a chunk consists of: one, unless it is sparse."""
    start = geo.agino_agbno(chunk.startino)
    if not chunk.holemask:
        return [(start, geo.chunk_blocks)]
    found: list[tuple[int, int]] = []
    for block in range(geo.chunk_blocks):
        group = (block << geo.inopblog) // HOLE_INODES
        if chunk.holemask >> group & 1:
            continue
        if found and sum(found[-1]) == start + block:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((start + block, 1))
    return found


# -- records -----------------------------------------------------------------------------------


def _chunk(tp: Transaction, agno: int, cur: Cursor) -> Chunk:
    """The record under a cursor, checked. Raises Corrupt."""
    startino, holemask, count, freecount, free = cur.record()
    if not tp.vol.geo.has_sparse:
        holemask, count = 0, RECORD_INODES
    chunk = Chunk(startino, holemask, count, freecount, free)
    fault = check(tp.vol.geo, agno, chunk)
    if fault:
        raise _corrupt(tp, agno, f"record {startino}: {fault}")
    return chunk


def _record(geo: Geometry, chunk: Chunk) -> tuple[int, ...]:
    """What the trees store; filesystems without sparse inodes have neither mask nor count."""
    if geo.has_sparse:
        return tuple(chunk)
    return chunk.startino, 0, 0, chunk.freecount, chunk.free


def check(geo: Geometry, agno: int, chunk: Chunk) -> str:
    """What is wrong with a record, "" if nothing is."""
    agbno = geo.agino_agbno(chunk.startino)
    unit = min(RECORD_INODES, geo.inode_align << geo.inopblog)
    if chunk.startino % unit or agbno % geo.inode_align:
        return "misplaced chunk"
    if agbno < geo.ag_header_blocks or agbno + geo.chunk_blocks > geo.ag_length(agno):
        return "chunk outside the AG"
    if chunk.count != RECORD_INODES - HOLE_INODES * chunk.holemask.bit_count():
        return "count and hole mask differ"
    if chunk.freecount != chunk.usable.bit_count():
        return "free count and free mask differ"
    return ""


def _corrupt(tp: Transaction, agno: int, reason: str) -> Corrupt:
    return tp.vol.corrupt("inode B+tree", f"AG {agno}", reason)
