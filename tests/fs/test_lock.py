"""Sleeping locks: shared and exclusive, first come first served, no state left behind."""

from __future__ import annotations

import random

import pytest
import trio
import trio.testing

from fs.cache.lock import LockTable


async def test_readers_share_and_writers_exclude() -> None:
    table = LockTable("test")
    assert table.try_acquire(1, True)
    assert table.try_acquire(1, True)
    assert not table.try_acquire(1, False)
    assert table.try_acquire(2, False), "another handle is another lock"
    table.release(1)
    table.release(1)
    assert table.try_acquire(1, False)
    assert not table.try_acquire(1, True)
    table.release(1)
    table.release(2)
    assert not table.held(1)
    assert not table.held(2)


async def test_first_come_first_served() -> None:
    table = LockTable("test")
    order: list[str] = []

    async def take(name: str, shared: bool) -> None:
        async with table.locked(1, shared):
            order.append(name)
            await trio.testing.wait_all_tasks_blocked()

    await table.acquire(1, True)
    async with trio.open_nursery() as nursery:
        for name, shared in (("writer", False), ("reader", True), ("late writer", False)):
            nursery.start_soon(take, name, shared)
            await trio.testing.wait_all_tasks_blocked()
        assert order == [], "a reader does not overtake a waiting writer"
        table.release(1)
    assert order == ["writer", "reader", "late writer"]
    assert table.waiting() == 0
    assert not table.held(1)


async def test_cancelled_waiter_lets_the_next_through() -> None:
    table = LockTable("test")
    await table.acquire(1, True)
    scope = trio.CancelScope()

    async def cancelled() -> None:
        with scope:
            await table.acquire(1, False)

    got = trio.Event()

    async def reader() -> None:
        await table.acquire(1, True)
        got.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancelled)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(reader)
        await trio.testing.wait_all_tasks_blocked()
        assert not got.is_set()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert got.is_set()
    table.release(1)
    table.release(1)
    assert not table.held(1)


@pytest.mark.parametrize("seed", range(5))
async def test_random_schedules_keep_exclusion(seed: int) -> None:
    table, rng = LockTable("test"), random.Random(seed)
    inside = {"readers": 0, "writers": 0}

    async def worker() -> None:
        for _ in range(30):
            shared = rng.random() < 0.6
            kind = "readers" if shared else "writers"
            with trio.move_on_after(0 if rng.random() < 0.1 else 1e9):
                async with table.locked(7, shared):
                    inside[kind] += 1
                    assert inside["writers"] <= 1
                    assert not (inside["writers"] and inside["readers"])
                    try:
                        await trio.lowlevel.checkpoint()
                    finally:
                        inside[kind] -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(worker)
    assert not table.held(7)
