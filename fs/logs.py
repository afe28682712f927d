"""Where the daemon's log goes.

Foreground: standard error. Background: a file for each mount point, in /var/log/nofailfs for
root and $XDG_STATE_HOME/nofailfs otherwise, turned over at 8 MiB so that it cannot fill a disk;
or syslog; or none. Under systemd standard error gets the level prefixes that the journal reads.

Opened before the daemon lets go of the terminal, so that a log that cannot be opened is an error
that somebody sees.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

from fs.errors import UserError

NAME = "nofailfs"
FILE_BYTES_MAX = 8 << 20
EXIT_USAGE = 1
FORMAT = "%(asctime)s %(levelname)s %(message)s"
JOURNAL_LEVELS = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3}


class JournalFormatter(logging.Formatter):
    """Lines with systemd's level prefix, without a time: the journal has its own."""

    def format(self, record: logging.LogRecord) -> str:
        level = JOURNAL_LEVELS.get(record.levelno, 3)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).split("\n"))


def default_path(mountpoint: str) -> Path:
    """The log file of a mount point."""
    if os.geteuid() == 0:
        base = Path("/var/log")
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "nofailfs" / (mountpoint.strip("/").replace("/", "-") + ".log")


def _stderr() -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    journal = "JOURNAL_STREAM" in os.environ
    handler.setFormatter(JournalFormatter("%(message)s") if journal else logging.Formatter(FORMAT))
    return handler


def _syslog() -> logging.Handler:
    try:
        handler = logging.handlers.SysLogHandler("/dev/log")
    except OSError as error:
        raise UserError("log=syslog: no syslog daemon listens on /dev/log", EXIT_USAGE) from error
    handler.setFormatter(logging.Formatter(f"{NAME}[{os.getpid()}]: %(levelname)s %(message)s"))
    return handler


def _file(path: Path) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = logging.handlers.RotatingFileHandler(
            path, maxBytes=FILE_BYTES_MAX, backupCount=1, encoding="utf-8"
        )
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise UserError(
            f"cannot write the log {path}: {reason}; choose another with -o log=FILE", EXIT_USAGE
        ) from error
    handler.setFormatter(logging.Formatter(FORMAT))
    return handler


def open_log(
    where: str, mountpoint: str, *, foreground: bool, debug: bool
) -> tuple[logging.Logger, str]:
    """The daemon's logger, and the path or name of where it writes.

    `where` is the option: empty for the default, `stderr`, `syslog`, `none`, or a file.
    """
    handler: logging.Handler
    if where == "none":
        handler, name = logging.NullHandler(), "none"
    elif where == "syslog":
        handler, name = _syslog(), "syslog"
    elif where == "stderr" or (not where and foreground):
        handler, name = _stderr(), "stderr"
    else:
        path = Path(where) if where else default_path(mountpoint)
        handler, name = _file(path), str(path)
    logger = logging.getLogger(NAME)
    for old in list(logger.handlers):
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.propagate = False
    return logger, name
