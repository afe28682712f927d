"""The LRU lists, active and inactive, of page cache folios: two for each node.

A folio is on a list exactly when its head has LRU; ACTIVE says which. Links are the descriptors'
lru_next/lru_prev; folios enter at the head, reclaim takes from the inactive tail, and a second
touch on the inactive list activates (`mark_accessed`), and so does a quick return after an eviction
(`refault`, alloc/workingset.py). When the inactive list is the shorter one, `age` moves folios from
the active tail to the inactive head.

`isolate` takes folios off the inactive list with a reference each, so that two reclaimers never
look at the same one and none is freed under their eyes; whoever isolates must `putback` each
folio, or remove it from its cache and drop the reference. The lists themselves hold none: the
last put takes a folio off its list.

While a request for a larger block waits, isolating is lumpy: with the folio at the tail come all
folios of the aligned block around it, active ones too, unless something in the block can not be
evicted at all. Sizes are counted in pages. Each node has a lock, held for one batch at most.

Kernels and helpers take the words of all nodes; `at` is the index of a node's row in them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import numpy as np

from alloc.atomic import (
    compare_exchange_acq_rel,
    fetch_and_acq_rel,
    fetch_or_acq_rel,
    load_acquire,
    spin_lock,
    spin_unlock,
)
from alloc.jit import helper, kernel
from alloc.node import row_of
from alloc.page import (
    ACTIVE,
    BUDDY,
    HEAD,
    LRU,
    LRU_HEAD,
    LRU_PAGES,
    LRU_STRIDE,
    LRU_TAIL,
    ORDER_MAX,
    PAGE_SHIFT,
    REFERENCED,
    W_LRU,
    W_LRU_LOCK,
    W_NODES,
    W_SPAN,
    W_STRIDE,
    WORKINGSET,
    Buddy,
)
from alloc.vmstat import VmStat
from alloc.workingset import COLD, RESTORED, activation, refault

BATCH_MAX = 1 << ORDER_MAX
BUDDY_ARGS = "i8[::1], u4[::1], u1[::1], i4[::1], u4[::1], u4[::1]"

# what `lru_move` does
ADD = 0  # to the head of the list that ACTIVE names
REMOVE = 1
ACTIVATE = 2  # to the head of the active list
DEACTIVATE = 3  # to the head of the inactive list
ROTATE = 4  # to the tail of the inactive list: next to be reclaimed

DONE = 1
NOTHING = 0
NOT_A_FOLIO = -1


def inactive_ratio(pages: int) -> int:
    """How many active pages there may be for an inactive one, of so many on both lists."""
    gib = pages >> 30 - PAGE_SHIFT
    return isqrt(10 * gib) if gib else 1


@helper
def try_get(b, pfn):
    """Add a reference unless there is none left; whether it was added."""
    while True:
        refs = load_acquire(b.refs, pfn)
        if refs <= 0:
            return False
        if compare_exchange_acq_rel(b.refs, pfn, refs, refs + 1):
            return True


@helper
def list_of(b, at, pfn):
    """Index in `words` of the list a folio belongs to by its ACTIVE flag."""
    if b.flags[pfn] & ACTIVE != 0:
        return at + W_LRU + LRU_STRIDE
    return at + W_LRU


@helper
def unlink_lru(b, row, pfn):
    """Under the LRU lock of its node: take a folio off the list it is on."""
    at = list_of(b, row, pfn)
    after = np.int64(b.lru_next[pfn])
    before = np.int64(b.lru_prev[pfn])
    if after != 0:
        b.lru_prev[after] = before
    else:
        b.words[at + LRU_TAIL] = before
    if before != 0:
        b.lru_next[before] = after
    else:
        b.words[at + LRU_HEAD] = after
    b.words[at + LRU_PAGES] -= 1 << np.int64(b.order[pfn])
    b.lru_next[pfn] = 0
    b.lru_prev[pfn] = 0
    fetch_and_acq_rel(b.flags, pfn, 0xFFFFFFFF ^ LRU)


@helper
def link_lru(b, row, pfn, at_tail):
    """Under the LRU lock of its node: put a folio at an end of the list that ACTIVE names."""
    at = list_of(b, row, pfn)
    head = b.words[at + LRU_HEAD]
    tail = b.words[at + LRU_TAIL]
    if at_tail:
        b.lru_prev[pfn] = tail
        b.lru_next[pfn] = 0
        b.words[at + LRU_TAIL] = pfn
        if tail != 0:
            b.lru_next[tail] = pfn
        else:
            b.words[at + LRU_HEAD] = pfn
    else:
        b.lru_next[pfn] = head
        b.lru_prev[pfn] = 0
        b.words[at + LRU_HEAD] = pfn
        if head != 0:
            b.lru_prev[head] = pfn
        else:
            b.words[at + LRU_TAIL] = pfn
    b.words[at + LRU_PAGES] += 1 << np.int64(b.order[pfn])
    fetch_or_acq_rel(b.flags, pfn, LRU)


@helper
def leave_lru(b, pfn):
    """A folio whose last reference is gone leaves its list."""
    row = row_of(b.words, pfn)
    spin_lock(b.words, row + W_LRU_LOCK)
    unlink_lru(b, row, pfn)
    spin_unlock(b.words, row + W_LRU_LOCK)


@helper
def _evictable_block(b, base, size):
    """Whether everything in an aligned block is free or on an LRU list."""
    if base + size > b.flags.size:
        return False
    pfn = base
    while pfn < base + size:
        flags = b.flags[pfn]
        if flags & BUDDY == 0 and (flags & HEAD == 0 or flags & LRU == 0):
            return False
        pfn += 1 << np.int64(b.order[pfn])
    return True


@helper
def _isolate_one(b, row, pfn, out, n):
    """Under the LRU lock: take a folio off its list with a reference; the new count."""
    if not try_get(b, pfn):
        return n  # its last reference is being dropped
    unlink_lru(b, row, pfn)
    fetch_and_acq_rel(b.flags, pfn, 0xFFFFFFFF ^ ACTIVE)
    out[n] = pfn
    return n + 1


@helper
def _isolate_block(b, row, base, size, out, n):
    """Under the LRU lock: isolate every folio of an evictable block."""
    pfn = base
    while pfn < base + size:
        step = 1 << np.int64(b.order[pfn])
        if b.flags[pfn] & LRU != 0:
            n = _isolate_one(b, row, pfn, out, n)
        pfn += step
    return n


@kernel(f"i8({BUDDY_ARGS}, i8, i8)")
def lru_move(words, flags, order, refs, lru_next, lru_prev, pfn, what):
    """ADD REMOVE ACTIVATE DEACTIVATE ROTATE; DONE, NOTHING if it was so already, NOT_A_FOLIO."""
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    if flags[pfn] & HEAD == 0:
        return NOT_A_FOLIO
    code = DONE
    row = row_of(words, pfn)
    spin_lock(words, row + W_LRU_LOCK)
    listed = flags[pfn] & LRU != 0
    if what == ADD:
        if listed:
            code = NOTHING
        else:
            link_lru(b, row, pfn, False)
    elif what == REMOVE:
        if listed:
            unlink_lru(b, row, pfn)
        else:
            code = NOTHING
    else:
        if listed:
            unlink_lru(b, row, pfn)
        if what == ACTIVATE:
            fetch_or_acq_rel(flags, pfn, ACTIVE)
        else:
            fetch_and_acq_rel(flags, pfn, 0xFFFFFFFF ^ (ACTIVE | REFERENCED))
        if listed:
            link_lru(b, row, pfn, what == ROTATE)
        else:
            code = NOTHING
    spin_unlock(words, row + W_LRU_LOCK)
    return code


@kernel(f"i8({BUDDY_ARGS}, i8, u4[::1], i8, i8)")
def lru_isolate(words, flags, order, refs, lru_next, lru_prev, node, out, nr, lumpy):
    """Fill out[] from a node's inactive tail, `nr` folios or more if there are so many; how many.

    lumpy > 0: with each come the folios of its aligned block of 2^lumpy pages. out must hold
    nr + 2^lumpy.
    """
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    n = 0
    row = node * words[W_STRIDE]
    spin_lock(words, row + W_LRU_LOCK)
    pfn = words[row + W_LRU + LRU_TAIL]
    while pfn != 0 and n < nr:
        before = np.int64(lru_prev[pfn])
        base = (pfn >> lumpy) << lumpy
        if lumpy > np.int64(order[pfn]) and _evictable_block(b, base, 1 << lumpy):
            had = n
            n = _isolate_block(b, row, base, 1 << lumpy, out, n)
            # `before` may have left with the block; but never start over without progress
            pfn = words[row + W_LRU + LRU_TAIL] if n > had else before
        else:
            n = _isolate_one(b, row, pfn, out, n)
            pfn = before
    spin_unlock(words, row + W_LRU_LOCK)
    return n


@kernel(f"i8({BUDDY_ARGS}, i8, i8)")
def lru_age(words, flags, order, refs, lru_next, lru_prev, node, nr):
    """Move up to `nr` folios from a node's active tail to its inactive head; how many."""
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    n = 0
    row = node * words[W_STRIDE]
    spin_lock(words, row + W_LRU_LOCK)
    while n < nr and words[row + W_LRU + LRU_STRIDE + LRU_TAIL] != 0:
        pfn = words[row + W_LRU + LRU_STRIDE + LRU_TAIL]
        unlink_lru(b, row, pfn)
        fetch_and_acq_rel(flags, pfn, 0xFFFFFFFF ^ (ACTIVE | REFERENCED))
        fetch_or_acq_rel(flags, pfn, WORKINGSET)
        link_lru(b, row, pfn, False)
        n += 1
    spin_unlock(words, row + W_LRU_LOCK)
    return n


