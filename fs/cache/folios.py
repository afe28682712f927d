"""How large the folios of files are: a report, a line for each order.

Counted at the moment it is asked for, from the flags of all pages: it takes longer with more
memory. Lanes go on meanwhile, so lines may disagree by what changed.
"""

from __future__ import annotations

import numpy as np

from alloc.page import ACTIVE, DIRTY, LRU, PAGE_SIZE, WRITEBACK, Pages

KINDS = {"active": ACTIVE, "dirty": DIRTY, "writeback": WRITEBACK}


def folios_text(pages: Pages, order_max: int) -> str:
    """Order and size, folios of it, their KiB, and how many of them are active, dirty, ..."""
    listed = np.flatnonzero(pages.flags & LRU)
    flags, orders = pages.flags[listed], pages.order[listed]
    out = f"{'# order':<8} {'size':>9} {'folios':>8} {'cached':>10}"
    out += "".join(f" {name:>9}" for name in KINDS) + "\n"
    for order in range(order_max + 1):
        of_it = flags[orders == order]
        kib = PAGE_SIZE << order >> 10
        out += f"{order:<8} {kib:6d} kB {of_it.size:8d} {of_it.size * kib:7d} kB"
        out += "".join(f" {np.count_nonzero(of_it & bit):9d}" for bit in KINDS.values()) + "\n"
    return out
