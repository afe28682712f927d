"""Allocating and freeing on real images: against a model, checked by xfs_repair and xfs_db."""

from __future__ import annotations

import errno
import random
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from fs.device.image import ImageFile
from fs.errors import Corrupt
from fs.log.transaction import Transaction
from fs.volume import Volume
from fs.xfs import ag, btkind, freespace, rmapbt
from fs.xfs.owner import OWN_AG, Owner
from tests.conftest import AllowLogs
from tests.fs.treecheck import ImageChecker
from tests.support import assert_clean, mkfs

MEMORY = 32 << 20
IMAGE_BYTES = 320 << 20
GEOMETRIES = {
    "default": ((), IMAGE_BYTES),
    "1k": (("-b", "size=1k"), IMAGE_BYTES),
    "64k": (("-b", "size=64k"), IMAGE_BYTES),
    "rmap": (("-m", "rmapbt=1"), IMAGE_BYTES),
    "1k rmap": (("-b", "size=1k", "-m", "rmapbt=1", "-d", "agcount=8"), 600 << 20),
    "no reflink": (("-m", "reflink=0,rmapbt=1"), IMAGE_BYTES),
}
geometries = pytest.mark.parametrize("name", GEOMETRIES)
INO = 131  # no such file: blocks it owns must be freed before repair looks


def image(tmp_path: Path, name: str) -> Path:
    arguments, size = GEOMETRIES[name]
    return mkfs(tmp_path, *arguments, size=size)


@asynccontextmanager
async def opened(path: Path) -> AsyncIterator[Volume]:
    async with Volume.open(ImageFile(str(path)), MEMORY, paranoid=True) as vol:
        yield vol


def assert_sound(path: Path) -> ImageChecker:
    """Nobody finds anything wrong with the image."""
    checker = ImageChecker(path)
    assert checker.check() == []
    assert_clean(path)
    return checker


async def free_extents(vol: Volume, agno: int) -> list[tuple[int, ...]]:
    found = []
    async with vol.reader() as tp:
        await tp.lock_space()
        cur = freespace.bno_cursor(tp, agno, await ag.read_agf(tp, agno))
        more = await cur.first()
        while more:
            found.append(cur.record())
            more = await cur.next()
    return found


async def all_free(vol: Volume) -> list[list[tuple[int, ...]]]:
    return [await free_extents(vol, agno) for agno in range(vol.geo.agcount)]


class Model:
    """Extents that the test owns; their blocks must never be handed out twice."""

    def __init__(self, vol: Volume) -> None:
        self.vol = vol
        self.extents: list[tuple[int, int, int]] = []  # fsbno, length, file offset
        self.blocks: set[int] = set()
        self.offset = 0

    def owner(self, offset: int) -> Owner:
        return Owner(INO, offset)

    def next_offset(self) -> int:
        self.offset += 1 << 20
        return self.offset

    def add(self, fsbno: int, n: int, offset: int) -> None:
        geo = self.vol.geo
        blocks = set(range(fsbno, fsbno + n))
        assert geo.valid_fsb(fsbno, n)
        assert not blocks & self.blocks
        self.blocks |= blocks
        self.extents.append((fsbno, n, offset))

    async def alloc(self, tp: Transaction, **wish: Any) -> tuple[int, int]:
        offset = self.next_offset()
        fsbno, n = await freespace.alloc(tp, owner=self.owner(offset), **wish)
        assert wish["minlen"] <= n <= wish["maxlen"]
        assert self.vol.geo.agbno_of(fsbno) % wish.get("align", 1) == 0
        self.add(fsbno, n, offset)
        return fsbno, n

    async def free(self, tp: Transaction, i: int, first: int = 0, n: int | None = None) -> None:
        """Free a part of extent i."""
        fsbno, length, offset = self.extents[i]
        self.extents[i] = self.extents[-1]
        self.extents.pop()
        n = length - first if n is None else n
        await freespace.free(tp, fsbno + first, n, self.owner(offset + first))
        self.blocks -= set(range(fsbno + first, fsbno + first + n))
        if first:
            self.extents.append((fsbno, first, offset))
        if first + n < length:
            rest = first + n
            self.extents.append((fsbno + rest, length - rest, offset + rest))


