"""One operation in two worlds: as system calls on the kernel's XFS, and on an open volume of ours.

Both have the same methods, by paths from the root. `sync` makes everything that was done stable in
the log and writes no metadata home; an unlinked inode is freed when `settle` returns.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from fs import copyrange, fallocate, file, namespace, rename, truncate, xattr
from fs.cache.inode import Inode
from fs.volume import Volume
from fs.xfs import stamp
from tests import kernel_tree

_libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
FREED_AT_ONCE = 30  # looks at the counters without a change: no transaction of a chain is to come


class World(Protocol):
    """What operations are made of. Raises OSError."""

    async def create(self, path: str) -> None: ...
    async def mkdir(self, path: str) -> None: ...
    async def mknod(self, path: str, mode: int, rdev: int) -> None: ...
    async def symlink(self, path: str, target: str) -> None: ...
    async def link(self, old: str, new: str) -> None: ...
    async def unlink(self, path: str) -> None: ...
    async def rmdir(self, path: str) -> None: ...
    async def rename(self, old: str, new: str, flags: int = 0) -> None: ...
    async def chmod(self, path: str, mode: int) -> None: ...
    async def chown(self, path: str, uid: int, gid: int) -> None: ...
    async def utime(self, path: str, ns: int) -> None: ...
    async def write(self, path: str, at: int, data: bytes) -> None: ...
    async def fsync(self, path: str) -> None: ...
    async def truncate(self, path: str, size: int) -> None: ...
    async def fallocate(self, path: str, mode: int, at: int, size: int) -> None: ...
    async def set_attr(self, path: str, name: str, value: bytes) -> None: ...
    async def drop_attr(self, path: str, name: str) -> None: ...
    async def clone(self, old: str, new: str) -> None: ...
    async def ino(self, path: str) -> int: ...
    async def open(self, path: str) -> None: ...
    async def close(self) -> None: ...
    async def settle(self) -> None: ...
    async def sync(self) -> None: ...


class Kernel:
    """A mount of the kernel's."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: list[int] = []

    def _at(self, path: str) -> bytes:
        return os.fsencode(self._root / path)

    async def create(self, path: str) -> None:
        os.close(os.open(self._at(path), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644))

    async def mkdir(self, path: str) -> None:
        os.mkdir(self._at(path))

    async def mknod(self, path: str, mode: int, rdev: int) -> None:
        os.mknod(self._at(path), mode, rdev)

    async def symlink(self, path: str, target: str) -> None:
        os.symlink(target.encode(), self._at(path))

    async def link(self, old: str, new: str) -> None:
        os.link(self._at(old), self._at(new))

    async def unlink(self, path: str) -> None:
        os.unlink(self._at(path))

    async def rmdir(self, path: str) -> None:
        os.rmdir(self._at(path))

    async def rename(self, old: str, new: str, flags: int = 0) -> None:
        if _libc.renameat2(AT_FDCWD, self._at(old), AT_FDCWD, self._at(new), flags):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    async def chmod(self, path: str, mode: int) -> None:
        os.chmod(self._at(path), mode)

    async def chown(self, path: str, uid: int, gid: int) -> None:
        os.chown(self._at(path), uid, gid)

    async def utime(self, path: str, ns: int) -> None:
        os.utime(self._at(path), ns=(ns, ns))

    async def write(self, path: str, at: int, data: bytes) -> None:
        fd = os.open(self._at(path), os.O_WRONLY)
        os.pwrite(fd, data, at)
        os.close(fd)

    async def fsync(self, path: str) -> None:
        fd = os.open(self._at(path), os.O_WRONLY)
        os.fsync(fd)
        os.close(fd)

    async def truncate(self, path: str, size: int) -> None:
        os.truncate(self._at(path), size)

    async def fallocate(self, path: str, mode: int, at: int, size: int) -> None:
        fd = os.open(self._at(path), os.O_WRONLY)
        done = kernel_tree.fallocate(fd, mode, at, size)
        os.close(fd)
        assert done

    async def set_attr(self, path: str, name: str, value: bytes) -> None:
        os.setxattr(self._at(path), name, value)

    async def drop_attr(self, path: str, name: str) -> None:
        os.removexattr(self._at(path), name)

    async def clone(self, old: str, new: str) -> None:
        """`new` must be there."""
        with open(self._at(old), "rb") as src, open(self._at(new), "rb+") as dst:
            fcntl.ioctl(dst.fileno(), kernel_tree.FICLONE, src.fileno())

    async def ino(self, path: str) -> int:
        return os.lstat(self._at(path)).st_ino

    async def open(self, path: str) -> None:
        how = os.O_RDONLY | os.O_NOATIME
        self._open.append(os.open(self._at(path), how))

    async def close(self) -> None:
        while self._open:
            os.close(self._open.pop())

    async def settle(self) -> None:
        """Looking at the counters wakes whoever frees inodes."""
        seen, same = None, 0
        while same < FREED_AT_ONCE:
            found = os.statvfs(self._root)
            counters = found.f_bfree, found.f_files, found.f_ffree
            same = same + 1 if counters == seen else 0
            seen = counters
            time.sleep(0.01)

    async def sync(self) -> None:
        fd = os.open(self._root, os.O_RDONLY)
        try:
            assert _libc.syncfs(fd) == 0
        finally:
            os.close(fd)


