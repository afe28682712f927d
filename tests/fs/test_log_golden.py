"""The kernel's own log items against ours of the same objects, and ours replayed by the kernel.

A kernel-mounted filesystem in which everything happened that has log items is shut down; its log
holds what the kernel wrote of each inode and each block last. Replayed, the image has the same
objects, and what we would log of them must be the same bytes. What may differ is named here: LSNs,
which are stamped when something goes home, CRCs likewise, and what lies around unlinked pointers.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alloc.jit import record_table
from fs.cache.inode import INODE
from fs.device.image import ImageFile
from fs.log import blocks, formats, intents, items
from fs.log.checkpoints import Checkpoint, Item
from fs.log.intents import Pending
from fs.log.items import BufItem, InodeItem
from fs.log.region import Region
from fs.log.replay import Replay
from fs.xfs import inobt, inode
from fs.xfs import layout as L
from fs.xfs.crc import crc_ok
from fs.xfs.geometry import Geometry
from tests import crashload, kernel_tree, support
from tests.fs.logwriter import LogWriter
from tests.fs.test_inobt import opened, records
from tests.fs.test_inode_images import used_inodes
from tests.fs.test_log_reader import read_log
from tests.fs.test_recovery import leave_dirty

GEOMETRIES = {
    "default": (),
    "1k": ("-b", "size=1k"),
    "64k": ("-b", "size=64k"),
    "old": ("-m", "bigtime=0", "-i", "size=1024"),
    "big counts": ("-i", "nrext64=1", "-s", "size=4096"),
    "rmapbt": ("-m", "rmapbt=1", "-n", "size=8k"),
}
SOURCE, AT = 0, 1 << 17
LSN_OF_CORE = slice(112, 120)
RECORD_BYTES = 200_000
geometries = pytest.mark.parametrize("args", GEOMETRIES.values(), ids=GEOMETRIES.keys())


# -- what the kernel does -------------------------------------------------------------------------


def fill(mnt: Path, args: tuple[str, ...]) -> None:
    """All forms, some of it gone again, with a checkpoint now and then."""
    sizes = os.statvfs(mnt)
    directory = 8192 if "size=8k" in args else max(4096, sizes.f_bsize)
    hints = kernel_tree.Hints(sizes.f_bsize, directory)
    hints.extents, hints.node = 300, sizes.f_bsize < 65536
    kernel_tree.make_tree(mnt, 3, hints)
    sync(mnt)
    for n in range(300):
        (mnt / f"gone-{n}").touch()
    sync(mnt)
    for n in range(300):
        (mnt / f"gone-{n}").unlink()
    for name in ("leaf", "deep"):
        shutil.rmtree(mnt / name, ignore_errors=True)
    os.truncate(mnt / "extents" / "many", 0)
    sync(mnt)


def sync(mnt: Path) -> None:
    subprocess.run(["sync", "-f", mnt], check=True)


def unlink_open(mnt: Path, count: int = 200) -> list[int]:
    """Files that are open and have no name: several on each unlinked list."""
    made = [os.open(mnt / f"open-{n}", os.O_CREAT | os.O_RDWR) for n in range(count)]
    sync(mnt)
    for n in range(count):
        os.unlink(mnt / f"open-{n}")
    return made


def shut_down(mnt: Path) -> None:
    fd = os.open(mnt, os.O_RDONLY)
    fcntl.ioctl(fd, crashload.GOINGDOWN, struct.pack("=I", crashload.LOGFLUSH))
    os.close(fd)


@dataclass
class Logged:
    """The last item of each object, and all of those that change nothing later."""

    inodes: dict[int, tuple[Item, InodeItem]] = field(default_factory=dict)
    buffers: dict[tuple[int, int], tuple[Item, BufItem]] = field(default_factory=dict)
    pointers: dict[int, tuple[Item, BufItem]] = field(default_factory=dict)
    cancels: list[Item] = field(default_factory=list)
    creates: list[Item] = field(default_factory=list)

    def take(self, checkpoint: Checkpoint) -> None:
        """What is cancelled is so at the checkpoint's end."""
        cancels = []
        for item in checkpoint.items():
            kind = items.kind_of(item)
            if kind == items.INODE:
                found = items.inode(item)
                self.inodes[found.ino] = item, found
            elif kind == items.ICREATE:
                self.creates.append(item)
            elif kind == items.BUF:
                buf = items.buffer(item)
                if buf.cancels:
                    cancels.append(buf)
                    self.cancels.append(item)
                elif buf.flags & items.INODE_BUF:
                    self.pointers[buf.daddr] = item, buf
                else:
                    self.buffers[buf.daddr, buf.bbs] = item, buf
        for buf in cancels:
            self.buffers.pop((buf.daddr, buf.bbs), None)
            self.pointers.pop(buf.daddr, None)
            for ino in [n for n, (_, one) in self.inodes.items() if one.daddr == buf.daddr]:
                del self.inodes[ino]


