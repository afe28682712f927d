"""Page descriptors and the layout of the arena's control words. Data only, no behaviour.

A page is 4 KiB and is named by its pfn, its index in the arena; byte address = pfn * 4096. pfn 0
is reserved, so that 0 means "none" in every link and handle. The descriptors are separate arrays,
one per field, indexed by pfn; for a block of several pages the head's descriptor speaks for all,
and each tail carries TAIL and the block's order, so that the head is found by rounding down.

Who may write a field: BUDDY pages belong to the buddy lock; SLAB pages to their cache's lock;
links and the LRU/ACTIVE flags of other pages to the LRU lock; everything else to the owner of the
page. `flags` is shared, so once other threads run it is changed only by atomic or/and.

`words` is one int64 array that holds locks, list heads, marks and counters. Each node has a row of
it, with everything at the indices below; node 0's is the first, so where there is one node the
whole array is its row. What different threads spin on is kept in different 64-byte lines (8 words).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
ORDER_MAX = 10
ORDERS = ORDER_MAX + 1

# page flags
RESERVED = 1 << 0  # never handed out
BUDDY = 1 << 1  # head of a free block
HEAD = 1 << 2  # first page of an allocated block
TAIL = 1 << 3  # other page of an allocated block
SLAB = 1 << 4  # objects of a slab cache
LRU = 1 << 5  # on the active or inactive list
ACTIVE = 1 << 6  # on, or taken from, the active list
REFERENCED = 1 << 7  # used once since it was last looked at
LOCKED = 1 << 8  # from here on: the owner's
UPTODATE = 1 << 9
DIRTY = 1 << 10
WRITEBACK = 1 << 11
RECLAIM = 1 << 12  # free it as soon as its write ends
WORKINGSET = 1 << 13  # has been on the active list, in this life or before its eviction
READAHEAD = 1 << 14
ERROR = 1 << 15
OWNER_1 = 1 << 16  # free for the owner's own use
OWNER_2 = 1 << 17
OWNER_3 = 1 << 18
PCP = 1 << 19  # head of a free block on a row's list

# migratetypes, of pageblocks and (the first three) of requests
UNMOVABLE = 0
MOVABLE = 1
RECLAIMABLE = 2
HIGHATOMIC = 3
TYPES = 4

# a page that carries one of these may not be freed
BUSY = RESERVED | BUDDY | DIRTY | WRITEBACK | LOCKED

# words: marks, written once, and what the fast path reads
W_END = 0  # the node has the pages from W_START up to this one
W_MIN = 1
W_LOW = 2
W_HIGH = 3
W_WAITERS = 4  # tasks that wait for memory
W_START = 5  # a multiple of the largest block
W_BLOCK_ORDER = 6  # of a pageblock
W_NODES = 7  # how many rows there are
# words: the buddy's line
W_BUDDY_LOCK = 8
W_FREE = 9  # free pages
W_FREED = 10  # blocks freed since the beginning: an event count
W_PGALLOC = 11  # pages handed out and given back since the beginning
W_PGFREE = 12
W_LOWEST = 13  # no free block begins below this pfn
W_BOOST = 14  # pages that fallbacks added and kswapd has not made good yet
W_FREE_HIGHATOMIC = 15  # free pages in pageblocks of the high-atomic reserve
W_FREE_ORDERS = 16  # one for each migratetype: bit o says that its list of order o has blocks
W_HIGHATOMIC = 20  # pages in pageblocks of the high-atomic reserve, free or not
W_HIGHATOMIC_MAX = 21
W_CLAIMED = 22  # pageblocks that changed their type for a request, since the beginning
W_STOLEN = 23  # requests that took pages of a pageblock of another type
W_MERGED = 24  # one for each order: blocks that two halves became, since the beginning
# words: written once, and seldom read
W_NODE = 40  # whose row it is
W_SPAN = 41  # pages of each node, of which the last one may have less
W_STRIDE = 42  # words of a row
W_PROMO = 43
W_BOOST_MAX = 44  # pages that fallbacks may add to `low` and `high`; 0: none
W_WEIGHT = 45  # of the node, for weighted interleaving
W_MEMPOLICY = 46  # of node 0: the mount's memory policy
W_MIGRATE = 47  # of node 0: by how many touches another node gets a folio; 0: it stays
# words: the LRU's line
W_LRU_LOCK = 48
W_LRU = 49  # head, tail, pages of the inactive list, then of the active list
LRU_HEAD = 0
LRU_TAIL = 1
LRU_PAGES = 2
LRU_STRIDE = 3
W_NONRESIDENT_AGE = 55  # pages evicted or activated since the beginning (alloc/workingset.py)
# words: one group per slab cache
W_SLAB = 64
SLAB_WORDS = 8
SLAB_CACHES = 32
S_LOCK = 0
S_PARTIAL = 1  # list of slabs with a free object
S_SLABS = 2
S_OBJECTS = 3
S_SHIFT = 4  # log2 of the object size
S_LIMIT = 5  # objects that a row keeps at most
S_RECLAIMABLE = 6  # 1: a shrinker gives its objects back
# words: what all rows go by
W_PCP = W_SLAB + SLAB_CACHES * SLAB_WORDS
W_PCP_BATCH = W_PCP  # pages
W_PCP_HIGH_MIN = W_PCP + 1
W_PCP_HIGH_MAX = W_PCP + 2
W_KSWAPD = W_PCP + 3  # 1 while kswapd works
# words: one row for the trio thread and one for each lane
W_ROWS = W_PCP + 8
ROWS = 17
PCP_ORDERS = 4
MIGRATETYPES = 3  # those that requests have, and lists in a row
P_LOCK = 0
P_COUNT = 1  # pages on the row's lists
P_HIGH = 2  # pages that it may have
P_ALLOC_FACTOR = 3  # log2 of how many batches the next refill takes
P_FREE_COUNT = 4  # pages freed lately without an allocation in between
P_HIGH_ORDER = 5  # 1: the last block freed was larger than a page
P_PGALLOC = 6  # pages handed out and given back since the beginning
P_PGFREE = 7
P_LISTS = 8  # head and tail of each list: by order, then by type
# of a row: a magazine for each slab cache
P_MAGAZINES = P_LISTS + 2 * PCP_ORDERS * MIGRATETYPES
MAGAZINE_WORDS = 16
Z_COUNT = 0  # objects in it
Z_USED = 1  # whether it was used since the last refresh
Z_OBJECTS = 2
MAGAZINE_MAX = MAGAZINE_WORDS - Z_OBJECTS
ROW_WORDS = P_MAGAZINES + SLAB_CACHES * MAGAZINE_WORDS
# words: the buddy's lists, at 16 * migratetype + order each
FREE_SHIFT = 4
W_FREE_HEAD = W_ROWS + ROWS * ROW_WORDS
W_FREE_TAIL = W_FREE_HEAD + (TYPES << FREE_SHIFT)
W_NR_FREE = W_FREE_TAIL + (TYPES << FREE_SHIFT)
# words: requests by where they wanted to be served and where they were (alloc/node.py)
W_NUMA = W_NR_FREE + (TYPES << FREE_SHIFT)
# words: all nodes, nearest first
W_ZONELIST = W_NUMA + 8
NODES = 16
# words: a ring of folios that are wanted on other nodes (alloc/touches.py)
W_HOT_NEXT = W_ZONELIST + NODES  # entries since the beginning
W_HOT = W_HOT_NEXT + 8
HOT = 256
HOT_NODE_SHIFT = 4  # an entry is a pfn and, below, the number of a node
# words: the migratetype of each pageblock
W_BLOCK_TYPES = W_HOT + HOT
LINE_BYTES = 64
LINE_WORDS = LINE_BYTES // 8
assert W_ROWS % 8 == ROW_WORDS % 8 == P_MAGAZINES % 8 == W_FREE_HEAD % 8 == W_NUMA % 8 == 0
assert W_HOT % 8 == 0
assert NODES <= 1 << HOT_NODE_SHIFT

Words = NDArray[np.int64]


class Pages(NamedTuple):
    """The descriptor arrays, all of length `memory_bytes / 4096`."""

    flags: NDArray[np.uint32]
    order: NDArray[np.uint8]  # of the block the page belongs to; meaningful on BUDDY HEAD TAIL
    refs: NDArray[np.int32]  # of the head page
    mapping: NDArray[np.uint32]  # inode handle or other owner; slab cache number of SLAB pages
    # file page index; object bitmap (upper half) of SLAB pages
    index: NDArray[np.int64]  # type: ignore[assignment]
    blocks: NDArray[np.uint32]  # per-block bits of the page cache
    lru_next: NDArray[np.uint32]
    lru_prev: NDArray[np.uint32]
    # of folios on the LRU: touches by node (alloc/touches.py); object bitmap (lower half) of SLAB
    private: NDArray[np.uint64]


class Buddy(NamedTuple):
    """What the kernels of the page allocator and of the LRU take, in this order."""

    words: Words
    flags: NDArray[np.uint32]
    order: NDArray[np.uint8]
    refs: NDArray[np.int32]
    lru_next: NDArray[np.uint32]
    lru_prev: NDArray[np.uint32]


class Slabs(NamedTuple):
    """What the slab kernels take: the buddy's arrays and the object bitmaps."""

    words: Words
    flags: NDArray[np.uint32]
    order: NDArray[np.uint8]
    refs: NDArray[np.int32]
    lru_next: NDArray[np.uint32]
    lru_prev: NDArray[np.uint32]
    mapping: NDArray[np.uint32]
    free_low: NDArray[np.uint64]
    free_high: NDArray[np.uint64]


def _aligned(count: int, kind: str) -> NDArray[Any]:
    """An array of zeros that begins at the start of a line."""
    nbytes = count * np.dtype(kind).itemsize
    room = np.zeros(nbytes + LINE_BYTES, dtype=np.uint8)
    skip = -room.ctypes.data % LINE_BYTES
    return room[skip : skip + nbytes].view(kind)


def make_words(nr_nodes: int, nr_pageblocks: int) -> Words:
    """Control words of so many nodes, each with room for so many pageblocks; all zero."""
    row = -(-(W_BLOCK_TYPES + nr_pageblocks) // LINE_WORDS) * LINE_WORDS
    return _aligned(nr_nodes * row, "i8")


def make_pages(nr_pages: int) -> Pages:
    """Descriptors of `nr_pages` pages, all zero; 41 bytes a page, 1 % of the arena."""
    assert nr_pages > 0
    kinds: tuple[Any, ...] = ("u4", "u1", "i4", "u4", "i8", "u4", "u4", "u4", "u8")
    return Pages(*(_aligned(nr_pages, kind) for kind in kinds))
