"""Waiting for memory: tasks in FIFO order, each with a name, a time it began, and a reason.

A task that cannot be served takes a ticket (`join`) and keeps it until it is served or gives up
by cancellation. Tickets with one key (kind and size, rights, nodes) form a class, in which the
first come is the first served: if one fails, none behind it would succeed. Whatever may have
changed things calls `serve`, which lets the oldest of each class *attempt* its request, in the
order of age: the oldest one that fits gets what is there. A ticket may be served while its task
still runs (it is reclaiming, say); the task finds its value when it looks.

A large request does not keep small ones from what it could not use itself, but after PASSES_MAX of
them it holds: all that are younger and have no rights to a reserve wait until it was served, or its
task has reclaimed what it could and slept once in vain (`let_pass`, for half as many each time).
So a stream of small requests cannot starve it, nor it those whose end it may be waiting for.

No wake-up can be lost: `join`, `serve` and the moment of parking happen on the trio thread without
an await in between; other threads post `serve` to the loop (`serve_soon`), and as they may not even
be able to post, the oldest parked ticket looks again every POLL_S.
"""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Callable
from typing import NamedTuple

import outcome
import trio

from alloc.buddy import RIGHTS_ATOMIC, RIGHTS_MIN

POLL_S = 0.1
PASSES_MAX = 32
WHO = RIGHTS_ATOMIC | 3  # the bits of rights that say how far below `min` a request may go


class Key(NamedTuple):
    """The class of a request: of two with one key, the younger fails if the older one does."""

    kind: str  # "folio" or "slab"
    size: int  # order, or number of the cache
    rights: int
    placed: int = 0  # on which nodes (alloc/node.py)


class Ticket:
    """One waiting request. `value` becomes non-zero when it is served."""

    __slots__ = (
        "attempt", "freed", "gfp", "holds_since", "key", "name", "number", "owner", "parked",
        "passed", "patience", "reason", "since", "site", "slept", "vain", "value", "what",
    )  # fmt: skip

    def __init__(
        self, what: str, gfp: int, site: str, key: Key, attempt: Callable[[int], int]
    ) -> None:
        self.what = what  # "order:4", "slab:inode"
        self.gfp = gfp
        self.site = site  # who asked
        self.key = key
        self.attempt = attempt  # with rights; the value, or 0
        self.owner = trio.lowlevel.current_task()
        self.name = f"{self.owner.name} {what}"
        self.reason = ""  # why it was not served when it last looked
        self.since = trio.current_time()
        self.value = 0
        self.vain = 0  # times it slept and nothing happened
        self.freed = 0  # pages that had been freed by then
        self.number = 0  # in the order of arrival
        self.passed = 0  # younger tickets that were served before it
        self.holds_since = 0.0  # when it last began to
        self.patience = PASSES_MAX  # how many of them it lets pass before it holds them
        self.parked = False
        self.slept = False  # once at least

    @property
    def holding(self) -> bool:
        """Whether it has let enough others pass and now keeps them waiting."""
        return self.passed >= self.patience


class WaitQueue:
    """The tickets by class and age. `length_changed` hears the number of unserved ones."""

    def __init__(self, length_changed: Callable[[int], None]) -> None:
        self._tickets: dict[Ticket, None] = {}  # oldest first
        self._classes: dict[Key, list[Ticket]] = {}  # oldest first
        self._joined = 0
        self._length_changed = length_changed
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def tickets(self) -> tuple[Ticket, ...]:
        """All that wait, oldest first."""
        return tuple(self._tickets)

    def join(self, ticket: Ticket) -> None:
        """Take a place in the line, at its end."""
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        self._joined += 1
        ticket.number = self._joined
        self._tickets[ticket] = None
        self._classes.setdefault(ticket.key, []).append(ticket)
        self._length_changed(len(self._tickets))

    def leave(self, ticket: Ticket) -> None:
        """Hand in a ticket, served or not."""
        if ticket in self._tickets:
            assert ticket.value == 0
            self._remove(ticket)

    def promote(self, ticket: Ticket, rights: int, placed: int = 0) -> None:
        """Change the rights of a ticket and the nodes it may have; it keeps its place by age."""
        assert ticket.value == 0
        self._leave_class(ticket)
        ticket.key = ticket.key._replace(rights=rights, placed=placed)
        insort(self._classes.setdefault(ticket.key, []), ticket, key=lambda t: t.number)

    def let_pass(self, ticket: Ticket) -> None:
        """Its task could do nothing for it: hold nobody back until others were served again."""
        ticket.passed = 0
        ticket.patience = max(ticket.patience // 2, 1)

    def serve(self) -> int:
        """Let tickets try, oldest first; how many were served."""
        failed: dict[Key, Ticket] = {}
        holding = False
        served = 0
        while (ticket := self._next(failed, holding)) is not None:
            ticket.value = ticket.attempt(ticket.key.rights | ticket.key.placed)
            if ticket.value == 0:
                failed[ticket.key] = ticket
                holding = holding or ticket.holding
                continue
            self._remove(ticket)
            served += 1
            for older in failed.values():
                older.passed += 1
                if older.passed == older.patience:
                    holding = True
                    older.holds_since = trio.current_time()
                    self._wake(older)  # to reclaim while it has what is freed for itself
            self._wake(ticket)
        return served

    def _next(self, failed: dict[Key, Ticket], holding: bool) -> Ticket | None:
        """The oldest ticket that may still succeed; older than all of `failed` is none."""
        heads = (
            tickets[0]
            for key, tickets in self._classes.items()
            if key not in failed and not (holding and key.rights & WHO == RIGHTS_MIN)
        )
        return min(heads, key=lambda ticket: ticket.number, default=None)

    def serve_soon(self) -> None:
        """`serve`, from any thread: at once on the trio thread, else as soon as it comes by."""
        if threading.get_ident() == self._thread:
            self.serve()
            return
        token = self._token
        if token is not None:
            try:
                token.run_sync_soon(self.serve, idempotent=True)
            except trio.RunFinishedError:
                assert not self._tickets, "the loop ended with tasks in the queue"

    def nudge(self, everyone: bool) -> None:
        """Wake the oldest parked task (or all) without a value, so that it reclaims again."""
        for ticket in self._tickets:
            if ticket.parked:
                self._wake(ticket)
                if not everyone:
                    return

    def _remove(self, ticket: Ticket) -> None:
        del self._tickets[ticket]
        self._leave_class(ticket)
        self._length_changed(len(self._tickets))

    def _leave_class(self, ticket: Ticket) -> None:
        members = self._classes[ticket.key]
        members.remove(ticket)
        if not members:
            del self._classes[ticket.key]

    def _wake(self, ticket: Ticket) -> None:
        if ticket.parked:
            ticket.parked = False
            trio.lowlevel.reschedule(ticket.owner, outcome.Value(None))

    async def park(self, ticket: Ticket, seconds: float) -> bool:
        """Sleep until served, nudged (True), or `seconds` have passed (False), for some tickets
        less. Cancellation leaves at once.
        """
        assert not ticket.parked
        assert ticket.value == 0
        polls = ticket.holding or next(iter(self._tickets)) is ticket
        with trio.move_on_after(min(seconds, POLL_S) if polls else seconds) as sleep:
            ticket.parked = True

            def abort(_: object) -> trio.lowlevel.Abort:
                ticket.parked = False
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if not ticket.value:
            self.serve()
        return not sleep.cancelled_caught
