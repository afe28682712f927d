"""What a mount looks at before it uses a log: its size, the memory it pins, its buffers' size."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fs.device.image import ImageFile
from fs.errors import UserError
from fs.log import bounds, reservation
from fs.volume import Volume
from fs.xfs import superblock
from fs.xfs.geometry import Geometry
from tests import support
from tools.targets import TargetError, find_tool

MIB = 1 << 20
SIZES = (32 << 10, 64 << 10, 128 << 10, 256 << 10)


def geometry(image: Path) -> Geometry:
    with image.open("rb") as raw:
        return superblock.geometry(superblock.read(raw.read(32768), image.stat().st_size))


async def mounts(image: Path, memory: int = 16 << 20, logbsize: int = 0) -> None:
    device = ImageFile(str(image))
    try:
        async with Volume.open(device, memory, logbsize=logbsize):
            pass
    finally:
        device.close()


def shorten_log(image: Path, blocks: int) -> None:
    """Make the superblock say that the log has so many blocks, and let its place follow."""
    words = ("-x", "-c", "sb 0", "-c", f"write -d logblocks {blocks}", str(image))
    subprocess.run([find_tool("xfs_db"), *words], check=True, capture_output=True)


@support.needs_root
async def test_a_log_that_is_too_small(scratch: Path) -> None:
    """Is refused with the kernel's numbers, before anything is written; one block more is not."""
    image = support.mkfs(scratch)
    least = reservation.minimum_log_blocks(geometry(image), 32 << 10)
    shorten_log(image, least - 1)
    before = image.read_bytes()
    with pytest.raises(UserError, match=f"{least - 1} blocks too small, minimum size is {least}"):
        await mounts(image)
    assert image.read_bytes() == before
    with pytest.raises(TargetError), support.kernel_mount(image, scratch / "mnt"):
        pass
    said = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    words = re.findall(r"Log size (\d+) blocks too small, minimum size is (\d+) blocks", said)
    assert (str(least - 1), str(least)) in words
    shorten_log(image, least)
    with support.kernel_mount(image, scratch / "mnt"):
        pass
    await mounts(image)


async def test_a_memory_that_is_too_small(scratch: Path) -> None:
    """Is refused with the one that is needed, and that one is enough."""
    image = support.mkfs(scratch, "-b", "size=64k")
    with pytest.raises(UserError, match=r"at least --memory \d+M") as refused:
        await mounts(image, 8 << 20)
    found = re.search(r"--memory (\d+)M", str(refused.value))
    assert found
    needed = int(found.group(1)) * MIB
    await mounts(image, needed)
    with pytest.raises(UserError):
        await mounts(image, needed - MIB)
    geo = geometry(image)
    for memory in (needed, needed - MIB):
        left = memory - bounds.pinned_most(geo, 32768, memory)
        assert (left >= memory // bounds.FREE_SHARE) == (memory == needed)


async def test_usual_images_need_no_more_than_the_least_memory(scratch: Path) -> None:
    await mounts(support.mkfs(scratch), 8 << 20)


async def test_what_a_mount_says(scratch: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    image = support.mkfs(scratch)
    await mounts(image, 64 << 20)
    geo = geometry(image)
    pinned = bounds.pinned_most(geo, 32768, 64 << 20) >> 10
    log = geo.log_blocks * geo.block_size / MIB
    words = f"log: {log:g} MiB, checkpoints up to 2048 KiB, at most {pinned} KiB of memory pinned"
    assert words in caplog.text


# -- iclogs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@support.needs_root
async def test_logbsize(size: int, scratch: Path) -> None:
    """Records are as large as that, and the kernel takes them."""
    image = support.mkfs(scratch)
    device = ImageFile(str(image))
    async with Volume.open(device, 64 << 20, logbsize=size) as vol:
        assert vol.xlog.stream.shape.size == size
        async with vol.transaction("sb"):
            pass
    device.close()
    with support.kernel_mount(image, scratch / "mnt"):
        pass
    support.assert_clean(image)


@pytest.mark.parametrize(
    ("unit", "asked", "expected"),
    [
        *(("32k", 0, 32768), ("64k", 0, 65536), ("256k", 0, 262144), ("32k", 65536, 65536)),
        *(("64k", 32768, None), ("96k", 131072, None), ("256k", 262144, 262144)),
    ],
)
async def test_with_a_stripe_unit(
    unit: str, asked: int, expected: int | None, scratch: Path
) -> None:
    """As large as it unless one says; what is smaller, or no multiple, is refused."""
    image = support.mkfs(scratch, "-l", f"su={unit}")
    if expected is None:
        with pytest.raises(UserError, match="logbuf size must be"):
            await mounts(image, 64 << 20, asked)
        return
    device = ImageFile(str(image))
    async with Volume.open(device, 64 << 20, logbsize=asked) as vol:
        assert vol.xlog.stream.shape.size == expected
    device.close()
