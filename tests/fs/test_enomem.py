"""Allocations that fail, at each place of a schedule: what ends where, and what is left behind.

The schedule touches most of the filesystem. Run with the N-th allocation failing, for every N, it
must end in one of two ways: the volume goes on and its image is sound, or a transaction was dirty,
then it is shut down and xfs_repair makes the image sound. Under `irix` it completes.
"""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from alloc import gfp
from alloc.arena import Arena, Slab
from alloc.policy import IRIX, AllocationFailed, parse
from fs import copyrange, enomem, fallocate, file, namespace, tmpfile, xattr
from fs.cache.incore import I4_IOLOCK, INODE_WORDS
from fs.cache.inode import Inode
from fs.cache.lock import acquire_word
from fs.errors import ShutDown
from fs.front import laneslow
from fs.log.transaction import Transaction
from fs.volume import Volume
from tests import support
from tests.conftest import AllowLogs
from tests.fs.imagefiles import IMAGES, SlowImage, a_file, opened

NO_MEMORY_LOGS = "memory allocation deadlock|page allocation failure"
DIRTY_SITE = "site=InodeCache._new_record"  # in a create: the new inode is on the image already
SHUTDOWN_LOGS = f"{NO_MEMORY_LOGS}|xfs_trans_cancel|Shutting down|unmounted after a shutdown"


@pytest.fixture(autouse=True)
def _no_memory(allow_logs: AllowLogs) -> None:
    """What the allocator says when it gives up is what all of these tests provoke."""
    allow_logs(NO_MEMORY_LOGS)


def drop_caches(vol: Volume) -> None:
    """Everything that is clean and that nobody uses, second chances included."""
    while vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 30):
        pass


class Schedule:
    """Changes of a volume, one after the other; a failure of one does not keep the next."""

    def __init__(self, vol: Volume) -> None:
        self.vol = vol
        self.failed: list[str] = []  # what did not come about

    async def do(self, what: str, work: Coroutine[Any, Any, Any]) -> Any:
        if self.vol.shut_down:
            work.close()
            return None
        try:
            return await work
        except AllocationFailed:
            self.failed.append(what)
        except (ShutDown, FileNotFoundError):
            assert self.failed or self.vol.shut_down, "what should be there was made"
        except OSError as error:
            absent = error.errno == errno.ENODATA and self.failed  # setting it had failed
            dead = self.vol.shut_down  # while it was waiting for the log
            assert absent or dead or error.errno == enomem.ERRNO, error
            self.failed.append(what)
        return None

    async def run(self) -> None:
        vol, do = self.vol, self.do
        root = await do("root", vol.inodes.get(vol.geo.root_ino))
        if root is None:
            return
        held = [root]
        steps = (self._file, self._attributes, self._names, self._temporary)
        for step in steps:
            held += await step(root)
            await do("sync", vol.flush_metadata())
            drop_caches(vol)
        for ip in held:
            vol.inodes.put(ip)

    async def _create(self, dp: Inode, name: bytes) -> Any:
        return await self.do("create", namespace.create(self.vol, dp, name, 0o644, 0, 0))

    async def _file(self, root: Inode) -> list[Inode]:
        vol, do = self.vol, self.do
        ip = await self._create(root, b"file")
        other = await self._create(root, b"copy")
        if ip is None or other is None:
            return [held for held in (ip, other) if held]
        await do("write", file.write(vol, ip, 0, b"x" * 300000))
        await do("write far", file.write(vol, ip, 10 << 20, b"y" * 300))
        await do("fsync", file.fsync(vol, ip))
        drop_caches(vol)
        await do("read", file.read(vol, ip, 0, 200000))
        await do("truncate", file.truncate(vol, ip, 200001))
        await do("copy", copyrange.copy(vol, ip, 0, other, 0, 196608))
        await do("copy on write", file.write(vol, other, 8192, b"w" * 70000))
        drop_caches(vol)
        await do("fsync", file.fsync(vol, other))
        for block in range(0, 40, 2):
            mode = fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE
            await do("punch", fallocate.fallocate(vol, other, block << 12, 4096, mode))
        mode = fallocate.INSERT_RANGE
        if other.size > 40960:
            await do("insert", fallocate.fallocate(vol, other, 40960, 8192, mode))
        await do("fsync", file.fsync(vol, other))
        return [ip, other]

    async def _attributes(self, root: Inode) -> list[Inode]:
        vol, do = self.vol, self.do
        ip = await self._create(root, b"attributes")
        if ip is None:
            return []
        for size in (100, 5000, 25000):  # in the inode, in a leaf, in blocks of its own
            await do("set", xattr.set(vol, ip, b"user.large", b"z" * size))
            drop_caches(vol)
        for number in range(20):
            await do("set", xattr.set(vol, ip, b"user.%d" % number, b"y" * 150 * number))
        drop_caches(vol)
        for number in range(0, 20, 2):
            await do("remove", xattr.remove(vol, ip, b"user.%d" % number))
        return [ip]

    async def _names(self, root: Inode) -> list[Inode]:
        vol, do = self.vol, self.do
        dp = await do("mkdir", namespace.mkdir(vol, root, b"dir", 0o755, 0, 0))
        link = await do("symlink", namespace.symlink(vol, root, b"link", b"t" * 600, 0, 0))
        if dp is None:
            return [link] if link else []
        for number in range(80):
            made = await self._create(dp, b"%05d" % number + b"q" * 60)
            if made:
                vol.inodes.put(made)
        await do("sync", vol.flush_metadata())
        drop_caches(vol)
        for number in range(0, 80, 3):
            await do("unlink", namespace.unlink(vol, dp, b"%05d" % number + b"q" * 60))
        await do("rename", namespace.rename(vol, root, b"link", dp, b"moved"))
        return [ip for ip in (dp, link) if ip]

    async def _temporary(self, root: Inode) -> list[Inode]:
        ip = await self.do("tmpfile", tmpfile.create(self.vol, root, 0o644, 0, 0))
        if ip:
            await self.do("write", file.write(self.vol, ip, 0, b"w" * 7000))
            self.vol.inodes.put(ip)
        return []


