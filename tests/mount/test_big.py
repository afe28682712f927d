"""Sizes that must not matter: many files, many extents, more data than memory.

Each test also looks at the daemon's peak resident size: the memory option and a constant, whatever
the mount holds.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import pytest

from tests import support
from tools import fiorun, targets

FILES, EXTENTS, FSX_OPS = 100_000, 10_000, 100_000

pytestmark = [pytest.mark.slow]


def test_a_directory_of_100_000_files(scratch: Path) -> None:
    image = support.mkfs(scratch, size=1 << 30)
    with support.our_mount(image, scratch / "mnt", memory="64M") as mount:
        before = os.statvfs(mount.path)
        big = mount.path / "big"
        big.mkdir()
        names = [f"file-{number:06d}" for number in range(FILES)]
        for name in names:
            os.close(os.open(big / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        assert sorted(os.listdir(big)) == names
        for name in names[:: FILES // 1000]:
            assert os.stat(big / name).st_size == 0
        support.assert_small(mount)
    support.assert_clean(image)
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        big = mount.path / "big"
        found = 0
        with os.scandir(big) as entries:
            for entry in entries:
                assert entry.is_file()
                found += 1
        assert found == FILES
        for name in names:
            os.unlink(big / name)
        assert os.listdir(big) == []
        big.rmdir()
        after = os.statvfs(mount.path)
        # chunks of free inodes may stay, as the kernel keeps them; the directory's blocks may not
        assert before.f_bfree - after.f_bfree <= FILES * 512 // 4096 * 5 // 4
        support.assert_small(mount)
    support.assert_clean(image)


def extents_of(image: Path, ino: int) -> int:
    """Data extents of an inode, as xfs_db reads them."""
    text = targets.run("xfs_db", "-r", "-c", f"inode {ino}", "-c", "print", image)
    found = re.search(r"^core\.(?:big_)?nextents = (\d+)", text, re.MULTILINE)
    assert found, text
    return int(found.group(1))


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@support.needs_root
def test_a_file_of_10_000_extents(scratch: Path) -> None:
    image = support.mkfs(scratch, size=1 << 30)
    with support.our_mount(image, scratch / "mnt", memory="32M") as mount:
        path = mount.path / "holes"
        want = hashlib.sha256()
        with open(path, "wb", buffering=0) as file:
            for number in range(EXTENTS):
                block = number.to_bytes(8, "big") * 512
                os.pwrite(file.fileno(), block, number * 8192)
                want.update(block if number == 0 else bytes(4096) + block)
            os.fsync(file.fileno())
        assert digest(path) == want.hexdigest()
        ino = os.stat(path).st_ino
        support.assert_small(mount)
    support.assert_clean(image)
    assert extents_of(image, ino) >= EXTENTS
    with support.kernel_mount(image, scratch / "kernel") as kernel:
        assert digest(kernel / "holes") == want.hexdigest()
    with support.our_mount(image, scratch / "mnt", memory="32M") as mount:
        path = mount.path / "holes"
        assert digest(path) == want.hexdigest()
        os.truncate(path, EXTENTS * 4096)
        os.truncate(path, 0)
        path.unlink()
        support.assert_small(mount)
    support.assert_clean(image)


def test_fsx_in_little_memory(scratch: Path) -> None:
    image = support.mkfs(scratch, size=512 << 20)
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        words = ("--ops", str(FSX_OPS), "--seed", "11", "--length", "24M", "--quiet")
        words += ("--whole-every", "2500")
        done = support.nofailfs("fsx", mount.path, *words, timeout=570)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{FSX_OPS} operations, seed 11: no difference" in done.stdout
        support.assert_small(mount)
    support.assert_clean(image)


@support.needs_fio
def test_fio_verifies_four_times_the_memory(scratch: Path) -> None:
    image = support.mkfs(scratch, size=1 << 30)
    with support.our_mount(image, scratch / "mnt", memory="64M") as mount:
        result = fiorun.run("verify", mount.path, 64 << 20)  # each of four jobs
        assert result.errors == 0, result.text
        # without lanes pyfuse3 keeps each job's request outside the arena
        support.assert_small(mount, waiting=4 if os.environ.get("NOFAILFS_LANES") == "0" else 0)
    support.assert_clean(image)
