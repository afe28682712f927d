"""The end of a recovered log: what was torn goes, and an unmount record says that all is at home.

XFS format, log: behind the head there may be BBs that a write left half-done, with the cycle that
the head is going to write. They are covered with empty headers of the cycle before, or they would
be log as soon as the head has passed by. Then comes a record with one operation, UNMOUNT; a log
that ends with it is clean.

Writes nothing but the log. Whoever calls it has made stable everywhere else what the log said.
"""

from __future__ import annotations

import struct

import numpy as np

from fs.log import record
from fs.log.checkpoints import OPERATION
from fs.log.head import LITTLE_ENDIAN_LINUX, TORN_BBS, VERSION, Ends
from fs.log.region import Blocks, Region, lsn_of, place_of
from fs.xfs import layout as L

ICLOG_BYTES = 32768  # as mkfs and the kernel take it if nobody says otherwise; a stripe at least
LOG_CLIENT = 0xAA
UNMOUNT_BODY = struct.pack("<HHI", 0x556E, 0, 0)


def _headers(region: Region, cycle: int, bb: int, count: int, tail: int) -> Blocks:
    """Headers of empty records at BBs from `bb` on."""
    blocks = np.zeros((count, L.BB_SIZE), np.uint8)
    found = blocks[:, : L.LOG_RECORD_HEADER.itemsize].copy().view(L.LOG_RECORD_HEADER)[:, 0]
    found["magic"], found["version"] = L.MAGIC_LOG_RECORD, VERSION
    found["fmt"] = LITTLE_ENDIAN_LINUX
    found["cycle"] = cycle
    found["lsn"] = lsn_of(cycle, bb) + np.arange(count, dtype=np.uint64)
    found["tail_lsn"] = tail
    found["uuid"] = np.void(region.uuid)
    blocks[:, : L.LOG_RECORD_HEADER.itemsize] = found.view(np.uint8).reshape(count, -1)
    return blocks


async def _clear_ahead(region: Region, ends: Ends) -> None:
    """Empty records from the head on, as far as writes may have been under way."""
    tail_cycle, tail = place_of(ends.tail)
    room = tail - ends.head + (region.bbs if tail_cycle == ends.cycle else 0)
    count = min(TORN_BBS, room)
    first = min(count, region.bbs - ends.head)
    if first > 0:
        blocks = _headers(region, ends.cycle - 1, ends.head, first, ends.tail)
        await region.write(ends.head, blocks)
    if count > first:
        await region.write(0, _headers(region, ends.cycle, 0, count - first, ends.tail))


def _unmount_record(region: Region, ends: Ends) -> Blocks:
    lsn = lsn_of(ends.cycle, ends.head)
    unit = max(region.geo.log_sunit, region.geo.log_sector_size, 2 * L.BB_SIZE)
    size = max(ICLOG_BYTES, region.geo.log_sunit)
    bbs, headers = unit >> L.BB_LOG, record.header_bbs(size)
    length = (bbs - headers) << L.BB_LOG
    blocks = np.zeros((bbs, L.BB_SIZE), np.uint8)
    blocks[:1] = _headers(region, ends.cycle, ends.head, 1, lsn)
    header = blocks[0][: L.LOG_RECORD_HEADER.itemsize].view(L.LOG_RECORD_HEADER)
    header["len"], header["num_logops"] = length, 1
    header["size"], header["prev_block"] = size, L.NULL32
    body = OPERATION.pack(1, len(UNMOUNT_BODY), LOG_CLIENT, L.LOG_OP_UNMOUNT, 0) + UNMOUNT_BODY
    blocks[headers][: len(body)] = np.frombuffer(body, np.uint8)
    flat = blocks.reshape(-1)
    record.stamp(flat, headers, bbs - headers, ends.cycle, region.bbs - ends.head)
    header["crc"] = record.crc(flat, headers, length)
    return blocks


async def close(region: Region, ends: Ends) -> None:
    """Make a log clean that was replayed. Raises OSError."""
    await _clear_ahead(region, ends)
    await region.flush()
    await region.write(ends.head, _unmount_record(region, ends))
    await region.flush()
