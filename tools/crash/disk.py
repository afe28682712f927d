"""A device in memory that remembers every write and flush, and what a crash may leave of them.

All that happens has a *moment*, a number that grows by one with each event: a write begins, is
done; a flush begins, is done; somebody notes something (`tick`). A crash at a moment leaves what is
*stable*: writes that were done before a flush began that is done. Of the other writes that have
begun each may be there, not be there, or be torn: some of its sectors are there. Sectors are never
torn.

Requests take seeded times on trio's clock, so they overtake each other. A write's bytes are taken
when it begins or when it is done: whoever changes them meanwhile is found out.

What of a home write of metadata may be torn is a matter of the format: neither the kernel nor we
replay an image into a block that names the same LSN or a newer one, so a block whose first
sector is there is there as a whole. Data and records of the log are torn in any way.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import trio
from numpy.typing import NDArray

from fs.device.base import Views
from fs.xfs.geometry import Geometry

LATE = 0.1  # of the requests that take LATE_S on the average, the others SOON_S
SOON_S, LATE_S = 0.0005, 0.02
NEVER = 1 << 62
ABSENT, WHOLE, TORN = "absent", "whole", "torn"
# Where a metadata block that recovery may skip begins (fs/xfs/layout.py has their names).
MAGICS = {
    b"AB3B", b"AB3C", b"IAB3", b"FIB3", b"R3FC", b"RMB3", b"BMA3", b"XDB3", b"XDD3", b"XDF3",
    b"XARM", b"XSLM", b"XAGF", b"XAGI", b"XAFL", b"XFSB",
}  # fmt: skip
DA_MAGICS = {b"\x3d\xf1", b"\x3d\xff", b"\x3b\xee", b"\x3e\xbe"}  # at byte 8


@dataclass
class Write:
    """One write; moments at which it began and was done."""

    offset: int
    data: bytes
    begun: int
    done: int = NEVER


@dataclass
class Record:
    """What was done to the device since `initial`, which is the content before it."""

    moment: int = 0
    writes: list[Write] = field(default_factory=list)
    flushes: list[tuple[int, int]] = field(default_factory=list)  # begun and done

    def tick(self) -> int:
        """Something else happened; its moment."""
        self.moment += 1
        return self.moment

    def stable_before(self, moment: int) -> int:
        """Writes that were done before this are stable at `moment`."""
        return max((begun for begun, done in self.flushes if done <= moment), default=0)

    def parted(self, moment: int) -> tuple[list[Write], list[Write]]:
        """Stable writes, and those that may be there; each in the order of their ends."""
        until = self.stable_before(moment)
        begun = sorted((w for w in self.writes if w.begun <= moment), key=lambda w: w.done)
        return [w for w in begun if w.done < until], [w for w in begun if w.done >= until]


class Disk:
    """A device with the content of a file, whose requests take virtual time. See `Record`."""

    def __init__(self, image: Path, seed: int) -> None:
        self.name = f"disk-{seed}"
        self.size = image.stat().st_size
        self.read_only = False
        self.record = Record()
        self.random = random.Random(seed)
        self._memory = mmap.mmap(-1, self.size)
        self._copy_in(image)

    def _copy_in(self, image: Path) -> None:
        with open(image, "rb") as file:
            for start, end in data_ranges(file.fileno(), self.size):
                self._memory[start:end] = os.pread(file.fileno(), end - start, start)

    async def _takes(self) -> None:
        mean = LATE_S if self.random.random() < LATE else SOON_S
        await trio.sleep(self.random.expovariate(1 / mean))

    async def read(self, offset: int, views: Views) -> None:
        await self._takes()
        for view in views:
            view[:] = self._memory[offset : offset + len(view)]
            offset += len(view)

    async def read_all(self, requests: Sequence[tuple[int, Views]]) -> None:
        for offset, views in requests:
            await self.read(offset, views)

    async def write(self, offset: int, views: Views) -> None:
        record = self.record
        write = Write(offset, b"".join(views), record.tick())
        record.writes.append(write)
        await self._takes()
        if self.random.random() < 0.5:
            write.data = b"".join(views)
        write.done = record.tick()
        self._memory[offset : offset + len(write.data)] = write.data

    async def discard(self, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "the device cannot discard")

    async def flush(self) -> None:
        begun = self.record.tick()
        await self._takes()
        self.record.flushes.append((begun, self.record.tick()))

    def close(self) -> None:
        """The memory goes with the object."""


def data_ranges(fd: int, size: int) -> list[tuple[int, int]]:
    """Where a sparse file has data."""
    found, at = [], 0
    while at < size:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        at = min(os.lseek(fd, start, os.SEEK_HOLE), size)
        found.append((start, at))
    return found


# -- what is left ---------------------------------------------------------------------------------


class Fate(NamedTuple):
    """What became of an unstable write: `sectors` of it are there (one byte each, 0 or 1)."""

    kind: str
    sectors: bytes = b""


class Tearing:
    """Which parts of a write are atomic, on an image of some geometry."""

    def __init__(self, geo: Geometry) -> None:
        self.geo = geo
        start = geo.fsb_to_bytes(geo.log_start)
        self.log = range(start, start + geo.log_blocks * geo.block_size)

    def draw(self, rng: random.Random, write: Write) -> Fate:
        """One of three fates; torn ones have lost a beginning, an end, or anything."""
        kind = rng.choice((ABSENT, WHOLE, TORN))
        if kind != TORN:
            return Fate(kind)
        count = len(write.data) // self.geo.sector_size
        cut = rng.randrange(count + 1)
        how = rng.randrange(3)
        there = np.arange(count) < cut if how == 0 else np.arange(count) >= cut
        if how == 2:
            there = np.array([rng.random() < 0.5 for _ in range(count)])
        self._keep_units(write, there)
        return Fate(TORN, bytes(there.astype(np.uint8)))

    def _keep_units(self, write: Write, there: NDArray[np.bool_]) -> None:
        """Metadata whose first sector is there is there."""
        if write.offset in self.log:
            return
        first, sector = 0, self.geo.sector_size
        unit = 0  # sectors of the block that we are in; 0: none
        for i in range(len(there)):
            found = self._unit(write.data[i * sector : i * sector + 16])
            if found:
                first, unit = i, found
            if unit and i - first < unit and there[first]:
                there[i] = True

    def _unit(self, head: bytes) -> int:
        """Sectors that belong together, from one that begins so; 0: no metadata begins here."""
        geo = self.geo
        if head[:2] == b"IN":
            return max(1, geo.inode_size // geo.sector_size)
        if head[:4] in MAGICS or head[8:10] in DA_MAGICS:
            return max(geo.block_size, geo.dir_block_size) // geo.sector_size
        return 0

    def apply(self, fd: int, write: Write, fate: Fate) -> None:
        """Write to an image what is left of a write."""
        if fate.kind == WHOLE:
            os.pwrite(fd, write.data, write.offset)
        sector = self.geo.sector_size
        for i in range(len(fate.sectors)):
            if fate.sectors[i]:
                data = write.data[i * sector : (i + 1) * sector]
                os.pwrite(fd, data, write.offset + i * sector)
