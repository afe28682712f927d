"""Freezing and shutting down a mount: who waits, what a copy of the image has, what umount says."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import struct
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fs import ioctl
from tests import support
from tests.mount.test_life import mount

pytestmark = [support.needs_root, support.needs_fuse]

FORMS = ["lanes=2", "lanes=0", "lanes=2,cache=writeback"]
NAMES = ("file", "gone", "old", "cut", "attr", "idle")
DATA = b"data" * 5000
QUIET_S = 1.0  # that writers are watched for


def command(*words: str | Path) -> None:
    done = support.nofailfs(*words)
    assert done.returncode == 0, done.stdout + done.stderr


class Writer:
    """One call of a client, in a thread of its own."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.error: OSError | None = None
        self._call = call
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except OSError as error:
            self.error = error

    @property
    def waits(self) -> bool:
        return self.thread.is_alive()


def overwrite(path: Path) -> None:
    """By another process: if we had it open, each child that we start would close it, too."""
    words = ("dd", f"of={path}", "conv=notrunc,fsync", "status=none")
    subprocess.run(words, input=DATA[::-1], check=True)


def writers(top: Path) -> list[Writer]:
    """Whoever changes something, each in its own way, on things of its own."""
    return [
        Writer(call)
        for call in (
            lambda: overwrite(top / "file"),
            lambda: (top / "new").touch(),
            lambda: (top / "dir").mkdir(),
            lambda: (top / "gone").unlink(),
            lambda: os.rename(top / "old", top / "renamed"),
            lambda: os.truncate(top / "cut", 10),
            lambda: os.setxattr(top / "attr", "user.name", b"value"),
        )
    ]


@pytest.mark.parametrize("form", FORMS)
def test_writers_wait_until_the_thaw(form: str, scratch: Path) -> None:
    image, where, copy = support.mkfs(scratch), scratch / "mnt", scratch / "copy"
    with support.our_mount(image, where, options=form) as mounted:
        top = mounted.path
        for name in NAMES:
            (top / name).write_bytes(DATA)
        command("freeze", where)
        assert (top / ".nofail/sys/fs/xfs/freeze").read_text() == "1\n"
        started = writers(top)
        for writer in started:
            writer.thread.join(QUIET_S / len(started))
        assert [writer.waits for writer in started] == [True] * len(started)
        assert (top / "idle").read_bytes() == DATA
        shutil.copyfile(image, copy)
        command("thaw", where)
        for writer in started:
            writer.thread.join(60)
        assert not any(writer.waits or writer.error for writer in started)
        assert (top / "file").read_bytes() == DATA[::-1]
        assert sorted(os.listdir(top)) == ["attr", "cut", "dir", "file", "idle", "new", "renamed"]
    support.assert_clean(image)
    with support.kernel_mount(copy, scratch / "kernel") as there:
        found = {path.name: path.read_bytes() for path in there.iterdir()}
    assert found == dict.fromkeys(NAMES, DATA)
    support.assert_clean(copy)


def test_an_unmount_of_what_is_frozen(scratch: Path) -> None:
    image, where = support.mkfs(scratch), scratch / "mnt"
    with support.our_mount(image, where) as mounted:
        (mounted.path / "file").write_bytes(DATA)
        command("freeze", where)
        again = support.nofailfs("freeze", where)
        assert again.returncode == 1
        assert "busy" in again.stderr
    support.assert_clean(image)
    assert "is not mounted" in support.nofailfs("freeze", where).stderr


def test_without_reports_it_cannot_be_done(scratch: Path) -> None:
    image, where = support.mkfs(scratch), scratch / "mnt"
    with support.our_mount(image, where, options="procdir=off"):
        said = support.nofailfs("freeze", where)
        assert said.returncode == 1
        assert "procdir" in said.stderr


# -- shutdown -------------------------------------------------------------------------------------

KEPT = {
    "default": (ioctl.GOING_DEFAULT, {"early": DATA, "late": DATA}),
    "log flushed": (ioctl.GOING_LOGFLUSH, {"early": DATA, "late": b""}),
    "log not flushed": (ioctl.GOING_NOLOGFLUSH, {"early": DATA}),
}


@pytest.mark.parametrize(("flags", "expected"), KEPT.values(), ids=KEPT.keys())
def test_a_shutdown_that_was_asked_for(
    flags: int, expected: dict[str, bytes], scratch: Path
) -> None:
    """EIO for everything, an unmount that says what comes next, and the kernel recovers it."""
    image, where = support.mkfs(scratch), scratch / "mnt"
    where.mkdir()
    mount(image, where)
    for name in ("early", "late"):
        fd = os.open(where / name, os.O_CREAT | os.O_WRONLY)
        os.write(fd, DATA)
        if name == "early":
            os.fsync(fd)
        os.close(fd)
    fd = os.open(where, os.O_RDONLY)
    fcntl.ioctl(fd, ioctl.GOINGDOWN, struct.pack("=I", flags))
    os.close(fd)
    for call in (lambda: os.listdir(where), lambda: (where / "more").touch()):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EIO
    done = support.nofailfs("umount", where)
    assert done.returncode == 2
    assert "the next mount recovers the log" in done.stderr
    assert "User initiated shutdown received." in image.with_suffix(".log").read_text()
    ours = scratch / "ours"
    shutil.copyfile(image, ours)
    mount(ours, where)
    assert {path.name: path.read_bytes() for path in where.iterdir()} == expected
    command("umount", where)
    with support.kernel_mount(image, scratch / "kernel") as there:
        assert {path.name: path.read_bytes() for path in there.iterdir()} == expected
    for one in (image, ours):
        support.assert_clean(one)


@pytest.mark.parametrize("fault", ["write", "flush"])
def test_a_device_that_fails_under_a_mount(fault: str, scratch: Path) -> None:
    """The log cannot be written: who waits for it is told, and everybody else from then on."""
    image, where = support.mkfs(scratch), scratch / "mnt"
    where.mkdir()
    mount(image, where, "-o", "faults=seed=1")
    (where / "early").write_bytes(DATA)
    fd = os.open(where / "early", os.O_RDWR)
    os.fsync(fd)
    (where / f".nofail/sys/device/fail_{fault}_ppm").write_text("1000000")
    late = os.open(where / "late", os.O_CREAT | os.O_WRONLY)
    with pytest.raises(OSError) as caught:
        os.fsync(late)
    assert caught.value.errno == errno.EIO
    with pytest.raises(OSError):
        os.listdir(where)
    os.close(late)
    os.close(fd)
    assert support.nofailfs("umount", where).returncode == 2
    assert "Log I/O Error (0x2) detected" in image.with_suffix(".log").read_text()
    with support.kernel_mount(image, scratch / "kernel") as there:
        assert (there / "early").read_bytes() == DATA
    support.assert_clean(image)
