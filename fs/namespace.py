"""The name space: whole operations on a volume, one transaction each.

This is what FUSE's handlers and tests without FUSE call. Functions take and return inodes; what
they return has one reference for the caller. Errors are OSError with the errno of the system call;
nothing is changed then. Permissions are the caller's business (`default_permissions`), inode flags
(immutable, append-only) are checked here.

Locking: IOLOCKs of the directories whose names change, exclusive, in ascending ino; then the
transaction's reservation; then the ILOCKs of all inodes involved in one call. A lookup takes the
directory's ILOCK shared, or nothing if the dentry cache knows the name.

An inode whose last link goes is put on its unlinked list in that transaction, and `inactivate`d
when its last reference goes.
"""

from __future__ import annotations

import builtins
import errno
import stat
from typing import TYPE_CHECKING

from fs import links
from fs.rename import EXCHANGE, NOREPLACE, rename
from fs.xfs import attr, bmap, inobt, inode, stamp, unlinked
from fs.xfs import dir as directory
from fs.xfs import layout as L
from fs.xfs import symlink as symlinks

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume

__all__ = [
    "EXCHANGE",
    "NOREPLACE",
    "create",
    "inactivate",
    "link",
    "lookup",
    "mkdir",
    "readlink",
    "rename",
    "rmdir",
    "setattr",
    "symlink",
    "unlink",
]

INHERITED = L.DIFLAG_NOATIME | L.DIFLAG_NODUMP | L.DIFLAG_SYNC | L.DIFLAG_NODEFRAG
INHERITED_BY_DIRS = L.DIFLAG_PROJINHERIT | L.DIFLAG_EXTSZINHERIT | L.DIFLAG_RTINHERIT
SPECIAL = (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
PERMISSIONS = 0o7777


# -- looking ------------------------------------------------------------------------------------


async def lookup(vol: Volume, dp: Inode, name: bytes) -> Inode:
    """The inode of a name. Raises OSError(ENOENT, ENOTDIR, ENAMETOOLONG), Corrupt."""
    links.check_name(name)
    links.check_directory(dp)
    vol.check_alive()
    known = vol.dentries.lookup(dp, name)
    if known is not None and known[0]:
        try:
            ip = await vol.inodes.get(known[0])
        except FileNotFoundError:
            known = None  # removed and freed while it was read
        else:
            if vol.dentries.lookup(dp, name) == known:
                return ip
            vol.inodes.put(ip)
    elif known is not None:
        raise FileNotFoundError(errno.ENOENT, f"no such entry: {name!r}")
    return await links.child(vol, dp, name)


async def readlink(vol: Volume, ip: Inode) -> bytes:
    """Target of a symbolic link. Raises OSError(EINVAL) for anything else."""
    vol.check_alive()
    if not stat.S_ISLNK(ip.mode):
        raise OSError(errno.EINVAL, f"inode {ip.ino} is no symbolic link")
    async with vol.reader(ip) as tp:
        return await symlinks.read(tp, ip)


# -- making -------------------------------------------------------------------------------------


async def create(
    vol: Volume, dp: Inode, name: bytes, mode: int, uid: int, gid: int, rdev: int = 0
) -> Inode:
    """Make a regular file, or what `mode` says: device, fifo, socket. `rdev` is the stored form."""
    if not stat.S_IFMT(mode):
        mode |= stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_IFMT(mode) in SPECIAL):
        raise OSError(errno.EINVAL, f"create cannot make mode {mode:o}")
    return await _make(vol, dp, name, mode, uid, gid, rdev=rdev)


async def mkdir(vol: Volume, dp: Inode, name: bytes, mode: int, uid: int, gid: int) -> Inode:
    """Make an empty directory."""
    return await _make(vol, dp, name, stat.S_IFDIR | mode & PERMISSIONS, uid, gid)


async def symlink(vol: Volume, dp: Inode, name: bytes, target: bytes, uid: int, gid: int) -> Inode:
    """Make a symbolic link of 1 to 1023 bytes."""
    if not target:
        raise OSError(errno.ENOENT, "empty link target")
    if len(target) > symlinks.TARGET_MAX:
        raise OSError(errno.ENAMETOOLONG, f"target of {len(target)} bytes")
    return await _make(vol, dp, name, stat.S_IFLNK | 0o777, uid, gid, target=target)


