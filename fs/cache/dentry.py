"""The dentry cache: which name in which directory is which inode, or that it is none.

An entry is a 128-byte slab record in the arena with the name inside; names that do not fit are
simply not cached. The key is the directory's inode number *and generation*, so entries of a
directory that was removed can never be taken for those of a new one with its number. An entry
with inode number 0 is negative: the name is known not to exist. Entries pin nothing: they hold
numbers, and whoever looks one up gets the inode from the inode cache.

Invariants: every record is on one hash chain and on its node's LRU list; at most one per key.
Coherence: entries are made under the directory's ILOCK (shared is enough) and changed or dropped
by whoever changes the directory, before it gives its exclusive ILOCK back.

Locking: the trio thread changes everything, and nothing here awaits after `start`. Lanes look names
up by RCU (`find_name`): key and name of a hashed record never change, its ino changes in one
store, and its memory is given back after a grace period. An insertion that would need memory at
once does without (NOWAIT): the cache is an optimisation, so it never makes anybody wait.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from alloc import gfp
from alloc.arena import Arena
from alloc.atomic import load_acquire, store_release
from alloc.buddy import RIGHTS_LOW, WOULD_BLOCK
from alloc.jit import helper, kernel
from alloc.magazine import object_alloc
from alloc.mempolicy import NONE
from alloc.page import Slabs
from alloc.placement import place
from alloc.rows import TRIO
from alloc.shrinker import SHRINK_STOP
from fs.cache.lock import Mutex
from fs.cache.thread import bucket_of, chain_insert, chain_remove, list_append, list_remove, row_of
from fs.xfs.danode import hash_bytes
from fs.xfs.dirdata import same_name

if TYPE_CHECKING:
    from fs.cache.inode import Inode

PAGE_SIZE = 4096

DENTRY = np.dtype(
    [
        ("parent", "u8"),  # ino of the directory
        ("ino", "u8"),  # what the name is; 0: nothing has this name
        ("gen", "u4"),  # generation of the directory
        ("hash", "u4"),
        ("hash_next", "u4"),
        ("lru_prev", "u4"),
        ("lru_next", "u4"),
        ("namelen", "u1"),
        ("ftype", "u1"),
        ("flags", "u1"),  # only F_REFERENCED, which lanes set, too
        ("pad", "u1"),
        ("name", "u1", (88,)),
    ]
)
SIZE = DENTRY.itemsize
assert SIZE == 128
NAME_MAX = 88


def _at(name: str, size: int = 1) -> int:
    """Where a field is, in words of `size` bytes from the start of the record."""
    assert DENTRY.fields is not None
    offset = int(DENTRY.fields[name][1])
    assert offset % size == 0, name
    return offset // size


NAME_AT = _at("name")
# The record's words as find_name reads them.
DENTRY_WORDS, DENTRY_LONGS = SIZE // 4, SIZE // 8
NAMELEN_AT, FLAGS_AT = _at("namelen"), _at("flags")
I8_PARENT, I8_INO = _at("parent", 8), _at("ino", 8)
I4_GEN, I4_HASH, I4_HASH_NEXT = _at("gen", 4), _at("hash", 4), _at("hash_next", 4)

F_REFERENCED = 1

# Words of the head array, of which each node has a row.
H_LRU = 0  # two words: first and last
H_COUNT = 2
H_SPAN, H_HITS, H_MISSES = 3, 4, 5  # of the first row
H_WORDS = 6
RECLAIM_BATCH = 128
PAGES_PER_BUCKET_PAGE = 2048  # of the arena: a bucket of 4 bytes for every 8 KiB


def _table_args(*rest: Any) -> Callable[[], tuple[Any, ...]]:
    head, buckets = np.zeros(H_WORDS, np.int64), np.zeros(1, np.uint32)
    return lambda: (np.zeros(1, np.uint8), np.zeros(1, DENTRY), head, buckets, *rest)


@helper
def _key(parent, gen, name_hash):
    """31 bits over the key: the directory's name hash, spread by the parent."""
    seed = np.uint64(parent) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(gen)
    mixed = (np.uint64(name_hash) ^ seed) * np.uint64(0xD6E8FEB86659FD93)
    return np.int64(mixed >> np.uint64(33))


@helper
def _hash(parent, gen, name):
    return _key(parent, gen, hash_bytes(name, 0, len(name)))


@helper
def _is(mem, m4, s8, h, parent, gen, name_addr, name_len):
    """Is record h the entry of the name at mem[name_addr:]?"""
    if s8[h * DENTRY_LONGS + I8_PARENT] != parent or np.int64(m4[h * DENTRY_WORDS + I4_GEN]) != gen:
        return False
    if np.int64(mem[h * SIZE + NAMELEN_AT]) != name_len:
        return False
    at = h * SIZE + NAME_AT
    i = 0
    while i < name_len and mem[at + i] == mem[name_addr + i]:
        i += 1
    return i == name_len


