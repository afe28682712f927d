"""The grant heads: who may begin to change metadata, so that the log's head never meets its tail.

A transaction reserves the bytes of the log that it may need before it changes anything; that is
the only place where it waits. Two heads count promises (XFS's design). The *reserve head* has all
of them; new transactions wait here. The *write head* has those that are backed by free space of
the log; who rolls without a unit in hand waits here, its promise being in the reserve head
already, so that no newcomer is between it and the space. Lines are FIFO, nobody passes a waiter.

A ticket has `left` bytes of the running unit, and `more` whole units for those that follow. What a
transaction logged goes over to the ticket of the checkpoint (`Context.take`), with what the records
around it cost, and from there into the log (`wrote`), where it stays until the tail moves.
A transaction that rolls must relog whatever it keeps locked, else it may wait for itself.

Invariants: occupied + write head <= size; write head = what tickets and contexts hold; reserve
head = that, and the unit of each waiter of the write head; nothing is negative. One BB is never
used: a log that is full to the last looks empty.

Trio thread only; everything between awaits is atomic. Whoever frees space serves the lines at
once, and a waiter is granted before it runs, so no wake-up is lost and none is too many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import outcome
import trio

from alloc import lockdep
from fs.errors import ShutDown
from fs.xfs import layout as L

LOG_SPACE = "log space"  # to the lock-order validator
FREE_SHARE = 4  # the tail is pushed while less than a quarter of the log is free
PUSH_MIN = 256 * L.BB_SIZE  # or than this (XFS's own least)


class Overrun(Exception):
    """More was logged than was reserved: a bug, the filesystem shuts down with this report."""


class Waiter(NamedTuple):
    """Somebody in a line, for reports; `since` on trio's clock."""

    name: str
    head: str  # "reserve" or "write"
    nbytes: int
    since: float


# -- LSNs -----------------------------------------------------------------------------------------


def lsn_add(lsn: int, nbytes: int, ring: int) -> int:
    """The LSN so many bytes (whole BBs) behind another, in a ring of `ring` bytes."""
    bbs = ring >> L.BB_LOG
    cycles, block = divmod((lsn & 0xFFFFFFFF) + (nbytes >> L.BB_LOG), bbs)
    return (lsn >> 32) + cycles << 32 | block


def lsn_distance(first: int, last: int, ring: int) -> int:
    """Bytes from one LSN to a later one."""
    cycles = (last >> 32) - (first >> 32)
    return cycles * ring + ((last & 0xFFFFFFFF) - (first & 0xFFFFFFFF) << L.BB_LOG)


# -- tickets --------------------------------------------------------------------------------------


class Ticket:
    """Promised bytes. `unit` is what each transaction of the chain may put into the log."""

    __slots__ = ("_grant", "count", "left", "more", "name", "unit")

    def __init__(self, grant: Grant, name: str, unit: int, count: int) -> None:
        self._grant = grant
        self.name = name
        self.unit = unit
        self.count = count
        self.left = 0  # of the running unit
        self.more = 0  # whole units

    @property
    def held(self) -> int:
        """All bytes that it still has."""
        return self.left + self.more * self.unit

    async def regrant(self) -> None:
        """One transaction of the chain has committed: a whole unit for the next one.

        Waits only when all units that were reserved are used up. Raises ShutDown, and has nothing
        then, nor after a cancellation.
        """
        await self._grant._regrant(self)

    def release(self) -> None:
        """Give back what was not used. Idempotent."""
        self._grant._release(self)

    def report(self) -> str:
        """As XFS prints a ticket."""
        return (
            f"ticket reservation summary: {self.name}\n"
            f"  unit res    = {self.unit} bytes\n"
            f"  current res = {self.left} bytes\n"
            f"  original count  = {self.count}\n"
            f"  remaining count = {self.more + 1 if self.held else 0}"
        )


