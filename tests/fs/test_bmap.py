"""Extent maps on real images: random changes against a model, formats, and the judges."""

from __future__ import annotations

import errno
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fs.cache.inode import Inode
from fs.device.image import ImageFile
from fs.log.transaction import Transaction
from fs.volume import Volume
from fs.xfs import bmap, extents, fork
from fs.xfs import layout as L
from fs.xfs.bmap import ATTR, DATA, HOLE, Mapping
from tests import support

IMAGES = {
    "default": (),
    "1k": ("-b", "size=1k"),
    "64k": ("-b", "size=64k"),
    "1k-inodes": ("-i", "size=1024"),
    "rmapbt": ("-m", "rmapbt=1"),
    "1k-rmapbt": ("-b", "size=1k", "-m", "rmapbt=1"),
    "nrext64": ("-i", "nrext64=1"),
}
images = pytest.mark.parametrize("args", IMAGES.values(), ids=IMAGES.keys())
FILES = ("one", "two")


def make_image(directory: Path, *args: str) -> Path:
    """An image with empty files in its root directory."""
    empty = directory / "empty"
    empty.touch()
    lines = [f"{name} ---644 0 0 {empty}" for name in FILES]
    proto = directory / "proto"
    proto.write_text("\n".join(["/nothing 0 0", "d--755 0 0", *lines, "$", ""]))
    return support.mkfs(directory, "-p", str(proto), *args)


@asynccontextmanager
async def opened(path: Path, memory: int = 64 << 20) -> AsyncIterator[Volume]:
    device = ImageFile(str(path))
    try:
        async with Volume.open(device, memory, paranoid=True) as vol:
            yield vol
            assert not vol.shut_down
    finally:
        device.close()


@asynccontextmanager
async def file_of(vol: Volume, index: int = 0) -> AsyncIterator[Inode]:
    """One of the image's files; mkfs puts them behind the root and the realtime inodes."""
    ip = await vol.inodes.get(vol.geo.root_ino + 3 + index)
    assert ip.mode == 0o100644
    try:
        yield ip
    finally:
        vol.inodes.put(ip)


@asynccontextmanager
async def change(vol: Volume, ip: Inode, blocks: int = 200) -> AsyncIterator[Transaction]:
    async with vol.transaction("truncate", blocks) as tp:
        await tp.lock_inodes(ip)
        yield tp


async def clear(vol: Volume, ip: Inode, which: int = DATA) -> None:
    """Unmap everything."""
    done = False
    while not done:
        async with change(vol, ip) as tp:
            done = await bmap.unmap(tp, ip, 0, L.FILE_OFFSET_MAX, which)


async def sound(vol: Volume, ip: Inode, model: dict[int, bool] | None = None) -> None:
    """The fork is in order, and maps exactly what the model says (file block -> unwritten)."""
    async with vol.reader(ip) as tp:
        assert await bmap.check(tp, ip) == ""
        if model is None:
            return
        end = max(model, default=0) + 2
        pieces = await bmap.read(tp, ip, 0, end)
        assert sum(piece.count for piece in pieces) == end
        state = {
            piece.offset + i: piece.unwritten
            for piece in pieces
            if piece.fsbno != HOLE
            for i in range(piece.count)
        }
        assert state == model
        assert await bmap.last_offset(tp, ip) == (max(model) + 1 if model else 0)
    indirect = ip.nblocks - len(model)
    assert indirect == 0 if ip.format == L.FMT_EXTENTS else indirect > 0


def test_merge() -> None:
    a, b = Mapping(0, 100, 4), Mapping(4, 104, 2)
    assert bmap.merge([a, b]) == [Mapping(0, 100, 6)]
    for other in (Mapping(5, 104, 2), Mapping(4, 105, 2), Mapping(4, 104, 2, True)):
        assert bmap.merge([a, other]) == [a, other]
    most = Mapping(0, 100, L.BMBT_LEN_MAX - 1)
    tail = Mapping(most.end, 100 + most.count, 2)
    assert bmap.merge([most, tail]) == [most, tail]
    assert bmap.merge([most, tail._replace(count=1)])[0].count == L.BMBT_LEN_MAX
    assert bmap.merge([]) == []


