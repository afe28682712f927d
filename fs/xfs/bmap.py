"""Extent maps: which blocks hold which part of a fork.

A fork maps file blocks to extents, sorted and without overlap. Few records stand in the inode
(EXTENTS format); more than fit there make a B+tree (BTREE format), and back as soon as they fit
again (XFS format: bmbt root in the inode). Neighbours that continue each other in the file and on
the disk, with the same state, are one record up to 2^21 - 1 blocks. Every change is one edit:
some consecutive records are replaced by others, after merging.

`nblocks` counts mapped blocks and tree blocks of both forks, `nextents` the records; both are
exact after each function here. Reverse mappings follow allocation and freeing; `insert` and
`remap` expect blocks that were allocated with this inode as their owner.

Readers hold the inode's ILOCK shared, everybody else exclusively. Functions that allocate or
free take the space lock. Reserve `worst_indirect` blocks beside the data for each insertion.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fs.xfs import btkind, extsize, freespace, refcount, rmap
from fs.xfs import extents as X
from fs.xfs import fork as forks
from fs.xfs import layout as L
from fs.xfs.btree import Cursor
from fs.xfs.btroots import InodeRoot, keep
from fs.xfs.fork import add_attr as add_attr_fork
from fs.xfs.geometry import Geometry
from fs.xfs.inode import (
    ATTR,
    ATTR_EXTENTS_MAX,
    ATTR_EXTENTS_MAX_BIG,
    DATA,
    DATA_EXTENTS_MAX,
    DATA_EXTENTS_MAX_BIG,
    bmbt_maxrecs,
    levels_max,
    limits,
)
from fs.xfs.owner import Owner

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.errors import Corrupt
    from fs.log.transaction import Transaction

__all__ = [
    "ATTR",
    "DATA",
    "HOLE",
    "Mapping",
    "add_attr_fork",
    "alloc",
    "check",
    "convert",
    "first_hole",
    "insert",
    "last_offset",
    "lookup",
    "read",
    "remap",
    "shift_left",
    "shift_right",
    "spare_records",
    "split",
    "unmap",
    "worst_indirect",
]

HOLE = -1  # fsbno of a mapping that has no blocks
UNMAP_EXTENTS = 64  # records that one call of `unmap` takes away at most
SHIFT_EXTENTS = 32  # records that one call moves to another place in the file at most
NEAR_GAP = 4  # a hole of up to so many times the request is left free on the disk, too


class Mapping(NamedTuple):
    """`count` file blocks from `offset` on, and where they are. Units: filesystem blocks."""

    offset: int
    fsbno: int
    count: int  # type: ignore[assignment]  # not the method of tuples
    unwritten: bool = False

    @property
    def end(self) -> int:
        return self.offset + self.count


# -- reading -----------------------------------------------------------------------------------


async def lookup(tp: Transaction, ip: Inode, offset: int, fork: int = DATA) -> Mapping | None:
    """The mapping that holds a file block, else the next one after it, else None."""
    if forks.fmt(ip, fork) == L.FMT_EXTENTS:
        addr, _ = forks.area(ip, fork)
        found = X.lookup(tp.vol.arena.mem, addr, forks.count(ip, fork), offset)
        return _mapping(*found) if found[0] >= 0 else None
    if forks.fmt(ip, fork) != L.FMT_BTREE:
        return None
    cur = Cursor(InodeRoot(tp, ip, fork))
    if await cur.lookup_le(offset):
        left = _tree_record(tp, ip, cur)
        if left.end > offset:
            return left
        more = await cur.next()
    else:
        more = await cur.first()
    return _tree_record(tp, ip, cur) if more else None


async def read(
    tp: Transaction, ip: Inode, offset: int, count: int, fork: int = DATA
) -> list[Mapping]:
    """Mappings that cover a range without gaps, clipped to it; holes have fsbno HOLE."""
    covered: list[Mapping] = []
    at, end = offset, offset + count
    for found in await _collect(tp, ip, offset, end, fork):
        if found.offset > at:
            covered.append(Mapping(at, HOLE, found.offset - at))
            at = found.offset
        piece = _clip(found, at, end)
        covered.append(piece)
        at = piece.end
    if at < end:
        covered.append(Mapping(at, HOLE, end - at))
    return covered


async def last_offset(tp: Transaction, ip: Inode, fork: int = DATA) -> int:
    """File block behind the last mapping; 0 if there is none."""
    left, _ = await _around(tp, ip, L.FILE_OFFSET_MAX - 1, fork)
    return left.end if left is not None else 0


async def first_hole(
    tp: Transaction, ip: Inode, fork: int = DATA, count: int = 1, start: int = 0
) -> int:
    """Lowest file block, from `start` on, with `count` unmapped blocks behind it."""
    if forks.fmt(ip, fork) == L.FMT_EXTENTS:
        addr, _ = forks.area(ip, fork)
        n = forks.count(ip, fork)
        return int(X.first_hole(tp.vol.arena.mem, addr, n, start, count))
    cur = Cursor(InodeRoot(tp, ip, fork))
    more = await cur.lookup_le(start) or await cur.first()
    place = start
    while more:
        found = _tree_record(tp, ip, cur)
        if found.offset >= place + count:
            break
        place = max(place, found.end)
        more = await cur.next()
    return place


async def _around(
    tp: Transaction, ip: Inode, offset: int, fork: int
) -> tuple[Mapping | None, Mapping | None]:
    """The last record that starts at or before a file block, and the one behind it."""
    form, n = forks.fmt(ip, fork), forks.count(ip, fork)
    if form == L.FMT_EXTENTS:
        mem, (addr, _) = tp.vol.arena.mem, forks.area(ip, fork)
        i = X.search(mem, addr, n, offset)
        left = _record(mem, addr, i) if i >= 0 else None
        return left, _record(mem, addr, i + 1) if i + 1 < n else None
    if form != L.FMT_BTREE:
        return None, None
    cur = Cursor(InodeRoot(tp, ip, fork))
    left = _tree_record(tp, ip, cur) if await cur.lookup_le(offset) else None
    more = await cur.next() if left is not None else await cur.first()
    return left, _tree_record(tp, ip, cur) if more else None


async def _collect(tp: Transaction, ip: Inode, offset: int, end: int, fork: int) -> list[Mapping]:
    """All records that touch [offset, end), in order."""
    form, n = forks.fmt(ip, fork), forks.count(ip, fork)
    found: list[Mapping] = []
    if form == L.FMT_EXTENTS:
        mem, (addr, _) = tp.vol.arena.mem, forks.area(ip, fork)
        for i in range(max(0, X.search(mem, addr, n, offset)), n):
            record = _record(mem, addr, i)
            if record.offset >= end:
                break
            found.append(record)
    elif form == L.FMT_BTREE:
        cur = Cursor(InodeRoot(tp, ip, fork))
        more = await cur.lookup_le(offset) or await cur.first()
        while more and (record := _tree_record(tp, ip, cur)).offset < end:
            found.append(record)
            more = await cur.next()
    if found and found[0].end <= offset:
        del found[0]
    return found


def _record(mem: Any, addr: int, i: int) -> Mapping:
    return _mapping(*X.unpack(mem, addr + i * X.REC_BYTES))


def _mapping(offset: int, fsbno: int, count: int, unwritten: int) -> Mapping:
    return Mapping(offset, fsbno, count, bool(unwritten))


def _tree_record(tp: Transaction, ip: Inode, cur: Cursor) -> Mapping:
    """The record under a cursor. Lists are checked when the inode is read, these one by one."""
    offset, fsbno, count, unwritten = cur.record()
    if not tp.vol.geo.valid_fsb(fsbno, count):
        raise _corrupt(tp, ip, f"file block {offset} lies outside the filesystem")
    return Mapping(offset, fsbno, count, bool(unwritten))


def _clip(found: Mapping, start: int, end: int) -> Mapping:
    """The part of a mapping that lies in [start, end)."""
    first, last = max(found.offset, start), min(found.end, end)
    return Mapping(first, found.fsbno + first - found.offset, last - first, found.unwritten)


# -- changing ----------------------------------------------------------------------------------


async def insert(tp: Transaction, ip: Inode, new: Mapping, fork: int = DATA) -> None:
    """Map blocks into a hole. Raises OSError(EFBIG) when the fork has all extents it may have."""
    left, right = await _around(tp, ip, new.offset, fork)
    if (left is not None and left.end > new.offset) or (
        right is not None and right.offset < new.end
    ):
        raise _corrupt(tp, ip, f"file block {new.offset} is mapped twice")
    old = [m for m in (left, right) if m is not None]
    wanted = merge([m for m in (left, new, right) if m is not None])
    _admit(tp, ip, fork, len(wanted) - len(old))
    ip.nblocks += new.count
    await _replace(tp, ip, fork, old, wanted)


async def detach(tp: Transaction, ip: Inode, gone: Mapping, fork: int = DATA) -> None:
    """Unmap a part of one record whose blocks stay allocated. Raises Corrupt if it is not there."""
    found = await lookup(tp, ip, gone.offset, fork)
    if found is None or _clip(found, gone.offset, gone.end) != gone:
        raise _corrupt(tp, ip, f"{gone.count} file blocks from {gone.offset} on are elsewhere")
    pieces = (_clip(found, found.offset, gone.offset), _clip(found, gone.end, found.end))
    rest = [piece for piece in pieces if piece.count]
    _admit(tp, ip, fork, len(rest) - 1)
    ip.nblocks -= gone.count
    await _replace(tp, ip, fork, [found], rest)


async def alloc(
    tp: Transaction,
    ip: Inode,
    offset: int,
    count: int,
    fork: int = DATA,
    *,
    unwritten: bool = False,
    contiguous: bool = False,
    hint: int = 0,
) -> Mapping:
    """Allocate blocks for a hole at `offset` and map them, near what is mapped before it.

    The mapping may be shorter than `count`: by the room up to the next mapping, and by what is
    free in one piece; `contiguous` insists. With an extent size hint it may begin before `offset`
    and reach farther (fs/xfs/extsize.py). Raises OSError(ENOSPC) or OSError(EFBIG).
    """
    left, right = await _around(tp, ip, offset, fork)
    if left is not None and left.end > offset:
        raise _corrupt(tp, ip, f"file block {offset} is allocated twice")
    before = 0 if left is None else left.end
    behind = L.FILE_OFFSET_MAX if right is None else right.offset
    room = min(L.BMBT_LEN_MAX, behind - offset)
    assert not contiguous or count <= room, "contiguous blocks wanted over a mapping"
    start = offset
    count = most = min(count, room)
    if hint:
        start, most = extsize.align(offset, count, hint, before, behind)
    _admit(tp, ip, fork, 1)
    fsbno, got = await freespace.alloc(
        tp,
        near=_near(tp.vol.geo, ip, left, right, start, most),
        minlen=count if contiguous else 1,
        maxlen=most,
        owner=None,
        whole=hint > 0,
    )
    start = extsize.settle(start, got, offset, count)
    await rmap.map(tp, fsbno, got, Owner(ip.ino, start, attr=fork == ATTR, unwritten=unwritten))
    new = Mapping(start, fsbno, got, unwritten)
    await insert(tp, ip, new, fork)
    return new


async def unmap(tp: Transaction, ip: Inode, offset: int, count: int, fork: int = DATA) -> bool:
    """Take mappings in a range away, from its end on, and free their blocks.

    At most UNMAP_EXTENTS records a call, and no more than the log has room for; returns whether the
    range is empty now. The caller goes on in another transaction. Only cutting a hole inside one
    record can need blocks (for the tree): without any OSError(ENOSPC) is raised, with nothing
    changed. Buffers of freed metadata blocks are the caller's to invalidate, before.
    """
    end = min(offset + count, L.FILE_OFFSET_MAX)
    for turn in range(UNMAP_EXTENTS):
        if turn and not tp.has_room:
            break
        last, _next = await _around(tp, ip, end - 1, fork) if end > offset else (None, None)
        if last is None or last.end <= offset:
            return True
        gone = _clip(last, offset, end)
        await _remove(tp, ip, fork, last, gone)
        end = gone.offset
    last, _next = await _around(tp, ip, end - 1, fork) if end > offset else (None, None)
    return last is None or last.end <= offset


async def convert(tp: Transaction, ip: Inode, offset: int, count: int) -> None:
    """Turn unwritten blocks of a range into written ones; splits and merges records."""
    end = offset + count
    at = offset
    while at < end:
        found = await lookup(tp, ip, at)
        if found is None or found.offset >= end:
            return
        at = found.end
        if found.unwritten:
            await _convert_one(tp, ip, found, _clip(found, offset, end))


async def remap(tp: Transaction, ip: Inode, new: Mapping) -> None:
    """Put new blocks in the place of old ones, after a copy on write.

    The old blocks lose this owner, and are freed if it was the last. The range may have holes.
    """
    while not await unmap(tp, ip, new.offset, new.count):
        pass
    await insert(tp, ip, new)


async def split(tp: Transaction, ip: Inode, offset: int) -> None:
    """Let a record begin at a file block, if one holds it: neighbours, until something merges them.

    Without blocks for the tree OSError(ENOSPC) is raised, with nothing changed.
    """
    found = await lookup(tp, ip, offset)
    if found is not None and found.offset < offset:
        _admit_cut(tp, ip, DATA)
        pieces = [_clip(found, found.offset, offset), _clip(found, offset, found.end)]
        await _replace(tp, ip, DATA, [found], pieces)


async def shift_left(tp: Transaction, ip: Inode, start: int, by: int) -> int | None:
    """Move the mappings from file block `start` on `by` blocks down, over a hole of that size.

    At most SHIFT_EXTENTS records a call, as far as the log has room, from the first on: the map is
    in order whenever it ends. Returns where the next call goes on, None when all are moved. Needs
    no blocks.
    """
    for turn in range(SHIFT_EXTENTS):
        if turn and not tp.has_room:
            break
        left, found = await _around(tp, ip, start - 1, DATA)
        if found is None:
            return None
        moved = found._replace(offset=found.offset - by)
        if left is not None and left.end > moved.offset:
            raise _corrupt(tp, ip, f"file block {found.offset} would move over others")
        before = [left] if left is not None else []
        await _replace(tp, ip, DATA, [*before, found], merge([*before, moved]))
        await _move_owner(tp, ip, found, moved)
        start = found.end
    return start


async def shift_right(
    tp: Transaction, ip: Inode, start: int, by: int, end: int = L.FILE_OFFSET_MAX
) -> int | None:
    """Move the mappings of file blocks [start, end) `by` blocks up; none lies over `start`.

    As `shift_left`, but from the last on; the next call's `end` is returned.
    """
    for turn in range(SHIFT_EXTENTS):
        if turn and not tp.has_room:
            break
        found, right = await _around(tp, ip, end - 1, DATA)
        if found is None or found.end <= start:
            return None
        moved = found._replace(offset=found.offset + by)
        if found.offset < start or (right is not None and right.offset < moved.end):
            raise _corrupt(tp, ip, f"file block {found.offset} would move over others")
        await _replace(tp, ip, DATA, [found], [moved])
        await _move_owner(tp, ip, found, moved)
        end = found.offset
        if end == start:
            return None
    return end


async def _move_owner(tp: Transaction, ip: Inode, old: Mapping, new: Mapping) -> None:
    """The reverse map learns that blocks hold another part of the file."""
    owner = Owner(ip.ino, old.offset, unwritten=old.unwritten)
    await rmap.unmap(tp, old.fsbno, old.count, owner)
    await rmap.map(tp, new.fsbno, new.count, owner._replace(offset=new.offset))


async def _remove(tp: Transaction, ip: Inode, fork: int, old: Mapping, gone: Mapping) -> None:
    """Cut `gone` out of the record `old` and free its blocks."""
    rest = []
    if gone.offset > old.offset:
        rest.append(_clip(old, old.offset, gone.offset))
    if gone.end < old.end:
        rest.append(_clip(old, gone.end, old.end))
    if len(rest) == 2:
        _admit_cut(tp, ip, fork)
    ip.nblocks -= gone.count
    await _replace(tp, ip, fork, [old], rest)
    owner = Owner(ip.ino, gone.offset, attr=fork == ATTR, unwritten=gone.unwritten)
    if fork == DATA and ip.flags2 & L.DIFLAG2_REFLINK:
        await refcount.decrease(tp, gone.fsbno, gone.count, owner)
    else:
        await freespace.free(tp, gone.fsbno, gone.count, owner)


async def _convert_one(tp: Transaction, ip: Inode, old: Mapping, part: Mapping) -> None:
    """Make `part` of the unwritten record `old` written."""
    before = (await _around(tp, ip, old.offset - 1, DATA))[0] if old.offset else None
    after = (await _around(tp, ip, old.offset, DATA))[1]
    pieces = [part._replace(unwritten=False)]
    if part.offset > old.offset:
        pieces.insert(0, _clip(old, old.offset, part.offset))
    if part.end < old.end:
        pieces.append(_clip(old, part.end, old.end))
    present = [m for m in (before, old, after) if m is not None]
    wanted = merge([m for m in (before, *pieces, after) if m is not None])
    _admit(tp, ip, DATA, len(wanted) - len(present))
    await _replace(tp, ip, DATA, present, wanted)
    await rmap.convert(tp, part.fsbno, part.count, Owner(ip.ino, part.offset))


def merge(mappings: list[Mapping]) -> list[Mapping]:
    """Join neighbours of a sorted list that one record can hold."""
    merged: list[Mapping] = []
    for new in mappings:
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.end == new.offset
            and last.fsbno + last.count == new.fsbno
            and last.unwritten == new.unwritten
            and last.count + new.count <= L.BMBT_LEN_MAX
        ):
            merged[-1] = last._replace(count=last.count + new.count)
        else:
            merged.append(new)
    return merged


def _near(
    geo: Geometry, ip: Inode, left: Mapping | None, right: Mapping | None, offset: int, count: int
) -> int:
    """Where blocks for `offset` are wanted: in line with the nearer neighbour, else by the inode.

    In line means as far from the neighbour on the device as in the file, so that what is written
    in between later fits there. A gap that is large beside what is wanted is not kept, except
    behind the last extent (the kernel's xfs_bmap_adjacent).
    """
    choices = []  # (how far from the neighbour, block)
    if left is not None:
        gap, behind = offset - left.end, left.fsbno + left.count
        small = right is None or gap <= NEAR_GAP * count
        if small and geo.valid_fsb(behind, gap + 1):
            choices.append((gap, behind + gap))
        else:
            choices.append((2 * gap, behind if geo.valid_fsb(behind) else left.fsbno))
    if right is not None:
        gap = right.offset - offset
        if gap <= NEAR_GAP * count and _precedes(geo, right.fsbno, gap):
            choices.append((gap, right.fsbno - gap))
        elif _precedes(geo, right.fsbno, count):
            choices.append((2 * gap - count, right.fsbno - count))
        else:
            choices.append((2 * gap, right.fsbno))
    return min(choices)[1] if choices else inode_fsb(geo, ip.ino)


def _precedes(geo: Geometry, fsbno: int, blocks: int) -> bool:
    """Whether a block's AG has so many blocks before it."""
    return geo.agbno_of(fsbno) >= blocks


def inode_fsb(geo: Geometry, ino: int) -> int:
    """The block that holds an inode."""
    return geo.fsb(geo.ino_agno(ino), geo.agino_agbno(geo.ino_agino(ino)))


def _corrupt(tp: Transaction, ip: Inode, reason: str) -> Corrupt:
    return tp.vol.corrupt("extent map", f"inode {ip.ino}", reason)


# -- records, in either format -----------------------------------------------------------------


def extents_max(ip: Inode, fork: int) -> int:
    """Records that the inode's extent counters can count (XFS format: nrext64)."""
    big = ip.flags2 & L.DIFLAG2_NREXT64
    if fork == ATTR:
        return ATTR_EXTENTS_MAX_BIG if big else ATTR_EXTENTS_MAX
    return DATA_EXTENTS_MAX_BIG if big else DATA_EXTENTS_MAX


def _admit(tp: Transaction, ip: Inode, fork: int, growth: int) -> None:
    """Refuse more records than the counters hold: OSError(EFBIG), with nothing changed."""
    n = forks.count(ip, fork) + growth
    if growth <= 0 or n <= extents_max(ip, fork):
        return
    if not tp.vol.geo.has_nrext64 or ip.flags2 & L.DIFLAG2_NREXT64:
        raise OSError(errno.EFBIG, "too many extents")
    ip.flags2 |= L.DIFLAG2_NREXT64


def _admit_cut(tp: Transaction, ip: Inode, fork: int) -> None:
    """A record is about to become two: OSError(ENOSPC) if a tree may need an unreserved block."""
    _admit(tp, ip, fork, 1)
    if not tp.blocks and not spare_records(tp, ip, fork):
        raise OSError(errno.ENOSPC, "no blocks reserved for the extent tree")


def spare_records(tp: Transaction, ip: Inode, fork: int) -> int:
    """Records that a fork surely takes without a new tree block: in its list, or its only leaf."""
    n = forks.count(ip, fork)
    addr, size = forks.area(ip, fork)
    if forks.fmt(ip, fork) != L.FMT_BTREE:
        return size // X.REC_BYTES - n
    level, leaves = _root_header(tp, addr)
    room = (tp.vol.geo.block_size - L.LONG_BLOCK.itemsize) // X.REC_BYTES
    return room - n if level == 1 and leaves == 1 else 0


def _root_header(tp: Transaction, addr: int) -> tuple[int, int]:
    """Level and number of entries of the tree root at an address of the arena."""
    level, count = tp.vol.arena.mem[addr : addr + 4].view(">u2").tolist()
    return level, count


async def _replace(
    tp: Transaction, ip: Inode, fork: int, old: list[Mapping], new: list[Mapping]
) -> None:
    """Replace consecutive records by others that cover the same place."""
    while old and new and old[0] == new[0]:
        old, new = old[1:], new[1:]
    while old and new and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    n = forks.count(ip, fork) + len(new) - len(old)
    capacity = forks.area(ip, fork)[1] // X.REC_BYTES
    if forks.fmt(ip, fork) == L.FMT_EXTENTS and n > capacity:
        await to_btree(tp, ip, fork)
    if forks.fmt(ip, fork) == L.FMT_EXTENTS:
        _replace_in_list(tp, ip, fork, old, new)
    else:
        await _replace_in_tree(tp, ip, fork, old, new)
    forks.set_count(ip, fork, n)
    if forks.fmt(ip, fork) == L.FMT_BTREE and n <= capacity:
        await to_extents(tp, ip, fork)
    tp.log_inode(ip)


def _replace_in_list(
    tp: Transaction, ip: Inode, fork: int, old: list[Mapping], new: list[Mapping]
) -> None:
    mem, (addr, _) = tp.vol.arena.mem, forks.area(ip, fork)
    n = forks.count(ip, fork)
    place = (old or new)[0].offset if old or new else 0
    i = X.search(mem, addr, n, place) + (0 if old else 1)
    rows = np.array(new, np.int64).reshape(len(new), 4)
    X.splice(mem, addr, n, i, len(old), rows)


async def _replace_in_tree(
    tp: Transaction, ip: Inode, fork: int, old: list[Mapping], new: list[Mapping]
) -> None:
    cur = Cursor(InodeRoot(tp, ip, fork))
    for i, record in enumerate(old):
        if not await cur.lookup_eq(record.offset):
            raise _corrupt(tp, ip, f"the record of file block {record.offset} is gone")
        if i < len(new):
            await cur.update(tuple(map(int, new[i])))
        else:
            await cur.delete()
    for record in new[len(old) :]:
        await cur.insert(tuple(map(int, record)))


# -- list and tree -----------------------------------------------------------------------------


def _tree_owner(ip: Inode, fork: int) -> Owner:
    return Owner(ip.ino, 0, attr=fork == ATTR, bmbt=True)


async def _tree_block(tp: Transaction, ip: Inode, fork: int, level: int) -> tuple[int, Any]:
    """A new, empty tree block: its fsbno and its buffer."""
    geo = tp.vol.geo
    fsbno, _ = await freespace.alloc(
        tp, near=inode_fsb(geo, ip.ino), minlen=1, maxlen=1, owner=_tree_owner(ip, fork)
    )
    buf = await tp.get(geo.fsb_to_daddr(fsbno), geo.block_bbs, btkind.BMAP.ops)
    header = buf.rec(L.LONG_BLOCK)
    header["magic"], header["level"] = L.MAGIC_BMBT, level
    header["leftsib"] = header["rightsib"] = L.NULL64
    header["blkno"], header["owner"] = buf.daddr, ip.ino
    header["uuid"] = np.void(geo.uuid)
    ip.nblocks += 1
    return fsbno, buf


def _set_root(tp: Transaction, ip: Inode, fork: int, level: int, key: int, fsbno: int) -> None:
    """Make the fork a root with one child."""
    mem, (addr, size) = tp.vol.arena.mem, forks.area(ip, fork)
    mem[addr : addr + size] = 0
    root = mem[addr : addr + 4].view(">u2")
    root[0], root[1] = level, 1
    mem[addr + 4 : addr + 12].view(">u8")[0] = key
    pointers = addr + 4 + 8 * bmbt_maxrecs(size)
    mem[pointers : pointers + 8].view(">u8")[0] = fsbno


async def to_btree(tp: Transaction, ip: Inode, fork: int) -> None:
    """Move the records of a fork in EXTENTS format into a tree with one leaf."""
    n = forks.count(ip, fork)
    assert n > 0
    fsbno, buf = await _tree_block(tp, ip, fork, 0)
    mem, (addr, _) = tp.vol.arena.mem, forks.area(ip, fork)
    start = buf.addr + L.LONG_BLOCK.itemsize
    mem[start : start + n * X.REC_BYTES] = mem[addr : addr + n * X.REC_BYTES]
    buf.rec(L.LONG_BLOCK)["numrecs"] = n
    tp.log(buf)
    _set_root(tp, ip, fork, 1, _record(mem, addr, 0).offset, fsbno)
    forks.set_fmt(ip, fork, L.FMT_BTREE)
    tp.log_inode(ip)


async def to_extents(tp: Transaction, ip: Inode, fork: int) -> None:
    """Take the records of a tree that fit the fork back into it, and free the tree's leaf."""
    n = forks.count(ip, fork)
    geo, mem, (addr, size) = tp.vol.geo, tp.vol.arena.mem, forks.area(ip, fork)
    level, numrecs = _root_header(tp, addr)
    if level != 1 or numrecs != 1:
        return  # more than one leaf: still a good tree
    pointers = addr + 4 + 8 * bmbt_maxrecs(size)
    fsbno = int(mem[pointers : pointers + 8].view(">u8")[0])
    buf = await tp.read(geo.fsb_to_daddr(fsbno), geo.block_bbs, btkind.BMAP.ops, ip.ino)
    if int(buf.rec(L.LONG_BLOCK)["numrecs"]) != n:
        raise _corrupt(tp, ip, "extent count does not match the tree")
    start = buf.addr + L.LONG_BLOCK.itemsize
    mem[addr : addr + size] = 0
    mem[addr : addr + n * X.REC_BYTES] = mem[start : start + n * X.REC_BYTES]
    forks.set_fmt(ip, fork, L.FMT_EXTENTS)
    ip.nblocks -= 1
    tp.log_inode(ip)
    tp.invalidate(buf)
    await freespace.free(tp, fsbno, 1, _tree_owner(ip, fork))
    keep(tp, 1)


async def push_root(tp: Transaction, ip: Inode, fork: int) -> None:
    """Move a tree root's entries one level down, because the fork becomes smaller."""
    mem, (addr, size) = tp.vol.arena.mem, forks.area(ip, fork)
    level, n = _root_header(tp, addr)
    fsbno, buf = await _tree_block(tp, ip, fork, level)
    start = buf.addr + L.LONG_BLOCK.itemsize
    most = (buf.size - L.LONG_BLOCK.itemsize) // 16
    pointers = addr + 4 + 8 * bmbt_maxrecs(size)
    mem[start : start + 8 * n] = mem[addr + 4 : addr + 4 + 8 * n]
    mem[start + 8 * most : start + 8 * (most + n)] = mem[pointers : pointers + 8 * n]
    buf.rec(L.LONG_BLOCK)["numrecs"] = n
    tp.log(buf)
    key = int(mem[addr + 4 : addr + 12].view(">u8")[0])
    _set_root(tp, ip, fork, level + 1, key, fsbno)
    tp.log_inode(ip)


def worst_indirect(geo: Geometry, count: int, fork: int = DATA) -> int:
    """Most tree blocks that mapping `count` blocks can need (XFS format: worst case indirect).

    A record a block, every level of the tree full; then one block for each level above.
    """
    most = (geo.block_size - L.LONG_BLOCK.itemsize) // X.REC_BYTES
    levels = levels_max(geo, fork)
    total = 0
    for level in range(levels):
        count = -(-count // most)
        total += count
        if count == 1:
            return total + levels - level - 1
    return total


# -- checking ----------------------------------------------------------------------------------


async def check(tp: Transaction, ip: Inode, fork: int = DATA) -> str:
    """Check a whole fork, "" if it is good: order, places, merging, format and the counts.

    Walks every record: O(records). `nblocks` is the sum over both forks, so it is compared when
    the data fork is checked.
    """
    form, n = forks.fmt(ip, fork), forks.count(ip, fork)
    capacity = forks.area(ip, fork)[1] // X.REC_BYTES
    records = await _collect(tp, ip, 0, L.FILE_OFFSET_MAX, fork)
    if len(records) != n:
        return f"{len(records)} records but a count of {n}"
    if (form == L.FMT_EXTENTS and n > capacity) or (form == L.FMT_BTREE and n <= capacity):
        return f"{n} records in format {form}, of which {capacity} fit the fork"
    rows = np.zeros(16 * n, np.uint8)
    for i, record in enumerate(records):
        X.pack(rows, 16 * i, *map(int, record))
    code, where = X.check(rows, 0, n, 0, int(fork == ATTR), limits(tp.vol.geo))
    if code:
        return f"record {where}: fault {code}"
    if merge(records) != records:
        return "neighbours that one record could hold"
    return ""
