"""The reader against the kernel: a tree with every form, made by the kernel, reads back identical.

Each geometry gets an image made by mkfs.xfs, a tree made on the kernel's mount, a snapshot of that
mount, and our own snapshot of the same image through the layers below FUSE, read-only.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from fs.device.image import ImageFile
from fs.volume import Volume
from tests.kernel_tree import Hints, Snapshot, diff, make_tree, snapshot, snapshot_volume
from tests.support import kernel_mount, mkfs, needs_root

CASES: dict[str, tuple[tuple[str, ...], Hints]] = {
    "default": ((), Hints(extents=3000)),
    "1k blocks": (("-b", "size=1k"), Hints(1024, 4096, extents=1500)),
    "64k blocks": (("-b", "size=64k"), Hints(65536, 65536)),
    "1k inodes": (("-i", "size=1024"), Hints()),
    "rmapbt": (("-m", "rmapbt=1"), Hints()),
    "8k directories": (("-n", "size=8k"), Hints(4096, 8192)),
    "nrext64": (("-i", "nrext64=1"), Hints()),
    "no bigtime": (("-m", "bigtime=0"), Hints()),
    "no reflink": (("-m", "reflink=0"), Hints()),
    "4k sectors": (("-s", "size=4096"), Hints()),
    "2k inodes": (("-i", "size=2048"), Hints()),
    "no sparse inodes, no finobt": (("-i", "sparse=0", "-m", "finobt=0"), Hints()),
}


async def _read(image: Path) -> Snapshot:
    device = ImageFile(str(image), read_only=True)
    try:
        async with Volume.open(device, 32 << 20, read_only=True) as vol:
            return await snapshot_volume(vol, exact=True)
    finally:
        device.close()


@needs_root
@pytest.mark.parametrize(("arguments", "hints"), CASES.values(), ids=CASES.keys())
def test_reads_what_the_kernel_wrote(
    scratch: Path, arguments: tuple[str, ...], hints: Hints
) -> None:
    image = mkfs(scratch, *arguments)
    where = scratch / "kernel"
    with kernel_mount(image, where, "loop,noatime"):
        make_tree(where, 2, hints)
    with kernel_mount(image, where, "loop,ro,noatime"):
        wanted = snapshot(where, exact=True)
    before = image.stat().st_mtime_ns
    found = trio.run(_read, image)
    assert image.stat().st_mtime_ns == before, "a read-only volume wrote to its image"
    assert diff(wanted, found) == []
