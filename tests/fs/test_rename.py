"""Renaming with flags: exchanges between all kinds of places, and what whiteouts leave behind."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from fs import links, namespace
from fs.cache.inode import Inode
from fs.namespace import EXCHANGE, NOREPLACE, WHITEOUT
from fs.volume import Volume
from fs.xfs import dir as directory
from fs.xfs import layout as L
from tests import support
from tests.fs.dirimages import listed, names_of, opened, using
from tests.fs.test_namespace import Mirror, follow

IMAGES = {"4k": (), "1k rmapbt": ("-b", "size=1k", "-m", "rmapbt=1")}
images = pytest.mark.parametrize("args", IMAGES.values(), ids=IMAGES.keys())
SIZES = (0, 3, 60, 400)  # entries: a short form with and without room, a block, leaves


def refused(code: int) -> object:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


async def fill(vol: Volume, dp: Inode, n: int) -> None:
    for i in range(n):
        vol.inodes.put(await namespace.create(vol, dp, b"filler %03d" % i, 0o644, 0, 0))


async def parent(vol: Volume, dp: Inode) -> int:
    async with vol.reader(dp) as tp:
        found = await directory.lookup(tp, dp, b"..")
    assert found is not None
    return found[0]


async def child(vol: Volume, dp: Inode, name: bytes) -> tuple[int, int, int]:
    """(ino, mode, nlink) of a name, as the dentry cache and as the directory itself have it."""
    ip = await namespace.lookup(vol, dp, name)
    async with vol.reader(dp) as tp:
        assert await directory.lookup(tp, dp, name) == (ip.ino, directory.ftype_of(ip.mode))
    found = ip.ino, ip.mode, ip.nlink
    vol.inodes.put(ip)
    return found


# -- exchange ----------------------------------------------------------------------------------


@images
@pytest.mark.parametrize("n", SIZES)
async def test_directories_change_places(scratch: Path, args: tuple[str, ...], n: int) -> None:
    """Directories of different parents: "..", link counts of both parents, names, contents."""
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol, using(vol) as root:
        made = [await namespace.mkdir(vol, root, name, 0o755, 0, 0) for name in (b"p", b"q")]
        p, q = made
        x = await namespace.mkdir(vol, p, b"x", 0o711, 0, 0)
        y = await namespace.mkdir(vol, q, b"y", 0o722, 0, 0)
        below = await namespace.mkdir(vol, x, b"below", 0o755, 0, 0)
        for dp in (p, q, x, y):
            await fill(vol, dp, n)
        counts = p.nlink, q.nlink, x.nlink, y.nlink
        await namespace.rename(vol, p, b"x", q, b"y", EXCHANGE)
        assert (p.nlink, q.nlink, x.nlink, y.nlink) == counts == (3, 3, 3, 2)
        assert (await parent(vol, x), await parent(vol, y)) == (q.ino, p.ino)
        assert await parent(vol, below) == x.ino
        assert await child(vol, q, b"y") == (x.ino, 0o40711, 3)
        assert await child(vol, p, b"x") == (y.ino, 0o40722, 2)
        # A directory and a file: the link of its ".." goes with it.
        f = await namespace.create(vol, p, b"f", 0o600, 0, 0)
        await namespace.rename(vol, p, b"f", q, b"y", EXCHANGE)
        assert (p.nlink, q.nlink) == (4, 2)
        assert await parent(vol, x) == p.ino
        assert await child(vol, q, b"y") == (f.ino, 0o100600, 1)
        assert await child(vol, p, b"f") == (x.ino, 0o40711, 3)
        # In one directory nothing but the names changes.
        await namespace.rename(vol, p, b"f", p, b"x", EXCHANGE)
        assert (p.nlink, x.nlink, y.nlink) == (4, 3, 2)
        assert await child(vol, p, b"x") == (x.ino, 0o40711, 3)
        assert await child(vol, p, b"f") == (y.ino, 0o40722, 2)
        for ip in (*made, x, y, below, f):
            vol.inodes.put(ip)
    support.assert_clean(image)


async def test_exchange_refuses_what_makes_a_loop(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        a = await namespace.mkdir(vol, root, b"a", 0o755, 0, 0)
        b = await namespace.mkdir(vol, a, b"b", 0o755, 0, 0)
        c = await namespace.mkdir(vol, b, b"c", 0o755, 0, 0)
        f = await namespace.create(vol, b, b"f", 0o644, 0, 0)
        for odp, oname, ndp, nname in (
            (root, b"a", b, b"c"),
            (b, b"c", root, b"a"),
            (root, b"a", a, b"b"),
            (b, b"f", root, b"a"),
            (root, b"a", b, b"f"),
        ):
            with refused(errno.EINVAL):
                await namespace.rename(vol, odp, oname, ndp, nname, EXCHANGE)
        for nname in (b"none", b"a"):
            with refused(errno.ENOENT):
                await namespace.rename(vol, b, b"none" if nname == b"a" else b"f", root, nname, 2)
        await namespace.rename(vol, root, b"a", root, b"a", EXCHANGE)
        vol.inodes.put(await namespace.mkdir(vol, root, b"d", 0o755, 0, 0))
        b.nlink = links.LINK_MAX
        for args in ((root, b"d", b, b"f"), (b, b"f", root, b"d")):
            with refused(errno.EMLINK):
                await namespace.rename(vol, *args, EXCHANGE)
        for _ in range(2):
            await namespace.rename(vol, root, b"d", b, b"c", EXCHANGE)  # as many as before
        b.nlink = 3
        for ip in (b, c, f):
            ip.flags = L.DIFLAG_IMMUTABLE
            with refused(errno.EPERM):
                await namespace.rename(vol, b, b"c", b, b"f", EXCHANGE)
            ip.flags = 0
        for ip in (a, b, c, f):
            vol.inodes.put(ip)
    support.assert_clean(image)


# -- whiteout ----------------------------------------------------------------------------------


@images
@pytest.mark.parametrize("n", SIZES)
async def test_a_whiteout_takes_the_place(scratch: Path, args: tuple[str, ...], n: int) -> None:
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol, using(vol) as root:
        p = await namespace.mkdir(vol, root, b"p", 0o755, 0, 0)
        q = await namespace.mkdir(vol, root, b"q", 0o755, 0, 0)
        for dp in (p, q):
            await fill(vol, dp, n)
        f = await namespace.create(vol, p, b"f", 0o644, 1, 1)
        x = await namespace.mkdir(vol, p, b"x", 0o755, 0, 0)
        await namespace.rename(vol, p, b"f", q, b"g", WHITEOUT, 7, 8)
        assert await child(vol, q, b"g") == (f.ino, 0o100644, 1)
        ino, mode, nlink = await child(vol, p, b"f")
        assert (mode, nlink) == (stat.S_IFCHR, 1)
        whiteout = await vol.inodes.get(ino)
        assert (whiteout.rdev, whiteout.uid, whiteout.gid) == (0, 7, 8)
        assert whiteout.format == L.FMT_DEV
        vol.inodes.put(whiteout)
        # A directory moves: its parent loses the link, the whiteout has none to give.
        await namespace.rename(vol, p, b"x", q, b"x", WHITEOUT | NOREPLACE)
        assert (p.nlink, q.nlink, await parent(vol, x)) == (2, 3, q.ino)
        # Within one directory, over a name that is there, which a whiteout may be, too.
        free_name = await namespace.create(vol, q, b"old", 0o600, 0, 0)
        await namespace.rename(vol, q, b"g", q, b"old", WHITEOUT)
        assert free_name.nlink == 0
        await namespace.rename(vol, p, b"x", p, b"f", WHITEOUT)
        for dp, name in ((p, b"x"), (p, b"f"), (q, b"g")):
            assert (await child(vol, dp, name))[1:] == (stat.S_IFCHR, 1)
        await namespace.unlink(vol, p, b"x")
        for ip in (p, q, f, x, free_name):
            vol.inodes.put(ip)
        await vol.drain_inactive()
    support.assert_clean(image)


async def test_flags_that_do_not_go_together(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        for name in (b"a", b"b"):
            vol.inodes.put(await namespace.create(vol, root, name, 0o644, 0, 0))
        for flags in (3, 6, 7, 8, 12, 1 << 31):
            with refused(errno.EINVAL):
                await namespace.rename(vol, root, b"a", root, b"b", flags)
        with refused(errno.EEXIST):
            await namespace.rename(vol, root, b"a", root, b"b", NOREPLACE | WHITEOUT)
        await namespace.link(vol, root, b"c", ip := await namespace.lookup(vol, root, b"a"))
        await namespace.rename(vol, root, b"a", root, b"c", WHITEOUT)  # one inode: nothing happens
        assert (await child(vol, root, b"a"))[0] == ip.ino
        assert sorted(await names_of(vol, root)) == [b"a", b"b", b"c"]
        vol.inodes.put(ip)
    support.assert_clean(image)


async def test_no_space_for_a_whiteout(scratch: Path) -> None:
    """Nothing is changed then; without the flag the rename needs none."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        for name in (b"a", b"b"):
            vol.inodes.put(await namespace.create(vol, root, name, 0o644, 0, 0))
        held = vol.space.available
        vol.space.reserve_delalloc(held)
        before = await names_of(vol, root)
        with refused(errno.ENOSPC):
            await namespace.rename(vol, root, b"a", root, b"b", WHITEOUT)
        assert await names_of(vol, root) == before
        await namespace.rename(vol, root, b"a", root, b"b")
        vol.space.release_delalloc(held)
        await vol.drain_inactive()
    support.assert_clean(image)


