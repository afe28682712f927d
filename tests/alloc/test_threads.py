"""Several GIL-free threads on one arena: page allocator, slab caches and LRU at once."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from alloc import buddy, lru, slab
from alloc.arena import Arena
from alloc.jit import DISABLED, probe
from alloc.page import Buddy, Slabs

pytestmark = pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")

KEEP = 64


@probe
def churn_pages(words, flags, order, refs, lru_next, lru_prev, mem, out, seed, rounds):
    """Take, share, list, isolate and put random blocks; stamps must survive. Errors counted."""
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    held = np.zeros(KEEP, np.int64)
    state = np.uint64(seed)
    errors = 0
    for _ in range(rounds):
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        random = np.int64(state >> np.uint64(33))
        k = random % KEEP
        if held[k] == 0:
            pfn = abs(buddy.take(b, (random >> 8) % 4, buddy.RIGHTS_MIN))
            held[k] = pfn
            if pfn != 0:
                mem[pfn << 12] = np.uint8(seed)
                lru.lru_move(words, flags, order, refs, lru_next, lru_prev, pfn, lru.ADD)
        else:
            pfn = held[k]
            if mem[pfn << 12] != np.uint8(seed) or not lru.try_get(b, pfn):
                errors += 1
            n = lru.lru_isolate(words, flags, order, refs, lru_next, lru_prev, out, 2, 0)
            for i in range(n):
                taken = np.int64(out[i])
                lru.lru_move(words, flags, order, refs, lru_next, lru_prev, taken, lru.ADD)
                buddy.put(b, taken)
            buddy.put(b, pfn)
            if buddy.put(b, pfn) < 0:
                errors += 1
            held[k] = 0
    for pfn in held:
        if pfn != 0:
            buddy.put(b, pfn)
    return errors


@probe
def churn_objects(
    words, flags, order, refs, lru_next, lru_prev, mapping, low, high, mem, cache, seed, rounds
):
    """Take and free objects of one cache; every one comes zeroed and keeps its stamp."""
    s = Slabs(words, flags, order, refs, lru_next, lru_prev, mapping, low, high)
    size = 1 << words[64 + cache * 8 + 4]
    held = np.zeros(KEEP, np.int64)
    state = np.uint64(seed)
    errors = 0
    for _ in range(rounds):
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        k = np.int64(state >> np.uint64(33)) % KEEP
        i = held[k]
        if i == 0:
            i = abs(slab.object_alloc(s, mem, cache, buddy.RIGHTS_MIN))
            held[k] = i
            if i != 0:
                if mem[i * size] != 0 or mem[i * size + size - 1] != 0:
                    errors += 1
                mem[i * size] = np.uint8(seed)
                mem[i * size + size - 1] = np.uint8(seed)
        else:
            if mem[i * size] != np.uint8(seed) or slab.object_free(s, cache, i) < 0:
                errors += 1
            held[k] = 0
    for i in held:
        if i != 0 and slab.object_free(s, cache, i) < 0:
            errors += 1
    return errors


def run(jobs: list[tuple]) -> list[int]:
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda job=job: results.append(job[0](*job[1:]))) for job in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_keep_every_structure_whole(arena: Arena) -> None:
    objects = [arena.slab(f"s{size}", np.dtype((np.void, size))) for size in (32, 1024)]
    jobs: list[tuple] = []
    for seed in (1, 2, 3):
        out = np.zeros(2048, np.uint32)
        jobs.append((churn_pages, *arena.buddy, arena.mem, out, seed, 30_000))
    for seed in (4, 5, 6, 7):
        cache = objects[seed % 2].number
        jobs.append((churn_objects, *arena.slabs, arena.mem, cache, seed, 60_000))
    assert run(jobs) == [0] * len(jobs)
    arena.check()
    assert arena.free_pages == arena.nr_pages - 1
    assert arena.lru.nr_inactive == 0
