"""The lock-order validator on a volume: the real paths agree, and planted mistakes are found.

Each planted mistake is made once, on an idle volume with memory to spare: what is found is found
by the order, not by a wait.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Iterator
from pathlib import Path

import pytest
import trio

from alloc import gfp, lockdep
from alloc.lockdep import FS_RECLAIM, Lockdep
from alloc.page import LOCKED
from fs import file, mapread, namespace, rename, truncate
from fs.cache import readahead
from fs.cache.inode import Inode
from fs.device.base import Views
from fs.front import laneslow
from fs.front.options import parse
from fs.log.transaction import Transaction
from fs.session import task_tree
from fs.volume import LOCK_ORDER, Volume
from tests import support
from tests.conftest import AllowLogs
from tests.fs.imagefiles import SlowImage, a_file, opened


@pytest.fixture
def dep() -> Iterator[Lockdep]:
    """A validator of this test's own: nothing but what happens here."""
    validator = Lockdep()
    with lockdep.using(validator):
        yield validator


@pytest.fixture
def image(scratch: Path) -> Path:
    return support.mkfs(scratch)


async def write_some(vol: Volume, ip: Inode, offset: int = 0) -> None:
    await file.write(vol, ip, offset, b"x" * 9000)
    await file.fsync(vol, ip)


async def test_ordinary_use_is_in_the_documented_order(dep: Lockdep, image: Path) -> None:
    async with opened(image) as vol, a_file(vol) as ip:
        root = await vol.inodes.get(vol.geo.root_ino)
        there = await namespace.mkdir(vol, root, b"there", 0o755, 0, 0)
        await write_some(vol, ip)
        await file.read(vol, ip, 0, 9000)
        await vol.flusher.sync()
        await rename.rename(vol, root, b"file", there, b"moved", 0)
        await truncate.truncate(vol, ip, 5000)
        with dep.holding(FS_RECLAIM):
            await vol.flush_metadata()
        vol.inodes.put(there)
        vol.inodes.put(root)
    assert dep.reports == []
    seen = set(dep.orders())
    assert {("rename", "iolock"), ("ilock", "space"), ("iolock", FS_RECLAIM)} <= seen
    assert {("ilock", "buf"), ("space", "buf"), ("iolock", "metadata")} <= seen
    assert {("iolock", "folio"), ("iolock", "writeback"), ("writeback", "ilock")} <= seen
    print(f"\n  lockdep: {len(seen)} orders: {sorted(seen)}")


async def test_each_operation_wants_what_it_may_wait_for(dep: Lockdep, image: Path) -> None:
    """Under a lock of the test's own each shows as an order, though nothing is waited for."""
    numbers = itertools.count()

    async def wanted(work: Awaitable[object]) -> set[str]:
        name = f"test {next(numbers)}"
        with dep.holding(name):
            await work
        return {after for before, after in dep.orders() if before == name}

    async with opened(image) as vol, a_file(vol) as ip:
        root = await vol.inodes.get(vol.geo.root_ino)
        there = await namespace.mkdir(vol, root, b"there", 0o755, 0, 0)
        await write_some(vol, ip)
        assert "iolock" in await wanted(file.read(vol, ip, 0, 1))
        assert "iolock" in await wanted(file.write(vol, ip, 0, b"x"))
        assert await wanted(mapread.read(vol, ip, 0, 1)) == {"ilock"}
        assert await wanted(vol.admit("test")) == {"metadata"}
        assert await wanted(vol.pages.throttle.balance(ip.handle)) == {FS_RECLAIM}
        assert await wanted(vol.inodes.get(ip.ino)) == {"inode load"}
        vol.inodes.put(ip)
        assert {"inode flush", "buf writer"} <= await wanted(vol.flush_metadata())
        assert {"rename", "iolock"} <= await wanted(
            rename.rename(vol, root, b"file", there, b"moved")
        )
        pfn = vol.pages.find(ip.handle, 0)
        assert await wanted(vol.pages.wait(pfn, LOCKED)) == {"folio"}
        assert await wanted(truncate.drop_folios(vol, ip, 0)) == {"folio", "writeback"}
        await truncate.truncate(vol, ip, 100_000)
        assert "folio" in await wanted(readahead.fill(vol, ip, 65536, 69632)), "also for a hole"
        assert "writeback" in await wanted(truncate.write_out(vol, ip, 0, 4096))
        vol.inodes.put(there)
        vol.inodes.put(root)
    assert dep.reports == []


