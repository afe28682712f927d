"""Compaction: large free blocks made by moving folios out of the way, instead of evicting them.

Each node is compacted by itself (alloc/compactnode.py): folios move within it, and it has its own
kcompactd. Who waits for a larger block has the nodes compacted that he may be served from, in the
order in which he tries them: asynchronously before reclaim (only pageblocks of the request's type),
sync-light after it (all types), and at full priority, without hints and from the beginning, if that
did not help. Nothing waits here for locks or I/O: priorities only differ in what they look at.

Trio thread only; runs are generators of steps, between which the loop gets its turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from alloc.compactnode import RESULTS, SKIPPED, SUCCESS, NodeCompaction
from alloc.migrate import Mover
from alloc.node import in_reach
from alloc.page import Buddy, Words
from alloc.vmstat import VmStat

EXTFRAG_THRESHOLD = 500
PROACTIVENESS = 20
COUNTERS = (
    "compact_stall",
    "compact_success",
    "compact_fail",
    "compact_migrate_scanned",
    "compact_free_scanned",
    "compact_isolated",
    "compact_daemon_wake",
    "compact_daemon_migrate_scanned",
    "compact_daemon_free_scanned",
    "pgmigrate_success",
    "pgmigrate_fail",
)


class Compaction:
    """Compaction of one arena. Without a mover there is nothing to move, and runs are skipped.

    `drain` gives back what rows keep; `freed` is called when what a move gave back is waited for.
    """

    def __init__(
        self,
        buddy: Buddy,
        nodes: Sequence[Words],
        vmstat: VmStat,
        drain: Callable[[], None],
        freed: Callable[[], object],
    ) -> None:
        self.buddy = buddy
        self.vmstat = vmstat
        self.drain = drain
        self.freed = freed
        self.mover: Mover | None = None
        self.extfrag_threshold = EXTFRAG_THRESHOLD  # thousandths
        self.proactiveness = PROACTIVENESS  # percent
        self._rows = nodes
        self.nodes = [NodeCompaction(self, words) for words in nodes]
        for name in COUNTERS:
            vmstat.add(name, 0)

    def register_mover(self, mover: Mover) -> None:
        """Who owns the folios on the LRU, and moves them."""
        assert self.mover is None, "the folios of an arena have one owner"
        self.mover = mover

    @property
    def score_marks(self) -> tuple[int, int]:
        """The score that proactive compaction aims at, and the one above which it begins."""
        low = max(100 - self.proactiveness, 5)
        return low, min(low + 10, 100)

    def direct(
        self, order: int, mt: int, placed: int, priority: str, satisfied: Callable[[], bool]
    ) -> Iterator[str]:
        """Runs for a request of type `mt`, in steps; yields how it stands, in the end the result.

        placed: the nodes it may have, as in its rights. satisfied: whether it has been served;
        asked when a block has become free.
        """
        best = SKIPPED
        ran = False
        for number in in_reach(self._rows, placed):
            node = self.nodes[number]
            result = node.objection(order, priority)
            if not result:
                if not ran:
                    self.vmstat.add("compact_stall")
                    self.drain()
                    ran = True
                result = yield from node.direct(order, mt, priority, satisfied)
            best = max(best, result, key=RESULTS.index)
            if best == SUCCESS:
                break
        if ran:
            self.vmstat.add("compact_success" if best == SUCCESS else "compact_fail")
        yield best

    def compact_memory(self) -> Iterator[None]:
        """Make as many blocks as can be, the largest first; a step for each unit."""
        if self.mover is None:
            return
        self.drain()
        for node in self.nodes:
            yield from node.compact()

    def wake(self, order: int, placed: int) -> None:
        """A request for a block of this order, on these nodes, had to take the slow path."""
        if order and self.mover is not None:
            for number in in_reach(self._rows, placed):
                self.nodes[number].wake(order)