async def _make(
    vol: Volume,
    dp: Inode,
    name: bytes,
    mode: int,
    uid: int,
    gid: int,
    *,
    rdev: int = 0,
    target: bytes = b"",
) -> Inode:
    """One transaction: a new inode and its name."""
    links.check_new_name(name)
    links.check_directory(dp)
    geo = vol.geo
    blocks = directory.enter_blocks(geo) + inobt.alloc_blocks(geo)
    if len(target) > geo.literal_size:
        blocks += symlinks.blocks(geo, len(target)) + bmap.worst_indirect(geo, 3)
    async with vol.iolock(dp), vol.transaction("create", blocks) as tp:
        await tp.lock_inodes(dp)
        links.check_open(dp)
        await links.expect_absent(tp, dp, name)
        if stat.S_ISDIR(mode):
            links.check_link_count(dp)
        ino, gen = await inobt.alloc(tp, dp.ino, stat.S_ISDIR(mode))
        ip = await vol.inodes.create(ino, gen)
        _fill(tp, dp, ip, mode, uid, gid, rdev)
        if stat.S_ISDIR(mode):
            directory.init(tp, ip, dp.ino)
            dp.nlink += 1
        elif target:
            await symlinks.write(tp, ip, target)
        tp.log_inode(ip)
        await _enter(tp, dp, name, ip)
        return ip


def _fill(tp: Transaction, dp: Inode, ip: Inode, mode: int, uid: int, gid: int, rdev: int) -> None:
    """The core of a new inode, as far as it is not zero; some of it comes from the directory."""
    is_dir = stat.S_ISDIR(mode)
    if dp.mode & stat.S_ISGID:
        gid = dp.gid
        mode |= stat.S_ISGID if is_dir else 0
    ip.mode, ip.uid, ip.gid, ip.nlink = mode, uid, gid, 2 if is_dir else 1
    special = stat.S_IFMT(mode) in SPECIAL
    ip.format = L.FMT_DEV if special else L.FMT_EXTENTS
    ip.aformat = L.FMT_EXTENTS
    ip.rdev = rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
    ip.flags2 = inode.new_flags2(tp.vol.geo)
    ip.atime = ip.mtime = ip.ctime = ip.crtime = stamp.now()
    ip.changecount = 1
    _inherit(dp, ip)


def _inherit(dp: Inode, ip: Inode) -> None:
    """Flags, project and extent size hints that a directory hands on (XFS format: di_flags)."""
    flags = dp.flags & INHERITED
    if stat.S_ISDIR(ip.mode):
        flags |= dp.flags & INHERITED_BY_DIRS
    elif stat.S_ISREG(ip.mode) and dp.flags & L.DIFLAG_EXTSZINHERIT:
        flags |= L.DIFLAG_EXTSIZE
    if flags & (L.DIFLAG_EXTSIZE | L.DIFLAG_EXTSZINHERIT):
        ip.extsize = dp.extsize
    if dp.flags & L.DIFLAG_PROJINHERIT:
        ip.projid = dp.projid
    if dp.flags2 & L.DIFLAG2_COWEXTSIZE and (stat.S_ISDIR(ip.mode) or stat.S_ISREG(ip.mode)):
        ip.flags2 |= L.DIFLAG2_COWEXTSIZE
        ip.cowextsize = dp.cowextsize
    ip.flags = flags


async def _enter(tp: Transaction, dp: Inode, name: bytes, ip: Inode) -> None:
    """Give an inode a name."""
    ftype = directory.ftype_of(ip.mode)
    await directory.add(tp, dp, name, ip.ino, ftype)
    links.touch(tp, dp)
    tp.vol.dentries.insert(dp, name, ip.ino, ftype)


async def link(vol: Volume, dp: Inode, name: bytes, ip: Inode) -> None:
    """Give an existing inode another name. Raises OSError(EPERM) for directories."""
    links.check_new_name(name)
    links.check_directory(dp)
    async with (
        vol.iolock(dp),
        vol.transaction("link", directory.enter_blocks(vol.geo)) as tp,
    ):
        await tp.lock_inodes(dp, ip)
        links.check_open(dp)
        await links.expect_absent(tp, dp, name)
        if not ip.nlink:
            raise FileNotFoundError(errno.ENOENT, f"inode {ip.ino} was removed")
        if stat.S_ISDIR(ip.mode) or ip.flags & links.FIXED:
            raise PermissionError(errno.EPERM, "a directory, or immutable or append-only")
        if dp.flags & L.DIFLAG_PROJINHERIT and dp.projid != ip.projid:
            raise OSError(errno.EXDEV, "the directory hands on another project")
        links.check_link_count(ip)
        await _enter(tp, dp, name, ip)
        links.add_link(tp, ip)


