"""The FUSE front: pyfuse3's request handlers over a volume.

Thin on purpose: a handler finds its inodes, calls one operation of the filesystem, and answers.
What an operation may raise is an OSError; the guard makes replies of errors.

References. The inode cache keeps the kernel's lookup counts; they keep no inode in core, because
FUSE's number of an inode is its ino and finds it again. An open file or directory holds a
reference, named in its file handle. An unlinked inode is freed when the kernel has forgotten it
and nobody has it open.

Waiting. pyfuse3 handles each request in a task and stops reading when `max_tasks` of them are
busy; the mount sets that above the number of requests the kernel can have outstanding, so that
requests that wait never keep out the ones that they wait for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import TYPE_CHECKING, Any

import pyfuse3

from alloc.policy import AllocationFailed
from fs import file, links, namespace, xattr
from fs.cache.inode import Inode
from fs.front import acl, attrs, handles, policyattr, procdir
from fs.front.atime import AccessTimes
from fs.front.guard import Gate, guarded
from fs.front.options import MountOptions
from fs.front.procdir import ProcDir
from fs.front.statfs import statfs
from fs.front.userpolicy import UserPolicies
from fs.xfs import dir as directory
from fs.xfs import layout as L
from fs.xfs import stamp

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from fs.volume import Volume

READDIR_BATCH = 64  # entries read under one hold of the directory's lock
OWN_NAMES = (b".", b"..")
STATISTICS = b"user.nofailfs.stat"  # an attribute that the root seems to have
CAPABILITY = b"security.capability"


@guarded
class Operations(pyfuse3.Operations):
    """Request handlers of one mounted volume."""

    supports_dot_lookup = False  # handles of forgotten inodes are refused: ESTALE

    def __init__(self, vol: Volume, options: MountOptions) -> None:
        super().__init__()
        self.vol = vol
        self.gate = Gate(vol, vol.log)
        self.enable_acl = options.acl
        self.enable_writeback_cache = options.cache == "writeback"
        self.direct = options.cache == "none"
        self._sync = handles.FULL_SYNC if options.sync else 0
        self._opens = 0  # so far
        self.dirsync = options.sync or options.dirsync
        self.times = AccessTimes(vol, options.atime, directories=options.diratime)
        self.proc = ProcDir(vol, options.procdir)
        self.users: UserPolicies | None = None  # where there are lanes
        self.statistics: Callable[[], bytes] | None = None  # what STATISTICS reads
        self._root: Inode | None = None

    # -- life -----------------------------------------------------------------------------------

    async def start(self) -> None:
        """Pin the root: the kernel knows it without having looked it up."""
        self._root = await self.vol.inodes.get(self.vol.geo.root_ino)
        await self.proc.start(self._root)

    def stop(self) -> None:
        """The kernel is gone and forgot to say so: drop every lookup count."""
        self.vol.inodes.forget_all()
        if self._root is not None:
            self.vol.inodes.put(self._root)
            self._root = None

    def stacktrace(self) -> None:
        """Asked for through an extended attribute of the root."""
        for line in self.gate.waiters():
            self.vol.log.info("%s", line)

    # -- references -----------------------------------------------------------------------------

    @asynccontextmanager
    async def using(self, *nodes: int) -> AsyncIterator[Any]:
        """Hold the inodes behind FUSE's numbers: one inode, or a tuple of several."""
        held: list[Inode] = []
        try:
            for node in nodes:
                held.append(await self._inode(attrs.ino_of(self.vol, node)))
            yield held[0] if len(held) == 1 else tuple(held)
        finally:
            for ip in held:
                self.vol.inodes.put(ip)

    async def _inode(self, ino: int) -> Inode:
        if procdir.owns(ino):
            raise OSError(errno.EPERM, "not in the directory of reports")
        ip = self.vol.inodes.find(ino)
        if ip is not None:
            return ip
        try:
            return await self.vol.inodes.get(ino)
        except FileNotFoundError:
            raise OSError(errno.ESTALE, f"inode {ino} is gone") from None

    def opened(self, fh: int) -> Inode:
        """The inode of an open file, which its handle keeps in core.

        Raises OSError(EINVAL) for a report: what reports can do, their handlers ask for first.
        """
        if procdir.is_open(fh):
            raise OSError(errno.EINVAL, "not of a report")
        return Inode(self.vol.inodes, handles.inode_handle(fh))

    def looked_up(self, ip: Inode) -> pyfuse3.EntryAttributes:
        """Tell the kernel of an inode, and drop our reference."""
        reply = attrs.entry(self.vol, ip, attrs.node_id(self.vol, ip.ino))
        self.vol.inodes.looked_up(ip)
        self.vol.inodes.put(ip)
        return reply

    def forgotten(self, node: int, count: int) -> None:
        """The kernel takes back so many lookups of an inode."""
        if node != pyfuse3.ROOT_INODE and not procdir.owns(node):
            self.vol.inodes.forget(node, count)

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        for node, count in inode_list:
            self.forgotten(node, count)

    # -- names ----------------------------------------------------------------------------------

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        if self.proc.claims(parent_inode, name):
            return self.proc.lookup(parent_inode, name)
        async with self.using(parent_inode) as dp:
            if name == b".":
                return self.looked_up(self.vol.inodes.hold(dp.handle))
            try:
                ip = await namespace.lookup(self.vol, dp, name)
            except FileNotFoundError:
                return self.absent()
            return self.looked_up(ip)

    def absent(self) -> pyfuse3.EntryAttributes:
        """That there is no such name is worth remembering: only this mount can make it."""
        reply = pyfuse3.EntryAttributes()
        reply.st_ino = 0
        reply.entry_timeout = attrs.CACHE_SECONDS
        return reply

    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        async with self.using(parent_inode) as dp:
            number = attrs.stored_rdev(rdev) if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
            ip = await namespace.create(self.vol, dp, name, mode, ctx.uid, ctx.gid, number)
            with self.made(ip):
                await self.complete(dp, ip)
            return self.looked_up(ip)

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        async with self.using(parent_inode) as dp:
            ip = await namespace.mkdir(self.vol, dp, name, mode, ctx.uid, ctx.gid)
            with self.made(ip):
                await self.complete(dp, ip)
            return self.looked_up(ip)

    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        async with self.using(parent_inode) as dp:
            ip = await namespace.symlink(self.vol, dp, name, target, ctx.uid, ctx.gid)
            with self.made(ip):
                await self._settle(dp)
            return self.looked_up(ip)

    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        async with self.using(inode, new_parent_inode) as (ip, dp):
            await namespace.link(self.vol, dp, new_name, ip)
            await self._settle(dp)
            return self.looked_up(self.vol.inodes.hold(ip.handle))

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        async with self.using(parent_inode) as dp:
            await namespace.unlink(self.vol, dp, name)
            await self._settle(dp)

    async def rmdir(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self.proc.refuse(parent_inode, name)
        async with self.using(parent_inode) as dp:
            await namespace.rmdir(self.vol, dp, name)
            await self._settle(dp)

    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: pyfuse3.RequestContext,
    ) -> None:
        self.proc.refuse(parent_inode_old, name_old)
        self.proc.refuse(parent_inode_new, name_new)
        async with self.using(parent_inode_old, parent_inode_new) as (odp, ndp):
            owner = (ctx.uid, ctx.gid)  # of what WHITEOUT leaves behind
            await namespace.rename(self.vol, odp, name_old, ndp, name_new, flags, *owner)
            await self._settle(odp)

    async def readlink(self, inode: int, ctx: pyfuse3.RequestContext) -> bytes:
        async with self.using(inode) as ip:
            target = await namespace.readlink(self.vol, ip)
            await self.times.touch(ip)
            return bytes(target)

    async def complete(self, dp: Inode, ip: Inode) -> None:
        """What a new inode still needs. It exists already: a failure is only logged."""
        try:
            if self.enable_acl:
                await acl.inherit(self.vol, dp, ip)
            await self._settle(dp)
        except OSError as error:
            self.vol.log.error("inode %d was made, but: %s", ip.ino, error)

    @contextmanager
    def made(self, ip: Inode) -> Iterator[None]:
        """What follows the making of an inode: its reference is dropped if that fails."""
        try:
            yield
        except BaseException:
            self.vol.inodes.put(ip)  # nobody else would ever free it
            raise

    async def _settle(self, dp: Inode) -> None:
        """With `dirsync` a change of names returns when it is on the device."""
        if self.dirsync:
            await file.fsync(self.vol, dp, False)

    # -- attributes -----------------------------------------------------------------------------

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if procdir.owns(inode):
            return self.proc.attributes(inode)
        async with self.using(inode) as ip:
            return attrs.entry(self.vol, ip, ip.ino)

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        if procdir.owns(inode):
            return self._size_of_report(inode, fields)
        async with self.using(inode) as ip:
            if fields.update_size:
                self.check_open(ip, os.O_WRONLY | os.O_TRUNC)
                await file.truncate(self.vol, ip, attr.st_size)
            changes = _changes(attr, fields, self.vol.geo.has_bigtime)
            await self._lose_privileges(ip, fields, ctx, changes)
            if changes:
                await namespace.setattr(self.vol, ip, changes)
                if fields.update_mode and self.enable_acl:
                    await acl.follow_mode(self.vol, ip)
            return attrs.entry(self.vol, ip, ip.ino)

    def _size_of_report(
        self, inode: int, fields: pyfuse3.SetattrFields
    ) -> pyfuse3.EntryAttributes:
        """Cutting a report or a tunable is how a shell begins to write: it changes nothing."""
        if fields.update_mode or fields.update_uid or fields.update_gid:
            raise OSError(errno.EPERM, "the attributes of reports are fixed")
        return self.proc.attributes(inode)

    async def _lose_privileges(
        self,
        ip: Inode,
        fields: pyfuse3.SetattrFields,
        ctx: pyfuse3.RequestContext,
        changes: dict[str, int],
    ) -> None:
        """A new owner, or another size by an ordinary user, takes set-id bits off a file.

        The kernel leaves that to us where we handle it at writes, and does it as well otherwise;
        pyfuse3 does not tell which.
        """
        chown_to_none = not changes and not fields.update_size  # chown(path, -1, -1)
        owner = fields.update_uid or fields.update_gid or chown_to_none
        if stat.S_ISDIR(ip.mode) or not (owner or fields.update_size):
            return
        mode = changes.get("mode", ip.mode)
        if (owner or ctx.uid) and mode != file.unprivileged(mode):
            changes["mode"] = file.unprivileged(mode)
        if ip.forkoff:
            with contextlib.suppress(OSError):
                await xattr.remove(self.vol, ip, CAPABILITY)

    async def access(self, inode: int, mode: int, ctx: pyfuse3.RequestContext) -> bool:
        return True  # the kernel checks: every mount has default_permissions

    async def statfs(self, ctx: pyfuse3.RequestContext) -> pyfuse3.StatvfsData:
        return await statfs(self.vol)

    # -- extended attributes --------------------------------------------------------------------

    async def setxattr(
        self, inode: int, name: bytes, value: bytes, ctx: pyfuse3.RequestContext
    ) -> None:
        async with self.using(inode) as ip:
            if policyattr.owns(name):
                return policyattr.set(self, ip, name, value, ctx.uid)
            _check_attributes(ip)
            await xattr.set(self.vol, ip, name, value)

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if name == STATISTICS and inode == pyfuse3.ROOT_INODE and self.statistics is not None:
            return self.statistics()
        if procdir.owns(inode):
            raise OSError(pyfuse3.ENOATTR, "no attributes")
        async with self.using(inode) as ip:
            if policyattr.owns(name):
                return policyattr.get(self, ip, name)
            if not ip.forkoff:  # the kernel asks before each write; answer at once
                xattr.stored_as(name)
                raise OSError(pyfuse3.ENOATTR, "no attributes")
            return await xattr.get(self.vol, ip, name)

    async def listxattr(self, inode: int, ctx: pyfuse3.RequestContext) -> Sequence[bytes]:
        if procdir.owns(inode):
            return []
        async with self.using(inode) as ip:
            return await xattr.names(self.vol, ip) if ip.forkoff else []

    async def removexattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        async with self.using(inode) as ip:
            if policyattr.owns(name):
                return policyattr.remove(self, ip, name, ctx.uid)
            _check_attributes(ip)
            await xattr.remove(self.vol, ip, name)

    # -- files ----------------------------------------------------------------------------------

    def check_open(self, ip: Inode, flags: int) -> None:
        """Inode flags that forbid what the mode allows. Raises OSError(EPERM)."""
        if not handles.is_writing(flags):
            return
        if ip.flags & L.DIFLAG_IMMUTABLE:
            raise OSError(errno.EPERM, "the file is immutable")
        if ip.flags & L.DIFLAG_APPEND and (flags & os.O_TRUNC or not flags & os.O_APPEND):
            raise OSError(errno.EPERM, "the file is append-only")

    def file_info(self, ip: Inode, flags: int, uid: int) -> pyfuse3.FileInfo:
        """The reply to an open; the reference on `ip` becomes the file handle's."""
        self._opens += 1
        fh = handles.pack(ip.handle, flags, uid, self._opens) | self._sync
        if ip.flags & L.DIFLAG_SYNC:
            fh |= handles.FULL_SYNC
        if fh & handles.WRITE:
            self.vol.eofblocks.opened(ip)
        self.vol.told.opened(fh, int(self.vol.pages.state(ip.handle)["error"]))
        return pyfuse3.FileInfo(fh=fh, direct_io=self.direct, keep_cache=not self.direct)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        if procdir.owns(inode):
            return self.proc.open(inode)
        async with self.using(inode) as ip:
            self.check_open(ip, flags)
            if flags & os.O_TRUNC and handles.is_writing(flags):
                await file.truncate(self.vol, ip, 0)
                if ctx.uid and ip.mode != file.unprivileged(ip.mode):
                    await file.remove_privileges(self.vol, ip)
            return self.file_info(self.vol.inodes.hold(ip.handle), flags, ctx.uid)

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        async with self.using(parent_inode) as dp:
            ip = await namespace.create(self.vol, dp, name, mode, ctx.uid, ctx.gid)
            with self.made(ip):
                await self.complete(dp, ip)
            info = self.file_info(self.vol.inodes.hold(ip.handle), flags, ctx.uid)
            return info, self.looked_up(ip)

    async def read(self, fh: int, off: int, size: int) -> Any:
        if procdir.is_open(fh):
            return self.proc.read(fh, off, size)
        ip = self.opened(fh)
        if off < ip.size:
            await self.times.touch(ip)
        return await file.read(self.vol, ip, off, size)

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        if procdir.is_open(fh):
            return await self.proc.write(fh, buf)
        ip = self.opened(fh)
        # With direct I/O the kernel leaves set-id bits to us; pyfuse3 does not say who writes.
        kill = self.direct and bool(fh & handles.ORDINARY)
        done = await file.write(self.vol, ip, off, buf, kill_privileges=kill)
        if fh & (handles.DATA_SYNC | handles.FULL_SYNC):
            await file.fsync(self.vol, ip, not fh & handles.FULL_SYNC, fh)
        return done

    async def flush(self, fh: int) -> None:
        # Closing a file writes nothing, as in XFS; ENOSYS tells the kernel not to ask again.
        raise pyfuse3.FUSEError(errno.ENOSYS)

    async def fsync(self, fh: int, datasync: bool) -> None:
        await file.fsync(self.vol, self.opened(fh), datasync, fh)

    def closed(self, fh: int) -> None:
        """Nobody has this file or directory open any more: drop the handle's reference."""
        if procdir.is_open(fh):
            self.proc.close(fh)
        else:
            ip = self.opened(fh)
            self.vol.told.closed(fh)
            if fh & handles.WRITE:
                self.vol.eofblocks.closed(ip)
            self.vol.inodes.put(ip)

    async def release(self, fh: int) -> None:
        self.closed(fh)

    # -- directories ----------------------------------------------------------------------------

    async def opendir(self, inode: int, ctx: pyfuse3.RequestContext) -> int:
        if procdir.owns(inode):
            return int(self.proc.open(inode).fh)
        async with self.using(inode) as dp:
            return handles.pack(self.vol.inodes.hold(dp.handle).handle, os.O_RDONLY)

    async def releasedir(self, fh: int) -> None:
        self.closed(fh)

    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        await file.fsync(self.vol, self.opened(fh), datasync)

    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if procdir.is_open(fh):
            self._list_reports(fh, start_id, token)
            return
        dp, cookie, told = self.opened(fh), start_id, 0
        try:
            while True:
                async with self.vol.reader(dp) as tp:
                    batch = await directory.read(tp, dp, cookie, READDIR_BATCH)
                for name, ino, _, cookie in batch:
                    if not await self._tell(token, name, ino, cookie):
                        return
                    told += 1
                if not batch:
                    return
        except (OSError, AllocationFailed):
            if not told:  # what was told counts as looked up; the error comes with the next call
                raise
        finally:
            await self.times.touch(dp, directory=True)

    def _list_reports(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for cookie, name, node in self.proc.entries(fh, start_id):
            reply = self.proc.attributes(node)
            if not pyfuse3.readdir_reply(token, name, reply, cookie):
                return

    async def _tell(self, token: pyfuse3.ReaddirToken, name: bytes, ino: int, cookie: int) -> bool:
        """Put one entry into the reply; False if it is full. Counts a lookup if it went in."""
        if name in OWN_NAMES:
            reply = pyfuse3.EntryAttributes()
            reply.st_ino, reply.st_mode = ino, stat.S_IFDIR
            return bool(pyfuse3.readdir_reply(token, name, reply, cookie))
        ip = await self.vol.inodes.get(ino)
        try:
            reply = attrs.entry(self.vol, ip, attrs.node_id(self.vol, ino))
            fits = bool(pyfuse3.readdir_reply(token, name, reply, cookie))
            if fits:
                self.vol.inodes.looked_up(ip)
            return fits
        finally:
            self.vol.inodes.put(ip)


def _check_attributes(ip: Inode) -> None:
    """Raises OSError(EPERM) for inodes whose attributes do not change."""
    if ip.flags & links.FIXED:
        raise OSError(errno.EPERM, "immutable or append-only")


def _changes(
    attr: pyfuse3.EntryAttributes, fields: pyfuse3.SetattrFields, bigtime: bool
) -> dict[str, int]:
    """What a setattr changes besides the size, under in-core names and in in-core units."""
    changes: dict[str, int] = {}
    if fields.update_mode:
        changes["mode"] = attr.st_mode
    if fields.update_uid:
        changes["uid"] = attr.st_uid
    if fields.update_gid:
        changes["gid"] = attr.st_gid
    for name in ("atime", "mtime", "ctime"):
        if getattr(fields, f"update_{name}"):
            changes[name] = stamp.from_unix_ns(getattr(attr, f"st_{name}_ns"), bigtime)
    return changes
