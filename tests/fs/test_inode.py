"""Inodes between cluster and memory: round trips over real images, and each check's fault."""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc.jit import record_table
from fs.cache.inode import INODE
from fs.xfs import extents as X
from fs.xfs import fork, inode, superblock
from fs.xfs import layout as L
from fs.xfs.crc import crc_stamp
from fs.xfs.geometry import Geometry
from tests import support

Image = tuple[Geometry, np.ndarray]
compiles = settings(deadline=None)


def open_image(path: Path) -> Image:
    with open(path, "rb") as file:
        head = file.read(32768)
        geo = superblock.geometry(superblock.read(head, os.path.getsize(path)))
    return geo, np.memmap(path, np.uint8, "c")


def inode_addr(geo: Geometry, ino: int) -> int:
    agino = geo.ino_agino(ino)
    fsbno = geo.fsb(geo.ino_agno(ino), geo.agino_agbno(agino))
    return geo.fsb_to_bytes(fsbno) + geo.agino_index(agino) * geo.inode_size


@pytest.fixture(scope="module", params=[(), ("-m", "bigtime=0", "-i", "nrext64=0"),
                                        ("-i", "size=2048,nrext64=1"), ("-b", "size=64k")],
                ids=["default", "no-bigtime", "2k-nrext64", "64k"])  # fmt: skip
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Image:
    path = support.mkfs(tmp_path_factory.mktemp("inode"), *request.param)
    return open_image(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return open_image(support.mkfs(tmp_path_factory.mktemp("inode")))


# -- moving ------------------------------------------------------------------------------------


def test_chunk_as_mkfs_made_it(image: Image) -> None:
    geo, mem = image
    table = record_table(np.zeros(2, INODE))
    copy = np.zeros(geo.inode_size, np.uint8)
    for ino in range(geo.root_ino, geo.root_ino + 64):
        addr = inode_addr(geo, ino)
        before = bytes(mem[addr : addr + geo.inode_size])
        assert inode.verify(geo, mem, addr, ino) == ""
        inode.unpack(geo, mem, addr, table, 1, copy, 0)
        assert table["ino"][1] == ino
        assert bytes(copy) == before
        if not table["mode"][1]:
            continue
        mem[addr + L.LITERAL : addr + geo.inode_size] = 0
        inode.pack(geo, table, 1, copy, 0, mem, addr)
        assert bytes(mem[addr : addr + geo.inode_size]) == before
    root = mem[inode_addr(geo, geo.root_ino) :][: L.LITERAL].view(L.DINODE)[0]
    assert root["mode"] == 0o40755
    assert root["nlink"] == 2


def test_old_stamps_become_bigtime(image: Image) -> None:
    """An inode without the bigtime flag is read, and upgraded where the filesystem has it."""
    geo, mem = image
    addr = inode_addr(geo, geo.root_ino)
    saved = mem[addr : addr + geo.inode_size].copy()
    core = mem[addr : addr + L.LITERAL].view(L.DINODE)[0]
    core["flags2"] &= ~np.uint64(L.DIFLAG2_BIGTIME)
    core["mtime"] = (-5 & 0xFFFFFFFF) << 32 | 123456789
    table = record_table(np.zeros(1, INODE))
    inode.unpack_core(mem, addr, table, 0)
    wanted = ((1 << 31) - 5) * 10**9 + 123456789
    assert table["mtime"][0] == wanted
    inode.pack(geo, table, 0, mem, addr, mem, addr)
    assert bool(int(core["flags2"]) & L.DIFLAG2_BIGTIME) == geo.has_bigtime
    if geo.has_bigtime:
        assert core["mtime"] == wanted
    else:
        assert core["mtime"] == (-5 & 0xFFFFFFFF) << 32 | 123456789
    assert inode.verify(geo, mem, addr, geo.root_ino) == ""
    mem[addr : addr + geo.inode_size] = saved


def test_stamps_beyond_32_bits_are_clamped_without_bigtime(plain: Image) -> None:
    geo, mem = plain
    small = dataclasses.replace(geo, has_bigtime=False)
    addr = inode_addr(geo, geo.root_ino)
    table = record_table(np.zeros(1, INODE))
    copy = mem[addr : addr + 512].copy()
    inode.unpack_core(mem, addr, table, 0)
    table["flags2"][0] = 0
    table["atime"][0] = (2**31 + 2**33) * 10**9
    inode.pack(small, table, 0, copy, 0, copy, 0)
    assert bytes(copy[32:40]) == struct.pack(">II", 0x7FFFFFFF, 999999999)


def test_pack_leaves_the_clusters_link(plain: Image) -> None:
    geo, mem = plain
    addr = inode_addr(geo, geo.root_ino)
    table = record_table(np.zeros(1, INODE))
    image = mem[addr : addr + 512].copy()
    inode.unpack_core(mem, addr, table, 0)
    cluster = image.copy()
    core = cluster[: L.LITERAL].view(L.DINODE)[0]
    core["next_unlinked"], core["lsn"] = 200, 77
    table["size"][0], table["disk_size"][0], table["lsn"][0] = 99, 6, 78
    inode.pack(geo, table, 0, image, 0, cluster, 0)
    assert core["next_unlinked"] == 200
    assert core["lsn"] == 78
    assert core["size"] == 6
    assert inode.verify(geo, cluster, 0, geo.root_ino) == ""


def test_free_inodes(image: Image) -> None:
    """A new chunk is what mkfs makes but for the generation, and a freed inode is in order."""
    geo, mem = image
    ino = geo.root_ino + 8
    addr = inode_addr(geo, ino)
    made = mem[addr : addr + geo.inode_size].copy()
    mine = np.full(2 * geo.inode_size, 0xEE, np.uint8)
    gen = int(made[: L.LITERAL].view(L.DINODE)[0]["gen"])
    inode.init_chunk(geo, mine, 0, 2, ino, gen)
    assert bytes(mine[: geo.inode_size]) == bytes(made)
    assert inode.verify(geo, mine, geo.inode_size, ino + 1) == ""
    limits = inode.limits(geo)
    assert inode.verify_cluster_image(mine, 0, 2, limits) == inode.OK

    root = inode_addr(geo, geo.root_ino)
    used = mem[root : root + geo.inode_size].copy()
    assert not inode.is_free(used, 0)
    inode.set_next_unlinked(used, 0, ino, geo.inode_size)
    assert inode.next_unlinked(used, 0) == ino
    inode.set_next_unlinked(used, 0, L.NULL32, geo.inode_size)
    assert bytes(used) == bytes(mem[root : root + geo.inode_size])
    used[96:100] = 0  # a next inode of 0 makes the whole cluster unreadable
    assert inode.verify_cluster_image(used, 0, 1, limits) == inode.BAD_UNLINKED


# -- checking ----------------------------------------------------------------------------------

Change = Callable[[Any, np.ndarray], None]


def make(mode: int, **fields: int) -> Change:
    """A change of a root directory inode into something else."""

    def change(core: Any, image: np.ndarray) -> None:
        image[L.LITERAL :] = 0
        defaults = {"mode": mode, "format": 2, "size": 0, "nlink": 1, "forkoff": 0, "aformat": 2}
        for name, value in (defaults | fields).items():
            core[name] = value

    return change


def regular(rows: list[tuple[int, int, int, int]], **fields: int) -> Change:
    """A regular file with these extent records."""
    counts = {"nextents": len(rows), "nblocks": sum(r[2] for r in rows)}
    base = make(0o100644, **counts | fields)

    def change(core: Any, image: np.ndarray) -> None:
        base(core, image)
        for i, row in enumerate(rows):
            X.pack(image, L.LITERAL + 16 * i, *row)

    return change


def tree(level: int = 1, keys: tuple[int, ...] = (0, 9), pointer: int = 50) -> Change:
    """A regular file whose fork is a tree root."""
    base = make(0o100644, format=3, nextents=300, nblocks=400)

    def change(core: Any, image: np.ndarray) -> None:
        base(core, image)
        struct.pack_into(">HH", image, L.LITERAL, level, len(keys))
        for i, key in enumerate(keys[:20]):
            struct.pack_into(">Q", image, L.LITERAL + 4 + 8 * i, key)
            struct.pack_into(">Q", image, L.LITERAL + 4 + 160 + 8 * i, pointer)

    return change


def short_attr(raw: bytes) -> Change:
    """A regular file with this attribute fork in short form."""

    def change(core: Any, image: np.ndarray) -> None:
        make(0o100644, forkoff=24, aformat=1)(core, image)
        image[L.LITERAL + 192 : L.LITERAL + 192 + len(raw)] = np.frombuffer(raw, np.uint8)

    return change


def symlink(target: bytes, **fields: int) -> Change:
    def change(core: Any, image: np.ndarray) -> None:
        make(0o120777, format=1, size=len(target), **fields)(core, image)
        image[L.LITERAL : L.LITERAL + len(target)] = np.frombuffer(target, np.uint8)

    return change


def put(**fields: int) -> Change:
    def change(core: Any, image: np.ndarray) -> None:
        for name, value in fields.items():
            core[name] = value

    return change


GOOD: dict[str, Change] = {
    "root": put(),
    "empty file": make(0o100644),
    "extents": regular([(0, 50, 4, 0), (4, 90, 2, 1), (8, 20, 1, 0)]),
    "tree": tree(),
    "short attributes": short_attr(b"\0\x0e\x02\0" + b"\1\2\0abb" + b"\1\0\2c"),
    "symlink": symlink(b"target"),
    "fifo": make(0o10644, format=0, forkoff=1),
    "device": make(0o20644, format=0),
    "file without links, attrs empty": make(0o100644, nlink=0, forkoff=24),
    "free, with rubbish": put(mode=0, format=9, nextents=7),
    "prealloc": regular([(0, 50, 4, 1)], flags=2),
    "hint": make(0o100644, flags=0x800, extsize=4),
    "reflink": make(0o100644, flags2=8 | 2),
}

BAD: dict[str, tuple[Change, int]] = {
    "magic": (put(magic=0x494D), inode.BAD_MAGIC),
    "version": (put(version=2), inode.BAD_VERSION),
    "number": (put(ino=129), inode.BAD_INO),
    "uuid": (put(uuid=np.void(b"x" * 16)), inode.BAD_UUID),  # type: ignore[arg-type]
    "unlinked": (put(next_unlinked=0), inode.BAD_UNLINKED),
    "negative size": (put(size=1 << 63), inode.BAD_SIZE),
    "file type": (put(mode=0o30755), inode.BAD_TYPE),
    "empty directory": (put(size=0), inode.NO_SIZE),
    "blocks": (put(nblocks=1), inode.BAD_BLOCKS),
    "extents without blocks": (make(0o100644, nextents=1), inode.BAD_BLOCKS),
    "pad": (put(big_nextents=1), inode.BAD_WIDTH),
    "nrext64 flag": (put(flags2=0x18), inode.BAD_WIDTH),
    "attr count": (make(0o100644, anextents=40000, nblocks=40000), inode.TOO_MANY),
    "realtime": (put(flags=1), inode.IS_REALTIME),
    "fork offset": (put(forkoff=42), inode.BAD_FORKOFF),
    "device fork offset": (make(0o20644, format=0, forkoff=24), inode.BAD_FORKOFF),
    "local file": (make(0o100644, format=1), inode.BAD_FORMAT),
    "device format": (make(0o20644, format=2), inode.BAD_FORMAT),
    "data format": (make(0o100644, format=5), inode.BAD_FORMAT),
    "small directory": (put(format=2), inode.BAD_LOCAL),
    "large local": (put(size=400), inode.BAD_LOCAL),
    "list too long": (make(0o100644, nextents=22, nblocks=22), inode.TOO_MANY),
    "attr format": (put(aformat=3), inode.BAD_AFORMAT),
    "attr count without fork": (make(0o100644, anextents=1, nblocks=1), inode.BAD_AFORMAT),
    "hint without size": (make(0o100644, flags=0x800), inode.BAD_HINT),
    "size without hint": (make(0o100644, extsize=4), inode.BAD_HINT),
    "cow hint": (make(0o100644, cowextsize=4), inode.BAD_HINT),
    "reflink directory": (put(flags2=8 | 2), inode.BAD_FLAG),
    "order": (regular([(4, 50, 4, 0), (0, 90, 2, 0)]), inode.EXTENT_ORDER),
    "overlap": (regular([(0, 50, 4, 0), (3, 90, 2, 0)]), inode.EXTENT_ORDER),
    "no length": (regular([(0, 50, 0, 0)], nblocks=1), inode.EXTENT_SHAPE),
    "place": (regular([(0, 7 << 15, 1, 0)]), inode.EXTENT_PLACE),
    "few blocks": (regular([(0, 50, 4, 0)], nblocks=3), inode.TOO_FEW_BLOCKS),
    "root level": (tree(level=0), inode.BAD_ROOT),
    "root height": (tree(level=9), inode.BAD_ROOT),
    "root empty": (tree(keys=()), inode.BAD_ROOT),
    "root full": (tree(keys=tuple(range(21))), inode.BAD_ROOT),
    "root order": (tree(keys=(9, 9)), inode.BAD_ROOT),
    "root pointer": (tree(pointer=0), inode.BAD_ROOT),
    "root far pointer": (tree(pointer=1 << 60), inode.BAD_ROOT),
    "attr total": (short_attr(b"\1\x0e\2\0"), inode.BAD_SHORT_ATTR),
    "attr entry": (short_attr(b"\0\x0d\2\0" + b"\1\2\0abb" + b"\1\0\2c"), inode.BAD_SHORT_ATTR),
    "attr flags": (short_attr(b"\0\x08\1\0" + b"\1\0\x40a"), inode.BAD_SHORT_ATTR),
    "symlink zero": (symlink(b"ta\0get"), inode.BAD_SYMLINK),
}


def changed(image: Image, change: Change) -> tuple[Geometry, np.ndarray]:
    geo, mem = image
    addr = inode_addr(geo, geo.root_ino)
    copy = mem[addr : addr + geo.inode_size].copy()
    change(copy[: L.LITERAL].view(L.DINODE)[0], copy)
    crc_stamp(copy, 0, geo.inode_size, inode.CRC)
    return geo, copy


@pytest.mark.parametrize("name", GOOD)
def test_good(plain: Image, name: str) -> None:
    geo, copy = changed(plain, GOOD[name])
    assert inode.verify(geo, copy, 0, geo.root_ino) == ""


@pytest.mark.parametrize("name", BAD)
def test_fault(plain: Image, name: str) -> None:
    change, code = BAD[name]
    geo, copy = changed(plain, change)
    assert inode.verify(geo, copy, 0, geo.root_ino) == inode.REASONS[code]


def test_every_bit_is_under_the_checksum(plain: Image) -> None:
    geo, copy = changed(plain, put())
    for at in (300, 511):
        copy[at] ^= 1
        assert inode.verify(geo, copy, 0, geo.root_ino) == "bad checksum"
        copy[at] ^= 1
    assert inode.verify(geo, copy, 0, geo.root_ino) == ""


@compiles
@given(st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=30),
       st.sampled_from(sorted(GOOD)))  # fmt: skip
