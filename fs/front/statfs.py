"""Totals of the filesystem, as the kernel's XFS reports them to statfs(2).

The log is not counted as space, and free is what data can still have: without the blocks that
the AGs keep for their trees and without the reserve pool. The number of inodes is what the free
blocks could hold, within the percentage that the image allows inodes (XFS format, superblock).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pyfuse3

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


async def statfs(vol: Volume) -> pyfuse3.StatvfsData:
    """The reply to statfs. Raises Corrupt or OSError(EIO) if an AG header cannot be read."""
    geo, available = vol.geo, _available(vol)
    allocated, spare = await _count_inodes(vol)
    out = pyfuse3.StatvfsData()
    out.f_bsize = out.f_frsize = geo.block_size
    out.f_blocks = geo.dblocks - geo.log_blocks
    out.f_bfree = out.f_bavail = available
    files = min(allocated + (available << geo.inopblog), INODE_MAX)
    if geo.imax_pct:
        files = min(files, geo.dblocks * geo.imax_pct // 100 << geo.inopblog)
    out.f_files = max(files, allocated)
    out.f_ffree = out.f_favail = max(0, out.f_files - (allocated - spare))
    out.f_namemax = NAME_MAX
    return out
