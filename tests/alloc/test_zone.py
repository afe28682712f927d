"""Pageblocks and their types, case by case; tests/alloc/test_buddy.py has them all at random."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from alloc import buddy, zone
from alloc.arena import Arena
from alloc.gfp import MOVABLE as GFP_MOVABLE
from alloc.gfp import NOWAIT
from alloc.gfp import RECLAIMABLE as GFP_RECLAIMABLE
from alloc.page import (
    HIGHATOMIC,
    MOVABLE,
    RECLAIMABLE,
    UNMOVABLE,
    W_BLOCK_TYPES,
    W_BOOST,
    W_BOOST_MAX,
    W_CLAIMED,
    W_FREE,
    W_FREE_HIGHATOMIC,
    W_HIGHATOMIC,
    W_STOLEN,
)
from tests.alloc.caches import FolioCache

BLOCK = 16  # pages of a pageblock in the smallest arena


def take(arena: Arena, mt: int, order: int = 0, rights: int = buddy.RIGHTS_ALL) -> int:
    return abs(int(buddy.alloc_pages(*arena.buddy, order, rights | mt << buddy.MT_SHIFT)))


def put(arena: Arena, *pfns: int) -> None:
    for pfn in pfns:
        assert buddy.put_page(*arena.buddy, pfn) > 0


def type_of(arena: Arena, pfn: int) -> int:
    return int(arena.words[W_BLOCK_TYPES + pfn // BLOCK])


def counts(arena: Arena) -> tuple[int, int]:
    return int(arena.words[W_CLAIMED]), int(arena.words[W_STOLEN])


class Full:
    """No page is free: a pageblock of blocks of `order` for each type, all else MOVABLE folios."""

    def __init__(self, arena: Arena, order: int = 0) -> None:
        self.arena = arena
        self.of = {
            mt: [take(arena, mt, order) for _ in range(BLOCK >> order)]
            for mt in (UNMOVABLE, RECLAIMABLE)
        }
        self.of[MOVABLE] = []
        while arena.words[W_FREE] > (1 << order):
            pfn = take(arena, MOVABLE, order)
            if not pfn:
                break
            self.of[MOVABLE].append(pfn)
            arena.lru.add(pfn)
        self.rest = []
        while pfn := take(arena, MOVABLE):
            self.rest.append(pfn)
        arena.words[W_CLAIMED] = arena.words[W_STOLEN] = arena.words[W_BOOST] = 0

    def free(self, mt: int, k: int) -> int:
        pfn = self.of[mt].pop(k)
        put(self.arena, pfn)
        return pfn

    def close(self) -> None:
        for pfns in (*self.of.values(), self.rest):
            put(self.arena, *pfns)


@pytest.mark.parametrize(
    ("mib", "order", "reserve"),
    [(8, 4, 32), (16, 5, 64), (32, 6, 128), (64, 7, 256), (256, 9, 1024), (1024, 9, 3072)],
)
def test_sizes_follow_the_arenas(mib: int, order: int, reserve: int) -> None:
    pages = mib << 8
    assert zone.block_order(pages) == order
    assert zone.nr_blocks(pages) == pages >> order >= 64
    assert zone.highatomic_max(pages) == reserve


def test_an_arena_that_ends_within_a_pageblock() -> None:
    assert zone.nr_blocks(2048 + 1) == 129
    assert zone.highatomic_max(2049) == 32


def test_the_first_request_of_a_type_claims_one_pageblock(arena: Arena) -> None:
    pfn = take(arena, UNMOVABLE)
    assert type_of(arena, pfn) == UNMOVABLE
    assert counts(arena) == (1, 0)
    assert arena.words[W_BOOST] == 0
    others = [take(arena, UNMOVABLE) for _ in range(BLOCK - 1)]
    assert {page // BLOCK for page in others} == {pfn // BLOCK}
    large = take(arena, RECLAIMABLE, 6)
    assert [type_of(arena, large + n * BLOCK) for n in range(5)] == [RECLAIMABLE] * 4 + [MOVABLE]
    assert counts(arena) == (5, 0)
    put(arena, pfn, large, *others)


@pytest.mark.parametrize(
    ("mt", "order"),
    [
        (UNMOVABLE, (RECLAIMABLE, MOVABLE)),
        (MOVABLE, (RECLAIMABLE, UNMOVABLE)),
        (RECLAIMABLE, (UNMOVABLE, MOVABLE)),
    ],
)
def test_whose_pages_are_taken_first(arena: Arena, mt: int, order: tuple[int, int]) -> None:
    full = Full(arena, order=1)
    freed = {other: full.free(other, 3) for other in order}
    for other in order:
        pfn = take(arena, mt, 1)
        assert pfn == freed[other]
        assert type_of(arena, pfn) == other
        full.rest.append(pfn)
    assert counts(arena) == (0, 2)
    full.close()


@pytest.mark.parametrize("mt", [UNMOVABLE, RECLAIMABLE])
def test_slabs_that_must_mix_take_the_lowest_page(arena: Arena, mt: int) -> None:
    full = Full(arena)
    freed = [full.free(MOVABLE, 40 * k + 7) for k in range(20)]
    got = [take(arena, mt) for _ in range(10)]
    assert got == sorted(freed)[:10]
    full.rest += got
    full.close()


def test_a_block_half_of_which_is_free_or_alike_is_claimed(arena: Arena) -> None:
    full = Full(arena)
    block = [pfn for pfn in full.of[MOVABLE] if pfn // BLOCK == 60]
    for n, pfn in enumerate(block[1::2]):
        assert type_of(arena, pfn) == MOVABLE
        full.of[MOVABLE].remove(pfn)
        put(arena, pfn)
        full.rest.append(take(arena, UNMOVABLE))
        assert full.rest[-1] == pfn
        assert counts(arena) == ((0, n + 1) if n < 7 else (1, 7))
    assert type_of(arena, block[0]) == UNMOVABLE
    # and back, when what is movable or free is half of it
    full.rest.remove(block[1])
    full.rest.remove(block[3])
    put(arena, block[1], block[3])
    full.of[MOVABLE] += [take(arena, MOVABLE), take(arena, MOVABLE)]
    assert type_of(arena, block[0]) == UNMOVABLE  # a page is too little for a claim
    full.close()


def test_each_mix_lifts_the_marks_up_to_a_bound(arena: Arena) -> None:
    full = Full(arena)
    most = int(arena.words[W_BOOST_MAX])
    assert most == arena.marks.high * 3 // 2
    for n in range(24):
        full.free(MOVABLE, 50 * n)
        full.rest.append(take(arena, UNMOVABLE))
        assert arena.words[W_BOOST] == min((n + 1) * BLOCK, most)
    assert counts(arena) == (0, 24)
    full.close()


async def test_kswapd_makes_a_boost_good_once_and_without_cleaning(
    arena: Arena, autojump_clock: object
) -> None:
    cache = FolioCache(arena)
    cache.fill()
    woken: list[None] = []
    arena.register_cleaner(lambda: woken.append(None))
    arena.words[W_BOOST] = boost = 100
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        arena.reclaim.wake_kswapd()
        await trio.testing.wait_all_tasks_blocked()
        assert arena.free_pages >= arena.marks.high + boost
        assert arena.words[W_BOOST] == 0
        for folio in cache.folios:
            cache.folios[folio] = True
        woken.clear()
        arena.words[W_BOOST] = boost = arena.free_pages
        arena.reclaim.wake_kswapd()
        await trio.testing.wait_all_tasks_blocked()
        assert arena.words[W_BOOST] == 0
        assert not woken
        nursery.cancel_scope.cancel()
    cache.drop()


def test_a_boost_keeps_nobody_waiting(arena: Arena) -> None:
    full = Full(arena)
    for _ in range(arena.marks.min + 1):
        full.free(MOVABLE, -1)
    arena.words[W_BOOST] = arena.words[W_BOOST_MAX]
    got = buddy.alloc_pages(*arena.buddy, 0, buddy.RIGHTS_MOVABLE)
    assert got < 0  # and kswapd is to be woken
    put(arena, -got)
    full.close()


def test_the_high_atomic_reserve_grows_to_its_size_and_is_used_first(arena: Arena) -> None:
    held = [take(arena, UNMOVABLE, 1, buddy.RIGHTS_ATOMIC)]
    assert type_of(arena, held[0]) == HIGHATOMIC
    assert arena.words[W_HIGHATOMIC] == BLOCK
    assert arena.words[W_FREE_HIGHATOMIC] == BLOCK - 2
    held += [take(arena, UNMOVABLE, 1, buddy.RIGHTS_ATOMIC) for _ in range(BLOCK // 2 - 1)]
    assert {pfn // BLOCK for pfn in held} == {held[0] // BLOCK}
    held.append(take(arena, MOVABLE, 6, buddy.RIGHTS_ATOMIC))
    assert arena.words[W_HIGHATOMIC] == 5 * BLOCK
    held.append(take(arena, MOVABLE, 6, buddy.RIGHTS_ATOMIC))
    assert arena.words[W_HIGHATOMIC] == 5 * BLOCK
    assert type_of(arena, held[-1]) == MOVABLE
    arena.check()
    put(arena, *held)
    arena.check()
    assert arena.words[W_FREE_HIGHATOMIC] == 5 * BLOCK
    assert zone.release_reserve(*arena.buddy, MOVABLE) == 5 * BLOCK
    assert arena.words[W_HIGHATOMIC] == 0


def test_others_leave_the_reserve_alone_until_they_may_take_everything(arena: Arena) -> None:
    put(arena, take(arena, UNMOVABLE, 1, buddy.RIGHTS_ATOMIC))
    held = []
    for rights in (buddy.RIGHTS_MIN, buddy.RIGHTS_HALF):
        while pfn := take(arena, MOVABLE, 0, rights):
            held.append(pfn)
    assert arena.words[W_FREE] == arena.marks.min // 2
    assert arena.words[W_FREE_HIGHATOMIC] == BLOCK
    while arena.words[W_FREE] > BLOCK:
        held.append(take(arena, MOVABLE, 0, buddy.RIGHTS_ALL))
    assert arena.words[W_FREE_HIGHATOMIC] == BLOCK
    while pfn := take(arena, MOVABLE, 0, buddy.RIGHTS_ALL):
        held.append(pfn)
    assert arena.words[W_FREE] == 0
    put(arena, *held)


async def test_who_waits_gets_the_reserve(arena: Arena, autojump_clock: object) -> None:
    put(arena, take(arena, UNMOVABLE, 3, buddy.RIGHTS_ATOMIC))
    held = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT | GFP_MOVABLE)) is not None:
        held.append(pfn)
    assert arena.words[W_FREE_HIGHATOMIC] == BLOCK
    held += [await arena.alloc_folio(0, GFP_MOVABLE) for _ in range(BLOCK)]
    assert trio.current_time() == 0
    assert arena.words[W_HIGHATOMIC] == 0
    assert arena.free_pages == arena.marks.min
    put(arena, *held)


async def test_gfp_and_slab_say_the_type(arena: Arena) -> None:
    folios = [await arena.alloc_folio(0, flags) for flags in (0, GFP_MOVABLE, GFP_RECLAIMABLE)]
    assert [type_of(arena, pfn) for pfn in folios] == [UNMOVABLE, MOVABLE, RECLAIMABLE]
    slabs = [arena.slab(str(flag), "V64", reclaimable=flag) for flag in (False, True)]
    objects = [await slab.alloc() for slab in slabs]
    assert [type_of(arena, i >> 6) for i in objects] == [UNMOVABLE, RECLAIMABLE]
    for slab, i in zip(slabs, objects, strict=True):
        slab.free(i)
    put(arena, *folios)


def test_check_finds_a_block_on_another_types_list(arena: Arena) -> None:
    arena.words[W_BLOCK_TYPES + 100] = RECLAIMABLE
    with pytest.raises(AssertionError, match="is on the list of type"):
        arena.check()
    arena.words[W_BLOCK_TYPES + 100] = MOVABLE
    arena.words[W_FREE_HIGHATOMIC] = 1
    with pytest.raises(AssertionError, match="free pages of the high-atomic reserve"):
        arena.check()
    arena.words[W_FREE_HIGHATOMIC] = 0
    arena.words[W_HIGHATOMIC] = 1
    with pytest.raises(AssertionError, match="pages of the high-atomic reserve"):
        arena.check()
    arena.words[W_HIGHATOMIC] = 0
    arena.words[W_BOOST] = -1
    with pytest.raises(AssertionError, match="the boost"):
        arena.check()
    arena.words[W_BOOST] = 0
