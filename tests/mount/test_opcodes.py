"""Requests that pyfuse3 does not have, on a real mount: what programs see is what XFS shows them.

Most checks are functions of a directory that return what they observed; each runs on our mount and
on the kernel's XFS, and both must have observed the same. Afterwards the judges look at the image,
and the kernel finds the same files in it.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from fs import ioctl
from tests import kernel_tree, support
from tests.conftest import AllowLogs
from tests.mount.test_handlers import away, error_of, served

pytestmark = [pytest.mark.mount, support.needs_root, support.needs_fuse]

LANES = "lanes=2"  # pyfuse3 alone has no such requests
KIB = 1024
PUNCH, ZERO, KEEP = 3, 16, 1
SYS_RENAMEAT2, SYS_STATX, AT_FDCWD = 316, 332, -100  # x86-64
NOBODY = 65534
libc = ctypes.CDLL(None, use_errno=True)


def errno_of(call: Callable[[], object]) -> int:
    """The errno that a call fails with, 0 if it works."""
    try:
        call()
    except OSError as error:
        return error.errno or 0
    return 0


def system(call: int) -> int:
    """A C library call's result; raises OSError."""
    if call < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return call


def fallocate(path: Path, mode: int, offset: int, length: int) -> int:
    """The errno of fallocate(2)."""
    libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def call() -> None:
        with path.open("r+b") as out:
            system(libc.fallocate(out.fileno(), mode, offset, length))

    return errno_of(call)


def renameat2(old: Path, new: Path, flags: int) -> int:
    """The errno of renameat2(2)."""
    args = (AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags)
    return errno_of(lambda: system(libc.syscall(SYS_RENAMEAT2, *args)))


def segments(path: Path) -> list[tuple[int, int]]:
    """Where a file has data, by SEEK_DATA and SEEK_HOLE."""
    found, at = [], 0
    fd = os.open(path, os.O_RDONLY)
    try:
        while True:
            try:
                start = os.lseek(fd, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                return found
            at = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, at))
    finally:
        os.close(fd)


def as_nobody(call: Callable[[], object]) -> int:
    """The errno of a call made by an ordinary user, in a child."""
    pid = os.fork()
    if not pid:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os._exit(errno_of(call))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# -- what is observed ---------------------------------------------------------------------------


def punch_and_zero(where: Path) -> object:
    path, seen = where / "punched", []
    path.write_bytes(bytes(range(256)) * 4096)
    for mode, offset, length in (
        *((PUNCH, 64 * KIB, 64 * KIB), (PUNCH, 200 * KIB + 5, 100 * KIB + 1)),
        *((ZERO, 400 * KIB, 32 * KIB), (ZERO | KEEP, 1000 * KIB, 100 * KIB)),
        *((ZERO, 1020 * KIB, 100 * KIB), (0, 1100 * KIB, 200 * KIB), (KEEP, 0, 4096 * KIB)),
        *((2, 0, 4096), (PUNCH, 0, 0)),
    ):
        seen.append((fallocate(path, mode, offset, length), path.stat().st_size))
    with path.open("rb") as out:  # XFS takes cached pages of unwritten extents for data
        os.fsync(out.fileno())
        os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return seen, segments(path), path.read_bytes()


def posix_fallocate(where: Path) -> object:
    path = where / "allocated"
    with path.open("wb") as out:
        os.posix_fallocate(out.fileno(), 0, 3 << 20)
    return path.stat().st_size, path.stat().st_blocks >= 6144, any(path.read_bytes())


def seek(where: Path) -> object:
    path = where / "sought"
    with path.open("wb") as out:
        for at in (0, 128 * KIB, 512 * KIB):
            os.pwrite(out.fileno(), b"d" * 4096, at)
        os.truncate(path, 1 << 20)
        before = segments(path)
        os.fsync(out.fileno())
    fd = os.open(path, os.O_RDONLY)
    ends = [errno_of(lambda at=at: os.lseek(fd, at, os.SEEK_HOLE)) for at in (1 << 20, 1 << 21)]
    os.close(fd)
    return before, segments(path), ends


