"""The reverse map for mappings whose blocks are neither allocated nor freed at that moment.

freespace.alloc and freespace.free keep the reverse map themselves. What is left is here: a file
that begins or ceases to share blocks, and unwritten extents that become written. All of it does
nothing on a filesystem without the feature. Units: blocks; extents lie in one AG.

Each call first brings the AG's free list to its length, since the tree lives on it.
"""

from __future__ import annotations

from fs.log.transaction import Transaction
from fs.xfs import freespace, rmapbt
from fs.xfs.owner import (
    OWN_AG,
    OWN_COW,
    OWN_FS,
    OWN_INOBT,
    OWN_INODES,
    OWN_LOG,
    OWN_NULL,
    OWN_REFC,
    OWN_UNKNOWN,
    Owner,
)

__all__ = [
    "OWN_AG",
    "OWN_COW",
    "OWN_FS",
    "OWN_INOBT",
    "OWN_INODES",
    "OWN_LOG",
    "OWN_NULL",
    "OWN_REFC",
    "OWN_UNKNOWN",
    "Owner",
    "convert",
    "map",
    "unmap",
]


async def map(tp: Transaction, fsbno: int, n: int, owner: Owner) -> None:
    """Record that `owner` maps blocks that are allocated already."""
    geo = tp.vol.geo
    if geo.has_rmap:
        agno = geo.agno_of(fsbno)
        agf = await freespace.prepare(tp, agno)
        await rmapbt.insert(tp, agno, agf, geo.agbno_of(fsbno), n, owner)
        tp.vol.ags.learn(agno, agf)


async def unmap(tp: Transaction, fsbno: int, n: int, owner: Owner) -> None:
    """Forget a mapping of blocks that stay allocated. Raises Corrupt if it is not recorded."""
    geo = tp.vol.geo
    if geo.has_rmap:
        agno = geo.agno_of(fsbno)
        agf = await freespace.prepare(tp, agno)
        await rmapbt.remove(tp, agno, agf, geo.agbno_of(fsbno), n, owner)
        tp.vol.ags.learn(agno, agf)


async def convert(tp: Transaction, fsbno: int, n: int, owner: Owner) -> None:
    """An extent changed between unwritten and written; `owner` describes it as it is now."""
    if tp.vol.geo.has_rmap:
        await unmap(tp, fsbno, n, owner._replace(unwritten=not owner.unwritten))
        await map(tp, fsbno, n, owner)
