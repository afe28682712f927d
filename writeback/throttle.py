"""Writers held back to what the device sustains: balance_dirty_pages.

A writer is whoever writes one file: writes to it stand in line at its IOLOCK, and FUSE does not
always say which task writes. Below the ceiling of free run nobody is held back and nothing is
known of writers; above it each has credit for some pages, which lanes may use without asking, and
when that is used up pauses for as long as the device takes for them at the writer's rate
(`bandwidth.py`, `position.py`, `pause.py`). Time that a writer spent otherwise since its last pause
is credited, up to a second. At the limit writers look every few milliseconds until there is room
again. Writers do no I/O: they wake the flusher.

What a writer dirtied and did not pay for when it is forgotten (the table is small, and whoever
wrote longest ago leaves it) goes to the next one, so that many small files are held back as one
large one is.

Invariants: busy pages <= limit + what each writer dirties in one step; a writer is forgotten before
the record of its mapping is anybody else's memory. Trio thread only, by trio's clock, in whole
milliseconds. Formulas and constants are the kernel's (mm/page-writeback.c).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import trio

from alloc import lockdep
from writeback import pause
from writeback.bandwidth import HZ, INTERVAL_MS, Bandwidth
from writeback.dirty import RATELIMIT_PAGES, Dirty
from writeback.position import CALC_SHIFT, Position, pos_ratio

WRITERS_MOST = 256
FIRST_PAGES = 32  # that a writer may dirty before it is looked at, when nobody ever was
EXCEEDED_PAGES = 8  # that every writer may, when the device has too much
CREDIT_MS = HZ
LIMIT_LOOKS = 8  # in the longest pause; Linux looks once, and two such pauses are one write's
RATELIMIT_SHARE = 32  # somebody is looked at whenever this part of the threshold was dirtied


def now_ms() -> int:
    """Trio's clock."""
    return int(trio.current_time() * HZ)


class Plan(NamedTuple):
    """What a writer does now; a pause of 0 is none, because it would be too short."""

    ms: int
    pays: bool  # for what was dirtied; else it waits for the limit
    paid_until: int  # ms; later than the pause's end: more is owed, with the next one
    next_pages: int  # to be dirtied until then


class Writer:
    """What one writer may dirty until it is looked at, and when it last paid.

    What it has dirtied is what its credit, a word of the mapping, lacks of that.
    """

    __slots__ = ("nr_dirtied_pause", "paused_when")

    def __init__(self, nr_dirtied_pause: int) -> None:
        self.nr_dirtied_pause = nr_dirtied_pause
        self.paused_when = 0  # ms; 0: not yet


