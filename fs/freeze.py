"""Freezing: the filesystem stands still, so that a copy of its image is whole.

As in XFS: first new writers wait, where they hold nothing, and those that are under way end; dirty
data is written; then nobody begins a transaction any more, and those that run end. What is
committed goes to the log and home, and the log is *covered*: the last thing in it is one checkpoint
with the superblock, which is at home, too. It is not marked clean, because a copy may have inodes
that are open and have no name: whoever mounts it frees them, as after a crash.

Reading goes on; access times do not change meanwhile. Who holds the IOLOCK of a write that a lane
began is let through: what it copies stays in memory.

Trio thread only; no lock is held while somebody waits here.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from fs.volume import Volume

THAWED, WRITERS_WAIT, FROZEN = range(3)


class Freezer:
    """Of one volume. `on_change` hears, as True or False, whether writers wait."""

    def __init__(self, vol: Volume) -> None:
        self._vol = vol
        self.level = THAWED
        self.on_change: Callable[[bool], None] = lambda frozen: None
        self._writers = 0
        self._own: trio.lowlevel.Task | None = None  # whose transactions pass
        self._changed = trio.Event()

    @asynccontextmanager
    async def writer(self) -> AsyncIterator[None]:
        """Somebody changes something: waits for a thaw first, where nothing is held.

        Raises ShutDown.
        """
        while self.level and not self._vol.shut_down:
            await self._changed.wait()
        self._vol.check_alive()
        self._writers += 1
        try:
            yield
        finally:
            self._writers -= 1
            self.stirred()

    async def admit(self) -> None:
        """A transaction is about to begin."""
        while self.level == FROZEN and self._own is not trio.lowlevel.current_task():
            await self._changed.wait()

    def stirred(self) -> None:
        """A writer or a transaction ended: whoever freezes looks again."""
        if self.level:
            self._announce()

    def _announce(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    def _enter(self, level: int) -> None:
        self.level = level
        self.on_change(level != THAWED)
        self._announce()

    async def _until(self, idle: Callable[[], bool]) -> None:
        while not idle():
            await self._changed.wait()
            self._vol.check_alive()

    async def freeze(self) -> None:
        """Raises OSError: EBUSY if it is frozen, EROFS; or why not everything could be written."""
        vol = self._vol
        vol.check_writable()
        if self.level:
            raise OSError(errno.EBUSY, "already frozen")
        self._own = trio.lowlevel.current_task()
        self._enter(WRITERS_WAIT)
        try:
            await self._until(lambda: not self._writers)
            vol.arena.rcu.synchronize()  # no lane is in the midst of a write
            await vol.flusher.sync()
            await vol.drain_inactive()
            self._enter(FROZEN)
            await self._until(lambda: not vol.running)
            await vol.cover_log()
        except BaseException:
            self.thaw()
            raise
        finally:
            self._own = None

    def thaw(self) -> None:
        """Let everybody go on. Idempotent."""
        if self.level:
            self._enter(THAWED)