async def run_schedule(image: Path, policy: str) -> tuple[Volume, Schedule, int]:
    """The schedule under a policy; the volume is closed, under it, too. Counts the calls."""
    device = SlowImage(image)
    try:
        async with Volume.open(device, 16 << 20, paranoid=True) as vol:
            schedule = Schedule(vol)
            vol.arena.set_policy(parse(policy))
            await schedule.run()
        injector = vol.arena._injector
        return vol, schedule, injector.calls if injector else 0
    finally:
        device.close()


def assert_sound(image: Path, shut_down: bool) -> None:
    """Nothing is wrong; after a shutdown, when the kernel has replayed the log."""
    if shut_down:
        with support.kernel_mount(image, image.parent / "mnt"):
            pass
    support.assert_clean(image)


async def sweep(scratch: Path, first: int, step: int) -> tuple[int, int]:
    """The schedule with the N-th allocation failing, N from `first` on; runs and shutdowns."""
    fresh, image = support.mkfs(scratch), scratch / "used"
    runs = shutdowns = 0
    for nth in range(first, 10000, step):
        subprocess.run(["cp", "--sparse=always", fresh, image], check=True)
        vol, schedule, calls = await run_schedule(image, f"inject:nth={nth}")
        runs, shutdowns = runs + 1, shutdowns + vol.shut_down
        if calls < nth:
            break
        figures = vol.failures.figures()
        assert schedule.failed or figures, f"nth={nth}: somebody has handled it"
        assert vol.shut_down or vol.pages.dirty.nr_dirty == 0
        assert_sound(image, vol.shut_down)
    return runs, shutdowns


async def test_some_allocation_fails(
    scratch: Path, autojump_clock: trio.testing.MockClock, allow_logs: AllowLogs
) -> None:
    allow_logs(SHUTDOWN_LOGS)
    runs, shutdowns = await sweep(scratch, 3, 23)
    assert 0 < shutdowns < runs


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2, 3])
async def test_any_allocation_fails(
    first: int, scratch: Path, autojump_clock: trio.testing.MockClock, allow_logs: AllowLogs
) -> None:
    """Every one of them, in three parts."""
    allow_logs(SHUTDOWN_LOGS)
    runs, shutdowns = await sweep(scratch, first, 3)
    assert runs > 50
    assert 0 < shutdowns < runs


