"""What the log says, from its tail to its head: checkpoints, with the regions of their items.

XFS format, log: a record holds operations, each with the number of its transaction (of which
there is one kind, the checkpoint). One begins with START, has a header, then the regions of its
items, and counts once COMMIT was read; a region that does not fit into its record goes on in the
next one. Items are told apart by their first region, which says how many regions there are.

Reads one record at a time; a checkpoint is held in memory until it was handed on. What does not
fit together raises BadLog, for a record with a right CRC comes from a writer who got it wrong.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fs.log import head, record
from fs.log.head import BadLog, Header
from fs.log.region import Region, lsn_of, place_of
from fs.xfs import layout as L

OPERATION = struct.Struct(">IIBBH")  # tid, bytes, client, flags
START, COMMIT, CONTINUE, WAS_CONT, END = (1 << n for n in range(5))
TRANSACTION_CLIENT, LOG_CLIENT = 0x69, 0xAA
TRANSACTION = struct.Struct("<4sIII")  # magic, type, tid, regions
MAGIC = b"NART"
ITEM = struct.Struct("<HH")  # type, regions

Item = list[bytes]


@dataclass
class Checkpoint:
    """Everything between START and COMMIT; `lsn` is the record's in which START is."""

    lsn: int
    regions: list[bytes] = field(default_factory=list)

    def items(self) -> list[Item]:
        """Its items, in the order in which they were logged. Raises BadLog."""
        found: list[Item] = []
        rest = self.regions[1:]  # the first one is the transaction's header
        while rest:
            if len(rest[0]) < ITEM.size:
                raise BadLog(f"an item of {len(rest[0])} bytes in checkpoint {self.lsn:#x}")
            kind, count = ITEM.unpack_from(rest[0])
            if not 1 <= count <= len(rest):
                raise BadLog(f"item {kind:#x} of checkpoint {self.lsn:#x} has {count} regions")
            found.append(rest[:count])
            rest = rest[count:]
        return found


async def records(region: Region, tail: int, end: int) -> AsyncIterator[tuple[Header, bytes]]:
    """Each record from an LSN up to a BB, with its data as it was before it was stamped.

    Raises BadLog for one that is not whole.
    """
    cycle, bb = place_of(tail)
    first = True
    while first or bb != end:
        first = False
        block = await region.read(bb, 1)
        header = head.parse(block[0], bb, region.uuid)
        if header.cycle != cycle:
            raise BadLog(f"the record at block {bb} of the log is of cycle {header.cycle}")
        blocks = await region.read(bb, header.bbs)
        if head.crc_of(blocks, header) != head.stored_crc(blocks):
            raise BadLog(f"CRC of the record at block {bb} of the log")
        flat = blocks.reshape(-1)
        record.unstamp(flat, header.headers, header.length // L.BB_SIZE)
        yield header, flat[header.headers * L.BB_SIZE :].tobytes()
        bb += header.bbs
        if bb >= region.bbs:
            bb, cycle = bb - region.bbs, record.next_cycle(cycle)


async def committed(region: Region, tail: int, end: int) -> AsyncIterator[Checkpoint]:
    """The checkpoints that count, in the order of their COMMITs. Raises BadLog."""
    under_way: dict[int, Checkpoint] = {}
    async for header, data in records(region, tail, end):
        at = 0
        for _ in range(header.ops):
            if at + OPERATION.size > len(data):
                raise BadLog(f"the record at block {header.bb} of the log ends in an operation")
            tid, length, _, flags, _ = OPERATION.unpack_from(data, at)
            at += OPERATION.size
            payload = data[at : at + length]
            if len(payload) < length:
                raise BadLog(f"the record at block {header.bb} of the log ends in a region")
            at += length
            if flags & L.LOG_OP_UNMOUNT:
                continue
            if flags & START:
                under_way[tid] = Checkpoint(lsn_of(header.cycle, header.bb))
            elif tid not in under_way:
                continue  # it began before the tail
            elif flags & COMMIT:
                yield under_way.pop(tid)
            else:
                _add(under_way[tid], flags, payload)


def _add(checkpoint: Checkpoint, flags: int, payload: bytes) -> None:
    """A region, or what a region goes on with."""
    regions = checkpoint.regions
    if flags & WAS_CONT:
        if not regions:
            raise BadLog(f"checkpoint {checkpoint.lsn:#x} begins in the middle of a region")
        regions[-1] += payload
    elif not regions and TRANSACTION.unpack_from(payload.ljust(16))[0] != MAGIC:
        raise BadLog(f"checkpoint {checkpoint.lsn:#x} has no header")
    else:
        regions.append(payload)
