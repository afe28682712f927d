"""Splitting: a large folio that is partly thrown away becomes smaller ones, so that memory is free.

As the kernel's non-uniform split: the folio is halved, then the half in which the edge lies, and
so on until a folio begins at the edge. So pieces are as large as they can be. An edge is a
multiple of the mapping's smallest order, so no piece is smaller.

A folio has one way in, its mapping's tree, and one lock on it, R_LOCK, under which lookups take
their references: as where folios move (fs/cache/relocate.py). So it is split in one hold of that
lock, if it is neither LOCKED nor under write-back and has no reference but its mapping's. Content
and block bits stay where they are. Tags and flags are those of both halves; one without dirty
blocks is clean. Other folios are not split, and neither is one that needs a node for the tree if
none is free: nobody waits, for what is left is only larger than it has to be. Trio thread only.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from alloc.atomic import spin_lock, spin_unlock
from alloc.halve import halve, may_halve
from alloc.jit import kernel
from alloc.page import ORDERS, Pages
from fs.cache.blocks import has_dirty, undirty_folio
from fs.cache.radix import LEVEL_ORDER, R_LOCK, halve_entry

if TYPE_CHECKING:
    from fs.cache.folio import PageCache


@kernel(
    "i8(i8[::1], u4[::1], u1[::1], i4[::1], u4[::1], i8[::1], u4[::1], u4[::1], u4[::1],"
    " u8[::1], u4[::1], u8[::1], i8[::1], i8, i8, i8, i8)"
)
def split_folio(
    words, flags, orders, refs, mapping, indices, blocks, lru_next, lru_prev, private, m4, m8,
    counts, root, pfn, index, spare,
):  # fmt: skip
    """Halve a folio until one begins at page `index`, which lies inside; how often, 0: it is used.

    spare: a node for the tree; taken if order and index say so (`Splits.split`).
    """
    pages = Pages(flags, orders, refs, mapping, indices, blocks, lru_next, lru_prev, private)
    halvings = np.int64(0)
    spin_lock(m4, root + R_LOCK)
    if may_halve(pages, pfn):
        while indices[pfn] != index:
            halve_entry(m4, m8, orders, root, indices[pfn], spare)
            upper = halve(words, pages, pfn)
            halvings += 1
            size = np.int64(1) << np.int64(orders[pfn])
            for half in (pfn, upper):
                if not has_dirty(blocks, half, size):
                    undirty_folio(m4, m8, flags, orders, indices, counts, root, half)
            if index >= indices[upper]:
                pfn = upper
    spin_unlock(m4, root + R_LOCK)
    return halvings


class Splits:
    """Splits of one page cache, counted by the order of what was, or was not, split."""

    def __init__(self, pages: PageCache) -> None:
        self._pages = pages
        self.done = [0] * ORDERS
        self.failed = [0] * ORDERS

    def split(self, pfn: int, index: int) -> bool:
        """Have a folio begin at a page of the file that lies inside of this; False: it stays whole.

        Other pages of the folio are in other folios afterwards.
        """
        pages, p = self._pages, self._pages.pages
        order, first = int(p.order[pfn]), int(p.index[pfn])
        assert first < index < first + (1 << order), f"page {index} is not inside of folio {pfn}"
        node, halvings = 0, 0
        needs_node = order >= LEVEL_ORDER and index & ((1 << LEVEL_ORDER) - 1) != 0
        if needs_node:
            node = pages.try_node()
        if node or not needs_node:
            root = pages.root(int(p.mapping[pfn]))
            state = (pages.m4, pages.m8, pages.dirty.counts, root)
            halvings = int(split_folio(pages.arena.words, *p, *state, pfn, index, node))
            if node and not halvings:
                pages.give_node(node)
        (self.done if halvings else self.failed)[order] += 1
        return halvings > 0
