"""Attributes as FUSE wants them, from in-core inodes, and the numbers that differ between both.

FUSE calls the root inode 1; every other inode keeps its XFS number. Times inside are bigtime
(nanoseconds since 2^31 seconds before 1970); outside they are nanoseconds since 1970. Device
numbers are stored as major << 18 | minor (XFS format, device inode).

Nobody but this mount changes the image, so names and attributes may stay in the kernel's caches
for long; the kernel drops what its own requests change. Pure reading, no await.
"""

from __future__ import annotations

import errno
import os
import struct
import time
from typing import TYPE_CHECKING

import pyfuse3

from fs import file
from fs.cache.inode import Inode
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.volume import Volume

EPOCH_NS = L.BIGTIME_EPOCH_SECONDS * 10**9
CACHE_SECONDS = 3600.0
PAGE_SIZE = 4096
RDEV_MINOR_BITS = 18
RDEV_MAJOR_BITS = 9  # what the kernel stores and reads of the field's 14

# struct fuse_attr; what fuse_attr_out, fuse_entry_out and fuse_statx_out begin with (linux/fuse.h)
ATTR = struct.Struct("=3Q3q10I")
ATTR_HEAD = struct.Struct("=QI4x")
ENTRY = struct.Struct("=4Q2I")
STATX_HEAD = struct.Struct("=QII16x")
STATX = struct.Struct("=IIQIIIHxxQQQQ" + "qIxxxx" * 4 + "II8x112x")
STATX_MASK = 0xFFF  # STATX_BASIC_STATS and STATX_BTIME
# Inode flags that statx(2) shows.
STATX_FLAGS = ((L.DIFLAG_IMMUTABLE, 0x10), (L.DIFLAG_APPEND, 0x20), (L.DIFLAG_NODUMP, 0x40))


def rdev_of(stored: int) -> int:
    """A dev_t from its on-disk form."""
    return os.makedev(stored >> RDEV_MINOR_BITS & 0x1FF, stored & ((1 << RDEV_MINOR_BITS) - 1))


def stored_rdev(rdev: int) -> int:
    """The on-disk form of a dev_t. Raises OSError(EINVAL) for what the format cannot hold."""
    major, minor = os.major(rdev), os.minor(rdev)
    if major >= 1 << RDEV_MAJOR_BITS or minor >= 1 << RDEV_MINOR_BITS:
        raise OSError(errno.EINVAL, f"device number {major}:{minor} has no on-disk form")
    return major << RDEV_MINOR_BITS | minor


def now_bigtime() -> int:
    """The present time as an in-core time stamp."""
    return time.time_ns() + EPOCH_NS


def node_id(vol: Volume, ino: int) -> int:
    """FUSE's name for an inode."""
    return pyfuse3.ROOT_INODE if ino == vol.geo.root_ino else ino


def ino_of(vol: Volume, node: int) -> int:
    """The inode behind FUSE's name."""
    return vol.geo.root_ino if node == pyfuse3.ROOT_INODE else node


def entry(vol: Volume, ip: Inode, node: int) -> pyfuse3.EntryAttributes:
    """The attributes of an inode, under the number `node`.

    st_blocks counts 512-byte units and includes delayed allocations, as XFS reports it.
    """
    geo = vol.geo
    out = pyfuse3.EntryAttributes()
    out.st_ino = node
    out.generation = ip.gen
    out.entry_timeout = out.attr_timeout = CACHE_SECONDS
    out.st_mode = ip.mode
    out.st_nlink = ip.nlink
    out.st_uid = ip.uid
    out.st_gid = ip.gid
    out.st_rdev = rdev_of(ip.rdev) if ip.format == L.FMT_DEV else 0
    out.st_size = ip.size
    out.st_blksize = max(PAGE_SIZE, geo.block_size)
    out.st_blocks = file.stat_blocks(vol, ip)
    out.st_atime_ns = ip.atime - EPOCH_NS
    out.st_mtime_ns = ip.mtime - EPOCH_NS
    out.st_ctime_ns = ip.ctime - EPOCH_NS
    return out


def attr_bytes(reply: pyfuse3.EntryAttributes) -> bytes:
    """struct fuse_attr."""
    (atime, atime_ns), (mtime, mtime_ns), (ctime, ctime_ns) = (
        divmod(stamp, 10**9) for stamp in (reply.st_atime_ns, reply.st_mtime_ns, reply.st_ctime_ns)
    )
    return ATTR.pack(
        *(reply.st_ino, reply.st_size, reply.st_blocks),
        *(atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns),
        *(reply.st_mode, reply.st_nlink, reply.st_uid, reply.st_gid, reply.st_rdev),
        *(reply.st_blksize, 0),
    )


def attr_out(reply: pyfuse3.EntryAttributes) -> bytes:
    """struct fuse_attr_out."""
    return ATTR_HEAD.pack(int(reply.attr_timeout), 0) + attr_bytes(reply)


def entry_out(reply: pyfuse3.EntryAttributes) -> bytes:
    """struct fuse_entry_out."""
    valid = (int(reply.entry_timeout), int(reply.attr_timeout))
    return ENTRY.pack(reply.st_ino, reply.generation, *valid, 0, 0) + attr_bytes(reply)


def statx_out(vol: Volume, ip: Inode) -> bytes:
    """struct fuse_statx_out: the attributes with the birth time and the inode's flags."""
    shown = sum(bit for flag, bit in STATX_FLAGS if ip.flags & flag)
    return statx_bytes(entry(vol, ip, ip.ino), ip.crtime - EPOCH_NS, shown)


def statx_bytes(reply: pyfuse3.EntryAttributes, birth_ns: int, shown: int) -> bytes:
    """struct fuse_statx_out; `shown` are the attributes that statx(2) is to see."""
    stamps = (reply.st_atime_ns, birth_ns, reply.st_ctime_ns, reply.st_mtime_ns)
    times = (word for stamp in stamps for word in divmod(stamp, 10**9))
    return STATX_HEAD.pack(int(CACHE_SECONDS), 0, 0) + STATX.pack(
        *(STATX_MASK, reply.st_blksize, shown, reply.st_nlink, reply.st_uid, reply.st_gid),
        *(reply.st_mode, reply.st_ino, reply.st_size, reply.st_blocks),
        sum(bit for _, bit in STATX_FLAGS),
        *times,
        *(os.major(reply.st_rdev), os.minor(reply.st_rdev)),
    )
