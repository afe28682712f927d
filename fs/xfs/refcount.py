"""Shared extents: who else uses these blocks.

The reference count tree of an AG (XFS format: refcountbt) has a record only for blocks that two or
more files' data map; what it does not mention has one owner. Neighbours with the same count are
one record. Records with bit 31 set in their start belong to copy-on-write staging: blocks that
will take the place of shared ones when their data is written. They lie behind all others in the
order. Those that a crash left behind are freed by recovery.

`increase` and `decrease` take an extent inside one AG. They read the records around it, compute
what should be there and apply the difference. Locking: under the space lock, which they take.
"""

from __future__ import annotations

from typing import NamedTuple

from fs.cache.buf import Buf
from fs.log.transaction import Transaction
from fs.xfs import ag, freespace, rmap
from fs.xfs.btblock import COW_START
from fs.xfs.btree import Cursor
from fs.xfs.btroots import refcount_root
from fs.xfs.owner import Owner

REFCOUNT_MAX = (1 << 32) - 1  # a count that got here stays: nobody knows any more


class Shared(NamedTuple):
    """Blocks start .. start+length of an AG are mapped `owners` times."""

    start: int
    length: int
    owners: int

    @property
    def end(self) -> int:
        return self.start + self.length


async def _around(cur: Cursor, start: int, end: int) -> list[Shared]:
    """Records that overlap or touch start..end, in order."""
    found = []
    more = await cur.lookup_le(max(start - 1, 0)) or await cur.first()
    while more:
        record = Shared(*cur.record())
        if record.start > end or record.start >= COW_START:
            break
        if record.end >= start:
            found.append(record)
        more = await cur.next()
    return found


async def find_shared(tp: Transaction, fsbno: int, n: int) -> tuple[int, int] | None:
    """The first part of an extent that has more than one owner, as (fsbno, length), or None."""
    geo = tp.vol.geo
    if not geo.has_reflink:
        return None
    await tp.lock_space()
    agno, start = geo.agno_of(fsbno), geo.agbno_of(fsbno)
    agf = await ag.read_agf(tp, agno)
    first = last = -1
    for record in await _around(Cursor(refcount_root(tp, agno, agf)), start, start + n):
        low, high = max(record.start, start), min(record.end, start + n)
        if low >= high or (first >= 0 and low != last):
            continue
        first, last = low if first < 0 else first, high
    return (geo.fsb(agno, first), last - first) if first >= 0 else None


async def alike(tp: Transaction, fsbno: int, n: int) -> int:
    """How many blocks at the beginning of an extent have the same number of owners."""
    geo = tp.vol.geo
    await tp.lock_space()
    agno, start = geo.agno_of(fsbno), geo.agbno_of(fsbno)
    agf = await ag.read_agf(tp, agno)
    for record in await _around(Cursor(refcount_root(tp, agno, agf)), start, start + n):
        if record.start > start:
            return min(n, record.start - start)
        if record.end > start:
            return min(n, record.end - start)
    return n


def adjust(records: list[Shared], start: int, end: int, delta: int) -> list[Shared]:
    """What becomes of the records around start..end when its counts change by `delta`.

    `records` are in order and touch or overlap the range; a gap counts 1. Merges neighbours.
    """
    pieces: list[Shared] = []

    def put(low: int, high: int, count: int) -> None:
        if low >= high or count < 2:
            return
        if pieces and pieces[-1].end == low and pieces[-1].owners == count:
            low = pieces.pop().start
        pieces.append(Shared(low, high - low, count))

    def change(count: int) -> int:
        return count if count == REFCOUNT_MAX else count + delta

    at = start
    for record in records:
        low, high = max(record.start, start), min(record.end, end)
        if low >= high:  # it only touches the range
            if record.start >= end:
                put(at, end, change(1))
                at = end
            put(record.start, record.end, record.owners)
            continue
        put(at, low, change(1))
        put(record.start, low, record.owners)
        put(low, high, change(record.owners))
        put(high, record.end, record.owners)
        at = high
    put(at, end, change(1))
    return pieces