@support.needs_root
async def test_the_kernel_sees_whiteouts_and_exchanges(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        for name in (b"a", b"b"):
            dp = await namespace.mkdir(vol, root, name, 0o755, 0, 0)
            vol.inodes.put(await namespace.mkdir(vol, dp, b"in " + name, 0o755, 0, 0))
            vol.inodes.put(await namespace.create(vol, dp, b"file " + name, 0o644, 0, 0))
            vol.inodes.put(dp)
        async with using(vol, b"a") as a, using(vol, b"b") as b:
            await namespace.rename(vol, a, b"in a", b, b"in b", EXCHANGE)
            await namespace.rename(vol, a, b"file a", b, b"in b", EXCHANGE)
            await namespace.rename(vol, b, b"file b", a, b"moved", WHITEOUT)
            assert len(await listed(vol, a)) == 5
    support.assert_clean(image)
    with support.kernel_mount(image, scratch / "mnt") as top:
        assert sorted(os.listdir(top / "a")) == ["file a", "in a", "moved"]
        assert sorted(os.listdir(top / "b")) == ["file b", "in b"]
        whiteout = (top / "b" / "file b").lstat()
        assert (whiteout.st_mode, whiteout.st_rdev, whiteout.st_nlink) == (stat.S_IFCHR, 0, 1)
        assert [(top / n).stat().st_nlink for n in ("a", "b", ".")] == [4, 2, 4]
        for name in ("in a", "file a"):
            below, above = top / "a" / name / "..", (top / "a").stat()
            assert below.stat().st_ino == above.st_ino
        (top / "b" / "file b").unlink()
    support.assert_clean(image)


class WhiteoutMirror(Mirror):
    """Renames with every flag that the host's file system knows."""

    rename_flags = (0, NOREPLACE, EXCHANGE, EXCHANGE, WHITEOUT, WHITEOUT, NOREPLACE | WHITEOUT)


@pytest.mark.parametrize("seed", range(4))
@images
async def test_random_renames_are_those_of_the_host(
    scratch: Path, seed: int, args: tuple[str, ...]
) -> None:
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol:
        await follow(WhiteoutMirror(vol, scratch / "host", seed), 600)
    support.assert_clean(image)
