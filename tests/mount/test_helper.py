"""mount(8): `mount -t fuse.nofailfs`, labels and image=, remounts, stale mounts, the helper."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs import helper, mounts, runfile
from tests import support
from tools.targets import child_environment

pytestmark = support.needs_root
RUN_SECONDS = 300.0


@pytest.fixture(scope="module", autouse=True)
def _helper() -> Iterator[None]:
    """mount(8)'s helper, put back as it was at the end."""
    before = helper.PATH.read_bytes() if helper.PATH.exists() else None
    helper.install()
    yield
    if before is None:
        helper.PATH.unlink()
    else:
        helper.PATH.write_bytes(before)


@pytest.fixture
def image(scratch: Path) -> Path:
    return support.mkfs(scratch)


@pytest.fixture
def where(scratch: Path) -> Path:
    path = scratch / "mnt"
    path.mkdir()
    return path


def mount(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["mount", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=child_environment(),
        timeout=RUN_SECONDS,
    )


def done(result: subprocess.CompletedProcess[str]) -> None:
    assert result.returncode == 0, result.stdout + result.stderr


def shown(where: Path) -> mounts.Mount:
    found = mounts.find(str(where))
    assert found is not None
    return found


def test_a_label_and_an_image(image: Path, where: Path) -> None:
    """As xfstests does: the source is only a label, an empty subtype makes the type plain."""
    options = f"image={image},subtype=,allow_other,noatime,memory=16M,log=none"
    done(mount("-t", "fuse.nofailfs", "LABEL", where, "-o", options))
    table = shown(where)
    assert (table.source, table.fstype) == ("LABEL", "fuse")
    assert "allow_other" in table.super_words
    assert "noatime" in table.words
    assert not {"nosuid", "nodev"} & set(table.words), "root's mounts have both"
    done(support.nofailfs("umount", where))
    support.assert_clean(image)


def test_nosuid_and_nodev(image: Path, where: Path) -> None:
    options = "nosuid,nodev,noexec,memory=16M,log=none"
    done(mount("-t", "fuse.nofailfs", image, where, "-o", options))
    table = shown(where)
    assert (table.source, table.fstype) == (str(image), "fuse.nofailfs")
    assert {"nosuid", "nodev", "noexec"} <= set(table.words)
    done(support.nofailfs("umount", where))


def test_devices_and_set_user_id_work(image: Path, where: Path) -> None:
    options = "suid,dev,memory=16M,log=none"
    done(mount("-t", "fuse.nofailfs", image, where, "-o", options))
    os.mknod(where / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert (where / "null").stat().st_rdev == os.makedev(1, 3)
    with open(where / "null", "wb", buffering=0) as null:
        assert null.write(b"gone") == 4
    done(support.nofailfs("umount", where))
    support.assert_clean(image)


def test_remount(image: Path, where: Path) -> None:
    done(mount("-t", "fuse.nofailfs", image, where, "-o", "memory=16M,log=none"))
    (where / "file").write_text("text")
    done(mount("-o", "remount,ro", where))
    assert "ro" in shown(where).words + shown(where).super_words
    with pytest.raises(OSError) as refused:
        (where / "file").write_text("more")
    assert refused.value.errno == errno.EROFS
    assert (where / "file").read_text() == "text"
    done(mount("-o", "remount,rw", where))
    (where / "file").write_text("more")
    done(support.nofailfs("umount", where))
    support.assert_clean(image)


def test_a_read_only_daemon_cannot_be_remounted_writable(image: Path, where: Path) -> None:
    done(mount("-t", "fuse.nofailfs", image, where, "-o", "ro,memory=16M,log=none"))
    result = mount("-o", "remount,rw", where)
    assert result.returncode == 32
    assert "mount it again without ro" in result.stderr
    done(support.nofailfs("umount", where))


def test_refusals_come_back_through_mount_8(image: Path, where: Path) -> None:
    result = mount("-t", "fuse.nofailfs", image, where, "-o", "zork")
    assert (result.returncode, "unknown option 'zork'" in result.stderr) == (1, True)
    result = mount("-t", "fuse.nofailfs", image.with_name("none"), where)
    assert (result.returncode, "no such image" in result.stderr) == (32, True)


def test_fstab_words_are_ignored(image: Path, where: Path, tmp_path: Path) -> None:
    fstab = tmp_path / "fstab"
    words = "defaults,nofail,_netdev,x-systemd.automount,memory=16M,log=none"
    fstab.write_text(f"{image} {where} fuse.nofailfs {words} 0 0\n")
    done(mount("--fstab", fstab, where))
    assert shown(where).fstype == "fuse.nofailfs"
    done(support.nofailfs("umount", where))


def test_a_source_with_odd_letters(scratch: Path, where: Path) -> None:
    image = support.mkfs(scratch, name="im,age ü\\x")
    done(support.nofailfs("mount", "--memory", "16M", "--log", "none", image, where))
    assert shown(where).source == str(image)
    done(support.nofailfs("umount", where))


def test_a_stale_mount_is_named_with_its_cure(image: Path, where: Path) -> None:
    done(support.nofailfs("mount", "--memory", "16M", "--log", "none", image, where))
    record = runfile.of_mountpoint(str(where))
    assert record is not None
    process = os.pidfd_open(record.pid)
    os.kill(record.pid, signal.SIGKILL)
    support.wait_for_end(process)
    result = support.nofailfs("mount", image, where)
    assert result.returncode == 32
    assert f"umount {where}" in result.stderr
    assert "Transport endpoint is not connected" in result.stderr
    result = support.nofailfs("umount", where)
    assert result.returncode == 2
    assert "recovers its log" in result.stderr
    assert mounts.find(str(where)) is None


def test_a_busy_mount_stays(image: Path, where: Path) -> None:
    done(support.nofailfs("mount", "--memory", "16M", "--log", "none", image, where))
    with open(where / "file", "w") as file:
        result = support.nofailfs("umount", where)
        assert result.returncode == 32
        assert "lsof" in result.stderr
        file.write("still there")
    done(support.nofailfs("umount", where))
    support.assert_clean(image)


def test_stacks_and_requests_on_sigusr1(image: Path, where: Path, scratch: Path) -> None:
    log = scratch / "log"
    done(support.nofailfs("mount", "--memory", "16M", "--log", log, image, where))
    record = runfile.of_mountpoint(str(where))
    assert record is not None
    for _ in range(300):  # while its kernels are loaded: threads that come and go in Python
        os.kill(record.pid, signal.SIGUSR1)
        time.sleep(0.005)
    done(support.nofailfs("umount", where))
    said = log.read_text()
    assert "thread MainThread:" in said
    assert "requests run" in said
    assert "0 tasks wait for memory" in said
    assert "task fs.session.Session.run" in said
