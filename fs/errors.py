"""Errors that may leave a function, and what each means to the caller.

Ordinary failures are `OSError(errno, text)` with the errno that a system call would give; the
front turns them into FUSE replies. There is no error for memory: allocations do not fail.
"""

from __future__ import annotations

import errno


class Corrupt(OSError):
    """A structure on the image contradicts itself: EUCLEAN to the caller."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EUCLEAN, text)


class ShutDown(OSError):
    """The filesystem was shut down after an error; every operation gives EIO."""

    def __init__(self, text: str = "the filesystem was shut down; unmount it") -> None:
        super().__init__(errno.EIO, text)


class UserError(Exception):
    """A mistake or a condition that its user can mend: message without a traceback, exit code.

    The message says what, where, and what to do next.
    """

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
