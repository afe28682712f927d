"""Each operation alone: what we log of it is what the kernel logs of it, and both can replay it.

An image is prepared by the kernel and unmounted. On one copy the kernel does the operation, on
another one we do; both make it stable in the log, and nothing goes home. Compared are the items of
the checkpoints that came of it, all together: which buffers, told by what is in them and how many
there are of a kind (which free block or inode one takes is everybody's own choice); which inodes,
and which of their forks; what is cancelled and created. DIFFERENCES names what may differ and why.

Then our copy is recovered twice, by the kernel and by us: the tree is that of the volume at the
moment of the copy, down to inode numbers, blocks and nanoseconds, the inodes of both copies are
alike in all bytes, and no checker finds anything.
"""

from __future__ import annotations

import stat
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fs.cache.buf import Buf
from fs.device.image import ImageFile
from fs.log import blocks, checkpoints, head, items
from fs.log.checkpoints import Checkpoint
from fs.log.region import Region, lsn_of
from fs.log.transaction import Transaction
from fs.volume import Volume
from fs.xfs import layout as L
from fs.xfs import superblock
from fs.xfs.geometry import Geometry
from tests import kernel_tree, support
from tests.fs.test_recovery import look, recover
from tests.fs.worlds import Kernel, Ours, World

MEMORY = 64 << 20
GEOMETRIES = {
    "default": (),
    "rmapbt": ("-m", "rmapbt=1"),
    "1k": ("-b", "size=1k"),
    "sectors": ("-s", "size=4096"),
    "su": ("-l", "su=32k"),
}

# -- operations -----------------------------------------------------------------------------------

Call = tuple[Any, ...]  # a method of World, and its arguments
Calls = list[Call]
KIB = 1024
BLOCK = 4096
KEEP, PUNCH, ZERO, COLLAPSE, INSERT = 1, 3, 0x10, 8, 0x20
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


@dataclass
class Operation:
    """What it is, what is there before, and what is begun (and synced) by whoever does it."""

    act: Calls
    prepare: Calls = field(default_factory=list)
    begin: Calls = field(default_factory=list)


def names(where: str, count: int, target: str = "target") -> Calls:
    """A directory with so many names of one file."""
    links: Calls = [("link", target, f"{where}/name-of-some-length-{i:05}") for i in range(count)]
    return [("create", target), ("mkdir", where), *links]


def a_file(size: int, path: str = "f") -> Calls:
    return [("create", path), ("write", path, 0, b"x" * size)]


def pieces(count: int, path: str = "f") -> Calls:
    """Extents with a hole before each."""
    wrote: Calls = []
    for i in range(count):
        wrote += [("write", path, (2 * i + 1) * BLOCK, b"p" * BLOCK), ("sync",)]
    return [("create", path), *wrote]


D: Calls = [("mkdir", "d"), ("create", "d/old")]
F: Calls = [("create", "f")]
NEW: Calls = [("create", "d/new")]
VALUE = b"v" * 40
GROWN = [("set_attr", "f", f"user.a{i}", b"w" * 100) for i in range(8)]
MANY = [("set_attr", "f", f"user.name-{i:04}", b"w" * 100) for i in range(40)]