def test_rubbish_never_reads_outside(plain: Image, holes: list[tuple[int, int]], name: str) -> None:
    """Whatever the bytes are, verify answers, and unpacking what it accepts does, too."""
    geo, copy = changed(plain, GOOD[name])
    for at, value in holes:
        copy[at] = value
    copy[:2] = (0x49, 0x4E)
    crc_stamp(copy, 0, 512, inode.CRC)
    if inode.verify(geo, copy, 0, geo.root_ino) == "":
        table = record_table(np.zeros(1, INODE))
        inode.unpack(geo, copy, 0, table, 0, np.zeros(512, np.uint8), 0)


# -- heights and borders -----------------------------------------------------------------------


@pytest.mark.parametrize(("block", "data", "attr"), [(1024, 7, 4), (4096, 5, 3), (65536, 3, 2)])
def test_tree_heights(plain: Image, block: int, data: int, attr: int) -> None:
    geo = plain[0]
    geo = dataclasses.replace(geo, block_size=block)
    assert inode.levels_max(geo, inode.DATA) == data
    assert inode.levels_max(geo, inode.ATTR) == attr


class Shape:
    """As much of an in-core inode as the border rules look at."""

    def __init__(self, form: int, forkoff: int = 0, nextents: int = 0, size: int = 0) -> None:
        self.format, self.forkoff, self.nextents, self.size = form, forkoff, nextents, size
        self.data_fork = (0, forkoff * 8 or 336)