class Context:
    """The ticket of a checkpoint that is being collected: what transactions logged goes here."""

    __slots__ = ("_grant", "left", "name", "payload", "total")

    def __init__(self, grant: Grant, name: str) -> None:
        self._grant = grant
        self.name = name
        self.payload = 0  # bytes of log vectors
        self.total = 0  # with what their records cost
        self.left = 0  # of that, what is not written yet

    def take(self, ticket: Ticket, nbytes: int) -> None:
        """A transaction added `nbytes` of log vectors to the checkpoint; pays for them.

        Less than nothing if new vectors are smaller than those they replace. With them it pays
        for the records they need more; the first one for all that any checkpoint costs. Raises
        Overrun, with nothing changed, if the ticket does not have as much.
        """
        payload = self.payload + nbytes
        assert payload >= 0
        total = self._grant.unit(payload)
        cost = total - self.total
        if cost > ticket.left:
            raise Overrun(
                f"Transaction log reservation overrun: {ticket.name}\n"
                f"  log items: {nbytes} bytes\n"
                f"  record headers: {cost - nbytes} bytes\n"
                f"  ctx ticket: {self.left} bytes\n" + ticket.report()
            )
        ticket.left -= cost
        self.left += cost
        self.payload, self.total = payload, total

    def wrote(self, nbytes: int) -> None:
        """The log's head moved over `nbytes`, headers and padding included. Raises Overrun."""
        if nbytes > self.left:
            raise Overrun(
                f"ctx ticket reservation ran out. Need to up reservation: {self.name}\n"
                f"  log items: {self.payload} bytes\n"
                f"  unit res    = {self.total} bytes\n"
                f"  current res = {self.left - nbytes} bytes"
            )
        self._grant._wrote(self, nbytes)

    def release(self) -> None:
        """It is written: give back what the worst case did not need. Idempotent."""
        self._grant._release_context(self)


class _Waiting(NamedTuple):
    ticket: Ticket
    task: trio.lowlevel.Task
    nbytes: int
    since: float


# -- the heads ------------------------------------------------------------------------------------


