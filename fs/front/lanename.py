"""Names and attributes in the lane: LOOKUP, GETATTR, STATX, STATFS, GETXATTR and ACCESS.

Each function serves the request in the lane's slot and says what came of it. It answers from what
is cached and free, and leaves everything else to the slow side, which gives the same bytes:
attributes are those of `fs/front/attrs.py`.

Who guards what. A record that a hash chain leads to stays one as long as the lane is in its RCU
section, which the lane's loop enters and leaves; that it still is the inode that was wanted is
checked under its ILOCK, held shared for the time of copying (a lane only tries to take it). Whoever
removes or reuses a record holds that lock exclusively. A name is looked up again under the lock, so
that it meant this inode while the inode was locked; the lookup is counted under it as well.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import errno

import numpy as np

from alloc.atomic import fetch_add, load_acquire
from alloc.jit import helper
from fs.cache.dentry import NAME_MAX, find_name
from fs.cache.incore import (
    I4_ANEXTENTS,
    I4_FORKOFF_FORMAT,
    I4_GEN,
    I4_GID,
    I4_ILOCK,
    I4_MAPPING,
    I4_MODE_FLAGS,
    I4_NLINK,
    I4_RDEV,
    I4_STATE,
    I4_UID,
    I8_ATIME,
    I8_CRTIME,
    I8_CTIME,
    I8_INO,
    I8_MTIME,
    I8_NBLOCKS,
    I8_NLOOKUP,
    I8_SIZE,
    INODE_WORDS,
    S_VALID,
    find_inode,
)
from fs.cache.lock import try_lock, unlock
from fs.cache.mapping import W_DELALLOC
from fs.front import wire
from fs.front.lanereply import OUT_BODY4, OUT_BODY8, bell, message, reply, u64
from fs.front.lanestate import (
    ANSWERED,
    B_LOCKS,
    BROKEN,
    FORWARD,
    G_BLKSIZE,
    G_BLOCK_LOG,
    G_BLOCK_SIZE,
    G_ROOT_INO,
    M_LEN,
    M_REASON,
    PARK,
    R_MISS,
)
from fs.space import T_AVAIL, T_BLOCKS, T_FFREE, T_FILES, T_FREE, T_VALID
from fs.xfs import layout as L

ROOT = 1  # FUSE's number of the root
CACHE_SECONDS = 3600  # attrs.CACHE_SECONDS
STATFS_NAMELEN = 255
SECOND = np.uint64(10**9)
EPOCH = L.BIGTIME_EPOCH_SECONDS
DOT = 46
GETXATTR_NAME = wire.BODY + 8
USER, SECURITY, TRUSTED, ACLS = (
    np.frombuffer(prefix, np.uint8)
    for prefix in (b"user.", b"security.", b"trusted.", b"system.posix_acl_")
)

# Bytes of a reply's body: struct fuse_entry_out, fuse_attr_out, fuse_statx_out, fuse_statfs_out.
ENTRY_BYTES, ATTR_BYTES, STATX_BYTES, STATFS_BYTES = 128, 104, 288, 80
# The body in words of 8 and of 4 bytes; attributes begin at 56 in an entry, at 32 in an attr_out.
ENTRY_ATTR, ATTR_ATTR = 40, 16
STATX_STAT = 32
STATX_MASK = 0xFFF  # STATX_BASIC_STATS and STATX_BTIME
STATX_IMMUTABLE, STATX_APPEND, STATX_NODUMP = 0x10, 0x20, 0x40
STATX_ATTRIBUTES = STATX_IMMUTABLE | STATX_APPEND | STATX_NODUMP


# -- finding ------------------------------------------------------------------------------------


@helper
def _ino_of(l, node):
    return l.geo[G_ROOT_INO] if node == ROOT else node


@helper
def _is(l, h, ino):
    """Is the record the inode that was wanted, and in use?"""
    at = h * INODE_WORDS
    if l.s8[(at >> 1) + I8_INO] != ino or np.int64(l.m4[at + I4_STATE]) & S_VALID == 0:
        return False
    return np.int64(l.m4[at + I4_MODE_FLAGS]) & 0xFFFF != 0


@helper
def _lock(l, ino):
    """The cached inode with its ILOCK held shared; 0 if it is not cached or that would wait."""
    h = find_inode(l.m4, l.s8, l.ibuckets, ino)
    if h == 0 or not try_lock(l.m4, h * INODE_WORDS + I4_ILOCK, True):
        return 0
    if _is(l, h, ino):
        return h
    _unlock(l, h)
    return 0


@helper
def _unlock(l, h):
    if unlock(l.m4, h * INODE_WORDS + I4_ILOCK, True):
        bell(l, B_LOCKS)


@helper
def _slow(l):
    """Not cached, or busy: trio's."""
    l.me[M_REASON] = R_MISS
    return PARK


