"""I/O completions: what one write-back I/O covers, from a pool that never runs dry for good.

An ioend names the folios of one file that are under write-back together, the runs of blocks in
them that were dirty, and how it went. There is a fixed number of them, made at mount with all
their room, so that cleaning memory never waits for memory: it waits, at most, for an earlier
write to finish. Waiters are served in FIFO order.
"""

from __future__ import annotations

import numpy as np
import trio

FOLIOS_MAX = 2048
RUNS_MAX = 4096
PAGES_MAX = 2048  # 8 MiB: long enough for one large extent, short enough to keep others moving


class Ioend:
    """One write in flight. Arrays are reused; the counts say how much of them is valid."""

    __slots__ = ("error", "folios", "handle", "meta", "runs")

    def __init__(self) -> None:
        self.handle = 0
        self.folios = np.zeros(FOLIOS_MAX, np.int64)  # pfns
        self.runs = np.zeros((RUNS_MAX, 2), np.int64)  # (first block, blocks) in the file
        self.meta = np.zeros(5, np.int64)  # folios, runs, pages, next page index, size
        self.error = 0

    @property
    def nr_folios(self) -> int:
        return int(self.meta[0])

    @property
    def nr_runs(self) -> int:
        return int(self.meta[1])

    @property
    def nr_pages(self) -> int:
        return int(self.meta[2])

    @property
    def next_index(self) -> int:
        """Where to go on gathering."""
        return int(self.meta[3])

    @property
    def size(self) -> int:
        """The object's size when its content was taken: what lies below is in the folios."""
        return int(self.meta[4])

    def ranges(self) -> list[tuple[int, int]]:
        """The dirty runs, (first block, blocks) each, ascending and apart."""
        return [(int(b), int(n)) for b, n in self.runs[: self.nr_runs]]

    def reset(self) -> None:
        self.handle = 0
        self.meta[:] = 0
        self.error = 0


class IoendPool:
    """A mempool of ioends."""

    def __init__(self, count: int) -> None:
        assert count > 0
        self.count = count
        self.waits = 0
        self._free = [Ioend() for _ in range(count)]
        self._turn = trio.Semaphore(count)

    @property
    def in_use(self) -> int:
        return self.count - len(self._free)

    async def get(self) -> Ioend:
        """An ioend, reset; waits for an earlier one to finish when all are in use."""
        if not self._free:
            self.waits += 1
        await self._turn.acquire()
        return self._free.pop()

    def put(self, ioend: Ioend) -> None:
        """Give it back."""
        assert len(self._free) < self.count
        ioend.reset()
        self._free.append(ioend)
        self._turn.release()
