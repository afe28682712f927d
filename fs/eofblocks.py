"""Blocks past the end of a file that grows, so that it stays in few pieces: speculative ones.

When write-back gives a file blocks it takes more than the data need: what is dirty right behind,
and, if that reaches the end of a file that is open for writing, as much again as the file has in
one piece there (`speculative`, XFS's rule), less when the filesystem is nearly full. What the data
do not need is unwritten, so it reads as nothing, and the next data that are appended find it.

When the last who writes has closed the file, what lies past its end is freed again by a task of its
own; and whenever space runs out, of all files that nobody is busy with. Files for which fallocate
made blocks keep them, and append-only ones.

Invariant: only files that are open for writing, or whose close has not been dealt with, have
speculative blocks. Trio thread only. The task takes the IOLOCK and a transaction, as truncation
does; who is short of space holds his own IOLOCK perhaps, so others' are only tried.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

from fs import enomem
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
        self._open: dict[int, None] = {}  # handles of inodes that may have speculative blocks
        self._draining = Mutex("eofblocks")
        self._wake = trio.Event()

    # -- who has a file open --------------------------------------------------------------------

    def opened(self, ip: Inode) -> None:
        """Somebody opened a file for writing."""
        self._writers[ip.handle] += 1

    def closed(self, ip: Inode) -> None:
        """And has closed it; he still holds a reference."""
        self._writers[ip.handle] -= 1
        if not self._writers[ip.handle] and ip.handle in self._open:
            del self._open[ip.handle]
            self._closed.append(self._vol.inodes.hold(ip.handle))
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
            if self._writers[ip.handle]:  # who keeps the inode, and so its handle
                self._open[ip.handle] = None
            break
        return max(wanted, 0)

    async def _wanted(self, tp: Transaction, ip: Inode, first: int, end: int) -> int:
        vol = self._vol
        dirty_end = vol.pages.reserved_until(ip.handle, end, end + LOOK_AHEAD)
        size = ip.size
        grows = self._writers[ip.handle] and not ip.flags & KEEPS
        if not grows or size < ALLOC_BYTES or dirty_end << vol.geo.block_log < size:
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
            await self._wake.wait()
            self._wake = trio.Event()
            await self.drain()

    async def drain(self) -> None:
        """Free what files have whose last writer has closed them; also what the task is at."""
        async with self._draining:
            while self._closed:
                ip = self._closed.popleft()
                try:
                    async with self._vol.iolock(ip):
                        if not self._writers[ip.handle]:
                            await self._free(ip)
                finally:
                    self._vol.inodes.put(ip)

    async def squeeze(self) -> bool:
        """Space has run out: free what nobody is busy with; whether there was any."""
        before = self._vol.space.available
        handles = [ip.handle for ip in self._closed] + list(self._open)
        for handle in handles:
            if not self._vol.iolocks.try_acquire(handle, False):
                continue
            ip = self._vol.inodes.hold(handle)
            try:
                await self._free(ip)
                self._open.pop(handle, None)
            finally:
                self._vol.iolocks.release(handle)
                self._vol.inodes.put(ip)
        return self._vol.space.available > before

    async def _free(self, ip: Inode) -> None:
        """Free what a file has past its end. The caller holds the IOLOCK exclusively."""
        vol = self._vol
        if vol.shut_down or not ip.nlink or ip.flags & KEEPS:
            return  # an unlinked file is freed as a whole

        async def free() -> None:
            await free_past_end(vol, ip)

        with trio.CancelScope(shield=True):
            try:
                await enomem.insist(vol, free, f"inode {ip.ino} keeps blocks past its end")
            except OSError as error:
                if not vol.shut_down:
                    vol.log.error("inode %d keeps blocks past its end: %s", ip.ino, error)


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
