"""The image's lock and the run files: who holds an image, and what the next one is told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fs import imagelock, mounts, runfile
from fs.errors import UserError


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image, and run files in a directory of this test."""
    monkeypatch.setattr(runfile, "directory", lambda: tmp_path / "run")
    path = tmp_path / "image"
    path.touch()
    return path


@pytest.fixture
def holder(image: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the image's lock until its input ends."""
    code = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX);"
        "sys.stdout.write('x'); sys.stdout.flush(); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.read(1) == b"x"
        try:
            yield child
        finally:
            assert child.stdin is not None
            child.stdin.close()


def record(image: Path, pid: int, mountpoint: str, state: str) -> runfile.Record:
    key = runfile.image_key(str(image))
    return runfile.Record(pid, runfile.start_ticks(pid), str(image), key, mountpoint, state)


def test_readers_share_and_writers_do_not(image: Path) -> None:
    first = imagelock.ImageLock(str(image), shared=True)
    second = imagelock.ImageLock(str(image), shared=True)
    writer = imagelock.ImageLock(str(image), shared=False)
    assert first.try_acquire()
    assert second.try_acquire()
    assert not writer.try_acquire()
    first.release()
    second.release()
    assert writer.try_acquire()
    assert not first.try_acquire()
    writer.release()


def test_a_mounted_image_is_refused_at_once(
    image: Path, holder: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    runfile.write(record(image, holder.pid, "/mnt/here", runfile.MOUNTED))
    standing = mounts.Mount("0:99", "/mnt/here", ("rw",), "fuse.nofailfs", str(image), ())
    monkeypatch.setattr(mounts, "find", lambda path: standing)
    lock = imagelock.ImageLock(str(image), shared=False)
    with pytest.raises(UserError, match=f"on /mnt/here by process {holder.pid}") as refused:
        lock.acquire(timeout=3600.0)
    assert refused.value.exit_code == 32
    assert "nofailfs umount /mnt/here" in str(refused.value)
    lock.release()


def test_a_daemon_that_finishes_is_waited_for(image: Path, holder: subprocess.Popen[bytes]) -> None:
    runfile.write(record(image, holder.pid, "/nowhere", runfile.STOPPING))
    lock = imagelock.ImageLock(str(image), shared=False)
    told: list[str] = []

    def let_go(text: str) -> None:
        told.append(text)
        assert holder.stdin is not None
        threading.Thread(target=holder.stdin.close).start()

    lock.acquire(60.0, let_go)
    assert told == [f"waiting for process {holder.pid} to finish writing {image}"]
    lock.release()


def test_the_wait_is_bounded(image: Path, holder: subprocess.Popen[bytes]) -> None:
    lock = imagelock.ImageLock(str(image), shared=False)
    with pytest.raises(UserError, match="did not finish within 0.1 s.*lock_timeout"):
        lock.acquire(0.1)
    lock.release()


def test_a_record_is_alive_while_its_process_is(image: Path) -> None:
    mine = record(image, os.getpid(), "/mnt", runfile.MOUNTED)
    assert mine.is_alive()
    assert not runfile.Record(mine.pid, mine.start_ticks + 1, "", "", "", "").is_alive()
    with subprocess.Popen(["true"]) as child:
        child.wait()
    assert runfile.start_ticks(child.pid) == -1


def test_records_by_mount_point(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    dead = record(other, os.getpid(), "/mnt/x", runfile.ENDED)
    runfile.write(runfile.Record(**{**vars(dead), "start_ticks": 1}))
    alive = record(image, os.getpid(), "/mnt/x", runfile.MOUNTED)
    runfile.write(alive)
    assert runfile.of_mountpoint("/mnt/x") == alive
    assert runfile.of_mountpoint("/mnt/y") is None
    runfile.remove(alive)
    assert runfile.of_image(alive.image_key) is None


def test_old_records_are_forgotten(image: Path, tmp_path: Path) -> None:
    def left(name: str, **changes: Any) -> runfile.Record:
        path = tmp_path / name
        path.touch()
        record_ = runfile.Record(**{**vars(record(path, os.getpid(), "/mnt", "")), **changes})
        runfile.write(record_)
        return record_

    alive = left("alive", state=runfile.MOUNTED)
    ended = left("ended", state=runfile.ENDED, start_ticks=1)
    failed = left("failed", state=runfile.ENDED, start_ticks=1, exit_status=2)
    crashed = left("crashed", state=runfile.MOUNTED, start_ticks=1)
    gone = left("gone", state=runfile.MOUNTED, start_ticks=1)
    (tmp_path / "gone").unlink()
    runfile.prune()
    kept = [r for r in (alive, ended, failed, crashed, gone) if runfile.of_image(r.image_key)]
    assert kept == [alive, failed, crashed]


def test_a_broken_run_file_is_no_record(image: Path) -> None:
    mine = record(image, os.getpid(), "/mnt", runfile.MOUNTED)
    runfile.write(mine)
    (runfile.directory() / f"{mine.image_key}.json").write_text("{half")
    assert runfile.of_image(mine.image_key) is None
    assert runfile.of_mountpoint("/mnt") is None


def test_messages_of_images_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such image; make one with: mkfs.xfs"):
        imagelock.check_readable(str(tmp_path / "none"), writable=True)
    with pytest.raises(UserError, match="is a directory"):
        imagelock.check_readable(str(tmp_path), writable=True)
