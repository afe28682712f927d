"""Recovery: from a log with changes that are not at home to a filesystem that can be used.

Two halves. `replay` works on a device that nobody has opened as a volume: what checkpoints say goes
home, and everything that could refuse the log was looked at before the first write. `finish` works
in a volume that is about to be used, with transactions like everybody's, and does what the log says
was begun: intents in the order in which they were logged; blocks that copies on write had prepared
and nobody mapped are freed; then the inodes on the unlinked lists.

Those transactions are logged, behind the old log, which is kept from the oldest intent on until all
intents are done and at home. Each says in the same checkpoint what it did: the intent is done, and
what remains of it is a new one. So a crash at any moment leaves a log that says exactly what is
still to be done, and the next recovery, ours or the kernel's, goes on from there. Unlinked inodes
and blocks for copies are found on the image, whenever the log is not clean. Counters need nothing:
a volume takes them from the AG headers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from fs.log import intents
from fs.log.head import Ends
from fs.log.intents import Intent, Work
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


async def replay(device: Device, geo: Geometry, ends: Ends, log: logging.Logger) -> list[Intent]:
    """The first half; returns what the second is to finish. Raises BadLog, OSError."""
    log.info("%s: Starting recovery (logdev: internal)", device.name)
    region, work = Region(device, geo), Replay(device, geo)
    await work.run(region, ends)
    left = work.intents.left()
    log.info(
        "%s: replayed %d checkpoints: %d blocks written, %d newer or freed, %d intents left",
        *(device.name, work.checkpoints, work.replayed, work.skipped, len(left)),
    )
    return left


def oldest(left: Sequence[Intent]) -> int:
    """LSN from which on the log is needed for what is left to do; 0: it is not."""
    return min((intent.lsn for intent in left), default=0)


async def finish(vol: Volume, left: Sequence[Intent]) -> None:
    """The second half. Raises OSError, also Corrupt."""
    users: dict[int, Inode] = {}  # kept to the end: an unlinked one must not be freed before it
    taken = {intent.number for intent in left}
    numbers = (number for number in itertools.count(1) if number not in taken)
    try:
        for intent in left:
            for one in intent.extents:
                if one.kind == intents.MAP and one.owner not in users:
                    users[one.owner] = await vol.inodes.get(one.owner)
            await _carry_out(vol, intent, users, numbers)
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


async def _carry_out(
    vol: Volume, intent: Intent, users: dict[int, Inode], numbers: Iterator[int]
) -> None:
    """A part in each transaction: the largest one that has its room in the log for sure."""
    blocks = bmap.worst_indirect(vol.geo, 1)
    while intent.extents:
        async with vol.transaction("intent", blocks, from_pool=True) as tp:
            done = await _change(tp, intent.extents[0], users)
            tp.log_also(intent.done())
            intent = intent.behind(done, next(numbers))
            if intent.extents:
                tp.log_also(intent.vector())


async def _change(tp: Transaction, work: Work, users: dict[int, Inode]) -> int:
    """The beginning of one extent, or all of it; returns how many blocks."""
    if work.kind == intents.COUNT:
        return await _change_count(tp, work)
    if work.kind == intents.MAP:
        await tp.lock_inodes(users[work.owner])
        await _change_map(tp, users[work.owner], work)
    elif work.kind == intents.FREE:
        await freespace.free_anyones(tp, work.fsbno, work.count)
    else:
        await _change_owner(tp, work)
    return work.count


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


async def _change_count(tp: Transaction, work: Work) -> int:
    """Counts differ from block to block: what has the same one, at a time."""
    n = work.count
    if work.action == intents.INCREASE:
        n = await refcount.alike(tp, work.fsbno, n)
        await refcount.increase(tp, work.fsbno, n)
    elif work.action == intents.DECREASE:
        n = await refcount.alike(tp, work.fsbno, n)
        await refcount.drop(tp, work.fsbno, n)
    elif work.action == intents.ALLOC_COW:
        await refcount.stage(tp, work.fsbno, n)
    else:
        await refcount.unstage(tp, work.fsbno, n)
    return n


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
