"""Grace periods: what is deferred when, and that no thread ever sees memory that was given back."""

from __future__ import annotations

import random
import threading
import time

import numpy as np
import pytest
import trio

from alloc import atomic, rcu
from alloc.arena import Arena
from alloc.gfp import NOWAIT
from alloc.jit import DISABLED, probe
from alloc.rcu import PENDING_MAX, Rcu, rcu_enter, rcu_exit

OBJECTS = 1024
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
    grace, freed = Rcu(), Freed()
    grace.defer(freed, 5)
    assert freed == [5]
    lane = grace.register()
    grace.defer(freed, 6)
    assert freed == [5, 6], "a lane outside of a section holds nothing back"
    grace.unregister(lane)
    grace.synchronize()
    assert grace.pending == 0


def test_a_section_holds_back_what_was_retired_since_it_began() -> None:
    grace, freed = Rcu(), Freed()
    one, two = grace.register(), grace.register()
    enter(grace.words, one)
    grace.defer(freed, 1)
    enter(grace.words, two)
    grace.reap()
    assert freed == []
    grace.defer(freed, 2)
    leave(grace.words, one)
    grace.reap()
    assert freed == [1], "the second section began after 1 was retired and before 2 was"
    enter(grace.words, one)
    leave(grace.words, two)
    grace.reap()
    assert freed == [1, 2]
    leave(grace.words, one)


def test_numbers_are_used_again() -> None:
    grace = Rcu()
    assert [grace.register() for _ in range(3)] == [0, 1, 2]
    grace.unregister(1)
    assert grace.register() == 1
    for lane in (2, 1, 0):
        grace.unregister(lane)
    assert grace.register() == 0


@pytest.mark.parametrize("seed", range(4))
def test_random_sections_against_a_model(seed: int) -> None:
    """The model: an object is held by exactly the sections that were open when it was retired."""
    rng, grace, freed = random.Random(seed), Rcu(), Freed()
    lanes = [grace.register() for _ in range(4)]
    held: dict[int, set[int]] = {}
    inside: set[int] = set()
    for step in range(2000):
        lane = rng.choice(lanes)
        if rng.random() < 0.1:
            held[step] = set(inside)
            grace.defer(freed, step)
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


@pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")
def test_synchronize_waits_for_a_section_and_so_does_a_long_list() -> None:
    grace, freed = Rcu(), Freed()
    for wait in (grace.synchronize, lambda: [grace.defer(freed, 2) for _ in range(PENDING_MAX)]):
        control = np.zeros(8, np.int64)
        lane = grace.register()
        thread = threading.Thread(target=stay, args=(grace.words, lane, control))
        thread.start()
        while not control[1]:
            time.sleep(0.001)
        grace.defer(freed, 1)
        assert freed == []
        threading.Timer(0.05, lambda c=control: c.__setitem__(0, 1)).start()
        wait()
        assert control[2] == 1, "it came back before the section had ended"
        assert freed.count(1) == 1
        assert grace.pending == 0
        freed.clear()
        thread.join()
        grace.unregister(lane)


async def test_who_waits_for_memory_waits_for_a_grace_period(arena: Arena) -> None:
    taken = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT)) is not None:
        taken.append(pfn)
    lane = arena.rcu.register()
    enter(arena.rcu.words, lane)
    arena.rcu.defer(arena.put_folio, taken.pop())
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
    threads = [threading.Thread(target=lane, args=(number,)) for number in lanes]
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
            grace.defer(kill, old)
    control[0] = 1
    for thread in threads:
        thread.join()
    for number in lanes:
        grace.unregister(number)
    return sum(dead), int(control[1])


@pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")
def test_threads_never_see_what_was_freed() -> None:
    look(np.zeros(rcu.RCU_WORDS, np.int64), 0, *np.ones((3, 8), np.int64))  # compile
    grace = Rcu()
    dead, looks = count_dead(grace, 1.0)
    assert looks > 1000
    assert dead == 0
    assert grace.pending == 0
    assert count_dead(Rcu(), 1.0, careless=True)[0] > 0, "the test would not notice"
