"""Images that lie: one field of a metadata block changed, with and without a fitting CRC.

Nothing a block says may do more than raise EUCLEAN for the operation that believed it: no other
exception, no endless loop, no byte written. The damage is laid over the reads of a device, so one
image serves all rounds.
"""

from __future__ import annotations

import errno
import random
import stat
from collections.abc import Iterator

import numpy as np
import pytest
import trio

from fs import file, xattr
from fs.cache.inode import Inode
from fs.device.base import Views
from fs.device.image import ImageFile
from fs.volume import Volume
from fs.xfs import dir as directory
from fs.xfs import symlink
from fs.xfs.crc import crc_stamp
from tests.conftest import AllowLogs
from tests.kernel_tree import Hints, Maker
from tests.support import kernel_mount, mkfs, needs_root

# Magic: where it stands in its block and where the CRC does.
KINDS = {
    b"XDB3": (0, 4),
    b"XDD3": (0, 4),
    b"\x3d\xf1": (8, 12),
    b"\x3d\xff": (8, 12),
    b"\x3e\xbe": (8, 12),
    b"\x3b\xee": (8, 12),
    b"XARM": (0, 12),
    b"XSLM": (0, 12),
    b"BMA3": (0, 64),
    b"IN": (0, 100),
}
ALLOWED = {errno.EUCLEAN, errno.ENOENT, errno.ENODATA}
INODE_BYTES = 512


class Patched(ImageFile):
    """A device that remembers which metadata it gave out and lays damage over some of it."""

    def __init__(self, path: str) -> None:
        super().__init__(path, read_only=True)
        self.seen: dict[bytes, set[tuple[int, int]]] = {kind: set() for kind in KINDS}
        self.patches: dict[int, bytes] = {}

    async def read(self, offset: int, views: Views) -> None:
        await super().read(offset, views)
        for view in views:
            for at, patch in self.patches.items():
                if offset <= at and at + len(patch) <= offset + len(view):
                    view[at - offset : at - offset + len(patch)] = patch
            self._note(offset, view)
            offset += len(view)

    def _note(self, offset: int, view: memoryview) -> None:
        for kind, (at, _) in KINDS.items():
            if bytes(view[at : at + len(kind)]) == kind:
                if kind != b"IN":
                    self.seen[kind].add((offset, len(view)))
                    continue
                for i in range(0, len(view), INODE_BYTES):
                    if int.from_bytes(view[i + 2 : i + 4], "big"):  # mode: in use
                        self.seen[kind].add((offset + i, INODE_BYTES))

    def damage(self, kind: bytes, rng: random.Random, restamp: bool) -> None:
        """Change up to three bytes of one block of a kind."""
        offset, length = rng.choice(sorted(self.seen[kind]))
        block = np.zeros(length, np.uint8)
        with open(self.path, "rb") as image:
            image.seek(offset)
            block[:] = np.frombuffer(image.read(length), np.uint8)
        for _ in range(rng.randint(1, 3)):
            end = rng.choice((64, 128, 256, length))
            value = rng.choice((0, 0xFF, 1 << rng.randrange(8), rng.randrange(256)))
            block[rng.randrange(len(kind), min(end, length))] = value
        if restamp:
            crc_stamp(block, 0, length, KINDS[kind][1])
        self.patches = {offset: block.tobytes()}


async def _use(vol: Volume, ip: Inode) -> list[tuple[bytes, int]]:
    """Read what an inode has; a directory's entries are returned."""
    for name in await xattr.names(vol, ip):
        await xattr.get(vol, ip, name)
    kind = stat.S_IFMT(ip.mode)
    entries: list[tuple[bytes, int]] = []
    async with vol.reader(ip) as tp:
        if kind == stat.S_IFLNK:
            await symlink.read(tp, ip)
        elif kind == stat.S_IFDIR:
            cookie = 0
            for _ in range(100):
                batch = await directory.read(tp, ip, cookie, 100)
                if not batch:
                    break
                entries += [(name, ino) for name, ino, _, _ in batch]
                cookie = batch[-1][3]
            for name, _ in entries[::17]:
                await directory.lookup(tp, ip, name)
    if kind == stat.S_IFREG:
        for at in (0, 5 << 12, max(0, ip.size - 5)):
            await file.read(vol, ip, at, 1000)
    return entries


async def _walk(device: Patched) -> int:
    """Use every inode that can be reached; returns how many operations met corruption."""
    faults = 0
    async with Volume.open(device, 16 << 20, read_only=True) as vol:
        waiting, known = [vol.geo.root_ino], {vol.geo.root_ino}
        with trio.fail_after(60):
            while waiting:
                try:
                    ip = await vol.inodes.get(waiting.pop())
                except OSError as error:
                    assert error.errno in ALLOWED, error
                    faults += 1
                    continue
                try:
                    for _, ino in await _use(vol, ip):
                        if ino not in known:
                            known.add(ino)
                            waiting.append(ino)
                except OSError as error:
                    assert error.errno in ALLOWED, error
                    faults += 1
                finally:
                    vol.inodes.put(ip)
    return faults


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Patched]:
    """An image with metadata of every kind, read once so that the device knows where it is."""
    scratch = tmp_path_factory.mktemp("damaged")
    image = mkfs(scratch)
    where = scratch / "kernel"
    with kernel_mount(image, where, "loop,noatime"):
        maker = Maker(where, 3, Hints(extents=300))
        maker.directories()
        maker.symlinks()
        maker.attributes()
        maker.extents()
    device = Patched(str(image))
    assert trio.run(_walk, device) == 0
    assert all(device.seen.values())
    yield device
    device.close()


@needs_root
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.hex())
def test_wrong_checksum_is_noticed(device: Patched, kind: bytes, allow_logs: AllowLogs) -> None:
    allow_logs("corrupt ")
    device.damage(kind, random.Random(1), restamp=False)
    assert trio.run(_walk, device) > 0
    assert any("corrupt" in line for line in allow_logs.seen)


@needs_root
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.hex())
def test_well_stamped_lies_do_no_harm(device: Patched, kind: bytes, allow_logs: AllowLogs) -> None:
    allow_logs("corrupt ")
    for seed in range(3):
        device.damage(kind, random.Random(seed), restamp=True)
        trio.run(_walk, device)
