"""The reverse map: records merge and split as mappings come and go, shared ones included."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fs.errors import Corrupt
from fs.log.transaction import Transaction
from fs.xfs import ag, freespace, rmap, rmapbt
from fs.xfs.owner import OWN_INODES, Owner
from tests.conftest import AllowLogs
from tests.fs.test_freespace import assert_sound, image, opened
from tests.fs.treecheck import ImageChecker

UNWRITTEN, ATTR, BMBT = 1 << 61, 1 << 63, 1 << 62
N = 64


async def records(tp: Transaction, base: int, n: int = N) -> list[tuple[int, ...]]:
    """Records that overlap the extent; starts relative to it."""
    geo = tp.vol.geo
    agno, start = geo.agno_of(base), geo.agbno_of(base)
    cur = rmapbt.cursor(tp, agno, await ag.read_agf(tp, agno))
    found, again = [], False
    while await cur.overlap(start, start + n - 1, again=again):
        rec = cur.record()
        found.append((rec[0] - start, *rec[1:]))
        again = True
    return found


async def blocks(tp: Transaction, owner: Owner | None) -> int:
    near = tp.vol.geo.fsb(1, 5000)
    fsbno, _ = await freespace.alloc(tp, near=near, minlen=N, maxlen=N, owner=owner)
    return fsbno


async def test_pieces_become_one_record_and_fall_apart(tmp_path: Path) -> None:
    path = image(tmp_path, "rmap")
    rng = random.Random(3)
    async with opened(path) as vol, vol.transaction("truncate", 200) as tp:
        base = await blocks(tp, None)
        pieces = [(at, 4) for at in range(0, N, 4)]
        rng.shuffle(pieces)
        for at, n in pieces:
            await rmap.map(tp, base + at, n, Owner(200, 500 + at))
        assert await records(tp, base) == [(0, N, 200, 500)]
        await rmap.convert(tp, base + 8, 8, Owner(200, 508, unwritten=True))
        assert await records(tp, base) == [
            (0, 8, 200, 500),
            (8, 8, 200, 508 | UNWRITTEN),
            (16, N - 16, 200, 516),
        ]
        await rmap.convert(tp, base + 12, 4, Owner(200, 512))
        assert (8, 4, 200, 508 | UNWRITTEN) in await records(tp, base)
        await rmap.convert(tp, base + 8, 4, Owner(200, 508))
        assert await records(tp, base) == [(0, N, 200, 500)]
        rng.shuffle(pieces)
        for at, n in pieces[:-1]:
            await rmap.unmap(tp, base + at, n, Owner(200, 500 + at))
        at, n = pieces[-1]
        assert await records(tp, base) == [(at, n, 200, 500 + at)]
        await rmap.unmap(tp, base + at, n, Owner(200, 500 + at))
        assert await records(tp, base) == []
        await freespace.free(tp, base, N, None)
    assert_sound(path)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (Owner(200, 0), Owner(201, 4)),
        (Owner(200, 0), Owner(200, 5)),
        (Owner(200, 0), Owner(200, 4, attr=True)),
        (Owner(200, 0), Owner(200, 4, unwritten=True)),
        (Owner(200, 0), Owner(200, bmbt=True)),
    ],
)
async def test_strangers_are_not_merged(tmp_path: Path, left: Owner, right: Owner) -> None:
    path = image(tmp_path, "rmap")
    async with opened(path) as vol, vol.transaction("truncate", 200) as tp:
        base = await blocks(tp, None)
        await rmap.map(tp, base, 4, left)
        await rmap.map(tp, base + 4, 4, right)
        found = await records(tp, base)
        assert [rec[:2] for rec in found] == [(0, 4), (4, 4)]
        await rmap.unmap(tp, base + 4, 4, right)
        await rmap.unmap(tp, base, 4, left)
        await freespace.free(tp, base, N, None)
    assert_sound(path)


async def test_owners_without_offsets_are_merged(tmp_path: Path) -> None:
    path = image(tmp_path, "1k rmap")
    async with opened(path) as vol, vol.transaction("truncate", 200) as tp:
        base = await blocks(tp, None)
        for owner in (Owner(OWN_INODES), Owner(200, bmbt=True), Owner(200, attr=True, bmbt=True)):
            await rmap.map(tp, base + 8, 8, owner)
            await rmap.map(tp, base, 8, owner)
            found = await records(tp, base)
            assert [rec[:3] for rec in found] == [(0, 16, owner.owner)]
            await rmap.unmap(tp, base + 4, 4, owner)
            assert [rec[:2] for rec in await records(tp, base)] == [(0, 4), (8, 8)]
            await rmap.unmap(tp, base, 4, owner)
            await rmap.unmap(tp, base + 8, 8, owner)
        await freespace.free(tp, base, N, None)
    assert_sound(path)


async def test_shared_blocks_have_a_record_each(tmp_path: Path) -> None:
    """Neighbours are found although other files' records lie between them in the order."""
    path = image(tmp_path, "rmap")
    async with opened(path) as vol, vol.transaction("truncate", 200) as tp:
        base = await blocks(tp, Owner(200, 0))
        for ino in range(300, 306):
            await rmap.map(tp, base + 10, 10, Owner(ino, 70))
        for ino in range(300, 306):
            await rmap.map(tp, base + 20, 10, Owner(ino, 80))
            await rmap.map(tp, base + 5, 5, Owner(ino, 65))
        wanted = [(0, N, 200, 0), *((5, 25, ino, 65) for ino in range(300, 306))]
        assert await records(tp, base) == wanted
        for ino in range(300, 306):
            await rmap.unmap(tp, base + 12, 3, Owner(ino, 72))
        assert len(await records(tp, base)) == 13
        for ino in range(300, 306):
            await rmap.unmap(tp, base + 5, 7, Owner(ino, 65))
            await rmap.unmap(tp, base + 15, 15, Owner(ino, 75))
        assert await records(tp, base) == [(0, N, 200, 0)]
        await freespace.free(tp, base, N, Owner(200, 0))
    assert_sound(path)


