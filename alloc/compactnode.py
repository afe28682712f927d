"""Compaction of one node: runs, when they are worth it, and what is kept from one to the next.

A run takes one aligned unit after the other from the bottom that the migrate scanner found worth
it, moves its folios to free pages at the top (alloc/scanner.py, alloc/migrate.py), and asks after
each whether that was enough. It ends when the scanners meet. So that the next run does not begin
anew, positions are kept, one for asynchronous runs and one for others, and pageblocks in which
there was nothing are passed over until the scanners have met and kcompactd has come by.

A run that failed is deferred: for the next 1, 2, 4, ... 64 requests of its order nobody tries,
unless at full priority. kcompactd does the same in the background for what was asked for last, and
keeps the fragmentation score below its mark (`proactiveness`).

Runs are steps on the trio thread. Nothing is isolated between two steps, so they may interleave.
Lists are the node's; `settle` takes the words of all nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING

import numpy as np
import trio

from alloc.buddy import FREED_AND_WAITERS
from alloc.gfp import COSTLY_ORDER
from alloc.migrate import MOVED, settle
from alloc.node import spanned
from alloc.page import (
    HIGHATOMIC,
    ORDER_MAX,
    W_BLOCK_ORDER,
    W_FREE,
    W_FREE_HIGHATOMIC,
    W_FREE_ORDERS,
    W_KSWAPD,
    W_LOW,
    W_MIN,
    W_START,
    Words,
)
from alloc.scanner import (
    ANY_TYPE,
    BATCH,
    C_FREE,
    C_FREE_SCANNED,
    C_ISOLATED,
    C_LIMIT,
    C_MIGRATE,
    C_MIGRATE_SCANNED,
    NO_SKIP,
    STATE_WORDS,
    find_unit,
    isolate,
    take_targets,
)
from alloc.zone import nr_blocks
from alloc.zoneinfo import all_free_blocks, fragmentation_index, unusable_index

if TYPE_CHECKING:
    from alloc.compaction import Compaction

ASYNC, SYNC_LIGHT, SYNC_FULL = "async", "sync_light", "sync_full"  # priorities
# how a run ended, the better the further down
SKIPPED = "skipped"  # too little memory, or fragmentation is not what is wrong
DEFERRED = "deferred"
PARTIAL_SKIPPED = "partial_skipped"  # in vain, begun in the middle
COMPLETE = "complete"  # in vain
SUCCESS = "success"
RESULTS = (SKIPPED, DEFERRED, PARTIAL_SKIPPED, COMPLETE, SUCCESS)

DEFER_SHIFT_MAX = 6
PROACTIVE_S = 0.5
KSWAPD_POLL_S = 0.01


class Deferral:
    """How often to leave compaction alone after it failed: 2^shift requests of that order."""

    def __init__(self) -> None:
        self.order_failed = ORDER_MAX + 1  # the smallest order that compaction failed for
        self.shift = 0
        self.considered = 0

    def defer(self, order: int) -> None:
        """A run for this order failed."""
        self.considered = 0
        self.shift = min(self.shift + 1, DEFER_SHIFT_MAX)
        self.order_failed = min(self.order_failed, order)

    def deferred(self, order: int) -> bool:
        """Whether a run for this order shall be left out; counts the question."""
        if order < self.order_failed:
            return False
        self.considered = min(self.considered + 1, 1 << self.shift)
        return self.considered < 1 << self.shift

    def reset(self, order: int, served: bool) -> None:
        """A run for this order succeeded; served: and the request got its block."""
        if served:
            self.considered = self.shift = 0
        self.order_failed = max(self.order_failed, order + 1)


class Run:
    """One run: what for, how far it may go, where it is, and how it ended."""

    __slots__ = ("ignore", "mt", "order", "result", "state", "whole")

    def __init__(self, order: int, mt: int, ignore: bool, whole: bool) -> None:
        self.order = order
        self.mt = mt
        self.ignore = ignore
        self.whole = whole  # it begins at the bottom
        self.state = np.zeros(STATE_WORDS, np.int64)
        self.result = SKIPPED


class NodeCompaction:
    """Compaction of one node; tunables and the owner of the folios are those of `common`."""

    def __init__(self, common: Compaction, words: Words) -> None:
        self._common = common
        self._words = words
        self._all = common.buddy
        self._here = common.buddy._replace(words=words)
        self._vmstat = common.vmstat
        self.deferral = Deferral()
        self._first, blocks = int(words[W_START]), nr_blocks(spanned(words))
        self._top = self._first + (blocks - 1 << int(words[W_BLOCK_ORDER]))
        self._skip = np.full(blocks, NO_SKIP, np.uint8)
        self._flush = False  # the scanners have met: hints have had their time
        self._reset_positions()
        self._sources = np.zeros(BATCH, np.int64)
        self._targets = np.zeros(BATCH, np.int64)
        self._verdicts = np.zeros(BATCH, np.int64)
        self._wake = trio.Event()
        self._asked = 0  # the largest order that kcompactd was woken for

    # ---------------------------------------------------------------- on behalf of requests

    def objection(self, order: int, priority: str) -> str:
        """Why there shall be no run for a request: DEFERRED, SKIPPED, or nothing. Counts it."""
        if priority != SYNC_FULL and self.deferral.deferred(order):
            return DEFERRED
        return "" if self.suitable(order) else SKIPPED

    def direct(
        self, order: int, mt: int, priority: str, satisfied: Callable[[], bool]
    ) -> Generator[str, None, str]:
        """A run for a request of type `mt`; yields after each step, and returns how it ended.

        satisfied: whether the request has been served; asked when a block has become free.
        """
        run = self._begin(order, mt if priority == ASYNC else ANY_TYPE, priority)
        for _ in self._steps(run, satisfied, "compact"):
            yield PARTIAL_SKIPPED
        if run.result == SUCCESS:
            self.deferral.reset(order, served=True)
        elif priority != ASYNC:
            self.deferral.defer(order)
        return run.result

    def suitable(self, order: int) -> bool:
        """Whether there is room to move folios in, and memory in pieces rather than short."""
        words = self._words
        mark = int(words[W_LOW if order > COSTLY_ORDER else W_MIN]) + (2 << order)
        if self._common.mover is None or int(words[W_FREE] - words[W_FREE_HIGHATOMIC]) < mark:
            return False
        if order <= COSTLY_ORDER:
            return True
        index = fragmentation_index(all_free_blocks(words), order)
        return not 0 <= index <= self._common.extfrag_threshold

    # ---------------------------------------------------------------- runs

    def _begin(self, order: int, mt: int, priority: str) -> Run:
        full = priority == SYNC_FULL
        start = self._first if full else self._migrate[priority] >> order << order
        run = Run(order, mt, ignore=full, whole=start == self._first)
        run.state[C_MIGRATE] = start
        run.state[C_FREE] = self._top if full else self._free
        run.state[C_LIMIT] = ORDER_MAX + 1
        return run

    def _steps(self, run: Run, enough: Callable[[], bool], who: str) -> Iterator[None]:
        """Free one unit after the other, a step each; run.result says how it ended."""
        args = (self._skip, run.state, run.order, run.mt, run.ignore)
        run.result = COMPLETE if run.whole else PARTIAL_SKIPPED
        try:
            while unit := int(find_unit(*self._here, *args)):
                if self._empty(run, unit):
                    if enough():
                        run.result = SUCCESS
                        run.state[C_MIGRATE] = unit
                        return
                    yield
                if run.state[C_LIMIT] == 0:
                    break  # there are no free pages above the unit
            self._reset_positions()
            self._flush = True
        finally:
            self._note(run, who)

    def _empty(self, run: Run, unit: int) -> bool:
        """Move the folios of a unit out of it; whether all are gone."""
        mover = self._common.mover
        assert mover is not None
        sources, targets, verdicts = self._sources, self._targets, self._verdicts
        while True:
            n = int(isolate(*self._here, run.state, unit, run.order, sources))
            if n <= 0:
                return n == 0
            args = (run.state, unit, run.order, sources, targets, n)
            found = int(take_targets(*self._here, *args))
            verdicts[:n] = 0
            mover.move_folios(sources[:found], targets[:found], verdicts[:found])
            moved = int(np.count_nonzero(verdicts[:n] == MOVED))
            if settle(*self._all, sources, targets, verdicts, n) == FREED_AND_WAITERS:
                self._common.freed()
            self._vmstat.add("pgmigrate_success", moved)
            self._vmstat.add("pgmigrate_fail", n - moved)
            if moved < n:
                return False

    def _note(self, run: Run, who: str) -> None:
        """Keep where a run came to, and count what it did."""
        state = run.state.tolist()
        if run.result == SUCCESS:
            priority = ASYNC if run.mt != ANY_TYPE else SYNC_LIGHT
            self._migrate[priority] = state[C_MIGRATE]
            self._migrate[ASYNC] = max(self._migrate.values())
            self._free = state[C_FREE]
        self._vmstat.add("compact_migrate_scanned", state[C_MIGRATE_SCANNED])
        self._vmstat.add("compact_free_scanned", state[C_FREE_SCANNED])
        self._vmstat.add("compact_isolated", state[C_ISOLATED])
        if who == "compact_daemon":
            self._vmstat.add("compact_daemon_migrate_scanned", state[C_MIGRATE_SCANNED])
            self._vmstat.add("compact_daemon_free_scanned", state[C_FREE_SCANNED])

    def _reset_positions(self) -> None:
        self._migrate = dict.fromkeys((ASYNC, SYNC_LIGHT), self._first)
        self._free = self._top

    def compact(self) -> Iterator[None]:
        """Make as many blocks as can be, the largest first; a step for each unit."""
        for order in range(ORDER_MAX, 0, -1):
            run = self._begin(order, ANY_TYPE, SYNC_FULL)
            yield from self._steps(run, lambda: False, "compact")

    # ---------------------------------------------------------------- in the background

    @property
    def score(self) -> int:
        """Percent of free memory in blocks smaller than a pageblock: external fragmentation."""
        order = int(self._words[W_BLOCK_ORDER])
        return unusable_index(all_free_blocks(self._words), order) // 10

    def wake(self, order: int) -> None:
        """A request for a block of this order had to take the slow path."""
        self._asked = max(self._asked, order)
        self._wake.set()

    async def kcompactd(self) -> None:
        """Background compaction, while kswapd sleeps; runs until cancelled."""
        rest = 0
        while True:
            with trio.move_on_after(PROACTIVE_S):
                await self._wake.wait()
            while self._words[W_KSWAPD]:
                await trio.sleep(KSWAPD_POLL_S)
            if self._flush:
                self._flush = False
                self._skip[:] = NO_SKIP
            if self._asked:
                self._wake = trio.Event()
                order, self._asked = self._asked, 0
                self._vmstat.add("compact_daemon_wake")
                await self._for_order(order)
            elif rest:
                rest -= 1
            elif not await self._proactive():
                rest = 1 << DEFER_SHIFT_MAX

    async def _for_order(self, order: int) -> None:
        """Have a free block of this order, unless that failed lately."""
        if self.has_block(order) or not self.suitable(order) or self.deferral.deferred(order):
            return
        self._common.drain()
        run = self._begin(order, ANY_TYPE, SYNC_LIGHT)
        for _ in self._steps(run, lambda: self.has_block(order), "compact_daemon"):
            await trio.lowlevel.checkpoint()
        if run.result == SUCCESS:
            self.deferral.reset(order, served=False)
        else:
            self.deferral.defer(order)

    def has_block(self, order: int) -> bool:
        """Whether there is a free block as large, for whatever type."""
        lists = self._words[W_FREE_ORDERS : W_FREE_ORDERS + HIGHATOMIC]
        return bool((lists >> order).any())

    async def _proactive(self) -> bool:
        """Bring the score below its mark; False if it was above and a run did not help."""
        low, high = self._common.score_marks
        before = self.score
        if not self._common.proactiveness or self._common.mover is None or before <= high:
            return True
        if self._words[W_FREE] < self._words[W_LOW]:
            return True
        self._common.drain()
        run = self._begin(int(self._words[W_BLOCK_ORDER]), ANY_TYPE, SYNC_LIGHT)
        for _ in self._steps(
            run, lambda: self.score <= low or self._words[W_KSWAPD] != 0, "compact_daemon"
        ):
            await trio.lowlevel.checkpoint()
        return self.score < before

