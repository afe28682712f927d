"""Memory for log vectors: what a committed change takes until its checkpoint is stable.

Vectors of up to half a page are slab objects of the next power of two, larger ones blocks of the
next order or, where there is no block of that order, pages that vmalloc shows in a row: the largest
is that of a block of 64 KiB, with its head. Nobody can be made to give them back but by writing the
log, so they are no reclaimable memory; `nbytes` says how much they take.

Who frees a vector says how large it was, as whoever asked for it did. Trio thread only; `alloc` is
the only await, `try_now` is for who holds what reclaim could wait for, or must not let others in.
"""

from __future__ import annotations

import numpy as np

from alloc import gfp
from alloc.arena import Arena
from alloc.page import PAGE_SHIFT, PAGE_SIZE

CLASSES = (32, 64, 128, 256, 512, 1024, 2048)


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_SIZE)


class Vectors:
    """The log vectors of one volume, named by their address in the arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        caches = {
            size: arena.slab(f"xfs_log_vec-{size}", np.dtype([("bytes", "u1", (size,))]))
            for size in CLASSES
        }
        self._cache_of = [caches[max(32, 1 << bits)] for bits in range(12)]  # by bit length
        self.nbytes = 0  # in use
        arena.vmstat.gauge("log_vector_bytes", lambda: self.nbytes)

    async def alloc(self, nbytes: int) -> int:
        """Address of memory for `nbytes`, content undefined. Never fails."""
        if nbytes <= CLASSES[-1]:
            cache = self._cache_of[(nbytes - 1).bit_length()]
            index = await cache.alloc(gfp.KERNEL | gfp.NOFAIL)
            self.nbytes += cache.size
            return cache.addr(index)
        page = await self._new_pages(_pages(nbytes))
        return self._paged(page, nbytes)

    def try_now(self, nbytes: int) -> int | None:
        """The same for who may not wait, who then gives way first and asks with `alloc`."""
        if nbytes <= CLASSES[-1]:
            cache = self._cache_of[(nbytes - 1).bit_length()]
            # who may not wait lets go of what it holds and comes back to wait
            index = cache.try_alloc(gfp.NOWAIT)
            if index is None:
                return None
            self.nbytes += cache.size
            return cache.addr(index)
        order = (_pages(nbytes) - 1).bit_length()
        page = self._arena.try_alloc_folio(order, gfp.NOWAIT)  # likewise
        return None if page is None else self._paged(page, nbytes)

    def free(self, address: int, nbytes: int) -> None:
        """Give a vector back."""
        if nbytes <= CLASSES[-1]:
            cache = self._cache_of[(nbytes - 1).bit_length()]
            cache.free(address // cache.size)
            self.nbytes -= cache.size
            return
        page = address >> PAGE_SHIFT
        self.nbytes -= self._taken(page, nbytes)
        if self._arena.vmalloc.covers(page):
            self._arena.vmalloc.free(page)
        else:
            self._arena.put_folio(page)

    async def _new_pages(self, nr: int) -> int:
        """A block if there is one, else single pages in a row, as buffers have it."""
        order = (nr - 1).bit_length()
        if not order:
            return await self._arena.alloc_folio(0, gfp.KERNEL | gfp.NOFAIL)
        # what reclaim and compaction would cost is more than a mapping for each page
        page = self._arena.try_alloc_folio(order, gfp.NOWAIT)
        if page is not None:
            return page
        self._arena.vmstat.add("log_vector_fallback")
        return await self._arena.vmalloc.alloc(nr, gfp.KERNEL | gfp.NOFAIL)

    def _taken(self, page: int, nbytes: int) -> int:
        """Bytes that a vector of pages takes."""
        nr = _pages(nbytes)
        if not self._arena.vmalloc.covers(page):
            nr = 1 << (nr - 1).bit_length()
        return nr << PAGE_SHIFT

    def _paged(self, page: int, nbytes: int) -> int:
        self.nbytes += self._taken(page, nbytes)
        return page << PAGE_SHIFT
