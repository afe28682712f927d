"""Both ends of what a mount writes to the log: what was torn ahead goes; an unmount record ends it.

XFS format, log: behind the head there may be BBs that a write left half-done, with the cycle that
the head is going to write. They are covered with empty headers of the cycle before, or they would
be log as soon as the head has passed by. Then comes a record with one operation, UNMOUNT; a log
that ends with it is clean.

Writes nothing but the log.
"""

from __future__ import annotations

import struct

import numpy as np

from fs.log import record
from fs.log.checkpoints import LOG_CLIENT, OPERATION
from fs.log.head import TORN_BBS, Ends, cycles
from fs.log.iclog import Shape
from fs.log.region import Blocks, Region, lsn_of, place_of
from fs.xfs import layout as L

UNMOUNT_BODY = struct.pack("<HHI", 0x556E, 0, 0)


def _headers(region: Region, cycle: int, bb: int, count: int, tail: int) -> Blocks:
    """Headers of empty records at BBs from `bb` on."""
    blocks = np.tile(record.template(0, region.uuid), (count, 1))
    found = blocks[:, : L.LOG_RECORD_HEADER.itemsize].copy().view(L.LOG_RECORD_HEADER)[:, 0]
    found["cycle"] = cycle
    found["lsn"] = lsn_of(cycle, bb) + np.arange(count, dtype=np.uint64)
    found["tail_lsn"] = tail
    blocks[:, : L.LOG_RECORD_HEADER.itemsize] = found.view(np.uint8).reshape(count, -1)
    return blocks


async def clear_ahead(region: Region, ends: Ends) -> None:
    """Empty records from the head on, as far as writes may have been under way.

    Nothing is written if there is nothing of the cycle that is to come. Raises OSError.
    """
    count = min(TORN_BBS, region.room(lsn_of(ends.cycle, ends.head), ends.tail))
    first = min(count, region.bbs - ends.head)
    due = np.full(count, ends.cycle)
    due[first:] = record.next_cycle(ends.cycle)
    if not np.any(cycles(await region.read(ends.head, count)) == due):
        return
    before = record.last_cycle(ends.cycle)
    if first > 0:
        await region.write(ends.head, _headers(region, before, ends.head, first, ends.tail))
    if count > first:
        await region.write(0, _headers(region, ends.cycle, 0, count - first, ends.tail))


def unmount_record(region: Region, shape: Shape, lsn: int, previous: int) -> Blocks:
    """The record that says that everything is at home, for a place in the log."""
    body = OPERATION.pack(1, len(UNMOUNT_BODY), LOG_CLIENT, L.LOG_OP_UNMOUNT, 0) + UNMOUNT_BODY
    first = shape.headers << L.BB_LOG
    blocks = np.zeros((shape.bbs(first + len(body)), L.BB_SIZE), np.uint8)
    flat = blocks.reshape(-1)
    flat[first : first + len(body)] = np.frombuffer(body, np.uint8)
    wrap = region.bbs - place_of(lsn)[1]
    record.seal(
        *(flat, record.template(shape.size, region.uuid), shape.headers),
        *(first + len(body), len(blocks), np.uint64(lsn), np.uint64(lsn), previous, 1, wrap),
    )
    return blocks
