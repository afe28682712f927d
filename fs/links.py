"""What changes of names have in common: checks, children, new inodes, stamps, link counts.

`fs.namespace` and `fs.rename` are built of these. Functions that take a transaction expect the
ILOCKs of the inodes they are given; `child` takes the directory's itself and expects its IOLOCK,
which everybody who changes names holds exclusively, so that what it found stays true.

A directory's names are cached (`fs.cache.dentry`) by whoever reads or changes them, under the
ILOCK; "." and ".." are not cached.
"""

from __future__ import annotations

import errno
import stat
from typing import TYPE_CHECKING

from fs.xfs import dir as directory
from fs.xfs import inobt, residentname, stamp, unlinked
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume

NAME_MAX = 255
LINK_MAX = (1 << 31) - 1  # XFS format: nlink
OWN_NAMES = (b".", b"..")
FIXED = L.DIFLAG_IMMUTABLE | L.DIFLAG_APPEND
SPECIAL = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)


def check_name(name: bytes) -> None:
    """Raises OSError(ENAMETOOLONG) or OSError(EINVAL) for what no directory can hold."""
    if len(name) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, f"name of {len(name)} bytes")
    if not name or b"/" in name or b"\0" in name:
        raise OSError(errno.EINVAL, f"not a name: {name!r}")


def check_new_name(name: bytes) -> None:
    """The same for a name that is to be made."""
    check_name(name)
    if name in OWN_NAMES:
        raise FileExistsError(errno.EEXIST, f"{name!r} is in every directory")


def check_directory(dp: Inode) -> None:
    """Raises OSError(ENOTDIR)."""
    if not stat.S_ISDIR(dp.mode):
        raise NotADirectoryError(errno.ENOTDIR, f"inode {dp.ino} is no directory")


def check_open(dp: Inode) -> None:
    """May names be added to this directory? Under its ILOCK."""
    check_directory(dp)
    if not dp.nlink:
        raise FileNotFoundError(errno.ENOENT, f"directory {dp.ino} was removed")
    if dp.flags & L.DIFLAG_IMMUTABLE:
        raise PermissionError(errno.EPERM, f"directory {dp.ino} is immutable")


def check_removable(dp: Inode, ip: Inode) -> None:
    """May this name of the inode be removed or moved?"""
    if dp.flags & FIXED or ip.flags & FIXED:
        raise PermissionError(errno.EPERM, "immutable or append-only")


def check_link_count(ip: Inode) -> None:
    """Raises OSError(EMLINK) if the inode cannot get one more link."""
    if ip.nlink >= LINK_MAX:
        raise OSError(errno.EMLINK, f"inode {ip.ino} has all links it may have")


def touch(tp: Transaction, *inodes: Inode, modified: bool = True) -> None:
    """ctime, mtime if it was `modified`, and the change count, of each inode; logs them."""
    now = stamp.now()
    for ip in inodes:
        ip.ctime = now
        if modified:
            ip.mtime = now
        ip.changecount += 1
        tp.log_inode(ip)


async def read_entry(
    vol: Volume, tp: Transaction, dp: Inode, name: bytes
) -> tuple[int, int] | None:
    """(ino, ftype) of a name, from the cache or the directory, whose ILOCK is held."""
    known = vol.dentries.lookup(dp, name)
    if known is not None:
        return known if known[0] else None
    found = await directory.lookup(tp, dp, name)
    if name not in OWN_NAMES:
        vol.dentries.insert(dp, name, *(found or (0, 0)))
    return found


async def expect_absent(tp: Transaction, dp: Inode, name: bytes) -> None:
    """Raises OSError(EEXIST) if the name is there."""
    if await read_entry(tp.vol, tp, dp, name) is not None:
        raise FileExistsError(errno.EEXIST, f"{name!r} exists")


async def get_named(vol: Volume, dp: Inode, name: bytes, ino: int) -> Inode:
    """The inode that an entry names: one reference. A free one contradicts the entry."""
    try:
        return await vol.inodes.get(ino)
    except FileNotFoundError:
        reason = f"{name!r} names inode {ino}, which is free"
        raise vol.corrupt("directory", f"inode {dp.ino}", reason) from None


async def find_child(vol: Volume, dp: Inode, name: bytes) -> Inode | None:
    """The inode of a name, one reference; None if there is none. IOLOCK of `dp` held."""
    async with vol.reader(dp) as tp:
        check_directory(dp)
        found = await read_entry(vol, tp, dp, name)
        return await get_named(vol, dp, name, found[0]) if found else None


async def child(vol: Volume, dp: Inode, name: bytes) -> Inode:
    """The same; raises OSError(ENOENT)."""
    ip = await find_child(vol, dp, name)
    if ip is None:
        raise FileNotFoundError(errno.ENOENT, f"no such entry: {name!r}")
    return ip


async def new_inode(
    tp: Transaction, dp: Inode, mode: int, uid: int, gid: int, rdev: int = 0
) -> Inode:
    """A new inode near a directory, which some of its core comes from: one reference.

    Its ILOCK is the transaction's, so that nobody takes it home before that is committed. Raises
    OSError(ENOSPC) with nothing changed. The caller logs the inode when it is complete.
    """
    ino, gen = await inobt.alloc(tp, dp.ino, stat.S_ISDIR(mode))
    ip = await tp.vol.inodes.create(ino, gen)
    tp.lock_new(ip)
    now = stamp.now()
    residentname.fill(tp.vol.resident, dp.handle, ip.handle, mode, uid, gid, rdev, now)
    return ip


async def drop_link(tp: Transaction, ip: Inode, links: int = 1) -> None:
    """Take links away; with the last one the inode goes onto its unlinked list."""
    if ip.nlink < links:
        raise tp.vol.corrupt("inode", f"ino {ip.ino}", f"link count {ip.nlink} is too low")
    ip.nlink -= links
    touch(tp, ip, modified=False)
    if not ip.nlink:
        await unlinked.insert(tp, ip)


def add_link(tp: Transaction, ip: Inode) -> None:
    """One more link."""
    ip.nlink += 1
    touch(tp, ip, modified=False)


def take_if_possible(tp: Transaction, blocks: int) -> None:
    """Reserve blocks that make a removal tidier, if there are any; it works without."""
    if blocks <= tp.vol.space.unpromised:
        tp.take_pool(blocks)
