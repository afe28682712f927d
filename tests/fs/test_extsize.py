"""Extent size hints: the same operations by the kernel and by us leave the same map of the file."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import random
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from fs import copyrange, file, fileattr, ioctl
from fs import fallocate as fa
from fs.cache.inode import Inode
from fs.fileattr import FileAttr
from fs.log.transaction import Transaction
from fs.volume import Volume
from fs.xfs import bmap, extsize, freespace
from fs.xfs import layout as L
from tests import support
from tests.fs.imagefiles import IMAGES, a_file, opened
from tests.fs.lanes import a_desk
from tests.fs.test_fallocate import Ranges, clean_always, sound
from tests.kernel_tree import fallocate

KIB, MIB = 1 << 10, 1 << 20
SPAN = 4 * MIB  # of a file that is written at random

Op = tuple[str, int, int]  # what, offset, size
Piece = tuple[int, int, bool]  # offset and length in bytes, unwritten

FIEMAP, FIEMAP_HEADER, FIEMAP_EXTENT = 0xC020660B, struct.Struct("=QQIIII"), 56
FIEMAP_SYNC, FIEMAP_UNWRITTEN, FIEMAP_MOST = 1, 0x800, 4000
FALLOCATE = {
    "allocate": 0,
    "keep": fa.KEEP_SIZE,
    "punch": fa.PUNCH_HOLE | fa.KEEP_SIZE,
    "zero": fa.ZERO_RANGE,
}


# -- what is done to a file --------------------------------------------------------------------


def script(seed: int, length: int = 40) -> list[Op]:
    """Writes of all kinds, holes, and what fallocate(2) has; sizes of a few KiB to some 100.

    Odd ones preallocate nothing: so what is past the end of the file does not stay. A file that
    was made smaller is not opened again: its next close counts as the first one, but on Linux not
    always (XFS_ITRUNCATED goes when the file is synced).
    """
    dice = random.Random(seed)
    ops: list[Op] = []
    smaller = False
    weights = (40, 20, 4, 8, 12, 6) + (() if seed % 2 else (6, 6, 4))
    kinds = ("write", "append", "truncate", "sync", "punch", "reopen", "allocate", "keep", "zero")
    for _ in range(length):
        what = dice.choices(kinds[: len(weights)], weights)[0]
        smaller = smaller or what == "truncate"
        if what == "reopen" and smaller:
            continue
        at = dice.randrange(SPAN)
        size = int(2 ** dice.uniform(0, 18))
        if dice.random() < 0.5:
            at, size = at // 4096 * 4096, -(-size // 4096) * 4096
        ops.append((what, at, size))
    return ops


async def run_ours(vol: Volume, ip: Inode, ops: Sequence[Op]) -> None:
    for what, at, size in ops:
        if what in FALLOCATE:
            await fa.fallocate(vol, ip, at, size, FALLOCATE[what])
        elif what == "truncate":
            await file.truncate(vol, ip, at)
        elif what == "sync":
            await file.fsync(vol, ip)
        elif what == "reopen":
            vol.eofblocks.closed(ip)
            await vol.eofblocks.drain()
            vol.eofblocks.opened(ip)
        else:
            await file.write(vol, ip, ip.size if what == "append" else at, b"x" * size)


def run_posix(path: Path, ops: Sequence[Op]) -> None:
    """On a mounted file; closed at the end."""
    fd = os.open(path, os.O_RDWR)
    try:
        for what, at, size in ops:
            if what in FALLOCATE:
                assert fallocate(fd, FALLOCATE[what], at, size)
            elif what == "truncate":
                os.ftruncate(fd, at)
            elif what == "sync":
                os.fsync(fd)
            elif what == "reopen":
                os.close(fd)
                fd = os.open(path, os.O_RDWR)
            else:
                at = os.fstat(fd).st_size if what == "append" else at
                assert os.pwrite(fd, b"x" * size, at) == size
    finally:
        os.close(fd)


# -- what it has then --------------------------------------------------------------------------


def pieces(path: Path) -> list[Piece]:
    """A file's map, as the kernel's XFS tells it; what lies side by side in the file is joined."""
    request = FIEMAP_HEADER.pack(0, (1 << 63) - 1, FIEMAP_SYNC, 0, FIEMAP_MOST, 0)
    answer = array.array("B", request + bytes(FIEMAP_MOST * FIEMAP_EXTENT))
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FIEMAP, answer)
    finally:
        os.close(fd)
    found: list[Piece] = []
    mapped = FIEMAP_HEADER.unpack_from(answer)[3]
    assert mapped < FIEMAP_MOST
    for i in range(mapped):
        at = FIEMAP_HEADER.size + i * FIEMAP_EXTENT
        offset, _, length, _, _, flags = struct.unpack_from("=QQQQQI", answer, at)
        unwritten = bool(flags & FIEMAP_UNWRITTEN)
        if found and (sum(found[-1][:2]), found[-1][2]) == (offset, unwritten):
            length += found[-1][1]
            offset = found.pop()[0]
        found.append((offset, length, unwritten))
    return found


def set_hint(path: Path, nbytes: int, xflags: int = fileattr.X_EXTSIZE) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, ioctl.FSSETXATTR, ioctl.FSXATTR.pack(*FileAttr(xflags, nbytes)))
    finally:
        os.close(fd)


def of_kernel(
    directory: Path, mkfs: Sequence[str], hint: int, scripts: Sequence[Sequence[Op]]
) -> list[list[Piece]]:
    """Maps of files that the kernel wrote, each in the way of one script, after a remount."""
    image = support.mkfs(directory, *mkfs, name="theirs")
    with support.kernel_mount(image, directory / "mnt") as there:
        for n, ops in enumerate(scripts):
            (there / f"{n}").touch()
            set_hint(there / f"{n}", hint)
            run_posix(there / f"{n}", ops)
    return read_back(image, directory, len(scripts))


def read_back(image: Path, directory: Path, files: int) -> list[list[Piece]]:
    with support.kernel_mount(image, directory / "mnt") as there:
        return [pieces(there / f"{n}") for n in range(files)]


# -- the rule ----------------------------------------------------------------------------------

END = L.FILE_OFFSET_MAX


@pytest.mark.parametrize(
    ("offset", "count", "hint", "hole", "wanted"),
    [
        (20, 1, 16, (0, END), (16, 16)),
        (20, 12, 16, (0, END), (16, 16)),
        (20, 13, 16, (0, END), (16, 32)),
        (21, 1, 16, (21, END), (21, 16)),  # moved behind what is there, as long as it was
        (20, 1, 16, (0, 30), (14, 16)),  # moved before what is there
        (20, 1, 16, (18, 30), (18, 12)),  # cut: the hole is too small
        (20, 1, 16, (20, 21), (20, 1)),
        (20, 1, 16, (0, 21), (5, 16)),
        (3, 1, 16, (0, 10), (0, 10)),
        (5, 3, 3, (0, END), (3, 6)),
        (1, L.BMBT_LEN_MAX, 1 << 20, (0, END), (0, 1 << 20)),  # no more than a record has
    ],
)
def test_alignment(
    offset: int, count: int, hint: int, hole: tuple[int, int], wanted: tuple[int, int]
) -> None:
    """Worked out by hand, in the kernel's steps."""
    assert extsize.align(offset, count, hint, *hole) == wanted