class Throttle:
    """Holds the writers of one volume back; all names of writers are handles of mappings.

    `credit` is the column of that name in the mappings' records, which whoever holds a file's
    IOLOCK exclusively counts down.
    """

    def __init__(self, dirty: Dirty, credit: Any) -> None:
        self.dirty = dirty
        self._credit = credit
        self.bandwidth = Bandwidth()
        self.paused = 0  # pauses
        self.paused_ms = 0  # asked for in all
        self.longest_ms = 0
        self.sleeping = 0  # writers that pause now
        self._writers: dict[int, Writer] = {}  # who wrote last stands last
        self._next_pages = FIRST_PAGES  # what the last one may dirty, and new ones, too
        self._leaks = 0  # pages dirtied by writers that were forgotten
        self._balanced_at = 0  # pages dirtied in all when somebody was looked at
        self._highest = 0  # busy pages, since the bandwidth was looked at
        self._free_at = 0  # ms: when memory was last seen in free run

    # -- what happens to pages ------------------------------------------------------------------

    def dirtied(self, handle: int, pages: int) -> None:
        """A writer made pages dirty; a kernel has counted them."""
        self.dirty.dirtied()
        busy = self.dirty.busy
        if busy > self.dirty.freerun:
            self._highest = max(self._highest, busy)
            self._writer(handle)
            self._credit[handle] -= pages

    def submitting(self) -> None:
        """Pages are about to go to the device."""
        now = now_ms()
        idle = not self.dirty.nr_writeback
        if idle and now - self.bandwidth.stamp_ms > INTERVAL_MS:
            self.bandwidth.start(now, self.dirty.nr_dirtied, self.dirty.nr_written)

    def completed(self) -> None:
        """Pages are written, or have failed."""
        now = now_ms()
        if self.dirty.busy <= self.dirty.freerun:
            self._free_at = now
        self._estimate(now)

    def _estimate(self, now: int) -> None:
        """Look at the bandwidth, if it is time.

        Where dirty memory stood is where writers brought it: they find room when a write has just
        ended, and sleep while there is none.
        """
        dirty, elapsed = self.dirty, now - self.bandwidth.stamp_ms
        if elapsed < INTERVAL_MS:
            return
        dirty.smooth()
        at = dirty.position()
        at = at._replace(dirty=max(at.dirty, self._highest))
        self._highest = 0
        held_back = at if at.dirty > dirty.freerun else None
        self.bandwidth.update(now, dirty.nr_dirtied, dirty.nr_written, held_back)

    # -- writers --------------------------------------------------------------------------------

    def _writer(self, handle: int) -> Writer:
        """What is known of a writer, who becomes the last to be forgotten."""
        writer = self._writers.pop(handle, None)
        if writer is None:
            writer = Writer(self._next_pages)
            self._paid(handle, writer, 0, self._next_pages)
            if len(self._writers) >= WRITERS_MOST:
                oldest = next(iter(self._writers))
                self.forget(oldest)
                self._credit[oldest] = 0
        elif writer.paused_when < self._free_at:
            self._paid(handle, writer, self._free_at, writer.nr_dirtied_pause)
        self._writers[handle] = writer
        return writer

    def forget(self, handle: int) -> None:
        """The object's record goes: what it owes is the next one's, and nothing is kept in it."""
        writer = self._writers.pop(handle, None)
        if writer is not None:
            self._leaks += self._nr_dirtied(handle, writer)

    def _nr_dirtied(self, handle: int, writer: Writer) -> int:
        """Pages that a writer has not paid for."""
        return max(writer.nr_dirtied_pause - int(self._credit[handle]), 0)

    def _paid(self, handle: int, writer: Writer, when: int, pages: int) -> None:
        """Nothing is owed as of a time, and so many pages may be dirtied."""
        writer.paused_when = when
        writer.nr_dirtied_pause = self._credit[handle] = pages

    def must_balance(self, handle: int) -> bool:
        """Whether a writer has to be looked at now; the cheap test before `balance`."""
        dirty = self.dirty
        dirty.look()
        if dirty.busy <= dirty.freerun:
            return False
        at = dirty.position()
        self._highest = max(self._highest, at.dirty)
        writer = self._writer(handle)
        ratelimit = writer.nr_dirtied_pause
        if at.exceeded:
            ratelimit = min(ratelimit, EXCEEDED_PAGES)
        inherited = min(self._leaks, max(ratelimit - self._nr_dirtied(handle, writer), 0))
        self._credit[handle] -= inherited
        self._leaks -= inherited
        together = max(at.thresh // RATELIMIT_SHARE, RATELIMIT_PAGES)
        return (
            at.dirty >= at.hard_limit
            or self._nr_dirtied(handle, writer) >= ratelimit
            or dirty.nr_dirtied - self._balanced_at >= together
        )

    async def balance(self, handle: int) -> None:
        """Pause for what a writer dirtied, and until there is room below the limit.

        Call it before any folio is taken.
        """
        if lockdep.current is not None:
            lockdep.current.wants(lockdep.FS_RECLAIM)  # the flusher works under it
        writer = self._writer(handle)
        self._balanced_at = self.dirty.nr_dirtied
        pages = self._nr_dirtied(handle, writer)
        while True:
            now = now_ms()
            self.dirty.update()
            at = self.dirty.position()
            if at.dirty <= self.dirty.freerun:
                self._paid(handle, writer, now, pause.poll_interval(at.dirty, at.thresh))
                return
            self.dirty.wake_flusher()
            if self.dirty.nr_writeback or now - self.bandwidth.stamp_ms < CREDIT_MS:
                self._estimate(now)  # else nothing was written: the device was not asked to
            found = self._plan(writer, pages, at, now)
            if found is None:
                if writer.nr_dirtied_pause <= pages:  # too few: more next time
                    writer.nr_dirtied_pause += pages
                    self._credit[handle] += pages
                return
            if found.ms:
                self._next_pages = found.next_pages
                await self._balance_dirty_pages(found.ms)
            self._paid(handle, writer, found.paid_until, found.next_pages)
            if not found.ms or (found.pays and self.dirty.busy < self.dirty.limit):
                return
            pages = 0 if found.pays else pages

    def _plan(self, writer: Writer, pages: int, at: Position, now: int) -> Plan | None:
        """What a writer owes for so many pages; None if that is less than a millisecond."""
        bandwidth = self.bandwidth
        rate = bandwidth.ratelimit * pos_ratio(at, bandwidth.avg) >> CALC_SHIFT
        longest = pause.max_pause(at.dirty, bandwidth.avg)
        shortest, next_pages = pause.target(longest, bandwidth.avg, bandwidth.ratelimit, rate)
        if not rate:
            ms = max(longest // LIMIT_LOOKS, 1)
            return Plan(ms, False, now + ms, next_pages)
        since = writer.paused_when or now
        period = HZ * pages // rate
        ms = period - (now - since)
        if ms >= shortest:
            debt = min(max(ms - longest, 0), longest)  # the rate may have dropped for a moment
            ms = max(min(ms, longest), 1)
            return Plan(ms, True, now + ms + debt, next_pages)
        if ms < -CREDIT_MS:
            return Plan(0, True, now, writer.nr_dirtied_pause)
        return Plan(0, True, since + period, writer.nr_dirtied_pause) if period else None

    async def _balance_dirty_pages(self, ms: int) -> None:
        """One pause, named for stack dumps."""
        self.paused += 1
        self.paused_ms += ms
        self.longest_ms = max(self.longest_ms, ms)
        self.sleeping += 1
        try:
            await trio.sleep(ms / HZ)
        finally:
            self.sleeping -= 1
