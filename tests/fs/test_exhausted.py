"""Cleaning without memory: it goes on, on what was set aside for it at mount.

Either all of the arena is taken before anything is written back, or all but half of the reserve,
which is for metadata that write-back has to read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from alloc import gfp
from alloc.victim import ROUNDS
from alloc.wait import POLL_S
from fs import buffered, file, namespace
from fs.cache import readahead
from fs.cache import resident as R
from fs.cache.inode import Inode
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import SlowImage, a_file, opened
from writeback.ioend import DEPTH, RESERVED

FILES = 20
CONTENT = b"cleaning memory needs no memory " * 4096


def take_all(vol: Volume, rights: int) -> list[int]:
    """Every free page that is for those with these rights."""
    held = []
    vol.arena.drain_all()
    while (pfn := vol.arena.try_alloc_folio(0, gfp.NOWAIT | rights)) is not None:
        held.append(pfn)
    return held


def drop_caches(vol: Volume) -> None:
    while any(known.shrinker.scan_objects(4096, 0) > 0 for known in vol.arena.reclaim.shrinkers):
        pass


@contextmanager
def exhausted(vol: Volume, rights: int = gfp.MEMALLOC) -> Iterator[None]:
    """While it lasts there is no memory (for those with these rights) nor does any become free."""
    shrinkers = [known.shrinker for known in vol.arena.reclaim.shrinkers]
    for shrinker in shrinkers:
        vol.arena.unregister_shrinker(shrinker)
    held = take_all(vol, rights)
    try:
        yield
    finally:
        assert vol.arena.free_pages < vol.arena.marks.min
        for shrinker in shrinkers:
            vol.arena.register_shrinker(shrinker)
        for pfn in held:
            vol.arena.put_folio(pfn)


class Writing:
    """Files with dirty data, each of which a task writes back; what came of it."""

    def __init__(self, vol: Volume) -> None:
        self.vol = vol
        self.inodes: list[Inode] = []
        self.written = 0
        self.depths: list[int] = [0]  # ioends in use, when something was written

    async def read_trees(self) -> None:
        """Have the metadata in core that write-back needs."""
        async with a_file(self.vol, b"first") as ip:
            await file.write(self.vol, ip, 0, CONTENT)
            await file.fsync(self.vol, ip)

    async def dirty(self, stack: AsyncExitStack) -> None:
        self.vol.pages.dirty.ratio, self.vol.pages.dirty.background_ratio = 90, 80
        for number in range(FILES):
            ip = await stack.enter_async_context(a_file(self.vol, b"%d" % number))
            await file.write(self.vol, ip, 0, CONTENT)
            self.inodes.append(ip)
        assert isinstance(self.vol.dev, SlowImage)
        self.vol.dev.before_write = self.note_depth

    def note_depth(self) -> None:
        self.depths.append(self.vol.pages.ioends.pool.in_use)

    async def clean(self, ip: Inode) -> None:
        await file.fsync(self.vol, ip)
        self.written += 1

    async def verify(self) -> None:
        assert self.written == FILES
        for ip in self.inodes:
            assert bytes(await file.read(self.vol, ip, 0, len(CONTENT))) == CONTENT
        self.vol.arena.check()


@asynccontextmanager
async def writing(scratch: Path, in_core: bool = True) -> AsyncIterator[Writing]:
    async with AsyncExitStack() as stack:
        image = support.mkfs(scratch)
        vol = await stack.enter_async_context(opened(image, 8 << 20, pause_s=0.1))
        made = Writing(vol)
        if in_core:
            await made.read_trees()
        await made.dirty(stack)
        yield made
        await made.verify()


async def test_with_memory_the_device_has_enough_to_do(
    scratch: Path, autojump_clock: object
) -> None:
    async with writing(scratch) as made, trio.open_nursery() as nursery:
        for ip in made.inodes:
            nursery.start_soon(made.clean, ip)
    assert max(made.depths) == DEPTH


@pytest.mark.parametrize("rights", [gfp.ATOMIC, gfp.MEMALLOC])
async def test_without_memory_it_goes_on(
    scratch: Path, rights: int, autojump_clock: object
) -> None:
    """D6. Delayed allocation, data and completion, at the depth of the pool."""
    async with writing(scratch, in_core=rights == gfp.MEMALLOC) as made:
        async with trio.open_nursery() as nursery:
            with exhausted(made.vol, rights):
                for ip in made.inodes:
                    nursery.start_soon(made.clean, ip)
                await trio.sleep(60)
                assert (made.written, made.vol.arena.waiters()) == (FILES, [])
        assert max(made.depths) == RESERVED


async def test_without_the_pool_it_does_not(
    scratch: Path, autojump_clock: object, allow_logs
) -> None:
    """What the other test is worth: the same run is stuck until there is memory."""
    allow_logs("for an element of mempool ioend")
    async with writing(scratch) as made:
        pool = made.vol.pages.ioends.pool
        pool.min_nr = 0
        while pool._aside:
            pool._source.free(pool._aside.pop())
        async with trio.open_nursery() as nursery:
            with exhausted(made.vol):
                for ip in made.inodes:
                    nursery.start_soon(made.clean, ip)
                await trio.sleep(60)
                assert (made.written, max(made.depths)) == (0, 0)
                assert "mempool:ioend mode:NOFS|MEMALLOC waits 60" in made.vol.arena.waiters()[0]
    assert max(made.depths) == DEPTH


async def test_more_inode_clusters_than_the_reserve_holds(
    scratch: Path, autojump_clock: object
) -> None:
    """The metadata writer reads them, fills them and lets go of them, a few at a time."""
    async with opened(support.mkfs(scratch), 8 << 20) as vol:
        per_cluster = vol.resident.shape[R.G_CLUSTER_BYTES] // vol.geo.inode_size
        clusters = 2 * vol.arena.marks.min * 4096 // vol.resident.shape[R.G_CLUSTER_BYTES]
        root = await vol.inodes.get(vol.geo.root_ino)
        spread = []
        for number in range(clusters * int(per_cluster)):
            ip = await namespace.create(vol, root, b"%d" % number, 0o644, 0, 0)
            if number % per_cluster:
                vol.inodes.put(ip)
            else:
                spread.append(ip)
        vol.inodes.put(root)
        await vol.flush_metadata()
        for ip in spread:
            async with vol.transaction("setattr") as tp:
                await tp.lock_inodes(ip)
                ip.mtime += 1
                tp.log_inode(ip)
        drop_caches(vol)
        held = take_all(vol, gfp.KERNEL)
        assert vol.inodes.dirty_count == len(spread) == clusters
        with trio.move_on_after(60):
            await vol.flush_metadata()
        left = vol.inodes.dirty_count, vol.bufs.dirty_bytes
        for pfn in held:
            vol.arena.put_folio(pfn)
        for ip in spread:
            vol.inodes.put(ip)
        assert left == (0, 0)


async def test_readahead_gives_way(
    scratch: Path, autojump_clock: object, allow_logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All memory but its window is in use, and it waits for a lock of one who waits for memory."""
    allow_logs("out of memory: shed 63 pages of readahead")
    allow_logs("possible memory allocation deadlock")
    taken, locked, served = trio.Event(), trio.Event(), trio.Event()
    take_folios = readahead._take_folios

    async def take_and_look_again(vol: Volume, ip: Inode, *args: Any) -> list[int]:
        folios = await take_folios(vol, ip, *args)
        if not taken.is_set():
            assert len(folios) == 64
            vol.pages.state(ip.handle)["map_seq"] += 1
            taken.set()
            await locked.wait()
        return folios

    async def transaction(vol: Volume, ip: Inode) -> None:
        await taken.wait()
        drop_caches(vol)
        held = take_all(vol, gfp.MEMALLOC)
        async with vol.ilocks.locked(ip.handle, False):
            locked.set()
            with trio.move_on_after(30):
                vol.arena.put_folio(await vol.arena.alloc_folio(0, gfp.NOFS | gfp.NOFAIL))
                served.set()
        for pfn in held:
            vol.arena.put_folio(pfn)

    monkeypatch.setattr(readahead, "_take_folios", take_and_look_again)
    async with opened(support.mkfs(scratch), 8 << 20) as vol, a_file(vol) as ip:
        vol.arena.set_watermarks(256, vol.arena.watermark_scale_factor)  # half of it is a window
        await file.write(vol, ip, 0, CONTENT * 8)
        await file.fsync(vol, ip)
        drop_caches(vol)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(transaction, vol, ip)
            got = bytes(await file.read(vol, ip, 0, len(CONTENT)))
        assert served.is_set()
        assert got == CONTENT
        assert vol.arena.vmstat["oom_victims"] == 1
        assert bytes(await file.read(vol, ip, 0, len(CONTENT * 8))) == CONTENT * 8
        vol.arena.check()