class Watched(SlowImage):
    """An image that notes what the running task holds when it reads and writes."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.held: dict[str, set[str]] = {"read": set(), "write": set()}

    def _note(self, what: str) -> None:
        names = [lock.split(" of ")[0] for lock in lockdep.held_by(trio.lowlevel.current_task())]
        self.held[what].add(", ".join(names))

    async def read(self, offset: int, views: Views) -> None:
        self._note("read")
        await super().read(offset, views)

    async def write(self, offset: int, views: Views) -> None:
        self._note("write")
        await super().write(offset, views)


async def test_who_transfers_holds_what_others_would_wait_for(dep: Lockdep, image: Path) -> None:
    device = Watched(image)
    async with Volume.open(device, 16 << 20) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * 9000)
        device.held["write"].clear()
        vol.flusher.clean_some()
        done = vol._metadata_done
        while vol.pages.dirty.nr_dirty or vol.pages.dirty.nr_writeback:
            await trio.sleep(0.001)
        assert device.held["write"] == {"writeback"}
        vol.wake_metadata()
        await done.wait()
        log = ""  # its task holds nothing
        assert device.held["write"] == {"writeback", log, "fs_reclaim, metadata, buf writer"}
        await truncate.drop_folios(vol, ip, 0)
        device.held["read"].clear()
        await file.read(vol, ip, 0, 9000)
        assert device.held["read"] == {"iolock, folio"}
        await truncate.drop_folios(vol, ip, 0)
        device.held["read"].clear()
        await file.write(vol, ip, 10, b"x")
        assert device.held["read"] == {"iolock, folio"}
    device.close()
    async with Volume.open(again := Watched(image), 16 << 20) as vol:
        again.held["read"].clear()
        async with a_file(vol):
            pass
        assert "inode load, buf" in again.held["read"]
    again.close()
    seen = set(dep.orders())
    assert {(FS_RECLAIM, "writeback"), (FS_RECLAIM, "inode flush")} <= seen
    assert {("metadata", "inode flush"), ("metadata", "buf writer")} <= seen


@pytest.mark.parametrize("cleaned", [True, False], ids=["cleaned", "nobody cleaned yet"])
async def test_a_transaction_without_its_scope_is_caught(
    dep: Lockdep,
    image: Path,
    allow_logs: AllowLogs,
    monkeypatch: pytest.MonkeyPatch,
    cleaned: bool,
) -> None:
    """Demo D2: reclaim needs the lock that the allocator's caller holds."""
    allow_logs("possible circular locking")
    async with opened(image, 64 << 20) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * 9000)
        if cleaned:
            await vol.flusher.clean(ip.handle)
        assert dep.reports == []
        monkeypatch.setattr("fs.log.transaction.gfp.nofs", lambda: gfp.Scope(0))
        async with vol.transaction("setattr") as tp:
            await tp.lock_inodes(ip)
            vol.arena.put_folio(await vol.arena.alloc_folio(0))
        assert vol.arena.vmstat["alloc_waits"] == 0, "there was memory all the time"
    (report,) = (text for text in dep.reports if "ilock, then fs_reclaim" in text)
    assert any("log space, then fs_reclaim" in text for text in dep.reports)
    assert "test_a_transaction_without_its_scope_is_caught" in report
    assert "fs_reclaim, then ilock" in report
    assert ("flusher.py" in report) == cleaned
    assert ("by declaration" in report) != cleaned


async def test_locks_turned_around_are_caught(
    dep: Lockdep, image: Path, allow_logs: AllowLogs
) -> None:
    allow_logs("possible (circular|recursive) locking")
    async with opened(image) as vol, a_file(vol, b"a") as a, a_file(vol, b"b") as b:
        assert a.ino < b.ino
        async with vol.transaction("setattr") as tp:
            await tp.lock_inodes(b, a)  # one call: it sorts
            await tp.lock_space()
        async with vol.iolock(a), vol.iolock(b):
            pass
        assert dep.reports == []
        async with vol.iolock(b), vol.iolock(a):
            pass
        assert f"iolock of {b.ino} is held and iolock of {a.ino} is wanted" in dep.reports[0]
        await vol.space_lock.acquire(0, shared=False)
        async with vol.ilocks.locked(a.handle, shared=True):
            pass
        vol.space_lock.release(0)
    assert len(dep.reports) == 2
    assert "space, then ilock" in dep.reports[1]
    assert "lock_space" in dep.reports[1]


