"""A load on a kernel-mounted XFS that is cut off in the middle: what is left is a dirty log.

Several threads do everything that a log has items for, on trees of their own and on one they
share: names, sizes, holes, attributes, shared extents, files that lose their last name while they
are open. Another one syncs now and then, so that checkpoints end in the midst of things. All from
a seed, but for the order in which threads come to their turn.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests import kernel_tree

GOINGDOWN = 0x8004587D  # XFS_IOC_GOINGDOWN
LOGFLUSH, NOLOGFLUSH = 1, 2
FICLONERANGE = 0x4020940D
BLOCK = 4096
_libc = ctypes.CDLL(None, use_errno=True)
NAMES = 60  # in each directory: few enough that they meet


class Worker:
    """One thread's operations, below `root`; errors of the system mean nothing here."""

    def __init__(self, root: Path, shared: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.roots = (root, root, root, shared)
        self.open: list[int] = []

    def path(self) -> Path:
        """A name in one of a few directories."""
        found = self.rng.choice(self.roots)
        for _ in range(self.rng.randrange(3)):
            found /= f"d{self.rng.randrange(4)}"
        stem = f"{self.rng.randrange(NAMES)}"
        return found / (stem if self.rng.random() < 0.8 else stem * 40)

    def file(self) -> int:
        fd = os.open(self.path(), os.O_RDWR | os.O_CREAT, 0o644)
        self.open.append(fd)
        while len(self.open) > 20:
            os.close(self.open.pop(self.rng.randrange(len(self.open))))
        return fd

    def range(self) -> tuple[int, int]:
        place = self.rng.randrange(200) * BLOCK
        return place, self.rng.choice((1, 2, 5, 60)) * BLOCK

    def do_create(self) -> None:
        self.file()

    def do_write(self) -> None:
        at, size = self.range()
        os.pwrite(self.file(), self.rng.randbytes(size - self.rng.randrange(BLOCK)), at)

    def do_sparse(self) -> None:
        fd = self.file()
        for at in range(0, self.rng.randrange(2, 80) * BLOCK, 2 * BLOCK):
            os.pwrite(fd, b"sparse", at)
        os.fsync(fd)

    def do_truncate(self) -> None:
        os.truncate(self.path(), self.rng.randrange(300) * 1000)

    def do_fallocate(self) -> None:
        at, size = self.range()
        for mode in self.rng.sample((0, 1, 3, 8, 16, 32), 2):
            kernel_tree.fallocate(self.file(), mode, at, size)

    def do_clone(self) -> None:
        at, size = self.range()
        request = struct.pack("=qQQQ", self.file(), at, size, self.rng.randrange(50) * BLOCK)
        fcntl.ioctl(self.file(), FICLONERANGE, request)

    def do_mkdir(self) -> None:
        path = self.path()
        os.makedirs(path.parent, exist_ok=True)
        os.mkdir(path.parent / f"d{self.rng.randrange(4)}")

    def do_names(self) -> None:
        path = self.path()
        for i in range(self.rng.randrange(150)):
            (path.parent / f"{path.name[:4]}-{i}-{'n' * self.rng.randrange(60)}").touch()

    def do_unlink(self) -> None:
        path = self.path()
        if self.rng.random() < 0.2:
            for name in os.listdir(path.parent)[: self.rng.randrange(200)]:
                os.unlink(path.parent / name)
        os.unlink(path)

    def do_rmdir(self) -> None:
        os.rmdir(self.path().parent)

    def do_rename(self) -> None:
        os.rename(self.path(), self.path())

    def do_link(self) -> None:
        os.link(self.path(), self.path())

    def do_symlink(self) -> None:
        os.symlink("t" * self.rng.choice((5, 90, 600, 1000)), self.path())

    def do_special(self) -> None:
        os.mknod(self.path(), 0o020600, os.makedev(3, self.rng.randrange(250)))

    def do_attr(self) -> None:
        name = f"user.{self.rng.randrange(20)}"
        os.setxattr(self.path(), name, self.rng.randbytes(self.rng.choice((3, 100, 900, 6000))))

    def do_drop_attr(self) -> None:
        path = self.path()
        os.removexattr(path, self.rng.choice(os.listxattr(path)))

    def do_mode(self) -> None:
        os.chmod(self.path(), self.rng.randrange(0o1000))
        os.utime(self.path(), ns=(self.rng.randrange(10**18), self.rng.randrange(10**18)))

    def do_tmpfile(self) -> None:
        fd = os.open(self.path().parent, os.O_TMPFILE | os.O_RDWR)
        self.open.append(fd)
        os.pwrite(fd, b"no name", self.range()[0])

    def do_fsync(self) -> None:
        os.fsync(self.file())

    def chain(self) -> None:
        """Files in many pieces that are shared, copied on write and cut: long chains of intents."""
        one, two = self.file(), self.file()
        size = self.rng.choice((20, 100, 300)) * 2 * BLOCK
        for at in range(0, size, 2 * BLOCK):
            os.pwrite(one, b"piece", at)
        os.fsync(one)
        os.ftruncate(two, 0)
        fcntl.ioctl(two, FICLONERANGE, struct.pack("=qQQQ", one, 0, size, 0))
        for at in range(0, size, 4 * BLOCK):
            os.pwrite(two, b"copy", at)
        os.fsync(two)
        for fd in (one, two):
            kernel_tree.fallocate(fd, 3, 5 * BLOCK, size)
            os.ftruncate(fd, self.rng.randrange(5) * BLOCK)

    def run(self, until: Callable[[], bool], *, chains: bool) -> None:
        """Until somebody says so."""
        jobs = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("do_")]
        jobs = [self.chain] if chains else jobs
        while not until():
            try:
                self.rng.choice(jobs)()
            except (OSError, IndexError):
                continue
        for fd in self.open:
            os.close(fd)


def go_round(mnt: Path) -> None:
    """Change metadata until the log, which is small, begins again at its start."""
    number = os.stat(mnt).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name
    log_head = Path("/sys/fs/xfs") / device / "log/log_head_lsn"
    fd, n = os.open(mnt, os.O_RDONLY), 0
    try:
        while log_head.read_text().startswith("1:"):
            for _ in range(500):
                (mnt / f"{n}{'n' * 200}").touch()
                n += 1
            _libc.syncfs(fd)
    finally:
        os.close(fd)
    for old in range(0, n, 2):
        (mnt / f"{old}{'n' * 200}").unlink()


def cut_off(mnt: Path, seed: int, seconds: float, *, chains: bool = False) -> None:
    """Work on a mount for a while, then shut it down: with its log flushed, or not.

    With `chains` most of the work is intents, and checkpoints end all the time.
    """
    rng = random.Random(seed)
    stop = threading.Event()
    (mnt / "shared").mkdir(exist_ok=True)
    workers = []
    for n in range(3):
        (mnt / f"w{n}").mkdir(exist_ok=True)
        worker = Worker(mnt / f"w{n}", mnt / "shared", rng.randrange(1 << 30))
        run = partial(worker.run, stop.is_set, chains=chains)
        workers.append(threading.Thread(target=run))
    fd = os.open(mnt, os.O_RDONLY)
    try:
        for thread in workers:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(rng.uniform(0, 0.001 if chains else seconds / 4))
            _libc.syncfs(fd)
        how = NOLOGFLUSH if chains else rng.choice((LOGFLUSH, NOLOGFLUSH))
        fcntl.ioctl(fd, GOINGDOWN, struct.pack("=I", how))
    finally:
        stop.set()
        for thread in workers:
            thread.join()
        os.close(fd)
