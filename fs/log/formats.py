"""Formats: log items written as vectors, which is how they wait in memory for their checkpoint.

A vector is contiguous bytes: for each region its length, a little-endian u4 that is a multiple of
4, and then so many bytes. The first region says what the item is; `items.py` reads the same. Each
put_* kernel writes the vector of one item to mem[at:] and returns how many regions it has; a
*_bytes kernel tells the exact size before, and what is logged must not change in between. Nothing
here allocates or waits. Sources and targets lie in one array, the arena.

XFS format, log: buffer, inode and inode create items. Little-endian, but for what is copied from
blocks and forks as it is there, and for the body of an inode create item. The root of an extent
tree is longer than in the inode: it has a block's header, and its pointers follow its last key.

Chunk maps are u4 words, bit i of them 128 bytes of a buffer. A buffer in several parts is one item
for each: `daddr`, `addr` and `size` are the part's, and the content type is that of the whole.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from alloc.jit import helper, kernel
from alloc.libc import memcpy, memset
from fs.log import blocks
from fs.log.items import (
    ADATA,
    BUF,
    BUF_HEAD,
    CANCEL,
    CHUNK,
    CORE,
    DBROOT,
    DDATA,
    DEV,
    DEXT,
    ICREATE,
    ICREATE_BODY,
    ICREATE_HEAD,
    INODE,
    INODE_BUF,
    INODE_HEAD,
    TYPE_SHIFT,
)
from fs.xfs import extents as X
from fs.xfs import inode as inodes
from fs.xfs import layout as L
from fs.xfs.be import get16, get32, get64, put16, put32, put64
from fs.xfs.geometry import Geometry

LENGTH = 4  # bytes in front of each region
WORD_BITS = 32
WORD_BYTES = WORD_BITS * CHUNK  # of a buffer, that a word of its chunk map stands for
BUF_HEAD_BYTES, INODE_HEAD_BYTES, ICREATE_BODY_AT = BUF_HEAD.size, INODE_HEAD.size, ICREATE_HEAD
ICREATE_BYTES = ICREATE_HEAD + ICREATE_BODY.size
CREATE_BYTES = LENGTH + ICREATE_BYTES  # of an inode create item's vector
DINODE_KIND = blocks.DINODE
LITERAL, NEXT_UNLINKED = L.LITERAL, L.off(L.DINODE, "next_unlinked")
FLAGS2, FLAGS2_BIGTIME = L.off(L.DINODE, "flags2"), L.DIFLAG2_BIGTIME
FMT_LOCAL, FMT_EXTENTS, FMT_BTREE = L.FMT_LOCAL, L.FMT_EXTENTS, L.FMT_BTREE
REC_BYTES = X.REC_BYTES
ROOT_KEYS = L.BMBT_ROOT.itemsize
ROOT_ENTRY = 16  # bytes of a key and its pointer
LONG_HEAD, MAGIC_BMBT = L.LONG_BLOCK.itemsize, L.MAGIC_BMBT
LONG_NUMRECS, LONG_SIBLINGS = L.off(L.LONG_BLOCK, "numrecs"), L.off(L.LONG_BLOCK, "leftsib")
LONG_LSN, LONG_UUID = L.off(L.LONG_BLOCK, "lsn"), L.off(L.LONG_BLOCK, "uuid")
LONG_OWNER = L.off(L.LONG_BLOCK, "owner")
RDEV_AT = 24  # in an inode item's head
ATTR_SHIFT = (ADATA // DDATA).bit_length() - 1  # from a data fork's flag to the attribute fork's


def _numbers() -> list[tuple[int, int]]:
    """(offset, bytes) of a core's fields whose order of bytes the log turns round."""
    found = []
    for name in L.DINODE.names or ():
        kind = L.DINODE[name]
        if kind.kind in "iu" and kind.itemsize > 1 and name not in inodes.STAMPS:
            found.append((L.off(L.DINODE, name), kind.itemsize))
    return found


NUMBERS = np.array(_numbers(), np.int64)
STAMPS = np.array([L.off(L.DINODE, name) for name in inodes.STAMPS], np.int64)


@helper
def _put(mem, at, width, value):
    """A little-endian number."""
    for k in range(width):
        mem[at + k] = np.uint8((value >> (8 * k)) & 0xFF)


@helper
def _put_region(mem, at, addr, size):
    """A region with bytes from mem[addr:], zeroes up to a multiple of 4; where the next begins."""
    padded = (size + 3) & ~3
    _put(mem, at, LENGTH, padded)
    memcpy(mem, at + LENGTH, mem, addr, size)
    memset(mem, at + LENGTH + size, 0, padded - size)
    return at + LENGTH + padded


