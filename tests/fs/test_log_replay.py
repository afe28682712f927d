"""The rules of replay, one by one, with logs written for them; and what is refused, untouched."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fs.device.image import ImageFile
from fs.errors import UserError
from fs.log import head, items
from fs.log.region import Region, lsn_of, place_of
from fs.log.replay import Replay
from fs.volume import Volume
from fs.xfs import inobt
from fs.xfs import layout as L
from fs.xfs.crc import crc_ok, crc_stamp
from tests import support
from tests.fs import logwriter
from tests.fs.logwriter import LogWriter

AGF_TYPE, CHUNK = 5 << items.TYPE_SHIFT, items.CHUNK
SPARE = L.off(L.AGF, "spare")  # bytes that mean nothing, the first of them in the first chunk


async def writer(scratch: Path, *args: str) -> LogWriter:
    """Of a new image, on which the kernel has been once."""
    image = support.mkfs(scratch, *args)
    with support.kernel_mount(image, scratch / "mnt") as mnt:
        (mnt / "file").touch()
    return await LogWriter(image).open()


async def read(log: LogWriter, daddr: int, bbs: int) -> np.ndarray[Any, Any]:
    block = np.zeros(bbs << L.BB_LOG, np.uint8)
    await log.device.read(daddr << L.BB_LOG, [block.data])
    return block


async def replay(log: LogWriter) -> Replay:
    region = Region(log.device, log.geo)
    ends = await head.find(region)
    assert not ends.clean
    done = Replay(log.device, log.geo)
    await done.run(region, ends)
    return done


async def agf_item(log: LogWriter, mark: bytes, flags: int = AGF_TYPE) -> list[bytes]:
    """AG 1's AGF with a mark where nobody looks."""
    raw = bytearray((await read(log, log.geo.ag_daddr(1, 1), log.geo.sector_bbs)).tobytes()[:CHUNK])
    raw[SPARE : SPARE + len(mark)] = mark
    return logwriter.buffer(log.geo.ag_daddr(1, 1), log.geo.sector_bbs, flags, {0: bytes(raw)})


async def agf(log: LogWriter) -> tuple[bytes, int, bool]:
    """The mark on the device, the AGF's LSN, and whether its CRC is right."""
    block = await read(log, log.geo.ag_daddr(1, 1), log.geo.sector_bbs)
    lsn = int(block[: L.AGF.itemsize].view(L.AGF)["lsn"][0])
    good = crc_ok(block, 0, len(block), L.off(L.AGF, "crc"))
    return block[SPARE : SPARE + 3].tobytes(), lsn, bool(good)


@support.needs_root
async def test_lsn_and_crc_follow(scratch: Path) -> None:
    log = await writer(scratch)
    lsn = await log.write([await agf_item(log, b"new")])
    assert (await replay(log)).replayed == 1
    assert await agf(log) == (b"new", lsn, True)


@pytest.mark.parametrize("later", [-1, 0, 1])
@support.needs_root
async def test_what_is_newer_stays(later: int, scratch: Path) -> None:
    """Of a block: written with that LSN or a later one. Of an inode: with a later one only."""
    log = await writer(scratch)
    ino = log.geo.root_ino
    place = inobt.imap(log.geo, ino)
    cluster = await read(log, *place[:2])
    inode = cluster[place[2] :][: L.DINODE.itemsize].view(L.DINODE)
    core = inode.astype(L.DINODE.newbyteorder("<"))
    core["uid"], core["next_unlinked"] = 1234, 99
    item = logwriter.inode(ino, place, core.tobytes())
    lsn = await log.write([await agf_item(log, b"log"), item])
    block = await read(log, log.geo.ag_daddr(1, 1), log.geo.sector_bbs)
    block[: L.AGF.itemsize].view(L.AGF)["lsn"] = lsn + later
    crc_stamp(block, 0, len(block), L.off(L.AGF, "crc"))
    await log.device.write(log.geo.ag_daddr(1, 1) << L.BB_LOG, [block.data])
    inode["lsn"] = lsn + later
    crc_stamp(cluster, place[2], log.geo.inode_size, L.off(L.DINODE, "crc"))
    await log.device.write(place[0] << L.BB_LOG, [cluster.data])
    done = await replay(log)
    assert (done.replayed, done.skipped) == {-1: (2, 0), 0: (1, 1), 1: (0, 2)}[later]
    assert (await agf(log))[0] == (b"log" if later < 0 else bytes(3))
    cluster = await read(log, *place[:2])
    inode = cluster[place[2] :][: L.DINODE.itemsize].view(L.DINODE)
    assert inode["uid"][0] == (1234 if later <= 0 else 0)
    assert inode["next_unlinked"][0] == L.NULL32  # is not the inode's own


