"""The reverse map of one AG: recording and removing an extent's owner.

Every allocated block is covered by a record of its owner (XFS format: rmapbt). Records of data
that several files share overlap, so a record is found by owner and file position, not by block
alone. Neighbours that continue each other, on disk and for inodes in the file too, are one
record.

The tree takes its blocks from the free list; callers see to it that the list is long enough
first (freespace does, and rmap.py for changes without allocation). They hold the space lock.
"""

from __future__ import annotations

from typing import NamedTuple

from fs.cache.buf import Buf
from fs.log.transaction import Transaction
from fs.xfs import btkind
from fs.xfs.ag import AgRoot
from fs.xfs.btblock import OFFSET_BMBT, OFFSET_UNWRITTEN
from fs.xfs.btree import Cursor
from fs.xfs.owner import Owner


class Rmap(NamedTuple):
    """One record; `offset` carries the flags."""

    start: int
    length: int
    owner: int
    offset: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def has_offsets(self) -> bool:
        return self.owner >= 0 and not self.offset & OFFSET_BMBT

    def at(self, start: int, length: int) -> Rmap:
        """The piece start .. start+length of this mapping."""
        offset = self.offset
        if self.has_offsets:
            offset += start - self.start
        return Rmap(start, length, self.owner, offset)

    def continues(self, left: Rmap) -> bool:
        """Does this record go on where `left` ends?"""
        return left.end == self.start and left.at(self.start, self.length) == self


def cursor(tp: Transaction, agno: int, agf: Buf) -> Cursor:
    """A cursor over an AG's reverse map."""
    return Cursor(AgRoot(tp, btkind.RMAP, agno, agf))


async def _left_neighbour(cur: Cursor, new: Rmap) -> Rmap | None:
    """The record that `new` continues; the cursor stands on it."""
    if not await cur.lookup_le(new.start, new.owner, new.offset & ~OFFSET_UNWRITTEN):
        return None
    found = Rmap(*cur.record())
    if new.continues(found):
        return found
    if not cur.tp.vol.geo.has_reflink or not new.has_offsets or not new.start:
        return None
    again = False  # other owners' shared records may lie between
    while await cur.overlap(new.start - 1, new.start - 1, again=again):
        found = Rmap(*cur.record())
        if new.continues(found):
            return found
        again = True
    return None


async def insert(tp: Transaction, agno: int, agf: Buf, start: int, n: int, owner: Owner) -> None:
    """Record that blocks start .. start+n belong to `owner` from now on."""
    cur = cursor(tp, agno, agf)
    new = Rmap(start, n, owner.owner, owner.packed())
    right = new.at(new.end, 1)
    if await cur.lookup_eq(right.start, right.owner, right.offset & ~OFFSET_UNWRITTEN):
        right = Rmap(*cur.record())
        if right.continues(new):
            new = Rmap(start, n + right.length, new.owner, new.offset)
            await cur.delete()
    left = await _left_neighbour(cur, new)
    if left is not None:
        await cur.update(Rmap(left.start, left.length + new.length, left.owner, left.offset))
    else:
        await cur.insert(new)


async def find(cur: Cursor, part: Rmap) -> Rmap:
    """The record that covers `part` of a mapping; the cursor stands on it.

    Raises Corrupt if there is none: blocks and reverse map disagree.
    """
    key_offset = part.offset & ~OFFSET_UNWRITTEN
    if await cur.lookup_le(part.start, part.owner, key_offset):
        found = Rmap(*cur.record())
        if _covers(found, part):
            return found
    again = False
    while await cur.overlap(part.start, part.start, again=again):
        found = Rmap(*cur.record())
        if _covers(found, part):
            return found
        again = True
    raise cur.root.corrupt(f"blocks {part.start}+{part.length}", f"no record of owner {part.owner}")


def _covers(record: Rmap, part: Rmap) -> bool:
    inside = record.start <= part.start and part.end <= record.end
    return inside and record.at(part.start, part.length) == part


async def remove(tp: Transaction, agno: int, agf: Buf, start: int, n: int, owner: Owner) -> None:
    """Forget that blocks start .. start+n belong to `owner`; more than one record may say so."""
    cur = cursor(tp, agno, agf)
    rest = Rmap(start, n, owner.owner, owner.packed())
    while rest.length:
        whole = await find(cur, rest.at(rest.start, 1))
        end = min(whole.end, rest.end)
        await _cut(cur, whole, rest.start, end)
        rest = rest.at(end, rest.end - end)


async def remove_any(tp: Transaction, agno: int, agf: Buf, start: int, n: int) -> None:
    """Forget whoever owns blocks start .. start+n: one record covers all of them, or none any."""
    cur = cursor(tp, agno, agf)
    if not await cur.overlap(start, start + n - 1):
        return
    whole = Rmap(*cur.record())
    if whole.start > start or whole.end < start + n:
        raise cur.root.corrupt(f"blocks {start}+{n}", "partly owned")
    await _cut(cur, whole, start, start + n)


async def _cut(cur: Cursor, whole: Rmap, start: int, end: int) -> None:
    """Take blocks start..end out of the record under the cursor."""
    head, tail = start - whole.start, whole.end - end
    if head:
        await cur.update(whole.at(whole.start, head))
        if tail:
            await cur.insert(whole.at(end, tail))
    elif tail:
        await cur.replace(whole.at(end, tail))
    else:
        await cur.delete()
