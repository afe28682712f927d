"""A full file system: ENOSPC is exact, nothing that was accepted is lost, all of it comes back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tests import support


def fill(fd: int, chunk: bytes) -> int:
    """Append `chunk` until there is no space; returns the bytes that were accepted."""
    done = 0
    while True:
        try:
            done += os.write(fd, chunk)
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return done


@pytest.mark.slow
@support.needs_root
@pytest.mark.parametrize("mkfs_args", [(), ("-m", "rmapbt=1")], ids=["default", "rmapbt"])
def test_a_file_that_fills_everything(scratch: Path, mkfs_args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *mkfs_args)
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        empty = os.statvfs(mount.path)
        fd = os.open(mount.path / "full", os.O_CREAT | os.O_RDWR)
        size = fill(fd, b"M" * (1 << 20))
        size += fill(fd, b"k" * 4096)
        assert size > empty.f_bavail * empty.f_frsize * 9 // 10
        os.fsync(fd)
        full = os.statvfs(mount.path)
        assert full.f_bavail * full.f_frsize < 1 << 20
        with pytest.raises(OSError) as caught:
            os.write(fd, b"k" * 4096)
        assert caught.value.errno == errno.ENOSPC
        os.pwrite(fd, b"over", 12345)  # in place: needs no new block
        assert os.fstat(fd).st_size == size
        os.close(fd)
        support.assert_small(mount)
    support.assert_clean(image)
    with support.kernel_mount(image, scratch / "kernel") as kernel:
        with open(kernel / "full", "rb") as file:
            head = file.read(1 << 20)
        assert head == b"M" * 12345 + b"over" + b"M" * ((1 << 20) - 12349)
        assert (kernel / "full").stat().st_size == size
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        os.unlink(mount.path / "full")
        (mount.path / "small").write_text("fits")
    support.assert_clean(image)
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        # inodes that the kernel made, and the growth of trees, may keep a few blocks
        assert empty.f_bavail - os.statvfs(mount.path).f_bavail <= 32


@pytest.mark.slow
def test_many_small_files_fill_everything(scratch: Path) -> None:
    """Names, inodes and data compete for the last blocks; whatever was created stays whole."""
    image = support.mkfs(scratch, "-b", "size=4k")
    made = []
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        with open(mount.path / "ballast", "wb", buffering=0) as file:
            room = os.statvfs(mount.path).f_bavail * 4096 - (12 << 20)
            for _ in range(room >> 20):
                file.write(b"b" * (1 << 20))
            os.fsync(file.fileno())
        with pytest.raises(OSError) as caught:
            for number in range(20_000):
                path = mount.path / f"file-{number}"
                path.write_bytes(number.to_bytes(4, "big") * 1024)
                made.append(path.name)
        assert caught.value.errno == errno.ENOSPC
        assert len(made) > 1000
        for number, name in enumerate(made):
            assert (mount.path / name).read_bytes() == number.to_bytes(4, "big") * 1024
    support.assert_clean(image)
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        for name in os.listdir(mount.path):
            os.unlink(mount.path / name)
        (mount.path / "after").write_bytes(b"a" * (8 << 20))
    support.assert_clean(image)
