"""The load: a few workers, each with a part of the tree, and one who syncs what they do.

Everything a log has items for, on a `Volume` without FUSE, on trio's clock. Each operation is
possible by the model, which it changes as it begins, so any exception is a failure. A worker does
one thing at a time; the syncer, the flusher and the log work meanwhile. All from a seed.
"""

from __future__ import annotations

import logging
import random
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import trio
import trio.testing

from fs import copyrange, fallocate, file, namespace, syncfs, tmpfile, truncate, xattr
from fs.cache.inode import Inode
from fs.log import region
from fs.volume import Volume
from fs.xfs import inobt, stamp
from tools.crash.disk import Disk, Record
from tools.crash.model import (
    DIRECTORY,
    FILE,
    SYMLINK,
    Ack,
    Model,
    Object,
    Part,
    State,
    Version,
    pattern,
)

LONG_AGO = 1_700_000_000 * 10**9  # nanoseconds since 1970: when the virtual clock began
SHARED = b"shared"
NAMES = 12  # in a directory: few enough that they meet
FILE_MAX = 384 << 10
HELD_MAX = 3  # files without a name that a worker uses
FILLERS = 20  # blocks that are logged again and again
SYNC_S = 0.3  # between two syncs of the syncer, on the average
PERIODS_S = (0.2, 0.5, 1.0, 3.0)  # of flusher, metadata writer and log: one is drawn for each

# operation: weight
WEIGHTS = {
    "create": 10,
    "write": 14,
    "overwrite": 8,
    "append": 6,
    "sparse": 3,
    "truncate": 6,
    "fallocate": 5,
    "copy": 5,
    "unlink": 8,
    "rename": 7,
    "exchange": 2,
    "link": 3,
    "symlink": 2,
    "mkdir": 3,
    "rmdir": 2,
    "chmod": 3,
    "setxattr": 5,
    "removexattr": 2,
    "many": 1,
    "hold": 2,
    "fsync": 6,
    "fdatasync": 2,
    "fsync_dir": 2,
}


@dataclass(frozen=True)
class Plan:
    """What is run."""

    seed: int
    ops: int = 120  # of each worker
    workers: int = 3
    memory: int = 32 << 20


