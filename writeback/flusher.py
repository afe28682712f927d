"""The flusher: who decides which mapping is written when.

One task per volume, which works in rounds: what reclaim asked for, because it found too little
that is clean; every 5 s what has been dirty for 30 s; and while dirty memory is above the
background threshold, whatever is oldest. The later kinds stop when there is one of the first.
A round takes mappings from lists (`lists.py`) by the kernel's rules: what is old enough goes to
b_io, gets a slice in turn, and with its slice used up comes again when the others had theirs.
Within a mapping the next slice begins where the last one ended (`writeback_index`).

With `lazytime` a mapping that has nothing but time stamps to be written goes to b_dirty_time, and
is written when it is synced, when nobody uses the object any more, or 12 h after its stamps
first waited. Whatever else logs the object takes the stamps along.

`sync` runs in its caller's task: a round with all that is dirty, and then each mapping that still
is, once, waiting for what is on its way; so busy writers cannot keep it for ever. Whoever works at
a mapping has it for himself: its blocks are chosen in order. Fsync may write it meanwhile.

The flusher's task runs with access to the memory reserve and outside the filesystem's reclaim
(NOFS, MEMALLOC): cleaning memory never waits for memory to be cleaned. Trio thread only.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any, Protocol

import trio

from alloc import gfp, lockdep
from writeback.dirty import Dirty
from writeback.lists import DIRTY, DIRTY_TIME, IO, MORE_IO, NOWHERE, Lists
from writeback.mapping import INODE_DIRTY, LISTED, LISTED_TIME, Mappings

PERIOD_S = 5.0  # dirty_writeback_centisecs; 0: only when somebody wakes it
EXPIRE_S = 30.0  # dirty_expire_centisecs
STAMPS_EXPIRE_S = 43200  # dirtytime_expire_seconds
NOW_DUE = (1 << 32) - 1  # in `stamped_when`: stamps wait no longer
CHUNK_PAGES = 1024  # 4 MiB of one mapping at least, then another gets its turn
CHUNK_SCOPE = 8  # and no more than this part of the limit
MAPPINGS_AT_ONCE = 4  # while blocks are looked up for one, the device has others' data
QUEUE_BATCH = 1024  # mappings that go to b_io at once, so that the other tasks get their turn
ALL_PAGES = 1 << 60  # a budget that is none, and the last page index of any mapping


def chunk_pages(avg_bandwidth: int, limit: int, wanted: int) -> int:
    """Pages of one mapping in a row: what the device writes in half a second, in 4 MiB.

    The kernel's formula and rounding; bandwidth in pages a second, `wanted` are left to be
    written at all.
    """
    pages = min(avg_bandwidth // 2, limit // CHUNK_SCOPE, wanted)
    return (pages + CHUNK_PAGES) // CHUNK_PAGES * CHUNK_PAGES


class Memory(Protocol):
    """What the flusher asks of the arena."""

    def register_cleaner(self, wake: Any) -> None:
        """`wake` is called when clean memory runs short."""

    def kick(self) -> None:
        """Memory became reclaimable."""


class Work:
    """One reason to write: how much, of what age, and whether it still holds."""

    def __init__(
        self, nr_pages: int, before: Callable[[], int], goes_on: Callable[[], bool]
    ) -> None:
        self.nr_pages = nr_pages  # that are still to be written
        self.before = before  # mappings that became dirty until then are written
        self.goes_on = goes_on
        self.queued = False  # b_io was filled for it
        self.progress = False  # since then something was written
        self.busy = 0  # helpers that write a slice


class Flusher:
    """Writes the dirty mappings of one volume."""

    def __init__(
        self, arena: Memory, mappings: Mappings, dirty: Dirty, log: logging.Logger
    ) -> None:
        self._arena = arena
        self._mappings = mappings
        self._dirty = dirty
        self._log = log
        self._syncs = 0
        self._reclaim_waits = False
        self._cleaning: set[int] = set()  # mappings that somebody is at: the kernel's I_SYNC
        self._cleaned = trio.Event()  # one of them no more
        self._wakeup = trio.Event()
        self._last_periodic = 0.0
        self.avg_bandwidth: Callable[[], int] = lambda: 0  # of the device, in pages a second
        self.lists = Lists(mappings)
        self.rounds = 0
        self.period_s = PERIOD_S
        self.expire_s = EXPIRE_S
        self.lazytime = False
        self.stamps_expire_s = STAMPS_EXPIRE_S
        dirty.wake_flusher = self.wake
        arena.register_cleaner(self.clean_some)

    # -- what becomes dirty and clean -----------------------------------------------------------

    @property
    def nr_listed(self) -> int:
        """Mappings on any list."""
        return len(self.lists)

    def enlist(self, handle: int) -> None:
        """A mapping became dirty, or is about to be. Cheap when it is on a list."""
        state = self._mappings.state(handle)
        if state["flags"] & LISTED or not self._mappings.enlist(handle):
            return
        if state["queue"] == NOWHERE:
            state["synced"] = self._syncs
        self.lists.dirtied(handle)

    def settle(self, handle: int) -> bool:
        """Take a mapping off its list if nothing in it is dirty any more; whether it was taken."""
        if not self._mappings.unlist(handle):
            return False
        self.lists.move(handle, NOWHERE)
        self._mappings.state(handle)["stamped_when"] = 0
        return True

    def unused(self, handle: int) -> None:
        """Nobody uses the object any more: its stamps are written like all that is dirty."""
        state = self._mappings.state(handle)
        if self.lazytime and state["queue"] != NOWHERE and not self.settle(handle):
            state["stamped_when"] = NOW_DUE
            if state["flags"] & LISTED_TIME:
                self.lists.dirtied(handle)

    def _stamps_wait(self, state: Any) -> bool:
        """Whether the stamps of an object need not be written yet."""
        waits_since = int(state["stamped_when"])
        if not waits_since:
            return self.lazytime
        return waits_since != NOW_DUE and trio.current_time() < waits_since + self.stamps_expire_s

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
        self._last_periodic = trio.current_time()
        with gfp.memalloc(), gfp.nofs():
            while True:
                with trio.move_on_at(self._last_periodic + (self.period_s or math.inf)):
                    await self._wakeup.wait()
                self._wakeup = trio.Event()
                with trio.CancelScope(shield=True):
                    await self._round()
                await trio.lowlevel.checkpoint()

    async def _round(self) -> None:
        self.rounds += 1
        if self._reclaim_waits:
            self._reclaim_waits = False
            await self._write_everything()
        if trio.current_time() >= self._last_periodic + (self.period_s or math.inf):
            self._last_periodic = trio.current_time()
            most = self._dirty.nr_dirty + self.nr_listed  # and not what comes while it works
            await self._write(Work(most, self._expired, lambda: not self._reclaim_waits))
        await self._write(Work(ALL_PAGES, self.lists.now, self._over_background))

    def _expired(self) -> int:
        """What became dirty until then is too old."""
        return int((trio.current_time() - self.expire_s) * 1e9)

    def _over_background(self) -> bool:
        return self._dirty.over_background() and not self._reclaim_waits

    async def _write_everything(self) -> None:
        """What is dirty now, without waiting for pages that are on their way (WB_SYNC_NONE)."""
        now = self.lists.now()
        await self._write(Work(self._dirty.nr_dirty, lambda: now, lambda: True))

    async def _write(self, work: Work) -> None:
        """Do a work; several at once, each at a mapping of its own."""
        if work.goes_on():
            async with trio.open_nursery() as nursery:
                for _ in range(MAPPINGS_AT_ONCE):
                    nursery.start_soon(self._help, work)

    async def _help(self, work: Work) -> None:
        """Slice after slice, while the reason holds and there is a mapping to be had."""
        while work.nr_pages > 0 and work.goes_on():
            if handle := self._next(work):
                await self._write_slice(handle, work)
            elif work.busy:  # when that is done there may be more
                await self._cleaned.wait()
            else:
                break

    def _next(self, work: Work) -> int:
        """The next mapping of a work that nobody is at, or 0."""
        lists = self.lists
        if not lists.first(IO):
            if work.queued and not work.progress:
                return 0
            work.queued, work.progress = True, False
            lists.splice()
            lists.expire(DIRTY, work.before(), QUEUE_BATCH)
            stamps_before = int((trio.current_time() - self.stamps_expire_s) * 1e9)
            lists.expire(DIRTY_TIME, stamps_before, QUEUE_BATCH)
        while (handle := lists.first(IO)) in self._cleaning:
            lists.move(handle, MORE_IO)
        return handle

    async def _write_slice(self, handle: int, work: Work) -> None:
        """A slice of one mapping, and then to the list where it belongs."""
        most = chunk_pages(self.avg_bandwidth(), self._dirty.limit, work.nr_pages)
        work.busy += 1
        try:
            pages = await self.clean(handle, budget=most)
        finally:
            work.busy -= 1
        work.nr_pages -= pages
        state = self._mappings.state(handle)
        if state["queue"] == NOWHERE or self._defer(handle, state):
            work.progress = True
            return
        work.progress |= pages > 0
        if state["ndirty"] and pages >= most and state["dirtied_when"] <= work.before():
            self.lists.move(handle, MORE_IO)
        else:  # it became dirty meanwhile, or could not be written: not at once again
            self.lists.redirtied(handle)

    def _defer(self, handle: int, state: Any) -> bool:
        """To b_dirty_time with a mapping that has nothing but stamps which may wait."""
        if not self._stamps_wait(state) or not self._mappings.defer(handle):
            return False
        if not state["stamped_when"]:
            state["stamped_when"] = max(int(trio.current_time()), 1)
        self.lists.dirtied(handle, DIRTY_TIME)
        return True

    async def clean(
        self, handle: int, *, integrity: bool = False, budget: int = ALL_PAGES
    ) -> int:
        """Write one mapping, and its object when that is dirty; pages submitted.

        Waits for whoever is at it. A mapping that could not be written has been told so in its
        state; the volume's own error handling has logged it.
        """
        self._mappings.hold(handle)
        pages = 0
        try:
            while handle in self._cleaning:
                await self._cleaned.wait()
            self._cleaning.add(handle)
            try:
                pages = await self._clean(handle, integrity, budget)
            finally:
                self._cleaning.remove(handle)
                self._cleaned.set()
                self._cleaned = trio.Event()
                self.settle(handle)
        finally:
            self._mappings.drop(handle)
        if pages:
            self._arena.kick()
        return pages

    async def _clean(self, handle: int, integrity: bool, budget: int) -> int:
        pages = 0
        try:
            with lockdep.holding(lockdep.FS_RECLAIM):
                pages = await self._mappings.write_range(
                    handle, 0, ALL_PAGES, integrity=integrity, budget=budget
                )
                state = self._mappings.state(handle)
                stamps = state["flags"] & INODE_DIRTY and pages < budget
                if stamps and (integrity or not self._stamps_wait(state)):
                    await self._mappings.write_object(handle)
                    state["stamped_when"] = 0
        except OSError as error:
            self._log.error("write-back stopped: %s", error)
        return pages

    async def sync(self) -> None:
        """Write everything that is dirty now and wait until the device has it (not: is stable)."""
        with gfp.memalloc(), gfp.nofs():
            await self._write_everything()
            self._syncs += 1
            number = self._syncs
            while handle := self._unsynced(number):
                self._mappings.state(handle)["synced"] = number
                self.lists.dirtied(handle)  # what becomes dirty now is the next sync's
                await self.clean(handle, integrity=True)

    def _unsynced(self, number: int) -> int:
        """The first listed mapping that this sync has not taken; 0 if none."""
        for queue in (IO, MORE_IO, DIRTY, DIRTY_TIME):
            handle = self.lists.first(queue)
            while handle:
                if self._mappings.state(handle)["synced"] < number:
                    return handle
                handle = self.lists.following(handle)
        return 0
