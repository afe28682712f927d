"""Blocks past the end of files: who gets how many, and that they go when nobody needs them."""

from __future__ import annotations

import errno
import os
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from fs import eofblocks, file, namespace
from fs.cache.blocks import RESERVED
from fs.cache.inode import Inode
from fs.eofblocks import LIFETIME_S, speculative
from fs.volume import Volume
from fs.xfs import bmap
from fs.xfs import layout as L
from tests import support
from tests.fs.imagefiles import IMAGES, a_file, opened
from tools.targets import make_image

KIB, MIB = 1 << 10, 1 << 20
PLENTY = 10_000_000


@pytest.mark.parametrize(
    ("piece", "free", "wanted"),
    [
        (16, PLENTY, 32),
        (300, PLENTY, 512),  # 600, rounded down to a power of two
        (5, PLENTY, 16),  # the least
        (L.BMBT_LEN_MAX // 2, PLENTY, 1 << 20),  # 2^21 - 2, rounded down
        (L.BMBT_LEN_MAX, PLENTY, 4096),  # too long: by the offset, 5000
        (1024, 4_500, 512),  # less than 5 % of 100,000 are free: a quarter
        (1024, 3_500, 256),
        (1024, 2_500, 128),
        (1024, 1_500, 64),
        (1024, 500, 32),
        (PLENTY // 16, 5_500, 4096),  # as much as is free and more: divided by 16 until it is less
        (1024, 20, 16),
    ],
)
def test_how_many(piece: int, free: int, wanted: int) -> None:
    """XFS's rule, worked out by hand."""
    assert speculative(piece, 5000, free, 100_000, 16) == wanted


def drop_caches(vol: Volume) -> None:
    """Have what is freed be read from the device first."""
    while vol.arena.reclaim.shrink_all(0, 0, "direct", 1 << 30):
        pass


async def past_end(vol: Volume, ip: Inode) -> int:
    """Blocks that a file has behind its size."""
    end = -(-ip.size // vol.geo.block_size)
    async with vol.reader(ip) as tp:
        found = await bmap.read(tp, ip, end, 1 << 20)
    return sum(m.count for m in found if m.fsbno != bmap.HOLE)


async def extents(vol: Volume, ip: Inode) -> int:
    """Pieces in which the device has a file."""
    async with vol.reader(ip) as tp:
        found = await bmap.read(tp, ip, 0, -(-ip.size // vol.geo.block_size))
    return len([m for m in found if m.fsbno != bmap.HOLE])


async def grow(vol: Volume, ip: Inode, to: int, step: int = 256 * KIB) -> None:
    """Append, and have each step written."""
    while ip.size < to:
        await file.write(vol, ip, ip.size, bytes([ip.size // step % 251]) * step)
        await file.fsync(vol, ip)


@pytest.mark.parametrize("form", ["4k", "64k", "rmapbt"])
async def test_while_it_is_written_and_not_after(form: str, scratch: Path) -> None:
    image = support.mkfs(scratch, *IMAGES[form])
    async with opened(image) as vol, a_file(vol) as ip:
        vol.eofblocks.opened(ip)
        await grow(vol, ip, 4 * MIB)
        block = vol.geo.block_size
        assert await past_end(vol, ip) >= 1 * MIB // block
        used = ip.nblocks
        vol.eofblocks.closed(ip)
        await vol.eofblocks.drain()
        assert await past_end(vol, ip) == 0
        assert used > ip.nblocks == 4 * MIB // block
        data = bytes(await file.read(vol, ip, 0, 4 * MIB))
        assert data == b"".join(bytes([n]) * (256 * KIB) for n in range(16))
    support.assert_clean(image)


async def test_who_gets_none(scratch: Path) -> None:
    """Small files, files that nobody has open for writing, append-only and preallocated ones."""
    async with opened(support.mkfs(scratch)) as vol:
        for number, (flags, size, writes) in enumerate(
            [
                (0, 32 * KIB, True),
                (0, MIB, False),
                (L.DIFLAG_APPEND, MIB, True),
                (L.DIFLAG_PREALLOC, MIB, True),
            ]
        ):
            async with a_file(vol, b"%d" % number) as ip:
                ip.flags |= flags
                if writes:
                    vol.eofblocks.opened(ip)
                await grow(vol, ip, size, min(size, 256 * KIB))
                assert await past_end(vol, ip) == 0, number
                if writes:
                    vol.eofblocks.closed(ip)


async def test_two_that_grow_side_by_side(scratch: Path) -> None:
    """A few pieces each, as they double."""
    image = support.mkfs(scratch)
    async with opened(image) as vol:
        async with a_file(vol, b"a") as a, a_file(vol, b"b") as b:
            for ip in a, b:
                vol.eofblocks.opened(ip)
            for step in range(1, 33):
                await grow(vol, a, step * 256 * KIB)
                await grow(vol, b, step * 256 * KIB)
            for ip in a, b:
                assert await extents(vol, ip) <= 8
                vol.eofblocks.closed(ip)
    support.assert_clean(image)


async def append_once(vol: Volume, ip: Inode, step: int = 64 * KIB, synced: bool = True) -> None:
    """Open, append, close."""
    vol.eofblocks.opened(ip)
    await file.write(vol, ip, ip.size, bytes([ip.size // step % 251]) * step)
    if synced:
        await file.fsync(vol, ip)
    vol.eofblocks.closed(ip)
    await vol.eofblocks.drain()


@pytest.mark.parametrize("synced", [True, False], ids=["fsync", "later"])
async def test_opened_again_for_each_piece(synced: bool, scratch: Path) -> None:
    """Two side by side: only the first close frees, so they grow as if they had stayed open."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol, b"a") as a, a_file(vol, b"b") as b:
        for _ in range(64):
            await append_once(vol, a, synced=synced)
            await append_once(vol, b, synced=synced)
            await vol.flusher.sync()
        for ip in a, b:
            assert await extents(vol, ip) <= 9
            assert await past_end(vol, ip) > 0
            data = bytes(await file.read(vol, ip, 0, ip.size))
            assert data == b"".join(bytes([n]) * (64 * KIB) for n in range(64))
    support.assert_clean(image)
    async with opened(image) as vol, a_file(vol, b"a") as a:
        assert await past_end(vol, a) == 0, "the end of the mount freed them"


async def test_a_file_that_is_made_smaller_begins_anew(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        for _ in range(4):
            await append_once(vol, ip)
        assert await past_end(vol, ip) > 0
        await file.truncate(vol, ip, 128 * KIB)
        assert await past_end(vol, ip) == 0
        await append_once(vol, ip)
        assert await past_end(vol, ip) == 0, "the first close"
        await append_once(vol, ip)
        assert await past_end(vol, ip) > 0
        vol.eofblocks.opened(ip)
        vol.eofblocks.closed(ip)
        await vol.eofblocks.drain()
        assert await past_end(vol, ip) > 0


async def test_a_file_that_is_written_once_keeps_none(scratch: Path) -> None:
    """Also if its data is written back after it was closed."""
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        vol.eofblocks.opened(ip)
        for _ in range(4):
            await file.write(vol, ip, ip.size, b"a" * 64 * KIB)
        vol.eofblocks.closed(ip)
        await vol.flusher.sync()
        assert await past_end(vol, ip) == 0
        assert not vol.eofblocks._kept


async def test_after_five_minutes(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """What is clean loses them, open or not; what is dirty at that moment later."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol, b"a") as a, a_file(vol, b"b") as b:
        for ip in a, b:
            for _ in range(4):
                await append_once(vol, ip)
        vol.eofblocks.opened(a)
        await trio.sleep(LIFETIME_S - 10)
        assert await past_end(vol, a) > 0
        await file.write(vol, b, b.size, b"b" * 4 * KIB)
        await trio.sleep(20)
        assert await past_end(vol, a) == 0
        assert await past_end(vol, b) > 0
        await trio.sleep(LIFETIME_S)
        assert await past_end(vol, b) == 0
        assert not vol.eofblocks._kept
        vol.eofblocks.closed(a)
    support.assert_clean(image)


async def test_they_keep_their_inodes_in_core(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which so far only: the first ones are given up when there are many; unlinked ones go."""
    monkeypatch.setattr(eofblocks, "KEPT_MOST", 3)
    image = support.mkfs(scratch)
    async with opened(image) as vol:
        before = vol.space.free
        root = await vol.inodes.get(vol.geo.root_ino)
        handles = []
        for n in range(5):
            async with a_file(vol, b"%d" % n) as ip:
                for _ in range(4):
                    await append_once(vol, ip)
                handles.append(ip.handle)
        drop_caches(vol)
        await vol.eofblocks.drain()
        assert list(vol.eofblocks._kept) == handles[2:]
        kept = {int(vol.inodes.fields["ino"][handle]) for handle in handles[2:]}
        drop_caches(vol)
        in_core = {int(vol.inodes.fields["ino"][handle]) for handle in vol.inodes.handles()}
        assert kept <= in_core
        for n in range(5):
            await namespace.unlink(vol, root, b"%d" % n)
        vol.inodes.put(root)
        await vol.drain_inactive()
        assert abs(vol.space.free - before) <= 16, "all is back, but for inodes' chunks"
        await vol.flush_metadata()
        drop_caches(vol)
        assert not kept & {int(vol.inodes.fields["ino"][h]) for h in vol.inodes.handles()}
        vol.arena.rcu.expedite()
        assert not vol.eofblocks._kept
    support.assert_clean(image)


async def test_what_is_dirty_behind_comes_along(scratch: Path) -> None:
    """What is written back later lies behind what was first, though others came between."""
    async with opened(support.mkfs(scratch), 64 * MIB) as vol:
        async with a_file(vol, b"a") as a, a_file(vol, b"b") as b:
            await file.write(vol, a, 0, b"a" * 4 * MIB)
            await vol.pages.write_range(a.handle, 0, 255, integrity=True, budget=1 << 30)
            await file.write(vol, b, 0, b"b" * MIB)
            await file.fsync(vol, b)
            await file.fsync(vol, a)
            assert await extents(vol, a) == 1
            assert not vol.eofblocks._kept, "nobody will append"
            assert bytes(await file.read(vol, a, 0, 4 * MIB)) == b"a" * 4 * MIB
        assert vol.space.delalloc == 0


async def test_unlinked_meanwhile(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol:
        before = vol.space.free
        root = await vol.inodes.get(vol.geo.root_ino)
        async with a_file(vol) as ip:
            vol.eofblocks.opened(ip)
            await grow(vol, ip, MIB)
            await namespace.unlink(vol, root, b"file")
            vol.eofblocks.closed(ip)
        vol.inodes.put(root)
        await vol.eofblocks.drain()
        await vol.drain_inactive()
        assert abs(vol.space.free - before) <= 16, "all is back, but for inodes' chunks"
    support.assert_clean(image)


async def test_space_that_runs_out_is_taken_from_there(scratch: Path) -> None:
    """By writers and by transactions; a file whose IOLOCK is held keeps its own for now."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol, b"a") as a, a_file(vol, b"b") as b:
        vol.eofblocks.opened(a)
        await grow(vol, a, 8 * MIB, MIB)
        spare = await past_end(vol, a)
        assert spare >= 1024
        async with vol.iolock(a):
            assert not await vol.eofblocks.squeeze()
        vol.space.pool = max(vol.space.unpromised + vol.space.stash - 300, 0)
        assert vol.space.available <= 300
        await file.write(vol, b, 0, b"b" * 2 * MIB)
        assert await past_end(vol, a) == 0
        vol.space.pool = 0
        await grow(vol, a, 9 * MIB, MIB)
        assert await past_end(vol, a) > 0
        short = vol.space.available + 10
        async with vol.transaction("truncate", short):
            assert await past_end_unlocked(vol, a) == 0
        with pytest.raises(OSError, check=lambda e: e.errno == errno.ENOSPC):
            async with vol.transaction("truncate", vol.geo.dblocks):
                pass
        vol.eofblocks.closed(a)
    support.assert_clean(image)


async def past_end_unlocked(vol: Volume, ip: Inode) -> int:
    """As past_end, of an inode that has as many blocks as its size or more."""
    return ip.nblocks - -(-ip.size // vol.geo.block_size)


async def test_the_end_of_a_mount_frees_what_is_open_still(scratch: Path) -> None:
    """Whoever never closed his file leaves nothing on the image."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        vol.eofblocks.opened(ip)
        await grow(vol, ip, MIB)
    support.assert_clean(image)
    async with opened(image) as vol, a_file(vol) as ip:
        assert ip.nblocks == MIB // vol.geo.block_size


async def test_promised_blocks_in_a_row(scratch: Path) -> None:
    """`reserved_until` against a look at each block."""
    rng = np.random.default_rng(1)
    async with opened(support.mkfs(scratch), 64 * MIB) as vol, a_file(vol) as ip:
        for first in rng.integers(0, 500, 60).tolist():
            await file.write(vol, ip, first * 4 * KIB, b"x" * 4 * KIB * int(rng.integers(1, 9)))
        reserved = [
            vol.pages.change_range(ip.handle, n, n + 1, count=RESERVED) for n in range(520)
        ]
        for first in range(500):
            for last in (first, first + 1, first + 7, 520):
                end = first
                while end < last and reserved[end]:
                    end += 1
                assert vol.pages.reserved_until(ip.handle, first, last) == end


def nr_extents(path: Path) -> int:
    """Of a file of the kernel's."""
    told = subprocess.run(["xfs_bmap", path], capture_output=True, text=True, check=True)
    return len(told.stdout.splitlines()) - 1


@pytest.mark.parametrize("files", range(1, 9))
async def test_unmounted_while_blocks_are_freed(files: int, scratch: Path) -> None:
    """The end of the mount waits for the task, which has begun."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, AsyncExitStack() as stack:
        grown = [await stack.enter_async_context(a_file(vol, b"%d" % n)) for n in range(files)]
        for ip in grown:
            vol.eofblocks.opened(ip)
        for step in range(1, 9):
            for ip in grown:
                await grow(vol, ip, step * 256 * KIB)
        for ip in grown:
            vol.eofblocks.closed(ip)
    support.assert_clean(image)


@support.needs_root
async def test_eight_writers_through_a_mount(scratch: Path) -> None:
    """Each file in a few pieces, and with the blocks of its size, when all are closed."""
    image, where = support.mkfs(scratch, size=2 << 30), scratch / "mnt"

    def write(name: Path) -> None:
        with name.open("wb", buffering=0) as out:
            for n in range(24):
                out.write(bytes([n]) * MIB)
                os.fsync(out)

    with support.our_mount(image, where):
        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(trio.to_thread.run_sync, write, where / f"{n}")
    support.assert_clean(image)
    with support.kernel_mount(image, scratch / "kernel") as there:
        for n in range(8):
            status = (there / f"{n}").stat()
            assert (status.st_size, status.st_blocks) == (24 * MIB, 24 * MIB // 512)
            assert nr_extents(there / f"{n}") <= 16


def nr_cycles(root: Path, synced: bool) -> list[int]:
    """Append to two files by turns, opening them for each piece; extents of each."""
    names = [root / "a", root / "b"]
    for n in range(200):
        for name in names:
            with name.open("ab", buffering=0) as out:
                out.write(bytes([n]) * 64 * KIB)
                if synced:
                    os.fsync(out)
    os.sync()
    return [nr_extents(name) for name in names]


@pytest.mark.slow
@pytest.mark.mount
@support.needs_fuse
@support.needs_root
@pytest.mark.parametrize("synced", [True, False], ids=["fsync", "later"])
def test_opened_again_for_each_piece_as_by_the_kernel(synced: bool, scratch: Path) -> None:
    size = 1 << 30
    image, other, where = support.mkfs(scratch, size=size), scratch / "other", scratch / "kernel"
    with support.our_mount(image, scratch / "mnt") as mounted:
        nr_cycles(mounted.path, synced)
    support.assert_clean(image)
    with support.kernel_mount(image, where) as there:
        ours = [nr_extents(there / name) for name in "ab"]
    make_image(other, size)
    with support.kernel_mount(other, where) as there:
        kernels = nr_cycles(there, synced)
    print(f"extents: ours {ours}, the kernel's {kernels}")
    assert max(ours) <= max(kernels) + 2
