"""Discarding free space: what goes, what must stay, and the devices that can or cannot."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from fs import file, namespace, trim
from fs.device import image as devices
from fs.device.image import ImageFile, Memory
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import SlowImage, a_file, opened
from tests.fs.test_file import contents
from tests.fs.test_freespace import free_extents

FORMS = {"4k": (), "1k rmapbt": ("-b", "size=1k", "-m", "rmapbt=1"), "64k": ("-b", "size=64k")}
forms = pytest.mark.parametrize("args", FORMS.values(), ids=FORMS.keys())
EVERYTHING = 1 << 62


def refused(code: int) -> object:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


class Recording(SlowImage):
    """Remembers what was discarded, and what the metadata's writes were before it."""

    def __init__(self, path: Path, seed: int = 0, pause_s: float = 0.0) -> None:
        super().__init__(path, seed, pause_s)
        self.discards: list[tuple[int, int]] = []
        self.before: list[int] = []  # writes that came before each

    async def discard(self, offset: int, length: int) -> None:
        self.discards.append((offset, length))
        self.before.append(len(self.writes))
        await super().discard(offset, length)


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`opened` uses a device that remembers."""
    with monkeypatch.context() as patch:
        patch.setattr("tests.fs.imagefiles.SlowImage", Recording)
        yield


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


async def free_bytes(vol: Volume) -> list[tuple[int, int]]:
    """Every free extent as (device offset, bytes), ascending."""
    found = []
    for agno in range(vol.geo.agcount):
        for start, n in await free_extents(vol, agno):
            fsbno = vol.geo.fsb(agno, start)
            found.append((vol.geo.fsb_to_bytes(fsbno), n << vol.geo.block_log))
    return found


def joined(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours as one."""
    merged: list[tuple[int, int]] = []
    for start, n in sorted(extents):
        if merged and sum(merged[-1]) == start:
            start, n = merged[-1][0], n + merged.pop()[1]
        merged.append((start, n))
    return merged


