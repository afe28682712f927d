"""Reading and writing regular files through the page cache.

Reads hold the inode's IOLOCK shared, writes and truncations exclusively, so a write is atomic for
readers. The fast path is one kernel that copies between the caller and folios which are ready; it
awaits nothing. What is not ready goes the slow way and then comes back to the same kernel: a
reader has folios filled (`readahead.fill`), a writer has one made ready at a time (`buffered`).

Sizes and time stamps change in memory at once; the flusher logs them. Positions and lengths are
bytes.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import numpy as np

from alloc.policy import AllocationFailed
from fs import buffered, delalloc, enomem
from fs.cache import blocks, readahead
from fs.truncate import SIZE_MAX, discard, extend, truncate
from fs.xfs import stamp
from writeback.flusher import ALL_PAGES
from writeback.mapping import INODE_DIRTY

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

__all__ = ["discard", "fsync", "read", "stat_blocks", "truncate", "write"]

S_ISUID, S_ISGID, S_IXGRP = 0o4000, 0o2000, 0o010

Buffer = bytes | bytearray | memoryview


# -- reading -----------------------------------------------------------------------------------


async def read(vol: Volume, ip: Inode, offset: int, size: int) -> bytes | bytearray:
    """Up to `size` bytes at `offset`; fewer only at the end of the file.

    The result is a copy, taken under the IOLOCK: no lane writes into it afterwards. Raises
    OSError(EINVAL, EIO), Corrupt, ShutDown.
    """
    vol.check_alive()
    if offset < 0 or size < 0:
        raise OSError(errno.EINVAL, "negative position or length")
    locks, handle = vol.iolocks, ip.handle
    if not locks.acquire_now(handle, True):
        await locks.acquire(handle, True)
    try:
        length = min(size, ip.size - offset)
        if length <= 0:
            return b""
        pages = vol.pages
        p, hint = pages.pages, pages.hint
        folios = (p.flags, p.order, p.index, p.blocks, pages.root(handle), pages.block_log)
        addr = int(blocks.locate(pages.m4, *folios, offset, length, hint))
        if addr >= 0:
            pages.note_used(handle, offset, length)
            _note_marker(vol, ip, length)
            return bytes(pages.view[addr : addr + length])
        return await read_slowly(vol, ip, offset, length)
    finally:
        locks.release(handle)


def _note_marker(vol: Volume, ip: Inode, length: int) -> None:
    """A kernel has copied for a reader of `length` bytes: he may have met readahead's marker."""
    pfn = int(vol.pages.hint[2])
    if pfn:
        vol.ahead.hit(ip, int(vol.arena.pages.index[pfn]), (length + 4095) >> 12)


async def read_slowly(vol: Volume, ip: Inode, offset: int, length: int) -> bytearray:
    """A copy of a range that spans folios, or is not cached."""
    pages = vol.pages
    result = bytearray(length)
    target = np.frombuffer(result, np.uint8)
    p = pages.pages
    folios = (p.flags, p.order, p.index, p.blocks, pages.root(ip.handle), pages.block_log)
    at, end = offset, offset + length
    while True:
        args = (at, target, at - offset, end - at, pages.hint)
        copied = int(blocks.copy_out(pages.m4, vol.arena.mem, *folios, *args))
        pages.note_used(ip.handle, at, copied)
        _note_marker(vol, ip, end - at)
        at += copied
        if at == end:
            return result
        at = min(await readahead.fill(vol, ip, at, end), end)
        vol.check_alive()


# -- writing -----------------------------------------------------------------------------------


async def write(
    vol: Volume, ip: Inode, offset: int, data: Buffer, *, kill_privileges: bool = False
) -> int:
    """Write at `offset`; bytes written, fewer than given when space ran out on the way.

    `kill_privileges`: the writer may not keep set-id bits and the kernel left them to us. Raises
    OSError: EFBIG, ENOSPC (nothing written), EROFS, EIO; Corrupt, ShutDown.
    """
    vol.check_writable()
    source = np.frombuffer(memoryview(data).toreadonly(), np.uint8)
    if offset < 0:
        raise OSError(errno.EINVAL, "negative position")
    if not source.size:
        return 0
    if offset >= SIZE_MAX:
        raise OSError(errno.EFBIG, "file too large")
    locks, handle = vol.iolocks, ip.handle
    if not locks.acquire_now(handle, False):
        await locks.acquire(handle, False)
    try:
        if offset > ip.size:
            await extend(vol, ip, offset)
        if kill_privileges and ip.mode & (S_ISUID | S_ISGID):
            await remove_privileges(vol, ip)
        return await write_held(vol, ip, offset, source[: SIZE_MAX - offset])
    finally:
        locks.release(handle)


async def write_held(vol: Volume, ip: Inode, offset: int, source: Any) -> int:
    """Write as much as can be; raises what stopped it only if nothing was written.

    The caller holds the IOLOCK exclusively and had the file extended up to `offset`.
    """
    done = 0
    length = source.size
    try:
        while done < length:
            pos = offset + done
            done += await buffered.write_step(vol, ip, pos, source, done, length - done)
            if offset + done > ip.size:
                ip.size = offset + done
    except (OSError, AllocationFailed) as error:
        if not done:
            raise
        enomem.told_less(vol, error)
    finally:
        if done:
            changed(vol, ip)
    return done


def changed(vol: Volume, ip: Inode) -> None:
    """Stamps of a write: in memory now, logged by the flusher."""
    vol.pages.note_write(ip, stamp.now())


def unprivileged(mode: int) -> int:
    """A mode without set-user-id, and without set-group-id where that means execution."""
    mode &= ~S_ISUID
    return mode & ~S_ISGID if mode & S_IXGRP else mode


async def remove_privileges(vol: Volume, ip: Inode) -> None:
    """Take set-id bits from a file that is written."""
    async with vol.transaction("remove privileges") as tp:
        await tp.lock_inodes(ip)
        mode = unprivileged(ip.mode)
        if mode != ip.mode:
            ip.mode = mode
            ip.ctime = stamp.now()
            tp.log_inode(ip)


# -- the rest ----------------------------------------------------------------------------------


async def fsync(vol: Volume, ip: Inode, datasync: bool = False, fh: int = 0) -> None:
    """Data, inode and whatever metadata leads to them are on stable storage when this returns.

    fh: the open file on whose behalf. Raises the error of a write-back that failed, which this open
    file was not told yet; OSError(EIO) after a shutdown.
    """
    vol.check_alive()
    if vol.read_only:
        return
    state = vol.pages.state(ip.handle)
    await vol.pages.write_range(ip.handle, 0, ALL_PAGES, integrity=True, budget=ALL_PAGES)
    if state["flags"] & INODE_DIRTY:
        await vol.pages.write_object(ip.handle)
    vol.flusher.settle(ip.handle)
    if not await vol.xlog.force_inode(ip):
        await vol.dev.flush()  # nothing but data was written
    error, state["error"] = vol.told.tell(fh, int(state["error"]))
    if error:
        raise OSError(error, "write-back of the file failed earlier")


def stat_blocks(vol: Volume, ip: Inode) -> int:
    """st_blocks: 512-byte units, delayed blocks included."""
    return (ip.nblocks + delalloc.promised_blocks(vol, ip)) * vol.geo.block_bbs