async def dirty(scratch: Path, args: tuple[str, ...]) -> tuple[Path, Geometry, Logged]:
    """An image whose log says how it was filled; files without names are left."""
    image = support.mkfs(scratch, *args)
    with support.kernel_mount(image, scratch / "mnt") as mnt:
        fill(mnt, args)
        held = unlink_open(mnt)
        shut_down(mnt)
        for fd in held:
            os.close(fd)
    region, _, found = await read_log(image)
    logged = Logged()
    for checkpoint in found:
        logged.take(checkpoint)
    return image, region.geo, logged


async def replay(image: Path, geo: Geometry) -> None:
    """What the log says goes home; nothing else happens."""
    device = ImageFile(str(image))
    _, ends, _ = await read_log(image)
    await Replay(device, geo).run(Region(device, geo), ends)
    device.close()


# -- what we would log ----------------------------------------------------------------------------


class Scratch:
    """Objects of an image, copied to one array and formatted there."""

    def __init__(self, image: Path, geo: Geometry) -> None:
        self.disk = np.memmap(image, np.uint8, "r+")
        self.geo = geo
        self.mem = np.zeros(1 << 18, np.uint8)

    def load(self, daddr: int, size: int) -> np.ndarray:
        start = daddr << L.BB_LOG
        self.mem[SOURCE : SOURCE + size] = self.disk[start : start + size]
        return self.mem[SOURCE : SOURCE + size]

    def item(self, nbytes: int, regions: int) -> Item:
        found = formats.regions_of(self.mem[AT : AT + nbytes].tobytes())
        assert len(found) == regions
        return found

    def inode(self, ino: int) -> Item:
        place = inobt.imap(self.geo, ino)
        self.load(place[0], place[1] << L.BB_LOG)
        table, image = record_table(np.zeros(1, INODE)), 1 << 16
        inode.unpack(self.geo, self.mem, SOURCE + place[2], table, 0, self.mem, image)
        assert table["ino"][0] == ino
        nbytes = formats.inode_bytes(self.mem, table, 0, image)
        return self.item(nbytes, formats.put_inode(self.geo, self.mem, AT, table, 0, image, place))

    def chunks(self, daddr: int, size: int, bits: np.ndarray) -> Item:
        kind = blocks.content_type(self.load(daddr, size), 0)
        put = formats.put_chunks(self.mem, AT, kind, daddr, SOURCE, size, bits, 0)
        return self.item(formats.chunks_bytes(size, bits, 0), put)

    def whole(self, daddr: int, size: int) -> Item:
        kind = blocks.content_type(self.load(daddr, size), 0)
        put = formats.put_whole(self.mem, AT, kind, daddr, SOURCE, size)
        return self.item(formats.whole_bytes(size), put)

    def pointers(self, daddr: int, size: int, bits: np.ndarray) -> Item:
        self.load(daddr, size)
        inode_size = self.geo.inode_size
        put = formats.put_unlinked(self.mem, AT, daddr, SOURCE, size, inode_size, bits, 0)
        return self.item(formats.chunks_bytes(size, bits, 0), put)

    def size_of(self, kind: int) -> int:
        """Bytes of a block of that content type, if it is in one piece."""
        if kind in (blocks.SB, blocks.AGF, blocks.AGFL, blocks.AGI):
            return self.geo.sector_size
        is_dir = blocks.DIR_BLOCK <= kind <= blocks.DIR_LEAFN
        return self.geo.dir_block_size if is_dir else self.geo.block_size

    def cancel(self, daddr: int, size: int) -> Item:
        put = formats.put_cancel(self.mem, AT, daddr, size)
        return self.item(formats.cancel_bytes(size), put)

    def create(self, *body: int) -> Item:
        return self.item(formats.CREATE_BYTES, formats.put_create(self.mem, AT, *body))


