"""Inode allocation: the arithmetic of chunks, and thousands of inodes on real images."""

from __future__ import annotations

import dataclasses
import errno
import random
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fs import namespace
from fs.cache.inode import S_INACTIVE, Inode
from fs.device.image import ImageFile
from fs.errors import Corrupt
from fs.log.transaction import Transaction
from fs.volume import Volume
from fs.xfs import ag, freespace, inobt, inode, superblock, unlinked
from fs.xfs import layout as L
from fs.xfs.btree import Cursor
from fs.xfs.btroots import finobt_root, inobt_root
from fs.xfs.geometry import Geometry
from fs.xfs.inobt import ALL_FREE, Chunk
from fs.xfs.owner import OWN_UNKNOWN, Owner
from tests import support


def geometry(path: Path) -> Geometry:
    with open(path, "rb") as file:
        return superblock.geometry(superblock.read(file.read(32768), path.stat().st_size))


@pytest.fixture(scope="module")
def geo(tmp_path_factory: pytest.TempPathFactory) -> Geometry:
    return geometry(support.mkfs(tmp_path_factory.mktemp("inobt")))


# -- arithmetic --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "cluster"),
    [
        ((), 16384),
        (("-b", "size=1k"), 16384),
        (("-b", "size=64k"), 65536),
        (("-i", "size=1024"), 32768),
        (("-i", "size=2048"), 65536),
        (("-i", "sparse=0"), 16384),
    ],
)
def test_imap(tmp_path: Path, args: tuple[str, ...], cluster: int) -> None:
    geo = geometry(support.mkfs(tmp_path, *args))
    assert geo.cluster_bytes == cluster
    for ino in (geo.root_ino, geo.root_ino + 63, geo.ino(1, 64 * 7 + 5)):
        daddr, bbs, offset = inobt.imap(geo, ino)
        agno, agino = geo.ino_agno(ino), geo.ino_agino(ino)
        place = agno * geo.ag_blocks * geo.block_size + agino * geo.inode_size
        assert daddr * 512 + offset == place
        assert bbs * 512 == cluster
        assert offset + geo.inode_size <= cluster
        in_ag = daddr * 512 - agno * geo.ag_blocks * geo.block_size
        assert in_ag % cluster == 0


def test_sparse_piece(geo: Geometry) -> None:
    """4 KiB blocks, 512-byte inodes: a chunk is 8 blocks, a piece is 4 of them."""
    first, second = inobt.sparse_piece(geo, 40), inobt.sparse_piece(geo, 44)
    assert first == Chunk(320, 0xFF00, 32, 32, ALL_FREE)
    assert second == Chunk(320, 0x00FF, 32, 32, ALL_FREE)
    assert first.usable == 0xFFFFFFFF
    assert second.usable == 0xFFFFFFFF << 32
    assert inobt.check(geo, 1, first) == ""
    assert inobt.check(geo, 1, second) == ""
    assert inobt.pieces(geo, first) == [(40, 4)]
    assert inobt.pieces(geo, second) == [(44, 4)]
    used = first._replace(free=ALL_FREE & ~1, freecount=31)
    both = inobt.merge(used, second)
    assert both == Chunk(320, 0, 64, 63, ALL_FREE & ~1)
    assert inobt.check(geo, 1, both) == ""
    assert inobt.pieces(geo, both) == [(40, 8)]


