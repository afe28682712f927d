"""Naive twins of the allocator's kernels: sets, dicts and lists, written for reading."""

from __future__ import annotations

from collections import OrderedDict

ORDER_MAX = 10


class NaiveBuddy:
    """Free blocks as a set of (pfn, order); pages 1 .. nr_pages-1."""

    def __init__(self, nr_pages: int, low: int, least: int) -> None:
        self.nr_pages, self.low, self.min = nr_pages, low, least
        self.free: set[tuple[int, int]] = set()
        self.allocated: dict[int, int] = {}
        for pfn in range(1, nr_pages):
            self._add(pfn, 0)

    def _add(self, pfn: int, order: int) -> None:
        buddy = pfn ^ (1 << order)
        if order < ORDER_MAX and (buddy, order) in self.free:
            self.free.remove((buddy, order))
            self._add(min(pfn, buddy), order + 1)
        else:
            self.free.add((pfn, order))

    @property
    def free_pages(self) -> int:
        return sum(1 << order for _, order in self.free)

    def may_take(self, order: int, mark: int) -> bool:
        """The watermark check, and that some block is large enough."""
        enough = self.free_pages - ((1 << order) - 1) > mark
        return enough and any(o >= order for _, o in self.free)

    def took(self, pfn: int, order: int) -> None:
        """Follow an allocation: the block must lie in one of the smallest blocks that fit."""
        fitting = min(o for _, o in self.free if o >= order)
        home = (pfn >> fitting << fitting, fitting)
        assert home in self.free
        assert pfn % (1 << order) == 0
        self.free.remove(home)
        start, size = home
        while size > order:
            size -= 1
            half = start + (1 << size)
            if pfn >= half:
                self.free.add((start, size))
                start = half
            else:
                self.free.add((half, size))
        assert start == pfn
        self.allocated[pfn] = order

    def gave_back(self, pfn: int) -> None:
        self._add(pfn, self.allocated.pop(pfn))


class NaiveLru:
    """Two ordered lists of folios, oldest first, and what is known of each folio."""

    def __init__(self) -> None:
        self.inactive: OrderedDict[int, None] = OrderedDict()
        self.active: OrderedDict[int, None] = OrderedDict()
        self.marked: set[int] = set()  # ACTIVE while on no list
        self.referenced: set[int] = set()

    def _leave(self, pfn: int) -> bool:
        for where in (self.inactive, self.active):
            if pfn in where:
                del where[pfn]
                return True
        return False

    def _enter(self, where: OrderedDict[int, None], pfn: int, oldest: bool = False) -> None:
        where[pfn] = None
        where.move_to_end(pfn, last=not oldest)

    def listed(self, pfn: int) -> bool:
        return pfn in self.inactive or pfn in self.active

    def add(self, pfn: int, active: bool) -> None:
        active = active or pfn in self.marked
        self._enter(self.active if active else self.inactive, pfn)
        self.marked.discard(pfn)

    def remove(self, pfn: int) -> bool:
        if pfn in self.active:
            self.marked.add(pfn)
        return self._leave(pfn)

    def activate(self, pfn: int) -> None:
        if self._leave(pfn):
            self._enter(self.active, pfn)
        else:
            self.marked.add(pfn)

    def deactivate(self, pfn: int, oldest: bool) -> None:
        self.referenced.discard(pfn)
        self.marked.discard(pfn)
        if self._leave(pfn):
            self._enter(self.inactive, pfn, oldest)

    def touch(self, pfn: int) -> None:
        if pfn in self.inactive and pfn in self.referenced:
            self.referenced.discard(pfn)
            self._leave(pfn)
            self._enter(self.active, pfn)
        else:
            self.referenced.add(pfn)

    def age(self, nr: int) -> None:
        for pfn in list(self.active)[:nr]:
            self.deactivate(pfn, oldest=False)

    def isolate(self, nr: int) -> list[int]:
        taken = list(self.inactive)[:nr]
        for pfn in taken:
            del self.inactive[pfn]
        return taken


def shrink(
    freeable: int, priority: int, seeks: int = 2, deferred: int = 0, batch: int = 128
) -> tuple[int, int]:
    """The shrinker formula restated: (objects scanned, deferred to the next pass)."""
    delta = ((freeable >> priority) * 4) // seeks if seeks else freeable // 2
    total = min((deferred >> priority) + delta, 2 * freeable)
    scanned = 0
    while total and (total >= batch or total >= freeable):
        step = min(batch, total)
        total, scanned = total - step, scanned + step
    return scanned, min(max(deferred + delta - scanned, 0), 2 * freeable)
