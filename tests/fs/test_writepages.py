"""Which parts of a file reach the device, in which order: slices, and a sync beside a writer."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from fs import file, mapread, writepages
from fs.cache.inode import Inode
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import SlowImage, a_file
from writeback.flusher import ALL_PAGES, CHUNK_PAGES
from writeback.ioend import Ioend

PAGE = 4096
SLICE = 256  # pages that one ioend takes with so little memory: the least that is written at once
PAGES = 2 * SLICE + 192


async def start_of(vol: Volume, ip: Inode, pages: int) -> int:
    """Where the device has a file that lies in one piece."""
    (extent,) = await mapread.read(vol, ip, 0, pages)
    return vol.geo.fsb_to_bytes(extent.fsbno)


async def test_a_slice_begins_where_the_last_one_ended(scratch: Path) -> None:
    """range_cyclic: on to the end, though the start is dirty again, and only then from there."""
    device = SlowImage(support.mkfs(scratch))
    async with Volume.open(device, 16 << 20) as vol, a_file(vol) as ip:
        vol.pages.dirty.ratio, vol.pages.dirty.background_ratio = 95, 90
        await file.write(vol, ip, 0, b"a" * PAGES * PAGE)
        await file.fsync(vol, ip)
        start = await start_of(vol, ip, PAGES)
        await file.write(vol, ip, 0, b"b" * PAGES * PAGE)
        state = vol.pages.state(ip.handle)
        slices = []
        for _ in range(4):
            device.writes.clear()
            await vol.pages.write_range(ip.handle, 0, ALL_PAGES, integrity=False, budget=16)
            slices.append((min(device.writes)[0] - start, sum(n for _, n in device.writes)))
            if len(slices) == 1:
                assert state["writeback_index"] == SLICE
                await file.write(vol, ip, 0, b"c" * PAGE)
        first, second, rest, again = slices
        assert first == (0, SLICE * PAGE)
        assert second == (SLICE * PAGE, SLICE * PAGE)
        assert rest == (2 * SLICE * PAGE, (PAGES - 2 * SLICE) * PAGE)
        assert again == (0, PAGE)
        assert state["writeback_index"] == 0
    device.close()


async def test_a_writer_does_not_hold_a_sync_up(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """He dirties as much as an ioend takes whenever write-back has looked up the blocks of one."""
    find_blocks, calls = writepages._map, 0

    async def beside_a_writer(vol: Volume, ip: Inode, ioend: Ioend) -> list[writepages.Segment]:
        nonlocal calls
        segments = await find_blocks(vol, ip, ioend)
        calls += 1
        if calls < 10:
            async with trio.open_nursery() as nursery:  # a task without write-back's locks
                nursery.start_soon(file.write, vol, ip, ip.size, b"b" * SLICE * PAGE)
        return segments

    monkeypatch.setattr(writepages, "_map", beside_a_writer)
    device = SlowImage(support.mkfs(scratch))
    async with Volume.open(device, 16 << 20) as vol, a_file(vol) as ip:
        vol.pages.dirty.ratio, vol.pages.dirty.background_ratio = 95, 90
        await file.write(vol, ip, 0, b"a" * 2 * SLICE * PAGE)
        await vol.flusher.sync()
        assert calls == CHUNK_PAGES // SLICE + 2, "a slice, and what is dirty after that"
        assert vol.pages.dirty.nr_dirty == 2 * SLICE
    device.close()
