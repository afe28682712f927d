"""Checkpoints written to the log of a clean image, as no kernel would be asked to write them.

Each record holds whole checkpoints; items are given as their regions. What is written is what the
format asks for, so xfs_logprint and the kernel can read it as well. Nobody may have the image open.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fs.device.image import ImageFile
from fs.log import checkpoints as C
from fs.log import head, items, record
from fs.log.region import Region, lsn_of, place_of
from fs.xfs import layout as L
from fs.xfs import superblock
from fs.xfs.geometry import Geometry

Items = Sequence[Sequence[bytes]]
TRANSACTION = 0x69
ICLOG = 262144


def buffer(daddr: int, bbs: int, flags: int, chunks: dict[int, bytes] | None = None) -> list[bytes]:
    """A buffer item with some chunks of 128 bytes; its regions are merged as the kernel does."""
    chunks = chunks or {}
    words = -(-bbs * L.BB_SIZE // items.CHUNK // 32)
    bitmap = sum(1 << chunk for chunk in chunks).to_bytes(4 * words, "little")
    data: list[bytes] = []
    for chunk in sorted(chunks):
        if chunk - 1 in chunks:
            data[-1] += chunks[chunk]
        else:
            data.append(chunks[chunk])
    head_ = items.BUF_HEAD.pack(items.BUF, 1 + len(data), flags, bbs, daddr, words)
    return [head_ + bitmap, *data]


def inode(
    ino: int, place: tuple[int, int, int], core: bytes, fields: int = items.CORE
) -> list[bytes]:
    """An inode item of a core alone; `place` is daddr, BBs and the offset in the cluster."""
    daddr, bbs, offset = place
    raw = items.INODE_HEAD.pack(items.INODE, 2, fields, 0, 0, 0, ino, daddr, bbs, offset)
    return [raw, core]


def create(agno: int, agbno: int, count: int, size: int, blocks: int, gen: int) -> list[bytes]:
    """An inode create item."""
    body = items.ICREATE_BODY.pack(agno, agbno, count, size, blocks, gen)
    return [struct.pack("<HH", items.ICREATE, 1) + body]


class LogWriter:
    """Records behind the head of one image's log."""

    def __init__(self, image: Path) -> None:
        self.device = ImageFile(str(image))
        self.geo: Geometry
        self._tail = 0

    async def open(self) -> LogWriter:
        raw = bytearray(32768)
        await self.device.read(0, [memoryview(raw)])
        self.geo = superblock.geometry(superblock.read(raw, self.device.size))
        self._region = Region(self.device, self.geo)
        ends = await head.find(self._region)
        self._cycle, self._bb = ends.cycle, ends.head
        self._tail = lsn_of(self._cycle, self._bb)
        return self

    async def write_at(self, lsn: int, *checkpoints: Items) -> None:
        """A record somewhere else, as if what comes before it had been lost."""
        here = self._cycle, self._bb
        self._cycle, self._bb = place_of(lsn)
        await self.write(*checkpoints)
        self._cycle, self._bb = here

    async def write(self, *checkpoints: Items) -> int:
        """One record with whole checkpoints; returns its LSN."""
        data, ops = b"", 0
        for tid, checkpoint in enumerate(checkpoints, 0x1000 + self._bb):
            regions = [region for item in checkpoint for region in item]
            header = C.TRANSACTION.pack(C.MAGIC, 40, tid, len(regions))
            parts = [(0, region) for region in (header, *regions)]
            parts = [(C.START, b""), *parts, (C.COMMIT, b"")]
            for flags, payload in parts:
                data += C.OPERATION.pack(tid, len(payload), TRANSACTION, flags, 0) + payload
            ops += len(parts)
        unit = max(self.geo.log_sector_size, self.geo.log_sunit) >> L.BB_LOG
        headers = record.header_bbs(ICLOG)
        bbs = -(-(-(-len(data) // L.BB_SIZE) + headers) // unit) * unit - headers
        lsn = lsn_of(self._cycle, self._bb)
        await self._write(headers, bbs, data, ops, lsn)
        self._bb += headers + bbs
        if self._bb >= self._region.bbs:
            self._bb, self._cycle = self._bb - self._region.bbs, self._cycle + 1
        return lsn

    async def _write(self, headers: int, bbs: int, data: bytes, ops: int, lsn: int) -> None:
        blocks = np.zeros((headers + bbs, L.BB_SIZE), np.uint8)
        flat = blocks.reshape(-1)
        flat[headers * L.BB_SIZE :][: len(data)] = np.frombuffer(data, np.uint8)
        header = flat[: L.LOG_RECORD_HEADER.itemsize].view(L.LOG_RECORD_HEADER)
        for name, value in (
            *(("magic", L.MAGIC_LOG_RECORD), ("cycle", self._cycle), ("version", 2), ("fmt", 1)),
            *(("len", bbs << L.BB_LOG), ("size", ICLOG), ("num_logops", ops), ("lsn", lsn)),
            *(("tail_lsn", self._tail), ("uuid", np.void(self.geo.log_uuid))),
        ):
            header[name] = value
        record.stamp(flat, headers, bbs, self._cycle, self._region.bbs - self._bb)
        header["crc"] = record.crc(flat, headers, bbs << L.BB_LOG)
        await self._region.write(self._bb, blocks)
