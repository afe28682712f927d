"""The log's place on the device: a ring of basic blocks (BBs, 512 bytes), addressed from its start.

Reads and writes wrap at the end. An LSN is a cycle, which counts how often the ring went round, and
the BB at which a record begins; so LSNs ascend. No state but the place, no locks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fs.device.base import Device
from fs.xfs import layout as L
from fs.xfs.geometry import Geometry

Blocks = NDArray[np.uint8]  # (BBs, 512)


def lsn_of(cycle: int, bb: int) -> int:
    """The LSN of a place."""
    return cycle << 32 | bb


def place_of(lsn: int) -> tuple[int, int]:
    """(cycle, BB) of an LSN."""
    return lsn >> 32, lsn & 0xFFFFFFFF


class Region:
    """The log of one image."""

    def __init__(self, device: Device, geo: Geometry) -> None:
        self._device = device
        self.geo = geo
        self._start = geo.fsb_to_bytes(geo.log_start)
        self.bbs = geo.log_blocks * geo.block_bbs
        self.uuid = geo.log_uuid

    def room(self, head: int, tail: int) -> int:
        """BBs from the head on that are not log any longer, which begins at the tail; LSNs."""
        (cycle, bb), (tail_cycle, tail_bb) = place_of(head), place_of(tail)
        return tail_bb - bb + (self.bbs if tail_cycle == cycle else 0)

    def _parts(self, bb: int, count: int) -> list[tuple[int, int, int]]:
        """(offset on the device, first, last) of blocks [first, last) of `count` from a BB on."""
        bb %= self.bbs
        first = min(count, self.bbs - bb)
        parts = [(self._start + bb * L.BB_SIZE, 0, first)]
        return parts if first == count else [*parts, (self._start, first, count)]

    async def read(self, bb: int, count: int) -> Blocks:
        """`count` BBs from `bb` on. Raises OSError."""
        blocks = np.zeros((count, L.BB_SIZE), np.uint8)
        for offset, first, last in self._parts(bb, count):
            await self._device.read(offset, [blocks[first:last].reshape(-1).data])
        return blocks

    async def write(self, bb: int, blocks: Blocks) -> None:
        """The other way round."""
        for offset, first, last in self._parts(bb, len(blocks)):
            await self._device.write(offset, [blocks[first:last].reshape(-1).data])

    async def flush(self) -> None:
        """Make what was written stable, here and everywhere on the device. Raises OSError."""
        await self._device.flush()
