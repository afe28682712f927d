"""Log reservations: xfs_db and mkfs.xfs are the judges, number by number, for every geometry."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fs.log import reservation
from fs.xfs import btkind, superblock
from fs.xfs.geometry import Geometry
from tests import support
from tools.targets import find_tool

MIB = 1 << 20

GEOMETRIES: dict[str, tuple[str, ...]] = {
    **support.GEOMETRIES,
    "no reflink": ("-m", "reflink=0"),
    "rmapbt, no reflink": ("-m", "rmapbt=1,reflink=0"),
    "rmapbt, 1k blocks": ("-m", "rmapbt=1", "-b", "size=1k"),
    "16k blocks, large counters": ("-b", "size=16k", "-i", "nrext64=1"),
    "2k inodes": ("-i", "size=2048"),
    "64k directories, 1k blocks": ("-n", "size=64k", "-b", "size=1k"),
    "striped log": ("-l", "su=32k"),
    "4k sectors": ("-s", "size=4096"),
    "small counters": ("-i", "nrext64=0"),
    "large counters": ("-i", "nrext64=1"),
    "no bigtime": ("-m", "bigtime=0"),
    "no finobt": ("-m", "finobt=0"),
    "no sparse inodes": ("-i", "sparse=0"),
}
LARGE: dict[str, tuple[str, ...]] = {
    "default": (),
    "rmapbt, 1k blocks": ("-m", "rmapbt=1", "-b", "size=1k"),
    "rmapbt, no reflink": ("-m", "rmapbt=1,reflink=0"),
    "64k blocks": ("-b", "size=64k"),
    "rmapbt, 64k blocks": ("-m", "rmapbt=1", "-b", "size=64k"),
    "log stripe of 256k": ("-l", "su=256k"),
    "many AGs": ("-d", "agcount=500"),
}
CASES = [(300 * MIB, arguments) for arguments in GEOMETRIES.values()]
CASES += [(4 << 40, arguments) for arguments in LARGE.values()]
NAMES = [*GEOMETRIES, *(f"4T, {name}" for name in LARGE)]

images = pytest.mark.parametrize(("size", "arguments"), CASES, ids=NAMES)


def geometry_of(path: Path) -> Geometry:
    with open(path, "rb") as image:
        raw = bytearray(image.read(32768))
    return superblock.geometry(superblock.read(raw, path.stat().st_size))


def old_rmap_levels(geo: Geometry) -> int:
    """xfsprogs before 6.3 let the root of a tree that fills an AG have the entries of any node."""
    least = btkind.minimum(btkind.RMAP, geo.block_size)[1]
    levels, nodes, left = 1, least, geo.ag_blocks - 1
    while nodes < left:
        left -= nodes
        nodes *= least
        levels += 1
    return levels


def is_old(tool: str) -> bool:
    text = subprocess.run([find_tool(tool), "-V"], capture_output=True, text=True).stdout
    found = re.search(r"(\d+)\.(\d+)", text)
    assert found, text
    return (int(found[1]), int(found[2])) < (6, 3)


def test_unit_by_hand(scratch: Path) -> None:
    """Records of 32 KiB hold 32256 bytes; a header of an operation for each cut and the start."""
    geo = geometry_of(support.mkfs(scratch))
    assert reservation.unit_bytes(geo, 0, 32768) == 40 + 12 + 2 * 512 + 2 * 512
    most = 32256 - 40 - 12  # so much goes into one record
    assert reservation.unit_bytes(geo, most, 32768) == 32256 + 2 * 512 + 2 * 512
    more = reservation.unit_bytes(geo, most + 1, 32768)
    assert more == 32256 + 1 + 12 + 3 * 512 + 2 * 512
    striped = geometry_of(support.mkfs(scratch, "-l", "su=32k", name="striped"))
    assert reservation.unit_bytes(striped, most, 32768) == 32256 + 2 * 512 + 2 * 32768


@images
def test_xfs_db_prints_the_same(scratch: Path, size: int, arguments: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *arguments, size=size)
    geo = geometry_of(image)
    command = [find_tool("xfs_db"), "-r", "-c", "logres", str(image)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    line = r"^type \d+ logres (\d+) logcount (\d+) flags 0x([04])$"
    theirs = [(int(a), int(b), c == "4") for a, b, c in re.findall(line, output, re.M)]
    levels = old_rmap_levels(geo) if geo.has_reflink and is_old("xfs_db") else None
    table = reservation.table(geo, levels)
    ours = {name: tuple(found) for name, found in table.items()}
    assert ours == dict(zip(table, theirs, strict=True))
    smallest = re.search(r"^minlogsize logres (\d+) logcount (\d+)$", output, re.M)
    assert smallest
    largest = reservation.largest(geo)
    assert (largest.logres, largest.logcount) == (int(smallest[1]), int(smallest[2]))


@pytest.mark.parametrize("arguments", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_mkfs_wants_the_same_log(scratch: Path, arguments: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *arguments)
    geo = geometry_of(image)
    if "-l" in arguments:
        arguments = ("-l", f"size=2m,{arguments[1]}")
    else:
        arguments += ("-l", "size=2m")
    command = [find_tool("mkfs.xfs"), "-N", "-f", *arguments, str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    smallest = re.search(r"minimum size is (\d+) blocks", done.stderr)
    assert smallest, done.stderr
    assert int(smallest[1]) == max(512, reservation.minimum_log_blocks(geo))  # mkfs's own minimum
