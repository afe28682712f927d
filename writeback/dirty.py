"""How much dirty memory there may be, and the writers who wait because there is too much.

Counts are in pages; a dirty folio counts whole. Limits follow Linux: dirtyable memory is what is
free above the reserves plus the file cache; the background threshold (10 %) starts the flusher,
above the hard limit (20 %) a writer waits before it takes a folio, in FIFO order, until the
flusher has cleaned enough. Writers never write.

Counters change by atomic addition, in kernels of any thread; waiting and waking happen on the
trio thread. Writers that cannot wait (lanes) dirty only below the freerun ceiling and while nobody
is in line, and tell the trio thread when the flusher has work (`poke`).

Invariant: dirty + writeback <= limit + what each admitted writer dirties in one step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
import trio

from alloc import lockdep

BACKGROUND_RATIO = 10  # vm.dirty_background_ratio, percent of dirtyable memory
PAGE_SIZE = 4096
RATIO = 20  # vm.dirty_ratio
RATELIMIT_PAGES = 16  # pages dirtied between two looks at the limits (Linux's floor)
LIMIT_MIN = 32  # pages: a writer can always dirty something when nothing is dirty
# words of `counts`; NR_DIRTIED and NR_WRITTEN only grow
NR_DIRTY, NR_WRITEBACK, NR_DIRTIED, NR_WRITTEN = range(4)
COUNT_FREERUN = 4  # below it nobody is held back: half-way between background and limit
COUNT_WAITERS = 5  # writers in line
COUNT_BACKGROUND = 6  # above it the flusher has work
NR_COUNTS = 8


def thresholds(
    dirtyable: int,
    background_ratio: int,
    ratio: int,
    background_bytes: int = 0,
    limit_bytes: int = 0,
) -> tuple[int, int]:
    """(background, limit) in pages, Linux's fixed point: ratios are scaled by 4096 first.

    Bytes that are not 0 are instead of the ratio; memory has no room for more than it has.
    """
    limit = (ratio * 4096 // 100) * dirtyable // 4096
    background = (background_ratio * 4096 // 100) * dirtyable // 4096
    if limit_bytes:
        limit = min(-(-limit_bytes // PAGE_SIZE), dirtyable)
    if background_bytes:
        background = -(-background_bytes // PAGE_SIZE)
    if background >= limit:
        background = limit // 2
    return background, limit


class Dirty:
    """The dirty accounting of one volume.

    `dirtyable()` tells free pages above the reserves plus file LRU pages plus one;
    `wake_flusher()` is called when there is something to clean, and costs nothing when repeated.
    """

    def __init__(
        self,
        dirtyable: Callable[[], int],
        *,
        background_ratio: int = BACKGROUND_RATIO,
        ratio: int = RATIO,
    ) -> None:
        assert 0 < ratio <= 100
        assert 0 < background_ratio <= 100
        self.dirtyable = dirtyable
        self.background_ratio = background_ratio
        self.ratio = ratio
        self.background_bytes = 0  # vm.dirty_background_bytes: instead of the ratio
        self.limit_bytes = 0  # vm.dirty_bytes
        self.counts = np.zeros(NR_COUNTS, np.int64)
        self.wake_flusher: Callable[[], None] = lambda: None
        self.throttled = 0  # times a writer had to wait
        self._waiters: deque[tuple[int, trio.Event]] = deque()
        self._looked_at = -RATELIMIT_PAGES
        self.background = 0
        self.limit = 0
        self.update()

    @property
    def nr_dirty(self) -> int:
        return int(self.counts[NR_DIRTY])

    @property
    def nr_writeback(self) -> int:
        return int(self.counts[NR_WRITEBACK])

    @property
    def nr_waiting(self) -> int:
        return len(self._waiters)

    def update(self) -> None:
        """Look at memory again and set the thresholds."""
        background, limit = thresholds(
            max(self.dirtyable(), 0),
            self.background_ratio,
            self.ratio,
            self.background_bytes,
            self.limit_bytes,
        )
        self.limit = max(limit, LIMIT_MIN)
        self.background = max(background, LIMIT_MIN // 2)
        self._looked_at = int(self.counts[NR_DIRTIED])
        self.counts[COUNT_BACKGROUND] = self.background
        self.counts[COUNT_FREERUN] = (self.background + self.limit) // 2
        assert self.background < self.limit

    def retune(self) -> None:
        """Ratios or bytes were changed: who may go on does, and the flusher looks at it."""
        self.update()
        self.admit()
        self.poke()

    def over_background(self) -> bool:
        """Whether the flusher has work to do without being asked."""
        self.update()
        return bool(self.counts[NR_DIRTY] > self.background)

    def poke(self) -> None:
        """Writers in other threads dirtied something: look whether there is work."""
        if self.over_background():
            self.wake_flusher()

    def dirtied(self) -> None:
        """Pages became dirty; a kernel has counted them."""
        counts = self.counts
        if counts[NR_DIRTIED] - self._looked_at >= RATELIMIT_PAGES:
            self.update()
        if counts[NR_DIRTY] > self.background:
            self.wake_flusher()

    def must_wait(self) -> bool:
        """Whether a writer has to wait now; the cheap test before `balance`."""
        counts = self.counts
        if self._waiters:
            return True
        if counts[NR_DIRTIED] - self._looked_at >= RATELIMIT_PAGES:
            self.update()
        return bool(counts[NR_DIRTY] + counts[NR_WRITEBACK] >= self.limit)

    async def balance(self, pages: int) -> None:
        """Wait until `pages` more may be dirtied. Call it before any folio is taken."""
        if lockdep.current is not None:
            lockdep.current.wants(lockdep.FS_RECLAIM)  # the flusher works under it
        if not self.must_wait():
            return
        self.update()
        if not self.must_wait():
            return
        self.throttled += 1
        waiter = (pages, trio.Event())
        self._waiters.append(waiter)
        self.counts[COUNT_WAITERS] = len(self._waiters)
        self.wake_flusher()
        try:
            await self._wait_dirty_limit(waiter[1])
        except BaseException:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self.counts[COUNT_WAITERS] = len(self._waiters)
            else:
                self.admit()
            raise

    async def _wait_dirty_limit(self, event: trio.Event) -> None:
        """The wait of balance_dirty_pages, named for stack dumps."""
        await event.wait()

    def admit(self) -> None:
        """Wake the oldest waiters that fit under the limit."""
        if not self._waiters:
            return
        self.update()
        busy = int(self.counts[NR_DIRTY] + self.counts[NR_WRITEBACK])
        while self._waiters and busy < self.limit:
            pages, event = self._waiters.popleft()
            busy += pages
            event.set()
        self.counts[COUNT_WAITERS] = len(self._waiters)
