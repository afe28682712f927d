"""Writing a file's dirty folios to the device: the filesystem's side of write-back.

Each batch (an ioend) goes through four steps. *Gather* moves dirty folios to write-back, before
anything is awaited. *Map* finds the blocks of every dirty run: delayed ones get an extent, as
unwritten, in one transaction each; shared ones get new blocks beside the old. *Submit* writes
from the folios. *Complete* converts what was unwritten, puts copies in the place of shared
blocks, moves the on-disk size, and ends write-back of the folios. So the image never has a size or
a written extent over data that is not on the device. The size that a completion may log was taken
with the content, under the mapping's lock; what a writer adds meanwhile is dirty again, and the
completion of that write will move the size.

No IOLOCK is taken here: writers and truncation wait for write-back, never the reverse. ILOCKs are
taken by the transactions. A failure is kept in the mapping until an fsync tells it; the folios
are clean afterwards, as on Linux; where only memory was lacking they are dirty again.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from typing import TYPE_CHECKING, NamedTuple

import trio

from alloc import gfp, lockdep
from alloc.page import WRITEBACK
from alloc.policy import AllocationFailed
from fs import delalloc, enomem, mapread
from fs.cache import radix
from fs.cache.blocks import MAPPED, RESERVED
from fs.cache.inode import Inode
from fs.cache.lock import FOLIO_WRITEBACK
from fs.xfs import bmap, freespace, refcount, rmap
from fs.xfs import layout as L
from fs.xfs.owner import Owner
from writeback import errseq
from writeback.ioend import Ioend
from writeback.mapping import INODE_DIRTY

if TYPE_CHECKING:
    from fs.log.transaction import Transaction
    from fs.volume import Volume

IN_PLACE, CONVERT, COPY = 0, 1, 2
EDITS_MAX = 32  # changes of the extent map in one completing transaction
RUNS_AT_ONCE = 64  # runs of blocks looked up between two turns of the other tasks
CLOSE_BLOCKS = 4096  # runs that span no more are looked up together


class Segment(NamedTuple):
    """File blocks that go to consecutive blocks of the device, and what follows the write."""

    offset: int
    fsbno: int
    count: int  # type: ignore[assignment]
    then: int  # IN_PLACE, CONVERT, COPY


async def write_range(
    vol: Volume, handle: int, start: int, end: int, *, integrity: bool, budget: int
) -> int:
    """See `writeback.mapping.Mappings.write_range`; pages are indices in the file."""
    pages = vol.pages
    ip = Inode(vol.inodes, handle)
    submitted = 0
    kept: list[int] = []
    pages.may_wait(WRITEBACK)  # for an ioend, too
    state, tag = pages.state(handle), radix.DIRTY
    if integrity:
        pages.tag_towrite(handle, start, end)
        tag = radix.TOWRITE
    else:
        start = max(start, int(state["writeback_index"]))
    with trio.CancelScope(shield=True), gfp.memalloc(), gfp.nofs():
        async with trio.open_nursery() as nursery:
            index = start
            while submitted < budget and index <= end and pages.next(handle, index, end, tag):
                ioend = await pages.ioends.get()
                busy = pages.gather(ioend, handle, index, end, tag, integrity)
                if not ioend.nr_folios:
                    pages.ioends.put(ioend)
                    if not busy:
                        break
                    await pages.wait(busy, WRITEBACK)
                    continue
                index = ioend.next_index
                submitted += ioend.nr_pages
                try:
                    with lockdep.holding(FOLIO_WRITEBACK):
                        segments = await _map(vol, ip, ioend)
                except BaseException:
                    _end(vol, ip, ioend)
                    raise
                nursery.start_soon(_write_and_complete, vol, ip, ioend, segments, kept)
        if integrity:
            await _wait_written(vol, handle, start, end)
        else:
            more = index <= end and pages.next(handle, index, end, tag)
            state["writeback_index"] = index if more else 0
    return submitted - sum(kept)


async def _wait_written(vol: Volume, handle: int, start: int, end: int) -> None:
    """Wait for every folio under write-back in a range, once."""
    pages = vol.pages
    while start <= end:
        pfn = pages.next(handle, start, end, radix.WRITEBACK)
        if not pfn:
            break
        following = pages.end(pfn) >> 12
        await pages.wait(pfn, WRITEBACK)
        start = following


# -- mapping -----------------------------------------------------------------------------------


async def _map(vol: Volume, ip: Inode, ioend: Ioend) -> list[Segment]:
    """Blocks for every dirty run of an ioend; on an error none, and the ioend carries it."""
    segments: list[Segment] = []
    try:
        vol.check_writable()
        runs = ioend.ranges()
        for at in range(0, len(runs), RUNS_AT_ONCE):
            for m in await _lookup(vol, ip, runs[at : at + RUNS_AT_ONCE]):
                if m.fsbno == bmap.HOLE:
                    segments += await _allocate(vol, ip, m.offset, m.count)
                elif m.unwritten:
                    segments.append(Segment(m.offset, m.fsbno, m.count, CONVERT))
                elif ip.flags2 & L.DIFLAG2_REFLINK:
                    segments += await _unshare(vol, ip, m)
                else:
                    segments.append(Segment(m.offset, m.fsbno, m.count, IN_PLACE))
    except (OSError, AllocationFailed) as error:
        _fail(vol, ip, ioend, error)
        await _abandon_copies(vol, ip, segments)
        return []
    return segments


async def _lookup(vol: Volume, ip: Inode, runs: list[tuple[int, int]]) -> list[bmap.Mapping]:
    """What the extent map says about some runs of blocks, in order.

    Runs that lie close together are looked up in one walk.
    """
    first, last = runs[0][0], sum(runs[-1])
    if last - first <= CLOSE_BLOCKS:
        found = await mapread.read(vol, ip, first, last - first)
        return [part for run in runs for part in _cut(found, *run)]
    async with vol.reader(ip) as tp:
        return [m for run in runs for m in await bmap.read(tp, ip, *run)]


def _cut(found: list[bmap.Mapping], offset: int, count: int) -> list[bmap.Mapping]:
    """The parts of contiguous mappings that lie in a run."""
    parts = []
    at = bisect_right(found, offset, key=lambda m: m.offset) - 1
    while at < len(found) and found[at].offset < offset + count:
        m = found[at]
        a, b = max(m.offset, offset), min(m.end, offset + count)
        fsbno = m.fsbno if m.fsbno == bmap.HOLE else m.fsbno + a - m.offset
        parts.append(bmap.Mapping(a, fsbno, b - a, m.unwritten))
        at += 1
    return parts


def _fail(vol: Volume, ip: Inode, ioend: Ioend, error: OSError | AllocationFailed) -> None:
    """Remember why an ioend's data did not reach the device."""
    if isinstance(error, AllocationFailed):
        vol.failures.note(enomem.WRITEBACK, error)
        ioend.error = errno.EIO if vol.shut_down else enomem.ERRNO
    else:
        ioend.error = error.errno or errno.EIO
    state = vol.pages.state(ip.handle)
    state["error"] = errseq.failed(int(state["error"]), ioend.error)
    vol.wb_error = errseq.failed(vol.wb_error, ioend.error)
    if ioend.error == enomem.ERRNO:
        return
    vol.pages.lost_pages += ioend.nr_pages
    if not vol.shut_down:
        vol.log.error("inode %d: write-back failed, data is lost: %s", ip.ino, error)


