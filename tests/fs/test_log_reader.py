"""Logs that the kernel left dirty, read by us and by xfs_logprint; and what is torn of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fs.device.image import ImageFile
from fs.log import checkpoints, head
from fs.log.checkpoints import Checkpoint
from fs.log.head import Ends
from fs.log.region import Region
from fs.xfs import superblock
from tests import support

GEOMETRIES = {
    "default": (),
    "1k": ("-b", "size=1k"),
    "64k": ("-b", "size=64k"),
    "su": ("-l", "su=32k"),
    "sectors": ("-s", "size=4096"),
    "rmapbt": ("-m", "rmapbt=1"),
}


def leave_dirty(scratch: Path, args: tuple[str, ...], rounds: int = 3) -> Path:
    """An image whose log the kernel would replay."""
    image = support.mkfs(scratch, *args)
    with support.kernel_mount(image, scratch / "mnt") as root:
        for n in range(rounds):
            (root / f"dir{n}").mkdir()
            for k in range(50):
                (root / f"dir{n}/file{k}").write_bytes(b"x" * (k * 100))
            subprocess.run(["sync", "-f", root], check=True)
            (root / f"dir{n}/file7").unlink()
        subprocess.run(["xfs_io", "-x", "-c", "shutdown -f", root], check=True)
    return image


async def read_log(image: Path) -> tuple[Region, Ends, list[Checkpoint]]:
    device = ImageFile(str(image), read_only=True)
    raw = bytearray(32768)
    await device.read(0, [memoryview(raw)])
    region = Region(device, superblock.geometry(superblock.read(raw, device.size)))
    ends = await head.find(region)
    log = checkpoints.committed(region, ends.tail, ends.head)
    found = [] if ends.clean else [checkpoint async for checkpoint in log]
    device.close()
    return region, ends, found


def printed(image: Path) -> list[int]:
    """Items of each checkpoint that xfs_logprint would replay."""
    said = subprocess.run(
        ["xfs_logprint", "-t", str(image)], check=True, capture_output=True, text=True
    ).stdout
    return [int(n) for n in re.findall(r"#items:\s*(\d+)", said)]


@pytest.mark.parametrize("args", GEOMETRIES.values(), ids=GEOMETRIES.keys())
@support.needs_root
async def test_what_xfs_logprint_reads(args: tuple[str, ...], scratch: Path) -> None:
    image = leave_dirty(scratch, args)
    _, ends, found = await read_log(image)
    assert not ends.clean
    assert len(found) > 3
    assert [len(c.regions) - 1 for c in found] == printed(image)


@support.needs_root
async def test_what_was_torn_does_not_count(scratch: Path) -> None:
    """A wrong byte in the last record, or a hole in it: the log ends before it, as the kernel says.

    The same in an older record, which nobody was writing any more, is no torn write.
    """
    image = leave_dirty(scratch, ())
    region, ends, found = await read_log(image)
    device = ImageFile(str(image))
    writable = Region(device, region.geo)
    start = found[-1].lsn & 0xFFFFFFFF
    for torn in (1, 2):
        good = await writable.read(start + torn, 1)
        bad = good.copy()
        bad[0][:4] = 0 if torn == 1 else good[0][:4]
        bad[0][9] ^= 1
        await writable.write(start + torn, bad)
        _, shorter, fewer = await read_log(image)
        assert shorter.head == start
        assert [c.lsn for c in fewer] == [c.lsn for c in found[:-1]]
        await writable.write(start + torn, good)
    assert (await read_log(image))[1] == ends
    old = found[0].lsn & 0xFFFFFFFF
    block = await writable.read(old + 1, 1)
    block[0][9] ^= 1
    await writable.write(old + 1, block)
    with pytest.raises(head.BadLog, match="CRC"):
        await read_log(image)
    device.close()
