"""Images in files, on block devices and in memory.

Transfers go through a small pool of threads, because pread and pwrite release the GIL and a
device may take milliseconds; a hop costs about 60 us. An image in memory (a memfd) has nothing to
wait for, so its transfers run in place. What is discarded becomes a hole in an image file; a
block device is told.

Transfers that `direct.py` takes pass the page cache by. One that the kernel refuses then is done
again through the cache, from its beginning: it may have been done in part.

A flush is stable for what was written before it began. When nothing was since the last one, it has
nothing to do: `_changes` counts writes as they end, whether they failed or not.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import trio

from fs.device import direct as ways
from fs.device.base import Views
from fs.device.sizes import READ, WRITE, Sizes

IO_THREADS = 4  # enough to keep a device of this class busy from two cores
IOV_MAX = 1024
KEEP_SIZE, PUNCH_HOLE = 1, 2  # fallocate(2)
BLKDISCARD = 0x1277  # ioctl(2) of block devices: (offset, length) in bytes
CANNOT = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.ENODEV)

Found = TypeVar("Found")

_fallocate = ctypes.CDLL(None, use_errno=True).fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _each_batch(views: Views) -> list[Views]:
    return [views[i : i + IOV_MAX] for i in range(0, len(views), IOV_MAX)]


def _transfer(call: Callable[..., int], fd: int, views: Views, offset: int, what: str) -> None:
    """preadv or pwritev until all views are done, resuming after short transfers."""
    for batch in _each_batch(views):
        rest, left = list(batch), sum(map(len, batch))
        while left:
            done = call(fd, rest, offset)
            if done <= 0:
                raise OSError(errno.EIO, f"short {what} at byte {offset}")
            offset += done
            left -= done
            if left:
                rest = _after(rest, done)


def _after(views: list[memoryview], done: int) -> list[memoryview]:
    """What of the views lies behind their first `done` bytes."""
    at = 0
    while done >= len(views[at]):
        done -= len(views[at])
        at += 1
    return [views[at][done:], *views[at + 1 :]]


def _discard(fd: int, offset: int, length: int) -> None:
    """Give the place back. Raises OSError(EOPNOTSUPP) where that is unknown."""
    try:
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            fcntl.ioctl(fd, BLKDISCARD, struct.pack("=QQ", offset, length))
        elif _fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length):
            raise OSError(ctypes.get_errno(), "fallocate")
    except OSError as error:
        if error.errno not in CANNOT:
            raise
        raise OSError(errno.EOPNOTSUPP, "the device cannot discard") from error


class ImageFile:
    """An image in a regular file or on a block device.

    direct: one of `direct.MODES`; `is_direct` says whether any transfer can be.
    """

    def __init__(self, path: str, *, read_only: bool = False, direct: str = "auto") -> None:
        self.name = path
        self.path = path
        self.read_only = read_only
        self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
        self._direct = ways.reopen(self._fd, direct, read_only=read_only)
        self.size = os.lseek(self._fd, 0, os.SEEK_END)
        self._threads = trio.CapacityLimiter(IO_THREADS)
        self._changes, self._stable = 1, 0  # whoever had it before may not have flushed
        self.sizes = Sizes()

    def fileno(self) -> int:
        return self._fd

    @property
    def is_direct(self) -> bool:
        return self._direct is not None

    async def read(self, offset: int, views: Views) -> None:
        self.sizes.note(READ, views)
        if await self._run(partial(self._read, offset, views)):
            self.sizes.note_direct(READ, views)

    async def read_all(self, requests: Sequence[tuple[int, Views]]) -> None:
        if len(requests) == 1:
            await self.read(*requests[0])
        elif requests:
            for _, views in requests:
                self.sizes.note(READ, views)
            # One hop for all: a fragmented file's window is hundreds of pieces of one block.
            for views in await self._run(partial(self._read_each, requests)):
                self.sizes.note_direct(READ, views)

    async def write(self, offset: int, views: Views) -> None:
        assert not self.read_only
        self.sizes.note(WRITE, views)
        if await self._change(partial(self._write, offset, views)):
            self.sizes.note_direct(WRITE, views)

    def _read(self, offset: int, views: Views) -> bool:
        return self._move(os.preadv, views, offset, "read")

    def _read_each(self, requests: Sequence[tuple[int, Views]]) -> list[Views]:
        return [views for offset, views in requests if self._read(offset, views)]

    def _write(self, offset: int, views: Views) -> bool:
        return self._move(os.pwritev, views, offset, "write")

    def _move(self, call: Callable[..., int], views: Views, offset: int, what: str) -> bool:
        """One transfer; whether it was direct."""
        if self._direct is not None and self._direct.takes(offset, views):
            try:
                _transfer(call, self._direct.fd, views, offset, what)
                return True
            except OSError as error:
                if error.errno not in ways.REFUSED:
                    raise
        _transfer(call, self._fd, views, offset, what)
        return False

    async def discard(self, offset: int, length: int) -> None:
        assert not self.read_only
        await self._change(partial(_discard, self._fd, offset, length))

    async def flush(self) -> None:
        changes = self._changes
        if not self.read_only and changes > self._stable:
            await self._run(partial(os.fdatasync, self._fd))
            self._stable = max(self._stable, changes)

    async def _change(self, call: Callable[[], Found]) -> Found:
        try:
            return await self._run(call)
        finally:
            self._changes += 1

    async def _run(self, call: Callable[[], Found]) -> Found:
        return await trio.to_thread.run_sync(call, limiter=self._threads)

    def close(self) -> None:
        if self._direct is not None:
            os.close(self._direct.fd)
            self._direct = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Memory(ImageFile):
    """An image in memory: an anonymous file that lives as long as its descriptor."""

    def __init__(self, size: int, name: str = "scratch") -> None:
        fd = os.memfd_create(name)
        os.ftruncate(fd, size)
        path = f"/proc/{os.getpid()}/fd/{fd}"
        super().__init__(path, direct="off")
        os.close(fd)
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        self.name = name

    async def _run(self, call: Callable[[], Found]) -> Found:
        return call()
