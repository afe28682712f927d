"""The ioctls without FUSE: flags and hints under XFS's rules, label, geometry, trim, shutdown.

The kernel's XFS says on a mount of its own what the right answers are.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import stat
import struct
import subprocess
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fs import file, fileattr, ioctl, namespace, trim
from fs.cache.inode import Inode
from fs.device.image import ImageFile
from fs.fileattr import FileAttr
from fs.volume import Volume
from fs.xfs import layout as L
from tests import support
from tests.conftest import AllowLogs
from tests.fs.dirimages import opened, using

ROOT = ioctl.Caller(0, os.getpid(), 0)
USER = ioctl.Caller(1000, os.getpid(), 0)
BLOCK = 4096
AG_BYTES = support.MIN_IMAGE // 4


async def error_of(work: Awaitable[object]) -> int:
    """The errno that a call fails with, 0 if it works."""
    try:
        await work
    except OSError as error:
        return error.errno or 0
    return 0


@asynccontextmanager
async def a_tree(image: Path) -> AsyncIterator[tuple[Volume, Inode, Inode, Inode]]:
    """A volume with an empty file, a file with data, and a directory."""
    async with opened(image) as vol, using(vol) as dp:
        empty = await namespace.create(vol, dp, b"empty", 0o644, 0, 0)
        full = await namespace.create(vol, dp, b"full", 0o4755, 0, 0)
        await file.write(vol, full, 0, b"x" * 10000)
        below = await namespace.mkdir(vol, dp, b"dir", 0o755, 0, 0)
        try:
            yield vol, empty, full, below
        finally:
            for ip in (empty, full, below):
                vol.inodes.put(ip)


async def test_an_unknown_command_is_enotty(scratch: Path) -> None:
    async with a_tree(support.mkfs(scratch)) as (vol, empty, *_):
        assert await error_of(ioctl.run(vol, empty, 0x5401, b"", ROOT)) == errno.ENOTTY
        short = ioctl.run(vol, empty, ioctl.SETFLAGS, b"\0\0", ROOT)
        assert await error_of(short) == errno.EINVAL


# -- flags --------------------------------------------------------------------------------------


async def test_every_flag_that_chattr_knows(scratch: Path) -> None:
    async with a_tree(support.mkfs(scratch)) as (vol, empty, _, below):
        for flag, xflag in fileattr.SPELLINGS:
            for ip in (empty, below):
                await ioctl.run(vol, ip, ioctl.SETFLAGS, struct.pack("=I", flag), ROOT)
                got = await ioctl.run(vol, ip, ioctl.GETFLAGS, b"", ROOT)
                directories_only = xflag == fileattr.X_PROJINHERIT and ip is empty
                assert struct.unpack("=I", got) == (0 if directories_only else flag,)
        before = empty.ctime
        assert await error_of(fileattr.set_flags(vol, empty, 0x1)) == errno.EOPNOTSUPP  # secrm
        assert empty.ctime == before, "nothing was changed"


async def test_chattr_keeps_what_it_does_not_know(scratch: Path) -> None:
    async with a_tree(support.mkfs(scratch)) as (vol, empty, *_):
        wanted = FileAttr(fileattr.X_EXTSIZE | fileattr.X_NODEFRAG, 16 * BLOCK, 0, 77)
        await fileattr.set(vol, empty, wanted)
        await fileattr.set_flags(vol, empty, 0x80)
        xflags = wanted.xflags | fileattr.X_NOATIME
        assert fileattr.get(vol, empty) == wanted._replace(xflags=xflags)


@pytest.mark.parametrize(
    ("kind", "wanted", "expected"),
    [
        ("empty", FileAttr(fileattr.X_EXTSIZE, BLOCK), 0),
        ("empty", FileAttr(fileattr.X_EXTSIZE, BLOCK + 1), errno.EINVAL),
        ("empty", FileAttr(fileattr.X_EXTSIZE, 0), 0),
        ("empty", FileAttr(0, BLOCK), errno.EINVAL),
        ("empty", FileAttr(fileattr.X_EXTSIZE, 1 << 31), errno.EINVAL),
        ("empty", FileAttr(fileattr.X_EXTSIZE, AG_BYTES // 2), 0),
        ("empty", FileAttr(fileattr.X_EXTSIZE, AG_BYTES // 2 + BLOCK), errno.EINVAL),
        ("full", FileAttr(fileattr.X_EXTSIZE, 0), 0),
        ("dir", FileAttr(fileattr.X_EXTSZINHERIT, AG_BYTES // 2 + BLOCK), errno.EINVAL),
        ("empty", FileAttr(fileattr.X_EXTSZINHERIT, BLOCK), errno.EINVAL),
        ("full", FileAttr(fileattr.X_EXTSIZE, BLOCK), errno.EINVAL),
        ("full", FileAttr(fileattr.X_NODUMP), 0),
        ("dir", FileAttr(fileattr.X_EXTSZINHERIT, BLOCK), 0),
        ("dir", FileAttr(fileattr.X_EXTSIZE, BLOCK), errno.EINVAL),
        ("dir", FileAttr(fileattr.X_PROJINHERIT, projid=9), 0),
        ("full", FileAttr(fileattr.X_COWEXTSIZE, cowextsize=8 * BLOCK), 0),
        ("full", FileAttr(0, cowextsize=8 * BLOCK), errno.EINVAL),
        ("full", FileAttr(fileattr.X_COWEXTSIZE, cowextsize=100), errno.EINVAL),
        ("empty", FileAttr(fileattr.X_REALTIME), errno.EINVAL),
        ("empty", FileAttr(0, projid=0xFFFFFFF0), 0),
    ],
)
@pytest.mark.mount
@support.needs_root
async def test_what_may_be_set_when_is_the_kernels_rule(
    scratch: Path, kind: str, wanted: FileAttr, expected: int
) -> None:
    image = support.mkfs(scratch, "-m", "reflink=1")
    data = ioctl.FSXATTR.pack(*wanted)
    with support.kernel_mount(image, scratch / "kernel") as there:
        (there / "empty").touch()
        (there / "full").write_bytes(b"x" * 10000)
        (there / "dir").mkdir()
        assert kernel_error(there / kind, ioctl.FSSETXATTR, data) == expected
        theirs = kernel_bytes(there / kind, ioctl.FSGETXATTR, 28)
        for name in ("empty", "full"):
            (there / name).unlink()
        (there / "dir").rmdir()
    async with a_tree(image) as (vol, empty, full, below):
        ip = {"empty": empty, "full": full, "dir": below}[kind]
        await file.fsync(vol, ip) if ip is full else None
        assert await error_of(ioctl.run(vol, ip, ioctl.FSSETXATTR, data, ROOT)) == expected
        ours = await ioctl.run(vol, ip, ioctl.FSGETXATTR, b"", ROOT)
        assert without_attributes(ours) == without_attributes(theirs)
    support.assert_clean(image)


async def test_flags_by_an_ordinary_user_take_set_id_bits(scratch: Path) -> None:
    async with a_tree(support.mkfs(scratch)) as (vol, _, full, _below):
        await ioctl.run(vol, full, ioctl.SETFLAGS, struct.pack("=I", 0x80), ROOT)
        assert stat.S_IMODE(full.mode) == 0o4755
        await ioctl.run(vol, full, ioctl.SETFLAGS, struct.pack("=I", 0x80), USER)
        assert stat.S_IMODE(full.mode) == 0o755


# -- what the kernel says -----------------------------------------------------------------------


def kernel_error(path: Path, command: int, data: bytes) -> int:
    """The errno of an ioctl on a path."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, command, data)
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(fd)
    return 0


