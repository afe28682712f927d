"""Extent maps of files that share blocks, on images whose sharing the kernel made."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fs.cache.inode import Inode
from fs.volume import Volume
from fs.xfs import bmap, freespace, refcount
from fs.xfs import layout as L
from fs.xfs.bmap import HOLE, Mapping
from fs.xfs.owner import Owner
from tests import support
from tests.fs.test_bmap import change, opened, sound

SIZE = 1 << 20

pytestmark = support.needs_root
variants = pytest.mark.parametrize("args", [(), ("-m", "rmapbt=1"), ("-b", "size=1k")],
                                   ids=["default", "rmapbt", "1k"])  # fmt: skip


def make_shared(directory: Path, where: Path, *args: str) -> tuple[Path, dict[str, int], str]:
    """An image with a file, two clones of it, and the digest of their content."""
    path = support.mkfs(directory, *args)
    where.mkdir()
    with support.kernel_mount(path, where) as root:
        data = os.urandom(SIZE)
        (root / "a").write_bytes(data)
        for name in ("b", "c"):
            command = ["cp", "--reflink=always", str(root / "a"), str(root / name)]
            subprocess.run(command, check=True)
        inos = {name: (root / name).stat().st_ino for name in "abc"}
    return path, inos, hashlib.sha256(data).hexdigest()


def digest(path: Path, where: Path, name: str) -> str:
    with support.kernel_mount(path, where) as root:
        return hashlib.sha256((root / name).read_bytes()).hexdigest()


@asynccontextmanager
async def held(vol: Volume, ino: int) -> AsyncIterator[Inode]:
    ip = await vol.inodes.get(ino)
    try:
        yield ip
    finally:
        vol.inodes.put(ip)


async def owned(vol: Volume, ip: Inode) -> int:
    """Blocks of the file that nobody shares."""
    alone = 0
    async with vol.reader(ip) as tp:
        for piece in await bmap.read(tp, ip, 0, SIZE // vol.geo.block_size):
            if piece.fsbno == HOLE:
                continue
            at, end = piece.fsbno, piece.fsbno + piece.count
            while at < end:
                shared = await refcount.find_shared(tp, at, end - at)
                start, count = shared if shared is not None else (end, 0)
                alone += start - at
                at = start + count
    return alone


@variants
async def test_unmap_gives_back_only_what_is_not_shared(
    scratch: Path, args: tuple[str, ...]
) -> None:
    path, inos, wanted = make_shared(scratch, scratch / "mnt", *args)
    async with opened(path) as vol:
        blocks = SIZE // vol.geo.block_size
        third = blocks // 3
        async with held(vol, inos["b"]) as b:
            assert b.flags2 & L.DIFLAG2_REFLINK
            free = vol.space.free
            async with change(vol, b) as tp:
                assert await bmap.unmap(tp, b, third, third)
            await sound(vol, b)
            assert vol.space.free == free
            assert b.nblocks == blocks - third
        async with held(vol, inos["c"]) as c:
            async with change(vol, c) as tp:
                assert await bmap.unmap(tp, c, 0, 2 * third)
            assert vol.space.free == free
        async with held(vol, inos["a"]) as a:
            assert await owned(vol, a) == third
    support.assert_clean(path)
    assert digest(path, scratch / "mnt", "a") == wanted
    async with opened(path) as vol:
        free = vol.space.free
        for name, gone in (("a", third), ("b", third), ("c", blocks - third)):
            async with held(vol, inos[name]) as ip, change(vol, ip) as tp:
                assert await bmap.unmap(tp, ip, 0, blocks)
                assert ip.nblocks == 0
            assert gone
        assert vol.space.free == free + blocks
    support.assert_clean(path)


@variants
async def test_remap(scratch: Path, args: tuple[str, ...]) -> None:
    """New blocks take the place of shared ones, in the middle of an extent and over a hole."""
    path, inos, wanted = make_shared(scratch, scratch / "mnt", *args)
    async with opened(path) as vol:
        blocks = SIZE // vol.geo.block_size
        async with held(vol, inos["b"]) as b:
            for offset, count in ((10, 20), (40, 1), (blocks - 5, 5)):
                free = vol.space.free
                async with change(vol, b, 100) as tp:
                    old = await bmap.lookup(tp, b, offset)
                    assert old is not None
                    fsbno, got = await freespace.alloc(
                        tp, near=old.fsbno, minlen=count, maxlen=count, owner=Owner(b.ino, offset)
                    )
                    await bmap.remap(tp, b, Mapping(offset, fsbno, got))
                assert b.nblocks == blocks
                assert vol.space.free == free - count
                await sound(vol, b)
            assert await owned(vol, b) == 26
    support.assert_clean(path)
    for name in "ac":
        assert digest(path, scratch / "mnt", name) == wanted
    assert digest(path, scratch / "mnt", "b") != wanted
