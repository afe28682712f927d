"""Policies through a mount: ENOMEM and going on, a forced shutdown, or, under irix, nothing at all.

The same schedule meets each policy. Where an allocation fails is chosen with `inject`, when the
mount has come so far.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alloc.policy import IRIX, parse
from fs import runfile
from fs import stat as figures
from fs.session import Session
from fs.volume import Volume
from tests import support
from tests.conftest import AllowLogs
from tests.mount.test_handlers import away, error_of, served

CONTENT = bytes(range(256)) * 800
NO_MEMORY_LOGS = "page allocation failure"
SHUTDOWN_LOGS = f"{NO_MEMORY_LOGS}|xfs_trans_cancel|Shutting down|unmounted after a shutdown"
FRONTS = ("lanes=0", "lanes=2")


def volume(session: Session) -> Volume:
    assert session._vol is not None
    return session._vol


def drop_caches(vol: Volume) -> None:
    while vol.arena.reclaim.shrink_all(0, 0, "direct", 1 << 30):
        pass


async def told(where: Path) -> dict[str, Any]:
    """What `nofailfs stat` says of failed allocations."""
    found: dict[str, Any] = await away(lambda: figures.read(str(where)))
    return found


@support.needs_root
@pytest.mark.parametrize("front", FRONTS)
async def test_a_read_without_memory_is_enomem(
    scratch: Path, front: str, allow_logs: AllowLogs
) -> None:
    allow_logs(NO_MEMORY_LOGS)
    image, where = support.mkfs(scratch), scratch / "mnt"
    async with served(image, where, front) as session:
        vol, path = volume(session), where / "file"
        await away(lambda: path.write_bytes(CONTENT))
        await away(lambda: subprocess.run(["sync", path], check=True))
        handle = await away(lambda: os.open(path, os.O_RDONLY))
        drop_caches(vol)
        vol.arena.set_policy(parse("inject:nth=1,site=_new_folio"))
        assert await error_of(lambda: os.pread(handle, 4096, 0)) == errno.ENOMEM
        assert await away(lambda: os.pread(handle, 1 << 20, 0)) == CONTENT
        shown = await told(where)
        assert shown["policy"] == "inject:nth=1,site=_new_folio"
        site = "order:0 fs.cache.folio:PageCache._new_folio"
        assert shown["allocation_failures"] == {"reply": {site: 1}}
        assert f"reply: 1 {site}\n" in figures.text(shown)
        assert shown["failed"] == 0, "nothing unexpected"
        await away(lambda: os.close(handle))
        await away(lambda: (where / "other").write_bytes(CONTENT))
    assert session.status == 0
    support.assert_clean(image)


@support.needs_root
@pytest.mark.parametrize("front", FRONTS)
async def test_a_create_without_memory_shuts_down(
    scratch: Path, front: str, allow_logs: AllowLogs
) -> None:
    """The inode is allocated on the image, and no memory comes for it in core."""
    allow_logs(SHUTDOWN_LOGS)
    image, where = support.mkfs(scratch), scratch / "mnt"
    async with served(image, where, front) as session:
        vol = volume(session)
        await away(lambda: (where / "before").write_bytes(CONTENT))
        await away(lambda: subprocess.run(["sync", where / "before"], check=True))
        vol.arena.set_policy(parse("inject:nth=2,site=_new_record"))
        assert await error_of(lambda: (where / "new").mkdir()) == errno.ENOMEM
        assert vol.shut_down
        assert vol.failures.figures().keys() == {"reply", "shutdown"}
        assert await error_of(lambda: os.statvfs(where)) == errno.EIO
        assert await error_of(lambda: (where / "other").mkdir()) == errno.EIO
    assert session.status == 2
    assert not os.path.ismount(where)
    said = "\n".join(allow_logs.seen)
    assert "Internal error xfs_trans_cancel at line " in said
    assert "of file fs/cache/inode.py.  Caller create" in said
    assert "Corruption of in-memory data (0x8) detected" in said
    assert "Shutting down filesystem." in said
    assert "Please unmount the filesystem and rectify the problem(s)" in said
    assert "unexpected" not in said
    check_repairable(image, where)


def check_repairable(image: Path, where: Path) -> None:
    """The kernel replays the log, and what was synced before is there."""
    with support.kernel_mount(image, where):
        assert (where / "before").read_bytes() == CONTENT
    support.assert_clean(image)
    with support.our_mount(image, where, memory="16M"):
        assert (where / "before").read_bytes() == CONTENT
        assert not (where / "new").exists()


@support.needs_root
async def test_the_same_under_irix(scratch: Path) -> None:
    """What failed in the tests above: a read with cold caches, a directory with a new inode."""
    image, where = support.mkfs(scratch), scratch / "mnt"
    async with served(image, where, "policy=irix") as session:
        vol, path = volume(session), where / "file"
        assert vol.arena.policy == IRIX
        await away(lambda: path.write_bytes(CONTENT))
        await away(lambda: subprocess.run(["sync", path], check=True))
        drop_caches(vol)
        assert await away(path.read_bytes) == CONTENT
        assert await error_of(lambda: (where / "new").mkdir()) == 0
        assert (await told(where))["allocation_failures"] == {}
    assert session.status == 0
    support.assert_clean(image)


def use(where: Path) -> list[int]:
    """A little of everything, again and again; the errors that came."""
    errors: list[int] = []
    for number in range(40):
        path = where / f"dir{number % 4}"
        try:
            path.mkdir(exist_ok=True)
            (path / f"file{number}").write_bytes(CONTENT)
            os.setxattr(path, "user.name", CONTENT[: 60 * number])
            assert (path / f"file{number}").read_bytes() == CONTENT
            if number % 3 == 0:
                (path / f"file{number}").unlink()
        except OSError as error:
            errors.append(error.errno or 0)
    return errors


@support.needs_root
@pytest.mark.parametrize("seed", range(4))
async def test_chance(scratch: Path, seed: int, allow_logs: AllowLogs) -> None:
    """Whatever fails, and whoever meets it: requests and the mount end, the image can be mended."""
    allow_logs(SHUTDOWN_LOGS)
    image, where = support.mkfs(scratch), scratch / "mnt"
    async with served(image, where) as session:
        vol = volume(session)
        vol.arena.set_policy(parse(f"inject:p=0.1,seed={seed}"))
        errors = await away(lambda: use(where))
        assert set(errors) <= {errno.ENOMEM, errno.EIO, errno.ENOENT}
        drop_caches(vol)
        await away(lambda: use(where))
        failures = vol.failures.figures()
    assert session.status == (2 if vol.shut_down else 0)
    assert failures
    if vol.shut_down:
        subprocess.run([support.find_tool("xfs_repair"), image], check=True, capture_output=True)
    support.assert_clean(image)


# -- the command line --------------------------------------------------------------------------


@pytest.fixture
def where(scratch: Path) -> Iterator[Path]:
    path = scratch / "mnt"
    path.mkdir()
    yield path
    if os.path.ismount(path):
        support.nofailfs("umount", path)


def test_the_program_says_which(scratch: Path, where: Path) -> None:
    image = support.mkfs(scratch)
    words = ("--memory", "16M", "--log", str(scratch / "log"), "--policy", "linux")
    done = support.nofailfs("mount", *words, image, where)
    assert done.returncode == 0, done.stderr
    record = runfile.of_mountpoint(str(where))
    assert record is not None
    assert "policy=linux" in record.options
    assert "memory   =policy=linux\n" in support.nofailfs("info", where).stdout
    assert json.loads(support.nofailfs("info", "--json", where).stdout)["policy"] == "linux"
    assert "policy linux, allocations failed: none\n" in support.nofailfs("stat", where).stdout
    assert support.nofailfs("umount", where).returncode == 0
    assert "policy" not in support.nofailfs("info", image).stdout


def test_what_needs_no_memory_works_without(scratch: Path, where: Path) -> None:
    """The policy rules from the first request on: mounting is not what it is about."""
    image, log = support.mkfs(scratch), scratch / "log"
    words = ("--memory", "16M", "--log", str(log), "--policy", "inject:p=1,seed=1")
    done = support.nofailfs("mount", *words, "-o", "noatime", image, where)  # nothing is logged
    assert done.returncode == 0, done.stderr
    assert os.listdir(where) == []
    with pytest.raises(OSError, match="Cannot allocate memory"):
        (where / "dir").mkdir()
    assert support.nofailfs("umount", where).returncode == 0
    assert "INFO policy inject:p=1,seed=1, allocations failed: reply " in log.read_text()
    support.assert_clean(image)


def test_what_is_no_policy(scratch: Path, where: Path) -> None:
    image = support.mkfs(scratch)
    done = support.nofailfs("mount", "--policy", "bsd", image, where)
    assert done.returncode == 1
    assert "not one of irix, linux, mayfail, inject:" in done.stderr