async def _apply(cur: Cursor, before: list[Shared], after: list[Shared]) -> None:
    """Make the tree's records `after` where they were `before`."""
    keep = set(before) & set(after)
    fresh = [record for record in after if record not in keep]
    starts = {record.start: record for record in fresh}
    for record in before:
        if record in keep:
            continue
        await cur.lookup_eq(record.start)
        successor = starts.pop(record.start, None)
        if successor is None:
            await cur.delete()
        else:
            await cur.update(successor)
    for record in sorted(starts.values()):
        await cur.insert(record)


async def _change(
    tp: Transaction, agno: int, start: int, n: int, delta: int
) -> tuple[Buf, list[Shared]]:
    """Adjust the counts of an extent; returns the AGF and the records that were there."""
    agf = await freespace.prepare(tp, agno)
    cur = Cursor(refcount_root(tp, agno, agf))
    before = await _around(cur, start, start + n)
    await _apply(cur, before, adjust(before, start, start + n, delta))
    tp.vol.ags.learn(agno, agf)
    return agf, before


async def increase(tp: Transaction, fsbno: int, n: int) -> None:
    """One more file maps the extent. The caller records the new mapping in the reverse map."""
    geo = tp.vol.geo
    assert geo.has_reflink
    await _change(tp, geo.agno_of(fsbno), geo.agbno_of(fsbno), n, 1)


async def decrease(tp: Transaction, fsbno: int, n: int, owner: Owner) -> None:
    """`owner` no longer maps the extent: forget that, and free what nobody else maps."""
    if not tp.vol.geo.has_reflink:
        await freespace.free(tp, fsbno, n, owner)
        return
    await rmap.unmap(tp, fsbno, n, owner)
    await drop(tp, fsbno, n)


async def drop(tp: Transaction, fsbno: int, n: int) -> None:
    """As `decrease`, where the reverse map has forgotten the mapping already."""
    geo = tp.vol.geo
    agno, start = geo.agno_of(fsbno), geo.agbno_of(fsbno)
    end = start + n
    _, before = await _change(tp, agno, start, n, -1)
    at = start
    for record in before:
        low, high = max(record.start, start), min(record.end, end)
        if low < high:
            if at < low:
                await freespace.free(tp, geo.fsb(agno, at), low - at, None)
            at = high
    if at < end:
        await freespace.free(tp, geo.fsb(agno, at), end - at, None)


# -- copy-on-write staging: what the log knows of copies that nobody maps yet ---------------------


async def first_staged(tp: Transaction, agno: int) -> tuple[int, int] | None:
    """The first extent that was prepared for a copy on write, as (fsbno, length), or None."""
    await tp.lock_space()
    cur = Cursor(refcount_root(tp, agno, await ag.read_agf(tp, agno)))
    if not await cur.lookup_ge(COW_START):
        return None
    start, length, _ = cur.record()
    return tp.vol.geo.fsb(agno, start - COW_START), length


async def stage(tp: Transaction, fsbno: int, n: int) -> None:
    """Record that blocks were prepared for a copy on write."""
    cur, start, agf = await _staging(tp, fsbno)
    await cur.insert(Shared(start, n, 1))
    tp.vol.ags.learn(tp.vol.geo.agno_of(fsbno), agf)


async def unstage(tp: Transaction, fsbno: int, n: int) -> None:
    """Forget that blocks were prepared for a copy on write. Raises Corrupt if they were not."""
    cur, start, agf = await _staging(tp, fsbno)
    found = Shared(*cur.record()) if await cur.lookup_le(start) else None
    if found is None or found.end < start + n:
        raise cur.root.corrupt(f"blocks {start - COW_START}+{n}", "not prepared for a copy")
    before = Shared(found.start, start - found.start, 1)
    behind = Shared(start + n, found.end - start - n, 1)
    await _apply(cur, [found], [piece for piece in (before, behind) if piece.length])
    tp.vol.ags.learn(tp.vol.geo.agno_of(fsbno), agf)


async def _staging(tp: Transaction, fsbno: int) -> tuple[Cursor, int, Buf]:
    geo = tp.vol.geo
    agf = await freespace.prepare(tp, geo.agno_of(fsbno))
    cur = Cursor(refcount_root(tp, geo.agno_of(fsbno), agf))
    return cur, COW_START + geo.agbno_of(fsbno), agf
