"""The ends of the log: where it goes on, from where it must be replayed, and whether at all.

XFS format, log: BBs before the head carry the current cycle, those behind it an older one, so the
head is found by bisection. What was written last may be torn: there may be holes within
TORN_BBS before the head, the last record may be incomplete, and CRCs of the last few may be wrong.
What comes before the first such place counts, nothing behind it. The last record that counts says
where the tail is. The log is clean if that is an unmount record.

Reads only. Anything that no writer leaves behind raises BadLog: the image is refused then.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fs.log import record
from fs.log.region import Blocks, Region, lsn_of, place_of
from fs.xfs import layout as L

RECORDS_UNDER_WAY = 8  # iclogs that may have been written at once
TORN_BBS = RECORDS_UNDER_WAY * (256 << 10) // L.BB_SIZE
FLAGS_IN_OP = 9  # byte of the flags in an operation header


class BadLog(Exception):
    """The log is not what any writer leaves behind; says where and what."""


class Ends(NamedTuple):
    """Where to go on, and from where to replay; they are the same place in a clean log."""

    head: int  # BB
    cycle: int  # of what is written there
    tail: int  # LSN
    clean: bool
    last: int  # BB of the record before the head
    size: int = 0  # of iclogs, in a dirty log: replay takes all records for such


class Header(NamedTuple):
    """A record's header as far as it is needed to find one's way."""

    bb: int
    cycle: int
    length: int  # data bytes
    headers: int  # BBs
    tail_lsn: int
    ops: int

    @property
    def bbs(self) -> int:
        """The whole record's."""
        return self.headers + self.length // L.BB_SIZE

    @property
    def lsn(self) -> int:
        """Its own."""
        return lsn_of(self.cycle, self.bb)


def cycles(blocks: Blocks) -> NDArray[np.uint32]:
    """The stamp of each block."""
    words = np.ascontiguousarray(blocks[:, :8]).view(">u4")
    stamps = np.where(words[:, 0] == L.MAGIC_LOG_RECORD, words[:, 1], words[:, 0])
    return stamps.astype(np.uint32)


def parse(block: NDArray[np.uint8], bb: int, uuid: bytes) -> Header:
    """A header block. Raises BadLog."""
    raw: Any = block[: L.LOG_RECORD_HEADER.itemsize].view(L.LOG_RECORD_HEADER)[0]
    size, length = int(raw["size"]), int(raw["len"])
    if raw["magic"] != L.MAGIC_LOG_RECORD:
        raise BadLog(f"no record begins at block {bb} of the log")
    if raw["uuid"].tobytes() != uuid:
        raise BadLog(f"the record at block {bb} of the log is another filesystem's")
    if raw["version"] != record.VERSION or raw["fmt"] != record.LITTLE_ENDIAN_LINUX:
        raise BadLog(f"the record at block {bb} of the log is of another version or machine")
    if length > max(size, record.HEADER_DATA) or length % L.BB_SIZE:
        raise BadLog(f"the record at block {bb} of the log has {length} bytes of {size}")
    headers = record.header_bbs(size)
    tail_lsn, ops = int(raw["tail_lsn"]), int(raw["num_logops"])
    return Header(bb, int(raw["cycle"]), length, headers, tail_lsn, ops)


def _cycle_behind(cycle: int, wraps: bool) -> int:
    return int(record.next_cycle(cycle)) if wraps else cycle


