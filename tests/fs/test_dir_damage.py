"""Changing directories whose blocks lie, with fitting CRCs.

A change may be refused (EUCLEAN) or shut the volume down, when the contradiction shows after the
first change (EIO from then on); nothing else may come of it. Every kind of directory block is
damaged, and shortforms in their inodes. What is written goes nowhere, so that one image serves
all rounds.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import trio

from fs import namespace
from fs.device.base import Views
from fs.device.image import ImageFile
from fs.volume import Volume
from fs.xfs.crc import crc_stamp
from tests import support
from tests.conftest import AllowLogs
from tests.fs import dirmodel
from tests.fs.dirimages import names_of, opened, using
from tools.targets import scratch_dir

# Magic, where it stands in the block and where the CRC does; where the damage goes.
KINDS = {
    "block": (b"XDB3", 0, 4, (48, 4096)),
    "data": (b"XDD3", 0, 4, (48, 4096)),
    "leaf1": (b"\x3d\xf1", 8, 12, (0, 4096)),
    "leafn": (b"\x3d\xff", 8, 12, (0, 4096)),
    "node": (b"\x3e\xbe", 8, 12, (0, 128)),
    "free": (b"XDF3", 0, 4, (48, 128)),
    "short": (b"IN", 0, 100, (176, 240)),
}
DIRS = {b"short": 3, b"block": 40, b"leaf": 200, b"node": 900}
ALLOWED = {errno.EUCLEAN, errno.EIO, errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
BITS = (0, 0xFF, 1, 2, 4, 8, 16, 32, 64, 128)


class Lying(ImageFile):
    """A device that lays a patch over its image and swallows what is written."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self.patch_at, self.patch = 0, b""
        self.seen: dict[str, set[tuple[int, int]]] = {kind: set() for kind in KINDS}

    async def read(self, offset: int, views: Views) -> None:
        await super().read(offset, views)
        for view in views:
            end = self.patch_at + len(self.patch)
            if self.patch and offset <= self.patch_at and end <= offset + len(view):
                view[self.patch_at - offset : end - offset] = self.patch
            self._note(offset, view)
            offset += len(view)

    async def write(self, offset: int, views: Views) -> None:
        pass

    def _note(self, offset: int, view: memoryview) -> None:
        for kind, (magic, at, _, _) in KINDS.items():
            if bytes(view[at : at + len(magic)]) != magic:
                continue
            if kind != "short":
                self.seen[kind].add((offset, len(view)))
                continue
            for i in range(0, len(view), 512):
                if view[i + 2] >> 4 == 4 and view[i + 5] == 1:  # a directory, inline
                    self.seen[kind].add((offset + i, 512))

    def damage(self, kind: str, rng: random.Random) -> None:
        """Up to three bytes of one block of a kind; the CRC fits again."""
        _, _, crc_at, (low, high) = KINDS[kind]
        self.patch_at, length = rng.choice(sorted(self.seen[kind]))
        with open(self.path, "rb") as image:
            image.seek(self.patch_at)
            block = np.frombuffer(image.read(length), np.uint8).copy()
        for _ in range(rng.randint(1, 3)):
            span = rng.choice((16, 64, 256, high - low))
            at = low + rng.randrange(min(span, high - low))
            if rng.randrange(4) == 0 and kind != "short":
                at = length - 1 - rng.randrange(64)
            if not crc_at <= at < crc_at + 4:
                block[at] = rng.choice((*BITS, rng.randrange(256)))
        crc_stamp(block, 0, length, crc_at)
        self.patch = block.tobytes()


async def make(path: Path) -> None:
    """A directory of each form, full of links to one file."""
    async with opened(path) as vol, using(vol) as root:
        target = await namespace.create(vol, root, b"target", 0o644, 0, 0)
        for name, count in DIRS.items():
            dp = await namespace.mkdir(vol, root, name, 0o755, 0, 0)
            names = [b"%d" % i + b"x" * (i % 60) for i in range(count)]
            for entry in names + (dirmodel.colliding(30) if count > 300 else []):
                await namespace.link(vol, dp, entry, target)
            for entry in names[1::9]:
                await namespace.unlink(vol, dp, entry)
            vol.inodes.put(dp)
        vol.inodes.put(target)


@pytest.fixture(scope="module")
def device() -> Iterator[Lying]:
    with scratch_dir() as scratch:
        image = support.mkfs(scratch)
        trio.run(make, image)
        device = Lying(image)
        assert trio.run(change, device, 0) == set()
        assert all(device.seen.values()), device.seen
        yield device
        device.close()


async def change(device: Lying, seed: int) -> set[int]:
    """Change every directory in many ways; returns the errors that were met."""
    errors: set[int] = set()
    rng = random.Random(seed)
    async with Volume.open(device, 16 << 20) as vol:
        with trio.fail_after(60):
            for name in DIRS:
                try:
                    await change_one(vol, name, rng)
                except OSError as error:
                    errors.add(error.errno or 0)
    return errors


async def change_one(vol: Volume, name: bytes, rng: random.Random) -> None:
    async with using(vol) as root, using(vol, name) as dp, using(vol, b"target") as target:
        names = sorted(await names_of(vol, dp))
        rng.shuffle(names)
        for i in range(12):
            await namespace.link(vol, dp, b"new-%d" % i + b"y" * rng.randrange(200), target)
        for entry in names[: len(names) * 3 // 4]:
            await namespace.unlink(vol, dp, entry)
        for entry in names[len(names) * 3 // 4 :][:5]:
            await namespace.rename(vol, dp, entry, dp, entry + b"+")
        await namespace.rename(vol, root, name, root, name + b"+")
        await namespace.rename(vol, root, name + b"+", root, name)


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_damaged_directories(device: Lying, kind: str, allow_logs: AllowLogs) -> None:
    allow_logs("")
    met: set[int] = set()
    for seed in range(8):
        device.damage(kind, random.Random(seed))
        errors = trio.run(change, device, seed)
        assert errors <= ALLOWED, errors
        met |= errors
    assert errno.EUCLEAN in met
    assert not any("Traceback" in line or "unexpected" in line for line in allow_logs.seen)