@pytest.mark.parametrize("policy", ["irix", "linux", "mayfail"])
async def test_with_memory_no_policy_makes_a_difference(
    policy: str, scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch)
    vol, schedule, _ = await run_schedule(image, policy)
    assert not vol.shut_down
    assert not schedule.failed
    assert not vol.failures.figures()
    support.assert_clean(image)


def take_all(vol: Volume, but: int) -> list[int]:
    """All memory there is, but so many pages; the pages that are held."""
    drop_caches(vol)
    taken = []
    while (pfn := vol.arena.try_alloc_folio(0, gfp.NOWAIT | gfp.MEMALLOC)) is not None:
        taken.append(pfn)
    for _ in range(but):
        vol.arena.put_folio(taken.pop())
    return taken


@pytest.mark.parametrize("policy", ["irix", "linux", "mayfail"])
@pytest.mark.parametrize("pages", [0, 140])  # min is 128
async def test_without_memory_it_does(
    policy: str,
    pages: int,
    scratch: Path,
    autojump_clock: trio.testing.MockClock,
    allow_logs: AllowLogs,
) -> None:
    """Somebody holds nearly all memory for a minute: who may wait completes, `mayfail` does not."""
    allow_logs(SHUTDOWN_LOGS)
    image = support.mkfs(scratch)
    device = SlowImage(image)
    async with Volume.open(device, 16 << 20, paranoid=True) as vol:
        schedule = Schedule(vol)
        taken = take_all(vol, pages)
        vol.arena.set_policy(parse(policy))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(schedule.run)
            await trio.sleep(60)
            for pfn in taken:
                vol.arena.put_folio(pfn)
    device.close()
    assert bool(schedule.failed) == (policy == "mayfail")
    assert policy == "mayfail" or not vol.shut_down
    assert (enomem.SHUTDOWN in vol.failures.figures()) == vol.shut_down
    assert_sound(image, vol.shut_down)


