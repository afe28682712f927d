"""The inode cache: in-core inodes in the arena, named by ino.

An in-core inode is a slab record (`incore.py`) and an image of the inode's size whose literal area
holds both forks in on-disk form. `Inode` is a short-lived view of it, equal by handle.

References: every `get` counts one; dirty data and the kernel's lookup count hold none. An inode
without references stays cached until reclaim takes it. What the kernel has looked up is found
again by its number, so reclaim leaves of such an inode only a stub with the count: the kernel
caches names in its own memory and must not be able to fill ours. An inode without links is
inactivated, by a task of the volume's own, when it has neither references nor lookups left.

Invariants: one record per ino; a record with references, dirty state or dirty pages is never
reclaimed, nor one without links; an ino has a stub or a valid record, not both.
Locking: the trio thread changes everything, atomic between awaits; `inodetable.py` says what lanes
do meanwhile. They count a lookup under the ILOCK and while nlink > 0 only, and links go under the
exclusive ILOCK: once nlink is 0 the count can only fall, and who sees both at 0 here is the last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import trio

from alloc import gfp, lockdep
from alloc.arena import Arena
from alloc.shrinker import SHRINK_STOP
from fs.cache import inodetable as records
from fs.cache.incore import (
    INODE,
    S_BAD,
    S_DIRTY,
    S_INACTIVE,
    S_LRU,
    S_REFERENCED,
    S_VALID,
    find_inode,
)
from fs.cache.stub import Stubs
from fs.xfs import layout as L

__all__ = [
    "INODE",
    "S_BAD",
    "S_DIRTY",
    "S_INACTIVE",
    "S_LRU",
    "S_REFERENCED",
    "S_VALID",
    "Inode",
    "InodeCache",
    "find_inode",
]

LOADING = "inode load"  # to the lock-order validator: others wait for whoever reads an inode
RECLAIM_BATCH = 128  # inodes that one kernel call takes off the list


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
    seq = _field("seq")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inode) and other.handle == self.handle

    def __hash__(self) -> int:
        return self.handle

    def __repr__(self) -> str:
        return f"<inode {self.ino:#x} handle {self.handle}>"

    @property
    def dirty(self) -> bool:
        """Does it differ from what its cluster's buffer has?"""
        return bool(self.state & S_DIRTY)

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
        self._slab = arena.slab("xfs_inode", INODE, reclaimable=True)
        size = 1 << inode_log
        image = np.dtype([("bytes", "u1", (size,))])
        self._images = arena.slab(f"xfs_ifork-{size}", image, reclaimable=True)
        self._bytes = INODE.itemsize + size  # of an inode in core
        self._stubs = Stubs(arena)
        self.table = self._slab.table
        self.fields = {name: self.table[name] for name in INODE.names or ()}
        self._head = np.zeros(records.H_WORDS * len(arena.nodes), np.int64)
        self._head[records.H_SPAN] = self._slab.span
        self._loads: dict[int, trio.Event] = {}
        self._idle = np.zeros(RECLAIM_BATCH, np.int64)
        self.read_image: Callable[[Inode], Any]
        self.evict: Callable[[int], None] = lambda handle: None
        self.unused: Callable[[int], None] = lambda handle: None  # no reference, no lookup
        self.freeing: Callable[[int], None] = lambda handle: None  # whoever knows it by number
        self.start_inactivation: Callable[[Inode], None]

    async def start(self) -> None:
        """Take the memory of the hash buckets."""
        self.buckets = await self._new_buckets()
        self._stubs.start(await self._new_buckets())
        self._arena.register_by_node(self)

    async def _new_buckets(self) -> np.ndarray[Any, np.dtype[np.uint32]]:
        pages = max(1, self._arena.nr_pages // 2048)
        order = min(6, (pages - 1).bit_length())
        pfn = await self._arena.alloc_folio(order, gfp.KERNEL | gfp.ZERO)
        return self._arena.mem[pfn << 12 : (pfn << 12) + (4096 << order)].view(np.uint32)

    # -- references -----------------------------------------------------------------------------

    def hold(self, handle: int) -> Inode:
        """One more reference of an in-core inode."""
        refs = self.fields["refs"]
        refs[handle] += 1
        if refs[handle] == 1:
            records.lru_remove(self.table, self._head, handle)
        return Inode(self, handle)

    def view(self, handle: int) -> Inode:
        """The view of an inode that a kernel took a reference of."""
        return Inode(self, handle)

    def find(self, ino: int) -> Inode | None:
        """The inode if it is in core and in use: one reference; None otherwise."""
        handle = records.find(self.table, self._head, self.buckets, ino)
        if not handle or not self.fields["state"][handle] & S_VALID:
            return None
        if not self.fields["mode"][handle]:
            return None
        return self.hold(handle)

    async def get(self, ino: int) -> Inode:
        """A reference of an inode in use.

        Raises OSError(ENOENT) for a free one, Corrupt for a broken one, OSError(EIO).
        """
        if lockdep.current is not None:
            lockdep.current.wants(LOADING, ino, ino)
        while True:
            under_way = self._loads.get(ino)
            if under_way is not None:
                await under_way.wait()
                continue
            handle = records.find(self.table, self._head, self.buckets, ino)
            if not handle:
                return await self._load(ino)
            if not self.fields["mode"][handle]:
                raise FileNotFoundError(2, f"inode {ino} is free")
            return self.hold(handle)

    async def _load(self, ino: int) -> Inode:
        done = self._loads[ino] = trio.Event()
        ip: Inode | None = None
        validator = lockdep.current
        if validator is not None:
            validator.took(LOADING, ino, ino)
        try:
            with gfp.nofs():  # a transaction may wait for this very inode
                ip = await self._new(ino)
            await self.read_image(ip)
            if not ip.mode:
                raise FileNotFoundError(2, f"inode {ino} is free")
            ip.nlookup = self._stubs.take(ino)
            records.publish(self.table, self._head, ip.handle)
            return ip
        except BaseException:
            if ip is not None:
                self._drop(ip.handle)
            raise
        finally:
            del self._loads[ino]
            done.set()
            if validator is not None:
                validator.dropped(LOADING, ino)

    async def _new(self, ino: int) -> Inode:
        """A record with one reference, findable but not valid; both its locks are held."""
        handle, image = await self._new_record()
        self.fields["ino"][handle] = ino
        self.fields["image"][handle] = image
        self.fields["refs"][handle] = 1
        records.insert(self.table, self._head, self.buckets, handle)
        return Inode(self, handle)

    async def _new_record(self) -> tuple[int, int]:
        """Memory of an inode: its record and its image. NOFAIL, as in XFS: see `BufCache._new`."""
        image = await self._images.alloc(gfp.KERNEL | gfp.NOFAIL)
        try:
            return await self._slab.alloc(gfp.KERNEL | gfp.NOFAIL), image
        except BaseException:
            self._images.free(image)
            raise

    def freed(self, ino: int) -> int | None:
        """The generation of a free inode that is in core; its cluster may not know it yet."""
        handle = records.find(self.table, self._head, self.buckets, ino)
        if not handle or not self.fields["state"][handle] & S_VALID:
            return None
        return None if self.fields["mode"][handle] else int(self.fields["gen"][handle])

    async def create(self, ino: int, gen: int) -> Inode:
        """The in-core inode of a freshly allocated ino: one reference, everything else zero.

        If the freed inode is still in core, its generation is newer than the image's and stays.
        """
        if lockdep.current is not None:
            lockdep.current.wants(LOADING, ino, ino)
        while ino in self._loads:
            await self._loads[ino].wait()
        ip = self._renewed(ino)
        if ip is None:
            done = self._loads[ino] = trio.Event()
            try:
                handle, image = await self._new_record()
                ip = self._begin(handle, ino, image, gen)
            finally:
                del self._loads[ino]
                done.set()
        return ip

    def _begin(self, handle: int, ino: int, image: int, gen: int) -> Inode:
        records.begin(self.table, self._head, self.buckets, handle, ino, image, gen)
        return Inode(self, handle)

    def _renewed(self, ino: int) -> Inode | None:
        """The record of a freed inode that is still in core, held and zeroed; it keeps its gen."""
        handle = records.find(self.table, self._head, self.buckets, ino)
        if not handle:
            return None
        assert not self.fields["mode"][handle], f"inode {ino} is allocated and in use"
        ip = self.hold(handle)
        records.renew(self.table, self._head, self._arena.mem, handle, self.inode_log)
        return ip

    @property
    def loading(self) -> bool:
        """Is an inode being read, which no kernel can see?"""
        return bool(self._loads)

    @property
    def slabs(self) -> tuple[int, int]:
        """Numbers of the slab caches of records and images."""
        return self._slab.number, self._images.number

    @property
    def words(self) -> tuple[Any, Any, Any]:
        """Records, head and hash, for kernels of other modules."""
        return self.table, self._head, self.buckets

    def put(self, ip: Inode) -> None:
        """Drop one reference."""
        handle = ip.handle
        refs = self.fields["refs"]
        assert refs[handle] > 0
        refs[handle] -= 1
        if refs[handle] or self._inactivates(ip):
            return
        if not self.fields["nlookup"][handle]:
            self.unused(handle)
        self.fields["state"][handle] |= S_REFERENCED
        records.lru_add(self.table, self._head, handle)

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
        records.count_lookup(self.table, self._head, ip.handle)

    def forget(self, ino: int, count: int) -> None:
        """The kernel takes back `count` lookups."""
        handle = records.find(self.table, self._head, self.buckets, ino)
        if not handle or not self.fields["state"][handle] & S_VALID:
            self._stubs.forget(ino, count)
            return
        left = records.uncount_lookups(self.table, self._head, handle, count)
        if left or self.fields["refs"][handle] or self._inactivates(Inode(self, handle)):
            return
        self.unused(handle)

    def forget_all(self) -> None:
        """The kernel is gone and forgot to say so: no lookup count holds any longer."""
        for handle in self.handles():
            if self.fields["nlookup"][handle]:
                self.forget(int(self.fields["ino"][handle]), 1 << 62)

    def handles(self) -> list[int]:
        """Every in-core inode's handle; O(inodes), for unmount and reports."""
        out = np.zeros(int(self._head[records.H_COUNT]), np.int64)
        n = records.collect(self.table, self._head, self.buckets, out)
        return [int(h) for h in out[:n]]

    # -- dirty state ----------------------------------------------------------------------------

    def mark_dirty(self, ip: Inode) -> None:
        """Core or forks differ from the inode's cluster buffer."""
        records.mark_dirty(self.table, self._head, ip.handle)

    def mark_clean(self, ip: Inode) -> None:
        records.mark_clean(self.table, self._head, ip.handle)

    def first_dirty(self) -> Inode | None:
        """The inode that has been dirty longest."""
        handle = int(self._head[records.H_DIRTY])
        return Inode(self, handle) if handle else None

    @property
    def dirty_count(self) -> int:
        return int(self._head[records.H_DIRTY_COUNT])

    # -- life -----------------------------------------------------------------------------------

    def in_core(self, first_ino: int, count: int) -> list[int]:
        """Handles of those of `count` inodes that have a record."""
        args = self.table, self._head, self.buckets
        found = (records.find(*args, ino) for ino in range(first_ino, first_ino + count))
        return [handle for handle in found if handle]

    def drop_chunk(self, first_ino: int, count: int) -> None:
        """Forget the free inodes of a chunk whose blocks are being freed; none may be in use."""
        out = self._idle[:count]
        n = records.drop_free(self.table, self._head, self.buckets, first_ino, out)
        assert n >= 0, f"an inode of the freed chunk at {first_ino} is in use"
        self._arena.rcu.defer_all(self._free, out[:n].tolist(), self._bytes)

    def _drop(self, handle: int) -> None:
        """Take out an inode whose locks we hold; its memory goes after a grace period."""
        records.mark_clean(self.table, self._head, handle)
        records.lru_remove(self.table, self._head, handle)
        records.remove(self.table, self._head, self.buckets, handle)
        self._arena.rcu.defer(self._free, handle, self._bytes)

    def _free(self, handle: int) -> None:
        self.freeing(handle)
        self._images.free(int(self.fields["image"][handle]))
        self._slab.free(handle)

    def count_objects(self, nid: int = 0) -> int:
        return self._arena.vfs_count(int(self._head[nid * records.H_WORDS + records.H_IDLE]))

    def scan_objects(self, nr: int, gfp_flags: int, nid: int = 0) -> int:
        """Free idle clean inodes from a node's cold end, looking at up to `nr`; never waits.

        Not for who is in the filesystem already: dropping an inode takes its locks and its folios.
        """
        if gfp_flags & gfp.NOFS:
            return SHRINK_STOP
        freed, looked_at = 0, 0
        while looked_at < nr:
            batch = min(RECLAIM_BATCH, nr - looked_at)
            out = self._idle[:batch]
            n = records.reclaim(self.table, self._head, out, batch, nid)
            freed += self._reclaim_claimed(out[:n].tolist())
            looked_at += batch
        return freed

    def _reclaim_claimed(self, handles: list[int]) -> int:
        """Free claimed inodes, with one grace period for all; how many."""
        gone = []
        for handle in handles:
            count = int(self.fields["nlookup"][handle])
            if count and not self._stubs.keep(int(self.fields["ino"][handle]), count):
                records.give_up(self.table, self._head, handle)
                continue
            self.evict(handle)
            records.remove(self.table, self._head, self.buckets, handle)
            gone.append(handle)
        if gone:
            self._arena.rcu.defer_all(self._free, gone, self._bytes)
            self._arena.rcu.expedite()
        return len(gone)