OPERATIONS: dict[str, Operation] = {
    "create": Operation(NEW, D),
    "create in a new chunk": Operation(NEW, [*D, ("fill", "d")]),
    "create in a block": Operation([("create", "d/x")], names("d", 30)),
    "first of all": Operation([("create", "new")]),
    "mkdir": Operation([("mkdir", "d/sub")], [*D, *(("mkdir", f"in-each-{i}") for i in range(8))]),
    "fifo": Operation([("mknod", "d/fifo", stat.S_IFIFO | 0o644, 0)], D),
    "device": Operation([("mknod", "d/dev", stat.S_IFBLK | 0o644, 0x0801)], D),
    "symlink": Operation([("symlink", "d/link", "x" * 30)], D),
    "remote symlink": Operation([("symlink", "d/link", "x" * 900)], D),
    "link": Operation([("link", "d/old", "d/new")], D),
    "unlink one of two": Operation([("unlink", "d/new")], [*D, ("link", "d/old", "d/new")]),
    "unlink": Operation([("unlink", "d/old")], D, [("open", "d/old")]),
    "unlink a second": Operation(
        [("unlink", "d/b64")],
        [("mkdir", "d"), *(("create", f"d/b{i}") for i in range(65))],
        [*(("open", f"d/b{i}") for i in range(65)), *(("unlink", f"d/b{i}") for i in range(64))],
    ),
    "inactivation": Operation(
        [("close",), ("settle",)],
        [("mkdir", "d"), *a_file(BLOCK, "d/old"), ("create", "d/new")],
        [("open", "d/old"), ("unlink", "d/old")],
    ),
    "inactivation of an empty file": Operation(
        [("close",), ("settle",)], [*D, *NEW], [("open", "d/old"), ("unlink", "d/old")]
    ),
    "inactivation of the last of a chunk": Operation(
        [("close",), ("settle",)],
        [*D, ("fill", "d", "last")],
        [("open", "d/last"), ("unlink", "d/last")],
    ),
    "rmdir": Operation([("rmdir", "d/sub")], [*D, ("mkdir", "d/sub")], [("open", "d/sub")]),
    "rename": Operation([("rename", "d/old", "d/new")], D),
    "rename over": Operation([("rename", "d/old", "d/new")], [*D, *NEW], [("open", "d/new")]),
    "rename across": Operation([("rename", "d/old", "e/new")], [*D, ("mkdir", "e")]),
    "rename a directory": Operation(
        [("rename", "d/sub", "e/sub")], [*D, ("mkdir", "d/sub"), ("mkdir", "e")]
    ),
    "exchange": Operation([("rename", "d/old", "d/new", EXCHANGE)], [*D, *NEW]),
    "exchange across": Operation(
        [("rename", "d/old", "e/sub", EXCHANGE)], [*D, ("mkdir", "e"), ("mkdir", "e/sub")]
    ),
    "whiteout": Operation([("rename", "d/old", "d/new", WHITEOUT)], D),
    "chmod": Operation([("chmod", "f", 0o600)], F),
    "chown": Operation([("chown", "f", 5, 6)], F),
    "utimes": Operation([("utime", "f", 10**18)], F),
    "write": Operation([("write", "f", 0, b"x" * 2 * BLOCK), ("fsync", "f")], F),
    "overwrite": Operation([("write", "f", 0, b"y" * BLOCK), ("fsync", "f")], a_file(2 * BLOCK)),
    "truncate down": Operation([("truncate", "f", BLOCK)], a_file(3 * BLOCK)),
    "truncate to 0": Operation([("truncate", "f", 0)], a_file(3 * BLOCK)),
    "truncate up": Operation([("truncate", "f", 9 * BLOCK)], a_file(3 * BLOCK)),
    "fallocate": Operation([("fallocate", "f", 0, 0, 16 * BLOCK)], F),
    "punch": Operation([("fallocate", "f", PUNCH, 4 * BLOCK, 4 * BLOCK)], a_file(16 * BLOCK)),
    "write into unwritten": Operation(
        [("write", "f", 4 * BLOCK, b"x" * BLOCK), ("fsync", "f")],
        [*F, ("fallocate", "f", 0, 0, 16 * BLOCK)],
    ),
    "collapse": Operation([("fallocate", "f", COLLAPSE, 4 * BLOCK, 4 * BLOCK)], a_file(16 * BLOCK)),
    "insert": Operation([("fallocate", "f", INSERT, 4 * BLOCK, 4 * BLOCK)], a_file(16 * BLOCK)),
    "attribute": Operation([("set_attr", "f", "user.a", VALUE)], F),
    "first attribute of all": Operation([("set_attr", "", "user.a", VALUE)]),
    "attribute replaced": Operation(
        [("set_attr", "f", "user.a", b"w" * 60)], [*F, ("set_attr", "f", "user.a", VALUE)]
    ),
    "attribute removed": Operation(
        [("drop_attr", "f", "user.a")], [*F, ("set_attr", "f", "user.a", VALUE)]
    ),
    "attribute leaf": Operation(
        [("set_attr", "f", "user.b", b"w" * 500)], [*F, ("set_attr", "f", "user.a", VALUE)]
    ),
    "attribute in a leaf": Operation([("set_attr", "f", "user.b", VALUE)], [*F, *GROWN]),
    "attribute leaf removed": Operation([("drop_attr", "f", "user.a3")], [*F, *GROWN]),
    "remote attribute": Operation([("set_attr", "f", "user.b", b"w" * 9000)], [*F, *GROWN]),
    "remote attribute removed": Operation(
        [("drop_attr", "f", "user.b")], [*F, *GROWN, ("set_attr", "f", "user.b", b"w" * 9000)]
    ),
    "attribute node": Operation([("set_attr", "f", "user.last", b"w" * 2000)], [*F, *MANY[:28]]),
    "attribute in a node": Operation([("set_attr", "f", "user.b", VALUE)], [*F, *MANY]),
    "directory to block": Operation([("create", "d/one-name-more-that-is-long")], names("d", 12)),
    "directory to leaf": Operation([("create", "d/" + "l" * 200)], names("d", 80)),
    "directory leaf": Operation([("create", "d/x")], names("d", 200)),
    "directory node": Operation([("create", "d/x")], names("d", 700)),
    "directory shrinks": Operation(
        [("unlink", f"d/name-of-some-length-{i:05}") for i in range(30, 90)], names("d", 90)
    ),
    "directory tree inactivated": Operation(
        [("rmdir", "d"), ("settle",)],
        [*names("d", 200), *(("unlink", f"d/name-of-some-length-{i:05}") for i in range(199))],
        [("unlink", "d/name-of-some-length-00199")],
    ),
    "extent tree": Operation(
        [("write", "f", 100 * BLOCK, b"x" * BLOCK), ("fsync", "f")],
        [*pieces(9), ("set_attr", "f", "user.a", VALUE)],
    ),
    "extent tree cut": Operation([("truncate", "f", BLOCK)], pieces(30)),
    "clone": Operation([("clone", "f", "g")], [*a_file(4 * BLOCK), ("create", "g")]),
    "copy on write": Operation(
        [("write", "g", BLOCK, b"y" * BLOCK), ("fsync", "g")],
        [*a_file(4 * BLOCK), ("create", "g"), ("clone", "f", "g")],
    ),
    "clone removed": Operation(
        [("unlink", "g"), ("settle",)],
        [*a_file(4 * BLOCK), ("create", "g"), ("clone", "f", "g"), ("sync",)],
    ),
}