@forms
async def test_all_that_is_free_goes_and_nothing_else(
    scratch: Path, args: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = support.mkfs(scratch, *args)
    data = os.urandom(8 << 20)
    monkeypatch.setattr(trim, "BATCH_EXTENTS", 7)
    monkeypatch.setattr(trim, "BATCH_BLOCKS", 500)
    with recording(monkeypatch):
        async with opened(image) as vol, a_file(vol, b"keep") as keep, a_file(vol, b"go") as go:
            for at in range(0, len(data), 1 << 18):  # the two files lie between each other
                for ip in (keep, go):
                    await file.write(vol, ip, at, data[at : at + (1 << 18)])
                    await file.fsync(vol, ip)
            full = allocated(image)
            await file.truncate(vol, go, 0)
            done = await trim.trim(vol, 0, EVERYTHING, 0)
            device = vol.dev
            assert isinstance(device, Recording)
            wanted = await free_bytes(vol)
            assert joined(device.discards) == wanted
            assert done == sum(n for _, n in wanted)
            assert allocated(image) <= full - len(data) * 9 // 10
            assert await contents(vol, keep) == data
    support.assert_clean(image)
    async with opened(image) as vol, a_file(vol, b"keep") as keep:
        assert await contents(vol, keep) == data


async def test_ranges_and_least_lengths(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = support.mkfs(scratch)
    with recording(monkeypatch):
        async with opened(image) as vol, a_file(vol, b"a") as a, a_file(vol, b"b") as b:
            for i in range(40):  # holes of 1 to 40 blocks
                for ip, n in ((a, 3), (b, i + 1)):
                    await file.write(vol, ip, ip.size, b"x" * n * 4096)
                    await file.fsync(vol, ip)
            await file.truncate(vol, b, 0)
            device, free = vol.dev, await free_bytes(vol)
            assert isinstance(device, Recording)
            for start, length, least in (
                (0, EVERYTHING, 20 << 12),
                (vol.geo.ag_blocks << 12, 1 << 30, 0),
                (5000, 300_000_000, 5000),
                (123 << 12, 4096, 0),
            ):
                device.discards.clear()
                done = await trim.trim(vol, start, length, least)
                low, high = -(-start // 4096) * 4096, (start + length) // 4096 * 4096
                wanted = [
                    (max(at, low), min(at + n, high) - max(at, low))
                    for at, n in free
                    if n >= least and at < high and at + n > low
                ]
                assert joined(device.discards) == wanted
                assert done == sum(n for _, n in wanted)
    support.assert_clean(image)


async def test_refusals(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol:
        size = vol.geo.dblocks << vol.geo.block_log
        for args in ((size, 4096, 0), (0, 4095, 0), (0, EVERYTHING, size), (-1, 4096, 0)):
            with refused(errno.EINVAL):
                await trim.trim(vol, *args)
        assert await trim.trim(vol, 0, EVERYTHING, (vol.geo.ag_blocks << 12) - 4096) == 0

        def cannot(*args: object) -> int:
            raise OSError(errno.EOPNOTSUPP, "no")

        monkeypatch.setattr(devices, "_fallocate", cannot)
        with refused(errno.EOPNOTSUPP):
            await trim.trim(vol, 0, EVERYTHING, 0)
    device = ImageFile(str(image), read_only=True)
    try:
        async with Volume.open(device, 16 << 20, read_only=True) as vol:
            with refused(errno.EROFS):
                await trim.trim(vol, 0, EVERYTHING, 0)
    finally:
        device.close()


async def test_the_image_says_so_first(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each discard an image that were cut off just then does not need what goes."""
    image = support.mkfs(scratch)
    with recording(monkeypatch):
        async with opened(image) as vol, a_file(vol) as ip:
            await file.write(vol, ip, 0, os.urandom(4 << 20))
            await file.fsync(vol, ip)
            await vol.flush_metadata()
            device = vol.dev
            assert isinstance(device, Recording)
            blocks = [(m[1], m[2]) for m in await _maps(vol, ip)]
            await file.truncate(vol, ip, 0)
            seen = []
            real = device._run

            async def run(call: object) -> None:
                if len(seen) < len(device.discards):
                    seen.append(_inode_size(image, ip.ino))
                await real(call)  # type: ignore[arg-type]

            monkeypatch.setattr(device, "_run", run)
            await trim.trim(vol, 0, EVERYTHING, 0)
            hit = [d for d in device.discards if _overlaps(vol, d, blocks)]
            assert hit
            assert set(seen) == {0}
    support.assert_clean(image)


async def _maps(vol: Volume, ip: object) -> list[tuple[int, int, int]]:
    from tests.fs.test_file import extents

    return [(m.offset, m.fsbno, m.count) for m in await extents(vol, ip)]  # type: ignore[arg-type]


def _overlaps(vol: Volume, discard: tuple[int, int], blocks: list[tuple[int, int]]) -> bool:
    log = vol.geo.block_log
    spans = [(vol.geo.fsb_to_bytes(fsbno), n << log) for fsbno, n in blocks]
    return any(at < sum(discard) and at + n > discard[0] for at, n in spans)


def _inode_size(image: Path, ino: int) -> int:
    """What the image itself says of an inode's blocks."""
    words = ["xfs_db", "-r", "-c", f"inode {ino}", "-c", "print core.nblocks", str(image)]
    done = subprocess.run(words, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


async def test_while_files_come_and_go(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Blocks are freed, discarded, allocated and written at the same time; no byte is lost."""
    image = support.mkfs(scratch, "-m", "rmapbt=1")
    kept: dict[bytes, bytes] = {}
    async with opened(image, 32 << 20, seed=3, pause_s=0.01) as vol:
        root = await vol.inodes.get(vol.geo.root_ino)
        stop = False
        discarded = 0

        async def life(me: int) -> None:
            rng = random.Random(me)
            for _ in range(25):
                name = b"%d-%d" % (me, rng.randrange(4))
                if name in kept:
                    async with a_file(vol, name) as ip:
                        assert await contents(vol, ip) == kept[name]
                    await namespace.unlink(vol, root, name)
                    del kept[name]
                data = rng.randbytes(rng.randrange(300_000))
                async with a_file(vol, name) as ip:
                    await file.write(vol, ip, 0, data)
                    await file.fsync(vol, ip)
                kept[name] = data
                await trio.sleep(rng.random() * 0.02)

        async def trimming() -> None:
            nonlocal discarded
            while not stop:
                discarded += await trim.trim(vol, 0, EVERYTHING, 0)
                await trio.sleep(0.01)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trimming)
            async with trio.open_nursery() as lives:
                for me in range(4):
                    lives.start_soon(life, me)
            stop = True
        assert discarded
        vol.inodes.put(root)
    support.assert_clean(image)
    async with opened(image) as vol:
        for name, data in kept.items():
            async with a_file(vol, name) as ip:
                assert await contents(vol, ip) == data


# -- devices -----------------------------------------------------------------------------------


async def test_a_memory_device_gives_its_pages_back() -> None:
    device = Memory(1 << 20)
    try:
        await device.write(0, [memoryview(b"x" * (1 << 20))])
        before = os.fstat(device.fileno()).st_blocks
        await device.discard(4096, 8192)
        assert before - os.fstat(device.fileno()).st_blocks == 16
        got = bytearray(16384)
        await device.read(0, [memoryview(got)])
        assert got == b"x" * 4096 + bytes(8192) + b"x" * 4096
        assert os.fstat(device.fileno()).st_size == 1 << 20
    finally:
        device.close()


@support.needs_root
async def test_a_block_device_is_told(scratch: Path) -> None:
    image = support.mkfs(scratch)
    data = os.urandom(4 << 20)
    with support.loop_device(image) as loop:
        device = ImageFile(str(loop))
        async with Volume.open(device, 16 << 20, paranoid=True) as vol:
            async with a_file(vol, b"keep") as keep, a_file(vol, b"go") as go:
                for ip in (keep, go):
                    await file.write(vol, ip, 0, data)
                    await file.fsync(vol, ip)
                full = allocated(image)
                await file.truncate(vol, go, 0)
                assert await trim.trim(vol, 0, EVERYTHING, 0) > len(data)
                assert full - allocated(image) > len(data) // 2
        device.close()
    support.assert_clean(image)
    with support.kernel_mount(image, scratch / "mnt") as root:
        assert (root / "keep").read_bytes() == data
