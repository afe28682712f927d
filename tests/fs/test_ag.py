"""AG headers and tree blocks: what the verifiers refuse, the free list's ring, the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fs.cache.buf import BufOps
from fs.errors import Corrupt
from fs.xfs import ag, btkind, freespace, superblock
from fs.xfs import layout as L
from fs.xfs.geometry import Geometry
from tests.conftest import AllowLogs
from tests.fs.test_freespace import assert_sound, image, opened


class RawBuf:
    """A block of an image, outside any cache."""

    def __init__(self, path: Path, daddr: int, size: int) -> None:
        with path.open("rb") as raw:
            raw.seek(daddr * 512)
            self.mem = np.frombuffer(raw.read(size), np.uint8).copy()
        self.addr, self.size, self.daddr = 0, size, daddr

    @property
    def data(self) -> Any:
        return self.mem

    def rec(self, dtype: Any) -> Any:
        return self.mem[: dtype.itemsize].view(dtype)[0]


def read_sb(path: Path) -> Any:
    with path.open("rb") as raw:
        return superblock.read(raw.read(32768), path.stat().st_size)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Geometry]:
    path = image(tmp_path_factory.mktemp("ag"), "1k rmap")
    return path, superblock.geometry(read_sb(path))


def header(sample: tuple[Path, Geometry], agno: int, sector: int) -> Any:
    path, geo = sample
    return RawBuf(path, geo.ag_daddr(agno, sector), geo.sector_size)


HEADERS = {
    "SB": (ag.SB, ag.SB_OPS),
    "AGF": (ag.AGF, ag.AGF_OPS),
    "AGI": (ag.AGI, ag.AGI_OPS),
    "AGFL": (ag.AGFL, ag.AGFL_OPS),
}


@pytest.mark.parametrize("name", HEADERS)
def test_fresh_headers_are_accepted(sample: tuple[Path, Geometry], name: str) -> None:
    sector, ops = HEADERS[name]
    for agno in range(sample[1].agcount):
        assert ops.verify(sample[1], header(sample, agno, sector), agno) == ""
        assert ops.verify(sample[1], header(sample, agno, sector), None) == ""


@pytest.mark.parametrize(
    ("name", "dtype", "field", "value"),
    [
        ("SB", L.SB, "magic", 1),
        ("SB", L.SB, "agblocks", 1),
        ("SB", L.SB, "dblocks", 1),
        ("AGF", L.AGF, "magic", 1),
        ("AGF", L.AGF, "version", 2),
        ("AGF", L.AGF, "seqno", 2),
        ("AGF", L.AGF, "length", 5),
        ("AGF", L.AGF, "bno_root", 0),
        ("AGF", L.AGF, "rmap_root", 1 << 30),
        ("AGF", L.AGF, "refcount_level", 0),
        ("AGF", L.AGF, "cnt_level", 20),
        ("AGF", L.AGF, "flfirst", 119),
        ("AGF", L.AGF, "flcount", 120),
        ("AGF", L.AGF, "freeblks", 1 << 30),
        ("AGF", L.AGF, "longest", 1 << 29),
        ("AGI", L.AGI, "magic", 1),
        ("AGI", L.AGI, "length", 5),
        ("AGI", L.AGI, "freecount", 1 << 20),
        ("AGI", L.AGI, "root", 0),
        ("AGI", L.AGI, "free_level", 0),
        ("AGI", L.AGI, "unlinked", 0),
        ("AGI", L.AGI, "unlinked", 67),
        ("AGFL", L.AGFL, "magic", 1),
        ("AGFL", L.AGFL, "seqno", 3),
    ],
)
def test_damaged_headers_are_refused(
    sample: tuple[Path, Geometry], name: str, dtype: Any, field: str, value: int
) -> None:
    sector, ops = HEADERS[name]
    buf = header(sample, 1, sector)
    buf.rec(dtype)[field] = value
    assert ops.verify(sample[1], buf, 1) != ""


def test_foreign_uuid_and_bad_slots_are_refused(sample: tuple[Path, Geometry]) -> None:
    for name, dtype in (("AGF", L.AGF), ("AGI", L.AGI), ("AGFL", L.AGFL)):
        sector, ops = HEADERS[name]
        buf = header(sample, 1, sector)
        buf.mem[L.off(dtype, "uuid")] ^= 1
        assert "uuid" in ops.verify(sample[1], buf, 1)
    buf = header(sample, 1, ag.AGFL)
    buf.mem[36:40] = (0x7F, 0, 0, 0)
    assert "outside" in ag.AGFL_OPS.verify(sample[1], buf, 1)


TREES = {
    btkind.BNO: (2, L.AGF, "bno_root"),
    btkind.CNT: (3, L.AGF, "cnt_root"),
    btkind.RMAP: (6, L.AGF, "rmap_root"),
    btkind.REFC: (7, L.AGF, "refcount_root"),
    btkind.INO: (4, L.AGI, "root"),
    btkind.FINO: (5, L.AGI, "free_root"),
}


def root_block(sample: tuple[Path, Geometry], kind: btkind.Kind, agno: int = 0) -> Any:
    path, geo = sample
    _, dtype, field = TREES[kind]
    sector = ag.AGF if dtype is L.AGF else ag.AGI
    block = int(header(sample, agno, sector).rec(dtype)[field])
    return RawBuf(path, geo.agb_to_daddr(agno, block), geo.block_size)


@pytest.mark.parametrize("kind", TREES, ids=lambda kind: kind.name)
def test_tree_blocks(sample: tuple[Path, Geometry], kind: btkind.Kind) -> None:
    geo, ops = sample[1], kind.ops
    assert ops.verify(geo, root_block(sample, kind), 0) == ""
    assert ops.verify(geo, root_block(sample, kind), None) == ""
    assert ops.verify(geo, root_block(sample, kind), 1) == "owner is AG 0"
    for field, value, text in (
        ("magic", 7, "magic"),
        ("level", 9, "level"),
        ("numrecs", 5000, "entries"),
        ("leftsib", 0, "sibling"),
        ("rightsib", 1 << 30, "sibling"),
        ("blkno", 77, "block number"),
        ("owner", 99, "owner"),
    ):
        buf = root_block(sample, kind)
        buf.rec(L.SHORT_BLOCK)[field] = value
        assert text in ops.verify(geo, buf, 0), field
    buf = root_block(sample, kind)
    buf.mem[L.off(L.SHORT_BLOCK, "uuid")] ^= 1
    assert "uuid" in ops.verify(geo, buf, 0)


def test_a_tree_block_is_not_anothers(sample: tuple[Path, Geometry]) -> None:
    wrong: BufOps = btkind.CNT.ops
    assert "magic" in wrong.verify(sample[1], root_block(sample, btkind.BNO), 0)
    assert "magic" in btkind.BMAP.ops.verify(sample[1], root_block(sample, btkind.BNO), 0)


def long_block(geo: Geometry) -> Any:
    """A leaf of an extent tree with one record, made by hand."""
    buf: Any = RawBuf.__new__(RawBuf)
    buf.mem, buf.addr, buf.size, buf.daddr = np.zeros(1024, np.uint8), 0, 1024, 640
    rec = buf.rec(L.LONG_BLOCK)
    rec["magic"], rec["numrecs"], rec["blkno"], rec["owner"] = L.MAGIC_BMBT, 1, 640, 131
    rec["leftsib"] = rec["rightsib"] = L.NULL64
    buf.mem[40:56] = list(geo.uuid)
    btkind.BMAP.pack(buf.mem, 72, (7, 400, 3, 0))
    return buf


def test_extent_tree_blocks(sample: tuple[Path, Geometry]) -> None:
    geo, ops = sample[1], btkind.BMAP.ops
    assert ops.verify(geo, long_block(geo), 131) == ""
    assert ops.verify(geo, long_block(geo), None) == ""
    for field, value, text in (
        ("magic", 7, "magic"),
        ("owner", 132, "inode 132"),
        ("blkno", 8, "block number"),
        ("leftsib", 1 << 50, "sibling"),
        ("level", 1, "pointer"),
        ("numrecs", 60, "entries"),
        ("numrecs", 2, "length"),
    ):
        buf = long_block(geo)
        buf.rec(L.LONG_BLOCK)[field] = value
        assert ops.verify(geo, buf, 131) != "", (field, text)


async def test_the_free_list_is_a_ring(tmp_path: Path) -> None:
    path = image(tmp_path, "default")
    async with opened(path) as vol, vol.transaction("truncate") as tp:
        await tp.lock_space()
        agf = await ag.read_agf(tp, 1)
        slots = ag.agfl_slots(vol.geo)
        count = ag.get(agf, ag.AGF_FLCOUNT)
        first = [await ag.agfl_get(tp, 1, agf) for _ in range(count)]
        assert len(set(first)) == count
        with pytest.raises(OSError, match="empty"):
            await ag.agfl_get(tp, 1, agf)
        for _ in range(slots // count + 2):  # more than once around
            for block in first:
                await ag.agfl_put(tp, 1, agf, block)
            assert ag.get(agf, ag.AGF_FLCOUNT) == count
            assert [await ag.agfl_get(tp, 1, agf) for _ in range(count)] == first
        for block in first:
            await ag.agfl_put(tp, 1, agf, block)
    assert_sound(path)


async def test_a_full_ring_is_corruption(tmp_path: Path, allow_logs: AllowLogs) -> None:
    allow_logs("free list is full|xfs_trans_cancel|Shutting down|after a shutdown")
    async with opened(image(tmp_path, "default")) as vol:
        with pytest.raises(Corrupt, match="full"):
            async with vol.transaction("truncate") as tp:
                await tp.lock_space()
                agf = await ag.read_agf(tp, 1)
                for _ in range(200):
                    await ag.agfl_put(tp, 1, agf, 5000)


@pytest.mark.parametrize("name", ["default", "1k", "64k", "1k rmap"])
async def test_summary_is_the_superblocks_count(tmp_path: Path, name: str) -> None:
    path = image(tmp_path, name)
    sb = read_sb(path)
    async with opened(path) as vol:
        ags = vol.ags
        assert ags.free == int(sb["fdblocks"])
        assert ags.free - ags.unavailable == sum(ags.usable)
        assert all(u <= t <= f for u, t, f in zip(ags.usable, ags.usable_by_trees, ags.freeblks,
                                                  strict=True))  # fmt: skip
        before = list(ags.usable)
        async with vol.reader() as tp:
            await freespace.mount(tp)
        assert ags.usable == before


def test_limits_of_known_geometries(sample: tuple[Path, Geometry]) -> None:
    """XFS format: 4 KiB blocks have 2 levels in an AG of 64 Ki blocks, 3 in one of 256 Ki."""
    alloc = btkind.minimum(btkind.BNO, 4096)
    assert btkind.height(*alloc, (65536 + 1) // 2) == 2
    assert btkind.height(*alloc, ((1 << 18) + 1) // 2) == 3
    assert btkind.height(*btkind.minimum(btkind.BNO, 65536), (4096 + 1) // 2) == 1
    assert [btkind.minimum(kind, 4096) for kind in (btkind.RMAP, btkind.BMAP)] == [
        (84, 45),
        (125, 125),
    ]
    assert btkind.worst_blocks(10, 4, 100) == 10 + 3 + 1
    assert btkind.limits(sample[1]).rmap_reserve >= sample[1].ag_blocks // 100