async def served(vol: Volume) -> float:
    """How long somebody waits for a page who may have the last one, in seconds."""
    began = trio.current_time()
    with trio.fail_after(30):
        vol.arena.put_folio(await vol.arena.alloc_folio(0, gfp.MEMALLOC))
    return trio.current_time() - began


async def test_a_writers_folio_gives_way(
    scratch: Path, autojump_clock: object, allow_logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He keeps what he has read for a part of it, and memory is short when he goes on."""
    allow_logs("out of memory: shed 16 pages of writers")
    classify, looks, waited = buffered.classify, 0, []

    async def short_of_memory(vol: Volume, *args: Any) -> list[buffered.Part]:
        nonlocal looks
        looks += 1
        if looks == 2:
            assert vol.pages.pins.count() == 16
            with exhausted(vol):
                assert vol.pages.shadows.count() == 0
                waited.append(await served(vol))
            assert vol.pages.pins.count() == 0
        return await classify(vol, *args)

    async with opened(support.mkfs(scratch, "-b", "size=64k"), 16 << 20) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, CONTENT)
        await file.fsync(vol, ip)
        drop_caches(vol)
        monkeypatch.setattr(buffered, "classify", short_of_memory)
        assert await file.write(vol, ip, 100, b"new") == 3
        assert looks == 3, "read, and read once more"
        assert waited == [pytest.approx(ROUNDS * POLL_S, abs=2 * POLL_S)]
        assert (vol.arena.vmstat["oom_victims"], vol.arena.vmstat["oom_pages"]) == (1, 16)
        new = CONTENT[:100] + b"new" + CONTENT[103:]
        assert bytes(await file.read(vol, ip, 0, len(CONTENT))) == new
        vol.arena.check()


async def test_a_writers_folio_in_use_stays(scratch: Path) -> None:
    async with opened(support.mkfs(scratch), 8 << 20) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"dirty")
        pfn = vol.pages.find(ip.handle, 0)
        with vol.pages.pins.pinning() as pin:
            pin(pfn)
            assert vol.pages.pins.count() == 0
            await file.fsync(vol, ip)
            assert vol.pages.pins.count() == 1
            vol.arena.get_folio(pfn)
            assert vol.pages.pins.count() == 0
            assert vol.pages.pins.shed() == 0
            vol.arena.put_folio(pfn)
            vol.pages.lock(pfn)
            assert vol.pages.pins.count() == 0
            vol.pages.unlock(pfn)
            assert vol.pages.pins.shed() == 1
        assert not vol.pages.find(ip.handle, 0)
        assert bytes(await file.read(vol, ip, 0, 5)) == b"dirty"
        vol.arena.check()


async def test_shadows_of_one_file_give_way(
    scratch: Path, autojump_clock: object, allow_logs
) -> None:
    allow_logs("out of memory: shed 8 pages of mm-shadow")
    async with opened(support.mkfs(scratch), 8 << 20) as vol, a_file(vol) as ip:
        async with a_file(vol, b"other") as other:
            for each, nodes in ((other, 24), (ip, 64)):
                for number in range(nodes):
                    await file.write(vol, each, number << 18, b"x")
                await file.fsync(vol, each)
                while vol.pages.eviction.scan_objects(128, 0, 0):
                    pass
            assert vol.pages.shadows.nr_nodes == 24 + 64
            with exhausted(vol):
                waited = await served(vol)
            assert waited == pytest.approx(ROUNDS * POLL_S, abs=2 * POLL_S)
            assert vol.pages.shadows.nr_nodes == 24
            assert not vol.pages.columns["node"][ip.handle]
            assert vol.arena.vmstat["oom_victims"] == 1
            assert bytes(await file.read(vol, ip, 0, 2)) == b"x\0"
            vol.arena.check()