async def _allocate(vol: Volume, ip: Inode, offset: int, count: int) -> list[Segment]:
    """Extents for delayed blocks, as large as the free space has them.

    Somebody who wrote what lies before them may have allocated them in the meantime.
    """
    pages = vol.pages
    segments = []
    while count:
        await trio.lowlevel.checkpoint()  # thousands of extents must not keep the others waiting
        async with vol.transaction("writeback allocation") as tp:
            await tp.lock_inodes(ip)
            there = await bmap.lookup(tp, ip, offset)
            if there is not None and there.offset <= offset:
                got = min(there.end - offset, count)
                fsbno = there.fsbno + offset - there.offset
                segments.append(Segment(offset, fsbno, got, CONVERT))
                offset, count = offset + got, count - got
                continue
            promised = pages.change_range(ip.handle, offset, offset + count, count=RESERVED)
            tree = delalloc.take(tp, ip, count, promised, 1)
            used = 0
            try:
                more = await vol.eofblocks.add(tp, ip, offset, offset + count)
                new = await bmap.alloc(tp, ip, offset, count + more, unwritten=True)
                got = min(new.count, count)
                used = pages.change_range(
                    ip.handle, offset, offset + got, remove=RESERVED, count=RESERVED
                )
            finally:
                delalloc.give_back(tp, ip, promised - used, tree)
            pages.state(ip.handle)["map_seq"] += 1
        segments.append(Segment(offset, new.fsbno, got, CONVERT))
        offset += got
        count -= got
    return segments