class Grant:
    """The space of one log. All sizes in bytes.

    `ring` is the log's size, `head` and `tail` the LSNs where it begins. `unit(payload)` says what
    so many bytes of log vectors can take with everything around them. `push(lsn)` is told, as
    often as need be, how far the tail should move; the head's LSN means that everything written
    is to go home, and what only a context has must be written first, so that it can. It wakes
    somebody, no more: the tail does not move before it returns.
    """

    def __init__(
        self,
        ring: int,
        unit: Callable[[int], int],
        push: Callable[[int], None],
        head: int,
        tail: int,
    ) -> None:
        self.ring = ring
        self.size = ring - L.BB_SIZE
        self.unit = unit
        self._unit_of = lru_cache(maxsize=64)(unit)  # of what transactions ask for, few numbers
        self.head, self.tail = head, tail
        self.occupied = lsn_distance(tail, head, ring)
        self.reserve_head = 0
        self.write_head = 0
        self.xs_try_logspace = 0
        self.xs_sleep_logspace = 0
        self._push = push
        self._newcomers: deque[_Waiting] = deque()
        self._rolling: deque[_Waiting] = deque()
        self._shut_down = False
        assert 0 <= self.occupied <= self.size

    # -- promises -------------------------------------------------------------------------------

    async def reserve(self, name: str, payload: int, count: int = 1) -> Ticket:
        """A ticket for `count` transactions of `payload` bytes of log vectors each.

        Waits for its turn and for space. Raises ShutDown. It must fit an empty log.
        """
        ticket = Ticket(self, name, self._unit_of(payload), count)
        nbytes = ticket.unit * count
        assert nbytes <= self.size, f"{name} can never fit the log"
        if lockdep.current is not None:
            lockdep.current.wants(LOG_SPACE)
        self.xs_try_logspace += 1
        self._check_alive()
        if self._newcomers or nbytes > self.free:
            await self._wait(self._newcomers, ticket, nbytes)
        else:
            self._give(ticket)
        self._push_tail(0)
        if lockdep.current is not None:
            lockdep.current.took(LOG_SPACE)
        return ticket

    def try_now(self, name: str, payload: int, count: int = 1) -> Ticket | None:
        """The same for whoever may not wait; None if it would have to. Raises ShutDown."""
        self.xs_try_logspace += 1
        self._check_alive()
        ticket = Ticket(self, name, self._unit_of(payload), count)
        if self._newcomers or ticket.unit * count > self.free:
            return None
        self._give(ticket)
        self._push_tail(0)
        if lockdep.current is not None:
            lockdep.current.took(LOG_SPACE)
        return ticket

    def context(self, name: str) -> Context:
        """The ticket of a new checkpoint. It begins without anything."""
        return Context(self, name)

    async def _regrant(self, ticket: Ticket) -> None:
        """Waiting holds locks that others want; they are wanted nowhere on the way to space."""
        assert ticket.unit
        self._take_back(ticket.left)
        ticket.left = 0
        if ticket.more:
            ticket.more -= 1
            ticket.left = ticket.unit
            self._serve()
            return
        self.xs_try_logspace += 1
        self.reserve_head += ticket.unit  # before it waits: newcomers stay behind it
        try:
            self._serve()
            self._check_alive()
            if self._rolling or ticket.unit > self._free_to_write:
                await self._wait(self._rolling, ticket, ticket.unit)
            else:
                self._give_unit(ticket)
        except BaseException:
            self.reserve_head -= ticket.unit
            self._serve()
            raise

    def _give(self, ticket: Ticket) -> None:
        """Promise a newcomer all of its units."""
        ticket.left, ticket.more = ticket.unit, ticket.count - 1
        self.reserve_head += ticket.held
        self.write_head += ticket.held

    def _give_unit(self, ticket: Ticket) -> None:
        """Back the promise of a rolling transaction."""
        ticket.left = ticket.unit
        self.write_head += ticket.unit

    def _release(self, ticket: Ticket) -> None:
        if ticket.unit:
            self._take_back(ticket.held)
            ticket.left = ticket.more = ticket.unit = 0
            if lockdep.current is not None:
                lockdep.current.dropped(LOG_SPACE)
            self._serve()

    def _release_context(self, context: Context) -> None:
        self._take_back(context.left)
        context.left = 0
        self._serve()

    def _take_back(self, nbytes: int) -> None:
        assert 0 <= nbytes <= self.write_head <= self.reserve_head
        self.reserve_head -= nbytes
        self.write_head -= nbytes

    # -- the log moves --------------------------------------------------------------------------

    def _wrote(self, context: Context, nbytes: int) -> None:
        assert nbytes >= 0
        assert nbytes % L.BB_SIZE == 0
        context.left -= nbytes
        self._take_back(nbytes)
        self.occupied += nbytes
        self.head = lsn_add(self.head, nbytes, self.ring)
        assert self.occupied <= self.size, "the head of the log has met its tail"

    def moved_tail(self, tail: int) -> None:
        """Everything before this LSN is at home. Cheap when it did not move."""
        if tail != self.tail:
            occupied = lsn_distance(tail, self.head, self.ring)
            assert 0 <= occupied < self.occupied, "the tail of the log moves forward to its head"
            self.tail, self.occupied = tail, occupied
            self._serve()

    @property
    def free(self) -> int:
        """Bytes that a newcomer can be promised; less than nothing if rolling ones lack some."""
        return self.size - self.occupied - self.reserve_head

    @property
    def _free_to_write(self) -> int:
        return self.size - self.occupied - self.write_head

    def _push_tail(self, nbytes: int) -> None:
        """Have the tail moved if less is free than somebody needs, or than should be."""
        wanted = max(nbytes, self.size // FREE_SHARE, PUSH_MIN)
        lacking = wanted - self.free
        if lacking > 0:
            lacking = min(-(-lacking // L.BB_SIZE) * L.BB_SIZE, self.occupied)
            self._push(lsn_add(self.tail, lacking, self.ring))

    # -- lines ----------------------------------------------------------------------------------

    async def _wait(self, line: deque[_Waiting], ticket: Ticket, nbytes: int) -> None:
        """Until it is one's turn and there is space; the promise was made then."""
        task = trio.lowlevel.current_task()
        waiting = _Waiting(ticket, task, nbytes, trio.current_time())
        line.append(waiting)
        self.xs_sleep_logspace += 1
        self._push_tail(nbytes)

        def abort(_: object) -> trio.lowlevel.Abort:
            line.remove(waiting)
            self._serve()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _serve(self) -> None:
        """Grant whoever is first in either line, as far as space goes; push for the others."""
        while self._rolling and self._rolling[0].nbytes <= self._free_to_write:
            first = self._rolling.popleft()
            self._give_unit(first.ticket)
            trio.lowlevel.reschedule(first.task, outcome.Value(None))
        while self._newcomers and self._newcomers[0].nbytes <= self.free:
            first = self._newcomers.popleft()
            self._give(first.ticket)
            trio.lowlevel.reschedule(first.task, outcome.Value(None))
        for line in (self._rolling, self._newcomers):
            if line:
                self._push_tail(line[0].nbytes)

    def give_up(self) -> None:
        """The filesystem has shut down: whoever waits, or comes, gets ShutDown. Idempotent."""
        self._shut_down = True
        for line in (self._rolling, self._newcomers):
            while line:
                trio.lowlevel.reschedule(line.popleft().task, outcome.Error(ShutDown()))

    def _check_alive(self) -> None:
        if self._shut_down:
            raise ShutDown

    def waiters(self) -> list[Waiter]:
        """Who waits, in the order in which they will be served: rolling ones first."""
        return [
            Waiter(w.ticket.name, head, w.nbytes, w.since)
            for head, line in (("write", self._rolling), ("reserve", self._newcomers))
            for w in line
        ]
