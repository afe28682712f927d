"""Readahead: the windows that patterns of reading come to, as the device sees them.

The file is one extent, so what the device was asked for is a range of its pages. Between two reads
everything comes to rest, unless a test says otherwise: then what is under way is under way.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from alloc.page import LOCKED, READAHEAD
from fs import file
from fs.cache import window
from fs.cache.inode import Inode
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import SlowImage, a_file, opened
from tests.fs.lanes import a_desk
from tests.fs.test_file import drop_caches, extents

PAGE = 4096
PAGES = 4096  # of the file
WINDOW_MOST = 256  # 1 MiB, which the tables are made for
MEMORY = 64 << 20


def page(index: int) -> bytes:
    """Its content."""
    return index.to_bytes(8, "little") * (PAGE // 8)


class Reader:
    """A file that is not cached, and a device that remembers."""

    def __init__(self, vol: Volume, ip: Inode, first: int) -> None:
        assert isinstance(vol.dev, SlowImage)
        self.vol, self.ip, self.dev = vol, ip, vol.dev
        self._first = first  # byte of the device with the file's first
        self.dev.reads.clear()

    async def read(self, index: int, pages: int = 1) -> None:
        got = await file.read(self.vol, self.ip, index * PAGE, pages * PAGE)
        assert bytes(got) == b"".join(page(i) for i in range(index, index + pages))

    async def at_rest(self, index: int, pages: int = 1) -> list[tuple[int, int]]:
        """Read, and let come what comes of it: (first page, pages) of the device's reads."""
        await self.read(index, pages)
        await wait_all_tasks_blocked()
        return self.asked()

    def asked(self) -> list[tuple[int, int]]:
        """What the device was asked for since the last time."""
        reads, self.dev.reads = self.dev.reads, []
        return [((at - self._first) // PAGE, nbytes // PAGE) for at, nbytes in reads]

    def orders(self) -> list[int]:
        """Orders of all folios of the file."""
        pages = self.vol.pages
        pfns, index = [], 0
        while found := pages.gang(self.ip.handle, index, PAGES):
            pfns += found
            index = pages.end(found[-1]) // PAGE
        return [int(pages.pages.order[pfn]) for pfn in pfns]


@asynccontextmanager
async def a_reader(
    scratch: Path, memory: int = MEMORY, pause_s: float = 0.0
) -> AsyncIterator[Reader]:
    async with opened(support.mkfs(scratch), memory, pause_s=pause_s) as vol, a_file(vol) as ip:
        for start in range(0, PAGES, 256):
            data = b"".join(page(i) for i in range(start, start + 256))
            await file.write(vol, ip, start * PAGE, data)
        await drop_caches(vol)
        (extent,) = await extents(vol, ip)
        vol.ahead.pages_most = min(vol.ahead.pages_most, WINDOW_MOST)
        yield Reader(vol, ip, vol.geo.fsb_to_bytes(extent.fsbno))


async def test_a_stream_of_single_pages(scratch: Path) -> None:
    """Golden: sizes 4, 16, 32, 64, 128, 256, ...; orders 0, 2, 4, 6, 7, 8, 8."""
    async with a_reader(scratch) as reader:
        seen, orders = {}, []
        for index in range(900):
            if got := await reader.at_rest(index):
                seen[index] = got
                order = int(reader.vol.pages.state(reader.ip.handle)["ra_order"])
                orders.append(order & ~window.TAKEN)
        assert seen == {
            0: [(0, 4)],
            1: [(4, 16)],
            4: [(20, 32)],
            20: [(52, 64)],
            52: [(116, 128)],
            116: [(244, 256)],
            244: [(500, 256)],
            500: [(756, 256)],
            756: [(1012, 256)],
        }
        assert reader.vol.arena.vmstat["readahead_evicted"] == 0, "of windows; shadows there are"
        assert orders == [0, 2, 4, 6, 7, 8, 8, 8, 8]
        assert reader.orders()[:12] == [0] * 4 + [2] * 4 + [2, 3, 4, 2], "20 to 51: as aligned"


@pytest.mark.parametrize("pages", [32, 256])
async def test_requests_as_large_as_their_window(scratch: Path, pages: int) -> None:
    """The marker is then on the first page, so there is always a window on its way."""
    async with a_reader(scratch) as reader:
        seen = [await reader.at_rest(index, pages) for index in range(0, 1024, pages)]
        if pages == 256:
            assert seen == [[(i, 256) for i in (0, 256)]] + [[(i, 256)] for i in (512, 768, 1024)]
        else:
            assert seen[:3] == [[(0, 64)], [(64, 128)], [(192, 256)]]


async def test_the_next_window_is_not_waited_for(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with a_reader(scratch, pause_s=1.0) as reader:
        await reader.read(0, 256)
        assert reader.asked() == [(0, 256)]
        await trio.testing.wait_all_tasks_blocked(0)
        assert reader.asked() == [(256, 256)], "on its way"
        flags, pages = reader.vol.arena.pages.flags, reader.vol.pages
        pfn = pages.find(reader.ip.handle, 256)
        assert flags[pfn] & (LOCKED | READAHEAD) == LOCKED | READAHEAD
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reader.read, 256, 256)
            await trio.testing.wait_all_tasks_blocked(0)
            assert reader.asked() == [(512, 256)], "who waits for one has the next one begun"
        assert not flags[pages.find(reader.ip.handle, 256)] & READAHEAD


async def test_two_streams_in_one_file(scratch: Path) -> None:
    async with a_reader(scratch) as reader:
        asked = []
        for i in range(120):
            asked += await reader.at_rest(i)
            asked += await reader.at_rest(2000 + i)
        # From 20 on each meets its marker when the window is the other's: what is cached from
        # there on, and the page that it wants, and twice as much.
        assert asked == [
            *((0, 4), (2000, 1), (4, 16), (2001, 4), (2005, 16)),
            *((20, 34), (2021, 34), (54, 70), (2055, 70), (124, 142), (2125, 142)),
        ]


async def test_a_stream_that_was_forgotten(scratch: Path) -> None:
    """Its cached pages show it: as many again, and the marker one page before the end."""
    async with a_reader(scratch) as reader:
        for index in (1000, 1001, 1002):
            await reader.at_rest(index)
        state = reader.vol.pages.state(reader.ip.handle)
        state["ra_start"] = state["ra_pages"] = state["ra_behind"] = 0
        cached = reader.vol.pages.cached_run(reader.ip.handle, 1000, 1, 256)
        reader.asked()
        assert await reader.at_rest(1000 + cached) == [(1000 + cached, cached + 1)]


async def test_at_random_as_it_was_asked_for(scratch: Path) -> None:
    async with a_reader(scratch) as reader:
        for index in (3000, 77, 1200, 2100, 500, 3777, 901):
            assert await reader.at_rest(index, 2) == [(index, 2)]
        assert await reader.at_rest(0) == [(0, 4)]


async def test_backwards(scratch: Path) -> None:
    async with a_reader(scratch) as reader:
        asked = [got for at in range(3000, 2900, -1) if (got := await reader.at_rest(at))]
        assert asked == [
            [(3000, 1)],
            [(2999, 1)],
            [(2998, 1), (2996, 2)],
            [(2995, 1), (2991, 4)],
            [(2990, 1), (2982, 8)],
            [(2981, 1), (2965, 16)],
            [(2964, 1), (2932, 32)],
            [(2931, 1), (2867, 64)],
        ]


async def test_every_tenth_page(scratch: Path) -> None:
    async with a_reader(scratch) as reader:
        asked = [sorted(got) for at in range(105, 400, 10) if (got := await reader.at_rest(at))]
        assert asked == [
            [(105, 1)],
            [(115, 1)],
            [(125, 1), (135, 1), (145, 1)],
            [(155, 1), *((at, 1) for at in range(165, 205, 10))],
            [(205, 1), *((at, 1) for at in range(215, 295, 10))],
            [(295, 1), *((at, 1) for at in range(305, 465, 10))],
        ]


async def test_a_lane_meets_the_marker(scratch: Path) -> None:
    async with a_reader(scratch) as reader, a_desk(reader.vol, atime="noatime") as desk:
        asked = {}
        for index in range(60):
            assert await desk.read(reader.ip, index * PAGE, PAGE) == page(index)
            await wait_all_tasks_blocked()
            if got := reader.asked():
                asked[index] = got
        assert asked == {
            0: [(0, 4)],
            1: [(4, 16)],
            4: [(20, 32)],
            20: [(52, 64)],
            52: [(116, 128)],
        }
        assert desk.codes == {"miss": 1, "answered": 59}


async def test_windows_that_are_evicted_shrink(scratch: Path) -> None:
    async with a_reader(scratch) as reader:
        vmstat = reader.vol.arena.vmstat
        for index in range(0, 256, 32):
            await reader.at_rest(index, 32)
        assert vmstat["readahead_pages_max"] == 256
        begun = vmstat["readahead_begun"]
        sizes, first = [], int(reader.vol.pages.state(reader.ip.handle)["ra_start"])
        assert first >= 256, "nobody has read in that window"
        for turn in range(5):
            await drop_caches(reader.vol)
            reader.asked()
            index = first + turn * 4
            waited, *ahead = await reader.at_rest(index, 4)
            sizes.append(waited[1])
            assert waited[0] == index
            assert ahead == []
        assert sizes == [128, 64, 32, 16, 8]
        assert vmstat["readahead_evicted"] == 5
        assert vmstat["readahead_pages_max"] == 8
        assert await reader.at_rest(0, 64) == [(0, 64), (64, 64)], "never less than a request"
        for index in range(first + 20, 3200, 4):
            await reader.at_rest(index, 4)
        more = vmstat["readahead_begun"] - begun
        assert vmstat["readahead_pages_max"] == min(8 + more, 256)
        assert 30 < more < 200
        assert vmstat["readahead_evicted"] == 5


async def test_a_writer_goes_first(scratch: Path) -> None:
    async with a_reader(scratch) as reader:
        await reader.read(0, 8)
        await wait_all_tasks_blocked()
        await reader.read(8, 4)
        async with reader.vol.iolock(reader.ip):
            await wait_all_tasks_blocked()
            assert reader.vol.arena.vmstat["readahead_skipped"] == 1
        reader.asked()
        assert await reader.at_rest(32, 4) == [(32, 64), (96, 128)], "still that window"


async def test_a_window_ends_with_the_file(scratch: Path) -> None:
    async with a_reader(scratch) as reader:
        asked = [got for at in range(PAGES - 30, PAGES) if (got := await reader.at_rest(at))]
        assert sum(pages for got in asked for _, pages in got) == 30


def test_growth() -> None:
    assert window.first_window(1, 256) == 4
    assert window.next_window(16, 256) == 32
    assert window.next_window(200, 256) == 256
