"""The flusher: who decides which mapping is written when.

One task per volume. It works while dirty memory is above the background threshold, writes what
has been dirty for 30 s at its 5 s rounds, and writes some when reclaim finds too little that is
clean. `sync` runs in its caller's task and takes each mapping once, so that a busy writer cannot
keep it for ever.

The list of dirty mappings is threaded through their state records, oldest first; stamps never
repeat. It is the trio thread's; a mapping's LISTED flag, which writers in other threads go by, is
set before it joins and cleared, with the last look at its dirty counts, before it leaves.

The flusher's task runs with access to the memory reserve and outside the filesystem's reclaim
(NOFS, MEMALLOC): cleaning memory never waits for memory to be cleaned.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

import trio

from alloc import gfp, lockdep
from writeback.dirty import Dirty
from writeback.mapping import INODE_DIRTY, LISTED, Mappings

PERIOD_S = 5.0  # dirty_writeback_centisecs; 0: only when somebody wakes it
EXPIRE_S = 30.0  # dirty_expire_centisecs
CHUNK_PAGES = 1024  # 4 MiB of one mapping at least, then another gets its turn
CHUNK_SCOPE = 8  # and no more than this part of the limit
MAPPINGS_AT_ONCE = 4  # while blocks are looked up for one, the device has others' data
ALL_PAGES = 1 << 60  # a budget that is none, and the last page index of any mapping


def chunk_pages(avg_bandwidth: int, limit: int) -> int:
    """Pages of one mapping in a row: what the device writes in half a second, in 4 MiB.

    The kernel's formula and rounding; bandwidth in pages a second.
    """
    pages = min(avg_bandwidth // 2, limit // CHUNK_SCOPE)
    return (pages + CHUNK_PAGES) // CHUNK_PAGES * CHUNK_PAGES


class Memory(Protocol):
    """What the flusher asks of the arena."""

    def register_cleaner(self, wake: Any) -> None:
        """`wake` is called when clean memory runs short."""

    def kick(self) -> None:
        """Memory became reclaimable."""


class Flusher:
    """Writes the dirty mappings of one volume."""

    def __init__(
        self, arena: Memory, mappings: Mappings, dirty: Dirty, log: logging.Logger
    ) -> None:
        self._arena = arena
        self._mappings = mappings
        self._dirty = dirty
        self._log = log
        self._first = 0
        self._last = 0
        self._stamp_ns = 0
        self._syncs = 0
        self._reclaim_waits = False
        self._cleaning: set[int] = set()  # mappings of which a chunk is being written
        self._wakeup = trio.Event()
        self.avg_bandwidth: Callable[[], int] = lambda: 0  # of the device, in pages a second
        self.nr_listed = 0
        self.rounds = 0
        self.period_s = PERIOD_S
        self.expire_s = EXPIRE_S
        dirty.wake_flusher = self.wake
        arena.register_cleaner(self.clean_some)

    # -- the list -------------------------------------------------------------------------------

    def enlist(self, handle: int) -> None:
        """A mapping became dirty, or is about to be. Cheap when it is on the list."""
        state = self._mappings.state(handle)
        if state["flags"] & LISTED or not self._mappings.enlist(handle):
            return
        state["synced"] = self._syncs
        self.nr_listed += 1
        self._append(handle, state)

    def settle(self, handle: int) -> None:
        """Take a mapping off the list if nothing in it is dirty any more."""
        if self._mappings.unlist(handle):
            self.nr_listed -= 1
            self._unlink(self._mappings.state(handle))

    def _append(self, handle: int, state: Any) -> None:
        now = int(trio.current_time() * 1e9)
        self._stamp_ns = max(self._stamp_ns + 1, now)
        state["dirtied_when"] = self._stamp_ns
        state["prev"], state["next"] = self._last, 0
        if self._last:
            self._mappings.state(self._last)["next"] = handle
        else:
            self._first = handle
        self._last = handle

    def _unlink(self, state: Any) -> None:
        before, after = int(state["prev"]), int(state["next"])
        if before:
            self._mappings.state(before)["next"] = after
        else:
            self._first = after
        if after:
            self._mappings.state(after)["prev"] = before
        else:
            self._last = before
        state["prev"] = state["next"] = 0

    def _requeue(self, handle: int) -> None:
        """To the end of the list: others come first, and it is young again."""
        state = self._mappings.state(handle)
        if state["flags"] & LISTED:
            self._unlink(state)
            self._append(handle, state)

    # -- the task -------------------------------------------------------------------------------

    def wake(self) -> None:
        """There may be something to do."""
        self._wakeup.set()

    def clean_some(self) -> None:
        """Reclaim wants clean memory; called by it, from any place that may not wait."""
        if self._dirty.nr_dirty and not self._reclaim_waits:
            self._reclaim_waits = True
            self._wakeup.set()

    async def run(self) -> None:
        """The background task; runs until cancelled, and is cancelled only between writes."""
        with gfp.memalloc(), gfp.nofs():
            while True:
                with trio.move_on_after(self.period_s or math.inf):
                    await self._wakeup.wait()
                self._wakeup = trio.Event()
                with trio.CancelScope(shield=True):
                    await self._round()
                await trio.lowlevel.checkpoint()

    async def _round(self) -> None:
        self.rounds += 1
        await self._write_expired()
        async with trio.open_nursery() as nursery:
            for _ in range(MAPPINGS_AT_ONCE):
                nursery.start_soon(self._write_background)
        if self._reclaim_waits:
            await self._write_some()
            self._reclaim_waits = False

    async def _write_background(self) -> None:
        """One of those who bring dirty memory below the background threshold."""
        while self._dirty.over_background():
            if not await self._write_some():
                break

    async def _write_expired(self) -> None:
        """Everything in mappings that joined the list too long ago."""
        before = int((trio.current_time() - self.expire_s) * 1e9)
        while self._first and self._mappings.state(self._first)["dirtied_when"] <= before:
            handle = self._first
            self._requeue(handle)
            await self.clean(handle)

    async def _write_some(self) -> bool:
        """A chunk of each mapping in turn until one had something to write; whether any had.

        One that somebody is at already is left to him: its blocks are chosen in order.
        """
        for _ in range(self.nr_listed):
            handle = self._first
            if not handle:
                return False
            self._requeue(handle)
            if handle in self._cleaning:
                continue
            self._cleaning.add(handle)
            try:
                budget = chunk_pages(self.avg_bandwidth(), self._dirty.limit)
                if await self.clean(handle, budget=budget):
                    return True
            finally:
                self._cleaning.remove(handle)
        return False

    async def clean(
        self, handle: int, *, integrity: bool = False, budget: int = ALL_PAGES
    ) -> int:
        """Write one mapping, and its object when that is dirty; pages submitted.

        A mapping that could not be written has been told so in its state; the volume's own error
        handling has logged it.
        """
        self._mappings.hold(handle)
        pages = 0
        try:
            with lockdep.holding(lockdep.FS_RECLAIM):
                pages = await self._mappings.write_range(
                    handle, 0, ALL_PAGES, integrity=integrity, budget=budget
                )
                state = self._mappings.state(handle)
                if state["flags"] & INODE_DIRTY and pages < budget:
                    await self._mappings.write_object(handle)
        except OSError as error:
            self._log.error("write-back stopped: %s", error)
        finally:
            self.settle(handle)
            self._mappings.drop(handle)
        if pages:
            self._arena.kick()
        return pages

    async def sync(self) -> None:
        """Write everything that is dirty now and wait until the device has it (not: is stable)."""
        self._syncs += 1
        number = self._syncs
        with gfp.memalloc(), gfp.nofs():
            while handle := self._unsynced(number):
                self._mappings.state(handle)["synced"] = number
                self._requeue(handle)
                await self.clean(handle, integrity=True)

    def _unsynced(self, number: int) -> int:
        """The first listed mapping that this sync has not taken; 0 if none."""
        handle = self._first
        while handle:
            state = self._mappings.state(handle)
            if state["synced"] < number:
                return handle
            handle = int(state["next"])
        return 0