def bits_of(item: Item) -> np.ndarray:
    return np.frombuffer(item[0][items.BUF_HEAD.size :], np.uint32).copy()


def without(parts: tuple[tuple[int, bytes], ...], block: np.ndarray) -> bytes:
    """Logged chunks of a block, but for its LSN and CRC."""
    layout, size = blocks.header_of(block), len(block)
    assert layout is not None
    whole = np.zeros(size, np.uint8)
    for at, data in parts:
        whole[at : at + len(data)] = np.frombuffer(data, np.uint8)
    for name in ("lsn", "crc"):
        first = L.off(layout, name)
        whole[first : first + layout[name].itemsize] = 0
    return whole.tobytes()


# -- the kernel's items and ours ------------------------------------------------------------------


def fork(data: bytes, root: bool) -> bytes:
    """A fork but for LSN, CRC and padding of a root's header: a root has none on disk."""
    view = np.frombuffer(data, np.uint8).copy()
    if root:
        header = view[: L.LONG_BLOCK.itemsize].view(L.LONG_BLOCK)
        header["lsn"] = header["crc"] = header["pad"] = 0
    return view.tobytes()


def same_inode(item: Item, theirs: InodeItem, mine: Item) -> None:
    """All that the kernel logged of it; we log forks that it did not think changed, too."""
    ours = items.inode(mine)
    assert ours.fields & theirs.fields == theirs.fields, theirs.ino
    assert (ours.daddr, ours.bbs, ours.offset) == (theirs.daddr, theirs.bbs, theirs.offset)
    cores = [bytearray(one.core) for one in (theirs, ours)]
    for core in cores:
        core[LSN_OF_CORE] = bytes(8)
    assert cores[0] == cores[1], (theirs.ino, cores)
    if theirs.fields & (items.DDATA | items.DEXT | items.DBROOT):
        root = bool(theirs.fields & items.DBROOT)
        assert fork(ours.data, root) == fork(theirs.data, root), theirs.ino
    if theirs.fields & (items.ADATA | items.AEXT | items.ABROOT):
        root = bool(theirs.fields & items.ABROOT)
        assert fork(ours.attr, root) == fork(theirs.attr, root), theirs.ino
    if theirs.fields & items.DEV:
        assert ours.rdev == theirs.rdev
    if ours.fields == theirs.fields:
        assert mine[0] == item[0], theirs.ino


def same_buffer(scratch: Scratch, item: Item, theirs: BufItem) -> None:
    size, bits = theirs.bbs << L.BB_LOG, bits_of(item)
    block = scratch.load(theirs.daddr, size).copy()
    mine = scratch.chunks(theirs.daddr, size, bits)
    ours = items.buffer(mine)
    assert mine[0] == item[0], theirs
    assert without(ours.runs, block) == without(theirs.runs, block), theirs.daddr
    assert ours.kind == theirs.kind
    if len(ours.runs) == 1 and len(ours.runs[0][1]) == size:
        assert scratch.whole(theirs.daddr, size) == mine


def same_pointers(scratch: Scratch, item: Item, theirs: BufItem) -> int:
    size = theirs.bbs << L.BB_LOG
    mine = scratch.pointers(theirs.daddr, size, bits_of(item))
    assert mine[0] == item[0]
    count = 0
    for (first, ours), (again, data) in zip(items.buffer(mine).runs, theirs.runs, strict=True):
        assert first == again
        for pointer in range(96, size, scratch.geo.inode_size):
            if first <= pointer < first + len(data):
                at = pointer - first
                assert ours[at : at + 4] == data[at : at + 4], (theirs.daddr, pointer)
                count += ours[at : at + 4] != b"\xff" * 4
    return count


