"""The extent map of a file, as its page cache asks for it.

Most maps stand in the inode. Looking into one needs neither buffers nor the scopes of a
transaction (no memory is allocated, nothing is awaited while the ILOCK is held), so such lookups,
which every slow read and write makes, are spared the cost of a transaction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fs.xfs import bmap
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume


class _InInode:
    """As much of a transaction as reading a map in EXTENTS format looks at."""

    __slots__ = ("vol",)

    def __init__(self, vol: Volume) -> None:
        self.vol = vol


async def read(vol: Volume, ip: Inode, first: int, count: int) -> list[bmap.Mapping]:
    """Mappings that cover file blocks [first, first + count), holes included.

    Raises Corrupt, OSError(EIO), ShutDown.
    """
    if ip.format != L.FMT_EXTENTS:
        async with vol.reader(ip) as tp:
            return await bmap.read(tp, ip, first, count)
    locks = vol.ilocks
    if not locks.acquire_now(ip.handle, True):
        await locks.acquire(ip.handle, True)
    try:
        if ip.format == L.FMT_EXTENTS:
            return await bmap.read(cast("Transaction", _InInode(vol)), ip, first, count)
    finally:
        locks.release(ip.handle)
    return await read(vol, ip, first, count)  # it became a tree while we waited
