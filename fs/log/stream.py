"""The log's writer: checkpoints, record by record, from the head on.

Records are made in a few buffers (iclogs) in the arena and written from there; while some are on
their way the next one is filled. A checkpoint that has begun is written to its end, whoever is
cancelled. Nobody flushes but `write` between the records of a large checkpoint, so that no more
than TORN_BBS are ever unstable: that is how far whoever looks for the log's ends looks for holes.
Its callers flush before (what the checkpoint exposes) and after it (then it counts).

Invariants: `head` is where the next record will be; every record begins there. A record never
covers the tail that it names, nor fills the log up to it: a full ring would look like an empty one.
After an error of the device there may be a hole: `dead` is that error, and nobody writes any more.

Locking: trio thread only; one `write` at a time.
"""

from __future__ import annotations

import numpy as np
import trio
from numpy.typing import NDArray

from alloc import gfp
from alloc.arena import Arena
from alloc.page import PAGE_SHIFT
from fs.log import closing, iclog, record
from fs.log.head import TORN_BBS, Ends
from fs.log.iclog import LENGTH_BYTES, Shape
from fs.log.region import Blocks, Region, lsn_of
from fs.xfs import layout as L

ICLOGS = 4  # buffers; a device has seldom use for more, each waits for a thread
Vectors = NDArray[np.int64]  # (vectors, 3): address, bytes, regions


class LogOverrun(Exception):
    """What was to be written does not fit between the head and the tail; nothing was written."""


class Stream:
    """The log of one image, from where its records end. Raises ValueError for a bad size."""

    def __init__(
        self, region: Region, arena: Arena, ends: Ends, logbsize: int = iclog.SIZE_LEAST
    ) -> None:
        self._region, self._arena, self._ends = region, arena, ends
        self._bb, self._cycle, self._last = ends.head, ends.cycle, ends.last
        self.shape = Shape.of(region.geo, logbsize)
        self._template = record.template(self.shape.size, region.uuid)
        self._give, self._take = trio.open_memory_channel[int](ICLOGS)  # addresses of idle iclogs
        self.dead: OSError | None = None

    async def start(self) -> None:
        """Take memory, and clear away what torn writes left ahead. Raises OSError."""
        order = (self.shape.size - 1 >> PAGE_SHIFT).bit_length()
        for _ in range(ICLOGS):
            pfn = await self._arena.alloc_folio(order, gfp.KERNEL)
            self._give.send_nowait(pfn << PAGE_SHIFT)
        await closing.clear_ahead(self._region, self._ends)
        await self._region.flush()

    def stop(self) -> None:
        """Give the memory back; nothing may be on its way."""
        for _ in range(ICLOGS):
            self._arena.put_folio(self._take.receive_nowait() >> PAGE_SHIFT)

    # -- room -----------------------------------------------------------------------------------

    @property
    def head(self) -> int:
        """LSN of the next record."""
        return lsn_of(self._cycle, self._bb)

    def bbs_free(self, tail: int) -> int:
        """BBs between the head and a tail; what is written must leave one of them free."""
        return self._region.room(self.head, tail)

    def bbs_for(self, nbytes: int, regions: int) -> int:
        """The most BBs that a checkpoint with so many bytes in so many regions takes."""
        return self.shape.bbs_for(nbytes, regions)

    def _check(self, bbs: int, tail: int) -> None:
        if self.dead is not None:
            raise self.dead
        free = self.bbs_free(tail)
        if not bbs < free <= self._region.bbs:
            raise LogOverrun(
                f"log overrun: {bbs} BBs at {self.head:#x}, {free} are free to the tail {tail:#x}"
            )

    def _advance(self, bbs: int) -> None:
        self._last = self._bb
        self._bb += bbs
        if self._bb >= self._region.bbs:
            self._bb -= self._region.bbs
            self._cycle = record.next_cycle(self._cycle)

    # -- records --------------------------------------------------------------------------------

    async def write(self, vectors: Vectors, tail: int) -> int:
        """One checkpoint; returns its start LSN, that of the record that it begins with.

        All its records name `tail`: where recovery is to begin, at the latest with this one.
        Raises OSError, also the one of an earlier write; LogOverrun.
        """
        broken = iclog.first_broken(self._arena.mem, vectors)
        assert broken < 0, f"log vector {broken} is not what it says"
        nbytes, regions = int(vectors[:, 1].sum()), int(vectors[:, 2].sum())
        self._check(self.bbs_for(nbytes - LENGTH_BYTES * regions, regions), tail)
        start = self.head
        cursor = iclog.cursor(self._tid(), regions)
        with trio.CancelScope(shield=True):
            await self._write_window(vectors, cursor, tail)
            while cursor[iclog.C_STAGE] != iclog.DONE:
                await self._flush()
                await self._write_window(vectors, cursor, tail)
        return start

    def _tid(self) -> int:
        """A number that no other checkpoint in the log has, for none begins where it does."""
        return self._cycle * self._region.bbs + self._bb & 0xFFFFFFFF

    async def _write_window(self, vectors: Vectors, cursor: Vectors, tail: int) -> None:
        """Records until the checkpoint is done, or until no more may be unstable."""
        bbs = 0
        async with trio.open_nursery() as nursery:
            while cursor[iclog.C_STAGE] != iclog.DONE:
                address = await self._take.receive()
                if self.dead is not None or bbs + (self.shape.size >> L.BB_LOG) > TORN_BBS:
                    self._give.send_nowait(address)
                    break
                bb, blocks = self._bb, self._fill(address, vectors, cursor, tail)
                bbs += len(blocks)
                nursery.start_soon(self._put, address, bb, blocks)
        if self.dead is not None:
            raise self.dead

    def _fill(self, address: int, vectors: Vectors, cursor: Vectors, tail: int) -> Blocks:
        """The next record of a checkpoint, at the head, which it moves."""
        shape, mem = self.shape, self._arena.mem
        rec = mem[address : address + shape.size]
        used = iclog.fill(mem, vectors, cursor, rec, shape.headers << L.BB_LOG, shape.size)
        bbs, lsn, wrap = shape.bbs(used), self.head, self._region.bbs - self._bb
        record.seal(
            *(rec, self._template, shape.headers, used, bbs),
            *(np.uint64(lsn), np.uint64(tail), self._last, cursor[iclog.C_OPS], wrap),
        )
        self._advance(bbs)
        return rec[: bbs << L.BB_LOG].reshape(-1, L.BB_SIZE)

    async def _put(self, address: int, bb: int, blocks: Blocks) -> None:
        await self._write_blocks(bb, blocks)
        self._give.send_nowait(address)

    async def _write_blocks(self, bb: int, blocks: Blocks) -> None:
        try:
            await self._region.write(bb, blocks)
        except OSError as error:
            self.dead = self.dead or error

    async def _flush(self) -> None:
        try:
            await self._region.flush()
        except OSError as error:
            self.dead = error
            raise

    async def unmount(self, tail: int) -> None:
        """The record that says that everything is at home. Raises OSError, LogOverrun."""
        blocks = closing.unmount_record(self._region, self.shape, self.head, self._last)
        self._check(len(blocks), tail)
        bb = self._bb
        self._advance(len(blocks))
        with trio.CancelScope(shield=True):
            await self._write_blocks(bb, blocks)
        if self.dead is not None:
            raise self.dead
