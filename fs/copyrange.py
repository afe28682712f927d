"""Copying a range of a file into a file: copy_file_range(2).

On an image with shared extents (XFS format: reflink) whole blocks are not copied: the destination
maps the source's blocks, whose reference counts go up. Where that cannot be (no such feature,
positions inside a block, no space for the trees) bytes go through the page cache, in steps.

Sharing holds the IOLOCKs of both files, the source's shared, in ascending ino, from the first
look at the sizes to the last transaction. Before it begins nothing is dirty in the source's range
and nothing at all in the destination: so each source block is settled, no promise of space can
become too small by the records that come in, and sizes may be logged. The destination's folios in
the range are dropped then; no one can make new ones without its IOLOCK.

Each transaction takes one extent of the source. It forgets that the source's cached blocks may be
overwritten in place (MAPPED): from now on a writer has to ask who else owns them. What the source
has not written becomes a hole. Steps of bytes lock both files each for itself.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import trio

from fs import delalloc, file, links, truncate
from fs.cache.blocks import MAPPED
from fs.xfs import ag, bmap, refcount, rmap, stamp
from fs.xfs import layout as L
from fs.xfs.owner import Owner
from writeback import errseq

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume

STEP_BYTES = 256 << 10  # copied with both files locked; memory outside the arena
EXTENT_BLOCKS = 1 << 16  # shared in one transaction, at most
CANNOT_SHARE = (errno.ENOSPC, errno.EFBIG)  # sharing needs room in trees; a copy may do without


async def copy(
    vol: Volume,
    src: Inode,
    src_pos: int,
    dst: Inode,
    dst_pos: int,
    length: int,
    *,
    kill_privileges: bool = False,
) -> int:
    """Copy up to `length` bytes; how many, fewer at the source's end or when space runs out.

    `kill_privileges`: the destination may not keep set-id bits and the kernel left them to us.
    Raises OSError: EINVAL (ranges of one file overlap; not regular files), EISDIR, EPERM, EFBIG,
    ENOSPC (nothing copied), EROFS, EIO; Corrupt, ShutDown.
    """
    vol.check_writable()
    _check_kinds(src, dst, src_pos, dst_pos, length)
    async with _locked(vol, src, dst):
        length = _clamp(src, src_pos, dst, dst_pos, length)
        if not length:
            return 0
        if kill_privileges:
            await file.remove_privileges(vol, dst)
        done = await _share(vol, src, src_pos, dst, dst_pos, length)
    try:
        while done < length:
            n = await _copy_step(vol, src, src_pos + done, dst, dst_pos + done, length - done)
            if not n:
                break
            done += n
    except OSError:
        if not done:
            raise
    return done


@asynccontextmanager
async def _locked(vol: Volume, src: Inode, dst: Inode) -> AsyncIterator[None]:
    """Both IOLOCKs in ascending ino: exclusive for what is written, shared for what is read."""
    async with AsyncExitStack() as stack:
        for ip in sorted({src, dst}, key=lambda ip: int(ip.ino)):
            await stack.enter_async_context(vol.iolock(ip, shared=ip != dst))
        yield


def _check_kinds(src: Inode, dst: Inode, src_pos: int, dst_pos: int, length: int) -> None:
    if stat.S_ISDIR(src.mode) or stat.S_ISDIR(dst.mode):
        raise IsADirectoryError(errno.EISDIR, "a directory is not copied")
    if not stat.S_ISREG(src.mode) or not stat.S_ISREG(dst.mode):
        raise OSError(errno.EINVAL, "only regular files are copied")
    if min(src_pos, dst_pos, length) < 0:
        raise OSError(errno.EINVAL, "negative position or length")
    if dst.flags & links.FIXED & L.DIFLAG_IMMUTABLE:
        raise PermissionError(errno.EPERM, f"inode {dst.ino} is immutable")


def _clamp(src: Inode, src_pos: int, dst: Inode, dst_pos: int, length: int) -> int:
    """The part of `length` that there is to copy. Raises OSError(EINVAL), OSError(EFBIG)."""
    length = max(min(length, src.size - src_pos), 0)
    if src == dst and src_pos < dst_pos + length and dst_pos < src_pos + length:
        raise OSError(errno.EINVAL, "the ranges overlap")
    if length and dst_pos >= truncate.SIZE_MAX:
        raise OSError(errno.EFBIG, "file too large")
    return min(length, truncate.SIZE_MAX - dst_pos)


# -- bytes -------------------------------------------------------------------------------------


async def _copy_step(
    vol: Volume, src: Inode, src_pos: int, dst: Inode, dst_pos: int, length: int
) -> int:
    """Copy some bytes through the page cache; 0 at the end of the source."""
    async with _locked(vol, src, dst):
        vol.check_writable()
        n = min(length, STEP_BYTES, src.size - src_pos)
        if n <= 0:
            return 0
        data = np.frombuffer(await file.read_slowly(vol, src, src_pos, n), np.uint8)
        if dst_pos > dst.size:
            await truncate.extend(vol, dst, dst_pos)
        return await file.write_held(vol, dst, dst_pos, data)


# -- sharing -----------------------------------------------------------------------------------


class Job(NamedTuple):
    """What is to be shared: `blocks` of a file from block `first` on, to block `target`."""

    vol: Volume
    src: Inode
    first: int
    dst: Inode
    target: int
    blocks: int
    size: int  # of the destination, at least, when all is done


def shareable(
    vol: Volume, src: Inode, src_pos: int, dst: Inode, dst_pos: int, length: int
) -> int:
    """How many bytes from the beginning of a range can be shared: whole blocks.

    The source's last block may be shared, whole or not, where it becomes the last one of the
    destination, too.
    """
    inside = vol.geo.block_size - 1
    realtime = (src.flags | dst.flags) & L.DIFLAG_REALTIME
    if not vol.geo.has_reflink or realtime or (src_pos | dst_pos) & inside:
        return 0
    if src_pos + length == src.size and dst_pos + length >= dst.size:
        return length
    return length & ~inside


async def _share(
    vol: Volume, src: Inode, src_pos: int, dst: Inode, dst_pos: int, length: int
) -> int:
    """Share what can be shared of a range; bytes. The IOLOCKs are held."""
    n = shareable(vol, src, src_pos, dst, dst_pos, length)
    if not n:
        return 0
    log = vol.geo.block_log
    blocks = -(-n // vol.geo.block_size)
    job = Job(vol, src, src_pos >> log, dst, dst_pos >> log, blocks, dst_pos + n)
    whole = src_pos == dst_pos == 0 and n >= max(src.size, dst.size)
    done = 0
    try:
        await _settle(job)
        while done < blocks:
            done += await _share_extent(job, done, whole)
            await trio.lowlevel.checkpoint()
    except OSError as error:
        if not done and error.errno not in CANNOT_SHARE:
            raise
    return min(done << log, n)


async def _settle(job: Job) -> None:
    """Write what must be on the device, and forget the range of the destination's folios."""
    vol, src, dst = job.vol, job.src, job.dst
    log = vol.geo.block_log
    start = job.target << log
    if start > dst.size:
        await truncate.extend(vol, dst, start)
    since = [int(vol.pages.state(ip.handle)["error"]) for ip in (src, dst)]
    await truncate.write_out(vol, src, job.first << log, (job.first + job.blocks) << log)
    await truncate.write_out(vol, dst, 0, truncate.SIZE_MAX)
    for ip, before in zip((src, dst), since, strict=True):
        failed = errseq.errno_since(int(vol.pages.state(ip.handle)["error"]), before)
        if failed:
            raise OSError(failed, f"write-back of inode {ip.ino} failed")
    await truncate.drop_folios(vol, dst, start, (job.target + job.blocks) << log)