@helper
def find_name(mem, m4, s8, buckets, parent, gen, name_addr, name_len):
    """(1, ino) of the name at mem[name_addr:], (0, 0) if nothing is known; ino 0: there is none.

    For lanes, in an RCU section. What it says was true at some moment in the call; a caller who
    has locked the inode since may call it again to learn whether it still is.
    """
    key = _key(parent, gen, hash_bytes(mem, name_addr, name_len))
    h = np.int64(load_acquire(buckets, bucket_of(buckets, key)))
    while h != 0:
        same_key = np.int64(m4[h * DENTRY_WORDS + I4_HASH]) == key
        if same_key and _is(mem, m4, s8, h, parent, gen, name_addr, name_len):
            if mem[h * SIZE + FLAGS_AT] == 0:
                mem[h * SIZE + FLAGS_AT] = F_REFERENCED
            return np.int64(1), np.int64(load_acquire(s8, h * DENTRY_LONGS + I8_INO))
        h = np.int64(load_acquire(m4, h * DENTRY_WORDS + I4_HASH_NEXT))
    return np.int64(0), np.int64(0)


@helper
def _same(mem, t, h, parent, gen, name):
    if np.int64(t["parent"][h]) != parent or np.int64(t["gen"][h]) != gen:
        return False
    if np.int64(t["namelen"][h]) != len(name):
        return False
    return same_name(mem, h * SIZE + NAME_AT, name)


@helper
def _find(mem, t, head, buckets, parent, gen, name):
    key = _hash(parent, gen, name)
    h = np.int64(buckets[bucket_of(buckets, key)])
    while h != 0:
        if np.int64(t["hash"][h]) == key and _same(mem, t, h, parent, gen, name):
            return h
        h = np.int64(t["hash_next"][h])
    return h


@helper
def _unhash(t, buckets, h):
    chain_remove(t["hash_next"], buckets, bucket_of(buckets, np.int64(t["hash"][h])), h)


@kernel(_table_args(1, 1, b""))
def _lookup(mem, t, head, buckets, parent, gen, name):
    """(1, ino, ftype) of a cached name, (0, 0, 0) if nothing is known."""
    h = _find(mem, t, head, buckets, parent, gen, name)
    if h == 0:
        head[H_MISSES] += 1
        return np.int64(0), np.int64(0), np.int64(0)
    head[H_HITS] += 1
    t["flags"][h] |= np.uint8(F_REFERENCED)
    return np.int64(1), np.int64(t["ino"][h]), np.int64(t["ftype"][h])


@helper
def _insert(mem, t, head, buckets, h, parent, gen, name, ino, ftype):
    """Fill the fresh record h and enter it."""
    t["parent"][h] = parent
    t["gen"][h] = gen
    t["ino"][h] = ino
    t["ftype"][h] = ftype
    t["flags"][h] = 0
    t["namelen"][h] = len(name)
    at = h * SIZE + NAME_AT
    for i in range(len(name)):
        mem[at + i] = name[i]
    key = _hash(parent, gen, name)
    t["hash"][h] = key
    chain_insert(t["hash_next"], buckets, bucket_of(buckets, key), h)
    row = row_of(head, H_SPAN, H_WORDS, h)
    list_append(t["lru_prev"], t["lru_next"], head, row + H_LRU, h)
    head[row + H_COUNT] += 1


@helper
def remember(mem, t, head, buckets, slabs, cache, parent, gen, name, ino, ftype):
    """Have the cache say what a name is; if it has no entry, and memory is short, leave it so."""
    if len(name) > NAME_MAX:
        return
    h = _find(mem, t, head, buckets, parent, gen, name)
    if h != 0:
        store_release(t["ino"], h, ino)
        t["ftype"][h] = ftype
        return
    h = object_alloc(slabs, mem, cache, RIGHTS_LOW | place(slabs.words, NONE, 0, 0), TRIO)
    if h != WOULD_BLOCK:
        _insert(mem, t, head, buckets, abs(h), parent, gen, name, ino, ftype)


def _slabs() -> Slabs:
    """Sample values of an arena's slabs."""
    u4, u8 = np.zeros(1, np.uint32), np.zeros(1, np.uint64)
    pages = np.zeros(1, np.uint8), np.zeros(1, np.int32)
    return Slabs(np.zeros(1, np.int64), u4, *pages, u4, u4, u4, u8, u8)


@kernel(_table_args(_slabs(), 1, 1, 1, b"", 1, 1))
def _remember(mem, t, head, buckets, slabs, cache, parent, gen, name, ino, ftype):
    """`remember` for Python."""
    remember(mem, t, head, buckets, slabs, cache, parent, gen, name, ino, ftype)