def without_attributes(got: bytes) -> FileAttr:
    """A struct fsxattr but for "has attributes": the kernel makes room for some in advance."""
    attr = FileAttr(*ioctl.FSXATTR.unpack(got))
    return attr._replace(xflags=attr.xflags & ~fileattr.X_HASATTR)


def kernel_bytes(path: Path, command: int, size: int) -> bytes:
    """What an ioctl on a path gives."""
    out = array.array("B", bytes(size))
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, command, out)
    finally:
        os.close(fd)
    return out.tobytes()


@support.geometries
@pytest.mark.mount
@support.needs_root
async def test_geometry_is_what_the_kernel_says(scratch: Path, mkfs_args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *mkfs_args)
    with support.kernel_mount(image, scratch / "kernel") as there:
        theirs = kernel_bytes(there, ioctl.FSGEOMETRY, 256)
    async with opened(image) as vol, using(vol) as dp:
        assert await ioctl.run(vol, dp, ioctl.FSGEOMETRY, b"", ROOT) == theirs


# -- the label ----------------------------------------------------------------------------------


@pytest.mark.mount
@support.needs_root
async def test_a_label_reaches_every_superblock(scratch: Path) -> None:
    image = support.mkfs(scratch, "-L", "before")
    async with opened(image) as vol, using(vol) as dp:
        assert (await ioctl.run(vol, dp, ioctl.GETFSLABEL, b"", ROOT)).rstrip(b"\0") == b"before"
        for bad, caller, expected in (
            (b"thirteen.long", ROOT, errno.EINVAL),
            (b"mine", USER, errno.EPERM),
        ):
            call = ioctl.run(vol, dp, ioctl.SETFSLABEL, bad.ljust(256, b"\0"), caller)
            assert await error_of(call) == expected
        await ioctl.run(vol, dp, ioctl.SETFSLABEL, b"twelve.bytes".ljust(256, b"\0"), ROOT)
        assert await ioctl.run(vol, dp, ioctl.GETFSLABEL, b"", ROOT) == b"twelve.bytes"
        agcount = vol.geo.agcount
    for agno in range(agcount):
        words = ["xfs_db", "-r", "-c", f"sb {agno}", "-c", "p fname", str(image)]
        shown = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
        assert '"twelve.bytes"' in shown, agno
    support.assert_clean(image)
    with support.kernel_mount(image, scratch / "kernel") as there:
        assert kernel_bytes(there, ioctl.GETFSLABEL, 256).rstrip(b"\0") == b"twelve.bytes"


