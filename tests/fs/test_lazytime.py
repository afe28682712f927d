"""lazytime: how often inodes are written, and what the image knows of their stamps meanwhile."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing

from fs import file, namespace
from fs.front.atime import AccessTimes
from fs.truncate import truncate
from fs.volume import Volume
from fs.xfs import inobt
from tests import support
from tests.fs.imagefiles import SlowImage, a_file
from tools.targets import find_tool

MINUTE_S = 60.0
LATER_S = 100.0  # dirty data is written after 35 s at most, metadata after another 30


def stamps(image: Path, ino: int) -> str:
    """An inode's times, as xfs_db sees them on the device."""
    words = ["-c", f"inode {ino}", "-c", "print core.atime core.mtime core.ctime"]
    command = [find_tool("xfs_db"), "-r", *words, str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "core.mtime.nsec" in done.stdout, done
    return done.stdout


def inode_writes(vol: Volume, device: SlowImage, ino: int) -> int:
    """How often the cluster of an inode went to the device."""
    daddr, _, _ = inobt.imap(vol.geo, ino)
    return sum(at <= daddr << 9 < at + size for at, size in device.writes)


@pytest.mark.parametrize("lazy", [False, True], ids=["exact", "lazy"])
async def test_how_often_the_inode_of_a_file_is_written(
    lazy: bool, scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Its blocks are written over once every two minutes, and each time reach the device."""
    device = SlowImage(image := support.mkfs(scratch))
    async with Volume.open(device, 16 << 20) as vol, a_file(vol) as ip:
        vol.flusher.lazytime = lazy
        await file.write(vol, ip, 0, b"a" * 9000)
        await file.fsync(vol, ip)
        await vol.flush_metadata()
        known = stamps(image, ip.ino)
        device.writes.clear()
        for _ in range(10):
            await file.write(vol, ip, 0, b"b" * 9000)
            await trio.sleep(2 * MINUTE_S)
            assert vol.pages.dirty.nr_dirty == 0
        assert inode_writes(vol, device, ip.ino) == (0 if lazy else 10)
        assert (stamps(image, ip.ino) == known) == lazy, "what a crash leaves"
        await file.fsync(vol, ip)
        await vol.flush_metadata()
        assert inode_writes(vol, device, ip.ino) == (1 if lazy else 10)
        assert stamps(image, ip.ino) != known
        assert vol.flusher.nr_listed == 0
    device.close()
    support.assert_clean(image)


@pytest.mark.parametrize("how", ["eviction", "change", "sync", "age", "unmount"])
async def test_what_has_stamps_written(
    how: str, scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    device = SlowImage(image := support.mkfs(scratch))
    async with Volume.open(device, 16 << 20) as vol:
        vol.flusher.lazytime = True
        async with a_file(vol) as ip:
            ino = ip.ino
            await file.write(vol, ip, 0, b"a" * 9000)
            await file.fsync(vol, ip)
            await vol.flush_metadata()
            known = stamps(image, ino)
            await file.write(vol, ip, 0, b"b" * 9000)
            await trio.sleep(LATER_S)
            assert stamps(image, ino) == known
            if how == "change":
                await truncate(vol, ip, 20000)
            elif how == "sync":
                await vol.flusher.sync()
            elif how == "age":
                await trio.sleep(vol.flusher.stamps_expire_s)
            if how not in ("eviction", "unmount"):
                await trio.sleep(LATER_S)
                assert stamps(image, ino) != known
        if how == "eviction":
            assert vol.pages.busy(ip.handle)
            await trio.sleep(LATER_S)
            assert stamps(image, ino) != known
        assert vol.pages.busy(ip.handle) == (how == "unmount")
    device.close()
    assert stamps(image, ino) != known
    support.assert_clean(image)


async def test_access_times_of_directories_wait_too(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Until the directory is used no more, or is none any more."""
    device = SlowImage(image := support.mkfs(scratch))
    async with Volume.open(device, 16 << 20) as vol:
        vol.flusher.lazytime = True
        times = AccessTimes(vol, "strictatime")
        root = await vol.inodes.get(vol.geo.root_ino)
        dp = await namespace.mkdir(vol, root, b"dir", 0o755, 0, 0)
        await trio.sleep(LATER_S)
        known = stamps(image, dp.ino)
        await times.touch(dp, directory=True)
        await trio.sleep(LATER_S)
        assert stamps(image, dp.ino) == known
        vol.inodes.put(dp)
        await trio.sleep(LATER_S)
        assert stamps(image, dp.ino) != known
        dp = await namespace.lookup(vol, root, b"dir")
        await times.touch(dp, directory=True)
        await namespace.rmdir(vol, root, b"dir")
        vol.inodes.put(dp)
        await vol.drain_inactive()
        assert vol.flusher.nr_listed == 0
        vol.inodes.put(root)
    device.close()
    support.assert_clean(image)