# -- removing -----------------------------------------------------------------------------------


async def unlink(vol: Volume, dp: Inode, name: bytes) -> None:
    """Remove a name of anything but a directory. Needs no free space."""
    links.check_name(name)
    links.check_directory(dp)
    async with vol.iolock(dp):
        if name in links.OWN_NAMES:
            raise IsADirectoryError(errno.EISDIR, f"{name!r} is a directory")
        ip = await links.child(vol, dp, name)
        try:
            if stat.S_ISDIR(ip.mode):
                raise IsADirectoryError(errno.EISDIR, f"{name!r} is a directory")
            async with vol.transaction("remove") as tp:
                await tp.lock_inodes(dp, ip)
                links.check_removable(dp, ip)
                await _leave(tp, dp, name, ip)
                await links.drop_link(tp, ip)
        finally:
            vol.inodes.put(ip)


async def rmdir(vol: Volume, dp: Inode, name: bytes) -> None:
    """Remove an empty directory. Needs no free space."""
    links.check_name(name)
    links.check_directory(dp)
    if name in links.OWN_NAMES:
        raise OSError(errno.EINVAL if name == b"." else errno.ENOTEMPTY, f"cannot remove {name!r}")
    async with vol.iolock(dp):
        ip = await links.child(vol, dp, name)
        try:
            links.check_directory(ip)
            async with vol.transaction("rmdir") as tp:
                await tp.lock_inodes(dp, ip)
                links.check_removable(dp, ip)
                if ip.nlink > 2 or not await directory.is_empty(tp, ip):
                    raise OSError(errno.ENOTEMPTY, f"{name!r} is not empty")
                await _leave(tp, dp, name, ip)
                await links.drop_link(tp, dp)
                await links.drop_link(tp, ip, ip.nlink)
        finally:
            vol.inodes.put(ip)


async def _leave(tp: Transaction, dp: Inode, name: bytes, ip: Inode) -> None:
    """Take a name away."""
    links.take_if_possible(tp, directory.shrink_blocks(tp.vol.geo))
    await directory.remove(tp, dp, name, ip.ino)
    links.touch(tp, dp)
    tp.vol.dentries.insert(dp, name, 0, 0)


# -- attributes ---------------------------------------------------------------------------------


async def setattr(vol: Volume, ip: Inode, changes: dict[str, int]) -> None:
    """Change mode, uid, gid, atime, mtime or ctime; stamps are bigtime nanoseconds.

    The size is `fs.truncate`'s. Raises OSError(EPERM) for immutable and append-only inodes.
    """
    async with vol.transaction("setattr") as tp:
        await tp.lock_inodes(ip)
        if ip.flags & links.FIXED:
            raise PermissionError(errno.EPERM, "immutable or append-only")
        for name, value in changes.items():
            assert name in ("mode", "uid", "gid", "atime", "mtime", "ctime"), name
            if name == "mode":
                value = stat.S_IFMT(ip.mode) | value & PERMISSIONS
            builtins.setattr(ip, name, value)
        if "ctime" not in changes:
            ip.ctime = stamp.now()
        ip.changecount += 1
        tp.log_inode(ip)


# -- the end of an inode ------------------------------------------------------------------------


async def inactivate(vol: Volume, ip: Inode) -> None:
    """Free an inode without links and references: data, attributes, then the inode itself.

    Several transactions; blocks they need come from the pool that users cannot have.
    """
    from fs import truncate

    assert ip.nlink == 0
    if stat.S_ISREG(ip.mode):
        await truncate.discard(vol, ip)
    elif stat.S_ISLNK(ip.mode):
        await symlinks.inactivate(vol, ip)
    elif stat.S_ISDIR(ip.mode):
        await directory.inactivate(vol, ip)
    if ip.forkoff:
        await attr.inactivate(vol, ip)
    async with vol.transaction("inactive") as tp:
        await tp.lock_inodes(ip)
        links.take_if_possible(tp, inobt.free_blocks(vol.geo))
        await unlinked.remove(tp, ip)
        await inobt.free(tp, ip)
