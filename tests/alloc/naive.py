"""Naive twins of the allocator's kernels: sets, dicts and lists, written for reading."""

from __future__ import annotations

from collections import OrderedDict

ORDER_MAX = 10


UNMOVABLE, MOVABLE, RECLAIMABLE, HIGHATOMIC = range(4)
FALLBACKS = {
    UNMOVABLE: (RECLAIMABLE, MOVABLE),
    MOVABLE: (RECLAIMABLE, UNMOVABLE),
    RECLAIMABLE: (UNMOVABLE, MOVABLE),
}


class NaiveBuddy:
    """Free blocks as lists of pfns by (type, order), next to be taken first; pages 1 and up."""

    def __init__(self, nr_pages: int, min_mark: int, low: int, boost_max: int) -> None:
        self.nr_pages, self.min, self.low, self.boost_max = nr_pages, min_mark, low, boost_max
        self.block_order = 9
        while self.block_order and nr_pages < 128 << self.block_order:
            self.block_order -= 1
        size = 1 << self.block_order
        self.types = [MOVABLE] * ((nr_pages + size - 1) // size)
        self.lists: dict[tuple[int, int], list[int]] = {}
        self.allocated: dict[int, int] = {}
        self.listed: set[int] = set()  # allocated folios on the LRU
        self.boost = self.reserved = self.claimed = self.stolen = 0
        self.merged = [0] * (ORDER_MAX + 1)
        self.reserve_max = 0
        if nr_pages // 100 >= size:
            self.reserve_max = (nr_pages // 100 + size - 1) // size * size
        pfn = nr_pages
        while pfn > 1:
            order = max(o for o in range(ORDER_MAX + 1) if pfn % (1 << o) == 0 and pfn - (1 << o))
            pfn -= 1 << order
            self._put(pfn, order, MOVABLE)

    # -- lists

    def _put(self, pfn: int, order: int, mt: int, last: bool = False) -> None:
        blocks = self.lists.setdefault((mt, order), [])
        blocks.insert(len(blocks) if last else 0, pfn)

    def free(self) -> dict[int, tuple[int, int]]:
        """(order, type) of every free block by its pfn."""
        return {pfn: (order, mt) for (mt, order), pfns in self.lists.items() for pfn in pfns}

    def first(self, order: int, mt: int) -> int:
        for o in range(order, ORDER_MAX + 1):
            if self.lists.get((mt, o)):
                return self.lists[mt, o][0]
        return 0

    @property
    def free_pages(self) -> int:
        return sum(len(pfns) << order for (_, order), pfns in self.lists.items())

    @property
    def free_reserve(self) -> int:
        return sum(len(pfns) << o for (mt, o), pfns in self.lists.items() if mt == HIGHATOMIC)

    # -- pageblocks

    def type_of(self, pfn: int) -> int:
        return self.types[pfn >> self.block_order]

    def _set_types(self, pfn: int, order: int, mt: int) -> None:
        for page in range(pfn, pfn + (1 << order)):
            self.types[page >> self.block_order] = mt

    def _within(self, pfn: int) -> range:
        start = pfn >> self.block_order << self.block_order
        return range(start, min(start + (1 << self.block_order), self.nr_pages))

    def _retype(self, pfn: int, mt: int) -> None:
        free, old = self.free(), self.type_of(pfn)
        for page in self._within(pfn):
            if page in free:
                order, _ = free[page]
                self.lists[old, order].remove(page)
                self._put(page, order, mt)
        self._set_types(pfn, 0, mt)

    def _claim(self, pfn: int, found: int, order: int, mt: int) -> int:
        other, size = self.type_of(pfn), 1 << self.block_order
        if found >= self.block_order:
            claimed = max(order, self.block_order)
            self.lists[other, found].remove(pfn)
            while found > claimed:
                found -= 1
                self._put(pfn + (1 << found), found, other)
            self._set_types(pfn, claimed, mt)
            self._put(pfn, claimed, mt)
            self.claimed += 1 << claimed - self.block_order
            return pfn
        pages = set(self._within(pfn))
        free = sum(1 << o for p, (o, _) in self.free().items() if p in pages)
        listed = sum(1 << self.allocated[p] for p in pages & self.listed)
        alike = 0
        if mt == MOVABLE:
            alike = listed
        elif other == MOVABLE:
            alike = size - free - listed
        if free + alike < size / 2:
            return 0
        self._retype(pfn, mt)
        self.claimed += 1
        return self.first(order, mt)

    def _fall_back(self, order: int, mt: int) -> int:
        least = order if mt != MOVABLE else max(order, self.block_order // 2)
        mixes, pfn = False, 0
        for found in range(ORDER_MAX, least - 1, -1):
            for other in FALLBACKS[mt]:
                if self.lists.get((other, found)):
                    mixes |= found < self.block_order
                    pfn = self._claim(self.lists[other, found][0], found, order, mt)
                    break
            if pfn:
                break
        if not pfn:
            pfns = [self.first(order, other) for other in FALLBACKS[mt]]
            if not any(pfns):
                return 0
            mixes = True
            self.stolen += 1
            pfn = pfns[0] or pfns[1]
            if order == 0 and mt != MOVABLE:
                lowest = min(self.free())
                pfn = lowest if self.type_of(lowest) != HIGHATOMIC else pfn
        if mixes:
            self.boost = min(self.boost + (1 << self.block_order), self.boost_max)
        return pfn

    # -- what the kernels do

    def take(self, order: int, mt: int, floor: int, atomic: bool, reserve: bool) -> int:
        """A block, or 0. floor: what must stay free; reserve: whether the reserve may be used."""
        free = self.free_pages - (0 if reserve else self.free_reserve)
        if free - ((1 << order) - 1) <= floor:
            return 0
        pfn = self.first(order, HIGHATOMIC) if atomic and order else 0
        pfn = pfn or self.first(order, mt)
        pfn = pfn or self._fall_back(order, mt)
        if not pfn and (atomic or floor == 0):
            pfn = self.first(order, HIGHATOMIC)
        if not pfn:
            return 0
        found, home = self.free()[pfn]
        self.lists[home, found].remove(pfn)
        while found > order:
            found -= 1
            self._put(pfn + (1 << found), found, home)
        if atomic and order:
            self._reserve(pfn, order)
        self.allocated[pfn] = order
        return pfn

    def _reserve(self, pfn: int, order: int) -> None:
        if self.reserved >= self.reserve_max or self.type_of(pfn) == HIGHATOMIC:
            return
        if order >= self.block_order:
            self._set_types(pfn, order, HIGHATOMIC)
        else:
            self._retype(pfn, HIGHATOMIC)
        self.reserved = self.types.count(HIGHATOMIC) << self.block_order

    def release(self, mt: int) -> None:
        while pfn := self.first(0, HIGHATOMIC):
            order, _ = self.free()[pfn]
            if order >= self.block_order:
                self.lists[HIGHATOMIC, order].remove(pfn)
                self._set_types(pfn, order, mt)
                self._add(pfn, order)
            else:
                self._retype(pfn, mt)
        self.reserved = self.types.count(HIGHATOMIC) << self.block_order

    def _add(self, pfn: int, order: int) -> None:
        mt = self.type_of(pfn)
        free = self.free()
        while order < ORDER_MAX:
            buddy = pfn ^ 1 << order
            if free.get(buddy, (-1, 0))[0] != order:
                break
            other = free[buddy][1]
            if other != mt and HIGHATOMIC in (other, mt):
                break
            self.lists[other, order].remove(buddy)
            self._set_types(buddy, order, mt)
            pfn, order = min(pfn, buddy), order + 1
            self.merged[order] += 1
        beyond = (pfn & ~(1 << order)) ^ 2 << order
        soon = order < ORDER_MAX - 1 and free.get(beyond, (-1, 0))[0] == order + 1
        self._put(pfn, order, mt, last=soon)

    def give_back(self, pfn: int) -> None:
        self.listed.discard(pfn)
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
