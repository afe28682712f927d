"""Directory blocks of several filesystem blocks that are not in one piece on the disk.

The kernel makes them when the free space has no such piece, and so do we.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path

import pytest

from fs import namespace
from fs.xfs import bmap
from tests import support
from tests.fs.dirimages import form, getdents, listed, names_of, opened, using

pytestmark = support.needs_root
KEEP_SIZE, PUNCH_HOLE = 1, 2
HOLES = 3000


def fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return bool(call(fd, mode, offset, length) == 0)


def shatter(mount: Path, block_bytes: int) -> None:
    """Fill the filesystem, then free single blocks none of which touch."""
    reserve = ["xfs_io", "-x", "-c", "resblks 0", str(mount)]
    subprocess.run(reserve, check=True, stdout=subprocess.DEVNULL)
    (mount / "target").touch()
    for name in ("a", "b"):
        (mount / name).mkdir()
        os.link(mount / "target", mount / name / "first")
    fd = os.open(mount / "hog", os.O_CREAT | os.O_RDWR)
    at, step = 0, 64 << 20
    while step >= block_bytes:
        if fallocate(fd, 0, at, step):
            at += step
        else:
            step //= 2
    for i in range(HOLES):
        assert fallocate(fd, KEEP_SIZE | PUNCH_HOLE, 2 * i * block_bytes, block_bytes)
    os.close(fd)


def long_name(i: int) -> bytes:
    return b"%d-" % i + b"n" * (i % 200)


@pytest.fixture
def image(scratch: Path) -> Path:
    # Without these trees no free space is set apart for their growth.
    image = support.mkfs(scratch, "-b", "size=1k", "-m", "finobt=0,reflink=0")
    with support.kernel_mount(image, scratch / "mnt") as mount:
        shatter(mount, 1024)
        for i in range(700):
            os.link(mount / "target", os.path.join(os.fsencode(mount), b"a", long_name(i)))
    return image


async def broken_blocks(path: Path, name: bytes) -> int:
    """Directory blocks of a directory that are in several pieces."""
    async with opened(path) as vol, using(vol, name) as dp, vol.reader(dp) as tp:
        count = 0
        for start in range(0, dp.size >> vol.geo.block_log, vol.geo.dir_block_blocks):
            pieces = await bmap.read(tp, dp, start, vol.geo.dir_block_blocks)
            count += len(pieces) > 1
        return count


async def test_the_kernels_pieces_are_read(scratch: Path, image: Path) -> None:
    assert await broken_blocks(image, b"a") > 10
    with support.kernel_mount(image, scratch / "mnt", "loop,ro") as mount:
        expected = getdents(mount / "a")
    async with opened(image) as vol, using(vol, b"a") as dp:
        assert await form(vol, dp) == "node"
        got = [(e.name, e.ino, e.next_cookie) for e in await listed(vol, dp)]
        assert got == [(e.name, e.ino, e.off) for e in expected]
        for i in range(0, 700, 7):
            vol.inodes.put(await namespace.lookup(vol, dp, long_name(i)))


@pytest.mark.compiled
async def test_pieces_are_written_and_freed(scratch: Path, image: Path) -> None:
    names = {long_name(i) for i in range(700)} | {b"first"}
    async with opened(image) as vol, using(vol) as root, using(vol, b"target") as target:
        vol.space.pool = 0  # what is left is for this test
        for name in (b"a", b"b"):
            async with using(vol, name) as dp:
                for i in range(700, 900) if name == b"a" else range(500):
                    await namespace.link(vol, dp, long_name(i), target)
                for i in range(0, 700 if name == b"a" else 500, 2):
                    await namespace.unlink(vol, dp, long_name(i))
        assert root.nlink == 4
    names = {n for i, n in ((i, long_name(i)) for i in range(900)) if i >= 700 or i % 2}
    support.assert_clean(image)
    assert await broken_blocks(image, b"b") > 10
    with support.kernel_mount(image, scratch / "mnt") as mount:
        assert {os.fsencode(n) for n in os.listdir(mount / "a")} == names | {b"first"}
        assert len(os.listdir(mount / "b")) == 251
        os.rename(mount / "a" / "first", mount / "b" / "moved")
    async with opened(image) as vol, using(vol) as root:
        for name in (b"a", b"b"):
            async with using(vol, name) as dp:
                for gone in list(await names_of(vol, dp)):
                    await namespace.unlink(vol, dp, gone)
                assert await form(vol, dp) == "short"
            await namespace.rmdir(vol, root, name)
    support.assert_clean(image)
