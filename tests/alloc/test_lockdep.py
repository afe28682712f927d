"""The lock-order validator by itself: which orders it takes, which it reports, and how.

Random orders are compared with a naive twin, which searches the graph anew for each edge.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import trio
import trio.testing

from alloc import gfp, lockdep
from alloc.arena import Arena
from alloc.lockdep import FS_RECLAIM, Lockdep
from tests.alloc.conftest import SMALL_BYTES
from tests.conftest import AllowLogs


@pytest.fixture
def dep(allow_logs: AllowLogs) -> Iterator[Lockdep]:
    """A validator with nothing learned, whose reports do not fail the test."""
    allow_logs("possible (circular|recursive) locking")
    validator = Lockdep()
    with lockdep.using(validator):
        yield validator
    validator.forget_tasks()


@contextmanager
def held(dep: Lockdep, *names: str) -> Iterator[None]:
    """Take locks one inside the other, as a task that may wait for each."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(dep.holding(name))
        yield


def take_a_then_b(dep: Lockdep) -> None:
    with held(dep, "a", "b"):
        pass


def take_b_then_a(dep: Lockdep) -> None:
    with held(dep, "b", "a"):
        pass


async def test_an_inversion_is_reported_once_with_both_stacks(dep: Lockdep) -> None:
    take_a_then_b(dep)
    take_a_then_b(dep)
    assert dep.reports == []
    dep.context = "the second context"
    take_b_then_a(dep)
    (report,) = dep.reports
    new, _, old = report.partition("against the order seen before")
    assert "b, then a" in new
    assert "take_b_then_a" in new
    assert "the second context" in new
    assert "a, then b" in old
    assert "take_a_then_b" in old
    assert "test_an_inversion_is_reported_once" in old, "the task is named"
    take_b_then_a(dep)
    assert len(dep.reports) == 1
    assert ("b", "a") not in dep.orders(), "what is wrong is not learned"


async def test_a_circle_of_three_names_all_its_orders(dep: Lockdep) -> None:
    for names in (("a", "b"), ("b", "c")):
        with held(dep, *names):
            pass
    with held(dep, "c", "a"):
        pass
    (report,) = dep.reports
    assert report.count(" -> ") == 3
    for order in ("c, then a", "a, then b", "b, then c"):
        assert order in report


async def test_trying_draws_no_edge_but_holds(dep: Lockdep) -> None:
    take_a_then_b(dep)
    with held(dep, "b"):
        dep.took("a")
        assert dep.reports == []
        dep.wants("c")
        dep.dropped("a")
    assert sorted(dep.orders()) == [("a", "b"), ("a", "c"), ("b", "c")]


async def test_ranks_rise_within_a_class(dep: Lockdep) -> None:
    for key, ino in ((10, 131), (7, 140)):  # the handle says nothing
        dep.wants("ilock", key, ino)
        dep.took("ilock", key, ino)
    assert dep.reports == []
    assert dep.held_by(trio.lowlevel.current_task()) == ["ilock of 131", "ilock of 140"]
    dep.wants("ilock", 3, 135)
    (report,) = dep.reports
    assert "ilock of 140 is held and ilock of 135 is wanted" in report
    dep.dropped("ilock", 7)
    dep.dropped("ilock", 10)
    assert dep.held_by(trio.lowlevel.current_task()) == []


async def test_waiting_twice_for_one_lock_is_reported(dep: Lockdep) -> None:
    with held(dep, "a"):
        dep.wants("a")
    assert "recursive" in dep.reports[0]


async def test_tasks_hold_for_themselves(dep: Lockdep) -> None:
    seen = trio.Event()

    async def other() -> None:
        with held(dep, "b"):
            await seen.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        with held(dep, "a"):
            await trio.testing.wait_all_tasks_blocked()
            tasks = {task.name: dep.held_by(task) for task in nursery.child_tasks}
            assert list(tasks.values()) == [["b"]]
            assert lockdep.held_by(trio.lowlevel.current_task()) == ["a"]
            seen.set()
    assert dep.orders() == []


async def test_a_lock_may_be_dropped_for_its_holder(dep: Lockdep) -> None:
    dep.took("a")
    async with trio.open_nursery() as nursery:

        async def drop() -> None:
            dep.dropped("a")
            dep.dropped("never told of")

        nursery.start_soon(drop)
    assert dep.held_by(trio.lowlevel.current_task()) == []


async def test_off_means_nothing_is_learned() -> None:
    with lockdep.using(None), lockdep.holding("a"):
        assert lockdep.held_by(trio.lowlevel.current_task()) == []


