"""Throttling: reclaimers that would only burn the processor wait a moment, for a reason.

| reason     | at most | who, and when                                                           |
| ---------- | ------- | ----------------------------------------------------------------------- |
| WRITEBACK  | 100 ms  | kswapd, which met folios again that it has marked and are still written |
| ISOLATED   | 20 ms   | direct reclaim: others have isolated too much of the inactive list      |
| NOPROGRESS | a tick  | direct reclaim at priority 1, which freed nothing                       |
| CONGESTED  | a tick  | direct reclaim, when all dirty folios that kswapd met are on their way  |

The first ends early when 32 pages for each waiter were written, the third when somebody frees more
than an eighth of what he looks at. The last two are skipped unless more than half of the file
pages is dirty or written, or when kswapd has given up. What reclaim waits for never waits here:
tasks with MEMALLOC do not reclaim. What a pass met is counted in a ReclaimStat, by the cache that
isolates; reasons, times and conditions are the kernel's, each node's its own, but for dirty pages,
which are counted for all nodes together. Trio thread only, by trio's clock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from alloc.vmstat import VmStat

if TYPE_CHECKING:
    from alloc.kswapd import Kswapd

WRITEBACK, ISOLATED, NOPROGRESS, CONGESTED = range(4)
NAMES = ("writeback", "isolated", "noprogress", "congested")
TICK_S = 0.001
TIMEOUT_S = (0.1, 0.02, TICK_S, TICK_S)
SWAP_CLUSTER_MAX = 32


class ReclaimStat:
    """What one pass met among the folios it isolated, in pages."""

    __slots__ = ("congested", "dirty", "immediate", "taken", "writeback")

    def __init__(self) -> None:
        self.taken = 0
        self.dirty = 0  # those under write-back included
        self.writeback = 0
        self.congested = 0  # under write-back and marked by an earlier pass
        self.immediate = 0  # of these, what kswapd met while the device could not keep up


class Throttle:
    """Who waits for which reason on a node, and what its kswapd has found out about it."""

    def __init__(self, vmstat: VmStat, kswapd: Kswapd) -> None:
        self._vmstat = vmstat
        self._kswapd = kswapd
        self._events = [trio.Event() for _ in NAMES]
        self._written = 0  # pages, since the first of those began to wait who wait for that
        self.waiting = [0] * len(NAMES)  # by reason
        self.stat = ReclaimStat()  # of the present pass, or the last one
        self.kswapd_in_pass = False
        self.writeback = False  # all that kswapd met in a pass was under write-back
        self.congested = False  # all that was dirty was, and marked
        for name in ("nr_throttled_written", "nr_vmscan_immediate_reclaim"):
            vmstat.add(name, 0)
        for name in NAMES:
            vmstat.add(f"vmscan_throttle_{name}", 0)

    # -- what a pass meets ------------------------------------------------------------------------

    def begin_pass(self, kswapd: bool) -> None:
        self.stat = ReclaimStat()
        self.kswapd_in_pass = kswapd

    def end_pass(self) -> None:
        """What a pass of kswapd says about the node."""
        stat = self.stat
        if self.kswapd_in_pass:
            self.writeback |= 0 < stat.writeback == stat.taken
            self.congested |= 0 < stat.dirty == stat.congested

    def met_dirty(self, pages: int) -> None:
        """A dirty folio that nobody writes yet: marked, so that it goes first once it is clean."""
        self.stat.dirty += pages
        self._vmstat.add("nr_vmscan_immediate_reclaim", pages)

    def met_writeback(self, pages: int, marked: bool) -> None:
        """A folio under write-back; `marked`: an earlier pass has met it already."""
        stat = self.stat
        stat.dirty += pages
        if marked:
            stat.congested += pages
        if marked and self.kswapd_in_pass and self.writeback:
            stat.immediate += pages
        else:
            stat.writeback += pages

    def balanced(self) -> None:
        """kswapd has reached its aim: nothing is congested any more."""
        self.writeback = self.congested = False

    # -- waiting ----------------------------------------------------------------------------------

    def _skipped(self, reason: int) -> bool:
        if reason not in (NOPROGRESS, CONGESTED):
            return False
        vmstat = self._vmstat
        pending = vmstat.get("nr_dirty", 0) + vmstat.get("nr_writeback", 0)
        pages = vmstat["nr_inactive_file"] + vmstat["nr_active_file"]
        return self._kswapd.hopeless or 2 * pending <= pages

    async def wait(self, reason: int) -> None:
        """Until the reason has gone, at most for its time. Can be cancelled."""
        if self._skipped(reason):
            return
        if reason == WRITEBACK and not self.waiting[WRITEBACK]:
            self._written = 0
        self._vmstat.add(f"vmscan_throttle_{NAMES[reason]}")
        self.waiting[reason] += 1
        try:
            with trio.move_on_after(TIMEOUT_S[reason]):
                await self._events[reason].wait()
        finally:
            self.waiting[reason] -= 1

    def wake(self, reason: int) -> None:
        """Everybody who waits for this reason goes on."""
        if self.waiting[reason]:
            self._events[reason].set()
            self._events[reason] = trio.Event()

    def written(self, pages: int) -> None:
        """So many pages were written."""
        waiting = self.waiting[WRITEBACK]
        if waiting:
            self._vmstat.add("nr_throttled_written", pages)
            self._written += pages
            if self._written > SWAP_CLUSTER_MAX * waiting:
                self.wake(WRITEBACK)
