"""Invariant 14: if what cannot be reclaimed leaves room for it, every waiter is served, and soon.

With unreclaimable pages of at most arena - high - largest request, a request that cannot fail is
served within a bounded number of kswapd's passes, whatever others do meanwhile. The schedules
are seeded: writers that take every page they can and dirty it, an ever-changing load of small
requests, large NOFAIL requests in between, a cleaner that needs memory itself, pinned pages at
the bottom of the arena (where unmovable pages are kept). Passes are counted, not seconds.
"""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import trio

from alloc import gfp
from alloc.arena import Arena
from alloc.gfp import KERNEL, NOFAIL, NOFS, NOWAIT
from alloc.jit import DISABLED
from tests.alloc.caches import FolioCache

ROUNDS_BOUND = 30
LARGE_REQUESTS = 12
SLAB_PAGES = 8  # of the transactions and the cleaner


class Adversary:
    """One seeded schedule on one arena, and how many rounds each large request took."""

    def __init__(self, arena: Arena, seed: int, largest: int) -> None:
        self.arena = arena
        self.random = Random(seed)
        self.cache = FolioCache(arena)
        self.items = arena.slab("items", np.dtype([("page", "u8", (512,))]))
        self.largest = largest
        self.took: list[tuple[int, int]] = []  # rounds, order
        self.clean = trio.Event()
        arena.register_cleaner(lambda: self.clean.set())

    @property
    def rounds(self) -> int:
        """Runs of kswapd so far."""
        return self.arena.vmstat["pageoutrun"]

    def pin(self) -> list[int]:
        """As many pages as the condition allows, from the bottom; the rest is dirty."""
        arena = self.arena
        most = arena.nr_pages - arena.marks.high - (1 << self.largest) - 1 - SLAB_PAGES
        held: list[int] = []
        while (pfn := arena.try_alloc_folio(0, NOWAIT)) is not None:
            held.append(pfn)
        held.sort()
        for pfn in held[most:]:
            self.cache.insert(pfn, dirty=True)
        return held[:most]

    async def writer(self) -> None:
        """As fast as memory comes, as one who need not care for others."""
        while True:
            pfn = await self.arena.alloc_folio(0, KERNEL)
            self.cache.insert(pfn, dirty=self.random.random() < 0.9)
            if self.random.random() < 0.01:
                await trio.sleep(self.random.random() * 0.01)

    async def transactions(self) -> None:
        """Objects of a page, held for a moment, with a right to the reserve."""
        while True:
            item = await self.items.alloc(NOFS | NOFAIL)
            await trio.sleep(self.random.random() * 0.01)
            self.items.free(item)
            await trio.sleep(self.random.random() * 0.01)

    async def cleaner(self) -> None:
        """Takes memory to clean memory, and takes its time."""
        with gfp.memalloc():
            while True:
                await self.clean.wait()
                self.clean = trio.Event()
                scratch = await self.items.alloc(NOFS)
                await trio.sleep(self.random.random() * 0.005)
                self.items.free(scratch)
                self.cache.clean(self.random.choice((32, 64, 200)))

    async def large(self) -> None:
        for _ in range(LARGE_REQUESTS):
            order = self.random.choice((self.largest, self.random.randrange(1, self.largest + 1)))
            before = self.rounds
            pfn = await self.arena.alloc_folio(order, NOFAIL)
            self.took.append((self.rounds - before, order))
            await trio.sleep(self.random.random() * 0.01)
            self.arena.put_folio(pfn)

    async def run(self) -> None:
        async with trio.open_nursery() as background:
            background.start_soon(self.arena.kswapd)
            background.start_soon(self.cleaner)
            for _ in range(self.random.randrange(2, 9)):
                background.start_soon(self.writer)
            for _ in range(self.random.randrange(5)):
                background.start_soon(self.transactions)
            async with trio.open_nursery() as served:
                served.start_soon(self.large)
            background.cancel_scope.cancel()


@pytest.mark.parametrize("largest", [5, 8, pytest.param(10, marks=pytest.mark.compiled)])
@pytest.mark.parametrize("seed", range(1 if DISABLED else 5))
async def test_every_waiter_is_served_in_bounded_rounds(
    seed: int,
    largest: int,
    autojump_clock: object,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    trio._core._run._r.seed(seed)  # which of the runnable tasks comes first
    arena = Arena(8 << 20)
    arena.stall_seconds = 1e6
    adversary = Adversary(arena, seed, largest)
    pinned = adversary.pin()
    with trio.fail_after(300):
        await adversary.run()
    assert len(adversary.took) == LARGE_REQUESTS
    with capsys.disabled():
        print(f"\n  progress: seed {seed}: {max(adversary.took)} rounds, order", end="")
    assert max(adversary.took)[0] <= ROUNDS_BOUND
    adversary.cache.drop()
    for pfn in pinned:
        arena.put_folio(pfn)
    arena.check()
    arena.close()