def test_alignment_of_anything() -> None:
    """It lies in the hole, holds what was asked for, and is the multiples where there is room."""
    dice = random.Random(1)
    for _ in range(20_000):
        before, hint = dice.randrange(60), dice.randrange(1, 20)
        offset = before + dice.randrange(30)
        count = dice.randrange(1, 40)
        behind = dice.choice((END, offset + count + dice.randrange(40)))
        start, blocks = extsize.align(offset, count, hint, before, behind)
        assert before <= start <= offset
        assert offset + count <= start + blocks <= behind
        first, last = offset // hint * hint, -(-(offset + count) // hint) * hint
        if before <= first and last <= behind:
            assert (start, blocks) == (first, last - first)
        else:
            assert blocks == min(last - first, behind - before)


@pytest.mark.parametrize(
    ("got", "wanted"),
    [(32, 16), (20, 16), (19, 16), (17, 16), (16, 17), (14, 19), (13, 20), (1, 20)],
)
def test_fewer_blocks_are_put_where_they_are_needed(got: int, wanted: int) -> None:
    """13 blocks were asked for at 20, 32 were wanted at 16."""
    assert extsize.settle(16, got, 20, 13) == wanted


# -- like the kernel's -------------------------------------------------------------------------

CASES = [
    (form, hint)
    for form, hints in {
        "1k": (16 * KIB, 3 * KIB),
        "4k": (16 * KIB, 64 * KIB, 1 * MIB, 12 * KIB),
        "64k": (64 * KIB, 192 * KIB, 1 * MIB),
        "rmapbt": (64 * KIB,),
    }.items()
    for hint in hints
]


