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
from fs.cache.incore import S_LINKABLE
from fs.cache.resident import MISS
from fs.rename import EXCHANGE, NOREPLACE, WHITEOUT, rename
from fs.xfs import attr, bmap, inobt, stamp, unlinked
from fs.xfs import dir as directory
from fs.xfs import layout as L
from fs.xfs import residentname as quick
from fs.xfs import symlink as symlinks
from writeback.mapping import INODE_DIRTY

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume
    from fs.xfs.geometry import Geometry

__all__ = [
    "EXCHANGE",
    "NOREPLACE",
    "WHITEOUT",
    "create",
    "create_blocks",
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

PERMISSIONS = 0o7777


# -- looking ------------------------------------------------------------------------------------


async def lookup(vol: Volume, dp: Inode, name: bytes) -> Inode:
    """The inode of a name. Raises OSError(ENOENT, ENOTDIR, ENAMETOOLONG), Corrupt."""
    links.check_name(name)
    links.check_directory(dp)
    vol.check_alive()
    known = vol.dentries.lookup(dp, name) or look_now(vol, dp, name)
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


def look_now(vol: Volume, dp: Inode, name: bytes) -> tuple[int, int] | None:
    """What a name is, (0, 0) if it is not there; None if that takes waiting."""
    if name in links.OWN_NAMES:
        return None
    code, ino, ftype = quick.lookup(vol.resident, dp.handle, name)
    return None if code == MISS else (ino, ftype)


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
    if not (stat.S_ISREG(mode) or stat.S_IFMT(mode) in links.SPECIAL):
        raise OSError(errno.EINVAL, f"create cannot make mode {mode:o}")
    ip = create_now(vol, dp, name, mode, uid, gid, rdev)
    return ip or await _make(vol, dp, name, mode, uid, gid, rdev=rdev)


def create_blocks(geo: Geometry) -> int:
    """Blocks to reserve for a new inode with a name."""
    return directory.enter_blocks(geo) + inobt.alloc_blocks(geo)


def create_now(
    vol: Volume, dp: Inode, name: bytes, mode: int, uid: int, gid: int, rdev: int
) -> Inode | None:
    """The whole transaction, if nothing has to be waited for; errors are the general path's."""
    links.check_new_name(name)
    links.check_directory(dp)
    ticket = None if vol.inodes.loading else vol.admits("create now", vol.create_blocks)
    if ticket is None:
        return None
    ftype, now = directory.ftype_of(mode), stamp.now()
    at = quick.create(vol.resident, dp.handle, name, ftype, mode, uid, gid, rdev, now)
    vol.commit_now(ticket, done=at != MISS)
    if at == MISS:
        return None
    vol.space.changed()
    return vol.inodes.view(at)


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
    blocks = vol.create_blocks
    if len(target) > geo.literal_size:
        blocks += symlinks.blocks(geo, len(target)) + bmap.worst_indirect(geo, 3)
    async with vol.iolock(dp), vol.transaction("create", blocks) as tp:
        await tp.lock_inodes(dp)
        links.check_open(dp)
        await links.expect_absent(tp, dp, name)
        if stat.S_ISDIR(mode):
            links.check_link_count(dp)
        ip = await links.new_inode(tp, dp, mode, uid, gid, rdev)
        if stat.S_ISDIR(mode):
            directory.init(tp, ip, dp.ino)
            dp.nlink += 1
        elif target:
            await symlinks.write(tp, ip, target)
        tp.log_inode(ip)
        await _enter(tp, dp, name, ip)
        return ip


async def _enter(tp: Transaction, dp: Inode, name: bytes, ip: Inode) -> None:
    """Give an inode a name."""
    ftype = directory.ftype_of(ip.mode)
    await directory.add(tp, dp, name, ip.ino, ftype)
    links.touch(tp, dp)
    tp.vol.dentries.insert(dp, name, ip.ino, ftype)


async def link(vol: Volume, dp: Inode, name: bytes, ip: Inode) -> None:
    """Give an existing inode another name, or a temporary file its first.

    Raises OSError(EPERM) for directories.
    """
    links.check_new_name(name)
    links.check_directory(dp)
    async with (
        vol.iolock(dp),
        vol.transaction("link", directory.enter_blocks(vol.geo)) as tp,
    ):
        await tp.lock_inodes(dp, ip)
        links.check_open(dp)
        await links.expect_absent(tp, dp, name)
        if not ip.nlink and not ip.state & S_LINKABLE:
            raise FileNotFoundError(errno.ENOENT, f"inode {ip.ino} was removed")
        if stat.S_ISDIR(ip.mode) or ip.flags & links.FIXED:
            raise PermissionError(errno.EPERM, "a directory, or immutable or append-only")
        if dp.flags & L.DIFLAG_PROJINHERIT and dp.projid != ip.projid:
            raise OSError(errno.EXDEV, "the directory hands on another project")
        links.check_link_count(ip)
        await _enter(tp, dp, name, ip)
        if not ip.nlink:
            ip.state &= ~S_LINKABLE
            await unlinked.remove(tp, ip)
        links.add_link(tp, ip)


# -- removing -----------------------------------------------------------------------------------


async def unlink(vol: Volume, dp: Inode, name: bytes) -> None:
    """Remove a name of anything but a directory. Needs no free space."""
    links.check_name(name)
    links.check_directory(dp)
    if unlink_now(vol, dp, name):
        return
    await vol.inodegc.throttle()
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


def unlink_now(vol: Volume, dp: Inode, name: bytes) -> bool:
    """The whole transaction, if nothing has to be waited for; errors are the general path's."""
    ticket = None if vol.inodegc.crowded else vol.admits("remove now")
    if ticket is None:
        return False
    at = quick.unlink(vol.resident, dp.handle, name, stamp.now())
    vol.commit_now(ticket, done=at != MISS)
    if at > 0:  # nobody uses it: have it freed
        vol.inodes.put(vol.inodes.hold(at))
    return bool(at != MISS)


async def rmdir(vol: Volume, dp: Inode, name: bytes) -> None:
    """Remove an empty directory. Needs no free space."""
    links.check_name(name)
    links.check_directory(dp)
    if name in links.OWN_NAMES:
        raise OSError(errno.EINVAL if name == b"." else errno.ENOTEMPTY, f"cannot remove {name!r}")
    await vol.inodegc.throttle()
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

    The size is `fs.truncate`'s. Raises OSError(EPERM) for immutable inodes, and for append-only
    ones unless only times change.
    """
    async with vol.transaction("setattr") as tp:
        await tp.lock_inodes(ip)
        # touch(1) of an append-only file is allowed; FUSE does not tell it from other times.
        fixed = links.FIXED if changes.keys() & {"mode", "uid", "gid"} else L.DIFLAG_IMMUTABLE
        if ip.flags & fixed:
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
    vol.pages.change_flags(ip.handle, remove=INODE_DIRTY)  # nobody will look at its stamps
    vol.flusher.settle(ip.handle)
    if free_now(vol, ip):
        return
    async with vol.transaction("inactive") as tp:
        await tp.lock_inodes(ip)
        links.take_if_possible(tp, inobt.free_blocks(vol.geo))
        await unlinked.remove(tp, ip)
        await inobt.free(tp, ip)


def free_now(vol: Volume, ip: Inode) -> bool:
    """Free an unlinked inode without references if it has nothing left, and nothing is to wait."""
    ticket = vol.admits("inactive now")
    if ticket is None:
        return False
    done = quick.free_inode(vol.resident, ip.handle) == quick.READY
    vol.commit_now(ticket, done=done)
    if not done:
        return False
    vol.space.changed()
    return True
