"""`nofailfs umount`: unmount, and wait until the daemon has written everything.

umount(8) returns when the kernel is done, which is before the daemon is. This waits for the
daemon's end and returns its exit status, so that a script that goes on afterwards finds a clean
image, or learns that it is none. Must stay importable without numba.
"""

from __future__ import annotations

import errno
import os
import select

from fs import mounts, runfile
from fs.errors import UserError

EXIT_FAILED = mounts.MOUNT_FAILED
EXIT_SYSTEM = 2
WAIT_SECONDS = 600.0


def unmount(mountpoint: str, *, lazy: bool = False, timeout: float = WAIT_SECONDS) -> int:
    """Unmount a directory; returns the daemon's exit status.

    `lazy` detaches a mount that is in use and does not wait: the daemon ends with its last user.
    Raises UserError if nothing of ours is mounted there, if it is in use, or if the daemon does
    not end within `timeout` seconds.
    """
    path = mounts.resolve(mountpoint)
    mounted = mounts.find(path)
    if mounted is None:
        path = os.path.realpath(mountpoint)
        mounted = mounts.find(path)
    record = runfile.of_mountpoint(path)
    if mounted is None and not (record and record.is_alive()):
        raise UserError(f"{path} is not mounted", EXIT_FAILED)
    if mounted is not None:
        if not mounted.is_fuse:
            raise UserError(
                f"{path} is a {mounted.fstype} mount, not one of nofailfs; use umount", EXIT_FAILED
            )
        _unmount(path, lazy)
    if record is None or lazy:
        return 0  # without a record: mounted by somebody whose run files we cannot see
    _wait(record, timeout)
    return _status(record)


def _unmount(path: str, lazy: bool) -> None:
    try:
        mounts.unmount(path, lazy=lazy)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise UserError(
                f"{path} is in use; see who uses it with: lsof +f -- {path}, "
                f"or unmount it later with: nofailfs umount --lazy {path}",
                EXIT_FAILED,
            ) from error
        if error.errno == errno.EPERM:
            raise UserError(f"{path}: you may not unmount it; become root", EXIT_FAILED) from error
        reason = os.strerror(error.errno or errno.EIO)
        raise UserError(f"cannot unmount {path}: {reason}", EXIT_FAILED) from error


def _wait(record: runfile.Record, timeout: float) -> None:
    """Wait for the end of the process that wrote the record."""
    try:
        process = os.pidfd_open(record.pid)
    except ProcessLookupError:
        return
    try:
        if not record.is_alive():
            return
        ended, _, _ = select.select([process], [], [], timeout)
    finally:
        os.close(process)
    if not ended:
        raise UserError(
            f"process {record.pid} is still writing {record.image or 'the image'} after "
            f"{timeout:g} s; see its log ({record.log}), or: kill -USR1 {record.pid}",
            EXIT_SYSTEM,
        )


def _status(record: runfile.Record) -> int:
    """What the daemon left as its status. Raises UserError if that is not success."""
    last = runfile.of_image(record.image_key)
    if last is None or last.pid != record.pid:
        return 0  # somebody else asked already
    runfile.remove(last)
    if last.state != runfile.ENDED:
        raise UserError(
            f"the daemon (process {last.pid}) ended without writing everything: the next "
            f"mount of {last.image or 'the image'} recovers its log; what it said is in {last.log}",
            EXIT_SYSTEM,
        )
    if last.exit_status:
        raise UserError(f"{last.message}; the log is {last.log}", last.exit_status)
    return 0