async def _share_extent(job: Job, done: int, whole: bool) -> int:
    """One transaction: the extent, or hole, that follows `done` blocks; its length.

    0 if the destination had so many extents there that they take another transaction.
    """
    vol, src, dst = job.vol, job.src, job.dst
    first, target = job.first + done, job.target + done
    tree = delalloc.RECORDS_EACH * vol.pages.tree_levels + 1
    async with vol.transaction("reflink", tree) as tp:
        await tp.lock_inodes(src, dst)
        m = await _piece(tp, src, first, job.blocks - done)
        if m.fsbno != bmap.HOLE:
            await _check_room(tp, dst, m.fsbno)
            _mark_shared(tp, src, dst)
            _forget_mapped(vol, src, first, first + m.count)
        vacant = await bmap.unmap(tp, dst, target, m.count)
        if vacant and m.fsbno != bmap.HOLE:
            await refcount.increase(tp, m.fsbno, m.count)
            await rmap.map(tp, m.fsbno, m.count, Owner(dst.ino, target))
            await bmap.insert(tp, dst, bmap.Mapping(target, m.fsbno, m.count))
        if vacant:
            size = min((target + m.count) << vol.geo.block_log, job.size)
            dst.size, dst.disk_size = max(dst.size, size), max(dst.disk_size, size)
        if whole and src.flags2 & ~dst.flags2 & L.DIFLAG2_COWEXTSIZE:
            dst.flags2 |= L.DIFLAG2_COWEXTSIZE
            dst.cowextsize = src.cowextsize
        dst.mtime = dst.ctime = stamp.now()
        dst.changecount += 1
        tp.log_inode(dst)
        for ip in (src, dst):
            vol.pages.state(ip.handle)["map_seq"] += 1
    return m.count if vacant else 0


