"""Reference counts: the record arithmetic against counting blocks, the tree against a model."""

from __future__ import annotations

import random
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs.volume import Volume
from fs.xfs import ag, freespace, refcount, rmap
from fs.xfs.btree import Cursor
from fs.xfs.btroots import refcount_root
from fs.xfs.owner import Owner
from fs.xfs.refcount import Shared, adjust
from tests.fs.test_freespace import assert_sound, image, opened
from tests.fs.treecheck import ImageChecker


def naive_records(counts: Counter[int]) -> list[Shared]:
    """Runs of blocks with the same count, if that is two or more."""
    blocks = sorted(block for block, count in counts.items() if count > 1)
    found = []
    for _, run in groupby(enumerate(blocks), lambda pair: (pair[1] - pair[0], counts[pair[1]])):
        members = [block for _, block in run]
        found.append(Shared(members[0], len(members), counts[members[0]]))
    return found


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=30, max_size=30),
    st.integers(0, 29),
    st.integers(1, 12),
    st.sampled_from([1, -1]),
)
def test_adjust(values: list[int], start: int, n: int, delta: int) -> None:
    counts = Counter(dict(enumerate(values)))
    end = start + n
    before = naive_records(counts)
    around = [r for r in before if r.end >= start and r.start <= end]
    after = adjust(around, start, end, delta)
    for block in range(start, end):
        counts[block] = counts.get(block, 1) + delta
    rest = [r for r in before if r not in around]
    assert sorted(after + rest) == naive_records(counts)


def test_a_saturated_count_stays() -> None:
    most = refcount.REFCOUNT_MAX
    assert adjust([Shared(4, 4, most)], 4, 8, -1) == [Shared(4, 4, most)]
    assert adjust([Shared(4, 4, most)], 5, 6, 1) == [Shared(4, 4, most)]


async def tree(vol: Volume, agno: int) -> list[Shared]:
    found = []
    async with vol.reader() as tp:
        await tp.lock_space()
        cur = Cursor(refcount_root(tp, agno, await ag.read_agf(tp, agno)))
        more = await cur.first()
        while more:
            found.append(Shared(*cur.record()))
            more = await cur.next()
    return found


class Files:
    """Files that map ranges of one large extent, block by block."""

    def __init__(self, vol: Volume, base: int, n: int) -> None:
        self.vol, self.base, self.n = vol, base, n
        self.maps: list[tuple[int, int, int]] = [(200, 0, n)]  # ino, first block, length

    def counts(self) -> Counter[int]:
        counts: Counter[int] = Counter()
        start = self.vol.geo.agbno_of(self.base)
        for _, first, n in self.maps:
            counts.update(range(start + first, start + first + n))
        return counts

    def owner(self, ino: int, first: int) -> Owner:
        return Owner(ino, 1000 + first)

    async def clone(self, rng: random.Random, ino: int) -> None:
        """Another file maps a part of what some file maps."""
        _, first, n = rng.choice(self.maps)
        at = rng.randrange(n)
        n = rng.randrange(1, n - at + 1)
        async with self.vol.transaction("truncate", 64) as tp:
            await refcount.increase(tp, self.base + first + at, n)
            await rmap.map(tp, self.base + first + at, n, self.owner(ino, first + at))
        self.maps.append((ino, first + at, n))

    async def drop(self, rng: random.Random, whole: bool = False) -> None:
        """A file unmaps a part of what it maps."""
        ino, first, n = self.maps.pop(rng.randrange(len(self.maps)))
        at = 0 if whole else rng.choice((0, rng.randrange(n)))
        m = n if whole else rng.randrange(1, n - at + 1)
        async with self.vol.transaction("truncate", 64) as tp:
            owner = self.owner(ino, first + at)
            await refcount.decrease(tp, self.base + first + at, m, owner)
        if at:
            self.maps.append((ino, first, at))
        if at + m < n:
            self.maps.append((ino, first + at + m, n - at - m))


@pytest.mark.parametrize("name", ["default", "1k", "rmap", "1k rmap"])
async def test_clones_come_and_go(tmp_path: Path, name: str) -> None:
    path = image(tmp_path, name)
    async with opened(path) as vol:
        free, rng = vol.space.free, random.Random(name)
        async with vol.transaction("truncate", 3000) as tp:
            base, n = await freespace.alloc(
                tp, near=vol.geo.fsb(1, 5000), minlen=2000, maxlen=2000, owner=Owner(200, 1000)
            )
        files = Files(vol, base, n)
        for i in range(250):
            if files.maps and rng.random() < 0.4:
                await files.drop(rng)
            elif files.maps:
                await files.clone(rng, 300 + i)
            if i % 50 == 0:
                assert await tree(vol, 1) == naive_records(files.counts())
                assert vol.space.free == vol.ags.free
        assert await tree(vol, 1) == naive_records(files.counts())
        maps = list(files.maps)
    checker = ImageChecker(path)
    assert checker.check() == []
    assert maps
    async with opened(path) as vol:
        files.vol = vol
        while files.maps:
            await files.drop(rng, whole=True)
        assert await tree(vol, 1) == []
        assert vol.space.free == free
    assert_sound(path)


async def test_find_shared(tmp_path: Path) -> None:
    path = image(tmp_path, "rmap")
    async with opened(path) as vol:
        async with vol.transaction("truncate", 200) as tp:
            base, _ = await freespace.alloc(
                tp, near=vol.geo.fsb(1, 5000), minlen=100, maxlen=100, owner=Owner(200, 0)
            )
            assert await refcount.find_shared(tp, base, 100) is None
            for first, n in ((10, 5), (12, 20), (60, 1)):
                await refcount.increase(tp, base + first, n)
                await rmap.map(tp, base + first, n, Owner(300 + first, 0))
            # three records, 10..12, 12..15, 15..32, are one shared range
            assert await refcount.find_shared(tp, base, 100) == (base + 10, 22)
            assert await refcount.find_shared(tp, base + 14, 4) == (base + 14, 4)
            assert await refcount.find_shared(tp, base + 32, 28) is None
            assert await refcount.find_shared(tp, base + 32, 29) == (base + 60, 1)
            for first, n in ((10, 5), (12, 20), (60, 1)):
                await refcount.decrease(tp, base + first, n, Owner(300 + first, 0))
            await refcount.decrease(tp, base, 100, Owner(200, 0))
    assert_sound(path)


async def test_staging_records_are_left_alone(tmp_path: Path) -> None:
    """A record of copy-on-write staging sorts last and is nobody's sharing."""
    path = image(tmp_path, "default")
    async with opened(path) as vol:
        staging = (1 << 31 | 7000, 8, 1)
        async with vol.transaction("truncate", 300) as tp:
            agf = await freespace.prepare(tp, 1)
            await Cursor(refcount_root(tp, 1, agf)).insert(staging)
            base, _ = await freespace.alloc(
                tp, near=vol.geo.fsb(1, 5000), minlen=100, maxlen=100, owner=Owner(200, 0)
            )
            await refcount.increase(tp, base, 100)
            assert await refcount.find_shared(tp, vol.geo.fsb(1, 7000), 8) is None
            await refcount.decrease(tp, base, 100, Owner(200, 0))
            await refcount.decrease(tp, base, 100, Owner(200, 0))
        assert await tree(vol, 1) == [staging]
        async with vol.transaction("truncate") as tp:
            cur = Cursor(refcount_root(tp, 1, await freespace.prepare(tp, 1)))
            assert await cur.lookup_eq(staging[0])
            await cur.delete()
    assert_sound(path)