# -- buffers --------------------------------------------------------------------------------------


@helper
def _words(size):
    return (size + WORD_BYTES - 1) // WORD_BYTES


@helper
def _is_set(bits, word, chunk):
    return bits[word + chunk // WORD_BITS] >> np.uint32(chunk % WORD_BITS) & np.uint32(1) != 0


@helper
def _put_buffer_head(mem, at, flags, daddr, size):
    """The head but for the number of regions, with an empty chunk map; where that is."""
    words = _words(size)
    _put(mem, at, LENGTH, BUF_HEAD_BYTES + 4 * words)
    _put(mem, at + 4, 2, BUF)
    _put(mem, at + 8, 2, flags)
    _put(mem, at + 10, 2, size >> L.BB_LOG)
    _put(mem, at + 12, 8, daddr)
    _put(mem, at + 20, 4, words)
    memset(mem, at + LENGTH + BUF_HEAD_BYTES, 0, 4 * words)
    return at + LENGTH + BUF_HEAD_BYTES


@kernel("i8(i8)")
def cancel_bytes(size):
    """Size of the vector that cancels a buffer of `size` bytes."""
    return LENGTH + BUF_HEAD_BYTES + 4 * _words(size)


@kernel("i8(u1[::1], i8, i8, i8)")
def put_cancel(mem, at, daddr, size):
    """What is older about a freed block of `size` bytes is not to be replayed."""
    _put_buffer_head(mem, at, CANCEL, daddr, size)
    _put(mem, at + 6, 2, 1)
    return np.int64(1)


@kernel("i8(i8)")
def whole_bytes(size):
    """Size of the vector of a whole buffer of `size` bytes."""
    return cancel_bytes(size) + LENGTH + size


@kernel("i8(u1[::1], i8, i8, i8, i8, i8)")
def put_whole(mem, at, kind, daddr, addr, size):
    """All chunks of a buffer; `kind` is its content type."""
    bits = _put_buffer_head(mem, at, kind << TYPE_SHIFT, daddr, size)
    chunks = size // CHUNK
    for k in range((chunks + 7) // 8):
        mem[bits + k] = np.uint8((1 << min(8, chunks - 8 * k)) - 1)
    _put(mem, at + 6, 2, 2)
    _put_region(mem, bits + 4 * _words(size), addr, size)
    return np.int64(2)


@kernel("void(u4[::1], i8, i8, i8)")
def mark(bits, word, first, last):
    """Bytes first..last of a buffer changed, says the chunk map that begins with bits[word]."""
    for chunk in range(first // CHUNK, last // CHUNK + 1):
        bits[word + chunk // WORD_BITS] |= np.uint32(1) << np.uint32(chunk % WORD_BITS)


def mark_unlinked(bits: Any, word: int, index: int, inode_size: int) -> None:
    """The pointer of the cluster's inode `index` changed."""
    first = index * inode_size + NEXT_UNLINKED
    mark(bits, word, first, first + 3)


@kernel("i8(i8, u4[::1], i8)")
def chunks_bytes(size, bits, word):
    """Size of the vector of a buffer's marked chunks."""
    total = np.int64(cancel_bytes(size))
    before = False
    for chunk in range(size // CHUNK):
        now = _is_set(bits, word, chunk)
        if now:
            total += CHUNK if before else LENGTH + CHUNK
        before = now
    return total


@helper
def _put_chunks(mem, at, flags, daddr, addr, size, bits, word):
    """A head, and a region for each run of marked chunks."""
    to = _put_buffer_head(mem, at, flags, daddr, size)
    for k in range(_words(size)):
        _put(mem, to, 4, np.int64(bits[word + k]))
        to += 4
    regions, chunk = np.int64(1), np.int64(0)
    while chunk < size // CHUNK:
        end = chunk
        while end < size // CHUNK and _is_set(bits, word, end):
            end += 1
        if end > chunk:
            to = _put_region(mem, to, addr + chunk * CHUNK, (end - chunk) * CHUNK)
            regions += 1
        chunk = end + 1
    _put(mem, at + 6, 2, regions)
    return regions


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, u4[::1], i8)")
def put_chunks(mem, at, kind, daddr, addr, size, bits, word):
    """The marked chunks of a buffer; `kind` is its content type."""
    return _put_chunks(mem, at, kind << TYPE_SHIFT, daddr, addr, size, bits, word)


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, u4[::1], i8)")
def put_unlinked(mem, at, daddr, addr, size, inode_size, bits, word):
    """The unlinked pointers that are marked in an inode cluster; its inodes are not logged by it.

    0 if one of them is 0: that is no inode, and with it no recovery would end.
    """
    for pointer in range(NEXT_UNLINKED, size, inode_size):
        if _is_set(bits, word, pointer // CHUNK) and get32(mem, addr + pointer) == 0:
            return np.int64(0)
    flags = DINODE_KIND << TYPE_SHIFT | INODE_BUF
    return _put_chunks(mem, at, flags, daddr, addr, size, bits, word)


# -- new inodes -----------------------------------------------------------------------------------


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, i8, i8)")
def put_create(mem, at, agno, agbno, count, inode_size, nr_blocks, generation):
    """`count` free inodes were made in `nr_blocks` blocks; their clusters are in no item."""
    _put(mem, at, LENGTH, ICREATE_BYTES)
    _put(mem, at + 4, 2, ICREATE)
    _put(mem, at + 6, 2, 1)
    body = at + LENGTH + ICREATE_BODY_AT
    put32(mem, body, agno)
    put32(mem, body + 4, agbno)
    put32(mem, body + 8, count)
    put32(mem, body + 12, inode_size)
    put32(mem, body + 16, nr_blocks)
    put32(mem, body + 20, generation)
    return np.int64(1)


def create(geo: Geometry, agno: int, agbno: int, nr_blocks: int, generation: int) -> bytes:
    """The vector of `put_create` for all inodes of new blocks."""
    vector = np.zeros(CREATE_BYTES, np.uint8)
    count = nr_blocks << geo.inopblog
    put_create(vector, 0, agno, agbno, count, geo.inode_size, nr_blocks, generation)
    return vector.tobytes()


# -- inodes ---------------------------------------------------------------------------------------


@helper
def _fork(mem, addr, form, count, inline):
    """(flag, bytes) of what the log has of a fork at mem[addr:], the flag as for a data fork."""
    if form == FMT_LOCAL and inline > 0:
        return np.int64(DDATA), np.int64(inline)
    if form == FMT_EXTENTS and count > 0:
        return np.int64(DEXT), np.int64(REC_BYTES * count)
    if form == FMT_BTREE:
        return np.int64(DBROOT), np.int64(LONG_HEAD + ROOT_ENTRY * get16(mem, addr + 2))
    return np.int64(0), np.int64(0)


@helper
def _data_fork(mem, record, image):
    size = np.int64(record.disk_size)
    return _fork(mem, image + LITERAL, record.format, np.int64(record.nextents), size)


@helper
def _attr_fork(mem, record, image):
    if record.forkoff == 0:
        return np.int64(0), np.int64(0)
    addr = image + LITERAL + 8 * np.int64(record.forkoff)
    return _fork(mem, addr, record.aformat, np.int64(record.anextents), get16(mem, addr))


def _size_types() -> tuple[Any, ...]:
    mem, _, table, i, *_ = inodes.core_types()
    return (mem, table, i, 0)


@kernel(_size_types)
def inode_bytes(mem, table, i, image):
    """Size of the vector of the inode of record i, with its forks in the image at mem[image:]."""
    _, size = _data_fork(mem, table[i], image)
    _, asize = _attr_fork(mem, table[i], image)
    total = np.int64(2 * LENGTH + INODE_HEAD_BYTES + LITERAL)
    if size:
        total += LENGTH + ((size + 3) & ~3)
    if asize:
        total += LENGTH + ((asize + 3) & ~3)
    return total


@helper
def _swap(mem, at, width):
    for k in range(width // 2):
        mem[at + k], mem[at + width - 1 - k] = mem[at + width - 1 - k], mem[at + k]


@helper
def _put_core(mem, at, table, i, uuid, limits):
    """The core's region: as on disk, but little-endian, old stamps with their seconds first."""
    _put(mem, at, LENGTH, LITERAL)
    core = at + LENGTH
    memset(mem, core, 0, LITERAL)
    inodes.put_core(mem, core, table, i, uuid, limits)
    put32(mem, core + NEXT_UNLINKED, L.NULL32)  # is the cluster's
    bigtime = get64(mem, core + FLAGS2) & np.uint64(FLAGS2_BIGTIME) != np.uint64(0)
    for k in range(len(STAMPS)):
        if bigtime:
            _swap(mem, core + STAMPS[k], 8)
        else:
            _swap(mem, core + STAMPS[k], 4)
            _swap(mem, core + STAMPS[k] + 4, 4)
    for k in range(len(NUMBERS)):
        _swap(mem, core + NUMBERS[k, 0], NUMBERS[k, 1])
    return core + LITERAL


@helper
def _put_root(mem, at, addr, fork_bytes, ino, uuid):
    """The region of a fork's tree root: a block's header, its keys and behind them its pointers."""
    n = get16(mem, addr + 2)
    _put(mem, at, LENGTH, LONG_HEAD + ROOT_ENTRY * n)
    to = at + LENGTH
    memset(mem, to, 0, LONG_HEAD)
    put32(mem, to, MAGIC_BMBT)
    put16(mem, to + 4, get16(mem, addr))
    put16(mem, to + LONG_NUMRECS, n)
    memset(mem, to + LONG_SIBLINGS, 0xFF, LONG_LSN - LONG_SIBLINGS)  # nobody beside it, no block
    for k in range(16):
        mem[to + LONG_UUID + k] = uuid[k]
    put64(mem, to + LONG_OWNER, np.uint64(ino))
    to += LONG_HEAD
    most = (fork_bytes - ROOT_KEYS) // ROOT_ENTRY
    memcpy(mem, to, mem, addr + ROOT_KEYS, 8 * n)
    memcpy(mem, to + 8 * n, mem, addr + ROOT_KEYS + 8 * most, 8 * n)
    return to + ROOT_ENTRY * n


@helper
def _put_fork(mem, at, flag, size, addr, fork_bytes, ino, uuid):
    if flag == DBROOT:
        return _put_root(mem, at, addr, fork_bytes, ino, uuid)
    return _put_region(mem, at, addr, size) if size else np.int64(at)


def _inode_types() -> tuple[Any, ...]:
    mem, _, table, i, uuid, limits = inodes.core_types()
    return (mem, 0, table, i, 0, 0, 0, 0, uuid, limits)


@kernel(_inode_types)
def put_inode_item(mem, at, table, i, image, daddr, bbs, offset, uuid, limits):
    """An inode: its core, and all that its forks have; daddr, bbs and offset are its place."""
    record = table[i]
    flag, size = _data_fork(mem, record, image)
    aflag, asize = _attr_fork(mem, record, image)
    fields = CORE | flag | aflag << ATTR_SHIFT
    regions = np.int64(2 + (size > 0) + (asize > 0))
    head = at + LENGTH
    memset(mem, head, 0, INODE_HEAD_BYTES)
    if inodes.is_device(record):
        fields |= DEV
        _put(mem, head + RDEV_AT, 4, np.int64(record.rdev))
    _put(mem, at, LENGTH, INODE_HEAD_BYTES)
    _put(mem, head, 2, INODE)
    _put(mem, head + 2, 2, regions)
    _put(mem, head + 4, 4, fields)
    _put(mem, head + 8, 2, asize)
    _put(mem, head + 10, 2, size)
    _put(mem, head + 16, 8, np.int64(record.ino))
    _put(mem, head + 40, 8, daddr)
    _put(mem, head + 48, 4, bbs)
    _put(mem, head + 52, 4, offset)
    to = _put_core(mem, head + INODE_HEAD_BYTES, table, i, uuid, limits)
    literal = limits[X.INODE_SIZE] - LITERAL
    border = 8 * np.int64(record.forkoff)
    ino, data = np.int64(record.ino), image + LITERAL
    to = _put_fork(mem, to, flag, size, data, border if border else literal, ino, uuid)
    _put_fork(mem, to, aflag, asize, data + border, literal - border, ino, uuid)
    return regions


def put_inode(
    geo: Geometry, mem: Any, at: int, table: Any, i: int, image: int, place: tuple[int, int, int]
) -> int:
    """`put_inode_item` with what it needs of the geometry; `place` is as `inobt.imap` gives it."""
    uuid, limits = inodes.uuid_bytes(geo), inodes.limits(geo)
    return put_inode_item(mem, at, table, i, image, *place, uuid, limits)


# -- the layout itself ----------------------------------------------------------------------------


def regions_of(vector: bytes) -> list[bytes]:
    """The regions of a vector."""
    found, at = [], 0
    while at < len(vector):
        (size,) = struct.unpack_from("<I", vector, at)
        found.append(vector[at + LENGTH : at + LENGTH + size])
        at += LENGTH + size
    return found


def vector_of(regions: Sequence[bytes]) -> bytes:
    """A vector of regions that somebody packed: small items, of which there are few."""
    return b"".join(struct.pack("<I", len(region)) + region for region in regions)