async def _piece(tp: Transaction, src: Inode, offset: int, count: int) -> bmap.Mapping:
    """What lies at a block of the source: a written extent, or a hole of at most `count`."""
    m = await bmap.lookup(tp, src, offset)
    if m is None or m.offset > offset:
        end = offset + count if m is None else min(m.offset, offset + count)
        return bmap.Mapping(offset, bmap.HOLE, end - offset)
    n = min(m.end - offset, count)
    if m.unwritten:
        return bmap.Mapping(offset, bmap.HOLE, n)
    return bmap.Mapping(offset, m.fsbno + offset - m.offset, min(n, EXTENT_BLOCKS))


async def _check_room(tp: Transaction, dst: Inode, fsbno: int) -> None:
    """Raises OSError, with nothing changed, if a tree may not take what sharing adds to it."""
    vol = tp.vol
    if dst.nextents + 2 > bmap.extents_max(dst, bmap.DATA) and not vol.geo.has_nrext64:
        raise OSError(errno.EFBIG, "too many extents")
    agno = vol.geo.agno_of(fsbno)
    await tp.lock_space()
    await ag.read_agf(tp, agno)
    needed = 2 * vol.ags.limits.refcount_levels + vol.ags.need[agno]
    if vol.ags.usable_by_trees[agno] < needed:
        raise OSError(errno.ENOSPC, f"AG {agno} has no room for its trees")


def _mark_shared(tp: Transaction, *inodes: Inode) -> None:
    """These files may share blocks from now on."""
    for ip in inodes:
        if not ip.flags2 & L.DIFLAG2_REFLINK:
            ip.flags2 |= L.DIFLAG2_REFLINK
            tp.log_inode(ip)


def _forget_mapped(vol: Volume, ip: Inode, first: int, last: int) -> None:
    """Cached blocks [first, last) must not be overwritten in place without a look at the map."""
    pages, log = vol.pages, vol.geo.block_log
    page, last_page = first << log >> 12, ((last << log) - 1) >> 12
    while pfn := pages.next(ip.handle, page, last_page):
        base, end = pages.base(pfn) >> log, pages.end(pfn) >> log
        pages.change(pfn, max(first, base), min(last, end), 0, MAPPED)
        page = pages.end(pfn) >> 12
