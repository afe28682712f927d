"""Log records: one write of the log, a header of one or more BBs and data behind it.

XFS format, log: the first word of every data BB is kept in the header, and in its place stands the
cycle, so that whoever looks for the head of the log knows each BB's age. 64 such words fit into the
header's first BB, as many into each further one. The CRC covers what stands on the device, stamps
included. A record may go over the end of the ring: stamps behind it are those of the next cycle.

Kernels take a record as one array of bytes, its BBs in a row; nothing here is shared.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.jit import helper, kernel
from fs.xfs import layout as L
from fs.xfs.crc import TABLE, extend

HEADER_DATA = 32768  # data bytes whose words one header BB keeps
WORDS = 64
CYCLE_DATA = 44  # where they stand in the first header BB; in the others behind the cycle
CRC_AT = 32
HEADER_BYTES = L.LOG_RECORD_HEADER.itemsize
EXTENDED_BYTES = 4 + 4 * WORDS


def header_bbs(size: int) -> int:
    """BBs of the header of records of an iclog of `size` bytes."""
    return max(1, -(-size // HEADER_DATA))


@helper
def _kept_at(i):
    """Where the word of data BB `i` is kept."""
    block = i // WORDS
    return block * L.BB_SIZE + (CYCLE_DATA if block == 0 else 4) + 4 * (i % WORDS)


@helper
def _put(rec, at, value):
    for k in range(4):
        rec[at + k] = np.uint8(value >> 24 - 8 * k & 0xFF)


@kernel("void(u1[::1], i8, i8, i8, i8)")
def stamp(rec, headers, bbs, cycle, wrap):
    """Stamp a record of `headers` and then `bbs` data BBs; from its BB `wrap` on with cycle + 1."""
    for i in range(bbs):
        at = (headers + i) * L.BB_SIZE
        kept = _kept_at(i)
        for k in range(4):
            rec[kept + k] = rec[at + k]
        _put(rec, at, cycle + 1 if headers + i >= wrap else cycle)
    for i in range(1, headers):
        _put(rec, i * L.BB_SIZE, cycle + 1 if i >= wrap else cycle)


@kernel("void(u1[::1], i8, i8)")
def unstamp(rec, headers, bbs):
    """Put the words back that `stamp` took away."""
    for i in range(bbs):
        at = (headers + i) * L.BB_SIZE
        kept = _kept_at(i)
        for k in range(4):
            rec[at + k] = rec[kept + k]


@kernel("u4(u1[::1], i8, i8)")
def crc(rec, headers, length):
    """CRC of a stamped record with `length` data bytes."""
    low = extend(np.uint32(0xFFFFFFFF), rec, 0, CRC_AT)
    for _ in range(4):
        low = TABLE[low & np.uint32(0xFF)] ^ (low >> np.uint32(8))
    low = extend(low, rec, CRC_AT + 4, HEADER_BYTES - CRC_AT - 4)
    for i in range(1, -(-length // HEADER_DATA)):
        low = extend(low, rec, i * L.BB_SIZE, EXTENDED_BYTES)
    low = extend(low, rec, headers * L.BB_SIZE, length)
    return np.uint32(~low)
