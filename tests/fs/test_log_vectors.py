"""Memory of log vectors: each its own, wherever there is memory, and all of it given back."""

from __future__ import annotations

import random

import numpy as np
import pytest
import trio
import trio.testing

from alloc.arena import Arena
from alloc.gfp import MEMALLOC, NOWAIT
from fs.log import formats
from fs.log.vectors import CLASSES, Vectors

PAGE = 4096
LARGEST = formats.whole_bytes(65536)
SIZES = (28, 32, 33, *CLASSES, 2049, PAGE, PAGE + 1, 3 * PAGE, 32768, 65536, LARGEST)


def take_all(arena: Arena) -> list[int]:
    """Every page, the reserve's as well."""
    taken = []
    while (pfn := arena.try_alloc_folio(0, NOWAIT | MEMALLOC)) is not None:
        taken.append(pfn)
    return taken


@pytest.fixture
def arena():
    made = Arena(8 << 20)
    yield made
    made.check()
    made.close()


async def test_each_its_own(arena: Arena) -> None:
    """Random lives: nobody's bytes change but the owner's, and none remain."""
    rng, vectors = random.Random(4), Vectors(arena)
    live: list[tuple[int, int, int]] = []
    for n in range(3000):
        if live and (len(live) > 40 or rng.random() < 0.4):
            address, size, mark = live.pop(rng.randrange(len(live)))
            assert (arena.mem[address : address + size] == mark).all()
            vectors.free(address, size)
            continue
        size, mark = rng.choice(SIZES), n % 251
        found = vectors.try_now(size) if n % 3 else None
        address = await vectors.alloc(size) if found is None else found
        arena.mem[address : address + size] = mark
        live.append((address, size, mark))
        assert sum(size for _, size, _ in live) <= vectors.nbytes
        assert arena.vmstat["log_vector_bytes"] == vectors.nbytes
    assert vectors.nbytes > 0
    for address, size, _ in live:
        vectors.free(address, size)
    assert vectors.nbytes == arena.vmalloc.nr_pages == 0
    assert all(cache.nr_objects == 0 for cache in arena.slab_caches)


async def test_the_size_class_is_the_next_one(arena: Arena) -> None:
    vectors = Vectors(arena)
    for size in SIZES:
        address = await vectors.alloc(size)
        assert vectors.nbytes == max(32, 1 << (size - 1).bit_length())
        vectors.free(address, size)
        assert vectors.nbytes == 0


async def test_single_pages_are_enough(arena: Arena) -> None:
    """Where no two pages lie side by side: a vector is pages in a row, exactly so many."""
    vectors = Vectors(arena)
    held = take_all(arena)
    for pfn in held:
        if pfn % 2:
            arena.put_folio(pfn)
    held = [pfn for pfn in held if pfn % 2 == 0]
    free = arena.free_pages
    for size in (PAGE + 1, 3 * PAGE, 65536, LARGEST):
        pages = -(-size // PAGE)
        assert vectors.try_now(size) is None
        address = await vectors.alloc(size)
        assert (vectors.nbytes, free - arena.free_pages) == (pages * PAGE, pages)
        arena.mem[address : address + size] = np.arange(size) % 251
        assert (arena.mem[address : address + size] == np.arange(size) % 251).all()
        vectors.free(address, size)
        assert (vectors.nbytes, arena.free_pages) == (0, free)
    assert arena.vmstat["log_vector_fallback"] == 4
    for pfn in held:
        arena.put_folio(pfn)


@pytest.mark.parametrize("size", [100, PAGE, LARGEST])
async def test_who_must_waits(
    arena: Arena, size: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Without memory: those who may not wait are told, the others have it once there is some."""
    vectors = Vectors(arena)
    held, got = take_all(arena), []

    async def ask() -> None:
        got.append(await vectors.alloc(size))

    async with trio.open_nursery() as nursery:
        assert vectors.try_now(size) is None
        nursery.start_soon(ask)
        await trio.sleep(1)
        assert (got, vectors.nbytes) == ([], 0)
        for _ in range(400):
            arena.put_folio(held.pop())
    vectors.free(got[0], size)
    for pfn in held:
        arena.put_folio(pfn)
