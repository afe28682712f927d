"""Temporary files: on the unlinked list until they get a name or are closed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from fs import file, namespace, tmpfile
from fs.cache.incore import S_LINKABLE
from fs.cache.inode import Inode
from fs.volume import Volume
from fs.xfs import ag, stamp
from fs.xfs import layout as L
from tests import support
from tests.fs.dirimages import names_of, opened, using
from tests.fs.test_unlinked import lists

IMAGES = {"4k": (), "1k rmapbt": ("-b", "size=1k", "-m", "rmapbt=1"), "64k": ("-b", "size=64k")}
images = pytest.mark.parametrize("args", IMAGES.values(), ids=IMAGES.keys())


def refused(code: int) -> object:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


async def make(vol: Volume, dp: Inode, linkable: bool = True) -> Inode:
    return await tmpfile.create(vol, dp, 0o640, 3, 4, linkable)


@images
async def test_without_a_name_it_goes_when_it_is_closed(
    scratch: Path, args: tuple[str, ...]
) -> None:
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol, using(vol) as root:
        free, before = vol.space.free, stamp.now()
        ip = await make(vol, root)
        assert (ip.mode, ip.uid, ip.gid, ip.nlink, ip.refs) == (0o100640, 3, 4, 0, 1)
        assert before <= ip.crtime == ip.mtime <= stamp.now()
        assert await names_of(vol, root) == {}
        assert sum(map(len, (await lists(vol)).values())) == 1
        data = os.urandom(300_000)
        await file.write(vol, ip, 0, data)
        await file.fsync(vol, ip)
        await vol.flush_metadata()
        vol.arena.reclaim.shrink_all(0, 0, "direct", 1 << 20)
        assert bytes(await file.read(vol, ip, 0, 1 << 20)) == data
        assert vol.inodes.find(ip.ino) == ip
        vol.inodes.put(ip)
        vol.inodes.put(ip)
        await vol.drain_inactive()
        assert await lists(vol) == {}
        assert vol.space.free == free
    support.assert_clean(image)


@images
@support.needs_root
async def test_a_link_makes_it_a_file(scratch: Path, args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *args)
    data = os.urandom(100_000)
    async with opened(image) as vol, using(vol) as root:
        ip = await make(vol, root)
        await file.write(vol, ip, 0, data)
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        await namespace.link(vol, dp, b"named", ip)
        assert (ip.nlink, ip.state & S_LINKABLE) == (1, 0)
        assert await lists(vol) == {}
        await namespace.link(vol, root, b"again", ip)
        assert ip.nlink == 2
        for name, where in ((b"named", dp), (b"again", root)):
            await namespace.unlink(vol, where, name)
        with refused(errno.ENOENT):  # removed now: no name for it any more
            await namespace.link(vol, root, b"late", ip)
        vol.inodes.put(ip)
        other = await make(vol, dp)
        await file.write(vol, other, 0, data)
        await namespace.link(vol, dp, b"stays", other)
        for made in (dp, other):
            vol.inodes.put(made)
        await vol.drain_inactive()
    support.assert_clean(image)
    with support.kernel_mount(image, scratch / "mnt") as root:
        found = root / "d" / "stays"
        assert found.read_bytes() == data
        assert os.listdir(root) == ["d"]
        status = found.stat()
        assert (status.st_nlink, stat.S_IMODE(status.st_mode), status.st_uid) == (1, 0o640, 3)


async def test_exclusive_ones_get_no_name(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        ip = await make(vol, root, linkable=False)
        with refused(errno.ENOENT):
            await namespace.link(vol, root, b"n", ip)
        linkable = await make(vol, root)
        vol.inodes.put(await namespace.create(vol, root, b"taken", 0o600, 0, 0))
        with refused(errno.EEXIST):
            await namespace.link(vol, root, b"taken", linkable)
        assert linkable.nlink == 0
        await namespace.link(vol, root, b"free", linkable)
        unnamed = await make(vol, root)
        for made in (ip, linkable, unnamed):
            vol.inodes.put(made)
        await vol.drain_inactive()
        # Record and number of a linkable one are used again, by a file that is removed.
        vol.inodes.put(await namespace.create(vol, root, b"another", 0o600, 0, 0))
        again = await namespace.create(vol, root, b"n", 0o600, 0, 0)
        assert again == unnamed
        await namespace.unlink(vol, root, b"n")
        with refused(errno.ENOENT):
            await namespace.link(vol, root, b"m", again)
        vol.inodes.put(again)
    support.assert_clean(image)


async def test_what_a_directory_hands_on_and_refuses(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o2755, 0, 55)
        dp.flags, dp.projid = L.DIFLAG_PROJINHERIT | L.DIFLAG_NODUMP, 9
        ip = await make(vol, dp)
        assert (ip.gid, ip.projid, ip.flags) == (55, 9, L.DIFLAG_NODUMP)
        with refused(errno.ENOTDIR):
            await make(vol, ip)
        dp.flags = L.DIFLAG_IMMUTABLE
        with refused(errno.EPERM):
            await make(vol, dp)
        dp.flags = 0
        await namespace.rmdir(vol, root, b"d")
        with refused(errno.ENOENT):
            await make(vol, dp)
        for made in (dp, ip):
            vol.inodes.put(made)
    support.assert_clean(image)


async def test_a_lookup_count_keeps_it(scratch: Path) -> None:
    """The kernel has no name for it, but may still open or link the node."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, using(vol) as root:
        ip = await make(vol, root)
        vol.inodes.looked_up(ip)
        ino = ip.ino
        vol.inodes.put(ip)
        vol.arena.reclaim.shrink_all(0, 0, "direct", 1 << 20)
        ip = await vol.inodes.get(ino)
        await namespace.link(vol, root, b"n", ip)
        vol.inodes.put(ip)
        other = await make(vol, root)
        vol.inodes.looked_up(other)
        ino = other.ino
        vol.inodes.put(other)
        assert await lists(vol) != {}
        vol.inodes.forget(ino, 1)
        await vol.drain_inactive()
        assert await lists(vol) == {}
    support.assert_clean(image)


