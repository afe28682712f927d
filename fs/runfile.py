"""Run files: what a daemon tells the other programs of this machine about itself.

One small JSON file for each mounted image, in /run/nofailfs for root and in
$XDG_RUNTIME_DIR/nofailfs for others. It names the process, the image and the mount point, and at
the end keeps the exit status, which nobody else can know: the daemon is no child of `umount`.

Files are replaced by rename, so a reader sees an old record or a new one, never a piece. A record
counts as alive only if the process exists *and* started when the record says: process ids are
used again. Must stay importable without numba.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

STARTING, MOUNTED, STOPPING, ENDED = "starting", "mounted", "stopping", "ended"


@dataclass(frozen=True)
class Record:
    """One daemon."""

    pid: int
    start_ticks: int
    image: str
    image_key: str
    mountpoint: str
    state: str
    is_read_only: bool = False
    image_fd: int = -1  # of the daemon, for an image that has no path
    options: str = ""
    policy: str = ""  # the allocator's
    log: str = ""
    negotiated: dict[str, Any] = field(default_factory=dict)  # with the kernel, at INIT
    exit_status: int = 0
    message: str = ""

    def is_alive(self) -> bool:
        """Does the process that wrote this still run?"""
        return start_ticks(self.pid) == self.start_ticks


def directory() -> Path:
    """Where this user's run files live."""
    if os.geteuid() == 0:
        return Path("/run/nofailfs")
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        return Path(base) / "nofailfs"
    return Path(tempfile.gettempdir()) / f"nofailfs-{os.geteuid()}"


def start_ticks(pid: int) -> int:
    """Clock ticks after boot at which a process started; -1 if there is none or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return -1
    words = stat.rpartition(")")[2].split()
    return -1 if words[0] in "ZX" else int(words[19])


def image_key(path: str) -> str:
    """A name for an image that does not depend on the path used: its device numbers or inode."""
    status = os.stat(path)
    if status.st_mode & 0o170000 == 0o060000:
        return f"b{os.major(status.st_rdev)}-{os.minor(status.st_rdev)}"
    return f"{os.major(status.st_dev)}-{os.minor(status.st_dev)}-{status.st_ino}"


def _path(key: str) -> Path:
    return directory() / f"{key}.json"


def write(record: Record) -> None:
    """Publish a record. Failure is not fatal to a mount: OSError goes to the caller to log."""
    path = _path(record.image_key)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{record.pid}.tmp")
    scratch.write_text(json.dumps(asdict(record), indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, path)


def _load(path: Path) -> Record | None:
    try:
        return Record(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def of_image(key: str) -> Record | None:
    """The record of an image, if a daemon left one."""
    return _load(_path(key))


def of_mountpoint(mountpoint: str) -> Record | None:
    """The record of the daemon that serves, or served last, this mount point."""
    best: Record | None = None
    for path in sorted(directory().glob("*.json")):
        record = _load(path)
        if record is None or record.mountpoint != mountpoint:
            continue
        if best is None or (record.is_alive(), record.start_ticks) > (
            best.is_alive(),
            best.start_ticks,
        ):
            best = record
    return best


def remove(record: Record) -> None:
    """Forget a record whose exit status has been read."""
    current = of_image(record.image_key)
    if current is not None and current.pid == record.pid:
        _path(record.image_key).unlink(missing_ok=True)


def prune() -> None:
    """Forget daemons that ended well, or whose image is gone: nobody will ask for their status."""
    for path in directory().glob("*.json"):
        record = _load(path)
        if record is not None and record.is_alive():
            continue
        ended_well = record is not None and record.state == ENDED and not record.exit_status
        if record is None or ended_well or not os.path.exists(record.image):
            path.unlink(missing_ok=True)


class Keeper:
    """A daemon's own record. A run file that cannot be written is a log line, no failure."""

    def __init__(self, record: Record, log: logging.Logger) -> None:
        self.record = record
        self._log = log
        try:
            prune()
        except OSError as error:
            self._log.info("old run files stay: %s", error)
        self.set()

    def set(self, **changes: object) -> None:
        """Publish the record with some fields changed."""
        self.record = replace(self.record, **changes)  # type: ignore[arg-type]
        try:
            write(self.record)
        except OSError as error:
            self._log.info("no run file: %s", error)

    def end(self, exit_status: int, message: str) -> None:
        """The daemon ends; its status stays for whoever unmounts."""
        self.set(state=ENDED, exit_status=exit_status, message=message)

    def drop(self) -> None:
        """The daemon never started; nobody waits for its status."""
        remove(self.record)
