"""Eviction: how reclaim takes folios of files, node by node, from the cold end of the LRU.

Each node's folios have a shrinker of their own, so what one node is short of does
not cost another its cache. A scan isolates a batch of folios; those that are clean, unlocked and
unused leave their mapping, each with a shadow in its place. A dirty one is marked and activated, so
that it is freed first once it is clean; a scan that met nothing else wakes the flusher. What a scan
met, it tells the node's throttle.

Trio thread only. Nothing here waits, allocates or writes, and locks are only tried: so it is safe
in any scope.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fs.cache import gather

if TYPE_CHECKING:
    from fs.cache.folio import PageCache

SCAN_BATCH = 128  # folios that one look of reclaim takes


class Eviction:
    """Reclaim of the folios of one page cache."""

    name = "page_cache"

    def __init__(self, pages: PageCache) -> None:
        self._pages = pages

    def count_objects(self, nid: int) -> int:
        lru = self._pages.arena.lru
        return lru.inactive_on(nid) + lru.active_on(nid)

    def scan_objects(self, nr: int, gfp_flags: int, nid: int) -> int:
        """Free clean folios from the cold end, about `nr` pages' worth of looking."""
        pages, lru = self._pages, self._pages.arena.lru
        if lru.inactive_is_low(nid):
            lru.age(min(nr, SCAN_BATCH), nid)
        pfns = lru.isolate(min(nr, SCAN_BATCH), nid)
        if not pfns:
            return 0
        throttle = pages.arena.reclaim.throttles[nid]
        freed = unqueued = 0
        for pfn, verdict in zip(pfns, pages.evict_folios(pfns), strict=True):
            size = 1 << int(pages.pages.order[pfn])
            throttle.stat.taken += size
            if verdict == gather.EVICTED:
                freed += size
                pages.arena.put_folio(pfn)
                lru.release(pfn)
                continue
            if verdict == gather.IS_DIRTY:
                throttle.met_dirty(size)
                unqueued += 1
            elif verdict != gather.IN_USE:
                throttle.met_writeback(size, marked=verdict == gather.IS_CONGESTED)
            if verdict != gather.IN_USE:
                lru.activate(pfn)
            lru.putback(pfn)
        if unqueued == len(pfns):
            pages.vol.flusher.clean_some()
        return freed
