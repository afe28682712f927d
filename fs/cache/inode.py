"""The inode cache: in-core inodes in the arena, named by ino.

An in-core inode is a slab record (the core in native form, the page-cache mapping, the links of
the lists it is on) and an image of the inode's size whose literal area holds both forks in
on-disk form. `Inode` is a short-lived view of it: two words, any number of them, equal by handle.

References: every `get` counts one; dirty data and the kernel's lookup count hold none. An inode
without references stays cached until reclaim takes it. What the kernel has looked up is found
again by its number, so reclaim leaves of such an inode only a stub with the count: the kernel
caches names in its own memory and must not be able to fill ours. An inode without links is
inactivated, by a task of the volume's own, when it has neither references nor lookups left.

Invariants: one record per ino; a record with references, dirty state or dirty pages is never
reclaimed, nor one without links; an ino has a stub or a record, not both.
Locking: trio thread only, atomic between awaits. IOLOCK and ILOCK are in the volume's lock tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import trio

from alloc import gfp
from alloc.arena import Arena
from alloc.jit import kernel
from fs.cache.mapping import MAPPING
from fs.cache.thread import (
    bucket_of,
    chain_find,
    chain_insert,
    chain_remove,
    list_append,
    list_remove,
)
from fs.xfs import layout as L

INODE = np.dtype(
    [
        # The core, as in layout.DINODE; times are bigtime: nanoseconds since 2^31 s before 1970.
        ("ino", "u8"),
        ("size", "i8"),  # bytes, what users see
        ("disk_size", "i8"),  # bytes, what the image may say: data below it is stable
        ("nblocks", "i8"),
        ("atime", "u8"),
        ("mtime", "u8"),
        ("ctime", "u8"),
        ("crtime", "u8"),
        ("changecount", "u8"),
        ("nextents", "i8"),
        ("flags2", "u8"),
        ("gen", "u4"),
        ("uid", "u4"),
        ("gid", "u4"),
        ("nlink", "u4"),
        ("projid", "u4"),
        ("extsize", "u4"),
        ("cowextsize", "u4"),
        ("anextents", "u4"),
        ("rdev", "u4"),  # as on disk: major << 18 | minor
        ("mode", "u2"),
        ("flags", "u2"),
        ("forkoff", "u1"),
        ("format", "u1"),
        ("aformat", "u1"),
        ("pad0", "u1"),
        # What only memory knows.
        ("image", "u4"),  # slab object with the forks
        ("state", "u4"),
        ("refs", "u4"),
        ("nlookup", "u8"),  # the kernel's lookup count
        ("hash_next", "u4"),
        ("lru_prev", "u4"),
        ("lru_next", "u4"),
        ("dirty_prev", "u4"),
        ("dirty_next", "u4"),
        ("unlinked_prev", "u4"),  # agino in front of this one on its unlinked list, or 0
        ("mapping", MAPPING),
        ("pad", "u1", (240,)),
    ]
)
assert INODE.itemsize == 512, INODE.itemsize
assert INODE.fields is not None
assert INODE.fields["mapping"][1] % 8 == 0

RECLAIM_BATCH = 128  # inodes that one kernel call takes off the list
S_VALID, S_DIRTY, S_LRU, S_REFERENCED, S_INACTIVE, S_BAD = 1, 2, 4, 8, 16, 32

STUB = np.dtype(
    [
        ("ino", "u8"),
        ("nlookup", "u8"),  # what the kernel will take back with FORGET
        ("hash_next", "u4"),
        ("pad", "u1", (12,)),
    ]
)
assert STUB.itemsize == 32

H_LRU, H_DIRTY = 0, 2  # two words each: first and last
H_COUNT, H_IDLE, H_DIRTY_COUNT, H_WORDS = 4, 5, 6, 7


def _table_args(*rest: Any) -> Callable[[], tuple[Any, ...]]:
    return lambda: (np.zeros(1, INODE), np.zeros(H_WORDS, np.int64), *rest)


_BUCKETS = np.zeros(1, np.uint32)


@kernel(_table_args(_BUCKETS, 1))
def _find(t, head, buckets, ino):
    return chain_find(t["ino"], t["hash_next"], buckets, ino)


@kernel(_table_args(_BUCKETS, 1))
def _insert(t, head, buckets, h):
    chain_insert(t["hash_next"], buckets, bucket_of(buckets, np.int64(t["ino"][h])), h)
    head[H_COUNT] += 1


@kernel(_table_args(_BUCKETS, 1))
def _remove(t, head, buckets, h):
    chain_remove(t["hash_next"], buckets, bucket_of(buckets, np.int64(t["ino"][h])), h)
    head[H_COUNT] -= 1


@kernel(_table_args(_BUCKETS, np.zeros(1, np.int64)))
def _collect(t, head, buckets, out):
    """Handles of all records; returns how many."""
    n = 0
    for slot in range(buckets.size):
        h = np.int64(buckets[slot])
        while h != 0 and n < out.size:
            out[n] = h
            n += 1
            h = np.int64(t["hash_next"][h])
    return n


@kernel(_table_args(1))
def _lru_add(t, head, h):
    if not t["state"][h] & S_LRU:
        t["state"][h] |= S_LRU
        list_append(t["lru_prev"], t["lru_next"], head, H_LRU, h)
        head[H_IDLE] += 1


@kernel(_table_args(1))
def _lru_remove(t, head, h):
    if t["state"][h] & S_LRU:
        t["state"][h] &= ~np.uint32(S_LRU)
        list_remove(t["lru_prev"], t["lru_next"], head, H_LRU, h)
        head[H_IDLE] -= 1


@kernel(_table_args(np.zeros(1, np.int64), 1))
def _reclaim(t, head, out, scan):
    """Take up to out.size idle inodes off the cold end; returns how many. Second chance."""
    n, mapping = 0, t["mapping"]
    for _ in range(min(scan, head[H_IDLE])):
        h = head[H_LRU]
        if n == out.size:
            break
        _lru_remove(t, head, h)
        unlinked = t["nlink"][h] == 0 and t["mode"][h] != 0
        busy = t["state"][h] & (S_DIRTY | S_REFERENCED) or unlinked
        if busy or mapping["flags"][h] or mapping["ndirty"][h] or mapping["nrwriteback"][h]:
            t["state"][h] &= ~np.uint32(S_REFERENCED)
            _lru_add(t, head, h)
            continue
        out[n] = h
        n += 1
    return n


@kernel(_table_args(1))
def _mark_dirty(t, head, h):
    if not t["state"][h] & S_DIRTY:
        t["state"][h] |= S_DIRTY
        list_append(t["dirty_prev"], t["dirty_next"], head, H_DIRTY, h)
        head[H_DIRTY_COUNT] += 1


@kernel(_table_args(1))
def _mark_clean(t, head, h):
    if t["state"][h] & S_DIRTY:
        t["state"][h] &= ~np.uint32(S_DIRTY)
        list_remove(t["dirty_prev"], t["dirty_next"], head, H_DIRTY, h)
        head[H_DIRTY_COUNT] -= 1


@kernel(lambda: (np.zeros(1, STUB), _BUCKETS, 1, 1, 1))
def _stub_insert(stubs, buckets, stub, ino, count):
    stubs["ino"][stub] = ino
    stubs["nlookup"][stub] = count
    chain_insert(stubs["hash_next"], buckets, bucket_of(buckets, ino), stub)


@kernel(lambda: (np.zeros(1, STUB), _BUCKETS, 1, 1))
def _stub_forget(stubs, buckets, ino, count):
    """Take `count` lookups off a stub; its handle, unlinked, when none are left; else 0."""
    stub = chain_find(stubs["ino"], stubs["hash_next"], buckets, ino)
    if stub == 0:
        return 0
    left = np.int64(stubs["nlookup"][stub]) - count
    if left > 0:
        stubs["nlookup"][stub] = left
        return 0
    chain_remove(stubs["hash_next"], buckets, bucket_of(buckets, ino), stub)
    return stub


def _field(name: str) -> Any:
    def read(self: Inode) -> int:
        return int(self._fields[name][self.handle])

    def write(self: Inode, value: int) -> None:
        self._fields[name][self.handle] = value

    return property(read, write, doc=f"The in-core record's {name}.")


class Inode:
    """View of one in-core inode; attributes read and write the arena."""

    __slots__ = ("_cache", "_fields", "handle")

    def __init__(self, cache: InodeCache, handle: int) -> None:
        self._cache = cache
        self._fields = cache.fields
        self.handle = handle

    ino = _field("ino")
    size = _field("size")
    disk_size = _field("disk_size")
    nblocks = _field("nblocks")
    atime = _field("atime")
    mtime = _field("mtime")
    ctime = _field("ctime")
    crtime = _field("crtime")
    changecount = _field("changecount")
    nextents = _field("nextents")
    anextents = _field("anextents")
    flags = _field("flags")
    flags2 = _field("flags2")
    gen = _field("gen")
    uid = _field("uid")
    gid = _field("gid")
    nlink = _field("nlink")
    projid = _field("projid")
    extsize = _field("extsize")
    cowextsize = _field("cowextsize")
    rdev = _field("rdev")
    mode = _field("mode")
    forkoff = _field("forkoff")
    format = _field("format")
    aformat = _field("aformat")
    state = _field("state")
    refs = _field("refs")
    nlookup = _field("nlookup")
    unlinked_prev = _field("unlinked_prev")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inode) and other.handle == self.handle

    def __hash__(self) -> int:
        return self.handle

    def __repr__(self) -> str:
        return f"<inode {self.ino:#x} handle {self.handle}>"

    @property
    def image_addr(self) -> int:
        """Byte offset in the arena of the inode's image; the literal area is 176 bytes in."""
        return int(self._fields["image"][self.handle]) << self._cache.inode_log

    @property
    def data_fork(self) -> tuple[int, int]:
        """Address and size in bytes of the data fork's literal area."""
        forkoff = self.forkoff << 3
        return self.image_addr + L.LITERAL, forkoff or self._cache.literal_size

    @property
    def attr_fork(self) -> tuple[int, int]:
        """Address and size in bytes of the attr fork's literal area; size 0 if there is none."""
        forkoff = self.forkoff << 3
        size = self._cache.literal_size - forkoff if forkoff else 0
        return self.image_addr + L.LITERAL + forkoff, size


