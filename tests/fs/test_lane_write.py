"""WRITE in the lane: against a bytearray, and every reason to park."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
import trio
import trio.testing

from alloc.page import W_LOW
from fs import file, xattr
from fs.cache.inode import Inode
from fs.front import lanestate as S
from fs.front import wire
from fs.volume import Volume
from fs.xfs import bmap
from tests import support
from tests.fs.imagefiles import IMAGES, a_file, opened
from tests.fs.lanes import Desk, a_desk
from tests.fs.test_file import MOST, Model, contents, drop_caches, extents
from writeback.dirty import COUNT_FREERUN, COUNT_LIMIT

# in MiB; 64k blocks need more for their log
RUNS = [("4k", 8), ("4k", 64), ("1k", 8), ("1k", 64), ("64k", 16), ("64k", 64)]
PAGE = bytes(range(256)) * 16


class LaneModel(Model):
    """A file that is used through the lane, and the bytes it should have."""

    def __init__(self, vol: Volume, ip: Inode, seed: int, desk: Desk) -> None:
        super().__init__(vol, ip, seed)
        self.desk = desk

    def span(self) -> tuple[int, int]:
        at, size = super().span()
        if self.random.random() < 0.15:
            size = self.desk.max_write
            at = at // size * size
        return at, min(size, self.desk.max_write)

    async def write_at(self, at: int, size: int) -> None:
        if at + size > MOST:
            return
        data = self.random.randbytes(size)
        assert await self.desk.write(self.ip, at, data) == size
        if at > len(self.bytes):
            self.bytes.extend(bytes(at - len(self.bytes)))
        self.bytes[at : at + size] = data

    async def read(self) -> None:
        at, size = self.span()
        assert await self.desk.read(self.ip, at, size) == self.bytes[at : at + size]


@pytest.mark.parametrize(("kind", "memory"), RUNS)
async def test_random_use_equals_a_bytearray(
    scratch: Path, kind: str, memory: int, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch, *IMAGES[kind])
    async with (
        opened(image, memory << 20, seed=memory, pause_s=0.02) as vol,
        a_file(vol) as ip,
        a_desk(vol) as desk,
    ):
        model = LaneModel(vol, ip, memory, desk)
        for _ in range(1500):
            await model.step()
        await model.check()
        assert desk.codes["answered"] > 300
        assert {"miss", "map", "list", "times"} <= set(desk.codes)
    async with opened(image) as vol, a_file(vol) as ip:
        model.vol, model.ip = vol, ip
        await model.check()
    support.assert_clean(image)


async def test_lane_and_task_leave_the_same_state(scratch: Path) -> None:
    """Two files, the same writes, one through the lane and one through fs/file.py."""
    image = support.mkfs(scratch, "-b", "size=1k")
    async with (
        opened(image) as vol,
        a_file(vol, b"lane") as ip,
        a_file(vol, b"task") as twin,
        a_desk(vol) as desk,
    ):
        dice = random.Random(5)
        for turn in range(400):
            at, data = dice.randrange(200_000), dice.randbytes(dice.randint(1, 20_000))
            at = min(at, ip.size)
            await desk.write(ip, at, data)
            await file.write(vol, twin, at, data)
            state, other = vol.pages.state(ip.handle), vol.pages.state(twin.handle)
            for name in ("delalloc", "pending", "indirect"):
                assert state[name] == other[name], (turn, name)
            assert ip.size == twin.size
            if turn % 50 == 49:
                for each in (ip, twin):
                    await file.fsync(vol, each)
                if turn % 100 == 99:
                    await drop_caches(vol)
        assert desk.codes["answered"] > 250
        assert await contents(vol, ip) == await contents(vol, twin)
        assert file.stat_blocks(vol, ip) == file.stat_blocks(vol, twin)
    support.assert_clean(image)


async def listed(desk: Desk, ip: Inode, size: int = 4096) -> None:
    """The file is on the flusher's list and has `size` bytes, dirty."""
    await file.write(desk.vol, ip, 0, bytes(size))


