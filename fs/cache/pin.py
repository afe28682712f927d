"""Folios that writers keep while they prepare a copy in several steps, each of which may wait.

Without a reference the folio that one step has read would be evicted by what the next one reads,
for ever, where memory is small. With it, a writer who waits for memory keeps some: up to a large
folio. It is only convenience, since every step looks its folio up again. So when nothing is left to
reclaim the largest clean one may be taken away (see `alloc.victim.Holder`), and the writer reads
it once more.

The writer holds the IOLOCK exclusively, so no lane looks at the file. What is LOCKED, dirty or
under write-back, or referenced by anybody else stays. Trio thread only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from alloc.page import DIRTY, LOCKED, WRITEBACK

if TYPE_CHECKING:
    from fs.cache.folio import PageCache

OWN_REFS = 2  # the mapping's and the writer's


class Pins:
    """The folios that writers of one page cache keep, one each."""

    name = "writers"

    def __init__(self, pages: PageCache) -> None:
        self._pages = pages
        self._kept: dict[int, int] = {}  # folios by writer
        self._serial = 0

    @contextmanager
    def pinning(self) -> Iterator[Callable[[int], None]]:
        """While the block lasts the last folio named to it is not evicted, but see above."""
        arena, kept = self._pages.arena, self._kept
        self._serial += 1
        writer = self._serial

        def pin(pfn: int) -> None:
            if kept.get(writer) != pfn:
                arena.get_folio(pfn)
                unpin()
                kept[writer] = pfn

        def unpin() -> None:
            pfn = kept.pop(writer, 0)
            if pfn:
                arena.put_folio(pfn)

        try:
            yield pin
        finally:
            unpin()

    def count(self) -> int:
        """Pages of the largest that could go."""
        return max(map(self._spare_pages, self._kept.values()), default=0)

    def shed(self) -> int:
        """Evict it; its pages, 0 if somebody has taken hold of it meanwhile."""
        writer = max(self._kept, key=lambda writer: self._spare_pages(self._kept[writer]))
        pfn = self._kept[writer]
        pages = self._spare_pages(pfn)
        if not self._pages.evict_folio(pfn):
            return 0
        del self._kept[writer]
        return pages

    def _spare_pages(self, pfn: int) -> int:
        p = self._pages.pages
        in_use = p.flags[pfn] & (LOCKED | DIRTY | WRITEBACK) or p.refs[pfn] != OWN_REFS
        return 0 if in_use else 1 << int(p.order[pfn])
