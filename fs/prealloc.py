"""Unwritten blocks for holes, at once rather than when data is written back.

fallocate(2) asks for them, and every write to a file with an extent size hint, whose blocks are
allocated ahead of the data (fs/xfs/extsize.py): such a file has no delayed allocation, so nothing
of it is RESERVED but copies of shared blocks. Each extent is one transaction that leaves a valid
map and ends with the promises to what is still dirty made good: more records may mean a larger
tree than was reserved for it.

The caller holds the IOLOCK exclusively, and sees to it that nothing in the holes is dirty:
write-back would fill them, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fs import delalloc
from fs.xfs import bmap, extsize
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume


async def have(vol: Volume, ip: Inode, first: int, last: int) -> int:
    """Have file block `first` mapped, and blocks up to `last` with it; the end of the mapping.

    Only a hole is filled, by one extent, which may be shorter, or longer by the file's hint.
    Raises OSError: ENOSPC, EFBIG, EIO; Corrupt, ShutDown.
    """
    async with vol.reader(ip) as tp:
        m = await bmap.lookup(tp, ip, first)
    if m is not None and m.offset <= first:
        return m.end
    count = min((last if m is None else min(last, m.offset)) - first, L.BMBT_LEN_MAX)
    hint = extsize.hint(ip)
    blocks = tree_blocks(vol) + (extsize.rounded(first, count, hint) if hint else count)
    if blocks > vol.space.available:
        await vol.flusher.sync()  # gives back what the worst case did not need
    async with vol.transaction("allocate", blocks) as tp:
        await tp.lock_inodes(ip)
        new = await bmap.alloc(tp, ip, first, count, unwritten=True, hint=hint)
        changed_map(tp, ip)
    return new.end


def tree_blocks(vol: Volume) -> int:
    """What one more record can cost: splits in the tree now, and promises for later ones."""
    return 2 * bmap.worst_indirect(vol.geo, 1) + 2


def changed_map(tp: Transaction, ip: Inode) -> None:
    """At the end of each transaction: bring the promise to pending blocks up to its new worst."""
    vol = tp.vol
    state = vol.pages.state(ip.handle)
    worst = delalloc.worst_tree_blocks(vol, ip, int(state["pending"]))
    short = worst - int(state["indirect"])
    if short > 0:
        delalloc.give_back(tp, ip, 0, short)
    state["map_seq"] += 1
