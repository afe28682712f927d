"""The slow path of an allocation: what is done, in which order, for a request that found no memory.

The order is Linux's. Wake kswapd and, for a block larger than a page, kcompactd; try the free lists
under the marks that the flags allow; for a large or unmovable block compact without looking far,
before anything is evicted; reclaim on one's own behalf (never with MEMALLOC: those are the ones
whom reclaim waits for); try; give back what lists, grace periods and the high-atomic reserve keep;
try; compact, each round with more effort; try. A request that the policy
allows to fail, fails here. Any other wakes the cleaners, tries with half of the reserve if it holds
others up (NOFAIL; NOFS where nothing may fail), sleeps until it is served or something happened,
and begins again; one that is bound to nodes may from then on be served by any.

Unlike Linux's, requests that wait stand in line (`alloc/wait.py`): each try is a turn of the whole
line, so a task may be served by another's reclaim. The turn that follows each block that
compaction empties takes the place of capturing it: while the line waits, nobody else gets it.

`with traced() as trace:` collects the actions of the task (and of tasks it starts) by name.

All of it runs on the trio thread. Cancellation is possible only while a request sleeps, and gives
everything back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

import trio

from alloc import stall, victim
from alloc.buddy import (
    MT_MASK,
    RIGHTS_ALL,
    RIGHTS_ATOMIC,
    RIGHTS_HALF,
    RIGHTS_MIN,
    RIGHTS_QUEUED,
)
from alloc.compactnode import ASYNC, DEFERRED, SKIPPED, SYNC_FULL, SYNC_LIGHT
from alloc.gfp import (
    ATOMIC,
    COSTLY_ORDER,
    MEMALLOC,
    MOVABLE,
    MT_SHIFT,
    NOFAIL,
    NOFS,
    NORETRY,
    NOWAIT,
    RETRY_MAYFAIL,
    describe,
)
from alloc.node import BOUND, may_serve
from alloc.page import W_WAITERS
from alloc.policy import AllocationFailed, caller
from alloc.wait import POLL_S, WHO, Key, Ticket, WaitQueue

if TYPE_CHECKING:
    from alloc.arena import Arena

log = logging.getLogger("nofailfs.alloc")

FAILURE_REPORTS_S = 10.0  # at most one report of a failure in this time
HOLD_S = 1.0  # for how long a large request may keep others waiting while something is cleaned
MARKS = {RIGHTS_MIN: "min", RIGHTS_HALF: "half", RIGHTS_ATOMIC: "atomic", RIGHTS_ALL: "all"}

_trace: ContextVar[list[str] | None] = ContextVar("slowpath_trace", default=None)


@contextmanager
def traced() -> Iterator[list[str]]:
    """The actions of the slow path, in order, for as long as the block lasts."""
    trace: list[str] = []
    token = _trace.set(trace)
    try:
        yield trace
    finally:
        _trace.reset(token)


def _note(action: str) -> None:
    trace = _trace.get()
    if trace is not None:
        trace.append(action)


def compacts_first(order: int, gfp: int) -> bool:
    """Whether reclaim is unlikely to make such a block: it is large, or must not lie anywhere."""
    return order > COSTLY_ORDER or (order > 0 and not gfp & MOVABLE)


class Request(NamedTuple):
    """What is wanted: its class, and how to try for it and to give it back."""

    what: str  # "order:4", "slab:inode"
    kind: str  # "folio" or "slab"
    size: int  # order, or number of the cache
    order: int  # of the pages that it may need
    gfp: int
    attempt: Callable[[int], int]  # with rights; 0 when there is nothing
    undo: Callable[[int], object]
    placed: int  # on which nodes, as rights have it


class SlowPath:
    """The slow path of one arena, and the line of those who wait in it."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self.queue = WaitQueue(self._waiters_changed)
        self._large: set[str] = set()  # sites that asked for large blocks
        self._last_failure = -FAILURE_REPORTS_S
        self._longest = 0.0  # seconds that anybody has waited
        for name in ("alloc_failed", "alloc_costly", "alloc_stall_reports"):
            arena.vmstat.add(name, 0)
        arena.vmstat.gauge("alloc_wait_longest_ms", lambda: int(self._longest * 1000))

    def _waiters_changed(self, length: int) -> None:
        for words in self._arena.nodes:
            words[W_WAITERS] = length

    def wanted_order(self, node: int) -> int:
        """The order of the oldest request that waits for a folio of a node; 0: there is none."""
        for ticket in self.queue.tickets():
            if ticket.key.kind == "folio" and may_serve(ticket.key.placed, node):
                return ticket.key.size
        return 0

    def waiting(self, node: int) -> int:
        """How many wait for memory that a node may serve."""
        return sum(may_serve(ticket.key.placed, node) for ticket in self.queue.tickets())

    def admit_large(self, order: int, gfp: int) -> None:
        """A request above COSTLY_ORDER, or one that nobody could ever serve: ValueError.

        Linux would let it fail; here it waits for as long as it takes, so its site is named once.
        """
        most = self._arena.order_max
        if not 0 <= order <= most:
            raise ValueError(f"a folio of order {order}: orders are 0 to {most}")
        self._arena.vmstat.add("alloc_costly")
        site = caller()
        if site not in self._large:
            self._large.add(site)
            log.info(
                "%s asks for order:%d mode:%s, above order %d and not allowed to fail",
                site,
                order,
                describe(gfp),
                COSTLY_ORDER,
            )

    def rights(self, gfp: int, stuck: bool) -> int:
        """How far below `min` a request may go; the more when reclaim got it nothing."""
        if gfp & MEMALLOC:
            return RIGHTS_ALL
        if gfp & ATOMIC & ~NOWAIT:
            return RIGHTS_ATOMIC
        helps = NOFAIL | NOFS if self._arena.policy.kind in ("irix", "inject") else NOFAIL
        return RIGHTS_HALF if stuck and gfp & helps else RIGHTS_MIN

    # ---------------------------------------------------------------- requests that may fail

    def try_now(self, request: Request) -> int:
        """What a try_* request may do beyond its fast path, without waiting; 0 when in vain."""
        arena, gfp = self._arena, request.gfp
        self._wake_kswapd(gfp, request.order, request.placed)
        rights = self.rights(gfp, stuck=False)
        got = self._try(request, rights | (RIGHTS_QUEUED if rights != RIGHTS_MIN else 0))
        if not got and not gfp & (NOWAIT | MEMALLOC):
            got = self._try_hard(request, rights)
        if not got:
            _note("fail")
            arena.vmstat.add("try_alloc_failed")
        return got

    def _try_hard(self, request: Request, rights: int) -> int:
        """Compaction and reclaim, the lighter the less the request may cost."""
        order, gfp = request.order, request.gfp
        light = bool(gfp & NORETRY)
        if compacts_first(order, gfp):
            got, ran = self._try_compact(request, rights, ASYNC)
            if got or light and order > COSTLY_ORDER and not ran:
                return got  # not worth evicting anything for
        _note("direct_reclaim")
        if light:
            self._arena.reclaim.light_round(gfp, request.placed)
            got = self._try(request, rights)
        else:
            assert gfp & RETRY_MAYFAIL
            got = self._full_round(request, rights)
        if not got and order:
            priority = ASYNC if light and order > COSTLY_ORDER else SYNC_LIGHT
            got, _ = self._try_compact(request, rights, priority)
        return got

    def _try_compact(self, request: Request, rights: int, priority: str) -> tuple[int, bool]:
        """A run in one go: what the request got, and whether there was one."""
        got = 0

        def satisfied() -> bool:
            nonlocal got
            got = request.attempt(rights | request.placed)
            return got != 0

        order, gfp, placed = request.order, request.gfp, request.placed
        *_, result = self._compaction(order, gfp, placed, priority, satisfied)
        if result in (SKIPPED, DEFERRED):
            return 0, False
        return got or self._try(request, rights), True

    def _full_round(self, request: Request, rights: int) -> int:
        held: list[int] = []

        def satisfied() -> bool:
            held.append(request.attempt(rights | request.placed))
            return held[-1] != 0

        self._arena.reclaim.full_round(request.gfp, request.placed, satisfied)
        _note("freelist:min")
        if held and held[-1]:
            return held[-1]
        self._drain()
        self._arena.release_reserve(request.gfp)
        return self._try(request, rights)

    def _try(self, request: Request, rights: int) -> int:
        _note(f"freelist:{MARKS[rights & WHO]}")
        return request.attempt(rights | request.placed)

    # ---------------------------------------------------------------- requests that wait

    async def wait(self, request: Request) -> int:
        """A ticket, reclaim, sleep; until served. AllocationFailed only by another policy."""
        arena = self._arena
        rights = self.rights(request.gfp, stuck=False) | RIGHTS_QUEUED
        key = Key(request.kind, request.size, rights, request.placed)
        ticket = Ticket(request.what, request.gfp, caller(), key, request.attempt)
        self.queue.join(ticket)
        arena.vmstat.add("alloc_waits")
        arena.vmstat.add("allocstall_normal")
        try:
            with arena.pressure:
                await self._until_served(ticket, request.order)
        except BaseException:
            self.queue.leave(ticket)
            if ticket.value:
                request.undo(ticket.value)
            raise
        finally:
            self._longest = max(self._longest, trio.current_time() - ticket.since)
        return ticket.value

    async def _until_served(self, ticket: Ticket, order: int) -> None:
        arena = self._arena
        report_at = arena.stall_seconds
        priority = SYNC_LIGHT
        while not ticket.value and not await self._round(ticket, order, priority):
            priority = SYNC_FULL
            if arena.policy.gives_up(order, ticket.gfp):
                self._fail(ticket)
            report_at = await self._sleep(ticket, report_at)

    async def _round(self, ticket: Ticket, order: int, priority: str) -> bool:
        """Everything short of sleeping; whether the ticket was served."""
        self._wake_kswapd(ticket.gfp, order, ticket.key.placed)
        if self._served(ticket):
            return True
        if not ticket.gfp & MEMALLOC:
            if compacts_first(order, ticket.gfp) and await self._compact(ticket, order, ASYNC):
                return True
            _note("direct_reclaim")
            reclaim, placed = self._arena.reclaim, ticket.key.placed
            await reclaim.direct(ticket.gfp, placed, lambda: self._turn(ticket))
            if self._served(ticket):
                return True
        self._drain()
        self._arena.release_reserve(ticket.gfp)
        if self._served(ticket):
            return True
        if not order or ticket.gfp & MEMALLOC:
            return False
        return await self._compact(ticket, order, priority)

    async def _compact(self, ticket: Ticket, order: int, priority: str) -> bool:
        """A run of compaction; whether the ticket was served."""
        gfp, placed = ticket.gfp, ticket.key.placed
        for result in self._compaction(order, gfp, placed, priority, lambda: self._turn(ticket)):
            if result in (SKIPPED, DEFERRED):
                return False
            await trio.lowlevel.cancel_shielded_checkpoint()
        return self._served(ticket)

    def _compaction(
        self, order: int, gfp: int, placed: int, priority: str, satisfied: Callable[[], bool]
    ) -> Iterator[str]:
        _note(f"compact:{priority}")
        mt = gfp >> MT_SHIFT & MT_MASK
        return self._arena.compaction.direct(order, mt, placed, priority, satisfied)

    async def _sleep(self, ticket: Ticket, report_at: float) -> float:
        """Nothing was left to reclaim: help those who clean, and sleep once.

        Reports a stall that has lasted `report_at` seconds; then, when to report the next.
        """
        arena = self._arena
        _note("cleaners")
        arena.reclaim.wake_cleaners()
        rights = self.rights(ticket.gfp, stuck=True) | RIGHTS_QUEUED
        anywhere = ticket.slept or ticket.gfp & MEMALLOC
        placed = ticket.key.placed & ~BOUND if anywhere else ticket.key.placed
        if not ticket.value and (rights, placed) != ticket.key[2:]:
            self.queue.promote(ticket, rights, placed)
            self._served(ticket)
        if ticket.value:
            return report_at
        ticket.reason = stall.reason(arena, ticket)
        _note("sleep")
        waited = trio.current_time() - ticket.since
        ticket.slept = True
        woken = await self.queue.park(ticket, max(report_at - waited, 0.001))
        if not ticket.value:
            self._count_vain(ticket, woken)
        if not ticket.value and ticket.holding:
            held = trio.current_time() - ticket.holds_since
            if held >= (HOLD_S if woken else POLL_S):
                self.queue.let_pass(ticket)
                self.queue.serve()
        waited = trio.current_time() - ticket.since
        if ticket.value or waited < report_at:
            return report_at
        arena.stalls.report()
        return report_at * 2

    def _count_vain(self, ticket: Ticket, woken: bool) -> None:
        """It slept and was not served. When nothing ever happens somebody has to give way."""
        freed = self._arena.vmstat["pgfree"]
        ticket.vain = 0 if woken or freed != ticket.freed else ticket.vain + 1
        ticket.freed = freed
        if ticket.vain >= victim.ROUNDS:
            ticket.vain = 0
            _note("victim")
            self._arena.victims.shed(ticket)

    def _served(self, ticket: Ticket) -> bool:
        """One turn of the line, on behalf of this ticket."""
        _note(f"freelist:{MARKS[ticket.key.rights & WHO]}")
        return self._turn(ticket)

    def _turn(self, ticket: Ticket) -> bool:
        if not ticket.value:
            self.queue.serve()
        return ticket.value != 0

    def _wake_kswapd(self, gfp: int, order: int, placed: int) -> None:
        _note("wake_kswapd")
        self._arena.reclaim.wake_kswapd(placed, helpless=gfp & MEMALLOC != 0)
        self._arena.compaction.wake(order, placed)

    def _drain(self) -> None:
        """Memory that is neither free nor in use goes back to the free lists."""
        _note("drain")
        self._arena.rcu.expedite()
        self._arena.drain_all()

    def _fail(self, ticket: Ticket) -> None:
        """What no request meets under irix. Raises AllocationFailed; one report in ten seconds."""
        _note("fail")
        self._arena.vmstat.add("alloc_failed")
        failure = AllocationFailed(ticket.what, ticket.gfp, ticket.site)
        now = trio.current_time()
        if not 0 <= now - self._last_failure < FAILURE_REPORTS_S:
            self._last_failure = now
            log.warning("%s: %s", ticket.owner.name, failure)
        raise failure
