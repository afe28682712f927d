"""Grace periods: what is deferred when, and that no thread ever sees memory that was given back."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import trio

from alloc import atomic, rcu
from alloc.arena import Arena
from alloc.gfp import NOFS, NOWAIT
from alloc.jit import DISABLED, probe
from alloc.rcu import BLIMIT, Rcu, rcu_enter, rcu_exit
from tests.conftest import AllowLogs

OBJECTS = 1024
MEMORY = 64 << 20
STALL = "detected stalls on lanes"
ALIVE = 7


@probe
def enter(words, lane):
    rcu_enter(words, lane)


@probe
def leave(words, lane):
    rcu_exit(words, lane)


@probe
def stay(words, lane, control):
    """One section that lasts until control[0] is set; control[1] says that it began."""
    rcu_enter(words, lane)
    atomic.store_release(control, 1, 1)
    while atomic.load_acquire(control, 0) == 0:
        atomic.sched_yield()
    atomic.store_release(control, 2, 1)
    rcu_exit(words, lane)


@probe
def look(words, lane, current, objects, control):
    """Follow current[0] again and again; how often its object was no longer alive."""
    dead = 0
    while atomic.load_acquire(control, 0) == 0:
        rcu_enter(words, lane)
        i = atomic.load_acquire(current, 0)
        for _ in range(20):
            if atomic.load_acquire(objects, i) != ALIVE:
                dead += 1
        rcu_exit(words, lane)
        atomic.fetch_add(control, 1, 1)
    return dead


class Freed(list[int]):
    """Collects what was freed."""

    def __call__(self, handle: int) -> None:
        self.append(handle)


def test_without_lanes_nothing_waits() -> None:
    grace, freed = Rcu(MEMORY), Freed()
    grace.defer(freed, 5, 64)
    assert freed == [5]
    lane = grace.register()
    grace.defer(freed, 6, 64)
    assert freed == [5, 6], "a lane outside of a section holds nothing back"
    grace.unregister(lane)
    grace.synchronize()
    assert grace.pending == 0


def test_a_section_holds_back_what_was_retired_since_it_began() -> None:
    grace, freed = Rcu(MEMORY), Freed()
    one, two = grace.register(), grace.register()
    enter(grace.words, one)
    grace.defer(freed, 1, 64)
    enter(grace.words, two)
    grace.reap()
    assert freed == []
    grace.defer(freed, 2, 64)
    leave(grace.words, one)
    grace.reap()
    assert freed == [1], "the second section began after 1 was retired and before 2 was"
    enter(grace.words, one)
    leave(grace.words, two)
    grace.reap()
    assert freed == [1, 2]
    leave(grace.words, one)


def test_numbers_are_used_again() -> None:
    grace = Rcu(MEMORY)
    assert [grace.register() for _ in range(3)] == [0, 1, 2]
    grace.unregister(1)
    assert grace.register() == 1
    for lane in (2, 1, 0):
        grace.unregister(lane)
    assert grace.register() == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_sections_against_a_model(seed: int) -> None:
    """The model: an object is held by exactly the sections that were open when it was retired."""
    rng, grace, freed = random.Random(seed), Rcu(MEMORY), Freed()
    grace.blimit = 2000
    lanes = [grace.register() for _ in range(4)]
    held: dict[int, set[int]] = {}
    inside: set[int] = set()
    for step in range(2000):
        lane = rng.choice(lanes)
        if rng.random() < 0.1:
            held[step] = set(inside)
            grace.defer(freed, step, 64)
        elif lane in inside:
            leave(grace.words, lane)
            inside.remove(lane)
            for sections in held.values():
                sections.discard(lane)
        else:
            enter(grace.words, lane)
            inside.add(lane)
        grace.reap()
        due = []
        for handle, sections in held.items():
            if sections:
                break  # the list is in order: what is due waits for what is before it
            due.append(handle)
        assert freed == due
    for lane in inside:
        leave(grace.words, lane)
    grace.synchronize()
    assert freed == list(held)


@contextmanager
def a_section(grace: Rcu, seconds: float) -> Iterator[Any]:
    """A thread in a section for so long; yields its control words."""
    control = np.zeros(8, np.int64)
    lane = grace.register()
    thread = threading.Thread(target=stay, args=(grace.words, lane, control))
    thread.start()
    while not control[1]:
        time.sleep(0.001)
    timer = threading.Timer(seconds, lambda: control.__setitem__(0, 1))
    timer.start()
    try:
        yield control
    finally:
        timer.join()
        thread.join()
        grace.unregister(lane)


@pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")
def test_synchronize_waits_for_a_section_and_so_does_who_defers_too_much() -> None:
    grace, freed = Rcu(MEMORY), Freed()
    too_much = grace.qovld // 64
    for wait in (grace.synchronize, lambda: grace.defer_all(freed, [2] * too_much, 64)):
        with a_section(grace, 0.05) as control:
            grace.defer(freed, 1, 64)
            assert freed == []
            wait()
            assert control[2] == 1, "it came back before the section had ended"
            assert freed.count(1) == 1
            assert (grace.pending, grace.deferred_bytes) == (0, 0)
            freed.clear()


@pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")
def test_an_expedited_grace_period_ends_in_any_case() -> None:
    grace, freed = Rcu(MEMORY), Freed()
    assert grace.expedite() == 0
    with a_section(grace, 0.1) as control:
        grace.defer(freed, 1, 64)
        assert grace.expedite() == 0
        assert control[2] == 0, "it waited for a section that lasts"
        while not control[2]:
            time.sleep(0.001)
        assert grace.expedite() == 1
    assert (freed, grace.expedited) == ([1], 2)


def test_its_shrinker_frees_what_is_due(arena: Arena) -> None:
    freed, rcu = Freed(), arena.rcu
    (state,) = [s for s in arena.reclaim.shrinkers if s.shrinker is rcu]
    lane = rcu.register()
    enter(rcu.words, lane)
    rcu.defer_all(freed, range(50), 64)
    assert rcu.count_objects() == 50
    assert (state.shrink(1, NOFS), state.deferred) == ((0, 0), 50), "SHRINK_STOP: nothing is due"
    leave(rcu.words, lane)
    assert state.shrink(1, NOFS) == (75, 50), "with half of what was deferred"
    assert freed == list(range(50))
    rcu.unregister(lane)


def test_bytes_are_counted_and_batches_follow_them() -> None:
    """10 at a time; all that fits a batch above 1/64 of memory, until 1/6400 is left."""
    grace, freed = Rcu(MEMORY), Freed()
    assert (grace.qhimark, grace.qlowmark, grace.qovld) == (1 << 20, (1 << 20) // 100, 2 << 20)
    lane = grace.register()
    enter(grace.words, lane)
    grace.defer_all(freed, range(100), 64)
    assert grace.deferred_bytes == grace.pending_bytes() == 6400
    assert not grace.reap()
    leave(grace.words, lane)
    assert grace.reap()
    assert freed == list(range(BLIMIT))
    assert grace.deferred_bytes == 64 * 90
    grace.defer(freed, 100, 64)
    assert freed == list(range(2 * BLIMIT)), "deferring frees a batch, too"
    assert sum(iter(grace.reap, False)) == 8
    assert freed == list(range(101))

    enter(grace.words, lane)
    grace.defer_all(freed, range(3000), 128)
    leave(grace.words, lane)
    freed.clear()
    assert grace.reap()
    assert len(freed) == 3000 >> 7, "of many a share"
    grace.synchronize()
    grace.unregister(lane)


def test_much_goes_in_large_batches_until_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 1/64 of memory a batch ends after 3 ms, here at once: when it looks at the clock."""
    monkeypatch.setattr(rcu, "BATCH_NS", -1)
    grace, freed = Rcu(MEMORY), Freed()
    lane = grace.register()
    enter(grace.words, lane)
    grace.defer(freed, 0, grace.qhimark)
    grace.defer_all(freed, range(1, 641), 64)
    leave(grace.words, lane)
    sizes = []
    while grace.pending:
        before = len(freed)
        grace.reap()
        sizes.append(len(freed) - before)
    large = len(range(0, 641 - grace.qlowmark // 64, 32))
    assert sizes == [32] * large + [10] * ((641 - 32 * large) // 10) + [(641 - 32 * large) % 10]
    grace.unregister(lane)


@pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")
def test_a_stalled_grace_period_names_the_reader(allow_logs: AllowLogs) -> None:
    """A flood waits for a section that lasts; when that ends all of it is free."""
    allow_logs(STALL)
    grace, freed = Rcu(MEMORY), Freed()
    grace.stall_seconds = 0.05
    grace.serves = lambda lane: f"lane {lane} in read of inode 131"
    with a_section(grace, 0.3):
        bystander = grace.register()
        assert grace.readers() == [], "nobody waits for a section yet"
        grace.defer(freed, 0, 64)
        assert grace.readers() == ["lane 0 in read of inode 131"]
        for i in range(1, 9):
            grace.defer(freed, i, grace.qovld // 8)
        assert freed == list(range(9))
        grace.unregister(bystander)
    assert grace.stalls == len(allow_logs.seen) >= 2, "after 0.05 s and 0.1 s"
    assert "on lanes: lane 0 in read of inode 131 (t=0.1 s, epoch 1 of " in allow_logs.seen[0]
    assert "(t=0.1 s," in allow_logs.seen[1]


def test_a_reader_that_comes_and_goes_is_no_stall() -> None:
    grace, freed = Rcu(MEMORY), Freed()
    grace.stall_seconds = 0.0
    lanes = [grace.register(), grace.register()]
    for i in range(20):
        enter(grace.words, lanes[i % 2])
        grace.defer(freed, i, 64)
        if i:
            leave(grace.words, lanes[(i + 1) % 2])
        grace.reap()
    leave(grace.words, lanes[1])
    assert grace.stalls == 0
    grace.synchronize()
    assert freed == list(range(20))


async def test_what_is_due_is_freed_in_the_background() -> None:
    """Without anything else going on; all of it, and quickly when memory is short."""
    grace, freed, short = Rcu(MEMORY), Freed(), [False]
    lane = grace.register()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(grace.reaper, lambda: short[0])
        for count in (1, 500):
            enter(grace.words, lane)
            grace.defer_all(freed, range(count), 64)
            await trio.sleep(0.03)
            assert freed == []
            leave(grace.words, lane)
            with trio.fail_after(5):
                while grace.pending:
                    await trio.sleep(0.001)
            assert freed == list(range(count))
            freed.clear()
            short[0] = True
        nursery.cancel_scope.cancel()
    assert grace.expedited > 1
    grace.unregister(lane)


async def test_deferred_memory_is_not_free_and_reports_say_so(
    arena: Arena, autojump_clock: object, allow_logs: AllowLogs
) -> None:
    allow_logs("possible memory allocation deadlock")
    taken = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT)) is not None:
        taken.append(pfn)
    lane = arena.rcu.register()
    enter(arena.rcu.words, lane)
    arena.rcu.defer_all(arena.put_folio, taken[:3], 4096)
    del taken[:3]
    arena.check()
    assert arena.meminfo()["RcuDeferred"] == 12
    assert arena.vmstat["rcu_deferred_bytes"] == 3 * 4096
    with trio.move_on_after(3):
        taken.append(await arena.alloc_folio(0))
    assert "\n  rcu: 12288 bytes wait for a grace period: lane 0\n" in allow_logs.seen[0]
    arena.rcu.deferred_bytes += 1
    with pytest.raises(AssertionError, match="bytes that wait"):
        arena.check()
    arena.rcu.deferred_bytes -= 1
    leave(arena.rcu.words, lane)
    arena.rcu.unregister(lane)
    assert arena.meminfo()["RcuDeferred"] == 0
    for pfn in taken:
        arena.put_folio(pfn)


async def test_who_waits_for_memory_waits_for_a_grace_period(arena: Arena) -> None:
    taken = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT)) is not None:
        taken.append(pfn)
    lane = arena.rcu.register()
    enter(arena.rcu.words, lane)
    arena.rcu.defer(arena.put_folio, taken.pop(), 4096)
    assert arena.try_alloc_folio(0, NOWAIT) is None, "a section may still look at it"
    leave(arena.rcu.words, lane)
    with trio.fail_after(5):
        taken.append(await arena.alloc_folio(0))
    arena.rcu.unregister(lane)
    for pfn in taken:
        arena.put_folio(pfn)


