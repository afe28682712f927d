"""The table of in-core inodes: hash chains, idle list, dirty list, and claiming a record.

Kernels over the records of `fs/cache/incore.py`; the inode cache decides, these change. `head` has
the ends and the lengths of the lists, in a row for each node: the idle list is each node's own.

Locking: called on the trio thread only, each call atomic between awaits. Lanes find records by
RCU and use one only under a lock of it that they got by try. So a record is hashed with both its
locks held, until `publish`, and unhashed by whoever has claimed it: has taken both locks by try
himself. The locks of an unhashed record stay held. Lanes set `touched` and add to nlookup.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from alloc.atomic import compare_exchange, fetch_add, load_acquire, store_release
from alloc.jit import helper, kernel
from alloc.libc import memset
from fs.cache.incore import (
    INODE,
    S_DIRTY,
    S_EOFBLOCKS,
    S_INACTIVE,
    S_LINKABLE,
    S_LRU,
    S_REFERENCED,
    S_RELEASED,
    S_REOPENED,
    S_VALID,
)
from fs.cache.lock import EXCLUSIVE
from fs.cache.thread import (
    bucket_of,
    chain_find,
    chain_insert,
    chain_remove,
    join_list,
    leave_list,
    row_of,
)

H_LRU, H_IDLE = 0, 2  # of each node: first and last (two words), how many
H_SPAN, H_DIRTY, H_COUNT, H_DIRTY_COUNT = 3, 4, 6, 7  # of the first row; H_DIRTY: two words
H_WORDS = 8


def _table_args(*rest: Any) -> Callable[[], tuple[Any, ...]]:
    return lambda: (np.zeros(1, INODE), np.zeros(H_WORDS, np.int64), *rest)


_BUCKETS = np.zeros(1, np.uint32)


@kernel(_table_args(_BUCKETS, 1))
def find(t, head, buckets, ino):
    return chain_find(t["ino"], t["hash_next"], buckets, ino)


@helper
def _claim(t, h):
    """Take both locks of a record by try: nobody else uses it, and lanes will not begin to."""
    if not compare_exchange(t["iolock"], h, 0, EXCLUSIVE):
        return False
    if compare_exchange(t["ilock"], h, 0, EXCLUSIVE):
        return True
    store_release(t["iolock"], h, 0)
    return False


@helper
def _unclaim(t, h):
    store_release(t["ilock"], h, 0)
    store_release(t["iolock"], h, 0)


@kernel(_table_args(1))
def publish(t, head, h):
    """The record is complete: lanes may lock it."""
    t["state"][h] |= S_VALID
    _unclaim(t, h)


@kernel(_table_args(_BUCKETS, 1))
def insert(t, head, buckets, h):
    """Hash a record; both locks are held until it is published."""
    t["iolock"][h] = EXCLUSIVE
    t["ilock"][h] = EXCLUSIVE
    chain_insert(t["hash_next"], buckets, bucket_of(buckets, np.int64(t["ino"][h])), h)
    head[H_COUNT] += 1


@kernel(_table_args(_BUCKETS, 1, 1, 1, 1))
def begin(t, head, buckets, h, ino, image, gen):
    """Make a fresh record the valid in-core inode of a newly allocated ino, with one reference."""
    t["ino"][h] = ino
    t["image"][h] = image
    t["gen"][h] = gen
    t["refs"][h] = 1
    insert(t, head, buckets, h)
    publish(t, head, h)


@kernel(_table_args(np.zeros(1, np.uint8), 1, 1))
def renew(t, head, mem, h, inode_log):
    """Zero the core and the forks of a freed inode, which is held, so that it is used again."""
    t["size"][h] = t["disk_size"][h] = t["nblocks"][h] = t["nextents"][h] = 0
    t["flags2"][h] = t["anextents"][h] = t["flags"][h] = t["projid"][h] = 0
    t["extsize"][h] = t["cowextsize"][h] = t["rdev"][h] = 0
    t["forkoff"][h] = t["unlinked_prev"][h] = 0
    t["state"][h] &= ~np.uint32(S_INACTIVE | S_LINKABLE | S_RELEASED | S_REOPENED)
    memset(mem, np.int64(t["image"][h]) << inode_log, 0, np.int64(1) << inode_log)


@kernel(_table_args(_BUCKETS, 1))
def remove(t, head, buckets, h):
    """Unhash a claimed record; its locks stay held for lanes that found it before."""
    t["state"][h] &= ~np.uint32(S_VALID)
    chain_remove(t["hash_next"], buckets, bucket_of(buckets, np.int64(t["ino"][h])), h)
    head[H_COUNT] -= 1


@kernel(_table_args(_BUCKETS, np.zeros(1, np.int64)))
def collect(t, head, buckets, out):
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
def lru_add(t, head, h):
    row, links = row_of(head, H_SPAN, H_WORDS, h), (t["lru_prev"], t["lru_next"])
    join_list(t["state"], S_LRU, *links, head, row + H_LRU, row + H_IDLE, h)


@kernel(_table_args(1))
def lru_remove(t, head, h):
    row, links = row_of(head, H_SPAN, H_WORDS, h), (t["lru_prev"], t["lru_next"])
    leave_list(t["state"], S_LRU, *links, head, row + H_LRU, row + H_IDLE, h)


@helper
def _idle(t, h):
    """Claim a record that reclaim may take: clean, without pages to write, not used of late."""
    state, is_used = t["state"][h], t["mode"][h] != 0
    if state & (S_DIRTY | S_REFERENCED) or t["touched"][h]:
        return False
    if is_used and (t["nlink"][h] == 0 or state & S_EOFBLOCKS):
        return False
    if not _claim(t, h):
        return False
    mapping = t["mapping"]  # lanes dirty pages under the IOLOCK only
    if mapping["flags"][h] or mapping["ndirty"][h] or mapping["nrwriteback"][h]:
        _unclaim(t, h)
        return False
    return True


@kernel(_table_args(np.zeros(1, np.int64), 1, 1))
def reclaim(t, head, out, scan, node):
    """Claim up to out.size idle inodes off a node's cold end; returns how many. Second chance."""
    n = 0
    row = node * H_WORDS
    for _ in range(min(scan, head[row + H_IDLE])):
        h = head[row + H_LRU]
        if n == out.size:
            break
        lru_remove(t, head, h)
        if not _idle(t, h):
            t["state"][h] &= ~np.uint32(S_REFERENCED)
            t["touched"][h] = 0
            lru_add(t, head, h)
            continue
        out[n] = h
        n += 1
    return n


