"""Totals of the filesystem, as the kernel's XFS reports them to statfs(2).

The log is not counted as space, and free is what data can still have: without the blocks that
the AGs keep for their trees and without the reserve pool. The number of inodes is what the free
blocks could hold, within the percentage that the image allows inodes (XFS format, superblock).

The figures stay in `vol.space.totals`, where lanes find them, until free blocks, promises or
inodes change on the trio thread. A lane that promises blocks lowers them itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyfuse3

from fs.space import T_AVAIL, T_BLOCKS, T_FFREE, T_FILES, T_FREE, T_VALID
from fs.xfs import ag
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.volume import Volume

INODE_MAX = 1 << 56  # the most that may be reported (XFS format, inode numbers)
NAME_MAX = 255
SET_ASIDE = 8  # blocks an AG never gives away: its free list, and room to refill it


async def _count_inodes(vol: Volume) -> tuple[int, int]:
    """Allocated and free inodes, from the AGI headers, which stay in the buffer cache."""
    count = free = 0
    async with vol.reader() as tp:
        for agno in range(vol.geo.agcount):
            buf = await ag.read_agi(tp, agno)
            agi = buf.rec(L.AGI)
            count, free = count + int(agi["count"]), free + int(agi["freecount"])
            tp.release(buf)
    return count, free


def _available(vol: Volume) -> int:
    """Free blocks. Nothing is held back for growth on a mount that cannot write."""
    if vol.read_only:
        return max(0, vol.space.free - SET_ASIDE * vol.geo.agcount)
    return vol.space.available


async def refresh(vol: Volume) -> None:
    """Have `vol.space.totals` say what is true now; lanes answer from it until something changes.

    Raises Corrupt or OSError(EIO) if an AG header cannot be read.
    """
    geo, space = vol.geo, vol.space
    if space.totals[T_VALID]:
        return
    changes = space.changes
    allocated, spare = await _count_inodes(vol)
    available = _available(vol)
    files = min(allocated + (available << geo.inopblog), INODE_MAX)
    if geo.imax_pct:
        files = min(files, geo.dblocks * geo.imax_pct // 100 << geo.inopblog)
    files = max(files, allocated)
    totals = space.totals
    totals[T_BLOCKS] = geo.dblocks - geo.log_blocks
    totals[T_FREE] = totals[T_AVAIL] = available
    totals[T_FILES] = files
    totals[T_FFREE] = max(0, files - (allocated - spare))
    totals[T_VALID] = int(changes == space.changes)  # last: a lane may look at any moment


async def statfs(vol: Volume) -> pyfuse3.StatvfsData:
    """The reply to statfs. Raises Corrupt or OSError(EIO) if an AG header cannot be read."""
    await refresh(vol)
    totals = vol.space.totals.tolist()
    out = pyfuse3.StatvfsData()
    out.f_bsize = out.f_frsize = vol.geo.block_size
    out.f_blocks = totals[T_BLOCKS]
    out.f_bfree, out.f_bavail = totals[T_FREE], totals[T_AVAIL]
    out.f_files = totals[T_FILES]
    out.f_ffree = out.f_favail = totals[T_FFREE]
    out.f_namemax = NAME_MAX
    return out
