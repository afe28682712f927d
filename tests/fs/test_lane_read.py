"""READ in the lane: what it answers at once, what it parks, and that both give the file's bytes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import trio
import trio.testing
from numba import typeof

from alloc.page import ACTIVE, REFERENCED
from fs import file
from fs.cache.inode import Inode
from fs.front import lanestate as S
from fs.front import wire
from fs.volume import Volume
from fs.xfs import layout as L
from tests import support
from tests.fs.imagefiles import a_file, opened
from tests.fs.lanes import Desk, a_desk
from tests.fs.test_file import drop_caches
from writeback.lists import DIRTY_TIME

PAGE = bytes(range(256)) * 16


async def test_kernels_are_compiled_for_the_lanes_there_are(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_desk(vol) as desk:
        for lane in desk.lanes:
            for name, array, other in zip(lane._fields, lane, S.sample(), strict=True):
                assert typeof(array) == typeof(other), name


async def test_cached_data_is_answered_at_once(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await file.write(vol, ip, 0, PAGE * 4)
        assert await desk.read(ip, 0, 16384) == PAGE * 4
        assert await desk.read(ip, 100, 5000) == (PAGE * 4)[100:5100]
        assert await desk.read(ip, 16000, 5000) == (PAGE * 4)[16000:]
        assert await desk.read(ip, 16384, 5000) == b""
        assert await desk.read(ip, 1 << 40, 5000) == b""
        assert desk.codes == {"answered": 5}
        refs = vol.arena.pages.refs
        assert {int(refs[pfn]) for pfn in vol.pages.gang(ip.handle, 0, 1 << 40)} == {1}
        assert not vol.iolocks.held(ip.handle)
        assert not vol.ilocks.held(ip.handle)


async def a_patchwork(vol: Volume, ip: Inode, dice: random.Random) -> bytearray:
    """A file of data, holes and unwritten blocks, some of it cached; its bytes."""
    want = bytearray(600_000)
    await file.truncate(vol, ip, len(want))
    for _ in range(12):
        at = dice.randrange(len(want) - 40_000)
        data = dice.randbytes(dice.choice((10, 1000, 4096, 30_000)))
        await file.write(vol, ip, at, data)
        want[at : at + len(data)] = data
    return want


@pytest.mark.parametrize("block", ["1k", "4k", "64k"])
async def test_pieces_holes_and_misses(scratch: Path, block: str) -> None:
    dice = random.Random(block)
    image = support.mkfs(scratch, "-b", f"size={block}")
    async with opened(image) as vol, a_file(vol) as ip, a_desk(vol, atime="noatime") as desk:
        want = await a_patchwork(vol, ip, dice)
        for turn in range(600):
            if turn % 60 == 30:
                await drop_caches(vol)
            at = dice.randrange(len(want) + 1000)
            size = dice.choice((1, 100, 4096, 20_000, desk.max_write))
            assert await desk.read(ip, at, size) == want[at : at + size], (turn, at, size)
        assert desk.codes["miss"] + desk.codes["map"] > 10
        assert desk.codes["answered"] > 400
        await drop_caches(vol)
        vol.arena.check()


async def test_holes_need_no_memory(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await file.truncate(vol, ip, 1 << 40)
        ip.atime = ip.mtime + 1
        assert await desk.read(ip, (1 << 39) + 5, 100_000) == bytes(100_000)
        assert desk.codes == {"answered": 1}
        assert vol.pages.state(ip.handle)["nrpages"] == 0


async def test_the_second_use_activates(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await file.write(vol, ip, 0, PAGE)
        await file.fsync(vol, ip)
        await drop_caches(vol)
        assert await desk.read(ip, 0, 4096) == PAGE
        flags, pfn = vol.arena.pages.flags, vol.pages.find(ip.handle, 0)
        assert flags[pfn] & (ACTIVE | REFERENCED) == REFERENCED
        assert await desk.read(ip, 0, 4096) == PAGE
        assert flags[pfn] & (ACTIVE | REFERENCED) == ACTIVE
        vol.arena.check()


# -- access times ------------------------------------------------------------------------------


async def test_access_times(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_desk(vol) as desk:
        await file.write(vol, ip, 0, PAGE)
        before = ip.atime
        assert await desk.read(ip, 0, 4096) == PAGE  # due, and the file is on the list
        assert ip.atime > before
        assert ip.atime > ip.mtime
        moved = ip.atime
        assert await desk.read(ip, 0, 4096) == PAGE
        assert ip.atime == moved
        assert desk.codes == {"answered": 2}
        await file.fsync(vol, ip)
        ip.atime = 0
        assert await desk.read(ip, 0, 4096) == PAGE
        assert desk.reason == "times"
        assert ip.atime > moved
        ip.flags |= L.DIFLAG_NOATIME
        ip.atime = 0
        assert await desk.read(ip, 0, 4096) == PAGE
        assert ip.atime == 0
        assert desk.codes == {"answered": 3, "times": 1}


async def test_access_times_of_a_file_whose_stamps_wait(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """It is not LISTED, and moves as the lane likes; the flusher knows of it already."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip, a_desk(vol, atime="strictatime") as desk:
        vol.flusher.lazytime = True
        await file.write(vol, ip, 0, PAGE)
        await file.fsync(vol, ip)
        ip.atime = 0
        assert await desk.read(ip, 0, 4096) == PAGE
        assert desk.reason == "times", "it waits for nothing yet"
        await trio.sleep(100)
        assert vol.flusher.lists.length[DIRTY_TIME] == 1
        for _ in range(3):
            ip.atime = 0
            assert await desk.read(ip, 0, 4096) == PAGE
            assert ip.atime > 0
        assert desk.codes == {"times": 1, "answered": 3}
        assert vol.flusher.lists.length[DIRTY_TIME] == 1
        known = ip.atime
        await file.fsync(vol, ip)
        assert vol.flusher.nr_listed == 0
    async with opened(image) as vol, a_file(vol) as ip:
        assert ip.atime == known


