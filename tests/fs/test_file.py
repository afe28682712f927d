"""Files through the page cache, on real images: against a bytearray, under pressure, to ENOSPC."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from alloc import gfp
from fs import buffered, file
from fs.cache.inode import Inode
from fs.truncate import SIZE_MAX
from fs.volume import Volume
from fs.xfs import bmap
from tests import support
from tests.fs.imagefiles import IMAGES, SlowImage, a_file, opened

images = pytest.mark.parametrize("args", IMAGES.values(), ids=IMAGES.keys())
MOST = 3 << 20  # largest file of the random runs


class Model:
    """A file and the bytes it should have."""

    def __init__(self, vol: Volume, ip: Inode, seed: int) -> None:
        self.vol, self.ip = vol, ip
        self.random = random.Random(seed)
        self.bytes = bytearray()

    async def step(self) -> None:
        what = self.random.choices(
            ("write", "append", "read", "truncate", "grow", "fsync", "reclaim", "rest"),
            (30, 10, 30, 5, 3, 2, 3, 5),
        )[0]
        await getattr(self, what)()

    def span(self) -> tuple[int, int]:
        size = self.random.choice((1, 100, 4096, 5000, 65536, 200_000, 1 << 20))
        at = self.random.randrange(max(len(self.bytes), 1) + 10_000)
        if self.random.random() < 0.4:
            at &= -4096
        return at, self.random.randint(1, size)

    async def write_at(self, at: int, size: int) -> None:
        if at + size > MOST:
            return
        data = self.random.randbytes(size)
        assert await file.write(self.vol, self.ip, at, data) == size
        if at > len(self.bytes):
            self.bytes.extend(bytes(at - len(self.bytes)))
        self.bytes[at : at + size] = data

    async def write(self) -> None:
        await self.write_at(*self.span())

    async def append(self) -> None:
        await self.write_at(len(self.bytes), self.span()[1])

    async def read(self) -> None:
        at, size = self.span()
        got = bytes(await file.read(self.vol, self.ip, at, size))
        assert got == self.bytes[at : at + size]

    async def truncate(self) -> None:
        size = self.random.randrange(len(self.bytes) + 1)
        await file.truncate(self.vol, self.ip, size)
        del self.bytes[size:]

    async def grow(self) -> None:
        size = min(len(self.bytes) + self.random.randrange(300_000), MOST)
        if size > len(self.bytes):
            await file.truncate(self.vol, self.ip, size)
            self.bytes.extend(bytes(size - len(self.bytes)))

    async def fsync(self) -> None:
        await file.fsync(self.vol, self.ip)
        state = self.vol.pages.state(self.ip.handle)
        assert state["ndirty"] == 0
        assert self.ip.disk_size == self.ip.size

    async def reclaim(self) -> None:
        self.vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20)

    async def rest(self) -> None:
        await trio.sleep(self.random.choice((0, 0.01, 1, 6)))

    async def check(self) -> None:
        assert self.ip.size == len(self.bytes)
        assert bytes(await file.read(self.vol, self.ip, 0, len(self.bytes) + 1)) == self.bytes


@images
async def test_random_use_equals_a_bytearray(
    scratch: Path, args: tuple[str, ...], autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch, *args)
    memory = 16 << 20 if "size=64k" in args else 8 << 20  # the least that their log needs
    async with opened(image, memory, seed=1, pause_s=0.02) as vol, a_file(vol) as ip:
        model = Model(vol, ip, seed=7)
        for _ in range(300):
            await model.step()
        await model.check()
        vol.arena.check()
    async with opened(image) as vol, a_file(vol) as ip:
        model.vol, model.ip = vol, ip
        await model.check()
    support.assert_clean(image)


async def drop_caches(vol: Volume) -> None:
    """Write everything and evict every folio."""
    await vol.ahead.settle()
    await vol.flusher.sync()
    for _ in range(4):
        vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20)
    assert vol.arena.lru.nr_active + vol.arena.lru.nr_inactive == 0


async def extents(vol: Volume, ip: Inode) -> list[bmap.Mapping]:
    async with vol.reader(ip) as tp:
        found = await bmap.read(tp, ip, 0, (ip.size // vol.geo.block_size) + 64)
    return [m for m in found if m.fsbno != bmap.HOLE]


async def contents(vol: Volume, ip: Inode) -> bytes:
    return bytes(await file.read(vol, ip, 0, ip.size + 1))


# -- reading -----------------------------------------------------------------------------------


async def test_a_cached_read_is_a_copy(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"abcd" * 2048)
        got = await file.read(vol, ip, 4, 4000)
        await file.write(vol, ip, 0, b"efgh" * 2048)
        assert got == b"abcd" * 1000
        assert await file.read(vol, ip, 8192, 1) == b""
        assert bytes(await file.read(vol, ip, 8190, 100)) == b"gh"


async def test_holes_are_read_without_memory(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.truncate(vol, ip, 1 << 40)
        assert bytes(await file.read(vol, ip, 1 << 39, 100_000)) == bytes(100_000)
        assert vol.pages.state(ip.handle)["nrpages"] == 0
        await file.write(vol, ip, (1 << 39) + 5000, b"x")
        got = bytes(await file.read(vol, ip, 1 << 39, 10_000))
        assert got == bytes(5000) + b"x" + bytes(4999)


async def test_sequential_reads_grow_the_window(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, os.urandom(1 << 20))
        await drop_caches(vol)
        assert isinstance(vol.dev, SlowImage)
        vol.dev.reads.clear()
        for at in range(0, 1 << 20, 4096):
            await file.read(vol, ip, at, 4096)
        sizes = [length for _, length in vol.dev.reads]
        assert len(sizes) < 20
        assert sizes == sorted(sizes) or sizes[:-1] == sorted(sizes[:-1])  # the last: end of file
        vol.dev.reads.clear()
        await drop_caches(vol)
        await file.read(vol, ip, 500_000, 10)
        assert [length for _, length in vol.dev.reads] == [4096]


async def test_requests_that_overtake_each_other_are_sequential(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """As the kernel reads ahead: 32 KiB each, four under way, in any order."""
    image, rng, step = support.mkfs(scratch), random.Random(3), 32 << 10
    async with opened(image, 64 << 20, pause_s=0.01) as vol, a_file(vol) as ip:
        content = rng.randbytes(8 << 20)
        await file.write(vol, ip, 0, content)
        await drop_caches(vol)
        assert isinstance(vol.dev, SlowImage)
        vol.dev.reads.clear()

        async def read(at: int) -> None:
            await trio.sleep(rng.random() * 0.001)
            assert bytes(await file.read(vol, ip, at, step)) == content[at : at + step]

        for first in range(0, len(content), 4 * step):
            async with trio.open_nursery() as nursery:
                for at in range(first, first + 4 * step, step):
                    nursery.start_soon(read, at)
        sizes = [length for _, length in vol.dev.reads]
        assert sum(sizes) == len(content)
        assert len(sizes) < 64  # about 25, by the order in which trio runs the readers
        assert max(sizes) >= 512 << 10
        assert vol.arena.vmstat["readahead_evicted"] == 0, "of what is read; shadows there are"


async def test_readers_of_one_folio_share_its_read(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(support.mkfs(scratch), pause_s=0.1) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"z" * 4096)
        await drop_caches(vol)
        assert isinstance(vol.dev, SlowImage)
        vol.dev.reads.clear()
        got: list[bytes] = []

        async def reader() -> None:
            got.append(bytes(await file.read(vol, ip, 0, 10)))

        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(reader)
        assert got == [b"z" * 10] * 5
        assert len(vol.dev.reads) == 1


# -- writing and write-back --------------------------------------------------------------------


@images
async def test_sequential_writes_make_one_extent(scratch: Path, args: tuple[str, ...]) -> None:
    async with opened(support.mkfs(scratch, *args)) as vol, a_file(vol) as ip:
        for at in range(0, 1 << 20, 100_000):
            await file.write(vol, ip, at, bytes([at & 255]) * 100_000)
        assert await extents(vol, ip) == []  # delayed
        assert vol.space.delalloc >= (1 << 20) // vol.geo.block_size
        assert file.stat_blocks(vol, ip) * 512 >= 1 << 20
        await file.fsync(vol, ip)
        (whole,) = await extents(vol, ip)
        assert whole.count == -(-ip.size // vol.geo.block_size)
        assert not whole.unwritten
        assert vol.space.delalloc == 0


async def test_contiguous_folios_become_one_device_write(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        for page in reversed(range(64)):
            await file.write(vol, ip, page << 12, bytes([page]) * 4096)
        assert isinstance(vol.dev, SlowImage)
        vol.dev.writes.clear()
        await vol.flusher.sync()
        assert [length for _, length in vol.dev.writes] == [64 << 12]


async def test_overwriting_needs_no_transaction(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"a" * 100_000)
        await file.fsync(vol, ip)
        before = await extents(vol, ip)
        await file.write(vol, ip, 5000, b"b" * 10)
        assert vol.space.delalloc == 0
        assert vol.pages.state(ip.handle)["pending"] == 0
        await drop_caches(vol)
        assert await extents(vol, ip) == before
        assert (await contents(vol, ip))[4999:5011] == b"a" + b"b" * 10 + b"a"


async def test_the_disk_size_never_passes_the_data(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(support.mkfs(scratch), pause_s=0.1) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"a" * 50_000)
        assert (ip.size, ip.disk_size) == (50_000, 0)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.fsync, vol, ip)
            while vol.pages.dirty.nr_writeback == 0:
                await trio.sleep(0.001)
            assert ip.disk_size == 0
            assert all(m.unwritten for m in await extents(vol, ip))
        assert ip.disk_size == 50_000


async def test_a_write_during_write_back_is_not_lost(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(support.mkfs(scratch), pause_s=0.1) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"a" * 4096)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vol.flusher.sync)
            while vol.pages.dirty.nr_writeback == 0:
                await trio.sleep(0.001)
            await file.write(vol, ip, 0, b"b" * 4096)
            assert vol.pages.dirty.nr_dirty == 1
        await drop_caches(vol)
        assert await contents(vol, ip) == b"b" * 4096


async def test_writers_are_held_back_at_the_limit(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(support.mkfs(scratch), 8 << 20, pause_s=0.2) as vol, a_file(vol) as ip:
        dirty = vol.pages.dirty
        slack = 1 << vol.pages.order_max
        for at in range(0, 12 << 20, 65536):
            await file.write(vol, ip, at, bytes(65536))
            assert dirty.nr_dirty + dirty.nr_writeback <= dirty.limit + slack
        assert vol.pages.throttle.paused > 0


async def test_a_failed_write_back_is_told_once(
    scratch: Path, allow_logs: Callable[[str], None]
) -> None:
    allow_logs("write-back failed, data is lost")
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"a" * 4096)
        assert isinstance(vol.dev, SlowImage)
        vol.dev.fail_writes = True
        await vol.flusher.sync()
        vol.dev.fail_writes = False
        assert vol.pages.dirty.nr_dirty == 0
        with pytest.raises(OSError, match="failed earlier") as told:
            await file.fsync(vol, ip)
        assert told.value.errno == errno.EIO
        await file.fsync(vol, ip)
        assert vol.space.delalloc == 0


async def test_limits_of_positions(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        with pytest.raises(OSError, match="too large") as told:
            await file.write(vol, ip, SIZE_MAX, b"x")
        assert told.value.errno == errno.EFBIG
        with pytest.raises(OSError, match="too large"):
            await file.truncate(vol, ip, SIZE_MAX + 1)
        assert await file.write(vol, ip, SIZE_MAX - 1, b"xyz") == 1
        assert ip.size == SIZE_MAX
        assert bytes(await file.read(vol, ip, SIZE_MAX - 2, 10)) == b"\0x"
        await file.truncate(vol, ip, 0)
        assert await file.write(vol, ip, 0, b"") == 0


async def test_set_id_bits_go_when_asked(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        ip.mode |= 0o6010
        await file.write(vol, ip, 0, b"x")
        assert ip.mode & 0o7777 == 0o6654
        await file.write(vol, ip, 0, b"x", kill_privileges=True)
        assert ip.mode & 0o7777 == 0o654


# -- truncation --------------------------------------------------------------------------------


@images
async def test_a_shrunk_file_grows_zeros(scratch: Path, args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol:
        for number, evict in enumerate((False, True)):
            async with a_file(vol, b"file%d" % number) as ip:
                await file.write(vol, ip, 0, b"a" * 200_000)
                if evict:
                    await drop_caches(vol)
                await file.truncate(vol, ip, 70_001)
                if evict:
                    await drop_caches(vol)
                await file.truncate(vol, ip, 150_000)
                await file.write(vol, ip, 180_000, b"b")
                if evict:
                    await drop_caches(vol)
                expected = b"a" * 70_001 + bytes(109_999) + b"b"
                assert await contents(vol, ip) == expected
                assert ip.nblocks <= 70_001 // vol.geo.block_size + 2
    support.assert_clean(image)


async def test_truncation_gives_promises_back(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, bytes(1 << 20))
        await file.truncate(vol, ip, 100_000)
        assert ip.nblocks == 25  # the rest never got blocks
        await file.write(vol, ip, 200_000, bytes(1 << 20))
        await file.truncate(vol, ip, 0)
        state = vol.pages.state(ip.handle)
        assert (state["delalloc"], state["pending"], state["indirect"]) == (0, 0, 0)
        assert vol.space.delalloc == 0
        assert vol.flusher.nr_listed == 0
        assert vol.pages.dirty.nr_dirty == 0


async def test_truncation_waits_for_write_back(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch)
    async with opened(image, pause_s=0.3) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"a" * (1 << 20))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vol.flusher.sync)
            while vol.pages.dirty.nr_writeback == 0:
                await trio.sleep(0.001)
            await file.truncate(vol, ip, 5)
            assert vol.pages.dirty.nr_writeback == 0
        assert await contents(vol, ip) == b"a" * 5
    support.assert_clean(image)


async def test_a_large_file_is_unmapped_in_steps(scratch: Path) -> None:
    image = support.mkfs(scratch, "-b", "size=1k")
    async with opened(image) as vol, a_file(vol) as ip:
        free = vol.space.free
        for block in range(0, 1200, 2):  # every other block: 600 extents
            await file.write(vol, ip, block << 10, b"x" * 1024)
        await file.fsync(vol, ip)
        assert ip.nextents == 600
        await file.truncate(vol, ip, 1024 * 100)
        assert ip.nextents == 50
        await file.truncate(vol, ip, 0)
        assert ip.nblocks == 0
        assert vol.space.free == free
    support.assert_clean(image)


# -- running out of space ----------------------------------------------------------------------


@images
async def test_no_space_is_exact_and_clean(scratch: Path, args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *args)
    async with opened(image, 32 << 20) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"first")
        await file.fsync(vol, ip)
        data = bytes(1 << 20)
        room = vol.space.available * vol.geo.block_size
        done = 0
        with pytest.raises(OSError, match="no space") as told:
            while True:
                done += await file.write(vol, ip, (1 << 20) + done, data)
        assert told.value.errno == errno.ENOSPC
        assert room - done < room // 100  # the rest is the map's tree
        assert ip.size == (1 << 20) + done
        await vol.flusher.sync()
        small = 0
        with pytest.raises(OSError, match="no space"):
            while small < 100:  # what is left goes block by block, and then no more
                await file.write(vol, ip, (1 << 20) + done, data[: vol.geo.block_size])
                done += vol.geo.block_size
                small += 1
        assert bytes(await file.read(vol, ip, 0, 5)) == b"first"
        await file.write(vol, ip, 0, b"again")  # an overwrite needs no space
        await file.fsync(vol, ip)
        await file.truncate(vol, ip, 10)
        await file.write(vol, ip, 0, data)
        await file.fsync(vol, ip)
    support.assert_clean(image)


async def test_scattered_blocks_to_the_last(scratch: Path) -> None:
    image = support.mkfs(scratch, "-b", "size=1k", size=300 << 20)
    async with opened(image, 32 << 20) as vol, a_file(vol) as ip:
        async with a_file(vol, b"filler") as filler:
            left = 2000 * 1024
            fill = vol.space.available * 1024 - left
            for at in range(0, fill, 1 << 20):
                await file.write(vol, filler, at, bytes(min(1 << 20, fill - at)))
            await vol.flusher.sync()
        with pytest.raises(OSError, match="no space"):
            for block in range(5000):
                await file.write(vol, ip, block * 2048, b"x" * 1024)
        await file.fsync(vol, ip)
        assert ip.nextents > 1800  # nearly all of the 2000: the worst case was given back
    support.assert_clean(image)


# -- extents that the kernel made --------------------------------------------------------------


@support.needs_root
@pytest.mark.parametrize("args", [(), ("-m", "rmapbt=1"), ("-b", "size=1k")])
async def test_shared_extents_are_copied(scratch: Path, args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *args)
    where = scratch / "mnt"
    where.mkdir()
    data = bytearray(os.urandom(300_000))
    with support.kernel_mount(image, where):
        (where / "file").write_bytes(data)
        subprocess.run(["cp", "--reflink=always", where / "file", where / "other"], check=True)
    original = bytes(data)
    async with opened(image) as vol, a_file(vol, b"file") as ip, a_file(vol, b"other") as other:
        rng = random.Random(3)
        for _ in range(20):
            at, piece = rng.randrange(290_000), rng.randbytes(rng.choice((10, 1024, 9000)))
            await file.write(vol, ip, at, piece)
            data[at : at + len(piece)] = piece
            if rng.random() < 0.3:
                await file.fsync(vol, ip)
        await file.truncate(vol, other, 100_001)
        assert await contents(vol, ip) == data
        await drop_caches(vol)
        assert await contents(vol, ip) == data
        assert await contents(vol, other) == original[:100_001]
    support.assert_clean(image)
    with support.kernel_mount(image, where):
        assert (where / "file").read_bytes() == data
        assert (where / "other").read_bytes() == original[:100_001]


@support.needs_root
async def test_preallocated_blocks_are_written_in_place(scratch: Path) -> None:
    image = support.mkfs(scratch)
    where = scratch / "mnt"
    where.mkdir()
    with support.kernel_mount(image, where):
        subprocess.run(["fallocate", "-l", "400k", where / "file"], check=True)
    async with opened(image) as vol, a_file(vol) as ip:
        (before,) = await extents(vol, ip)
        assert before.unwritten
        await file.write(vol, ip, 100_000, b"x" * 50_000)
        assert vol.pages.state(ip.handle)["delalloc"] == 0  # no data block was promised
        await drop_caches(vol)
        after = await extents(vol, ip)
        assert [m.unwritten for m in after] == [True, False, True]
        assert [m.fsbno - m.offset for m in after] == [before.fsbno] * 3
        expected = bytes(100_000) + b"x" * 50_000 + bytes(259_600)
        assert await contents(vol, ip) == expected
    support.assert_clean(image)
    with support.kernel_mount(image, where):
        assert (where / "file").read_bytes() == expected


# -- many at once ------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(), ("-b", "size=1k")])
async def test_tasks_share_a_file(
    scratch: Path, args: tuple[str, ...], autojump_clock: trio.testing.MockClock
) -> None:
    """Each task owns every fourth piece of 3000 bytes; all read, sync and reclaim."""
    image = support.mkfs(scratch, *args)
    pieces, size = 200, 3000
    mirror = bytearray(pieces * size)
    memory = 16 << 20 if "size=64k" in args else 8 << 20  # the least that their log needs
    async with opened(image, memory, seed=5, pause_s=0.05) as vol, a_file(vol) as ip:
        await file.truncate(vol, ip, len(mirror))

        async def task(number: int) -> None:
            rng = random.Random(number)
            for _ in range(120):
                at = (rng.randrange(pieces // 4) * 4 + number) * size
                data = rng.randbytes(size)
                await file.write(vol, ip, at, data)
                mirror[at : at + size] = data
                if rng.random() < 0.05:
                    await file.fsync(vol, ip)
                if rng.random() < 0.1:
                    vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20)
                assert bytes(await file.read(vol, ip, at, size)) == data

        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(task, number)
        assert await contents(vol, ip) == mirror
        await drop_caches(vol)
        assert await contents(vol, ip) == mirror
    support.assert_clean(image)


# -- the end of the world ----------------------------------------------------------------------


async def test_a_shutdown_lets_everybody_go(
    scratch: Path,
    autojump_clock: trio.testing.MockClock,
    allow_logs: Callable[[str], None],
) -> None:
    allow_logs("told to|Shutting down|unmounted after a shutdown")
    device = SlowImage(support.mkfs(scratch), pause_s=0.2)
    ended: list[str] = []

    async def writer(vol: Volume, ip: Inode) -> None:
        with pytest.raises(OSError, match="shut down"):
            for at in range(0, 64 << 20, 65536):
                await file.write(vol, ip, at, bytes(65536))
        ended.append("writer")

    async def syncer(vol: Volume, ip: Inode) -> None:
        with pytest.raises(OSError, match="shut down|failed earlier"):
            while True:
                await file.fsync(vol, ip)
                await trio.sleep(0.1)
        ended.append("syncer")

    async with Volume.open(device, 8 << 20) as vol:
        async with a_file(vol) as ip, a_file(vol, b"other") as other:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(writer, vol, ip)
                nursery.start_soon(writer, vol, other)
                nursery.start_soon(syncer, vol, ip)
                await trio.sleep(2)
                assert vol.pages.throttle.paused
                vol.shutdown("the test told to")
            await trio.sleep(60)
            assert vol.pages.dirty.nr_dirty == 0
            assert vol.pages.dirty.nr_writeback == 0
    device.close()
    assert sorted(ended) == ["syncer", "writer", "writer"]


async def test_a_size_is_not_logged_before_its_data(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(support.mkfs(scratch), pause_s=0.5) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * 100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(file.fsync, vol, ip)
            while not vol.pages.dirty.nr_writeback:
                await trio.sleep(0.01)
            assert await file.write(vol, ip, 100, b"y" * 200) == 200  # into the same block
            assert vol.pages.dirty.nr_writeback == vol.pages.dirty.nr_dirty == 1
        assert (ip.size, ip.disk_size) == (300, 100)
        await file.fsync(vol, ip)
        assert (ip.size, ip.disk_size) == (300, 300)
        assert not vol.pages.busy(ip.handle)


async def test_a_part_of_a_block_is_written_however_fast_folios_are_evicted(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the map takes memory, and evicts all that nobody holds."""
    classify = buffered.classify

    def evict(vol: Volume) -> None:
        for _ in range(3):  # second chances, too
            vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20)

    async def greedy(vol: Volume, *args: Any) -> list[buffered.Part]:
        parts = await classify(vol, *args)
        evict(vol)
        await trio.lowlevel.checkpoint()
        return parts

    monkeypatch.setattr(buffered, "classify", greedy)
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * 300_000)
        await file.fsync(vol, ip)
        evict(vol)
        with trio.fail_after(10):
            for at in (100, 5000, 299_000):
                await file.write(vol, ip, at, b"y" * 50)
        read = bytes(await file.read(vol, ip, 0, 300_000))
        assert read.count(b"y") == 150
        assert read[4990:5060] == b"x" * 10 + b"y" * 50 + b"x" * 10
