"""The kernel's caches over ours: whatever the mode, every view of a file agrees at once."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fs.front.options import CACHE_MODES
from tests import support
from tools.targets import scratch_dir

OLD_NS = 10**18


@pytest.fixture(scope="module", params=CACHE_MODES)
def mounted(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    """One mount for each cache mode; its name and its directory."""
    with scratch_dir() as scratch:
        image = support.mkfs(scratch)
        scratch.chmod(0o755)
        options = "allow_other" if os.geteuid() == 0 else ""
        with support.our_mount(image, scratch / "mnt", "16M", request.param, options) as mount:
            yield request.param, mount.path
        support.assert_clean(image)
        with support.our_mount(image, scratch / "mnt", "16M", "none", "ro") as mount:
            assert (mount.path / "kept").read_bytes() == bytes(range(256)) * 4096


def test_every_view_agrees(mounted: tuple[str, Path]) -> None:
    """A write through one descriptor shows in stat, fstat and reads through another."""
    path = mounted[1] / "file"
    writer = os.open(path, os.O_CREAT | os.O_RDWR)
    reader = os.open(path, os.O_RDONLY)
    for size in (1, 4096, 100_000, 100_001):
        os.utime(path, ns=(OLD_NS, OLD_NS))
        os.pwrite(writer, b"x", size - 1)
        assert path.stat().st_size == os.fstat(reader).st_size == size
        assert path.stat().st_mtime_ns > OLD_NS
        assert os.pread(reader, 2, size - 1) == b"x"
    os.ftruncate(writer, 10)
    assert path.stat().st_size == os.fstat(reader).st_size == 10
    assert os.pread(reader, 100, 0) == b"x" + bytes(9)
    os.close(writer)
    os.close(reader)


def test_links_and_directories_agree(mounted: tuple[str, Path]) -> None:
    """Link counts and stamps that another request changed are not served from a cache."""
    here = mounted[1] / "links"
    here.mkdir()
    (here / "a").write_text("a")
    os.link(here / "a", here / "b")
    assert (here / "a").stat().st_nlink == 2
    os.unlink(here / "b")
    assert (here / "a").stat().st_nlink == 1
    (here / "c").write_text("c")
    fd = os.open(here / "a", os.O_RDONLY)
    os.rename(here / "c", here / "a")
    assert os.fstat(fd).st_nlink == 0
    os.close(fd)
    (here / "sub").mkdir()
    assert here.stat().st_nlink == 3
    (here / "sub").rmdir()
    assert here.stat().st_nlink == 2
    assert not (here / "sub").exists(), "a name that is gone may be cached as gone"
    (here / "sub").touch()
    assert (here / "sub").exists()


def test_appends_and_truncating_opens(mounted: tuple[str, Path]) -> None:
    path = mounted[1] / "log"
    for _ in range(3):
        with open(path, "ab") as file:
            file.write(b"line\n")
    assert path.read_bytes() == b"line\n" * 3
    with open(path, "wb"):
        assert path.stat().st_size == 0
    assert path.read_bytes() == b""


def test_synchronous_writes_are_on_the_image(mounted: tuple[str, Path]) -> None:
    """O_SYNC and O_DSYNC: after the write another reader of the image finds the bytes."""
    here = mounted[1]
    image = here.parent / "image"
    for flag, word in ((os.O_SYNC, b"full sync"), (os.O_DSYNC, b"data sync")):
        text = os.urandom(16).hex().encode() + word
        fd = os.open(here / word.decode(), os.O_CREAT | os.O_WRONLY | flag)
        os.write(fd, text)
        assert text in image.read_bytes()
        os.close(fd)


def test_shared_mappings(mounted: tuple[str, Path]) -> None:
    mode, here = mounted
    path = here / "mapped"
    path.write_bytes(bytes(8192))
    with open(path, "r+b") as file:
        if mode == "none" and os.environ.get("NOFAILFS_LANES") == "0":
            with pytest.raises(OSError, match="No such device"):
                mmap.mmap(file.fileno(), 8192)
            return
        with mmap.mmap(file.fileno(), 8192) as shared:
            shared[4000:4200] = b"m" * 200
            shared.flush()
        assert path.read_bytes()[3999:4201] == b"\0" + b"m" * 200 + b"\0"


def test_contents_survive_dropped_caches(mounted: tuple[str, Path]) -> None:
    path = mounted[1] / "kept"
    path.write_bytes(bytes(range(256)) * 4096)
    os.sync()
    if os.geteuid() == 0:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    assert path.read_bytes() == bytes(range(256)) * 4096


def test_the_set_user_id_bit_goes_when_others_write(mounted: tuple[str, Path]) -> None:
    if os.geteuid():
        pytest.skip("needs root to become somebody else")
    path = mounted[1] / "program"
    path.write_bytes(b"#!")
    path.chmod(0o6777)
    os.chown(path, 1, 1)
    assert path.stat().st_mode & 0o7777 == 0o777, "a change of owner takes it"
    path.chmod(0o6777)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setresuid(1000, 1000, 1000)
            status = 1 - os.write(os.open(path, os.O_WRONLY), b"!")
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    assert path.stat().st_mode & 0o7777 == 0o777
    path.chmod(0o6777)
    path.write_bytes(b"##")
    assert path.stat().st_mode & 0o7777 == 0o6777, "root keeps it"
