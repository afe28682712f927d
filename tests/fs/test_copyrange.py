"""Copying ranges: shared where they can be, against bytearrays, the kernel and its tools."""

from __future__ import annotations

import errno
import os
import random
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from alloc import gfp
from fs import copyrange, file, writepages
from fs.cache.inode import Inode
from fs.log.transaction import Transaction
from fs.volume import Volume
from fs.xfs import bmap, refcount
from fs.xfs import layout as L
from tests import support
from tests.conftest import AllowLogs
from tests.fs.imagefiles import IMAGES, a_file, opened
from tests.fs.test_file import contents, drop_caches, extents
from tests.fs.treecheck import ImageChecker

FORMS = {**IMAGES, "1k rmapbt": ("-b", "size=1k", "-m", "rmapbt=1")}
forms = pytest.mark.parametrize("args", FORMS.values(), ids=FORMS.keys())
PLAIN = ("-m", "reflink=0")
MOST = 2 << 20


def judge(image: Path) -> None:
    """The kernel's tools, and our own count of every block's owners."""
    support.assert_clean(image)
    assert ImageChecker(image).check() == []


def refused(code: int) -> object:
    return pytest.raises(OSError, check=lambda error: error.errno == code)


@asynccontextmanager
async def files(vol: Volume, names: str) -> AsyncIterator[list[Inode]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(a_file(vol, n.encode())) for n in names]


async def shared_blocks(vol: Volume, ip: Inode) -> int:
    """Blocks of a file that have other owners, too."""
    found = 0
    for m in await extents(vol, ip):
        at, end = m.fsbno, m.fsbno + m.count
        async with vol.reader() as tp:
            while at < end and (part := await refcount.find_shared(tp, at, end - at)):
                found += part[1]
                at = sum(part)
    return found


async def sound(vol: Volume, *inodes: Inode) -> None:
    for ip in inodes:
        async with vol.reader(ip) as tp:
            assert await bmap.check(tp, ip) == ""


# -- sharing -----------------------------------------------------------------------------------