async def run(world: World, calls: Calls) -> None:
    for method, *args in calls:
        if method == "fill":
            await _fill(world, *args)
        else:
            await getattr(world, method)(*args)


async def _fill(world: World, where: str, last: str = "") -> None:
    """Files until a new chunk of inodes is needed; `last` is the first file there, if wanted."""
    chunks: set[int] = set()
    for i in range(200):
        await world.create(f"{where}/{i}")
        chunk = await world.ino(f"{where}/{i}") // 64
        if chunks and chunk not in chunks:
            if last:
                await world.rename(f"{where}/{i}", f"{where}/{last}")
            else:
                await world.unlink(f"{where}/{i}")
            return
        chunks.add(chunk)
    raise AssertionError("there is no end to a chunk of inodes")


# -- what may differ ------------------------------------------------------------------------------

# Of an operation, what of the kernel's we do not log. Beside that: an inode is logged with all of
# its forks, changed or not, for we keep no track of which changed; and a buffer with all chunks.
DIFFERENCES = {
    # New inodes have an empty attribute fork there, which the superblock has to know of; ours get
    # one with their first attribute, and the superblock is logged then.
    "first of all": Counter({"SB": 1}),
}
# What we log and the kernel does not: with 1k blocks, the node above the leaf that changed.
ADDITIONS = {"remote attribute removed": Counter({"DA_NODE of 2": 1})}


# -- what was logged ------------------------------------------------------------------------------

FORKS = {
    items.DDATA: "DDATA", items.DEXT: "DEXT", items.DBROOT: "DBROOT",
    items.ADATA: "ADATA", items.AEXT: "AEXT", items.ABROOT: "ABROOT", items.DEV: "DEV",
}  # fmt: skip
TREES = {
    L.MAGIC_BNOBT: "BNO", L.MAGIC_CNTBT: "CNT", L.MAGIC_INOBT: "INO", L.MAGIC_FINOBT: "FINO",
    L.MAGIC_RMAPBT: "RMAP", L.MAGIC_REFCOUNTBT: "REFC", L.MAGIC_BMBT: "BMA",
}  # fmt: skip
TYPES = {
    number: name
    for name, number in vars(blocks).items()
    if name.isupper() and isinstance(number, int) and 4 <= number <= blocks.SB
}
HEADERS = {blocks.AGF, blocks.AGFL, blocks.AGI, blocks.SB}  # of a sector each
INTENTS = {items.EFI, items.EFD, *range(items.RUI, items.ATTRD + 1)}


