"""Inodes that wait to be freed: who waits for them and when, and which shrinkers know no NOFS."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from alloc import gfp
from alloc.shrinker import SHRINK_STOP, ShrinkerState
from fs import file, namespace
from fs.cache.inode import Inode
from fs.front.procdir import shrinkers
from fs.inodegc import MAX_BACKLOG
from fs.volume import Volume
from tests import support
from tests.fs.dirimages import opened, using

BY_NODE = ("page_cache", "dentry", "xfs_inode")
NAMES = ("rcu", "xfs_buf", "xfs_inode", "dentry", "page_cache", "mm-shadow", "xfs_inodegc")


async def make(vol: Volume, root: Inode, count: int, size: int) -> list[Inode]:
    """Files of one block, unlinked already and kept by their references."""
    made = []
    for i in range(count):
        ip = await namespace.create(vol, root, b"gone%d" % i, 0o644, 0, 0)
        if size:
            await file.write(vol, ip, 0, bytes(size))
        await namespace.unlink(vol, root, b"gone%d" % i)
        made.append(ip)
    return made


def let_go(vol: Volume, inodes: list[Inode]) -> None:
    """Drop the last references, with no chance for the worker to do anything."""
    for ip in inodes:
        vol.inodes.put(ip)


async def waits(vol: Volume, root: Inode, name: bytes) -> bool:
    """Whether unlinking a name waited until nothing, or the backlog, was left to free."""
    queued = len(vol.inodegc)
    await namespace.unlink(vol, root, name)
    return len(vol.inodegc) < queued


async def test_a_shrinker_makes_who_unlinks_wait(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        (state,) = [s for s in vol.arena.reclaim.shrinkers if s.shrinker is vol.inodegc]
        assert (state.seeks, state.batch, vol.inodegc.count_objects()) == (0, 2049, 0)
        for name in (b"one", b"two", b"three"):
            vol.inodes.put(await namespace.create(vol, root, name, 0o644, 0, 0))
        let_go(vol, await make(vol, root, 20, 0))
        assert len(vol.inodegc) == 0, "what has nothing but itself is freed at once"
        let_go(vol, await make(vol, root, 20, 5000))
        assert (len(vol.inodegc), vol.inodegc.count_objects()) == (20, 4096)
        assert not await waits(vol, root, b"one")
        assert len(vol.inodegc) == 20
        assert (state.shrink(12, 0), state.deferred) == ((0, 0), 2048)
        assert not vol.inodegc.shrinker_hit, "one short of a batch"
        assert state.shrink(11, gfp.NOFS) == (0, 0)
        assert vol.inodegc.shrinker_hit
        with gfp.nofs():
            await vol.inodegc.throttle()
        assert len(vol.inodegc) == 20, "a transaction does not wait"
        assert await waits(vol, root, b"two")
        assert len(vol.inodegc) == 0
        await vol.drain_inactive()
        await trio.testing.wait_all_tasks_blocked()
        assert not vol.inodegc.shrinker_hit
        assert state.shrink(0, 0) == (0, 0)
        assert vol.inodegc.scan_objects(2049, 0) == SHRINK_STOP
        assert not vol.inodegc.shrinker_hit, "there is nothing to wait for"
    support.assert_clean(image)


async def test_the_backlog_is_bounded(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        vol.inodes.put(await namespace.create(vol, root, b"last", 0o644, 0, 0))
        let_go(vol, await make(vol, root, MAX_BACKLOG + 3, 100))
        assert len(vol.inodegc) == MAX_BACKLOG + 3
        assert await waits(vol, root, b"last")
        assert len(vol.inodegc) <= MAX_BACKLOG
    support.assert_clean(image)


async def test_every_cache_has_a_shrinker_and_who_is_gated_stops_under_nofs(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, using(vol) as root:
        for i in range(50):
            ip = await namespace.create(vol, root, b"file%d" % i, 0o644, 0, 0)
            await file.write(vol, ip, 0, bytes(4096))
            vol.inodes.put(ip)
        await vol.flusher.sync()
        await vol.flush_metadata()
        states = {s.shrinker.name: s for s in vol.arena.reclaim.shrinkers}
        assert set(states) == set(NAMES)
        rows = [line.split() for line in shrinkers(vol).splitlines()[1:]]
        nodes = dict.fromkeys(NAMES, "-") | dict.fromkeys(BY_NODE, "0")
        assert {row[0]: row[5] for row in rows} == nodes
        for name in ("xfs_buf", "page_cache"):
            cache = states[name].shrinker
            freed = sum(cache.scan_objects(1000, gfp.NOIO) for _ in range(3))
            assert freed > 0, "a transaction may have what is clean"
        for name in ("dentry", "xfs_inode"):
            cache = states[name].shrinker
            before = cache.count_objects()
            assert before >= 50
            for flags in (gfp.NOFS, gfp.NOIO, gfp.NOFS | gfp.NOFAIL):
                assert cache.scan_objects(1000, flags) == SHRINK_STOP
            state = ShrinkerState(cache)
            assert state.shrink(0, gfp.NOFS) == (0, 0)
            assert state.deferred == 2 * before
            assert cache.count_objects() == before
            assert sum(cache.scan_objects(1000, gfp.KERNEL) for _ in range(2)) > 0
            assert cache.count_objects() < before
