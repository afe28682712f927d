"""Intents that a log left over, one of each kind, on volumes where their first half was done.

What would be left of a crash is made with our own functions: mappings that are gone while the
reverse map, the reference counts or the free space still know them, and the other way round. After
`recovery.finish` both checkers find nothing.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fs import recovery
from fs.cache.inode import Inode
from fs.log import formats, intents
from fs.log.head import BadLog
from fs.log.intents import Intent, Pending, Work
from fs.volume import Volume
from fs.xfs import bmap, freespace, refcount, rmap
from fs.xfs import layout as L
from fs.xfs.bmap import Mapping
from fs.xfs.owner import Owner
from tests import support
from tests.fs.imagefiles import a_file, opened

BLOCKS = 12
ARGS = {"rmapbt": ("-m", "rmapbt=1"), "1k": ("-b", "size=1k"), "plain": ("-m", "reflink=0")}
images = pytest.mark.parametrize("args", ARGS.values(), ids=ARGS.keys())
shared = pytest.mark.parametrize("args", list(ARGS.values())[:2], ids=list(ARGS)[:2])
COW = Owner(rmap.OWN_COW)


@asynccontextmanager
async def volume(scratch: Path, args: tuple[str, ...]) -> AsyncIterator[tuple[Volume, Inode, int]]:
    """A volume with a file of BLOCKS blocks, and where they begin; judged when it is closed."""
    image = support.mkfs(scratch, *args)
    async with opened(image) as vol:
        async with a_file(vol) as ip:
            async with vol.transaction("truncate", 100) as tp:
                await tp.lock_inodes(ip)
                found = await bmap.alloc(tp, ip, 0, BLOCKS, contiguous=True)
                ip.size = ip.disk_size = BLOCKS * vol.geo.block_size
                tp.log_inode(ip)
            yield vol, ip, found.fsbno
    support.assert_clean(image)


async def finish(vol: Volume, *work: Work) -> None:
    """As if the log had an intent for each."""
    left = [Intent(one.kind, number, (one,)) for number, one in enumerate(work, 5)]
    await recovery.finish(vol, left)


async def detach(vol: Volume, ip: Inode, mapping: Mapping) -> None:
    async with vol.transaction("truncate", 10) as tp:
        await tp.lock_inodes(ip)
        await bmap.detach(tp, ip, mapping)


async def blocks_for_a_copy(vol: Volume, owner: Owner | None) -> int:
    async with vol.transaction("truncate", 10) as tp:
        return (await freespace.alloc(tp, minlen=4, maxlen=4, owner=owner))[0]


@images
async def test_blocks_to_be_freed(args: tuple[str, ...], scratch: Path) -> None:
    """Whoever they belonged to; and once more when the reverse map has forgotten them already."""
    async with volume(scratch, args) as (vol, ip, first):
        free = vol.space.free
        await detach(vol, ip, Mapping(4, first + 4, 4))
        await finish(vol, Work(intents.FREE, 0, first + 4, 4, 0, 0, 0))
        assert vol.space.free == free + 4
        await detach(vol, ip, Mapping(8, first + 8, 4))
        async with vol.transaction("truncate") as tp:
            await rmap.unmap(tp, first + 8, 4, Owner(ip.ino, 8))
        await finish(vol, Work(intents.FREE, 0, first + 8, 4, 0, 0, 0))
        assert vol.space.free == free + 8


@shared
async def test_a_mapping_less(args: tuple[str, ...], scratch: Path) -> None:
    """Of one that is gone, the reverse map and the count follow; then all three are to go."""
    async with volume(scratch, args) as (vol, ip, first):
        free = vol.space.free
        await detach(vol, ip, Mapping(4, first + 4, 4))
        work = [
            Work(intents.REVERSE, intents.R_UNMAP, first + 4, 4, ip.ino, 4, intents.R_UNMAP),
            Work(intents.COUNT, intents.DECREASE, first + 4, 4, 0, 0, intents.DECREASE),
        ]
        await finish(vol, *work)
        assert vol.space.free == free + 4
        work = [
            Work(intents.MAP, intents.B_UNMAP, first, 2, ip.ino, 0, intents.B_UNMAP),
            Work(intents.COUNT, intents.DECREASE, first, 2, 0, 0, intents.DECREASE),
        ]
        await finish(vol, *work)
        assert vol.space.free == free + 6
        assert ip.nblocks == BLOCKS - 6


@shared
async def test_a_mapping_more(args: tuple[str, ...], scratch: Path) -> None:
    async with volume(scratch, args) as (vol, ip, first), a_file(vol, b"clone") as clone:
        async with vol.transaction("truncate") as tp:
            await tp.lock_inodes(ip, clone)
            for one in (ip, clone):
                one.flags2 |= L.DIFLAG2_REFLINK
                tp.log_inode(one)
        work = [
            Work(intents.COUNT, intents.INCREASE, first + 4, 4, 0, 0, intents.INCREASE),
            Work(intents.MAP, intents.B_MAP, first + 4, 4, clone.ino, 7, intents.B_MAP),
        ]
        await finish(vol, *work)
        async with vol.reader(clone) as tp:
            assert await bmap.lookup(tp, clone, 0) == Mapping(7, first + 4, 4)
            assert await refcount.find_shared(tp, first, BLOCKS) == (first + 4, 4)


@shared
async def test_blocks_for_copies(args: tuple[str, ...], scratch: Path) -> None:
    """Prepared and not used: nobody is copying, so they are freed, at whatever step it ended."""
    async with volume(scratch, args) as (vol, _, _):
        free = vol.space.free
        first = await blocks_for_a_copy(vol, None)
        alloc, action = intents.ALLOC_COW, intents.R_ALLOC
        work = [
            Work(intents.COUNT, alloc, first, 4, 0, 0, alloc),
            Work(intents.REVERSE, action, first, 4, rmap.OWN_COW, 0, action),
        ]
        await finish(vol, *work)
        assert vol.space.free == free
        first = await blocks_for_a_copy(vol, COW)
        async with vol.transaction("truncate") as tp:
            await refcount.stage(tp, first, 4)
        await finish(vol)
        assert vol.space.free == free
        first = await blocks_for_a_copy(vol, COW)
        async with vol.transaction("truncate") as tp:
            await refcount.stage(tp, first, 4)
        drop, action = intents.FREE_COW, intents.R_FREE
        work = [
            Work(intents.COUNT, drop, first + 1, 2, 0, 0, drop),
            Work(intents.REVERSE, action, first + 1, 2, rmap.OWN_COW, 0, action),
            Work(intents.FREE, 0, first + 1, 2, 0, 0, 0),
        ]
        await finish(vol, *work)
        assert vol.space.free == free


async def test_what_became_written(scratch: Path) -> None:
    async with volume(scratch, ARGS["rmapbt"]) as (vol, ip, first):
        await detach(vol, ip, Mapping(4, first + 4, 4))
        async with vol.transaction("truncate", 10) as tp:
            await tp.lock_inodes(ip)
            await bmap.insert(tp, ip, Mapping(4, first + 4, 4, True))
        action = intents.R_CONVERT
        flags = action | intents.R_UNWRITTEN
        await finish(vol, Work(intents.REVERSE, action, first + 4, 4, ip.ino, 4, flags))


async def test_what_the_log_says(scratch: Path) -> None:
    """Intents stay until they are done, in their order; what cannot be is refused."""
    async with volume(scratch, ()) as (vol, _, first):
        pending, lsn = Pending(vol.geo), 1 << 32 | 40

        def say(kind: int, number: int, body: bytes, count: int = 1) -> bool:
            return pending.take(kind, [intents.HEAD.pack(kind, 1, count, number) + body], lsn)

        extents = intents.EXTENT.pack(first, 2, 0) + intents.EXTENT.pack(first + 5, 1, 0)
        assert say(intents.FREE, 7, extents, 2)
        increase = intents.EXTENT.pack(first, 3, intents.INCREASE)
        assert say(intents.COUNT, 7, increase)
        mapping = intents.MAPPING.pack(-5, first, 9, 1, intents.R_MAP | intents.R_ATTR)
        assert say(intents.REVERSE, 1, mapping)
        left = pending.left()
        assert [(i.kind, i.number, i.lsn) for i in left] == [
            *((intents.FREE, 7, lsn), (intents.COUNT, 7, lsn), (intents.REVERSE, 1, lsn)),
        ]
        assert [[(w.fsbno, w.count) for w in i.extents] for i in left] == [
            *([(first, 2), (first + 5, 1)], [(first, 3)], [(first, 1)]),
        ]
        assert left[-1].extents[0][4:] == (-5, 9, intents.R_MAP | intents.R_ATTR)
        for intent in left:  # what we say of one is what others do
            assert pending.take(intent.kind, formats.regions_of(intent.vector()), lsn)
        assert pending.left() == left
        assert pending.take(0x1237, [struct.pack("<HHIQ", 0x1237, 1, 0, 7)], lsn)
        assert [i.kind for i in pending.left()] == [intents.COUNT, intents.REVERSE]
        (done,) = formats.regions_of(left[0].done())
        assert done == struct.pack("<HHIQ", 0x1237, 1, 2, 7) + extents
        (done,) = formats.regions_of(left[1].done())
        assert done == struct.pack("<HHIQ", 0x1243, 1, 0, 7)
        assert pending.take(0x1243, [done], lsn)
        assert [i.kind for i in pending.left()] == [intents.REVERSE]
        rest = left[0].behind(1, 8)
        assert [(w.fsbno, w.count) for w in rest.extents] == [(first + 1, 1), (first + 5, 1)]
        assert not rest.behind(1, 9).behind(1, 10).extents
        assert left[2].behind(0, 9).extents[0].offset == 9
        assert not pending.take(0x123B, [b""], lsn)
        for kind, body in (
            (intents.FREE, extents),
            (intents.FREE, intents.EXTENT.pack(vol.geo.dblocks * 4, 1, 0)),
            (intents.COUNT, intents.EXTENT.pack(first, 1, 9)),
            (intents.COUNT, intents.EXTENT.pack(first, 0, 1)),
            (intents.MAP, intents.MAPPING.pack(130, first, 0, 1, intents.B_REALTIME | 1)),
        ):
            with pytest.raises(BadLog):
                say(kind, 9, body)
