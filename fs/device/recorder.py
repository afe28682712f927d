"""A device whose writes are kept in a log, in the order in which they may become stable.

The log has the format of the kernel's dm-log-writes, version 1, so its tools (xfstests' replay-log)
can play it back up to any entry: the image as a loss of power would have left it there. All numbers
are little-endian words of 64 bits:

    sector 0          magic, version, entries; 32 bits: bytes of a sector
    then each entry   first sector, sectors, flags, bytes of data; from the next sector on the data

A write enters the log when it is done, a flush when it is: behind the writes that were done before
it began, which it made stable, and ahead of those that were done meanwhile, which it may not have.
The log is written on the trio thread; it is an instrument, and no mount for speed.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence

from fs.device.base import Device, Views

MAGIC = 0x6A736677736872
VERSION = 1
SECTOR = 512
FLUSH, DISCARD = 1, 4
SUPER = struct.Struct("<QQQI")
ENTRY = struct.Struct("<QQQQ")

Entry = tuple[int, int, int, bytes]  # offset, bytes, flags, data


class Recorder:
    """A device, with a log of what changes it in the file `path`, which is made anew. OSError."""

    def __init__(self, inner: Device, path: str) -> None:
        self.inner = inner
        self.name = inner.name
        self.size = inner.size
        self.read_only = inner.read_only
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._entries = 0
        self._end = SECTOR
        self._flushing = 0
        self._meanwhile: list[Entry] = []  # done while a flush was on its way
        self._write_super()

    async def read(self, offset: int, views: Views) -> None:
        await self.inner.read(offset, views)

    async def read_all(self, requests: Sequence[tuple[int, Views]]) -> None:
        await self.inner.read_all(requests)

    async def write(self, offset: int, views: Views) -> None:
        data = b"".join(views)  # as it is now: when the device is done it may change
        await self.inner.write(offset, views)
        self._add((offset, len(data), 0, data))

    async def discard(self, offset: int, length: int) -> None:
        await self.inner.discard(offset, length)
        self._add((offset, length, DISCARD, b""))

    async def flush(self) -> None:
        self._flushing += 1
        try:
            await self.inner.flush()
            self._append((0, 0, FLUSH, b""))
        finally:
            self._flushing -= 1
            if not self._flushing:
                for entry in self._meanwhile:
                    self._append(entry)
                self._meanwhile.clear()
        self._write_super()

    def close(self) -> None:
        self.inner.close()
        if self._fd >= 0:
            self._write_super()
            os.close(self._fd)
            self._fd = -1

    def _add(self, entry: Entry) -> None:
        if self._flushing:
            self._meanwhile.append(entry)
        else:
            self._append(entry)

    def _append(self, entry: Entry) -> None:
        offset, nbytes, flags, data = entry
        head = ENTRY.pack(offset // SECTOR, nbytes // SECTOR, flags, len(data))
        os.pwritev(self._fd, [head.ljust(SECTOR, b"\0"), data], self._end)
        self._end += SECTOR + len(data)
        self._entries += 1

    def _write_super(self) -> None:
        head = SUPER.pack(MAGIC, VERSION, self._entries, SECTOR)
        os.pwrite(self._fd, head.ljust(SECTOR, b"\0"), 0)