@pytest.mark.parametrize(("policy", "moves"), [("noatime", False), ("strictatime", True)])
async def test_policies(scratch: Path, policy: str, moves: bool) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip, a_desk(vol, atime=policy) as desk:
        await file.write(vol, ip, 0, PAGE)
        ip.atime = before = ip.mtime + 5
        for _ in range(2):
            assert await desk.read(ip, 0, 4096) == PAGE
        assert (ip.atime > before) is moves
        assert desk.codes == {"answered": 2}


# -- what is parked ----------------------------------------------------------------------------


async def parked(desk: Desk, ip: Inode, reason: str, at: int, size: int = 4096) -> None:
    """A read that the lane leaves to trio for this reason, with nothing held."""
    desk.put(wire.READ, ip.handle, at, size, 0, b"")
    assert desk.attempt(wire.READ) == S.PARK
    assert desk.reason == reason
    assert desk.lane.me[S.M_DONE] == desk.lane.me[S.M_LOCKED] == 0
    assert os.fstat(desk.fd).st_size == 0
    refs = desk.vol.arena.pages.refs
    assert {int(refs[pfn]) for pfn in desk.vol.pages.gang(ip.handle, 0, 1 << 40)} <= {1}


async def test_reasons_to_park(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip, a_desk(vol, atime="noatime") as desk:
        await file.write(vol, ip, 0, PAGE * 4)
        await file.fsync(vol, ip)
        async with vol.iolock(ip):
            await parked(desk, ip, "lock", 0)
        async with vol.iolock(ip, shared=True):
            assert await desk.read(ip, 0, 4096) == PAGE
        await drop_caches(vol)
        await file.read(vol, ip, 4096, 10)
        await parked(desk, ip, "miss", 4096, 8192)
        desk.control[S.C_SHUTDOWN] = 1
        await parked(desk, ip, "shutdown", 4096)
        desk.control[S.C_SHUTDOWN] = 0
        async with vol.ilocks.locked(ip.handle, False):
            await parked(desk, ip, "lock", 0)
            assert await desk.read(ip, 4096, 4096) == PAGE  # needs no map
        assert await desk.read(ip, 0, 16384) == PAGE * 4
        assert not vol.iolocks.held(ip.handle)
        assert not vol.ilocks.held(ip.handle)


