"""`nofailfs freeze` and `thaw`: what fsfreeze(8) does, for a mount of ours.

FIFREEZE and FITHAW end in the VFS, which freezes the kernel's side of a FUSE mount and tells the
daemon nothing. So `freeze` writes to a tunable of the directory of reports (fs/front/sysctl.py),
which returns when everything is written. `thaw` must not look up any name: a writer that waits in
the root has the kernel's lock of that directory. It sends the daemon a signal.

Must stay importable without numba.
"""

from __future__ import annotations

import os
import signal

from fs import mounts, runfile
from fs.errors import UserError

TUNABLE = "sys/fs/xfs/freeze"
EXIT_FAILED = 1
THAW = signal.SIGRTMIN


def freeze(mountpoint: str, directory: str) -> None:
    """Freeze; `directory` is the name of the reports' one. Raises UserError with the reason."""
    mounted = mounts.find(mountpoint)
    if mounted is None or not mounted.is_fuse:
        raise UserError(f"{mountpoint} is not mounted; name a mount point of nofailfs", EXIT_FAILED)
    try:
        fd = os.open(os.path.join(mounted.mountpoint, directory, TUNABLE), os.O_WRONLY)
        try:
            os.write(fd, b"1")
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise UserError(
            f"{mounted.mountpoint} has no {directory} to freeze it by; with procdir=NAME say "
            f"--procdir NAME, with procdir=off it cannot be done",
            EXIT_FAILED,
        ) from error
    except OSError as error:
        raise UserError(f"cannot freeze {mountpoint}: {error.strerror}", EXIT_FAILED) from error


def thaw(mountpoint: str) -> None:
    """Let writers go on, if it was frozen. Raises UserError if no daemon of ours is known."""
    record = runfile.of_mountpoint(mounts.resolve(mountpoint))
    if record is None or not record.is_alive():
        raise UserError(f"{mountpoint} is not mounted; name a mount point of nofailfs", EXIT_FAILED)
    try:
        os.kill(record.pid, THAW)
    except PermissionError as error:
        raise UserError(f"cannot thaw {mountpoint}: {error.strerror}", EXIT_FAILED) from error