@pytest.mark.compiled
async def test_thousands_of_records(tmp_path: Path) -> None:
    """Every second block belongs to another file: a tree of several levels, and back."""
    path = image(tmp_path, "1k rmap")
    async with opened(path) as vol:
        async with vol.transaction("truncate", 4000) as tp:
            near = vol.geo.fsb(1, 3000)
            base, _ = await freespace.alloc(tp, near=near, minlen=3000, maxlen=3000, owner=None)
        order = list(range(3000))
        random.Random(6).shuffle(order)
        for first in range(0, 3000, 500):
            async with vol.transaction("truncate") as tp:
                for at in order[first : first + 500]:
                    await rmap.map(tp, base + at, 1, Owner(200 + at % 2, at))
    assert ImageChecker(path).check() == []
    async with opened(path) as vol:
        for first in range(0, 3000, 500):
            async with vol.transaction("truncate") as tp:
                for at in order[first : first + 500]:
                    await freespace.free(tp, base + at, 1, Owner(200 + at % 2, at))
    checker = assert_sound(path)
    assert checker.heights[1]["rmapbt"] == 1


async def test_unknown_mapping_is_corruption(tmp_path: Path, allow_logs: AllowLogs) -> None:
    allow_logs("corrupt rmapbt")
    path = image(tmp_path, "rmap")
    async with opened(path) as vol, vol.transaction("truncate", 100) as tp:
        base = await blocks(tp, Owner(200, 0))
        for owner in (Owner(201, 0), Owner(200, 1), Owner(200, 0, attr=True)):
            with pytest.raises(Corrupt, match="no record of owner"):
                await rmap.unmap(tp, base, 1, owner)
        await freespace.free(tp, base, N, Owner(200, 0))


async def test_nothing_happens_without_the_feature(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    async with opened(path) as vol, vol.transaction("truncate", 10) as tp:
        await rmap.map(tp, 5000, 1, Owner(200, 0))
        await rmap.unmap(tp, 5000, 1, Owner(200, 0))
        await rmap.convert(tp, 5000, 1, Owner(200, 0))
        assert not tp.dirty
