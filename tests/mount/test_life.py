"""The life of a mount as a person or a service lives it: command line, lock, signals, read-only."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs import runfile
from tests import support
from tools.targets import run


@pytest.fixture
def image(scratch: Path) -> Path:
    return support.mkfs(scratch)


@pytest.fixture
def where(scratch: Path) -> Iterator[Path]:
    path = scratch / "mnt"
    path.mkdir()
    yield path
    if os.path.ismount(path):
        support.nofailfs("umount", path)


def mount(image: Path, where: Path, *words: str) -> None:
    log = str(image.with_suffix(".log"))
    done = support.nofailfs("mount", "--memory", "16M", "--log", log, *words, image, where)
    assert done.returncode == 0, done.stdout + done.stderr


def umount(where: Path) -> None:
    done = support.nofailfs("umount", where)
    assert done.returncode == 0, done.stdout + done.stderr


def test_mount_returns_when_it_answers(image: Path, where: Path) -> None:
    mount(image, where)
    (where / "file").write_text("there")
    umount(where)
    assert not os.path.ismount(where)
    support.assert_clean(image)
    mount(image, where)
    assert (where / "file").read_text() == "there"
    umount(where)


def test_a_plain_umount_is_as_safe(image: Path, where: Path) -> None:
    """Whoever opens the image next waits for the daemon that still writes."""
    data = os.urandom(1 << 20) * 12
    for number in range(3):
        mount(image, where)
        (where / f"file{number}").write_bytes(data)
        run("umount" if os.geteuid() == 0 else "fusermount3", *_dash_u(), where)
    mount(image, where)
    assert all((where / f"file{number}").read_bytes() == data for number in range(3))
    umount(where)
    support.assert_clean(image)


def _dash_u() -> list[str]:
    return [] if os.geteuid() == 0 else ["-u"]


def test_a_second_mount_is_refused_by_name(image: Path, where: Path, scratch: Path) -> None:
    mount(image, where)
    (scratch / "other").mkdir()
    done = support.nofailfs("mount", image, scratch / "other")
    assert done.returncode == 32
    assert str(where) in done.stderr
    assert "nofailfs umount" in done.stderr
    umount(where)


def test_info_reads_a_mounted_image(image: Path, where: Path) -> None:
    mount(image, where)
    said = json.loads(support.nofailfs("info", "--json", where).stdout)
    assert said
    umount(where)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unmounts_cleanly(image: Path, where: Path, number: signal.Signals) -> None:
    mount(image, where)
    (where / "file").write_bytes(b"x" * 100_000)
    record = runfile.of_mountpoint(str(where))
    assert record is not None
    process = os.pidfd_open(record.pid)
    os.kill(record.pid, number)
    support.wait_for_end(process)
    assert not os.path.ismount(where)
    support.assert_clean(image)
    mount(image, where, "-o", "ro")
    assert (where / "file").stat().st_size == 100_000
    umount(where)


def test_a_read_only_mount_changes_no_byte(image: Path, where: Path) -> None:
    mount(image, where)
    (where / "file").write_text("text")
    umount(where)
    before = image.read_bytes()
    mount(image, where, "-o", "ro")
    assert (where / "file").read_text() == "text"
    for change in (
        lambda: (where / "new").touch(),
        lambda: (where / "file").unlink(),
        lambda: (where / "file").chmod(0o600),
        lambda: (where / "dir").mkdir(),
        lambda: os.truncate(where / "file", 1),
    ):
        with pytest.raises(OSError) as caught:
            change()
        assert caught.value.errno == errno.EROFS
    umount(where)
    assert image.read_bytes() == before


@support.needs_root
def test_remount_read_only(image: Path, where: Path) -> None:
    mount(image, where)
    (where / "file").write_text("text")
    run("mount", "-i", "-o", "remount,ro", where)
    with pytest.raises(OSError) as caught:
        (where / "new").touch()
    assert caught.value.errno == errno.EROFS
    assert (where / "file").read_text() == "text"
    umount(where)
    support.assert_clean(image)


def test_a_scratch_mount_leaves_nothing(where: Path) -> None:
    done = support.nofailfs("mount", "--scratch", "400M", "--memory", "16M", "--log", "none", where)
    assert done.returncode == 0, done.stderr
    (where / "file").write_bytes(b"1" * 5_000_000)
    free = os.statvfs(where)
    assert free.f_blocks * free.f_frsize > 300 << 20
    umount(where)


def test_fsync_survives_on_the_image(image: Path, where: Path) -> None:
    """After fsync the data is in the image, whatever becomes of the daemon."""
    mount(image, where)
    data = os.urandom(300_000)
    with open(where / "file", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        raw = image.read_bytes()
        assert data[:4096] in raw
        assert data[200_704:204_800] in raw
    umount(where)


@pytest.mark.parametrize(
    ("option", "moves"), [("noatime", False), ("strictatime", True)], ids=["noatime", "strict"]
)
def test_access_times(image: Path, where: Path, option: str, moves: bool) -> None:
    mount(image, where, "-o", option)
    path = where / "file"
    path.write_text("text")
    old = 10**18
    os.utime(path, ns=(old, old))
    assert path.read_text() == "text"
    umount(where)
    mount(image, where, "-o", "noatime")
    assert (path.stat().st_atime_ns != old) == moves
    umount(where)