@kernel(_table_args(1, 1, b""))
def _remove(mem, t, head, buckets, parent, gen, name):
    """Take the entry of a name out; its record, or 0."""
    h = _find(mem, t, head, buckets, parent, gen, name)
    if h != 0:
        _unhash(t, buckets, h)
        row = row_of(head, H_SPAN, H_WORDS, h)
        list_remove(t["lru_prev"], t["lru_next"], head, row + H_LRU, h)
        head[row + H_COUNT] -= 1
    return h


@kernel(_table_args(np.zeros(1, np.int64), 1, 1))
def _reclaim(mem, t, head, buckets, out, scan, node):
    """Take up to out.size entries off a node's cold end; returns how many. Second chance."""
    n = 0
    row = node * H_WORDS
    for _ in range(scan):
        h = head[row + H_LRU]
        if h == 0 or n == out.size:
            break
        list_remove(t["lru_prev"], t["lru_next"], head, row + H_LRU, h)
        if t["flags"][h] & F_REFERENCED:
            t["flags"][h] &= ~np.uint8(F_REFERENCED)
            list_append(t["lru_prev"], t["lru_next"], head, row + H_LRU, h)
            continue
        _unhash(t, buckets, h)
        head[row + H_COUNT] -= 1
        out[n] = h
        n += 1
    return n


class DentryCache:
    """All cached names of one volume."""

    name = "dentry"

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._slab = arena.slab("dentry", DENTRY, reclaimable=True)
        self._head = np.zeros(H_WORDS * len(arena.nodes), np.int64)
        self._head[H_SPAN] = self._slab.span
        self._found = np.zeros(RECLAIM_BATCH, np.int64)
        self._state: tuple[Any, ...] = ()
        self.rename_lock = Mutex("rename")  # held while a directory moves to another directory

    async def start(self) -> None:
        """Take the memory of the hash buckets."""
        pages = max(1, self._arena.nr_pages // PAGES_PER_BUCKET_PAGE)
        order = min(8, (pages - 1).bit_length())
        pfn = await self._arena.alloc_folio(order, gfp.KERNEL | gfp.ZERO)
        raw = self._arena.mem[pfn * PAGE_SIZE : pfn * PAGE_SIZE + (PAGE_SIZE << order)]
        self.buckets = raw.view(np.uint32)
        self._state = (self._arena.mem, self._slab.table, self._head, self.buckets)
        self._arena.register_by_node(self)

    def lookup(self, dp: Inode, name: bytes) -> tuple[int, int] | None:
        """(ino, ftype) of a name, ino 0 if it is known not to exist; None if nothing is known."""
        known, ino, ftype = _lookup(*self._state, dp.ino, dp.gen, name)
        return (ino, ftype) if known else None

    def insert(self, dp: Inode, name: bytes, ino: int, ftype: int) -> None:
        """Remember a name under the directory's ILOCK; ino 0: that it does not exist."""
        where = self._arena.slabs, self._slab.number
        _remember(*self._state, *where, dp.ino, dp.gen, name, ino, ftype)

    @property
    def words(self) -> tuple[Any, Any, Any]:
        """Records, head and hash, for kernels of other modules."""
        return self._slab.table, self._head, self.buckets

    @property
    def slab(self) -> int:
        """Number of the slab cache."""
        return self._slab.number

    def forget(self, dp: Inode, name: bytes) -> None:
        """Know nothing of a name any more."""
        h = int(_remove(*self._state, dp.ino, dp.gen, name))
        if h:
            self._arena.rcu.defer(self._slab.free, h, SIZE)

    # -- shrinker and figures -------------------------------------------------------------------

    def count_objects(self, nid: int = 0) -> int:
        return self._arena.vfs_count(int(self._head[nid * H_WORDS + H_COUNT]))

    def scan_objects(self, nr: int, gfp_flags: int, nid: int = 0) -> int:
        """Drop up to `nr` cold entries of a node; never waits.

        Not for who is in the filesystem already.
        """
        if gfp_flags & gfp.NOFS:
            return SHRINK_STOP
        freed, scanned = 0, 0
        while scanned < nr:
            batch = min(RECLAIM_BATCH, nr - scanned)
            out = self._found[:batch]
            n = int(_reclaim(*self._state, out, batch, nid))
            if n:
                self._arena.rcu.defer_all(self._slab.free, out[:n].tolist(), SIZE)
                self._arena.rcu.expedite()
            freed, scanned = freed + n, scanned + batch
        return freed

    def statistics(self) -> dict[str, int]:
        """Entries, hits and misses since the mount."""
        head = self._head
        return {
            "entries": int(head[H_COUNT::H_WORDS].sum()),
            "hits": int(head[H_HITS]),
            "misses": int(head[H_MISSES]),
        }