async def test_memory_is_a_lock_unless_reclaim_stays_out(dep: Lockdep) -> None:
    arena = Arena(SMALL_BYTES)
    slab = arena.slab("test", "u8,u8,u8,u8")
    with held(dep, "ilock"):
        with gfp.nofs():
            arena.put_folio(await arena.alloc_folio(0))
        with gfp.memalloc():
            slab.free(await slab.alloc())
        assert dep.orders() == []
        slab.free(await slab.alloc())
    assert dep.orders() == [("ilock", FS_RECLAIM)]
    with held(dep, FS_RECLAIM):
        dep.wants("ilock")
    (report,) = dep.reports
    assert "arena.py" in report, "the allocation's stack"
    arena.close()


@pytest.mark.parametrize("where", ["folio", "slab"])
async def test_a_dropped_scope_is_caught_without_pressure(dep: Lockdep, where: str) -> None:
    arena = Arena(SMALL_BYTES)
    with held(dep, FS_RECLAIM, "ilock"):  # a cleaner
        pass
    with held(dep, "ilock"):
        if where == "folio":
            arena.put_folio(await arena.alloc_folio(0))
        else:
            slab = arena.slab("test", "u8,u8,u8,u8")
            slab.free(await slab.alloc())
    assert len(dep.reports) == 1
    assert arena.vmstat["alloc_waits"] == 0
    arena.close()


async def test_cleaning_that_needs_cleaning_is_caught(dep: Lockdep) -> None:
    arena = Arena(SMALL_BYTES)
    with held(dep, FS_RECLAIM):
        with gfp.memalloc():
            arena.put_folio(await arena.alloc_folio(0))
        assert dep.reports == []
        arena.put_folio(await arena.alloc_folio(0))
    (report,) = dep.reports
    assert "fs_reclaim is held and fs_reclaim is wanted" in report
    assert "alloc_folio" in report
    arena.close()


class Locking:
    """A shrinker that waits for a lock, which none may."""

    name = "locking"

    def __init__(self, dep: Lockdep) -> None:
        self.dep = dep

    def count_objects(self) -> int:
        return 200

    def scan_objects(self, nr: int, gfp_flags: int) -> int:
        self.dep.wants("ilock")
        return 0


@pytest.mark.parametrize(("flags", "found"), [(gfp.KERNEL, 1), (gfp.NOFS, 0), (gfp.NOIO, 0)])
async def test_shrinkers_run_under_reclaim(dep: Lockdep, flags: int, found: int) -> None:
    arena = Arena(SMALL_BYTES)
    arena.register_shrinker(Locking(dep))
    with held(dep, "ilock"):
        dep.allocates(gfp.KERNEL)
    arena.reclaim.shrink_all(0, flags, "direct", 1)
    assert len(dep.reports) == found
    assert dep.held_by(trio.lowlevel.current_task()) == []
    arena.close()


def test_declared_orders_hold_at_first_sight(dep: Lockdep) -> None:
    dep.declare("a", "b", "c")
    dep.declare("a", "b", "c")
    assert dep.orders() == [], "nobody was seen"
    dep.took("c")
    dep.wants("a")
    assert "by declaration" in dep.reports[0]


def test_an_order_that_was_seen_replaces_its_declaration(dep: Lockdep) -> None:
    dep.declare("a", "b")
    take_a_then_b(dep)
    dep.declare("a", "b")
    take_b_then_a(dep)
    assert "by declaration" not in dep.reports[0]
    assert "take_a_then_b" in dep.reports[0]


def reaches(edges: set[tuple[str, str]], start: str, end: str) -> bool:
    """The naive twin of the search: everything that can be reached, by brute force."""
    found = {start}
    while more := {after for before, after in edges if before in found} - found:
        found |= more
    return end in found


@pytest.mark.parametrize("seed", range(20))
def test_random_orders_agree_with_brute_force(dep: Lockdep, seed: int) -> None:
    rng = random.Random(seed)
    names = "abcdefgh"
    edges: set[tuple[str, str]] = set()
    wrong: set[tuple[str, str]] = set()
    for _ in range(60):
        before, after = rng.sample(names, 2)
        with held(dep, before):
            dep.wants(after)
        if (before, after) not in edges | wrong:
            (wrong if reaches(edges, after, before) else edges).add((before, after))
        assert set(dep.orders()) == edges
        assert len(dep.reports) == len(wrong)
    assert wrong