@support.needs_root
async def test_checkpoints_that_begin_in_one_record(scratch: Path) -> None:
    """The second one is not older than what the first has just written."""
    log = await writer(scratch)
    one, two = [await agf_item(log, b"one")], [await agf_item(log, b"two")]
    lsn = await log.write(one, two)
    assert (await replay(log)).checkpoints == 2
    assert await agf(log) == (b"two", lsn, True)


@support.needs_root
async def test_cancelled(scratch: Path) -> None:
    """A block that is freed later may be somebody's by now; not one that is logged after that."""
    log = await writer(scratch)
    place = log.geo.ag_daddr(1, 1), log.geo.sector_bbs
    cancel = logwriter.buffer(*place, items.CANCEL)
    await log.write([await agf_item(log, b"old")])
    await log.write([cancel, await agf_item(log, b"too")])
    done = await replay(log)
    assert (done.replayed, done.skipped) == (0, 2)
    assert (await agf(log))[0] == bytes(3)
    lsn = await log.write([await agf_item(log, b"new")])
    assert (await replay(log)).replayed == 1
    assert await agf(log) == (b"new", lsn, True)


@support.needs_root
async def test_inodes_are_made_before_they_are_used(scratch: Path) -> None:
    """Whatever the order in the log. Of a cluster's images only unlinked pointers count."""
    log = await writer(scratch)
    geo = log.geo
    first = geo.ino(1, 4096 << geo.inopblog)
    place = inobt.imap(geo, first + 2)
    cluster = await read(log, *inobt.imap(geo, geo.root_ino)[:2])
    core = cluster[: L.DINODE.itemsize].view(L.DINODE).astype(L.DINODE.newbyteorder("<"))
    core["ino"], core["mode"], core["format"], core["size"] = first + 2, 0, 2, 0
    core["nlink"], core["next_unlinked"], core["gen"] = 0, 99, 77
    at = 2 * geo.inode_size + L.off(L.DINODE, "next_unlinked")
    chunk = bytearray(b"?" * CHUNK)
    chunk[at % CHUNK : at % CHUNK + 4] = (2 + 64).to_bytes(4, "big")
    made = logwriter.create(1, 4096, geo.chunk_inodes, geo.inode_size, geo.chunk_blocks, 5)
    pointer = logwriter.buffer(*place[:2], items.INODE_BUF, {at // CHUNK: bytes(chunk)})
    lsn = await log.write([pointer, logwriter.inode(first + 2, place, core.tobytes()), made])
    await replay(log)
    cluster = await read(log, *place[:2])
    for n in range(len(cluster) // geo.inode_size):
        raw: Any = cluster[n * geo.inode_size :][: L.DINODE.itemsize].view(L.DINODE)[0]
        crc = crc_ok(cluster, n * geo.inode_size, geo.inode_size, L.off(L.DINODE, "crc"))
        assert crc
        assert raw["ino"] == first + n
        assert (raw["gen"], raw["lsn"]) == ((77, lsn) if n == 2 else (5, 0))
        assert raw["next_unlinked"] == (66 if n == 2 else L.NULL32)


@pytest.mark.parametrize("stray", ["blocks", "record"])
@support.needs_root
async def test_a_tail_that_was_overwritten(stray: str, scratch: Path) -> None:
    """Writes behind the last whole record hit the tail that it names: replay begins behind them.

    The kernel says the same of a copy, but takes a whole record there for the tail and gives up.
    """
    log = await writer(scratch, "--unsupported", "-l", "size=13m", "-m", "rmapbt=1")
    item, bbs = await agf_item(log, b"1st"), log.geo.log_blocks * log.geo.block_bbs
    lsns = [await log.write([item] * 400)]
    while bbs - place_of(lsns[-1])[1] > 500:
        lsns.append(await log.write([item] * 400))
    last = await log.write([await agf_item(log, b"end")])
    region = Region(log.device, log.geo)
    ends = await head.find(region)
    assert ends.tail == lsns[0]
    if stray == "record":  # a whole one, but what came before it is lost
        odd = [await agf_item(log, b"odd")] * 400
        await log.write_at(lsn_of(ends.cycle + 1, place_of(lsns[0])[1]), odd)
    else:
        blocks = np.full((40, L.BB_SIZE), 7, np.uint8)
        blocks[:, :4] = np.frombuffer((ends.cycle + 1).to_bytes(4, "big"), np.uint8)
        await region.write(place_of(lsns[0])[1], blocks)
    moved = await head.find(region)
    assert (moved.head, moved.tail) == (ends.head, lsns[1])
    shutil.copyfile(scratch / "image", scratch / "copy")
    await replay(log)
    assert await agf(log) == (b"end", last, True)
    if stray == "record":
        return
    with support.kernel_mount(scratch / "copy", scratch / "mnt"):
        pass
    theirs = LogWriter(scratch / "copy")
    theirs.geo = log.geo
    assert (await agf(theirs))[0] == b"end"


REFUSED: dict[str, tuple[list[bytes], str]] = {
    "quota": (logwriter.buffer(4096, 8, 0x4, {0: bytes(CHUNK)}), "quota"),
    "attributes": ([struct.pack("<HHIQ", items.ATTRI, 1, 0, 1)], "ATTRI"),
    "unknown": ([struct.pack("<HHIQ", 0x1250, 1, 0, 1)], "0x1250"),
    "outside": (logwriter.buffer(1 << 40, 8, AGF_TYPE, {0: bytes(CHUNK)}), "outside"),
    "pieces": (logwriter.buffer(4096, 4, 11 << 11, {0: bytes(CHUNK)}), "several pieces"),
    "owners": (logwriter.inode(128, (64, 32, 0), bytes(176), 0x201), "extent tree"),
    "places": (logwriter.inode(128, (64, 32, 100), bytes(176)), "byte 100"),
    "cores": (logwriter.inode(128, (64, 32, 512), bytes(170)), "170 bytes"),
    "inodes": (logwriter.create(9, 100, 64, 512, 8, 0), "new inodes"),
    "counts": (logwriter.create(1, 100, 65, 512, 8, 0), "65 new inodes"),
    "intents": ([struct.pack("<HHIQQII", items.EFI, 1, 1, 1, 1 << 50, 1, 0)], "0x1236"),
    "regions": ([struct.pack("<HHIQ", items.BUF, 3, 0, 1)], "3 regions"),
}


@pytest.mark.parametrize(("item", "reason"), REFUSED.values(), ids=REFUSED.keys())
@support.needs_root
async def test_refused_with_the_image_as_it_was(
    item: list[bytes], reason: str, scratch: Path
) -> None:
    """Also what comes before it in the log is not replayed."""
    log = await writer(scratch)
    await log.write([await agf_item(log, b"new")])
    await log.write([item])
    log.device.close()
    image = scratch / "image"
    before = image.read_bytes()
    with pytest.raises(UserError, match="cannot be replayed") as refused:
        async with Volume.open(ImageFile(str(image)), 32 << 20):
            pass
    assert reason in str(refused.value)
    assert image.read_bytes() == before


@support.needs_root
async def test_a_log_that_says_nothing(scratch: Path) -> None:
    """Where there is no end to be found one is told so, and what helps."""
    log = await writer(scratch)
    region = Region(log.device, log.geo)
    await region.write(0, np.zeros((region.bbs, L.BB_SIZE), np.uint8))
    log.device.close()
    for read_only in (False, True):
        device = ImageFile(str(scratch / "image"), read_only=read_only)
        with pytest.raises(UserError, match="bad log: no record ends .*; run xfs_repair$"):
            async with Volume.open(device, 32 << 20):
                pass
        device.close()
