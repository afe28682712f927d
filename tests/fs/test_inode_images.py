"""Every inode of an image that the kernel filled: verified, packed back, its maps in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from alloc.jit import record_table
from fs.cache.inode import INODE
from fs.volume import Volume
from fs.xfs import bmap, inobt, inode
from fs.xfs import layout as L
from tests import support
from tests.fs.test_inobt import mirrored, opened, records
from tests.fs.test_unlinked import lists
from tests.kernel_tree import make_tree


async def used_inodes(vol: Volume) -> list[int]:
    """What the inobt says is in use."""
    found = []
    for agno in range(vol.geo.agcount):
        for chunk in await records(vol, agno, finobt=False):
            bits = (i for i in range(64) if not chunk.free >> i & 1)
            found += [vol.geo.ino(agno, chunk.startino + i) for i in bits]
    return found


@support.needs_root
@support.geometries
async def test_kernel_images(scratch: Path, mkfs_args: tuple[str, ...]) -> None:
    path = support.mkfs(scratch, *mkfs_args, size=400 << 20)
    where = scratch / "mnt"
    where.mkdir()
    with support.kernel_mount(path, where) as root:
        make_tree(root, 1)
    async with opened(path) as vol:
        await mirrored(vol)
        assert await lists(vol) == {}
        inos = await used_inodes(vol)
        assert len(inos) > 100
        forms = set()
        for ino in inos:
            await packs_back(vol, ino)
            ip = await vol.inodes.get(ino)
            forms.add((ip.format, ip.aformat if ip.forkoff else None))
            async with vol.reader(ip) as tp:
                assert await bmap.check(tp, ip) == "", ino
                if ip.aformat in (L.FMT_EXTENTS, L.FMT_BTREE):
                    assert await bmap.check(tp, ip, bmap.ATTR) == "", ino
            vol.inodes.put(ip)
        wanted = {L.FMT_DEV, L.FMT_LOCAL, L.FMT_EXTENTS}
        if vol.geo.block_size < 65536:  # there the kernel's files have too few extents
            wanted.add(L.FMT_BTREE)
        assert {form for form, _ in forms} == wanted
        assert {1, 2} <= {form for _, form in forms if form is not None}
    support.assert_clean(path)


async def packs_back(vol: Volume, ino: int) -> None:
    """Unpacking and packing an inode gives the same bytes."""
    geo = vol.geo
    async with vol.reader() as tp:
        daddr, bbs, offset = inobt.imap(geo, ino)
        buf = await tp.read(daddr, bbs, inode.INODE_OPS)
        addr = buf.addr + offset
        assert inode.verify(geo, buf.mem, addr, ino) == ""
        table = record_table(np.zeros(1, INODE))
        image = np.zeros(geo.inode_size, np.uint8)
        inode.unpack(geo, buf.mem, addr, table, 0, image, 0)
        target = image.copy()
        inode.pack(geo, table, 0, image, 0, target, 0)
        assert bytes(target) == bytes(image)