# -- what replies are made of -------------------------------------------------------------------


@helper
def _blocks(l, at):
    """st_blocks of the record at m4[at]: 512-byte units, delayed blocks included."""
    blocks = l.s8[(at >> 1) + I8_NBLOCKS] + np.int64(l.m4[at + I4_MAPPING + W_DELALLOC])
    return blocks << (l.geo[G_BLOCK_LOG] - 9)


@helper
def _rdev(l, at):
    """(major, minor) of a device inode, (0, 0) of any other."""
    if (np.int64(l.m4[at + I4_FORKOFF_FORMAT]) >> 8) & 0xFF != L.FMT_DEV:
        return 0, 0
    stored = np.int64(l.m4[at + I4_RDEV])
    return (stored >> 18) & 0x1FF, stored & 0x3FFFF


@helper
def _time(l, word):
    """(seconds, nanoseconds) since 1970 of the bigtime stamp in m8[word]."""
    stamp = l.m8[word]
    return np.int64(stamp // SECOND) - EPOCH, np.int64(stamp % SECOND)


@helper
def _put_attr(l, h, ino, at):
    """struct fuse_attr of the inode, `at` bytes into the body."""
    i4 = h * INODE_WORDS
    i8 = i4 >> 1
    w8 = OUT_BODY8 + (at >> 3)
    w4 = OUT_BODY4 + (at >> 2) + 12
    l.out8[w8] = ino
    l.out8[w8 + 1] = l.s8[i8 + I8_SIZE]
    l.out8[w8 + 2] = _blocks(l, i4)
    l.out8[w8 + 3], l.out4[w4] = _time(l, i8 + I8_ATIME)
    l.out8[w8 + 4], l.out4[w4 + 1] = _time(l, i8 + I8_MTIME)
    l.out8[w8 + 5], l.out4[w4 + 2] = _time(l, i8 + I8_CTIME)
    l.out4[w4 + 3] = np.int64(l.m4[i4 + I4_MODE_FLAGS]) & 0xFFFF
    l.out4[w4 + 4] = l.m4[i4 + I4_NLINK]
    l.out4[w4 + 5] = l.m4[i4 + I4_UID]
    l.out4[w4 + 6] = l.m4[i4 + I4_GID]
    major, minor = _rdev(l, i4)
    l.out4[w4 + 7] = (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    l.out4[w4 + 8] = l.geo[G_BLKSIZE]
    l.out4[w4 + 9] = 0


@helper
def _put_entry(l, h, node):
    """struct fuse_entry_out; h 0: that there is no such name."""
    for i in range(ENTRY_BYTES >> 3):
        l.out8[OUT_BODY8 + i] = 0
    l.out8[OUT_BODY8 + 2] = CACHE_SECONDS  # of the name
    if h == 0:
        return
    l.out8[OUT_BODY8] = node
    l.out8[OUT_BODY8 + 1] = np.int64(l.m4[h * INODE_WORDS + I4_GEN])
    l.out8[OUT_BODY8 + 3] = CACHE_SECONDS  # of the attributes
    _put_attr(l, h, node, ENTRY_ATTR)


# -- LOOKUP -------------------------------------------------------------------------------------


@helper
def _name_length(l, addr):
    """Bytes of the one name in the message; 0 if it is malformed."""
    n = l.me[M_LEN] - wire.BODY - 1
    if n < 1 or l.mem[addr + n] != 0:
        return 0
    for i in range(n):
        if l.mem[addr + i] == 0:
            return 0
    return n


@helper
def serve_lookup(l):
    """A cached name of a cached directory, or that the cache knows that there is none."""
    addr = message(l) + wire.BODY
    n = _name_length(l, addr)
    if n == 0:
        return BROKEN
    if n > NAME_MAX or (l.mem[addr] == DOT and (n == 1 or (n == 2 and l.mem[addr + 1] == DOT))):
        return _slow(l)
    parent = _ino_of(l, u64(l, wire.H_NODEID))
    dp = find_inode(l.m4, l.s8, l.ibuckets, parent)
    if dp == 0 or not _is(l, dp, parent):
        return _slow(l)
    gen = np.int64(l.m4[dp * INODE_WORDS + I4_GEN])
    known, ino = find_name(l.mem, l.m4, l.s8, l.dbuckets, parent, gen, addr, n)
    if not known:
        return _slow(l)
    if ino == 0:
        _put_entry(l, 0, 0)
        reply(l, 0, ENTRY_BYTES)
        return ANSWERED
    h = _lock(l, ino)
    if h == 0:
        return _slow(l)
    at = h * INODE_WORDS
    known, again = find_name(l.mem, l.m4, l.s8, l.dbuckets, parent, gen, addr, n)
    good = known and again == ino and np.int64(l.m4[at + I4_NLINK]) > 0
    if good:
        _put_entry(l, h, ROOT if ino == l.geo[G_ROOT_INO] else ino)
        fetch_add(l.s8, (at >> 1) + I8_NLOOKUP, 1)
    _unlock(l, h)
    if not good:
        return _slow(l)
    reply(l, 0, ENTRY_BYTES)
    return ANSWERED


# -- attributes ---------------------------------------------------------------------------------


@helper
def serve_getattr(l):
    """The attributes of a cached inode."""
    ino = _ino_of(l, u64(l, wire.H_NODEID))
    h = _lock(l, ino)
    if h == 0:
        return _slow(l)
    l.out8[OUT_BODY8] = CACHE_SECONDS
    l.out8[OUT_BODY8 + 1] = 0
    _put_attr(l, h, ino, ATTR_ATTR)
    _unlock(l, h)
    reply(l, 0, ATTR_BYTES)
    return ANSWERED


@helper
def _put_time(l, at, word):
    """struct fuse_sx_time of the stamp in m8[word], `at` bytes into the body."""
    l.out8[OUT_BODY8 + (at >> 3)], l.out4[OUT_BODY4 + (at >> 2) + 2] = _time(l, word)
    l.out4[OUT_BODY4 + (at >> 2) + 3] = 0


@helper
def _attributes(flags):
    """Inode flags as statx(2) shows them."""
    found = 0
    if flags & L.DIFLAG_IMMUTABLE:
        found |= STATX_IMMUTABLE
    if flags & L.DIFLAG_APPEND:
        found |= STATX_APPEND
    if flags & L.DIFLAG_NODUMP:
        found |= STATX_NODUMP
    return found


@helper
def _put_statx(l, h, ino):
    """struct fuse_statx."""
    i4 = h * INODE_WORDS
    i8 = i4 >> 1
    mode = np.int64(l.m4[i4 + I4_MODE_FLAGS])
    w8 = OUT_BODY8 + (STATX_STAT >> 3)
    w4 = OUT_BODY4 + (STATX_STAT >> 2)
    l.out4[w4] = STATX_MASK
    l.out4[w4 + 1] = l.geo[G_BLKSIZE]
    l.out8[w8 + 1] = _attributes(mode >> 16)
    l.out4[w4 + 4] = l.m4[i4 + I4_NLINK]
    l.out4[w4 + 5] = l.m4[i4 + I4_UID]
    l.out4[w4 + 6] = l.m4[i4 + I4_GID]
    l.out4[w4 + 7] = mode & 0xFFFF
    l.out8[w8 + 4] = ino
    l.out8[w8 + 5] = l.s8[i8 + I8_SIZE]
    l.out8[w8 + 6] = _blocks(l, i4)
    l.out8[w8 + 7] = STATX_ATTRIBUTES
    _put_time(l, STATX_STAT + 64, i8 + I8_ATIME)
    _put_time(l, STATX_STAT + 80, i8 + I8_CRTIME)
    _put_time(l, STATX_STAT + 96, i8 + I8_CTIME)
    _put_time(l, STATX_STAT + 112, i8 + I8_MTIME)
    l.out4[w4 + 32], l.out4[w4 + 33] = _rdev(l, i4)


@helper
def serve_statx(l):
    """The attributes of a cached inode, with its birth time; pyfuse3 does not know this request."""
    ino = _ino_of(l, u64(l, wire.H_NODEID))
    h = _lock(l, ino)
    if h == 0:
        return _slow(l)
    for i in range(STATX_BYTES >> 3):
        l.out8[OUT_BODY8 + i] = 0
    l.out8[OUT_BODY8] = CACHE_SECONDS
    _put_statx(l, h, ino)
    _unlock(l, h)
    reply(l, 0, STATX_BYTES)
    return ANSWERED


# -- the rest -----------------------------------------------------------------------------------


@helper
def serve_statfs(l):
    """Totals that somebody has computed and nothing has changed since, but lanes' promises."""
    if load_acquire(l.totals, T_VALID) == 0:
        return FORWARD
    l.out8[OUT_BODY8] = l.totals[T_BLOCKS]
    l.out8[OUT_BODY8 + 1] = max(0, l.totals[T_FREE])
    l.out8[OUT_BODY8 + 2] = max(0, l.totals[T_AVAIL])
    l.out8[OUT_BODY8 + 3] = l.totals[T_FILES]
    l.out8[OUT_BODY8 + 4] = l.totals[T_FFREE]
    l.out4[OUT_BODY4 + 10] = l.geo[G_BLOCK_SIZE]
    l.out4[OUT_BODY4 + 11] = STATFS_NAMELEN
    l.out4[OUT_BODY4 + 12] = l.geo[G_BLOCK_SIZE]
    for i in range(13, STATFS_BYTES >> 2):
        l.out4[OUT_BODY4 + i] = 0
    reply(l, 0, STATFS_BYTES)
    return ANSWERED


@helper
def _has_attributes(l, at):
    """Is there anything in the attribute fork? The kernel makes an empty one with each inode."""
    forms = np.int64(l.m4[at + I4_FORKOFF_FORMAT])
    if forms & 0xFF == 0:
        return False
    return (forms >> 16) & 0xFF != L.FMT_EXTENTS or l.m4[at + I4_ANEXTENTS] != 0


@helper
def _begins(l, at, prefix):
    """Does the string in the message begin with a prefix, and go on?"""
    for i in range(len(prefix)):
        if l.mem[at + i] != prefix[i]:
            return False
    return l.mem[at + len(prefix)] != 0


@helper
def _is_attribute(l):
    """Could there be an attribute of the name in hand?"""
    at = message(l) + GETXATTR_NAME
    if _begins(l, at, USER) or _begins(l, at, SECURITY):
        return True
    return _begins(l, at, TRUSTED) or _begins(l, at, ACLS)


@helper
def serve_getxattr(l):
    """ENODATA for an inode without attributes; the root has virtual ones, which are not ours."""
    node = u64(l, wire.H_NODEID)
    if node == ROOT or not _is_attribute(l):
        return FORWARD
    h = _lock(l, node)
    if h == 0:
        return FORWARD
    found = _has_attributes(l, h * INODE_WORDS)
    _unlock(l, h)
    if found:
        return FORWARD
    reply(l, errno.ENODATA, 0)
    return ANSWERED


@helper
def serve_access(l):
    """The kernel checks permissions itself: every mount has default_permissions."""
    reply(l, 0, 0)
    return ANSWERED