@forms
@support.needs_root
async def test_a_copy_shares_until_one_side_is_written(
    scratch: Path, args: tuple[str, ...]
) -> None:
    """Written by us on one side, by the kernel on the other; both keep their content."""
    image = support.mkfs(scratch, *args)
    data = os.urandom(MOST + 777)
    async with opened(image) as vol, files(vol, "ab") as (a, b):
        bs = vol.geo.block_size
        assert await file.write(vol, a, 0, data) == len(data)
        before, modified = vol.space.available, a.mtime
        assert await copyrange.copy(vol, a, 0, b, 0, 1 << 40) == len(data)
        assert (b.size, b.disk_size, b.nblocks) == (len(data), len(data), a.nblocks)
        assert a.flags2 & b.flags2 & L.DIFLAG2_REFLINK
        assert a.mtime == modified
        assert b.mtime > b.crtime
        assert await shared_blocks(vol, b) == a.nblocks == -(-len(data) // bs)
        assert before - vol.space.available <= 16  # trees
        assert await contents(vol, b) == data
        ours = bytearray(data)
        for at, n in ((3 * bs, bs), (5 * bs + 10, 20), (len(data) - 5, 50)):
            ours[at : at + n] = os.urandom(n)
            await file.write(vol, a, at, ours[at : at + n])
        assert (await contents(vol, a), await contents(vol, b)) == (ours, data)
        await file.fsync(vol, a)
        assert await shared_blocks(vol, b) == b.nblocks - 3
        await sound(vol, a, b)
    judge(image)
    theirs = bytearray(data)
    with support.kernel_mount(image, scratch / "mnt") as root:
        assert (root / "a").read_bytes() == ours
        assert (root / "b").read_bytes() == data
        with open(root / "b", "r+b") as out:
            theirs[9 * bs : 9 * bs + 5000] = os.urandom(5000)
            out.seek(9 * bs)
            out.write(theirs[9 * bs : 9 * bs + 5000])
    judge(image)
    async with opened(image) as vol, files(vol, "ab") as (a, b):
        assert (await contents(vol, a), await contents(vol, b)) == (ours, theirs)


@forms
async def test_cached_blocks_of_the_source_are_no_longer_its_own(
    scratch: Path, args: tuple[str, ...]
) -> None:
    """Clean and dirty folios of the source, which were writable in place, are no longer."""
    image = support.mkfs(scratch, *args)
    async with opened(image, 32 << 20) as vol, files(vol, "ab") as (a, b):
        bs = vol.geo.block_size
        data = os.urandom(40 * bs)
        await file.write(vol, a, 0, data)
        await file.fsync(vol, a)
        await drop_caches(vol)
        assert await contents(vol, a) == data
        data = data[: 7 * bs] + os.urandom(2 * bs) + data[9 * bs :]
        await file.write(vol, a, 7 * bs, data[7 * bs : 9 * bs])  # dirty, in place
        state = vol.pages.state(a.handle)
        assert state["delalloc"] == 0
        assert await copyrange.copy(vol, a, 0, b, 0, len(data)) == len(data)
        for at in range(0, len(data), bs):
            await file.write(vol, a, at + 1, b"new")
        assert state["delalloc"] == 40  # a new block was promised to each
        await file.fsync(vol, a)
        await drop_caches(vol)
        assert await contents(vol, b) == data
        assert await shared_blocks(vol, b) == 0
    judge(image)


@forms
async def test_what_was_there_gives_way(scratch: Path, args: tuple[str, ...]) -> None:
    """Cached, dirty, delayed, shared and fragmented blocks of the destination."""
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol, files(vol, "abc") as (a, b, c):
        bs = vol.geo.block_size
        data, old = os.urandom(100 * bs), os.urandom(150 * bs + 5)
        await file.write(vol, a, 0, data)
        for at in range(0, len(old), 2 * bs):  # every second block is on the device
            await file.write(vol, b, at, old[at : at + bs])
        await file.fsync(vol, b)
        await file.write(vol, b, 0, old)
        await copyrange.copy(vol, a, 0, c, 0, 50 * bs)
        await copyrange.copy(vol, c, 0, b, 120 * bs, 20 * bs)
        wanted = bytearray(old)
        wanted[120 * bs : 140 * bs] = data[: 20 * bs]
        assert await contents(vol, b) == wanted
        await file.write(vol, b, 0, wanted)
        assert await copyrange.copy(vol, a, 10 * bs, b, 20 * bs, 80 * bs) == 80 * bs
        wanted[20 * bs : 100 * bs] = data[10 * bs : 90 * bs]
        assert await contents(vol, b) == wanted
        await drop_caches(vol)
        assert await contents(vol, b) == wanted
        await sound(vol, a, b, c)
        free, delayed = vol.space.free, vol.space.delalloc - vol.space.stash
        await copyrange.copy(vol, a, 10 * bs, b, 20 * bs, 80 * bs)  # once more
        assert (vol.space.free, vol.space.delalloc - vol.space.stash) == (free, delayed)
        assert await contents(vol, b) == wanted
    judge(image)


async def test_holes_and_unwritten_blocks_become_holes(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image, 32 << 20) as vol, files(vol, "ab") as (a, b):
        bs = vol.geo.block_size
        await file.truncate(vol, a, 30 * bs)
        await file.write(vol, a, 5 * bs, b"x" * 3 * bs)
        await file.fsync(vol, a)
        async with vol.transaction("truncate", 20) as tp:
            await tp.lock_inodes(a)
            await bmap.alloc(tp, a, 8, 4, unwritten=True)
        await file.write(vol, b, 0, b"y" * 40 * bs)
        assert await copyrange.copy(vol, a, 0, b, 0, 30 * bs) == 30 * bs
        assert [(m.offset, m.count, m.unwritten) for m in await extents(vol, b)] == [
            (5, 3, False),
            (30, 10, False),
        ]
        wanted = bytes(5 * bs) + b"x" * 3 * bs + bytes(22 * bs) + b"y" * 10 * bs
        assert await contents(vol, b) == wanted
    judge(image)


# -- positions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [(), PLAIN], ids=["reflink", "plain"])
async def test_ends(scratch: Path, args: tuple[str, ...]) -> None:
    """Where the source ends, where the destination does, and what lies between."""
    image = support.mkfs(scratch, *args)
    shares = not args
    async with opened(image) as vol, files(vol, "abcde") as (a, b, c, d, e):
        data = os.urandom(10_000)
        await file.write(vol, a, 0, data)
        # The last block of the source becomes the last one of the destination.
        assert await copyrange.copy(vol, a, 4096, b, 8192, 1 << 20) == 5904
        assert await contents(vol, b) == bytes(8192) + data[4096:]
        assert await shared_blocks(vol, b) == 2 * shares
        # It does not: the destination goes on behind it.
        await file.write(vol, c, 0, b"c" * 20_000)
        assert await copyrange.copy(vol, a, 4096, c, 8192, 1 << 20) == 5904
        assert await contents(vol, c) == b"c" * 8192 + data[4096:] + b"c" * 5904
        assert await shared_blocks(vol, c) == shares
        # Positions inside blocks.
        assert await copyrange.copy(vol, a, 1, d, 5, 5000) == 5000
        assert await contents(vol, d) == bytes(5) + data[1:5001]
        assert await shared_blocks(vol, d) == 0
        # A destination that has written bytes behind its end and grows over them.
        await file.write(vol, e, 0, b"e" * 9000)
        await file.fsync(vol, e)
        e.size = e.disk_size = 8200
        assert await copyrange.copy(vol, a, 0, e, 12288, 4096) == 4096
        assert await contents(vol, e) == b"e" * 8200 + bytes(4088) + data[:4096]
        # Nothing to copy.
        assert await copyrange.copy(vol, a, 10_000, e, 0, 10) == 0
        assert await copyrange.copy(vol, a, 0, e, 0, 0) == 0
    judge(image)


@pytest.mark.parametrize("args", [(), PLAIN], ids=["reflink", "plain"])
async def test_one_file(scratch: Path, args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol, files(vol, "a") as (a,):
        data = os.urandom(10_000)
        await file.write(vol, a, 0, data)
        for src, dst, n in ((0, 4096, 4097), (4096, 0, 4097), (0, 0, 1), (4096, 9999, 1 << 30)):
            with refused(errno.EINVAL):
                await copyrange.copy(vol, a, src, a, dst, n)
        assert await copyrange.copy(vol, a, 0, a, 4096, 4096) == 4096
        assert await contents(vol, a) == data[:4096] * 2 + data[8192:]
        assert await copyrange.copy(vol, a, 4096, a, 12288, 1 << 30) == 5904
        wanted = data[:4096] * 2 + data[8192:] + bytes(2288) + data[:4096] + data[8192:]
        assert await contents(vol, a) == wanted
        await file.write(vol, a, 8192, b"new")
        await drop_caches(vol)
        wanted = bytearray(wanted)
        wanted[8192:8195] = b"new"
        assert await contents(vol, a) == wanted
    judge(image)


async def test_refusals(scratch: Path) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol, files(vol, "ab") as (a, b):
        await file.write(vol, a, 0, b"abc")
        root = await vol.inodes.get(vol.geo.root_ino)
        for src, dst in ((root, a), (a, root)):
            with refused(errno.EISDIR):
                await copyrange.copy(vol, src, 0, dst, 0, 1)
        vol.inodes.put(root)
        with refused(errno.EINVAL):
            await copyrange.copy(vol, a, -1, b, 0, 1)
        with refused(errno.EFBIG):
            await copyrange.copy(vol, a, 0, b, 1 << 63, 1)
        b.flags = L.DIFLAG_IMMUTABLE
        with refused(errno.EPERM):
            await copyrange.copy(vol, a, 0, b, 0, 1)
        b.flags, b.mode = 0, 0o106777
        await copyrange.copy(vol, a, 0, b, 0, 1, kill_privileges=True)
        assert b.mode == 0o100777
        a.flags2 |= L.DIFLAG2_COWEXTSIZE
        a.cowextsize = 4
        await copyrange.copy(vol, a, 0, b, 0, 3)
        assert (b.flags2 & L.DIFLAG2_COWEXTSIZE, b.cowextsize) == (L.DIFLAG2_COWEXTSIZE, 4)
    judge(image)


# -- trouble -----------------------------------------------------------------------------------


async def test_without_room_for_trees_bytes_are_copied(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sharing stops half-way; the rest is copied."""
    image = support.mkfs(scratch)
    turns = 0

    async def refuse(tp: Transaction, dst: Inode, fsbno: int) -> None:
        nonlocal turns
        turns += 1
        if turns > 2:
            raise OSError(errno.ENOSPC, "refused")

    monkeypatch.setattr(copyrange, "_check_room", refuse)
    monkeypatch.setattr(copyrange, "EXTENT_BLOCKS", 10)
    async with opened(image) as vol, files(vol, "ab") as (a, b):
        data = os.urandom(50 * 4096 + 3)
        await file.write(vol, a, 0, data)
        assert await copyrange.copy(vol, a, 0, b, 0, 1 << 30) == len(data)
        assert turns == 3
        assert await contents(vol, b) == data
        assert await shared_blocks(vol, b) == 20
    judge(image)


async def test_a_full_filesystem(scratch: Path) -> None:
    """No block is free: the copy is refused, what the destination had is still there."""
    image = support.mkfs(scratch, "-m", "rmapbt=1")
    async with opened(image) as vol, files(vol, "abc") as (a, b, c):
        data = os.urandom(64 << 10)
        await file.write(vol, a, 0, data)
        await file.fsync(vol, a)
        at = 0
        while vol.space.available > 8:
            at += await file.write(vol, c, at, bytes(min(1 << 20, (vol.space.available - 8) << 12)))
        await file.fsync(vol, c)
        await file.write(vol, b, 0, b"kept")
        done = 0
        try:
            done = await copyrange.copy(vol, a, 0, b, 0, len(data))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        kept = b"kept" + bytes(len(data) - 4)
        found = await contents(vol, b)
        assert found == data[:done] + kept[done : len(found)]
        await file.truncate(vol, c, 0)
        assert await copyrange.copy(vol, a, 0, b, 0, len(data)) == len(data)
        assert await contents(vol, b) == data
    judge(image)


async def test_a_failed_write_back_of_the_source_is_not_shared(
    scratch: Path, allow_logs: AllowLogs
) -> None:
    allow_logs("write-back failed")
    image = support.mkfs(scratch)
    async with opened(image) as vol, files(vol, "ab") as (a, b):
        await file.write(vol, a, 0, b"a" * 8192)
        await vol.flush_metadata()
        vol.dev.fail_writes = True  # type: ignore[attr-defined]
        with refused(errno.EIO):
            await copyrange.copy(vol, a, 0, b, 0, 8192)
        vol.dev.fail_writes = False  # type: ignore[attr-defined]
        assert b.nblocks == 0
    support.assert_clean(image)


async def test_a_completion_that_fails_half_way(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, allow_logs: AllowLogs
) -> None:
    """Copies that have taken the place of shared blocks stay, the others are freed."""
    allow_logs("write-back failed")
    image = support.mkfs(scratch)
    edit_map, edits = writepages._edit_map, []

    async def edit_first(vol: Volume, ip: Inode, some: list[writepages.Segment], size: int) -> None:
        edits.append(len(some))
        if len(edits) > 1:
            raise OSError(errno.EIO, "the map cannot be read")
        await edit_map(vol, ip, some, size)

    async with opened(image) as vol, files(vol, "ab") as (a, b):
        old, new = os.urandom(100 << 12), os.urandom(4096)
        await file.write(vol, a, 0, old)
        assert await copyrange.copy(vol, a, 0, b, 0, len(old)) == len(old)
        for page in range(0, 100, 2):
            await file.write(vol, b, page << 12, new)
        monkeypatch.setattr(writepages, "_edit_map", edit_first)
        with refused(errno.EIO):
            await file.fsync(vol, b)
        assert edits == [50, 50 - writepages.EDITS_MAX]
        monkeypatch.undo()
        await drop_caches(vol)
        changed = await contents(vol, b)
        for page in range(100):
            done = page % 2 == 0 and page < 2 * writepages.EDITS_MAX
            at = page << 12
            assert changed[at : at + 4096] == (new if done else old[at : at + 4096])
        assert await contents(vol, a) == old
    judge(image)


async def test_many_owners(scratch: Path) -> None:
    """Reference counts that split until their tree has several levels; all of it goes again."""
    image = support.mkfs(scratch, "-b", "size=1k", "-m", "rmapbt=1")
    async with opened(image) as vol, files(vol, "abc") as (a, b, c):
        free = vol.space.free
        await file.write(vol, a, 0, os.urandom(1000 << 10))
        for block in range(0, 1000, 2):
            await copyrange.copy(vol, a, block << 10, b, block << 10, 1 << 10)
        await copyrange.copy(vol, a, 0, c, 0, 1 << 30)
        assert await contents(vol, a) == await contents(vol, c)
        async with vol.reader() as tp:
            levels = [await _refcount_levels(tp, agno) for agno in range(vol.geo.agcount)]
        assert max(levels) > 1
        for ip in (b, a, c):
            for size in (700_001, 500_000, 0):
                await file.truncate(vol, ip, size)
        assert vol.space.free == free
    judge(image)


async def on_the_edge(vol: Volume, a: Inode, b: Inode) -> list[int]:
    """Make `b` share 22 extents, one more than its inode has room for; their file blocks."""
    await file.write(vol, a, 0, os.urandom(44 << 12))
    places = list(range(0, 44, 2))
    for block in places:
        await copyrange.copy(vol, a, block << 12, b, block << 12, 1 << 12)
    assert (b.nextents, b.format) == (22, L.FMT_BTREE)
    return places


async def test_a_map_becomes_a_list_and_a_tree_in_turn(scratch: Path) -> None:
    """Each copy on write takes a record away and adds one: the tree's block is used again."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, files(vol, "ab") as (a, b):
        for block in await on_the_edge(vol, a, b):
            await file.write(vol, b, block << 12, b"new")
        await file.fsync(vol, b)
        assert await shared_blocks(vol, b) == 0
        await sound(vol, a, b)
    judge(image)


async def test_a_promise_that_became_too_small(scratch: Path) -> None:
    """What a tree lacks that grew and shrank since its blocks were promised is the pool's."""
    image = support.mkfs(scratch)
    async with opened(image) as vol, files(vol, "ab") as (a, b):
        await on_the_edge(vol, a, b)
        for block in range(1, 800, 2):
            await file.write(vol, b, block << 12, b"new")
        indirect = int(vol.pages.columns["indirect"][b.handle])
        assert indirect > 3
        vol.pages.columns["indirect"][b.handle] = 0
        vol.space.release_delalloc(indirect)
        await file.fsync(vol, b)
        assert b.nextents > 300
        await sound(vol, a, b)
    judge(image)


async def test_a_removal_may_split_records(scratch: Path) -> None:
    """The refcount tree grows in transactions that have no block reserved: truncations."""
    image = support.mkfs(scratch, "-b", "size=1k")
    n = 400
    async with opened(image) as vol, files(vol, "abc") as (a, b, c):
        await file.write(vol, a, 0, os.urandom(n << 10))
        await copyrange.copy(vol, a, 0, b, 0, n << 10)
        for i, block in enumerate((*range(0, n, 2), *range(1, n, 2))):
            await copyrange.copy(vol, a, block << 10, c, i << 10, 1 << 10)
        agno = vol.geo.agno_of((await extents(vol, a))[0].fsbno)
        async with vol.reader() as tp:
            assert await _refcount_levels(tp, agno) == 1
        held = vol.space.unpromised
        vol.space.reserve(held, from_pool=True)
        await file.truncate(vol, c, n << 9)  # every second block has one owner less
        vol.space.release(held)
        async with vol.reader() as tp:
            assert await _refcount_levels(tp, agno) == 2
        assert await contents(vol, a) == await contents(vol, b)
    judge(image)


async def _refcount_levels(tp: Transaction, agno: int) -> int:
    from fs.xfs import ag
    from fs.xfs.btroots import refcount_root

    return refcount_root(tp, agno, await ag.read_agf(tp, agno)).levels


# -- at random ---------------------------------------------------------------------------------


class Model:
    """Some files and the bytes that they should have."""

    def __init__(self, vol: Volume, inodes: list[Inode], seed: int) -> None:
        self.vol, self.inodes = vol, inodes
        self.random = random.Random(seed)
        self.bytes = [bytearray() for _ in inodes]
        self.shared = 0

    def place(self, size: int) -> int:
        at = self.random.randrange(size + 20_000)
        return at & -self.vol.geo.block_size if self.random.random() < 0.7 else at

    async def step(self) -> None:
        what = self.random.choices(
            ("write", "copy", "read", "truncate", "fsync", "reclaim"), (25, 40, 20, 8, 2, 5)
        )[0]
        await getattr(self, what)(self.random.randrange(len(self.inodes)))

    async def write(self, i: int) -> None:
        have = self.bytes[i]
        at, size = self.place(len(have)), self.random.choice((1, 1000, 4096, 70_000, 300_000))
        data = self.random.randbytes(self.random.randint(1, size))
        if at + len(data) <= MOST:
            await file.write(self.vol, self.inodes[i], at, data)
            have.extend(bytes(max(at - len(have), 0)))
            have[at : at + len(data)] = data

    async def copy(self, i: int) -> None:
        j = self.random.randrange(len(self.inodes))
        src, dst = self.bytes[i], self.bytes[j]
        at, to = self.place(len(src)), self.place(len(dst))
        n = self.random.choice((5000, 65536, 1 << 20))
        real = max(min(n, len(src) - at), 0)
        if to + real > MOST:
            return
        args = (self.vol, self.inodes[i], at, self.inodes[j], to, n)
        if real and i == j and at < to + real and to < at + real:
            with refused(errno.EINVAL):
                await copyrange.copy(*args)
            return
        assert await copyrange.copy(*args) == real
        if real:
            dst.extend(bytes(max(to - len(dst), 0)))
            dst[to : to + real] = src[at : at + real]

    async def read(self, i: int) -> None:
        at, n = self.place(len(self.bytes[i])), self.random.choice((1, 5000, 1 << 20))
        got = bytes(await file.read(self.vol, self.inodes[i], at, n))
        assert got == self.bytes[i][at : at + n]

    async def truncate(self, i: int) -> None:
        size = self.random.randrange(len(self.bytes[i]) + 1)
        await file.truncate(self.vol, self.inodes[i], size)
        del self.bytes[i][size:]

    async def fsync(self, i: int) -> None:
        await file.fsync(self.vol, self.inodes[i])

    async def reclaim(self, i: int) -> None:
        self.vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20)

    async def check(self) -> None:
        for ip, have in zip(self.inodes, self.bytes, strict=True):
            assert ip.size == len(have)
            assert await contents(self.vol, ip) == have
            self.shared += await shared_blocks(self.vol, ip)
        await sound(self.vol, *self.inodes)


@forms
async def test_random_use_equals_bytearrays(
    scratch: Path, args: tuple[str, ...], autojump_clock: trio.testing.MockClock
) -> None:
    image = support.mkfs(scratch, *args)
    async with opened(image, 16 << 20, seed=1, pause_s=0.02) as vol, files(vol, "abc") as inodes:
        model = Model(vol, inodes, seed=3)
        for i in range(400):
            await model.step()
            if i % 100 == 99:
                await model.check()
        assert model.shared
        vol.arena.check()
    judge(image)
    async with opened(image) as vol, files(vol, "abc") as inodes:
        model.vol, model.inodes = vol, inodes
        await model.check()


async def test_copies_and_writers_at_once(
    scratch: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """Every copy is of one moment: writers fill the source with one byte after the other."""
    image = support.mkfs(scratch)
    size = 24 * 4096
    async with (
        opened(image, 16 << 20, seed=5, pause_s=0.02) as vol,
        files(vol, "abc") as (a, b, c),
        trio.open_nursery() as nursery,
    ):
        await file.write(vol, a, 0, b"\1" * size)
        stop = False

        async def writer() -> None:
            value = 1
            while not stop:
                value = value % 250 + 1
                await file.write(vol, a, 0, bytes([value]) * size)
                await trio.sleep(0.01)

        async def flusher() -> None:
            while not stop:
                await vol.flusher.sync()
                await trio.sleep(0.015)

        nursery.start_soon(writer)
        nursery.start_soon(flusher)
        seen = set()
        for turn in range(60):
            dst = (b, c)[turn % 2]
            assert await copyrange.copy(vol, a, 0, dst, 0, size) == size
            first = await contents(vol, dst)
            assert first == first[:1] * size
            seen.add(first[0])
            await trio.sleep(0.003)
            if turn % 7 == 0:
                await drop_caches_if_clean(vol)
            assert await contents(vol, dst) == first
        stop = True
    assert len(seen) > 10
    judge(image)


async def drop_caches_if_clean(vol: Volume) -> None:
    await vol.flusher.sync()
    vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20)


# -- the kernel's side -------------------------------------------------------------------------


@support.needs_root
@pytest.mark.parametrize("args", [(), ("-m", "rmapbt=1")], ids=["default", "rmapbt"])
async def test_copies_of_what_the_kernel_shared(scratch: Path, args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *args)
    data = os.urandom(MOST)
    with support.kernel_mount(image, scratch / "mnt") as root:
        (root / "a").write_bytes(data)
        for name in "bc":
            command = ["cp", "--reflink=always", str(root / "a"), str(root / name)]
            subprocess.run(command, check=True)
    async with opened(image) as vol, files(vol, "abcd") as (a, b, c, d):
        for src, pos in ((c, 0), (a, 1 << 20), (b, 3 << 20)):
            assert await copyrange.copy(vol, src, 0, d, pos, MOST) == MOST
        await file.write(vol, d, 4096, b"d" * 4096)
    judge(image)
    wanted = bytearray(data[: 1 << 20] + data + data)
    wanted[4096:8192] = b"d" * 4096
    with support.kernel_mount(image, scratch / "mnt") as root:
        assert (root / "d").read_bytes() == wanted
        for name in "abc":
            assert (root / name).read_bytes() == data
            (root / name).unlink()
        assert (root / "d").read_bytes() == wanted
    judge(image)
