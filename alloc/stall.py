"""Stalls: who waits for memory, since when and why, what they hold, and what cannot be freed.

A wait that has lasted `arena.stall_seconds` is reported in XFS's words, and again when twice, four
times, ... as much has passed; all who wait are in each report, so reports are at least
`stall_seconds` apart. Which locks a task holds is asked of `arena.holders`, which whoever keeps
such a record sets. A report is an observation: it changes nothing, and the wait goes on.

Runs on the trio thread; reads words and counters without locks.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import trio

from alloc.buddy import RIGHTS_ALL, RIGHTS_HALF
from alloc.gfp import describe
from alloc.mempool import Waiter
from alloc.page import PAGE_SIZE, W_FREE, W_MIN
from alloc.rows import nr_pages_listed
from alloc.wait import WHO, Ticket
from alloc.zoneinfo import all_free_blocks

if TYPE_CHECKING:
    from alloc.arena import Arena

log = logging.getLogger("nofailfs.alloc")

STALL_S = 2.0
SLABS_SHOWN = 4  # largest caches


def no_locks(_: trio.lowlevel.Task) -> list[str]:
    """The answer when nobody keeps a record of locks."""
    return []


def reason(arena: Arena, ticket: Ticket) -> str:
    """Why a ticket that has just tried was not served."""
    if any(older.holding for older in _older(arena, ticket)) and not ticket.key.rights & WHO:
        return "an older request holds the line"
    order = ticket.key.size if ticket.key.kind == "folio" else 0
    nids = arena.reclaim.reach(ticket.key.placed)
    rows = [arena.nodes[nid] for nid in nids]
    where = f" on node {'+'.join(map(str, sorted(nids)))}" if len(nids) < len(arena.nodes) else ""
    who = ticket.key.rights & WHO
    marks = [int(words[W_MIN]) for words in rows]
    if who in (RIGHTS_ALL, RIGHTS_HALF):
        marks = [mark // 2 if who == RIGHTS_HALF else 0 for mark in marks]
    free = [int(words[W_FREE]) + nr_pages_listed(words) - ((1 << order) - 1) for words in rows]
    if all(pages <= mark for pages, mark in zip(free, marks, strict=True)):
        return f"free pages at the mark of {sum(marks)}{where}"
    if not any(any(all_free_blocks(words)[order:]) for words in rows):
        return f"no free block is as large{where}"
    return "others came first"


def _older(arena: Arena, ticket: Ticket) -> list[Ticket]:
    return [other for other in arena.queue.tickets() if other.number < ticket.number]


def unreclaimable(arena: Arena) -> dict[str, int]:
    """Pages that reclaim cannot take as they are: dirty and in write-back, slabs, all else in use.

    `slab` leaves out the caches that a shrinker can empty. `pinned` is what is neither free, nor on
    the LRU, nor a slab: buffers, tables, log vectors.
    """
    vmstat = arena.vmstat
    listed = vmstat["nr_inactive_file"] + vmstat["nr_active_file"]
    others = arena.free_pages + vmstat["nr_slab"] + listed
    return {
        "dirty": vmstat.get("nr_dirty", 0),
        "writeback": vmstat.get("nr_writeback", 0),
        "slab": vmstat["nr_slab_unreclaimable"],
        "pinned": max(arena.nr_pages - 1 - others, 0),
    }


class Stalls:
    """The reports of one arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._last = float("-inf")

    def waiters(self) -> list[str]:
        """A line for each task that waits for memory, oldest first, then those at mempools."""
        lines = [
            self._line(ticket, ticket.what, ticket.reason or "reclaims")
            for ticket in self._arena.queue.tickets()
        ]
        for pool in self._arena.mempools:
            reason = f"all {pool.in_use} elements are in use"
            lines += [self._line(w, f"mempool:{pool.name}", reason) for w in pool.waiters()]
        return lines

    def _line(self, waiter: Ticket | Waiter, what: str, reason: str) -> str:
        waited = trio.current_time() - waiter.since
        locks = ", ".join(self._arena.holders(waiter.owner)) or "nothing"
        return (
            f"{waiter.owner.name} {what} mode:{describe(waiter.gfp)} waits {waited:.1f}s "
            f"in {waiter.site}: {reason}; holds {locks}"
        )

    def report(self) -> None:
        """Log who waits and for what, unless that was done a moment ago."""
        arena, now = self._arena, trio.current_time()
        oldest = next(iter(arena.queue.tickets()), None)
        if oldest is None or 0 <= now - self._last < arena.stall_seconds:
            return
        self._last = now
        arena.vmstat.add("alloc_stall_reports")
        order = oldest.key.size if oldest.key.kind == "folio" else 0
        counts = " ".join(f"{name} {pages}" for name, pages in unreclaimable(arena).items())
        caches = sorted(arena.slab_caches, key=lambda cache: -cache.nr_slabs)[:SLABS_SHOWN]
        largest = ", ".join(f"{cache.name} {cache.nr_slabs}" for cache in caches)
        grace = ""
        if arena.rcu.pending:
            readers = ", ".join(arena.rcu.readers()) or "nobody any more"
            grace = f"\n  rcu: {arena.rcu.deferred_bytes} bytes wait for a grace period: {readers}"
        log.warning(
            "%s(%d) possible memory allocation deadlock size %d in %s (mode:%s), %d waiting\n"
            "  memory: free %d min %d of %d pages; unreclaimable: %s; slabs: %s; %s%s\n  %s",
            oldest.owner.name,
            os.getpid(),
            PAGE_SIZE << order,
            oldest.site,
            describe(oldest.gfp),
            len(arena.queue),
            arena.free_pages,
            arena.marks.min,
            arena.nr_pages,
            counts,
            largest or "none",
            arena.victims,
            grace,
            "\n  ".join(self.waiters()),
        )
