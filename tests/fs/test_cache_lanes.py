"""Lanes on threads that find inodes and names while the trio thread creates, reclaims and drops.

A lane must never see a half-made record, never lose its way on a hash chain, and no lookup that
it counted may be lost. Records are poisoned when they are freed: their chains end at once, so a
walker that still stood on one misses inodes that are there all the time.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alloc import atomic
from alloc.arena import Arena
from alloc.jit import DISABLED, helper, probe
from alloc.rcu import rcu_enter, rcu_exit
from fs.cache import incore
from fs.cache.dentry import DentryCache, find_name
from fs.cache.incore import I4_ILOCK, I4_NLINK, I4_STATE, I8_INO, I8_NLOOKUP, I8_SIZE, S_VALID
from fs.cache.inode import Inode, InodeCache
from fs.cache.lock import LockTable, try_lock, unlock

pytestmark = pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")

FILE = 0o100644
FIRST, COUNT = 64, 240  # inos
PINNED = 3  # every third ino, every third name is there all the time
CHAINS = 4  # few, so that chains are long
LANES = 2
SECONDS = 1.5
LIMIT = 60.0
WORDS, LONGS = incore.INODE_WORDS, incore.INODE_LONGS


@helper
def next_random(state):
    return state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)


@probe
def look_up(m4, m8, s8, buckets, rcu, lane, counts, control):
    """LOOKUP of random inos as a lane does it; (wrong records, pinned inos missed, hits)."""
    state = np.uint64(lane + 1)
    wrong = missed = hits = 0
    while atomic.load_acquire(control, 0) == 0:
        state = next_random(state)
        ino = np.int64(state >> np.uint64(33)) % COUNT + FIRST
        rcu_enter(rcu, lane)
        h = incore.find_inode(m4, s8, buckets, ino)
        if h == 0:
            missed += ino % PINNED == 0
        elif try_lock(m4, h * WORDS + I4_ILOCK, True):
            long = h * LONGS
            if s8[long + I8_INO] != ino or not m4[h * WORDS + I4_STATE] & S_VALID:
                wrong += 1
            elif m4[h * WORDS + I4_NLINK] > 0:
                wrong += s8[long + I8_SIZE] != ino * 1000
                atomic.fetch_add(m8, long + I8_NLOOKUP, 1)
                counts[ino - FIRST] += 1
                hits += 1
            unlock(m4, h * WORDS + I4_ILOCK, True)
        rcu_exit(rcu, lane)
        if wrong or missed:
            atomic.store_release(control, 1, 1)
    return wrong, missed, hits


@probe
def look_up_names(mem, m4, s8, buckets, rcu, lane, names, control):
    """Random names, 8 bytes each from mem[names:]; (wrong answers, pinned names missed, hits)."""
    state = np.uint64(lane + 1)
    wrong = missed = hits = 0
    while atomic.load_acquire(control, 0) == 0:
        state = next_random(state)
        i = np.int64(state >> np.uint64(33)) % COUNT
        rcu_enter(rcu, lane)
        known, ino = find_name(mem, m4, s8, buckets, 128, 5, names + 8 * i, 8)
        rcu_exit(rcu, lane)
        missed += known == 0 and i % PINNED == 0
        hits += known
        wrong += known and (ino >> 32 != ino & 0xFFFFFFFF or (ino & 0xFFFF) % COUNT != i)
        if wrong or missed:
            atomic.store_release(control, 1, 1)
    return wrong, missed, hits


class Lanes:
    """Threads that run a jitted loop, beginning with its compilation, until they are stopped."""

    def __init__(
        self, arena: Arena, loop: Callable[..., Any], args: Callable[[int], tuple[Any, ...]]
    ) -> None:
        self.control = np.zeros(8, np.int64)  # stop, something is wrong
        self.control[0] = 1
        self.arena, self.results = arena, list[tuple[int, int, int]]()
        loop(*args(0), self.control)
        self.control[0] = 0
        self.numbers = [arena.rcu.register() for _ in range(LANES)]
        self.threads = [
            threading.Thread(target=lambda n=n: self.results.append(loop(*args(n), self.control)))
            for n in self.numbers
        ]
        for thread in self.threads:
            thread.start()

    def stop(self) -> tuple[int, int, int]:
        self.control[0] = 1
        for thread in self.threads:
            thread.join()
        for number in self.numbers:
            self.arena.rcu.unregister(number)
        wrong, missed, hits = zip(*self.results, strict=True)
        return sum(wrong), sum(missed), sum(hits)


class World:
    """An inode cache over imaginary inodes, with short hash tables and poisoned free records."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.cache = cache = InodeCache(arena, 9)
        self.counts = np.zeros((LANES, COUNT), np.int64)
        self.forgotten = [0] * COUNT
        self.free_modes: set[int] = set()
        self.ilocks = LockTable("ilock", arena.mem.view(np.uint32), WORDS, I4_ILOCK)
        self.dropped = 0
        cache.read_image = self.read
        free = cache._free

        def poison(handle: int) -> None:
            cache.fields["hash_next"][handle] = 0
            cache.fields["size"][handle] = 1
            cache.fields["ilock"][handle] = 0
            free(handle)

        cache._free = poison

    async def read(self, ip: Inode) -> None:
        ip.nlink, ip.size = 1, ip.ino * 1000
        ip.mode = 0 if ip.ino in self.free_modes else FILE

    def lane_args(self, n: int) -> tuple[Any, ...]:
        mem = self.arena.mem
        views = (mem.view(np.uint32), mem.view(np.uint64), mem.view(np.int64))
        return (*views, self.cache.buckets, self.arena.rcu.words, n, self.counts[n])

    async def step(self, rng: random.Random) -> None:
        ino, act = rng.randrange(FIRST, FIRST + COUNT), rng.random()
        cache = self.cache
        if act < 0.6:
            cache.put(await cache.get(ino))
        elif act < 0.7:
            cache.scan_objects(64, 0)
        elif act < 0.95:
            self.forget(ino)
        else:
            await self.fail_to_load()
            self.drop_a_free_one(rng)

    def forget(self, ino: int) -> None:
        """FORGET of all lookups that are known to have happened."""
        seen = int(self.counts[:, ino - FIRST].sum()) - self.forgotten[ino - FIRST]
        self.forgotten[ino - FIRST] += seen
        self.cache.forget(ino, seen)

    async def fail_to_load(self) -> None:
        """A number outside the lanes' that is findable while it is read, and then free."""
        ino = FIRST + COUNT + 1
        self.free_modes.add(ino)
        with pytest.raises(FileNotFoundError):
            await self.cache.get(ino)

    def drop_a_free_one(self, rng: random.Random) -> None:
        """An inode loses its last link and its chunk goes away, unless a lane is looking at it."""
        handle = rng.choice(self.cache.handles())
        ip = Inode(self.cache, handle)
        if ip.refs or not self.ilocks.try_acquire(handle, False):
            return
        self.forget(ip.ino)
        assert not ip.nlookup, "no lane counts while the ILOCK is held exclusively"
        ip.mode = ip.nlink = 0
        self.ilocks.release(handle)
        self.cache.drop_chunk(ip.ino, 1)
        if ip.state & S_VALID:  # a lane held it: it stays cached, and is used again
            ip.mode, ip.nlink = FILE, 1
        else:
            self.dropped += 1

    async def left(self, ino: int) -> int:
        """What the cache says the kernel still knows of an inode."""
        ip = await self.cache.get(ino)
        self.cache.put(ip)
        return ip.nlookup


