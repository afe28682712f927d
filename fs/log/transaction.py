"""Transactions: the only way to dirty metadata, and the only way to hold metadata buffers.

A transaction reserves, joins, modifies and commits. Entering is the only place that waits for
space, in the filesystem and in the log; afterwards nothing can fail for lack of it. What it changed
stays changed: XFS modifies cached objects in place and keeps no before-image, so leaving with an
exception after the first change shuts the filesystem down. Leaving without one puts all that it
changed into the CIL, at once; from there checkpoints take it to the log, and only then it may go
home.

Order of locks: reservations, then ILOCKs in ascending ino (one call), then the space lock. All are
held until the end. Buffers and inodes taken through a transaction are released at its end.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING

import trio

from alloc import gfp
from fs import enomem
from fs.cache.buf import Buf, BufOps, Runs
from fs.cache.inode import Inode
from fs.log.changes import BUFFER, ORDERED, POINTERS, Changes
from fs.log.grant import Overrun
from fs.xfs.inode import INODE_OPS
from writeback.mapping import INODE_DIRTY

if TYPE_CHECKING:
    from types import TracebackType

    from fs.log.grant import Ticket
    from fs.volume import Volume


class Transaction:
    """One transaction. Read-only ones (`vol.reader`) hold buffers but dirty nothing."""

    def __init__(
        self,
        vol: Volume,
        name: str,
        blocks: int,
        *,
        write: bool,
        inodes: tuple[Inode, ...] = (),
        from_pool: bool = False,
    ) -> None:
        self.vol = vol
        self.name = name
        self.blocks = 0  # what is left of the block reservation
        self.dirty = False
        self._wanted = blocks
        self._write = write
        self._from_pool = from_pool
        self._readers = inodes
        self._changes = Changes()
        self._ticket: Ticket | None = None
        self._held: dict[int, Buf] = {}
        self._stale: list[Buf] = []
        self._locked: list[int] = []
        self._space_locked = False
        self.places: dict[tuple[int, int], Runs] = {}  # of directory blocks, by inode and block
        self._shield = trio.CancelScope(shield=True)
        self._scope = gfp.nofs()

    # -- life -----------------------------------------------------------------------------------

    async def __aenter__(self) -> Transaction:
        if self._write:
            await self.vol.admit(self.name)
            await self._reserve()
            self.blocks = self._wanted
            await self._reserve_log()
            self.vol.enter()
        self._shield.__enter__()
        self._scope.__enter__()
        await self._lock(self._readers, shared=True)
        return self

    async def _reserve(self) -> None:
        """Promise it the blocks that it may need. Raises OSError(ENOSPC)."""
        space = self.vol.space
        try:
            space.reserve(self._wanted, from_pool=self._from_pool)
        except OSError:
            if self._from_pool or not await self.vol.eofblocks.squeeze():
                raise
            space.reserve(self._wanted)

    async def _reserve_log(self) -> None:
        """Promise it room in the log for all that it may change. Raises ShutDown."""
        try:
            self._ticket = await self.vol.xlog.reserve(self.name)
        except BaseException:
            self.vol.space.release(self.blocks)
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is not None and self.dirty:
                self._cancel_dirty(error)
            elif self._changes:
                await self._commit()
            for buf in self._stale:
                await self.vol.bufs.wait_written(buf.handle)
        finally:
            self._finish()
            self._scope.__exit__(kind, error, trace)
            self._shield.__exit__(kind, error, trace)

    async def _commit(self) -> None:
        """From here on it happened."""
        assert self._ticket is not None
        try:
            await self.vol.xlog.commit(self._changes, self._ticket)
        except Overrun as error:
            self.vol.shutdown(str(error))
        except BaseException as error:  # a policy that lets allocations fail
            self._cancel_dirty(error)
            raise

    def _cancel_dirty(self, error: BaseException) -> None:
        """What was changed cannot be taken back: memory and image disagree from here on."""
        vol = self.vol
        if not vol.shut_down:
            vol.log.error(
                "%s: Internal error xfs_trans_cancel at %s.  Caller %s",
                vol.dev.name,
                _origin(error),
                self.name,
            )
        enomem.force_shutdown(vol, f"transaction {self.name} was cancelled while dirty", error)

    def _finish(self) -> None:
        for buf in self._held.values():
            self.vol.bufs.release(buf.handle)
        for buf in self._stale:
            self.vol.bufs.release(buf.handle)
        if self.blocks:
            self.vol.space.release(self.blocks)
        if self._space_locked:
            self.vol.space_lock.release(0)
        for handle in self._locked:
            self.vol.ilocks.release(handle)
        if self._ticket is not None:
            self._ticket.release()
        if self._write:
            self.vol.leave()

    @property
    def has_room(self) -> bool:
        """Does what is promised of the log suffice for another turn of this transaction's loop?"""
        need = self.vol.xlog.budget.need(self.name)
        return self._changes.nbytes + need.step <= need.payload

    # -- locks ----------------------------------------------------------------------------------

    async def _lock(self, inodes: tuple[Inode, ...], *, shared: bool) -> None:
        unique = {ip.handle: ip.ino for ip in inodes}
        for handle in sorted(unique, key=lambda h: unique[h]):
            await self.vol.ilocks.acquire(handle, shared)
            self._locked.append(handle)

    async def lock_inodes(self, *inodes: Inode) -> None:
        """ILOCK the inodes exclusively: all that the transaction needs, in one call."""
        assert self._write
        assert not self._locked
        assert not self._space_locked
        await self._lock(inodes, shared=False)

    def lock_new(self, ip: Inode) -> None:
        """ILOCK an inode that was just made, which nobody else can have: it stays until the end."""
        taken = self.vol.ilocks.try_acquire(ip.handle, shared=False)
        assert taken, f"new inode {ip.ino} is locked"
        self._locked.append(ip.handle)

    async def lock_space(self) -> None:
        """The AG lock: AG headers, all trees in AGs, unlinked lists. Idempotent."""
        if not self._space_locked:
            await self.vol.space_lock.acquire(0, shared=False)
            self._space_locked = True

    # -- buffers --------------------------------------------------------------------------------

    async def read(
        self, daddr: int, bbs: int, ops: BufOps, owner: int | None = None, runs: Runs = ()
    ) -> Buf:
        """A verified buffer, held until the end. Raises Corrupt, OSError(EIO)."""
        held = self._held.get(daddr)
        if held is not None and held.ops is ops:
            return held
        buf = await self.vol.bufs.read(daddr, bbs, ops, owner, runs)
        return self._keep(buf)

    async def get(
        self, daddr: int, bbs: int, ops: BufOps, owner: int = 0, runs: Runs = ()
    ) -> Buf:
        """The buffer of a newly allocated block, zeroed; it must be logged."""
        assert self._write
        return self._keep(await self.vol.bufs.get(daddr, bbs, ops, owner, runs))

    def _keep(self, buf: Buf) -> Buf:
        held = self._held.get(buf.daddr)
        if held is None:
            self._held[buf.daddr] = buf
            return buf
        self.vol.bufs.release(buf.handle)
        return held

    def log(self, buf: Buf) -> None:
        """The buffer changed. Of an inode cluster, only unlinked pointers are logged so."""
        self._change(buf, POINTERS if buf.ops is INODE_OPS else BUFFER)

    def order(self, buf: Buf) -> None:
        """The buffer must be home before the log forgets this transaction, which rebuilds it."""
        self._change(buf, ORDERED)

    def _change(self, buf: Buf, kind: int) -> None:
        assert self._write
        self.vol.check_writable()
        self.dirty = True
        self._changes.add_buffer(buf.handle, kind, buf.size)
        self.vol.bufs.mark_dirty(buf.handle)

    def log_also(self, vector: bytes) -> None:
        """Something that recovery is to do besides: a log vector (fs/log/formats.py)."""
        assert self._write
        self.dirty = True
        self._changes.loose.append(vector)

    def freed(self, fsbno: int, n: int) -> None:
        """Blocks were freed: nobody's data goes there before the log says so."""
        self._changes.extents.append((fsbno, n))

    def invalidate(self, buf: Buf) -> None:
        """The buffer's block was freed: it is forgotten and never written."""
        assert self._write
        self.dirty = True
        if self._held.pop(buf.daddr, None) is not None:
            for daddr, _, size in self.vol.bufs.parts(buf.handle):
                self._changes.cancels[daddr, size] = None
            self._changes.bufs.pop(buf.handle, None)
            self._changes.stale[buf.handle] = None
            self.vol.bufs.invalidate(buf.handle)
            self._stale.append(buf)

    def forget(self, daddr: int, size: int, *, logged: bool = True) -> None:
        """Invalidate a block of `size` bytes, or a part of one, without reading it.

        What is never logged, values of attributes, the log need not be told to forget.
        """
        self.dirty = True
        buf = self._held.get(daddr) or self.vol.bufs.find(daddr)
        if buf is not None:
            self.invalidate(self._keep(buf) if daddr not in self._held else buf)
        if logged:
            self._changes.cancels[daddr, size] = None
        else:
            self._changes.cancels.pop((daddr, size), None)

    def forget_inodes(self, first: int, count: int) -> None:
        """A chunk's blocks are freed; none of its inodes is in use."""
        for handle in self.vol.inodes.in_core(first, count):
            self._changes.inodes.pop(handle, None)
            self._changes.releases.append(self.vol.xlog.cil.forget_inode(handle))
        self.vol.inodes.drop_chunk(first, count)

    def release(self, buf: Buf) -> None:
        """Let go of a buffer early, so that a long scan does not hold memory."""
        if self._held.pop(buf.daddr, None) is not None:
            self.vol.bufs.release(buf.handle)

    # -- inodes and space -----------------------------------------------------------------------

    def log_inode(self, ip: Inode) -> None:
        """Core or forks of the inode changed."""
        assert self._write
        self.vol.check_writable()
        self.dirty = True
        self.vol.pages.change_flags(ip.handle, remove=INODE_DIRTY)  # its stamps go along
        self._changes.add_inode(ip.handle, self.vol.geo.inode_size)
        self.vol.inodes.mark_dirty(ip)

    def take_delalloc(self, blocks: int) -> None:
        """Take over a reservation that dirty data made when it was written."""
        self.vol.space.delalloc_to_reserved(blocks)
        self.blocks += blocks

    def take_pool(self, blocks: int) -> None:
        """Reserve from the pool for work that must complete."""
        self.vol.space.reserve(blocks, from_pool=True)
        self.blocks += blocks


def _origin(error: BaseException) -> str:
    """Where in the filesystem an error came from, as XFS says it."""
    found = "line 0 of file unknown"
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if module.startswith("fs."):
            found = f"line {line} of file {module.replace('.', '/')}.py"
    return found
