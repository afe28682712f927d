"""What lies where, in the formats of /proc: buddyinfo, pagetypeinfo, zoneinfo; and fragmentation.

One arena is node 0 with one zone, Normal. Counts are read without the buddy lock: a report is a
snapshot of moving numbers. The fragmentation index says why a block of an order can not be had:
towards 0 memory is short, towards 1000 it is in pieces; it is in thousandths, and -1000 if a block
is there. The unusable index is the part of free memory that is in smaller pieces. All of them are
the kernel's formulas and formats.
"""

from __future__ import annotations

from collections.abc import Sequence

from alloc.page import (
    FREE_SHIFT,
    ORDERS,
    TYPES,
    W_BLOCK_ORDER,
    W_BLOCK_TYPES,
    W_BOOST,
    W_FREE,
    W_HIGH,
    W_LOW,
    W_MIN,
    W_NR_FREE,
    W_PAGES,
    W_PCP_BATCH,
    W_PROMO,
    Words,
)
from alloc.rows import pages_in_rows
from alloc.vmstat import VmStat
from alloc.watermarks import RESERVE_RATIO_NORMAL, lowmem_reserve

TYPE_NAMES = ("Unmovable", "Movable", "Reclaimable", "HighAtomic")
NODE_ZONE = f"Node {0:d}, zone {'Normal':>8}"
NODE_STATS = ("nr_inactive_file", "nr_active_file", "nr_dirty", "nr_writeback")
ZONE_STATS = ("nr_free_pages", "nr_slab_reclaimable", "nr_slab_unreclaimable")
WOULD_SUCCEED = -1000


def free_blocks(words: Words, mt: int) -> list[int]:
    """Blocks on the lists of one migratetype, by order."""
    at = W_NR_FREE + (mt << FREE_SHIFT)
    counts: list[int] = words[at : at + ORDERS].tolist()
    return counts


def all_free_blocks(words: Words) -> list[int]:
    """Free blocks by order."""
    lists = [free_blocks(words, mt) for mt in range(TYPES)]
    return [sum(counts[order] for counts in lists) for order in range(ORDERS)]


def fragmentation_index(blocks: Sequence[int], order: int) -> int:
    """Why a block of `order` can not be had, in thousandths; `blocks` are free ones by order.

    -1000 if it can be had. A little below 0 is possible where very little is free.
    """
    total = sum(blocks)
    if total == 0:
        return 0
    if any(blocks[order:]):
        return WOULD_SUCCEED
    pages = sum(count << o for o, count in enumerate(blocks))
    return 1000 - (1000 + (1000 * pages >> order)) // total


def unusable_index(blocks: Sequence[int], order: int) -> int:
    """Thousandths of free memory that lie in blocks smaller than `order`; 1000 if none is free."""
    pages = sum(count << o for o, count in enumerate(blocks))
    usable = sum(count << o for o, count in enumerate(blocks) if o >= order)
    return (pages - usable) * 1000 // pages if pages else 1000


def buddyinfo(words: Words) -> str:
    """/proc/buddyinfo of one arena: free blocks of each order, one line."""
    return NODE_ZONE + " " + " ".join(f"{count:6d}" for count in all_free_blocks(words))


def extfrag(words: Words) -> str:
    """Both indices by order, as debugfs prints extfrag_index and unusable_index."""
    blocks = all_free_blocks(words)
    lines = (
        " ".join(f"{index(blocks, order) / 1000:.3f}" for order in range(ORDERS))
        for index in (fragmentation_index, unusable_index)
    )
    return "".join(f"{NODE_ZONE} {line}\n" for line in lines)


def pagetypeinfo(words: Words) -> str:
    """/proc/pagetypeinfo of one arena: free blocks by type and order, pageblocks by type."""
    order = int(words[W_BLOCK_ORDER])
    types = words[W_BLOCK_TYPES:].tolist()
    out = f"Page block order: {order}\nPages per block:  {1 << order}\n\n"
    out += f"{'Free pages count per migrate type at order':<43} "
    out += "".join(f"{o:6d} " for o in range(ORDERS)) + "\n"
    for mt, name in enumerate(TYPE_NAMES):
        counts = "".join(f"{count:6d} " for count in free_blocks(words, mt))
        out += f"Node {0:4d}, zone {'Normal':>8}, type {name:>12} {counts}\n"
    out += f"\n{'Number of blocks type':<23}" + "".join(f"{name:>12} " for name in TYPE_NAMES)
    counts = "".join(f"{types.count(mt):12d} " for mt in range(TYPES))
    return out + f"\n{NODE_ZONE} {counts}\n"


def zoneinfo(words: Words, vmstat: VmStat) -> str:
    """/proc/zoneinfo of one arena: marks, sizes and counts in pages, and the rows as pagesets."""
    pages = int(words[W_PAGES])
    rows = {
        "boost": int(words[W_BOOST]),
        "min": int(words[W_MIN]),
        "low": int(words[W_LOW]),
        "high": int(words[W_HIGH]),
        "promo": int(words[W_PROMO]),
        "spanned": pages,
        "present": pages,
        "managed": pages - 1,  # page 0 is never handed out
    }
    ((reserve,),) = lowmem_reserve([pages - 1], [RESERVE_RATIO_NORMAL])
    out = f"{NODE_ZONE}\n  per-node stats\n"
    out += "".join(f"      {name:<12} {vmstat.get(name, 0)}\n" for name in NODE_STATS)
    out += f"  pages free     {int(words[W_FREE])}\n"
    out += "".join(f"        {name:<8} {count}\n" for name, count in rows.items())
    out += f"        protection: ({reserve})\n"
    out += "".join(f"      {name:<12} {vmstat[name]}\n" for name in ZONE_STATS)
    out += "  pagesets\n"
    for row, (count, high) in enumerate(pages_in_rows(words)):
        out += f"    cpu: {row}\n              count: {count}\n              high:  {high}\n"
        out += f"              batch: {int(words[W_PCP_BATCH])}\n"
    return out + "  node_unreclaimable:  0\n  start_pfn:           1\n"
