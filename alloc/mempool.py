"""Mempools: a number of elements set aside, so that who cleans memory never waits for memory.

An element is a slab's object or a folio, named by its number. A request tries for a new one
without waiting and without the reserve; then takes one that was set aside; then, unless its task is
one whose work reclaim waits for (MEMALLOC), reclaims; then waits in line until somebody gives one
back. What is given back goes to the oldest in line, else to those set aside, else to where it came
from. So progress is certain if whoever holds an element gives it back without waiting for another
one; nobody takes a second before he has submitted the first.

Invariants: elements in use and set aside are never fewer than `min_nr`; above `min_nr` in use
are only those for which there was memory above `min`; while somebody waits none is set aside.

Trio thread only. The wait is the only await, and may be cancelled. Nothing depends on its timer:
after five seconds in which no element came back the oldest tries again, and says so in the log.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Protocol

import trio

from alloc.gfp import (
    FAILABLE,
    KERNEL,
    MEMALLOC,
    NOIO,
    NOMEMALLOC,
    NOWAIT,
    RETRY_MAYFAIL,
    ZERO,
    current_scope,
)
from alloc.policy import caller

if TYPE_CHECKING:
    from alloc.arena import Arena

log = logging.getLogger("nofailfs.alloc")

TIMER_S = 5.0


class Source(Protocol):
    """Where elements come from and go to: a slab cache, or `Folios`."""

    async def alloc(self, gfp: int = KERNEL) -> int:
        """An element; never fails."""

    def try_alloc(self, gfp: int) -> int | None:
        """An element if it can be had."""

    def free(self, i: int) -> None:
        """Give it back."""


class Folios:
    """Folios of one order as elements."""

    def __init__(self, arena: Arena, order: int) -> None:
        self._arena = arena
        self._order = order

    async def alloc(self, gfp: int = KERNEL) -> int:
        return await self._arena.alloc_folio(self._order, gfp)

    def try_alloc(self, gfp: int) -> int | None:
        return self._arena.try_alloc_folio(self._order, gfp)

    def free(self, i: int) -> None:
        self._arena.put_folio(i)


class Waiter:
    """One task in line. `element` becomes non-zero when it is served."""

    __slots__ = ("element", "gfp", "owner", "served", "since", "site")

    def __init__(self, gfp: int) -> None:
        self.gfp = gfp
        self.owner = trio.lowlevel.current_task()
        self.site = caller()
        self.since = trio.current_time()
        self.element = 0
        self.served = trio.Event()


class Mempool:
    """At least `min_nr` elements of a source, for those who need one to get memory cleaned."""

    def __init__(self, arena: Arena, name: str, source: Source, min_nr: int) -> None:
        assert min_nr > 0
        self.name = name
        self.min_nr = min_nr
        self.in_use = 0
        self.waits = 0  # requests that had to
        self._source = source
        self._aside: list[int] = []
        self._line: deque[Waiter] = deque()
        self._returned = 0  # elements given back so far
        arena.mempools.append(self)

    async def fill(self) -> None:
        """Set the elements aside, before the first one is needed."""
        while self.in_use + len(self._aside) < self.min_nr:
            self._aside.append(await self._source.alloc())

    @property
    def aside(self) -> int:
        """Elements that are set aside."""
        return len(self._aside)

    def waiters(self) -> tuple[Waiter, ...]:
        """Who is in line, oldest first."""
        return tuple(self._line)

    async def alloc(self, gfp: int = KERNEL) -> int:
        """An element, its content undefined; waits for one that is in use if it must."""
        gfp |= current_scope()
        assert not gfp & ZERO, "what was set aside is not zero"
        assert not gfp & FAILABLE, "a mempool never fails"
        element = self._source.try_alloc(NOWAIT | NOMEMALLOC) or self._take_aside()
        element = element or self._reclaim(gfp) or await self._wait(gfp)
        self.in_use += 1
        return element

    def free(self, element: int) -> None:
        """Give an element back: to the oldest in line, to those set aside, or to its source."""
        assert self.in_use > 0
        self.in_use -= 1
        self._give(element)

    def _give(self, element: int) -> None:
        self._returned += 1
        if self._line:
            waiter = self._line.popleft()
            waiter.element = element
            waiter.served.set()
        elif len(self._aside) < self.min_nr:
            self._aside.append(element)
        else:
            self._source.free(element)

    def _take_aside(self) -> int:
        return self._aside.pop() if self._aside else 0

    def _reclaim(self, gfp: int) -> int:
        """A new one at the cost of a round of reclaim; not for those whom reclaim waits for."""
        if gfp & MEMALLOC:
            return 0
        return self._source.try_alloc(RETRY_MAYFAIL | NOMEMALLOC | gfp & NOIO) or 0

    async def _wait(self, gfp: int) -> int:
        waiter = Waiter(gfp)
        self._line.append(waiter)
        self.waits += 1
        try:
            while not waiter.element:
                returned = self._returned
                with trio.move_on_after(TIMER_S):
                    await waiter.served.wait()
                if self._returned == returned and self._line[0] is waiter:
                    self._look_again(waiter)
        except BaseException:
            if waiter.element:
                self._give(waiter.element)
            else:
                self._line.remove(waiter)
            raise
        return waiter.element

    def _look_again(self, waiter: Waiter) -> None:
        """Nothing came back for long: perhaps there is memory by now. For the first in line."""
        element = self._source.try_alloc(NOWAIT | NOMEMALLOC) or self._reclaim(waiter.gfp)
        if element:
            self._give(element)
            return
        log.warning(
            "%s waits %.0f s for an element of mempool %s in %s: all %d are in use",
            waiter.owner.name,
            trio.current_time() - waiter.since,
            self.name,
            waiter.site,
            self.in_use,
        )
