"""Readahead that nobody waits for: a task for each window, from its marker to its last page.

Whoever meets a marker tells (`hit`): a reader on the trio thread directly, a lane through the ring.
What the window is, is decided there and then, so that whoever misses one of its pages before the
task has begun sees that it is the window's, and reads it himself.

A task holds the inode and, shared, its IOLOCK, which it only tries: a writer goes first, and so do
readers for memory, of which it takes what comes easily. A window may fail or stay unread without
anybody's harm; whoever wants its pages reads them, and meets the errors. The end of a mount waits
for tasks (`drain`). Trio thread only.

Windows that are evicted before they are used only do harm: each halves the size that windows of the
volume may have, and each window that is begun adds a page to it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fs.cache import blocks
from fs.cache.readahead import read_window
from fs.cache.window import WINDOW_LEAST, Stream, Window, most_pages
from fs.errors import Corrupt

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume


class Ahead:
    """The windows of one volume."""

    def __init__(self, vol: Volume) -> None:
        self._vol = vol
        self._nursery: trio.Nursery | None = None  # while windows are read
        self._ended = trio.Event()
        self._running = 0
        self._ceiling = self._most = self._request_most = most_pages(vol.arena.nr_pages)
        self._waited = self._begun = self._skipped = self._evicted = 0
        for name, read in {
            "readahead_waited": lambda: self._waited,  # windows that began with a miss
            "readahead_begun": lambda: self._begun,  # ahead of their reader
            "readahead_skipped": lambda: self._skipped,  # of those: a writer had the file
            "readahead_evicted": lambda: self._evicted,  # before they were used
            "readahead_pages_max": lambda: self._most,
        }.items():
            vol.arena.vmstat.gauge(name, read)

    @property
    def pages_most(self) -> int:
        """The largest window in pages, as it was set; 0: nothing is read ahead."""
        return self._ceiling

    @pages_most.setter
    def pages_most(self, pages: int) -> None:
        self._ceiling = self._most = pages

    async def run(self) -> None:
        """Read windows for the volume's life."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    async def drain(self) -> None:
        """Begin no more windows, and wait for those that are being read."""
        self._nursery = None
        await self.settle()

    async def settle(self) -> None:
        """Wait until no window is being read."""
        while self._running:
            self._ended = trio.Event()
            await self._ended.wait()

    def _stream(self, ip: Inode, wanted: int = 1) -> Stream:
        """Who reads a file now, and wants so much: a window is never less than a request."""
        pages, handle, most = self._vol.pages, ip.handle, max(self._most, wanted)
        return Stream(
            pages.state(handle), most, pages.order_max,
            lambda index, step: pages.cached_run(handle, index, step, most),
        )  # fmt: skip

    def miss(self, ip: Inode, index: int, wanted: int) -> Window:
        """What a reader is to read who wants `wanted` pages and has to wait for the first."""
        self._waited += 1
        wanted = min(wanted, self._request_most)
        if self._stream(ip).had(index) and self._vol.pages.was_evicted(ip.handle, index):
            self._evicted += 1
            self._most = max(self._most // 2, min(WINDOW_LEAST, self._ceiling))
            return self._stream(ip, wanted).shrink(index, wanted)
        window, others = self._stream(ip, wanted).miss(index, wanted)
        for other in others:
            self._begin(ip, other)
        return window

    def taken(self, ip: Inode, index: int, window: Window) -> None:
        """A window's folios from page `index` on are in the cache, LOCKED."""
        self._stream(ip).taken(index, window)

    def hit(self, ip: Inode, index: int, wanted: int) -> None:
        """A reader who wants `wanted` pages has met, and taken, the marker on page `index`."""
        pages, wanted = self._vol.pages, min(wanted, self._request_most)
        pfn = pages.find(ip.handle, index)
        size = 1 << int(pages.pages.order[pfn]) if pfn else 1
        window = self._stream(ip, wanted).hit(index, size, wanted)
        if window is not None:
            self._begin(ip, window)

    def hit_in(self, ino: int, index: int, wanted: int) -> None:
        """A lane has; the file may be gone by now."""
        ip = self._vol.inodes.find(ino)
        if ip is not None:
            self.hit(ip, index, wanted)
            self._vol.inodes.put(ip)

    def look(self, ip: Inode, pfn: int, wanted: int) -> None:
        """A reader waits for a folio: take the marker, if it has that."""
        pages = self._vol.pages.pages
        if blocks.marker_taken(pages.flags, pfn):
            self.hit(ip, int(pages.index[pfn]), wanted)

    def _begin(self, ip: Inode, window: Window) -> None:
        vol = self._vol
        if self._nursery is None or not self._ceiling or window.start << 12 >= ip.size:
            return
        vol.inodes.hold(ip.handle)
        self._begun += 1
        self._most = min(self._most + 1, self._ceiling)
        self._running += 1
        self._nursery.start_soon(self._read, ip, window)

    async def _read(self, ip: Inode, window: Window) -> None:
        vol = self._vol
        try:
            if vol.iolocks.try_acquire(ip.handle, True):
                try:
                    await read_window(vol, ip, window)
                finally:
                    vol.iolocks.release(ip.handle)
            else:
                self._skipped += 1
        except (OSError, Corrupt):
            pass  # who reads it meets that again
        finally:
            vol.inodes.put(ip)
            self._running -= 1
            self._ended.set()
