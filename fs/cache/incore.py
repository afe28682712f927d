"""The in-core inode's record: its layout, its words as lanes see them, and how lanes find it.

A record is the core in native form, what only memory knows, and the page-cache mapping. Python
and the kernels of the trio thread read it through the dtype; lanes read words of the arena, whose
places are the I4_ constants (in 32-bit words from the record's first) and I8_ (in 64-bit words).

`find_inode` runs in an RCU section. A record that it finds may be on its way out of the cache or
in, so the caller then takes a lock of it by try and looks at ino and state again: whoever puts a
record in, or takes it out, holds both of its locks.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import load_acquire
from alloc.jit import helper
from fs.cache.mapping import MAPPING
from fs.cache.thread import bucket_of

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
        ("iolock", "u4"),  # fs.cache.lock words
        ("ilock", "u4"),
        ("touched", "u4"),  # a lane found it since reclaim last looked
        ("writers", "u4"),  # open files that may write (fs/eofblocks.py)
        ("mapping", MAPPING),
        # What the log knows of it, as of a buffer (fs/cache/buf.py).
        ("seq", "i8"),
        ("held", "i8"),
        ("lsn", "i8"),
        ("item", "u4"),
        ("going", "u4"),
        ("pad", "u1", (288 - MAPPING.itemsize,)),
    ]
)
assert INODE.itemsize == 512, INODE.itemsize
assert INODE.fields is not None
assert INODE.fields["mapping"][1] % 64 == 0

S_VALID, S_DIRTY, S_LRU, S_REFERENCED, S_INACTIVE, S_BAD = 1, 2, 4, 8, 16, 32
S_NOSEC = 128  # known to have no capabilities that a write would take away
S_LINKABLE = 64  # without links, but not removed: a temporary file that may get a name
S_EOFBLOCKS = 256  # may have blocks past its end, so the record stays (fs/eofblocks.py)
S_RELEASED = 512  # lost such blocks when it was closed,
S_REOPENED = 1024  # and was opened for writing again

INODE_WORDS = INODE.itemsize // 4
INODE_LONGS = INODE.itemsize // 8


def _word(name: str, size: int) -> int:
    """Where a field is, in words of `size` bytes from the start of the record."""
    assert INODE.fields is not None
    offset = int(INODE.fields[name][1])
    assert offset % size == 0, name
    return offset // size


I8_INO = _word("ino", 8)
I8_SIZE = _word("size", 8)
I8_NBLOCKS = _word("nblocks", 8)
I8_ATIME = _word("atime", 8)
I8_MTIME = _word("mtime", 8)
I8_CTIME = _word("ctime", 8)
I8_CRTIME = _word("crtime", 8)
I8_CHANGECOUNT = _word("changecount", 8)
I8_NEXTENTS = _word("nextents", 8)
I8_FLAGS2 = _word("flags2", 8)
I8_NLOOKUP = _word("nlookup", 8)
I4_GEN = _word("gen", 4)
I4_UID = _word("uid", 4)
I4_GID = _word("gid", 4)
I4_NLINK = _word("nlink", 4)
I4_ANEXTENTS = _word("anextents", 4)
I4_RDEV = _word("rdev", 4)
I4_MODE_FLAGS = _word("mode", 4)  # u2 mode, u2 flags above it
I4_FORKOFF_FORMAT = _word("forkoff", 4)  # bytes: forkoff, format, aformat
I4_IMAGE = _word("image", 4)
I4_STATE = _word("state", 4)
I4_HASH_NEXT = _word("hash_next", 4)
I4_IOLOCK = _word("iolock", 4)
I4_ILOCK = _word("ilock", 4)
I4_TOUCHED = _word("touched", 4)
I4_MAPPING = _word("mapping", 4)


@helper
def find_inode(m4, s8, buckets, ino):
    """Handle of the record hashed under an ino, or 0. In an RCU section; see the header."""
    h = np.int64(load_acquire(buckets, bucket_of(buckets, ino)))
    while h != 0 and s8[h * INODE_LONGS + I8_INO] != ino:
        h = np.int64(load_acquire(m4, h * INODE_WORDS + I4_HASH_NEXT))
    if h != 0 and m4[h * INODE_WORDS + I4_TOUCHED] == 0:
        m4[h * INODE_WORDS + I4_TOUCHED] = 1
    return h
