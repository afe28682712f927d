"""Log vectors of random objects, read back by what reads the log: the same as on disk."""

from __future__ import annotations

import dataclasses
import os
import random
from typing import Any

import numpy as np
import pytest

from alloc.jit import record_table
from fs.cache.inode import INODE
from fs.log import blocks, formats, items, replay
from fs.xfs import ag, attrblock, btkind, dirbuf, inode, superblock, symlink
from fs.xfs import layout as L
from fs.xfs.geometry import Geometry
from tests import support
from tests.fs import logwriter

AT, SOURCE, SIZE = 1 << 17, 4096, 1 << 18
UNTOUCHED = 0xEE
SEED = 20
SIZES = (512, 1024, 4096, 8192, 16384, 65536)


def memory(rng: random.Random) -> np.ndarray:
    """Random bytes to log, and behind them room for a vector."""
    mem = np.frombuffer(rng.randbytes(SIZE), np.uint8).copy()
    mem[AT:] = UNTOUCHED
    return mem


def written(mem: np.ndarray, nbytes: int, regions: int) -> list[bytes]:
    """A vector's regions; it has the size and the number of them that were promised."""
    found = formats.regions_of(mem[AT : AT + nbytes].tobytes())
    assert (mem[AT + nbytes :] == UNTOUCHED).all()
    assert sum(map(len, found)) + formats.LENGTH * len(found) == nbytes
    assert all(region and len(region) % 4 == 0 for region in found)
    assert len(found) == regions == int.from_bytes(found[0][2:4], "little")
    assert formats.vector_of(found) == mem[AT : AT + nbytes].tobytes()
    return found


