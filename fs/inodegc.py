"""Inode inactivation: unlinked inodes without users are freed in the background, one by one.

An inode whose last user has gone is freed there and then if it has nothing left but itself; any
other joins the queue. Whoever unlinks waits at his beginning, where he holds nothing, while the
queue is longer than MAX_BACKLOG; and while there is one at all, once reclaim has come by: its
shrinker frees nothing itself, it makes the producers wait for the consumer. As in XFS it counts
4096 for any queue, with a batch of 2049 and no seeks: half of that is one short of a batch, so the
first look is only noted, and the next one is a hit.

Trio thread only. The worker takes transactions, and so every lock that they take; whoever waits
for it must hold none of them, and may not be in a NOFS scope.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import trio

from alloc import gfp
from alloc.shrinker import SHRINK_STOP
from fs import enomem, namespace

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

MAX_BACKLOG = 256  # inodes
COUNT, BATCH = 4096, 2049  # of the shrinker


class InodeGc:
    """The inodes of one volume that are to be freed."""

    name = "xfs_inodegc"

    def __init__(self, vol: Volume) -> None:
        self._vol = vol
        self._queue: deque[Inode] = deque()
        self._wake = trio.Event()
        self._done = trio.Event()
        self.shrinker_hit = False

    def __len__(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        """Be known to reclaim."""
        self._vol.arena.register_shrinker(self, seeks=0, batch=BATCH)

    def add(self, ip: Inode) -> None:
        """Free an unlinked inode without users: now if that is all there is to do, else in turn."""
        if namespace.free_now(self._vol, ip):
            self._vol.inodes.put(ip)
            return
        self._queue.append(ip)
        self._wake.set()

    async def run(self) -> None:
        """The worker; runs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._queue:
                await self._inactivate(self._queue[0])
                self._queue.popleft()
                self._progress()
            self.shrinker_hit = False

    def _progress(self) -> None:
        done, self._done = self._done, trio.Event()
        done.set()

    async def _inactivate(self, ip: Inode) -> None:
        vol = self._vol

        async def free() -> None:
            await namespace.inactivate(vol, ip)

        try:
            if not vol.shut_down and not vol.read_only:
                with trio.CancelScope(shield=True):
                    await enomem.insist(vol, free, f"inode {ip.ino} could not be freed")
        except OSError as error:
            if not vol.shut_down:
                vol.log.error("inode %d could not be freed: %s; run xfs_repair", ip.ino, error)
        finally:
            vol.inodes.put(ip)

    # -- who waits ------------------------------------------------------------------------------

    @property
    def crowded(self) -> bool:
        """Whether who unlinks is to wait."""
        return len(self) > (0 if self.shrinker_hit else MAX_BACKLOG)

    async def throttle(self) -> None:
        """Wait for the worker if it lags behind; nothing in a NOFS scope."""
        while self.crowded and not self._vol.shut_down and not gfp.current_scope() & gfp.NOFS:
            await self._done.wait()

    async def drain(self) -> None:
        """Wait until nothing is left to free, or the volume has shut down."""
        while self._queue and not self._vol.shut_down:
            await self._done.wait()

    def give_up(self) -> None:
        """The volume has shut down: nobody waits any longer."""
        self._progress()

    # -- shrinker -------------------------------------------------------------------------------

    def count_objects(self) -> int:
        return COUNT if self._queue else 0

    def scan_objects(self, nr: int, gfp_flags: int) -> int:
        """Have who unlinks wait until the queue is empty. Frees nothing, so NOFS or not."""
        self._wake.set()
        self.shrinker_hit = bool(self._queue)
        return SHRINK_STOP
