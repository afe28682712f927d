"""Opened volumes for the tests of the page cache: a device that takes its time, files to use.

The device works in place, after a pause on trio's clock that a seed decides, so that under a mock
clock every run with one seed interleaves reads, write-back and writers in the same way.
"""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from alloc.topology import ONE, Topology
from fs import namespace
from fs.cache.inode import Inode
from fs.device.base import Views
from fs.device.image import Found, ImageFile
from fs.volume import Volume

IMAGES = {
    "4k": (),
    "1k": ("-b", "size=1k"),
    "64k": ("-b", "size=64k"),
    "rmapbt": ("-m", "rmapbt=1"),
}


class SlowImage(ImageFile):
    """An image whose transfers take up to `pause_s`; it can be told to fail, and counts."""

    def __init__(self, path: Path, seed: int = 0, pause_s: float = 0.0) -> None:
        super().__init__(str(path))
        self._random = random.Random(seed)
        self._pause_s = pause_s
        self.fail_writes = False
        self.reads: list[tuple[int, int]] = []  # (offset, bytes)
        self.writes: list[tuple[int, int]] = []
        self.before_write: Callable[[], object] = lambda: None

    async def read(self, offset: int, views: Views) -> None:
        self.reads.append((offset, sum(len(v) for v in views)))
        await super().read(offset, views)

    async def read_all(self, requests: Sequence[tuple[int, Views]]) -> None:
        if len(requests) > 1:  # a single one comes through `read`
            self.reads.extend((offset, sum(len(v) for v in views)) for offset, views in requests)
        await super().read_all(requests)

    async def write(self, offset: int, views: Views) -> None:
        self.writes.append((offset, sum(len(v) for v in views)))
        self.before_write()
        if self.fail_writes:
            raise OSError(errno.EIO, "the device failed, as it was told to")
        await super().write(offset, views)

    async def _run(self, call: Callable[[], Found]) -> Found:
        if self._pause_s:
            await trio.sleep(self._random.random() * self._pause_s)
        return call()


@asynccontextmanager
async def opened(
    path: Path,
    memory: int = 16 << 20,
    seed: int = 0,
    pause_s: float = 0.0,
    nodes: Topology = ONE,
) -> AsyncIterator[Volume]:
    """A volume on a slow device; it must not have shut down."""
    device = SlowImage(path, seed, pause_s)
    try:
        async with Volume.open(device, memory, nodes, paranoid=True) as vol:
            yield vol
        assert not vol.shut_down
        assert vol.space.delalloc == 0
        assert vol.space.reserved == 0
    finally:
        device.close()


@asynccontextmanager
async def a_file(vol: Volume, name: bytes = b"file") -> AsyncIterator[Inode]:
    """A regular file in the root directory, made when it is missing."""
    root = await vol.inodes.get(vol.geo.root_ino)
    try:
        try:
            ip = await namespace.lookup(vol, root, name)
        except FileNotFoundError:
            ip = await namespace.create(vol, root, name, 0o644, 0, 0)
    finally:
        vol.inodes.put(root)
    try:
        yield ip
    finally:
        vol.inodes.put(ip)
