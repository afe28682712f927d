"""Inodes on disk: checking one, and moving it between its cluster and memory.

An inode is a core of 176 bytes and a literal area that its two forks share (XFS format: dinode
v3). Clusters of them are the unit of I/O. The in-core record holds the core in native integers
and `image_addr`, where the inode's image lies in the arena; both forks stay there in on-disk
form, so unpacking is a few loads and one copy.

`verify` looks at everything that a later reader trusts: the kernel's own checks, and beyond them
the order and place of each extent record, the B+tree roots and short attributes. Short
directories are checked where they are read. `di_next_unlinked` lives in the cluster buffer only:
`pack` leaves it alone. Stamps are bigtime nanoseconds in memory whatever the image has.

Nothing here waits.
"""

from __future__ import annotations

import stat
from functools import lru_cache
from typing import Any

import numpy as np

from alloc.jit import helper, kernel
from fs.cache.buf import Buf, BufOps
from fs.xfs import extents as X
from fs.xfs import layout as L
from fs.xfs.be import get16, get32, get64, put16, put32, put64
from fs.xfs.crc import crc_ok, crc_stamp
from fs.xfs.extents import fsb_in_ag
from fs.xfs.geometry import Geometry

LITERAL = L.LITERAL
NULL32 = L.NULL32
FMT_DEV, FMT_LOCAL, FMT_EXTENTS, FMT_BTREE = L.FMT_DEV, L.FMT_LOCAL, L.FMT_EXTENTS, L.FMT_BTREE
DATA, ATTR = 0, 1

# Extent counts an inode may have (XFS format), without and with the NREXT64 flag.
DATA_EXTENTS_MAX, ATTR_EXTENTS_MAX = (1 << 31) - 1, (1 << 15) - 1
DATA_EXTENTS_MAX_BIG, ATTR_EXTENTS_MAX_BIG = (1 << 48) - 1, (1 << 32) - 1

NSEC = 10**9
EPOCH = L.BIGTIME_EPOCH_SECONDS
STAMPS = ("atime", "mtime", "ctime", "crtime")


def _off(field: str) -> int:
    return L.off(L.DINODE, field)


MODE, VERSION, FORMAT, UID, GID = map(_off, ("mode", "version", "format", "uid", "gid"))
NLINK, PROJID_LO, PROJID_HI = map(_off, ("nlink", "projid_lo", "projid_hi"))
BIG_NEXTENTS, ATIME, MTIME, CTIME = map(_off, ("big_nextents", "atime", "mtime", "ctime"))
SIZE, NBLOCKS, EXTSIZE, NEXTENTS = map(_off, ("size", "nblocks", "extsize", "nextents"))
ANEXTENTS, FORKOFF, AFORMAT = map(_off, ("anextents", "forkoff", "aformat"))
FLAGS, GEN, NEXT_UNLINKED, CRC = map(_off, ("flags", "gen", "next_unlinked", "crc"))
LSN = _off("lsn")
CHANGECOUNT, FLAGS2, COWEXTSIZE = map(_off, ("changecount", "flags2", "cowextsize"))
CRTIME, INO, UUID = map(_off, ("crtime", "ino", "uuid"))
FLAGS2_BIGTIME, FLAGS2_NREXT64 = L.DIFLAG2_BIGTIME, L.DIFLAG2_NREXT64
FLAGS2_REFLINK, FLAGS2_COWEXTSIZE = L.DIFLAG2_REFLINK, L.DIFLAG2_COWEXTSIZE
FLAG_REALTIME, FLAG_EXTSIZE = L.DIFLAG_REALTIME, L.DIFLAG_EXTSIZE
FLAG_EXTSZINHERIT = L.DIFLAG_EXTSZINHERIT
MAGIC = L.MAGIC_DINODE
IFMT, IFREG, IFDIR, IFLNK = 0o170000, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK
IFIFO, IFCHR, IFBLK, IFSOCK = stat.S_IFIFO, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFSOCK
DIR_SIZE_MAX = 1 << 35

