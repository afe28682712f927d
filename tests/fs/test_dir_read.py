"""Directories that the kernel made, in every form: lookup, order and cookies as the kernel's."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from fs.xfs import dir as directory
from tests import support
from tests.fs import dirmodel
from tests.fs.dirimages import IMAGES, Dirent, form, getdents, listed, opened, using

pytestmark = support.needs_root
images = pytest.mark.parametrize("args", IMAGES.values(), ids=IMAGES.keys())


def fill(where: Path, names: list[bytes], keep: float = 1.0, seed: int = 1) -> None:
    """Make a directory with these names, then remove some of them again."""
    where.mkdir()
    base = os.fsencode(where)
    (where.parent / "target").touch()
    for name in names:
        os.link(where.parent / "target", os.path.join(base, name))
    rng = random.Random(seed)
    for name in names:
        if rng.random() >= keep:
            os.unlink(os.path.join(base, name))


def make_forms(mount: Path, block_bytes: int) -> None:
    """One directory of each form, with and without removals, and one of every file type."""
    per_block = block_bytes // 24
    fill(mount / "short", [b"a", b"bb", b"name with \xff\xfe"])
    fill(mount / "block", [b"block%d" % i for i in range(per_block // 3)])
    fill(mount / "leaf", [b"leaf%d" % i for i in range(per_block * 2)], keep=0.9)
    many = [b"n%d" % i + b"x" * (i % 120) for i in range(max(1200, block_bytes // 7))]
    fill(mount / "node", many + dirmodel.colliding(200))
    fill(mount / "holes", [b"%d-" % i + b"y" * 200 for i in range(block_bytes // 8)], keep=0.1)
    kinds = mount / "kinds"
    kinds.mkdir()
    (kinds / "dir").mkdir()
    (kinds / "file").touch()
    (kinds / "link").symlink_to("file")
    os.mkfifo(kinds / "fifo")
    os.mknod(kinds / "char", 0o20600, os.makedev(1, 3))
    os.mknod(kinds / "block", 0o60600, os.makedev(7, 0))


FORMS = {"short": "short", "block": "block", "leaf": "leaf", "node": "node", "kinds": "short"}
DTYPES = {1: 8, 2: 4, 3: 2, 4: 6, 5: 1, 6: 12, 7: 10}  # ftype -> d_type


def as_dirent(entry: directory.Entry) -> Dirent:
    return Dirent(entry.name, entry.ino, DTYPES[entry.ftype], entry.next_cookie)


@images
async def test_every_form_reads_as_the_kernel_does(scratch: Path, args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *args)
    block_bytes = {"size=8k": 8192, "size=64k": 65536}.get(args[1] if args else "", 4096)
    with support.kernel_mount(image, scratch / "mnt") as mount:
        make_forms(mount, block_bytes)
        expected = {p.name: getdents(p) for p in mount.iterdir() if p.is_dir()}
    async with opened(image) as vol:
        for name, entries in expected.items():
            async with using(vol, os.fsencode(name)) as dp:
                assert await form(vol, dp) == FORMS.get(name, await form(vol, dp)), name
                for batch in (7, 1000):
                    got = [as_dirent(e) for e in await listed(vol, dp, batch)]
                    assert got == entries, name
                async with vol.reader(dp) as tp:
                    for entry in entries:
                        found = await directory.lookup(tp, dp, entry.name)
                        assert found is not None
                        assert found[0] == entry.ino
                    assert await directory.lookup(tp, dp, b"absent") is None
                    assert await directory.lookup(tp, dp, b"x" * 255) is None


async def test_reading_goes_on_behind_a_name_that_went(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.kernel_mount(image, scratch / "mnt") as mount:
        fill(mount / "d", [b"f%d" % i for i in range(500)])
    async with opened(image) as vol, using(vol, b"d") as dp:
        whole = await listed(vol, dp, 1000)
        for at in (3, 100, 400):
            cookie = whole[at - 1].next_cookie
            async with vol.transaction("truncate", 50) as tp:
                await tp.lock_inodes(dp)
                await directory.remove(tp, dp, whole[at].name, whole[at].ino)
            async with vol.reader(dp) as tp:
                rest = await directory.read(tp, dp, cookie, 1000)
            assert [e.name for e in rest] == [e.name for e in whole[at + 1 :]]
            async with vol.transaction("truncate", 50) as tp:
                await tp.lock_inodes(dp)
                await directory.add(tp, dp, whole[at].name, whole[at].ino, 1)
            whole = await listed(vol, dp, 1000)
