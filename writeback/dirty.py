"""How much dirty memory there is, and how much there may be.

Counts are in pages; a dirty folio counts whole. Thresholds follow Linux: dirtyable memory is what
is free above the reserves plus the file cache; above the background threshold (10 %) the flusher
works, from half-way between it and the threshold (20 %) on writers are held back
(`writeback/throttle.py`), and above the limit nobody goes on. The limit is the threshold, but
follows it down slowly when memory shrinks: what was dirtied in good faith is written first.
A volume has one device: all completions are its own, so its proportion of the threshold, which
Linux takes over periods of 3 s, is 1; a min_ratio would have nothing to raise, max_ratio is there.

Once writers are held back, free run begins again only at the background threshold, not half-way, as
in Linux: write-back ends in large pieces, and in each gap of one whoever happens to be awake would
run free while the others sleep. With small memories that was half of all that was written.

Counters change by atomic addition, in kernels of any thread; thresholds are the trio thread's.
Writers that cannot wait (lanes) dirty below the ceiling of free run, one comparison; above it, up
to the limit, what the throttle has granted to the file. They tell the trio thread when the flusher
has work (`poke`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from writeback.position import Position

BACKGROUND_RATIO = 10  # vm.dirty_background_ratio, percent of dirtyable memory
PAGE_SIZE = 4096
RATIO = 20  # vm.dirty_ratio
RATELIMIT_PAGES = 16  # pages dirtied between two looks at the limits (Linux's floor)
LIMIT_MIN = 32  # pages: a writer can always dirty something when nothing is dirty
# words of `counts`; NR_DIRTIED and NR_WRITTEN only grow
NR_DIRTY, NR_WRITEBACK, NR_DIRTIED, NR_WRITTEN = range(4)
COUNT_FREERUN = 4  # below it nobody is held back
COUNT_BACKGROUND = 5  # above it the flusher has work
COUNT_LIMIT = 6  # from it on nobody goes on
NR_COUNTS = 8
SMOOTH_LOG = 5  # the limit falls by 1/32 of what it is too high, each time


def thresholds(
    dirtyable: int,
    background_ratio: int,
    ratio: int,
    background_bytes: int = 0,
    limit_bytes: int = 0,
) -> tuple[int, int]:
    """(background, threshold) in pages, Linux's fixed point: ratios are scaled by 4096 first.

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
        self.max_ratio = 100  # the device's share of the threshold, percent
        self.strict_limit = 0  # 1: that share is a limit of its own
        self._held_back = False  # writers are
        self._looked_at = -RATELIMIT_PAGES
        self._smoothed = 0
        self.background = 0
        self.thresh = 0
        self.update()

    @property
    def nr_dirty(self) -> int:
        return int(self.counts[NR_DIRTY])

    @property
    def nr_writeback(self) -> int:
        return int(self.counts[NR_WRITEBACK])

    @property
    def nr_dirtied(self) -> int:
        """Pages that were ever dirtied."""
        return int(self.counts[NR_DIRTIED])

    @property
    def nr_written(self) -> int:
        """Pages whose write-back ever ended."""
        return int(self.counts[NR_WRITTEN])

    @property
    def busy(self) -> int:
        """Pages that are dirty or on their way to the device."""
        return int(self.counts[NR_DIRTY] + self.counts[NR_WRITEBACK])

    @property
    def freerun(self) -> int:
        """Below so many busy pages nobody is held back."""
        return int(self.counts[COUNT_FREERUN])

    @property
    def limit(self) -> int:
        """Above so many busy pages nobody goes on."""
        return self.position().hard_limit

    def position(self) -> Position:
        """Where dirty memory stands now. The volume has one device: its share is the maximum."""
        limit = max(self.thresh, self._smoothed)
        share = max(self.thresh * self.max_ratio // 100, 1)
        return Position(
            self.background, self.thresh, limit, self.busy, share, strict=bool(self.strict_limit)
        )

    def update(self) -> None:
        """Look at memory again and set the thresholds."""
        background, thresh = thresholds(
            max(self.dirtyable(), 0),
            self.background_ratio,
            self.ratio,
            self.background_bytes,
            self.limit_bytes,
        )
        self.thresh = max(thresh, LIMIT_MIN)
        self.background = max(background, LIMIT_MIN // 2)
        self._looked_at = self.nr_dirtied
        at = self.position()
        self._held_back = at.dirty > (at.wb_background if self._held_back else at.freerun)
        self.counts[COUNT_BACKGROUND] = at.wb_background
        self.counts[COUNT_FREERUN] = at.wb_background if self._held_back else at.freerun
        self.counts[COUNT_LIMIT] = at.hard_limit
        assert self.background < self.thresh

    def look(self) -> None:
        """The same, if enough was dirtied since the last time."""
        if self.counts[NR_DIRTIED] - self._looked_at >= RATELIMIT_PAGES:
            self.update()

    def smooth(self) -> None:
        """Let the limit follow the threshold: up at once, down slowly. Called each 200 ms."""
        self._smoothed = max(self._smoothed, self.thresh)
        excess = self._smoothed - max(self.thresh, self.busy)
        self._smoothed -= max(excess, 0) >> SMOOTH_LOG

    def retune(self) -> None:
        """Ratios or bytes were changed: the flusher looks at it."""
        self.update()
        self.poke()

    def over_background(self) -> bool:
        """Whether the flusher has work to do without being asked."""
        self.update()
        return bool(self.counts[NR_DIRTY] > self.counts[COUNT_BACKGROUND])

    def poke(self) -> None:
        """Writers in other threads dirtied something: look whether there is work."""
        if self.over_background():
            self.wake_flusher()

    def dirtied(self) -> None:
        """Pages became dirty; a kernel has counted them."""
        self.look()
        if self.counts[NR_DIRTY] > self.counts[COUNT_BACKGROUND]:
            self.wake_flusher()