async def test_a_write_of_a_whole_folio_takes_the_payload_itself(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image, 64 << 20) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        size = 4096 << desk.payload_order
        await listed(desk, ip, size)
        data = os.urandom(size)
        folio = int(desk.lane.me[S.M_PAYLOAD])
        assert await desk.write(ip, size, data) == size
        assert vol.pages.find(ip.handle, size >> 12) == folio
        assert int(desk.lane.me[S.M_PAYLOAD]) not in (0, folio)
        assert int(vol.arena.pages.refs[folio]) == 1
        assert await desk.read(ip, size, size) == data
        again = os.urandom(size)
        assert await desk.write(ip, size, again) == size  # something is cached: it is copied
        assert vol.pages.find(ip.handle, size >> 12) == folio
        assert desk.codes == {"answered": 3}
        await file.fsync(vol, ip)
        assert vol.pages.state(ip.handle)["delalloc"] == 0
        await drop_caches(vol)
        assert (await contents(vol, ip))[size:] == again
    support.assert_clean(image)


async def test_mtime_and_size_change_with_the_data(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await listed(desk, ip)
        before, count = ip.mtime, ip.changecount
        assert await desk.write(ip, 4000, PAGE) == 4096
        assert ip.size == 8096
        assert ip.changecount > count
        assert ip.mtime == ip.ctime > before
        await file.fsync(vol, ip)
        assert ip.disk_size == 8096


# -- what is parked ----------------------------------------------------------------------------


async def parked(desk: Desk, ip: Inode, reason: str, at: int, data: bytes = PAGE) -> None:
    """A write that the lane leaves to trio for this reason, with nothing done and nothing held."""
    desk.put(wire.WRITE, ip.handle, at, len(data), 0, data)
    assert desk.attempt(wire.WRITE) == S.PARK
    assert desk.reason == reason
    assert desk.lane.me[S.M_DONE] == desk.lane.me[S.M_LOCKED] == 0


async def test_reasons_to_park(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await parked(desk, ip, "list", 0)
        await listed(desk, ip)
        await parked(desk, ip, "map", 5000)
        async with vol.iolock(ip):
            await parked(desk, ip, "lock", 0)
        async with vol.ilocks.locked(ip.handle, False):
            await parked(desk, ip, "lock", 4096)
        words = vol.arena.words
        low, words[W_LOW] = int(words[W_LOW]), vol.arena.nr_pages
        await parked(desk, ip, "memory", 4096)
        words[W_LOW] = low
        assert desk.bells[S.B_KSWAPD] == 1
        vol.space.recall_stash()
        await parked(desk, ip, "space", 4096)
        vol.space.refill_stash()
        counts = vol.pages.dirty.counts
        free_run, counts[COUNT_FREERUN] = int(counts[COUNT_FREERUN]), 1
        await parked(desk, ip, "dirty", 4096)
        assert await desk.write(ip, 0, PAGE) == 4096  # what is dirty gets no dirtier
        credit = vol.pages.columns["credit"]
        credit[ip.handle] = 1
        counts[COUNT_LIMIT], limit = 1, int(counts[COUNT_LIMIT])
        await parked(desk, ip, "dirty", 4096)
        counts[COUNT_LIMIT], credit[ip.handle] = limit, 1
        assert await desk.write(ip, 4096, PAGE) == 4096
        assert credit[ip.handle] == 0
        await parked(desk, ip, "dirty", 8192)
        counts[COUNT_FREERUN] = free_run
        desk.control[S.C_READ_ONLY] = 1
        await parked(desk, ip, "shutdown", 0)
        desk.control[S.C_READ_ONLY] = 0
        assert not vol.iolocks.held(ip.handle)
        assert not vol.ilocks.held(ip.handle)
        assert await desk.write(ip, 8192, PAGE) == 4096
        assert desk.codes["answered"] == 3


async def test_a_part_of_a_block_on_the_device_is_read_first(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await file.write(vol, ip, 0, PAGE * 4)
        await file.fsync(vol, ip)
        await drop_caches(vol)
        await listed(desk, ip)
        await parked(desk, ip, "miss", 8192 + 100, b"x" * 50)
        assert await desk.write(ip, 8192 + 100, b"x" * 50) == 50
        assert await desk.write(ip, 8192 + 200, b"y" * 50) == 50
        assert desk.codes == {"miss": 2, "answered": 1}
        want = bytearray(bytes(4096) + PAGE * 3)
        want[8292:8342], want[8392:8442] = b"x" * 50, b"y" * 50
        assert await contents(vol, ip) == want
    support.assert_clean(image)


async def test_sync_handles_and_set_id_bits(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await listed(desk, ip)
        assert await desk.write(ip, 0, PAGE, how=os.O_RDWR | os.O_SYNC) == 4096
        assert desk.reason == "sync"
        assert vol.pages.state(ip.handle)["ndirty"] == 0
        ip.mode |= 0o4000
        await listed(desk, ip)
        assert await desk.write(ip, 0, PAGE) == 4096
        assert ip.mode & 0o4000
        assert await desk.write(ip, 0, PAGE, flags=wire.WRITE_KILL_SUIDGID) == 4096
        assert desk.reason == "privileges"
        assert not ip.mode & 0o6000


async def test_capabilities_go_with_the_first_write(scratch: Path) -> None:
    name = b"security.capability"
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await listed(desk, ip)
        await xattr.set(vol, ip, b"user.other", b"1")
        await xattr.set(vol, ip, name, b"cap")
        for _ in range(2):
            assert await desk.write(ip, 0, PAGE) == 4096
        assert desk.codes == {"privileges": 1, "answered": 1}
        await xattr.set(vol, ip, name, b"cap")
        assert await desk.write(ip, 0, PAGE) == 4096
        assert desk.reason == "privileges"
        assert await xattr.names(vol, ip) == [b"user.other"]


async def test_a_write_that_stops_half_way_keeps_its_lock(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await file.write(vol, ip, 0, PAGE * 4)
        await file.fsync(vol, ip)
        await drop_caches(vol)
        await listed(desk, ip, 8192)
        data = os.urandom(6000)  # ends in the middle of a block that is on the device only
        desk.put(wire.WRITE, ip.handle, 4096, len(data), 0, data)
        assert desk.attempt(wire.WRITE) == S.PARK
        assert desk.reason == "miss"
        assert desk.lane.me[S.M_DONE] == 4096
        assert desk.lane.me[S.M_LOCKED] == 1
        assert vol.iolocks.held(ip.handle)
        got: list[bytes] = []

        async def reader() -> None:
            got.append(bytes(await file.read(vol, ip, 4096, 6000)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader)
            await trio.testing.wait_all_tasks_blocked()
            assert not got  # nobody sees a half
            body = await desk.finish(wire.WRITE)
        assert int.from_bytes(body[:4], "little") == 6000
        assert got == [data]
        assert not vol.iolocks.held(ip.handle)
        assert not vol.ilocks.held(ip.handle)
    support.assert_clean(image)


async def test_a_tree_or_a_sharing_file_is_left_to_trio(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        for page in range(0, 64, 2):
            await file.write(vol, ip, page << 12, PAGE)
        await file.fsync(vol, ip)
        assert len(await extents(vol, ip)) == 32
        await listed(desk, ip)
        await parked(desk, ip, "map", 4096)
        assert await desk.write(ip, 4096, PAGE) == 4096
        assert await desk.write(ip, 4096, PAGE) == 4096  # into what is claimed, without a look
        assert desk.codes == {"map": 2, "answered": 1}
        await drop_caches(vol)
        assert await desk.read(ip, 3 << 12, 4096) == bytes(4096)
        async with vol.reader(ip) as tp:
            assert await bmap.lookup(tp, ip, 0)
    support.assert_clean(image)


async def test_a_folio_that_is_gone_is_not_touched_again(scratch: Path) -> None:
    """Nothing of one write is remembered for the next: its folio may be free by then."""
    image = support.mkfs(scratch)
    async with (
        opened(image) as vol,
        a_file(vol, b"one") as ip,
        a_file(vol, b"other") as other,
        a_desk(vol) as desk,
    ):
        await listed(desk, ip)
        assert await desk.write(ip, 0, PAGE[:100]) == 100
        folio = vol.pages.find(ip.handle, 0)
        assert desk.lane.me[S.M_HINT + 1] == folio  # its second use: it was activated
        await file.truncate(vol, ip, 0)
        before = int(vol.arena.pages.flags[folio])
        await parked(desk, other, "list", 0)
        assert int(vol.arena.pages.flags[folio]) == before
    support.assert_clean(image)


async def test_errors_come_as_fs_file_has_them(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        with pytest.raises(OSError) as caught:
            await desk.write(ip, (1 << 63) - 4096, PAGE)
        assert caught.value.errno == errno.EFBIG
        assert not vol.iolocks.held(ip.handle)
        assert not vol.ilocks.held(ip.handle)
