"""Shutdown: its three kinds as XFS has them, and a log that cannot be written; the kernel as judge.

What was forced is there, what was only in memory is not, and the checkers find nothing either way.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Awaitable
from pathlib import Path

import pytest
import trio

from fs import file, ioctl, namespace
from fs.device.faulty import Faults, Faulty
from fs.device.image import ImageFile
from fs.errors import ShutDown
from fs.volume import Volume
from fs.xfs import layout as L
from tests import support
from tests.conftest import AllowLogs

DOWN_LOGS = "Shutting down filesystem|unmounted after a shutdown"
DATA = b"x" * 10000


async def make(vol: Volume, *names: bytes) -> None:
    root = await vol.inodes.get(vol.geo.root_ino)
    for name in names:
        ip = await namespace.create(vol, root, name, 0o644, 0, 0)
        await file.write(vol, ip, 0, DATA)
        vol.inodes.put(ip)
    vol.inodes.put(root)


async def go_down(vol: Volume, flags: int) -> None:
    word = ctypes.c_uint32(flags)
    caller = ioctl.Caller(uid=0, pid=os.getpid(), argument=ctypes.addressof(word))
    root = await vol.inodes.get(vol.geo.root_ino)
    await ioctl.run(vol, root, ioctl.GOINGDOWN, b"", caller)
    vol.inodes.put(root)


async def fails(work: Awaitable[object]) -> bool:
    """Whether it says EIO."""
    try:
        await work
    except OSError as error:
        return error.errno == errno.EIO
    return False


def names_by_kernel(image: Path, scratch: Path) -> dict[str, bytes]:
    """What is in the root after the kernel has recovered the image."""
    with support.kernel_mount(image, scratch / "mnt") as there:
        found = {path.name: path.read_bytes() for path in there.iterdir()}
    support.assert_clean(image)
    return found


async def names_by_us(image: Path) -> set[bytes]:
    device = ImageFile(str(image))
    async with Volume.open(device, 16 << 20) as vol:
        root = await vol.inodes.get(vol.geo.root_ino)
        found = set()
        for name in (b"forced", b"late"):
            try:
                vol.inodes.put(await namespace.lookup(vol, root, name))
                found.add(name)
            except FileNotFoundError:
                pass
        vol.inodes.put(root)
    device.close()
    support.assert_clean(image)
    return found


KINDS = {
    "default": (ioctl.GOING_DEFAULT, {"forced": DATA, "late": DATA}),
    "log flushed": (ioctl.GOING_LOGFLUSH, {"forced": DATA, "late": b""}),
    "log not flushed": (ioctl.GOING_NOLOGFLUSH, {"forced": DATA}),
}


@pytest.mark.parametrize(("flags", "expected"), KINDS.values(), ids=KINDS.keys())
@support.needs_root
async def test_what_a_shutdown_keeps(
    flags: int, expected: dict[str, bytes], scratch: Path, allow_logs: AllowLogs
) -> None:
    allow_logs(DOWN_LOGS)
    image = support.mkfs(scratch)
    device = ImageFile(str(image))
    async with Volume.open(device, 16 << 20) as vol:
        await make(vol, b"forced")
        await vol.flusher.sync()
        await vol.xlog.force()
        await make(vol, b"late")
        await go_down(vol, flags)
        assert await fails(make(vol, b"none"))
    device.close()
    assert any("User initiated shutdown received." in line for line in allow_logs.seen)
    copy = scratch / "copy"
    copy.write_bytes(image.read_bytes())
    assert await names_by_us(copy) == {name.encode() for name in expected}
    assert names_by_kernel(image, scratch) == expected


@pytest.mark.parametrize("fault", ["write", "flush", "torn"])
@support.needs_root
async def test_a_log_that_cannot_be_written(
    fault: str, scratch: Path, allow_logs: AllowLogs
) -> None:
    """XFS's words, and EIO for whoever waits for the log or for space in it; nothing hangs."""
    allow_logs(DOWN_LOGS)
    image = support.mkfs(scratch)
    inner = ImageFile(str(image))
    device = Faulty(inner, Faults(seed=3))
    told = []
    with trio.fail_after(60):
        async with Volume.open(device, 16 << 20) as vol:
            await make(vol, b"forced")
            await vol.flusher.sync()
            await vol.xlog.force()
            await make(vol, b"late")
            first = vol.geo.fsb_to_bytes(vol.geo.log_start)
            device.faults.first, device.faults.last = first, first + _log_bytes(vol) - 1
            setattr(device.faults, fault, 1.0)
            promised = []  # all the room that the log has
            while ticket := vol.xlog.grant.try_now("create", 100000):
                promised.append(ticket)

            async def waits(work: Awaitable[object]) -> None:
                told.append(await fails(work))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(waits, vol.xlog.force())
                nursery.start_soon(waits, vol.xlog.force())
                nursery.start_soon(waits, vol.xlog.reserve("create"))
            for ticket in promised:
                ticket.release()
            assert vol.shut_down
            assert await fails(make(vol, b"none"))
            with pytest.raises(ShutDown):
                await vol.xlog.reserve("create")
    inner.close()
    assert told == [True] * 3
    said = [line for line in allow_logs.seen if "Log I/O Error (0x2) detected" in line]
    assert len(said) == 1, allow_logs.seen
    found = names_by_kernel(image, scratch)
    assert found["forced"] == DATA


def _log_bytes(vol: Volume) -> int:
    return vol.geo.log_blocks << vol.geo.block_log


@support.needs_root
async def test_metadata_that_cannot_go_home(scratch: Path, allow_logs: AllowLogs) -> None:
    """It is in the log, so nothing is lost."""
    allow_logs(DOWN_LOGS)
    image = support.mkfs(scratch)
    inner = ImageFile(str(image))
    device = Faulty(inner, Faults())
    async with Volume.open(device, 16 << 20) as vol:
        await make(vol, b"late")
        await vol.flusher.sync()
        await vol.xlog.force()
        device.faults.last = (vol.geo.ag_daddr(1, 0) << L.BB_LOG) - 1
        device.faults.write = 1.0
        vol.wake_metadata()
        while not vol.shut_down:
            await trio.sleep(0.01)
    inner.close()
    assert any("Metadata I/O Error (0x1) detected" in line for line in allow_logs.seen)
    assert names_by_kernel(image, scratch) == {"late": DATA}
