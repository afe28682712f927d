"""Buffered writing: data into folios, space promised, one folio at a time.

The fast path is one kernel that copies into folios which are ready; it awaits nothing. What is not
ready is prepared: memory first, then space, then the bits that allow the copy, with no await
between the last two. Whatever was awaited may have changed the cache, so preparing starts over
after each wait, with less to do. Files with an extent size hint have their holes filled first
(fs/prealloc.py), for as much of the write as follows.

The caller holds the inode's IOLOCK exclusively. A writer is held back when there is too much
dirty memory before it takes a folio, and never writes itself.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from alloc.page import LOCKED
from fs import delalloc, mapread, prealloc
from fs.cache import blocks, readahead
from fs.cache.blocks import MAPPED, PENDING, RESERVED
from fs.cache.folio import write_order
from fs.xfs import bmap, extsize, refcount
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

HOLE, UNWRITTEN, SHARED, OWN = range(4)  # kinds of blocks as a writer sees them

Part = tuple[int, int, int]  # first block, last block (exclusive), kind


async def write_step(
    vol: Volume, ip: Inode, pos: int, source: Any, start: int, length: int
) -> int:
    """Copy as much as is ready; make the next folio ready if nothing is. Bytes copied."""
    throttle = vol.pages.throttle
    if throttle.must_balance(ip.handle):
        await throttle.balance(ip.handle)
        vol.check_writable()
    copied = _copy_in(vol, ip, pos, source, start, length)
    if copied:
        return copied
    end = min(pos + length, ((pos >> 12) + (1 << vol.pages.order_max)) << 12)
    if extsize.hint(ip):
        log = vol.geo.block_log
        vol.eofblocks.note(ip)
        mapped = await prealloc.have(vol, ip, pos >> log, (pos + length - 1 >> log) + 1)
        end = min(end, mapped << log)
    end = await _make_ready(vol, ip, pos, end)
    return _copy_in(vol, ip, pos, source, start, end - pos)


async def _make_ready(vol: Volume, ip: Inode, pos: int, end: int) -> int:
    """Prepare the folio at `pos`, for less than up to `end` if space is short; how far."""
    flushed = False
    with vol.pages.pins.pinning() as pin:
        while True:
            try:
                if await _prepare(vol, ip, pos, end, pin):
                    return end
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                if not flushed:  # writing out gives back what the worst case did not need
                    flushed = True
                    await vol.flusher.sync()
                    await vol.eofblocks.squeeze()  # last, for write-back may take some
                elif end - pos > vol.geo.block_size:
                    end = pos + (end - pos) // 2
                else:
                    raise


def _copy_in(vol: Volume, ip: Inode, pos: int, source: Any, start: int, length: int) -> int:
    """The copy kernel and its accounting."""
    pages = vol.pages
    p, hint = pages.pages, pages.hint
    copied = int(
        blocks.copy_in(
            pages.m4, pages.m8, vol.arena.mem, p.flags, p.order, p.index, p.blocks,
            pages.dirty.counts, pages.root(ip.handle), pages.block_log, pos, source, start,
            length, hint,
        )  # fmt: skip
    )
    if hint[0]:
        pages.note_dirtied(ip.handle, int(hint[0]))
    pages.note_used(ip.handle, pos, copied)
    return copied


async def _prepare(
    vol: Volume, ip: Inode, pos: int, end: int, pin: Callable[[int], None]
) -> bool:
    """A step towards a folio at `pos` that a copy of up to [pos, end) may go into.

    True when the copy may follow at once, without an await. Each step that awaits something
    (False) leaves less to do for the next one. Raises OSError(ENOSPC) with nothing reserved.
    """
    pages = vol.pages
    log = vol.geo.block_log
    sequence = int(pages.columns["map_seq"][ip.handle])
    first, last = pos >> log, ((end - 1) >> log) + 1
    parts = await classify(vol, ip, first, last)
    pfn = pages.find(ip.handle, pos >> 12)
    if not pfn:
        order = write_order(pos, end - pos, pages.order_min, pages.order_max)
        pfn, _ = await pages.add(ip.handle, pos >> 12, order)
    pin(pfn)  # or what the next step reads evicts what this one has read, for ever
    if pages.is_locked(pfn):
        await pages.wait(pfn, LOCKED)
        return False
    if pages.columns["map_seq"][ip.handle] != sequence:
        return False
    last = min(last, pages.end(pfn) >> log)
    end = min(end, pages.end(pfn))
    for block in {pos >> log, (end - 1) >> log}:
        whole = pos <= block << log and end >= (block + 1) << log
        if not whole and not await _complete_block(vol, ip, pfn, block, parts):
            return False
    _claim(vol, ip, pfn, [(a, min(b, last), kind) for a, b, kind in parts if a < last])
    return True


async def _complete_block(
    vol: Volume, ip: Inode, pfn: int, block: int, parts: list[Part]
) -> bool:
    """A block that is written in part needs its rest; False if the device had to be asked."""
    if not vol.pages.missing(pfn, block, block + 1):
        return True
    kind = next(kind for a, b, kind in parts if a <= block < b)
    if kind in (HOLE, UNWRITTEN) or block << vol.geo.block_log >= ip.size:
        vol.pages.zero_missing(pfn, block, block + 1)
        return True
    await readahead.read_blocks(vol, ip, pfn, block, block + 1)
    return False


async def classify(vol: Volume, ip: Inode, first: int, last: int) -> list[Part]:
    """What the blocks [first, last) are to a writer: HOLE, UNWRITTEN, SHARED or OWN."""
    parts: list[Part] = []
    for m in await mapread.read(vol, ip, first, last - first):
        if m.fsbno == bmap.HOLE:
            parts.append((m.offset, m.end, HOLE))
        elif m.unwritten:
            parts.append((m.offset, m.end, UNWRITTEN))
        elif ip.flags2 & L.DIFLAG2_REFLINK:
            parts += await _sharing(vol, ip, m)
        else:
            parts.append((m.offset, m.end, OWN))
    return parts


async def _sharing(vol: Volume, ip: Inode, m: bmap.Mapping) -> list[Part]:
    """Which blocks of a written extent have other owners, too."""
    parts: list[Part] = []
    at = m.offset
    while at < m.end:
        fsbno = m.fsbno + at - m.offset
        async with vol.reader(ip) as tp:
            shared = await refcount.find_shared(tp, fsbno, m.end - at)
        start = m.end if shared is None else at + shared[0] - fsbno
        end = m.end if shared is None else start + shared[1]
        if start > at:
            parts.append((at, start, OWN))
        if end > start:
            parts.append((start, end, SHARED))
        at = end
    return parts


def _claim(vol: Volume, ip: Inode, pfn: int, parts: list[Part]) -> None:
    """Promise space to the blocks of a folio that have none, and let them be written.

    Raises OSError(ENOSPC) with nothing changed. Atomic.
    """
    pages = vol.pages
    data = pending = 0
    for first, last, kind in parts:
        if kind != OWN:
            n = pages.claim(pfn, first, last, 0)
            pending += n
            data += n if kind != UNWRITTEN else 0
    if pending:
        delalloc.promise(vol, ip, data, pending)
    bits = {HOLE: RESERVED | PENDING, SHARED: RESERVED | PENDING, UNWRITTEN: PENDING, OWN: MAPPED}
    for first, last, kind in parts:
        pages.claim(pfn, first, last, bits[kind])