REASONS = (
    "",
    "bad magic",
    "bad checksum",
    "bad version",
    "wrong inode number",
    "wrong uuid",
    "bad next unlinked inode",
    "negative size",
    "unknown file type",
    "directory or symlink without size",
    "more extents than blocks, or blocks without extents",
    "bad extent count width",
    "realtime file",
    "bad fork offset",
    "data format does not fit the file type",
    "size does not fit the data format",
    "too many extents for the fork",
    "attribute format without an attribute fork",
    "bad extent size hint",
    "flag of a feature that the filesystem lacks",
    "extent records out of order",
    "impossible extent record",
    "extent outside its allocation group",
    "unwritten extent in the attribute fork",
    "fewer blocks than its extents have",
    "bad B+tree root",
    "bad short attributes",
    "bad short symlink",
    "more directory blocks than a directory may have",
)
(
    OK,
    BAD_MAGIC,
    BAD_CRC,
    BAD_VERSION,
    BAD_INO,
    BAD_UUID,
    BAD_UNLINKED,
    BAD_SIZE,
    BAD_TYPE,
    NO_SIZE,
    BAD_BLOCKS,
    BAD_WIDTH,
    IS_REALTIME,
    BAD_FORKOFF,
    BAD_FORMAT,
    BAD_LOCAL,
    TOO_MANY,
    BAD_AFORMAT,
    BAD_HINT,
    BAD_FLAG,
    EXTENT_ORDER,  # EXTENT_ORDER - 1 + the code of extents.check
    EXTENT_SHAPE,
    EXTENT_PLACE,
    EXTENT_UNWRITTEN,
    TOO_FEW_BLOCKS,
    BAD_ROOT,
    BAD_SHORT_ATTR,
    BAD_SYMLINK,
    BAD_DIR_EXTENTS,
) = range(len(REASONS))