def copy_range(where: Path) -> object:
    source, target = where / "source", where / "target"
    source.write_bytes(bytes(range(251)) * 4000)
    with source.open("r+b") as inp, target.open("w+b") as out:
        ends = []
        for n, at, to in ((256 * KIB, 0, 0), (100, 7, 1 << 20), (1 << 40, 512 * KIB, 256 * KIB)):
            end = at + n
            while done := os.copy_file_range(inp.fileno(), out.fileno(), end - at, at, to):
                at, to = at + done, to + done  # fewer bytes than asked for are no mistake
            ends.append(at)
        same = errno_of(lambda: os.copy_file_range(inp.fileno(), inp.fileno(), 9, 0, 4))
    with target.open("r+b") as out:
        out.write(b"own")  # shared blocks are copied before they are written
    return ends, same, source.read_bytes(), target.read_bytes()


def give_a_name(fd: int, path: Path) -> None:
    """linkat(2) of an open file."""
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def temporary(where: Path) -> object:
    fd = os.open(where, os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"temporary")
    before = os.fstat(fd)
    give_a_name(fd, where / "linked")
    after = os.fstat(fd)
    os.close(fd)
    never = os.open(where, os.O_TMPFILE | os.O_WRONLY | os.O_EXCL, 0o600)
    refused = errno_of(lambda: give_a_name(never, where / "never"))
    os.close(never)
    text = (where / "linked").read_bytes()
    return before.st_nlink, oct(before.st_mode), after.st_nlink, refused, text


def rename_flags(where: Path) -> object:
    base = where / "names"
    base.mkdir()
    for name in ("a", "b", "c"):
        (base / name).write_text(name)
    (base / "d").mkdir()
    codes = [
        renameat2(base / old, base / new, flags)
        for old, new, flags in (
            *(("a", "b", 1), ("a", "e", 1), ("e", "d", 2), ("b", "absent", 2), ("b", "w", 4)),
            *(("c", "d/c", 5), ("w", "c", 6), ("w", "c", 3), ("w", "x", 8)),
        )
    ]
    rows = []
    for path in sorted(base.rglob("*")):
        s = path.lstat()
        rows.append((str(path.relative_to(base)), stat.S_IFMT(s.st_mode), s.st_rdev, s.st_uid))
    return codes, rows


def attribute_flags(where: Path) -> object:
    path, below = where / "flagged", where / "flagged.d"
    path.write_text("old")
    below.mkdir()
    seen: list[object] = []
    for word, target in (("+i", path), ("-i", path), ("+aA", path), ("-a", path), ("+dS", below)):
        done = subprocess.run(["chattr", word, target], capture_output=True, text=True)
        shown = subprocess.run(["lsattr", "-d", target], capture_output=True, text=True).stdout
        seen.append((word, done.returncode, shown.split()[:1]))
        if target is path:
            codes = [errno_of(lambda how=how: path.open(how).close()) for how in ("r+", "a", "w")]
            codes += [errno_of(lambda: os.chmod(path, 0o600)), errno_of(lambda: path.touch())]
            codes += [errno_of(lambda: os.truncate(path, 1)), fallocate(path, PUNCH, 0, 4096)]
            codes += [errno_of(lambda: os.setxattr(path, "user.x", b"1"))]
            codes += [errno_of(lambda: os.rename(path, where / "other"))]
            if (where / "other").exists():
                os.rename(where / "other", path)
            seen.append(codes)
    subprocess.run(["chattr", "-dS", below], check=True)
    return seen


def directory_flags(where: Path) -> object:
    base, seen = where / "fixed.d", []
    base.mkdir()
    for name in ("x", "y", "i", "a"):
        (base / name).touch()
    for word in ("+i", "+a"):
        subprocess.run(["chattr", word, base / word[1]], check=True)
        seen.append([errno_of((base / word[1]).unlink), errno_of(partial(renamed, base, word[1]))])
        subprocess.run(["chattr", f"-{word[1]}", base / word[1]], check=True)
    for word in ("+i", "+a"):
        subprocess.run(["chattr", word, base], check=True)
        calls = ((base / f"new{word}").touch, (base / f"d{word}").mkdir, (base / "x").unlink)
        seen.append([*map(errno_of, calls), errno_of(partial(renamed, base, "y"))])
        subprocess.run(["chattr", f"-{word[1]}", base], check=True)
    return seen, sorted(os.listdir(base))


def renamed(base: Path, name: str) -> None:
    os.rename(base / name, base / "moved")
    os.rename(base / "moved", base / name)


