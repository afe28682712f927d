"""One XFS image, opened: geometry, caches, space, locks, background tasks, shutdown state.

`Volume.open(...)` checks the superblock, recovers the log, starts the background tasks in a nursery
of its own and yields the volume; leaving it inactivates what is unlinked, writes everything and
says in the log that all is at home. What happens in between is logged, so an image that crashed is
recovered by the next mount, ours or the kernel's.

Locks, in the order in which they are taken: IOLOCK of inodes (ascending), a transaction's
reservation, ILOCK of inodes (ascending), the space lock. One trio thread runs all of it, so the
space lock is one for all AGs: more would only overlap metadata reads.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import numpy as np
import trio

from alloc import gfp, lockdep
from alloc.arena import Arena
from alloc.topology import ONE, Topology
from fs import enomem, namespace, recovery
from fs.cache import resident
from fs.cache.ahead import Ahead
from fs.cache.buf import BufCache
from fs.cache.dentry import DentryCache
from fs.cache.folio import PageCache
from fs.cache.incore import I4_ILOCK, I4_IOLOCK, INODE_WORDS
from fs.cache.inode import Inode, InodeCache
from fs.cache.lock import LockTable, Mutex
from fs.device.base import Device
from fs.eofblocks import EofBlocks
from fs.errors import Corrupt, ShutDown, UserError
from fs.freeze import Freezer
from fs.inodegc import InodeGc
from fs.log import bounds, head, iclog
from fs.log.ail import EVERYTHING
from fs.log.grant import LOG_SPACE, Overrun, Ticket
from fs.log.intents import Intent
from fs.log.log import Log
from fs.log.region import Region
from fs.log.transaction import Transaction
from fs.shutdown import Why
from fs.space import Space
from fs.xfs import ag, btkind, dirbuf, freespace, inobt, inode, residentino, superblock
from fs.xfs import layout as L
from fs.xfs.geometry import Geometry
from writeback import errseq
from writeback.flusher import Flusher

MOUNT_FAILED = 32
SUPERBLOCK_READ = 32768  # the largest sector
METADATA_PERIOD_S = 30.0  # dirty metadata goes home at least this often
COVER_PERIOD_S = 30.0  # a log that stood still for so long is covered
DIRTY_INODE_BYTES = 1024  # what a dirty inode keeps from reclaim: record and forks
RESTART_S = 1.0  # between a background task's failure and its next attempt
METADATA = "metadata"  # to the lock-order validator: transactions wait for the metadata writer
# The documented order of locks, from the outermost to the innermost.
LOCK_ORDER = ("rename", "iolock", lockdep.FS_RECLAIM, METADATA, LOG_SPACE, "ilock", "space")
FLUSH_BATCH = 256  # inodes flushed between two turns of the other tasks

# Kinds of blocks that kernels find by themselves, in the order of fs.cache.resident's K_*.
RESIDENT_KINDS = (
    ag.AGI_OPS,
    btkind.INO.ops,
    btkind.FINO.ops,
    inode.INODE_OPS,
    dirbuf.DATA_OPS,
    dirbuf.LEAF_OPS,
    dirbuf.FREE_OPS,
    btkind.BMAP.ops,
)

default_log = logging.getLogger("nofailfs")


class Volume:
    """An open image. Create it with `Volume.open`."""

    def __init__(
        self,
        device: Device,
        geo: Geometry,
        memory_bytes: int,
        nodes: Topology,
        ends: head.Ends,
        *,
        read_only: bool,
        log: logging.Logger,
        paranoid: bool,
        logbsize: int,
        floor: int,
    ) -> None:
        self.dev = device
        self.geo = geo
        self.log = log
        self.read_only = read_only
        self.shut_down = False
        self.shutdown_reason = ""
        self.on_shutdown: Callable[[], None] = lambda: None  # lanes hear of it so
        self.arena = Arena(memory_bytes, nodes=nodes)
        self.failures = enomem.Failures()
        self.told = errseq.Told()
        self.wb_error = 0  # the last error of any write-back: a word of writeback/errseq.py
        self.ags = ag.Summary(geo)
        self.space = Space(lambda: self.ags.unavailable)
        self.bufs = BufCache(self.arena, device, geo, log, paranoid=paranoid)
        self.inodes = InodeCache(self.arena, geo.inode_log)
        self.dentries = DentryCache(self.arena)
        self.pages = PageCache(self)
        self.ahead = Ahead(self)
        self.flusher = Flusher(self.arena, self.pages, self.pages.dirty, log)
        self.flusher.avg_bandwidth = lambda: self.pages.throttle.bandwidth.avg
        words = self.arena.mem.view(np.uint32)
        self.iolocks = LockTable("iolock", words, INODE_WORDS, I4_IOLOCK, self._ino_of)
        self.ilocks = LockTable("ilock", words, INODE_WORDS, I4_ILOCK, self._ino_of)
        self.space_lock = LockTable("space")
        self.create_blocks = namespace.create_blocks(geo)
        region = Region(device, geo)
        self.xlog = Log(self, region, ends, logbsize or iclog.SIZE_LEAST, floor)
        self.running = 0  # transactions that are open
        self.metadata_period_s = METADATA_PERIOD_S
        self._metadata_wake = trio.Event()
        self._metadata_done = trio.Event()
        self._inode_flush = Mutex("inode flush")
        self._replayed = False  # the log, when the volume was opened
        self._covering = Mutex("cover")  # the end of a mount waits for it
        self.inodegc = InodeGc(self)
        self.eofblocks = EofBlocks(self)
        self.freezer = Freezer(self)
        self._closing = False
        self.arena.holders = lockdep.held_by
        if lockdep.current is not None:
            lockdep.current.declare(*LOCK_ORDER)

    # -- opening and closing --------------------------------------------------------------------

    @staticmethod
    @asynccontextmanager
    async def open(
        device: Device,
        memory_bytes: int = 256 << 20,
        nodes: Topology = ONE,
        *,
        read_only: bool = False,
        norecovery: bool = False,
        log: logging.Logger = default_log,
        paranoid: bool = False,
        logbsize: int = 0,
    ) -> AsyncIterator[Volume]:
        """Open the image on a device for the duration of a block.

        A log with changes is recovered first; a read-only volume of such an image is refused
        unless `norecovery` asks for what is there without it. `paranoid` verifies every metadata
        block before it is written, too. `logbsize` is the size of the log's buffers; 0: as large as
        they should be. Raises UserError for an image that is refused; it says why
        and what to do.
        """
        only_reads = read_only or device.read_only
        assert only_reads or not norecovery
        try:
            geo, ends = await _admit_image(device, only_reads)
            if not only_reads:
                _check_log(geo, logbsize, memory_bytes)
            left = None
            if not ends.clean and not norecovery:
                geo, left = await _replay_log(device, geo, ends, only_reads, log)
        except UserError as error:
            raise UserError(f"{device.name}: {error}", MOUNT_FAILED) from error
        except head.BadLog as error:
            text = f"{device.name}: bad log: {error}; run xfs_repair"
            raise UserError(text, MOUNT_FAILED) from error
        vol = Volume(
            device,
            geo,
            memory_bytes,
            nodes,
            ends,
            read_only=only_reads,
            log=log,
            paranoid=paranoid,
            logbsize=logbsize,
            floor=recovery.oldest(left or ()),
        )
        try:
            async with trio.open_nursery() as nursery:
                await vol._start(nursery, left)
                try:
                    yield vol
                finally:
                    with trio.CancelScope(shield=True):
                        await vol._stop()
                    nursery.cancel_scope.cancel()
        finally:
            vol.arena.close()

    async def _start(self, nursery: trio.Nursery, left: list[Intent] | None) -> None:
        self.inodes.read_image = self._read_inode
        self.inodes.evict = self.pages.evict
        self.inodes.unused = self.flusher.unused
        self.inodes.freeing = self._forget
        self.inodes.start_inactivation = self.inodegc.add
        await self.bufs.start(max(self.geo.block_size, self.geo.cluster_bytes))
        await self.inodes.start()
        await self.dentries.start()
        await self.pages.start()
        self.inodegc.start()
        self.resident = resident.of_volume(
            self, RESIDENT_KINDS, inode.limits(self.geo), inode.new_flags2(self.geo)
        )
        self.arena.register_cleaner(self.wake_metadata)
        nursery.start_soon(self._in_background, self.arena.kswapd)
        async with self.reader() as tp:
            await freespace.mount(tp)
        self.space.start(self.ags.free, self.geo.dblocks)
        if not self.read_only:
            self.log.info("%s: %s", self.dev.name, self.xlog.told())
            await self.xlog.start()
            nursery.start_soon(self._in_background, self.xlog.run)
            nursery.start_soon(self._in_background, self._metadata_writer)
            nursery.start_soon(self._in_background, self._cover_when_idle)
            nursery.start_soon(self._in_background, self.flusher.run)
            nursery.start_soon(self._in_background, self.eofblocks.run)
        nursery.start_soon(self._in_background, self.ahead.run)
        nursery.start_soon(self._in_background, self.inodegc.run)
        if left is not None:
            self._replayed = True
            await self._finish_recovery(left)

    async def _finish_recovery(self, left: list[Intent]) -> None:
        """What the log says was begun; what says so is kept until it is done and at home."""
        try:
            await recovery.finish(self, left)
            await self.flush_metadata()
            self.xlog.recovered()
        except OSError as error:
            raise UserError(
                f"{self.dev.name}: recovery could not be finished: {error}; the next mount goes on "
                "with it; if that comes no further, run xfs_repair",
                MOUNT_FAILED,
            ) from error

    def _forget(self, handle: int) -> None:
        """An in-core inode's memory goes: whoever knows it by its handle knows it no more."""
        self.pages.throttle.forget(handle)
        self.eofblocks.forget(handle)

    async def _in_background(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run a task for the volume's life; a bug in it is a shutdown, not the mount's death.

        The task starts again, because there may be somebody who waits for it.
        """
        while True:
            try:
                await work()
            except Exception as error:
                self._background_failed(error)
            await trio.sleep(RESTART_S)

    def _background_failed(self, error: Exception) -> None:
        failed = enomem.failed_allocation(error)
        if failed is not None:  # nothing is half-done: a dirty transaction has shut down
            self.failures.note(enomem.RETRY, failed)
            return
        if not self.shut_down:
            self.log.error("background task failed", exc_info=error)
        self.shutdown(f"unexpected {type(error).__name__} in a background task: {error}")

    async def _stop(self) -> None:
        """Write everything and mark the image clean; after a shutdown write nothing."""
        self._closing = True
        self.freezer.thaw()
        async with self._covering:
            pass
        await self.ahead.drain()
        self.space.close_stash()
        if self.read_only:
            return
        try:
            await self.drain_inactive()
            if not self.shut_down:
                await self._write_data()
                await self.eofblocks.drain()
                await self.eofblocks.squeeze()
            if not self.shut_down:
                await enomem.insist(self, self._write_metadata, "unmount failed")
        except OSError as error:
            self.shutdown(f"unmount failed: {error}", Why.METADATA_IO)
        if self.shut_down:
            self.log.error("unmounted after a shutdown: the next mount recovers the log")

    async def _write_data(self) -> None:
        """All dirty folios; those that stay dirty, for want of memory, are tried again."""
        await self.flusher.sync()
        for _ in range(enomem.TRIES):
            if self.shut_down or not self.pages.dirty.nr_dirty:
                return
            await trio.sleep(enomem.RETRY_S)
            await self.flusher.sync()
        self.shutdown(f"unmount failed: {self.pages.dirty.nr_dirty} pages stay dirty")

    async def _write_metadata(self) -> None:
        """The last of it: metadata, exact counters, and the record that all is at home."""
        if self._replayed or self.xlog.is_used:  # else they are as they were
            await self._log_counters()
        await self.flush_metadata()
        await self.xlog.unmount()
        await self.dev.flush()

    async def cover_log(self) -> None:
        """Bring everything home, and have nothing in the log but the superblock, as it is there.

        The first checkpoint holds what there was; the second one's tail is itself. Raises OSError.
        """
        for _ in range(2):
            await self._log_counters()
            await self.flush_metadata()

    async def _cover_when_idle(self) -> None:
        """Cover the log when nobody has changed anything for a while: no mount has to replay it."""
        covered = before = 0
        while True:
            await trio.sleep(COVER_PERIOD_S)
            stable = self.bufs.ail.stable
            idle = stable == before and not self.running and not self.xlog.cil.count
            before = stable
            if stable > covered and idle and not self.arena.below_min:
                async with self._covering:
                    if not (self.freezer.level or self._closing or self.shut_down):
                        await self.cover_log()
                covered = before = self.bufs.ail.stable

    async def _log_counters(self) -> None:
        """The superblock's counters, which a running filesystem keeps in the AG headers."""
        async with self.transaction("sb") as tp:
            inodes = await self._count_inodes(tp)
            buf = await ag.read_sb(tp)
            sb = buf.rec(L.SB)
            sb["icount"], sb["ifree"] = inodes
            sb["fdblocks"] = self.space.free
            assert self.space.free == self.ags.free, "free-block accounting went wrong"
            tp.log(buf)

    async def _count_inodes(self, tp: Transaction) -> tuple[int, int]:
        """Allocated and free inodes, from the AGI headers."""
        count = free = 0
        for agno in range(self.geo.agcount):
            agi = (await ag.read_agi(tp, agno)).rec(L.AGI)
            count, free = count + int(agi["count"]), free + int(agi["freecount"])
        return count, free

    # -- errors ---------------------------------------------------------------------------------

    def corrupt(self, structure: str, where: str, reason: str) -> Corrupt:
        """One line in the log; the caller raises the result."""
        self.log.error("corrupt %s at %s: %s; run xfs_repair", structure, where, reason)
        return Corrupt(f"corrupt {structure} at {where}: {reason}")

    def shutdown(self, reason: str, why: Why = Why.IN_CORE) -> None:
        """Stop everything: nothing more is written. Idempotent."""
        if self.shut_down:
            return
        self.shut_down = True
        self.shutdown_reason = reason
        self.on_shutdown()
        self.log.critical("%s", why.message(self.dev.name, reason))
        self.xlog.give_up()
        self.wake_metadata()
        self._metadata_done.set()
        self.inodegc.give_up()
        self.freezer.thaw()

    def check_alive(self) -> None:
        """Raises ShutDown after a shutdown."""
        if self.shut_down:
            raise ShutDown

    def check_writable(self) -> None:
        """Raises ShutDown after a shutdown, OSError(EROFS) on a read-only volume."""
        if self.shut_down:
            raise ShutDown
        if self.read_only:
            raise OSError(30, "the filesystem is mounted read-only")

    # -- transactions and locks -----------------------------------------------------------------

    def transaction(self, name: str, blocks: int = 0, *, from_pool: bool = False) -> Transaction:
        """A write transaction with a block reservation; enter it with `async with`.

        Entering raises OSError(ENOSPC), OSError(EROFS) or ShutDown with nothing changed.
        """
        return Transaction(self, name, blocks, write=True, from_pool=from_pool)

    def reader(self, *inodes: Inode) -> Transaction:
        """A read-only transaction that holds the inodes' ILOCKs shared."""
        return Transaction(self, "reader", 0, write=False, inodes=inodes)

    def iolock(self, ip: Inode, shared: bool = False) -> AbstractAsyncContextManager[None]:
        """Serialises data operations: shared to read, exclusive to write or truncate."""
        return self.iolocks.locked(ip.handle, shared)

    def _ino_of(self, handle: int) -> int:
        """Several inodes are locked in this order."""
        return int(self.inodes.fields["ino"][handle])

    async def admit(self, name: str) -> None:
        """Let a transaction begin when dirty metadata leaves memory for it, and nothing is frozen.

        The writer needs no transaction, so what is waited for here always comes.
        """
        self.check_writable()
        await self.freezer.admit()
        if lockdep.current is not None:
            lockdep.current.wants(METADATA)
        while self._metadata_is_crowding() and not self.shut_down:
            self.wake_metadata()
            await self._metadata_done.wait()
        self.check_writable()

    def admits(self, name: str, blocks: int = 0) -> Ticket | None:
        """Room in the log for a transaction that waits for nothing; None if it had to wait.

        It must do without blocks, but is refused where one that may need `blocks` would be.
        """
        if self.shut_down or self.read_only or self.freezer.level:
            return None
        if self._metadata_is_crowding():
            return None
        if blocks and blocks > self.space.available:
            return None
        return self.xlog.try_now(name)

    def commit_now(self, ticket: Ticket, *, done: bool) -> None:
        """The end of a transaction that waited for nothing: a kernel noted what it changed."""
        touched = self.resident.bufs_touched[0] + self.resident.inodes_touched[0]
        assert done or not touched
        if touched:
            try:
                self.xlog.commit_now(self.resident, ticket)
            except Overrun as error:
                self.shutdown(str(error))
        ticket.release()

    def _metadata_is_crowding(self) -> bool:
        dirty = self.bufs.dirty_bytes + self.inodes.dirty_count * DIRTY_INODE_BYTES
        return dirty > self.arena.memory_bytes // bounds.METADATA_SHARE or self.bufs.ail.is_crowded

    def enter(self) -> None:
        """A write transaction began."""
        self.running += 1

    def leave(self) -> None:
        """A write transaction ended."""
        assert self.running > 0
        self.running -= 1
        self.space.changed()
        self.freezer.stirred()

    # -- metadata write-back --------------------------------------------------------------------

    def wake_metadata(self) -> None:
        """Have dirty metadata written soon: memory is short, or it is a lot."""
        self._metadata_wake.set()

    async def _metadata_writer(self) -> None:
        with gfp.memalloc():
            while True:
                with trio.move_on_after(self.metadata_period_s):
                    await self._metadata_wake.wait()
                self._metadata_wake = trio.Event()
                written = self.bufs.counts["writes"]
                if not self.shut_down:
                    try:
                        with lockdep.holding(lockdep.FS_RECLAIM), lockdep.holding(METADATA):
                            await enomem.insist(self, self.flush_metadata, "metadata write failed")
                    except OSError as error:
                        self.shutdown(f"metadata write failed: {error}", Why.METADATA_IO)
                done, self._metadata_done = self._metadata_done, trio.Event()
                done.set()
                if self.bufs.counts["writes"] > written:  # else who waits would only wake us again
                    self.arena.kick()

    async def flush_metadata(self) -> None:
        """Take what is committed to the log, and then home, and make it stable.

        Passes by what a transaction holds and by what changes meanwhile: that is stable in the log.
        Waits for no lock that a transaction holds, so that cleaning never waits for memory.
        Raises OSError from the device or for a corrupt inode cluster, ShutDown.
        """
        self.check_alive()
        with gfp.memalloc():
            await self.xlog.force()
            await self._flush_inodes()
            await self.bufs.write_dirty()
        await self.dev.flush()
        self.xlog.moved_tail()

    async def _flush_inodes(self) -> None:
        """Copy dirty inodes into their cluster buffers.

        A cluster that has to be read takes memory; when only the reserve is left, those that are
        filled are written, and can be reclaimed, before the next one is read.
        """
        async with self._inode_flush:
            left = self.inodes.dirty_count
            while left > 0:
                if self.arena.below_min:
                    await self.bufs.write_dirty()
                looks = min(left, FLUSH_BATCH)
                missing = residentino.flush(self.resident, looks, EVERYTHING)
                if missing:
                    await self._flush_inode(self.inodes.view(missing))
                left -= 1 if missing else looks
                await trio.lowlevel.checkpoint()

    async def _flush_inode(self, ip: Inode) -> None:
        ino = ip.ino
        daddr, bbs, offset = inobt.imap(self.geo, ino)
        buf = await self.bufs.read(daddr, bbs, inode.INODE_OPS)
        try:
            if ip.ino == ino and ip.dirty:  # else its chunk was freed while the cluster was read
                residentino.flush_one(self.resident, ip.handle, buf.handle, buf.addr + offset)
        finally:
            self.bufs.release(buf.handle)

    # -- inodes ---------------------------------------------------------------------------------

    async def _read_inode(self, ip: Inode) -> None:
        """Fill a fresh in-core inode from its cluster."""
        ino = ip.ino
        if not self.geo.valid_ino(ino):
            raise self.corrupt("inode", f"ino {ino}", "number outside the filesystem")
        daddr, bbs, offset = inobt.imap(self.geo, ino)
        buf = await self.bufs.read(daddr, bbs, inode.INODE_OPS)
        try:
            addr = buf.addr + offset
            fault = inode.verify(self.geo, buf.mem, addr, ino)
            if fault:
                raise self.corrupt("inode", f"ino {ino}", fault)
            mem = self.arena.mem
            inode.unpack(self.geo, mem, addr, self.inodes.table, ip.handle, mem, ip.image_addr)
        finally:
            self.bufs.release(buf.handle)

    async def drain_inactive(self) -> None:
        """Wait until every unlinked inode without users is free."""
        await self.inodegc.drain()

    # -- figures --------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What statistics want to know, by name."""
        return {
            "free_blocks": self.space.free,
            "available_blocks": self.space.available,
            "dirty_metadata_bytes": self.bufs.dirty_bytes,
            "dirty_inodes": self.inodes.dirty_count,
            "running_transactions": self.running,
            "inactive_inodes": len(self.inodegc),
        }


async def _admit_image(device: Device, read_only: bool) -> tuple[Geometry, head.Ends]:
    """Superblock checks, and the ends of the log. Raises UserError, BadLog."""
    raw = bytearray(min(SUPERBLOCK_READ, device.size))
    await device.read(0, [memoryview(raw)])
    sb = superblock.read(raw, device.size)
    superblock.check_features(sb, writable=not read_only)
    geo = superblock.geometry(sb)
    return geo, await head.find(Region(device, geo))


def _check_log(geo: Geometry, logbsize: int, memory_bytes: int) -> None:
    """Whether a volume can be written with such a log. Raises UserError."""
    try:
        bounds.check(geo, bounds.iclog_bytes(geo, logbsize), memory_bytes)
    except ValueError as error:
        raise UserError(str(error)) from error


async def _replay_log(
    device: Device, geo: Geometry, ends: head.Ends, read_only: bool, log: logging.Logger
) -> tuple[Geometry, list[Intent]]:
    """Bring home what the log says, and look at the superblock again, which may be other now."""
    if read_only:
        raise UserError(
            "the log holds changes that were not written back, and nothing may be written: mount "
            "the image once without ro, or with -o ro,norecovery, which shows it as it is"
        )
    try:
        left = await recovery.replay(device, geo, ends, log)
    except head.BadLog as error:
        raise UserError(
            f"the log cannot be replayed: {error}. Mount the image with the kernel's XFS once and "
            "unmount it, which replays the log; or, losing what is in it, run xfs_repair -L"
        ) from error
    except OSError as error:
        raise UserError(f"the log was not replayed: {error}; the next mount tries again") from error
    geo, _ = await _admit_image(device, read_only)
    return geo, left
