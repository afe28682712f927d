"""What must not be mounted, and what the message says to do about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import support
from tools.targets import TargetError, run


def refused(image: Path, where: Path, *words: str) -> str:
    """The message of a mount that is refused with mount(8)'s code for that."""
    where.mkdir(exist_ok=True)
    done = support.nofailfs("mount", "--log", "none", *words, image, where)
    assert done.returncode == 32, (done.returncode, done.stderr)
    assert "Traceback" not in done.stderr
    assert not os.path.ismount(where)
    return done.stderr


def test_garbage(scratch: Path) -> None:
    image = scratch / "image"
    image.write_bytes(os.urandom(1 << 20))
    assert "no XFS superblock" in refused(image, scratch / "mnt")


def test_no_such_image(scratch: Path) -> None:
    assert "no such image" in refused(scratch / "nothing", scratch / "mnt")


def test_version_4(scratch: Path) -> None:
    image = support.mkfs(scratch, "-m", "crc=0,finobt=0,reflink=0,bigtime=0,inobtcount=0")
    assert "version 4" in refused(image, scratch / "mnt").lower()


def test_an_external_log(scratch: Path) -> None:
    log = scratch / "log"
    with open(log, "wb") as file:
        file.truncate(128 << 20)
    image = support.mkfs(scratch, "-l", f"logdev={log},size=64m")
    assert "external log" in refused(image, scratch / "mnt")


def test_a_damaged_superblock(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with open(image, "r+b") as file:
        file.seek(110)
        file.write(b"?")
    assert "xfs_repair" in refused(image, scratch / "mnt")


@support.needs_root
def test_a_dirty_log(scratch: Path) -> None:
    """The kernel's XFS was shut down in the middle: who may not write cannot replay its log."""
    image = support.mkfs(scratch)
    with support.kernel_mount(image, scratch / "kernel") as kernel:
        for number in range(50):
            (kernel / f"file{number}").write_text("text")
        os.sync()
        (kernel / "late").touch()
        run("xfs_io", "-x", "-c", "shutdown -f", kernel)
    before = image.read_bytes()
    assert "norecovery" in refused(image, scratch / "mnt", "-o", "ro")
    assert "needs ro" in support.nofailfs("mount", "-o", "norecovery", image, scratch).stderr
    with support.our_mount(image, scratch / "mnt", options="ro,norecovery") as mount:
        assert "late" not in os.listdir(mount.path), "only the log knows it"
    assert image.read_bytes() == before
    with support.our_mount(image, scratch / "mnt") as mount:
        assert (mount.path / "file49").read_text() == "text"
        assert (mount.path / "late").exists()
    support.assert_clean(image)


@support.needs_root
def test_an_image_that_the_kernel_has_mounted(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.kernel_mount(image, scratch / "kernel"):
        assert "mounted by the kernel" in refused(image, scratch / "mnt")


def _kill_a_mount(image: Path, where: Path) -> None:
    """A daemon that dies while it has changed things."""
    with pytest.raises(TargetError):
        with support.our_mount(image, where, memory="16M") as mount:
            for number in range(500):
                (mount.path / f"file{number}").write_bytes(b"x" * number)
            (mount.path / "deep").mkdir(exist_ok=True)
            with open(mount.path / "deep" / "kept", "wb") as file:
                file.write(b"kept" * 1000)
                file.flush()
                os.fsync(file.fileno())
            mount.process.kill()
            mount.process.wait()


@support.needs_root
def test_a_crashed_image_is_recovered(scratch: Path) -> None:
    """By whoever mounts it next; who only reads says so."""
    image = support.mkfs(scratch)
    _kill_a_mount(image, scratch / "mnt")
    assert "mount the image once without ro" in refused(image, scratch / "mnt", "-o", "ro")
    with support.kernel_mount(image, scratch / "kernel"):
        pass
    support.assert_clean(image)
    _kill_a_mount(image, scratch / "mnt")
    with support.our_mount(image, scratch / "mnt") as mount:
        assert os.statvfs(mount.path).f_files > 0
        (mount.path / "after").write_text("again")
    support.assert_clean(image)
