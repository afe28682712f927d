"""Superblock, geometry and the state of the log, on images that mkfs.xfs and the kernel made."""

from __future__ import annotations

import errno
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fs.device.image import ImageFile
from fs.errors import UserError
from fs.log import head
from fs.log.region import Region
from fs.xfs import layout as L
from fs.xfs import superblock
from fs.xfs.crc import crc_stamp
from fs.xfs.geometry import Geometry
from tests.support import geometries, kernel_mount, mkfs, needs_root


async def look(image: Path) -> tuple[Geometry, bool]:
    device = ImageFile(str(image), read_only=True)
    raw = bytearray(32768)
    await device.read(0, [memoryview(raw)])
    sb = superblock.read(raw, device.size)
    superblock.check_features(sb, writable=True)
    geo = superblock.geometry(sb)
    clean = (await head.find(Region(device, geo))).clean
    device.close()
    return geo, clean


def xfs_db(image: Path, *commands: str) -> str:
    words = [w for c in commands for w in ("-c", c)]
    return subprocess.run(
        ["xfs_db", "-r", *words, str(image)], check=True, capture_output=True, text=True
    ).stdout


@geometries
async def test_geometry_is_what_xfs_db_prints(mkfs_args: tuple[str, ...], scratch: Path) -> None:
    image = mkfs(scratch, *mkfs_args)
    geo, clean = await look(image)
    assert clean
    text = xfs_db(image, "sb 0", "p")
    field = dict(re.findall(r"^(\w+) = (\S+)$", text, re.M))
    assert geo.block_size == int(field["blocksize"])
    assert geo.dblocks == int(field["dblocks"])
    assert geo.agcount == int(field["agcount"])
    assert geo.ag_blocks == int(field["agblocks"])
    assert geo.root_ino == int(field["rootino"])
    assert geo.inode_align == max(1, int(field["inoalignmt"]))
    assert geo.dir_block_size == geo.block_size << int(field["dirblklog"])
    for agno in range(geo.agcount):
        length = re.search(r"length = (\d+)", xfs_db(image, f"agf {agno}", "p"))
        assert length
        assert geo.ag_length(agno) == int(length[1])
        assert str(geo.ag_daddr(agno, 2)) in xfs_db(image, f"agi {agno}", "daddr")
    fsb = geo.fsb(geo.agcount - 1, 77)
    assert str(geo.fsb_to_daddr(fsb)) in xfs_db(image, f"convert fsblock {fsb} daddr")
    assert geo.daddr_to_fsb(geo.fsb_to_daddr(fsb)) == fsb
    ino = geo.ino(geo.agcount - 1, 1234)
    assert str(geo.agino_agbno(1234)) in xfs_db(image, f"convert inode {ino} agblock")
    assert geo.ino_agino(ino) == 1234
    assert geo.ino_agno(ino) == geo.agcount - 1


@needs_root
@geometries
async def test_a_dirty_log_is_seen(mkfs_args: tuple[str, ...], scratch: Path) -> None:
    image = mkfs(scratch, *mkfs_args)
    with kernel_mount(image, scratch / "mnt") as mnt:
        for i in range(40):
            (mnt / f"d{i}").mkdir()
        subprocess.run(["sync", "-f", str(mnt)], check=True)
        assert not (await look(image))[1]
    assert (await look(image))[1]


def patched(raw: bytearray, **fields: int) -> bytes:
    data = np.frombuffer(bytes(raw), np.uint8).copy()
    sb = data[: L.SB.itemsize].view(L.SB)[0]
    for name, value in fields.items():
        sb[name] = value
    crc_stamp(data, 0, int(sb["sectsize"]) if sb["sectsize"] == 512 else 512, L.off(L.SB, "crc"))
    return data.tobytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magic": 0}, "no XFS superblock"),
        ({"versionnum": 0xB4A4}, "version 4"),
        ({"features_incompat": 0x10}, "needsrepair"),
        ({"features_incompat": 0x80 | 1}, "parent"),
        ({"features_incompat": 1 << 20 | 1}, "bit 20"),
        ({"features_ro_compat": 1 << 9}, "bit 9"),
        ({"agcount": 5}, "AG count"),
        ({"blocklog": 20}, "block size"),
        ({"inopblog": 9}, "inodes per block log"),
        ({"logstart": 0}, "external log"),
        ({"rblocks": 5}, "realtime"),
        ({"dblocks": 1 << 40, "agcount": (1 << 40) // 20480 + 1}, "cut short|AG count"),
    ],
)
def test_refusals_name_their_reason(fields: dict[str, int], message: str, scratch: Path) -> None:
    image = mkfs(scratch)
    raw = bytearray(image.open("rb").read(32768))
    data = patched(raw, **fields)
    with pytest.raises(UserError, match=message) as caught:
        sb = superblock.read(data, image.stat().st_size)
        superblock.check_features(sb, writable=True)
    assert caught.value.exit_code == 32


def test_damaged_superblock_is_refused(scratch: Path) -> None:
    image = mkfs(scratch)
    raw = bytearray(image.open("rb").read(32768))
    superblock.read(raw, image.stat().st_size)
    raw[400] ^= 1
    with pytest.raises(UserError, match="checksum"):
        superblock.read(raw, image.stat().st_size)
    with pytest.raises(UserError, match="smaller"):
        superblock.read(b"abc", 3)
    with pytest.raises(UserError, match="cut short"):
        superblock.read(image.open("rb").read(32768), 1 << 20)
    assert errno.EUCLEAN == 117