@pytest.mark.parametrize(
    ("left", "right", "offset", "count", "wanted"),
    [
        ((0, 100, 8), None, 8, 4, 108),
        ((0, 100, 8), None, 500, 1, 600),  # behind the last one any gap is kept
        ((0, 100, 8), (900, 2000, 8), 20, 4, 120),
        ((0, 100, 8), (900, 2000, 8), 200, 4, 108),  # too far from both; the left one is nearer
        ((0, 100, 8), (900, 2000, 8), 890, 4, 1990),
        ((0, 100, 8), (900, 2000, 8), 800, 4, 1996),  # right before the right one
        (None, (50, 2000, 8), 40, 4, 1990),
        (None, (50, 5, 8), 40, 40, 5),  # its AG does not go so far back
    ],
)
async def test_in_line_with_the_nearer_neighbour(
    tmp_path: Path,
    left: tuple[int, int, int] | None,
    right: tuple[int, int, int] | None,
    offset: int,
    count: int,
    wanted: int,
) -> None:
    async with opened(make_image(tmp_path)) as vol, file_of(vol) as ip:
        neighbours = [side and Mapping(*side, False) for side in (left, right)]
        assert bmap._near(vol.geo, ip, *neighbours, offset, count) == wanted


async def test_worst_indirect(tmp_path: Path) -> None:
    """By the format's formula: every level full, then one block a level up to the limit."""
    async with opened(make_image(tmp_path)) as vol:
        geo = vol.geo
        assert bmap.worst_indirect(geo, 1) == 5  # 5 levels at 4 KiB
        assert bmap.worst_indirect(geo, 251) == 5
        assert bmap.worst_indirect(geo, 252) == 2 + 1 + 3
        assert bmap.worst_indirect(geo, 1, ATTR) == 3


@images
async def test_against_a_model(tmp_path: Path, args: tuple[str, ...]) -> None:
    """Allocate, unmap and convert at random places; compare after every step."""
    path = make_image(tmp_path, *args)
    rng = random.Random(7)
    model: dict[int, bool] = {}
    async with opened(path) as vol, file_of(vol) as ip:
        free = vol.space.free
        for turn in range(250):
            offset, count = rng.randrange(600), rng.randrange(1, 12)
            action = rng.random()
            async with change(vol, ip) as tp:
                if action < 0.6:
                    await fill(tp, ip, offset, count, rng.random() < 0.5, model)
                elif action < 0.8:
                    assert await bmap.unmap(tp, ip, offset, count)
                    for block in range(offset, offset + count):
                        model.pop(block, None)
                else:
                    await bmap.convert(tp, ip, offset, count)
                    for block in range(offset, offset + count):
                        if block in model:
                            model[block] = False
            if turn % 10 == 0:
                await sound(vol, ip, model)
        await sound(vol, ip, model)
        await vol.flush_metadata()
        assert free - vol.space.free == ip.nblocks
        await check_lookups(vol, ip, model)
    support.assert_clean(path)
    async with opened(path) as vol, file_of(vol) as ip:
        await sound(vol, ip, model)
        await clear(vol, ip)
        assert (ip.nblocks, ip.nextents, ip.format) == (0, 0, L.FMT_EXTENTS)
        assert vol.space.free == free
    support.assert_clean(path)


@images
async def test_shifting_against_a_model(tmp_path: Path, args: tuple[str, ...]) -> None:
    """Put holes in and take parts out, at random places between allocations."""
    path = make_image(tmp_path, *args)
    rng = random.Random(8)
    model: dict[int, bool] = {}
    async with opened(path) as vol, file_of(vol) as ip:
        for turn in range(80):
            for _ in range(5):
                async with change(vol, ip) as tp:
                    offset, count = rng.randrange(500), rng.randrange(1, 12)
                    await fill(tp, ip, offset, count, rng.random() < 0.3, model)
            at, by = rng.randrange(500), rng.randrange(1, 30)
            edge: int | None = L.FILE_OFFSET_MAX if turn % 2 else at + by
            async with change(vol, ip) as tp:
                if turn % 2:
                    await bmap.split(tp, ip, at)
                else:
                    assert await bmap.unmap(tp, ip, at, by)
            while edge is not None:
                async with change(vol, ip, 0) as tp:
                    if turn % 2:
                        edge = await bmap.shift_right(tp, ip, at, by, edge)
                    else:
                        edge = await bmap.shift_left(tp, ip, edge, by)
            if turn % 2:
                model = {b + by * (b >= at): state for b, state in model.items()}
            else:
                kept = {b: state for b, state in model.items() if not at <= b < at + by}
                model = {b - by * (b > at): state for b, state in kept.items()}
            await sound(vol, ip, model)
        assert ip.nextents > 2 * bmap.SHIFT_EXTENTS
    support.assert_clean(path)


