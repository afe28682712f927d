"""Changing a file's size, and what lies beyond its end.

Invariant: bytes between a file's size and the end of its last block are zero wherever the file
could grow over them. So a file that shrinks into a block has the rest of that block zeroed, on the
device too, before the smaller size is logged; a file that grows has what it grows over zeroed
first, except where nothing is written.

Order when shrinking: zero the last block, shrink in memory, drop folios (waiting for those under
write-back), write, then log the size and unmap, a bounded number of extents a transaction.
A size is never logged over data that is not on the device. The IOLOCK is held exclusively.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np
import trio

from alloc.page import DIRTY, LOCKED, WRITEBACK
from fs import buffered, delalloc
from fs.cache import blocks, radix
from fs.cache.incore import S_RELEASED, S_REOPENED
from fs.xfs import bmap, stamp
from fs.xfs import layout as L
from writeback import errseq
from writeback.flusher import ALL_PAGES

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

SIZE_MAX = (1 << 63) - (1 << 22)  # so that the end of the last folio is still a 63-bit number
_EVERYTHING = (1 << 63) - 1
_ZEROES = np.zeros(1 << 16, np.uint8)
_ZEROES.flags.writeable = False


async def truncate(vol: Volume, ip: Inode, size: int) -> None:
    """Set the size of a regular file and its mtime and ctime.

    Raises OSError: EINVAL, EFBIG, EROFS, ENOSPC (a shared last block needs a copy), EIO; Corrupt.
    """
    vol.check_writable()
    if size < 0:
        raise OSError(errno.EINVAL, "negative size")
    if size > SIZE_MAX:
        raise OSError(errno.EFBIG, "file too large")
    async with vol.iolock(ip):
        if size > ip.size:
            await grow(vol, ip, size)
        else:
            await _shrink(vol, ip, size)
    vol.flusher.settle(ip.handle)


async def discard(vol: Volume, ip: Inode) -> None:
    """Throw away all data of a file that nobody can reach any more: for inactivation.

    Nothing is written; afterwards the inode's mapping is empty.
    """
    ip.size = 0
    await drop_folios(vol, ip, 0)
    await unmap(vol, ip, 0, stamped=False)


async def grow(vol: Volume, ip: Inode, size: int) -> None:
    old = ip.size
    await extend(vol, ip, size)
    await write_out(vol, ip, min(ip.disk_size, old), size)
    async with vol.transaction("truncate up") as tp:
        await tp.lock_inodes(ip)
        ip.size = ip.disk_size = size
        _stamp(vol, ip)
        tp.log_inode(ip)


async def _shrink(vol: Volume, ip: Inode, size: int) -> None:
    block_end = -(-size // vol.geo.block_size) * vol.geo.block_size
    if size < ip.size:
        zeroed = await zero_written(vol, ip, size, min(block_end, ip.size))
        ip.size = size
        ip.state &= ~(S_RELEASED | S_REOPENED)  # it is written anew
        await drop_folios(vol, ip, size)
        if zeroed or ip.disk_size < size:
            await write_out(vol, ip, min(ip.disk_size, size), size)
    await unmap(vol, ip, size)


def _stamp(vol: Volume, ip: Inode) -> None:
    """mtime and ctime; the caller, who holds IOLOCK and ILOCK, logs the inode."""
    ip.mtime = ip.ctime = stamp.now()
    ip.changecount += 1


async def write_out(vol: Volume, ip: Inode, start: int, end: int) -> None:
    """Bytes from `start` to the block of `end` are on the device when this returns.

    Or lost, for want of a device; for want of memory they are still dirty, and it is an OSError.
    """
    pages = vol.pages
    args = (ip.handle, start >> 12, max(end - 1, start) >> 12)
    await pages.write_range(*args, integrity=True, budget=ALL_PAGES)
    vol.check_writable()
    if pages.next(*args, radix.DIRTY):
        word = int(pages.state(ip.handle)["error"])
        raise OSError(word & errseq.MAX_ERRNO or errno.EIO, "write-back failed")


# -- zeroes ------------------------------------------------------------------------------------


async def extend(vol: Volume, ip: Inode, end: int) -> None:
    """The file is about to grow over [size, end): have that read as zeros.

    Holes and unwritten blocks do already. Raises OSError(ENOSPC), OSError(EIO), Corrupt.
    """
    await zero_written(vol, ip, ip.size, end)


async def zero_written(vol: Volume, ip: Inode, start: int, end: int) -> bool:
    """Write zeros over what in [start, end) is not zero for want of blocks; whether any were."""
    log = vol.geo.block_log
    wrote = False
    while start < end:
        block = start >> log
        block_end = min(end, (block + 1) << log)
        whole = start == block << log and block_end == (block + 1) << log
        cached = None if whole else _cached(vol, ip, start, block_end)
        if cached is None:
            async with vol.reader(ip) as tp:
                m = await bmap.lookup(tp, ip, block)
            if m is None or m.offset << log >= end:
                break
            if m.offset > block or m.unwritten:
                start = (m.end if m.offset <= block else m.offset) << log
                continue
            block_end = min(end, m.end << log)
        if cached:
            start = block_end
        while start < block_end:
            wrote = True
            n = min(_ZEROES.size, block_end - start)
            start += await buffered.write_step(vol, ip, start, _ZEROES, 0, n)
    return wrote


def _cached(vol: Volume, ip: Inode, start: int, end: int) -> bool | None:
    """Whether [start, end), in one block, is cached as zeros; None if it is not cached."""
    pages = vol.pages
    pfn = pages.find(ip.handle, start >> 12)
    block = start >> vol.geo.block_log
    if not pfn or pages.missing(pfn, block, block + 1):
        return None
    addr = (pfn << 12) + start - pages.base(pfn)
    return bool(blocks.is_zero(vol.arena.mem, addr, end - start))


# -- dropping ----------------------------------------------------------------------------------


async def drop_folios(vol: Volume, ip: Inode, start: int, stop: int = _EVERYTHING) -> None:
    """Remove what is cached of bytes [start, stop), waiting for reads and write-back to end.

    A folio that holds more is split, if a piece of it can go then. If somebody uses it, it can not
    be split; then it goes, too, but stays whole while something else in it is dirty. In what stays
    the bytes are zeroed, and blocks wholly inside forgotten.
    """
    pages = vol.pages
    first, last = -(-start >> 12 + pages.order_min), stop >> 12 + pages.order_min
    edges = (first << pages.order_min, last << pages.order_min) if first < last else ()
    pages.may_wait(LOCKED | WRITEBACK)
    page = start >> 12
    while pfn := pages.next(ip.handle, page, (stop - 1) >> 12):
        if pages.pages.flags[pfn] & (LOCKED | WRITEBACK):
            await pages.wait(pfn, LOCKED | WRITEBACK)
            continue
        base, end = pages.base(pfn), pages.end(pfn)
        inside = [edge for edge in edges if base >> 12 < edge < end >> 12]
        if any(pages.splits.split(pfn, edge) for edge in inside):
            continue
        page = end >> 12
        reserved, pending = pages.cut(pfn, max(base, start), min(end, stop))
        if reserved or pending:
            delalloc.forget(vol, ip, reserved, pending)
        if (base >= start and end <= stop) or (inside and not pages.pages.flags[pfn] & DIRTY):
            pages.remove(pfn)
    pages.shadows.forget(ip.handle, start >> 12, (stop - 1) >> 12)


async def unmap(vol: Volume, ip: Inode, size: int, *, stamped: bool = True) -> None:
    """Log the size, and the time if it is to be `stamped`, and free every block behind it."""
    start = -(-size // vol.geo.block_size)
    state = vol.pages.state(ip.handle)
    done = False
    while not done:
        await trio.lowlevel.cancel_shielded_checkpoint()
        async with vol.transaction("truncate", from_pool=True) as tp:
            await tp.lock_inodes(ip)
            ip.disk_size = size
            if stamped:
                _stamp(vol, ip)
            tp.log_inode(ip)
            done = await bmap.unmap(tp, ip, start, L.FILE_OFFSET_MAX - start)
            state["map_seq"] += 1
