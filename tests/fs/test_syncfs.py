"""syncfs: what it writes, and which errors of write-back it tells, how often."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from fs import file
from fs.device.model import Model
from fs.device.modeled import Modeled
from fs.syncfs import syncfs
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import SlowImage, a_file


async def test_a_lost_write_is_told_once_by_syncfs_too(
    scratch: Path, allow_logs: Callable[[str], None]
) -> None:
    """As Linux: the file's error and the filesystem's are two words; who heard one hears both."""
    allow_logs("write-back failed, data is lost")
    image = support.mkfs(scratch)
    device = SlowImage(image)
    async with Volume.open(device, 16 << 20) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"a" * 9000)
        await syncfs(vol)
        assert vol.pages.dirty.nr_dirty == 0
        for told_by_fsync in (False, True):
            await file.write(vol, ip, 0, b"b" * 9000)
            device.fail_writes = True
            await vol.flusher.clean(ip.handle)
            device.fail_writes = False
            if told_by_fsync:
                with pytest.raises(OSError, match="failed earlier"):
                    await file.fsync(vol, ip)
            with pytest.raises(OSError, match="since the last syncfs") as error:
                await syncfs(vol)
            assert error.value.errno == errno.EIO
            await syncfs(vol)
            if not told_by_fsync:
                with pytest.raises(OSError, match="failed earlier"):
                    await file.fsync(vol, ip)
        await file.fsync(vol, ip)
    device.close()
    support.assert_clean(image)


async def test_what_failed_while_it_syncs_is_told(
    scratch: Path, allow_logs: Callable[[str], None]
) -> None:
    allow_logs("write-back failed, data is lost")
    device = SlowImage(support.mkfs(scratch))
    async with Volume.open(device, 16 << 20) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"a" * 4096)
        await file.fsync(vol, ip)  # in place from now on: no metadata write fails
        await file.write(vol, ip, 0, b"b" * 4096)

        def fail_once() -> None:
            device.fail_writes = not device.fail_writes

        device.before_write = fail_once
        with pytest.raises(OSError, match="since the last syncfs"):
            await syncfs(vol)
        device.before_write, device.fail_writes = (lambda: None), False
        await syncfs(vol)
    device.close()


async def test_files_do_not_wait_for_each_other(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A device that answers late has data of several files at once."""
    files, late_s = 40, 0.01
    device = SlowImage(image := support.mkfs(scratch))
    slow = Modeled(device, Model(lat_us=int(late_s * 1e6)))
    async with Volume.open(slow, 16 << 20) as vol:
        for n in range(files):
            async with a_file(vol, b"file%d" % n) as ip:
                await file.write(vol, ip, 0, b"a" * 4096)
        began = trio.current_time()
        await vol.flusher.sync()
        assert trio.current_time() - began < files * late_s / 2
        assert vol.pages.dirty.nr_dirty == 0
    device.close()
    support.assert_clean(image)
