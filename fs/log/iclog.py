"""In-core log buffers (iclogs): how a checkpoint is cut into records.

XFS format, log: operations one behind the other: START, the transaction's header, each region of
each vector, COMMIT. A region that does not fit into what is left of an iclog goes on in the next
one, with an operation of its own; none is begun where no data would fit behind it. Every checkpoint
begins with a record, and all its records but the last are as large as an iclog.

A vector is (address, bytes, regions) of memory that holds for each region its length (4 bytes,
little-endian; a multiple of 4, not 0) and then the region. A cursor says how far a checkpoint got;
it starts with nothing but C_TID and C_REGIONS. Kernels read vectors and fill one iclog, which must
not be written meanwhile; nothing else is shared.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alloc.jit import helper, kernel
from alloc.libc import memcpy
from fs.log import checkpoints as C
from fs.log import record
from fs.xfs import be
from fs.xfs import layout as L
from fs.xfs.geometry import Geometry

SIZE_LEAST, SIZE_MOST = 32768, 262144
OP_BYTES = C.OPERATION.size
LEAST = OP_BYTES + 4  # bytes that must be left for an operation
KIND = 40  # of transaction: a checkpoint, the only one
MAGIC = int.from_bytes(C.MAGIC, "little")
LENGTH_BYTES = 4

# Words of a cursor.
C_TID, C_REGIONS, C_STAGE, C_VECTOR, C_OFFSET, C_LEFT, C_OPS, CURSOR_WORDS = range(8)
BEGIN, REGIONS, DONE = range(3)  # stages


class Shape(NamedTuple):
    """What the records of one writer have in common."""

    size: int  # bytes of an iclog
    headers: int  # BBs of each record
    unit: int  # bytes of which every record is a multiple

    @classmethod
    def of(cls, geo: Geometry, size: int = SIZE_LEAST) -> Shape:
        """For iclogs of `size` bytes, or of a stripe if that is more. Raises ValueError."""
        if not SIZE_LEAST <= size <= SIZE_MOST or size & (size - 1):
            raise ValueError(f"iclogs of {size} bytes: 32 KiB to 256 KiB, a power of two")
        if geo.log_sunit:
            size = max(size - size % geo.log_sunit, geo.log_sunit)
        unit = max(geo.log_sunit, geo.log_sector_size)
        return cls(size, record.header_bbs(size), unit)

    @property
    def capacity(self) -> int:
        """Bytes of operations in one record."""
        return self.size - (self.headers << L.BB_LOG)

    def bbs(self, used: int) -> int:
        """Of a record whose operations end at byte `used`."""
        return -(-used // self.unit) * self.unit >> L.BB_LOG

    def bbs_for(self, nbytes: int, regions: int) -> int:
        """The most BBs that a checkpoint takes: `nbytes` of data in so many regions.

        All that a further record costs, besides its header, is one more operation for a region
        that goes on, or the place in which none could begin: less than LEAST bytes.
        """
        nbytes += C.TRANSACTION.size + OP_BYTES * (regions + 3)
        records = -(-nbytes // (self.capacity - OP_BYTES))
        full, rest = divmod(nbytes + OP_BYTES * (records - 1), self.capacity)
        last = self.bbs((self.headers << L.BB_LOG) + rest) if rest else 0
        return full * (self.size >> L.BB_LOG) + last


def cursor(tid: int, regions: int) -> NDArray[np.int64]:
    """Of a checkpoint of which nothing is written yet."""
    words = np.zeros(CURSOR_WORDS, np.int64)
    words[C_TID], words[C_REGIONS] = tid, regions
    return words


@helper
def _get32(mem, at):
    """A little-endian word."""
    word = np.int64(0)
    for k in range(4):
        word |= np.int64(mem[at + k]) << 8 * k
    return word


@helper
def _put32(mem, at, word):
    for k in range(4):
        mem[at + k] = np.uint8(word >> 8 * k & 0xFF)


@helper
def _operation(rec, at, cursor, length, flags):
    """The header of an operation; returns where its data goes."""
    be.put32(rec, at, cursor[C_TID])
    be.put32(rec, at + 4, length)
    rec[at + 8], rec[at + 9] = C.TRANSACTION_CLIENT, flags
    be.put16(rec, at + 10, 0)
    cursor[C_OPS] += 1
    return at + OP_BYTES


@helper
def _begin(rec, at, cursor):
    at = _operation(rec, at, cursor, 0, C.START)
    at = _operation(rec, at, cursor, 16, 0)
    _put32(rec, at, MAGIC)
    _put32(rec, at + 4, KIND)
    _put32(rec, at + 8, cursor[C_TID])
    _put32(rec, at + 12, cursor[C_REGIONS])
    return at + 16


@helper
def _region(mem, vectors, cursor, rec, at, end):
    """The next region, or as much of it as fits."""
    start = vectors[cursor[C_VECTOR], 0]
    flags = C.WAS_CONT
    if not cursor[C_LEFT]:
        flags = 0
        cursor[C_LEFT] = _get32(mem, start + cursor[C_OFFSET])
        cursor[C_OFFSET] += LENGTH_BYTES
    count = min(cursor[C_LEFT], end - at - OP_BYTES)
    if count < cursor[C_LEFT]:
        flags |= C.CONTINUE
    elif flags:
        flags |= C.END
    at = _operation(rec, at, cursor, count, flags)
    memcpy(rec, at, mem, start + cursor[C_OFFSET], count)
    cursor[C_OFFSET] += count
    cursor[C_LEFT] -= count
    if not cursor[C_LEFT] and cursor[C_OFFSET] == vectors[cursor[C_VECTOR], 1]:
        cursor[C_VECTOR] += 1
        cursor[C_OFFSET] = 0
    return at + count


@kernel("i8(u1[::1], i8[:,::1], i8[::1], u1[::1], i8, i8)")
def fill(mem, vectors, cursor, rec, at, end):
    """Operations from byte `at` of a record to `end` at most; returns where they end.

    `mem` is what the vectors' addresses count in. C_OPS of the cursor is how many there are.
    """
    cursor[C_OPS] = 0
    if cursor[C_STAGE] == BEGIN:
        at = _begin(rec, at, cursor)
        cursor[C_STAGE] = REGIONS
    while cursor[C_VECTOR] < len(vectors) and end - at >= LEAST:
        at = _region(mem, vectors, cursor, rec, at, end)
    if cursor[C_VECTOR] == len(vectors) and end - at >= LEAST:
        at = _operation(rec, at, cursor, 0, C.COMMIT)
        cursor[C_STAGE] = DONE
    return at


@kernel("i8(u1[::1], i8[:,::1])")
def first_broken(mem, vectors):
    """The first vector that is not what it says, whole regions of which it has so many; or -1."""
    for i in range(len(vectors)):
        at, end, left = vectors[i, 0], vectors[i, 0] + vectors[i, 1], vectors[i, 2]
        if left < 1:
            return i
        while at + LENGTH_BYTES <= end and left:
            length = _get32(mem, at)
            if not length or length % 4:
                return i
            at += LENGTH_BYTES + length
            left -= 1
        if at != end or left:
            return i
    return -1
