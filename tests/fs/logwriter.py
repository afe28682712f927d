"""Checkpoints written to the log of a clean image, as no kernel would be asked to write them.

Each record holds whole checkpoints; items are given as their regions. What is written is what the
format asks for, so xfs_logprint and the kernel can read it as well. Nobody may have the image open.
Where a checkpoint may begin and how many share a record is this writer's own; the bytes of
operations and headers are those of fs/log.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fs.device.image import ImageFile
from fs.log import head, iclog, items, record
from fs.log.iclog import Shape
from fs.log.region import Region, lsn_of, place_of
from fs.xfs import layout as L
from fs.xfs import superblock
from fs.xfs.geometry import Geometry

Items = Sequence[Sequence[bytes]]
ICLOG = 262144


def vector(item: Sequence[bytes]) -> bytes:
    """An item as it lies in memory before it is logged."""
    return b"".join(struct.pack("<I", len(region)) + region for region in item)


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

    def __init__(self, image: Path, device: type[ImageFile] = ImageFile) -> None:
        self.device = device(str(image))
        self.geo: Geometry
        self._tail = 0

    async def open(self) -> LogWriter:
        raw = bytearray(32768)
        await self.device.read(0, [memoryview(raw)])
        self.geo = superblock.geometry(superblock.read(raw, self.device.size))
        self.region = Region(self.device, self.geo)
        self.ends = ends = await head.find(self.region)
        self._shape = Shape.of(self.geo, ICLOG)
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
        shape, lsn = self._shape, lsn_of(self._cycle, self._bb)
        rec, at, ops = np.zeros(shape.size, np.uint8), shape.headers << L.BB_LOG, 0
        for tid, checkpoint in enumerate(checkpoints, 0x1000 + self._bb):
            raw = b"".join(map(vector, checkpoint))
            regions = sum(map(len, checkpoint))
            cursor = iclog.cursor(tid, regions)
            vectors = np.array([[0, len(raw), regions]])
            mem = np.frombuffer(bytearray(raw), np.uint8)
            at = iclog.fill(mem, vectors, cursor, rec, at, shape.size)
            assert cursor[iclog.C_STAGE] == iclog.DONE, "more than a record"
            ops += int(cursor[iclog.C_OPS])
        bbs, wrap = shape.bbs(at), self.region.bbs - self._bb
        template = record.template(shape.size, self.geo.log_uuid)
        lsns = np.uint64(lsn), np.uint64(self._tail)
        record.seal(rec, template, shape.headers, at, bbs, *lsns, L.NULL32, ops, wrap)
        await self.region.write(self._bb, rec[: bbs << L.BB_LOG].reshape(-1, L.BB_SIZE))
        self._bb += bbs
        if self._bb >= self.region.bbs:
            self._bb, self._cycle = self._bb - self.region.bbs, self._cycle + 1
        return lsn