@geometries
@support.needs_root
async def test_the_kernels_items(args: tuple[str, ...], scratch: Path) -> None:
    image, geo, logged = await dirty(scratch, args)
    await replay(image, geo)
    here = Scratch(image, geo)
    for ino, (item, theirs) in logged.inodes.items():
        same_inode(item, theirs, here.inode(ino))
    for item, theirs_too in logged.buffers.values():
        same_buffer(here, item, theirs_too)
    chained = sum(same_pointers(here, *found) for found in logged.pointers.values())
    for item in logged.cancels:
        cancelled = items.buffer(item)
        assert here.cancel(cancelled.daddr, cancelled.bbs << L.BB_LOG) == item
    for item in logged.creates:
        made = items.create(item)
        body = (made.agno, made.agbno, made.count, made.inode_bytes, made.blocks, made.generation)
        assert here.create(*body) == item
    assert chained > 50
    assert min(len(logged.inodes) // 100, len(logged.cancels), len(logged.creates)) > 1
    fields = {1 << n for _, one in logged.inodes.values() for n in range(9) if one.fields >> n & 1}
    kinds = {one.kind for _, one in logged.buffers.values()}
    wanted = {items.CORE, items.DDATA, items.DEXT, items.DEV, items.ADATA, items.AEXT}
    assert fields >= (wanted | {items.DBROOT} if geo.block_size < 65536 else wanted)
    if geo.block_size < 65536:
        everything = set(range(blocks.BTREE, blocks.ATTR_LEAF + 1)) | {blocks.SB}
        seldom = set() if geo.has_rmap else {blocks.AGFL}  # only when a tree has grown
        assert kinds | seldom == everything - {blocks.DINODE}


# -- our items and the kernel ---------------------------------------------------------------------


async def log(image: Path, logged: list[Item]) -> dict[int, int]:
    """Write items behind what the log has, which counts no more; the LSN of each one's record."""
    log, lsns = await LogWriter(image).open(), {}
    while logged:
        part, room = [], RECORD_BYTES
        while logged and (room := room - sum(map(len, logged[-1]))) >= 0:
            part.append(logged.pop())
        lsn = await log.write(part)
        lsns.update(dict.fromkeys(map(id, part), lsn))
    log.device.close()
    return lsns


def metadata(here: Scratch, logged: Logged) -> list[tuple[int, int]]:
    """Place and size of blocks that are still what the log said last."""
    found = []
    for (daddr, bbs), (_, buf) in logged.buffers.items():
        block = here.load(daddr, bbs << L.BB_LOG)
        if blocks.content_type(block, 0) == buf.kind and bbs << L.BB_LOG == here.size_of(buf.kind):
            found.append((daddr, bbs << L.BB_LOG))
    return found


async def settled(scratch: Path, args: tuple[str, ...]) -> tuple[Path, Geometry, Logged]:
    """The same image, recovered by the kernel and unmounted."""
    image, geo, logged = await dirty(scratch, args)
    with support.kernel_mount(image, scratch / "mnt"):
        pass
    support.assert_clean(image)
    return image, geo, logged


@support.needs_root
async def test_the_kernels_intents(scratch: Path) -> None:
    """What was begun and what was done, in logs of chains until there was one of each kind."""
    seen: set[int] = set()
    for seed in range(20):
        args = ("-m", "rmapbt=1") if seed % 2 else ()
        seen |= await same_intents(leave_dirty(scratch, args, seed, 0.7, chains=True))
        if seen == set(intents.ACTIONS) | set(intents.INTENT_OF):
            return
    raise AssertionError(f"intents of types {seen} only")


async def same_intents(image: Path) -> set[int]:
    """Compares a log's intents and done items with ours; the types there were."""
    region, _, found = await read_log(image)
    seen, begun = set(), {}
    for item in (item for checkpoint in found for item in checkpoint.items()):
        kind, number = struct.unpack_from("<H6xQ", item[0])
        pending, intent = Pending(region.geo), intents.INTENT_OF.get(kind, kind)
        if kind in intents.ACTIONS:
            pending.take(kind, item, 0)
            (work,) = (one.extents for one in pending.left())
            begun[kind, number] = work
            assert intents.begin(kind, number, work) == item
            seen.add(kind)
        elif (intent, number) in begun:
            assert intents.done(intent, number, begun.pop((intent, number))) == item
            seen.add(kind)
    return seen


@geometries
@support.needs_root
async def test_replayed_inodes(args: tuple[str, ...], scratch: Path) -> None:
    """All inodes are wiped from the device, and all their clusters with them: it has them back."""
    image, geo, _ = await settled(scratch, args)
    async with opened(image) as vol:
        inos = await used_inodes(vol)
        chunks = {
            (agno, *piece)
            for agno in range(geo.agcount)
            for chunk in await records(vol, agno, finobt=False)
            for piece in inobt.pieces(geo, chunk)
        }
    here = Scratch(image, geo)
    before = {ino: stored(here, ino) for ino in inos}
    logged = [here.inode(ino) for ino in inos]
    for agno, agbno, count in chunks:
        size = geo.inode_size
        logged.append(here.create(agno, agbno, count * geo.inopblock, size, count, 7))
        here.disk[geo.agb_to_daddr(agno, agbno) << L.BB_LOG :][: count << geo.block_log] = 0x55
    here.disk.flush()
    await log(image, logged)
    with support.kernel_mount(image, scratch / "mnt", "loop,noatime"):
        pass
    support.assert_clean(image)
    assert {ino: stored(here, ino) for ino in inos} == before


def stored(here: Scratch, ino: int) -> bytes:
    """An inode on the device but for LSN and CRC, and for what a fork no longer uses."""
    daddr, _, offset = inobt.imap(here.geo, ino)
    raw = here.disk[(daddr << L.BB_LOG) + offset :][: here.geo.inode_size].copy()
    core: Any = raw[: L.LITERAL].view(L.DINODE)
    core["lsn"] = core["crc"] = 0
    forks = items.inode(here.inode(ino))
    device = raw[L.LITERAL :][:4].tobytes() if forks.fields & items.DEV else b""
    return core.tobytes() + forks.data + b"|" + forks.attr + b"|" + device


@geometries
@support.needs_root
async def test_replayed_blocks(args: tuple[str, ...], scratch: Path) -> None:
    """Blocks are wiped; what is there afterwards has the record's LSN and a CRC."""
    image, geo, logged = await settled(scratch, args)
    here = Scratch(image, geo)
    places = metadata(here, logged)
    before = {daddr: here.disk[daddr << L.BB_LOG :][:size].copy() for daddr, size in places}
    ours = {daddr: here.whole(daddr, size) for daddr, size in places}
    for daddr, size in places:
        if daddr:  # or nobody would find the log
            here.disk[daddr << L.BB_LOG :][:size] = 0
    here.disk.flush()
    lsns = await log(image, list(ours.values()))
    with support.kernel_mount(image, scratch / "mnt", "loop,noatime"):
        pass
    support.assert_clean(image)
    for daddr, size in places:
        block = here.disk[daddr << L.BB_LOG :][:size].copy()
        layout = blocks.header_of(block)
        assert layout is not None
        assert crc_ok(block, 0, size, L.off(layout, "crc"))
        lsn = int(block[: layout.itemsize].view(layout)["lsn"][0])
        if daddr:  # the superblock was logged again
            assert lsn == lsns[id(ours[daddr])]
            assert without(((0, block.tobytes()),), block) == without(
                ((0, before[daddr].tobytes()),), block
            )
    assert len(places) > 20


def is_short_leaf(block: np.ndarray) -> bool:
    """A leaf of a free-space tree with room at its end."""
    header = block[: L.SHORT_BLOCK.itemsize].view(L.SHORT_BLOCK)[0]
    return header["magic"] == L.MAGIC_BNOBT and not header["level"] and header["numrecs"] < 400


@pytest.mark.parametrize("cancelled", [False, True])
@support.needs_root
async def test_cancelled_by_us(cancelled: bool, scratch: Path) -> None:
    """An older image of a block that was freed later is not replayed."""
    image, geo, logged = await settled(scratch, ())
    here = Scratch(image, geo)
    trees = [place for place in metadata(here, logged) if is_short_leaf(here.load(*place))]
    daddr, size = trees[0]
    block = here.load(daddr, size)
    block[-8:] = 0xAB  # behind the last record
    put = formats.put_whole(here.mem, AT, blocks.BTREE, daddr, SOURCE, size)
    item = here.item(formats.whole_bytes(size), put)
    writer = await LogWriter(image).open()
    await writer.write([item])
    if cancelled:
        await writer.write([here.cancel(daddr, size)])
    writer.device.close()
    with support.kernel_mount(image, scratch / "mnt"):
        pass
    support.assert_clean(image)
    end = here.disk[(daddr << L.BB_LOG) + size - 8 :][:8].tobytes()
    assert (end == b"\xab" * 8) != cancelled


@geometries
@support.needs_root
async def test_replayed_pointers(args: tuple[str, ...], scratch: Path) -> None:
    """Lists of unlinked inodes that only the log knows: the kernel finds and frees all of them."""
    image, geo, logged = await dirty(scratch, args)
    await replay(image, geo)
    here, ours, chained = Scratch(image, geo), [], 0
    for daddr, (_, buf) in logged.pointers.items():
        size, bits = buf.bbs << L.BB_LOG, np.zeros(16, np.uint32)
        for index in range(size >> geo.inode_log):
            at = (daddr << L.BB_LOG) + (index << geo.inode_log)
            if inode.next_unlinked(here.disk, at) != L.NULL32:
                formats.mark_unlinked(bits, 0, index, geo.inode_size)
                chained += 1
        if bits.any():
            ours.append(here.pointers(daddr, size, bits))
        for at in range(daddr << L.BB_LOG, (daddr + buf.bbs) << L.BB_LOG, geo.inode_size):
            inode.set_next_unlinked(here.disk, at, L.NULL32, geo.inode_size)
    here.disk.flush()
    assert chained > 50
    await log(image, ours)
    with support.kernel_mount(image, scratch / "mnt"):
        pass
    support.assert_clean(image)


# -- where LSNs are --------------------------------------------------------------------------------

XFS_DB_TYPES = {
    L.MAGIC_SB: "sb",
    L.MAGIC_AGF: "agf",
    L.MAGIC_AGI: "agi",
    L.MAGIC_AGFL: "agfl",
    L.MAGIC_BNOBT: "bnobt",
    L.MAGIC_CNTBT: "cntbt",
    L.MAGIC_INOBT: "inobt",
    L.MAGIC_FINOBT: "finobt",
    L.MAGIC_RMAPBT: "rmapbt",
    L.MAGIC_REFCOUNTBT: "refcntbt",
    L.MAGIC_BMBT: "bmapbtd",
    L.MAGIC_SYMLINK: "symlink",
    L.MAGIC_ATTR_LEAF: "attr3",
    L.MAGIC_DIR_BLOCK: "dir3",
    L.MAGIC_DIR_DATA: "dir3",
    L.MAGIC_DIR_FREE: "dir3",
    L.MAGIC_DIR_LEAF1: "dir3",
    L.MAGIC_DIR_LEAFN: "dir3",
    L.MAGIC_DA_NODE: "dir3",
}


@support.needs_root
async def test_where_xfs_db_reads_lsns(scratch: Path) -> None:
    """Of a block of each magic there is: that LSNs are where the table says."""
    image, geo, logged = await settled(scratch, ("-m", "rmapbt=1"))
    here, seen = Scratch(image, geo), {}
    for daddr, size in metadata(here, logged):
        block = here.load(daddr, size)
        layout = blocks.header_of(block)
        assert layout is not None
        magic = block[:4].tobytes() if "forw" not in (layout.names or ()) else block[8:10].tobytes()
        lsn = int(block[: layout.itemsize].view(layout)["lsn"][0])
        if lsn:
            seen[int.from_bytes(magic, "big")] = daddr, lsn
    assert set(seen) >= set(XFS_DB_TYPES) - {L.MAGIC_AGFL}
    for magic, (daddr, lsn) in seen.items():
        words = f"daddr {daddr}", f"type {XFS_DB_TYPES[magic]}", "print"
        command = ["xfs_db", "-r", *(part for word in words for part in ("-c", word)), str(image)]
        done = subprocess.run(command, capture_output=True, text=True)
        printed = re.search(r"^\S*\blsn = (0x[0-9a-f]+|[0-9]+)", done.stdout, re.M)
        assert printed, (XFS_DB_TYPES[magic], done)
        assert int(printed[1], 0) == lsn, (XFS_DB_TYPES[magic], printed[0])
