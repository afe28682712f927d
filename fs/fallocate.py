"""fallocate(2): space for a part of a file, or a hole, zeros or nothing at all in its place.

Everything happens under the IOLOCK held exclusively, so nobody dirties a folio meanwhile; only
write-back goes on. Blocks are allocated only in a range that was written out (write-back may have
seen the hole, and would fill it, too). Blocks are unmapped only after what is cached of them was
dropped. Extents are shifted only while nothing of the file is dirty and nothing cached behind the
first of them.

Each step is one transaction that leaves a valid map, and ends with the promises to what is still
dirty made good (`prealloc`): more records may mean a larger tree than was reserved for it. Size and
time stamps follow the rules of fs/truncate.py: the size changes last, except that an insertion
changes it first, so that no shifted extent lies behind the end of the file.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

import numpy as np
import trio

from fs import buffered, file, prealloc, truncate
from fs.truncate import SIZE_MAX
from fs.xfs import bmap
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE, UNSHARE_RANGE = 1, 2, 8, 16, 32, 64
MODES = {
    0, KEEP_SIZE, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE, COLLAPSE_RANGE,
    INSERT_RANGE, UNSHARE_RANGE, UNSHARE_RANGE | KEEP_SIZE,
}  # fmt: skip

POSITION_MAX = (1 << 63) - 1
CLASSIFY_BLOCKS = 1 << 14  # that are looked up together
COPY_BYTES = 1 << 17


async def fallocate(
    vol: Volume, ip: Inode, offset: int, length: int, mode: int, *, kill_privileges: bool = False
) -> None:
    """Change bytes [offset, offset + length) of a regular file as fallocate(2)'s mode bits say.

    `kill_privileges`: the caller may not keep set-id bits and the kernel left them to us. Raises
    OSError: EINVAL, EOPNOTSUPP, EFBIG, ENOSPC, EROFS, EIO; Corrupt, ShutDown. After an
    error the size is what it was; what was allocated or freed by then stays so.
    """
    vol.check_writable()
    _check(ip, offset, length, mode)
    end = min(offset + length, max(offset, SIZE_MAX))
    async with vol.iolock(ip):
        if mode & (COLLAPSE_RANGE | INSERT_RANGE):
            _check_shift(vol, ip, offset, end, mode)
        if kill_privileges and ip.mode & (stat.S_ISUID | stat.S_ISGID):
            await file.remove_privileges(vol, ip)
        file.changed(vol, ip)
        if mode == COLLAPSE_RANGE:
            await _collapse(vol, ip, offset, end)
        elif mode == INSERT_RANGE:
            await _insert(vol, ip, offset, end)
        else:
            if mode & UNSHARE_RANGE:
                await _unshare(vol, ip, offset, min(end, ip.size))
            if mode & (PUNCH_HOLE | ZERO_RANGE):
                await _punch(vol, ip, offset, end)
            if not mode & PUNCH_HOLE:
                await _allocate(vol, ip, offset, end)
            if not mode & KEEP_SIZE and end > ip.size:
                await truncate.grow(vol, ip, end)
    vol.flusher.settle(ip.handle)


def _check(ip: Inode, offset: int, length: int, mode: int) -> None:
    """What can be said without the lock, in the order in which the kernel says it."""
    if offset < 0 or length <= 0:
        raise OSError(errno.EINVAL, "negative position or no length")
    if mode not in MODES:
        raise OSError(errno.EOPNOTSUPP, f"fallocate mode {mode:#x}")
    if not stat.S_ISREG(ip.mode):
        raise OSError(errno.EINVAL, "not a regular file")
    # A hole may reach to where no file does: nothing is there as it is.
    if offset + length > (POSITION_MAX if mode & PUNCH_HOLE else SIZE_MAX):
        raise OSError(errno.EFBIG, "file too large")


def _check_shift(vol: Volume, ip: Inode, offset: int, end: int, mode: int) -> None:
    """Collapsing and inserting: whole blocks, inside the file."""
    if (offset | end) & (vol.geo.block_size - 1):
        raise OSError(errno.EINVAL, "not a multiple of the block size")
    if mode == INSERT_RANGE and ip.size + end - offset > SIZE_MAX:
        raise OSError(errno.EFBIG, "file too large")
    if (end if mode == COLLAPSE_RANGE else offset) >= ip.size:
        raise OSError(errno.EINVAL, "the range reaches the end of the file")


# -- steps -------------------------------------------------------------------------------------


async def _allocate(vol: Volume, ip: Inode, offset: int, end: int) -> None:
    """Unwritten extents for all holes in the blocks of a range."""
    log = vol.geo.block_log
    at, last = offset >> log, ((end - 1) >> log) + 1
    await _keep_what_is_allocated(vol, ip)
    await truncate.write_out(vol, ip, at << log, last << log)
    while at < last:
        await trio.lowlevel.checkpoint()
        at = await prealloc.have(vol, ip, at, last)


async def _keep_what_is_allocated(vol: Volume, ip: Inode) -> None:
    """Mark the file as one whose blocks past the end are meant to be there."""
    if ip.flags & L.DIFLAG_PREALLOC:
        return
    async with vol.transaction("setattr") as tp:
        await tp.lock_inodes(ip)
        ip.flags |= L.DIFLAG_PREALLOC
        tp.log_inode(ip)


async def _punch(vol: Volume, ip: Inode, offset: int, end: int) -> None:
    """Have a range read as zeros: holes where it has whole blocks, else written."""
    log = vol.geo.block_log
    first, last = -(-offset >> log), end >> log
    stop = min(end, ip.size)
    head = min(first << log, stop)
    await truncate.zero_written(vol, ip, offset, head)
    await truncate.zero_written(vol, ip, max(last << log, head), stop)
    if first < last:
        with trio.CancelScope(shield=True):
            await truncate.drop_folios(vol, ip, first << log, last << log)
            size = ip.disk_size
            if size < ip.size <= last << log:
                # The write-back that would have moved the size on the device was dropped.
                await truncate.write_out(vol, ip, size, ip.size)
                size = ip.size
            await _unmap(vol, ip, first, last, size)


async def _unmap(vol: Volume, ip: Inode, first: int, last: int, size: int = 0) -> None:
    """Free the blocks of a range that nothing is cached of; data is stable up to `size`."""
    done = False
    while not done:
        await trio.lowlevel.cancel_shielded_checkpoint()
        async with vol.transaction("punch", prealloc.tree_blocks(vol), from_pool=True) as tp:
            await tp.lock_inodes(ip)
            ip.disk_size = max(ip.disk_size, size)
            done = await bmap.unmap(tp, ip, first, last - first)
            tp.log_inode(ip)
            prealloc.changed_map(tp, ip)


# -- shifting ----------------------------------------------------------------------------------


async def _collapse(vol: Volume, ip: Inode, offset: int, end: int) -> None:
    """Take whole blocks out of a file: what lies behind them moves down."""
    log = vol.geo.block_log
    with trio.CancelScope(shield=True):
        await truncate.write_out(vol, ip, 0, ip.size)
        await truncate.drop_folios(vol, ip, offset)
        await _unmap(vol, ip, offset >> log, end >> log)
        at: int | None = end >> log
        while at is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            async with vol.transaction("collapse", from_pool=True) as tp:
                await tp.lock_inodes(ip)
                at = await bmap.shift_left(tp, ip, at, (end - offset) >> log)
                prealloc.changed_map(tp, ip)
        ip.size -= end - offset
        await truncate.unmap(vol, ip, ip.size)


async def _insert(vol: Volume, ip: Inode, offset: int, end: int) -> None:
    """Make room for whole blocks inside a file: what lies behind `offset` moves up."""
    log = vol.geo.block_log
    start, by = offset >> log, (end - offset) >> log
    with trio.CancelScope(shield=True):
        await truncate.write_out(vol, ip, 0, ip.size)
        async with vol.transaction("insert", prealloc.tree_blocks(vol)) as tp:
            await tp.lock_inodes(ip)
            if (await bmap.last_offset(tp, ip) + by) << log > SIZE_MAX:
                raise OSError(errno.EINVAL, "preallocated blocks would move too far")
            await bmap.split(tp, ip, start)
            prealloc.changed_map(tp, ip)
        await truncate.grow(vol, ip, ip.size + end - offset)
        await truncate.drop_folios(vol, ip, offset)
        at: int | None = L.FILE_OFFSET_MAX
        while at is not None:
            await trio.lowlevel.cancel_shielded_checkpoint()
            async with vol.transaction("insert", from_pool=True) as tp:
                await tp.lock_inodes(ip)
                at = await bmap.shift_right(tp, ip, start, by, at)
                prealloc.changed_map(tp, ip)


# -- sharing -----------------------------------------------------------------------------------


async def _unshare(vol: Volume, ip: Inode, offset: int, end: int) -> None:
    """Give a file blocks of its own for those it shares: write-back copies what is dirty."""
    if not ip.flags2 & L.DIFLAG2_REFLINK:
        return
    log = vol.geo.block_log
    at, last = offset >> log, -(-end >> log)
    while at < last:
        stop = min(last, at + CLASSIFY_BLOCKS)
        for first, behind, kind in await buffered.classify(vol, ip, at, stop):
            if kind == buffered.SHARED:
                await _dirty(vol, ip, first << log, min(behind << log, ip.size))
        at = stop


async def _dirty(vol: Volume, ip: Inode, pos: int, end: int) -> None:
    """Write a range's own content over it."""
    while pos < end:
        n = min(COPY_BYTES, end - pos)
        data = np.frombuffer(await file.read_slowly(vol, ip, pos, n), np.uint8)
        done = 0
        while done < n:
            done += await buffered.write_step(vol, ip, pos + done, data, done, n - done)
        pos += n
