"""Reading file data into the page cache: in which folios, and from where.

How much is the business of `fs/cache/window.py`; `fs/cache/ahead.py` reads what nobody waits for.
Holes and unwritten extents get no folio of their own: readers see zeros without one.

Folios are put in LOCKED and looked up in the extent map afterwards: from then on nothing in them
can become dirty, so what the map says stays true until they are unlocked. The caller holds the
inode's IOLOCK, shared at least. That look may wait for memory, which the window's own folios may
be all of, so until the device is asked they can be taken back but for the first (`Windows`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from alloc import gfp, lockdep
from alloc.page import LOCKED, READAHEAD
from fs import mapread
from fs.cache import blocks
from fs.cache.blocks import MAPPED, UPTODATE
from fs.cache.lock import FOLIO_LOCKED
from fs.device.base import Views
from fs.xfs import bmap
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.folio import PageCache
    from fs.cache.inode import Inode
    from fs.cache.window import Window
    from fs.volume import Volume

Piece = tuple[int, int, int]  # device offset in bytes or -1 for zeros, address in memory, bytes


class Windows:
    """Folios that were taken for reads which have not begun: see `alloc.victim.Holder`."""

    name = "readahead"

    def __init__(self, pages: PageCache) -> None:
        self._pages = pages
        self._open: dict[int, list[int]] = {}  # by the first folio, which its reader keeps

    @contextmanager
    def opened(self, locked: list[int]) -> Iterator[None]:
        """While the block lasts the end of a window may be cut off."""
        self._open[locked[0]] = locked
        try:
            yield
        finally:
            del self._open[locked[0]]

    def count(self) -> int:
        return max(map(self._spare_pages, self._open.values()), default=0)

    def shed(self) -> int:
        locked = max(self._open.values(), key=self._spare_pages)
        pages = self._spare_pages(locked)
        for pfn in self._spare(locked):
            locked.remove(pfn)
            self._pages.unlock(pfn)
            self._pages.remove(pfn)
        return pages

    def _spare(self, locked: list[int]) -> list[int]:
        """Those with nothing in them."""
        return [pfn for pfn in locked[1:] if self._pages.is_blank(pfn)]

    def _spare_pages(self, locked: list[int]) -> int:
        return sum(1 << int(self._pages.pages.order[pfn]) for pfn in self._spare(locked))


async def fill(vol: Volume, ip: Inode, pos: int, end: int) -> int:
    """Bring file data at `pos`, and what readahead wants behind it, into the cache.

    Returns a position: up to it the file is known to be a hole without a folio (then it is above
    `pos`), or `pos` when folios were read or waited for. Raises OSError(EIO), Corrupt.
    """
    pages = vol.pages
    index = pos >> 12
    pages.may_wait(LOCKED)
    wanted = ((end - 1) >> 12) - index + 1
    pfn = pages.find(ip.handle, index)
    if pfn and pages.is_locked(pfn):
        vol.ahead.look(ip, pfn, wanted)
        await pages.wait(pfn, LOCKED)
        return pos
    window = vol.ahead.miss(ip, index, wanted)
    stop = _stop(ip, window)
    sequence = int(pages.columns["map_seq"][ip.handle])
    hole = await _zeros_at(vol, ip, pos, stop << 12)
    if hole > pos:
        return hole
    found = await _lookup(vol, ip, index << 12, stop << 12)
    locked = await _take_folios(vol, ip, index, stop, window, found)
    if locked:
        vol.ahead.taken(ip, index, window)
        with lockdep.holding(FOLIO_LOCKED):
            await _read_folios(vol, ip, locked, found, sequence)
    return pos


async def read_window(vol: Volume, ip: Inode, window: Window) -> None:
    """Bring a window that nobody asked for into the cache, as far as memory comes easily.

    Raises OSError(EIO), Corrupt.
    """
    stop = _stop(ip, window)
    if window.start >= stop:
        return
    sequence = int(vol.pages.columns["map_seq"][ip.handle])
    found = await _lookup(vol, ip, window.start << 12, stop << 12)
    locked = await _take_folios(vol, ip, -1, stop, window, found)
    if locked:
        vol.ahead.taken(ip, window.start, window)
        with lockdep.holding(FOLIO_LOCKED):
            await _read_folios(vol, ip, locked, found, sequence)


def _stop(ip: Inode, window: Window) -> int:
    """The page behind a window, or behind the file if that ends before."""
    return min(window.start + window.pages, (ip.size - 1 >> 12) + 1)


async def _lookup(vol: Volume, ip: Inode, start: int, end: int) -> list[bmap.Mapping]:
    """The extent map of bytes [start, end), rounded to blocks."""
    log = vol.geo.block_log
    first = start >> log
    return await mapread.read(vol, ip, first, ((end - 1) >> log) + 1 - first)


async def _zeros_at(vol: Volume, ip: Inode, pos: int, stop: int) -> int:
    """How far from `pos`, at most about `stop`, the file reads as zeros for want of a folio.

    One look at the map, because a file of many small holes comes here for each of them.
    """
    log = vol.geo.block_log
    block, last = pos >> log, ((stop - 1) >> log) + 1
    async with vol.reader(ip) as tp:
        m = await bmap.lookup(tp, ip, block)
    if m is None or m.offset > block:
        end = last if m is None else min(m.offset, last)
        m = bmap.Mapping(block, bmap.HOLE, end - block, False)
    return _zero_until(vol, ip, pos, [m])


def _is_zero(m: bmap.Mapping) -> bool:
    return m.fsbno == bmap.HOLE or m.unwritten


def _zero_until(vol: Volume, ip: Inode, pos: int, found: list[bmap.Mapping]) -> int:
    """How far from `pos` the file reads as zeros for want of a folio; `pos` if it does not."""
    log = vol.geo.block_log
    end = pos
    for m in found:
        if m.end << log <= end:
            continue
        if m.offset << log > end or not _is_zero(m):
            break
        end = m.end << log
    if end > pos:
        pfn = vol.pages.next(ip.handle, pos >> 12, (end - 1) >> 12)
        if pfn:
            end = max(pos, min(end, vol.pages.base(pfn)))
    return end


def _next_data(vol: Volume, page: int, found: list[bmap.Mapping]) -> int:
    """The first page from `page` on that has a written block; behind the map if none."""
    log = vol.geo.block_log
    for m in found:
        if m.end << log > page << 12 and not _is_zero(m):
            return max(page, m.offset << log >> 12)
    return 1 << 52


async def _take_folios(
    vol: Volume, ip: Inode, index: int, stop: int, window: Window, found: list[bmap.Mapping]
) -> list[int]:
    """Lock the folios of a window up to page `stop` that must be read, making what is missing.

    That of page `index`, where it begins unless that is -1, is made with full effort, the others
    only if memory comes easily. A new one over the window's mark gets the marker.
    """
    pages = vol.pages
    order = max(window.order, pages.order_min)
    locked: list[int] = []
    page = index if index >= 0 else window.start
    while page < stop:
        pfn = pages.find(ip.handle, page)
        if pfn:
            log = vol.geo.block_log
            low, high = pages.base(pfn) >> log, pages.end(pfn) >> log
            if not pages.is_locked(pfn) and pages.missing(pfn, low, high):
                pages.lock(pfn)
                locked.append(pfn)
            page = pages.end(pfn) >> 12
            continue
        page = _next_data(vol, page, found)
        if page >= stop:
            break
        fit = _fit(page, stop, order, pages.order_min)
        if page == index:
            pfn, fresh = await pages.add(ip.handle, page, fit, LOCKED)
            if not fresh:
                continue
        else:
            with gfp.nofs():
                pfn = pages.try_add(ip.handle, page, fit, LOCKED)
            if not pfn:
                break
        if pages.base(pfn) >> 12 <= window.mark < pages.end(pfn) >> 12:
            blocks.set_flags(pages.pages.flags, pfn, READAHEAD)
        locked.append(pfn)
        page = pages.end(pfn) >> 12
    return locked


def _fit(page: int, stop: int, order: int, order_min: int) -> int:
    """The largest order up to `order` that is aligned at `page` and ends before `stop`."""
    while order > order_min and (page & ((1 << order) - 1) or page + (1 << order) > stop):
        order -= 1
    return order


async def _read_folios(
    vol: Volume, ip: Inode, locked: list[int], found: list[bmap.Mapping], sequence: int
) -> None:
    """Read what is not up to date in folios that the caller locked, and unlock them.

    `found` is what the map said when its number was `sequence`, and may be too little or too old.
    """
    pages = vol.pages
    log = vol.geo.block_log
    done = False
    try:
        start, end = pages.base(locked[0]), pages.end(locked[-1])
        covered = found[0].offset << log <= start and end <= found[-1].end << log
        if not covered or pages.columns["map_seq"][ip.handle] != sequence:
            with pages.windows.opened(locked):
                found = await _lookup(vol, ip, start, end)
        plan = [piece for pfn in locked for piece in _plan(vol, pfn, found)]
        await _transfer(vol, plan)
        own = 0 if ip.flags2 & L.DIFLAG2_REFLINK else MAPPED
        for pfn in locked:
            _mark_read(vol, pfn, found, own)
        done = True
    finally:
        for pfn in locked:
            pages.unlock(pfn)
            if not done and pages.is_blank(pfn):
                pages.remove(pfn)


def _overlaps(
    vol: Volume, pfn: int, found: list[bmap.Mapping]
) -> list[tuple[bmap.Mapping, int, int]]:
    """(mapping, first block, last block) of a folio's blocks that are not up to date."""
    log = vol.geo.block_log
    low, high = vol.pages.base(pfn) >> log, vol.pages.end(pfn) >> log
    parts = []
    for first, count in vol.pages.missing(pfn, low, high):
        for m in found:
            a, b = max(first, m.offset), min(first + count, m.end)
            if a < b:
                parts.append((m, a, b))
    return parts