async def test_whoever_is_dirty_says_nofail(
    scratch: Path, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first change to the commit a transaction asks only for what cannot be refused."""
    open_ones: dict[trio.lowlevel.Task, list[Transaction]] = {}
    seen, plain = 0, set()
    enter, leave = Transaction.__aenter__, Transaction.__aexit__

    async def entered(tp: Transaction) -> Transaction:
        open_ones.setdefault(trio.lowlevel.current_task(), []).append(tp)
        return await enter(tp)

    async def left(tp: Transaction, *how: Any) -> None:
        await leave(tp, *how)
        open_ones[trio.lowlevel.current_task()].remove(tp)

    def watched(alloc: Any, at: int) -> Any:
        async def asked(self: Any, *args: Any) -> int:
            nonlocal seen
            if any(tp.dirty for tp in open_ones.get(trio.lowlevel.current_task(), ())):
                seen += 1
                if len(args) <= at or not args[at] & gfp.NOFAIL:
                    plain.add(sys._getframe(1).f_code.co_qualname)
            return int(await alloc(self, *args))

        return asked

    monkeypatch.setattr(Transaction, "__aenter__", entered)
    monkeypatch.setattr(Transaction, "__aexit__", left)
    monkeypatch.setattr(Arena, "alloc_folio", watched(Arena.alloc_folio, 1))
    monkeypatch.setattr(Slab, "alloc", watched(Slab.alloc, 0))
    await run_schedule(support.mkfs(scratch), "irix")
    assert seen > 50
    assert not plain


async def test_a_dirty_transaction_says_what_xfs_says(
    scratch: Path, autojump_clock: trio.testing.MockClock, allow_logs: AllowLogs
) -> None:
    allow_logs(SHUTDOWN_LOGS)
    image = support.mkfs(scratch)
    vol, schedule, _ = await run_schedule(image, f"inject:nth=3,{DIRTY_SITE}")
    assert vol.shut_down
    assert schedule.failed == ["create"]
    assert vol.failures.figures().keys() == {"shutdown"}
    said = "\n".join(allow_logs.seen)
    assert "Internal error xfs_trans_cancel at line " in said
    assert "of file fs/cache/inode.py.  Caller create" in said
    assert "Corruption of in-memory data (0x8) detected" in said
    assert "Shutting down filesystem." in said
    assert "Please unmount the filesystem and rectify the problem(s)" in said
    assert_sound(image, True)


# -- requests ----------------------------------------------------------------------------------


async def test_a_write_answers_what_it_copied(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Only a write that copied nothing is told that there is no memory."""
    image, content = support.mkfs(scratch), bytes(range(256)) * 256
    async with opened(image) as vol, a_file(vol) as ip:
        vol.pages.order_max = 0  # a larger one would be done without
        vol.arena.set_policy(parse("inject:nth=5,site=_new_folio"))
        done = await file.write(vol, ip, 0, content)
        assert done == 4 * 4096
        assert ip.size == done
        assert vol.failures.counts[enomem.REPLY].total() == 1
        vol.arena.set_policy(parse("inject:nth=1,site=_new_folio"))
        with pytest.raises(AllocationFailed):
            await file.write(vol, ip, done, content[done:])
        assert await file.write(vol, ip, done, content[done:]) == len(content) - done
        assert await file.read(vol, ip, 0, len(content)) == content
    support.assert_clean(image)


async def test_so_does_one_that_a_lane_began(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        assert acquire_word(vol.iolocks.words, ip.handle * INODE_WORDS + I4_IOLOCK, False)  # a lane
        vol.arena.set_policy(parse("inject:nth=1,site=_new_folio"))
        assert await laneslow._go_on(vol, ip, 0, memoryview(b"x" * 70000), 65536) == 65536
        assert vol.failures.counts[enomem.REPLY].total() == 1
        assert vol.iolocks.try_acquire(ip.handle, False)
        vol.iolocks.release(ip.handle)
    support.assert_clean(image)


# -- write-back --------------------------------------------------------------------------------


async def test_what_could_not_be_written_stays_dirty(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A write-back without memory: fsync says so, nothing is lost, the next one writes it."""
    image, content = support.mkfs(scratch), b"kept" * 50000
    async with opened(image) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, content)
        dirty = vol.pages.dirty.nr_dirty
        vol.arena.set_policy(parse("inject:p=1,site=BufCache"))
        with pytest.raises(OSError, match="failed earlier") as told:
            await file.fsync(vol, ip)
        assert told.value.errno == errno.ENOMEM
        assert vol.pages.dirty.nr_dirty == dirty
        assert vol.failures.figures().keys() == {"writeback"}
        vol.arena.set_policy(IRIX)
        await file.fsync(vol, ip)
        assert vol.pages.dirty.nr_dirty == 0
        drop_caches(vol)
        assert await file.read(vol, ip, 0, len(content)) == content
    support.assert_clean(image)


async def test_the_flusher_goes_on(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    """The error of a write-back that nobody waited for is told once; the data is written later."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * 100000)
        vol.arena.set_policy(parse("inject:p=1,site=BufCache"))
        await trio.sleep(60)
        assert vol.failures.counts[enomem.WRITEBACK]
        assert vol.pages.dirty.nr_dirty
        vol.arena.set_policy(IRIX)
        await trio.sleep(60)
        assert vol.pages.dirty.nr_dirty == 0
        with pytest.raises(OSError, match="failed earlier"):
            await file.fsync(vol, ip)
        await file.fsync(vol, ip)
    support.assert_clean(image)


async def test_what_needs_clean_data_does_not_begin(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Extents are not shifted while the data that they shall hold is still dirty."""
    image, content = support.mkfs(scratch), bytes(range(256)) * 256
    async with opened(image) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, content)
        vol.arena.set_policy(parse("inject:nth=1,site=BufCache"))
        with pytest.raises(OSError, match="write-back failed"):
            await fallocate.fallocate(vol, ip, 0, 8192, fallocate.COLLAPSE_RANGE)
        assert await file.read(vol, ip, 0, 1 << 20) == content
        await fallocate.fallocate(vol, ip, 0, 8192, fallocate.COLLAPSE_RANGE)
        assert await file.read(vol, ip, 0, 1 << 20) == content[8192:]
    support.assert_clean(image)


# -- the background ----------------------------------------------------------------------------


async def test_inodegc_tries_again(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol:
        root = await vol.inodes.get(vol.geo.root_ino)
        async with a_file(vol):
            await namespace.unlink(vol, root, b"file")
            await vol.flush_metadata()
            drop_caches(vol)  # so it cannot be freed at once
        vol.inodes.put(root)
        vol.arena.set_policy(parse("inject:nth=1,site=xfs_buf"))  # nothing has changed then
        await vol.drain_inactive()
        assert vol.failures.figures().keys() == {"retry"}
    support.assert_clean(image)


async def test_insisting_ends(
    scratch: Path, autojump_clock: trio.testing.MockClock, allow_logs: AllowLogs
) -> None:
    """Work that never gets its memory is given up, in the end, by a shutdown that says why."""
    allow_logs(SHUTDOWN_LOGS)
    device = SlowImage(support.mkfs(scratch))
    calls = []

    async def never() -> None:
        calls.append(trio.current_time())
        raise AllocationFailed("order:0", gfp.KERNEL, "test")

    async with Volume.open(device, 16 << 20) as vol:
        await enomem.insist(vol, never, "the test")
        assert len(calls) == enomem.TRIES
        assert vol.shutdown_reason == f"the test: no memory after {enomem.TRIES} tries"
        assert vol.failures.counts[enomem.RETRY].total() == enomem.TRIES
    device.close()


async def test_an_unmount_insists(scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    """Half of all allocations fail: everything is written nevertheless, at a few tries each."""
    image, content = support.mkfs(scratch), b"written" * 30000
    async with opened(image) as vol:
        async with a_file(vol) as ip:
            await file.write(vol, ip, 0, content)
        vol.arena.set_policy(parse("inject:p=0.5,seed=1,site=BufCache"))
    async with opened(image) as vol, a_file(vol) as ip:
        assert await file.read(vol, ip, 0, len(content)) == content
    support.assert_clean(image)


# -- blocks larger than pages ------------------------------------------------------------------


async def checkerboard(vol: Volume) -> list[int]:
    """Have no sixteen free pages side by side, though most are free; the pages that are held."""
    await vol.flush_metadata()  # so that no block is a buffer's, which may come back
    taken = take_all(vol, 0)
    for pfn in taken:
        if pfn % 16:
            vol.arena.put_folio(pfn)
    return [pfn for pfn in taken if pfn % 16 == 0]


@pytest.mark.parametrize("policy", ["linux", "irix"])
async def test_a_large_block_in_fragmented_memory(
    policy: str, scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Linux gives up on the folio of a 64 KiB block, the smallest there is; irix waits for it."""
    image, wrote = support.mkfs(scratch, *IMAGES["64k"]), trio.Event()

    async def write(vol: Volume, ip: Inode) -> None:
        assert await file.write(vol, ip, 0, b"x") == 1
        wrote.set()

    async with opened(image) as vol, a_file(vol) as ip:
        held = await checkerboard(vol)
        assert vol.arena.free_pages > vol.arena.nr_pages // 2
        vol.arena.set_policy(parse(policy))
        if policy == "linux":
            with pytest.raises(AllocationFailed, match="order:4, mode:KERNEL"):
                await file.write(vol, ip, 0, b"x")
        async with trio.open_nursery() as nursery:
            vol.arena.set_policy(IRIX)
            nursery.start_soon(write, vol, ip)
            await trio.sleep(10)
            assert not wrote.is_set()
            for pfn in held:
                vol.arena.put_folio(pfn)
    support.assert_clean(image)


@pytest.mark.parametrize("areas", [True, False])
async def test_cleaning_goes_on_in_fragmented_memory(
    areas: bool, scratch: Path, autojump_clock: trio.testing.MockClock, allow_logs: AllowLogs
) -> None:
    """Metadata needs pages, not blocks; if it did write-back would wait for itself, for ever."""
    allow_logs("possible memory allocation deadlock")
    image = support.mkfs(scratch, *IMAGES["64k"])
    async with opened(image, 32 << 20) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * (1 << 20))
        held = await checkerboard(vol)
        if not areas:
            vol.arena.vmalloc._free.clear()
        assert vol.pages.dirty.nr_dirty
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vol.flusher.sync)
            await trio.sleep(30)
            waits = vol.pages.dirty.nr_dirty + vol.pages.dirty.nr_writeback
            for pfn in held:
                vol.arena.put_folio(pfn)
        assert (waits == 0) == areas
    support.assert_clean(image)


async def test_nofail_waits_under_linux(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Metadata for which there are no areas: a transaction says NOFAIL, and waits for a block."""
    image, made = support.mkfs(scratch, *IMAGES["64k"]), []

    async def fill(vol: Volume, root: Inode) -> None:
        for number in range(12):
            name = b"%d" % number + b"n" * 60
            vol.inodes.put(await namespace.create(vol, root, name, 0o644, 0, 0))
            made.append(number)

    async with opened(image) as vol:
        root = await vol.inodes.get(vol.geo.root_ino)
        held = await checkerboard(vol)
        vol.arena.vmalloc._free.clear()
        vol.arena.set_policy(parse("linux"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fill, vol, root)
            await trio.sleep(10)
            assert len(made) < 12
            for pfn in held:
                vol.arena.put_folio(pfn)
        assert len(made) == 12
        assert not vol.failures.figures()
        vol.inodes.put(root)
    support.assert_clean(image)


# -- what is left behind -----------------------------------------------------------------------


def objects(vol: Volume) -> dict[str, int]:
    return {cache.name: cache.nr_objects for cache in vol.arena.slab_caches}


@pytest.mark.parametrize(
    ("site", "nth"),
    [("BufCache._new", 1), ("_new_pages", 1), ("_new_record", 1), ("_new_record", 2)],
)
async def test_a_failed_read_leaves_nothing(
    site: str,
    nth: int,
    scratch: Path,
    autojump_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No memory is lost, and whoever waited for the same inode or block gets it.

    Inode clusters have four pages; for these to fail memory must be in pieces.
    """
    results: list[str] = []

    async def look(vol: Volume, ino: int) -> None:
        try:
            vol.inodes.put(await vol.inodes.get(ino))
            results.append("found")
        except AllocationFailed:
            results.append("failed")

    image = support.mkfs(scratch)
    async with opened(image, pause_s=0.1) as vol:
        async with a_file(vol) as ip:
            ino = ip.ino
        await vol.flush_metadata()
        drop_caches(vol)
        before = objects(vol), vol.arena.free_pages
        monkeypatch.setattr(vol.arena, "try_alloc_folio", lambda *_: None)
        vol.arena.set_policy(parse(f"inject:nth={nth},site={site}"))
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(look, vol, ino)
                nursery.start_soon(look, vol, ino)
        assert sorted(results) == ["failed", "found"]
        drop_caches(vol)
        assert (objects(vol), vol.arena.free_pages) == before
        vol.arena.check()


async def test_a_failed_folio_leaves_nothing(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Neither without a folio nor without a radix node is anything taken or promised."""
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        for node in vol.pages._spare[: vol.pages._nr_spare].tolist():
            vol.pages.nodes.free(node)
        vol.pages._nr_spare = 0
        before = vol.arena.free_pages, vol.space.delalloc
        for site in ("_new_folio", "_refill"):
            vol.arena.set_policy(parse(f"inject:nth=1,site={site}"))
            with pytest.raises(AllocationFailed, match=site):
                await file.write(vol, ip, 0, b"x" * 4096)
        vol.arena.set_policy(IRIX)
        assert (vol.arena.free_pages, vol.space.delalloc) == before
        assert await file.write(vol, ip, 0, b"x" * 4096) == 4096


def test_groups() -> None:
    """A nursery's group of nothing but failed allocations is one; with anything else it is not."""
    failed = AllocationFailed("order:4", gfp.KERNEL, "test")
    inner = ExceptionGroup("inner", [failed, AllocationFailed("order:5", gfp.KERNEL, "test")])
    look: Callable[[BaseException], Any] = enomem.failed_allocation
    assert look(failed) is failed
    assert look(ExceptionGroup("outer", [inner])) is failed
    assert look(ExceptionGroup("outer", [inner, OSError()])) is None
    assert look(OSError(errno.ENOMEM, "the host's")) is None