async def hammered(world: World, enough: Callable[[Lanes], bool]) -> tuple[int, int, int]:
    """Let lanes look up while the trio thread does its work, until it is enough."""
    cache, rng = world.cache, random.Random(1)
    await cache.start()
    cache.buckets = cache.buckets[:CHAINS]
    held = [await cache.get(n) for n in range(FIRST, FIRST + COUNT) if n % PINNED == 0]
    lanes = Lanes(world.arena, look_up, world.lane_args)
    try:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and not enough(lanes):
            for _ in range(100):
                await world.step(rng)
    finally:
        result = lanes.stop()
    for ip in held:
        cache.put(ip)
    return result


async def test_inodes_come_and_go_under_lanes() -> None:
    world = World(Arena(8 << 20))
    begin = time.monotonic()
    wrong, missed, hits = await hammered(
        world, lambda _: time.monotonic() > begin + SECONDS and world.dropped > 10
    )
    assert (wrong, missed) == (0, 0)
    assert hits > 1000
    assert world.dropped > 10
    counts = world.counts.sum(axis=0)
    for ino in range(FIRST, FIRST + COUNT):
        assert await world.left(ino) == counts[ino - FIRST] - world.forgotten[ino - FIRST]
    for _ in range(4):
        world.cache.scan_objects(1000, 0)
    assert world.cache.handles() == []
    assert world.arena.rcu.pending == 0
    world.arena.check()


