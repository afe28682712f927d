"""The inode cache: one record an ino, references, lookup counts that pin nothing, inactivation."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
import trio.testing

from alloc.arena import Arena
from fs.cache.inode import Inode, InodeCache

FILE = 0o100644


class World:
    """A cache over imaginary inodes: `modes` says which are in use, `links` how often."""

    def __init__(self) -> None:
        self.arena = Arena(8 << 20)
        self.cache = InodeCache(self.arena, 9)
        self.cache.read_image = self.read
        self.cache.start_inactivation = self.inactivated
        self.modes: dict[int, int] = {}
        self.reads: list[int] = []
        self.freed: list[int] = []

    def inactivated(self, ip: Inode) -> None:
        self.freed.append(ip.ino)
        ip.mode = 0
        self.modes[ip.ino] = 0
        self.cache.put(ip)

    async def read(self, ip: Inode) -> None:
        self.reads.append(ip.ino)
        await trio.lowlevel.checkpoint()
        ip.mode, ip.nlink = self.modes.get(ip.ino, 0), 1

    def reclaim(self) -> int:
        """Enough passes for every idle inode to lose its second chance."""
        return sum(self.cache.scan_objects(10_000, 0) for _ in range(2))


async def make() -> World:
    world = World()
    await world.cache.start()
    return world


async def test_concurrent_gets_read_once() -> None:
    world = await make()
    world.modes[77] = FILE
    got: list[Inode] = []

    async def get() -> None:
        got.append(await world.cache.get(77))

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(get)
    assert world.reads == [77]
    assert len({ip.handle for ip in got}) == 1
    assert got[0].refs == 4


async def test_a_free_inode_is_not_found_and_leaves_nothing() -> None:
    world = await make()
    with pytest.raises(FileNotFoundError):
        await world.cache.get(5)
    assert world.cache.handles() == []
    world.arena.check()


async def test_lookups_survive_reclaim_as_a_stub() -> None:
    world = await make()
    world.modes[77] = FILE
    ip = await world.cache.get(77)
    for _ in range(3):
        world.cache.looked_up(ip)
    world.cache.put(ip)
    assert world.reclaim() == 1
    assert world.cache.handles() == [], "the kernel's lookups keep no inode in core"
    world.cache.forget(77, 1)
    ip = await world.cache.get(77)
    assert ip.nlookup == 2
    ip.nlink = 0
    world.cache.put(ip)
    assert world.freed == [], "the kernel can still name it"
    assert world.reclaim() == 0, "and nobody else could free it"
    world.cache.forget(77, 2)
    assert world.freed == [77]


async def test_forgetting_a_stub_frees_it() -> None:
    world = await make()
    free = world.arena.free_pages
    for ino in range(64, 3064):
        world.modes[ino] = FILE
        ip = await world.cache.get(ino)
        world.cache.looked_up(ip)
        world.cache.put(ip)
    assert world.reclaim() == 3000
    world.arena.drain_all()
    assert free - world.arena.free_pages <= 3000 * 32 // 4096 + 2
    for ino in range(64, 3064):
        world.cache.forget(ino, 1)
    world.arena.drain_all()
    assert world.arena.free_pages >= free - 1
    world.cache.forget(64, 1)  # a count that nobody knows is no reason to stop


async def test_last_reference_of_an_unlinked_inode_inactivates_it() -> None:
    world = await make()
    ip = await world.cache.create(9, 4)
    ip.mode, ip.nlink = FILE, 1
    world.cache.looked_up(ip)
    again = world.cache.hold(ip.handle)
    ip.nlink = 0
    world.cache.put(ip)
    world.cache.forget_all()
    assert world.freed == [], "somebody has it open"
    world.cache.put(again)
    assert world.freed == [9]
    assert world.reclaim() == 1, "what is left of a freed inode is only cache"


async def test_a_freed_inode_is_created_again_with_its_newer_generation() -> None:
    world = await make()
    ip = await world.cache.create(9, 4)
    ip.mode, ip.nlink, ip.size, ip.gen = FILE, 0, 55, 5
    world.cache.put(ip)
    assert world.freed == [9]
    ip = await world.cache.create(9, 4)
    assert (ip.gen, ip.size, ip.refs) == (5, 0, 1)


async def test_dirty_and_held_inodes_stay() -> None:
    world = await make()
    world.modes.update({1: FILE, 2: FILE, 3: FILE})
    held, dirty, idle = [await world.cache.get(n) for n in (1, 2, 3)]
    world.cache.mark_dirty(dirty)
    world.cache.put(dirty)
    world.cache.put(idle)
    assert world.reclaim() == 1
    first = world.cache.first_dirty()
    assert first is not None
    assert first.ino == 2
    world.cache.mark_clean(dirty)
    assert world.reclaim() == 1
    assert [Inode(world.cache, h).ino for h in world.cache.handles()] == [held.ino]


@pytest.mark.parametrize("seed", range(4))
async def test_random_life_against_a_model(seed: int) -> None:
    world, rng = await make(), random.Random(seed)
    counts: dict[int, int] = {}
    for ino in range(100, 400):
        world.modes[ino] = FILE
    held: list[Any] = []
    for _ in range(4000):
        ino = rng.randrange(100, 400)
        act = rng.random()
        if act < 0.5:
            ip = await world.cache.get(ino)
            assert ip.nlookup == counts.get(ino, 0)
            if rng.random() < 0.5:
                world.cache.looked_up(ip)
                counts[ino] = counts.get(ino, 0) + 1
            held.append(ip)
        elif act < 0.9 and held:
            world.cache.put(held.pop(rng.randrange(len(held))))
        elif act < 0.95 and counts.get(ino):
            taken = rng.randint(1, counts[ino])
            counts[ino] -= taken
            world.cache.forget(ino, taken)
        else:
            world.cache.scan_objects(64, 0)
    assert world.freed == []
    for ip in held:
        world.cache.put(ip)
    world.reclaim()
    assert world.cache.handles() == []
    world.arena.check()
