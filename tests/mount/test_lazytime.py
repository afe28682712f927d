"""lazytime through a mount: what lanes do with files whose stamps wait, and that none is lost."""

from __future__ import annotations

import os
from pathlib import Path

from tests import support
from tools.targets import OurMount


def figure(mounted: OurMount, name: str) -> int:
    """A figure of .nofail/writeback."""
    lines = (mounted.path / ".nofail/writeback").read_text().splitlines()
    return int(dict(line.split(":") for line in lines)[name].split()[0])


def test_reads_and_writes_of_files_whose_stamps_wait(scratch: Path) -> None:
    """Reads move the access time in memory, a write has its data written as soon as ever."""
    image = support.mkfs(scratch)
    where = scratch / "mnt"
    with support.our_mount(image, where, options="lazytime,strictatime,lanes=2") as mounted:
        for period in ("writeback", "expire"):
            (where / f".nofail/sys/vm/dirty_{period}_centisecs").write_text("1")
        path = mounted.path / "file"
        path.write_bytes(b"a" * 9000)
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)  # the stamps so far are in a transaction
        seen = os.fstat(fd).st_atime_ns
        assert os.pread(fd, 4096, 0) == b"a" * 4096
        support.wait_until(lambda: figure(mounted, "b_dirty_time") == 1, "stamps do not wait")
        for _ in range(100):
            assert os.pread(fd, 4096, 0) == b"a" * 4096
            before, seen = seen, os.fstat(fd).st_atime_ns
            assert seen > before
        assert figure(mounted, "b_dirty_time") == 1
        os.pwrite(fd, b"b" * 4096, 0)
        assert figure(mounted, "BdiDirtied") > 12
        support.wait_until(
            lambda: figure(mounted, "BdiReclaimable") + figure(mounted, "BdiWriteback") == 0,
            "the data waits as long as stamps do",
        )
        stamps = os.fstat(fd)
        os.close(fd)
    support.assert_clean(image)
    with support.our_mount(image, where, options="noatime") as mounted:
        after = os.stat(mounted.path / "file")
        assert (after.st_atime_ns, after.st_mtime_ns) == (stamps.st_atime_ns, stamps.st_mtime_ns)
        assert (mounted.path / "file").read_bytes() == b"b" * 4096 + b"a" * 4904
