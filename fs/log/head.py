"""Is the log clean? Finds the head of the on-disk log and looks at the last record.

XFS format, log: the first word of every 512-byte block that was ever written carries the cycle
number (a record header carries its magic there and the cycle in the second word). Blocks before
the head carry the current cycle, those behind it an older one, so the head is found by bisection.
The log is clean when the record that ends at the head is an unmount record.

Anything unexpected counts as dirty: the image is then refused, never touched.
"""

from __future__ import annotations

import numpy as np

from fs.device.base import Device
from fs.xfs import layout as L
from fs.xfs.geometry import Geometry

SEARCH_BACK_BBS = (2 << 20) // L.BB_SIZE  # how far the last header may be behind the head
HEADER_DATA = 32768  # data bytes that one header block covers
FLAGS_IN_OP = 9  # byte of the flags in an operation header


class _Log:
    """Reads of the log region, addressed in BBs from its start, wrapping at its end."""

    def __init__(self, device: Device, geo: Geometry) -> None:
        self._device = device
        self._start = geo.fsb_to_bytes(geo.log_start)
        self.bbs = geo.log_blocks * geo.block_bbs

    async def read(self, bb: int, count: int) -> np.ndarray:
        data = np.zeros((count, L.BB_SIZE), np.uint8)
        bb %= self.bbs
        first = min(count, self.bbs - bb)
        await self._device.read(self._start + bb * L.BB_SIZE, [data[:first].reshape(-1).data])
        if first < count:
            await self._device.read(self._start, [data[first:].reshape(-1).data])
        return data

    async def cycle(self, bb: int) -> int:
        return int(_cycles(await self.read(bb, 1))[0])


def _cycles(blocks: np.ndarray) -> np.ndarray:
    words = np.ascontiguousarray(blocks[:, :8]).view(">u4")
    return np.where(words[:, 0] == L.MAGIC_LOG_RECORD, words[:, 1], words[:, 0])


async def _find_head(log: _Log) -> int:
    """First block of another cycle than block 0's; the log's length if there is none."""
    cycle = await log.cycle(0)
    low, high = 0, log.bbs  # low has block 0's cycle, high does not (or is the end)
    while high - low > 1:
        middle = (low + high) // 2
        if await log.cycle(middle) == cycle:
            low = middle
        else:
            high = middle
    return high


async def is_clean(device: Device, geo: Geometry) -> bool:
    """Does the log end with an unmount record of this filesystem?"""
    log = _Log(device, geo)
    head = await _find_head(log)
    back = min(SEARCH_BACK_BBS, log.bbs)
    blocks = await log.read(head - back, back)
    magic = np.ascontiguousarray(blocks[:, :4]).view(">u4")[:, 0]
    headers = np.flatnonzero(magic == L.MAGIC_LOG_RECORD)
    if not headers.size:
        return False
    at = int(headers[-1])
    header = blocks[at][: L.LOG_RECORD_HEADER.itemsize].view(L.LOG_RECORD_HEADER)[0]
    if header["uuid"].tobytes() != geo.log_uuid or header["num_logops"] != 1:
        return False
    header_bbs = max(1, -(-int(header["size"]) // HEADER_DATA))
    data_bbs = int(header["len"]) // L.BB_SIZE
    if data_bbs < 1 or at + header_bbs + data_bbs != back:
        return False
    operation = blocks[at + header_bbs]
    return bool(operation[FLAGS_IN_OP] & L.LOG_OP_UNMOUNT)
