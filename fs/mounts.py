"""The mount table of this machine, and the system calls that change it.

`/proc/self/mountinfo` is the truth; `/etc/mtab` is not read. Nothing here touches a mounted
filesystem with stat(): a mount whose daemon is stuck would take the caller with it. Paths are
resolved up to their parent directory only.

Unmounting uses umount2 as root and fusermount3 otherwise. Must stay importable without numba.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import subprocess
from dataclasses import dataclass

from fs.errors import UserError

MOUNT_FAILED = 32
MOUNTINFO = "/proc/self/mountinfo"
FUSERMOUNT_SECONDS = 60  # fusermount3 only asks the kernel; a minute means it is stuck

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_SYNCHRONOUS = 1, 2, 4, 8, 16
MS_REMOUNT, MS_DIRSYNC, MS_NOSYMFOLLOW, MS_NOATIME, MS_NODIRATIME = 32, 128, 256, 1024, 2048
MS_BIND, MS_RELATIME, MS_STRICTATIME = 4096, 1 << 21, 1 << 24
MNT_FORCE, MNT_DETACH = 1, 2

FLAG_OF_WORD = {
    "ro": MS_RDONLY,
    "nosuid": MS_NOSUID,
    "nodev": MS_NODEV,
    "noexec": MS_NOEXEC,
    "sync": MS_SYNCHRONOUS,
    "dirsync": MS_DIRSYNC,
    "nosymfollow": MS_NOSYMFOLLOW,
    "noatime": MS_NOATIME,
    "nodiratime": MS_NODIRATIME,
    "relatime": MS_RELATIME,
}


@dataclass(frozen=True)
class Mount:
    """One line of the mount table."""

    device: str  # "major:minor"
    mountpoint: str
    words: tuple[str, ...]  # per mount point: rw, nosuid, relatime, ...
    fstype: str
    source: str
    super_words: tuple[str, ...]

    @property
    def is_fuse(self) -> bool:
        return self.fstype == "fuse" or self.fstype.startswith("fuse.")


def _unescape(text: str) -> str:
    """mountinfo writes blanks, tabs, newlines and backslashes in octal."""
    if "\\" not in text:
        return text
    for code in ("040", "011", "012", "043", "134"):
        text = text.replace("\\" + code, chr(int(code, 8)))
    return text


def table() -> list[Mount]:
    """All mounts that this process sees, oldest first."""
    mounts = []
    with open(MOUNTINFO, encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            left, _, right = line.rstrip("\n").partition(" - ")
            front, back = left.split(" "), right.split(" ")
            mounts.append(
                Mount(
                    device=front[2],
                    mountpoint=_unescape(front[4]),
                    words=tuple(front[5].split(",")),
                    fstype=back[0],
                    source=_unescape(back[1]),
                    super_words=tuple(back[2].split(",")) if len(back) > 2 else (),
                )
            )
    return mounts


def resolve(path: str) -> str:
    """Absolute path without touching its last component."""
    path = os.path.abspath(path)
    parent, name = os.path.split(path)
    return os.path.join(os.path.realpath(parent), name) if name else path


def find(mountpoint: str) -> Mount | None:
    """What is mounted on a directory: the topmost mount, or None."""
    wanted = resolve(mountpoint)
    found = [m for m in table() if m.mountpoint == wanted]
    return found[-1] if found else None


def stale_command(mountpoint: str) -> str:
    """The command that removes a mount whose daemon is gone."""
    return f"umount {mountpoint}" if os.geteuid() == 0 else f"fusermount3 -u {mountpoint}"


def check_mountpoint(mountpoint: str) -> str:
    """The resolved mount point. Raises UserError if nothing can be mounted there."""
    path = resolve(mountpoint)
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            raise UserError(
                f"{path}: a mount is left there whose daemon is gone (Transport endpoint is not "
                f"connected); remove it with: {stale_command(path)}",
                MOUNT_FAILED,
            ) from error
        if error.errno == errno.ENOENT:
            raise UserError(
                f"{path}: the mount point does not exist; make it with: mkdir -p {path}",
                MOUNT_FAILED,
            ) from error
        raise UserError(f"{path}: {os.strerror(error.errno or 0)}", MOUNT_FAILED) from error
    path = os.path.realpath(path)
    if status.st_mode & 0o170000 != 0o040000:
        raise UserError(f"{path}: the mount point is not a directory", MOUNT_FAILED)
    if os.geteuid() != 0 and not os.access(path, os.W_OK):
        raise UserError(
            f"{path}: you may only mount on a directory that you may write to", MOUNT_FAILED
        )
    return path


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def unmount(mountpoint: str, *, lazy: bool = False, cut_off: bool = False) -> None:
    """Unmount. Raises OSError: EBUSY while files are open, EINVAL if nothing is mounted there.

    `lazy` takes a mount away that is in use; `cut_off` does so and, if we are root, has the kernel
    fail every request, even those of whom it could not kill.
    """
    lazy = lazy or cut_off
    if os.geteuid() == 0:
        flags = (MNT_DETACH if lazy else 0) | (MNT_FORCE if cut_off else 0)
        _check(_libc().umount2(os.fsencode(mountpoint), flags), mountpoint)
        return
    tool = shutil.which("fusermount3")
    if tool is None:
        raise OSError(errno.ENOENT, "fusermount3 not found; install fuse3", mountpoint)
    command = [tool, "-u", "-q", *(["-z"] if lazy else []), "--", mountpoint]
    done = subprocess.run(command, capture_output=True, timeout=FUSERMOUNT_SECONDS, check=False)
    if done.returncode != 0:
        code = errno.EBUSY if find(mountpoint) else errno.EINVAL
        raise OSError(code, os.strerror(code), mountpoint)


def remount(mounted: Mount, add: int, remove: int) -> None:
    """Change the kernel's flags of a mount, as `mount -o remount` does. Root only."""
    flags = MS_REMOUNT
    for word in (*mounted.words, *mounted.super_words):
        flags |= FLAG_OF_WORD.get(word, 0)
    flags = flags & ~remove | add
    target = os.fsencode(mounted.mountpoint)
    _check(_libc().mount(None, target, None, ctypes.c_ulong(flags), None), mounted.mountpoint)
