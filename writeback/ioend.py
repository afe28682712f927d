"""I/O completions: what one write-back I/O covers, in memory that was set aside for it.

An ioend names the folios of one file that are under write-back together, the runs of blocks in
them that were dirty, and how it went. It is one folio of the arena: a head of eight words, then the
pfns, then the runs. RESERVED of them are there always (a mempool), so that cleaning memory never
waits for memory: it waits, at most, for an earlier write to finish. While there is memory DEPTH of
them are: no more, because reads stand in line behind the writes. Waiters are served in FIFO order.

How much one covers goes by the largest folio of a file, which has to fit: four of these, up to
8 MiB: long enough for one large extent, short enough to keep others moving.
"""

from __future__ import annotations

import numpy as np
import trio
from numpy.typing import NDArray

from alloc.arena import Arena
from alloc.mempool import Folios, Mempool
from alloc.page import PAGE_SIZE

RESERVED = 4  # as many as the device has threads
DEPTH = 8
FOLIOS_MAX = 2048  # as many pages at most
FOLIOS_SHARE = 4  # of its words one in so many names a folio
HEAD_WORDS = 8
PAGE_WORDS = PAGE_SIZE // 8


class Ioend:
    """One write in flight: a view of its folio. The counts say how much of the arrays is valid."""

    __slots__ = ("folios", "meta", "pfn", "runs")

    def __init__(self, words: NDArray[np.int64], pfn: int) -> None:
        self.pfn = pfn
        nr_folios = words.size // FOLIOS_SHARE
        rest = words[HEAD_WORDS + nr_folios :]
        # folios, runs, pages, next page index, size, handle, error
        self.meta = words[:HEAD_WORDS]
        self.folios = words[HEAD_WORDS : HEAD_WORDS + nr_folios]  # pfns
        # (first block, blocks) in the file
        self.runs = rest[: rest.size & -2].reshape(-1, 2)

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

    @property
    def handle(self) -> int:
        """Whose folios they are."""
        return int(self.meta[5])

    @handle.setter
    def handle(self, handle: int) -> None:
        self.meta[5] = handle

    @property
    def error(self) -> int:
        """errno of what went wrong, or 0."""
        return int(self.meta[6])

    @error.setter
    def error(self, error: int) -> None:
        self.meta[6] = error

    def ranges(self) -> list[tuple[int, int]]:
        """The dirty runs, (first block, blocks) each, ascending and apart."""
        return [(int(b), int(n)) for b, n in self.runs[: self.nr_runs]]


class IoendPool:
    """The ioends of one volume, whose files' folios have at most `folio_pages` pages."""

    def __init__(self, arena: Arena, folio_pages: int) -> None:
        folios = min(4 * folio_pages, FOLIOS_MAX)
        assert folios >= folio_pages, "every folio must fit"
        pages = -(-folios * FOLIOS_SHARE // PAGE_WORDS)
        self._order = (pages - 1).bit_length()
        self._words = arena.mem.view(np.int64)
        self.pool = Mempool(arena, "ioend", Folios(arena, self._order), RESERVED)
        self._turn = trio.Semaphore(DEPTH)

    async def get(self) -> Ioend:
        """An ioend, reset; waits for an earlier one to finish when there are no more."""
        await self._turn.acquire()
        try:
            pfn = await self.pool.alloc()
        except BaseException:
            self._turn.release()
            raise
        at = pfn * PAGE_WORDS
        ioend = Ioend(self._words[at : at + (PAGE_WORDS << self._order)], pfn)
        ioend.meta[:] = 0
        return ioend

    def put(self, ioend: Ioend) -> None:
        """Give it back."""
        self.pool.free(ioend.pfn)
        self._turn.release()
