"""The two scanners of compaction: folios that may move, from below; pages for them, from above.

The migrate scanner looks for a *unit*, an aligned block of the wanted order in which everything is
free or a folio that may move: only such a block is worth the work, since one page that stays
spoils it. What it finds without a lock is a guess, which `isolate` confirms under the LRU lock when
it takes a reference of each folio; the folios stay on their list. The free scanner takes blocks of
exactly the order that a folio has, from MOVABLE pageblocks above the unit, and spares free blocks
that are as large as the wanted one.

The scanners look at one node. A byte for each of its pageblocks says from which order on it had no
unit when it was last looked at: a block without one of order o has none of a larger order either.
`state` is what a run keeps: see the indices below. No lock is held for more than a unit or a
pageblock. Kernels here take the words of the node.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import spin_lock, spin_unlock
from alloc.buddy import carve
from alloc.freelist import block_type
from alloc.jit import helper, kernel
from alloc.lru import BUDDY_ARGS, try_get
from alloc.migrate import may_move
from alloc.page import (
    BUDDY,
    HEAD,
    HIGHATOMIC,
    MOVABLE,
    TAIL,
    W_BLOCK_ORDER,
    W_BUDDY_LOCK,
    W_END,
    W_FREE,
    W_LRU_LOCK,
    W_PGALLOC,
    W_START,
    Buddy,
)

NO_SKIP = 255
BATCH = 32  # pages that are isolated at a time
ANY_TYPE = -1

# a run's state
C_MIGRATE = 0  # where the migrate scanner is, a pfn
C_FREE = 1  # the pageblock that the free scanner is in: its first page
C_LIMIT = 2  # folios of this order and above find no place
C_MIGRATE_SCANNED = 3  # pages looked at
C_FREE_SCANNED = 4
C_ISOLATED = 5  # pages of folios, and of blocks for them
STATE_WORDS = 6


@helper
def _movable_pages(b, base, end, limit):
    """Pages of folios in a unit; -1 if something there is neither free nor may move."""
    pages = np.int64(0)
    pfn = base
    while pfn < end:
        order = np.int64(b.order[pfn])
        if b.flags[pfn] & BUDDY == 0:
            if order >= limit or not may_move(b, pfn):
                return np.int64(-1)
            pages += 1 << order
        pfn += 1 << order
    return pages


@helper
def _type_fits(words, base, end, mt):
    """Whether folios may be taken out of all pageblocks of a unit."""
    pfn = base
    while pfn < end:
        there = block_type(words, pfn)
        if there == HIGHATOMIC or (mt != ANY_TYPE and there != mt):
            return False
        pfn += np.int64(1) << words[W_BLOCK_ORDER]
    return True


@helper
def _number(words, pfn):
    """Of the pageblock of a page, among those of its node."""
    return pfn - words[W_START] >> words[W_BLOCK_ORDER]


@helper
def _is_skipped(words, skip, base, end, order):
    """Whether a pageblock of a unit is known to have none of this order."""
    pfn = base
    while pfn < end:
        if skip[_number(words, pfn)] <= order:
            return True
        pfn += np.int64(1) << words[W_BLOCK_ORDER]
    return False


@kernel(f"i8({BUDDY_ARGS}, u1[::1], i8[::1], i8, i8, b1)")
def find_unit(words, flags, order, refs, lru_next, lru_prev, skip, state, wanted, mt, ignore):
    """The next unit of order `wanted` that moving folios would make free, or 0: none is left.

    mt: of which pageblocks, or ANY_TYPE. ignore: look also where nothing was found before. The
    migrate scanner is moved behind the unit. A unit that needs more pages than are free is none.
    """
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    size = np.int64(1) << wanted
    region = max(size, np.int64(1) << words[W_BLOCK_ORDER])
    found = np.int64(0)
    at = state[C_MIGRATE]
    while found == 0 and at + size <= state[C_FREE]:
        begin = at
        end = min((at & -region) + region, words[W_END])
        usable = _type_fits(words, begin & -region, end, mt)
        if usable and not ignore:
            usable = not _is_skipped(words, skip, begin & -region, end, wanted)
        if not usable:
            at = end
            continue
        hopeless = begin & (region - 1) == 0 and state[C_LIMIT] >= wanted
        while found == 0 and at + size <= end:
            pages = _movable_pages(b, at, at + size, min(wanted, state[C_LIMIT]))
            state[C_MIGRATE_SCANNED] += size
            hopeless = hopeless and pages < 0
            if 0 < pages < words[W_FREE]:
                found = at
            at += size
        if found == 0:
            at = end
        if hopeless:
            for block in range(_number(words, begin), _number(words, end)):
                skip[block] = min(np.int64(skip[block]), wanted)
    state[C_MIGRATE] = at
    return found


@kernel(f"i8({BUDDY_ARGS}, i8[::1], i8, i8, i8[::1])")
def isolate(words, flags, order, refs, lru_next, lru_prev, state, unit, wanted, out):
    """A reference of each of the next folios in a unit, worth BATCH pages or one; how many.

    0: it is free by now. -1: something in it can not move after all.
    """
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    n = 0
    taken = np.int64(0)
    end = unit + (np.int64(1) << wanted)
    spin_lock(words, W_LRU_LOCK)
    if _movable_pages(b, unit, end, min(wanted, state[C_LIMIT])) < 0:
        n = -1
    pfn = unit
    while n >= 0 and pfn < end and taken < BATCH:
        pages = np.int64(1) << np.int64(order[pfn])
        if flags[pfn] & BUDDY == 0:
            if not try_get(b, pfn):
                n = n if n > 0 else -1  # its last reference is being dropped
                break
            out[n] = pfn
            n += 1
            taken += pages
        pfn += pages
    spin_unlock(words, W_LRU_LOCK)
    state[C_ISOLATED] += taken
    return n


@helper
def _free_in(b, start, want, spared):
    """Under the buddy lock: a free block of order `want` or more in a pageblock, or 0.

    -1: there is not even a smaller one. Those of order `spared` and above are left alone.
    """
    words = b.words
    end = min(start + (np.int64(1) << words[W_BLOCK_ORDER]), words[W_END])
    answer = np.int64(-1)
    pfn = start
    while pfn < end:
        order = np.int64(b.order[pfn])
        if b.flags[pfn] & BUDDY != 0 and order < spared:
            answer = np.int64(0)
            if order >= want:
                return pfn
        # by pages where a block may be on its way: its order may be old
        pfn += 1 << order if b.flags[pfn] & (BUDDY | HEAD) != 0 else 1
    return answer


@helper
def _take_target(b, state, bottom, want, spared):
    """A block of order `want` as it is handed out, from the top; or 0 when there is none."""
    words = b.words
    size = np.int64(1) << words[W_BLOCK_ORDER]
    start = state[C_FREE]
    while start >= bottom:
        pfn = np.int64(-1)
        if block_type(words, start) == MOVABLE:
            spin_lock(words, W_BUDDY_LOCK)
            pfn = _free_in(b, start, want, spared)
            if pfn > 0:
                carve(b, pfn, want)
                words[W_PGALLOC] += 1 << want
            spin_unlock(words, W_BUDDY_LOCK)
            state[C_FREE_SCANNED] += size
        if pfn > 0:
            return pfn
        if pfn < 0 and start == state[C_FREE]:
            state[C_FREE] -= size
        start -= size
    return np.int64(0)


@kernel(f"i8({BUDDY_ARGS}, i8[::1], i8, i8, i8[::1], i8[::1], i8)")
def take_targets(
    words, flags, order, refs, lru_next, lru_prev, state, unit, wanted, sources, targets, n
):
    """A block for each of sources[:n], with one reference; how many before there was none.

    They lie above the unit. The first for which there is none lowers the run's limit.
    """
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    size = np.int64(1) << words[W_BLOCK_ORDER]
    bottom = (unit + (np.int64(1) << wanted) + size - 1) & -size
    for i in range(n):
        targets[i] = 0
    for i in range(n):
        want = np.int64(order[sources[i]])
        pfn = _take_target(b, state, bottom, want, max(wanted, want + 1))
        if pfn == 0:
            state[C_LIMIT] = want
            return i
        pages = np.int64(1) << want
        order[pfn : pfn + pages] = want
        flags[pfn + 1 : pfn + pages] = TAIL
        flags[pfn] = HEAD
        refs[pfn] = 1
        targets[i] = pfn
        state[C_ISOLATED] += pages
    return n