def _plan(vol: Volume, pfn: int, found: list[bmap.Mapping]) -> list[Piece]:
    """Device reads that bring a folio up to date; holes are zeroed at once."""
    log = vol.geo.block_log
    address = (pfn << 12) - vol.pages.base(pfn)
    plan = []
    for m, a, b in _overlaps(vol, pfn, found):
        if _is_zero(m):
            vol.pages.zero_missing(pfn, a, b)
        else:
            at = vol.geo.fsb_to_bytes(m.fsbno) + ((a - m.offset) << log)
            plan.append((at, address + (a << log), (b - a) << log))
    return plan


def _mark_read(vol: Volume, pfn: int, found: list[bmap.Mapping], own: int) -> None:
    for m, a, b in _overlaps(vol, pfn, found):
        if not _is_zero(m):
            vol.pages.change(pfn, a, b, UPTODATE | own)


async def _transfer(vol: Volume, plan: list[Piece]) -> None:
    """Read the pieces with one call to the device, neighbours with one transfer."""
    requests: list[tuple[int, Views]] = []
    at = 0
    while at < len(plan):
        offset, addr, length = plan[at]
        views = [vol.pages.view[addr : addr + length]]
        end = offset + length
        at += 1
        while at < len(plan) and plan[at][0] == end:
            _, addr, length = plan[at]
            views.append(vol.pages.view[addr : addr + length])
            end += length
            at += 1
        requests.append((offset, views))
    await vol.dev.read_all(requests)


async def read_blocks(vol: Volume, ip: Inode, pfn: int, first: int, last: int) -> None:
    """Bring file blocks [first, last) of a folio that is not locked up to date.

    For writers that change a part of a block. The folio may be gone afterwards.
    """
    vol.pages.lock(pfn)
    log = vol.geo.block_log
    try:
        with lockdep.holding(FOLIO_LOCKED):
            found = await _lookup(vol, ip, first << log, last << log)
            await _transfer(vol, _plan(vol, pfn, found))
        own = 0 if ip.flags2 & L.DIFLAG2_REFLINK else MAPPED
        _mark_read(vol, pfn, found, own)
    finally:
        vol.pages.unlock(pfn)