@dataclass
class Shape:
    """Items, and of what; `inodes` has the forks that were logged, by what the inode is."""

    items: Counter[str] = field(default_factory=Counter)
    inodes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


async def geometry(device: ImageFile) -> Geometry:
    raw = bytearray(32768)
    await device.read(0, [memoryview(raw)])
    return superblock.geometry(superblock.read(raw, device.size))


async def end_of_log(image: Path) -> int:
    """LSN of the next record."""
    device = ImageFile(str(image), read_only=True)
    ends = await head.find(Region(device, await geometry(device)))
    device.close()
    return lsn_of(ends.cycle, ends.head)


async def logged_since(image: Path, lsn: int) -> list[Checkpoint]:
    """Checkpoints from an LSN on, up to the end of the log."""
    device = ImageFile(str(image), read_only=True)
    region = Region(device, await geometry(device))
    ends = await head.find(region)
    found: list[Checkpoint] = []
    if lsn != lsn_of(ends.cycle, ends.head):
        found = [one async for one in checkpoints.committed(region, lsn, ends.head)]
    device.close()
    return found


class Reader:
    """Says what checkpoints are about. `known` are names of inodes that were there before."""

    def __init__(self, image: Path, known: dict[int, str]) -> None:
        self._image, self._known = image, known

    def shape(self, log: list[Checkpoint]) -> Shape:
        found, places = Shape(), {}
        for item in (item for checkpoint in log for item in checkpoint.items()):
            kind = items.kind_of(item)
            if kind == items.BUF:
                buf = items.buffer(item)
                places[buf.daddr, buf.cancels] = self._buffer(buf)
            elif kind == items.INODE:
                inode = items.inode(item)
                found.inodes[self._inode(inode)] |= {
                    name for bit, name in FORKS.items() if inode.fields & bit
                }
            elif kind == items.ICREATE:
                places[item[0], False] = f"ICREATE of {items.create(item).count}"
            else:
                assert kind in INTENTS, hex(kind)
        found.items = Counter(places.values())
        return found

    def _buffer(self, buf: items.BufItem) -> str:
        if buf.cancels:
            return f"CANCEL of {buf.bbs}"
        if buf.flags & items.INODE_BUF:
            return "POINTERS"
        if buf.kind in HEADERS:
            return TYPES[buf.kind]
        if buf.kind != blocks.BTREE:
            return f"{TYPES[buf.kind]} of {buf.bbs}"
        first = buf.runs[0][1] if buf.runs[0][0] == 0 else self._block(buf.daddr)
        level = int.from_bytes(first[4:6], "big")
        return f"{TREES[int.from_bytes(first[:4], 'big')]} level {level}"

    def _block(self, daddr: int) -> bytes:
        with open(self._image, "rb") as image:
            image.seek(daddr << L.BB_LOG)
            return image.read(L.BB_SIZE)

    def _inode(self, inode: items.InodeItem) -> str:
        mode = int.from_bytes(inode.core[2:4], "little")
        return self._known.get(inode.ino) or f"new {stat.S_IFMT(mode):o}"


# -- both worlds ----------------------------------------------------------------------------------


def copy(image: Path, to: Path) -> Path:
    """Holes stay holes."""
    subprocess.run(["cp", "--sparse=always", image, to], check=True)
    return to


