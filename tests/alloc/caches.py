"""Small caches for the reclaim tests: folios on the LRU, some of them dirty, with a shrinker.

And kswapd beside them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import islice

import trio
import trio.testing

from alloc.arena import Arena
from alloc.gfp import NOFS, NOWAIT
from alloc.shrinker import SHRINK_STOP
from alloc.topology import Topology


@contextmanager
def checked(memory_bytes: int, nodes: Topology) -> Iterator[Arena]:
    """An arena of several nodes, validated when the block ends."""
    made = Arena(memory_bytes, nodes=nodes)
    yield made
    made.drain_all()
    made.check()
    made.close()


@asynccontextmanager
async def kswapd(arena: Arena) -> AsyncIterator[None]:
    """The arena's background tasks, asleep at the beginning, cancelled at the end."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        await trio.testing.wait_all_tasks_blocked()
        yield
        nursery.cancel_scope.cancel()


class FolioCache:
    """Holds folios until the shrinker takes clean ones away; behaves as the page cache does."""

    name = "test-folios"

    def __init__(self, arena: Arena, needs_fs: bool = False) -> None:
        self.arena = arena
        self.needs_fs = needs_fs
        self.folios: dict[int, bool] = {}  # pfn: dirty
        self.scans: list[int] = []
        arena.register_by_node(self)

    def fill(self, dirty: bool = False, order: int = 0) -> int:
        """Take every folio that an ordinary request can have; how many."""
        count = 0
        while (pfn := self.arena.try_alloc_folio(order, NOWAIT)) is not None:
            self.insert(pfn, dirty)
            count += 1
        return count

    def insert(self, pfn: int, dirty: bool) -> None:
        self.arena.lru.add(pfn)
        self.folios[pfn] = dirty

    def clean(self, count: int) -> None:
        """The end of a write: `count` dirty folios become clean."""
        for pfn in list(islice((pfn for pfn, dirty in self.folios.items() if dirty), count)):
            self.folios[pfn] = False
            self.arena.lru.rotate(pfn)
        self.arena.kick()

    def drop(self) -> None:
        """Give everything back."""
        for pfn in list(self.folios):
            del self.folios[pfn]
            self.arena.put_folio(pfn)

    def count_objects(self, nid: int) -> int:
        return sum(self.arena.node_of(pfn) == nid for pfn in self.folios)

    def scan_objects(self, nr: int, gfp: int, nid: int) -> int:
        if self.needs_fs and gfp & NOFS:
            return SHRINK_STOP
        self.scans.append(nr)
        freed = 0
        for pfn in self.arena.lru.isolate(nr, nid):
            if self.folios[pfn]:
                self.arena.lru.putback(pfn)
                continue
            del self.folios[pfn]
            self.arena.put_folio(pfn)
            freed += self.arena.lru.release(pfn)
        return freed
