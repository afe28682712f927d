"""Several GIL-free threads on one arena: page allocator, slab caches and LRU at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from alloc import buddy, lru, magazine, pcp
from alloc.arena import Arena
from alloc.jit import DISABLED, probe
from alloc.mempolicy import NONE, parse
from alloc.page import W_NODES, Buddy, Slabs
from alloc.placement import place
from alloc.topology import topology

pytestmark = pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")

KEEP = 64


@probe
def churn_pages(words, flags, order, refs, lru_next, lru_prev, mem, out, row, seed, rounds):
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
            where = place(words, NONE, random >> 4, row % words[W_NODES])
            rights = ((random >> 16) % 3) << buddy.MT_SHIFT | where
            pfn = abs(pcp.take(b, row, (random >> 8) % 5, rights))
            held[k] = pfn
            if pfn != 0:
                mem[pfn << 12] = np.uint8(seed)
                lru.lru_move(words, flags, order, refs, lru_next, lru_prev, pfn, lru.ADD)
        else:
            pfn = held[k]
            if mem[pfn << 12] != np.uint8(seed) or not lru.try_get(b, pfn):
                errors += 1
            node = (random >> 20) % words[W_NODES]
            n = lru.lru_isolate(words, flags, order, refs, lru_next, lru_prev, node, out, 2, 0)
            for i in range(n):
                taken = np.int64(out[i])
                lru.lru_move(words, flags, order, refs, lru_next, lru_prev, taken, lru.ADD)
                pcp.put(b, row, taken)
            pcp.put(b, row, pfn)
            if pcp.put(b, row, pfn) < 0:
                errors += 1
            held[k] = 0
    for pfn in held:
        if pfn != 0:
            pcp.put(b, row, pfn)
    return errors


@probe
def churn_objects(
    words, flags, order, refs, lru_next, lru_prev, mapping, low, high, mem, cache, row, seed, rounds
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
            where = place(words, NONE, k, row % words[W_NODES])
            i = abs(magazine.object_alloc(s, mem, cache, buddy.RIGHTS_MIN | where, row))
            held[k] = i
            if i != 0:
                if mem[i * size] != 0 or mem[i * size + size - 1] != 0:
                    errors += 1
                mem[i * size] = np.uint8(seed)
                mem[i * size + size - 1] = np.uint8(seed)
        else:
            if mem[i * size] != np.uint8(seed) or magazine.object_free(s, cache, i, row) < 0:
                errors += 1
            held[k] = 0
    for i in held:
        if i != 0 and magazine.object_free(s, cache, i, row) < 0:
            errors += 1
    return errors


def run(jobs: list[tuple], meanwhile: Callable[[], None]) -> list[int]:
    results: list[int] = []
    threads = [
        threading.Thread(target=lambda job=job: results.append(job[0](*job[1:]))) for job in jobs
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        meanwhile()
        time.sleep(0.001)
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(("nodes", "policy"), [(1, "local"), (3, "local"), (3, "interleave")])
def test_threads_keep_every_structure_whole(nodes: int, policy: str) -> None:
    """Some have a row of their own, some share one, and all rows are drained again and again."""
    arena = Arena(nodes * (8 << 20), nodes=topology(nodes))
    arena.set_mempolicy(parse(policy, nodes))
    objects = [arena.slab(f"s{size}", np.dtype((np.void, size))) for size in (32, 1024)]
    arena.set_lanes(3)
    jobs: list[tuple] = []
    for seed in (1, 2, 3):
        out = np.zeros(2048, np.uint32)
        jobs.append((churn_pages, *arena.buddy, arena.mem, out, min(seed, 2), seed, 150_000))
    for seed in (4, 5, 6, 7):
        cache = objects[seed % 2].number
        jobs.append((churn_objects, *arena.slabs, arena.mem, cache, seed % 4, seed, 300_000))
    drains = arena.vmstat["drain_all_pages"]
    assert run(jobs, arena.drain_all) == [0] * len(jobs)
    assert arena.vmstat["drain_all_pages"] > drains
    arena.check()
    arena.drain_all()
    arena.check()
    assert arena.free_pages == arena.nr_pages - 1 == arena.vmstat["nr_free_pages"]
    assert arena.lru.nr_inactive == 0
    if nodes > 1:
        served = arena.vmstat["numa_hit"] + arena.vmstat["numa_miss"]
        assert served == arena.vmstat["numa_local"] + arena.vmstat["numa_other"] > 0
    arena.close()