class Run:
    """A load on an open volume."""

    def __init__(self, plan: Plan, vol: Volume, disk: Disk, model: Model) -> None:
        self.plan, self.vol, self.disk, self.model = plan, vol, disk, model
        self.rng = random.Random(plan.seed)
        self.idents = 0
        self.shared: Object
        self.active = plan.workers
        self.counts: dict[str, int] = {}

    def object(self, kind: str, mode: int) -> Object:
        self.idents += 1
        return Object(self.idents, kind, mode)

    @contextmanager
    def using(self, ip: Inode) -> Iterator[Inode]:
        try:
            yield ip
        finally:
            self.vol.inodes.put(ip)

    async def inode(self, obj: Object) -> Inode:
        return await self.vol.inodes.get(obj.ino)

    async def set_up(self) -> None:
        """The directories that are there from the beginning."""
        vol = self.vol
        root = await vol.inodes.get(vol.geo.root_ino)
        with self.using(root):
            self.shared = await self._top(root, SHARED)
            for number in range(self.plan.workers):
                name = b"w%d" % number
                self.model.parts.append(Part(name, await self._top(root, name)))
            await self._advance_log(root)
        await syncfs.syncfs(vol)
        self.model.start = self.disk.record.tick()

    async def _advance_log(self, root: Inode) -> None:
        """Fill the log's first round up to a random place, so that the load goes round its end."""
        vol, name, geo = self.vol, b"filler", self.vol.geo
        aim = self.rng.uniform(0.85, 1.0) * geo.log_blocks * geo.block_bbs
        value = b"\xa5" * (geo.block_size * 5 // 8)  # one in each block
        ip = await namespace.create(vol, root, name, 0o644, 0, 0)
        with self.using(ip):
            while region.place_of(vol.xlog.stream.head) < (1, aim):
                for n in range(FILLERS):
                    await xattr.set(vol, ip, b"user.%d" % n, value)
                await syncfs.syncfs(vol)
        await namespace.unlink(vol, root, name)
        await vol.drain_inactive()

    async def _top(self, root: Inode, name: bytes) -> Object:
        top = self.object(DIRECTORY, stat.S_IFDIR | 0o755)
        with self.using(await namespace.mkdir(self.vol, root, name, 0o755, 0, 0)) as ip:
            top.ino = int(ip.ino)
        return top

    async def run(self) -> None:
        await self.set_up()
        async with trio.open_nursery() as nursery:
            for part in self.model.parts:
                nursery.start_soon(Worker(self, part).run)
            nursery.start_soon(self._syncer)

    async def _syncer(self) -> None:
        """Sync other people's files, and everything, while they work."""
        rng = random.Random(self.rng.random())
        while self.active:
            await trio.sleep(rng.expovariate(1 / SYNC_S))
            if rng.random() < 0.3:
                await self.sync(None)
                continue
            part = rng.choice(self.model.parts)
            obj = rng.choice(list(part.tree.values()))
            if obj.ino and obj.kind != SYMLINK:
                await self.sync(obj, rng.random() < 0.2)

    def is_named(self, obj: Object) -> bool:
        trees = (part.tree.values() for part in self.model.parts)
        return obj is self.shared or any(obj is other for tree in trees for other in tree)

    async def sync(self, obj: Object | None, datasync: bool = False) -> None:
        """fsync of an object, or syncfs; notes what was promised by it."""
        tick = self.disk.record.tick
        if obj is None:
            begun = tick()
            await syncfs.syncfs(self.vol)
        else:
            try:
                ip = await self.inode(obj)
            except FileNotFoundError:
                return  # somebody removed it
            with self.using(ip):
                if not self.is_named(obj):
                    return  # and the number may be another's
                begun = tick()
                await file.fsync(self.vol, ip, datasync)
        self.model.acks.append(Ack(begun, tick(), obj, datasync))


class Worker:
    """Who changes one part."""

    def __init__(self, run: Run, part: Part) -> None:
        self.all, self.part, self.vol = run, part, run.vol
        self.rng = random.Random(run.rng.random())
        self.tick = run.disk.record.tick
        self.held: list[tuple[Object, Inode]] = []
        self.numbers = 0

    async def run(self) -> None:
        jobs, weights = list(WEIGHTS), list(WEIGHTS.values())
        pause = self.rng.choice((0.0, 0.005, 0.05))
        for _ in range(self.all.plan.ops):
            job = self.rng.choices(jobs, weights)[0]
            self.all.counts[job] = self.all.counts.get(job, 0) + 1
            await getattr(self, f"do_{job}")()
            await trio.sleep(self.rng.expovariate(1 / pause) if pause else 0)
        for _, ip in self.held:
            self.vol.inodes.put(ip)
        self.all.active -= 1

    # -- choosing ---------------------------------------------------------------------------------

    def any(self, *kinds: str) -> bytes | None:
        return self.rng.choice(self.part.paths(*kinds) or [None])

    def directory(self) -> bytes:
        """A directory for a new name, or the one that all share."""
        if self.rng.random() < 0.15:
            return SHARED
        return self.rng.choice(self.part.paths(DIRECTORY))

    def place(self, kind: str = FILE) -> bytes | None:
        """A name that is free."""
        above = self.directory()
        if kind == DIRECTORY:
            above = self.rng.choice(self.part.paths(DIRECTORY))
        stem = b"%d" % self.rng.randrange(NAMES)
        name = stem if self.rng.random() < 0.7 else stem * self.rng.choice((5, 60))
        prefix = b"%s-" % self.part.name if above == SHARED else b""
        path = above + b"/" + prefix + name
        return None if path in self.part.tree else path

    def top(self, path: bytes) -> Object:
        """The directory of a path, in the model."""
        above = path.rpartition(b"/")[0]
        return self.all.shared if above == SHARED else self.part.tree[above]

    async def parent(self, path: bytes) -> Inode:
        return await self.all.inode(self.top(path))

    # -- noting -----------------------------------------------------------------------------------

    @contextmanager
    def naming(self, what: str, *objects: Object) -> Iterator[None]:
        """The model's tree was changed, and now the volume's is."""
        state = State(*self.part.snapshot(), what, self.tick())
        self.part.states.append(state)
        changes = [[state.begun, 1 << 62] for _ in objects]
        for obj, change in zip(objects, changes, strict=True):
            obj.changes.append(change)
        yield
        state.ended = self.tick()
        for change in changes:
            change[1] = state.ended

    @contextmanager
    def filling(
        self, obj: Object, data: bytes, what: str, *, holes: bool = False
    ) -> Iterator[None]:
        """A file's content is becoming `data`."""
        version = Version(data, what, self.tick(), holes=holes)
        change = [version.begun, 1 << 62]
        obj.versions.append(version)
        obj.changes.append(change)
        yield
        version.ended = change[1] = self.tick()

    # -- names ------------------------------------------------------------------------------------

    async def make(self, path: bytes, mode: int = 0o644) -> Object:
        obj = self.all.object(FILE, stat.S_IFREG | mode)
        obj.versions.append(Version(b"", "empty", 0, 0))
        with self.all.using(await self.parent(path)) as dp:
            above = self.top(path)
            self.part.tree[path] = obj
            with self.naming(f"create {path!r}", obj, above):
                ip = await namespace.create(self.vol, dp, path.rpartition(b"/")[2], mode, 0, 0)
        obj.ino = int(ip.ino)
        self.vol.inodes.put(ip)
        return obj

    async def do_create(self) -> None:
        path = self.place()
        if path is not None:
            obj = await self.make(path, self.rng.choice((0o644, 0o600, 0o755)))
            if self.rng.random() < 0.6:
                await self.write(obj, 0, self.length())

    async def do_many(self) -> None:
        """Names enough that a directory gets blocks, and then fewer."""
        above = self.rng.choice(self.part.paths(DIRECTORY))
        size = self.rng.choice((20, 100, 200))
        for n in range(self.rng.randrange(10, 40)):
            path = above + b"/m%d-" % n + b"n" * size
            if path not in self.part.tree:
                await self.make(path)
        for path in [p for p in self.part.tree if p.startswith(above + b"/m")]:
            if self.rng.random() < 0.6 and self.part.tree[path].kind == FILE:
                await self.unlink(path)

    async def do_mkdir(self) -> None:
        path = self.place(DIRECTORY)
        if path is None or path.count(b"/") > 4:
            return
        obj = self.all.object(DIRECTORY, stat.S_IFDIR | 0o755)
        with self.all.using(await self.parent(path)) as dp:
            above = self.top(path)
            self.part.tree[path] = obj
            with self.naming(f"mkdir {path!r}", obj, above):
                ip = await namespace.mkdir(self.vol, dp, path.rpartition(b"/")[2], 0o755, 0, 0)
        obj.ino = int(ip.ino)
        self.vol.inodes.put(ip)

    async def do_symlink(self) -> None:
        path = self.place(SYMLINK)
        if path is None:
            return
        obj = self.all.object(SYMLINK, stat.S_IFLNK | 0o777)
        obj.target = b"t" * self.rng.choice((5, 90, 600, 1000))
        with self.all.using(await self.parent(path)) as dp:
            above = self.top(path)
            self.part.tree[path] = obj
            with self.naming(f"symlink {path!r} of {len(obj.target)} bytes", obj, above):
                name = path.rpartition(b"/")[2]
                ip = await namespace.symlink(self.vol, dp, name, obj.target, 0, 0)
        obj.ino = int(ip.ino)
        self.vol.inodes.put(ip)

    async def do_link(self) -> None:
        old, new = self.any(FILE), self.place()
        if old is None or new is None:
            return
        obj = self.part.tree[old]
        with (
            self.all.using(await self.parent(new)) as dp,
            self.all.using(await self.all.inode(obj)) as ip,
        ):
            self.part.tree[new] = obj
            with self.naming(f"link {old!r} {new!r}", obj, self.top(new)):
                await namespace.link(self.vol, dp, new.rpartition(b"/")[2], ip)

    async def unlink(self, path: bytes) -> None:
        above = self.top(path)
        with self.all.using(await self.parent(path)) as dp:
            obj = self.part.tree.pop(path)
            with self.naming(f"unlink {path!r}", obj, above):
                await namespace.unlink(self.vol, dp, path.rpartition(b"/")[2])

    async def do_unlink(self) -> None:
        path = self.any(FILE, SYMLINK)
        if path is not None:
            await self.unlink(path)

    async def do_rmdir(self) -> None:
        empty = [p for p in self.part.paths(DIRECTORY) if b"/" in p and not self.part.below(p)]
        if not empty:
            return
        path = self.rng.choice(empty)
        above = self.top(path)
        with self.all.using(await self.parent(path)) as dp:
            obj = self.part.tree.pop(path)
            with self.naming(f"rmdir {path!r}", obj, above):
                await namespace.rmdir(self.vol, dp, path.rpartition(b"/")[2])

    async def do_rename(self) -> None:
        old = self.any(FILE, SYMLINK, DIRECTORY)
        if old is None or b"/" not in old:
            return
        obj = self.part.tree[old]
        new = self.place(obj.kind)
        if self.rng.random() < 0.4:
            mates = [p for p in self.part.paths(FILE, SYMLINK) if self.part.tree[p] is not obj]
            new = self.rng.choice(mates or [None]) if obj.kind != DIRECTORY else new
        if new is None or new.startswith(old + b"/") or new.count(b"/") > 5:
            return
        tops = self.top(old), self.top(new)
        with (
            self.all.using(await self.parent(old)) as odp,
            self.all.using(await self.parent(new)) as ndp,
        ):
            target = self.part.tree.pop(new, None)
            self._move(old, new)
            touched = [obj, *tops, *([target] if target else [])]
            with self.naming(f"rename {old!r} {new!r}", *touched):
                names = old.rpartition(b"/")[2], new.rpartition(b"/")[2]
                await namespace.rename(self.vol, odp, names[0], ndp, names[1])

    def _move(self, old: bytes, new: bytes) -> None:
        tree = self.part.tree
        moved = {new + path[len(old) :]: tree.pop(path) for path in [old, *self.part.below(old)]}
        tree.update(moved)

    async def do_exchange(self) -> None:
        one, two = self.any(FILE, SYMLINK, DIRECTORY), self.any(FILE, SYMLINK, DIRECTORY)
        if one is None or two is None or b"/" not in one or b"/" not in two:
            return
        tree = self.part.tree
        related = one == two or one.startswith(two + b"/") or two.startswith(one + b"/")
        shared = SHARED in (one.split(b"/")[0], two.split(b"/")[0])
        if related or tree[one] is tree[two] or shared:
            return
        tops, objects = (self.top(one), self.top(two)), (tree[one], tree[two])
        with (
            self.all.using(await self.parent(one)) as odp,
            self.all.using(await self.parent(two)) as ndp,
        ):
            self._move(one, b"\0")
            self._move(two, one)
            self._move(b"\0", two)
            with self.naming(f"exchange {one!r} {two!r}", *tops, *objects):
                names = one.rpartition(b"/")[2], two.rpartition(b"/")[2]
                flags = namespace.EXCHANGE
                await namespace.rename(self.vol, odp, names[0], ndp, names[1], flags)

    # -- attributes -------------------------------------------------------------------------------

    async def do_chmod(self) -> None:
        path = self.any(FILE, DIRECTORY)
        assert path is not None
        obj = self.part.tree[path]
        with self.all.using(await self.all.inode(obj)) as ip:
            obj.mode = stat.S_IFMT(obj.mode) | self.rng.randrange(0o1000)
            with self.naming(f"chmod {path!r} {obj.mode:o}", obj):
                await namespace.setattr(self.vol, ip, {"mode": obj.mode})

    async def do_setxattr(self) -> None:
        path = self.any(FILE, DIRECTORY)
        assert path is not None
        obj = self.part.tree[path]
        name = b"user.%d" % self.rng.randrange(12)
        value = pattern(obj.ident, self.rng.randrange(1 << 30), 0, self.attr_length())
        with self.all.using(await self.all.inode(obj)) as ip:
            obj.xattrs[name] = value
            with self.naming(f"setxattr {path!r} {name!r} {len(value)} bytes", obj):
                await xattr.set(self.vol, ip, name, value)

    def attr_length(self) -> int:
        return self.rng.choice((3, 40, 100, 900, 3000, 9000))

    async def do_removexattr(self) -> None:
        having = [p for p, obj in self.part.tree.items() if obj.xattrs]
        if not having:
            return
        path = self.rng.choice(having)
        obj = self.part.tree[path]
        name = self.rng.choice(list(obj.xattrs))
        with self.all.using(await self.all.inode(obj)) as ip:
            del obj.xattrs[name]
            with self.naming(f"removexattr {path!r} {name!r}", obj):
                await xattr.remove(self.vol, ip, name)

    # -- content ----------------------------------------------------------------------------------

    def length(self, most: int = 128 << 10) -> int:
        return int(2 ** self.rng.uniform(0, most.bit_length() - 1))

    def file(self) -> Object | None:
        """A file with a name, or without."""
        if self.held and self.rng.random() < 0.2:
            return self.rng.choice(self.held)[0]
        path = self.any(FILE)
        return None if path is None else self.part.tree[path]

    async def write(self, obj: Object, offset: int, length: int) -> None:
        self.numbers += 1
        old = obj.data
        new = pattern(obj.ident, self.numbers, offset, length)
        data = old[:offset].ljust(offset, b"\0") + new + old[offset + length :]
        what = f"{self.numbers}: write {offset} {length}"
        with self.all.using(await self.all.inode(obj)) as ip:
            with self.filling(obj, data, what):
                done = await file.write(self.vol, ip, offset, new)
                assert done == length

    async def do_write(self) -> None:
        obj = self.file()
        if obj is not None:
            offset = self.rng.randrange(FILE_MAX // 2)
            if self.rng.random() < 0.5:
                offset = self.rng.choice((0, offset & ~4095, offset >> 6))
            await self.write(obj, offset, self.length())

    async def do_overwrite(self) -> None:
        obj = self.file()
        if obj is not None and obj.data:
            offset = self.rng.randrange(len(obj.data))
            await self.write(obj, offset, min(self.length(), len(obj.data) - offset))

    async def do_append(self) -> None:
        obj = self.file()
        if obj is not None and len(obj.data) < FILE_MAX:
            await self.write(obj, len(obj.data), self.length(32 << 10))

    async def do_sparse(self) -> None:
        obj = self.file()
        if obj is not None:
            step = self.rng.choice((2, 4, 32)) * 4096
            for at in range(0, self.rng.randrange(2, 12) * step, step):
                await self.write(obj, at, self.rng.choice((10, 1000, 4096)))

    async def do_truncate(self) -> None:
        obj = self.file()
        if obj is None:
            return
        size = self.rng.choice((0, self.rng.randrange(FILE_MAX), len(obj.data) // 2))
        data = obj.data[:size].ljust(size, b"\0")
        with self.all.using(await self.all.inode(obj)) as ip:
            with self.filling(obj, data, f"truncate {size}"):
                await truncate.truncate(self.vol, ip, size)

    async def do_fallocate(self) -> None:
        obj = self.file()
        if obj is None:
            return
        mode = self.rng.choice((0, 1, 3, 3, 3, 8, 16, 17, 32))
        at, length = self.rng.randrange(FILE_MAX // 2), self.length() + 1
        if mode in (fallocate.COLLAPSE_RANGE, fallocate.INSERT_RANGE):
            block = self.vol.geo.block_size
            blocks = len(obj.data) // block
            if blocks < 3 or len(obj.data) > FILE_MAX:
                return
            at, length = self.rng.randrange(blocks - 1) * block, block
            if at + length >= len(obj.data):
                return
        data = _after_fallocate(obj.data, at, length, mode)
        shifts = mode in (fallocate.COLLAPSE_RANGE, fallocate.INSERT_RANGE)
        with self.all.using(await self.all.inode(obj)) as ip:
            with self.filling(obj, data, f"fallocate {mode} {at} {length}", holes=shifts):
                await fallocate.fallocate(self.vol, ip, at, length, mode)

    async def do_copy(self) -> None:
        """Shares blocks, where the format can."""
        src, dst = self.file(), self.file()
        if src is None or dst is None or src is dst or not src.data:
            return
        block = self.vol.geo.block_size
        at, to = (self.rng.randrange(FILE_MAX // 4) for _ in range(2))
        if self.rng.random() < 0.7:
            at, to = at // block * block, to // block * block
        length = max(0, min(self.length(256 << 10), len(src.data) - at))
        if self.rng.random() < 0.3:
            at, to, length = 0, 0, len(src.data)
        if not length:
            return
        old = dst.data
        data = old[:to].ljust(to, b"\0") + src.data[at : at + length] + old[to + length :]
        with (
            self.all.using(await self.all.inode(src)) as sip,
            self.all.using(await self.all.inode(dst)) as dip,
        ):
            with self.filling(dst, data, f"copy of file {src.ident} {at} {to} {length}"):
                done = await copyrange.copy(self.vol, sip, at, dip, to, length)
                assert done == length

    async def do_hold(self) -> None:
        """Files that have lost their name, or never had one, and are used."""
        while len(self.held) >= HELD_MAX or (self.held and self.rng.random() < 0.3):
            _, ip = self.held.pop(self.rng.randrange(len(self.held)))
            self.vol.inodes.put(ip)
        path = self.any(FILE)
        if path is not None and self.rng.random() < 0.6:
            obj = self.part.tree[path]
            ip = await self.all.inode(obj)
            await self.unlink(path)
        else:
            obj = self.all.object(FILE, stat.S_IFREG | 0o644)
            obj.versions.append(Version(b"", "empty", 0, 0))
            with self.all.using(await self.parent(self.part.name + b"/x")) as dp:
                ip = await tmpfile.create(self.vol, dp, 0o644, 0, 0)
            obj.ino = int(ip.ino)
        self.held.append((obj, ip))

    # -- syncing ----------------------------------------------------------------------------------

    async def do_fsync(self) -> None:
        path = self.any(FILE)
        if path is not None:
            await self.all.sync(self.part.tree[path])

    async def do_fdatasync(self) -> None:
        path = self.any(FILE)
        if path is not None:
            await self.all.sync(self.part.tree[path], True)

    async def do_fsync_dir(self) -> None:
        directory = self.directory()
        top = self.all.shared if directory == SHARED else self.part.tree[directory]
        await self.all.sync(top)


def _after_fallocate(old: bytes, at: int, length: int, mode: int) -> bytes:
    """The content after fallocate(2) did what it was asked for."""
    if mode == fallocate.COLLAPSE_RANGE:
        return old[:at] + old[at + length :]
    if mode == fallocate.INSERT_RANGE:
        return old[:at] + bytes(length) + old[at:]
    size = len(old) if mode & fallocate.KEEP_SIZE else max(len(old), at + length)
    data = old.ljust(size, b"\0")
    if mode & (fallocate.PUNCH_HOLE | fallocate.ZERO_RANGE):
        data = data[:at] + bytes(length) + data[at + length :]
    return data[:size]


# -- a run ----------------------------------------------------------------------------------------


@contextmanager
def determined(seed: int) -> Iterator[None]:
    """One run for one seed: which task is next, time stamps, generations of inodes."""
    core: Any = trio._core._run
    was, now = core._ALLOW_DETERMINISTIC_SCHEDULING, stamp.now
    core._ALLOW_DETERMINISTIC_SCHEDULING = True
    core._r.seed(seed)
    inobt._generations.seed(seed)
    stamp.now = lambda: LONG_AGO + int(trio.current_time() * 1e9) + stamp.EPOCH_NS
    try:
        yield
    finally:
        core._ALLOW_DETERMINISTIC_SCHEDULING, stamp.now = was, now


def run(plan: Plan, disk: Disk, log: logging.Logger) -> tuple[Model, Record]:
    """The load from the volume's opening to its end. Raises whatever went wrong in it."""
    model = Model()

    async def main() -> None:
        async with Volume.open(disk, plan.memory, log=log, paranoid=True) as vol:
            rng = random.Random(f"periods {plan.seed}")
            vol.flusher.period_s, vol.flusher.expire_s = rng.choice(PERIODS_S), 0.5
            vol.metadata_period_s = rng.choice(PERIODS_S)
            vol.xlog.period_s = rng.choice(PERIODS_S)
            await Run(plan, vol, disk, model).run()
        if vol.shut_down:
            raise AssertionError(f"the volume shut down: {vol.shutdown_reason}")

    with determined(plan.seed):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    return model, disk.record
