"""The cursor against a sorted list, on trees of tiny blocks; and that the checker sees faults."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right, insort
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fs.xfs import btkind as K
from fs.xfs.btkind import Kind, Record
from tests.fs.treefake import FakeRoot, World

# kind, block size, bytes of the root in the inode (0: an AG tree)
TREES = [
    pytest.param(K.BNO, 56 + 8 * 8, 0, id="bnobt"),
    pytest.param(K.CNT, 56 + 8 * 9, 0, id="cntbt"),
    pytest.param(K.INO, 56 + 16 * 3, 0, id="inobt"),
    pytest.param(K.RMAP, 56 + 44 * 4, 0, id="rmapbt"),
    pytest.param(K.REFC, 56 + 12 * 5, 0, id="refcountbt"),
    pytest.param(K.BMAP, 72 + 16 * 5, 4 + 16 * 3, id="bmbt-3"),
    pytest.param(K.BMAP, 72 + 16 * 4, 4 + 16 * 4, id="bmbt-4"),
]


def make(kind: Kind, n: int, rng: random.Random) -> Record:
    """A record whose place in the order follows n (cntbt: a random one, n keeps it unique)."""
    start = n * 4
    if kind is K.BNO:
        return start, 1 + rng.randrange(3)
    if kind is K.CNT:
        return start, 1 + rng.randrange(30)
    if kind in (K.INO, K.FINO):
        return n * 64, 0, 64, 64, (1 << 64) - 1
    if kind is K.RMAP:
        owner = rng.choice((-5, -7, 131, 1 << 40))
        flags = rng.choice((0, 1 << 61, 1 << 63)) if owner > 0 else 0
        return start, rng.choice((1, 4, 40)), owner, (rng.randrange(99) if owner > 0 else 0) | flags
    if kind is K.REFC:
        return start, 2, 2 + rng.randrange(5)
    return start, rng.randrange(1 << 30), 1 + rng.randrange(4), rng.randrange(2)


def order(kind: Kind, rec: Record) -> tuple[int, ...]:
    return tuple(k % (1 << 64) for k in kind.key(rec))


def raw(rec: Record) -> Record:
    """As the checker decodes it: everything unsigned."""
    return tuple(v % (1 << 64) for v in rec)


class Model:
    """A sorted list of records."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.recs: list[Record] = []

    def _key(self, rec: Record) -> tuple[int, ...]:
        return order(self.kind, rec)

    def add(self, rec: Record) -> None:
        insort(self.recs, rec, key=self._key)

    def le(self, key: tuple[int, ...]) -> Record | None:
        i = bisect_right(self.recs, key, key=self._key)
        return self.recs[i - 1] if i else None

    def ge(self, key: tuple[int, ...]) -> Record | None:
        i = bisect_left(self.recs, key, key=self._key)
        return self.recs[i] if i < len(self.recs) else None


def assert_same(root: FakeRoot, model: Model) -> None:
    tree = root.check()
    assert tree.faults == []
    assert tree.records == [raw(rec) for rec in model.recs]


async def step(cur: Any, model: Model, rec: Record, remove: bool) -> None:
    """Insert the record or remove the first one at or behind it; look around there."""
    kind = model.kind
    there = model.ge(order(kind, rec))
    known = there is not None and order(kind, there) == order(kind, rec)
    if not remove and not known:
        await cur.insert(rec)
        model.add(rec)
        assert cur.record() == rec
    elif await cur.lookup_ge(*kind.key(rec)):
        assert there is not None
        victim = there
        assert cur.record() == victim
        await cur.delete()
        model.recs.remove(victim)
        after = model.ge(order(kind, victim))
        assert await cur.settle() == (after is not None)
        if after is not None:
            assert cur.record() == after
    else:
        assert there is None
    before = model.le(order(kind, rec))
    assert await cur.lookup_le(*kind.key(rec)) == (before is not None)
    if before is not None:
        assert cur.record() == before


@pytest.mark.parametrize(("kind", "block", "area"), TREES)
@pytest.mark.parametrize("pattern", ["random", "up", "down"])
async def test_grow_and_shrink(kind: Kind, block: int, area: int, pattern: str) -> None:
    rng = random.Random(f"{kind.name} {pattern}")
    root = FakeRoot(World(block, 1000), kind, area)
    cur, model = root.cursor(), Model(kind)
    numbers = list(range(1, 300))
    if pattern == "random":
        rng.shuffle(numbers)
    elif pattern == "down":
        numbers.reverse()
    records = [make(kind, n, rng) for n in numbers]
    for i, rec in enumerate(records):
        await step(cur, model, rec, remove=False)
        if i % 37 == 0:
            assert_same(root, model)
    assert root.levels >= 3
    assert_same(root, model)
    rng.shuffle(records)
    keep = 1 if root.in_inode else 0  # bmap turns the last few into a list before the tree is empty
    for i, rec in enumerate(records[keep:]):
        assert await cur.lookup_eq(*kind.key(rec))
        assert cur.record() == rec
        await cur.delete()
        model.recs.remove(rec)
        if i % 37 == 0 or len(model.recs) < 20:
            assert_same(root, model)
    assert root.levels == (2 if root.in_inode else 1)