def bmbt_maxrecs(fork_bytes: int) -> int:
    """Keys and pointers that a B+tree root in a fork has room for (XFS format: bmdr root)."""
    return max(0, (fork_bytes - L.BMBT_ROOT.itemsize) // 16)


def _levels(geo: Geometry, extents: int, root_space: int) -> int:
    """Height of the tallest fork tree: every block at its minimum (XFS format: bm_maxlevels)."""
    least = (geo.block_size - L.LONG_BLOCK.itemsize) // X.REC_BYTES // 2
    blocks = -(-extents // least)
    level = 1
    while blocks > 1:
        blocks = 1 if blocks <= root_space else -(-blocks // least)
        level += 1
    return level


def levels_max(geo: Geometry, fork: int) -> int:
    """Most levels of a fork's B+tree, the root in the inode included."""
    if fork == DATA:
        extents = DATA_EXTENTS_MAX_BIG if geo.has_nrext64 else DATA_EXTENTS_MAX
        return _levels(geo, extents, 3)
    extents = ATTR_EXTENTS_MAX_BIG if geo.has_nrext64 else ATTR_EXTENTS_MAX
    return _levels(geo, extents, 2)


@lru_cache(maxsize=16)
def limits(geo: Geometry) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The numbers of a geometry that kernels need, indexed by the constants of `extents`."""
    numbers = np.zeros(X.LIMITS, np.int64)
    numbers[X.INODE_SIZE] = geo.inode_size
    numbers[X.BLOCK_LOG] = geo.block_log
    numbers[X.AGCOUNT] = geo.agcount
    numbers[X.AG_BLOCKS] = geo.ag_blocks
    numbers[X.AG_BLOCK_LOG] = geo.ag_block_log
    numbers[X.LAST_AG_BLOCKS] = geo.ag_length(geo.agcount - 1)
    numbers[X.AG_HEADER_BLOCKS] = geo.ag_header_blocks
    numbers[X.FEATURES] = (
        X.FEATURE_REFLINK * geo.has_reflink
        | X.FEATURE_BIGTIME * geo.has_bigtime
        | X.FEATURE_NREXT64 * geo.has_nrext64
    )
    numbers[X.DATA_LEVELS_MAX] = levels_max(geo, DATA)
    numbers[X.ATTR_LEVELS_MAX] = levels_max(geo, ATTR)
    numbers[X.DIR_EXTENTS_MAX] = 3 * DIR_SIZE_MAX >> geo.block_log
    numbers[X.AGINO_LOG] = geo.agino_log
    return numbers


@lru_cache(maxsize=16)
def uuid_bytes(geo: Geometry) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The uuid that metadata carries, for kernels."""
    return np.frombuffer(geo.uuid, np.uint8).copy()


def new_flags2(geo: Geometry) -> int:
    """flags2 of an inode that is made now, and of a free one."""
    return FLAGS2_BIGTIME * geo.has_bigtime | FLAGS2_NREXT64 * geo.has_nrext64


# -- checking ----------------------------------------------------------------------------------


@helper
def _nextents(mem, addr):
    """(data extents, attribute extents) of an inode image."""
    if get64(mem, addr + FLAGS2) & np.uint64(FLAGS2_NREXT64):
        data = get64(mem, addr + BIG_NEXTENTS) & np.uint64(0x7FFFFFFFFFFFFFFF)
        return np.int64(data), get32(mem, addr + NEXTENTS)
    return get32(mem, addr + NEXTENTS), get16(mem, addr + ANEXTENTS)


@helper
def _valid_agino(agino, limits):
    blocks = agino >> (limits[X.AGINO_LOG] - limits[X.AG_BLOCK_LOG])
    return limits[X.AG_HEADER_BLOCKS] <= blocks and blocks < limits[X.AG_BLOCKS]


@helper
def _check_identity(mem, addr, ino, uuid, limits):
    if get16(mem, addr) != MAGIC:
        return BAD_MAGIC
    if mem[addr + VERSION] != 3:
        return BAD_VERSION
    if not crc_ok(mem, addr, limits[X.INODE_SIZE], CRC):
        return BAD_CRC
    if get64(mem, addr + INO) != np.uint64(ino):
        return BAD_INO
    for i in range(16):
        if mem[addr + UUID + i] != uuid[i]:
            return BAD_UUID
    unlinked = get32(mem, addr + NEXT_UNLINKED)
    if unlinked != NULL32 and not _valid_agino(unlinked, limits):
        return BAD_UNLINKED
    return OK


@helper
def _check_counts(mem, addr, limits):
    """Extent counts against blocks and against what the flags allow."""
    features = limits[X.FEATURES]
    flags2 = get64(mem, addr + FLAGS2)
    data, attr = _nextents(mem, addr)
    if flags2 & np.uint64(FLAGS2_NREXT64):
        if not features & X.FEATURE_NREXT64 or get16(mem, addr + ANEXTENTS) != 0:
            return BAD_WIDTH
        if data > DATA_EXTENTS_MAX_BIG:
            return TOO_MANY
    elif get64(mem, addr + BIG_NEXTENTS) != np.uint64(0):
        return BAD_WIDTH
    elif data > DATA_EXTENTS_MAX or attr > ATTR_EXTENTS_MAX:
        return TOO_MANY
    blocks = get64(mem, addr + NBLOCKS)
    if np.uint64(data) + np.uint64(attr) > blocks:
        return BAD_BLOCKS
    if data + attr == 0 and blocks != np.uint64(0):
        return BAD_BLOCKS
    return OK


@helper
def _check_hints(mem, addr, mode, limits):
    """Extent size hints and feature flags."""
    kind = mode & IFMT
    flags, flags2 = get16(mem, addr + FLAGS), get64(mem, addr + FLAGS2)
    extsize, cow = get32(mem, addr + EXTSIZE), get32(mem, addr + COWEXTSIZE)
    hint, inherit = flags & FLAG_EXTSIZE, flags & FLAG_EXTSZINHERIT
    reflink = limits[X.FEATURES] & X.FEATURE_REFLINK
    most = limits[X.AG_BLOCKS] // 2
    if (hint and kind != IFREG) or (inherit and kind != IFDIR):
        return BAD_HINT
    if (hint or inherit) and (extsize == 0 or extsize > most):
        return BAD_HINT
    if not hint and not inherit and mode != 0 and extsize != 0:
        return BAD_HINT
    if flags2 & np.uint64(FLAGS2_COWEXTSIZE):
        if not reflink or (kind != IFREG and kind != IFDIR) or cow == 0 or cow > most:
            return BAD_HINT
    elif mode != 0 and cow != 0:
        return BAD_HINT
    if flags2 & np.uint64(FLAGS2_REFLINK) and (not reflink or (mode != 0 and kind != IFREG)):
        return BAD_FLAG
    if flags2 & np.uint64(FLAGS2_BIGTIME) and not limits[X.FEATURES] & X.FEATURE_BIGTIME:
        return BAD_FLAG
    return OK


@helper
def _check_root(mem, at, size, fork, n, limits):
    """A B+tree root in a fork of `size` bytes whose tree holds n extents."""
    most = (size - 4) // 16
    level, count = get16(mem, at), get16(mem, at + 2)
    if level < 1 or level >= limits[X.DATA_LEVELS_MAX + fork]:
        return BAD_ROOT
    if count < 1 or count > most or n <= size // X.REC_BYTES:
        return BAD_ROOT
    keys, pointers = at + 4, at + 4 + 8 * most
    for i in range(count):
        key = get64(mem, keys + 8 * i)
        if key >= np.uint64(X.FILE_OFFSET_MAX):
            return BAD_ROOT
        if i > 0 and key <= get64(mem, keys + 8 * (i - 1)):
            return BAD_ROOT
        pointer = get64(mem, pointers + 8 * i)
        if pointer >= np.uint64(1 << 52) or not fsb_in_ag(np.int64(pointer), 1, limits):
            return BAD_ROOT
    return OK


@helper
def _check_fork(mem, at, size, form, fork, n, limits):
    """The contents of one fork, short data excepted."""
    if form == FMT_EXTENTS:
        if n > size // X.REC_BYTES:
            return TOO_MANY
        return OK
    if form == FMT_BTREE:
        return _check_root(mem, at, size, fork, n, limits)
    if form == FMT_LOCAL:
        return TOO_MANY if n != 0 else OK
    return BAD_FORMAT if fork == 0 else BAD_AFORMAT


@helper
def _check_short_attr(mem, at, size):
    """Short attributes: every entry inside totsize, and the last one ends there."""
    total, count = get16(mem, at), np.int64(mem[at + 2])
    if total < 4 or total > size:
        return BAD_SHORT_ATTR
    end = np.int64(4)
    for _ in range(count):
        if end + 3 > total or mem[at + end] == 0:
            return BAD_SHORT_ATTR
        if mem[at + end + 2] & ~np.uint8(0x2 | 0x4 | 0x8):
            return BAD_SHORT_ATTR
        end += 3 + np.int64(mem[at + end]) + np.int64(mem[at + end + 1])
    return OK if end == total else BAD_SHORT_ATTR


@helper
def _check_symlink(mem, at, size):
    """A short symlink: 1 to 1023 bytes without a zero."""
    if size < 1 or size > 1023:
        return BAD_SYMLINK
    for i in range(size):
        if mem[at + i] == 0:
            return BAD_SYMLINK
    return OK


@helper
def _check_data_fork(mem, addr, mode, data, literal, limits):
    kind = mode & IFMT
    form, forkoff = np.int64(mem[addr + FORMAT]), np.int64(mem[addr + FORKOFF])
    size = np.int64(get64(mem, addr + SIZE))
    fork = forkoff * 8 if forkoff else literal
    if kind in (IFIFO, IFCHR, IFBLK, IFSOCK):
        return OK if form == FMT_DEV and data == 0 else BAD_FORMAT
    if kind not in (IFREG, IFDIR, IFLNK):
        return BAD_TYPE
    if form == FMT_DEV or (kind == IFREG and form == FMT_LOCAL):
        return BAD_FORMAT
    nlink = get32(mem, addr + NLINK)
    if kind != IFREG and size == 0 and nlink != 0:
        return NO_SIZE
    if kind == IFDIR:
        if size > DIR_SIZE_MAX or (size != 0 and size <= fork and form != FMT_LOCAL):
            return BAD_LOCAL
        if data > limits[X.DIR_EXTENTS_MAX]:
            return BAD_DIR_EXTENTS
    if size > fork and form == FMT_LOCAL:
        return BAD_LOCAL
    if kind == IFLNK and form == FMT_LOCAL and size != 0:
        return _check_symlink(mem, addr + LITERAL, size)
    return _check_fork(mem, addr + LITERAL, fork, form, 0, data, limits)


@helper
def _check_attr_fork(mem, addr, attr, literal, limits):
    forkoff, form = np.int64(mem[addr + FORKOFF]), np.int64(mem[addr + AFORMAT])
    if forkoff == 0:
        # A freshly initialised chunk has format 0, everything later EXTENTS.
        return OK if (form == 0 or form == FMT_EXTENTS) and attr == 0 else BAD_AFORMAT
    if forkoff * 8 >= literal:
        return BAD_FORKOFF
    if np.int64(mem[addr + FORMAT]) == FMT_DEV and forkoff != 1:
        return BAD_FORKOFF
    at, size = addr + LITERAL + forkoff * 8, literal - forkoff * 8
    if form == FMT_LOCAL:
        return TOO_MANY if attr != 0 else _check_short_attr(mem, at, size)
    return _check_fork(mem, at, size, form, 1, attr, limits)


@helper
def _check_maps(mem, addr, data, attr, literal, limits):
    """The records of forks in EXTENTS format, and their sum against nblocks."""
    forkoff = np.int64(mem[addr + FORKOFF])
    blocks = np.int64(0)
    if mem[addr + FORMAT] == FMT_EXTENTS:
        code, found = X.check(mem, addr + LITERAL, data, 0, 0, limits)
        if code:
            return EXTENT_ORDER - 1 + code
        blocks += found
    if forkoff and mem[addr + AFORMAT] == FMT_EXTENTS:
        code, found = X.check(mem, addr + LITERAL + forkoff * 8, attr, 0, 1, limits)
        if code:
            return EXTENT_ORDER - 1 + code
        blocks += found
    return TOO_FEW_BLOCKS if np.uint64(blocks) > get64(mem, addr + NBLOCKS) else OK


@kernel("i8(u1[::1], i8, i8, u1[::1], i8[::1])")
def verify_image(mem, addr, ino, uuid, limits):
    """Check one inode of a cluster; returns an index of REASONS, 0 if it is good."""
    literal = limits[X.INODE_SIZE] - LITERAL
    code = np.int64(_check_identity(mem, addr, ino, uuid, limits))
    if code:
        return code
    mode = get16(mem, addr + MODE)
    if get64(mem, addr + SIZE) >> np.uint64(63):
        return np.int64(BAD_SIZE)
    if mode == 0:  # free: what else it says means nothing
        return np.int64(OK)
    code = np.int64(_check_counts(mem, addr, limits))
    if code:
        return code
    if get16(mem, addr + FLAGS) & FLAG_REALTIME:
        return np.int64(IS_REALTIME)
    data, attr = _nextents(mem, addr)
    code = np.int64(_check_attr_fork(mem, addr, attr, literal, limits))
    if code:
        return code
    code = np.int64(_check_data_fork(mem, addr, mode, data, literal, limits))
    if code:
        return code
    code = np.int64(_check_hints(mem, addr, mode, limits))
    if code:
        return code
    return np.int64(_check_maps(mem, addr, data, attr, literal, limits))


def verify(geo: Geometry, mem: Any, addr: int, ino: int) -> str:
    """What is wrong with the inode image at mem[addr:], "" if nothing is.

    A free inode (mode 0) is good if its identity is.
    """
    return REASONS[verify_image(mem, addr, ino, uuid_bytes(geo), limits(geo))]


# -- between cluster and memory ----------------------------------------------------------------


def _core_types() -> tuple[Any, ...]:
    from fs.cache.inode import INODE

    return (np.zeros(1, np.uint8), 0, np.zeros(1, INODE), 0)


@helper
def _stamp_in(mem, at, bigtime):
    """A stamp as bigtime nanoseconds."""
    raw = get64(mem, at)
    if bigtime:
        return raw
    seconds = np.int64(np.int32(raw >> np.uint64(32)))
    nanoseconds = raw & np.uint64(0xFFFFFFFF)
    return np.uint64(seconds + EPOCH) * np.uint64(NSEC) + nanoseconds


@helper
def _stamp_out(mem, at, value, bigtime):
    """Write a stamp; without bigtime it is clamped to what 32 bits of seconds hold."""
    if bigtime:
        put64(mem, at, value)
        return
    seconds = np.int64(value // np.uint64(NSEC)) - EPOCH
    nanoseconds = np.int64(value % np.uint64(NSEC))
    if seconds > 0x7FFFFFFF:
        seconds, nanoseconds = np.int64(0x7FFFFFFF), np.int64(NSEC - 1)
    put32(mem, at, seconds & 0xFFFFFFFF)
    put32(mem, at + 4, nanoseconds)


@kernel(_core_types)
def unpack_core(mem, addr, table, i):
    """Load the core of the inode image at mem[addr:] into record i of the table."""
    to = table[i]
    to.ino = np.int64(get64(mem, addr + INO))
    to.gen = get32(mem, addr + GEN)
    to.mode = get16(mem, addr + MODE)
    to.uid = get32(mem, addr + UID)
    to.gid = get32(mem, addr + GID)
    to.nlink = get32(mem, addr + NLINK)
    to.projid = (get16(mem, addr + PROJID_HI) << 16) | get16(mem, addr + PROJID_LO)
    to.size = np.int64(get64(mem, addr + SIZE))
    to.disk_size = np.int64(get64(mem, addr + SIZE))
    to.nblocks = np.int64(get64(mem, addr + NBLOCKS))
    to.flags = get16(mem, addr + FLAGS)
    flags2 = get64(mem, addr + FLAGS2)
    to.flags2 = flags2
    to.extsize = get32(mem, addr + EXTSIZE)
    to.cowextsize = get32(mem, addr + COWEXTSIZE)
    data, attr = _nextents(mem, addr)
    to.nextents = data
    to.anextents = attr
    to.forkoff = np.int64(mem[addr + FORKOFF])
    form = np.int64(mem[addr + FORMAT])
    to.format = form
    to.aformat = np.int64(mem[addr + AFORMAT])
    to.rdev = get32(mem, addr + LITERAL) if form == FMT_DEV else np.int64(0)
    to.changecount = get64(mem, addr + CHANGECOUNT)
    to.lsn = np.int64(get64(mem, addr + LSN))
    bigtime = (flags2 & np.uint64(FLAGS2_BIGTIME)) != np.uint64(0)
    to.atime = _stamp_in(mem, addr + ATIME, bigtime)
    to.mtime = _stamp_in(mem, addr + MTIME, bigtime)
    to.ctime = _stamp_in(mem, addr + CTIME, bigtime)
    to.crtime = _stamp_in(mem, addr + CRTIME, bigtime)


@helper
def _pack_counts(mem, addr, record, flags2):
    if flags2 & np.uint64(FLAGS2_NREXT64):
        put64(mem, addr + BIG_NEXTENTS, np.uint64(record.nextents))
        put32(mem, addr + NEXTENTS, np.int64(record.anextents))
        put16(mem, addr + ANEXTENTS, 0)
    else:
        put64(mem, addr + BIG_NEXTENTS, np.uint64(0))
        put32(mem, addr + NEXTENTS, np.int64(record.nextents))
        put16(mem, addr + ANEXTENTS, np.int64(record.anextents))


def core_types() -> tuple[Any, ...]:
    """Arguments of kernels that make a core of a record."""
    return (*_core_types(), np.zeros(16, np.uint8), np.zeros(1, np.int64))


@helper
def put_core(mem, addr, table, i, uuid, limits):
    """Store record i of the table into the core at mem[addr:].

    Neither next_unlinked, nor crc, nor lsn, nor what is always 0 are touched.
    """
    record = table[i]
    flags2 = np.uint64(record.flags2)
    if limits[X.FEATURES] & X.FEATURE_BIGTIME:
        flags2 |= np.uint64(FLAGS2_BIGTIME)
    bigtime = (flags2 & np.uint64(FLAGS2_BIGTIME)) != np.uint64(0)
    put16(mem, addr, MAGIC)
    put16(mem, addr + MODE, np.int64(record.mode))
    mem[addr + VERSION] = np.uint8(3)
    mem[addr + FORMAT] = np.uint8(record.format)
    put32(mem, addr + UID, np.int64(record.uid))
    put32(mem, addr + GID, np.int64(record.gid))
    put32(mem, addr + NLINK, np.int64(record.nlink))
    put16(mem, addr + PROJID_LO, np.int64(record.projid) & 0xFFFF)
    put16(mem, addr + PROJID_HI, np.int64(record.projid) >> 16)
    put64(mem, addr + SIZE, np.uint64(record.disk_size))
    put64(mem, addr + NBLOCKS, np.uint64(record.nblocks))
    put16(mem, addr + FLAGS, np.int64(record.flags))
    put64(mem, addr + FLAGS2, flags2)
    put32(mem, addr + EXTSIZE, np.int64(record.extsize))
    put32(mem, addr + COWEXTSIZE, np.int64(record.cowextsize))
    _pack_counts(mem, addr, record, flags2)
    mem[addr + FORKOFF] = np.uint8(record.forkoff)
    mem[addr + AFORMAT] = np.uint8(record.aformat)
    put32(mem, addr + GEN, np.int64(record.gen))
    put64(mem, addr + CHANGECOUNT, np.uint64(record.changecount))
    _stamp_out(mem, addr + ATIME, np.uint64(record.atime), bigtime)
    _stamp_out(mem, addr + MTIME, np.uint64(record.mtime), bigtime)
    _stamp_out(mem, addr + CTIME, np.uint64(record.ctime), bigtime)
    _stamp_out(mem, addr + CRTIME, np.uint64(record.crtime), bigtime)
    put64(mem, addr + INO, np.uint64(record.ino))
    for k in range(16):
        mem[addr + UUID + k] = uuid[k]


@helper
def is_device(record):
    """Has an inode in core a device number for its data fork? A free one has none."""
    return record.format == FMT_DEV and record.mode != 0


@kernel(core_types)
def pack_core(mem, addr, table, i, uuid, limits):
    """Store record i of the table into the inode image at mem[addr:] and stamp its CRC.

    Neither the literal area (but for rdev) nor next_unlinked are touched.
    """
    put_core(mem, addr, table, i, uuid, limits)
    put64(mem, addr + LSN, np.uint64(table[i].lsn))
    if is_device(table[i]):
        put32(mem, addr + LITERAL, np.int64(table[i].rdev))
    crc_stamp(mem, addr, limits[X.INODE_SIZE], CRC)


def unpack(geo: Geometry, mem: Any, addr: int, table: Any, i: int, image: Any, at: int) -> None:
    """Take a verified inode into memory: core into record i, image to image[at:]."""
    unpack_core(mem, addr, table, i)
    image[at : at + geo.inode_size] = mem[addr : addr + geo.inode_size]


def pack(geo: Geometry, table: Any, i: int, image: Any, at: int, mem: Any, addr: int) -> None:
    """Put an inode into its cluster at mem[addr:]: forks from image[at:], then the core, CRC.

    The cluster keeps its next_unlinked.
    """
    end = geo.inode_size
    mem[addr + LITERAL : addr + end] = image[at + LITERAL : at + end]
    pack_core(mem, addr, table, i, uuid_bytes(geo), limits(geo))


# -- free inodes and clusters ------------------------------------------------------------------


@kernel("void(u1[::1], i8, i8, i8, i8, u1[::1], i8[::1])")
def init_free(mem, addr, n, ino, gen, uuid, limits):
    """Write n free inodes from number `ino` on: the template of a new chunk (XFS format)."""
    size = limits[X.INODE_SIZE]
    for i in range(n):
        at = addr + i * size
        mem[at : at + size] = 0
        put16(mem, at, MAGIC)
        mem[at + VERSION] = np.uint8(3)
        put32(mem, at + GEN, gen)
        put32(mem, at + NEXT_UNLINKED, NULL32)
        put64(mem, at + INO, np.uint64(ino + i))
        for k in range(16):
            mem[at + UUID + k] = uuid[k]
        crc_stamp(mem, at, size, CRC)


@kernel("void(u1[::1], i8, i8, i8)")
def set_next_unlinked(mem, addr, agino, inode_size):
    """Change the unlinked link of the inode image at mem[addr:]."""
    put32(mem, addr + NEXT_UNLINKED, agino)
    crc_stamp(mem, addr, inode_size, CRC)


@kernel("i8(u1[::1], i8)")
def next_unlinked(mem, addr):
    """agino of the next inode on the unlinked list; NULL32 at its end."""
    return get32(mem, addr + NEXT_UNLINKED)


@kernel("i8(u1[::1], i8)")
def generation(mem, addr):
    """Generation of the inode image at mem[addr:]."""
    return get32(mem, addr + GEN)


def is_free(mem: Any, addr: int) -> bool:
    """Is the inode image at mem[addr:] one of a free inode?"""
    return not mem[addr + MODE] and not mem[addr + MODE + 1]


@kernel("i8(u1[::1], i8, i8, i8[::1])")
def verify_cluster_image(mem, addr, n, limits):
    """Check what must hold for each of n inodes, free ones too; returns an index of REASONS."""
    for i in range(n):
        at = addr + i * limits[X.INODE_SIZE]
        if get16(mem, at) != MAGIC:
            return np.int64(BAD_MAGIC)
        if mem[at + VERSION] != 3:
            return np.int64(BAD_VERSION)
        unlinked = get32(mem, at + NEXT_UNLINKED)
        if unlinked != NULL32 and not _valid_agino(unlinked, limits):
            return np.int64(BAD_UNLINKED)
    return np.int64(OK)


def _verify_cluster(geo: Geometry, buf: Buf, owner: int | None) -> str:
    count = buf.size // geo.inode_size
    return REASONS[verify_cluster_image(buf.mem, buf.addr, count, limits(geo))]


INODE_OPS = BufOps("inode cluster", None, _verify_cluster)


def init_chunk(geo: Geometry, mem: Any, addr: int, count: int, ino: int, gen: int) -> None:
    """Fill a new cluster with free inodes; `gen` is one random number for the chunk."""
    init_free(mem, addr, count, ino, gen, uuid_bytes(geo), limits(geo))
