"""Areas of pages that lie anywhere: they read and write as one, and nothing is lost."""

from __future__ import annotations

import faulthandler
import os
import signal

import numpy as np
import pytest
import trio
import trio.testing

from alloc.arena import Arena
from alloc.gfp import NOWAIT
from alloc.vmalloc import AREA_PAGES

PAGE = 4096


async def take_all(arena: Arena) -> list[int]:
    taken = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT)) is not None:
        taken.append(pfn)
    return taken


async def in_pieces(arena: Arena) -> list[int]:
    """Have no two free pages side by side; the pages that are held."""
    taken = await take_all(arena)
    for pfn in taken:
        if pfn % 2:
            arena.put_folio(pfn)
    return [pfn for pfn in taken if pfn % 2 == 0]


async def test_pages_in_a_row(arena: Arena) -> None:
    """What is written to an area is in its pages, in their order, and the other way round."""
    held = await in_pieces(arena)
    before = arena.free_pages
    first = await arena.vmalloc.alloc(AREA_PAGES)
    at, end = first * PAGE, (first + AREA_PAGES) * PAGE
    shown = arena.vmalloc.shown()
    assert arena.vmalloc.covers(first)
    assert not any(pfn + 1 in shown for pfn in shown), "they do not lie side by side"
    assert (len(shown), before - arena.free_pages) == (AREA_PAGES, AREA_PAGES)
    arena.check()
    arena.mem[at:end] = np.repeat(np.arange(1, 1 + AREA_PAGES, dtype=np.uint8), PAGE)
    for number, pfn in enumerate(shown, 1):
        assert (arena.mem[pfn * PAGE : (pfn + 1) * PAGE] == number).all()
    arena.mem[shown[5] * PAGE + 7] = 99
    assert arena.mem[at + 5 * PAGE + 7] == 99
    assert arena.meminfo()["VmallocUsed"] == 4 * AREA_PAGES
    arena.vmalloc.free(first)
    assert (arena.free_pages, arena.vmalloc.nr_pages) == (before, 0)
    for pfn in held:
        arena.put_folio(pfn)


async def test_areas_are_apart_and_come_back(arena: Arena) -> None:
    """Sizes mix; what is freed is used again."""
    areas = {await arena.vmalloc.alloc(1 + n % AREA_PAGES): n for n in range(40)}
    for first, n in areas.items():
        arena.mem[first * PAGE : (first + 1 + n % AREA_PAGES) * PAGE] = n
    for first, n in areas.items():
        part = arena.mem[first * PAGE : (first + 1 + n % AREA_PAGES) * PAGE]
        assert (part == n).all()
    arena.check()
    for first in areas:
        arena.vmalloc.free(first)
    assert await arena.vmalloc.alloc(2) in areas
    arena.vmalloc.free(next(reversed(areas)))
    assert arena.vmalloc.nr_pages == 0


async def test_waiting_for_pages(
    arena: Arena, autojump_clock: trio.testing.MockClock
) -> None:
    """It waits as any request does, and one that is cancelled meanwhile leaves nothing."""
    held = await take_all(arena)
    with trio.move_on_after(1):
        await arena.vmalloc.alloc(4)
    assert arena.vmalloc.nr_pages == 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.vmalloc.alloc, 4)
        await trio.sleep(1)
        assert arena.vmalloc.nr_pages == 0
        for pfn in held:
            arena.put_folio(pfn)
    assert arena.vmalloc.nr_pages == 4
    arena.vmalloc.free(arena.nr_pages)


async def test_all_pages_or_none(arena: Arena, autojump_clock: trio.testing.MockClock) -> None:
    """Two that wait for as many as there are: each has none until it has all, so one gets them."""
    held = await take_all(arena)
    areas: list[int] = []

    async def one() -> None:
        areas.append(await arena.vmalloc.alloc(AREA_PAGES))

    for _ in range(AREA_PAGES - 1):
        arena.put_folio(held.pop())
    free = arena.free_pages
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(one)
        await trio.sleep(0.5)
        assert (areas, arena.free_pages, len(arena.waiters())) == ([], free, 2)
        arena.put_folio(held.pop())
        await trio.sleep(0.5)
        assert (len(areas), arena.free_pages) == (1, free + 1 - AREA_PAGES)
        arena.vmalloc.free(areas[0])
        await trio.sleep(0.5)
        assert len(areas) == 2
    arena.vmalloc.free(areas[1])
    for pfn in held:
        arena.put_folio(pfn)


async def test_without_areas_a_block(arena: Arena) -> None:
    """When the window is full it has to be a block, of the order that holds so many pages."""
    arena.vmalloc._free.clear()
    pfn = await arena.vmalloc.alloc(5)
    assert not arena.vmalloc.covers(pfn)
    assert int(arena.pages.order[pfn]) == 3
    arena.put_folio(pfn)
    with pytest.raises(ValueError, match="18 pages in a row: an area has 17"):
        await arena.vmalloc.alloc(18)


async def test_the_validator_sees_a_page_in_two_places(arena: Arena) -> None:
    """And one whose reference somebody dropped."""
    first, second = await arena.vmalloc.alloc(2), await arena.vmalloc.alloc(2)
    areas = arena.vmalloc._areas
    own = areas[second][0]
    areas[second][0] = areas[first][0]
    with pytest.raises(AssertionError, match="shown twice"):
        arena.check()
    areas[second][0] = own
    arena.get_folio(own)
    with pytest.raises(AssertionError, match="order 0, 2 references"):
        arena.check()
    arena.put_folio(own)
    for area in (first, second):
        arena.vmalloc.free(area)


@pytest.mark.parametrize("freed", [True, False])
async def test_use_after_free_ends_the_program(arena: Arena, freed: bool) -> None:
    """In a process of its own; calibrated by one that uses an area that is not free."""
    first = await arena.vmalloc.alloc(2)
    if freed:
        arena.vmalloc.free(first)
    child = os.fork()
    if not child:
        faulthandler.disable()
        os._exit(int(arena.mem[first * PAGE]) & 0)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == (-signal.SIGSEGV if freed else 0)
    if not freed:
        arena.vmalloc.free(first)