def count_dead(grace: Rcu, seconds: float, *, careless: bool = False) -> tuple[int, int]:
    """Threads follow a pointer that is moved on all the time; (dead objects seen, looks)."""
    objects = np.full(OBJECTS, ALIVE, np.int64)
    current, control = np.zeros(8, np.int64), np.zeros(8, np.int64)
    free = list(range(1, OBJECTS))
    dead: list[int] = []

    def kill(i: int) -> None:
        objects[i] = 0
        free.append(i)

    def lane(number: int) -> None:
        dead.append(look(grace.words, number, current, objects, control))

    lanes = [grace.register() for _ in range(3)]
    threads = [threading.Thread(target=lane, args=(number,), daemon=True) for number in lanes]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        new, old = free.pop(0), int(current[0])
        objects[new] = ALIVE
        current[0] = new
        if careless:
            kill(old)
        else:
            grace.defer(kill, old, grace.qovld // (OBJECTS // 2))
    control[0] = 1
    for thread in threads:
        thread.join()
    for number in lanes:
        grace.unregister(number)
    return sum(dead), int(control[1])


@pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")
def test_threads_never_see_what_was_freed() -> None:
    look(np.zeros(rcu.RCU_WORDS, np.int64), 0, *np.ones((3, 8), np.int64))  # compile
    grace = Rcu(MEMORY)
    dead, looks = count_dead(grace, 1.0)
    assert looks > 1000
    assert dead == 0
    assert grace.pending == 0
    assert count_dead(Rcu(MEMORY), 1.0, careless=True)[0] > 0, "the test would not notice"
