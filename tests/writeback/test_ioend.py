"""The pool of I/O completions: never more than there are, first come first served, in the arena."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from alloc import gfp
from alloc.arena import Arena
from writeback.ioend import DEPTH, FOLIOS_MAX, RESERVED, Ioend, IoendPool


@pytest.fixture
def arena():
    made = Arena(8 << 20)
    yield made
    made.check()
    made.close()


def exhaust(arena: Arena) -> list[int]:
    """Every page, those of the reserve too."""
    held = []
    while (pfn := arena.try_alloc_folio(0, gfp.NOWAIT | gfp.MEMALLOC)) is not None:
        held.append(pfn)
    return held


@pytest.mark.parametrize("exhausted", [False, True])
async def test_waits_for_an_earlier_one(arena: Arena, exhausted: bool) -> None:
    pool = IoendPool(arena, 32)
    await pool.pool.fill()
    held = exhaust(arena) if exhausted else []
    most = RESERVED if exhausted else DEPTH
    in_use: list[Ioend] = []
    order: list[int] = []

    async def taker(number: int) -> None:
        in_use.append(await pool.get())
        order.append(number)

    with gfp.memalloc():
        for number in range(most):
            await taker(number)
        assert len({ioend.pfn for ioend in in_use}) == most
        async with trio.open_nursery() as nursery:
            for number in range(most, most + 2):
                nursery.start_soon(taker, number)
                await trio.testing.wait_all_tasks_blocked()
            assert len(in_use) == pool.pool.in_use == most
            for _ in range(2):
                pool.put(in_use.pop(0))
                await trio.testing.wait_all_tasks_blocked()
    assert order == list(range(most + 2))
    for ioend in in_use:
        pool.put(ioend)
    assert (pool.pool.in_use, pool.pool.aside) == (0, RESERVED)
    for pfn in held:
        arena.put_folio(pfn)


async def test_comes_back_clean(arena: Arena) -> None:
    pool = IoendPool(arena, 32)
    await pool.pool.fill()
    held = exhaust(arena)
    for _ in range(RESERVED):
        ioend = await pool.get()
        ioend.meta[:5] = (1, 1, 1, 9, 77)
        ioend.handle, ioend.error = 7, 5
        ioend.folios[:] = ioend.runs[:] = -1
        ioend.runs[0] = (3, 4)
        assert ioend.ranges() == [(3, 4)]
        assert (ioend.next_index, ioend.size) == (9, 77)
        assert (ioend.handle, ioend.error) == (7, 5)
        pool.put(ioend)
        again = await pool.get()
        assert (again.handle, again.error, again.nr_folios, again.ranges()) == (0, 0, 0, [])
        pool.put(again)
    for pfn in held:
        arena.put_folio(pfn)


@pytest.mark.parametrize("folio_pages", [1, 16, 32, 64, 512])
async def test_parts_lie_apart_and_the_largest_folio_fits(folio_pages: int, arena: Arena) -> None:
    pool = IoendPool(arena, folio_pages)
    ioend = await pool.get()
    start, end = ioend.pfn << 12, (ioend.pfn + (1 << int(arena.pages.order[ioend.pfn]))) << 12
    at = 0
    for part in (ioend.meta, ioend.folios, ioend.runs):
        offset = part.__array_interface__["data"][0] - arena.mem.__array_interface__["data"][0]
        assert max(start, at) <= offset
        at = offset + part.nbytes
    assert at <= end
    assert folio_pages <= ioend.folios.size <= FOLIOS_MAX
    assert len(ioend.runs) >= folio_pages * 4, "blocks of 1 KiB, were each a run"
    pool.put(ioend)
