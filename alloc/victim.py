"""Victims: who gives up memory that is in use, when nothing is left to reclaim.

A holder has memory that reclaim may not take but that its owner can do without: folios that
readahead has for a read that has not begun, or a writer for his next step, the shadows of one
file. It registers with the arena and says how much its
largest piece has. When the request that waits longest has slept ROUNDS times and nothing was freed
or heard of meanwhile, the holder with the largest piece is the victim: it sheds that piece, which
costs somebody time, never data and never an error. While nobody has anything to shed the wait goes
on, and the stall report says so.

Linux kills a process then. Here all memory belongs to caches and to requests, and a request that
was accepted is not given up.

Trio thread only; counting and shedding never wait and never allocate.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Protocol

from alloc.vmstat import VmStat

if TYPE_CHECKING:
    from alloc.wait import Ticket

log = logging.getLogger("nofailfs.alloc")

ROUNDS = 16  # of sleeping in vain, at POLL_S each; Linux's MAX_RECLAIM_RETRIES


class Holder(Protocol):
    """Somebody with memory in use that he can do without."""

    name: str

    def count(self) -> int:
        """Pages of the largest piece that could be shed now; 0 for none."""

    def shed(self) -> int:
        """Give that piece up; its pages."""


class Victims:
    """The holders of one arena."""

    def __init__(self, vmstat: VmStat) -> None:
        self._vmstat = vmstat
        self._holders: list[Holder] = []
        for name in ("oom_victims", "oom_pages"):
            vmstat.add(name, 0)

    def register(self, holder: Holder) -> None:
        """Have somebody considered from now on."""
        self._holders.append(holder)

    def shed(self, ticket: Ticket) -> int:
        """Name a victim on behalf of a request; pages that it gave up, 0 if there is none."""
        victim = max(self._holders, key=lambda holder: holder.count(), default=None)
        if victim is None or not victim.count():
            return 0
        pages = victim.shed()
        self._vmstat.add("oom_victims")
        self._vmstat.add("oom_pages", pages)
        log.warning("%s: out of memory: shed %d pages of %s", ticket.name, pages, victim.name)
        return pages

    def __str__(self) -> str:
        """What could be shed now, as stall reports say it."""
        counts = [(holder.name, holder.count()) for holder in self._holders]
        found = ", ".join(f"{name} {pages}" for name, pages in counts if pages)
        return f"can shed {found}" if found else "nothing to shed"
