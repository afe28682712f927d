"""Migration: a folio moves from one block of pages to another of the same order.

Only a folio that nobody uses may move: on the LRU, not LOCKED, not under write-back, and with two
references under the lock that lookups take: its mapping's, and that of who moves it. Content,
flags (DIRTY among them), per-block bits, owner and index come along, and the new folio takes the
old one's place in its LRU list, or enters the same list of another node at the head. The mapping's
reference comes along, too: the old block is left with one, the mover's, and the new one has the one
it was allocated with.

The arena does not know what a folio belongs to: its owner registers as the mover. It looks at each
folio under its own lock, changes its index and calls `replace_folio` (fs/cache/relocate.py is the
page cache's). `settle` then gives back what is no longer needed. All of this happens on the trio
thread between two awaits; lanes look folios up meanwhile.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from alloc.atomic import fetch_add_acq_rel, fetch_and_acq_rel, load_acquire, spin_lock, spin_unlock
from alloc.buddy import FREED, FREED_AND_WAITERS, LAST, drop, give_back
from alloc.jit import helper, kernel
from alloc.libc import memcpy
from alloc.lru import BUDDY_ARGS, link_lru, list_of, unlink_lru
from alloc.node import buddy_on, node_of, row_of
from alloc.page import (
    HEAD,
    LOCKED,
    LRU,
    LRU_HEAD,
    LRU_TAIL,
    PAGE_SHIFT,
    W_LRU_LOCK,
    WRITEBACK,
    Buddy,
)

STAYS, MOVED = 0, 1  # verdicts


class Mover(Protocol):
    """What the owner of folios offers to who wants them elsewhere."""

    def move_folios(
        self, sources: NDArray[np.int64], targets: NDArray[np.int64], verdicts: NDArray[np.int64]
    ) -> None:
        """Move each source (a head, with a reference of the caller's) to its target.

        verdicts: MOVED, or STAYS when it is in use. Never waits and never allocates.
        """

    def policy_of(self, pfn: int) -> int:
        """The memory policy of what a folio belongs to, or NONE; the caller has a reference."""


@helper
def may_move(b, pfn):
    """Whether a folio on the LRU looks as if nobody but its mapping used it."""
    state = b.flags[pfn]
    if state & (HEAD | LRU | LOCKED | WRITEBACK) != HEAD | LRU:
        return False
    return load_acquire(b.refs, pfn) == 1


@helper
def _replace_lru(words, p, at, source, target):
    """Under the LRU lock: `target` takes the place of `source` in the list at `at`."""
    after = np.int64(p.lru_next[source])
    before = np.int64(p.lru_prev[source])
    p.lru_next[target] = after
    p.lru_prev[target] = before
    if after != 0:
        p.lru_prev[after] = target
    else:
        words[at + LRU_TAIL] = target
    if before != 0:
        p.lru_next[before] = target
    else:
        words[at + LRU_HEAD] = target
    p.lru_next[source] = 0
    p.lru_prev[source] = 0


@helper
def replace_folio(words, p, mem, source, target):
    """Under the owner's lock: `target`, a fresh block, becomes what `source` was.

    The owner's index is its own business. `source` is left with the caller's reference alone.
    """
    pages = np.int64(1) << np.int64(p.order[source])
    memcpy(mem, target << PAGE_SHIFT, mem, source << PAGE_SHIFT, pages << PAGE_SHIFT)
    p.mapping[target] = p.mapping[source]
    p.index[target] = p.index[source]
    p.private[target] = p.private[source]
    for k in range(pages):
        p.blocks[target + k] = p.blocks[source + k]
    b = Buddy(words, p.flags, p.order, p.refs, p.lru_next, p.lru_prev)
    left, entered = row_of(words, source), row_of(words, target)
    spin_lock(words, left + W_LRU_LOCK)
    at = list_of(b, left, source)
    listed = p.flags[source] & LRU != 0
    if listed and left != entered:
        unlink_lru(b, left, source)
    p.flags[target] = fetch_and_acq_rel(p.flags, source, HEAD)
    if listed and left == entered:
        _replace_lru(words, p, at, source, target)
    spin_unlock(words, left + W_LRU_LOCK)
    if listed and left != entered:
        spin_lock(words, entered + W_LRU_LOCK)
        link_lru(b, entered, target, False)
        spin_unlock(words, entered + W_LRU_LOCK)
    p.mapping[source] = 0
    fetch_add_acq_rel(p.refs, source, -1)


@helper
def _put(b, pfn):
    """Drop a reference; the last one gives the block back to the buddy of its node."""
    code = drop(b, pfn)
    return give_back(buddy_on(b, node_of(b.words, pfn)), pfn) if code == LAST else code


@kernel(f"i8({BUDDY_ARGS}, i8[::1], i8[::1], i8[::1], i8)")
def settle(words, flags, order, refs, lru_next, lru_prev, sources, targets, verdicts, n):
    """Drop the mover's references of sources[:n], and free the targets of those that stayed.

    A target of 0 is none. FREED_AND_WAITERS if somebody waits for what was freed.
    """
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    answer = FREED
    for i in range(n):
        if verdicts[i] != MOVED and targets[i] != 0 and _put(b, targets[i]) == FREED_AND_WAITERS:
            answer = FREED_AND_WAITERS
        if _put(b, sources[i]) == FREED_AND_WAITERS:
            answer = FREED_AND_WAITERS
    return answer
