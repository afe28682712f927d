"""Time stamps as inodes keep them in memory: bigtime nanoseconds.

XFS format: with bigtime a stamp counts nanoseconds from 2^31 seconds before 1970, which is what
32-bit stamps began with; in memory every inode uses that form, whatever its image has.
"""

from __future__ import annotations

import time

from fs.xfs import layout as L

EPOCH_NS = L.BIGTIME_EPOCH_SECONDS * 10**9
# Seconds since 1970 that a stamp can name.
SECONDS_MIN, SECONDS_MAX = -L.BIGTIME_EPOCH_SECONDS, (1 << 31) - 1
BIGTIME_SECONDS_MAX = ((1 << 64) // 10**9 & ~3) - L.BIGTIME_EPOCH_SECONDS


def now() -> int:
    """The present moment."""
    return time.time_ns() + EPOCH_NS


def to_unix_ns(stamp: int) -> int:
    """Nanoseconds since 1970, negative before."""
    return stamp - EPOCH_NS


def from_unix_ns(nanoseconds: int, bigtime: bool = True) -> int:
    """A stamp from nanoseconds since 1970; what it cannot name becomes the first or last second.

    Those two have no nanoseconds, as in the kernel.
    """
    seconds, rest = divmod(nanoseconds, 10**9)
    last = BIGTIME_SECONDS_MAX if bigtime else SECONDS_MAX
    if not SECONDS_MIN < seconds < last:
        seconds, rest = min(max(seconds, SECONDS_MIN), last), 0
    return seconds * 10**9 + rest + EPOCH_NS