# -- trim and shutdown --------------------------------------------------------------------------


async def test_trim_says_how_much(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def seven(vol: Volume, start: int, length: int, minlen: int) -> int:
        assert (start, length, minlen) == (1, 2, 3)
        return 7

    monkeypatch.setattr(trim, "trim", seven)
    async with a_tree(support.mkfs(scratch)) as (vol, empty, *_):
        argument = struct.pack("=3Q", 1, 2, 3)
        assert await error_of(ioctl.run(vol, empty, ioctl.FITRIM, argument, USER)) == errno.EPERM
        out = await ioctl.run(vol, empty, ioctl.FITRIM, argument, ROOT)
        assert struct.unpack("=3Q", out) == (1, 7, 3)


@pytest.mark.parametrize("flags", [ioctl.GOING_DEFAULT, ioctl.GOING_NOLOGFLUSH])
async def test_a_shutdown_that_was_asked_for(
    scratch: Path, allow_logs: AllowLogs, flags: int
) -> None:
    allow_logs("User initiated shutdown|unmounted after a shutdown")
    image = support.mkfs(scratch)
    word = ctypes.c_uint32(flags)
    caller = ROOT._replace(argument=ctypes.addressof(word))
    device = ImageFile(str(image))
    async with Volume.open(device, 16 << 20) as vol, using(vol) as dp:
        full = await namespace.create(vol, dp, b"full", 0o600, 0, 0)
        await file.write(vol, full, 0, b"x" * 10000)
        denied = ioctl.run(vol, full, ioctl.GOINGDOWN, b"", caller._replace(uid=1))
        assert await error_of(denied) == errno.EPERM
        lost = ioctl.run(vol, full, ioctl.GOINGDOWN, b"", ROOT)
        assert await error_of(lost) == errno.EFAULT
        word.value = 9
        wrong = ioctl.run(vol, full, ioctl.GOINGDOWN, b"", caller)
        assert await error_of(wrong) == errno.EINVAL
        word.value = flags
        assert not vol.shut_down
        await ioctl.run(vol, full, ioctl.GOINGDOWN, b"", caller)
        assert vol.shut_down
        dirty = vol.pages.state(full.handle)["ndirty"]
        assert bool(dirty) == (flags == ioctl.GOING_NOLOGFLUSH)
        assert await error_of(ioctl.run(vol, full, ioctl.GETFLAGS, b"", ROOT)) == errno.EIO
        vol.inodes.put(full)
    device.close()


async def test_an_immutable_file_stays_as_it_is(scratch: Path) -> None:
    async with a_tree(support.mkfs(scratch)) as (vol, empty, _, below):
        await fileattr.set_flags(vol, empty, 0x10)
        assert empty.flags == L.DIFLAG_IMMUTABLE
        async with using(vol) as dp:
            assert await error_of(namespace.unlink(vol, dp, b"empty")) == errno.EPERM
            assert await error_of(namespace.link(vol, dp, b"more", empty)) == errno.EPERM
        assert await error_of(namespace.setattr(vol, empty, {"mode": 0o600})) == errno.EPERM