@pytest.mark.parametrize("size", SIZES)
def test_whole_buffers(size: int) -> None:
    rng = random.Random(SEED)
    mem = memory(rng)
    daddr, kind = rng.randrange(1 << 50), rng.randrange(1, 19)
    regions = formats.put_whole(mem, AT, kind, daddr, SOURCE, size)
    item = written(mem, formats.whole_bytes(size), regions)
    data = mem[SOURCE : SOURCE + size].tobytes()
    pieces = {n: data[n * 128 : n * 128 + 128] for n in range(size // 128)}
    assert item == logwriter.buffer(daddr, size >> 9, kind << 11, pieces)
    parsed = items.buffer(item)
    assert (parsed.daddr, parsed.bbs, parsed.kind) == (daddr, size >> 9, kind)
    assert parsed.runs == ((0, data),)


@pytest.mark.parametrize("size", SIZES)
def test_chunks(size: int) -> None:
    """Any ranges of bytes; marks of other buffers stand beside their map."""
    rng = random.Random(SEED)
    for _ in range(50):
        mem, wanted = memory(rng), set()
        word = rng.randrange(3)
        bits = np.full(32, 0xFFFFFFFF, np.uint32)
        bits[word : word - -size // 4096] = 0
        for _ in range(rng.randrange(1, 12)):
            first = rng.randrange(size)
            last = min(size - 1, first + rng.randrange(rng.choice((1, 200, 3000))))
            formats.mark(bits, word, first, last)
            wanted |= set(range(first // 128, last // 128 + 1))
        regions = formats.put_chunks(mem, AT, 4, 77, SOURCE, size, bits, word)
        item = written(mem, formats.chunks_bytes(size, bits, word), regions)
        data = mem[SOURCE : SOURCE + size].tobytes()
        pieces = {n: data[n * 128 : n * 128 + 128] for n in wanted}
        assert item == logwriter.buffer(77, size >> 9, 4 << 11, pieces)
        items.buffer(item)


@pytest.mark.parametrize("inode_size", [512, 1024, 2048])
def test_unlinked_pointers(inode_size: int) -> None:
    rng = random.Random(SEED)
    size = 32 * inode_size
    for _ in range(20):
        mem, bits = memory(rng), np.zeros(16, np.uint32)
        changed = sorted(rng.sample(range(size // inode_size), rng.randrange(1, 9)))
        for index in changed:
            formats.mark_unlinked(bits, 0, index, inode_size)
        regions = formats.put_unlinked(mem, AT, 64, SOURCE, size, inode_size, bits, 0)
        parsed = items.buffer(written(mem, formats.chunks_bytes(size, bits, 0), regions))
        assert parsed.flags == 0x4001
        places = [index * inode_size + 96 for index in changed]
        assert [first for first, _ in parsed.runs] == [at // 128 * 128 for at in places]
        for at, (first, data) in zip(places, parsed.runs, strict=True):
            assert data[at - first :][:4] == mem[SOURCE + at :][:4].tobytes()
        mem[SOURCE + places[-1] :][:4] = 0
        assert not formats.put_unlinked(mem, AT, 64, SOURCE, size, inode_size, bits, 0)


def test_cancels_and_new_inodes() -> None:
    rng = random.Random(SEED)
    for size in SIZES:
        mem = memory(rng)
        item = written(mem, formats.cancel_bytes(size), formats.put_cancel(mem, AT, 99, size))
        assert item == logwriter.buffer(99, size >> 9, items.CANCEL)
        assert items.buffer(item).cancels
    mem, body = memory(rng), [rng.randrange(1 << 32) for _ in range(6)]
    item = written(mem, formats.CREATE_BYTES, formats.put_create(mem, AT, *body))
    assert items.create(item) == items.CreateItem(*body)


# -- inodes ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[(), ("-m", "bigtime=0", "-i", "nrext64=0"),
                                        ("-i", "size=2048,nrext64=1"), ("-i", "size=1024")],
                ids=["default", "no-bigtime", "2k-nrext64", "1k"])  # fmt: skip
def geo(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Geometry:
    path = support.mkfs(tmp_path_factory.mktemp("formats"), *request.param)
    with open(path, "rb") as file:
        return superblock.geometry(superblock.read(file.read(32768), os.path.getsize(path)))


def random_inode(rng: random.Random, geo: Geometry, table: Any, mem: np.ndarray) -> None:
    """A record, and forks at SOURCE, of any form; nothing that a file would need to make sense."""
    raw = table.view(np.uint8).reshape(1, -1)
    raw[0] = np.frombuffer(rng.randbytes(INODE.itemsize), np.uint8)
    table["flags2"] &= np.uint64(0xFF) & ~np.uint64(L.DIFLAG2_NREXT64 | L.DIFLAG2_BIGTIME)
    table["flags2"] |= np.uint64(inode.new_flags2(geo))
    for name in inode.STAMPS:
        if not geo.has_bigtime:  # else all 64 bits may be there
            table[name] = rng.randrange((1 << 32) * 10**9)
    table["nextents"] &= (1 << 47 if geo.has_nrext64 else 1 << 30) - 1
    if not geo.has_nrext64:
        table["anextents"] &= 0x7FFF
    table["mode"] |= 1
    device = rng.random() < 0.2
    borders = (0, 1) if device else (0, rng.randrange(8, geo.literal_size // 8 - 5))
    forkoff = rng.choice(borders)
    table["forkoff"] = forkoff
    sizes = (8 * forkoff or geo.literal_size, geo.literal_size - 8 * forkoff)
    for which, size in enumerate(sizes):
        form = rng.choice((L.FMT_LOCAL, L.FMT_EXTENTS, L.FMT_BTREE))
        form = L.FMT_DEV if device and not which else form
        place = mem[SOURCE + L.LITERAL + 8 * forkoff * which :][:size]
        place = np.zeros(size, np.uint8) if which and not forkoff else place
        random_fork(rng, table, place, which, form)


def random_fork(rng: random.Random, table: Any, place: np.ndarray, which: int, form: int) -> None:
    """A fork of random bytes gets a form and a size that fits."""
    table[("format", "aformat")[which]] = form
    if form == L.FMT_LOCAL:
        used = rng.randrange(4 * which, len(place))
        if which:
            place[:2] = (used >> 8, used & 0xFF)
        else:
            table["disk_size"] = used
    elif form == L.FMT_EXTENTS:
        table[("nextents", "anextents")[which]] = rng.randrange(len(place) // 16 + 1)
    elif form == L.FMT_BTREE:
        count = rng.randrange(1, inode.bmbt_maxrecs(len(place)) + 1)
        place[:4] = (0, rng.randrange(1, 5), 0, count)


def cleared(raw: np.ndarray, geo: Geometry, table: Any) -> bytes:
    """An inode's image without what its log item does not say."""
    core = raw[: L.LITERAL].view(L.DINODE)[0]
    core["crc"] = core["lsn"] = core["next_unlinked"] = 0
    core["dmevmask"] = core["dmstate"] = core["onlink"] = 0
    core["pad2"] = bytes(12)
    forkoff = 8 * int(core["forkoff"])
    sizes = [forkoff or geo.literal_size, geo.literal_size - forkoff if forkoff else 0]
    for which, (form, count) in enumerate(
        (
            (int(core["format"]), int(table["nextents"][0])),
            (int(core["aformat"]), int(table["anextents"][0])),
        )
    ):
        at, size = L.LITERAL + forkoff * which, sizes[which]
        if not size:
            continue
        place = raw[at : at + size]
        if form == L.FMT_LOCAL:
            used = int(place[0]) << 8 | int(place[1]) if which else int(core["size"])
            place[used:] = 0
        elif form == L.FMT_EXTENTS:
            place[16 * count :] = 0
        elif form == L.FMT_DEV:
            place[4:] = 0
        else:
            most, n = inode.bmbt_maxrecs(size), int(place[2]) << 8 | int(place[3])
            place[4 + 8 * n : 4 + 8 * most] = 0
            place[4 + 8 * (most + n) :] = 0
    return raw.tobytes()


def test_inodes(geo: Geometry) -> None:
    """What the cluster would get and what replay makes of the item are the same."""
    rng = random.Random(SEED)
    seen = set()
    for _ in range(400):
        mem, table = memory(rng), record_table(np.zeros(1, INODE))
        random_inode(rng, geo, table, mem)
        place = rng.randrange(1 << 40), rng.randrange(1, 129), rng.randrange(1 << 16)
        regions = formats.put_inode(geo, mem, AT, table, 0, SOURCE, place)
        item = written(mem, formats.inode_bytes(mem, table, 0, SOURCE), regions)
        parsed = items.inode(item)
        assert (parsed.ino, (parsed.daddr, parsed.bbs, parsed.offset)) == (table["ino"][0], place)
        assert item[1][96:104] == bytes.fromhex("ffffffff00000000")
        ours, theirs = np.zeros((2, geo.inode_size), np.uint8)
        inode.pack(geo, table, 0, mem, SOURCE, ours, 0)
        core: Any = theirs[: L.LITERAL].view(L.DINODE)
        replay._copy_core(parsed, core)
        replay._copy_forks(parsed, theirs)
        assert cleared(ours, geo, table) == cleared(theirs, geo, table)
        seen.add(parsed.fields)
    data, attr = {fields & 0x1F for fields in seen}, {fields & ~0x1F for fields in seen}
    assert data == {1, 1 | items.DDATA, 1 | items.DEXT, 1 | items.DBROOT, 1 | items.DEV}
    assert attr == {0, items.ADATA, items.AEXT, items.ABROOT}


def test_a_freed_inode_has_no_device(geo: Geometry) -> None:
    mem, table = memory(random.Random(SEED)), record_table(np.zeros(1, INODE))
    table["format"], table["rdev"] = L.FMT_DEV, 0x14004D
    for mode, rdev in ((0o20600, 0x14004D), (0, 0)):
        table["mode"] = mode
        formats.put_inode(geo, mem, AT, table, 0, SOURCE, (64, 32, 0))
        parsed = items.inode(formats.regions_of(mem[AT : AT + 240].tobytes()))
        assert (bool(parsed.fields & items.DEV), parsed.rdev) == (bool(mode), rdev)


# -- what blocks are ------------------------------------------------------------------------------

OPS = {
    ag.SB_OPS: {L.MAGIC_SB},
    ag.AGF_OPS: {L.MAGIC_AGF},
    ag.AGI_OPS: {L.MAGIC_AGI},
    ag.AGFL_OPS: {L.MAGIC_AGFL},
    dirbuf.DATA_OPS: {L.MAGIC_DIR_BLOCK, L.MAGIC_DIR_DATA},
    dirbuf.LEAF_OPS: {L.MAGIC_DIR_LEAF1, L.MAGIC_DIR_LEAFN, L.MAGIC_DA_NODE},
    dirbuf.FREE_OPS: {L.MAGIC_DIR_FREE},
    attrblock.ATTR_OPS: {L.MAGIC_ATTR_LEAF, L.MAGIC_DA_NODE},
    symlink.SYMLINK_OPS: {L.MAGIC_SYMLINK},
    **{kind.ops: {kind.magic} for kind in btkind.KINDS if kind.magic},
}


def test_kinds_know_where_their_lsn_is() -> None:
    known = blocks.IN_FRONT | blocks.BEHIND_SIBLINGS
    for ops, magics in OPS.items():
        for magic in magics:
            _, layout = known[magic]
            assert ops.crc_offset == L.off(layout, "crc"), ops.name
            assert ops.lsn_offset == L.off(layout, "lsn"), ops.name
    assert set().union(*OPS.values()) == set(known)
    assert inode.INODE_OPS.crc_offset is inode.INODE_OPS.lsn_offset is None


def test_content_types() -> None:
    """By the magic in front, or behind two siblings, which may be any numbers."""
    rng = random.Random(SEED)
    for front, kinds in ((True, blocks.IN_FRONT), (False, blocks.BEHIND_SIBLINGS)):
        for magic, (number, layout) in kinds.items():
            mem = np.frombuffer(rng.randbytes(512), np.uint8).copy()
            mem[100:108] = 0
            mem[100 if front else 108 :][: 4 if front else 2] = np.frombuffer(
                magic.to_bytes(4 if front else 2, "big"), np.uint8
            )
            assert blocks.content_type(mem, 100) == number
            assert blocks.header_of(mem[100:]) is layout
    mem = np.zeros(512, np.uint8)
    assert blocks.content_type(mem, 0) == 0
    mem[:2] = np.frombuffer(b"IN", np.uint8)
    assert blocks.content_type(mem, 0) == blocks.DINODE
    assert blocks.header_of(mem) is None


def test_geometry_without_a_flag_keeps_the_inodes(geo: Geometry) -> None:
    """A record that has big counts is logged with them, whatever new inodes get."""
    small = dataclasses.replace(geo, has_nrext64=False)
    mem, table = memory(random.Random(SEED)), record_table(np.zeros(1, INODE))
    table["flags2"], table["nextents"], table["anextents"] = L.DIFLAG2_NREXT64, 1 << 40, 70000
    table["format"] = table["aformat"] = L.FMT_DEV
    formats.put_inode(small, mem, AT, table, 0, SOURCE, (64, 32, 0))
    core = np.frombuffer(formats.regions_of(mem[AT : AT + 240].tobytes())[1], "<u1")
    view = core.view(L.DINODE.newbyteorder("<"))[0]
    assert (view["big_nextents"], view["nextents"], view["anextents"]) == (1 << 40, 70000, 0)