@dataclass
class Stage:
    """An operation on an image of a geometry."""

    scratch: Path
    operation: Operation
    known: dict[int, str] = field(default_factory=dict)

    async def prepare(self, args: tuple[str, ...]) -> Path:
        image = support.mkfs(self.scratch, *args)
        with support.kernel_mount(image, self.scratch / "mnt", "loop,noatime") as mnt:
            if self.operation.prepare:
                await run(Kernel(mnt), self.operation.prepare)
            tree = kernel_tree.snapshot(mnt, exact=True)
        for name, node in sorted(tree.items()):
            self.known.setdefault(node["ino"], name.decode())
        return image

    async def theirs(self, image: Path) -> Shape:
        with support.kernel_mount(image, self.scratch / "mnt", "loop,noatime") as mnt:
            world = Kernel(mnt)
            try:
                await run(world, self.operation.begin)
                await world.sync()
                start = await end_of_log(image)
                await run(world, self.operation.act)
                await world.sync()
                log = await logged_since(image, start)
            finally:
                await world.close()
        return Reader(image, self.known).shape(log)

    async def ours(self, image: Path, crashed: Path) -> tuple[Shape, kernel_tree.Snapshot]:
        device = ImageFile(str(image))
        async with Volume.open(device, MEMORY, paranoid=True) as vol:
            world = Ours(vol)
            try:
                await run(world, self.operation.begin)
                await world.sync()
                start = vol.xlog.stream.head
                await run(world, self.operation.act)
                await world.sync()
                tree = await kernel_tree.snapshot_volume(vol, exact=True)
                copy(image, crashed)
                log = await logged_since(crashed, start)
            finally:
                await world.close()
        device.close()
        return Reader(image, self.known).shape(log), tree


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
@support.needs_root
async def test_operation(geometry: str, name: str, scratch: Path) -> None:
    stage = Stage(scratch, OPERATIONS[name])
    image = await stage.prepare(GEOMETRIES[geometry])
    theirs = await stage.theirs(copy(image, scratch / "theirs"))
    ours, tree = await stage.ours(image, scratch / "crashed")
    complaints = differences(name, ours, theirs)
    assert not complaints, "\n".join([name, *complaints])
    await judge(scratch, image, tree)


@pytest.mark.parametrize("name", ["create", "fifo", "unlink", "inactivation of an empty file"])
@support.needs_root
async def test_step_by_step(name: str, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one kernel does if nothing has to be waited for, as it is done else."""
    monkeypatch.setattr(Volume, "admits", lambda *_: None)
    await test_operation("default", name, scratch)


@pytest.mark.parametrize("magic", [b"XAGI", b"FIB3"])
@support.needs_root
async def test_what_is_left_out_is_seen(
    magic: bytes, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Transaction.log

    def forgetful(tp: Transaction, buf: Buf) -> None:
        if buf.data[:4].tobytes() != magic:
            log(tp, buf)

    monkeypatch.setattr(Volume, "admits", lambda *_: None)
    stage = Stage(scratch, OPERATIONS["create"])
    image = await stage.prepare(())
    theirs = await stage.theirs(copy(image, scratch / "theirs"))
    monkeypatch.setattr(Transaction, "log", forgetful)
    ours, _ = await stage.ours(image, scratch / "crashed")
    what = {b"XAGI": "AGI", b"FIB3": "FINO level 0"}[magic]
    assert differences("create", ours, theirs) == [f"missing: 1 {what}"]
    with support.kernel_mount(scratch / "crashed", scratch / "mnt"):
        pass
    with pytest.raises(AssertionError, match="xfs_repair"):
        support.assert_clean(scratch / "crashed")


def differences(name: str, ours: Shape, theirs: Shape) -> list[str]:
    more = ours.items - theirs.items - ADDITIONS.get(name, Counter())
    less = theirs.items - ours.items - DIFFERENCES.get(name, Counter())
    said = [f"too much: {n} {what}" for what, n in more.items()]
    said += [f"missing: {n} {what}" for what, n in less.items()]
    for what in sorted(ours.inodes.keys() | theirs.inodes.keys()):
        if what not in ours.inodes:
            said.append(f"missing: inode {what}")
        elif what not in theirs.inodes:
            said.append(f"too much: inode {what}")
        elif not ours.inodes[what] >= theirs.inodes[what]:
            said.append(f"inode {what}: {ours.inodes[what]}, they {theirs.inodes[what]}")
    return said


async def judge(scratch: Path, image: Path, tree: kernel_tree.Snapshot) -> None:
    """Two copies are recovered; `image` was unmounted as it should be."""
    crashed, again = scratch / "crashed", copy(scratch / "crashed", scratch / "again")
    with support.kernel_mount(crashed, scratch / "mnt", "loop,noatime") as mnt:
        assert not kernel_tree.diff(tree, kernel_tree.snapshot(mnt, exact=True))
    await recover(again)
    (_, by_kernel), (our_tree, by_us) = await look(crashed), await look(again)
    assert not kernel_tree.diff(tree, our_tree)
    assert by_kernel == by_us
    for one in (crashed, again, image):
        support.assert_clean(one)
