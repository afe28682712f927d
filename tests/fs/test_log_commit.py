"""What transactions put into the CIL, after each of them, beside a naive twin in Python.

Objects are made and removed as in test_resident.py, most of it by kernels, some on the general
path. After each commit every object that it named must have an item whose vector is what the
object is now, the context must be as large as its items say, and nothing was allocated since the
memory for it was there.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from alloc import magazine
from alloc.arena import Arena
from fs import namespace, volume
from fs.log import blocks, cil, commit, formats, items
from fs.log.changes import BUFFER, CANCEL, INODE_ITEM, LOOSE, ORDERED, POINTERS
from fs.log.cil import Cil
from fs.volume import Volume
from fs.xfs import inobt, inode
from fs.xfs import layout as L
from tests import support
from tests.fs import logwriter
from tests.fs.dirimages import IMAGES, opened
from tests.fs.test_resident import Files, _make, _other, _remove

SCRATCH_ORDER = 6


class Twin:
    """Looks at the open context of a volume after each commit."""

    def __init__(self, vol: Volume, scratch: int) -> None:
        self.vol, self.cil, self.scratch = vol, vol.xlog.cil, scratch
        self.quick = self.general = 0

    def open_items(self) -> list[int]:
        table, found = self.cil.items, []
        item = int(self.cil._context.words[commit.C_FIRST])
        while item:
            found.append(item)
            item = int(table["next"][item])
        return found

    def vector(self, item: int) -> bytes:
        record = self.cil.items[item]
        assert record["used"] <= record["room"]
        at = int(record["vector"])
        return self.vol.arena.mem[at : at + int(record["used"])].tobytes()

    def buffer(self, handle: int) -> bytes:
        """The vector of a whole buffer, in one piece or in several."""
        parts = self.vol.bufs.parts(handle)
        mem, vector = self.vol.arena.mem, b""
        kind = blocks.content_type(mem, parts[0][1]) if len(parts) == 1 else 0
        for daddr, addr, size in parts:
            data = mem[addr : addr + size].tobytes()
            pieces = {n: data[n * 128 : n * 128 + 128] for n in range(size // 128)}
            vector += logwriter.vector(logwriter.buffer(daddr, size >> 9, kind << 11, pieces))
        return vector

    def pointers(self, handle: int) -> bytes:
        ((daddr, addr, size),) = self.vol.bufs.parts(handle)
        step, chunks = self.vol.geo.inode_size, {}
        for at in range(0, size, step):
            n = (at + L.off(L.DINODE, "next_unlinked")) // 128
            chunks[n] = self.vol.arena.mem[addr + n * 128 : addr + n * 128 + 128].tobytes()
        flags = blocks.DINODE << 11 | items.INODE_BUF
        return logwriter.vector(logwriter.buffer(daddr, size >> 9, flags, chunks))

    def inode(self, handle: int) -> bytes:
        vol, ip = self.vol, self.vol.inodes.view(handle)
        table, mem = vol.inodes.table, vol.arena.mem
        place = inobt.imap(vol.geo, ip.ino)
        formats.put_inode(vol.geo, mem, self.scratch, table, handle, ip.image_addr, place)
        n = formats.inode_bytes(mem, table, handle, ip.image_addr)
        return mem[self.scratch : self.scratch + n].tobytes()

    def check_object(self, kind: int, handle: int) -> None:
        table = self.vol.inodes.table if kind == INODE_ITEM else self.vol.bufs.table
        item = int(table["item"][handle])
        record = self.cil.items[item]
        assert item in self.open_items()
        assert record["owner"] == handle
        assert table["seq"][handle] == self.cil.seq
        if kind == ORDERED:
            assert record["kind"] in (ORDERED, POINTERS)
            return
        assert record["kind"] == kind
        makers = {BUFFER: self.buffer, POINTERS: self.pointers, INODE_ITEM: self.inode}
        vector = self.vector(item)
        assert vector == makers[kind](handle)
        assert record["regions"] == len(formats.regions_of(vector))

    def check_context(self) -> None:
        found = self.open_items()
        table = self.cil.items
        assert len(found) == len(set(found)) == self.cil.count
        assert self.cil.payload == sum(int(table["cost"][item]) for item in found)
        for item in found:
            used, regions = int(table["used"][item]), int(table["regions"][item])
            # a length in the vector becomes an operation header of 12 bytes
            assert table["cost"][item] >= used + 8 * regions
            if table["owner"][item] and table["kind"][item] != ORDERED:
                assert regions  # what was freed since is left out
            if table["kind"][item] in (CANCEL, LOOSE):
                assert table["owner"][item] == 0


def _watch(twin: Twin, mp: pytest.MonkeyPatch) -> None:
    """Have the twin look after each commit of either kind."""
    general, quick, bufs = twin.cil.commit, twin.cil.commit_now, twin.vol.bufs

    async def commit(changes: Any, ticket: Any) -> None:
        await general(changes, ticket)
        for handle, kind in changes.bufs.items():
            twin.check_object(kind, handle)
        for handle in changes.inodes:
            twin.check_object(INODE_ITEM, handle)
        twin.check_context()
        twin.general += 1

    def commit_now(touched: Any, inodes: Any, ticket: Any) -> None:
        handles = touched[1 : 1 + touched[0]].tolist()
        inode_handles = inodes[1 : 1 + inodes[0]].tolist()
        quick(touched, inodes, ticket)
        for handle in handles:
            cluster = bufs.ops_of(handle) is inode.INODE_OPS
            twin.check_object(POINTERS if cluster else BUFFER, handle)
        for handle in inode_handles:
            twin.check_object(INODE_ITEM, handle)
        twin.check_context()
        twin.quick += 1

    mp.setattr(twin.cil, "commit", commit)
    mp.setattr(twin.cil, "commit_now", commit_now)


def _forbid_memory(mp: pytest.MonkeyPatch) -> list[str]:
    """No allocation while a context is filled; returns the list of those that came then."""
    filling = [False]
    found: list[str] = []

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            filling[0] = True
            try:
                return function(*args)
            finally:
                filling[0] = False

        return call

    def noted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **words: Any) -> Any:
            if filling[0]:
                found.append(name)
            return function(*args, **words)

        return call

    mp.setattr(Cil, "_insert", guarded(Cil._insert))
    mp.setattr(cil, "insert_touched", guarded(cil.insert_touched))
    mp.setattr(magazine, "slab_alloc", noted(magazine.slab_alloc, "object"))
    mp.setattr(Arena, "try_alloc_folio", noted(Arena.try_alloc_folio, "folio"))
    return found


@pytest.mark.compiled
@pytest.mark.parametrize("arguments", IMAGES.values(), ids=IMAGES.keys())
async def test_what_is_committed(
    tmp_path: Any, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """800 operations in three directories, with a checkpoint now and then."""
    rng = random.Random(11)
    monkeypatch.setattr(volume, "METADATA_PERIOD_S", 10**6)
    path = support.mkfs(tmp_path, *arguments)
    found = _forbid_memory(monkeypatch)
    async with opened(path) as vol:
        pfn = await vol.arena.alloc_folio(SCRATCH_ORDER, 0)
        twin = Twin(vol, pfn << 12)
        _watch(twin, monkeypatch)
        root = await vol.inodes.get(vol.geo.root_ino)
        dirs = [await namespace.mkdir(vol, root, b"d%d" % i, 0o755, 0, 0) for i in range(3)]
        files: Files = {}
        for turn in range(800):
            if rng.random() < 0.05:
                await _other(vol, rng, dirs, files)
            elif rng.random() < (0.8 if turn < 500 else 0.2) or not files:
                await _make(vol, rng, dirs[: 1 if rng.random() < 0.8 else 3], files)
            else:
                await _remove(vol, rng, files)
            if rng.random() < 0.01:
                await vol.xlog.force()
        for ip in [root, *dirs, *(ip for ip in files.values() if ip is not None)]:
            vol.inodes.put(ip)
        vol.arena.put_folio(pfn)
    assert not found
    assert twin.quick > 400
    assert twin.general > 40
    support.assert_clean(path)