def root_of(n: int) -> np.ndarray:
    return np.frombuffer(bytearray(struct.pack(">HH", 1, n)), np.uint8)


@pytest.mark.parametrize(("shape", "size", "wanted"), [
    (Shape(L.FMT_EXTENTS), 20, (336 - 36) // 8),  # capped: room for a two-pointer root
    (Shape(L.FMT_EXTENTS), 100, (336 - 100) // 8),
    (Shape(L.FMT_EXTENTS), 300, 0),  # the data fork keeps room for a three-pointer root
    (Shape(L.FMT_EXTENTS, nextents=12), 144, 24),
    (Shape(L.FMT_EXTENTS, nextents=12), 152, 0),
    (Shape(L.FMT_EXTENTS, nextents=20), 280, 7),  # becomes a tree
    (Shape(L.FMT_EXTENTS, forkoff=24), 144, 24),
    (Shape(L.FMT_EXTENTS, forkoff=24), 160, 22),
    (Shape(L.FMT_LOCAL, size=200), 136, 25),
    (Shape(L.FMT_LOCAL, size=201), 136, 0),
    (Shape(L.FMT_DEV), 200, 1),
    (Shape(L.FMT_BTREE, forkoff=24), 150, 0),
    (Shape(L.FMT_BTREE, forkoff=24), 100, 24),
    (Shape(L.FMT_BTREE), 100, 29),
    (Shape(L.FMT_EXTENTS), 400, 0),
])  # fmt: skip
def test_border(plain: Image, shape: Any, size: int, wanted: int) -> None:
    assert fork.shortform_fit(plain[0], shape, root_of(3), size) == wanted
    assert fork.default_forkoff(plain[0]) == 24


@compiles
@given(st.integers(1, 20), st.data())
def test_respace_root(n: int, data: st.DataObject) -> None:
    least = 4 + 16 * n
    old, new = (data.draw(st.integers(least, 336)) for _ in range(2))
    keys, pointers = list(range(n)), list(range(100, 100 + n))

    def place(size: int) -> np.ndarray:
        most = (size - 4) // 16
        raw = bytearray(400)
        struct.pack_into(f">HH{n}Q", raw, 0, 1, n, *keys)
        struct.pack_into(f">{n}Q", raw, 4 + 8 * most, *pointers)
        return np.frombuffer(raw, np.uint8)

    mem = place(old)
    fork.respace_root(mem, 0, old, new)
    most = (new - 4) // 16
    assert struct.unpack_from(f">{n}Q", mem, 4) == tuple(keys)
    assert struct.unpack_from(f">{n}Q", mem, 4 + 8 * most) == tuple(pointers)
