"""Direct I/O: a second descriptor of an image, whose transfers pass the page cache below by.

Through that cache every byte is copied once more and takes memory that no throttle of ours knows,
and a write is done before the device has it. So what is large goes around it. What is small does
not: there the cache below merges neighbours and reads ahead, which is worth more than its copy.

Both ways may be used on one image because the kernel keeps them coherent: before a direct transfer
it writes back what the cache has of the range, and a direct write throws that away before and
after. It does so by pages, hence only whole pages go direct: nobody else can have a page of theirs
dirty meanwhile. A flush through the other descriptor reaches both.

Whether a file takes direct I/O is asked of statx(2), as far as the kernel and the file system
answer that, and then tried. A file system in memory takes the flag and ignores it: that is none.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from dataclasses import dataclass

from fs.device.base import Views

MODES = ("auto", "on", "off")  # large transfers; all that are aligned; none
LARGE = 64 << 10  # from here on auto is direct (docs/performance.md)
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # what a transfer gets that cannot be direct
AT_EMPTY_PATH, STATX_DIOALIGN = 0x1000, 0x2000
STATX_BYTES, DIO_OFFSET_ALIGN = 256, 0x9C
STATFS_BYTES = 256  # more than any architecture's
IN_MEMORY = (0x01021994, 0x858458F6)  # tmpfs, ramfs

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Direct:
    """A descriptor for direct transfers: multiples of `granule` bytes, from `least` on."""

    fd: int
    granule: int
    least: int

    def takes(self, offset: int, views: Views) -> bool:
        """Whether a transfer shall be direct. Of its memory the kernel judges: REFUSED."""
        nbytes = sum(view.nbytes for view in views)
        return nbytes >= self.least and not (offset | nbytes) % self.granule


def reopen(fd: int, mode: str, *, read_only: bool) -> Direct | None:
    """The second descriptor of an open image, which the caller closes; None: it takes none."""
    granule = 0 if mode == "off" else _granule(fd)
    if not granule:
        return None
    flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_DIRECT
    try:
        opened = os.open(f"/proc/self/fd/{fd}", flags)
    except OSError:
        return None
    with mmap.mmap(-1, granule) as block:
        try:
            os.preadv(opened, [block], 0)
        except OSError:
            os.close(opened)
            return None
    return Direct(opened, granule, LARGE if mode == "auto" else granule)


def _granule(fd: int) -> int:
    """Of which offsets and lengths must be multiples, in bytes; 0: nothing can be direct."""
    found = ctypes.create_string_buffer(STATX_BYTES)
    if _libc.statx(fd, b"", AT_EMPTY_PATH, STATX_DIOALIGN, found) == 0:
        (mask,) = struct.unpack_from("=I", found)
        if mask & STATX_DIOALIGN:
            (align,) = struct.unpack_from("=I", found, DIO_OFFSET_ALIGN)
            return max(align, mmap.PAGESIZE) if align else 0
    return 0 if _in_memory(fd) else mmap.PAGESIZE


def _in_memory(fd: int) -> bool:
    found = ctypes.create_string_buffer(STATFS_BYTES)
    if _libc.fstatfs(fd, found):
        return False
    (kind,) = struct.unpack_from("@l", found)
    return kind & 0xFFFFFFFF in IN_MEMORY