class InodeCache:
    """All in-core inodes of one volume.

    `read_image(ip)` fills a fresh record from the image; `evict(handle)` drops the clean folios
    of an idle inode; `start_inactivation(ip)` has an inode without links or users freed. The
    volume supplies all three.
    """

    name = "xfs_inode"

    def __init__(self, arena: Arena, inode_log: int) -> None:
        self._arena = arena
        self.inode_log = inode_log
        self.literal_size = (1 << inode_log) - L.LITERAL
        self._slab = arena.slab("xfs_inode", INODE)
        size = 1 << inode_log
        self._images = arena.slab(f"xfs_ifork-{size}", np.dtype([("bytes", "u1", (size,))]))
        self._stubs = arena.slab("xfs_inode_stub", STUB)
        self.table = self._slab.table
        self.fields = {name: self.table[name] for name in INODE.names or ()}
        self._head = np.zeros(H_WORDS, np.int64)
        self._loads: dict[int, trio.Event] = {}
        self._idle = np.zeros(RECLAIM_BATCH, np.int64)
        self.read_image: Callable[[Inode], Any]
        self.evict: Callable[[int], None] = lambda handle: None
        self.start_inactivation: Callable[[Inode], None]

    async def start(self) -> None:
        """Take the memory of the hash buckets."""
        self._buckets = await self._new_buckets()
        self._stub_buckets = await self._new_buckets()
        self._arena.register_shrinker(self)

    async def _new_buckets(self) -> np.ndarray[Any, np.dtype[np.uint32]]:
        pages = max(1, self._arena.mem.size // 4096 // 2048)
        order = min(6, (pages - 1).bit_length())
        pfn = await self._arena.alloc_folio(order, gfp.KERNEL | gfp.ZERO)
        return self._arena.mem[pfn << 12 : (pfn << 12) + (4096 << order)].view(np.uint32)

    # -- references -----------------------------------------------------------------------------

    def hold(self, handle: int) -> Inode:
        """One more reference of an in-core inode."""
        refs = self.fields["refs"]
        refs[handle] += 1
        if refs[handle] == 1:
            _lru_remove(self.table, self._head, handle)
        return Inode(self, handle)

    def find(self, ino: int) -> Inode | None:
        """The inode if it is in core and in use: one reference; None otherwise."""
        handle = _find(self.table, self._head, self._buckets, ino)
        if not handle or not self.fields["state"][handle] & S_VALID:
            return None
        if not self.fields["mode"][handle]:
            return None
        return self.hold(handle)

    async def get(self, ino: int) -> Inode:
        """A reference of an inode in use.

        Raises OSError(ENOENT) for a free one, Corrupt for a broken one, OSError(EIO).
        """
        while True:
            under_way = self._loads.get(ino)
            if under_way is not None:
                await under_way.wait()
                continue
            handle = _find(self.table, self._head, self._buckets, ino)
            if not handle:
                return await self._load(ino)
            if not self.fields["mode"][handle]:
                raise FileNotFoundError(2, f"inode {ino} is free")
            return self.hold(handle)

    async def _load(self, ino: int) -> Inode:
        done = self._loads[ino] = trio.Event()
        ip: Inode | None = None
        try:
            ip = await self._new(ino)
            await self.read_image(ip)
            if not ip.mode:
                raise FileNotFoundError(2, f"inode {ino} is free")
            ip.nlookup = self._take_stub(ino)
            ip.state |= S_VALID
            return ip
        except BaseException:
            if ip is not None:
                self._drop(ip.handle)
            raise
        finally:
            del self._loads[ino]
            done.set()

    async def _new(self, ino: int) -> Inode:
        """A record with one reference, findable but not valid."""
        image = await self._images.alloc()
        handle = await self._slab.alloc()
        self.fields["ino"][handle] = ino
        self.fields["image"][handle] = image
        self.fields["refs"][handle] = 1
        _insert(self.table, self._head, self._buckets, handle)
        return Inode(self, handle)

    async def create(self, ino: int, gen: int) -> Inode:
        """The in-core inode of a freshly allocated ino: one reference, everything else zero.

        If the freed inode is still in core, its generation is newer than the image's and stays.
        """
        while ino in self._loads:
            await self._loads[ino].wait()
        handle = _find(self.table, self._head, self._buckets, ino)
        if not handle:
            done = self._loads[ino] = trio.Event()
            ip = await self._new(ino)
            ip.state |= S_VALID
            del self._loads[ino]
            done.set()
        else:
            assert not self.fields["mode"][handle], f"inode {ino} is allocated and in use"
            ip, gen = self.hold(handle), int(self.fields["gen"][handle])
            self._reset(ip)
        ip.gen = gen
        return ip

    def _reset(self, ip: Inode) -> None:
        """Zero the core of a freed inode that is used again, and its forks."""
        for name in ("size", "disk_size", "nblocks", "nextents", "anextents", "flags2", "flags"):
            self.fields[name][ip.handle] = 0
        for name in ("projid", "extsize", "cowextsize", "rdev", "forkoff", "unlinked_prev"):
            self.fields[name][ip.handle] = 0
        ip.state &= ~S_INACTIVE
        self._images.table["bytes"][int(self.fields["image"][ip.handle])] = 0

    def put(self, ip: Inode) -> None:
        """Drop one reference."""
        handle = ip.handle
        refs = self.fields["refs"]
        assert refs[handle] > 0
        refs[handle] -= 1
        if refs[handle] or self._inactivates(ip):
            return
        self.fields["state"][handle] |= S_REFERENCED
        _lru_add(self.table, self._head, handle)

    def _inactivates(self, ip: Inode) -> bool:
        """Start freeing an unreferenced inode whose last link is gone, if nobody can reach it."""
        handle = ip.handle
        if self.fields["nlink"][handle] or not self.fields["mode"][handle]:
            return False
        if self.fields["state"][handle] & (S_INACTIVE | S_BAD) or self.fields["nlookup"][handle]:
            return False
        ip.state |= S_INACTIVE
        self.start_inactivation(self.hold(handle))
        return True

    # -- the kernel's lookup counts -------------------------------------------------------------

    def looked_up(self, ip: Inode) -> None:
        """The kernel was told of the inode once more."""
        self.fields["nlookup"][ip.handle] += 1

    def forget(self, ino: int, count: int) -> None:
        """The kernel takes back `count` lookups."""
        handle = _find(self.table, self._head, self._buckets, ino)
        if not handle:
            stub = int(_stub_forget(self._stubs.table, self._stub_buckets, ino, count))
            if stub:
                self._stubs.free(stub)
            return
        nlookup = self.fields["nlookup"]
        nlookup[handle] = max(0, int(nlookup[handle]) - count)
        if not nlookup[handle] and not self.fields["refs"][handle]:
            self._inactivates(Inode(self, handle))

    def forget_all(self) -> None:
        """The kernel is gone and forgot to say so: no lookup count holds any longer."""
        for handle in self.handles():
            if self.fields["nlookup"][handle]:
                self.forget(int(self.fields["ino"][handle]), 1 << 62)

    def _take_stub(self, ino: int) -> int:
        """The lookup count that reclaim kept; its stub is gone."""
        stub = int(_stub_forget(self._stubs.table, self._stub_buckets, ino, 1 << 62))
        if not stub:
            return 0
        count = int(self._stubs.table["nlookup"][stub])
        self._stubs.free(stub)
        return count

    def _leave_stub(self, handle: int) -> bool:
        """Keep the lookup count of an inode about to be reclaimed; False if that needs memory."""
        count = int(self.fields["nlookup"][handle])
        if not count:
            return True
        # Reclaim itself: whoever waits here would wait for himself. The inode stays cached then.
        stub = self._stubs.try_alloc(gfp.MEMALLOC | gfp.NOWAIT)
        if stub is None:
            return False
        ino = int(self.fields["ino"][handle])
        _stub_insert(self._stubs.table, self._stub_buckets, stub, ino, count)
        return True

    def handles(self) -> list[int]:
        """Every in-core inode's handle; O(inodes), for unmount and reports."""
        out = np.zeros(int(self._head[H_COUNT]), np.int64)
        n = _collect(self.table, self._head, self._buckets, out)
        return [int(h) for h in out[:n]]

    # -- dirty state ----------------------------------------------------------------------------

    def mark_dirty(self, ip: Inode) -> None:
        """Core or forks differ from the inode's cluster buffer."""
        _mark_dirty(self.table, self._head, ip.handle)

    def mark_clean(self, ip: Inode) -> None:
        _mark_clean(self.table, self._head, ip.handle)

    def first_dirty(self) -> Inode | None:
        """The inode that has been dirty longest."""
        handle = int(self._head[H_DIRTY])
        return Inode(self, handle) if handle else None

    @property
    def dirty_count(self) -> int:
        return int(self._head[H_DIRTY_COUNT])

    # -- life -----------------------------------------------------------------------------------

    def drop_chunk(self, first_ino: int, count: int) -> None:
        """Forget the free inodes of a chunk whose blocks are being freed; none may be in use."""
        for ino in range(first_ino, first_ino + count):
            handle = _find(self.table, self._head, self._buckets, ino)
            if not handle:
                continue
            assert not self.fields["mode"][handle], f"inode {ino} of a freed chunk is in use"
            ip = Inode(self, handle)
            self.mark_clean(ip)
            if not ip.refs:
                self._drop(handle)

    def _drop(self, handle: int) -> None:
        _mark_clean(self.table, self._head, handle)
        _lru_remove(self.table, self._head, handle)
        _remove(self.table, self._head, self._buckets, handle)
        self._images.free(int(self.fields["image"][handle]))
        self._slab.free(handle)

    def count_objects(self) -> int:
        return int(self._head[H_IDLE])

    def scan_objects(self, nr: int, gfp_flags: int) -> int:
        """Free idle clean inodes from the cold end, looking at up to `nr`; never waits."""
        freed, looked_at = 0, 0
        while looked_at < nr:
            batch = min(RECLAIM_BATCH, nr - looked_at)
            out = self._idle[:batch]
            n = _reclaim(self.table, self._head, out, batch)
            for handle in out[:n].tolist():
                if not self._leave_stub(handle):
                    _lru_add(self.table, self._head, handle)
                    continue
                self.evict(handle)
                self._drop(handle)
                freed += 1
            looked_at += batch
        return freed