def project_and_hints(where: Path) -> object:
    path = where / "hinted"
    path.touch()
    fd = os.open(path, os.O_RDWR)
    seen: list[object] = []
    for words in ((0x800, 65536, 0, 7, 0), (0x800, 65537, 0, 7, 0), (0x1000, 65536, 0, 0, 0)):
        argument = ioctl.FSXATTR.pack(*words)
        seen.append(errno_of(lambda data=argument: fcntl.ioctl(fd, ioctl.FSSETXATTR, data)))
        out = array.array("B", bytes(28))
        fcntl.ioctl(fd, ioctl.FSGETXATTR, out)
        xflags, *rest = ioctl.FSXATTR.unpack(out.tobytes())
        seen.append((xflags & 0x7FFFFFFF, rest))
    seen.append(errno_of(lambda: fcntl.ioctl(fd, 0x5401, bytes(64))))
    os.close(fd)
    return seen


def locks(where: Path) -> object:
    path = where / "locked"
    path.write_bytes(bytes(100))
    with path.open("r+b") as one:
        fcntl.flock(one, fcntl.LOCK_EX)
        with path.open("r+b") as two:
            busy = errno_of(lambda: fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB))
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.lockf(one, fcntl.LOCK_EX, 10, 20)

        def other(start: int) -> int:
            with path.open("r+b") as two:
                how = fcntl.LOCK_EX | fcntl.LOCK_NB
                return as_nobody(lambda: fcntl.lockf(two, how, 10, start))

        return busy, other(20), other(40)


def shared_mapping(where: Path) -> object:
    path = where / "mapped"
    path.write_bytes(bytes(300 * KIB))
    with path.open("r+b") as out, mmap.mmap(out.fileno(), 0) as view:
        view[100 * KIB : 100 * KIB + 5] = b"hello"
        view.flush()
        through_read = os.pread(out.fileno(), 5, 100 * KIB)
        os.pwrite(out.fileno(), b"world", 200 * KIB)
        through_map = bytes(view[200 * KIB : 200 * KIB + 5])
    return through_read, through_map, path.read_bytes().count(b"hello")


def set_id_bits(where: Path) -> object:
    seen = []
    path = where / "set-id"
    for change in (
        lambda: os.chown(path, 1, 1),
        lambda: os.truncate(path, 10),
        lambda: path.open("w").close(),
        lambda: path.open("ab").write(b"x"),
    ):
        path.write_bytes(b"text")
        os.chown(path, NOBODY, NOBODY)
        os.chmod(path, 0o6777)
        os.chmod(where, 0o777)
        code = as_nobody(change) if seen else errno_of(change)
        seen.append((code, oct(path.stat().st_mode)))
    assert not any(code for code, _ in seen)
    return seen


CHECKS = (
    punch_and_zero, posix_fallocate, seek, copy_range, temporary, rename_flags, attribute_flags,
    directory_flags, project_and_hints, locks, shared_mapping, set_id_bits,
)  # fmt: skip


@pytest.mark.parametrize("mkfs_args", [(), ("-m", "reflink=0", "-b", "size=1k")], ids=["4k", "1k"])
def test_programs_see_what_xfs_shows_them(scratch: Path, mkfs_args: tuple[str, ...]) -> None:
    ours = support.mkfs(scratch, *mkfs_args, name="ours")
    theirs = support.mkfs(scratch, *mkfs_args, name="theirs")
    scratch.chmod(0o755)  # ordinary users take part
    with support.our_mount(ours, scratch / "mnt", options=f"{LANES},allow_other") as mounted:
        observed = {check.__name__: check(mounted.path) for check in CHECKS}
        left = kernel_tree.snapshot(mounted.path)
    with support.kernel_mount(theirs, scratch / "kernel") as there:
        wrong = [check.__name__ for check in CHECKS if observed[check.__name__] != check(there)]
        assert not wrong
    support.assert_clean(ours)
    with support.kernel_mount(ours, scratch / "kernel") as there:
        assert kernel_tree.diff(left, kernel_tree.snapshot(there)) == []


def statx_btime(path: Path) -> tuple[int, int, int]:
    """(mask, seconds, nanoseconds) of the birth time."""
    out = ctypes.create_string_buffer(256)
    system(libc.syscall(SYS_STATX, AT_FDCWD, os.fsencode(path), 0, 0x800, out))
    mask = struct.unpack_from("=I", out, 0)[0]
    seconds, rest = struct.unpack_from("=qI", out, 0x50)
    return mask & 0x800, seconds, rest


