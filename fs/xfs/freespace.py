"""Free space: allocating and freeing extents of blocks.

Each AG keeps its free extents twice, by place (bnobt) and by length (cntbt), with sums in the AGF
(XFS format: free space). Both trees take their blocks from the AG's free list, which is brought
to its proper length before every change. Choosing an extent only reads: an allocation that is
refused has changed nothing.

Policy: the blocks right behind `near` if they are free; else the nearest extent of the full
length among the neighbours; else the smallest sufficient one of the AG, then of the following AGs
in turn; if no AG has the full length, the longest extent anywhere, so that big files get few
extents.

Locking: everything happens under the space lock, which the entry points take. An AG's share for
the growth of its own trees is out of reach for data (`metadata=True` reaches it).
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from fs.cache.buf import Buf
from fs.log.transaction import Transaction
from fs.xfs import ag, btkind, freefit, owner, rmapbt
from fs.xfs.ag import AgRoot
from fs.xfs.btree import Cursor
from fs.xfs.owner import Owner

Extent = tuple[int, int]  # first block of the AG, length
UNBOUND = 1 << 31  # beyond any block of an AG


async def mount(tp: Transaction) -> None:
    """Read every AG's figures into the volume's summary."""
    geo, ags = tp.vol.geo, tp.vol.ags
    for agno in range(geo.agcount):
        if geo.has_finobt and geo.has_inobtcount:
            agi = await ag.read_agi(tp, agno)
            ags.finobt_blocks[agno] = ag.get(agi, ag.AGI_FBLOCKS)
            tp.release(agi)
        agf = await ag.read_agf(tp, agno)
        ags.learn(agno, agf)
        tp.release(agf)


def bno_cursor(tp: Transaction, agno: int, agf: Buf) -> Cursor:
    """A cursor over the free extents by place."""
    return Cursor(AgRoot(tp, btkind.BNO, agno, agf))


def cnt_cursor(tp: Transaction, agno: int, agf: Buf) -> Cursor:
    """A cursor over the free extents by length."""
    return Cursor(AgRoot(tp, btkind.CNT, agno, agf))


class Wish(NamedTuple):
    """What an allocation asks for."""

    near: int | None  # fsbno
    minlen: int
    maxlen: int
    align: int
    above: int  # AG blocks that the extent must keep between
    below: int
    enough: int  # blocks at `near`, rather than more elsewhere

    @property
    def plain(self) -> bool:
        return self.align == 1 and self.above == 0 and self.below == UNBOUND


# -- choosing (reads only) ------------------------------------------------------------------------


async def _choose_near(
    tp: Transaction, agno: int, near: int, wish: Wish, most: int
) -> Extent | None:
    """At `near` itself as many blocks as are enough, or `most` blocks among its neighbours."""
    cur = bno_cursor(tp, agno, await ag.read_agf(tp, agno))
    fitting = near % wish.align == 0 and near >= wish.above
    if await cur.lookup_le(near) and fitting:
        start, length = cur.record()
        here = min(start + length, wish.below) - near
        if here >= wish.enough:
            return near, min(most, here)
    if tp.vol.ags.longest[agno] < most:
        return None
    addr, _, n = cur.leaf()
    first = freefit.nearest(cur.mem, addr, n, most, near, wish.align, wish.above, wish.below)
    return (first, most) if first >= 0 else None


async def _choose_by_length(
    tp: Transaction, agno: int, wish: Wish, least: int, most: int
) -> Extent | None:
    """The smallest extent that holds `most` blocks, else the longest that holds `least`."""
    cur = cnt_cursor(tp, agno, await ag.read_agf(tp, agno))
    if await cur.lookup_ge(most):
        if wish.plain:
            return cur.record()[0], most
        if await _scan_up(cur, wish, most):
            return _room(cur, wish, most)
    if least < most and await cur.last() and await _scan_down(cur, wish, least):
        return _room(cur, wish, most)
    return None


def _room(cur: Cursor, wish: Wish, most: int) -> Extent:
    """What the extent under the cursor offers."""
    start, length = cur.record()
    first = -(-max(start, wish.above) // wish.align) * wish.align
    return first, min(most, min(start + length, wish.below) - first)


async def _scan_up(cur: Cursor, wish: Wish, want: int) -> bool:
    """From the cursor to longer extents, until one has room for `want` blocks."""
    align, above, below = wish.align, wish.above, wish.below
    while True:
        addr, i, n = cur.leaf()
        found = freefit.roomy_above(cur.mem, addr, i, n, want, align, above, below)
        cur.place(found if found >= 0 else n - 1)
        if found >= 0:
            return True
        if not await cur.next():
            return False


async def _scan_down(cur: Cursor, wish: Wish, want: int) -> bool:
    """From the cursor to shorter extents, until one has room for `want` blocks."""
    align, above, below = wish.align, wish.above, wish.below
    while cur.record()[1] >= want:
        addr, i, _ = cur.leaf()
        found = freefit.roomy_below(cur.mem, addr, i, want, align, above, below)
        cur.place(max(found, 0))
        if found >= 0:
            return True
        if not await cur.prev():
            break
    return False


async def _choose(
    tp: Transaction, wish: Wish, this_ag: bool, usable: list[int]
) -> tuple[int, int, int] | None:
    """(agno, first block, length) of the extent to allocate, or None: there is none."""
    geo, longest = tp.vol.geo, tp.vol.ags.longest
    near, minlen, maxlen = wish.near, wish.minlen, wish.maxlen
    home = geo.agno_of(near) if near is not None else 0
    got: Extent | None = None
    if near is not None and min(usable[home], longest[home]) >= wish.enough:
        most = min(maxlen, usable[home])
        got = await _choose_near(tp, home, geo.agbno_of(near), wish, most)
        if got is not None:
            return home, *got
    order = [home] if this_ag else [(home + i) % geo.agcount for i in range(geo.agcount)]
    for agno in order:
        if min(usable[agno], longest[agno]) >= maxlen:
            got = await _choose_by_length(tp, agno, wish, maxlen, maxlen)
            if got is not None:
                return agno, *got
    order.sort(key=lambda agno: -min(usable[agno], longest[agno]))
    for agno in order:
        if min(usable[agno], longest[agno]) >= minlen:
            most = min(maxlen, usable[agno])
            got = await _choose_by_length(tp, agno, wish, minlen, most)
            if got is not None:
                return agno, *got
    return None


# -- the free list --------------------------------------------------------------------------------


async def fix_freelist(tp: Transaction, agno: int, agf: Buf, keep: Extent = (0, 0)) -> None:
    """Bring the free list to its minimum length; blocks of the extent `keep` stay free.

    Where the AG has no blocks left the list stays short: then its trees are small.
    """
    ags = tp.vol.ags
    while ag.get(agf, ag.AGF_FLCOUNT) > ags.need[agno]:
        block = await ag.agfl_get(tp, agno, agf)
        if tp.vol.geo.has_rmap:
            await rmapbt.remove(tp, agno, agf, block, 1, owner.AG)
        await _give(tp, agno, agf, block, 1)
        ags.learn(agno, agf)
    while (short := ags.need[agno] - ag.get(agf, ag.AGF_FLCOUNT)) > 0:
        found = await _smallest(tp, agno, agf, keep)
        if found is None:
            break
        start, n = found[0], min(found[1], short)
        await _take(tp, agno, agf, start, n)
        for block in range(start, start + n):
            await ag.agfl_put(tp, agno, agf, block)
        if tp.vol.geo.has_rmap:
            await rmapbt.insert(tp, agno, agf, start, n, owner.AG)
        ags.learn(agno, agf)


async def _smallest(tp: Transaction, agno: int, agf: Buf, keep: Extent) -> Extent | None:
    """The smallest free extent outside `keep`, or a part of one."""
    cur = cnt_cursor(tp, agno, agf)
    more = await cur.first()
    while more:
        start, length = cur.record()
        end, keep_end = start + length, keep[0] + keep[1]
        if end <= keep[0] or start >= keep_end:
            return start, length
        if keep_end < end:
            return keep_end, end - keep_end
        if start < keep[0]:
            return start, keep[0] - start
        more = await cur.next()
    return None


# -- changing the trees ---------------------------------------------------------------------------


async def _take(tp: Transaction, agno: int, agf: Buf, start: int, n: int) -> None:
    """Take blocks out of the free extent that holds them."""
    bno, cnt = bno_cursor(tp, agno, agf), cnt_cursor(tp, agno, agf)
    if not await bno.lookup_le(start):
        raise bno.root.corrupt(f"blocks {start}+{n}", "not free")
    first, length = bno.record()
    head, tail = start - first, first + length - (start + n)
    if tail < 0:
        raise bno.root.corrupt(f"blocks {start}+{n}", "not free")
    if not await cnt.lookup_eq(length, first):
        raise cnt.root.corrupt(f"extent {first}+{length}", "only in the bnobt")
    if head:
        await bno.update((first, head))
        await cnt.replace((first, head))
        if tail:
            await bno.insert((start + n, tail))
            await cnt.insert((start + n, tail))
    elif tail:
        await bno.update((start + n, tail))
        await cnt.replace((start + n, tail))
    else:
        await bno.delete()
        await cnt.delete()
    ag.add(agf, ag.AGF_FREEBLKS, -n)
    if length == ag.get(agf, ag.AGF_LONGEST):
        ag.put(agf, ag.AGF_LONGEST, cnt.record()[1] if await cnt.last() else 0)
    tp.log(agf)


async def _give(tp: Transaction, agno: int, agf: Buf, start: int, n: int) -> None:
    """Put blocks among the free extents, merged with their neighbours."""
    tp.freed(tp.vol.geo.fsb(agno, start), n)
    bno, cnt = bno_cursor(tp, agno, agf), cnt_cursor(tp, agno, agf)
    left = right = None
    if await bno.lookup_le(start):
        left = bno.record()
        if left[0] + left[1] > start:
            raise bno.root.corrupt(f"blocks {start}+{n}", "freed but free already")
        left = left if left[0] + left[1] == start else None
    if await bno.lookup_ge(start):
        right = bno.record()
        if right[0] < start + n:
            raise bno.root.corrupt(f"blocks {start}+{n}", "freed but free already")
        right = right if right[0] == start + n else None
    first = left[0] if left else start
    length = n + (left[1] if left else 0) + (right[1] if right else 0)
    if right is not None and left is not None:
        await bno.delete()
        await _drop_length(cnt, right)
    elif right is not None:
        await bno.update((first, length))
    if left is not None:
        await bno.lookup_eq(left[0])
        await bno.update((first, length))
    elif right is None:
        await bno.insert((first, length))
        await cnt.insert((first, length))
    if (old := left or right) is not None:
        await _to_length(cnt, old)
        await cnt.replace((first, length))
    ag.add(agf, ag.AGF_FREEBLKS, n)
    if length > ag.get(agf, ag.AGF_LONGEST):
        ag.put(agf, ag.AGF_LONGEST, length)
    tp.log(agf)


async def _to_length(cnt: Cursor, extent: tuple[int, ...]) -> None:
    if not await cnt.lookup_eq(extent[1], extent[0]):
        raise cnt.root.corrupt(f"extent {extent[0]}+{extent[1]}", "only in the bnobt")


async def _drop_length(cnt: Cursor, extent: tuple[int, ...]) -> None:
    await _to_length(cnt, extent)
    await cnt.delete()


# -- entry points ---------------------------------------------------------------------------------


async def alloc(
    tp: Transaction,
    *,
    near: int | None = None,
    minlen: int,
    maxlen: int,
    align: int = 1,
    above: int = 0,
    below: int = 0,
    owner: Owner | None,
    this_ag: bool = False,
    metadata: bool = False,
    whole: bool = False,
) -> tuple[int, int]:
    """Allocate minlen to maxlen contiguous blocks; returns (fsbno, length).

    `near` is the fsbno where they are wanted; `align` asks for a multiple in the AG; the extent
    starts at or behind AG block `above` and ends before `below` (0: anywhere); `this_ag` confines
    the search to near's AG; `whole` asks for maxlen blocks elsewhere rather than fewer at `near`.
    The reverse map records `owner` (None: the caller does). The blocks come out of the
    transaction's reservation, which bounds the length. Raises OSError(ENOSPC) with nothing changed.
    """
    assert 0 < minlen <= maxlen
    assert align > 0
    await tp.lock_space()
    vol, ags = tp.vol, tp.vol.ags
    usable = ags.usable_by_trees if metadata else ags.usable
    if near is not None and vol.geo.agno_of(near) >= vol.geo.agcount:
        near = None  # just behind the end of the last AG
    maxlen = min(maxlen, tp.blocks)
    enough = maxlen if whole else minlen
    wish = Wish(near, minlen, maxlen, align, above, below or UNBOUND, enough)
    got = None
    if wish.maxlen >= minlen:
        got = await _choose(tp, wish, this_ag, usable)
    if got is None:
        raise OSError(errno.ENOSPC, f"no free extent of {minlen} blocks")
    agno, start, n = got
    agf = await ag.read_agf(tp, agno)
    await fix_freelist(tp, agno, agf, (start, n))
    await _take(tp, agno, agf, start, n)
    if owner is not None and vol.geo.has_rmap:
        await rmapbt.insert(tp, agno, agf, start, n, owner)
    ags.learn(agno, agf)
    vol.space.note_alloc(tp, n)
    return vol.geo.fsb(agno, start), n


async def free(tp: Transaction, fsbno: int, n: int, owner: Owner | None) -> None:
    """Free n blocks from fsbno on, all in one AG; the reverse map forgets `owner` (None: not).

    Raises Corrupt if some of them are free already or belong to somebody else.
    """
    vol = tp.vol
    if not vol.geo.valid_fsb(fsbno, n):
        raise vol.corrupt("extent", f"fsbno {fsbno}+{n}", "freed, but outside any AG")
    agf = await prepare(tp, agno := vol.geo.agno_of(fsbno))
    start = vol.geo.agbno_of(fsbno)
    if owner is not None and vol.geo.has_rmap:
        await rmapbt.remove(tp, agno, agf, start, n, owner)
    await _give(tp, agno, agf, start, n)
    vol.ags.learn(agno, agf)
    vol.space.note_free(n)


async def free_anyones(tp: Transaction, fsbno: int, n: int) -> None:
    """Free n blocks from fsbno on, whoever the reverse map says that they belong to, or nobody.

    For recovery, which knows that they are to be freed but not what they were.
    """
    vol = tp.vol
    agno, start = vol.geo.agno_of(fsbno), vol.geo.agbno_of(fsbno)
    if vol.geo.has_rmap:
        await rmapbt.remove_any(tp, agno, await prepare(tp, agno), start, n)
    await free(tp, fsbno, n, None)


async def prepare(tp: Transaction, agno: int) -> Buf:
    """Make an AG ready for a change of its trees; returns the AGF."""
    await tp.lock_space()
    agf = await ag.read_agf(tp, agno)
    await fix_freelist(tp, agno, agf)
    return agf
