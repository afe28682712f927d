"""Folios that are halved, again and again, against lists of what there is and where it stands."""

from __future__ import annotations

from random import Random

import pytest

from alloc.arena import Arena
from alloc.halve import halve, may_halve
from alloc.jit import probe
from alloc.page import (
    ACTIVE,
    DIRTY,
    HEAD,
    LOCKED,
    LRU,
    READAHEAD,
    RECLAIM,
    REFERENCED,
    TAIL,
    WORKINGSET,
    WRITEBACK,
    Pages,
)
from alloc.topology import topology
from tests.alloc.test_lru import listed, take


@probe
def halved(words, flags, order, refs, mapping, index, blocks, lru_next, lru_prev, private, pfn):
    """The helpers' entry point for an owner without locks: the upper half, or 0."""
    pages = Pages(flags, order, refs, mapping, index, blocks, lru_next, lru_prev, private)
    return halve(words, pages, pfn) if may_halve(pages, pfn) else 0


class Owner:
    """Has folios: their orders by pfn, and for each list what stands in it, oldest first."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.orders: dict[int, int] = {}
        self.lists: dict[tuple[int, bool], list[int]] = {
            (node, active): [] for node in range(len(arena.nodes)) for active in (False, True)
        }

    def take(self, order: int, node: int, active: bool) -> None:
        pfn, pages = take(self.arena, order, node), self.arena.pages
        pages.mapping[pfn], pages.index[pfn], pages.private[pfn] = pfn, pfn * 3, pfn + 1
        for page in range(pfn, pfn + (1 << order)):
            pages.blocks[page] = page
        self.arena.lru.add(pfn, active)
        self.orders[pfn] = order
        self.lists[node, active].append(pfn)

    def put(self, pfn: int) -> None:
        assert self.arena.put_folio(pfn)
        del self.orders[pfn]
        for stands in self.lists.values():
            if pfn in stands:
                stands.remove(pfn)

    def halve(self, pfn: int) -> None:
        pages = self.arena.pages
        whole = (int(pages.mapping[pfn]), int(pages.private[pfn]), int(pages.flags[pfn]))
        index, size = int(pages.index[pfn]), 1 << self.orders[pfn] >> 1
        upper = halved(self.arena.words, *pages, pfn)
        assert upper == pfn + size
        for half, at in ((pfn, index), (upper, index + size)):
            about = (int(pages.mapping[half]), int(pages.private[half]), int(pages.flags[half]))
            assert about == whole
            assert (int(pages.index[half]), int(pages.refs[half])) == (at, 1)
        self.orders[pfn] -= 1
        self.orders[upper] = self.orders[pfn]
        for stands in self.lists.values():
            if pfn in stands:
                stands.insert(stands.index(pfn), upper)

    def check(self) -> None:
        pages = self.arena.pages
        for (node, active), pfns in self.lists.items():
            assert listed(self.arena, active, node) == pfns
        for pfn, order in self.orders.items():
            assert self.arena.folio_head(pfn + (1 << order) - 1) == pfn
            blocks = pages.blocks[pfn : pfn + (1 << order)].tolist()
            assert blocks == list(range(pfn, pfn + (1 << order)))
        self.arena.check()


@pytest.mark.parametrize("seed", range(6))
def test_any_folio_any_number_of_times(seed: int) -> None:
    random = Random(seed)
    arena = Arena(16 << 20, nodes=topology(2))
    free = arena.free_pages
    owner = Owner(arena)
    for _ in range(120):
        what = random.choice(["take", "halve", "halve", "halve", "put"])
        large = sorted(pfn for pfn, order in owner.orders.items() if order)
        if what == "take" and sum(1 << order for order in owner.orders.values()) < 2000:
            owner.take(random.choice([0, 1, 3, 5, 8]), random.randrange(2), random.random() < 0.4)
        elif what == "halve" and large:
            owner.halve(random.choice(large))
        elif what == "put" and owner.orders:
            owner.put(random.choice(sorted(owner.orders)))
        owner.check()
    assert any(order not in (0, 1, 3, 5, 8) for order in owner.orders.values())
    for pfn in list(owner.orders):
        owner.put(pfn)
    owner.check()
    assert arena.free_pages == free
    arena.close()


def test_a_part_becomes_free_memory_and_merges_again(arena: Arena) -> None:
    owner = Owner(arena)
    before = arena.free_pages
    owner.take(5, 0, False)
    (pfn,) = owner.orders
    owner.halve(pfn)
    owner.halve(pfn + 16)
    owner.put(pfn + 24)
    assert before - arena.free_pages == 24
    owner.put(pfn)
    owner.put(pfn + 16)
    arena.drain_all()
    assert arena.free_pages == before
    assert take(arena, 5) == pfn
    arena.put_folio(pfn)


def test_what_both_halves_are(arena: Arena) -> None:
    pfn, flags = take(arena, 3), arena.pages.flags
    arena.lru.add(pfn, active=True)
    both = HEAD | LRU | ACTIVE | REFERENCED | WORKINGSET | DIRTY
    flags[pfn] |= both | READAHEAD | RECLAIM
    upper = halved(arena.words, *arena.pages, pfn)
    assert (flags[pfn], flags[upper]) == (both | READAHEAD | RECLAIM, both)
    assert set(flags[pfn + 1 : pfn + 4]) == set(flags[upper + 1 : upper + 4]) == {TAIL}
    for half in (pfn, upper):
        flags[half] ^= DIRTY
        arena.put_folio(half)


@pytest.mark.parametrize("why", ["a reference", "no list", "LOCKED", "WRITEBACK", "a tail"])
def test_who_is_used_is_not_halved(arena: Arena, why: str) -> None:
    pfn, flags = take(arena, 2), arena.pages.flags
    busy = {"LOCKED": LOCKED, "WRITEBACK": WRITEBACK}.get(why, 0)
    if why != "no list":
        arena.lru.add(pfn)
    if why == "a reference":
        arena.get_folio(pfn)
    flags[pfn] |= busy
    assert halved(arena.words, *arena.pages, pfn + (why == "a tail")) == 0
    flags[pfn] ^= busy
    arena.check()
    if why == "a reference":
        arena.put_folio(pfn)
    arena.put_folio(pfn)
