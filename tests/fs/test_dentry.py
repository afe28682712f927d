"""The dentry cache against a dict, and what reclaim and generations do to it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from alloc.arena import Arena
from alloc.jit import probe
from fs.cache import dentry
from fs.cache.dentry import DentryCache
from fs.cache.thread import bucket_of


@pytest.fixture
async def cache() -> AsyncIterator[DentryCache]:
    arena = Arena(8 << 20)
    names = DentryCache(arena)
    await names.start()
    yield names
    arena.close()


@probe
def bucket(buckets, key):
    return bucket_of(buckets, key)


def directory(ino: int, gen: int = 1) -> Any:
    return SimpleNamespace(ino=ino, gen=gen)


def check_lists(cache: DentryCache) -> int:
    """Walk the LRU both ways; every entry is on its hash chain. Returns how many there are."""
    table, head, buckets = cache._slab.table, cache._head, cache._state[3]
    forward, h = [], int(head[dentry.H_LRU])
    while h:
        forward.append(h)
        h = int(table["lru_next"][h])
    backward, h = [], int(head[dentry.H_LRU + 1])
    while h:
        backward.append(h)
        h = int(table["lru_prev"][h])
    assert forward == backward[::-1]
    for entry in forward:
        h = int(buckets[bucket(buckets, int(table["hash"][entry]))])
        while h != entry:
            assert h, "an entry is on no chain"
            h = int(table["hash_next"][h])
    assert len(forward) == cache.count_objects()
    return len(forward)


async def test_cache_follows_its_model(cache: DentryCache) -> None:
    rng = random.Random(1)
    model: dict[tuple[int, bytes], tuple[int, int]] = {}
    for step in range(3000):
        dp, name = directory(rng.randrange(100, 110)), b"name%d" % rng.randrange(60)
        what = rng.randrange(4)
        if what == 0:
            cache.forget(dp, name)
            model.pop((dp.ino, name), None)
        elif what == 1:
            value = (0, 0) if rng.randrange(3) == 0 else (rng.randrange(1, 1 << 50), 1)
            cache.insert(dp, name, *value)
            model[dp.ino, name] = value
        else:
            assert cache.lookup(dp, name) == model.get((dp.ino, name))
        if step % 500 == 0:
            assert check_lists(cache) == len(model)
    assert check_lists(cache) == len(model)
    assert cache.statistics()["entries"] == len(model)


async def test_a_new_directory_with_an_old_number_knows_nothing(cache: DentryCache) -> None:
    cache.insert(directory(128, 1), b"old", 200, 1)
    assert cache.lookup(directory(128, 2), b"old") is None
    assert cache.lookup(directory(128, 1), b"old") == (200, 1)


async def test_names_that_do_not_fit_are_not_cached(cache: DentryCache) -> None:
    dp = directory(128)
    for length in (1, dentry.NAME_MAX, dentry.NAME_MAX + 1, 255):
        cache.insert(dp, b"n" * length, 300, 1)
        cached = cache.lookup(dp, b"n" * length) is not None
        assert cached == (length <= dentry.NAME_MAX)


async def test_reclaim_takes_the_cold_ones_first(cache: DentryCache) -> None:
    dp = directory(128)
    for i in range(300):
        cache.insert(dp, b"%d" % i, 300 + i, 1)
    for i in range(0, 300, 3):
        cache.lookup(dp, b"%d" % i)
    freed = cache.scan_objects(300, 0)
    assert freed == 200
    assert check_lists(cache) == 100
    assert all(cache.lookup(dp, b"%d" % i) == (300 + i, 1) for i in range(0, 300, 3))
    assert cache.lookup(dp, b"1") is None
    assert cache.scan_objects(1000, 0) == 100
    assert check_lists(cache) == 0


async def test_a_full_arena_only_costs_the_cache(cache: DentryCache) -> None:
    dp = directory(128)
    arena = cache._arena
    while arena.try_alloc_folio(0, dentry.gfp.NOWAIT) is not None:  # fill what is free
        pass
    for i in range(2000):
        cache.insert(dp, b"%d" % i, 300 + i, 1)
    assert check_lists(cache) <= 2000
    known = [i for i in range(2000) if cache.lookup(dp, b"%d" % i)]
    assert all(cache.lookup(dp, b"%d" % i) == (300 + i, 1) for i in known)
