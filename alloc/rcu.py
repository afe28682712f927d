"""RCU: memory that lanes may still be looking at is given back after a grace period.

A lane brackets its lookups with `rcu_enter` and `rcu_exit`; in between it follows links without
a lock. The trio thread unlinks an object, leaves the object's own links alone, and has it freed by
`defer` when every lane was seen outside of a section or in a later one. Words: the epoch, then for
each lane, in a cache line of its own, 0 outside of sections or the epoch it found when it entered.

Why it is right: entering stores the lane's word, then a full barrier, then loads links; retiring
unlinks, raises the epoch, then a full barrier, then loads the lanes' words. So either the lane's
word is seen, or the lane sees the object unlinked. A section that began before the epoch was
raised holds an older epoch and is waited for.

What is deferred is not free: the allocator counts it as allocated, `deferred_bytes` says how much
it is. What is due goes in batches of `blimit`; above `qhimark` bytes (1/64 of the arena) batches
are large until `qlowmark` is reached, and above `qovld` whoever defers waits for the sections.

Locking: the class belongs to the trio thread. It waits for sections only, and those never wait;
one that lasts `stall_seconds` all the same is reported with what its lane serves.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
import trio
from numpy.typing import NDArray

from alloc.atomic import fetch_add, full_barrier, load_acquire, store_release
from alloc.jit import helper, kernel
from alloc.libc import monotonic_ns, sched_yield
from alloc.shrinker import SHRINK_STOP
from alloc.stall import STALL_S

log = logging.getLogger("nofailfs.alloc")

LANES_MAX = 64
LINE = 8  # words in a cache line
RCU_WORDS = LINE * (1 + LANES_MAX)
EPOCH = 0
NEVER = 1 << 62  # an epoch that does not come

BLIMIT, BLIMIT_MAX = 10, 10_000  # objects freed at a time: usually, and above qhimark
BLIMIT_SHIFT = 7  # or this share of all that wait
BATCH_TIMED, BATCH_NS = 100, 3_000_000  # a batch of more objects than this has a limit in time
TIME_EVERY = 32  # objects between two looks at the clock
ALL = 1 << 62  # a batch without limit
QHIMARK_SHARE = 64  # of the arena
QLOWMARK_SHARE, QOVLD_TIMES = 100, 2  # the kernel's 100 and 20000 beside its qhimark of 10000
PENDING_MAX = 20_000  # objects: their list is not the arena's

REAP_S, HURRY_S = 0.01, 0.001  # between two looks at the lanes: usually, and if memory is short
PATIENCE_NS = 100_000  # an expedited grace period
LOOK_NS = 10_000_000  # between two looks at the clock of somebody who waits for a grace period


@helper
def rcu_enter(words, lane):
    """Begin a section: what is reachable now stays memory until rcu_exit. Does not nest."""
    store_release(words, LINE * (1 + lane), load_acquire(words, EPOCH))
    full_barrier()


@helper
def rcu_exit(words, lane):
    """End the section; the lane holds nothing any more that it found in it."""
    store_release(words, LINE * (1 + lane), 0)


@helper
def _oldest(words, lanes):
    """The oldest epoch that a section of lanes [0, lanes) is in; NEVER when there is none."""
    full_barrier()
    oldest = np.int64(NEVER)
    for lane in range(lanes):
        seen = load_acquire(words, LINE * (1 + lane))
        if seen != 0 and seen < oldest:
            oldest = seen
    return oldest


@kernel("i8(i8[::1], i8)")
def oldest_section(words, lanes):
    """See `_oldest`. What was retired in that epoch or before may be freed."""
    return _oldest(words, lanes)


@kernel("i8(i8[::1], i8)")
def retire(words, lanes):
    """Begin a new epoch, after something was unlinked; returns the oldest one still in use."""
    fetch_add(words, EPOCH, 1)
    return _oldest(words, lanes)


@kernel("i8(i8[::1], i8, i8, i8)")
def wait_for_sections(words, lanes, epoch, until_ns):
    """Wait until no section of an older epoch is left, or until then by the monotonic clock.

    Returns the oldest epoch still in use.
    """
    oldest = _oldest(words, lanes)
    while oldest < epoch and monotonic_ns() < until_ns:
        sched_yield()
        oldest = _oldest(words, lanes)
    return oldest


class Rcu:
    """Grace periods of one arena of `memory_bytes`."""

    name = "rcu"  # of the shrinker

    def __init__(self, memory_bytes: int) -> None:
        self.words: NDArray[np.int64] = np.zeros(RCU_WORDS, np.int64)
        self.words[EPOCH] = 1
        self.blimit = BLIMIT
        self.qhimark = memory_bytes // QHIMARK_SHARE  # bytes, as the next two
        self.qlowmark = self.qhimark // QLOWMARK_SHARE
        self.qovld = self.qhimark * QOVLD_TIMES
        self.deferred_bytes = 0
        self.expedited = 0  # grace periods
        self.stalls = 0  # reports
        self.stall_seconds = STALL_S
        self.serves: Callable[[int], str] = "lane {}".format  # what a lane is at, for reports
        self._registered: set[int] = set()
        self._lanes = 0  # one more than the highest number registered
        self._pending: deque[tuple[int, Callable[[int], object], int, int]] = deque()
        self._crowded = False  # from above qhimark until qlowmark
        self._wake = trio.Event()
        self._blocked_by = 0  # the oldest epoch in use when something was last not due
        self._blocked_since = self._report_after = 0.0

    def register(self) -> int:
        """A number for a lane, which is outside of sections."""
        lane = min(set(range(LANES_MAX)) - self._registered, default=-1)
        assert lane >= 0, "out of lanes: raise LANES_MAX"
        self._registered.add(lane)
        self._lanes = max(self._registered) + 1
        return lane

    def unregister(self, lane: int) -> None:
        """The lane has ended, outside of sections."""
        assert self.words[LINE * (1 + lane)] == 0, f"lane {lane} ends inside a section"
        self._registered.remove(lane)
        self._lanes = max(self._registered, default=-1) + 1
        self._free_until(int(oldest_section(self.words, self._lanes)), ALL)

    # -- deferring ------------------------------------------------------------------------------

    def defer(self, free: Callable[[int], object], handle: int, nbytes: int) -> None:
        """Call free(handle), which gives `nbytes` back, after a grace period.

        The caller has unlinked the object. Frees it at once if no lane is in a section; may wait
        for sections when too much is pending.
        """
        self.defer_all(free, (handle,), nbytes)

    def defer_all(
        self, free: Callable[[int], object], handles: Sequence[int], nbytes: int
    ) -> None:
        """As `defer` for several objects of `nbytes` each, with one grace period."""
        if not self._lanes:
            for handle in handles:
                free(handle)
            return
        oldest = int(retire(self.words, self._lanes))
        epoch = int(self.words[EPOCH])
        self._pending.extend((epoch, free, handle, nbytes) for handle in handles)
        self.deferred_bytes += nbytes * len(handles)
        self._free_until(oldest, self._batch())
        if self.deferred_bytes > self.qovld or len(self._pending) > PENDING_MAX:
            self.synchronize()
        if self._pending:
            self._wake.set()

    def _batch(self) -> int:
        """Objects that may be freed at a time."""
        if self.deferred_bytes > self.qhimark:
            self._crowded = True
        elif self.deferred_bytes < self.qlowmark:
            self._crowded = False
        return BLIMIT_MAX if self._crowded else max(self.blimit, len(self._pending) >> BLIMIT_SHIFT)

    # -- grace periods --------------------------------------------------------------------------

    def reap(self) -> bool:
        """Free a batch of what is due, without waiting; whether more is due."""
        if not self._pending:
            return False
        oldest = int(oldest_section(self.words, self._lanes))
        self._free_until(oldest, self._batch())
        return self._more_due(oldest)

    def expedite(self) -> int:
        """Memory is short: give sections a moment to end, free all that is due; objects freed."""
        if not self._pending:
            return 0
        self.expedited += 1
        newest, until = self._pending[-1][0], time.monotonic_ns() + PATIENCE_NS
        oldest = int(wait_for_sections(self.words, self._lanes, newest, until))
        freed = self._free_until(oldest, ALL)
        self._more_due(oldest)
        return freed

    def synchronize(self) -> None:
        """Wait for a grace period, without the GIL. All that was deferred is free afterwards."""
        if self._lanes:
            retire(self.words, self._lanes)
            epoch, oldest = int(self.words[EPOCH]), 0
            while oldest < epoch:
                until = time.monotonic_ns() + LOOK_NS
                oldest = int(wait_for_sections(self.words, self._lanes, epoch, until))
                if oldest < epoch:
                    self._note_blocked(oldest)
        self._free_until(NEVER, ALL)

    async def reaper(self, hurry: Callable[[], bool]) -> None:
        """Frees in the background what is due, quickly if `hurry`; runs until cancelled."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            while self._pending:
                short = hurry()
                more = self.expedite() > 0 if short else self.reap()
                pause = HURRY_S if short or self._crowded else REAP_S
                await trio.sleep(0 if more else pause)

    @property
    def pending(self) -> int:
        """Objects that wait for a grace period."""
        return len(self._pending)

    def pending_bytes(self) -> int:
        """`deferred_bytes`, counted anew; O(objects)."""
        return sum(nbytes for _, _, _, nbytes in self._pending)

    def _free_until(self, epoch: int, most: int) -> int:
        """Free what was retired up to an epoch, `most` objects; how many it were."""
        freed, end = 0, 0
        if BATCH_TIMED < most < ALL:
            end = time.monotonic_ns() + BATCH_NS
        while self._pending and self._pending[0][0] <= epoch and freed < most:
            _, free, handle, nbytes = self._pending.popleft()
            self.deferred_bytes -= nbytes
            free(handle)
            freed += 1
            if end and freed % TIME_EVERY == 0 and time.monotonic_ns() > end:
                break
        return freed

    def count_objects(self) -> int:
        return len(self._pending)

    def scan_objects(self, nr: int, gfp: int) -> int:
        """All that is due after a moment, whatever `nr` is; SHRINK_STOP when that is nothing."""
        return self.expedite() or SHRINK_STOP

    # -- stalls ---------------------------------------------------------------------------------

    def readers(self) -> list[str]:
        """The lanes in sections that a grace period would wait for now, and what they serve."""
        epoch = int(self.words[EPOCH])
        sections = {lane: int(self.words[LINE * (1 + lane)]) for lane in sorted(self._registered)}
        return [self.serves(lane) for lane, seen in sections.items() if 0 < seen < epoch]

    def _more_due(self, oldest: int) -> bool:
        """Whether something is due; if something is not, look for how long that has been so."""
        if self._pending and self._pending[-1][0] > oldest:
            self._note_blocked(oldest)
        return bool(self._pending) and self._pending[0][0] <= oldest

    def _note_blocked(self, oldest: int) -> None:
        """Sections of the epoch `oldest` hold something back. Reports after 1, 2, 4, ... times
        `stall_seconds` of the same.
        """
        now = time.monotonic()
        if oldest != self._blocked_by:
            self._blocked_by, self._blocked_since = oldest, now
            self._report_after = self.stall_seconds
        elif now - self._blocked_since >= self._report_after:
            self._report_after *= 2
            self.stalls += 1
            log.warning(
                "rcu: INFO: nofailfs detected stalls on lanes: %s "
                "(t=%.1f s, epoch %d of %d): %d objects of %d bytes wait",
                ", ".join(self.readers()) or "none any more",
                now - self._blocked_since,
                oldest,
                int(self.words[EPOCH]),
                len(self._pending),
                self.deferred_bytes,
            )
