"""Recovery: from a log with changes that are not at home to a filesystem that can be used.

Two halves. `replay` works on a device that nobody has opened as a volume: what checkpoints say goes
home, and everything that could refuse the log was looked at before the first write. `finish` works
in a volume that is about to be used, with transactions like everybody's, and does what the log says
was begun: intents in the order in which they were logged; blocks that copies on write had prepared
and nobody mapped are freed; then the inodes on the unlinked lists.

Those transactions are not logged, so between the halves the superblock's guard is set and the log
marked clean, in this order (`Volume` does it): a crash before that finds the log as it was and
replays it again, a crash after it an image that xfs_repair must see, which knows what to do with
unlinked inodes and blocks that nobody owns. Counters need nothing: a volume takes them from the AG
headers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from fs.log import closing, intents
from fs.log.head import Ends
from fs.log.intents import Work
from fs.log.region import Region
from fs.log.replay import Replay
from fs.xfs import bmap, freespace, refcount, rmap, unlinked
from fs.xfs.bmap import ATTR, DATA, Mapping
from fs.xfs.owner import Owner

if TYPE_CHECKING:
    import logging

    from fs.cache.inode import Inode
    from fs.device.base import Device
    from fs.log.transaction import Transaction
    from fs.volume import Volume
    from fs.xfs.geometry import Geometry


class Recovery(NamedTuple):
    """A log that was replayed, and what it left to do."""

    region: Region
    ends: Ends
    work: list[Work]

    async def close_log(self) -> None:
        """Mark the log clean. Raises OSError."""
        await closing.close(self.region, self.ends)


async def replay(device: Device, geo: Geometry, ends: Ends, log: logging.Logger) -> Recovery:
    """The first half. Raises BadLog, OSError."""
    log.info("%s: Starting recovery (logdev: internal)", device.name)
    region, work = Region(device, geo), Replay(device, geo)
    await work.run(region, ends)
    left = work.intents.left()
    log.info(
        "%s: replayed %d checkpoints: %d blocks written, %d newer or freed, %d intents left",
        *(device.name, work.checkpoints, work.replayed, work.skipped, len(left)),
    )
    return Recovery(region, ends, left)


async def finish(vol: Volume, work: list[Work]) -> None:
    """The second half. Raises OSError, also Corrupt."""
    users: dict[int, Inode] = {}  # kept to the end: an unlinked one must not be freed before it
    try:
        for one in work:
            if one.kind == intents.MAP and one.owner not in users:
                users[one.owner] = await vol.inodes.get(one.owner)
            await _carry_out(vol, one, users.get(one.owner))
        if vol.geo.has_reflink:
            for agno in range(vol.geo.agcount):
                await _free_staging(vol, agno)
    finally:
        for ip in users.values():
            vol.inodes.put(ip)
    freed = 0
    for agno in range(vol.geo.agcount):
        for bucket in range(unlinked.BUCKETS):
            freed += await _free_unlinked(vol, agno, bucket)
    await vol.drain_inactive()
    vol.log.info("%s: Ending recovery: %d unlinked inodes freed", vol.dev.name, freed)


# -- intents --------------------------------------------------------------------------------------


async def _carry_out(vol: Volume, work: Work, ip: Inode | None) -> None:
    blocks = bmap.worst_indirect(vol.geo, 1)
    async with vol.transaction("intent", blocks, from_pool=True) as tp:
        if ip is not None and work.kind == intents.MAP:
            await tp.lock_inodes(ip)
            await _change_map(tp, ip, work)
        elif work.kind == intents.FREE:
            await freespace.free_anyones(tp, work.fsbno, work.count)
        elif work.kind == intents.COUNT:
            await _change_count(tp, work)
        else:
            await _change_owner(tp, work)


async def _change_map(tp: Transaction, ip: Inode, work: Work) -> None:
    fork = ATTR if work.flags & intents.B_ATTR else DATA
    is_unwritten = bool(work.flags & intents.B_UNWRITTEN)
    mapping = Mapping(work.offset, work.fsbno, work.count, is_unwritten)
    owner = Owner(ip.ino, work.offset, attr=fork == ATTR, unwritten=is_unwritten)
    ip.changecount += 1 + tp.vol.geo.has_rmap  # the kernel's chain has a transaction for each
    if work.action == intents.B_MAP:
        await bmap.insert(tp, ip, mapping, fork)
        await rmap.map(tp, work.fsbno, work.count, owner)
    else:
        await bmap.detach(tp, ip, mapping, fork)
        await rmap.unmap(tp, work.fsbno, work.count, owner)


async def _change_count(tp: Transaction, work: Work) -> None:
    if work.action == intents.INCREASE:
        await refcount.increase(tp, work.fsbno, work.count)
    elif work.action == intents.DECREASE:
        await refcount.drop(tp, work.fsbno, work.count)
    elif work.action == intents.ALLOC_COW:
        await refcount.stage(tp, work.fsbno, work.count)
    else:
        await refcount.unstage(tp, work.fsbno, work.count)


async def _change_owner(tp: Transaction, work: Work) -> None:
    owner = Owner(
        work.owner,
        work.offset,
        attr=bool(work.flags & intents.R_ATTR),
        bmbt=bool(work.flags & intents.R_BMBT),
        unwritten=bool(work.flags & intents.R_UNWRITTEN),
    )
    if work.action in (intents.R_CONVERT, intents.R_CONVERT_SHARED):
        await rmap.convert(tp, work.fsbno, work.count, owner)
    elif work.action in (intents.R_MAP, intents.R_MAP_SHARED, intents.R_ALLOC):
        await rmap.map(tp, work.fsbno, work.count, owner)
    else:
        await rmap.unmap(tp, work.fsbno, work.count, owner)


# -- what nobody uses any longer ------------------------------------------------------------------


async def _free_staging(vol: Volume, agno: int) -> None:
    """Blocks prepared for copies on write: nobody is copying now."""
    while True:
        async with vol.transaction("cow leftovers") as tp:
            found = await refcount.first_staged(tp, agno)
            if found is None:
                return
            await refcount.unstage(tp, *found)
            await freespace.free(tp, *found, Owner(rmap.OWN_COW))


async def _free_unlinked(vol: Volume, agno: int, bucket: int) -> int:
    """Inodes on one list: without users from here on, so they are freed; returns how many."""
    async with vol.reader() as tp:
        listed = await unlinked.list_bucket(tp, agno, bucket)
    for agino in listed:
        await vol.inodegc.throttle()
        ip = await vol.inodes.get(vol.geo.ino(agno, agino))
        try:
            if ip.nlink:
                raise vol.corrupt("unlinked list", f"inode {ip.ino}", f"it has {ip.nlink} links")
        finally:
            vol.inodes.put(ip)
    return len(listed)
