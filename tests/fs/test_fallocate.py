"""fallocate on real images: random use against a bytearray, edge by edge, and the judges."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
import trio
import trio.testing

from fs import fallocate as fa
from fs import file, prealloc, seek
from fs.cache.inode import Inode
from fs.log.transaction import Transaction
from fs.truncate import SIZE_MAX
from fs.volume import Volume
from fs.xfs import bmap, fork
from fs.xfs import layout as L
from fs.xfs.extents import REC_BYTES
from tests import support
from tests.fs.imagefiles import IMAGES, a_file, opened
from tests.fs.test_bmap_shared import SIZE, held, make_shared, owned
from tests.fs.test_file import MOST, Model, contents, extents

images = pytest.mark.parametrize("args", IMAGES.values(), ids=IMAGES.keys())
KEEP = fa.KEEP_SIZE
PUNCH = fa.PUNCH_HOLE | KEEP


async def sound(vol: Volume, ip: Inode) -> None:
    """The map is in order; records that a split left apart are fine."""
    async with vol.reader(ip) as tp:
        fault = await bmap.check(tp, ip)
    assert fault in ("", "neighbours that one record could hold")


class Ranges(Model):
    """A file whose parts are also punched, allocated, zeroed, taken out and put in."""

    async def step(self) -> None:
        what = self.random.choices(
            ("write", "append", "read", "truncate", "grow", "fsync", "reclaim", "rest")
            + ("punch", "zero", "allocate", "collapse", "insert", "unshare", "map"),
            (20, 6, 20, 2, 2, 2, 3, 3, 12, 8, 8, 5, 4, 1, 3),
        )[0]
        await getattr(self, what)()

    async def call(self, at: int, size: int, mode: int) -> None:
        await fa.fallocate(self.vol, self.ip, at, size, mode)

    def clear(self, at: int, size: int) -> None:
        end = min(at + size, len(self.bytes))
        if end > at:
            self.bytes[at:end] = bytes(end - at)

    def extend(self, end: int) -> None:
        self.bytes.extend(bytes(max(end - len(self.bytes), 0)))

    async def punch(self) -> None:
        at, size = self.span()
        await self.call(at, size, PUNCH)
        self.clear(at, size)

    async def zero(self) -> None:
        at, size = self.span()
        keep = self.random.choice((0, KEEP))
        await self.call(at, size, fa.ZERO_RANGE | keep)
        self.clear(at, size)
        if not keep:
            self.extend(at + size)

    async def allocate(self) -> None:
        at, size = self.span()
        keep = self.random.choice((0, KEEP))
        await self.call(at, size, keep)
        if not keep:
            self.extend(at + size)

    async def unshare(self) -> None:
        at, size = self.span()
        await self.call(at, size, fa.UNSHARE_RANGE | KEEP)

    def blocks(self, most: int) -> tuple[int, int]:
        """Some whole blocks that begin inside the file."""
        unit = self.vol.geo.block_size
        at = self.random.randrange(len(self.bytes) // unit + 1) * unit
        return at, self.random.randint(1, max(most // unit, 1)) * unit

    async def collapse(self) -> None:
        at, size = self.blocks(100_000)
        if at + size < len(self.bytes):
            await self.call(at, size, fa.COLLAPSE_RANGE)
            del self.bytes[at : at + size]
        else:
            with pytest.raises(OSError, match="end of the file"):
                await self.call(at, size, fa.COLLAPSE_RANGE)

    async def insert(self) -> None:
        at, size = self.blocks(100_000)
        if len(self.bytes) + size > MOST:
            return
        if at < len(self.bytes):
            await self.call(at, size, fa.INSERT_RANGE)
            self.bytes[at:at] = bytes(size)
        else:
            with pytest.raises(OSError, match="end of the file"):
                await self.call(at, size, fa.INSERT_RANGE)

    async def map(self) -> None:
        await sound(self.vol, self.ip)
        for at, end in await holes(self.vol, self.ip):
            assert not any(self.bytes[at:end]), f"data in the hole {at}..{end}"


async def holes(vol: Volume, ip: Inode) -> list[tuple[int, int]]:
    """What SEEK_HOLE and SEEK_DATA say."""
    found, at = [], 0
    while at < ip.size:
        start = await seek.seek(vol, ip, at, seek.SEEK_HOLE)
        if start == ip.size:
            break
        try:
            at = await seek.seek(vol, ip, start, seek.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            at = ip.size
        found.append((start, at))
    return found


def kernel_holes(fd: int) -> list[tuple[int, int]]:
    """The same question to the kernel."""
    found, at, size = [], 0, os.fstat(fd).st_size
    while at < size:
        start = os.lseek(fd, at, os.SEEK_HOLE)
        if start == size:
            break
        try:
            at = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO
            at = size
        found.append((start, at))
    return found


def judge(
    image: Path, where: Path, wanted: dict[str, bytes], maps: dict[str, list[tuple[int, int]]]
) -> None:
    """Repair tools and the kernel: the image is sound, files and their holes are these."""
    support.assert_clean(image)
    where.mkdir(exist_ok=True)
    with support.kernel_mount(image, where) as root:
        for name, content in wanted.items():
            if name in maps:  # before the kernel's cache holds anything of the file
                with (root / name).open("rb") as opened_file:
                    assert kernel_holes(opened_file.fileno()) == maps[name]
            assert (root / name).read_bytes() == content


async def clean_always(vol: Volume) -> None:
    """Write-back at all times, beside whatever else goes on."""
    while True:
        await trio.sleep(0.03)
        await vol.flusher.sync()


@support.needs_root
@images
@pytest.mark.parametrize("seed", [1, 2])
async def test_random_use_equals_a_bytearray(
    scratch: Path, args: tuple[str, ...], seed: int, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch, *args)
    memory = 16 << 20 if "size=64k" in args else 8 << 20  # the least that their log needs
    async with opened(image, memory, seed=seed, pause_s=0.02) as vol, a_file(vol) as ip:
        model = Ranges(vol, ip, seed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clean_always, vol)
            for turn in range(1000):
                await model.step()
                if turn % 50 == 0:
                    await model.check()
            nursery.cancel_scope.cancel()
        await model.check()
        vol.arena.check()
    async with opened(image) as vol, a_file(vol) as ip:
        model.vol, model.ip = vol, ip
        await model.map()
        maps = {"file": await holes(vol, ip)}
        await model.check()
    judge(image, scratch / "mnt", {"file": bytes(model.bytes)}, maps)


@support.needs_root
@pytest.mark.parametrize("args", [(), ("-m", "rmapbt=1"), ("-b", "size=1k", "-m", "rmapbt=1")],
                         ids=["default", "rmapbt", "1k-rmapbt"])  # fmt: skip
async def test_random_use_of_a_file_that_shares_blocks(
    scratch: Path, args: tuple[str, ...], autojump_clock: trio.testing.MockClock
) -> None:
    image, inos, _ = make_shared(scratch, scratch / "mnt", *args)
    with support.kernel_mount(image, scratch / "mnt") as root:
        original = (root / "a").read_bytes()
    maps = {}
    async with opened(image, 8 << 20, seed=3, pause_s=0.02) as vol, held(vol, inos["b"]) as b:
        async with held(vol, inos["c"]) as c:
            models = [Ranges(vol, b, 5), Ranges(vol, c, 6)]
            for model in models:
                model.bytes[:] = original
            for turn in range(1000):
                await models[turn % 2].step()
            for name, model in zip("bc", models, strict=True):
                await model.check()
                await file.fsync(vol, model.ip)
                maps[name] = await holes(vol, model.ip)
    wanted = {"a": original, "b": bytes(models[0].bytes), "c": bytes(models[1].bytes)}
    judge(image, scratch / "mnt", wanted, maps)


# -- what the kernel does ----------------------------------------------------------------------

FS_IOC_FIEMAP, FIEMAP_UNWRITTEN = 0xC020660B, 0x800
RANGES = [  # (offset, length) in bytes of 4 KiB blocks
    (0, 4096), (100, 200), (4000, 200), (4096, 8192), (5000, 9000), (12288, 16384), (16384, 4096),
    (16384 + 512, 1024), (20480, 20480), (24576 + 4095, 2), (40960, 8192), (45056, 2000),
    (45056, 4096), (46000, 100_000), (49152, 4096), (200_000, 5000), (204_800, 4096), (0, 1 << 20),
    (-1, 10), (0, 0), (SIZE_MAX, 1 << 23),
]  # fmt: skip
CALLS = [
    (mode, offset, length)
    for mode in (0, KEEP, PUNCH, fa.ZERO_RANGE, fa.ZERO_RANGE | KEEP, fa.UNSHARE_RANGE)
    for offset, length in RANGES
] + [
    (mode, offset, length)
    for mode in (fa.COLLAPSE_RANGE, fa.INSERT_RANGE)
    for offset, length in [*RANGES, (0, 8192), (0, 45056), (36864, 4096), (8192, 8192), (512, 4096)]
]
CALLS += [(mode, 0, 4096) for mode in (2, 4, 9, 33, 18, 128, 256)]
CALLS += [(PUNCH, 16384, (1 << 63) - 1 - 16384), (PUNCH, (1 << 63) - 8192, 4096)]

Outcome = tuple[int, int, bytes, list[tuple[int, int, bool]]]  # errno, size, content, extents


def prepare(image: Path, where: Path, files: int) -> None:
    """Equal files: written, unwritten and missing blocks, and an end inside a block."""
    where.mkdir(exist_ok=True)
    with support.kernel_mount(image, where) as root:
        for number in range(files):
            with (root / f"f{number}").open("wb") as f:
                f.write(bytes(range(1, 251)) * 184)  # 46,000 bytes
                f.flush()
                syscall(f.fileno(), PUNCH, 12288, 8192)
                syscall(f.fileno(), fa.ZERO_RANGE, 24576, 12288)


def syscall(fd: int, mode: int, offset: int, length: int) -> int:
    """fallocate(2); its errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_int(fd), ctypes.c_int(mode), ctypes.c_long(offset), ctypes.c_long(length))
    return ctypes.get_errno() if libc.fallocate(*arguments) else 0


