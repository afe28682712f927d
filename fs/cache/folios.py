"""How large the folios of files are, and what became of them: a report, a line for each order.

Counted at the moment it is asked for, from the flags of all pages: it takes longer with more
memory. Lanes go on meanwhile, so lines may disagree by what changed. The last columns are events
since the mount: `split` and `split_failed` are the kernel's of each size of huge pages, for folios
of that order (fs/cache/split.py); `merged` says how often the page allocator made a free block of
that order of two.
"""

from __future__ import annotations

import numpy as np

from alloc.page import ACTIVE, DIRTY, LRU, PAGE_SIZE, WRITEBACK
from alloc.vmstat import merged_blocks
from fs.cache.folio import ORDER_MAX, PageCache

KINDS = {"active": ACTIVE, "dirty": DIRTY, "writeback": WRITEBACK}


def folios_text(cache: PageCache) -> str:
    """Order and size, folios of it, their KiB, how many of them are active, ...; events."""
    pages = cache.pages
    listed = np.flatnonzero(pages.flags & LRU)
    flags, orders = pages.flags[listed], pages.order[listed]
    events = {
        "split": cache.splits.done,
        "split_failed": cache.splits.failed,
        "merged": merged_blocks(cache.arena.nodes),
    }
    out = f"{'# order':<8} {'size':>9} {'folios':>8} {'cached':>10}"
    out += "".join(f" {name:>9}" for name in KINDS)
    out += "".join(f" {name:>12}" for name in events) + "\n"
    for order in range(ORDER_MAX + 1):
        of_it = flags[orders == order]
        kib = PAGE_SIZE << order >> 10
        out += f"{order:<8} {kib:6d} kB {of_it.size:8d} {of_it.size * kib:7d} kB"
        out += "".join(f" {np.count_nonzero(of_it & bit):9d}" for bit in KINDS.values())
        out += "".join(f" {counts[order]:12d}" for counts in events.values()) + "\n"
    return out