@given(st.integers(0, 0xFFFF))
def test_hole_bits(mask: int) -> None:
    wanted = sum(1 << i for i in range(64) if mask >> i // 4 & 1)
    assert inobt._hole_bits(mask) == wanted


@pytest.mark.parametrize("inopblog", [1, 2, 3, 6])
@given(missing=st.lists(st.booleans(), min_size=16, max_size=16))
def test_pieces(geo: Geometry, inopblog: int, missing: list[bool]) -> None:
    """Blocks of a chunk, for any blocks missing, and any number of inodes in a block."""
    geo = dataclasses.replace(geo, inopblog=inopblog, inopblock=1 << inopblog)
    chunk_blocks = 64 >> inopblog
    blocks = {40 + b for b in range(chunk_blocks) if not missing[b * 16 // chunk_blocks]}
    absent = [i for i in range(64) if 40 + (i >> inopblog) not in blocks]
    mask = sum(1 << i // 4 for i in absent if i % 4 == 0)
    found = inobt.pieces(geo, Chunk(40 << inopblog, mask, 0, 0, ALL_FREE))
    if mask:
        assert {at + i for at, count in found for i in range(count)} == blocks
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(found))


@pytest.mark.parametrize(
    ("chunk", "fault"),
    [
        (Chunk(321, 0, 64, 64, ALL_FREE), "misplaced"),
        (Chunk(320 + 64 * 7 + 32, 0, 64, 64, ALL_FREE), "misplaced"),
        (Chunk(0, 0, 64, 64, ALL_FREE), "outside"),
        (Chunk(19200 * 8, 0, 64, 64, ALL_FREE), "outside"),
        (Chunk(320, 0, 60, 60, ALL_FREE), "hole mask"),
        (Chunk(320, 1, 64, 60, ALL_FREE), "hole mask"),
        (Chunk(320, 0, 64, 63, ALL_FREE), "free mask"),
    ],
)
def test_check(geo: Geometry, chunk: Chunk, fault: str) -> None:
    assert fault in inobt.check(geo, 1, chunk)


# -- on images ---------------------------------------------------------------------------------

IMAGES = {
    "default": (),
    "1k": ("-b", "size=1k"),
    "64k": ("-b", "size=64k"),
    "1k-inodes": ("-i", "size=1024"),
    "rmapbt": ("-m", "rmapbt=1"),
    "no-finobt": ("-m", "finobt=0"),
    "no-sparse": ("-i", "sparse=0"),
    "8-AGs-1k-rmapbt": ("-b", "size=1k", "-m", "rmapbt=1", "-d", "agcount=4"),
}
images = pytest.mark.parametrize("args", IMAGES.values(), ids=IMAGES.keys())


@asynccontextmanager
async def opened(path: Path, memory: int = 64 << 20) -> AsyncIterator[Volume]:
    device = ImageFile(str(path))
    try:
        async with Volume.open(device, memory, paranoid=True) as vol:
            yield vol
            assert not vol.shut_down
    finally:
        device.close()


async def make(vol: Volume, parent: int, *, is_dir: bool = False, blocks: int = -1) -> Inode:
    """A new, unlinked, empty file; the caller holds it and must see that it is freed."""
    reserve = inobt.alloc_blocks(vol.geo) if blocks < 0 else blocks
    async with vol.transaction("create", reserve) as tp:
        ino, gen = await inobt.alloc(tp, parent, is_dir)
        ip = await vol.inodes.create(ino, gen)
        ip.mode, ip.format, ip.aformat = 0o100600, L.FMT_EXTENTS, L.FMT_EXTENTS
        ip.flags2 = inode.new_flags2(vol.geo)
        ip.nlink = 0
        ip.state |= S_INACTIVE  # nobody else frees it
        await unlinked.insert(tp, ip)
        tp.log_inode(ip)
    return ip


async def drop(vol: Volume, ip: Inode) -> None:
    """Free the inode and let go of it."""
    async with vol.transaction("inactive", inobt.free_blocks(vol.geo), from_pool=True) as tp:
        await unlinked.remove(tp, ip)
        await inobt.free(tp, ip)
    vol.inodes.put(ip)


async def figures(vol: Volume) -> tuple[int, int]:
    async with vol.reader() as tp:
        return await inobt.counts(tp)


async def records(vol: Volume, agno: int, *, finobt: bool) -> list[Chunk]:
    """All records of one tree."""
    async with vol.reader() as tp:
        agi = await ag.read_agi(tp, agno)
        cur = Cursor((finobt_root if finobt else inobt_root)(tp, agno, agi))
        found = []
        more = await cur.first()
        while more:
            found.append(inobt._chunk(tp, agno, cur))
            more = await cur.next()
        return found


async def mirrored(vol: Volume) -> None:
    """The finobt is the inobt's records with free inodes, and the AGIs count both."""
    for agno in range(vol.geo.agcount):
        chunks = await records(vol, agno, finobt=False)
        if vol.geo.has_finobt:
            listed = await records(vol, agno, finobt=True)
            assert listed == [chunk for chunk in chunks if chunk.freecount]
        async with vol.reader() as tp:
            header = (await ag.read_agi(tp, agno)).rec(L.AGI)
            assert header["count"] == sum(chunk.count for chunk in chunks)
            assert header["freecount"] == sum(chunk.freecount for chunk in chunks)


@pytest.mark.compiled
@images
async def test_thousands(tmp_path: Path, args: tuple[str, ...]) -> None:
    """Allocate and free in a seeded mix; every number is used once, everything comes back."""
    path = support.mkfs(tmp_path, *args)
    rng = random.Random(3)
    async with opened(path) as vol:
        before, free = await figures(vol), vol.space.free
        alive: dict[int, Inode] = {}
        seen: dict[int, int] = {}
        for turn in range(3000):
            if rng.random() < (0.75 if turn < 2000 else 0.3) or not alive:
                parent = rng.choice([vol.geo.root_ino, *list(alive)[:5]])
                ip = await make(vol, parent, is_dir=rng.random() < 0.1)
                assert ip.ino not in alive
                assert seen.get(ip.ino) != ip.gen
                alive[ip.ino] = ip
                seen[ip.ino] = ip.gen
            else:
                await drop(vol, alive.pop(rng.choice(list(alive))))
            if turn % 500 == 0:
                await mirrored(vol)
                await vol.flush_metadata()
        count, unused = await figures(vol)
        assert count - unused == before[0] - before[1] + len(alive)
        for ino in list(alive):
            await drop(vol, alive.pop(ino))
        await mirrored(vol)
        after = await figures(vol)
        if vol.geo.inopblock <= 64:
            assert after == before
            assert vol.space.free == free
        assert after[0] - after[1] == before[0] - before[1]
    support.assert_clean(path)


async def test_placement(tmp_path: Path) -> None:
    """Files near their parent, directories in turn to all AGs."""
    path = support.mkfs(tmp_path)
    async with opened(path) as vol:
        geo = vol.geo
        dirs = [await make(vol, geo.root_ino, is_dir=True) for _ in range(8)]
        assert [geo.ino_agno(ip.ino) for ip in dirs] == [1, 2, 3, 0, 1, 2, 3, 0]
        file = await make(vol, dirs[1].ino)
        assert geo.ino_agno(file.ino) == 2
        assert abs(file.ino - dirs[1].ino) < 64
        for ip in (*dirs, file):
            await drop(vol, ip)
    support.assert_clean(path)


async def test_without_reservation_only_existing_inodes(tmp_path: Path) -> None:
    path = support.mkfs(tmp_path)
    async with opened(path) as vol:
        made: list[Inode] = []
        with pytest.raises(OSError, match="no free inode") as caught:
            while len(made) < 100:
                made.append(await make(vol, vol.geo.root_ino, blocks=0))
        assert caught.value.errno == errno.ENOSPC
        assert len(made) == 61
        assert not vol.shut_down
        for ip in made:
            await drop(vol, ip)
    support.assert_clean(path)


async def test_inode_percentage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No new chunk beyond the share of the space that mkfs allows to inodes."""
    path = support.mkfs(tmp_path, "-i", "maxpct=1")
    async with opened(path) as vol:
        most = vol.geo.dblocks // 100 * 8

        async def reached(tp: Transaction) -> tuple[int, int]:
            return most, 0

        made = [await make(vol, vol.geo.root_ino) for _ in range(61)]
        with monkeypatch.context() as patch:
            patch.setattr(inobt, "counts", reached)
            with pytest.raises(OSError, match="no free inode") as caught:
                await make(vol, vol.geo.root_ino)
            assert caught.value.errno == errno.ENOSPC
        made.append(await make(vol, vol.geo.root_ino))
        for ip in made:
            await drop(vol, ip)
    support.assert_clean(path)


async def test_generation_changes_on_reuse(tmp_path: Path) -> None:
    """Also when the freed inode's memory is gone, and over a remount."""
    path = support.mkfs(tmp_path)
    gens = []
    for _ in range(2):
        async with opened(path) as vol:
            for forget in (False, True):
                ip = await make(vol, vol.geo.root_ino)
                first = ip.ino
                gens.append(ip.gen)
                await drop(vol, ip)
                if forget:
                    vol.inodes.scan_objects(1000, 0)
                    vol.inodes.scan_objects(1000, 0)
                assert vol.inodes.find(first) is None
    assert gens == list(range(gens[0], gens[0] + 4))
    support.assert_clean(path)


async def test_sparse_pieces(tmp_path: Path) -> None:
    """With no aligned room for a whole chunk, pieces are made, joined, and freed."""
    path = support.mkfs(tmp_path)
    async with opened(path) as vol:
        before, free = await figures(vol), vol.space.free
        geo = vol.geo
        held = await crumble(vol)
        made = [await make(vol, geo.root_ino) for _ in range(61 + 40)]
        sparse = [c for c in await records(vol, 0, finobt=False) if c.holemask]
        assert sparse, "no sparse chunk was made"
        await mirrored(vol)
        await vol.flush_metadata()
        for ip in made:
            await drop(vol, ip)
        await release(vol, held)
        await mirrored(vol)
        assert (await figures(vol), vol.space.free) == (before, free)
    support.assert_clean(path)


async def crumble(vol: Volume) -> list[tuple[int, int]]:
    """Take all free space but half an inode chunk's worth in every second place, in AG 0."""
    geo = vol.geo
    chunk, half = geo.inode_align, geo.sparse_align
    held: list[tuple[int, int]] = []
    owner = Owner(OWN_UNKNOWN)
    while most := min(4096, vol.space.unpromised):
        try:
            async with vol.transaction("truncate", most, from_pool=True) as tp:
                got = await freespace.alloc(tp, minlen=1, maxlen=most, owner=owner, metadata=True)
                held.append(got)
        except OSError:
            break
    async with vol.transaction("truncate", 0) as tp:
        for fsbno, count in list(held):
            if geo.agno_of(fsbno) != 0:
                continue
            held.remove((fsbno, count))
            at, first = fsbno, geo.agbno_of(fsbno)
            for block in range(-(-first // chunk) * chunk, first + count - half, chunk):
                if geo.fsb(0, block) > at:
                    held.append((at, geo.fsb(0, block) - at))
                await freespace.free(tp, geo.fsb(0, block), half, owner)
                at = geo.fsb(0, block + half)
            held.append((at, fsbno + count - at))
    async with vol.transaction("truncate", 2000) as tp:  # what the AG had kept for its trees
        with suppress(OSError):
            while True:
                near = geo.fsb(0, chunk)
                got = await freespace.alloc(
                    tp,
                    near=near,
                    minlen=half + 1,
                    maxlen=200,
                    owner=owner,
                    metadata=True,
                    this_ag=True,
                )
                held.append(got)
    return held


async def release(vol: Volume, held: list[tuple[int, int]]) -> None:
    async with vol.transaction("truncate", 0) as tp:
        for fsbno, count in held:
            await freespace.free(tp, fsbno, count, Owner(OWN_UNKNOWN))


async def test_free_twice_is_corruption(tmp_path: Path, allow_logs: Any) -> None:
    allow_logs("corrupt inode B.tree")
    path = support.mkfs(tmp_path)
    async with opened(path) as vol:
        ip = await make(vol, vol.geo.root_ino)
        async with vol.transaction("inactive", 10) as tp:
            await unlinked.remove(tp, ip)
            await inobt.free(tp, ip)
        with pytest.raises(Corrupt, match="not allocated"):
            async with vol.transaction("inactive", 10) as tp:
                await inobt.free(tp, ip)
        assert not vol.shut_down
    support.assert_clean(path)


@pytest.mark.compiled
@pytest.mark.parametrize("args", [(), ("-m", "rmapbt=1"), ("-b", "size=1k")],
                         ids=["default", "rmapbt", "1k"])  # fmt: skip
async def test_sparse_chunks_in_use(tmp_path: Path, args: tuple[str, ...]) -> None:
    """Files in a sparse chunk: the judges accept it, it is read back, and it grows together."""
    path = support.mkfs(tmp_path, *args)
    async with opened(path) as vol:
        held = await crumble(vol)
        await touch(vol, range(90))
        sparse = [c for c in await records(vol, 0, finobt=False) if c.holemask]
        assert sparse
        await release(vol, held)
    support.assert_clean(path)
    async with opened(path) as vol:
        await mirrored(vol)
        root = await vol.inodes.get(vol.geo.root_ino)
        for i in range(90):
            vol.inodes.put(await namespace.lookup(vol, root, b"%d" % i))
            await namespace.unlink(vol, root, b"%d" % i)
        vol.inodes.put(root)
    support.assert_clean(path)


async def touch(vol: Volume, names: range) -> None:
    """Empty files in the root directory."""
    root = await vol.inodes.get(vol.geo.root_ino)
    for i in names:
        vol.inodes.put(await namespace.create(vol, root, b"%d" % i, 0o100644, 0, 0))
    vol.inodes.put(root)


DAMAGE = {
    "finobt differs": ("agi 0", "addr free_root", "write recs[1].free 0xfffffffffffffe00"),
    "free count": ("agi 0", "addr root", "write recs[1].freecount 60"),
    "no free inode": ("agi 0", "addr free_root", "write numrecs 0"),
    "inode in use": ("inode 131", "write core.mode 0100644"),
}


@pytest.mark.parametrize("name", DAMAGE)
async def test_damage_stops_an_allocation(tmp_path: Path, name: str, allow_logs: Any) -> None:
    """EUCLEAN before anything is changed: the volume goes on."""
    allow_logs("corrupt")
    path = support.mkfs(tmp_path)
    words = [word for command in DAMAGE[name] for word in ("-c", command)]
    subprocess.run(["xfs_db", "-x", *words, str(path)], check=True, stdout=subprocess.DEVNULL)
    async with opened(path) as vol:
        with pytest.raises(OSError, match="corrupt") as caught:
            await make(vol, vol.geo.root_ino)
        assert caught.value.errno == errno.EUCLEAN
        assert not vol.shut_down
