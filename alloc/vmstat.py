"""Counters and reports, under the names that Linux gives them where the meaning is the same.

Counters of the fast path live in the arena's words and are kept by the kernels; those of slow
paths are Python integers, changed on the trio thread only. Reading never takes a lock: a report
is a snapshot of moving numbers, each of them right at some moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from alloc.node import NUMA_NAMES, spanned
from alloc.page import (
    LRU_PAGES,
    LRU_STRIDE,
    ORDERS,
    S_RECLAIMABLE,
    S_SLABS,
    SLAB_CACHES,
    SLAB_WORDS,
    W_CLAIMED,
    W_FREE,
    W_FREE_HIGHATOMIC,
    W_LRU,
    W_MERGED,
    W_NUMA,
    W_PGALLOC,
    W_PGFREE,
    W_SLAB,
    W_STOLEN,
    Words,
)
from alloc.rows import nr_pages_listed, pages_given_back, pages_handed_out
from alloc.watermarks import KB_PER_PAGE

# counted by the allocator itself; other rooms add their own names (nr_dirty, ...)
NAMES = (
    "allocstall_normal",
    "allocstall_retries",
    "alloc_waits",
    "alloc_stall_reports",
    "try_alloc_failed",
    "pageoutrun",
    "kswapd_low_wmark_hit_quickly",
    "kswapd_high_wmark_hit_quickly",
    "pgsteal_kswapd",
    "pgsteal_direct",
    "pgscan_kswapd",
    "pgscan_direct",
    "pgscan_direct_throttle",
    "pgactivate",
    "pgdeactivate",
    "pgrotated",
    "workingset_refault_file",
    "workingset_activate_file",
    "workingset_restore_file",
    "workingset_nodereclaim",
    "slabs_scanned",
    "cleaner_wakeups",
    "drain_all_pages",
)


def nr_slab_pages(words: Words, reclaimable: bool) -> int:
    """Pages that slab caches hold, those whose objects a shrinker gives back or the others."""
    caches = words[W_SLAB : W_SLAB + SLAB_CACHES * SLAB_WORDS].reshape(SLAB_CACHES, SLAB_WORDS)
    return int(caches[caches[:, S_RECLAIMABLE] == reclaimable, S_SLABS].sum())


def node_counts(words: Words) -> dict[str, Callable[[], int]]:
    """What the kernels count on a node, under the names of /proc/vmstat."""
    counts: dict[str, Callable[[], int]] = {
        "nr_free_pages": lambda: int(words[W_FREE]),
        "nr_inactive_file": lambda: int(words[W_LRU + LRU_PAGES]),
        "nr_active_file": lambda: int(words[W_LRU + LRU_STRIDE + LRU_PAGES]),
        "nr_slab": lambda: nr_slab_pages(words, True) + nr_slab_pages(words, False),
        "nr_slab_reclaimable": lambda: nr_slab_pages(words, True),
        "nr_slab_unreclaimable": lambda: nr_slab_pages(words, False),
        "nr_free_highatomic": lambda: int(words[W_FREE_HIGHATOMIC]),
        "nr_pcp_pages": lambda: nr_pages_listed(words),
        "pgalloc_normal": lambda: int(words[W_PGALLOC]) + pages_handed_out(words),
        "pageblock_claimed": lambda: int(words[W_CLAIMED]),
        "pageblock_stolen": lambda: int(words[W_STOLEN]),
        "pgfree": lambda: int(words[W_PGFREE]) + pages_given_back(words),
    }
    return counts


def merged_blocks(nodes: Sequence[Words]) -> list[int]:
    """How often two free halves became a block, by the order of the block."""
    return [sum(int(words[W_MERGED + order]) for words in nodes) for order in range(ORDERS)]


def numa_counts(words: Words) -> dict[str, Callable[[], int]]:
    """What is counted on a node only where there are others."""
    return {name: partial(_word, words, W_NUMA + i) for i, name in enumerate(NUMA_NAMES)}


def _word(words: Words, at: int) -> int:
    return int(words[at])


def _total(counts: Sequence[Callable[[], int]]) -> int:
    return sum(count() for count in counts)


class VmStat(Mapping[str, int]):
    """/proc/vmstat of one arena: a mapping from name to count, all nodes together."""

    def __init__(self, nodes: Sequence[Words]) -> None:
        self._counts = dict.fromkeys(NAMES, 0)
        self._live: dict[str, Callable[[], int]] = {}
        kinds = (node_counts, numa_counts) if len(nodes) > 1 else (node_counts,)
        for kind in kinds:
            each = [kind(words) for words in nodes]
            for name in each[0]:
                self._live[name] = partial(_total, [counts[name] for counts in each])

    def add(self, name: str, nr: int = 1) -> None:
        """Count; a name seen for the first time starts at 0. Gauges go down with nr < 0."""
        assert name not in self._live, f"{name} is kept by the kernels"
        self._counts[name] = self._counts.get(name, 0) + nr

    def gauge(self, name: str, read: Callable[[], int]) -> None:
        """A number that its owner keeps elsewhere and that is read on demand."""
        self._live[name] = read

    def __getitem__(self, name: str) -> int:
        read = self._live.get(name)
        return read() if read is not None else self._counts[name]

    def __iter__(self) -> Iterator[str]:
        yield from self._live
        yield from self._counts

    def __len__(self) -> int:
        return len(self._live) + len(self._counts)


def meminfo(nodes: Sequence[Words], vmstat: VmStat) -> dict[str, int]:
    """/proc/meminfo of one arena, in KiB. Dirty and Writeback are 0 until somebody counts them."""
    inactive = vmstat["nr_inactive_file"] * KB_PER_PAGE
    active = vmstat["nr_active_file"] * KB_PER_PAGE
    reclaimable, unreclaimable = vmstat["nr_slab_reclaimable"], vmstat["nr_slab_unreclaimable"]
    return {
        "MemTotal": sum(map(spanned, nodes)) * KB_PER_PAGE,
        "MemFree": vmstat["nr_free_pages"] * KB_PER_PAGE,
        "Cached": inactive + active,
        "Active(file)": active,
        "Inactive(file)": inactive,
        "Dirty": vmstat.get("nr_dirty", 0) * KB_PER_PAGE,
        "Writeback": vmstat.get("nr_writeback", 0) * KB_PER_PAGE,
        "Slab": (reclaimable + unreclaimable) * KB_PER_PAGE,
        "SReclaimable": reclaimable * KB_PER_PAGE,
        "SUnreclaim": unreclaimable * KB_PER_PAGE,
        "RcuDeferred": vmstat["rcu_deferred_bytes"] >> 10,  # not free, and part of the above
    }


def meminfo_text(sizes: Mapping[str, int]) -> str:
    """Sizes in KiB as /proc/meminfo prints them."""
    return "".join(f"{name + ':':<15} {kib:8d} kB\n" for name, kib in sizes.items())


def vmstat_text(counts: Mapping[str, int]) -> str:
    """Counters as /proc/vmstat prints them."""
    return "".join(f"{name} {count}\n" for name, count in counts.items())
