"""The log of a volume: who may change it, what has to be stable, and what may be forgotten.

Transactions ask here for space (`reserve`), put what they changed into the CIL (`commit`) and have
it on the device when somebody asks (`force`) or after a while. One task writes checkpoints, one at
a time, while the next one is collected: whoever asks meanwhile shares that one.

A checkpoint is written between two flushes of the device. What lies in front of the first is stable
before the checkpoint is: data that it exposes, and what went home and so is no longer kept in the
log. Behind the second its objects may go home. The tail named in its records was looked up before
the first flush.

Locking: trio thread only. `reserve` is the only wait for space, and comes before any lock of an
inode; committing is atomic. The writer takes no lock and no memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from fs.errors import ShutDown
from fs.log import bounds, reservation
from fs.log.budget import Budget
from fs.log.cil import Cil
from fs.log.grant import Grant, Overrun, lsn_distance
from fs.log.region import Region
from fs.log.stream import LogOverrun, Stream
from fs.log.vectors import Vectors
from fs.shutdown import Why
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.cache.resident import Resident
    from fs.log.changes import Changes
    from fs.log.grant import Ticket
    from fs.log.head import Ends
    from fs.volume import Volume

PERIOD_S = 30.0  # what is committed is stable after this long


class Log:
    """Of one writable volume. `run` is its task.

    `ends` are those of the log that was found; from `floor` on, an LSN, it is needed until
    `recovered` is called (0: not at all).
    """

    def __init__(
        self, vol: Volume, region: Region, ends: Ends, logbsize: int, floor: int = 0
    ) -> None:
        self._vol, self._region = vol, region
        self.ail = vol.bufs.ail
        self.period_s = PERIOD_S
        self.stream = Stream(region, vol.arena, ends, ends.size or logbsize)
        head = self.stream.head
        self.ail.floor = floor
        nbytes = region.bbs << L.BB_LOG
        unit = self._unit
        self.grant = Grant(nbytes, unit, self._push_tail, head, floor or head)
        self.budget = Budget(vol.geo)
        self.vectors = Vectors(vol.arena)
        self.limit = bounds.limit(vol.geo, vol.arena.memory_bytes)
        self.cil = Cil(vol, self.vectors, self.grant.context)
        self._wake = trio.Event()
        self._wanted = 0  # checkpoint that somebody waits for
        self._going = 0  # where the checkpoint begins that is being written, 0: none is
        self._moved = trio.Event()  # a checkpoint became stable, or none will any more
        self.counts = {"checkpoints": 0, "forces": 0, "bytes": 0}

    def _unit(self, payload: int) -> int:
        return reservation.unit_bytes(self._vol.geo, payload, self.stream.shape.size)

    def told(self) -> str:
        """A line for the log of the mount."""
        vol = self._vol
        return bounds.told(vol.geo, self.stream.shape.size, vol.arena.memory_bytes)

    async def start(self) -> None:
        """Take the memory of iclogs, and clear the way ahead. Raises OSError."""
        await self.stream.start()

    @property
    def is_used(self) -> bool:
        """Has any transaction committed?"""
        return self.cil.seq > 1 or self.cil.count > 0

    # -- transactions ---------------------------------------------------------------------------

    async def reserve(self, name: str) -> Ticket:
        """Space for a transaction of that name; waits for it. Raises ShutDown."""
        while self.cil.payload > bounds.GATE * self.limit and not self._vol.shut_down:
            await self._wait(self.cil.seq)
        return await self.grant.reserve(name, self.budget.need(name).payload)

    def try_now(self, name: str) -> Ticket | None:
        """The same, if nobody has to be waited for."""
        if self.cil.payload > bounds.GATE * self.limit or not self.cil.stocked:
            return None
        return self.grant.try_now(name, self.budget.need(name).payload)

    async def commit(self, changes: Changes, ticket: Ticket) -> None:
        """What a transaction changed is the log's from here on. Raises Overrun."""
        await self.cil.commit(changes, ticket)
        self._grown()

    def commit_now(self, touched: Resident, ticket: Ticket) -> None:
        """The same for a transaction that waited for nothing and left its changes on lists."""
        self.cil.commit_now(touched.bufs_touched, touched.inodes_touched, ticket)
        self._grown()

    def _grown(self) -> None:
        if self.cil.payload > self.limit:
            self._want(self.cil.seq)

    # -- stability ------------------------------------------------------------------------------

    def _want(self, seq: int) -> None:
        if seq > self._wanted:
            self._wanted = seq
            self._wake.set()

    async def _wait(self, seq: int) -> None:
        """Until checkpoint `seq` is stable. Raises ShutDown."""
        self._want(seq)
        while self.ail.stable < seq:
            if self._vol.shut_down:
                raise ShutDown
            await self._moved.wait()

    async def force(self, seq: int | None = None) -> bool:
        """What is committed now, or up to checkpoint `seq`, is on the device when this returns.

        Returns whether anything had to be written. Raises ShutDown.
        """
        if seq is None:
            seq = self.cil.seq if self.cil.count else self.cil.seq - 1
        if seq <= self.ail.stable:
            return False
        self.counts["forces"] += 1
        await self._wait(seq)
        return True

    async def force_inode(self, ip: Inode) -> bool:
        """The same for all that was committed about an inode."""
        return await self.force(ip.seq)

    async def wait_freed(self, fsbno: int, n: int) -> None:
        """Until the log says that whoever had these blocks has them no more. Raises ShutDown."""
        seq = self.cil.busy.until(fsbno, n)
        if seq:
            await self._wait(seq)

    async def run(self) -> None:
        """Write checkpoints, when somebody wants one and every `period_s`."""
        while True:
            with trio.move_on_after(self.period_s) as late:
                await self._wake.wait()
            self._wake = trio.Event()
            if self._vol.shut_down:
                await trio.sleep_forever()
            if self.cil.count and (late.cancelled_caught or self.cil.seq <= self._wanted):
                await self._write()
                if self.cil.seq <= self._wanted:
                    self._wake.set()
            elif self._wanted >= self.cil.seq:
                self._wanted = self.cil.seq - 1

    async def _write(self) -> None:
        """One checkpoint: all that is in the CIL."""
        vol = self._vol
        self._going = self.stream.head
        batch, tail = self.cil.seal(), self.ail.tail() or self._going
        try:
            await vol.dev.flush()
            before = self.stream.head
            lsn = await self.stream.write(batch.vectors, tail)
            self._count(batch.ticket, before)
            await vol.dev.flush()
        except (OSError, Overrun, LogOverrun) as error:
            vol.shutdown(str(error), Why.LOG_IO if isinstance(error, OSError) else Why.IN_CORE)
            return
        self.cil.settle(batch, lsn)
        batch.ticket.release()
        self._going = 0
        self.counts["checkpoints"] += 1
        self.moved_tail()
        self._announce()

    def _count(self, ticket: object, before: int) -> None:
        nbytes = lsn_distance(before, self.stream.head, self._region.bbs << L.BB_LOG)
        self.counts["bytes"] += nbytes
        ticket.wrote(nbytes)  # type: ignore[attr-defined]

    def _announce(self) -> None:
        moved, self._moved = self._moved, trio.Event()
        moved.set()

    # -- the tail -------------------------------------------------------------------------------

    def _push_tail(self, lsn: int) -> None:
        """Somebody needs room: what is in front of this LSN has to go home."""
        self._vol.wake_metadata()

    def moved_tail(self) -> None:
        """Objects went home: whoever waits for space may have it now.

        A checkpoint that is on its way is held by nobody yet, and is not passed; nor is the end of
        what was granted by the record that ends the log.
        """
        self.grant.moved_tail(self.ail.tail() or self._going or self.grant.head)

    def recovered(self) -> None:
        """All that the old log asked for is done, and at home."""
        self.ail.floor = 0
        self.moved_tail()

    # -- the end --------------------------------------------------------------------------------

    def give_up(self) -> None:
        """The filesystem has shut down: nobody waits any more."""
        self.grant.give_up()
        self._wake.set()
        self._announce()

    async def unmount(self) -> None:
        """Say that everything is at home. Raises OSError."""
        assert not self.cil.count
        assert not self.ail.objects
        await self.stream.unmount(self.stream.head)

    def waiters(self) -> list[str]:
        """Who waits for space, for reports."""
        now = trio.current_time()
        return [f"{w.name} {w.nbytes} bytes {now - w.since:.1f} s" for w in self.grant.waiters()]
