"""Reclaim: passes over what can be freed, and direct reclaim, on behalf of a task that waits.

A task whose request cannot be served reclaims itself before it sleeps, kswapd (alloc/kswapd.py)
before that becomes necessary. Both make passes over all shrinkers at falling priorities, direct
reclaim from 12 to 0; priority 0 looks at everything, twice, so a task sleeps only when there was
nothing left to free. Memory that is dirty is not reclaim's to clean: when clean memory runs short
it wakes the cleaners (flusher, metadata writer), and their progress comes back as `kick`.

Each node has its kswapd, its throttle, and its part of the caches that know nodes. A pass of direct
reclaim goes over all nodes that may serve the request, at one priority.

Passes are synchronous and never allocate. Between passes the loop gets its turn, and direct reclaim
may be throttled (alloc/throttle.py). One pass runs at a time: a shrinker must not cause another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import trio

from alloc import gfp as gfp_flags
from alloc import lockdep
from alloc.kswapd import CLEANERS_BELOW_PRIORITY, Kswapd
from alloc.lru import Lru
from alloc.node import in_reach
from alloc.page import W_FREE, W_HIGH, W_MIN, Words
from alloc.shrinker import NO_NODE, PRIORITY_FIRST, Shrinker, ShrinkerState
from alloc.throttle import CONGESTED, ISOLATED, NOPROGRESS, SWAP_CLUSTER_MAX, Throttle
from alloc.vmstat import VmStat

MAX_RECLAIM_RETRIES = 16
RESERVE_WAIT_S = 1.0  # for what may hold locks that kswapd needs
VAIN_STEP = 3
VAIN_S = 0.05


class Reclaim:
    """The shrinkers and cleaners of one arena, and the work of getting memory back."""

    def __init__(
        self, nodes: Sequence[Words], lru: Lru, vmstat: VmStat, waiting: Callable[[int], int]
    ) -> None:
        """waiting: how many tasks wait for memory that a node may serve."""
        self._lru = lru
        self._nodes = nodes
        self._vmstat = vmstat
        self.kswapds = [
            Kswapd(self, nid, words, vmstat, waiting) for nid, words in enumerate(nodes)
        ]
        self.throttles = [Throttle(vmstat, kswapd) for kswapd in self.kswapds]
        self._all = tuple(range(len(nodes)))
        self._shrinkers: list[ShrinkerState] = []
        self._cleaners: list[Callable[[], None]] = []
        self._kicks = 0
        # by rights and nodes: kicks then, and when
        self._vain: dict[tuple[int, tuple[int, ...]], tuple[int, float]] = {}
        self._in_pass = False
        self.scanned = 0  # objects that the last pass looked at
        self.who = "direct"  # whose pass is running: the suffix of pgscan_ and pgsteal_

    def register_shrinker(self, shrinker: Shrinker, seeks: int, batch: int, nid: int) -> None:
        assert all(state.shrinker is not shrinker for state in self._shrinkers)
        self._shrinkers.append(ShrinkerState(shrinker, seeks, batch, nid))

    def unregister_shrinker(self, shrinker: Shrinker) -> None:
        self._shrinkers = [s for s in self._shrinkers if s.shrinker is not shrinker]

    @property
    def shrinkers(self) -> tuple[ShrinkerState, ...]:
        """Who gives memory back, in the order of registration."""
        return tuple(self._shrinkers)

    def register_cleaner(self, wake: Callable[[], None]) -> None:
        self._cleaners.append(wake)

    def reach(self, placed: int) -> tuple[int, ...]:
        """The nodes that may serve a request with these bits of its rights, nearest first."""
        return tuple(in_reach(self._nodes, placed)) if len(self._all) > 1 else self._all

    @property
    def running(self) -> bool:
        """Whether there is background reclaim."""
        return self.kswapds[0].running

    def wake_kswapd(self, placed: int = 0, helpless: bool = False) -> None:
        """The nodes of a request are below `low`; see `Kswapd.wake`."""
        for nid in self.reach(placed):
            self.kswapds[nid].wake(helpless)

    def kick(self) -> None:
        """Something became reclaimable: no more holding back."""
        self._kicks += 1
        for kswapd in self.kswapds:
            kswapd.kick()

    def wake_cleaners(self) -> None:
        if self._cleaners:
            self._vmstat.add("cleaner_wakeups")
        for wake in self._cleaners:
            wake()

    def shrink_all(
        self,
        priority: int,
        gfp: int,
        who: str,
        target: int,
        nids: tuple[int, ...] | None = None,
        common: bool = True,
    ) -> int:
        """One pass over every shrinker of some nodes, each up to `target` objects freed; progress.

        nids: all if None. common: also over caches that know no nodes.
        """
        if self._in_pass:
            return 0
        nids = self._all if nids is None else nids
        asked = (*nids, NO_NODE) if common else nids
        throttles = [self.throttles[nid] for nid in nids]
        validator = None if gfp & gfp_flags.NOFS else lockdep.current
        if validator is not None:
            validator.took(lockdep.FS_RECLAIM)
        self._in_pass = True
        self.who = who
        for throttle in throttles:
            throttle.begin_pass(who == "kswapd")
        self.scanned = 0
        free_before = self._free(nids)
        freed = 0
        try:
            for state in [s for s in self._shrinkers if s.nid in asked]:
                nr_scanned, nr_freed = state.shrink(priority, gfp, target)
                self.scanned += nr_scanned
                freed += nr_freed
        finally:
            self._in_pass = False
            for throttle in throttles:
                throttle.end_pass()
            if validator is not None:
                validator.dropped(lockdep.FS_RECLAIM)
        gained = max(self._free(nids) - free_before, 0)
        self._vmstat.add("slabs_scanned", self.scanned)
        self._vmstat.add(f"pgsteal_{who}", gained)
        progress = max(freed, gained)
        for nid, throttle in zip(nids, throttles, strict=True):
            if progress:
                self.kswapds[nid].failures = 0
            if progress > self.scanned >> 3:
                throttle.wake(NOPROGRESS)
        return progress

    def light_round(self, gfp: int, placed: int) -> int:
        """What NORETRY may do: passes at falling priority until one has looked at something."""
        nids = self.reach(placed)
        for priority in range(PRIORITY_FIRST, -1, -1):
            freed = self.shrink_all(priority, gfp, "direct", SWAP_CLUSTER_MAX, nids)
            if self.scanned:
                return freed
        return 0

    def full_round(self, gfp: int, placed: int, satisfied: Callable[[], bool]) -> None:
        """What RETRY_MAYFAIL may do: everything that direct reclaim does, in one go."""
        for _ in self._rounds(gfp, self.reach(placed)):
            if satisfied():
                return

    async def direct(self, gfp: int, placed: int, satisfied: Callable[[], bool]) -> None:
        """Direct reclaim of a waiting task: until satisfied, or nothing more can be freed.

        placed: which nodes its request may have, as in its rights.

        Skipped when somebody with the same rights has just looked at everything in vain and
        nothing was heard of since: many waiters would otherwise keep the cleaners from running.
        """
        nids = self.reach(placed)
        if self._in_vain(gfp, nids):
            return
        await self._spare_reserve(gfp, nids, satisfied)
        for nid in nids:
            if self._too_many_isolated(gfp, nid):
                await self.throttles[nid].wait(ISOLATED)
        freed = 0
        for priority, freed in self._rounds(gfp, nids):
            if satisfied():
                return
            if not freed and priority <= CLEANERS_BELOW_PRIORITY:
                self.wake_cleaners()
            if freed:
                await trio.lowlevel.cancel_shielded_checkpoint()
            await self._consider_throttle(nids, priority, freed)
            if satisfied():
                return
        if not freed:
            self._vain[gfp & gfp_flags.NOIO, nids] = (self._kicks, trio.current_time())

    async def _consider_throttle(self, nids: tuple[int, ...], priority: int, freed: int) -> None:
        """After a pass of direct reclaim: whether to wait a moment before the next."""
        if priority == 1 and not freed:
            await self.throttles[nids[0]].wait(NOPROGRESS)
        for nid in nids:
            if self.throttles[nid].congested:
                await self.throttles[nid].wait(CONGESTED)
                return

    def _too_many_isolated(self, gfp: int, nid: int) -> bool:
        """Whether others have isolated too much; transactions may add more before that."""
        inactive = self._lru.inactive_on(nid)
        if not gfp & gfp_flags.NOIO:
            inactive >>= 3
        return self._lru.nr_isolated[nid] > inactive

    def _refiller(self, nids: tuple[int, ...]) -> Kswapd | None:
        """If less than half of `min` is free on these nodes: who works on it."""
        if self._free(nids) > sum(int(self._nodes[nid][W_MIN]) for nid in nids) // 2:
            return None
        for nid in nids:
            kswapd, words = self.kswapds[nid], self._nodes[nid]
            if kswapd.running and not kswapd.hopeless and words[W_FREE] <= words[W_MIN] // 2:
                return kswapd
        return None

    async def _spare_reserve(
        self, gfp: int, nids: tuple[int, ...], satisfied: Callable[[], bool]
    ) -> None:
        """Those who clean live on the rest of the reserve: kswapd refills it first.

        Who may hold locks that kswapd needs waits for a second at most.
        """
        if self._refiller(nids) is None:
            return
        self._vmstat.add("pgscan_direct_throttle")
        with trio.move_on_after(RESERVE_WAIT_S if gfp & gfp_flags.NOFS else math.inf):
            while (kswapd := self._refiller(nids)) is not None and not satisfied():
                kswapd.wake()
                await kswapd.wait_pass()

    def _rounds(self, gfp: int, nids: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        """Passes of direct reclaim, each as (priority, freed), until one at 0 frees nothing.

        At priority 0 each pass may free twice as much as the one before.
        """
        priority, retries = PRIORITY_FIRST, 0
        while retries < MAX_RECLAIM_RETRIES:
            freed = self.shrink_all(priority, gfp, "direct", SWAP_CLUSTER_MAX << retries, nids)
            yield priority, freed
            if priority > 0:
                priority = self.next_priority(priority, freed)
                continue
            if not freed:
                return
            retries += 1
            self._vmstat.add("allocstall_retries")

    def next_priority(self, priority: int, freed: int) -> int:
        """After a pass that looked at something and freed nothing the next looks much further.

        So a vain round costs little more than its last two passes.
        """
        step = VAIN_STEP if self.scanned and not freed else 1
        return max(priority - step, 1 if priority > 1 else 0)

    def _in_vain(self, gfp: int, nids: tuple[int, ...]) -> bool:
        """Whether a full round with these rights or more has just found nothing."""
        now = trio.current_time()
        for rights in (gfp_flags.KERNEL, gfp & gfp_flags.NOIO):
            kicks, noted = self._vain.get((rights, nids), (-1, 0.0))
            if kicks == self._kicks and 0 <= now - noted < VAIN_S:
                return True
        return False

    def _free(self, nids: tuple[int, ...]) -> int:
        """Free pages of some nodes, those in rows not counted."""
        return sum(int(self._nodes[nid][W_FREE]) for nid in nids)

    def short(self) -> int:
        """Pages that are missing to `high` of all nodes together; negative if there are more."""
        return sum(int(words[W_HIGH] - words[W_FREE]) for words in self._nodes)