async def test_many_in_any_order(scratch: Path) -> None:
    """Long lists: linked, closed and removed in any order, among files that were unlinked."""
    image = support.mkfs(scratch)
    rng = random.Random(2)
    async with opened(image) as vol, using(vol) as root:
        held: list[Inode] = []
        names = 0
        for i in range(300):
            ip = await make(vol, root, rng.random() < 0.7)
            held.append(ip)
            if rng.random() < 0.5:
                vol.inodes.put(held.pop(rng.randrange(len(held))))
            if held and rng.random() < 0.4:
                ip = rng.choice(held)
                can = ip.nlink or ip.state & S_LINKABLE
                try:
                    await namespace.link(vol, root, b"%d" % i, ip)
                    names += 1
                    assert can
                except FileNotFoundError:
                    assert not can
            if names > 20:
                name = rng.choice(sorted(await names_of(vol, root)))
                await namespace.unlink(vol, root, name)
                names -= 1
        on_list = {ip.ino for ip in held if not ip.nlink}
        await vol.drain_inactive()
        assert sum(map(len, (await lists(vol)).values())) == len(on_list)
        for ip in held:
            vol.inodes.put(ip)
        await vol.drain_inactive()
        assert await lists(vol) == {}
    support.assert_clean(image)


@pytest.mark.slow
async def test_they_go_without_a_free_block(scratch: Path) -> None:
    """The tree of chunks with free inodes grows on blocks that its AG keeps back."""
    image = support.mkfs(scratch, "-b", "size=1k")
    chunks = 64  # more than a leaf has records
    async with opened(image) as vol, using(vol) as root:
        held = [await make(vol, root) for _ in range(chunks * 64)]
        most = vol.space.unpromised
        vol.space.reserve(most, from_pool=True)
        for ip in held[::64]:
            vol.inodes.put(ip)
        await vol.drain_inactive()
        async with vol.reader() as tp:
            agi = await ag.read_agi(tp, vol.geo.ino_agno(root.ino))
            assert int(agi.rec(L.AGI)["free_level"]) == 2
        vol.space.release(most)
        for i, ip in enumerate(held):
            if i % 64:
                vol.inodes.put(ip)
        await vol.drain_inactive()
    support.assert_clean(image)


async def test_the_image_knows_it_before_a_crash(scratch: Path) -> None:
    """What is on the device while the file is open: an inode without links, on its list."""
    image, copy = support.mkfs(scratch), scratch / "crashed"
    async with opened(image) as vol, using(vol) as root:
        ip = await make(vol, root)
        await file.write(vol, ip, 0, b"x" * 10_000)
        await file.fsync(vol, ip)
        await vol.flush_metadata()
        shutil.copyfile(image, copy)
        agno, agino = vol.geo.ino_agno(ip.ino), vol.geo.ino_agino(ip.ino)
        ino = ip.ino
        vol.inodes.put(ip)
    support.assert_clean(image)
    agi = xfs_db(copy, f"agi {agno}", f"print unlinked[{agino % 64}]")
    assert agi.split()[-1] == str(agino)
    core = xfs_db(copy, f"inode {ino}", "print core.nlinkv2 core.size next_unlinked").split("\n")
    assert [line.split()[-1] for line in core] == ["0", "10000", "null"]


def xfs_db(image: Path, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    done = subprocess.run(["xfs_db", "-r", *words, str(image)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()
