"""A log in which nothing happens is covered: after a crash there is nothing to replay."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
import trio.testing

from fs import namespace
from fs.device.image import ImageFile
from fs.log import blocks, checkpoints, head, items
from fs.log.region import Region
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import opened


async def in_log(image: Path, vol: Volume) -> list[int]:
    """Kinds of the blocks that recovery would look at."""
    device = ImageFile(str(image), read_only=True)
    try:
        region = Region(device, vol.geo)
        ends = await head.find(region)
        found = [c async for c in checkpoints.committed(region, ends.tail, ends.head)]
    finally:
        device.close()
    return [items.buffer(item).kind for c in found for item in c.items()]


@pytest.mark.parametrize("files", [0, 40])
async def test_covered(files: int, scratch: Path, autojump_clock: trio.testing.MockClock) -> None:
    image = support.mkfs(scratch)
    async with opened(image) as vol:
        root = await vol.inodes.get(vol.geo.root_ino)
        for n in range(files):
            ip = await namespace.create(vol, root, b"%d" % n, 0o644, 0, 0)
            vol.inodes.put(ip)
        vol.inodes.put(root)
        await trio.sleep(200)
        head_then, writes = vol.xlog.stream.head, len(vol.dev.writes)  # type: ignore[attr-defined]
        await trio.sleep(2000)
        assert vol.xlog.stream.head == head_then, "covering a covered log would never end"
        assert len(vol.dev.writes) == writes  # type: ignore[attr-defined]
        if files:
            assert await in_log(image, vol) == [blocks.SB]
    support.assert_clean(image)
