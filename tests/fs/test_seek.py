"""SEEK_DATA and SEEK_HOLE: dirty data in holes, the kernel's answers, a naive twin."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from fs import fallocate, file, truncate
from fs.cache.blocks import PENDING
from fs.cache.inode import Inode
from fs.seek import SEEK_DATA, SEEK_HOLE, find_pending, seek
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import IMAGES, a_file, opened

images = pytest.mark.parametrize("args", IMAGES.values(), ids=IMAGES.keys())


async def answer(vol: Volume, ip: Inode, offset: int, whence: int) -> int:
    """A position, or a negative errno."""
    try:
        return await seek(vol, ip, offset, whence)
    except OSError as error:
        return -(error.errno or 0)


def kernels_answer(fd: int, offset: int, whence: int) -> int:
    try:
        return os.lseek(fd, offset, whence)
    except OSError as error:
        return -(error.errno or 0)


@images
async def test_ends_and_empty_files(scratch: Path, args: tuple[str, ...]) -> None:
    async with opened(support.mkfs(scratch, *args)) as vol, a_file(vol) as ip:
        for whence in (SEEK_DATA, SEEK_HOLE):
            assert await answer(vol, ip, 0, whence) == -errno.ENXIO
        await truncate.truncate(vol, ip, 200_000)
        assert await answer(vol, ip, 70_000, SEEK_HOLE) == 70_000
        assert await answer(vol, ip, 0, SEEK_DATA) == -errno.ENXIO
        for offset in (-1, 200_000, 1 << 50):
            for whence in (SEEK_DATA, SEEK_HOLE):
                assert await answer(vol, ip, offset, whence) == -errno.ENXIO
        assert await answer(vol, ip, 0, os.SEEK_SET) == -errno.EINVAL
        await file.write(vol, ip, 0, b"x" * 200_000)
        assert await answer(vol, ip, 123, SEEK_HOLE) == 200_000
        assert await answer(vol, ip, 199_999, SEEK_DATA) == 199_999


@images
async def test_dirty_data_is_data_before_the_map_says_so(
    scratch: Path, args: tuple[str, ...]
) -> None:
    """In a hole, in an unwritten extent, and after it was written out and dropped again."""
    async with opened(support.mkfs(scratch, *args)) as vol, a_file(vol) as ip:
        unit = max(vol.geo.block_size, 4096)
        await truncate.truncate(vol, ip, 40 * unit)
        await fallocate.fallocate(vol, ip, 20 * unit, 10 * unit, 0)
        assert await answer(vol, ip, 0, SEEK_DATA) == -errno.ENXIO
        for at in (5, 25):
            await file.write(vol, ip, at * unit + unit // 2, b"d" * unit)
        for _ in range(2):
            assert await answer(vol, ip, 0, SEEK_DATA) // unit == 5
            assert -(-await answer(vol, ip, 5 * unit + unit // 2, SEEK_HOLE) // unit) == 7
            assert await answer(vol, ip, 7 * unit, SEEK_HOLE) == 7 * unit
            assert await answer(vol, ip, 7 * unit, SEEK_DATA) // unit == 25
            assert await answer(vol, ip, 27 * unit, SEEK_DATA) == -errno.ENXIO
            await file.fsync(vol, ip)
        await fallocate.fallocate(vol, ip, 0, 40 * unit, fallocate.PUNCH_HOLE | 1)
        assert await answer(vol, ip, 0, SEEK_DATA) == -errno.ENXIO


async def test_data_is_seen_at_every_moment_of_write_back(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """It is in the cache, then in the map: never in neither for one who looks."""
    image = support.mkfs(scratch)
    async with opened(image, seed=1, pause_s=0.1) as vol, a_file(vol) as ip:
        await truncate.truncate(vol, ip, 64 << 20)
        for turn in range(40):
            at = turn << 20
            await file.write(vol, ip, at, b"x" * 20_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vol.flusher.sync)
                for _ in range(30):
                    assert await answer(vol, ip, at + 10_000, SEEK_DATA) == at + 10_000
                    assert await answer(vol, ip, at, SEEK_HOLE) == at + 20_480
                    await trio.sleep(0.01)


@support.needs_root
@images
async def test_the_kernel_says_the_same(scratch: Path, args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *args)
    rng = random.Random(5)
    size = 3_000_001
    asked = [(rng.randrange(size + 10_000), rng.choice((3, 4))) for _ in range(300)]
    async with opened(image) as vol, a_file(vol) as ip:
        for _ in range(60):
            at, n = rng.randrange(size), rng.randrange(1, 40_000)
            action = rng.random()
            if action < 0.4:
                await file.write(vol, ip, at, b"w" * min(n, size - at))
            else:
                mode = (1, fallocate.ZERO_RANGE | 1, fallocate.PUNCH_HOLE | 1)[rng.randrange(3)]
                await fallocate.fallocate(vol, ip, at, n, mode)
        await truncate.truncate(vol, ip, size)
        dirty = [await answer(vol, ip, *question) for question in asked]
        await file.fsync(vol, ip)
        clean = [await answer(vol, ip, *question) for question in asked]
    assert dirty == clean
    where = scratch / "mnt"
    where.mkdir()
    with support.kernel_mount(image, where) as root, (root / "file").open("rb") as f:
        assert clean == [kernels_answer(f.fileno(), *question) for question in asked]


async def test_find_pending_against_a_naive_twin(scratch: Path) -> None:
    """Over folios of several orders, holes in the cache, blocks of 1 KiB."""
    async with opened(support.mkfs(scratch, "-b", "size=1k")) as vol, a_file(vol) as ip:
        rng = random.Random(9)
        for _ in range(25):
            at = rng.randrange(600) * 1024
            await file.write(vol, ip, at, b"x" * rng.choice((1000, 5000, 70_000)))
        await file.fsync(vol, ip)
        await fallocate.fallocate(vol, ip, 100 << 10, 300 << 10, fallocate.PUNCH_HOLE | 1)
        for _ in range(12):
            await file.write(vol, ip, rng.randrange(700) * 1024, b"y" * rng.randrange(1, 9000))
        pages = vol.pages
        p = pages.pages

        def pending(block: int) -> bool:
            pfn = pages.find(ip.handle, block >> 2)
            if not pfn:
                return False
            unit = block - (pages.base(pfn) >> 10)
            return bool(int(p.blocks[pfn + (unit >> 2)]) >> (unit & 3) & PENDING)

        states = np.array([pending(block) for block in range(800)])
        assert 20 < states.sum() < 700
        fixed = (pages.m4, pages.m8, p.order, p.index, p.blocks, pages.root(ip.handle), 10)
        for _ in range(2000):
            first = rng.randrange(800)
            last = rng.randrange(first, 801)
            wanted = rng.randrange(2)
            naive = next((b for b in range(first, last) if states[b] == wanted), last)
            assert find_pending(*fixed, first, last, wanted) == naive
