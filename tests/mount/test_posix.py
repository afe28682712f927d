"""Corners of POSIX that a random run seldom meets, one by one, on one mount for all of them."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support
from tools.targets import scratch_dir


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    with scratch_dir() as scratch:
        image = support.mkfs(scratch)
        with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
            yield mount.path
        support.assert_clean(image)


@pytest.fixture
def here(root: Path, request: pytest.FixtureRequest) -> Path:
    path = root / request.node.name.replace("/", "_")[:200]
    path.mkdir()
    return path


def fails(code: int, call, *words) -> None:
    with pytest.raises(OSError) as caught:
        call(*words)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def test_entries_removed_while_reading_are_seen_once(here: Path) -> None:
    names = {f"entry-{number:05d}" for number in range(3000)}
    for name in names:
        (here / name).touch()
    seen = []
    with os.scandir(here) as entries:
        for entry in entries:
            seen.append(entry.name)
            os.unlink(here / entry.name)
    assert len(seen) == len(set(seen))
    assert set(seen) == names
    assert os.listdir(here) == []


def test_appends_of_two_descriptors_do_not_overwrite(here: Path) -> None:
    path = here / "log"
    fds = [os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND) for _ in range(2)]
    for number in range(200):
        os.write(fds[number % 2], b"%04d\n" % number)
    for fd in fds:
        os.close(fd)
    assert path.read_bytes() == b"".join(b"%04d\n" % number for number in range(200))


def test_far_offsets(here: Path) -> None:
    path = here / "sparse"
    with open(path, "w+b", buffering=0) as file:
        for power in (31, 32, 40, 43):
            os.pwrite(file.fileno(), b"%d" % power, 2**power - 1)
        for power in (31, 32, 40, 43):
            assert os.pread(file.fileno(), 4, 2**power - 2) == b"\0%d" % power + b"\0" * (
                1 if power != 43 else 0
            )
        assert os.pread(file.fileno(), 10, 2**39) == bytes(10)
    status = path.stat()
    assert status.st_size == 2**43 + 1
    assert status.st_blocks * 512 < 1 << 20
    os.truncate(path, 2**40)
    assert path.stat().st_size == 2**40
    os.unlink(path)


def _moved(path: Path, act) -> set[str]:
    """Names of the stamps of `path` that `act` changed."""
    os.utime(path, ns=(1, 1), follow_symlinks=False)
    before = path.lstat()
    act()
    after = path.lstat()
    return {
        name
        for name in ("st_mtime_ns", "st_ctime_ns")
        if getattr(before, name) != getattr(after, name)
    }


def test_stamps_move_when_they_must(here: Path) -> None:
    path, both = here / "file", {"st_mtime_ns", "st_ctime_ns"}
    path.write_text("text")
    assert _moved(path, lambda: path.chmod(0o640)) == {"st_ctime_ns"}
    assert _moved(path, lambda: os.link(path, here / "link")) == {"st_ctime_ns"}
    assert _moved(path, lambda: os.unlink(here / "link")) == {"st_ctime_ns"}
    assert _moved(path, lambda: os.truncate(path, 2)) == both
    assert _moved(path, lambda: path.write_text("more")) == both
    assert _moved(path, lambda: os.setxattr(path, "user.a", b"1")) == {"st_ctime_ns"}
    assert _moved(here, lambda: (here / "new").touch()) == both
    assert _moved(here, lambda: os.rename(here / "new", here / "newer")) == both
    assert _moved(here, lambda: os.unlink(here / "newer")) == both
    assert _moved(here, lambda: path.write_text("no entry changes")) == set()


@pytest.mark.parametrize("ns", [0, 1, 999_999_999, 2**31 * 10**9, 10**19, -1, -(2**31) * 10**9])
def test_stamps_of_all_times(here: Path, ns: int) -> None:
    path = here / "file"
    path.touch()
    os.utime(path, ns=(ns, ns))
    status = path.stat()
    assert (status.st_atime_ns, status.st_mtime_ns) == (ns, ns)


@pytest.mark.parametrize(
    ("seconds", "last"), [(1 << 34, 16299260424), (1 << 40, 16299260424), (-(1 << 40), -(1 << 31))]
)
def test_stamps_that_no_inode_can_hold(here: Path, seconds: int, last: int) -> None:
    """They become the first or last that it can, as in the kernel's XFS."""
    path = here / "file"
    path.touch()
    os.utime(path, ns=(seconds * 10**9 + 5,) * 2)
    status = path.stat()
    assert status.st_atime_ns == status.st_mtime_ns == last * 10**9


def test_an_unlinked_file_lives_until_it_is_closed(here: Path) -> None:
    fd = os.open(here / "file", os.O_CREAT | os.O_RDWR)
    os.write(fd, b"x" * (1 << 20))
    os.fsync(fd)
    os.unlink(here / "file")
    fails(errno.ENOENT, os.stat, here / "file")
    assert os.pread(fd, 3, (1 << 20) - 3) == b"xxx"
    assert os.fstat(fd).st_nlink == 0
    os.pwrite(fd, b"still", 0)
    assert os.pread(fd, 6, 0) == b"stillx"
    os.close(fd)