async def churn(vol: Volume, model: Model, rng: random.Random, steps: int) -> None:
    """Random allocations and partial frees, some in one transaction."""
    geo = vol.geo
    unit = max(1, 8192 // geo.block_size)
    for _ in range(steps):
        async with vol.transaction("truncate", 200 * unit) as tp:
            for _ in range(rng.randrange(1, 4)):
                if model.extents and rng.random() < 0.48:
                    i = rng.randrange(len(model.extents))
                    length = model.extents[i][1]
                    first = rng.choice((0, 0, rng.randrange(length)))
                    n = rng.choice((length - first, rng.randrange(1, length - first + 1)))
                    await model.free(tp, i, first, n)
                    continue
                near = geo.fsb(rng.randrange(geo.agcount), rng.randrange(geo.ag_length(0)))
                most = rng.choice((1, 3, 8, 20)) * unit
                least = rng.choice((1, most))
                align = rng.choice((1, 1, 4))
                await model.alloc(tp, near=near, minlen=least, maxlen=most, align=align)


@geometries
async def test_random_churn_and_back(tmp_path: Path, name: str) -> None:
    path = image(tmp_path, name)
    async with opened(path) as vol:
        before, free = await all_free(vol), vol.space.free
        model, rng = Model(vol), random.Random(name)
        await churn(vol, model, rng, 300)
        assert vol.space.free == free - len(model.blocks)
        assert vol.ags.free == vol.space.free
        rng.shuffle(model.extents)
        while model.extents:
            async with vol.transaction("truncate") as tp:
                await model.free(tp, len(model.extents) - 1)
        assert vol.space.free == free
        after = await all_free(vol)
        for extents, at_first in zip(after, before, strict=True):  # merged again, but for the AGFL
            assert len(extents) <= len(at_first) + 8
    assert_sound(path)


@pytest.mark.parametrize("name", ["default", "1k rmap"])
async def test_state_on_disk_is_the_models(tmp_path: Path, name: str) -> None:
    """With extents still allocated, the image says exactly which blocks are free."""
    path = image(tmp_path, name)
    async with opened(path) as vol:
        model = Model(vol)
        await churn(vol, model, random.Random(4), 300)
        geo, extents = vol.geo, list(model.extents)
    checker = ImageChecker(path)
    assert checker.check() == []
    for fsbno, n, _ in extents:
        agno, start = geo.agno_of(fsbno), geo.agbno_of(fsbno)
        for first, length in checker.free[agno]:
            assert start + n <= first or first + length <= start
    done = subprocess.run(
        ["xfs_db", "-r", "-c", "freesp -d", str(path)], capture_output=True, text=True, check=True
    )
    lines = [line.split() for line in done.stdout.splitlines()]
    seen = {(int(w[0]), int(w[1]), int(w[2])) for w in lines if len(w) == 3 and w[0].isdigit()}
    mine = {(a, s, n) for a, extents in enumerate(checker.free) for s, n in extents}
    # freesp lists the free lists' blocks as free extents, too
    assert mine <= seen


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("name", "kind", "extents"), [("1k", btkind.BNO, 8), ("1k rmap", btkind.RMAP, 3)]
)
async def test_fragmenting_makes_deep_trees(
    tmp_path: Path, name: str, kind: btkind.Kind, extents: int
) -> None:
    """Every second block of some extents is freed: trees of three levels, and back to one."""
    path = image(tmp_path, name)
    async with opened(path) as vol:
        geo, model = vol.geo, Model(vol)
        home = geo.fsb(0, geo.ag_length(0) // 2)
        for _ in range(extents):
            async with vol.transaction("truncate", 3000) as tp:
                await model.alloc(tp, near=home, minlen=2500, maxlen=2500)
        pieces = [(f + i, o + i) for f, n, o in model.extents for i in range(n)]
        for at in range(0, len(pieces), 400):
            async with vol.transaction("truncate") as tp:
                for fsbno, offset in pieces[at : at + 400 : 2]:
                    await freespace.free(tp, fsbno, 1, model.owner(offset))
        agf_levels = []
        async with vol.reader() as tp:
            for agno in range(geo.agcount):
                buf = await ag.read_agf(tp, agno)
                agf_levels.append(ag.get(buf, ag.ROOT_FIELDS[kind][1]))
        assert max(agf_levels) >= 3
    deep = ImageChecker(path)
    assert deep.check() == []
    async with opened(path) as vol:
        rest = pieces[1::2]
        random.Random(2).shuffle(rest)
        for at in range(0, len(rest), 500):
            async with vol.transaction("truncate") as tp:
                for fsbno, offset in rest[at : at + 500]:
                    await freespace.free(tp, fsbno, 1, model.owner(offset))
    checker = assert_sound(path)
    assert all(levels[kind.name] == 1 for levels in checker.heights)


@geometries
async def test_enospc_is_exact_and_clean(tmp_path: Path, name: str) -> None:
    """Data gets every block that is not set aside; a refusal changes nothing."""
    path = image(tmp_path, name)
    async with opened(path) as vol:
        model = Model(vol)
        while vol.ags.free > vol.ags.unavailable:
            n = min(vol.space.unpromised, 20000)
            async with vol.transaction("truncate", n, from_pool=True) as tp:
                await model.alloc(tp, minlen=1, maxlen=tp.blocks)
        assert vol.ags.free == vol.ags.unavailable
        before = await all_free(vol)
        for wish in ({"minlen": 1, "maxlen": 1}, {"minlen": 1, "maxlen": 99, "near": 4}):
            async with vol.transaction("truncate") as tp:
                with pytest.raises(OSError, match="no free extent") as caught:
                    await model.alloc(tp, **wish)
                assert caught.value.errno == errno.ENOSPC
                assert not tp.dirty
        assert await all_free(vol) == before
        random.Random(1).shuffle(model.extents)
        while model.extents:
            async with vol.transaction("truncate") as tp:
                await model.free(tp, len(model.extents) - 1)
    assert_sound(path)


async def test_large_requests_get_large_extents(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    async with opened(path) as vol:
        model, near, pieces = Model(vol), vol.geo.fsb(1, 100), []
        wanted = 40000
        while wanted:
            async with vol.transaction("truncate", wanted) as tp:
                fsbno, n = await model.alloc(tp, near=near, minlen=1, maxlen=wanted)
                near, wanted = fsbno + n, wanted - n
                pieces.append(n)
        assert len(pieces) <= vol.geo.agcount
        async with vol.transaction("truncate") as tp:
            while model.extents:
                await model.free(tp, 0)
    assert_sound(path)


async def test_policies(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    async with opened(path) as vol:
        geo, model = vol.geo, Model(vol)
        near = geo.fsb(1, 9000)  # far from anything
        async with vol.transaction("truncate", 500) as tp:
            assert await model.alloc(tp, near=near, minlen=1, maxlen=8) == (near, 8)
            assert await model.alloc(tp, near=near + 8, minlen=1, maxlen=8) == (near + 8, 8)
            # taken already: the nearest blocks behind
            assert await model.alloc(tp, near=near, minlen=4, maxlen=4) == (near + 16, 4)
            # a hole too small for all is used if it is just where blocks are wanted, as a rule
            await model.free(tp, 0, 2, 3)
            got = await model.alloc(tp, near=near + 2, minlen=1, maxlen=9, whole=True)
            assert got == (near + 20, 9)
            assert await model.alloc(tp, near=near + 2, minlen=1, maxlen=9) == (near + 2, 3)
            fsbno, n = await model.alloc(tp, near=near + 1, minlen=16, maxlen=16, align=8)
            assert (geo.agbno_of(fsbno) % 8, n) == (0, 16)
            fsbno, n = await model.alloc(
                tp, near=near, minlen=4, maxlen=4, align=4, above=16001, below=16009, this_ag=True
            )
            assert (fsbno, n) == (geo.fsb(1, 16004), 4)
            with pytest.raises(OSError, match="no free extent"):
                await model.alloc(
                    tp, near=near, minlen=4, maxlen=4, align=4, above=16001, below=16009,
                    this_ag=True,
                )  # fmt: skip
            end = geo.fsb(geo.agcount, 0)  # behind the last AG: where its last file would go on
            await model.alloc(tp, near=end, minlen=1, maxlen=2)
            got = await model.alloc(tp, near=near, minlen=1, maxlen=100000)
            assert got[1] <= 500  # never more than the transaction reserved
            assert tp.blocks == 0
            with pytest.raises(OSError, match="no free extent"):
                await model.alloc(tp, near=near, minlen=1, maxlen=1)
            while model.extents:
                await model.free(tp, 0)
    assert_sound(path)


async def test_refilling_the_free_list_spares_what_was_chosen(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    async with opened(path) as vol, vol.transaction("truncate", 100) as tp:
        model, hole = Model(vol), vol.geo.fsb(1, 9000)
        await model.alloc(tp, near=hole, minlen=40, maxlen=40)
        await model.free(tp, 0, 10, 4)  # now the smallest free extent of the AG
        agf = await ag.read_agf(tp, 1)
        count = ag.get(agf, ag.AGF_FLCOUNT)
        taken = [await ag.agfl_get(tp, 1, agf) for _ in range(count)]
        vol.ags.learn(1, agf)
        assert await model.alloc(tp, near=hole + 10, minlen=4, maxlen=4) == (hole + 10, 4)
        assert ag.get(agf, ag.AGF_FLCOUNT) == count
        for block in taken:
            await freespace.free(tp, vol.geo.fsb(1, block), 1, None)
        vol.space.free = vol.ags.free  # blocks went around the counter with the free list
        while model.extents:
            await model.free(tp, 0)
    assert_sound(path)


async def test_double_free_is_refused(tmp_path: Path, allow_logs: AllowLogs) -> None:
    path = image(tmp_path, "default")
    async with Volume.open(ImageFile(str(path)), MEMORY, paranoid=True) as vol:
        allow_logs("corrupt|Shutting down|xfs_repair")
        start, n = (await free_extents(vol, 1))[0]
        with pytest.raises(Corrupt, match="free already"):
            async with vol.transaction("truncate") as tp:
                await freespace.free(tp, vol.geo.fsb(1, start + n // 2), 1, None)
        with pytest.raises(Corrupt, match="outside any AG"):
            async with vol.transaction("truncate") as tp:
                await freespace.free(tp, vol.geo.fsb(1, 0), 1, None)


async def test_reverse_map_of_a_fresh_image_is_understood(tmp_path: Path) -> None:
    path = image(tmp_path, "1k rmap")
    async with opened(path) as vol:
        async with vol.reader() as tp:
            await tp.lock_space()
            agf = await ag.read_agf(tp, 0)
            cur = rmapbt.cursor(tp, 0, agf)
            more, found = await cur.first(), []
            while more:
                found.append(cur.record())
                more = await cur.next()
        assert (found[0][2], found[1][2]) == (-3, OWN_AG)


@pytest.mark.parametrize("fault", ["freeblks", "longest", "unmerged", "agfl twice", "owner"])
async def test_the_image_checker_sees_a_planted_fault(tmp_path: Path, fault: str) -> None:
    path = image(tmp_path, "1k rmap")
    with path.open("r+b") as raw:

        def edit(at: int, delta: int) -> None:
            raw.seek(at)
            value = int.from_bytes(raw.read(4), "big")
            raw.seek(at)
            raw.write((value + delta).to_bytes(4, "big"))

        bnobt, cntbt, rmapbt_root = 2048, 3072, 6 * 1024
        if fault == "freeblks":
            edit(512 + 52, 1)
        elif fault == "longest":
            edit(512 + 56, -1)
        elif fault == "agfl twice":
            raw.seek(1536 + 36 + 4)
            slot = raw.read(4)
            raw.seek(1536 + 36 + 8)
            raw.write(slot)
        elif fault == "owner":
            edit(rmapbt_root + 56 + 4, -1)  # the first record covers one block less
        else:
            for block in (bnobt, cntbt):
                edit(block + 56 + 4, 0)
                raw.seek(block + 4)
                level_count = raw.read(4)
                n = int.from_bytes(level_count[2:], "big")
                raw.seek(block + 56 + 8 * (n - 1))
                start, length = (int.from_bytes(raw.read(4), "big") for _ in range(2))
                raw.seek(block + 56 + 8 * (n - 1))
                parts = [(start, 5), (start + 5, length - 5)]
                raw.write(b"".join(a.to_bytes(4, "big") + b.to_bytes(4, "big") for a, b in parts))
                raw.seek(block + 6)
                raw.write((n + 1).to_bytes(2, "big"))
    assert ImageChecker(path).check() != []
