"""The pool of I/O completions: never more than there are, first come first served."""

from __future__ import annotations

import trio
import trio.testing

from writeback.ioend import IoendPool


async def test_waits_for_an_earlier_one() -> None:
    pool = IoendPool(2)
    first, second = await pool.get(), await pool.get()
    assert pool.in_use == 2
    order: list[int] = []

    async def taker(number: int) -> None:
        pool.put(await pool.get())
        order.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(2):
            nursery.start_soon(taker, number)
            await trio.testing.wait_all_tasks_blocked()
        assert order == []
        pool.put(first)
    assert order == [0, 1]
    assert pool.waits == 2
    pool.put(second)
    assert pool.in_use == 0


async def test_comes_back_clean() -> None:
    pool = IoendPool(1)
    ioend = await pool.get()
    ioend.handle, ioend.error = 7, 5
    ioend.meta[:] = (1, 1, 1, 9, 77)
    ioend.runs[0] = (3, 4)
    assert ioend.ranges() == [(3, 4)]
    assert (ioend.next_index, ioend.size) == (9, 77)
    pool.put(ioend)
    again = await pool.get()
    assert (again.handle, again.error, again.nr_folios, again.ranges()) == (0, 0, 0, [])
