"""Shadows of evicted folios: the radix nodes that hold nothing else, and who takes them back.

A shadow costs nothing as long as its node holds folios, too. Nodes with nothing but shadows are
on a list, oldest first; a shrinker frees them when they are more than one for eight pages of the
arena, a bound of 1.6 % of it, as the kernel's does. When nothing else is left, those of the file
with the most of them go, too (`alloc.victim.Holder`). What is dropped from a file, by truncation or
with its inode, takes its shadows with it.

The list is the trio thread's. A lane that puts folios among shadows does not look at it: it may
leave a node there that is in use again, which the shrinker passes over, or one that is no longer
in any tree (its root is 0), which only waits for being freed. Nodes change under their mapping's
spin lock, which the shrinker only tries.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from alloc.atomic import spin_lock, spin_trylock, spin_unlock
from alloc.jit import helper, kernel
from fs.cache.radix import (
    COUNT,
    L_FIRST,
    L_NODES,
    NEXT,
    NODE,
    NODE_BIT,
    R_HEIGHT,
    R_LOCK,
    R_NODE,
    ROOT_AT,
    SHADOWS,
    SLOTS,
    WORDS,
    is_shadow,
    list_node,
    prune,
    unlist_node,
)

if TYPE_CHECKING:
    from fs.cache.folio import PageCache

PAGES_PER_NODE = 8
NODES_PER_PAGE = 4096 // NODE.itemsize
SCAN_BATCH = 128
LEVELS_MAX = 10


@helper
def _clear(m4, node, first, last):
    """Forget the shadows in slots [first, last) of a node."""
    for word in range(node * WORDS + first, node * WORDS + last):
        if is_shadow(np.int64(m4[word])):
            m4[word] = 0
            m4[node * WORDS + SHADOWS] -= 1


@kernel("i8(u4[::1], u8[::1], i8[::1], i8, u4[::1])")
def reclaim(m4, m8, listed, nr, freed):
    """Look at `nr` listed nodes, the oldest first; how many are in `freed`, parents included."""
    n = np.int64(0)
    for _ in range(nr):
        node = listed[L_FIRST]
        if node == 0:
            break
        unlist_node(m4, listed, node)
        root = np.int64(m8[node * 64 + ROOT_AT])
        if root != 0 and not spin_trylock(m4, root + R_LOCK):
            list_node(m4, m8, listed, root, node)
            continue
        if m8[node * 64 + ROOT_AT] == 0:
            freed[n] = node
            n += 1
        elif m4[node * WORDS + COUNT] == 0:
            _clear(m4, node, 0, SLOTS)
            n = prune(m4, m8, listed, root, node, freed, n)
        if root != 0:
            spin_unlock(m4, root + R_LOCK)
    return n


@kernel("i8(u4[::1], u8[::1], i8[::1], i8, i8, i8, u4[::1], i8[::1])")
def forget(m4, m8, listed, root, index, last, freed, out):
    """Forget the shadows of pages [index, last] until `freed` is full; how many are in it.

    out[0]: where to go on. A shadow goes as a whole.
    """
    n = np.int64(0)
    spin_lock(m4, root + R_LOCK)
    while index <= last and n + LEVELS_MAX <= freed.size:
        node = np.int64(m4[root + R_NODE])
        shift = (np.int64(m4[root + R_HEIGHT]) - 1) * 6
        if node == 0 or index >> (shift + 6) != 0:
            index = last + 1
            break
        slot = (index >> shift) & 63
        while m4[node * WORDS + slot] & NODE_BIT != 0:
            node = np.int64(m4[node * WORDS + slot]) ^ NODE_BIT
            shift -= 6
            slot = (index >> shift) & 63
        base = (index >> (shift + 6)) << (shift + 6)
        first = slot
        while slot < SLOTS and m4[node * WORDS + slot] & NODE_BIT == 0:
            if base + (slot << shift) > last:
                break
            slot += 1
        _clear(m4, node, first, slot)
        index = base + (slot << shift)
        n = prune(m4, m8, listed, root, node, freed, n)
    spin_unlock(m4, root + R_LOCK)
    out[0] = index
    return n


class ShadowNodes:
    """The nodes of one page cache that hold nothing but shadows, and their shrinker."""

    name = "mm-shadow"  # the shrinker's and the holder's

    def __init__(self, pages: PageCache) -> None:
        self._pages = pages
        self.listed = np.zeros(3, np.int64)
        self._freed = np.zeros((LEVELS_MAX + 1) * SCAN_BATCH, np.uint32)
        self._out = np.zeros(1, np.int64)

    @property
    def nr_nodes(self) -> int:
        """Nodes on the list."""
        return int(self.listed[L_NODES])

    def forget(self, handle: int, index: int, last: int) -> None:
        """Forget the shadows of pages [index, last] of a file."""
        pages = self._pages
        while index <= last and pages.columns["node"][handle]:
            args = (pages.m4, pages.m8, self.listed, pages.root(handle), index, last)
            self._free(forget(*args, self._freed, self._out))
            index = int(self._out[0])

    def _by_file(self) -> Counter[int]:
        """How many nodes the list has of each mapping, by its root."""
        m4, m8 = self._pages.m4, self._pages.m8
        found: Counter[int] = Counter()
        node = int(self.listed[L_FIRST])
        while node:
            found[int(m8[node * 64 + ROOT_AT])] += 1
            node = int(m4[node * WORDS + NEXT])
        del found[0]
        return found

    def count(self) -> int:
        """Pages that the shadows of one file fill, of the one with the most."""
        return max(self._by_file().values(), default=0) // NODES_PER_PAGE

    def shed(self) -> int:
        """Forget the shadows of that file; its pages."""
        ((root, nodes),) = self._by_file().most_common(1)
        self.forget(self._pages.handle_of(root), 0, 1 << 52)
        return nodes // NODES_PER_PAGE

    def count_objects(self) -> int:
        """Nodes above the bound, which has nothing to do with how short memory is."""
        return max(self.nr_nodes - self._pages.arena.nr_pages // PAGES_PER_NODE, 0)

    def scan_objects(self, nr: int, gfp_flags: int) -> int:
        """Free the oldest nodes. Safe under NOFS: locks are only tried."""
        pages = self._pages
        freed = reclaim(pages.m4, pages.m8, self.listed, min(nr, SCAN_BATCH), self._freed)
        pages.arena.vmstat.add("workingset_nodereclaim", freed)
        return self._free(freed)

    def _free(self, nodes: int) -> int:
        for node in self._freed[:nodes].tolist():
            self._pages.nodes.free(node)
        return nodes
