"""The layout of images: byte for byte what xfs_info prints, and messages for what is no image."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fs import info
from fs.errors import UserError
from tests.support import mkfs, nofailfs

SHAPES = {
    "default": (),
    "1k blocks": ("-b", "size=1k"),
    "64k blocks": ("-b", "size=64k"),
    "1k inodes": ("-i", "size=1024"),
    "rmapbt": ("-m", "rmapbt=1"),
    "8k directories": ("-n", "size=8k"),
    "4k sectors": ("-s", "size=4096"),
    "nrext64": ("-i", "nrext64=1"),
    "old": ("-m", "bigtime=0,reflink=0,inobtcount=0", "-i", "sparse=0"),
    "version 4": ("-m", "crc=0"),
    "case-insensitive": ("-n", "version=ci"),
    "log stripes": ("-l", "sunit=64"),
    "stripes": ("-d", "sunit=128,swidth=512"),
}


@pytest.mark.parametrize("arguments", SHAPES.values(), ids=SHAPES.keys())
def test_as_xfs_info_prints_it(scratch: Path, arguments: tuple[str, ...]) -> None:
    image = str(mkfs(scratch, *arguments, size=1 << 30))
    told = subprocess.run(["xfs_info", image], capture_output=True, text=True, check=True).stdout
    assert info.text(info.layout(info.read_superblock(image)), image) == told


def test_a_label_and_a_uuid(scratch: Path) -> None:
    uuid = "12345678-abcd-abcd-abcd-000000000000"
    image = str(mkfs(scratch, "-L", "twelve chars", "-m", f"uuid={uuid}"))
    shown = info.layout(info.read_superblock(image))
    assert (shown.label, shown.uuid) == ("twelve chars", uuid)
    assert shown.clean


def test_the_program_prints_it(scratch: Path) -> None:
    image = mkfs(scratch)
    told = subprocess.run(["xfs_info", image], capture_output=True, text=True, check=True).stdout
    done = nofailfs("info", image)
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")
    shown = json.loads(nofailfs("info", "--json", image).stdout)
    assert (shown["image"], shown["bsize"], shown["reflink"]) == (str(image), 4096, 1)


def test_what_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(UserError, match="No such file"):
        info.read_superblock(str(path))
    path.write_bytes(b"small")
    with pytest.raises(UserError, match="too small"):
        info.read_superblock(str(path))
    path.write_bytes(bytes(65536))
    with pytest.raises(UserError, match="holds no XFS filesystem .*0x00000000.*mkfs.xfs"):
        info.read_superblock(str(path))


def test_a_damaged_superblock(scratch: Path) -> None:
    image = mkfs(scratch)
    with image.open("r+b") as file:
        file.seek(100)
        file.write(b"\xff")
    with pytest.raises(UserError, match="wrong checksum.*xfs_repair"):
        info.read_superblock(str(image))