@pytest.mark.parametrize(("kind", "block", "area"), TREES)
async def test_mixed_with_walks(kind: Kind, block: int, area: int) -> None:
    rng = random.Random(kind.name)
    root = FakeRoot(World(block, 1000), kind, area)
    cur, model = root.cursor(), Model(kind)
    await step(cur, model, make(kind, 2000, rng), remove=False)
    for i in range(700):
        remove = rng.random() < (0.3 if i < 350 else 0.6) and len(model.recs) > 3
        await step(cur, model, make(kind, rng.randrange(1, 400), rng), remove)
        if i % 50 == 0:
            assert_same(root, model)
    assert_same(root, model)
    found = []
    more = await cur.first()
    while more:
        found.append(cur.record())
        more = await cur.next()
    assert found == model.recs
    back = []
    more = await cur.last()
    while more:
        back.append(cur.record())
        more = await cur.prev()
    assert back[::-1] == model.recs


async def test_appending_fills_blocks() -> None:
    """Trees that grow at their end, as files and inode tables do, end nearly full."""
    root = FakeRoot(World(72 + 16 * 20, 1000), K.BMAP, 4 + 16 * 9)
    cur = root.cursor()
    for i in range(2000):
        await cur.insert((i * 10, i, 1, 0))
    tree = root.check()
    assert tree.faults == []
    assert len(tree.blocks) < 2000 / 20 * 1.15


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_keeps_the_invariants(data: st.DataObject) -> None:
    import trio

    parts: Any = data.draw(st.sampled_from([p.values for p in TREES]))
    kind, block, area = parts
    numbers = data.draw(st.lists(st.tuples(st.booleans(), st.integers(1, 60)), max_size=80))

    async def run() -> None:
        rng = random.Random(1)
        root = FakeRoot(World(block, 300), kind, area)
        cur, model = root.cursor(), Model(kind)
        await step(cur, model, make(kind, 90, rng), remove=False)
        for remove, n in numbers:
            rec = make(kind, n, rng)
            there = model.ge(order(kind, rec))
            takes = remove or (there is not None and order(kind, there) == order(kind, rec))
            if takes and len(model.recs) == 1:
                continue  # a tree rooted in an inode turns into a list long before it is empty
            await step(cur, model, rec, remove)
        assert_same(root, model)

    trio.run(run)


async def test_replace_moves_a_record_when_its_key_asks() -> None:
    rng = random.Random(5)
    root = FakeRoot(World(56 + 8 * 8, 500), K.CNT)
    cur, model = root.cursor(), Model(K.CNT)
    for n in range(1, 200):
        rec = (n * 1000, 1 + rng.randrange(400))
        await cur.insert(rec)
        model.add(rec)
    for _ in range(400):
        old = rng.choice(model.recs)
        new = (old[0], max(1, old[1] + rng.randrange(-20, 21)))
        assert await cur.lookup_eq(old[1], old[0])
        await cur.replace(new)
        model.recs.remove(old)
        model.add(new)
        assert cur.record() == new
    assert_same(root, model)


async def test_duplicate_key_is_refused() -> None:
    root = FakeRoot(World(256, 50), K.BNO)
    await root.cursor().insert((4, 2))
    with pytest.raises(ValueError, match="exists already"):
        await root.cursor().insert((4, 3))


async def test_overlap_query_finds_what_a_scan_finds() -> None:
    rng = random.Random(11)
    root = FakeRoot(World(56 + 44 * 4, 500), K.RMAP)
    cur, recs = root.cursor(), []
    for n in range(1, 150):
        rec = (rng.randrange(400), 1 + rng.randrange(60), 100 + n, 0)
        await cur.insert(rec)
        recs.append(rec)
    assert root.check().faults == []
    for first in range(0, 470, 7):
        last = first + rng.randrange(5)
        found, again = [], False
        while await cur.overlap(first, last, again=again):
            found.append(cur.record())
            again = True
        wanted = [r for r in recs if r[0] <= last and r[0] + r[1] > first]
        assert found == sorted(wanted, key=lambda r: K.RMAP.key(r))


async def test_broken_blocks_are_reported() -> None:
    root = FakeRoot(World(56 + 8 * 4, 100), K.BNO)
    cur = root.cursor()
    for n in range(1, 20):
        await cur.insert((n * 4, 1))
    leaf = cur.leaf()[0]
    root.world.mem[leaf + 5] = 3  # its level
    with pytest.raises(ValueError, match="unexpected level"):
        await root.cursor().lookup_eq(19 * 4)


@pytest.mark.parametrize(
    ("what", "at", "text"),
    [
        ("a record", 56, "behind"),
        ("a count", 7, "entries"),
        ("a sibling", 11, "siblings"),
        ("the block number", 23, "says block"),
        ("the uuid", 40, "uuid"),
        ("the owner", 51, "owner"),
        ("the magic", 0, "magic"),
    ],
)
async def test_the_checker_sees_a_planted_fault(what: str, at: int, text: str) -> None:
    root = FakeRoot(World(56 + 8 * 4, 100), K.BNO)
    cur = root.cursor()
    for n in range(1, 20):
        await cur.insert((n * 4, 1))
    assert root.check().faults == []
    await cur.lookup_eq(9 * 4)
    root.world.mem[cur.leaf()[0] + at] ^= 0x41
    assert any(text in fault for fault in root.check().faults), what


async def test_the_checker_sees_a_stale_key() -> None:
    root = FakeRoot(World(56 + 44 * 4, 200), K.RMAP)
    cur = root.cursor()
    for n in range(1, 60):
        await cur.insert((n * 4, 4, -5, 0))
    await cur.first()
    leaf = cur.leaf()[0]
    root.world.mem[leaf + 56 + 7] = 200  # the first record grows; the high keys do not
    assert any("key" in fault for fault in root.check().faults)
