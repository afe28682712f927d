"""Eight writers of files on a device that slows down, by a mock clock: the throttle as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from fs import file, namespace
from fs.device.model import Model
from fs.device.modeled import Modeled
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import SlowImage, a_file, opened

MB = 1_000_000
WRITERS, SIZE = 8, 16384
FILE_BYTES = 32 << 20
BETWEEN_S = 0.00005  # writes of one writer: its own work


class Load:
    """The writers of one volume, and what they got since `measure`."""

    def __init__(self, vol: Volume, device: Modeled) -> None:
        self.vol = vol
        self.device = device
        self.measure()

    def measure(self) -> None:
        self.began = trio.current_time()
        self.written = [0] * WRITERS
        self.times: list[float] = []
        self.most = 0  # pages above the limit
        self.vol.pages.throttle.longest_ms = 0

    async def writer(self, number: int) -> None:
        at, data, dirty = 0, bytes(SIZE), self.vol.pages.dirty
        async with a_file(self.vol, b"file%d" % number) as ip:
            while True:
                before = trio.current_time()
                await file.write(self.vol, ip, at, data)
                self.times.append(trio.current_time() - before)
                self.written[number] += SIZE
                self.most = max(self.most, dirty.busy - dirty.limit)
                at = (at + SIZE) % FILE_BYTES
                await trio.sleep(BETWEEN_S)

    def judge(self) -> None:
        seconds = trio.current_time() - self.began
        assert sum(self.written) / seconds == pytest.approx(self.device.model.bw, rel=0.05)
        assert max(self.written) < 1.1 * min(self.written)
        assert self.most <= WRITERS * SIZE >> 12
        assert self.vol.pages.throttle.longest_ms <= 200
        assert sorted(self.times)[len(self.times) * 999 // 1000] < 0.25


@pytest.mark.slow
async def test_writers_share_what_the_device_sustains(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    image = SlowImage(support.mkfs(scratch, size=1 << 30))
    device = Modeled(image, Model(bw=25 * MB))
    async with Volume.open(device, 32 << 20) as vol:
        load = Load(vol, device)
        async with trio.open_nursery() as nursery:
            for number in range(WRITERS):
                nursery.start_soon(load.writer, number)
            await trio.sleep(10)
            load.measure()
            await trio.sleep(10)
            load.judge()
            device.model.bw = 5 * MB
            await trio.sleep(20)
            load.measure()
            await trio.sleep(20)
            load.judge()
            nursery.cancel_scope.cancel()
        device.model.bw = 0
    image.close()


@pytest.mark.parametrize("how", ["evicted", "unlinked"])
async def test_a_writer_goes_with_its_inode(how: str, scratch: Path) -> None:
    """Its record is somebody else's memory afterwards: what writers owe is kept in records."""
    async with opened(support.mkfs(scratch)) as vol:
        root = await vol.inodes.get(vol.geo.root_ino)
        handles = []
        for n in range(64):
            ip = await namespace.create(vol, root, b"%d" % n, 0o644, 0, 0)
            vol.pages.throttle._writer(ip.handle)
            handles.append(ip.handle)
            vol.inodes.put(ip)
        assert set(handles) <= vol.pages.throttle._writers.keys()
        for n in range(64 if how == "unlinked" else 0):
            await namespace.unlink(vol, root, b"%d" % n)
        vol.inodes.put(root)
        await vol.drain_inactive()
        await vol.flush_metadata()
        while vol.arena.reclaim.shrink_all(0, 0, "direct", 1 << 30):
            pass
        vol.arena.rcu.expedite()
        assert not vol.pages.throttle._writers.keys() & set(handles)