async def fill(
    tp: Transaction, ip: Inode, offset: int, count: int, unwritten: bool, model: dict[int, bool]
) -> None:
    """Allocate the holes of a range."""
    for piece in await bmap.read(tp, ip, offset, count):
        at = piece.offset
        while piece.fsbno == HOLE and at < piece.end:
            new = await bmap.alloc(tp, ip, at, piece.end - at, unwritten=unwritten)
            assert new.offset == at
            assert 0 < new.count <= piece.end - at
            model.update(dict.fromkeys(range(at, new.end), unwritten))
            at = new.end


async def check_lookups(vol: Volume, ip: Inode, model: dict[int, bool]) -> None:
    """`lookup` and `first_hole` against the model."""
    async with vol.reader(ip) as tp:
        for block in range(max(model) + 2):
            found = await bmap.lookup(tp, ip, block)
            behind = min((b for b in model if b >= block), default=None)
            if behind is None:
                assert found is None
            else:
                assert found is not None
                assert found.offset <= behind < found.end
            hole = block
            while any(hole + i in model for i in range(3)):
                hole += 1
            assert await bmap.first_hole(tp, ip, DATA, 3, block) == hole


@images
async def test_many_extents(tmp_path: Path, args: tuple[str, ...]) -> None:
    """Every other block, in random order: a tree grows, is read back, and is taken down."""
    wanted = 10_000 if args in ((), ("-b", "size=1k", "-m", "rmapbt=1")) else 2000
    path = make_image(tmp_path, *args)
    rng = random.Random(1)
    offsets = [2 * i for i in range(wanted)]
    rng.shuffle(offsets)
    async with opened(path) as vol, file_of(vol) as ip:
        free = vol.space.free
        for first in range(0, wanted, 50):
            async with change(vol, ip, 400) as tp:
                for offset in offsets[first : first + 50]:
                    await bmap.alloc(tp, ip, offset, 1)
        assert ip.nextents == wanted
        assert ip.format == L.FMT_BTREE
        await sound(vol, ip, dict.fromkeys(range(0, 2 * wanted, 2), False))
    support.assert_clean(path)
    async with opened(path) as vol, file_of(vol) as ip:
        await sound(vol, ip, dict.fromkeys(range(0, 2 * wanted, 2), False))
        for first in range(0, wanted // 2, 50):
            async with change(vol, ip) as tp:
                for offset in offsets[first : first + 50]:
                    assert await bmap.unmap(tp, ip, offset, 1)
        left = dict.fromkeys(offsets[-(-(wanted // 2) // 50) * 50 :], False)
        await sound(vol, ip, left)
        await clear(vol, ip)
        assert (ip.nblocks, ip.nextents, ip.format) == (0, 0, L.FMT_EXTENTS)
        assert vol.space.free == free
    support.assert_clean(path)


async def test_list_and_tree_change_over_exactly(tmp_path: Path) -> None:
    """22 records do not fit 336 bytes: one more is a tree, one less is a list again."""
    path = make_image(tmp_path)
    async with opened(path) as vol, file_of(vol) as ip:
        assert ip.forkoff == 0
        for count in range(1, 25):
            async with change(vol, ip) as tp:
                await bmap.alloc(tp, ip, 3 * count, 2)
            assert ip.format == (L.FMT_EXTENTS if count <= 21 else L.FMT_BTREE)
            assert ip.nblocks == 2 * count + (count > 21)
        for count in range(23, 0, -1):
            async with change(vol, ip) as tp:
                assert await bmap.unmap(tp, ip, 3 * (count + 1), 2)
            assert ip.format == (L.FMT_EXTENTS if count <= 21 else L.FMT_BTREE)
            await sound(vol, ip)
    support.assert_clean(path)


async def test_cutting_a_hole_without_reserved_blocks(tmp_path: Path) -> None:
    """It works while the list has room, and is refused with nothing changed when it has none."""
    path = make_image(tmp_path)
    async with opened(path) as vol, file_of(vol) as ip:
        async with change(vol, ip) as tp:
            await bmap.alloc(tp, ip, 0, 100, contiguous=True)
        for cut in range(20):
            async with change(vol, ip, 0) as tp:
                assert await bmap.unmap(tp, ip, 4 * cut + 2, 1)
        assert ip.nextents == 21
        with pytest.raises(OSError, match="no blocks reserved") as caught:
            async with change(vol, ip, 0) as tp:
                await bmap.unmap(tp, ip, 90, 1)
        assert caught.value.errno == errno.ENOSPC
        assert (ip.nextents, ip.nblocks, vol.shut_down) == (21, 80, False)
        async with change(vol, ip, 0) as tp:
            assert await bmap.unmap(tp, ip, 0, 100)
    support.assert_clean(path)


async def test_unmap_is_bounded(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    async with opened(path) as vol, file_of(vol) as ip:
        async with change(vol, ip) as tp:
            for i in range(bmap.UNMAP_EXTENTS + 5):
                await bmap.alloc(tp, ip, 2 * i, 1)
        async with change(vol, ip) as tp:
            assert not await bmap.unmap(tp, ip, 0, 1000)
        assert ip.nextents == 5
        async with change(vol, ip) as tp:
            assert await bmap.unmap(tp, ip, 0, 1000)


async def test_merging_with_both_neighbours(tmp_path: Path) -> None:
    path = make_image(tmp_path)
    async with opened(path) as vol, file_of(vol) as ip:
        async with change(vol, ip) as tp:
            whole = await bmap.alloc(tp, ip, 10, 9, unwritten=True)
            await bmap.convert(tp, ip, 13, 3)
            assert ip.nextents == 3
            await bmap.convert(tp, ip, 10, 3)
            assert ip.nextents == 2
            await bmap.convert(tp, ip, 0, 100)
            assert ip.nextents == 1
            assert await bmap.lookup(tp, ip, 0) == whole._replace(unwritten=False)
            assert await bmap.unmap(tp, ip, 13, 3)
            assert ip.nextents == 2
            assert ip.nblocks == 6
            again = await bmap.alloc(tp, ip, 13, 50)
            assert again == Mapping(13, whole.fsbno + 3, 3)
            assert ip.nextents == 1
    support.assert_clean(path)


async def test_contiguous_and_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC and EFBIG are raised with nothing changed."""
    path = make_image(tmp_path)
    async with opened(path) as vol, file_of(vol) as ip:
        async with change(vol, ip, 4000) as tp:
            got = await bmap.alloc(tp, ip, 0, 3000, contiguous=True)
            assert got.count == 3000
        before = (ip.nextents, ip.nblocks, vol.space.free)
        with monkeypatch.context() as patch:
            patch.setattr(bmap, "DATA_EXTENTS_MAX", 1)
            with pytest.raises(OSError, match="extents") as caught:
                async with change(vol, ip) as tp:
                    await bmap.alloc(tp, ip, 5000, 1)
            assert caught.value.errno == errno.EFBIG
            assert not vol.shut_down
            with pytest.raises(OSError, match="extents") as caught:
                async with change(vol, ip) as tp:
                    await bmap.unmap(tp, ip, 5, 1)
            assert caught.value.errno == errno.EFBIG
            assert not vol.shut_down
        assert (ip.nextents, ip.nblocks, vol.space.free) == before
        with pytest.raises(OSError, match="free extent") as caught:
            async with change(vol, ip) as tp:
                await bmap.alloc(tp, ip, 5000, 1 << 20, contiguous=True)
        assert caught.value.errno == errno.ENOSPC
        assert not vol.shut_down
    support.assert_clean(path)


@images
async def test_attr_fork_moves_the_border(tmp_path: Path, args: tuple[str, ...]) -> None:
    """A list that no longer fits becomes a tree, a tree's root moves, and all of it is read."""
    path = make_image(tmp_path, *args)
    async with opened(path) as vol:
        for index, records in ((0, 15), (1, 1000)):
            async with file_of(vol, index) as ip:
                capacity = vol.geo.literal_size // 16
                count = records if records > 100 else capacity - 2
                async with change(vol, ip, 2 * count + 50) as tp:
                    for i in range(count):
                        await bmap.alloc(tp, ip, 2 * i, 1)
                small = ip.format == L.FMT_EXTENTS
                async with change(vol, ip) as tp:
                    await bmap.add_attr_fork(tp, ip, vol.geo.literal_size - 200)
                assert ip.forkoff
                assert ip.format == L.FMT_BTREE
                assert ip.aformat == L.FMT_EXTENTS
                assert small or count > 100
                async with change(vol, ip) as tp:
                    for i in range(2 * bmap.UNMAP_EXTENTS // 10):
                        await bmap.alloc(tp, ip, 3 * i, 1, ATTR)
                await sound(vol, ip)
                async with vol.reader(ip) as tp:
                    assert await bmap.check(tp, ip, ATTR) == ""
                async with change(vol, ip) as tp:
                    assert await bmap.unmap(tp, ip, 0, 100, ATTR)
                    fork.drop_attr(tp, ip)
                assert ip.anextents == 0
                await sound(vol, ip)
    support.assert_clean(path)


async def test_border_moves_with_its_contents(tmp_path: Path) -> None:
    """Both forks' lists and roots survive every position that they fit."""
    path = make_image(tmp_path)
    async with opened(path) as vol, file_of(vol) as ip:
        async with change(vol, ip, 500) as tp:
            await bmap.add_attr_fork(tp, ip, 100)
            for i in range(30):
                await bmap.alloc(tp, ip, 2 * i, 1, ATTR)
            for i in range(5):
                await bmap.alloc(tp, ip, 2 * i, 1)
            assert ip.aformat == L.FMT_BTREE
            data, attr = await bmap.read(tp, ip, 0, 100), await bmap.read(tp, ip, 0, 100, ATTR)
            for forkoff in (10, 37, 24, 11, 36):
                fork.set_forkoff(tp, ip, forkoff)
                assert await bmap.read(tp, ip, 0, 100) == data
                assert await bmap.read(tp, ip, 0, 100, ATTR) == attr
            assert await bmap.unmap(tp, ip, 0, 100, ATTR)
            fork.drop_attr(tp, ip)
            assert await bmap.read(tp, ip, 0, 100) == data
            assert not ip.forkoff
    support.assert_clean(path)


async def test_check_can_fail(tmp_path: Path) -> None:
    """Overlap and missing merges are found."""
    path = make_image(tmp_path)
    async with opened(path) as vol, file_of(vol) as ip:
        async with change(vol, ip) as tp:
            for i in range(3):
                await bmap.alloc(tp, ip, 2 * i, 1)
        async with vol.reader(ip) as tp:
            assert await bmap.check(tp, ip) == ""
            mem, (addr, _) = vol.arena.mem, ip.data_fork
            saved = mem[addr : addr + 48].copy()
            mem[addr : addr + 16] = saved[16:32]
            assert "record 1" in await bmap.check(tp, ip)
            mem[addr : addr + 48] = saved
            first = await bmap.lookup(tp, ip, 0)
            assert first is not None
            extents.pack(mem, addr + 16, 1, first.fsbno + 1, 1, 0)
            assert "neighbours" in await bmap.check(tp, ip)
            extents.pack(mem, addr + 16, 2, 0, 1, 0)
            assert "record 1" in await bmap.check(tp, ip)
            mem[addr : addr + 48] = saved
            assert await bmap.check(tp, ip) == ""


@pytest.mark.parametrize("field", ["nblocks", "nextents"])
async def test_the_judges_see_wrong_counts(tmp_path: Path, field: str) -> None:
    path = make_image(tmp_path)
    async with opened(path) as vol, file_of(vol) as ip, change(vol, ip) as tp:
        for i in range(3):
            await bmap.alloc(tp, ip, 2 * i, 1)
        setattr(ip, field, getattr(ip, field) - 1)
    with pytest.raises(AssertionError, match="xfs_repair"):
        support.assert_clean(path)
