"""Folios that can be moved: a cache whose index is a dict, and naive twins of the scanners."""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from alloc.arena import Arena
from alloc.jit import probe
from alloc.mempolicy import NONE
from alloc.migrate import MOVED, replace_folio
from alloc.page import (
    BUDDY,
    HEAD,
    LOCKED,
    LRU,
    MOVABLE,
    W_BLOCK_ORDER,
    W_BLOCK_TYPES,
    WRITEBACK,
    Pages,
)
from tests.alloc.caches import FolioCache


@probe
def relocate(
    words, flags, order, refs, mapping, index, blocks, lru_next, lru_prev, private, mem, source,
    target,
):  # fmt: skip
    """The helper's entry point for an owner without locks."""
    pages = Pages(flags, order, refs, mapping, index, blocks, lru_next, lru_prev, private)
    replace_folio(words, pages, mem, source, target)


class MovableCache(FolioCache):
    """A FolioCache whose folios carry a pattern and may be moved, but for those in `pinned`."""

    name = "test-movable"

    def __init__(self, arena: Arena) -> None:
        super().__init__(arena)
        self.seeds: dict[int, int] = {}
        self.pinned: set[int] = set()
        self.policies: dict[int, int] = {}
        self.moves: list[tuple[int, int]] = []
        arena.compaction.register_mover(self)

    def insert(self, pfn: int, dirty: bool) -> None:
        super().insert(pfn, dirty)
        pages = self.arena.pages
        self.seeds[pfn] = seed = len(self.seeds) + 1
        pages.index[pfn], pages.mapping[pfn], pages.private[pfn] = seed, 7, seed + 1
        for page in range(pfn, pfn + (1 << int(pages.order[pfn]))):
            pages.blocks[page] = seed ^ page - pfn
        self._bytes(pfn)[:] = np.arange(self._bytes(pfn).size) * seed & 0xFF

    def _bytes(self, pfn: int) -> NDArray[np.uint8]:
        return self.arena.mem[pfn << 12 : (pfn << 12) + (4096 << int(self.arena.pages.order[pfn]))]

    def pin(self, pfn: int) -> None:
        self.pinned.add(pfn)
        self.arena.get_folio(pfn)

    def drop(self) -> None:
        for pfn in self.pinned:
            self.arena.put_folio(pfn)
        super().drop()

    def move_folios(
        self, sources: NDArray[np.int64], targets: NDArray[np.int64], verdicts: NDArray[np.int64]
    ) -> None:
        pages = self.arena.pages
        for k, (source, target) in enumerate(zip(sources.tolist(), targets.tolist(), strict=True)):
            assert source not in self.pinned
            assert pages.refs[source] == 2
            relocate(self.arena.words, *pages, self.arena.mem, source, target)
            self.folios[target] = self.folios.pop(source)
            self.seeds[target] = self.seeds.pop(source)
            self.moves.append((source, target))
            verdicts[k] = MOVED

    def policy_of(self, pfn: int) -> int:
        return self.policies.get(pfn, NONE)

    def verify(self) -> None:
        """Everything that came along with each folio is what it was, and the arena is sound."""
        self.arena.check()
        pages = self.arena.pages
        for pfn in self.folios:
            seed, size = self.seeds[pfn], 1 << int(pages.order[pfn])
            what = (int(pages.index[pfn]), int(pages.mapping[pfn]), int(pages.private[pfn]))
            assert what == (seed, 7, seed + 1)
            assert pages.blocks[pfn : pfn + size].tolist() == [seed ^ k for k in range(size)]
            assert (self._bytes(pfn) == np.arange(size << 12) * seed % 256).all()


def lru_order(arena: Arena, start: int) -> list[int]:
    """The folios of an LRU list from its head."""
    found = []
    while start:
        found.append(start)
        start = int(arena.pages.lru_next[start])
    return found


def tiles(arena: Arena) -> dict[int, tuple[int, str]]:
    """Every block by its pfn: its order, and whether it is free, movable or in the way."""
    pages, out, pfn = arena.pages, {}, 1
    while pfn < arena.nr_pages:
        flags, order = int(pages.flags[pfn]), int(pages.order[pfn])
        moves = flags & (HEAD | LRU | LOCKED | WRITEBACK) == HEAD | LRU and pages.refs[pfn] == 1
        out[pfn] = (order, "free" if flags & BUDDY else "moves" if moves else "stays")
        pfn += 1 << order
    return out


def units(arena: Arena, order: int, top: int, mt: int | None) -> list[int]:
    """Naive find_unit: all aligned blocks that moving would make free, below page `top`."""
    known, size, found = tiles(arena), 1 << order, []
    block = int(arena.words[W_BLOCK_ORDER])
    free = sum(1 << o for o, kind in known.values() if kind == "free")
    for base in range(0, top - size + 1, size):
        inside = {pfn: known[pfn] for pfn in range(base, base + size) if pfn in known}
        whole = base in inside and all(
            kind == "free" or kind == "moves" and o < order for o, kind in inside.values()
        )
        moving = sum(1 << o for o, kind in inside.values() if kind == "moves")
        types = {int(arena.words[W_BLOCK_TYPES + (p >> block)]) for p in range(base, base + size)}
        fits = types <= ({0, 1, 2} if mt is None else {mt})
        if whole and fits and 0 < moving < free:
            found.append(base)
    return found


def best_target(arena: Arena, bottom: int, want: int, spared: int) -> int:
    """Naive take_targets: the lowest fitting free block of the highest MOVABLE pageblock."""
    block = 1 << int(arena.words[W_BLOCK_ORDER])
    fitting: dict[int, list[int]] = {}
    for pfn, (order, kind) in tiles(arena).items():
        movable = arena.words[W_BLOCK_TYPES + pfn // block] == MOVABLE
        if kind == "free" and movable and pfn >= bottom and want <= order < spared:
            fitting.setdefault(pfn // block, []).append(pfn)
    return min(fitting[max(fitting)]) if fitting else 0


def scatter(
    arena: Arena, rng: random.Random, orders: list[int], part: float, dirty: float = 0.5
) -> MovableCache:
    """A full arena of movable folios of these orders, of which then a part is freed at random."""
    cache = MovableCache(arena)
    while True:
        order = rng.choice(orders)
        pfn = arena.try_alloc_folio(order, 4 | 1 << 16)
        if pfn is None:
            break
        cache.insert(pfn, dirty=rng.random() < dirty)
    cache.fill(dirty=True)
    for pfn in rng.sample(sorted(cache.folios), int(len(cache.folios) * part)):
        del cache.folios[pfn]
        arena.put_folio(pfn)
    arena.drain_all()
    return cache