async def _unshare(vol: Volume, ip: Inode, m: bmap.Mapping) -> list[Segment]:
    """A written extent of a file that may share blocks: copies for what is shared."""
    segments = []
    offset, fsbno, count = m.offset, m.fsbno, m.count
    while count:
        async with vol.reader(ip) as tp:
            shared = await refcount.find_shared(tp, fsbno, count)
        own = count if shared is None else shared[0] - fsbno
        if own:
            segments.append(Segment(offset, fsbno, own, IN_PLACE))
        if shared is not None:
            segments += await _copy_blocks(vol, ip, offset + own, shared[0], shared[1])
        done = own + (shared[1] if shared is not None else 0)
        offset, fsbno, count = offset + done, fsbno + done, count - done
    return segments


async def _copy_blocks(
    vol: Volume, ip: Inode, offset: int, near: int, count: int
) -> list[Segment]:
    """New blocks that will take the place of shared ones when their data is written.

    Until then the log says that they are staged: after a crash recovery frees them.
    """
    pages = vol.pages
    segments = []
    while count:
        await trio.lowlevel.checkpoint()  # thousands of extents must not keep the others waiting
        promised = pages.change_range(ip.handle, offset, offset + count, count=RESERVED)
        async with vol.transaction("copy on write") as tp:
            await tp.lock_inodes(ip)
            delalloc.take(tp, ip, count, promised, 0)
            used = 0
            try:
                fsbno, got = await freespace.alloc(
                    tp, near=near, minlen=1, maxlen=count, owner=Owner(rmap.OWN_COW)
                )
                await refcount.stage(tp, fsbno, got)
                used = pages.change_range(
                    ip.handle, offset, offset + got, remove=RESERVED, count=RESERVED
                )
            finally:
                delalloc.give_back(tp, ip, promised - used, 0)
        segments.append(Segment(offset, fsbno, got, COPY))
        offset, count = offset + got, count - got
    return segments


# -- writing and completing --------------------------------------------------------------------


async def _write_and_complete(
    vol: Volume, ip: Inode, ioend: Ioend, segments: list[Segment], kept: list[int]
) -> None:
    """Steps 3 and 4; pages that stay dirty are put into `kept`."""
    try:
        with lockdep.holding(FOLIO_WRITEBACK):
            await _submit(vol, ip, segments)
            if segments:
                await _complete(vol, ip, ioend, segments)
    except (OSError, AllocationFailed) as error:
        _fail(vol, ip, ioend, error)
        await _abandon_copies(vol, ip, segments)
    finally:
        if ioend.error == enomem.ERRNO:
            kept.append(ioend.nr_pages)
        _end(vol, ip, ioend)


def _end(vol: Volume, ip: Inode, ioend: Ioend) -> None:
    """Whatever happened, waiters for these folios are woken."""
    if ioend.error == enomem.ERRNO:
        _redirty(vol, ip, ioend)
    else:
        _settle(vol, ip, ioend)
    vol.pages.finish(ioend)
    vol.pages.ioends.put(ioend)
    vol.arena.kick()


async def _submit(vol: Volume, ip: Inode, segments: list[Segment]) -> None:
    """Write the segments, those that continue each other on the device in one go."""
    log = vol.geo.block_log
    at = 0
    while at < len(segments):
        first = segments[at]
        views = vol.pages.memory(
            ip.handle, first.offset << log, first.offset + first.count << log
        )
        end = first.fsbno + first.count
        at += 1
        while at < len(segments) and segments[at].fsbno == end:
            s = segments[at]
            views += vol.pages.memory(ip.handle, s.offset << log, s.offset + s.count << log)
            end += s.count
            at += 1
        await vol.xlog.wait_freed(first.fsbno, end - first.fsbno)
        await vol.dev.write(vol.geo.fsb_to_bytes(first.fsbno), views)


