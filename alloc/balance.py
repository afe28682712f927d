"""Balancing: folios migrate to the node that touches them, as pages did on the Origin.

The counters and their interrupts are in alloc/touches.py. What an interrupt asks for is refused if
the folio is in use (LOCKED, under write-back, referenced), if its memory policy wants it elsewhere,
if it has moved a short while ago (a folio that bounces is used from everywhere, and is in the right
place nowhere), if the node has nothing above `high` to spare, and when more pages than the rate
allows have moved. None of them is waited for: a folio that stays in demand interrupts again. It
moves as in compaction (alloc/migrate.py), and enters the new node's list at the head.

One task, which looks at the rings of all nodes ten times a second. Where there is one node it is
not started, and nothing is counted. Trio thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import trio
from numpy.typing import NDArray

from alloc import pcp, rows
from alloc.buddy import FREED_AND_WAITERS, RIGHTS_LOW, RIGHTS_MOVABLE
from alloc.mempolicy import allows, current_home
from alloc.migrate import MOVED, settle
from alloc.node import BOUND_SHIFT, HOME_SHIFT, NODE_SHIFT, PLACED
from alloc.page import (
    HOT,
    HOT_NODE_SHIFT,
    W_FREE,
    W_HIGH,
    W_HOT,
    W_HOT_NEXT,
    W_MEMPOLICY,
    W_MIGRATE,
    Pages,
    Words,
)
from alloc.touches import BOUNCED, COUNTER_BITS, TICK_MASK, claim, note_move, touch_all

if TYPE_CHECKING:
    from alloc.compaction import Compaction

TICK_S = 0.1
THRESHOLD = 8  # touches by which another node leads
THRESHOLD_MOST = (1 << COUNTER_BITS) - 1
REST_MS = 1000  # a folio that has moved is left alone for so long
REST_MS_MOST = int(TICK_MASK * TICK_S * 1000) // 2
RATE_MBPS = 64
BATCH = 32  # folios between two turns of the loop
REFUSALS = ("policy", "bounce", "nomem", "ratelimit")


class Balancer:
    """The migration of folios between the nodes of one arena.

    `freed` is called when what a move gave back is waited for.
    """

    def __init__(
        self,
        compaction: Compaction,
        nodes: Sequence[Words],
        pages: Pages,
        freed: Callable[[], object],
    ) -> None:
        self._buddy = compaction.buddy
        self._compaction = compaction
        self._vmstat = compaction.vmstat
        self._nodes = nodes
        self._pages = pages
        self._freed = freed
        self._taken = [0 for _ in nodes]  # entries of each ring
        self._tick = 0
        self._budget = 0.0  # pages that may move now
        self._arrays = [np.zeros(1, np.int64) for _ in range(3)]
        self._threshold = THRESHOLD
        self.rest_ms = REST_MS
        self.rate_mbps = RATE_MBPS  # MiB a second
        self.enabled = len(nodes) > 1
        self._set_word()
        if self.enabled:
            for name in ("numa_hint_faults", "numa_pages_migrated"):
                self._vmstat.add(name, 0)
            for name in REFUSALS:
                self._vmstat.add(f"numa_migrate_{name}", 0)

    def _set_word(self) -> None:
        self._nodes[0][W_MIGRATE] = self._threshold if self.enabled else 0

    def enable(self, on: bool) -> None:
        """Whether touches are counted and folios migrate."""
        self.enabled = on
        self._set_word()

    @property
    def threshold(self) -> int:
        """By how many touches a node must lead; less where counters are smaller."""
        return self._threshold

    @threshold.setter
    def threshold(self, touches: int) -> None:
        assert 1 <= touches <= THRESHOLD_MOST
        self._threshold = touches
        self._set_word()

    def touch(self, pfns: NDArray[np.int64]) -> None:
        """The running task uses these folios, on behalf of who is at home on its home node."""
        touch_all(self._buddy.words, self._pages.private, pfns, current_home())

    async def run(self) -> None:
        """The task; runs until cancelled."""
        while True:
            await trio.sleep(TICK_S)
            self._tick += 1
            rate = self.rate_mbps * 256
            self._budget = min(self._budget + rate * TICK_S, rate)
            for n, (pfn, node) in enumerate(self._interrupts()):
                self._migrate(pfn, node)
                if n % BATCH == BATCH - 1:
                    await trio.lowlevel.checkpoint()

    def _interrupts(self) -> Iterator[tuple[int, int]]:
        """The folios that are wanted elsewhere, and where. An entry may be old, or half written."""
        for nid, words in enumerate(self._nodes):
            first, last = self._taken[nid], int(words[W_HOT_NEXT])
            self._taken[nid] = last
            self._vmstat.add("numa_hint_faults", last - first)
            entries = {int(words[W_HOT + k % HOT]) for k in range(max(first, last - HOT), last)}
            for entry in sorted(entries - {0}):
                yield entry >> HOT_NODE_SHIFT, entry & (1 << HOT_NODE_SHIFT) - 1

    def _migrate(self, pfn: int, node: int) -> None:
        """Move a folio to a node, unless something is against it."""
        mover = self._compaction.mover
        if mover is None:
            return
        rest = round(self.rest_ms / 1000 / TICK_S)
        here = int(claim(*self._buddy, self._pages.private, pfn, node, self._tick, rest))
        if here < 0:
            if here == BOUNCED:
                self._refuse("bounce")
            return
        sources, targets, verdicts = self._arrays
        sources[0], targets[0], verdicts[0] = pfn, 0, 0
        policy = mover.policy_of(pfn) or int(self._nodes[0][W_MEMPOLICY])
        pages = 1 << int(self._pages.order[pfn])
        if not allows(policy, node):
            self._refuse("policy")
        elif pages > self._budget:
            self._refuse("ratelimit")
        elif not self._take(node, pfn):
            self._refuse("nomem")
        else:
            mover.move_folios(sources, targets, verdicts)
            if verdicts[0] == MOVED:
                note_move(self._pages.private, int(targets[0]), self._tick)
                self._budget -= pages
                self._vmstat.add("numa_pages_migrated", pages)
            self._vmstat.add(f"pgmigrate_{'success' if verdicts[0] == MOVED else 'fail'}")
        if settle(*self._buddy, sources, targets, verdicts, 1) == FREED_AND_WAITERS:
            self._freed()

    def _refuse(self, why: str) -> None:
        self._vmstat.add(f"numa_migrate_{why}")

    def _take(self, node: int, pfn: int) -> int:
        """A block on a node for the folio, into targets[0], if there is more than `high`; or 0."""
        order, words = int(self._pages.order[pfn]), self._nodes[node]
        if words[W_FREE] - (1 << order) > words[W_HIGH]:
            rights = RIGHTS_LOW | RIGHTS_MOVABLE | PLACED | 1 << BOUND_SHIFT + node
            rights |= node << NODE_SHIFT | node << HOME_SHIFT
            self._arrays[1][0] = abs(int(pcp.alloc_block(*self._buddy, rows.TRIO, order, rights)))
        return int(self._arrays[1][0])
