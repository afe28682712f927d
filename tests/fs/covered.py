"""What goes home is what the log says: a check of every write of metadata, for any test.

Whenever a transaction commits, a checksum of each buffer and inode that it says it changed is kept;
whenever one of them goes home it must be the same still, and at unmount everything in core must be
as it was logged, or as it was read. So a change that nobody logged is found, which only a crash at
the right moment would show else. Not compared: LSNs and CRCs, which are stamped on the way home;
stamps and change counts of inodes, which may go home without being logged, as in XFS; sizes in
memory, of data that was not written yet. Of inode clusters only unlinked pointers are compared, for
their inodes are.

`python -m pytest -p tests.fs.covered ...` puts every test under it.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from fs.cache import buf as bufs
from fs.cache.buf import Buf, BufCache
from fs.cache.incore import INODE, S_DIRTY, S_VALID
from fs.cache.inode import Inode
from fs.log.changes import BUFFER, ORDERED, Changes
from fs.log.cil import Cil
from fs.volume import Volume
from fs.xfs import layout as L
from fs.xfs import residentino
from fs.xfs.inode import INODE_OPS

VOLATILE = ("size", "atime", "mtime", "ctime", "changecount")
assert INODE.fields is not None
CORE_BYTES = INODE.fields["image"][1]  # what the image has is in front of what only memory knows
POINTER_AT, POINTER_BYTES = L.off(L.DINODE, "next_unlinked"), 4


class Coverage:
    """All volumes of a test; `found` are the changes that nobody logged."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.found: list[str] = []
        self.compared = 0
        self._bufs: dict[tuple[int, int], tuple[int, int]] = {}  # (daddr, checksum) by handle
        self._inodes: dict[tuple[int, int], tuple[int, int]] = {}  # (ino, checksum)
        self._volumes: dict[int, Volume] = {}  # by what kernels know of it
        self._patch = patch
        self._follow_commits()
        self._follow_inodes()
        self._follow_writes()
        self._follow_flushes()

    # -- what is hooked -------------------------------------------------------------------------

    def _follow_commits(self) -> None:
        original = Cil._insert

        def insert(cil: Cil, changes: Changes, *rest: Any) -> None:
            original(cil, changes, *rest)
            vol = cil._vol
            for handle, kind in changes.bufs.items():
                self._note_buf(vol.bufs, handle, kind)
            for handle in changes.inodes:
                self._note_inode(vol, handle)

        at_once = Cil.commit_now

        def commit_now(cil: Cil, some_bufs: Any, some_inodes: Any, ticket: Any) -> None:
            handles = [row[1 : 1 + row[0]].tolist() for row in (some_bufs, some_inodes)]
            at_once(cil, some_bufs, some_inodes, ticket)
            for handle in handles[0]:
                self._note_buf(cil._vol.bufs, handle, BUFFER)
            for handle in handles[1]:
                self._note_inode(cil._vol, handle)

        self._patch.setattr(Cil, "_insert", insert)
        self._patch.setattr(Cil, "commit_now", commit_now)

    def _follow_inodes(self) -> None:
        original = Volume._read_inode

        async def read_inode(vol: Volume, ip: Inode) -> None:
            await original(vol, ip)
            self._note_inode(vol, ip.handle)

        forget = Cil.forget_inode

        def forget_inode(cil: Cil, handle: int) -> int:
            self._inodes.pop((id(cil._vol), handle), None)
            return forget(cil, handle)

        self._patch.setattr(Volume, "_read_inode", read_inode)
        self._patch.setattr(Cil, "forget_inode", forget_inode)

    def _follow_writes(self) -> None:
        original, stop = BufCache._stamp, Volume._stop

        def stamp(cache: BufCache, buf: Buf) -> None:
            self._check_buf(cache, buf)
            original(cache, buf)

        async def stopped(vol: Volume) -> None:
            await stop(vol)
            if not (vol.shut_down or vol.read_only):
                for handle in vol.inodes.handles():
                    self._check_inode(vol, handle, "at unmount")
                await self._compare_with_device(vol)
            self._forget(vol)

        self._patch.setattr(BufCache, "_stamp", stamp)
        self._patch.setattr(Volume, "_stop", stopped)

    def _follow_flushes(self) -> None:
        flush, one = residentino.flush, residentino.flush_one
        start = Volume._start

        async def started(vol: Volume, *rest: Any) -> None:
            self._volumes[id(vol.inodes.table)] = vol
            await start(vol, *rest)

        def flushed(r: Any, looks: int, most: int) -> int:
            vol = self._volumes[id(r.inodes)]
            for handle in vol.inodes.handles():
                self._check_goes(vol, handle)
            return int(flush(r, looks, most))

        def flushed_one(r: Any, handle: int, *rest: Any) -> None:
            self._check_goes(self._volumes[id(r.inodes)], handle)
            one(r, handle, *rest)

        self._patch.setattr(Volume, "_start", started)
        self._patch.setattr(residentino, "flush", flushed)
        self._patch.setattr(residentino, "flush_one", flushed_one)

    def _forget(self, vol: Volume) -> None:
        self._volumes.pop(id(vol.inodes.table), None)
        for notes, owner in ((self._bufs, id(vol.bufs)), (self._inodes, id(vol))):
            for key in [key for key in notes if key[0] == owner]:
                del notes[key]

    # -- buffers --------------------------------------------------------------------------------

    def _checksum(self, buf: Buf) -> int:
        if buf.ops is INODE_OPS:
            inode_bytes = self._inode_bytes(buf)
            rows = buf.data.reshape(-1, inode_bytes)
            return zlib.crc32(rows[:, POINTER_AT : POINTER_AT + POINTER_BYTES].tobytes())
        return zlib.crc32(self._masked(buf, buf.data.copy()))

    def _inode_bytes(self, buf: Buf) -> int:
        return 1 << next(iter(self._volumes.values())).geo.inode_log

    def _masked(self, buf: Buf, data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        for at, size in ((buf.ops.lsn_offset, 8), (buf.ops.crc_offset, 4)):
            if at is not None:
                data[at : at + size] = 0
        return data

    def _note_buf(self, cache: BufCache, handle: int, kind: int) -> None:
        buf = Buf(cache, handle)
        if kind != ORDERED or (id(cache), handle) not in self._bufs:
            self._bufs[id(cache), handle] = buf.daddr, self._checksum(buf)

    def _check_buf(self, cache: BufCache, buf: Buf) -> None:
        daddr, noted = self._bufs.get((id(cache), buf.handle), (-1, 0))
        self.compared += 1
        if daddr != buf.daddr:
            if buf.ops is not INODE_OPS:  # which go home for the sake of inodes
                self.found.append(f"{buf.ops.name} at {buf.daddr} goes home and is in no log")
        elif noted != self._checksum(buf):
            self.found.append(f"{buf.ops.name} at {buf.daddr} is not what was logged")

    async def _compare_with_device(self, vol: Volume) -> None:
        """Nothing is dirty any more."""
        cache, handle = vol.bufs, int(vol.bufs._head[bufs.H_LRU])
        while handle:
            buf = Buf(cache, handle)
            there = np.zeros(buf.size, np.uint8)
            at = 0
            for daddr, _, size in cache.parts(handle):
                await vol.dev.read(daddr << L.BB_LOG, [there[at : at + size].data])
                at += size
            if not np.array_equal(*(self._masked(buf, one) for one in (there, buf.data.copy()))):
                self.found.append(f"{buf.ops.name} at {buf.daddr} was changed and not written")
            self.compared += 1
            handle = int(cache.table["lru_next"][handle])

    # -- inodes ---------------------------------------------------------------------------------

    def _state(self, vol: Volume, handle: int) -> tuple[int, int]:
        """(ino, checksum) of an in-core inode."""
        record = vol.inodes.table[handle : handle + 1].copy()
        for name in VOLATILE:
            record[name] = 0
        ip = vol.inodes.view(handle)
        forks = b"".join(_used(*fork) for fork in _forks(vol, ip))
        return int(ip.ino), zlib.crc32(record.tobytes()[:CORE_BYTES] + forks)

    def _note_inode(self, vol: Volume, handle: int) -> None:
        self._inodes[id(vol), handle] = self._state(vol, handle)

    def _check_goes(self, vol: Volume, handle: int) -> None:
        """A dirty inode that nobody holds, and that is not in a checkpoint under way, may go."""
        record = vol.inodes.table[handle]
        dirty = record["state"] & S_DIRTY and record["state"] & S_VALID
        if dirty and not record["ilock"] and record["seq"] <= vol.xlog.ail.stable:
            self._check_inode(vol, handle, "goes home")

    def _check_inode(self, vol: Volume, handle: int, when: str) -> None:
        if not vol.inodes.table["state"][handle] & S_VALID:
            return
        self.compared += 1
        now, noted = self._state(vol, handle), self._inodes.get((id(vol), handle))
        if noted is None and not vol.inodes.table["mode"][handle]:
            return  # its chunk is gone
        if noted != now:
            self.found.append(f"inode {now[0]} is not what was logged: {when}")


def _forks(vol: Volume, ip: Inode) -> Iterator[tuple[bytes, int, int, int]]:
    """Of each fork: its bytes, format, extents and inline bytes."""
    mem = vol.arena.mem
    addr, size = ip.data_fork
    yield mem[addr : addr + size].tobytes(), ip.format, ip.nextents, ip.disk_size
    if ip.forkoff:
        addr, size = ip.attr_fork
        total = int.from_bytes(mem[addr : addr + 2].tobytes(), "big")
        yield mem[addr : addr + size].tobytes(), ip.aformat, ip.anextents, total


def _used(raw: bytes, form: int, extents: int, inline: int) -> bytes:
    """What of a fork means something."""
    if form == L.FMT_LOCAL:
        return raw[:inline]
    if form == L.FMT_EXTENTS:
        return raw[: 16 * extents]
    if form == L.FMT_BTREE:
        records = 8 * int.from_bytes(raw[2:4], "big")  # bytes of keys, and of pointers
        pointers = 4 + 8 * ((len(raw) - 4) // 16)
        return raw[: 4 + records] + raw[pointers : pointers + records]
    return b""


@pytest.fixture(autouse=True)
def coverage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Coverage]:
    """Fails a test in which something went home that was not logged."""
    watch = Coverage(monkeypatch)
    yield watch
    assert not watch.found, "\n".join(["not in the log:", *watch.found[:20]])