class Ours:
    """An open volume."""

    def __init__(self, vol: Volume) -> None:
        self._vol = vol
        self._open: list[Inode] = []

    @asynccontextmanager
    async def _at(self, path: str) -> AsyncIterator[Inode]:
        vol = self._vol
        ip = await vol.inodes.get(vol.geo.root_ino)
        try:
            for name in filter(None, path.split("/")):
                found = await namespace.lookup(vol, ip, name.encode())
                vol.inodes.put(ip)
                ip = found
            yield ip
        finally:
            vol.inodes.put(ip)

    @asynccontextmanager
    async def _name(self, path: str) -> AsyncIterator[tuple[Volume, Inode, bytes]]:
        where, _, name = path.rpartition("/")
        async with self._at(where) as dp:
            yield self._vol, dp, name.encode()

    async def create(self, path: str) -> None:
        async with self._name(path) as at:
            self._vol.inodes.put(await namespace.create(*at, 0o644, 0, 0))

    async def mkdir(self, path: str) -> None:
        async with self._name(path) as at:
            self._vol.inodes.put(await namespace.mkdir(*at, 0o755, 0, 0))

    async def mknod(self, path: str, mode: int, rdev: int) -> None:
        async with self._name(path) as at:
            number = os.major(rdev) << 18 | os.minor(rdev)
            self._vol.inodes.put(await namespace.create(*at, mode, 0, 0, number))

    async def symlink(self, path: str, target: str) -> None:
        async with self._name(path) as at:
            self._vol.inodes.put(await namespace.symlink(*at, target.encode(), 0, 0))

    async def link(self, old: str, new: str) -> None:
        async with self._name(new) as at, self._at(old) as ip:
            await namespace.link(*at, ip)

    async def unlink(self, path: str) -> None:
        async with self._name(path) as at:
            await namespace.unlink(*at)

    async def rmdir(self, path: str) -> None:
        async with self._name(path) as at:
            await namespace.rmdir(*at)

    async def rename(self, old: str, new: str, flags: int = 0) -> None:
        async with self._name(old) as at, self._name(new) as to:
            await rename.rename(*at, *to[1:], flags)

    async def chmod(self, path: str, mode: int) -> None:
        await self._set(path, mode=mode)

    async def chown(self, path: str, uid: int, gid: int) -> None:
        await self._set(path, uid=uid, gid=gid)

    async def utime(self, path: str, ns: int) -> None:
        at = stamp.from_unix_ns(ns)
        await self._set(path, atime=at, mtime=at)

    async def _set(self, path: str, **changes: int) -> None:
        async with self._at(path) as ip:
            await namespace.setattr(self._vol, ip, changes)

    async def write(self, path: str, at: int, data: bytes) -> None:
        async with self._at(path) as ip:
            assert await file.write(self._vol, ip, at, data) == len(data)

    async def fsync(self, path: str) -> None:
        async with self._at(path) as ip:
            await file.fsync(self._vol, ip)

    async def truncate(self, path: str, size: int) -> None:
        async with self._at(path) as ip:
            await truncate.truncate(self._vol, ip, size)

    async def fallocate(self, path: str, mode: int, at: int, size: int) -> None:
        async with self._at(path) as ip:
            await fallocate.fallocate(self._vol, ip, at, size, mode)

    async def set_attr(self, path: str, name: str, value: bytes) -> None:
        async with self._at(path) as ip:
            await xattr.set(self._vol, ip, name.encode(), value)

    async def drop_attr(self, path: str, name: str) -> None:
        async with self._at(path) as ip:
            await xattr.remove(self._vol, ip, name.encode())

    async def clone(self, old: str, new: str) -> None:
        async with self._at(old) as src, self._at(new) as dst:
            assert await copyrange.copy(self._vol, src, 0, dst, 0, src.size) == src.size

    async def ino(self, path: str) -> int:
        async with self._at(path) as ip:
            return int(ip.ino)

    async def open(self, path: str) -> None:
        async with self._at(path) as ip:
            self._open.append(self._vol.inodes.hold(ip.handle))

    async def close(self) -> None:
        while self._open:
            self._vol.inodes.put(self._open.pop())

    async def settle(self) -> None:
        await self._vol.drain_inactive()

    async def sync(self) -> None:
        await self._vol.flusher.sync()
        await self._vol.xlog.force()