@asynccontextmanager
async def a_hinted(vol: Volume, name: bytes, nbytes: int) -> AsyncIterator[Inode]:
    """A file with a hint, open for writing."""
    async with a_file(vol, name) as ip:
        await fileattr.set(vol, ip, FileAttr(fileattr.X_EXTSIZE, nbytes))
        vol.eofblocks.opened(ip)
        yield ip
        vol.eofblocks.closed(ip)


def compare(ours: list[list[Piece]], theirs: list[list[Piece]], what: str) -> None:
    for n, (got, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert got == wanted, f"{what}, file {n}"


@pytest.mark.mount
@support.needs_root
@pytest.mark.parametrize(("form", "hint"), CASES)
async def test_maps_are_the_kernels(scratch: Path, form: str, hint: int) -> None:
    scripts = [script(seed) for seed in range(6)]
    theirs = of_kernel(scratch, IMAGES[form], hint, scripts)
    image = support.mkfs(scratch, *IMAGES[form])
    async with opened(image) as vol:
        for n, ops in enumerate(scripts):
            async with a_hinted(vol, b"%d" % n, hint) as ip:
                await run_ours(vol, ip, ops)
                assert vol.pages.state(ip.handle)["delalloc"] == 0
    support.assert_clean(image)
    compare(read_back(image, scratch, 6), theirs, f"{form}, hint {hint}")


@pytest.mark.mount
@support.needs_root
async def test_many_maps_where_space_is_in_use(scratch: Path) -> None:
    """The first AG is full before the last file comes: whole multiples come from the others."""
    scripts = [script(seed, 60) for seed in range(100, 140)]
    theirs = of_kernel(scratch, IMAGES["64k"], 192 * KIB, scripts)
    image = support.mkfs(scratch, *IMAGES["64k"])
    async with opened(image) as vol:
        for n, ops in enumerate(scripts):
            async with a_hinted(vol, b"%d" % n, 192 * KIB) as ip:
                await run_ours(vol, ip, ops)
    support.assert_clean(image)
    compare(read_back(image, scratch, len(scripts)), theirs, "many")


@support.needs_fuse
@pytest.mark.mount
@support.needs_root
@pytest.mark.parametrize("cache", ["none", "writethrough"])
def test_through_a_mount_and_inherited(scratch: Path, cache: str) -> None:
    """Files made below a directory that hands its hint on, and a directory below that one."""
    scripts = [script(seed) for seed in range(20, 24)]  # nobody waits until a close is dealt with
    scripts = [[op for op in ops if op[0] != "reopen"] for ops in scripts]
    names = ["dir/0", "dir/1", "dir/below/2", "dir/below/3"]

    def fill(root: Path) -> None:
        (root / "dir").mkdir()
        set_hint(root / "dir", 64 * KIB, fileattr.X_EXTSZINHERIT)
        (root / "dir/below").mkdir()
        for name, ops in zip(names, scripts, strict=True):
            (root / name).touch()
            run_posix(root / name, ops)

    found = []
    for who in ("theirs", "ours"):
        image, where = support.mkfs(scratch, name=who), scratch / "mnt"
        if who == "ours":
            with support.our_mount(image, where, cache=cache, options="lanes=2") as mount:
                fill(mount.path)
            support.assert_clean(image)
        else:
            with support.kernel_mount(image, where) as there:
                fill(there)
        with support.kernel_mount(image, where) as there:
            found.append([pieces(there / name) for name in names])
    compare(found[1], found[0], "inherited")


# -- content, space, lanes ---------------------------------------------------------------------


@pytest.mark.parametrize("form", IMAGES)
@pytest.mark.parametrize("blocks", [5, 32])
async def test_random_use_equals_a_bytearray(
    scratch: Path, form: str, blocks: int, autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch, *IMAGES[form])
    memory = 16 << 20 if form == "64k" else 8 << 20  # the least that their log needs
    async with opened(image, memory, seed=blocks, pause_s=0.02) as vol:
        async with a_hinted(vol, b"file", blocks * vol.geo.block_size) as ip:
            model = Ranges(vol, ip, seed=blocks)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(clean_always, vol)
                for _ in range(250):
                    await model.step()
                nursery.cancel_scope.cancel()
            await model.check()
            await sound(vol, ip)
    async with opened(image) as vol, a_file(vol) as ip:
        model.vol, model.ip = vol, ip
        await model.check()
    support.assert_clean(image)


async def past_end(vol: Volume, ip: Inode) -> int:
    """Blocks that a file has behind its size."""
    async with vol.reader(ip) as tp:
        return max(await bmap.last_offset(tp, ip) - -(-ip.size // vol.geo.block_size), 0)


async def test_what_lies_past_the_end_goes_with_the_last_writer(scratch: Path) -> None:
    """But not where fallocate has made blocks."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol, b"a") as a, a_file(vol, b"b") as b:
        for ip in (a, b):
            async with a_hinted(vol, b"a" if ip is a else b"b", MIB):
                await file.write(vol, ip, 0, b"x" * 5000)
                assert await past_end(vol, ip) == 254
                if ip is b:
                    await fa.fallocate(vol, ip, 0, 1, fa.KEEP_SIZE)
        await vol.eofblocks.drain()
        assert (await past_end(vol, a), await past_end(vol, b)) == (0, 254)
        assert (a.nblocks, b.nblocks) == (2, 256)
    support.assert_clean(image)


async def test_a_close_that_frees_nothing_is_not_the_first(scratch: Path) -> None:
    """The next one is; after that what is past the end stays, for who goes on."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        await fileattr.set(vol, ip, FileAttr(fileattr.X_EXTSIZE, 64 * KIB))
        for size, before, after in ((64 * KIB, 0, 0), (4 * KIB, 15, 0), (16 * KIB, 12, 12)):
            vol.eofblocks.opened(ip)
            await file.write(vol, ip, ip.size, b"x" * size)
            assert await past_end(vol, ip) == before
            vol.eofblocks.closed(ip)
            await vol.eofblocks.drain()
            assert await past_end(vol, ip) == after
    support.assert_clean(image)


async def test_no_space_for_a_multiple(scratch: Path) -> None:
    """ENOSPC as from the kernel, which gives no part of one; nothing was changed."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_hinted(vol, b"file", MIB) as ip:
        vol.space.pool = vol.space.unpromised + vol.space.stash - 200
        with pytest.raises(OSError, check=lambda e: e.errno == errno.ENOSPC):
            await file.write(vol, ip, 0, b"x")
        assert (ip.nblocks, ip.size) == (0, 0)
        vol.space.pool = 0
        assert await file.write(vol, ip, 0, b"x") == 1
        assert ip.nblocks == 256
    support.assert_clean(image)


async def test_free_space_in_crumbs(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No multiple is free in one piece: each piece lies where it serves what was asked for."""
    image = support.mkfs(scratch, *IMAGES["rmapbt"])
    whole = freespace.alloc

    async def crumbs(tp: Transaction, *, maxlen: int, **words: Any) -> tuple[int, int]:
        return await whole(tp, maxlen=min(maxlen, 2), **words)

    async with opened(image) as vol, a_hinted(vol, b"file", 64 * KIB) as ip:
        monkeypatch.setattr(freespace, "alloc", crumbs)
        await file.write(vol, ip, 4 * 4096, b"x")
        await file.write(vol, ip, 20 * 4096, b"x" * 5 * 4096)
        monkeypatch.undo()
        async with vol.reader(ip) as tp:
            found = await bmap.read(tp, ip, 0, 40)
        mapped = [b for m in found if m.fsbno != bmap.HOLE for b in range(m.offset, m.end)]
        assert mapped == [3, 4, 20, 21, 22, 23, 24, 25]
        assert ip.nblocks == 8
        assert bytes(await file.read(vol, ip, 20 * 4096, 1 << 20)) == b"x" * 5 * 4096
    support.assert_clean(image)


async def test_a_lane_leaves_holes_to_trio(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_hinted(vol, b"file", 64 * KIB) as ip, a_desk(vol) as desk:
        await file.truncate(vol, ip, 80 * KIB)
        assert await desk.write(ip, 0, b"x" * 4096) == 4096
        assert await desk.write(ip, 4096, b"y" * 4096) == 4096
        assert await desk.write(ip, 64 * KIB, b"z" * 4096) == 4096
        assert await desk.write(ip, 68 * KIB, b"z" * 4096) == 4096
        assert desk.codes == {"list": 1, "answered": 2, "map": 1}
        assert vol.pages.state(ip.handle)["delalloc"] == 0
        assert ip.nblocks == 32
    support.assert_clean(image)


async def test_who_sets_a_hint_waits_for_writers(scratch: Path) -> None:
    """A writer who found no hint has promised blocks to his data before there is one."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, a_file(vol) as ip:
        async with trio.open_nursery() as nursery:
            async with vol.iolock(ip):
                wanted = FileAttr(fileattr.X_EXTSIZE, 64 * KIB)
                nursery.start_soon(fileattr.set, vol, ip, wanted)
                await trio.testing.wait_all_tasks_blocked()
                assert not extsize.hint(ip)
        assert extsize.hint(ip) == 16


async def test_shared_blocks_are_copied_as_ever(scratch: Path) -> None:
    """Their copies are delayed still; holes beside them are not."""
    image = support.mkfs(scratch)
    async with opened(image) as vol:
        async with a_hinted(vol, b"a", 64 * KIB) as ip, a_file(vol, b"b") as other:
            await file.write(vol, ip, 0, b"a" * 8 * 4096)
            await file.fsync(vol, ip)
            await copyrange.copy(vol, ip, 0, other, 0, 8 * 4096)
            assert ip.flags2 & L.DIFLAG2_REFLINK
            await file.write(vol, ip, 4 * 4096, b"b" * 20 * 4096)
            assert vol.pages.state(ip.handle)["delalloc"] == 4
            await file.fsync(vol, ip)
            assert bytes(await file.read(vol, other, 0, 1 << 20)) == b"a" * 8 * 4096
            wanted = b"a" * 4 * 4096 + b"b" * 20 * 4096
            assert bytes(await file.read(vol, ip, 0, 1 << 20)) == wanted
    support.assert_clean(image)