async def test_waiting_for_write_back_under_the_ilock_is_caught(
    dep: Lockdep, image: Path, allow_logs: AllowLogs
) -> None:
    """Write-back needs the ILOCK to end; here nothing is under write-back."""
    allow_logs("possible circular locking")
    async with opened(image) as vol, a_file(vol) as ip:
        await write_some(vol, ip)
        await truncate.drop_folios(vol, ip, 0)
        assert dep.reports == []
        async with vol.ilocks.locked(ip.handle, shared=True):
            await truncate.drop_folios(vol, ip, 0)
    (report,) = dep.reports
    assert "ilock, then writeback" in report
    assert "writeback, then ilock" in report
    assert " _map" in report


async def test_a_dump_says_what_tasks_hold(dep: Lockdep, image: Path) -> None:
    async with opened(image) as vol, a_file(vol) as ip, vol.iolock(ip):
        me = trio.lowlevel.current_task()
        assert f"(holds iolock of {ip.ino})" in task_tree(me)[0]
    assert "holds" not in task_tree(me)[0]


async def test_a_lock_got_by_trying_or_from_a_lane_is_held(
    dep: Lockdep, image: Path, allow_logs: AllowLogs
) -> None:
    allow_logs("possible recursive locking")
    me = trio.lowlevel.current_task()
    async with opened(image) as vol, a_file(vol, b"a") as a, a_file(vol, b"b") as b:
        assert vol.ilocks.try_acquire(b.handle, False)
        assert dep.held_by(me) == [f"ilock of {b.ino}"]
        async with vol.ilocks.locked(a.handle, shared=False):
            assert len(dep.reports) == 1, "who holds by trying must not wait for a lower one"
        vol.ilocks.release(b.handle)
        with lockdep.using(None):  # a lane, of which the validator is not told
            assert vol.iolocks.try_acquire(b.handle, False)
        assert dep.held_by(me) == []
        vol.iolocks.adopt(b.handle)
        assert dep.held_by(me) == [f"iolock of {b.ino}"]
        vol.iolocks.release(b.handle)
        assert dep.held_by(me) == []


async def test_a_write_that_a_lane_began_goes_on_under_its_lock(image: Path) -> None:
    fresh = Lockdep()
    async with opened(image) as vol, a_file(vol) as ip:
        with lockdep.using(None):  # the lane
            assert vol.iolocks.try_acquire(ip.handle, False)
        with lockdep.using(fresh):
            assert await laneslow._go_on(vol, ip, 0, memoryview(b"x" * 5000), 0) == 5000
            assert fresh.held_by(trio.lowlevel.current_task()) == []
    assert ("iolock", FS_RECLAIM) in fresh.orders()


async def test_a_cancelled_waiter_holds_nothing(dep: Lockdep, image: Path) -> None:
    async with opened(image) as vol, a_file(vol) as ip, trio.open_nursery() as nursery:
        waiter: list[trio.lowlevel.Task] = []

        async def wait() -> None:
            waiter.append(trio.lowlevel.current_task())
            with trio.move_on_after(0.01):
                await vol.iolocks.acquire(ip.handle, False)
            assert dep.held_by(waiter[0]) == []

        async with vol.iolock(ip):
            nursery.start_soon(wait)
            await trio.sleep(0.05)
            assert dep.held_by(trio.lowlevel.current_task()) == [f"iolock of {ip.ino}"]


async def test_bringing_something_in_core_lets_nobody_wait_for_cleaning(
    dep: Lockdep, image: Path
) -> None:
    """A cleaner may wait for the same block, a transaction for the same inode."""
    async with opened(image) as vol, a_file(vol) as ip:
        await write_some(vol, ip)
    async with opened(image) as vol, a_file(vol) as ip:
        await write_some(vol, ip, 9000)
    seen = set(dep.orders())
    assert ("inode load", "buf") in seen
    assert ("inode load", FS_RECLAIM) not in seen
    assert ("buf", FS_RECLAIM) not in seen


def test_the_documented_order_is_the_declared_one() -> None:
    text = (Path(__file__).parents[2] / "docs/concurrency.md").read_text(encoding="utf-8")
    assert " -> ".join(f"`{name}`" for name in LOCK_ORDER) in text


def test_the_option() -> None:
    assert parse(["lockdep"]).lockdep
    assert not parse([]).lockdep


async def test_a_transaction_is_no_holder_after_its_end(dep: Lockdep, image: Path) -> None:
    async with opened(image) as vol, a_file(vol) as ip:
        async with Transaction(vol, "setattr", 0, write=True) as tp:
            await tp.lock_inodes(ip)
            await tp.lock_space()
            held = ["log space", f"ilock of {ip.ino}", "space"]
            assert dep.held_by(trio.lowlevel.current_task()) == held
        assert dep.held_by(trio.lowlevel.current_task()) == []
