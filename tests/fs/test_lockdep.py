"""The lock-order validator on a volume: the real paths agree, and planted mistakes are found.

Each planted mistake is made once, on an idle volume with memory to spare: what is found is found
by the order, not by a wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from alloc import gfp, lockdep
from alloc.lockdep import FS_RECLAIM, Lockdep
from fs import file, namespace, rename, truncate
from fs.cache.inode import Inode
from fs.front.options import parse
from fs.log.transaction import Transaction
from fs.session import task_tree
from fs.volume import LOCK_ORDER, Volume
from tests import support
from tests.conftest import AllowLogs
from tests.fs.imagefiles import a_file, opened


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


async def test_a_transaction_without_its_scope_is_caught(
    dep: Lockdep, image: Path, allow_logs: AllowLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Demo D2: reclaim needs the lock that the allocator's caller holds."""
    allow_logs("possible circular locking")
    async with opened(image, 64 << 20) as vol, a_file(vol) as ip:
        await write_some(vol, ip)  # the flusher's order: under reclaim it takes the ILOCK
        with dep.holding(FS_RECLAIM):
            await vol.pages.write_range(ip.handle, 0, 1 << 20, integrity=True, budget=1 << 20)
        assert dep.reports == []
        monkeypatch.setattr("fs.log.transaction.gfp.nofs", lambda: gfp.Scope(0))
        async with vol.transaction("careless") as tp:
            await tp.lock_inodes(ip)
            vol.arena.put_folio(await vol.arena.alloc_folio(0))
        assert vol.arena.vmstat["alloc_waits"] == 0, "there was memory all the time"
    (report,) = dep.reports
    assert "ilock, then fs_reclaim" in report
    assert "test_a_transaction_without_its_scope_is_caught" in report
    assert "fs_reclaim, then ilock" in report


async def test_locks_turned_around_are_caught(
    dep: Lockdep, image: Path, allow_logs: AllowLogs
) -> None:
    allow_logs("possible (circular|recursive) locking")
    async with opened(image) as vol, a_file(vol, b"a") as a, a_file(vol, b"b") as b:
        assert a.ino < b.ino
        async with vol.transaction("first") as tp:
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
    assert "_map" in report


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
        async with Transaction(vol, "test", 0, write=True) as tp:
            await tp.lock_inodes(ip)
            await tp.lock_space()
            assert dep.held_by(trio.lowlevel.current_task()) == [f"ilock of {ip.ino}", "space"]
        assert dep.held_by(trio.lowlevel.current_task()) == []
