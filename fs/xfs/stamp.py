"""Time stamps as inodes keep them in memory: bigtime nanoseconds.

XFS format: with bigtime a stamp counts nanoseconds from 2^31 seconds before 1970, which is what
32-bit stamps began with; in memory every inode uses that form, whatever its image has.
"""

from __future__ import annotations

import time

from fs.xfs import layout as L

EPOCH_NS = L.BIGTIME_EPOCH_SECONDS * 10**9


def now() -> int:
    """The present moment."""
    return time.time_ns() + EPOCH_NS


def to_unix_ns(stamp: int) -> int:
    """Nanoseconds since 1970, negative before."""
    return stamp - EPOCH_NS


def from_unix_ns(nanoseconds: int) -> int:
    """A stamp from nanoseconds since 1970."""
    return nanoseconds + EPOCH_NS