def joined(parts: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    """(offset, count, unwritten) with neighbours of one state as one."""
    out: list[tuple[int, int, bool]] = []
    for offset, count, unwritten in parts:
        if out and sum(out[-1][:2]) == offset and out[-1][2] == unwritten:
            offset, count = out[-1][0], out.pop()[1] + count
        out.append((offset, count, unwritten))
    return out


def fiemap(fd: int, block_log: int = 12) -> list[tuple[int, int, bool]]:
    """The kernel's view of a file's extents, in blocks."""
    request = bytearray(struct.pack("=QQIIII", 0, (1 << 63) - 1, 1, 0, 64, 0) + bytes(64 * 56))
    fcntl.ioctl(fd, FS_IOC_FIEMAP, request)
    found = struct.unpack_from("=I", request, 20)[0]
    parts = []
    for i in range(found):
        logical, _, length, _, _, flags = struct.unpack_from("=QQQQQI", request, 32 + 56 * i)
        unwritten = bool(flags & FIEMAP_UNWRITTEN)
        parts.append((logical >> block_log, length >> block_log, unwritten))
    return joined(parts)


def outcome(path: Path, error: int) -> Outcome:
    with path.open("rb") as f:
        found = fiemap(f.fileno())
        return error, os.fstat(f.fileno()).st_size, f.read(), found


@support.needs_root
@pytest.mark.parametrize("args", [(), ("-m", "rmapbt=1")], ids=["default", "rmapbt"])
async def test_each_call_does_what_the_kernels_does(scratch: Path, args: tuple[str, ...]) -> None:
    image, where = support.mkfs(scratch, *args), scratch / "mnt"
    prepare(image, where, len(CALLS))
    theirs = scratch / "theirs"
    shutil.copyfile(image, theirs)
    wanted = []
    with support.kernel_mount(theirs, where) as root:
        for number, call in enumerate(CALLS):
            path = root / f"f{number}"
            with path.open("r+b") as f:
                error = syscall(f.fileno(), *call)
                os.fsync(f.fileno())
            wanted.append(outcome(path, error))
    errors = []
    async with opened(image) as vol:
        for number, (mode, offset, length) in enumerate(CALLS):
            async with a_file(vol, f"f{number}".encode()) as ip:
                try:
                    await fa.fallocate(vol, ip, offset, length, mode)
                    errors.append(0)
                except OSError as error:
                    errors.append(error.errno)
    support.assert_clean(image)
    with support.kernel_mount(image, where) as root:
        for number, (call, error) in enumerate(zip(CALLS, errors, strict=True)):
            assert outcome(root / f"f{number}", error or 0) == wanted[number], call


# -- sizes, stamps, room -----------------------------------------------------------------------


async def test_set_id_bits_and_stamps(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        for kill, mode in ((False, 0o106755), (True, 0o100755)):
            async with vol.transaction("truncate") as tp:
                await tp.lock_inodes(ip)
                ip.mode = 0o106755
                tp.log_inode(ip)
            mtime, ctime, count = ip.mtime, ip.ctime, ip.changecount
            await fa.fallocate(vol, ip, 0, 5, PUNCH, kill_privileges=kill)
            assert ip.mode == mode
            assert (ip.mtime > mtime, ip.ctime > ctime, ip.changecount > count) == (True,) * 3
        await file.fsync(vol, ip)


async def test_a_punched_end_keeps_the_size_on_the_device(scratch: Path) -> None:
    """The dirty blocks whose write-back would have logged the size are gone."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * 100_000)
        assert ip.disk_size == 0
        await fa.fallocate(vol, ip, 50_000, 60_000, PUNCH)
        await vol.flusher.sync()
        assert ip.disk_size == 100_000
    async with opened(image) as vol, a_file(vol) as ip:
        assert await contents(vol, ip) == b"x" * 50_000 + bytes(50_000)


async def test_no_space_changes_no_size(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"abc")
        room = vol.space.available << vol.geo.block_log
        for mode in (0, KEEP, fa.ZERO_RANGE, fa.UNSHARE_RANGE):
            with pytest.raises(OSError, match="space") as caught:
                await fa.fallocate(vol, ip, 0, 2 * room, mode)
            assert caught.value.errno == errno.ENOSPC
            assert ip.size == 3
        await fa.fallocate(vol, ip, 0, room - (1 << 20), 0)
        assert ip.size == room - (1 << 20)
        await fa.fallocate(vol, ip, 1 << 20, 1 << 40, PUNCH)
        assert ip.nblocks == 256
        assert vol.space.available << vol.geo.block_log >= room - (2 << 20)
    support.assert_clean(image)


async def test_what_dirty_data_was_promised_too_much_comes_back_first(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip, a_file(vol, b"o") as other:
        await fa.fallocate(vol, other, 0, (vol.space.available - 3000) * 4096, 0)
        for at in range(0, 400, 2):
            await file.write(vol, ip, at * 4096, b"dirty")
        indirect = int(vol.pages.state(ip.handle)["indirect"])
        while (left := vol.space.available) > 2 * prealloc.tree_blocks(vol):
            n = min(left - 2 * prealloc.tree_blocks(vol), 200)
            await fa.fallocate(vol, other, other.size, n * 4096, 0)
            assert vol.pages.state(ip.handle)["indirect"] == indirect
        more = left - prealloc.tree_blocks(vol) + 1
        with pytest.raises(OSError, match="space"):
            vol.space.reserve(more + prealloc.tree_blocks(vol))
        assert indirect > 1
        await fa.fallocate(vol, other, other.size, more * 4096, 0)
        assert vol.pages.state(ip.handle)["indirect"] == 0


async def test_more_extents_leave_write_back_the_room_it_was_promised(scratch: Path) -> None:
    """Punching makes the list of extents full while a dirty block waits for its place in it."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * (50 * 4096))
        await file.fsync(vol, ip)
        await file.write(vol, ip, 100 * 4096, b"dirty")
        assert vol.pages.state(ip.handle)["indirect"] == 0
        at = 1
        while fork.area(ip, bmap.DATA)[1] > ip.nextents * REC_BYTES:
            await fa.fallocate(vol, ip, at * 4096, 4096, PUNCH)
            at += 2
        assert ip.format == L.FMT_EXTENTS
        await file.fsync(vol, ip)
        assert ip.format == L.FMT_BTREE
        assert vol.pages.lost_pages == 0
    support.assert_clean(image)


async def test_extent_size_hint(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        async with vol.transaction("truncate") as tp:
            await tp.lock_inodes(ip)
            ip.flags |= L.DIFLAG_EXTSIZE
            ip.extsize = 16
            tp.log_inode(ip)
        await fa.fallocate(vol, ip, 20 * 4096 + 1, 4096, 0)
        assert [m[::2] for m in await extents(vol, ip)] == [(16, 16)]
        await fa.fallocate(vol, ip, 30 * 4096, 40 * 4096, KEEP)
        assert sum(m.count for m in await extents(vol, ip)) == 80 - 16
        assert ip.flags & L.DIFLAG_PREALLOC
    support.assert_clean(image)


# -- the cache ---------------------------------------------------------------------------------


async def test_a_hole_in_a_large_dirty_folio(scratch: Path) -> None:
    """The folio stays, its other blocks are written, the hole is neither written nor counted."""
    image = support.mkfs(scratch)
    data = bytes(range(256)) * 4096
    async with opened(image) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, data)
        assert int(vol.pages.pages.order[vol.pages.find(ip.handle, 0)]) > 2
        await fa.fallocate(vol, ip, 4096 - 7, 8192 + 7, PUNCH)
        wanted = data[:4089] + bytes(8199) + data[12288:]
        assert await contents(vol, ip) == wanted
        assert vol.pages.state(ip.handle)["delalloc"] == 254
        await file.fsync(vol, ip)
        assert ip.nblocks == 254
        assert await contents(vol, ip) == wanted
        await file.write(vol, ip, 5000, b"back again")
        wanted = wanted[:5000] + b"back again" + wanted[5010:]
        assert await contents(vol, ip) == wanted
    judge(image, scratch / "mnt", {"file": wanted}, {})


async def test_punching_waits_for_write_back(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """No block is freed, and given to another file, while a write to it is under way."""
    image = support.mkfs(scratch)
    async with opened(image, seed=1, pause_s=1.0) as vol, a_file(vol) as ip:
        async with a_file(vol, b"other") as other:
            for turn in range(10):
                await file.write(vol, ip, 0, bytes([turn + 1]) * (1 << 20))
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(vol.flusher.sync)
                    await trio.sleep(0.05 * turn)
                    await fa.fallocate(vol, ip, 0, 1 << 20, PUNCH)
                    assert ip.nblocks == 0
                await file.write(vol, other, turn << 20, bytes([turn + 101]) * (1 << 20))
    wanted = b"".join(bytes([turn + 101]) * (1 << 20) for turn in range(10))
    judge(image, scratch / "mnt", {"file": bytes(1 << 20), "other": wanted}, {})


# -- shifting ----------------------------------------------------------------------------------


@support.needs_root
@pytest.mark.parametrize("args", [("-b", "size=1k"), ("-b", "size=1k", "-m", "rmapbt=1")],
                         ids=["1k", "1k-rmapbt"])  # fmt: skip
async def test_shifting_a_tree_of_extents(scratch: Path, args: tuple[str, ...]) -> None:
    """Thousands of records in several levels; the map is sound after every transaction."""
    image = support.mkfs(scratch, *args)
    async with opened(image, 64 << 20) as vol, a_file(vol) as ip:
        unit = vol.geo.block_size
        content = bytearray(os.urandom(3000 * unit - 100))
        await file.write(vol, ip, 0, content)
        for at in range(1, 2400, 2):
            await fa.fallocate(vol, ip, at * unit, unit, PUNCH if at % 3 else fa.ZERO_RANGE)
            content[at * unit : (at + 1) * unit] = bytes(unit)
        assert ip.format == L.FMT_BTREE
        rng = random.Random(3)
        for _ in range(6):
            at, n = rng.randrange(2000) * unit, rng.randrange(1, 60) * unit
            await fa.fallocate(vol, ip, at, n, fa.INSERT_RANGE)
            content[at:at] = bytes(n)
            await sound(vol, ip)
            at, n = rng.randrange(2000) * unit, rng.randrange(1, 60) * unit
            await fa.fallocate(vol, ip, at, n, fa.COLLAPSE_RANGE)
            del content[at : at + n]
            await sound(vol, ip)
        assert await contents(vol, ip) == content
        maps = {"file": await holes(vol, ip)}
    judge(image, scratch / "mnt", {"file": bytes(content)}, maps)


async def test_what_was_put_in_and_taken_out_leaves_no_trace(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * 100_000)
        await file.fsync(vol, ip)
        before = await extents(vol, ip)
        assert len(before) == 1
        changes = int(vol.pages.state(ip.handle)["map_seq"])
        await fa.fallocate(vol, ip, 8192, 4096, fa.INSERT_RANGE)
        assert len(await extents(vol, ip)) == 2
        await fa.fallocate(vol, ip, 8192, 4096, fa.COLLAPSE_RANGE)
        assert await extents(vol, ip) == before
        assert ip.size == ip.disk_size == 100_000
        assert vol.pages.state(ip.handle)["map_seq"] >= changes + 4


async def test_a_shift_is_sound_between_its_transactions(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bmap, "SHIFT_EXTENTS", 3)
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, b"x" * (80 * 4096))
        for at in range(1, 80, 2):
            await fa.fallocate(vol, ip, at * 4096, 4096, PUNCH)
        steps = 0
        changed_map = prealloc.changed_map

        def watched(tp: Transaction, inode: Inode) -> None:
            nonlocal steps
            steps += 1
            assert 40 <= inode.nextents <= 42
            changed_map(tp, inode)

        monkeypatch.setattr(prealloc, "changed_map", watched)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fa.fallocate, vol, ip, 10 * 4096, 40960, fa.INSERT_RANGE)
            while steps < 12:
                await trio.lowlevel.checkpoint()
                async with vol.reader(ip) as tp:
                    assert await bmap.check(tp, ip) == ""


# -- sharing -----------------------------------------------------------------------------------


@support.needs_root
@pytest.mark.parametrize("args", [(), ("-m", "rmapbt=1")], ids=["default", "rmapbt"])
async def test_unshare(scratch: Path, args: tuple[str, ...]) -> None:
    image, inos, digest = make_shared(scratch, scratch / "mnt", *args)
    async with opened(image) as vol, held(vol, inos["b"]) as b, held(vol, inos["a"]) as a:
        assert await owned(vol, b) == 0
        before = await contents(vol, b)
        await fa.fallocate(vol, b, 10 * 4096 + 5, 20 * 4096, fa.UNSHARE_RANGE)
        assert await owned(vol, b) == 21
        await fa.fallocate(vol, b, 0, SIZE + 4096, fa.UNSHARE_RANGE)
        assert b.size == SIZE + 4096
        assert await owned(vol, b) == SIZE // 4096
        assert await owned(vol, a) == 0  # c has them, too
        assert await contents(vol, b) == before + bytes(4096)
    assert hashlib.sha256(before).hexdigest() == digest
    judge(image, scratch / "mnt", dict.fromkeys("ac", before), {})
