"""File handles without a table: the 64 bits that FUSE carries for us hold all we need.

The low 32 bits are the in-core inode's handle, on which the open file holds one reference; above
them are the properties of this open that requests need. Nothing is kept in Python for an open
file, so open files cost no memory that the arena does not count.
"""

from __future__ import annotations

import os

HANDLE_BITS = 32
HANDLE_MASK = (1 << HANDLE_BITS) - 1
WRITE = 1 << 32  # opened for writing
DATA_SYNC = 1 << 33  # O_DSYNC: a write returns when its data are on the device
FULL_SYNC = 1 << 34  # O_SYNC: and the inode as well
APART = 1 << 36  # no inode behind it: fs/front/procdir.py's
ORDINARY = 1 << 35  # opened by an ordinary user, whose writes take set-id bits away
TURN_SHIFT, TURN_BITS = 37, 27  # which open it was, so that no two files have one handle


def is_writing(flags: int) -> bool:
    """Whether open flags ask for write access."""
    return flags & os.O_ACCMODE != os.O_RDONLY


def pack(handle: int, flags: int, uid: int = 0, turn: int = 0) -> int:
    """The file handle for an open with these flags by this user, the `turn`-th of all."""
    assert 0 < handle <= HANDLE_MASK
    word = handle | (ORDINARY if uid else 0) | (turn & (1 << TURN_BITS) - 1) << TURN_SHIFT
    if is_writing(flags):
        word |= WRITE
    if flags & os.O_SYNC == os.O_SYNC:
        word |= FULL_SYNC
    elif flags & os.O_DSYNC:
        word |= DATA_SYNC
    return word


def inode_handle(fh: int) -> int:
    """The in-core inode of an open file."""
    return fh & HANDLE_MASK
