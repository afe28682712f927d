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
