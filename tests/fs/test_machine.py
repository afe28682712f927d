"""Edges to the machine: mount table, readiness, logs, limits."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from fs import logs, mount, mounts, tuning
from fs.errors import UserError
from fs.front import options as grammar
from fs.notify import notify, watchdog_seconds

TABLE = (
    "36 35 98:0 / /mnt/with\\040blank rw,noatime shared:1 - xfs /dev/root rw,errors=continue\n"
    "37 35 0:57 / /mnt/x\\134y\\054 ro,relatime - fuse.nofailfs /a\\040b rw,user_id=0\n"
    "38 37 0:58 / /mnt/with\\040blank rw - fuse LABEL rw\n"
)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount table of our own."""
    path = tmp_path / "mountinfo"
    path.write_text(TABLE)
    monkeypatch.setattr(mounts, "MOUNTINFO", str(path))


@pytest.mark.usefixtures("table")
def test_the_mount_table_is_read() -> None:
    first, second, third = mounts.table()
    assert (first.device, first.fstype, first.is_fuse) == ("98:0", "xfs", False)
    assert (second.mountpoint, second.source) == ("/mnt/x\\y\\054", "/a b")
    assert second.words == ("ro", "relatime")
    assert mounts.find("/mnt/with blank") == third, "the topmost mount counts"
    assert mounts.find("/mnt/other") is None


def test_the_last_component_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "stuck").symlink_to("nowhere")
    assert mounts.resolve(str(tmp_path / "link" / "stuck")) == f"{tmp_path}/real/stuck"
    assert mounts.resolve("/") == "/"


def test_mount_points_are_checked(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="not a directory"):
        mounts.check_mountpoint(str(file))
    with pytest.raises(UserError, match="does not exist; make it with: mkdir -p"):
        mounts.check_mountpoint(str(tmp_path / "none"))
    assert mounts.check_mountpoint(f"{tmp_path}/.") == str(tmp_path)


def test_unmounting_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        mounts.unmount(str(tmp_path))


@pytest.mark.parametrize("abstract", [False, True], ids=["path", "abstract"])
def test_readiness_reaches_systemd(
    abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"\0nofailfs-{os.getpid()}" if abstract else str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(name)
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name.replace("\0", "@"))
        assert notify("READY=1", "STATUS=mounted")
        assert systemd.recv(100) == b"READY=1\nSTATUS=mounted"


def test_no_systemd_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not notify("READY=1")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert not notify("READY=1")


@pytest.mark.parametrize(("wanted", "seconds"), [("30000000", 15.0), ("", 0.0), ("no", 0.0)])
def test_the_watchdog_is_fed_in_time(
    wanted: str, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", wanted)
    assert watchdog_seconds() == seconds


def test_a_log_file_for_each_mount_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs.os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(logs, "NAME", "nofailfs-test")
    log, where = logs.open_log("", "/mnt/a/b", foreground=False, debug=False)
    assert where == str(tmp_path / "nofailfs" / "mnt-a-b.log")
    log.warning("said")
    assert Path(where).read_text().endswith("WARNING said\n")
    log, where = logs.open_log("none", "/mnt", foreground=False, debug=False)
    assert (where, len(log.handlers)) == ("none", 1)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write the log .*choose another"):
        logs.open_log(str(tmp_path / "file" / "log"), "/mnt", foreground=False, debug=False)


def test_the_journal_gets_levels() -> None:
    record = logging.LogRecord("x", logging.ERROR, "", 0, "two\nlines", (), None)
    assert logs.JournalFormatter("%(message)s").format(record) == "<3>two\n<3>lines"


def test_there_are_more_tasks_than_threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "threads-max"
    monkeypatch.setattr(tuning, "THREADS_MAX", limit)
    assert tuning.max_tasks() > tuning.TASKS_LEAST
    limit.write_text("63000\n")
    assert tuning.max_tasks() > 63000


def test_lanes_follow_the_cores_or_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tuning.LANES_VARIABLE, raising=False)
    for cores, lanes in ((1, 1), (3, 3), (64, 4)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=cores: set(range(n)))
        assert tuning.lanes() == lanes
    monkeypatch.setenv(tuning.LANES_VARIABLE, "0")
    assert tuning.lanes() == 0


def test_the_pages_of_a_request_are_raised_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit, log = tmp_path / "max_pages_limit", logging.getLogger("nofailfs")
    monkeypatch.setattr(tuning, "PAGES_LIMIT", limit)
    assert tuning.pages_limit() == 256
    tuning.allow_pages(257, log)  # nothing to raise here
    limit.write_text("256\n")
    tuning.allow_pages(257, log)
    assert tuning.pages_limit() == 257
    tuning.allow_pages(33, log)
    assert tuning.pages_limit() == 257


def test_a_write_must_fit_into_memory_for_each_lane() -> None:
    options = replace(grammar.parse(["memory=8M,max_write=1M"]), lanes=1)
    mount._check_max_write(options)
    with pytest.raises(UserError, match="needs more memory"):
        mount._check_max_write(replace(options, lanes=2))
