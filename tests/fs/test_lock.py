"""Sleeping locks: shared and exclusive, first come first served, no state left behind.

The words against a model, and lanes on threads that try the same locks as tasks that wait.
"""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest
import trio
import trio.testing

from alloc import atomic
from alloc.jit import DISABLED, probe
from fs.cache import lock
from fs.cache.lock import EXCLUSIVE, WAITED, LockTable, try_lock, unlock

STRIDE, OFFSET = 16, 3


@probe
def lane_unlock(words, i, shared):
    return unlock(words, i, shared)


@probe
def contend(words, i, guarded, control, seed):
    """A lane: take the lock either way by try, look for company, ring when told to."""
    state = np.uint64(seed)
    wrong = 0
    while atomic.load_acquire(control, 0) == 0:
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        shared = np.int64(state >> np.uint64(40)) % 3 != 0
        if not try_lock(words, i, shared):
            atomic.sched_yield()
            continue
        if shared:
            atomic.fetch_add(guarded, 1, 1)
            wrong += atomic.load_acquire(guarded, 0) != 0
            atomic.fetch_add(guarded, 1, -1)
        else:
            wrong += atomic.fetch_add(guarded, 0, 1) != 0
            wrong += atomic.load_acquire(guarded, 1) != 0
            atomic.fetch_add(guarded, 0, -1)
        atomic.fetch_add(control, 2, 1)
        if unlock(words, i, shared):
            atomic.store_release(control, 1, 1)
    return wrong


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


class Word:
    """The model of a lock's word: holders (-1 for an exclusive one) and whether somebody waits."""

    def __init__(self) -> None:
        self.holders, self.waited = 0, False

    def can(self, shared: bool) -> bool:
        return self.holders >= 0 if shared else self.holders == 0

    def take(self, shared: bool) -> None:
        self.holders = self.holders + 1 if shared else -1

    def give(self) -> None:
        self.holders = max(self.holders - 1, 0)

    @property
    def value(self) -> int:
        held = EXCLUSIVE if self.holders < 0 else self.holders
        return held | (WAITED if self.waited else 0)


@pytest.mark.parametrize("seed", range(4))
def test_words_against_their_model(seed: int) -> None:
    rng, words, model = random.Random(seed), np.zeros(8, np.uint32), Word()
    seen = set()
    for _ in range(3000):
        act, shared, more = rng.randrange(5), rng.random() < 0.7, rng.random() < 0.5
        if act == 0:
            can = model.can(shared) and not model.waited
            assert lock.acquire_word(words, 5, shared) == can
            if can:
                model.take(shared)
        elif act == 1:
            can = model.can(shared)
            assert lock.grant_word(words, 5, shared, more) == can
            model.waited = more or not can
            if can:
                model.take(shared)
        elif act == 2 and model.holders:
            kind = model.holders > 0
            model.give()
            assert lane_unlock(words, 5, kind) == (model.value == WAITED)
        elif act == 3:
            free = model.holders == 0
            model.give()
            assert lock.release_word(words, 5) == (-1 if free else model.value)
        elif act == 4:
            lock.clear_waited(words, 5)
            model.waited = False
        assert words[5] == model.value
        seen.add(model.value)
    assert {0, 1, 2, EXCLUSIVE, WAITED, WAITED | 1, WAITED | EXCLUSIVE} <= seen
    assert words.sum() == words[5]


async def test_the_word_of_a_record_is_the_lock() -> None:
    words = np.zeros(STRIDE * 4, np.uint32)
    table = LockTable("test", words, STRIDE, OFFSET)
    await table.acquire(2, True)
    assert table.try_acquire(2, True), "waiting for it twice could be for ever"
    await table.acquire(3, False)
    assert {int(i): int(words[i]) for i in np.flatnonzero(words)} == {
        2 * STRIDE + OFFSET: 2,
        3 * STRIDE + OFFSET: EXCLUSIVE,
    }
    for handle in (2, 2, 3):
        table.release(handle)
    assert not words.any()
    with pytest.raises(AssertionError, match="not held"):
        table.release(3)


async def test_a_task_takes_over_the_lock_of_a_lane() -> None:
    words = np.zeros(64, np.uint32)
    table = LockTable("test", words)
    assert lock.acquire_word(words, 9, False)  # a lane, which parks its request with the lock
    assert table.held(9)
    order: list[str] = []

    async def take(shared: bool) -> None:
        async with table.locked(9, shared):
            order.append("shared" if shared else "exclusive")
            await trio.testing.wait_all_tasks_blocked()

    async with trio.open_nursery() as nursery:
        for shared in (True, True, False):
            nursery.start_soon(take, shared)
            await trio.testing.wait_all_tasks_blocked()
        assert table.waiting() == 3
        assert not lock.acquire_word(words, 9, True), "lanes stand back while tasks wait"
        table.release(9)
    assert order == ["shared", "shared", "exclusive"]
    assert not words.any()


async def test_a_lane_that_releases_last_has_to_ring() -> None:
    words = np.zeros(64, np.uint32)
    table = LockTable("test", words)
    assert lock.acquire_word(words, 9, True)
    assert lock.acquire_word(words, 9, True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(table.acquire, 9, False)
        await trio.testing.wait_all_tasks_blocked()
        assert not lane_unlock(words, 9, True), "another lane still holds it"
        table.grant_all()
        assert table.waiting() == 1
        assert lane_unlock(words, 9, True)
        assert not lock.acquire_word(words, 9, True), "not even before the bell is heard"
        table.grant_all()
    assert words[9] == EXCLUSIVE
    table.release(9)
    table.grant_all()
    assert not words.any()


async def test_leaving_the_line_lets_lanes_try_again() -> None:
    words = np.zeros(64, np.uint32)
    table = LockTable("test", words)
    assert lock.acquire_word(words, 9, True)
    with trio.move_on_after(0.01):
        await table.acquire(9, False)
    assert table.waiting() == 0
    assert lock.acquire_word(words, 9, True)
    assert words[9] == 2


@pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")
async def test_lanes_and_tasks_exclude_each_other_and_nobody_is_forgotten() -> None:
    words, guarded = np.zeros(64, np.uint32), np.zeros(8, np.int64)
    control = np.zeros(8, np.int64)  # stop, bell, sections of lanes
    control[0] = 1
    contend(words, 7, guarded, control, 1)  # compile
    control[0] = 0
    table, rng = LockTable("test", words), random.Random(1)
    wrong: list[int] = []
    threads = [
        threading.Thread(
            target=lambda seed=seed: wrong.append(contend(words, 7, guarded, control, seed))
        )
        for seed in (2, 3)
    ]
    waited = 0

    async def bell() -> None:
        while True:
            if control[1]:
                control[1] = 0
                table.grant_all()
            await trio.sleep(0)

    async def task() -> None:
        nonlocal waited
        for _ in range(300):
            shared = rng.random() < 0.5
            waited += table.held(7)
            async with table.locked(7, shared):
                if shared:
                    assert not guarded[0]
                    await trio.lowlevel.checkpoint()
                    assert not guarded[0]
                else:
                    assert not guarded[:2].any()
                    guarded[0] = 1
                    await trio.lowlevel.checkpoint()
                    assert guarded[:2].tolist() == [1, 0]
                    guarded[0] = 0

    for thread in threads:
        thread.start()
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(bell)
                async with trio.open_nursery() as tasks:
                    for _ in range(4):
                        tasks.start_soon(task)
                nursery.cancel_scope.cancel()
    finally:
        control[0] = 1
        for thread in threads:
            thread.join()
    assert wrong == [0, 0]
    assert control[2] > 100
    assert waited > 100
    assert not words.any()