@kernel(_table_args(1))
def give_up(t, head, h):
    """A claimed inode stays cached after all."""
    _unclaim(t, h)
    lru_add(t, head, h)


@kernel(_table_args(1))
def count_lookup(t, head, h):
    fetch_add(t["nlookup"], h, 1)


@kernel(_table_args(1, 1))
def uncount_lookups(t, head, h, count):
    """Take lookups off a record while lanes may add some; how many are left."""
    while True:
        before = np.int64(load_acquire(t["nlookup"], h))
        left = max(before - count, 0)
        if compare_exchange(t["nlookup"], h, before, left):
            return left


@kernel(_table_args(1))
def mark_dirty(t, head, h):
    links = t["dirty_prev"], t["dirty_next"]
    join_list(t["state"], S_DIRTY, *links, head, H_DIRTY, H_DIRTY_COUNT, h)


@kernel(_table_args(1))
def mark_clean(t, head, h):
    links = t["dirty_prev"], t["dirty_next"]
    leave_list(t["state"], S_DIRTY, *links, head, H_DIRTY, H_DIRTY_COUNT, h)


@kernel(_table_args(_BUCKETS, 1, np.zeros(1, np.int64)))
def drop_free(t, head, buckets, first, out):
    """Unhash the records of out.size inodes from number `first` on, all of them free ones.

    Returns how many there are for the caller to free, -1 if one is in use. Those that somebody
    holds or a lane looks at stay, clean.
    """
    n = 0
    for ino in range(first, first + out.size):
        h = chain_find(t["ino"], t["hash_next"], buckets, ino)
        if h == 0:
            continue
        if t["mode"][h]:
            return -1
        mark_clean(t, head, h)
        if t["refs"][h] == 0 and _claim(t, h):
            lru_remove(t, head, h)
            remove(t, head, buckets, h)
            out[n] = h
            n += 1
    return n