def at_once(free: Callable[[int], object], handles: Sequence[int], nbytes: int) -> None:
    """What `defer_all` must not be."""
    for handle in handles:
        free(handle)


async def test_without_grace_periods_lanes_lose_their_way(monkeypatch: Any) -> None:
    """The test above would notice: the same with records freed at once."""
    world = World(Arena(8 << 20))
    monkeypatch.setattr(world.arena.rcu, "defer_all", at_once)
    wrong, missed, _ = await hammered(world, lambda lanes: lanes.control[1] != 0)
    assert wrong + missed > 0


@probe
def add_lookups(m8, word, control):
    """Count lookups until told to stop; how many."""
    n = 0
    while atomic.load_acquire(control, 0) == 0:
        atomic.fetch_add(m8, word, 1)
        n += 1
    return n


async def test_no_lookup_is_lost_between_lookup_and_forget() -> None:
    world, control = World(Arena(8 << 20)), np.ones(1, np.int64)
    await world.cache.start()
    ip = await world.cache.get(FIRST)
    m8, word = world.arena.mem.view(np.uint64), ip.handle * LONGS + I8_NLOOKUP
    assert add_lookups(m8, word, control) == 0
    begin, rounds, added = 1 << 40, 0, list[int]()
    control[0], ip.nlookup = 0, begin
    thread = threading.Thread(target=lambda: added.append(add_lookups(m8, word, control)))
    thread.start()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        world.cache.forget(FIRST, 3)
        world.cache.looked_up(ip)
        rounds += 1
    control[0] = 1
    thread.join()
    assert ip.nlookup == begin + added[0] - 2 * rounds


class Names:
    """A dentry cache with short hash tables and poisoned free records, and COUNT names."""

    def __init__(self, arena: Arena) -> None:
        self.arena, self.rng = arena, random.Random(1)
        self.cache, self.dp = DentryCache(arena), SimpleNamespace(ino=128, gen=5)
        self.spelled = [b"name%04d" % i for i in range(COUNT)]
        slab = self.cache._slab
        free = slab.free

        def poison(handle: int) -> None:
            slab.table["hash_next"][handle] = 0
            free(handle)

        slab.free = poison

    async def start(self) -> None:
        await self.cache.start()
        self.cache.buckets = self.cache.buckets[:CHAINS]
        self.cache._state = (*self.cache._state[:3], self.cache.buckets)
        self.at = (await self.arena.alloc_folio(0)) << 12
        self.arena.mem[self.at :][: 8 * COUNT] = np.frombuffer(b"".join(self.spelled), np.uint8)
        for i in range(COUNT):
            self.enter(i)

    def enter(self, i: int) -> None:
        value = i + COUNT * self.rng.randrange(200)  # both halves are alike: a torn one shows
        self.cache.insert(self.dp, self.spelled[i], value << 32 | value, 1)

    def lane_args(self, n: int) -> tuple[Any, ...]:
        mem = self.arena.mem
        views = (mem, mem.view(np.uint32), mem.view(np.int64))
        return (*views, self.cache.buckets, self.arena.rcu.words, n, self.at)

    def step(self) -> None:
        i = self.rng.randrange(COUNT)
        if i % PINNED == 0 or self.rng.random() < 0.5:
            self.enter(i)
        else:
            self.cache.forget(self.dp, self.spelled[i])

    def hammered(self, enough: Callable[[Lanes], bool]) -> tuple[int, int, int]:
        lanes = Lanes(self.arena, look_up_names, self.lane_args)
        try:
            end = time.monotonic() + LIMIT
            while time.monotonic() < end and not enough(lanes):
                for _ in range(100):
                    self.step()
        finally:
            result = lanes.stop()
        return result


async def test_names_come_and_go_under_lanes() -> None:
    names = Names(Arena(8 << 20))
    await names.start()
    begin = time.monotonic()
    wrong, missed, hits = names.hammered(lambda _: time.monotonic() > begin + SECONDS)
    assert (wrong, missed) == (0, 0)
    assert hits > 1000
    names.cache.scan_objects(10 * COUNT, 0)
    assert names.cache.count_objects() == 0
    assert names.arena.rcu.pending == 0
    names.arena.check()


async def test_without_grace_periods_names_get_lost(monkeypatch: Any) -> None:
    """The test above would notice: the same with records freed at once."""
    names = Names(Arena(8 << 20))
    await names.start()
    monkeypatch.setattr(names.arena.rcu, "defer_all", at_once)
    wrong, missed, _ = names.hammered(lambda lanes: lanes.control[1] != 0)
    assert wrong + missed > 0
