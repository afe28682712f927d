"""Access control lists: stored as XFS stores them, enforced by the kernel, inherited."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests import support

DEFAULT = "u::rwx,u:1000:rwx,u:1001:r--,g::r-x,m::rwx,o::r--"


def made(here: Path) -> dict[str, tuple[int, str]]:
    """Modes and ACLs of a tree in which everything inherits."""
    (here / "top").mkdir()
    subprocess.run(["setfacl", "-d", "-m", DEFAULT, here / "top"], check=True)
    before = os.umask(0)
    try:
        (here / "top" / "dir").mkdir(mode=0o775)
        os.close(os.open(here / "top" / "file", os.O_CREAT | os.O_WRONLY, 0o640))
        os.close(os.open(here / "top" / "dir" / "deep", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkfifo(here / "top" / "fifo", 0o600)
        os.symlink("file", here / "top" / "link")
        os.close(os.open(here / "top" / "changed", os.O_CREAT | os.O_WRONLY, 0o666))
        (here / "top" / "changed").chmod(0o2751)
    finally:
        os.umask(before)
    return look(here)


def look(here: Path) -> dict[str, tuple[int, str]]:
    """Modes and ACLs of the tree."""
    paths = sorted(p for p in here.rglob("*") if not p.is_symlink())
    return {
        str(path.relative_to(here)): (
            path.stat().st_mode,
            subprocess.run(
                ["getfacl", "-cpnE", path], capture_output=True, text=True, check=True
            ).stdout,
        )
        for path in paths
    }


@support.needs_root
def test_inherited_as_by_the_kernel(scratch: Path) -> None:
    ours, theirs = support.mkfs(scratch, name="ours"), support.mkfs(scratch, name="theirs")
    with support.kernel_mount(theirs, scratch / "kernel") as kernel:
        expected = made(kernel)
    with support.our_mount(ours, scratch / "mnt", "16M") as mount:
        assert made(mount.path) == expected
    support.assert_clean(ours)
    with support.kernel_mount(ours, scratch / "kernel") as kernel:
        assert look(kernel) == expected
    with support.our_mount(theirs, scratch / "mnt", "16M", options="ro") as mount:
        assert look(mount.path) == expected


@support.needs_root
def test_enforced_by_the_kernel(scratch: Path) -> None:
    image = support.mkfs(scratch)
    scratch.chmod(0o755)
    with support.our_mount(image, scratch / "mnt", "16M", options="allow_other") as mount:
        path = mount.path / "file"
        path.write_text("secret")
        path.chmod(0o600)
        subprocess.run(["setfacl", "-m", "u:1000:r--", path], check=True)
        assert path.stat().st_mode & 0o777 == 0o640, "the group bits are the mask"
        assert _can_read(path, 1000)
        assert not _can_read(path, 1001)
        path.chmod(0o600)
        assert not _can_read(path, 1000), "the mask takes it back"
    support.assert_clean(image)


def _can_read(path: Path, uid: int) -> bool:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresgid(uid, uid, uid)
            os.setgroups([])
            os.setresuid(uid, uid, uid)
            os.close(os.open(path, os.O_RDONLY))
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0
