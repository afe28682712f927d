"""`nofailfs freeze` and `thaw`: what fsfreeze(8) does, for a mount of ours.

FIFREEZE and FITHAW end in the VFS, which freezes the kernel's side of a FUSE mount and tells the
daemon nothing. So this writes to a tunable of the directory of reports (fs/front/sysctl.py), which
returns when everything is written. Must stay importable without numba.
"""

from __future__ import annotations

import os

from fs import mounts
from fs.errors import UserError

TUNABLE = "sys/fs/xfs/freeze"
EXIT_FAILED = 1


def set_frozen(mountpoint: str, directory: str, *, frozen: bool) -> None:
    """Freeze or thaw; `directory` is the name of the reports' one.

    Raises UserError if nothing of ours is mounted there, or if it cannot be done.
    """
    mounted = mounts.find(mountpoint)
    if mounted is None or not mounted.is_fuse:
        raise UserError(f"{mountpoint} is not mounted; name a mount point of nofailfs", EXIT_FAILED)
    what = "freeze" if frozen else "thaw"
    try:
        fd = os.open(os.path.join(mounted.mountpoint, directory, TUNABLE), os.O_WRONLY)
    except FileNotFoundError as error:
        raise UserError(
            f"{mounted.mountpoint} has no {directory} to {what} it by; with procdir=NAME say "
            f"--procdir NAME, with procdir=off it cannot be done",
            EXIT_FAILED,
        ) from error
    except OSError as error:
        raise UserError(f"cannot {what} {mountpoint}: {error.strerror}", EXIT_FAILED) from error
    try:
        os.write(fd, b"1" if frozen else b"0")
    except OSError as error:
        raise UserError(f"cannot {what} {mountpoint}: {error.strerror}", EXIT_FAILED) from error
    finally:
        os.close(fd)
