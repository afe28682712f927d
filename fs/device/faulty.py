"""A device that fails now and then: another one, and how often which of its calls go wrong.

For experiments and tests. A call that fails raises OSError(EIO) and has done nothing, but for a
torn write: some of its sectors from the beginning are on the device then, as when power is lost.
Each request is decided by the seed and its turn, so a run with the same requests fails in the same
places. With a range only requests that touch it fail; the shares may be changed at any time.
"""

from __future__ import annotations

import errno
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fs.device.base import Device, Views
from fs.device.settings import number, settings

SECTOR = 512
OFFSET_MOST = (1 << 63) - 1
SHARE = re.compile(r"0|1|0?\.\d+|1\.0+", re.ASCII)
SHARES = ("read", "write", "torn", "flush")
HELP = "read=P,write=P,torn=P,flush=P,seed=N,first=BYTE,last=BYTE (each P from 0 to 1)"


@dataclass
class Faults:
    """Which share of the calls goes wrong, of those that touch bytes `first` to `last`."""

    read: float = 0.0
    write: float = 0.0
    torn: float = 0.0
    flush: float = 0.0
    seed: int = 0
    first: int = 0
    last: int = OFFSET_MOST

    def touches(self, offset: int, nbytes: int) -> bool:
        """Whether a request may fail at all."""
        return offset <= self.last and offset + nbytes > self.first


def parse(text: str) -> Faults:
    """The faults that an option describes. Raises ValueError for what are none."""
    return Faults(**settings(text, READERS, "faults", HELP))


def _share(text: str) -> float:
    if not SHARE.fullmatch(text):
        raise ValueError(f"'{text}' is not from 0 to 1")
    return float(text)


READERS = dict.fromkeys(SHARES, _share) | dict.fromkeys(("seed", "first", "last"), number)


class Faulty:
    """A device with faults. `failed` counts them by the name of the share."""

    def __init__(self, inner: Device, faults: Faults) -> None:
        self.inner = inner
        self.faults = faults
        self._random = random.Random(faults.seed)
        self.failed = dict.fromkeys(SHARES, 0)
        self.name = inner.name
        self.size = inner.size
        self.read_only = inner.read_only

    def _fails(self, kind: str, offset: int = 0, nbytes: int = 0) -> bool:
        drawn = self._random.random()
        if drawn >= getattr(self.faults, kind):
            return False
        if kind != "flush" and not self.faults.touches(offset, nbytes):
            return False
        self.failed[kind] += 1
        return True

    async def read(self, offset: int, views: Views) -> None:
        if self._fails("read", offset, _length(views)):
            raise OSError(errno.EIO, f"injected: read of byte {offset} failed")
        await self.inner.read(offset, views)

    async def read_all(self, requests: Sequence[tuple[int, Views]]) -> None:
        for offset, views in requests:
            if self._fails("read", offset, _length(views)):
                raise OSError(errno.EIO, f"injected: read of byte {offset} failed")
        await self.inner.read_all(requests)

    async def write(self, offset: int, views: Views) -> None:
        nbytes = _length(views)
        if self._fails("write", offset, nbytes):
            raise OSError(errno.EIO, f"injected: write of byte {offset} failed")
        if self._fails("torn", offset, nbytes):
            written = self._random.randrange(nbytes // SECTOR) * SECTOR
            if written:
                await self.inner.write(offset, _beginning(views, written))
            raise OSError(
                errno.EIO, f"injected: {written} of {nbytes} bytes written at byte {offset}"
            )
        await self.inner.write(offset, views)

    async def discard(self, offset: int, length: int) -> None:
        await self.inner.discard(offset, length)

    async def flush(self) -> None:
        if self._fails("flush"):
            raise OSError(errno.EIO, "injected: flush failed")
        await self.inner.flush()

    def close(self) -> None:
        self.inner.close()


def _length(views: Views) -> int:
    return sum(view.nbytes for view in views)


def _beginning(views: Views, nbytes: int) -> list[memoryview]:
    """The first bytes of some views."""
    found = []
    for view in views:
        part = view[: min(view.nbytes, nbytes)]
        nbytes -= part.nbytes
        if part.nbytes:
            found.append(part)
    return found