async def _complete(vol: Volume, ip: Inode, ioend: Ioend, segments: list[Segment]) -> None:
    """The data is on the device: make the extent map and the size say so.

    On an error `segments` has those whose change of the map was not made.
    """
    segments[:] = [s for s in segments if s.then != IN_PLACE]
    last, count = ioend.ranges()[-1]
    size = min(ioend.size, last + count << vol.geo.block_log)
    while segments:
        await _edit_map(vol, ip, segments, size)
    if min(size, ip.size) > ip.disk_size:
        await _edit_map(vol, ip, segments, size)


async def _edit_map(vol: Volume, ip: Inode, edits: list[Segment], size: int) -> None:
    """One completing transaction, which takes the edits that it made off the list.

    With the last of them the on-disk size follows.
    """
    await trio.lowlevel.checkpoint()
    state = vol.pages.state(ip.handle)
    async with vol.transaction("ioend") as tp:
        await tp.lock_inodes(ip)
        turns, done = min(len(edits), EDITS_MAX), 0
        tree = delalloc.take(tp, ip, 0, 0, turns)
        try:
            for s in edits[:turns]:
                if done and not tp.has_room:
                    break
                done += 1
                if s.then == CONVERT:
                    await bmap.convert(tp, ip, s.offset, s.count)
                else:
                    await _map_copy(tp, ip, s)
        finally:
            delalloc.give_back(tp, ip, 0, tree)
        if done == len(edits):
            ip.disk_size = max(ip.disk_size, min(size, ip.size))
        state["map_seq"] += 1
        tp.log_inode(ip)
    del edits[:done]


async def _map_copy(tp: Transaction, ip: Inode, s: Segment) -> None:
    """Staged blocks take the place of shared ones."""
    await refcount.unstage(tp, s.fsbno, s.count)
    await rmap.unmap(tp, s.fsbno, s.count, Owner(rmap.OWN_COW))
    await bmap.remap(tp, ip, bmap.Mapping(s.offset, s.fsbno, s.count))
    await rmap.map(tp, s.fsbno, s.count, Owner(ip.ino, s.offset))


async def _abandon_copies(vol: Volume, ip: Inode, segments: list[Segment]) -> None:
    """The write failed: blocks that were to replace shared ones go back."""
    copies = [s for s in segments if s.then == COPY]
    if not copies or vol.shut_down:
        return

    async def free() -> None:
        while copies:
            done = 0
            async with vol.transaction("copy on write, cancelled") as tp:
                while done < len(copies) and (not done or tp.has_room):
                    s = copies[done]
                    await refcount.unstage(tp, s.fsbno, s.count)
                    await freespace.free(tp, s.fsbno, s.count, Owner(rmap.OWN_COW))
                    done += 1
            del copies[:done]

    try:
        await enomem.insist(vol, free, "blocks of a failed copy are lost")
    except OSError as error:
        vol.log.error("inode %d: blocks of a failed copy are lost: %s", ip.ino, error)


def _redirty(vol: Volume, ip: Inode, ioend: Ioend) -> None:
    """The folios were not written and will be: blocks keep what they were promised."""
    pages, log = vol.pages, vol.geo.block_log
    for first, count in ioend.ranges():
        at, end = first, first + count
        while at < end:
            pfn = pages.find(ip.handle, at << log >> 12)
            stop = min(end, pages.end(pfn) >> log)
            pages.redirty(ip.handle, pfn, at, stop)
            at = stop


def _settle(vol: Volume, ip: Inode, ioend: Ioend) -> None:
    """Bits and promises of the blocks that were written (or have failed)."""
    mapped = 0 if ioend.error or ip.flags2 & L.DIFLAG2_REFLINK else MAPPED
    delalloc.settle(vol, ip, ioend.runs, ioend.nr_runs, mapped)


async def log_core(vol: Volume, handle: int) -> None:
    """Log an inode whose core changed in memory only (time stamps of writes).

    The transaction clears the flag first: a lane that changes the core while it is copied sets it
    again.
    """
    ip = Inode(vol.inodes, handle)
    if not ip.mode or vol.shut_down:
        vol.pages.change_flags(handle, remove=INODE_DIRTY)
        return
    async with vol.transaction("time stamps") as tp:
        await tp.lock_inodes(ip)
        if ip.mode:
            tp.log_inode(ip)
