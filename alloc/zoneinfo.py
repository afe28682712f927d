"""What lies where, in the formats of /proc: buddyinfo, pagetypeinfo, zoneinfo; and fragmentation.

Each node has one zone, Normal. Counts are read without the buddy lock: a report is a
snapshot of moving numbers. The fragmentation index says why a block of an order can not be had:
towards 0 memory is short, towards 1000 it is in pieces; it is in thousandths, and -1000 if a block
is there. The unusable index is the part of free memory that is in smaller pieces. All of them are
the kernel's formulas and formats.
"""

from __future__ import annotations

from collections.abc import Sequence

from alloc.node import spanned
from alloc.page import (
    FREE_SHIFT,
    ORDERS,
    TYPES,
    W_BLOCK_ORDER,
    W_BOOST,
    W_FREE,
    W_HIGH,
    W_LOW,
    W_MIN,
    W_NODE,
    W_NR_FREE,
    W_PCP_BATCH,
    W_PROMO,
    W_START,
    Words,
)
from alloc.rows import pages_in_rows
from alloc.vmstat import VmStat, node_counts, numa_counts
from alloc.watermarks import RESERVE_RATIO_NORMAL, lowmem_reserve
from alloc.zone import block_types

TYPE_NAMES = ("Unmovable", "Movable", "Reclaimable", "HighAtomic")
NODE_STATS = ("nr_inactive_file", "nr_active_file")
ALL_STATS = ("nr_dirty", "nr_writeback")  # not known by node: node 0 shows all
ZONE_STATS = ("nr_free_pages", "nr_slab_reclaimable", "nr_slab_unreclaimable")
WOULD_SUCCEED = -1000


def _zone(words: Words, width: int = 0) -> str:
    return f"Node {int(words[W_NODE]):{width}d}, zone {'Normal':>8}"


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


def buddyinfo(nodes: Sequence[Words]) -> str:
    """/proc/buddyinfo of one arena: free blocks of each order, a line for each node."""
    return "\n".join(
        _zone(words) + " " + " ".join(f"{count:6d}" for count in all_free_blocks(words))
        for words in nodes
    )


def extfrag(nodes: Sequence[Words]) -> str:
    """Both indices by order, as debugfs prints extfrag_index and unusable_index."""
    out = ""
    for index in (fragmentation_index, unusable_index):
        for words in nodes:
            blocks = all_free_blocks(words)
            line = " ".join(f"{index(blocks, order) / 1000:.3f}" for order in range(ORDERS))
            out += f"{_zone(words)} {line}\n"
    return out


def pagetypeinfo(nodes: Sequence[Words]) -> str:
    """/proc/pagetypeinfo of one arena: free blocks by type and order, pageblocks by type."""
    order = int(nodes[0][W_BLOCK_ORDER])
    out = f"Page block order: {order}\nPages per block:  {1 << order}\n\n"
    out += f"{'Free pages count per migrate type at order':<43} "
    out += "".join(f"{o:6d} " for o in range(ORDERS)) + "\n"
    for words in nodes:
        for mt, name in enumerate(TYPE_NAMES):
            counts = "".join(f"{count:6d} " for count in free_blocks(words, mt))
            out += f"{_zone(words, 4)}, type {name:>12} {counts}\n"
    out += f"\n{'Number of blocks type':<23}" + "".join(f"{name:>12} " for name in TYPE_NAMES)
    for words in nodes:
        types = block_types(words).tolist()
        counts = "".join(f"{types.count(mt):12d} " for mt in range(TYPES))
        out += f"\n{_zone(words)} {counts}"
    return out + "\n"


def zoneinfo(nodes: Sequence[Words], vmstat: VmStat, hopeless: Sequence[bool]) -> str:
    """/proc/zoneinfo of one arena: marks, sizes and counts in pages, and the rows as pagesets.

    hopeless: of which nodes kswapd has given up.
    """
    several = len(nodes) > 1
    return "".join(
        _zoneinfo(words, vmstat, several, given_up)
        for words, given_up in zip(nodes, hopeless, strict=True)
    )


def _zoneinfo(words: Words, vmstat: VmStat, several: bool, hopeless: bool) -> str:
    pages, first = spanned(words), max(int(words[W_START]), 1)  # page 0 is never handed out
    managed = pages - first + int(words[W_START])
    rows = {
        "boost": int(words[W_BOOST]),
        "min": int(words[W_MIN]),
        "low": int(words[W_LOW]),
        "high": int(words[W_HIGH]),
        "promo": int(words[W_PROMO]),
        "spanned": pages,
        "present": pages,
        "managed": managed,
    }
    counts = {name: read() for name, read in node_counts(words).items()}
    stats = {name: counts[name] for name in NODE_STATS}
    if not int(words[W_NODE]):
        stats |= {name: vmstat.get(name, 0) for name in ALL_STATS}
    zone = {name: counts[name] for name in ZONE_STATS}
    if several:
        zone |= {name: read() for name, read in numa_counts(words).items()}
    ((reserve,),) = lowmem_reserve([managed], [RESERVE_RATIO_NORMAL])
    out = f"{_zone(words)}\n  per-node stats\n"
    out += "".join(f"      {name:<12} {count}\n" for name, count in stats.items())
    out += f"  pages free     {int(words[W_FREE])}\n"
    out += "".join(f"        {name:<8} {count}\n" for name, count in rows.items())
    out += f"        protection: ({reserve})\n"
    out += "".join(f"      {name:<12} {count}\n" for name, count in zone.items())
    out += "  pagesets\n"
    for row, (count, high) in enumerate(pages_in_rows(words)):
        out += f"    cpu: {row}\n              count: {count}\n              high:  {high}\n"
        out += f"              batch: {int(words[W_PCP_BATCH])}\n"
    return out + f"  node_unreclaimable:  {hopeless:d}\n  start_pfn:           {first}\n"
