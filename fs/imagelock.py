"""One writer an image: a lock that lives as long as the daemon's last write.

A lock of flock(2) on a descriptor of its own: exclusive for a writable mount, shared for
read-only ones. The kernel drops it when the process ends in whatever way, so there are no stale
lock files. `umount` returns before the daemon has written everything; whoever opens the image
next therefore *waits* for this lock when the old mount is already gone, and is refused, with the
name of the holder, when it still stands.

Waiting is bounded by the `lock_timeout` option. Must stay importable without numba.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path

from fs import mounts, runfile
from fs.errors import UserError

POLL_SECONDS = 0.05
BLOCK_DEVICE = 0o060000


class ImageLock:
    """The lock of one image, held from `acquire` to `release` or to the end of the process."""

    def __init__(self, path: str, *, shared: bool) -> None:
        self.path = path
        self.shared = shared
        self.key = runfile.image_key(path)
        self._fd = -1

    def try_acquire(self) -> bool:
        """Take the lock if nobody holds it."""
        if self._fd < 0:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        kind = fcntl.LOCK_SH if self.shared else fcntl.LOCK_EX
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def acquire(self, timeout: float, tell: Callable[[str], None] | None = None) -> None:
        """Take the lock, waiting up to `timeout` seconds for a daemon that is finishing.

        Raises UserError naming the holder if it still has a mount, or does not finish in time.
        """
        deadline = time.monotonic() + timeout
        told = False
        while not self.try_acquire():
            holder = runfile.of_image(self.key)
            if self._is_mounted(holder):
                assert holder is not None
                raise UserError(self._refusal(holder), mounts.MOUNT_FAILED)
            if time.monotonic() >= deadline:
                raise UserError(self._timed_out(holder, timeout), mounts.MOUNT_FAILED)
            if tell is not None and not told:
                tell(f"waiting for {self._name(holder)} to finish writing {self.path}")
                told = True
            time.sleep(POLL_SECONDS)

    def _is_mounted(self, holder: runfile.Record | None) -> bool:
        if holder is None or not holder.is_alive() or holder.state != runfile.MOUNTED:
            return False
        mounted = mounts.find(holder.mountpoint)
        return mounted is not None and mounted.is_fuse

    def _name(self, holder: runfile.Record | None) -> str:
        return f"process {holder.pid}" if holder and holder.is_alive() else "another process"

    def _refusal(self, holder: runfile.Record) -> str:
        return (
            f"{self.path} is mounted on {holder.mountpoint} by process {holder.pid}; unmount it "
            f"first with: nofailfs umount {holder.mountpoint}"
        )

    def _timed_out(self, holder: runfile.Record | None, timeout: float) -> str:
        where = f" (for {holder.mountpoint})" if holder and holder.is_alive() else ""
        return (
            f"{self.path} is locked by {self._name(holder)}{where}, which did not finish within "
            f"{timeout:g} s; look at its log, or wait longer with -o lock_timeout=SECONDS"
        )

    def release(self) -> None:
        """Give the lock back. Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def refuse_kernel_mount(path: str) -> None:
    """Raise UserError if the kernel has this image mounted, itself or through a loop device."""
    status = os.stat(path)
    sources = {}
    if status.st_mode & 0o170000 == BLOCK_DEVICE:
        sources[f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"] = path
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            same = os.path.samefile(backing.read_text(encoding="utf-8").rstrip("\n"), path)
            number = (backing.parents[1] / "dev").read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if same:
            sources[number] = f"/dev/{backing.parents[1].name}"
    for mounted in mounts.table():
        if mounted.device in sources:
            raise UserError(
                f"{path} is mounted by the kernel on {mounted.mountpoint} "
                f"({sources[mounted.device]}); unmount it first: umount {mounted.mountpoint}",
                mounts.MOUNT_FAILED,
            )


def check_readable(path: str, *, writable: bool) -> None:
    """Raise UserError if the image cannot be opened as the mount needs it."""
    try:
        os.close(os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC))
    except OSError as error:
        raise UserError(_open_failure(path, error, writable), mounts.MOUNT_FAILED) from error


def _open_failure(path: str, error: OSError, writable: bool) -> str:
    if error.errno == errno.ENOENT:
        return (
            f"{path}: there is no such image; make one with: mkfs.xfs -d file,name={path},size=1g"
        )
    if error.errno == errno.EISDIR:
        return f"{path} is a directory, not an image"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and writable:
        return f"{path}: no permission to write; mount it with -o ro, or become its owner"
    return f"{path}: {os.strerror(error.errno or errno.EIO)}"
