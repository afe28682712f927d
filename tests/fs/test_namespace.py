"""The name space without FUSE: a seeded run mirrored on a directory of the host, and the rules."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from fs import links, namespace
from fs.cache.inode import Inode
from fs.errors import Corrupt
from fs.volume import Volume
from fs.xfs import dir as directory
from fs.xfs import layout as L
from fs.xfs import stamp
from tests import support
from tests.conftest import AllowLogs
from tests.fs.dirimages import listed, names_of, opened, using

SYS_RENAMEAT2, AT_FDCWD = 316, -100  # x86-64


def renameat2(old: Path, new: Path, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    args = (AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)
    if libc.syscall(SYS_RENAMEAT2, *args) != 0:
        raise OSError(ctypes.get_errno(), "renameat2")


class Mirror:
    """The same operations on a volume and on a directory of the host."""

    rename_flags: tuple[int, ...] = (0, 0, 0, namespace.NOREPLACE, namespace.EXCHANGE)

    def __init__(self, vol: Volume, host: Path, seed: int) -> None:
        self.vol, self.host, self.rng = vol, host, random.Random(seed)
        self.host.mkdir()
        self.plain = host.parent / "plain"
        self.plain.touch()
        self.outcomes: dict[str, int] = {}

    def path(self) -> tuple[str, ...]:
        """A random path: few names, so that operations meet."""
        depth = self.rng.choice((1, 1, 2, 2, 3))
        return tuple(self.rng.choice("abcd") for _ in range(depth))

    async def both(
        self, what: str, ours: Callable[[], Awaitable[object]], theirs: Callable[[], object]
    ) -> None:
        """Run it on both sides; the errors must be the same."""
        wanted = got = 0
        try:
            theirs()
        except OSError as error:
            wanted = error.errno or 0
        try:
            await ours()
        except OSError as error:
            got = error.errno or 0
        assert got == wanted, f"{what}: {os.strerror(got)}, should be {os.strerror(wanted)}"
        self.outcomes[errno.errorcode.get(got, "0")] = 1

    async def at(
        self, path: tuple[str, ...], do: Callable[[Inode, bytes], Awaitable[object]]
    ) -> None:
        """Run `do` on the parent directory and the last name of a path."""
        async with self.parent(path) as dp:
            got = await do(dp, path[-1].encode())
        if isinstance(got, Inode):
            self.vol.inodes.put(got)

    async def step(self) -> None:
        a, b = self.path(), self.path()
        kinds = ("make", "make", "make", "remove", "remove", "link", "rename", "rename", "rename")
        kind = self.rng.choice(kinds)
        if kind == "make":
            await self.make(a)
        elif kind == "remove":
            await self.remove(a)
        elif kind == "link":
            await self.both(
                f"link {a} {b}",
                lambda: self.link(a, b),
                lambda: os.link(self.on_host(a), self.on_host(b), follow_symlinks=False),
            )
        else:
            flags = self.rng.choice(self.rename_flags)
            await self.both(
                f"rename {a} {b} flags {flags}",
                lambda: self.rename(a, b, flags),
                lambda: renameat2(self.on_host(a), self.on_host(b), flags),
            )

    def on_host(self, path: tuple[str, ...]) -> Path:
        return self.host.joinpath(*path)

    async def make(self, path: tuple[str, ...]) -> None:
        vol, host, what = self.vol, self.on_host(path), self.rng.randrange(3)
        if what == 0:
            flags = os.O_CREAT | os.O_EXCL
            await self.both(
                f"create {path}",
                lambda: self.at(path, lambda d, n: namespace.create(vol, d, n, 0o640, 0, 0)),
                lambda: os.close(os.open(host, flags, 0o640)),
            )
        elif what == 1:
            await self.both(
                f"mkdir {path}",
                lambda: self.at(path, lambda d, n: namespace.mkdir(vol, d, n, 0o750, 0, 0)),
                lambda: host.mkdir(0o750),
            )
        else:
            # To a file, so that a link in the middle of a path gives ENOTDIR on both sides.
            target = "/" * self.rng.choice((1, 300, 900)) + str(self.plain)
            await self.both(
                f"symlink {path}",
                lambda: self.at(
                    path, lambda d, n: namespace.symlink(vol, d, n, target.encode(), 0, 0)
                ),
                lambda: host.symlink_to(target),
            )

    async def remove(self, path: tuple[str, ...]) -> None:
        vol, host = self.vol, self.on_host(path)
        if self.rng.randrange(2):
            await self.both(
                f"unlink {path}",
                lambda: self.at(path, lambda d, n: namespace.unlink(vol, d, n)),
                host.unlink,
            )
        else:
            await self.both(
                f"rmdir {path}",
                lambda: self.at(path, lambda d, n: namespace.rmdir(vol, d, n)),
                host.rmdir,
            )

    @asynccontextmanager
    async def parent(self, path: tuple[str, ...]) -> AsyncIterator[Inode]:
        """The directory in front of a path's last name."""
        async with using(self.vol, *(name.encode() for name in path[:-1])) as dp:
            links.check_directory(dp)
            yield dp

    async def link(self, a: tuple[str, ...], b: tuple[str, ...]) -> None:
        async with using(self.vol, *(name.encode() for name in a)) as ip:
            await self.at(b, lambda dp, name: namespace.link(self.vol, dp, name, ip))

    async def rename(self, a: tuple[str, ...], b: tuple[str, ...], flags: int) -> None:
        async with self.parent(a) as odp, self.parent(b) as ndp:
            last_a, last_b = a[-1].encode(), b[-1].encode()
            await namespace.rename(self.vol, odp, last_a, ndp, last_b, flags)

    async def check(self) -> None:
        """Both trees are the same: names, kinds, modes, link counts, targets."""
        async with using(self.vol) as root:
            assert await self.ours(root) == self.theirs(self.host)

    async def ours(self, dp: Inode) -> dict[str, object]:
        found: dict[str, object] = {}
        for name, ino in (await names_of(self.vol, dp)).items():
            ip = await self.vol.inodes.get(ino)
            what: object = None
            if stat.S_ISDIR(ip.mode):
                what = await self.ours(ip)
            elif stat.S_ISLNK(ip.mode):
                what = (await namespace.readlink(self.vol, ip)).decode()
            found[name.decode()] = (ip.mode, ip.nlink, what)
            self.vol.inodes.put(ip)
        return found

    def theirs(self, where: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        for path in where.iterdir():
            status = path.lstat()
            what: object = None
            if path.is_symlink():
                what = os.readlink(path)
            elif path.is_dir():
                what = self.theirs(path)
            found[path.name] = (status.st_mode, status.st_nlink, what)
        return found


async def follow(mirror: Mirror, steps: int) -> None:
    """Random operations here and on the host, compared; the common outcomes must all occur."""
    for i in range(steps):
        await mirror.step()
        if i % 200 == 199:
            await mirror.check()
    assert {"0", "EEXIST", "ENOENT", "ENOTEMPTY", "EINVAL", "ENOTDIR"} <= set(mirror.outcomes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("args", [(), ("-b", "size=1k", "-m", "rmapbt=1")], ids=["4k", "1k"])
async def test_random_operations_are_those_of_the_host(
    scratch: Path, seed: int, args: tuple[str, ...]
) -> None:
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol:
        await follow(Mirror(vol, scratch / "host", seed), 800)
    support.assert_clean(image)


# -- rules --------------------------------------------------------------------------------------


@pytest.fixture
async def image(scratch: Path) -> Path:
    return support.mkfs(scratch)


def refused(code: int) -> object:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


async def test_a_new_inode_has_what_it_must_have(image: Path) -> None:
    async with opened(image) as vol, using(vol) as root:
        before, changes = stamp.now(), root.changecount
        ip = await namespace.create(vol, root, b"f", 0o4755, 7, 8)
        assert (ip.mode, ip.uid, ip.gid, ip.nlink, ip.size) == (0o104755, 7, 8, 1, 0)
        assert before <= ip.crtime == ip.mtime == ip.ctime == ip.atime <= stamp.now()
        assert root.mtime >= before
        assert root.changecount > changes
        device = await namespace.create(vol, root, b"null", 0o20666, 0, 0, 1 << 18 | 3)
        assert (device.mode, device.rdev, device.format) == (0o20666, 1 << 18 | 3, L.FMT_DEV)
        dp = await namespace.mkdir(vol, root, b"d", 0o1777, 1, 2)
        assert (dp.mode, dp.nlink, root.nlink) == (0o41777, 2, 3)
        async with vol.reader(dp) as tp:
            assert await directory.lookup(tp, dp, b"..") == (root.ino, L.FT_DIR)
            assert await directory.lookup(tp, dp, b".") == (dp.ino, L.FT_DIR)
        for made in (ip, device, dp):
            vol.inodes.put(made)
    support.assert_clean(image)


async def test_setgid_and_flags_are_handed_on(image: Path) -> None:
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o2755, 0, 55)
        dp.flags = L.DIFLAG_PROJINHERIT | L.DIFLAG_NODUMP
        dp.projid = 9
        sub = await namespace.mkdir(vol, dp, b"sub", 0o755, 1, 1)
        ip = await namespace.create(vol, dp, b"f", 0o644, 1, 1)
        assert (sub.gid, sub.mode) == (55, 0o42755)
        assert (ip.gid, ip.mode) == (55, 0o100644)
        assert sub.flags == L.DIFLAG_PROJINHERIT | L.DIFLAG_NODUMP
        assert ip.flags == L.DIFLAG_NODUMP
        assert sub.projid == ip.projid == 9
        other = await namespace.create(vol, root, b"other", 0o644, 0, 0)
        with refused(errno.EXDEV):
            await namespace.link(vol, dp, b"in", other)
        with refused(errno.EXDEV):
            await namespace.rename(vol, root, b"other", dp, b"in")
        for made in (dp, sub, ip, other):
            vol.inodes.put(made)


async def test_names_that_are_refused(image: Path) -> None:
    async with opened(image) as vol, using(vol) as root:
        ip = await namespace.create(vol, root, b"f", 0o644, 0, 0)
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        for name, code in (
            (b"x" * 256, errno.ENAMETOOLONG),
            (b"a/b", errno.EINVAL),
            (b"", errno.EINVAL),
            (b".", errno.EEXIST),
            (b"f", errno.EEXIST),
        ):
            with refused(code):
                await namespace.create(vol, root, name, 0o644, 0, 0)
        with refused(errno.ENAMETOOLONG):
            await namespace.symlink(vol, root, b"l", b"x" * 1024, 0, 0)
        with refused(errno.ENOTDIR):
            await namespace.create(vol, ip, b"n", 0o644, 0, 0)
        with refused(errno.ENOTDIR):
            await namespace.lookup(vol, ip, b"n")
        with refused(errno.EISDIR):
            await namespace.unlink(vol, root, b"d")
        with refused(errno.ENOTDIR):
            await namespace.rmdir(vol, root, b"f")
        with refused(errno.EINVAL):
            await namespace.rmdir(vol, dp, b".")
        with refused(errno.ENOTEMPTY):
            await namespace.rmdir(vol, dp, b"..")
        with refused(errno.EBUSY):
            await namespace.rename(vol, root, b"f", root, b"..")
        with refused(errno.EINVAL):
            await namespace.rename(vol, root, b"f", root, b"g", 3)
        with refused(errno.EPERM):
            await namespace.link(vol, root, b"dd", dp)
        with refused(errno.EINVAL):
            await namespace.readlink(vol, ip)
        for made in (ip, dp):
            vol.inodes.put(made)


async def test_link_counts_have_an_end(image: Path) -> None:
    async with opened(image) as vol, using(vol) as root:
        ip = await namespace.create(vol, root, b"f", 0o644, 0, 0)
        ip.nlink = links.LINK_MAX
        with refused(errno.EMLINK):
            await namespace.link(vol, root, b"g", ip)
        ip.nlink = 1
        count = root.nlink
        root.nlink = links.LINK_MAX
        with refused(errno.EMLINK):
            await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        root.nlink = count
        vol.inodes.put(ip)


async def test_immutable_and_append_only(image: Path) -> None:
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        ip = await namespace.create(vol, dp, b"f", 0o644, 0, 0)
        for flags in (L.DIFLAG_IMMUTABLE, L.DIFLAG_APPEND):
            ip.flags = flags
            with refused(errno.EPERM):
                await namespace.unlink(vol, dp, b"f")
            with refused(errno.EPERM):
                await namespace.setattr(vol, ip, {"mode": 0o600})
            with refused(errno.EPERM):
                await namespace.rename(vol, dp, b"f", root, b"g")
            ip.flags, dp.flags = 0, flags
            with refused(errno.EPERM):
                await namespace.unlink(vol, dp, b"f")
            dp.flags = 0
        dp.flags = L.DIFLAG_APPEND
        vol.inodes.put(await namespace.create(vol, dp, b"appended", 0o644, 0, 0))
        dp.flags = L.DIFLAG_IMMUTABLE
        with refused(errno.EPERM):
            await namespace.create(vol, dp, b"more", 0o644, 0, 0)
        dp.flags = 0
        for made in (dp, ip):
            vol.inodes.put(made)


@pytest.mark.parametrize(("bigtime", "last"), [(True, 16299260424), (False, (1 << 31) - 1)])
def test_the_ends_of_time(bigtime: bool, last: int) -> None:
    for seconds, rest, want in (
        (last - 1, 7, (last - 1) * 10**9 + 7),
        (last, 7, last * 10**9),
        (last + 1, 7, last * 10**9),
        (-1, 7, -(10**9) + 7),
        (-(1 << 31), 7, -(1 << 31) * 10**9),
        (-(1 << 40), 7, -(1 << 31) * 10**9),
    ):
        assert stamp.to_unix_ns(stamp.from_unix_ns(seconds * 10**9 + rest, bigtime)) == want


async def test_setattr_changes_what_it_is_told(image: Path) -> None:
    async with opened(image) as vol, using(vol) as root:
        ip = await namespace.create(vol, root, b"f", 0o644, 0, 0)
        early = stamp.from_unix_ns(-(10**9))
        await namespace.setattr(vol, ip, {"mode": 0o7123, "uid": 3, "atime": early})
        assert (ip.mode, ip.uid, ip.gid, ip.atime) == (0o107123, 3, 0, early)
        assert ip.ctime > ip.crtime
        vol.inodes.put(ip)
    async with opened(image) as vol, using(vol, b"f") as ip:
        assert (ip.mode, ip.uid, ip.atime) == (0o107123, 3, early)


async def test_a_removed_directory_takes_no_names(image: Path) -> None:
    async with opened(image) as vol, using(vol) as root:
        dp = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        other = await namespace.create(vol, root, b"f", 0o644, 0, 0)
        await namespace.rmdir(vol, root, b"d")
        with refused(errno.ENOENT):
            await namespace.create(vol, dp, b"n", 0o644, 0, 0)
        with refused(errno.ENOENT):
            await namespace.rename(vol, root, b"f", dp, b"n")
        assert [e.name for e in await listed(vol, dp)] == [b".", b".."]
        for ip in (dp, other):
            vol.inodes.put(ip)
        await vol.drain_inactive()
        again = await namespace.mkdir(vol, root, b"d", 0o755, 0, 0)
        with refused(errno.ENOENT):
            await namespace.lookup(vol, again, b"n")
        vol.inodes.put(again)
    support.assert_clean(image)


async def test_an_unlinked_inode_lives_while_it_is_held(image: Path) -> None:
    async with opened(image) as vol, using(vol) as root:
        free = vol.space.free
        held = [await namespace.create(vol, root, b"f%d" % i, 0o644, 0, 0) for i in range(70)]
        inos = {ip.ino for ip in held}
        link = await namespace.symlink(vol, root, b"l", b"t" * 1000, 0, 0)
        for i in range(70):
            await namespace.unlink(vol, root, b"f%d" % i)
        await namespace.unlink(vol, root, b"l")
        assert await namespace.readlink(vol, link) == b"t" * 1000
        fresh = await namespace.create(vol, root, b"fresh", 0o644, 0, 0)
        assert fresh.ino not in inos
        random.Random(1).shuffle(held)
        for ip in (*held, link, fresh):
            vol.inodes.put(ip)
        await vol.drain_inactive()
        await namespace.unlink(vol, root, b"fresh")
        await vol.drain_inactive()
        assert vol.space.free == free
    support.assert_clean(image)


async def test_lookups_race_with_changes(image: Path) -> None:
    """Whoever finds a name finds an inode that had it."""
    async with opened(image) as vol, using(vol) as root:
        stop = False

        async def change() -> None:
            nonlocal stop
            for i in range(60):
                ip = await namespace.create(vol, root, b"n", 0o644, i, 0)
                vol.inodes.put(ip)
                await trio.lowlevel.checkpoint()
                await namespace.rename(vol, root, b"n", root, b"m")
                await namespace.unlink(vol, root, b"m")
            stop = True

        async def look(name: bytes) -> None:
            while not stop:
                await trio.lowlevel.checkpoint()
                try:
                    ip = await namespace.lookup(vol, root, name)
                except FileNotFoundError:
                    continue
                assert stat.S_ISREG(ip.mode)
                vol.inodes.put(ip)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            for name in (b"n", b"m", b"n"):
                nursery.start_soon(look, name)
    support.assert_clean(image)


async def test_a_name_of_a_free_inode_is_corruption(image: Path, allow_logs: AllowLogs) -> None:
    allow_logs("corrupt directory .* which is free")
    async with opened(image) as vol, using(vol) as root:
        ip = await namespace.create(vol, root, b"f", 0o644, 0, 0)
        free_ino = ip.ino + 5
        async with vol.transaction("truncate") as tp:
            await tp.lock_inodes(root)
            await directory.replace(tp, root, b"f", free_ino, L.FT_REG)
            vol.dentries.forget(root, b"f")
        with pytest.raises(Corrupt):
            await namespace.lookup(vol, root, b"f")
        async with vol.transaction("truncate") as tp:
            await tp.lock_inodes(root)
            await directory.replace(tp, root, b"f", ip.ino, L.FT_REG)
            vol.dentries.forget(root, b"f")
        vol.inodes.put(ip)
    support.assert_clean(image)


async def test_a_read_only_volume_is_not_changed(scratch: Path, image: Path) -> None:
    from fs.device.image import ImageFile

    device = ImageFile(str(image))
    try:
        async with Volume.open(device, 16 << 20, read_only=True) as vol, using(vol) as root:
            for change in (
                namespace.create(vol, root, b"f", 0o644, 0, 0),
                namespace.mkdir(vol, root, b"d", 0o755, 0, 0),
                namespace.setattr(vol, root, {"mode": 0o700}),
            ):
                with refused(errno.EROFS):
                    await change
    finally:
        device.close()