class _Search:
    def __init__(self, region: Region) -> None:
        self._region = region
        self._bbs = region.bbs

    async def _cycle(self, bb: int) -> int:
        return int(cycles(await self._region.read(bb, 1))[0])

    async def first_other(self) -> tuple[int, int]:
        """(first BB that has not BB 0's cycle, or the log's end; that cycle)."""
        cycle = await self._cycle(0)
        low, high = 0, self._bbs  # low has block 0's cycle, high does not (or is the end)
        while high - low > 1:
            middle = (low + high) // 2
            if await self._cycle(middle) == cycle:
                low = middle
            else:
                high = middle
        return high, cycle

    async def before_holes(self, head: int, cycle: int) -> int:
        """The head, or the first hole not far before it: a BB that an older cycle left."""
        back = min(TORN_BBS, self._bbs)
        stamps = cycles(await self._region.read(head - back, back))
        due = np.full(back, cycle, np.uint32)
        if head < back:  # the ring's end is of the cycle before
            due[: back - head] = record.last_cycle(cycle)
        holes = np.flatnonzero(stamps != due)
        return head if not holes.size else (head - back + int(holes[0])) % self._bbs

    async def last_header(self, end: int) -> Header:
        """The record that begins last before a BB. Raises BadLog."""
        back = min(TORN_BBS, self._bbs)
        blocks = await self._region.read(end - back, back)
        magic = np.ascontiguousarray(blocks[:, :4]).view(">u4")[:, 0]
        found = np.flatnonzero(magic == L.MAGIC_LOG_RECORD)
        if not found.size:
            raise BadLog(f"no record ends before block {end} of the log")
        at = int(found[-1])
        return parse(blocks[at], (end - back + at) % self._bbs, self._region.uuid)

    def ends_at(self, header: Header) -> tuple[int, int]:
        """(BB behind a record, cycle of what is written there)."""
        end = header.bb + header.bbs
        return end % self._bbs, _cycle_behind(header.cycle, end >= self._bbs)

    async def last_complete(self, head: int) -> Header:
        """The last record before a place that is there as a whole. Raises BadLog."""
        for _ in range(RECORDS_UNDER_WAY):
            header = await self.last_header(head)
            if header.length and self.ends_at(header)[0] == head % self._bbs:
                return header
            head = header.bb
        raise BadLog(f"no complete record ends before block {head} of the log")

    async def is_whole(self, header: Header) -> bool:
        """Whether a record's CRC is right."""
        blocks = await self._region.read(header.bb, header.bbs)
        return crc_of(blocks, header) == stored_crc(blocks)

    async def before_torn(self, last: Header) -> Header:
        """The last record of which and of those right before it all CRCs are right."""
        recent = [last]
        while len(recent) < RECORDS_UNDER_WAY and recent[0].lsn > last.tail_lsn:
            recent.insert(0, await self.last_header(recent[0].bb))
        for n, header in enumerate(recent):
            if not await self.is_whole(header):
                if not n:
                    raise BadLog(f"CRC of the record at block {header.bb} of the log")
                return recent[n - 1]
        return last

    async def first_header(self, bb: int, end: int) -> Header:
        """The record that begins first from a BB on, not far behind it. Raises BadLog."""
        count = min(TORN_BBS, (end - bb) % self._bbs)
        blocks = await self._region.read(bb, count)
        magic = np.ascontiguousarray(blocks[:, :4]).view(">u4")[:, 0]
        found = np.flatnonzero(magic == L.MAGIC_LOG_RECORD)
        if not found.size:
            raise BadLog(f"no record begins behind block {bb} of the log")
        at = int(found[0])
        return parse(blocks[at], (bb + at) % self._bbs, self._region.uuid)

    async def past_overwritten(self, tail: int, head: int) -> int:
        """The tail's LSN, or that of the record behind what torn writes did to the first ones.

        Writes that got lost may have been about to say that the tail has moved; others that were
        under way with them have then overwritten what was the tail.
        """
        cycle, bb = place_of(tail)
        lost = False
        while lost or 0 < (bb - head) % self._bbs <= TORN_BBS:
            header = await self.first_header(bb, head)
            cycle = _cycle_behind(cycle, header.bb < bb)
            lost = lost or header.bb != bb
            if header.cycle == cycle and header.length and await self.is_whole(header):
                tail = header.lsn if lost else tail
                lost, (bb, cycle) = False, self.ends_at(header)
            else:
                lost, bb = True, header.bb + 1
        return tail

    async def is_unmount(self, header: Header) -> bool:
        """Whether a record says that everything before it is at home."""
        if header.ops != 1:
            return False
        data = await self._region.read(header.bb + header.headers, 1)
        return bool(data[0][FLAGS_IN_OP] & L.LOG_OP_UNMOUNT)


def crc_of(blocks: Blocks, header: Header) -> int:
    """What a stamped record's CRC is to be."""
    return int(record.crc(blocks.reshape(-1), header.headers, header.length))


def stored_crc(blocks: Blocks) -> int:
    """What it says that it is."""
    return int(blocks[0][record.CRC_AT : record.CRC_AT + 4].view("<u4")[0])


async def find(region: Region) -> Ends:
    """Both ends. Raises BadLog, OSError."""
    search = _Search(region)
    other, cycle = await search.first_other()
    last = await search.last_complete(await search.before_holes(other, cycle))
    if await search.is_unmount(last):
        head, cycle = search.ends_at(last)
        return Ends(head, cycle, lsn_of(cycle, head), True, last.bb)
    last = await search.before_torn(last)
    head, cycle = search.ends_at(last)
    tail_cycle, tail = place_of(last.tail_lsn)
    same = tail_cycle == last.cycle and tail <= last.bb
    before = tail_cycle == record.last_cycle(last.cycle) and tail > last.bb and tail < region.bbs
    if not same and not before:
        raise BadLog(f"the tail {last.tail_lsn:#x} that the record at block {last.bb} names")
    tail = await search.past_overwritten(last.tail_lsn, head)
    return Ends(head, cycle, tail, False, last.bb, last.headers * record.HEADER_DATA)
