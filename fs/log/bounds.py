"""How large things of the log are, and how much memory it may pin: asked when an image is mounted.

Changed objects are pinned until their checkpoint is stable; how much metadata may be dirty when a
transaction begins is bounded. Beside them are the vectors of two checkpoints, one that is written
and one that is collected; transactions begin while that has up to two limits. The largest
transaction may come on top each time. So the most that is pinned, and that no reclaim can free, is
a share of memory and a part that does not grow with it: that part needs a memory of some size.

Units: bytes. Pure functions of the image's geometry.
"""

from __future__ import annotations

import math

from fs.log import reservation
from fs.log.iclog import SIZE_LEAST, SIZE_MOST
from fs.log.stream import ICLOGS
from fs.xfs.geometry import Geometry

LOG_SHARE = 8  # a checkpoint has at most this part of the log,
MEMORY_SHARE = 32  # and of memory
LIMIT_MOST = 32 << 20
GATE = 2  # limits that may be collected while transactions begin
CHECKPOINTS = 2  # one that is written, one that is collected
METADATA_SHARE = 8  # at most 1/8 of memory may be dirty metadata before transactions wait
FREE_SHARE = 8  # of memory that must be left when all is pinned that can be
MIB = 1 << 20


def log_bytes(geo: Geometry) -> int:
    """Size of the log."""
    return geo.log_blocks << geo.block_log


def limit(geo: Geometry, memory_bytes: int) -> int:
    """How much a checkpoint collects before it is written."""
    return min(log_bytes(geo) // LOG_SHARE, memory_bytes // MEMORY_SHARE, LIMIT_MOST)


def _fixed(geo: Geometry, logbsize: int) -> int:
    """What may be pinned whatever the memory: iclogs, and three times the largest transaction."""
    largest = max(known.logres for known in reservation.table(geo).values())
    return ICLOGS * logbsize + (1 + CHECKPOINTS) * largest


def pinned_most(geo: Geometry, logbsize: int, memory_bytes: int) -> int:
    """Memory that the log may pin."""
    vectors = CHECKPOINTS * GATE * limit(geo, memory_bytes)
    return memory_bytes // METADATA_SHARE + vectors + _fixed(geo, logbsize)


def memory_least(geo: Geometry, logbsize: int) -> int:
    """The smallest memory, in whole MiB, of which enough is left, whatever is pinned."""
    scaled = 1 - 1 / FREE_SHARE - 1 / METADATA_SHARE - CHECKPOINTS * GATE / MEMORY_SHARE
    return math.ceil(_fixed(geo, logbsize) / scaled / MIB) * MIB


def iclog_bytes(geo: Geometry, asked: int) -> int:
    """Size of the log's buffers for `logbsize=` (0: not said). Raises ValueError with the reason.

    XFS's rules: 32 KiB, or a stripe unit of the log if that is more; never less than one, and a
    multiple of it.
    """
    if not asked:
        return max(SIZE_LEAST, geo.log_sunit)
    if asked < geo.log_sunit:
        raise ValueError(
            f"logbuf size must be greater than or equal to log stripe size ({geo.log_sunit})"
        )
    if geo.log_sunit and asked % geo.log_sunit:
        raise ValueError(f"logbuf size must be a multiple of the log stripe size ({geo.log_sunit})")
    assert SIZE_LEAST <= asked <= SIZE_MOST
    return asked


def check(geo: Geometry, logbsize: int, memory_bytes: int) -> None:
    """Raises ValueError for a log that is too small, or a memory that is too small for it."""
    least = reservation.minimum_log_blocks(geo, logbsize)
    if geo.log_blocks < least:
        raise ValueError(
            f"Log size {geo.log_blocks} blocks too small, minimum size is {least} blocks"
        )
    needed = memory_least(geo, logbsize)
    if memory_bytes < needed:
        pinned = pinned_most(geo, logbsize, memory_bytes)
        raise ValueError(
            f"the log of this image may pin {-(-pinned // MIB)} MiB of memory, too much of "
            f"{memory_bytes // MIB} MiB; mount it with at least --memory {needed // MIB}M"
        )


def told(geo: Geometry, logbsize: int, memory_bytes: int) -> str:
    """A line for the log of a mount."""
    pinned = pinned_most(geo, logbsize, memory_bytes)
    return (
        f"log: {log_bytes(geo) / MIB:g} MiB, checkpoints up to "
        f"{limit(geo, memory_bytes) >> 10} KiB, at most {pinned >> 10} KiB of memory pinned"
    )
