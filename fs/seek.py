"""SEEK_DATA and SEEK_HOLE: where a file has data.

Data is what a written extent holds, and what is dirty (or under write-back) in the page cache
where the extent map still has a hole or an unwritten extent; everything else up to the end of the
file is a hole, and so is the end itself. Answers are exact to the block.

The IOLOCK is held shared, so nobody makes anything dirty. Write-back goes on, but a block stays
PENDING until the map has it, and the map needs the ILOCK: under that, held shared, both are looked
at, so data is always seen in one of them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np

from alloc.atomic import spin_lock, spin_unlock
from alloc.jit import kernel
from fs.cache import radix
from fs.cache.blocks import PENDING, block_bits
from fs.cache.radix import R_LOCK, next_entry
from fs.xfs import bmap

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

SEEK_DATA, SEEK_HOLE = 3, 4


async def seek(vol: Volume, ip: Inode, offset: int, whence: int) -> int:
    """The first position from `offset` on that is data, or a hole.

    Raises OSError: ENXIO (behind the end, or no more data), EINVAL, EIO; Corrupt, ShutDown.
    """
    vol.check_alive()
    if whence not in (SEEK_DATA, SEEK_HOLE):
        raise OSError(errno.EINVAL, f"whence {whence}")
    log = vol.geo.block_log
    async with vol.iolock(ip, shared=True):
        if not 0 <= offset < ip.size:
            raise OSError(errno.ENXIO, "behind the end of the file")
        at, end = offset >> log, -(-ip.size >> log)
        while at < end:
            stop, is_data = await _run(vol, ip, at, end)
            if is_data == (whence == SEEK_DATA):
                return max(offset, at << log)
            at = stop
        if whence == SEEK_HOLE:
            return ip.size
    raise OSError(errno.ENXIO, "no data up to the end of the file")


async def _run(vol: Volume, ip: Inode, at: int, end: int) -> tuple[int, bool]:
    """(block behind it, whether it is data) of a run of equal blocks that begins at `at`."""
    async with vol.reader(ip) as tp:
        m = await bmap.lookup(tp, ip, at)
        if m is not None and m.offset <= at and not m.unwritten:
            return m.end, True
        if m is not None:
            end = min(end, m.end if m.offset <= at else m.offset)
        stop = _cached(vol, ip, at, end, pending=True)
        if stop > at:
            return stop, False
        return _cached(vol, ip, at, end, pending=False), True


def _cached(vol: Volume, ip: Inode, first: int, last: int, *, pending: bool) -> int:
    """The first block of [first, last) that is waiting to be mapped, or is not; else `last`."""
    pages = vol.pages
    p = pages.pages
    args = (pages.m4, pages.m8, p.order, p.index, p.blocks, pages.root(ip.handle))
    return int(find_pending(*args, pages.block_log, first, last, int(pending)))


@kernel("i8(u4[::1], u8[::1], u1[::1], i8[::1], u4[::1], i8, i8, i8, i8, i8)")
def find_pending(m4, m8, orders, indices, blocks, root, block_log, first, last, wanted):
    """The first block of [first, last) that is PENDING (wanted 1) or is not (0); else `last`."""
    block = np.int64(first)
    last_page = ((last << block_log) - 1) >> 12
    found = False
    spin_lock(m4, root + R_LOCK)
    while block < last and not found:
        pfn = next_entry(m4, m8, orders, root, (block << block_log) >> 12, last_page, radix.ANY)
        start = np.int64(last)
        end = np.int64(last)
        base = np.int64(0)
        if pfn != 0:
            base = indices[pfn] << 12
            start = max(block, base >> block_log)
            end = min(last, (base + (4096 << np.int64(orders[pfn]))) >> block_log)
        if start > block and wanted == 0:
            break
        block = start
        while block < end:
            bits = block_bits(blocks, pfn, base, block_log, block)
            if (bits & PENDING != 0) == (wanted != 0):
                found = True
                break
            block += 1
    spin_unlock(m4, root + R_LOCK)
    return block
