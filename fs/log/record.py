"""Log records: one write of the log, a header of one or more BBs and data behind it.

XFS format, log: the first word of every data BB is kept in the header, and in its place stands the
cycle, so that whoever looks for the head of the log knows each BB's age. 64 such words fit into the
header's first BB, as many into each further one. The CRC covers what stands on the device, stamps
included. A record may go over the end of the ring: stamps behind it are those of the next cycle.
No cycle has the number by which headers are known.

Kernels take a record as one array of bytes, its BBs in a row; nothing here is shared.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alloc.jit import helper, kernel
from alloc.libc import memcpy, memset
from fs.xfs import be
from fs.xfs import layout as L
from fs.xfs.crc import TABLE, extend

HEADER_DATA = 32768  # data bytes whose words one header BB keeps
WORDS = 64
VERSION, LITTLE_ENDIAN_LINUX = 2, 1  # of records, and of who writes items in them
CYCLE_AT, LENGTH_AT, LSN_AT, TAIL_AT, PREVIOUS_AT, OPS_AT = 4, 12, 16, 24, 36, 40
CYCLE_DATA = 44  # where they stand in the first header BB; in the others behind the cycle
CRC_AT = 32
HEADER_BYTES = L.LOG_RECORD_HEADER.itemsize
EXTENDED_BYTES = 4 + 4 * WORDS


def header_bbs(size: int) -> int:
    """BBs of the header of records of an iclog of `size` bytes."""
    return max(1, -(-size // HEADER_DATA))


def template(size: int, uuid: bytes) -> NDArray[np.uint8]:
    """What the first header BBs of all records of iclogs of `size` bytes have in common."""
    block = np.zeros(L.BB_SIZE, np.uint8)
    header = block[:HEADER_BYTES].view(L.LOG_RECORD_HEADER)[0]
    header["magic"], header["version"] = L.MAGIC_LOG_RECORD, VERSION
    header["fmt"], header["size"], header["uuid"] = LITTLE_ENDIAN_LINUX, size, np.void(uuid)
    return block


@kernel("i8(i8)")
def next_cycle(cycle):
    """The cycle in which the ring goes on at its start."""
    return cycle + (2 if cycle + 1 == L.MAGIC_LOG_RECORD else 1)


@kernel("i8(i8)")
def last_cycle(cycle):
    """The cycle before."""
    return cycle - (2 if cycle - 1 == L.MAGIC_LOG_RECORD else 1)


@helper
def _kept_at(i):
    """Where the word of data BB `i` is kept."""
    block = i // WORDS
    return block * L.BB_SIZE + (CYCLE_DATA if block == 0 else 4) + 4 * (i % WORDS)


@kernel("void(u1[::1], i8, i8, i8, i8)")
def stamp(rec, headers, bbs, cycle, wrap):
    """Stamp a record of `headers` and `bbs` data BBs; from its BB `wrap` on with the next cycle."""
    beyond = next_cycle(cycle)
    for i in range(bbs):
        at = (headers + i) * L.BB_SIZE
        kept = _kept_at(i)
        for k in range(4):
            rec[kept + k] = rec[at + k]
        be.put32(rec, at, beyond if headers + i >= wrap else cycle)
    for i in range(1, headers):
        be.put32(rec, i * L.BB_SIZE, beyond if i >= wrap else cycle)


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


@kernel("void(u1[::1], u1[::1], i8, i8, i8, u8, u8, i8, i8, i8)")
def seal(rec, template, headers, used, bbs, lsn, tail, previous, ops, wrap):
    """Make a record of `ops` operations that end at byte `used`: header, padding, stamps, CRC.

    It has `bbs` BBs with the header's; `previous` is the BB of the one before it, and BB `wrap` of
    it is where the ring begins again.
    """
    cycle, length = np.int64(lsn >> np.uint64(32)), (bbs - headers) * L.BB_SIZE
    memcpy(rec, 0, template, 0, L.BB_SIZE)
    memset(rec, L.BB_SIZE, 0, (headers - 1) * L.BB_SIZE)
    memset(rec, used, 0, bbs * L.BB_SIZE - used)
    be.put32(rec, CYCLE_AT, cycle)
    be.put32(rec, LENGTH_AT, length)
    be.put64(rec, LSN_AT, lsn)
    be.put64(rec, TAIL_AT, tail)
    be.put32(rec, PREVIOUS_AT, previous)
    be.put32(rec, OPS_AT, ops)
    stamp(rec, headers, bbs - headers, cycle, wrap)
    whole = crc(rec, headers, length)
    for k in range(4):
        rec[CRC_AT + k] = np.uint8(whole >> np.uint32(8 * k) & np.uint32(0xFF))
