"""What a load does to a file system, counted: through a mount, or (virtual.py) to a volume itself.

`Files` is the interface; names are `directory/name`, directories stand in the root. `Counted` is
what loads call: it notes each operation's time by trio's clock, and each failure under the name of
operation and errno; None is then the answer, and the load goes on, as most programs would not. An
errno that only a file system at its end gives raises Ended. Nothing here knows policies: under
irix the failures must stay empty, under the others they are the result.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio

from tools.lab.cut import ENDED, Cut

T = TypeVar("T")
NOFOLLOW, FORCE_SYNC = 0x100, 0x2000  # statx(2)
STATX_SIZE, STATX_BYTES, SIZE_AT = 0x200, 256, 40
_libc = ctypes.CDLL(None, use_errno=True)
WRONG_KEPT = 5
# A file system that shut down answers EIO; one whose daemon has gone, the others.
END_ERRNOS = frozenset((errno.EIO, errno.ENOTCONN, errno.ECONNABORTED, errno.ESHUTDOWN))


class Files(Protocol):
    """A file system under load. Handles are opaque; all but `pause` may raise OSError."""

    async def mkdir(self, name: str) -> bool:
        """A directory in the root; one that is there already is as good. True."""

    async def create(self, name: str) -> Any:
        """A new file, open."""

    async def open(self, name: str) -> Any:
        """An existing file, open."""

    async def close(self, file: Any) -> None:
        """The end of an open file."""

    async def write(self, file: Any, offset: int, data: bytes) -> int:
        """Bytes written."""

    async def read(self, file: Any, offset: int, length: int) -> bytes | bytearray:
        """Up to so many bytes."""

    async def sync(self, file: Any) -> None:
        """Its data on stable storage."""

    async def unlink(self, name: str) -> None:
        """Take a name away."""

    async def stat(self, name: str) -> int:
        """Size in bytes; asks whoever knows, not the kernel's cache."""

    async def missing(self, name: str) -> bool:
        """Whether there is no such name."""

    async def drop_caches(self) -> None:
        """What is read next comes from the device."""

    async def pause(self) -> None:
        """Between two operations."""


class Mounted:
    """Files of a mount, by system calls that block this process: it has one load."""

    def __init__(self, root: Path) -> None:
        # by path they might be found below a mount that has ended
        self._root = os.open(root, os.O_PATH | os.O_DIRECTORY)
        self._statx = ctypes.create_string_buffer(STATX_BYTES)

    async def mkdir(self, name: str) -> bool:
        try:
            os.mkdir(name, dir_fd=self._root)
        except FileExistsError:
            pass
        return True

    async def create(self, name: str) -> int:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=self._root)

    async def open(self, name: str) -> int:
        return os.open(name, os.O_RDWR, dir_fd=self._root)

    async def close(self, file: int) -> None:
        os.close(file)

    async def write(self, file: int, offset: int, data: bytes) -> int:
        return os.pwrite(file, data, offset)

    async def read(self, file: int, offset: int, length: int) -> bytes:
        return os.pread(file, length, offset)

    async def sync(self, file: int) -> None:
        os.fsync(file)

    async def unlink(self, name: str) -> None:
        os.unlink(name, dir_fd=self._root)

    async def stat(self, name: str) -> int:
        flags = FORCE_SYNC | NOFOLLOW
        if _libc.statx(self._root, name.encode(), flags, STATX_SIZE, self._statx) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), name)
        return int(struct.unpack_from("=Q", self._statx, SIZE_AT)[0])

    async def missing(self, name: str) -> bool:
        try:
            os.stat(name, dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            return True
        return False

    async def drop_caches(self) -> None:
        tunable = os.open(".nofail/sys/vm/drop_caches", os.O_WRONLY, dir_fd=self._root)
        try:
            os.write(tunable, b"5")  # file data; without a line in the log
        finally:
            os.close(tunable)

    async def pause(self) -> None:
        """The kernel has this process wait often enough."""


class Ended(Exception):
    """The file system does not answer any more: it shut down, or its daemon went."""


@dataclass
class Tally:
    """What one load did; `failures` by operation and errno, seconds by the run's clock."""

    load: str
    operations: int = 0
    written: int = 0
    verified: int = 0  # bytes that were read and were right
    unknown: int = 0  # bytes not compared: the write that made them had failed
    rounds: int = 0
    longest: float = 0.0
    longest_name: str = ""
    ended: str = ""
    failures: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def failed(self, name: str, count: int = 1) -> None:
        """So many operations failed, of one name."""
        self.failures[name] = self.failures.get(name, 0) + count

    def add(self, other: Tally) -> None:
        """Another load of the same kind."""
        self.operations += other.operations
        self.written += other.written
        self.verified += other.verified
        self.unknown += other.unknown
        self.rounds += other.rounds
        if other.longest > self.longest:
            self.longest, self.longest_name = other.longest, other.longest_name
        self.ended = self.ended or other.ended
        for name, count in other.failures.items():
            self.failed(name, count)
        self.wrong += other.wrong


class Counted:
    """The operations of one load, and their tally.

    `is_over`: finish what you are at. `cut`: leave it.
    """

    def __init__(
        self, files: Files, tally: Tally, is_over: Callable[[], bool], cut: Cut | None = None
    ) -> None:
        self.files = files
        self.tally = tally
        self._is_over = is_over
        self._cut = Cut() if cut is None else cut

    def over(self) -> bool:
        """Whether the load should finish what it is at."""
        return self._is_over()

    async def do(self, name: str, operation: Awaitable[T]) -> T | None:
        """The operation's result; None if it failed. Raises Ended."""
        await self.files.pause()
        began = trio.current_time()
        try:
            result = await operation
            if self._cut:
                raise Ended(ENDED)
            return result
        except OSError as error:
            number = error.errno or 0
            self.tally.failed(f"{name} {errno.errorcode.get(number, number)}")
            if number in END_ERRNOS:
                raise Ended(f"{name}: {os.strerror(number)}") from error
            return None
        finally:
            took = trio.current_time() - began
            self.tally.operations += 1
            if took > self.tally.longest:
                self.tally.longest, self.tally.longest_name = took, name

    async def write(self, file: Any, offset: int, data: bytes) -> bool:
        """Whether all of it was written."""
        done = await self.do("write", self.files.write(file, offset, data))
        self.tally.written += done or 0
        if done is not None and done < len(data):
            self.tally.failed("write short")
        return done == len(data)

    async def read(self, file: Any, offset: int, length: int) -> bytes | bytearray | None:
        """All of a range; None, and not to be compared, if less came."""
        found = await self.do("read", self.files.read(file, offset, length))
        if found is not None and len(found) < length:
            self.tally.failed("read short")
        if found is None or len(found) < length:
            self.tally.unknown += length
            return None
        return found

    def note_wrong(self, what: str) -> None:
        """Something was read that was never written."""
        if len(self.tally.wrong) < WRONG_KEPT:
            self.tally.wrong.append(what)
