"""What transactions may log: every name has a need, which fits any log and is never exceeded."""

from __future__ import annotations

import ast
import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from fs import fallocate, file, namespace, truncate, xattr
from fs.cache.buf import Buf
from fs.cache.inode import Inode
from fs.log import budget, reservation
from fs.log.budget import PLANS, Budget, Worst
from fs.log.transaction import Transaction
from fs.volume import Volume
from fs.xfs.geometry import Geometry
from tests import support
from tests.fs.imagefiles import IMAGES, a_file, opened
from tests.fs.test_reservation import GEOMETRIES, geometry_of
from tests.fs.test_sharing_mixed import Mixed, files
from tests.source import ROOT

MIB = 1 << 20
NOW = {"create now", "remove now", "inactive now"}


def names_in_use() -> set[str]:
    """Names given to Volume.transaction and to write transactions made by hand."""
    found = set()
    for path in (ROOT / "fs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = node.func
            if isinstance(called, ast.Attribute) and called.attr == "transaction":
                name = node.args[0]
            elif isinstance(called, ast.Name) and called.id == "Transaction":
                name = node.args[1]
            else:
                continue
            if isinstance(name, ast.Constant):
                found.add(name.value)
    return found - {"reader"}  # it writes nothing


def test_every_name_has_a_need() -> None:
    used = names_in_use()
    assert len(used) > 30
    assert used == PLANS.keys() - NOW


def test_an_unknown_name_is_an_error(scratch: Path) -> None:
    with pytest.raises(KeyError, match="no such thing"):
        Budget(geometry_of(support.mkfs(scratch))).need("no such thing")


def check(geo: Geometry) -> None:
    """Several of any kind fit the log; XFS's formula is kept to, and so is our own, if it fits."""
    found, costs, xfs = Budget(geo), Worst(geo), reservation.table(geo)
    log = geo.log_blocks << geo.block_log
    for name, plan in PLANS.items():
        payload, step = found.need(name)
        least, base = xfs[plan.kind].logres, plan.base(costs)
        assert payload >= least
        if payload > least:
            assert reservation.unit_bytes(geo, payload) <= log // budget.LOG_SHARE
        assert reservation.unit_bytes(geo, payload) <= log // 3, "as for the smallest log"
        assert 0 <= step <= payload
        assert bool(step) == (plan.step is not Worst.nothing)
        roomy = Budget(geo_with_log(geo, 1 << 40)).need(name)
        assert roomy.payload >= base + plan.step(costs)


def geo_with_log(geo: Geometry, log_bytes: int) -> Geometry:
    return dataclasses.replace(geo, log_blocks=log_bytes >> geo.block_log)


@pytest.mark.parametrize("arguments", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_needs_fit_any_log(scratch: Path, arguments: tuple[str, ...]) -> None:
    geo = geometry_of(support.mkfs(scratch, *arguments))
    check(geo)
    check(geo_with_log(geo, reservation.minimum_log_blocks(geo) << geo.block_log))
    check(geo_with_log(geo, 2 << 30))


# -- measured -------------------------------------------------------------------------------------


class Meter:
    """What transactions log, were every object logged whole, against their needs."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self.logged: dict[Transaction, dict[object, int]] = {}

    def add(self, tp: Transaction, what: object, size: int) -> None:
        mine = self.logged.setdefault(tp, {})
        mine[what] = max(size, mine.get(what, 0))

    def end(self, tp: Transaction) -> None:
        nbytes = sum(self.logged.pop(tp, {}).values())
        need = Budget(tp.vol.geo).need(tp.name)
        assert nbytes <= need.payload, f"{tp.name} logged {nbytes} bytes of {need.payload}"
        self.most[tp.name] = max(nbytes, self.most.get(tp.name, 0))


@contextmanager
def metered(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    meter = Meter()
    log, log_inode, invalidate = Transaction.log, Transaction.log_inode, Transaction.invalidate
    finish = Transaction._finish

    def note(tp: Transaction, buf: Buf) -> None:
        meter.add(tp, buf.daddr, buf.size + 128)
        log(tp, buf)

    def note_inode(tp: Transaction, ip: Inode) -> None:
        meter.add(tp, ("inode", ip.handle), Worst(tp.vol.geo).inodes(1))
        log_inode(tp, ip)

    def note_freed(tp: Transaction, buf: Buf) -> None:
        meter.add(tp, ("cancel", buf.daddr), 128)
        invalidate(tp, buf)

    def note_end(tp: Transaction) -> None:
        if tp._write:
            meter.end(tp)
        finish(tp)

    with monkeypatch.context() as patch:
        patch.setattr(Transaction, "log", note)
        patch.setattr(Transaction, "log_inode", note_inode)
        patch.setattr(Transaction, "invalidate", note_freed)
        patch.setattr(Transaction, "_finish", note_end)
        yield meter


FORMS = {
    **IMAGES,
    "1k rmapbt": ("-b", "size=1k", "-m", "rmapbt=1"),
    "8k directories": ("-n", "size=8k"),
}


@pytest.mark.parametrize("name", ["4k", "1k rmapbt", "64k"])
async def test_maps_keep_to_their_needs(
    scratch: Path, name: str, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = support.mkfs(scratch, *FORMS[name])
    with metered(monkeypatch) as meter:
        async with opened(image, 16 * MIB, 5, 0.02) as vol, files(vol, "abc") as inodes:
            model = Mixed(vol, inodes, 5)
            for _ in range(150):
                await model.step()
    assert {"truncate", "punch", "ioend", "reflink", "writeback allocation"} <= meter.most.keys()


class Names:
    """Names come and go in a few directories, through the general paths only."""

    def __init__(self, vol: Volume, root: Inode, seed: int) -> None:
        self.vol, self.random = vol, random.Random(seed)
        self.directories = [root]
        self.names: list[tuple[Inode, bytes]] = []

    def new(self) -> tuple[Inode, bytes]:
        n = self.random.randrange(1 << 40)
        return self.random.choice(self.directories), b"%d" % n * self.random.randrange(1, 15)

    async def create(self) -> None:
        dp, name = self.new()
        self.vol.inodes.put(await namespace.create(self.vol, dp, name, 0o644, 0, 0))
        self.names.append((dp, name))

    async def symlink(self) -> None:
        dp, name = self.new()
        target = b"t" * self.random.choice((9, 500, 1000))
        self.vol.inodes.put(await namespace.symlink(self.vol, dp, name, target, 0, 0))
        self.names.append((dp, name))

    async def mkdir(self) -> None:
        dp, name = self.new()
        ip = await namespace.mkdir(self.vol, dp, name, 0o755, 0, 0)
        self.directories.append(ip)

    async def unlink(self) -> None:
        for _ in range(min(len(self.names), 3)):
            dp, name = self.names.pop(self.random.randrange(len(self.names)))
            await namespace.unlink(self.vol, dp, name)

    async def rename(self) -> None:
        """To a new name, or over another file."""
        self.random.shuffle(self.names)
        if len(self.names) > 1:
            old = self.names.pop()
            new = self.names.pop() if self.random.random() < 0.5 else self.new()
            await namespace.rename(self.vol, *old, *new)
            self.names.append(new)

    async def attribute(self) -> None:
        if self.names:
            ip = await namespace.lookup(self.vol, *self.random.choice(self.names))
            name = b"user.%d" % self.random.randrange(40)
            size = self.random.choice((5, 100, 900, 3000, 20000))
            try:
                if self.random.random() < 0.7:
                    await xattr.set(self.vol, ip, name, bytes(size))
                else:
                    await xattr.remove(self.vol, ip, name)
            except OSError:
                pass
            self.vol.inodes.put(ip)


@pytest.mark.parametrize("name", ["4k", "1k rmapbt", "64k", "8k directories"])
async def test_names_keep_to_their_needs(
    scratch: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = support.mkfs(scratch, *FORMS[name])
    with metered(monkeypatch) as meter:
        for call in ("create_now", "unlink_now", "free_now"):
            monkeypatch.setattr(namespace, call, lambda *args: None)
        async with opened(image, 32 * MIB) as vol:
            root = await vol.inodes.get(vol.geo.root_ino)
            run = Names(vol, root, 11)
            steps = [run.create] * 6 + [run.symlink, run.mkdir, run.rename, run.unlink]
            for i in range(1500):
                await run.random.choice([*steps, run.attribute, run.attribute])()
                if i > 1000:
                    await run.unlink()
            for ip in run.directories:
                vol.inodes.put(ip)
    assert {"create", "rename", "remove", "inactive", "attr_set", "attr_rm"} <= meter.most.keys()
    assert meter.most["create"] > 3 * (1 << 10)


async def test_what_is_resident_needs_little(scratch: Path) -> None:
    """Only buffers that these paths made dirty count, each whole; and two inodes."""
    image = support.mkfs(scratch)
    async with opened(image, 32 * MIB) as vol:
        costs, root = Worst(vol.geo), await vol.inodes.get(vol.geo.root_ino)
        most = dict.fromkeys(NOW, 0)

        async def measure(name: str, call: object) -> None:
            assert callable(call)
            await vol.flush_metadata()
            assert vol.bufs.dirty_bytes == 0
            if call():
                n = vol.bufs.dirty_bytes // 512 * 128  # more headers than there can be buffers
                most[name] = max(most[name], vol.bufs.dirty_bytes + n + costs.inodes(2))

        for i in range(600):
            name = b"%d" % i * 9

            def create(name: bytes = name) -> bool:
                ip = namespace.create_now(vol, root, name, 0o100644, 0, 0, 0)
                if ip is not None:
                    vol.inodes.put(ip)
                return ip is not None

            if i % 20:
                await namespace_create(vol, root, name)
            else:
                await measure("create now", create)
                await measure("remove now", lambda name=name: namespace.unlink_now(vol, root, name))
        vol.inodes.put(root)
        needs = Budget(vol.geo)
        assert all(most[name] for name in ("create now", "remove now"))
        assert all(nbytes <= needs.need(name).payload for name, nbytes in most.items())


async def namespace_create(vol: Volume, root: Inode, name: bytes) -> None:
    vol.inodes.put(await namespace.create(vol, root, name, 0o644, 0, 0))


async def test_many_extents_in_one_transaction(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Extents that lie scattered over all AGs are freed 64 a transaction."""
    image = support.mkfs(scratch, "-m", "rmapbt=1", "-b", "size=1k")
    with metered(monkeypatch) as meter:
        async with opened(image, 32 * MIB) as vol, a_file(vol) as ip:
            size = vol.geo.block_size
            for block in range(0, 1200, 2):
                await file.write(vol, ip, block * size, b"x" * size)
            await file.fsync(vol, ip)
            await fallocate.fallocate(
                vol, ip, 10 * size, 500 * size, fallocate.PUNCH_HOLE | fallocate.KEEP_SIZE
            )
            await truncate.truncate(vol, ip, 0)
            await trio.lowlevel.checkpoint()
    assert meter.most["truncate"] > 10 * size
