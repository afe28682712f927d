"""Blocks past the end of a file that grows, so that it stays in few pieces: speculative ones.

When write-back gives a file blocks it takes more than the data need: what is dirty right behind,
and, if that reaches the end of a file that is open for writing, as much again as the file has in
one piece there (`speculative`, XFS's rule), less when the filesystem is nearly full. What the data
do not need is unwritten, so it reads as nothing, and the next data that are appended find it. Files
with an extent size hint get theirs when they are written (fs/prealloc.py), and no others.

Who closes a file as its last writer has what lies past its end freed by a task of its own, but only
the first time since the file was last made smaller (XFS's rule): files that are written once lie
next to each other, and one that is opened again and again to be appended to keeps blocks to go on
with. Those go when a look, every LIFETIME_S, finds the file clean; when more than KEPT_MOST closed
files have some; when space runs out, of all files that nobody is busy with; and at the end of the
mount. Files for which fallocate made blocks keep them, and append-only ones.

Invariant: what may have speculative blocks is in `_kept`, or held to be freed, and stays in core
(S_EOFBLOCKS). Trio thread only. The task takes the IOLOCK and a transaction, as truncation does;
who is short of space holds his own IOLOCK perhaps, so others' are only tried.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import trio

from fs import enomem
from fs.cache.incore import S_EOFBLOCKS, S_RELEASED, S_REOPENED
from fs.cache.inode import Inode
from fs.cache.lock import Mutex
from fs.xfs import bmap
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.log.transaction import Transaction
    from fs.volume import Volume

ALLOC_BYTES = 64 << 10  # the least, for files that are as large at least
LOOK_AHEAD = 16384  # blocks behind a run that are looked at
KEEPS = L.DIFLAG_PREALLOC | L.DIFLAG_APPEND
EXTENTS_MOST = 10  # how far back a file's last piece is followed
LIFETIME_S = 300.0  # fs.xfs.speculative_prealloc_lifetime
KEPT_MOST = 256  # files that nobody has open for writing; they cannot leave core


def speculative(piece: int, offset: int, free: int, dblocks: int, least: int) -> int:
    """Blocks to add to a file whose last piece has so many; 0 when space is short.

    XFS's rule: as many again, or as the file's offset when the piece is half of the longest extent
    or more; a quarter of that with less than 5 % free, and half of it for each further percent
    less; a power of two; never more than is free, and `least` at least. All in blocks.
    """
    wanted = piece * 2
    if wanted > L.BMBT_LEN_MAX:
        wanted = offset
    wanted = min(wanted, 1 << L.BMBT_LEN_MAX.bit_length())
    if free < dblocks * 5 // 100:
        wanted >>= 2 + sum(free < dblocks * percent // 100 for percent in (1, 2, 3, 4))
    wanted = min(1 << wanted.bit_length() - 1 if wanted else 0, L.BMBT_LEN_MAX)
    while wanted and wanted >= free:
        wanted >>= 4
    return max(wanted, least)


class EofBlocks:
    """The speculative blocks of one volume."""

    def __init__(self, vol: Volume) -> None:
        self._vol = vol
        self._writers = vol.inodes.fields["writers"]  # open files that write, by inode
        self._closed: deque[Inode] = deque()  # held
        self._kept: dict[int, None] = {}  # handles, longest first
        self._draining = Mutex("eofblocks")
        self._wake = trio.Event()
        self._due = math.inf  # when the next look at what is kept is
        self.lifetime_s = LIFETIME_S

    # -- who has a file open --------------------------------------------------------------------

    def opened(self, ip: Inode) -> None:
        """Somebody opened a file for writing."""
        self._writers[ip.handle] += 1
        if ip.state & S_RELEASED:
            ip.state |= S_REOPENED

    def closed(self, ip: Inode) -> None:
        """And has closed it; he still holds a reference."""
        handle = ip.handle
        self._writers[handle] -= 1
        if self._writers[handle] or ip.state & S_RELEASED or not ip.nlink or ip.flags & KEEPS:
            return
        delayed = self._vol.pages.state(handle)["delalloc"]
        if handle in self._kept:
            self._give_up(handle)
        elif not delayed or ip.size <= ALLOC_BYTES:  # it would not have got any
            return
        ip.state |= S_RELEASED

    def forget(self, handle: int) -> None:
        """An inode's record goes, for the inode is free."""
        self._kept.pop(handle, None)

    # -- what is kept ---------------------------------------------------------------------------

    def _keep(self, ip: Inode) -> None:
        """A file gets blocks that it may not need."""
        ip.state |= S_EOFBLOCKS
        self._kept.setdefault(ip.handle)
        if len(self._kept) > KEPT_MOST:
            oldest = next(filter(self._is_idle, self._kept), 0)
            if oldest:
                self._give_up(oldest)
        if self._due == math.inf:
            self.set_lifetime(self.lifetime_s)

    def _is_idle(self, handle: int) -> bool:
        """Whether a file is closed, and there: a free inode may be about to leave core."""
        return not self._writers[handle] and bool(self._vol.inodes.fields["nlink"][handle])

    def _give_up(self, handle: int) -> None:
        """Have the task free what a file has."""
        del self._kept[handle]
        self._closed.append(self._vol.inodes.hold(handle))
        self._wake.set()

    def set_lifetime(self, seconds: float) -> None:
        """The next look at what is kept is so much later, and so are those that follow."""
        self.lifetime_s = seconds
        self._due = trio.current_time() + seconds
        self._wake.set()

    # -- blocks ---------------------------------------------------------------------------------

    async def add(self, tp: Transaction, ip: Inode, first: int, end: int) -> int:
        """Bring blocks into a transaction to go on with behind `end`; how many.

        [first, end) is about to be allocated. The caller holds the ILOCK.
        """
        wanted = await self._wanted(tp, ip, first, end)
        while wanted > 0:
            try:
                self._vol.space.reserve(wanted)
            except OSError:
                wanted >>= 2  # it can be done without
                continue
            tp.blocks += wanted
            self.note(ip)
            break
        return max(wanted, 0)

    def note(self, ip: Inode) -> None:
        """A file is given blocks that may lie past its end."""
        if self._grows(ip):
            self._keep(ip)

    def _grows(self, ip: Inode) -> bool:
        """Whether somebody will perhaps append to a file: who has it open, or opened it again."""
        writes = self._writers[ip.handle] or ip.state & S_REOPENED
        return bool(writes and not ip.flags & KEEPS)

    async def _wanted(self, tp: Transaction, ip: Inode, first: int, end: int) -> int:
        vol = self._vol
        dirty_end = vol.pages.reserved_until(ip.handle, end, end + LOOK_AHEAD)
        size = ip.size
        if not self._grows(ip) or size < ALLOC_BYTES or dirty_end << vol.geo.block_log < size:
            return dirty_end - end
        piece = dirty_end - first + await self._piece_before(tp, ip, first)
        least = max(ALLOC_BYTES >> vol.geo.block_log, 1)
        free = vol.space.available
        return dirty_end - end + speculative(piece, first, free, vol.geo.dblocks, least)

    async def _piece_before(self, tp: Transaction, ip: Inode, offset: int) -> int:
        """Blocks in one piece on the device that end at a file offset."""
        start, begins = offset, None
        for _ in range(EXTENTS_MOST):
            m = await bmap.lookup(tp, ip, start - 1) if start else None
            if m is None or m.fsbno == bmap.HOLE or not m.offset < start <= m.end:
                break
            if begins is not None and m.fsbno + m.count != begins:
                break
            start, begins = m.offset, m.fsbno
        return offset - start

    # -- freeing --------------------------------------------------------------------------------

    async def run(self) -> None:
        """The task; runs until cancelled."""
        while True:
            with trio.move_on_at(self._due):
                await self._wake.wait()
            self._wake = trio.Event()
            await self.drain()
            if trio.current_time() >= self._due:
                await self._look()

    async def drain(self) -> None:
        """Free what files have that were given up; also what the task is at."""
        async with self._draining:
            while self._closed:
                ip = self._closed.popleft()
                try:
                    async with self._vol.iolock(ip):
                        if self._writers[ip.handle]:
                            self._kept.setdefault(ip.handle)
                        elif not await self._free(ip):
                            ip.state &= ~S_RELEASED
                finally:
                    self._vol.inodes.put(ip)

    async def _look(self) -> None:
        """Free what clean files have, open or not, that nobody is busy with."""
        for handle in list(self._kept):
            state = self._vol.pages.state(handle)
            if handle in self._kept and not state["ndirty"] and not state["nrwriteback"]:
                await self._try_to_free(handle)
        self._due = trio.current_time() + self.lifetime_s if self._kept else math.inf

    async def squeeze(self) -> bool:
        """Space has run out: free what nobody is busy with; whether there was any."""
        before = self._vol.space.available
        for handle in [*(ip.handle for ip in self._closed), *self._kept]:
            await self._try_to_free(handle)
        return self._vol.space.available > before

    async def _try_to_free(self, handle: int) -> None:
        """Free what a file has if its IOLOCK is to be had."""
        if not self._vol.iolocks.try_acquire(handle, False):
            return
        ip = self._vol.inodes.hold(handle)
        try:
            await self._free(ip)
        finally:
            self._vol.iolocks.release(handle)
            self._vol.inodes.put(ip)

    async def _free(self, ip: Inode) -> bool:
        """Free what a file has past its end; whether it had any. IOLOCKed exclusively."""
        vol, before = self._vol, ip.nblocks
        self._kept.pop(ip.handle, None)
        ip.state &= ~S_EOFBLOCKS
        if vol.shut_down or not ip.nlink or ip.flags & KEEPS or vol.freezer.level:
            return False  # an unlinked file is freed as a whole

        async def free() -> None:
            await free_past_end(vol, ip)

        with trio.CancelScope(shield=True):
            try:
                await enomem.insist(vol, free, f"inode {ip.ino} keeps blocks past its end")
            except OSError as error:
                if not vol.shut_down:
                    vol.log.error("inode %d keeps blocks past its end: %s", ip.ino, error)
        return ip.nblocks < before


async def free_past_end(vol: Volume, ip: Inode) -> None:
    """Unmap all blocks behind a file's size, which stays as it is. IOLOCKed exclusively."""
    start = -(-ip.size // vol.geo.block_size)
    async with vol.reader(ip) as tp:
        done = await bmap.lookup(tp, ip, start) is None
    while not done:
        await trio.lowlevel.cancel_shielded_checkpoint()
        async with vol.transaction("free eofblocks", from_pool=True) as tp:
            await tp.lock_inodes(ip)
            done = await bmap.unmap(tp, ip, start, L.FILE_OFFSET_MAX - start)
            vol.pages.state(ip.handle)["map_seq"] += 1
            tp.log_inode(ip)
