"""Devices that fail, tear and remember: what they do, and what the filesystem makes of it."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from fs import file, mapread
from fs.device.faulty import Faults, Faulty, parse
from fs.device.image import ImageFile, Memory
from fs.device.recorder import DISCARD, FLUSH, Recorder
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import a_file

SECTOR = 512


def views(*parts: bytes) -> list[memoryview]:
    return [memoryview(part) for part in parts]


async def content(device: Memory, offset: int, nbytes: int) -> bytes:
    got = bytearray(nbytes)
    await device.read(offset, [memoryview(got)])
    return bytes(got)


# -- faults ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("write=0.5", Faults(write=0.5)),
        ("read=1,torn=.25,seed=7", Faults(read=1.0, torn=0.25, seed=7)),
        ("flush=0,first=4096,last=8191", Faults(first=4096, last=8191)),
    ],
)
def test_the_option(text: str, faults: Faults) -> None:
    assert parse(text) == faults


@pytest.mark.parametrize("text", ["", "write=2", "write=-1", "seed=x", "write=1,write=1", "w=1"])
def test_the_option_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is none of read=P"):
        parse(text)


async def test_as_often_as_told_and_again_by_the_same_seed() -> None:
    async def run(seed: int) -> list[int]:
        device = Faulty(Memory(1 << 20), Faults(write=0.25, seed=seed))
        failed = []
        for n in range(200):
            try:
                await device.write(n * SECTOR, views(b"x" * SECTOR))
            except OSError as error:
                assert error.errno == errno.EIO
                failed.append(n)
        assert device.failed == {"read": 0, "write": len(failed), "torn": 0, "flush": 0}
        device.close()
        return failed

    first = await run(1)
    assert 25 <= len(first) <= 75
    assert await run(1) == first != await run(2)


async def test_what_failed_was_not_done_and_what_is_torn_begun() -> None:
    inner = Memory(1 << 20)
    device = Faulty(inner, Faults(write=1.0))
    with pytest.raises(OSError, match="injected: write of byte 4096"):
        await device.write(4096, views(b"x" * 4096))
    assert await content(inner, 4096, 4096) == bytes(4096)
    device.faults = Faults(torn=1.0)
    seen = set()
    for n in range(40):
        at = n * 4096
        with pytest.raises(OSError, match="of 4096 bytes written"):
            await device.write(at, views(b"a" * 1024, b"b" * 3072))
        there = await content(inner, at, 4096)
        written = len(there.rstrip(b"\0"))
        assert written % SECTOR == 0
        assert there == (b"a" * 1024 + b"b" * 3072)[:written].ljust(4096, b"\0")
        seen.add(written)
    assert seen == set(range(0, 4096, SECTOR)), "never all of it"
    device.faults = Faults(read=1.0, flush=1.0)
    for call in (device.flush(), device.read(0, views(b"x")), device.read_all([(0, views(b"x"))])):
        with pytest.raises(OSError, match="injected"):
            await call
    device.close()


async def test_a_range_only() -> None:
    device = Faulty(Memory(1 << 20), Faults(write=1.0, first=8192, last=12287))
    for at, fails in ((0, False), (4096, False), (8192, True), (12288, False), (4096 + 512, True)):
        try:
            await device.write(at, views(b"x" * 4096))
        except OSError:
            assert fails, at
        else:
            assert not fails, at
    device.close()


# -- the log of writes -------------------------------------------------------------------------


def entries(path: Path) -> Iterator[tuple[int, int, int, bytes]]:
    """What a log of writes says, by dm-log-writes' rules: (sector, sectors, flags, data)."""
    raw = path.read_bytes()
    magic, version, count, sector_size = struct.unpack_from("<QQQI", raw)
    assert (magic, version, sector_size) == (0x6A736677736872, 1, SECTOR)
    at = sector_size
    for _ in range(count):
        sector, sectors, flags, length = struct.unpack_from("<QQQQ", raw, at)
        at += sector_size
        yield sector, sectors, flags, raw[at : at + length]
        at += length
    assert at == len(raw)


