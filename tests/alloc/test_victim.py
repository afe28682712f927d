"""Victims: who gives up what, when, and that nobody is one without need."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from alloc.arena import Arena
from alloc.gfp import KERNEL, MEMALLOC, NOWAIT
from alloc.victim import ROUNDS
from alloc.wait import POLL_S

SHED = "out of memory: shed"
REPORT = "possible memory allocation deadlock"


class Pinned:
    """Pieces of memory that are in use and could be done without."""

    def __init__(self, arena: Arena, name: str) -> None:
        self.arena, self.name = arena, name
        self.pieces: list[list[int]] = []
        arena.victims.register(self)

    def take(self, pages: int) -> None:
        flags = NOWAIT | MEMALLOC
        self.pieces.append([self.arena.try_alloc_folio(0, flags) or 0 for _ in range(pages)])

    def count(self) -> int:
        return max(map(len, self.pieces), default=0)

    def shed(self) -> int:
        piece = max(self.pieces, key=len)
        self.pieces.remove(piece)
        for pfn in piece:
            self.arena.put_folio(pfn)
        return len(piece)


@pytest.fixture
def pinned(arena: Arena):
    """Two holders, and nothing else in memory that could be had."""
    made = [Pinned(arena, "one"), Pinned(arena, "other")]
    for holder, sizes in zip(made, [(3, 20), (40, 10)], strict=True):
        for size in sizes:
            holder.take(size)
    rest = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT)) is not None:
        rest.append(pfn)
    yield made
    for holder in made:
        while holder.pieces:
            holder.shed()
    for pfn in rest:
        arena.put_folio(pfn)


async def take(arena: Arena, pages: int) -> None:
    got = [await arena.alloc_folio(0, KERNEL) for _ in range(pages)]
    for pfn in got:
        arena.put_folio(pfn)


async def test_the_largest_piece_goes_first_and_no_more_than_needed(
    arena: Arena, pinned: list[Pinned], autojump_clock: object, allow_logs
) -> None:
    allow_logs(SHED)
    one, other = pinned
    await take(arena, 1)
    assert (one.count(), other.count()) == (20, 10)
    assert trio.current_time() == pytest.approx(ROUNDS * POLL_S, abs=2 * POLL_S)
    assert allow_logs.seen[0].endswith(f"order:0: {SHED} 40 pages of other")
    assert (arena.vmstat["oom_victims"], arena.vmstat["oom_pages"]) == (1, 40)
    await take(arena, 55)
    assert (one.count(), other.count()) == (3, 10)
    assert (arena.vmstat["oom_victims"], arena.vmstat["oom_pages"]) == (2, 60)


async def test_nothing_to_shed_is_said_and_the_wait_goes_on(
    arena: Arena, pinned: list[Pinned], autojump_clock: object, allow_logs
) -> None:
    allow_logs(f"{SHED}|{REPORT}")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, arena, 200)
        await trio.sleep(15)
        assert [holder.count() for holder in pinned] == [0, 0]
        assert arena.vmstat["oom_victims"] == 4
        assert len(arena.queue) == 1
        nursery.cancel_scope.cancel()
    reports = [text for text in allow_logs.seen if REPORT in text]
    assert reports
    assert all("; nothing to shed\n" in text for text in reports)


async def test_a_report_names_what_could_be_shed(
    arena: Arena, pinned: list[Pinned], autojump_clock: object, allow_logs
) -> None:
    allow_logs(REPORT)
    arena.stall_seconds = 1.0
    with trio.move_on_after(1.2):
        await take(arena, 1)
    (text,) = allow_logs.seen
    assert "; can shed one 20, other 40\n" in text


@pytest.mark.parametrize("event", ["kick", "free"])
async def test_nobody_is_a_victim_while_anything_happens(
    arena: Arena, pinned: list[Pinned], event: str, autojump_clock: object, allow_logs
) -> None:
    """An end of an I/O, or pages freed that are too few: not the end of everything."""
    allow_logs(REPORT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(take, arena, 1)
        for _ in range(10):
            await trio.sleep(ROUNDS * POLL_S * 0.6)
            if event == "kick":
                arena.kick()
            else:
                pfn = arena.try_alloc_folio(0, NOWAIT | MEMALLOC)
                arena.put_folio(pfn or 0)
        assert arena.vmstat["oom_victims"] == 0
        nursery.cancel_scope.cancel()
