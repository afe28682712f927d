"""Memory in one piece to its user, of pages that lie anywhere: what vmalloc is in the kernel.

Behind the arena's pages its mapping goes on with a window of areas, AREA_PAGES pages each. An area
shows single pages of the arena in a row, at addresses that count on: `mem[addr]` reads and writes
them as it does any other memory. So who needs more than a page, and must not wait until memory lies
in one piece, needs single pages only. It costs a system call for each page, there and back.

Invariants: a page that an area shows is allocated, with one reference, the area's; what shows
nothing is mapped without access, so a use after free ends the program. There are no more areas
than the kernel allows mappings for (half of max_map_count); who finds none waits for a block.

Trio thread only; the request for all its pages is the only await.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from alloc.gfp import KERNEL
from alloc.page import PAGE_SHIFT, PAGE_SIZE
from alloc.watermarks import KB_PER_PAGE

if TYPE_CHECKING:
    from alloc.arena import Arena

AREA_PAGES = 17  # 64 KiB, and a page for what stands before them in a log vector
MAX_MAP_COUNT = Path("/proc/sys/vm/max_map_count")
MAX_MAP_COUNT_DEFAULT = 65530
MREMAP_MAYMOVE, MREMAP_FIXED = 1, 2
PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000
NO_ACCESS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED

_libc = ctypes.CDLL(None, use_errno=True)
_address, _length = ctypes.c_void_p, ctypes.c_size_t
_libc.mmap.restype = _libc.mremap.restype = _address
_libc.mmap.argtypes = (_address, _length, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.mremap.argtypes = (_address, _length, _length, ctypes.c_int, _address)


def nr_areas(nr_pages: int) -> int:
    """Areas of an arena: each takes two pages at least, and may take a mapping for each page."""
    most = MAX_MAP_COUNT_DEFAULT
    with suppress(OSError, ValueError):
        most = int(MAX_MAP_COUNT.read_text())
    return min(nr_pages // 2, most // 2 // AREA_PAGES)


def map_memory(nbytes: int) -> mmap.mmap:
    """An arena's pages, and the window behind them.

    Shared, because pages of such memory only can be mapped a second time.
    """
    window = nr_areas(nbytes >> PAGE_SHIFT) * AREA_PAGES << PAGE_SHIFT
    flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return mmap.mmap(-1, nbytes + window, flags=flags)


def _check(address: int | None, call: str) -> None:
    if address == ctypes.c_void_p(-1).value:
        code = ctypes.get_errno()
        raise OSError(code, f"{call} of a vmalloc area: {os.strerror(code)}")


class Vmalloc:
    """The window of one arena. An area is known by its first page, counted on from the arena's."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._base = arena.mem.ctypes.data
        self._areas: dict[int, list[int]] = {}  # first page: what it shows
        self.nr_areas = (arena.mem.size - arena.memory_bytes) // (AREA_PAGES * PAGE_SIZE)
        self._free = list(range(self.nr_areas - 1, -1, -1))
        self.nr_pages = 0  # shown
        self._hide(arena.nr_pages, self.nr_areas * AREA_PAGES)

    def covers(self, page: int) -> bool:
        """Whether a page number is one of the window."""
        return page >= self._arena.nr_pages

    def shown(self) -> list[int]:
        """The pfns that areas show, those of each in order."""
        return [pfn for pages in self._areas.values() for pfn in pages]

    def meminfo(self) -> dict[str, int]:
        """Its lines of /proc/meminfo, in KiB."""
        return {
            "VmallocTotal": self.nr_areas * AREA_PAGES * KB_PER_PAGE,
            "VmallocUsed": self.nr_pages * KB_PER_PAGE,
        }

    async def alloc(self, nr_pages: int, gfp: int = KERNEL) -> int:
        """`nr_pages` in a row, content undefined; the number of the first, or of a folio's.

        ValueError for more than AREA_PAGES; OSError if the kernel grants no mapping.
        """
        if not 0 < nr_pages <= AREA_PAGES:
            raise ValueError(f"{nr_pages} pages in a row: an area has {AREA_PAGES}")
        if not self._free:
            return await self._arena.alloc_folio((nr_pages - 1).bit_length(), gfp)
        area = self._free.pop()
        first = self._arena.nr_pages + area * AREA_PAGES
        shown: list[int] = []
        try:
            shown = await self._arena.alloc_pages(nr_pages, gfp)
            for number, pfn in enumerate(shown):
                self._show(first + number, pfn)
        except BaseException:
            self._release(first, shown)
            raise
        self._areas[first] = shown
        self.nr_pages += nr_pages
        return first

    def free(self, first: int) -> None:
        """Give an area and its pages back."""
        shown = self._areas.pop(first)
        self.nr_pages -= len(shown)
        self._release(first, shown)

    def _release(self, first: int, shown: list[int]) -> None:
        self._hide(first, AREA_PAGES)
        for pfn in shown:
            self._arena.put_folio(pfn)
        self._free.append((first - self._arena.nr_pages) // AREA_PAGES)

    def _at(self, page: int) -> int:
        return self._base + (page << PAGE_SHIFT)

    def _show(self, page: int, pfn: int) -> None:
        """A second mapping of a page: what mremap makes of a shared one that is to be 0 long."""
        how = MREMAP_MAYMOVE | MREMAP_FIXED
        _check(_libc.mremap(self._at(pfn), 0, PAGE_SIZE, how, self._at(page)), "mremap(2)")

    def _hide(self, page: int, nr_pages: int) -> None:
        where = self._at(page), nr_pages << PAGE_SHIFT
        _check(_libc.mmap(*where, PROT_NONE, NO_ACCESS, -1, 0), "mmap(2)")
