"""Volumes and kernel mounts for the directory tests, and how the kernel lists a directory."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from fs import namespace
from fs.cache.inode import Inode
from fs.device.image import ImageFile
from fs.volume import Volume
from fs.xfs import dir as directory

SYS_GETDENTS64 = 217  # x86-64
IMAGES = {
    "4k": (),
    "1k": ("-b", "size=1k"),
    "64k": ("-b", "size=64k"),
    "8k directories": ("-n", "size=8k"),
    "rmapbt": ("-b", "size=1k", "-m", "rmapbt=1"),
}


class Dirent(NamedTuple):
    """One record of getdents64; `off` is the cookie behind it."""

    name: bytes
    ino: int
    dtype: int
    off: int


def getdents(path: Path, buffer_bytes: int = 32768) -> list[Dirent]:
    """The kernel's listing, with its cookies, which the os module hides."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    buffer = ctypes.create_string_buffer(buffer_bytes)
    found: list[Dirent] = []
    try:
        while True:
            n = libc.syscall(SYS_GETDENTS64, fd, buffer, buffer_bytes)
            assert n >= 0, os.strerror(ctypes.get_errno())
            if n == 0:
                return found
            at = 0
            while at < n:
                ino, off, length, dtype = struct.unpack_from("=QqHB", buffer.raw, at)
                name = buffer.raw[at + 19 : at + length].split(b"\0", 1)[0]
                found.append(Dirent(name, ino, dtype, off))
                at += length
    finally:
        os.close(fd)


@asynccontextmanager
async def opened(path: Path, memory: int = 32 << 20) -> AsyncIterator[Volume]:
    """The volume on an image; it must not have shut down when the block ends."""
    device = ImageFile(str(path))
    try:
        async with Volume.open(device, memory, paranoid=True) as vol:
            yield vol
            assert not vol.shut_down
    finally:
        device.close()


@asynccontextmanager
async def using(vol: Volume, *names: bytes) -> AsyncIterator[Inode]:
    """The inode at a path from the root; its reference ends with the block."""
    ip = await vol.inodes.get(vol.geo.root_ino)
    try:
        for name in names:
            below = await namespace.lookup(vol, ip, name)
            vol.inodes.put(ip)
            ip = below
        yield ip
    finally:
        vol.inodes.put(ip)


async def listed(vol: Volume, dp: Inode, batch: int = 64) -> list[directory.Entry]:
    """All entries, in calls of `batch` that go on from cookies."""
    found: list[directory.Entry] = []
    cookie = 0
    while True:
        async with vol.reader(dp) as tp:
            more = await directory.read(tp, dp, cookie, batch)
        if not more:
            return found
        found += more
        cookie = more[-1].next_cookie


async def names_of(vol: Volume, dp: Inode) -> dict[bytes, int]:
    """name -> ino, without "." and ".."."""
    return {e.name: e.ino for e in await listed(vol, dp) if e.name not in (b".", b"..")}


async def form(vol: Volume, dp: Inode) -> str:
    """short, block, leaf or node."""
    if dp.format == 1:
        return "short"
    async with vol.reader(dp) as tp:
        what = await directory._open(tp, dp)
        if isinstance(what, directory.TreeDir):
            return "leaf" if what.is_leaf else "node"
    return "block"