class Slow(Memory):
    """Writes and flushes are done when the test says."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.writes = trio.Event()
        self.flushes = trio.Event()

    async def write(self, offset: int, views: object) -> None:
        await super().write(offset, views)  # type: ignore[arg-type]
        if offset:
            await self.writes.wait()

    async def flush(self) -> None:
        await self.flushes.wait()


async def test_a_flush_stands_behind_what_it_made_stable_only(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    inner = Slow()
    device = Recorder(inner, str(tmp_path / "log"))
    data = bytearray(b"1" * SECTOR)
    async with trio.open_nursery() as nursery:
        await device.write(0, [memoryview(data)])
        data[:] = b"9" * SECTOR
        nursery.start_soon(device.write, 4096, views(b"2" * SECTOR, b"2" * SECTOR))
        await trio.sleep(1)
        nursery.start_soon(device.flush)
        await trio.sleep(1)
        inner.writes.set()  # under way when the flush began
        await trio.sleep(1)
        await device.discard(8192, 4096)
        inner.flushes.set()
    device.close()
    assert list(entries(tmp_path / "log")) == [
        (0, 1, 0, b"1" * SECTOR),
        (0, 0, FLUSH, b""),
        (8, 2, 0, b"2" * 2 * SECTOR),
        (16, 8, DISCARD, b""),
    ]


async def test_played_back_it_is_the_image(scratch: Path) -> None:
    """All entries on a copy of the image make the image; up to a flush, one that is sound."""
    image, copy = support.mkfs(scratch), scratch / "copy"
    copy.write_bytes(image.read_bytes())
    device = Recorder(ImageFile(str(image)), str(scratch / "log"))
    async with Volume.open(device, 16 << 20) as vol, a_file(vol) as ip:
        for n in range(20):
            await file.write(vol, ip, n * 65536, bytes([n]) * 50000)
            await file.fsync(vol, ip)
    device.close()
    with copy.open("r+b") as played:
        for sector, _, flags, data in entries(scratch / "log"):
            assert not flags & DISCARD
            os.pwrite(played.fileno(), data, sector * SECTOR)
    assert copy.read_bytes() == image.read_bytes()
    support.assert_clean(copy)


# -- the filesystem on such devices ------------------------------------------------------------


@pytest.mark.parametrize("kind", ["write", "torn"])
async def test_a_failed_write_harms_no_other_file(
    kind: str, scratch: Path, allow_logs: Callable[[str], None]
) -> None:
    """In place, over blocks that are known: its own fsync says so, everything else is as it was."""
    allow_logs("write-back failed, data is lost")
    image = support.mkfs(scratch)
    device = Faulty(ImageFile(str(image)), Faults())
    async with (
        Volume.open(device, 16 << 20) as vol,
        a_file(vol, b"a") as a,
        a_file(vol, b"b") as b,
    ):
        for ip, byte in ((a, b"a"), (b, b"b")):
            await file.write(vol, ip, 0, byte * 100_000)
            await file.fsync(vol, ip)
        extents = await mapread.read(vol, a, 0, 25)
        first = extents[0].fsbno
        assert len(extents) == 1
        at = vol.geo.fsb_to_bytes(first)
        faults = {kind: 1.0, "first": at, "last": at + (extents[0].count << 12) - 1}
        device.faults = Faults(**faults)  # type: ignore[arg-type]
        for ip, byte in ((a, b"A"), (b, b"B")):
            await file.write(vol, ip, 0, byte * 100_000)
        await file.fsync(vol, b)
        with pytest.raises(OSError, match="failed earlier") as told:
            await file.fsync(vol, a)
        assert told.value.errno == errno.EIO
        assert device.failed[kind] >= 1
        device.faults = Faults()
        await file.fsync(vol, a)
        await file.write(vol, a, 200_000, b"again")
        await file.fsync(vol, a)
    device.close()
    support.assert_clean(image)
    async with (
        Volume.open(ImageFile(str(image)), 16 << 20) as vol,
        a_file(vol, b"a") as a,
        a_file(vol, b"b") as b,
    ):
        assert bytes(await file.read(vol, b, 0, 100_000)) == b"B" * 100_000
        lost = bytes(await file.read(vol, a, 0, 100_000))
        assert set(lost) <= set(b"aA")
        assert bytes(await file.read(vol, a, 200_000, 5)) == b"again"


async def test_a_flush_that_has_nothing_to_do_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing since the last one that ended well; what is written meanwhile is for the next."""
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 16))
    device = ImageFile(str(path))
    calls: list[int] = []
    during: list[Callable[[], None]] = []

    def sync(fd: int) -> None:
        calls.append(fd)
        while during:
            during.pop()()

    def fail() -> None:
        raise OSError(errno.EIO, "sync")

    monkeypatch.setattr("os.fdatasync", sync)

    async def flushes() -> int:
        before = len(calls)
        await device.flush()
        return len(calls) - before

    assert [await flushes() for _ in range(2)] == [1, 0]  # what was there before, then nothing
    await device.write(0, views(b"1" * SECTOR))
    assert [await flushes() for _ in range(2)] == [1, 0]
    await device.discard(4096, 4096)
    assert [await flushes() for _ in range(2)] == [1, 0]
    await device.write(0, views(b"2" * SECTOR))
    during.append(lambda: trio.from_thread.run(device.write, 0, views(b"3" * SECTOR)))
    assert [await flushes() for _ in range(3)] == [1, 1, 0]
    await device.write(0, views(b"4" * SECTOR))
    during.append(fail)
    with pytest.raises(OSError, match="sync"):
        await device.flush()
    assert [await flushes() for _ in range(2)] == [1, 0]
    device.close()
