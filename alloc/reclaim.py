"""Reclaim: passes over what can be freed, and direct reclaim, on behalf of a task that waits.

A task whose request cannot be served reclaims itself before it sleeps, kswapd (alloc/kswapd.py)
before that becomes necessary. Both make passes over all shrinkers at falling priorities, direct
reclaim from 12 to 0; priority 0 looks at everything, twice, so a task sleeps only when there was
nothing left to free. Memory that is dirty is not reclaim's to clean: when clean memory runs short
it wakes the cleaners (flusher, metadata writer), and their progress comes back as `kick`.

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
from alloc.page import W_FREE, W_MIN, Words
from alloc.shrinker import NO_NODE, PRIORITY_FIRST, Shrinker, ShrinkerState
from alloc.throttle import CONGESTED, ISOLATED, NOPROGRESS, SWAP_CLUSTER_MAX, Throttle
from alloc.vmstat import VmStat

MAX_RECLAIM_RETRIES = 16
RESERVE_WAIT_S = 1.0  # for what may hold locks that kswapd needs
VAIN_STEP = 3
VAIN_S = 0.05


class Reclaim:
    """The shrinkers and cleaners of one arena, and the work of getting memory back."""

    def __init__(self, nodes: Sequence[Words], vmstat: VmStat, waiting: Callable[[], int]) -> None:
        self._nodes = nodes
        self._vmstat = vmstat
        self.background = Kswapd(self, nodes, vmstat, waiting)
        self.throttle = Throttle(vmstat, lambda: self.background.hopeless)
        self._shrinkers: list[ShrinkerState] = []
        self._cleaners: list[Callable[[], None]] = []
        self._kicks = 0
        self._vain: dict[int, tuple[int, float]] = {}  # by rights: kicks then, and when
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

    def wake_kswapd(self, helpless: bool = False) -> None:
        """Free memory is below `low`; see `Kswapd.wake`."""
        self.background.wake(helpless)

    def kick(self) -> None:
        """Something became reclaimable: no more holding back."""
        self._kicks += 1
        self.background.kick()

    def wake_cleaners(self) -> None:
        if self._cleaners:
            self._vmstat.add("cleaner_wakeups")
        for wake in self._cleaners:
            wake()

    def shrink_all(self, priority: int, gfp: int, who: str, target: int, nid: int = 0) -> int:
        """One pass over every shrinker of a node, each up to `target` objects freed; progress."""
        if self._in_pass:
            return 0
        validator = None if gfp & gfp_flags.NOFS else lockdep.current
        if validator is not None:
            validator.took(lockdep.FS_RECLAIM)
        self._in_pass = True
        self.who = who
        self.throttle.begin_pass(who == "kswapd")
        self.scanned = 0
        free_before = self._free()
        freed = 0
        try:
            for state in [s for s in self._shrinkers if s.nid in (NO_NODE, nid)]:
                nr_scanned, nr_freed = state.shrink(priority, gfp, target)
                self.scanned += nr_scanned
                freed += nr_freed
        finally:
            self._in_pass = False
            self.throttle.end_pass()
            if validator is not None:
                validator.dropped(lockdep.FS_RECLAIM)
        gained = max(self._free() - free_before, 0)
        self._vmstat.add("slabs_scanned", self.scanned)
        self._vmstat.add(f"pgsteal_{who}", gained)
        progress = max(freed, gained)
        if progress:
            self.background.failures = 0
        if progress > self.scanned >> 3:
            self.throttle.wake(NOPROGRESS)
        return progress

    def light_round(self, gfp: int) -> int:
        """What NORETRY may do: passes at falling priority until one has looked at something."""
        for priority in range(PRIORITY_FIRST, -1, -1):
            freed = self.shrink_all(priority, gfp, "direct", SWAP_CLUSTER_MAX)
            if self.scanned:
                return freed
        return 0

    def full_round(self, gfp: int, satisfied: Callable[[], bool]) -> None:
        """What RETRY_MAYFAIL may do: everything that direct reclaim does, in one go."""
        for _ in self._rounds(gfp):
            if satisfied():
                return

    async def direct(self, gfp: int, satisfied: Callable[[], bool]) -> None:
        """Direct reclaim of a waiting task: until satisfied, or nothing more can be freed.

        Skipped when somebody with the same rights has just looked at everything in vain and
        nothing was heard of since: many waiters would otherwise keep the cleaners from running.
        """
        if self._in_vain(gfp):
            return
        await self._spare_reserve(gfp, satisfied)
        if self._too_many_isolated(gfp):
            await self.throttle.wait(ISOLATED)
        freed = 0
        for priority, freed in self._rounds(gfp):
            if satisfied():
                return
            if not freed and priority <= CLEANERS_BELOW_PRIORITY:
                self.wake_cleaners()
            if freed:
                await trio.lowlevel.cancel_shielded_checkpoint()
            await self._consider_throttle(priority, freed)
            if satisfied():
                return
        if not freed:
            self._note_in_vain(gfp)

    async def _consider_throttle(self, priority: int, freed: int) -> None:
        """After a pass of direct reclaim: whether to wait a moment before the next."""
        if priority == 1 and not freed:
            await self.throttle.wait(NOPROGRESS)
        if self.throttle.congested:
            await self.throttle.wait(CONGESTED)

    def _too_many_isolated(self, gfp: int) -> bool:
        """Whether others have isolated too much; transactions may add more before that."""
        inactive = self._vmstat["nr_inactive_file"]
        if not gfp & gfp_flags.NOIO:
            inactive >>= 3
        return self._vmstat["nr_isolated_file"] > inactive

    def _reserve_is_short(self) -> bool:
        """Whether less than half of `min` is free and kswapd works on it."""
        if not self.background.running or self.background.hopeless:
            return False
        return self._free() <= sum(int(words[W_MIN]) for words in self._nodes) // 2

    async def _spare_reserve(self, gfp: int, satisfied: Callable[[], bool]) -> None:
        """Those who clean live on the rest of the reserve: kswapd refills it first.

        Who may hold locks that kswapd needs waits for a second at most.
        """
        if not self._reserve_is_short():
            return
        self._vmstat.add("pgscan_direct_throttle")
        with trio.move_on_after(RESERVE_WAIT_S if gfp & gfp_flags.NOFS else math.inf):
            while self._reserve_is_short() and not satisfied():
                self.wake_kswapd()
                await self.background.wait_pass()

    def _rounds(self, gfp: int) -> Iterator[tuple[int, int]]:
        """Passes of direct reclaim, each as (priority, freed), until one at 0 frees nothing.

        At priority 0 each pass may free twice as much as the one before.
        """
        priority, retries = PRIORITY_FIRST, 0
        while retries < MAX_RECLAIM_RETRIES:
            freed = self.shrink_all(priority, gfp, "direct", SWAP_CLUSTER_MAX << retries)
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

    def _in_vain(self, gfp: int) -> bool:
        """Whether a full round with these rights or more has just found nothing."""
        now = trio.current_time()
        for rights in (gfp_flags.KERNEL, gfp & gfp_flags.NOIO):
            kicks, noted = self._vain.get(rights, (-1, 0.0))
            if kicks == self._kicks and 0 <= now - noted < VAIN_S:
                return True
        return False

    def _note_in_vain(self, gfp: int) -> None:
        self._vain[gfp & gfp_flags.NOIO] = (self._kicks, trio.current_time())

    def _free(self) -> int:
        """Free pages of all nodes, those in rows not counted."""
        return sum(int(words[W_FREE]) for words in self._nodes)