@kernel(f"i8({BUDDY_ARGS}, i8)")
def lru_touch(words, flags, order, refs, lru_next, lru_prev, pfn):
    """mark_accessed: the first touch sets REFERENCED, the second activates; DONE if activated."""
    if flags[pfn] & (REFERENCED | ACTIVE | LRU) != REFERENCED | LRU:
        fetch_or_acq_rel(flags, pfn, REFERENCED)
        return NOTHING
    code = NOTHING
    row = row_of(words, pfn)
    spin_lock(words, row + W_LRU_LOCK)
    if flags[pfn] & (ACTIVE | LRU) == LRU:
        b = Buddy(words, flags, order, refs, lru_next, lru_prev)
        unlink_lru(b, row, pfn)
        fetch_or_acq_rel(flags, pfn, ACTIVE)
        fetch_and_acq_rel(flags, pfn, 0xFFFFFFFF ^ REFERENCED)
        link_lru(b, row, pfn, False)
        activation(words, row, np.int64(1) << np.int64(order[pfn]))
        code = DONE
    spin_unlock(words, row + W_LRU_LOCK)
    return code


class Lru:
    """The lists of one arena, for the page cache. pfns are those of folio heads."""

    def __init__(
        self,
        buddy: Buddy,
        vmstat: VmStat,
        put_folio: Callable[[int], bool],
        wanted_order: Callable[[int], int],
        scanner: Callable[[], str],
    ) -> None:
        self._buddy = buddy
        self._vmstat = vmstat
        self._put_folio = put_folio
        self._wanted_order = wanted_order
        self._scanner = scanner
        self._out = np.zeros(2 * BATCH_MAX, dtype=np.uint32)
        words = buddy.words
        self._span, self._stride = int(words[W_SPAN]), int(words[W_STRIDE])
        self._nodes = range(int(words[W_NODES]))
        self.nr_isolated = [0 for _ in self._nodes]  # pages, by node
        vmstat.gauge("nr_isolated_file", lambda: sum(self.nr_isolated))

    def inactive_on(self, node: int) -> int:
        """Pages on a node's inactive list."""
        return int(self._buddy.words[node * self._stride + W_LRU + LRU_PAGES])

    def active_on(self, node: int) -> int:
        """Pages on a node's active list."""
        return int(self._buddy.words[node * self._stride + W_LRU + LRU_STRIDE + LRU_PAGES])

    @property
    def nr_inactive(self) -> int:
        """Pages on all inactive lists."""
        return sum(map(self.inactive_on, self._nodes))

    @property
    def nr_active(self) -> int:
        """Pages on all active lists."""
        return sum(map(self.active_on, self._nodes))

    def _move(self, pfn: int, what: int) -> bool:
        code = lru_move(*self._buddy, pfn, what)
        assert code != NOT_A_FOLIO, f"page {pfn} is not the head of an allocated folio"
        return bool(code == DONE)

    def add(self, pfn: int, active: bool = False) -> None:
        """A folio that is on no list enters at a head: the inactive list's unless `active`."""
        if active:
            self._move(pfn, ACTIVATE)
        added = self._move(pfn, ADD)
        assert added, f"folio {pfn} is on a list already"

    def remove(self, pfn: int) -> bool:
        """Take a folio off its list; False when it was on none (isolated, or never added)."""
        return self._move(pfn, REMOVE)

    def activate(self, pfn: int) -> None:
        """To the head of the active list (or marked so, for when an isolated one comes back)."""
        self._move(pfn, ACTIVATE)
        self._vmstat.add("pgactivate")

    def deactivate(self, pfn: int) -> None:
        """To the head of the inactive list."""
        self._move(pfn, DEACTIVATE)
        self._vmstat.add("pgdeactivate")

    def rotate(self, pfn: int) -> None:
        """To the tail of the inactive list: reclaim takes it next (its write has ended)."""
        self._move(pfn, ROTATE)
        self._vmstat.add("pgrotated")

    def mark_accessed(self, pfn: int) -> None:
        """A use of the folio; the second one on the inactive list activates it."""
        if lru_touch(*self._buddy, pfn) == DONE:
            self._vmstat.add("pgactivate")

    def refault(self, pfn: int, shadow: int) -> None:
        """A folio that is to be read, and on no list yet, left this shadow when it was evicted.

        It enters the active list if that was too early.
        """
        b, nr = self._buddy, 1 << int(self._buddy.order[pfn])
        self._vmstat.add("workingset_refault_file", nr)
        code = refault(b.words, b.flags, b.order, pfn, shadow)
        if code != COLD:
            self._vmstat.add("workingset_activate_file", nr)
        if code == RESTORED:
            self._vmstat.add("workingset_restore_file", nr)

    def inactive_is_low(self, node: int = 0) -> bool:
        """Whether reclaim should age a node's active list: the kernel's ratio, 1 below 1 GiB."""
        inactive, active = self.inactive_on(node), self.active_on(node)
        return inactive * inactive_ratio(inactive + active) < active

    def age(self, nr: int, node: int = 0) -> int:
        """Deactivate up to `nr` folios from a node's active tail; how many."""
        moved: int = lru_age(*self._buddy, node, nr)
        self._vmstat.add("pgdeactivate", moved)
        return moved

    def isolate(self, nr: int, node: int = 0) -> list[int]:
        """About `nr` folios from a node's inactive tail, off the lists, with a reference each.

        More than `nr` when a larger block is wanted. Every one must be put back or released.
        """
        lumpy = self._wanted_order(node)
        n = lru_isolate(*self._buddy, node, self._out, min(nr, BATCH_MAX), lumpy)
        pfns: list[int] = self._out[:n].tolist()
        self.nr_isolated[node] += sum(1 << int(self._buddy.order[pfn]) for pfn in pfns)
        self._vmstat.add(f"pgscan_{self._scanner()}", n)
        return pfns

    def putback(self, pfn: int) -> bool:
        """An isolated folio returns to the head of its list; drops isolate's reference.

        True when that was the last one: its cache let go of it meanwhile, and it is freed.
        """
        self._move(pfn, ADD)
        return self.release(pfn)

    def release(self, pfn: int) -> bool:
        """An isolated folio is to return to no list; drops isolate's reference.

        True when that was the last one: its cache let go of it, and it is freed.
        """
        self.nr_isolated[pfn // self._span] -= 1 << int(self._buddy.order[pfn])
        return self._put_folio(pfn)
