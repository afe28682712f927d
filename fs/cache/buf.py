"""The buffer cache: verified metadata blocks, kept in the arena, named by daddr.

A buffer is a descriptor (slab record) and its bytes (a folio, pages that vmalloc shows in a row, or
a slab object for blocks smaller than a page). It is read once, checked (CRC first, then the
structure's own verifier) and only then visible. Modified buffers stay on a dirty list until the
metadata writer copies them, stamps their CRC and writes neighbours in one device write.

Invariants: one buffer per daddr; a buffer with holders, dirty or being written is never reclaimed;
a reader of a block that somebody else reads waits for that read; what a checkpoint of the log
contains is not written before that is stable.

Locking: trio thread only; everything between awaits is atomic. Buffers have no lock of their own:
who may modify which block follows from the inode's ILOCK and the space lock. The writer passes by
what a transaction holds, which may be half-changed, and copies before it writes, so a block may
change while an older image of it is on its way; a second write of it waits for the first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import trio

from alloc import gfp, lockdep
from alloc.arena import Arena
from alloc.jit import helper, kernel
from alloc.watermarks import KB_PER_PAGE
from fs.cache.lock import Mutex
from fs.cache.thread import (
    bucket_of,
    chain_find,
    chain_insert,
    chain_remove,
    list_append,
    list_remove,
)
from fs.device.base import Device
from fs.errors import Corrupt
from fs.log import ail
from fs.log.ail import EVERYTHING, Ail
from fs.xfs import layout as L
from fs.xfs.crc import crc_ok, crc_stamp
from fs.xfs.geometry import Geometry

PAGE_SIZE = 4096

BUF = np.dtype(
    [
        ("daddr", "i8"),  # BBs from the start of the device; -1 once invalidated
        ("addr", "i8"),  # byte offset of the data in the arena
        ("owner", "i8"),  # ino that owned the block when it was verified, or 0
        ("size", "u4"),  # bytes
        ("flags", "u4"),
        ("hold", "u4"),  # running users
        ("ops", "u4"),  # index of the BufOps
        ("hash_next", "u4"),
        ("lru_prev", "u4"),
        ("lru_next", "u4"),
        ("dirty_prev", "u4"),
        ("dirty_next", "u4"),
        ("data", "u4"),  # number of the first page or index of the slab object
        # What the log knows of it (fs/log/cil.py, fs/log/ail.py).
        ("seq", "i8"),  # the newest checkpoint that contains it
        ("held", "i8"),  # the stable checkpoint that it keeps in the log, or 0
        ("lsn", "i8"),  # to be stamped when it is written
        ("item", "u4"),  # its item in the checkpoint that is filled, and in the one that is
        ("going", "u4"),  # being written; 0: none
        ("pad", "u1", (32,)),
    ]
)
assert BUF.itemsize == 128

F_VALID, F_DIRTY, F_WRITING, F_STALE, F_REFERENCED, F_PIECES, F_TOUCHED = 1, 2, 4, 8, 16, 32, 64

# Words of the cache's head array.
H_LRU, H_DIRTY = 0, 2  # two words each: first and last
H_COUNT, H_DIRTY_BYTES, H_WORDS = 4, 5, 6


def _no_fault(geo: Geometry, buf: Buf, owner: int | None) -> str:
    return ""


@dataclass(frozen=True, eq=False)
class BufOps:
    """What a kind of metadata block is: its checks, and where its CRC and its LSN are.

    `verify(geo, buf, owner)` returns a reason, or "" if the block is sound. Both offsets are None
    for inode clusters, whose inodes carry a CRC and an LSN each.
    """

    name: str
    crc_offset: int | None
    verify: Callable[[Geometry, Buf, int | None], str] = _no_fault
    lsn_offset: int | None = None


class Buf:
    """A held buffer. Valid until it is released; kernels take `(buf.mem, buf.addr)`."""

    __slots__ = ("_cache", "addr", "daddr", "handle", "mem", "size")

    def __init__(self, cache: BufCache, handle: int) -> None:
        self._cache = cache
        self.handle = handle
        self.mem: np.ndarray[Any, np.dtype[np.uint8]] = cache.mem
        self.addr, self.size, self.daddr = _identity(cache.table, handle)

    @property
    def bbs(self) -> int:
        return self.size >> L.BB_LOG

    @property
    def data(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return self.mem[self.addr : self.addr + self.size]

    @property
    def ops(self) -> BufOps:
        return self._cache.ops_of(self.handle)

    @ops.setter
    def ops(self, ops: BufOps) -> None:
        self._cache.set_ops(self.handle, ops)

    @property
    def dirty(self) -> bool:
        return bool(self._cache.flags[self.handle] & F_DIRTY)

    def rec(self, dtype: np.dtype[Any], at: int = 0) -> Any:
        """The structure at byte `at` as a record; assignments go to the buffer."""
        start = self.addr + at
        return self.mem[start : start + dtype.itemsize].view(dtype)[0]


# -- kernels --------------------------------------------------------------------------------------
# `t` is the slab table (the arena as BUF records), `head` the cache's words, `buckets` the hash.


def _table_args(*rest: Any) -> Callable[[], tuple[Any, ...]]:
    return lambda: (np.zeros(1, BUF), np.zeros(H_WORDS, np.int64), *rest)


_BUCKETS = np.zeros(1, np.uint32)


@kernel(lambda: (np.zeros(1, BUF), 1))
def _identity(t, h):
    """What a view of a buffer knows of it: address, size and daddr."""
    return np.int64(t["addr"][h]), np.int64(t["size"][h]), np.int64(t["daddr"][h])


@kernel(lambda: (np.zeros(1, BUF), 1))
def _release(t, h):
    """Drop a hold: 1 if the buffer is to be freed, 0, or -1 if nobody held it."""
    if t["hold"][h] == 0:
        return -1
    t["hold"][h] -= np.uint32(1)
    return 1 if t["hold"][h] == 0 and t["flags"][h] & (F_STALE | F_WRITING) == F_STALE else 0


@kernel(_table_args(_BUCKETS, 1))
def _hold(t, head, buckets, daddr):
    """Find a valid buffer and hold it; 0 if there is none, -1 if its read is under way."""
    h = chain_find(t["daddr"], t["hash_next"], buckets, daddr)
    if h == 0:
        return 0
    if not t["flags"][h] & F_VALID:
        return -1
    t["hold"][h] += 1
    t["flags"][h] |= F_REFERENCED
    return h


@kernel(_table_args(_BUCKETS, 1))
def _insert(t, head, buckets, h):
    chain_insert(t["hash_next"], buckets, bucket_of(buckets, np.int64(t["daddr"][h])), h)
    list_append(t["lru_prev"], t["lru_next"], head, H_LRU, h)
    head[H_COUNT] += 1


@kernel(_table_args(_BUCKETS, 1))
def _remove(t, head, buckets, h):
    chain_remove(t["hash_next"], buckets, bucket_of(buckets, np.int64(t["daddr"][h])), h)
    list_remove(t["lru_prev"], t["lru_next"], head, H_LRU, h)
    head[H_COUNT] -= 1


@kernel(_table_args(1))
def mark_dirty(t, head, h):
    """Put a buffer on the dirty list."""
    if not t["flags"][h] & F_DIRTY:
        t["flags"][h] |= F_DIRTY
        list_append(t["dirty_prev"], t["dirty_next"], head, H_DIRTY, h)
        head[H_DIRTY_BYTES] += t["size"][h]


@kernel(_table_args(1))
def _mark_clean(t, head, h):
    if t["flags"][h] & F_DIRTY:
        t["flags"][h] &= ~np.uint32(F_DIRTY)
        list_remove(t["dirty_prev"], t["dirty_next"], head, H_DIRTY, h)
        head[H_DIRTY_BYTES] -= t["size"][h]


@helper
def _may_go(t, held, h):
    """Is a dirty buffer whole, and all of it in the log?"""
    if t["flags"][h] & (F_WRITING | F_DIRTY) != F_DIRTY or t["hold"][h]:
        return False
    return not ail.is_pinned(held, t["seq"][h])


@kernel(_table_args(ail.sample(), np.zeros(1, np.int64), 1))
def _collect_dirty(t, head, held, out, most):
    """Handles of buffers that may go home and hold a checkpoint up to `most`; returns how many."""
    n, h = 0, head[H_DIRTY]
    while h and n < out.size:
        if t["held"][h] <= most and _may_go(t, held, h):
            out[n] = h
            n += 1
        h = np.int64(t["dirty_next"][h])
    return n


@kernel(_table_args(ail.sample(), 1))
def _goes(t, head, held, h):
    return _may_go(t, held, h)


@kernel(_table_args(1))
def _depart(t, head, h):
    """A buffer goes home: the checkpoint that it held so far, or 0."""
    _mark_clean(t, head, h)
    t["flags"][h] |= F_WRITING
    kept = t["held"][h]
    t["held"][h] = 0
    return kept


@helper
def keep_in_log(t, held, h, seq):
    """The buffer holds checkpoint `seq`, or the older one that it holds already."""
    before = t["held"][h]
    if before == 0 or before > seq:
        ail.hold(held, seq)
        ail.release(held, before)
        t["held"][h] = seq


@kernel(_table_args(ail.sample(), 1, 1))
def _return(t, head, held, h, kept):
    """A buffer could not be written: it is dirty, and holds what it held."""
    mark_dirty(t, head, h)
    if kept != 0:
        keep_in_log(t, held, h, kept)
        ail.release(held, kept)


@kernel(_table_args(_BUCKETS, np.zeros(1, np.int64), 1))
def _reclaim(t, head, buckets, out, scan):
    """Take up to out.size idle buffers off the cold end; returns how many. Second chance."""
    n = 0
    for _ in range(scan):
        h = head[H_LRU]
        if h == 0 or n == out.size:
            break
        flags = t["flags"][h] & (F_VALID | F_DIRTY | F_WRITING | F_REFERENCED)
        if t["hold"][h] == 0 and flags == F_VALID:
            _remove(t, head, buckets, h)
            out[n] = h
            n += 1
            continue
        t["flags"][h] &= ~np.uint32(F_REFERENCED)
        list_remove(t["lru_prev"], t["lru_next"], head, H_LRU, h)
        list_append(t["lru_prev"], t["lru_next"], head, H_LRU, h)
    return n


# Where the parts of a buffer are: (daddr, basic blocks) of each, or nothing if it is in one piece.
Runs = tuple[tuple[int, int], ...]

RECLAIM_BATCH = 128
READING = "buf"  # to the lock-order validator: others wait for whoever brings a block in core
RESERVE_BUFFERS, RESERVE_SHARE = 32, 8  # that cleaning may need; and no more than 1/8 of memory
WRITE_BATCH = 4096  # buffers looked at in one pass of the writer


class BufCache:
    """All metadata buffers of one volume."""

    name = "xfs_buf"

    def __init__(
        self, arena: Arena, device: Device, geo: Geometry, log: logging.Logger, *, paranoid: bool
    ) -> None:
        self._arena, self._device, self._geo, self._log = arena, device, geo, log
        self._paranoid = paranoid  # run the verifier before every write, too
        self.mem = arena.mem
        self._slab = arena.slab("xfs_buf", BUF, reclaimable=True)
        self.table = self._slab.table
        self.flags = self.table["flags"]
        self._record_ops, self._owners = self.table["ops"], self.table["owner"]
        self._lsns = self.table["lsn"]
        self._small = {
            size: arena.slab(f"xfs_buf-{size}", np.dtype([("bytes", "u1", (size,))]), True)
            for size in (512, 1024, 2048)
        }
        self._head = np.zeros(H_WORDS, np.int64)
        self._ops: list[BufOps] = []
        self._ops_index: dict[int, int] = {}
        self._reads: dict[int, trio.Event] = {}
        self._runs: dict[int, Runs] = {}  # of the few buffers that are not in one piece
        self.ail = Ail()
        self._writing = trio.Event()
        self._found = np.zeros(RECLAIM_BATCH, np.int64)
        self._writer = Mutex("buf writer")
        self.counts = {"reads": 0, "writes": 0, "merged_writes": 0, "corrupt": 0}

    async def start(self, cleaning: int = PAGE_SIZE) -> None:
        """Take the memory that the cache itself needs: hash buckets and the writer's bounce.

        Buffers that are needed to clean memory have up to `cleaning` bytes. If that is more than a
        page the reserve grows by what a few of them take.
        """
        pages = max(1, self._arena.nr_pages // 2048)
        order = min(6, (pages - 1).bit_length())
        pfn = await self._arena.alloc_folio(order, gfp.KERNEL | gfp.ZERO)
        raw = self.mem[pfn * PAGE_SIZE : (pfn << 12) + (PAGE_SIZE << order)]
        self._buckets = raw.view(np.uint32)
        order = 4 if self._arena.memory_bytes < 64 << 20 else 6
        self._bounce_pfn = await self._arena.alloc_folio(order, gfp.KERNEL)
        self._bounce_bytes = PAGE_SIZE << order
        if cleaning > PAGE_SIZE:
            share = self._arena.nr_pages // RESERVE_SHARE
            pages = min(RESERVE_BUFFERS * cleaning // PAGE_SIZE, share)
            least = self._arena.min_free_kbytes + pages * KB_PER_PAGE
            self._arena.set_watermarks(least, self._arena.watermark_scale_factor)
        self._arena.register_shrinker(self)

    # -- lookup ---------------------------------------------------------------------------------

    def ops_of(self, handle: int) -> BufOps:
        return self._ops[self._record_ops[handle]]

    def number_of(self, ops: BufOps) -> int:
        """What buffers of this kind have in their record."""
        index = self._ops_index.get(id(ops))
        if index is None:
            index = self._ops_index[id(ops)] = len(self._ops)
            self._ops.append(ops)
        return index

    def set_ops(self, handle: int, ops: BufOps) -> None:
        self._record_ops[handle] = self.number_of(ops)

    @property
    def words(self) -> tuple[Any, Any, Any]:
        """Records, head and hash, for kernels of other modules."""
        return self.table, self._head, self._buckets

    async def read(
        self, daddr: int, bbs: int, ops: BufOps, owner: int | None = None, runs: Runs = ()
    ) -> Buf:
        """Hold a verified buffer. Raises Corrupt, or OSError from the device.

        `runs` says where its parts are if it is not in one piece; `daddr` is the first one's.
        """
        if lockdep.current is not None:
            lockdep.current.wants(READING)
        while True:
            handle = _hold(self.table, self._head, self._buckets, daddr)
            if handle > 0:
                buf = Buf(self, handle)
                self._check_cached(buf, bbs, ops, owner, runs)
                return buf
            under_way = self._reads.get(daddr)
            if under_way is None:
                return await self._read_device(daddr, bbs, ops, owner, runs)
            await under_way.wait()

    def parts(self, handle: int) -> list[tuple[int, int, int]]:
        """(daddr, address, bytes) of each part of a buffer."""
        addr, size, daddr = _identity(self.table, handle)
        runs = self._runs.get(handle)
        if runs is None:
            return [(daddr, addr, size)]
        found = []
        for start, bbs in runs:
            found.append((start, addr, bbs << L.BB_LOG))
            addr += bbs << L.BB_LOG
        return found

    def find(self, daddr: int) -> Buf | None:
        """Hold the buffer if it is in core; nothing is read or verified."""
        handle = _hold(self.table, self._head, self._buckets, daddr)
        return Buf(self, handle) if handle > 0 else None

    def _check_cached(
        self, buf: Buf, bbs: int, ops: BufOps, owner: int | None, runs: Runs
    ) -> None:
        """A block that is asked for as something else than it was read as is checked again."""
        fault = ""
        if buf.bbs != bbs:
            fault = f"used with {bbs} and {buf.bbs} basic blocks"
        elif self._runs.get(buf.handle, ()) != runs:
            fault = "used with different parts"
        elif buf.ops is not ops or self._owners[buf.handle] != (owner or 0):
            fault = ops.verify(self._geo, buf, owner)
            if not fault:
                buf.ops = ops
                self._owners[buf.handle] = owner or 0
        if fault:
            self.release(buf.handle)
            raise self._corrupt(ops, buf.daddr, fault)

    async def _read_device(
        self, daddr: int, bbs: int, ops: BufOps, owner: int | None, runs: Runs
    ) -> Buf:
        for start, count in runs or ((daddr, bbs),):
            if start < 0 or (start + count) << L.BB_LOG > self._device.size:
                raise self._corrupt(ops, daddr, "beyond the end of the device")
        done = self._reads[daddr] = trio.Event()
        handle = 0
        validator = lockdep.current
        if validator is not None:
            validator.took(READING, daddr, daddr)
        try:
            with gfp.nofs():  # cleaners may wait for this very block
                handle = await self._new(daddr, bbs << L.BB_LOG, ops, runs)
            buf = Buf(self, handle)
            _insert(self.table, self._head, self._buckets, handle)
            self.counts["reads"] += 1
            at = buf.addr
            for start, count in runs or ((daddr, bbs),):
                view = self.mem[at : at + (count << L.BB_LOG)].data
                await self._device.read(start << L.BB_LOG, [view])
                at += count << L.BB_LOG
            fault = ""
            if ops.crc_offset is not None and not crc_ok(
                buf.mem, buf.addr, buf.size, ops.crc_offset
            ):
                fault = "wrong checksum"
            fault = fault or ops.verify(self._geo, buf, owner)
            if fault:
                raise self._corrupt(ops, daddr, fault)
            self._owners[handle] = owner or 0
            self.flags[handle] |= F_VALID
            return buf
        except BaseException:
            if handle:
                self._forget(handle)
            raise
        finally:
            del self._reads[daddr]
            done.set()
            if validator is not None:
                validator.dropped(READING, daddr)

    async def get(
        self, daddr: int, bbs: int, ops: BufOps, owner: int = 0, runs: Runs = ()
    ) -> Buf:
        """Hold a buffer for a newly allocated block: zeroed, not read. `runs` as in `read`.

        `owner` is who the caller makes the block say it belongs to.
        """
        if lockdep.current is not None:
            lockdep.current.wants(READING)
        while True:
            handle = _hold(self.table, self._head, self._buckets, daddr)
            under_way = self._reads.get(daddr)
            if handle <= 0 and under_way is not None:
                await under_way.wait()
                continue
            if handle > 0:
                buf = Buf(self, handle)
                assert buf.bbs == bbs, "a freed block kept its buffer"
                self._set_runs(handle, runs)
            else:
                done = self._reads[daddr] = trio.Event()
                try:
                    handle = await self._new(daddr, bbs << L.BB_LOG, ops, runs)
                    _insert(self.table, self._head, self._buckets, handle)
                    self.flags[handle] |= F_VALID
                finally:
                    del self._reads[daddr]
                    done.set()
                buf = Buf(self, handle)
            buf.data[:] = 0
            buf.ops = ops
            self._owners[handle] = owner
            return buf

    def _set_runs(self, handle: int, runs: Runs) -> None:
        if runs:
            assert runs[0][0] == int(self.table["daddr"][handle])
            self._runs[handle] = runs
            self.flags[handle] |= F_PIECES
        elif self._runs.pop(handle, None):
            self.flags[handle] &= ~np.uint32(F_PIECES)

    async def _new(self, daddr: int, size: int, ops: BufOps, runs: Runs) -> int:
        """A descriptor with data memory, held once, not yet findable.

        NOFAIL, as XFS has it for every buffer: whoever asks may be in a dirty transaction.
        """
        handle = await self._slab.alloc(gfp.KERNEL | gfp.NOFAIL)
        try:
            if size >= PAGE_SIZE:
                order = (size // PAGE_SIZE - 1).bit_length()
                data = await self._new_pages(order)
            else:
                data = await self._small[size].alloc(gfp.KERNEL | gfp.NOFAIL)
        except BaseException:
            self._slab.free(handle)
            raise
        record = self.table[handle]
        record["addr"] = data * min(size, PAGE_SIZE)
        record["data"], record["daddr"], record["size"] = data, daddr, size
        record["hold"], record["flags"] = 1, F_REFERENCED
        for name in ("seq", "held", "lsn", "item", "going"):
            record[name] = 0
        self.set_ops(handle, ops)
        self._set_runs(handle, runs)
        return handle

    async def _new_pages(self, order: int) -> int:
        """Memory of a buffer: a block if there is one, else single pages in a row, as XFS does it.

        Who cleans memory may have the last page, but there may be no larger block before something
        is clean.
        """
        if not order:
            return await self._arena.alloc_folio(0, gfp.KERNEL | gfp.NOFAIL)
        # what reclaim and compaction would cost is more than a mapping for each page
        pfn = self._arena.try_alloc_folio(order, gfp.NOWAIT)
        if pfn is not None:
            return pfn
        self._arena.vmstat.add("buf_backing_fallback")
        return await self._arena.vmalloc.alloc(1 << order, gfp.KERNEL | gfp.NOFAIL)

    def _free_pages(self, page: int) -> None:
        if self._arena.vmalloc.covers(page):
            self._arena.vmalloc.free(page)
        else:
            self._arena.put_folio(page)

    def _corrupt(self, ops: BufOps, daddr: int, fault: str) -> Corrupt:
        self.counts["corrupt"] += 1
        self._log.error("corrupt %s at daddr %d: %s; run xfs_repair", ops.name, daddr, fault)
        return Corrupt(f"corrupt {ops.name} at daddr {daddr}: {fault}")

    # -- life -----------------------------------------------------------------------------------

    def release(self, handle: int) -> None:
        """Drop one hold."""
        code = _release(self.table, handle)
        assert code >= 0
        if code:
            self._free(handle)

    def mark_dirty(self, handle: int) -> None:
        """The buffer was modified."""
        assert self.flags[handle] & F_VALID
        assert not self.flags[handle] & F_STALE
        mark_dirty(self.table, self._head, handle)

    def invalidate(self, handle: int) -> None:
        """The block was freed: forget it without writing. The caller holds it."""
        if self.flags[handle] & F_STALE:
            return
        _mark_clean(self.table, self._head, handle)
        _remove(self.table, self._head, self._buckets, handle)
        self.flags[handle] |= F_STALE

    def _forget(self, handle: int) -> None:
        _remove(self.table, self._head, self._buckets, handle)
        self._free(handle)

    def _free(self, handle: int) -> None:
        record = self.table[handle]
        size, data = int(record["size"]), int(record["data"])
        record["daddr"] = -1
        self._runs.pop(handle, None)
        if size >= PAGE_SIZE:
            self._free_pages(data)
        else:
            self._small[size].free(data)
        self._slab.free(handle)

    # -- shrinker -------------------------------------------------------------------------------

    def count_objects(self) -> int:
        return int(self._head[H_COUNT])

    def scan_objects(self, nr: int, gfp_flags: int) -> int:
        """Free up to `nr` idle buffers; never waits."""
        freed, scanned = 0, 0
        while scanned < nr:
            batch = min(RECLAIM_BATCH, nr - scanned)
            out = self._found[:batch]
            n = _reclaim(self.table, self._head, self._buckets, out, batch)
            for handle in out[:n].tolist():
                self._free(handle)
            freed, scanned = freed + n, scanned + batch
        return freed

    # -- writing --------------------------------------------------------------------------------

    @property
    def dirty_bytes(self) -> int:
        return int(self._head[H_DIRTY_BYTES])

    async def write_dirty(self, most: int = EVERYTHING) -> None:
        """Write the buffers that are dirty now, may go home and hold a checkpoint up to `most`.

        In device order. The caller flushes the device. Raises OSError from the device; the buffers
        not written stay dirty.
        """
        async with self._writer:
            out = np.zeros(WRITE_BATCH, np.int64)
            rounds = 1 + int(self._head[H_COUNT]) // WRITE_BATCH
            for _ in range(rounds):
                n = _collect_dirty(self.table, self._head, self.ail.held, out, most)
                if n == 0:
                    return
                order = np.argsort(self.table["daddr"][out[:n]], kind="stable")
                await self._write_sorted(out[:n][order].tolist())

    async def _write_sorted(self, handles: Sequence[int]) -> None:
        next_index = 0
        while next_index < len(handles):
            next_index, run, end = self._fill_bounce(handles, next_index)
            if run:
                await self._write_run(run, end)

    def _fill_bounce(
        self, handles: Sequence[int], index: int
    ) -> tuple[int, list[tuple[int, int]], int]:
        """Stamp and copy neighbours into the bounce until there is a gap or it is full.

        Returns the index to go on from, the buffers copied, each with the checkpoint that it held,
        and the end of the copy. Looks at each buffer anew, because buffers come and go while
        earlier runs are written.
        """
        start = at = self._bounce_pfn * PAGE_SIZE
        run: list[tuple[int, int]] = []
        expected = -1
        while index < len(handles):
            handle = handles[index]
            index += 1
            if not _goes(self.table, self._head, self.ail.held, handle):
                continue
            buf = Buf(self, handle)
            if run and (buf.daddr != expected or at + buf.size > start + self._bounce_bytes):
                return index - 1, run, at
            if run and handle in self._runs:  # in parts: no neighbour goes with it
                return index - 1, run, at
            self._stamp(buf)
            self.mem[at : at + buf.size] = buf.data
            at += buf.size
            expected = -1 if handle in self._runs else buf.daddr + buf.bbs
            run.append((handle, _depart(self.table, self._head, handle)))
        return index, run, at

    async def _write_run(self, run: Sequence[tuple[int, int]], end: int) -> None:
        start, first = self._bounce_pfn * PAGE_SIZE, run[0][0]
        whole = int(self.table["daddr"][first]), (end - start) >> L.BB_LOG
        done = self._writing = trio.Event()
        try:
            for daddr, bbs in self._runs.get(first) or (whole,):
                view = self.mem[start : start + (bbs << L.BB_LOG)].data
                await self._device.write(daddr << L.BB_LOG, [view])
                start += bbs << L.BB_LOG
        except BaseException:
            for handle, kept in run:
                if not self.flags[handle] & F_STALE:
                    _return(self.table, self._head, self.ail.held, handle, kept)
            raise
        else:
            for _, kept in run:
                self.ail.release(kept)
        finally:
            done.set()
            for handle, _ in run:
                self._written(handle)
        self.counts["writes"] += len(run)
        self.counts["merged_writes"] += 1

    async def wait_written(self, handle: int) -> None:
        """Wait until no write of this held buffer is on its way.

        A freed block must not be reused while an old image of it may still reach the device.
        """
        while self.flags[handle] & F_WRITING:
            await self._writing.wait()

    def _written(self, handle: int) -> None:
        self.flags[handle] &= ~np.uint32(F_WRITING)
        if self.flags[handle] & F_STALE and not self.table["hold"][handle]:
            self._free(handle)

    def _stamp(self, buf: Buf) -> None:
        ops = buf.ops
        if self._paranoid:
            fault = ops.verify(self._geo, buf, None)
            if fault:
                raise self._corrupt(ops, buf.daddr, f"about to be written: {fault}")
        if ops.lsn_offset is not None:
            at = buf.addr + ops.lsn_offset
            buf.mem[at : at + 8].view(">u8")[0] = self._lsns[buf.handle]
        self.stamp_crc(buf.handle)

    def stamp_crc(self, handle: int) -> None:
        """Make the checksum of a buffer right for what it holds now."""
        ops, record = self.ops_of(handle), self.table[handle]
        if ops.crc_offset is not None:
            crc_stamp(self.mem, int(record["addr"]), int(record["size"]), ops.crc_offset)
