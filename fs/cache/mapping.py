"""The page cache's part of an in-core inode: one sub-record, all zeroes when nothing is cached.

The radix root comes first, then what writeback keeps (its STATE), then the space accounting of
dirty blocks and the readahead window. Kernels address it by the index of its first 32-bit word
in the arena, its `root`; Python reads it as a structured view.

Lanes change `ndirty`, `nrwriteback`, `flags`, `delalloc`, `pending` and `indirect`, too, so these
change in kernels only, under the mapping's spin lock (R_LOCK); one of them alone may be read
without it. `credit` is counted down by who holds the IOLOCK exclusively. The flusher's lists,
`error`, `synced`, `writeback_index`, the readahead window and `map_seq` (under the ILOCK,
exclusively) are the trio thread's; lanes may read map_seq.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import spin_lock, spin_unlock
from alloc.jit import kernel
from fs.cache.radix import R_LOCK, ROOT
from writeback.mapping import INODE_DIRTY, LISTED, LISTED_TIME, STATE

SPACE = np.dtype(
    [
        ("delalloc", "<u4"),  # fs blocks reserved for dirty data that has none of its own yet
        ("pending", "<u4"),  # dirty fs blocks whose write-back changes the extent map
        ("indirect", "<u4"),  # fs blocks reserved for the extent tree that may need them
        ("ra_order", "u1"),  # readahead (fs/cache/window.py): order of the last window, and TAKEN
        ("ra_run", "u1"),  # misses in a row that were ra_step apart
        ("ra_step", "<i2"),  # pages between the last two misses
        ("ra_start", "<u8"),  # first page of the last window
        ("ra_pages", "<u2"),  # its length
        ("ra_async", "<u2"),  # how many of them lie behind its marker, that page included
        ("map_seq", "<u4"),  # goes up with every change of the extent map
        ("mempolicy", "<u4"),  # where its folios lie (alloc/mempolicy.py); 0: as the mount says
        ("ra_behind", "<u4"),  # the page behind the last that a miss asked for, its lower bits
    ]
)
MAPPING = np.dtype([(name, d[name]) for d in (ROOT, STATE, SPACE) for name in (d.names or ())])
assert MAPPING.itemsize == 112


def _word(name: str) -> int:
    """Where a field is, in 32-bit words from the start of the mapping."""
    assert MAPPING.fields is not None
    return int(MAPPING.fields[name][1]) // 4


W_NDIRTY = _word("ndirty")
W_NRWRITEBACK = _word("nrwriteback")
W_FLAGS = _word("flags")
W_CREDIT = _word("credit")
W_DELALLOC = _word("delalloc")
W_PENDING = _word("pending")
W_INDIRECT = _word("indirect")
W_POLICY = _word("mempolicy")


@kernel("i8(u4[::1], i8, i8, i8)")
def change_flags(m4, root, add, remove):
    """Change the flags of a mapping; what they were."""
    spin_lock(m4, root + R_LOCK)
    before = np.int64(m4[root + W_FLAGS])
    m4[root + W_FLAGS] = (before | add) & ~remove
    spin_unlock(m4, root + R_LOCK)
    return before


@kernel("i8(u4[::1], i8)")
def unlist(m4, root):
    """Take a mapping's LISTED or LISTED_TIME if nothing in it is dirty; whether it was taken.

    Lanes dirty only what is LISTED, under the same lock, so nothing becomes dirty unnoticed.
    """
    spin_lock(m4, root + R_LOCK)
    flags = np.int64(m4[root + W_FLAGS])
    clean = m4[root + W_NDIRTY] == 0 and flags & INODE_DIRTY == 0
    taken = clean and flags & (LISTED | LISTED_TIME) != 0
    if taken:
        m4[root + W_FLAGS] = flags & ~(LISTED | LISTED_TIME)
    spin_unlock(m4, root + R_LOCK)
    return np.int64(taken)


@kernel("i8(u4[::1], i8)")
def defer(m4, root):
    """Give a listed mapping LISTED_TIME instead of LISTED if it has no dirty page; whether it has.

    From then on lanes change its access time, but dirty no page before it is LISTED again.
    """
    spin_lock(m4, root + R_LOCK)
    flags = np.int64(m4[root + W_FLAGS])
    deferred = m4[root + W_NDIRTY] == 0 and flags & (LISTED | LISTED_TIME) != 0
    if deferred:
        m4[root + W_FLAGS] = flags & ~LISTED | LISTED_TIME
    spin_unlock(m4, root + R_LOCK)
    return np.int64(deferred)
