"""Waiting for memory: one FIFO queue of tasks, each with a name and a time it began.

A task that cannot be served takes a ticket (`join`) and keeps it until it is served or gives up
by cancellation. Whatever may have changed things calls `serve`, which goes through the tickets
from the oldest and lets each *attempt* its request: the oldest one that fits gets what is there.
So order is kept among equals, and a large request does not keep small ones from what it could not
use itself. A ticket may be served while its task still runs (it is reclaiming, say); the task
finds its value when it looks.

No wake-up can be lost: `join`, `serve` and the moment of parking happen on the trio thread without
an await in between; other threads post `serve` to the loop (`serve_soon`), and as they may not even
be able to post, the oldest parked ticket looks again every POLL_S.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import outcome
import trio

POLL_S = 0.1
Key = tuple[str, int, int]  # kind of request, its size or cache, its rights


class Ticket:
    """One waiting request. `value` becomes non-zero when it is served."""

    __slots__ = ("attempt", "key", "name", "since", "task", "value")

    def __init__(self, name: str, key: Key, attempt: Callable[[], int]) -> None:
        self.name = name
        self.key = key
        self.attempt = attempt
        self.since = trio.current_time()
        self.value = 0
        self.task: trio.lowlevel.Task | None = None


class WaitQueue:
    """The tickets, oldest first. `length_changed` hears the number of unserved ones."""

    def __init__(self, length_changed: Callable[[int], None]) -> None:
        self._tickets: list[Ticket] = []
        self._length_changed = length_changed
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def tickets(self) -> tuple[Ticket, ...]:
        return tuple(self._tickets)

    def join(self, name: str, key: Key, attempt: Callable[[], int]) -> Ticket:
        """Take a ticket. `key` is equal for requests of which none succeeds if one fails."""
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        ticket = Ticket(name, key, attempt)
        self._tickets.append(ticket)
        self._length_changed(len(self._tickets))
        return ticket

    def leave(self, ticket: Ticket) -> None:
        """Hand in a ticket, served or not."""
        if ticket in self._tickets:
            assert ticket.value == 0
            self._tickets.remove(ticket)
            self._length_changed(len(self._tickets))

    def serve(self) -> int:
        """Let every ticket try, oldest first; how many were served."""
        failed: set[Key] = set()
        served = 0
        for ticket in tuple(self._tickets):
            if ticket.key in failed:
                continue
            ticket.value = ticket.attempt()
            if ticket.value == 0:
                failed.add(ticket.key)
                continue
            self._tickets.remove(ticket)
            served += 1
            self._length_changed(len(self._tickets))
            self._wake(ticket)
        return served

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
            if ticket.task is not None:
                self._wake(ticket)
                if not everyone:
                    return

    def _wake(self, ticket: Ticket) -> None:
        if ticket.task is not None:
            task, ticket.task = ticket.task, None
            trio.lowlevel.reschedule(task, outcome.Value(None))

    async def park(self, ticket: Ticket, seconds: float) -> None:
        """Sleep until served, nudged, or `seconds` have passed. Cancellation leaves at once."""
        assert ticket.task is None
        assert ticket.value == 0
        oldest = self._tickets[0] is ticket
        with trio.move_on_after(min(seconds, POLL_S) if oldest else seconds):
            ticket.task = trio.lowlevel.current_task()

            def abort(_: object) -> trio.lowlevel.Abort:
                ticket.task = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
        if not ticket.value:
            self.serve()
