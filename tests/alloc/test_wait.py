"""The line of waiters: order by age and class, rights, and how long a large request is passed."""

from __future__ import annotations

from collections import defaultdict
from random import Random

import pytest
import trio
import trio.testing

from alloc.arena import Arena
from alloc.buddy import RIGHTS_ALL, RIGHTS_HALF, RIGHTS_MIN
from alloc.gfp import KERNEL, NOWAIT
from alloc.wait import PASSES_MAX, Key, Ticket, WaitQueue


class Shop:
    """A queue whose requests are served from a number of pages; the order of service."""

    def __init__(self) -> None:
        self.pages = 0
        self.served: list[str] = []
        self.lengths: list[int] = []
        self.queue = WaitQueue(self.lengths.append)

    def join(self, name: str, pages: int, rights: int = RIGHTS_MIN) -> Ticket:
        def attempt(_: int) -> int:
            if self.pages < pages:
                return 0
            self.pages -= pages
            self.served.append(name)
            return pages

        ticket = Ticket(name, KERNEL, "here", Key("folio", pages, rights), attempt)
        self.queue.join(ticket)
        return ticket


async def test_the_oldest_that_fits_is_served() -> None:
    shop = Shop()
    for name, pages in (("a", 2), ("b", 1), ("c", 2), ("d", 1), ("e", 3)):
        shop.join(name, pages)
    shop.pages = 1
    assert shop.queue.serve() == 1
    assert shop.served == ["b"]
    shop.pages = 4
    assert shop.queue.serve() == 2
    assert shop.served == ["b", "a", "c"]
    assert [ticket.what for ticket in shop.queue.tickets()] == ["d", "e"]
    assert shop.lengths == [1, 2, 3, 4, 5, 4, 3, 2]
    for ticket in shop.queue.tickets():
        shop.queue.leave(ticket)
    assert len(shop.queue) == 0


async def test_one_of_a_class_fails_for_all() -> None:
    """A turn of the line costs one attempt for each class, however many wait."""
    tries: dict[int, int] = defaultdict(int)
    queue = WaitQueue(lambda _: None)

    def attempt(rights: int) -> int:
        tries[rights] += 1
        return 0

    for k in range(1000):
        queue.join(Ticket("x", KERNEL, "here", Key("folio", 0, k % 3), attempt))
    queue.serve()
    assert tries == {0: 1, 1: 1, 2: 1}


async def test_a_promoted_ticket_keeps_its_age() -> None:
    shop = Shop()
    young = shop.join("young", 1, RIGHTS_MIN)
    shop.join("half", 1, RIGHTS_HALF)
    younger = shop.join("younger", 1, RIGHTS_MIN)
    shop.queue.promote(younger, RIGHTS_HALF)
    shop.queue.promote(young, RIGHTS_HALF)
    assert young.key.rights == RIGHTS_HALF
    shop.pages = 3
    shop.queue.serve()
    assert shop.served == ["young", "half", "younger"]


def small_ones(shop: Shop, number: int) -> int:
    """So many small requests with a page each; how many were served."""
    before = len(shop.served)
    for _ in range(number):
        shop.join("small", 1)
        shop.pages += 1
        shop.queue.serve()
    return len(shop.served) - before


async def test_a_large_request_is_passed_so_often() -> None:
    shop = Shop()
    large = shop.join("large", 1000)
    assert small_ones(shop, 100) == PASSES_MAX
    assert large.holding
    shop.join("transaction", 1, RIGHTS_HALF)
    shop.join("cleaner", 1, RIGHTS_ALL)
    shop.queue.serve()
    assert shop.served[-2:] == ["transaction", "cleaner"], "rights to the reserve pass"
    shop.queue.let_pass(large)
    shop.queue.serve()
    assert shop.served.count("small") == PASSES_MAX + PASSES_MAX // 2
    for _ in range(10):
        shop.queue.let_pass(large)
    before = len(shop.served)
    shop.queue.serve()
    assert len(shop.served) == before + 1, "in the end one at a time"
    shop.pages = 1000
    shop.queue.serve()
    assert large.value == 1000
    assert "large" in shop.served
    shop.pages = 100
    shop.queue.serve()
    assert len(shop.queue) == 0


@pytest.mark.parametrize("seed", range(20))
async def test_against_a_naive_queue(seed: int) -> None:
    """A list of all tickets, walked from the oldest; holding from the naive rule."""
    random = Random(seed)
    shop = Shop()
    naive: list[list[int]] = []  # [number, pages, passed]
    number = 0
    for _ in range(300):
        if random.random() < 0.6:
            number += 1
            pages = random.choice((1, 1, 1, 2, 8))
            shop.join(str(number), pages)
            naive.append([number, pages, 0])
        shop.pages += random.randrange(3)
        free, expected, failed = shop.pages, [], []
        for entry in list(naive):
            if any(older[2] >= PASSES_MAX for older in failed):
                break
            if entry[1] > free or any(entry[1] == older[1] for older in failed):
                failed.append(entry)
                continue
            free -= entry[1]
            expected.append(str(entry[0]))
            naive.remove(entry)
            heads = {older[1]: older for older in reversed(failed)}
            for older in heads.values():
                older[2] += 1
        before = len(shop.served)
        shop.queue.serve()
        assert shop.served[before:] == expected
        assert shop.pages == free


async def test_small_ones_get_on_beside_one_that_nobody_can_serve(
    arena: Arena, autojump_clock: object
) -> None:
    """Pinned pages all over: no block of 128 can be made. It holds, but not for ever."""
    pinned = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT)) is not None:
        pinned.append(pfn)
    for pfn in sorted(pinned)[::2]:
        pinned.remove(pfn)
        arena.put_folio(pfn)
    arena.stall_seconds = 1e6
    done = 0

    async def small() -> None:
        nonlocal done
        for _ in range(20):
            pfn = await arena.alloc_folio(0)
            await trio.sleep(0.01)
            arena.put_folio(pfn)
            done += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.alloc_folio, 7)
        await trio.testing.wait_all_tasks_blocked()
        with trio.fail_after(30):
            async with trio.open_nursery() as others:
                for _ in range(5):
                    others.start_soon(small)
        assert done == 100
        nursery.cancel_scope.cancel()
    for pfn in pinned:
        arena.put_folio(pfn)
