"""Stubs: what stays in memory of a reclaimed inode that the kernel still knows.

The kernel's lookup count of an inode must outlive its record, or an unlink would free an inode
that the kernel can still name. A stub is ino and count, 32 bytes in the arena, hashed by ino. It
is made when reclaim takes a record whose count is not zero, and goes when the count comes back
into a record, or the kernel has forgotten the rest.

Locking: trio thread only, nothing awaits after `start`. Lanes never look at stubs: they count
under a lock of the record, and reclaim holds that before it reads the count.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alloc import gfp
from alloc.arena import Arena
from alloc.jit import kernel
from fs.cache.thread import bucket_of, chain_find, chain_insert, chain_remove

STUB = np.dtype(
    [
        ("ino", "u8"),
        ("nlookup", "u8"),  # what the kernel will take back with FORGET
        ("hash_next", "u4"),
        ("pad", "u1", (12,)),
    ]
)
assert STUB.itemsize == 32
ALL = 1 << 62  # more lookups than there are

_BUCKETS = np.zeros(1, np.uint32)


@kernel(lambda: (np.zeros(1, STUB), _BUCKETS, 1, 1, 1))
def _insert(stubs, buckets, stub, ino, count):
    stubs["ino"][stub] = ino
    stubs["nlookup"][stub] = count
    chain_insert(stubs["hash_next"], buckets, bucket_of(buckets, ino), stub)


@kernel(lambda: (np.zeros(1, STUB), _BUCKETS, 1, 1))
def _forget(stubs, buckets, ino, count):
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


class Stubs:
    """The lookup counts of inodes that are not in core."""

    def __init__(self, arena: Arena) -> None:
        self._slab = arena.slab("xfs_inode_stub", STUB)
        self._buckets: NDArray[np.uint32]

    def start(self, buckets: NDArray[np.uint32]) -> None:
        """Use these zeroed hash buckets."""
        self._buckets = buckets

    def keep(self, ino: int, count: int) -> bool:
        """Remember a count; False if that needs memory that is not there at once."""
        # Reclaim itself: whoever waits here would wait for himself.
        stub = self._slab.try_alloc(gfp.MEMALLOC | gfp.NOWAIT)
        if stub is None:
            return False
        _insert(self._slab.table, self._buckets, stub, ino, count)
        return True

    def forget(self, ino: int, count: int) -> None:
        """The kernel takes back `count` lookups."""
        self._take(ino, count)

    def take(self, ino: int) -> int:
        """The count of an inode that comes back into core, 0 if there is none; its stub is gone."""
        return self._take(ino, ALL)

    def _take(self, ino: int, count: int) -> int:
        stub = int(_forget(self._slab.table, self._buckets, ino, count))
        if not stub:
            return 0
        kept = int(self._slab.table["nlookup"][stub])
        self._slab.free(stub)
        return kept