def test_names(here: Path) -> None:
    longest = "n" * 255
    (here / longest).write_text("1")
    assert os.listdir(here) == [longest]
    fails(errno.ENAMETOOLONG, os.mkdir, here / ("n" * 256))
    fails(errno.ENAMETOOLONG, os.symlink, "x" * 1024, here / "symlink")
    os.symlink("x" * 1023, here / "symlink")
    assert os.readlink(here / "symlink") == "x" * 1023
    odd = b"\xff\xfe\n\\ " + "ü€".encode()
    os.mkdir(os.fsencode(here) + b"/" + odd)
    assert odd in os.listdir(os.fsencode(here))


def test_a_directory_inherits_the_group_of_a_setgid_one(here: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root to give a directory to another group")
    os.chown(here, 0, 4711)
    here.chmod(0o2755)
    (here / "dir").mkdir(mode=0o755)
    (here / "file").touch()
    status = (here / "dir").stat()
    assert status.st_gid == (here / "file").stat().st_gid == 4711
    assert status.st_mode & stat.S_ISGID


def test_a_directory_that_moves_takes_its_dotdot_along(here: Path) -> None:
    for name in ("a", "b", "a/child", "a/child/deep"):
        (here / name).mkdir()
    os.rename(here / "a" / "child", here / "b" / "child")
    assert (here / "a").stat().st_nlink == 2
    assert (here / "b").stat().st_nlink == 3
    assert os.stat(here / "b" / "child" / "..").st_ino == (here / "b").stat().st_ino
    fails(errno.EINVAL, os.rename, here / "b", here / "b" / "child" / "inside")
    fails(errno.ENOTEMPTY, os.rmdir, here / "b")


def test_attributes_of_every_size(here: Path) -> None:
    path = here / "file"
    path.touch()
    sizes = [0, 1, 50, 200, 255, 256, 1000, 3000, 4000, 5000, 20_000, 65_536]
    for size in sizes:
        os.setxattr(path, f"user.size{size}", os.urandom(1) * size)
    for size in sizes:
        value = os.getxattr(path, f"user.size{size}")
        assert len(value) == size
        assert len(set(value)) <= 1
    assert sorted(os.listxattr(path)) == sorted(f"user.size{size}" for size in sizes)
    fails(errno.E2BIG, os.setxattr, path, "user.large", b"x" * 65_537)
    fails(errno.ENODATA, os.getxattr, path, "user.none")
    for size in sizes:
        os.setxattr(path, f"user.size{size}", b"small", os.XATTR_REPLACE)
    for size in sizes:
        os.removexattr(path, f"user.size{size}")
    assert os.listxattr(path) == []


@support.needs_root
def test_attribute_namespaces(here: Path) -> None:
    path = here / "file"
    path.touch()
    os.symlink("nowhere", here / "link")
    for name in ("user.same", "trusted.same", "security.same"):
        os.setxattr(path, name, name.encode())
    for name in ("user.same", "trusted.same", "security.same"):
        assert os.getxattr(path, name) == name.encode()
    os.setxattr(here / "link", "trusted.x", b"1", follow_symlinks=False)
    assert os.getxattr(here / "link", "trusted.x", follow_symlinks=False) == b"1"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("user.a", errno.ENODATA),
        ("user.", errno.EINVAL),
        ("user", errno.EOPNOTSUPP),
        ("other.a", errno.EOPNOTSUPP),
        ("system.a", errno.EOPNOTSUPP),
    ],
)
def test_names_that_no_attribute_has(here: Path, name: str, error: int) -> None:
    path = here / "file"
    path.touch()
    for _ in range(2):
        fails(error, os.getxattr, path, name)
        os.setxattr(path, "user.b", b"")


def test_hard_links(here: Path) -> None:
    path = here / "0"
    path.write_text("one file")
    for number in range(1, 300):
        os.link(path, here / str(number))
    assert path.stat().st_nlink == 300
    assert (here / "299").read_text() == "one file"
    os.unlink(path)
    (here / "150").write_text("changed")
    assert (here / "7").read_text() == "changed"
    fails(errno.EPERM, os.link, here, here / "self")


def test_deep_directories(here: Path) -> None:
    fd = os.open(here, os.O_RDONLY)
    for _ in range(200):
        os.mkdir("deeper", dir_fd=fd)
        inner = os.open("deeper", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.fsync(fd)
    os.close(fd)


def test_statvfs_counts(here: Path) -> None:
    before = os.statvfs(here)
    with open(here / "file", "wb") as file:
        file.write(b"x" * (10 << 20))
        file.flush()
        promised = os.statvfs(here)
        assert before.f_bfree - promised.f_bfree >= (10 << 20) // before.f_frsize
        os.fsync(file.fileno())
    written = os.statvfs(here)
    assert before.f_bfree - written.f_bfree >= (10 << 20) // before.f_frsize
    assert (here / "file").stat().st_blocks * 512 >= 10 << 20
    assert written.f_namemax == 255


def test_truncate_exposes_no_old_bytes(here: Path) -> None:
    path = here / "file"
    path.write_bytes(b"secret" * 2000)
    os.truncate(path, 5)
    os.truncate(path, 12_000)
    assert path.read_bytes() == b"secre" + bytes(11_995)
    os.truncate(path, 6001)
    with open(path, "r+b") as file:
        file.seek(9000)
        file.write(b"end")
    assert path.read_bytes() == b"secre" + bytes(8995) + b"end"
