"""RCU: memory that lanes may still be looking at is given back after a grace period.

A lane brackets its lookups with `rcu_enter` and `rcu_exit`; in between it follows links without
a lock. The trio thread unlinks an object, leaves the object's own links alone, and has it freed by
`defer`, or after `synchronize`, when every lane was seen outside of a section or in a later one.

Words: the epoch, then one word for each lane in a cache line of its own, 0 outside of sections
(a lane that sleeps, or waits for a request, is outside) and the epoch it found when it entered.

Why it is right: entering stores the lane's word, then a full barrier, then loads links; retiring
unlinks, raises the epoch, then a full barrier, then loads the lanes' words. So either the lane's
word is seen, or the lane sees the object unlinked. A section that began before the epoch was
raised holds an older epoch and is waited for.

Locking: the class belongs to the trio thread. It waits for sections only, and those never wait.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from alloc.atomic import fetch_add, full_barrier, load_acquire, store_release
from alloc.jit import helper, kernel
from alloc.libc import sched_yield

LANES_MAX = 64
LINE = 8  # words in a cache line
RCU_WORDS = LINE * (1 + LANES_MAX)
EPOCH = 0
PENDING_MAX = 256  # objects that may wait for a grace period before somebody waits for it
NEVER = 1 << 62  # an epoch that does not come


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


@kernel("void(i8[::1], i8)")
def wait_for_sections(words, lanes):
    """Begin a new epoch and wait until no section of an older one is left."""
    epoch = fetch_add(words, EPOCH, 1) + 1
    while _oldest(words, lanes) < epoch:
        sched_yield()


class Rcu:
    """Grace periods of one arena."""

    def __init__(self) -> None:
        self.words: NDArray[np.int64] = np.zeros(RCU_WORDS, np.int64)
        self.words[EPOCH] = 1
        self._registered: set[int] = set()
        self._lanes = 0  # one more than the highest number registered
        self._pending: deque[tuple[int, Callable[[int], object], int]] = deque()

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
        self.reap()

    def defer(self, free: Callable[[int], object], handle: int) -> None:
        """Call free(handle) after a grace period; at once if no lane is in a section.

        The caller has unlinked the object. May wait for sections when too much is pending.
        """
        if not self._lanes:
            free(handle)
            return
        oldest = int(retire(self.words, self._lanes))
        self._pending.append((int(self.words[EPOCH]), free, handle))
        self._free_until(oldest)
        if len(self._pending) > PENDING_MAX:
            self.synchronize()

    def reap(self) -> None:
        """Free what is due; never waits."""
        if self._pending:
            self._free_until(int(oldest_section(self.words, self._lanes)))

    def synchronize(self) -> None:
        """Wait for a grace period, without the GIL. All that was deferred is free afterwards."""
        if self._lanes:
            wait_for_sections(self.words, self._lanes)
        self._free_until(NEVER)

    @property
    def pending(self) -> int:
        """Objects that wait for a grace period."""
        return len(self._pending)

    def _free_until(self, epoch: int) -> None:
        while self._pending and self._pending[0][0] <= epoch:
            _, free, handle = self._pending.popleft()
            free(handle)