def test_birth_times_are_those_in_the_image(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", options=LANES) as mounted:
        (mounted.path / "file").write_text("text")
        (mounted.path / "dir").mkdir()
        born = {name: statx_btime(mounted.path / name) for name in ("file", "dir", ".")}
        assert all(mask for mask, _, _ in born.values())
    with support.kernel_mount(image, scratch / "kernel") as there:
        assert {name: statx_btime(there / name) for name in born} == born


def test_trim_gives_space_back_to_the_host(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", options=LANES) as mounted:
        big = mounted.path / "big"
        free = os.statvfs(mounted.path).f_bfree
        with big.open("wb") as writer:
            writer.write(os.urandom(16 << 20))
            os.fsync(writer.fileno())  # Linux tells a FUSE server nothing of sync(2)
        before = image.stat().st_blocks
        big.unlink()
        support.wait_until(
            lambda: free - os.statvfs(mounted.path).f_bfree < (1 << 20) // 4096,
            "the blocks of an unlinked file are not free",
        )
        done = subprocess.run(["fstrim", "-v", mounted.path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "trimmed" in done.stdout
        assert before - image.stat().st_blocks > (12 << 20) // 512
    support.assert_clean(image)


def test_the_label_can_be_changed(scratch: Path) -> None:
    image = support.mkfs(scratch, "-L", "before")
    with support.our_mount(image, scratch / "mnt", options=LANES) as mounted:
        fd = os.open(mounted.path, os.O_RDONLY)
        label = array.array("B", bytes(256))
        fcntl.ioctl(fd, ioctl.GETFSLABEL, label)
        assert label.tobytes().rstrip(b"\0") == b"before"
        fcntl.ioctl(fd, ioctl.SETFSLABEL, array.array("B", b"after".ljust(256, b"\0")))
        os.close(fd)
    words = ["xfs_db", "-r", "-c", "label", image]
    assert b"after" in subprocess.run(words, capture_output=True, check=True).stdout
    support.assert_clean(image)


def test_statistics_are_an_attribute_of_the_root(scratch: Path) -> None:
    with support.our_mount(support.mkfs(scratch), scratch / "mnt", options=LANES) as mounted:
        assert os.getxattr(mounted.path, "user.nofailfs.stat")
        assert os.listxattr(mounted.path) == []
        (mounted.path / "file").touch()
        with pytest.raises(OSError, match="No data"):
            os.getxattr(mounted.path / "file", "user.nofailfs.stat")


def test_lanes_and_pyfuse3_show_the_same_files(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.kernel_mount(image, scratch / "kernel", "loop,noatime") as there:
        kernel_tree.make_tree(there, 7)
    seen = []
    for lanes in ("lanes=0", "lanes=2"):
        with support.our_mount(image, scratch / "mnt", options=f"{lanes},noatime") as mounted:
            kernel_tree.snapshot(mounted.path)  # now names and inodes are cached here
            Path("/proc/sys/vm/drop_caches").write_text("2")
            seen.append(kernel_tree.snapshot(mounted.path, exact=True))
    assert kernel_tree.diff(*seen) == []


async def test_a_shutdown_by_ioctl(scratch: Path, allow_logs: AllowLogs) -> None:
    for pattern in ("User initiated shutdown", "unmounted after a shutdown"):
        allow_logs(pattern)
    image, where = support.mkfs(scratch), scratch / "mnt"
    word = struct.pack("=I", ioctl.GOING_DEFAULT)

    def go_down(uid: int) -> int:
        fd = os.open(where, os.O_RDONLY)
        try:
            call = lambda: fcntl.ioctl(fd, ioctl.GOINGDOWN, word)  # noqa: E731
            return as_nobody(call) if uid else errno_of(call)
        finally:
            os.close(fd)

    async with served(image, where, f"{LANES},allow_other") as session:
        await away(lambda: (where / "file").write_bytes(b"kept"))
        assert await away(lambda: go_down(NOBODY)) == errno.EPERM
        assert await away(lambda: go_down(0)) == 0
        for client in (
            lambda: (where / "file").read_bytes(),
            lambda: (where / "other").touch(),
            lambda: os.statvfs(where),
        ):
            assert await error_of(client) == errno.EIO
    assert session.status == 2
    assert "user-initiated" in session.message
    with support.kernel_mount(image, scratch / "kernel") as there:
        assert (there / "file").read_bytes() == b"kept"
