"""Telling the device which blocks hold nothing: FITRIM.

The free extents of an AG are walked by place, a batch at a time. A batch holds the space lock from
reading the free-space tree to the end of the device's work, so no block can be allocated and
written meanwhile. Under the lock, and before anything is discarded, all metadata goes home: then
the image, too, says that these blocks are free, and a crash finds no file with holes in its data.
Writing metadata home takes no lock that a transaction holds, so it may be done under this one.

Positions are bytes of the device, as everywhere in FITRIM. Free extents shorter than `minlen` are
left alone; the others are discarded as far as they lie in the range.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import trio

from fs.xfs import ag, freespace

if TYPE_CHECKING:
    from fs.log.transaction import Transaction
    from fs.volume import Volume

BATCH_EXTENTS = 64  # discarded under one hold of the space lock, at most
BATCH_BLOCKS = 1 << 18  # and about so many blocks, which may be a part of an extent
LEAF_EXTENTS = 4096  # looked at under one hold of the space lock, at most

Extent = tuple[int, int]  # first block of the AG, length


async def trim(vol: Volume, start: int, length: int, minlen: int) -> int:
    """Discard free space in [start, start + length) of the device; bytes discarded.

    Raises OSError: EINVAL for a range outside the filesystem or a `minlen` that no extent can
    have, EOPNOTSUPP when the device cannot discard, EROFS, EIO; Corrupt, ShutDown.
    """
    vol.check_writable()
    geo = vol.geo
    size = geo.dblocks << geo.block_log
    if min(start, length, minlen) < 0 or start >= size or length < geo.block_size:
        raise OSError(errno.EINVAL, "no range of the filesystem")
    if minlen > geo.ag_blocks << geo.block_log:
        raise OSError(errno.EINVAL, "no extent is as long as that")
    first = -(-start >> geo.block_log)
    end = min(start + length, size) >> geo.block_log
    least = max(-(-minlen >> geo.block_log), 1)
    done = 0
    for agno in range(first // geo.ag_blocks, geo.agcount):
        base = agno * geo.ag_blocks
        if base >= end:
            break
        low, high = max(first - base, 0), min(end - base, geo.ag_length(agno))
        while low < high:
            low, blocks = await _batch(vol, agno, low, high, least)
            done += blocks << geo.block_log
            await trio.lowlevel.checkpoint()
    return done


async def _batch(vol: Volume, agno: int, low: int, high: int, least: int) -> tuple[int, int]:
    """Discard some free extents of AG blocks [low, high): where to go on, blocks discarded."""
    async with vol.reader() as tp:
        await tp.lock_space()
        found, low = await _collect(tp, agno, low, high, least)
        if not found:
            return low, 0
        vol.check_writable()
        await vol.flush_metadata()
        for start, n in found:
            vol.check_writable()
            offset = vol.geo.fsb_to_bytes(vol.geo.fsb(agno, start))
            await vol.dev.discard(offset, n << vol.geo.block_log)
        return low, sum(n for _, n in found)


async def _collect(
    tp: Transaction, agno: int, low: int, high: int, least: int
) -> tuple[list[Extent], int]:
    """A batch of [low, high) from extents of `least` blocks or more, and where to go on."""
    agf = await ag.read_agf(tp, agno)
    if tp.vol.ags.longest[agno] < least:
        return [], high
    cur = freespace.bno_cursor(tp, agno, agf)
    more = await cur.lookup_le(low) or await cur.first()
    found: list[Extent] = []
    blocks = 0
    for _ in range(LEAF_EXTENTS):
        if not more:
            return found, high
        first, n = cur.record()
        if first >= high:
            return found, high
        a, b = max(first, low), min(first + n, high)
        if n >= least and a < b:
            b = min(b, a + BATCH_BLOCKS)
            found.append((a, b - a))
            blocks += b - a
            if len(found) == BATCH_EXTENTS or blocks >= BATCH_BLOCKS:
                return found, b
        more = await cur.next()
    return found, max(b, low)
