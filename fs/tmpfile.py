"""Temporary files: O_TMPFILE of open(2).

A temporary file is a regular file without a name. It is on the unlinked list of its AG from the
transaction that makes it, so nothing is left of it but that list when nobody frees it; it lives as
long as somebody uses it, and is freed like any file whose last link has gone. `namespace.link`
may give it a name: then, in one transaction, it leaves the list and has its first link. Whether
it may is a bit of the in-core inode, which cannot leave core before (S_LINKABLE); O_EXCL and a
removed file have it not.

No directory changes: what the file inherits is read between awaits, so no IOLOCK or ILOCK is taken.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from fs import links
from fs.cache.incore import S_LINKABLE
from fs.xfs import inobt, unlinked

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.volume import Volume

PERMISSIONS = 0o7777


async def create(
    vol: Volume, dp: Inode, mode: int, uid: int, gid: int, linkable: bool = True
) -> Inode:
    """A regular file without a name, made in directory `dp`: one reference, no link.

    Raises OSError: ENOTDIR, ENOENT and EPERM for a directory that takes no files, ENOSPC, EROFS;
    Corrupt, ShutDown.
    """
    links.check_open(dp)
    async with vol.transaction("tmpfile", inobt.alloc_blocks(vol.geo)) as tp:
        links.check_open(dp)
        ip = await links.new_inode(tp, dp, stat.S_IFREG | mode & PERMISSIONS, uid, gid)
        ip.nlink = 0
        if linkable:
            ip.state |= S_LINKABLE
        tp.log_inode(ip)
        await unlinked.insert(tp, ip)
        return ip
