"""The extent size hint of a file: holes get blocks in whole multiples of it, ahead of the data.

A file that has one (DIFLAG_EXTSIZE, `extsize` in blocks) has no delayed allocation: what a write or
fallocate(2) finds unmapped is allocated at once, as unwritten, from one multiple of the hint to
another, as far as its neighbours leave room (the kernel's xfs_bmap_extsize_align). What then lies
behind the file's end goes as speculative blocks do (fs/eofblocks.py). Only file offsets follow the
hint; where on the device the blocks are is chosen as for any file.

Pure functions; the caller holds the ILOCK. Units: filesystem blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode


def hint(ip: Inode) -> int:
    """Blocks of a file's hint; 0: it has none."""
    return ip.extsize if ip.flags & L.DIFLAG_EXTSIZE else 0


def rounded(offset: int, count: int, hint: int) -> int:
    """Blocks between the multiples of a hint around a range, as many as one record may have."""
    blocks = -(-(offset % hint + count) // hint) * hint
    while blocks > L.BMBT_LEN_MAX:
        blocks -= hint
    return blocks


def align(offset: int, count: int, hint: int, before: int, behind: int) -> tuple[int, int]:
    """(offset, count) of what is allocated for a range in the hole [before, behind).

    The kernel's rule: what does not fit between the neighbours is moved away from the one, then
    from the other, with its length kept, and cut only if the hole is too small for it.
    """
    blocks = rounded(offset, count, hint)
    start = max(offset - offset % hint, before)
    if start + blocks > behind:
        start = max(behind - blocks, before)
    return start, min(blocks, behind - start)


def settle(start: int, got: int, offset: int, count: int) -> int:
    """Where to map `got` blocks that were to begin at `start` for a range.

    There, unless they are too few to reach what was asked for (xfs_bmap_process_allocated_extent).
    """
    if got <= count:
        return offset
    return max(start, offset + count - got)
