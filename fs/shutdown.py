"""Why a filesystem was shut down, and what the log says of it: XFS's words and numbers.

After a shutdown nothing is written any more, neither home nor to the log, so the image is what a
crash would have left: the next mount, ours or the kernel's, recovers its log.
"""

from __future__ import annotations

from enum import Enum


class Why(Enum):
    """A flag of XFS's SHUTDOWN_*, and what it stands for."""

    METADATA_IO = 0x1, "Metadata I/O Error"
    LOG_IO = 0x2, "Log I/O Error"
    ASKED_FOR = 0x4, "User initiated shutdown received."
    IN_CORE = 0x8, "Corruption of in-memory data"

    def message(self, name: str, reason: str) -> str:
        """For the log of the filesystem on device `name`."""
        flag, text = self.value
        if self is Why.ASKED_FOR:
            return f"{name}: {text}  Shutting down filesystem."
        return (
            f"{name}: {text} ({flag:#x}) detected: {reason}.  Shutting down filesystem.  "
            "Please unmount the filesystem and rectify the problem(s)"
        )
