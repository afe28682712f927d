"""kswapd: background reclaim of a node, from its mark `low` up to `high`.

It is woken for the nodes of a request when none of them stays above `low`. A run makes passes at
priorities 12 down to 1 until enough is free and nobody waits; the priority falls when a pass looked
at too little or freed nothing. After a run that reached its aim it naps for 100 ms, looks again,
and only then sleeps until it is woken; the counters kswapd_*_hit_quickly say what ended a nap. A
run that frees nothing at all is a failure, and so is the sleep after it: it ends after 100 ms, or
when an I/O has ended.

After 16 failures in a row the node is hopeless, and kswapd stays down: each pass costs a look at
everything. That is over when anybody's pass frees something, or an I/O ends (`kick`). Only a
request that may not reclaim on its own behalf still wakes it: nobody else would look for it.

Caches that know no nodes free memory anywhere. They are asked while memory is short on all nodes
together, or somebody waits: one node that is full of what stays must not cost all their buffers.

Trio thread only; reads the free count and the marks without a lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from alloc import gfp as gfp_flags
from alloc.page import W_BOOST, W_FREE, W_HIGH, W_KSWAPD, Words
from alloc.shrinker import PRIORITY_FIRST
from alloc.throttle import SWAP_CLUSTER_MAX, WRITEBACK
from alloc.vmstat import VmStat
from alloc.zone import take_boost

if TYPE_CHECKING:
    from alloc.reclaim import Reclaim

BOOST_PRIORITY_LAST = 10
CLEANERS_BELOW_PRIORITY = 10
MAX_FAILURES = 16
NAP_S = 0.1
PRIORITY_LAST = 1


class Kswapd:
    """The background reclaimer of one node, whose words these are."""

    def __init__(
        self,
        reclaim: Reclaim,
        nid: int,
        words: Words,
        vmstat: VmStat,
        waiting: Callable[[int], int],
    ) -> None:
        self._reclaim = reclaim
        self._nid = nid
        self._words = words
        self._vmstat = vmstat
        self._waiting = waiting
        self._wake = trio.Event()
        self._kicked = trio.Event()
        self._passed = trio.Event()
        self._tasks = 0
        self.failures = 0  # runs in a row that freed nothing

    @property
    def running(self) -> bool:
        """Whether its task has been started."""
        return self._tasks > 0

    @property
    def hopeless(self) -> bool:
        return self.failures >= MAX_FAILURES

    def wake(self, helpless: bool = False) -> None:
        """Free memory is below `low`. Cheap, and harmless when it is not so.

        `helpless`: for a request that may not reclaim itself; a hopeless kswapd hears it, too.
        """
        if self._wake.is_set() or self.hopeless and not helpless:
            return
        if not self._balanced(int(self._words[W_BOOST])):
            self._wake.set()

    def kick(self) -> None:
        """Something became reclaimable: there is hope, and no more holding back."""
        self.failures = 0
        self.wake()
        self._kicked.set()

    async def run(self) -> None:
        """The task; runs until cancelled."""
        self._tasks += 1
        try:
            with gfp_flags.memalloc():
                while True:
                    await self._wake.wait()
                    again = True
                    while again:
                        self._wake, self._kicked = trio.Event(), trio.Event()
                        with self._working():
                            balanced = await self._balance()
                        self._note_pass()
                        again = await (self._nap() if balanced else self._back_off())
        finally:
            self._tasks -= 1
            self._note_pass()

    async def wait_pass(self) -> None:
        """Until it has made a pass, or ended; it must be running."""
        await self._passed.wait()

    def _note_pass(self) -> None:
        self._passed.set()
        self._passed = trio.Event()

    async def _nap(self) -> bool:
        """After a run that reached its aim: whether another is due so soon."""
        self._reclaim.throttles[self._nid].balanced()
        with trio.move_on_after(NAP_S):
            await self._wake.wait()
        if self._wake.is_set():
            self._vmstat.add("kswapd_low_wmark_hit_quickly")
            return True
        return self._off_high()

    async def _back_off(self) -> bool:
        """After a run that did not: let a cleaner get somewhere; whether to try again."""
        again = not self.hopeless and self._off_high()
        with trio.move_on_after(NAP_S):
            await self._kicked.wait()
        return again

    def _off_high(self) -> bool:
        """Whether it is not balanced (any more), counted under the kernel's name for that."""
        if self._balanced():
            return False
        self._vmstat.add("kswapd_high_wmark_hit_quickly")
        return True

    def _balanced(self, boost: int = 0) -> bool:
        return self._short(boost) <= 0 and not self._waiting(self._nid)

    def _short(self, boost: int = 0) -> int:
        """Pages that are missing to `high`, and to what a boost adds."""
        return int(self._words[W_HIGH] - self._words[W_FREE]) + boost

    async def _balance(self) -> bool:
        """One run; whether it reached its aim.

        A pass is to look at max(high, 32) objects, and ends when it has freed what is missing.
        The boost it found is made good from what is easily had: without cleaning, and without
        looking at more than a part of everything. With this run it is over either way.
        """
        self._vmstat.add("pageoutrun")
        reclaim, nids = self._reclaim, (self._nid,)
        throttle = reclaim.throttles[self._nid]
        enough = max(int(self._words[W_HIGH]), SWAP_CLUSTER_MAX)
        priority, total = PRIORITY_FIRST, 0
        boost = int(take_boost(self._words))
        while not self._balanced(boost):
            target = max(self._short(boost), SWAP_CLUSTER_MAX)
            common = reclaim.short() + boost > 0 or self._waiting(self._nid) > 0
            freed = reclaim.shrink_all(
                priority, gfp_flags.KERNEL, "kswapd", target, nids, common
            )
            total += freed
            self._note_pass()
            if self._balanced(boost) or self._balanced() and priority <= BOOST_PRIORITY_LAST:
                break
            if throttle.stat.immediate:
                await throttle.wait(WRITEBACK)
            if freed < SWAP_CLUSTER_MAX and priority <= CLEANERS_BELOW_PRIORITY:
                reclaim.wake_cleaners()
            if not freed or reclaim.scanned < enough:
                if priority == PRIORITY_LAST:
                    self.failures += not total
                    return False
                priority = max(reclaim.next_priority(priority, freed), PRIORITY_LAST)
            await trio.lowlevel.checkpoint()
        return True

    @contextmanager
    def _working(self) -> Iterator[None]:
        """While kswapd works, rows keep little (alloc/pcp.py)."""
        self._words[W_KSWAPD] = 1
        try:
            yield
        finally:
            self._words[W_KSWAPD] = 0
