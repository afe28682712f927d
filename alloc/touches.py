"""Touches: who uses a folio from which node, counted in the folio's descriptor.

As the Origin's hardware did it for each frame: a counter for each node, and an interrupt when that
of another node leads the folio's own by a threshold. Here the counters are in `private` of the head
page, which for folios of files is nobody else's: 48 bits for all nodes, so up to 11 each, as on the
Origin, or fewer where there are more than four. One that is full halves all. Above them is how
often the folio has moved, by which its threshold doubles (`MOVES_MOST` times at most), and when it
did, in ticks of the balancer (alloc/balance.py).

The interrupt is an entry in the ring of the node where the folio is: its pfn and who wants it. The
ring keeps the last ones; what is lost is said again when the lead has grown by the threshold again.

Whoever touches holds a reference or the lock under which the folio is found. A touch is one atomic
exchange, and given up if somebody else's comes between: counters are no more than a hint. Where
there is one node, or nothing is to move, W_MIGRATE is 0, and a touch is a look at that word.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import compare_exchange_acq_rel, fetch_add, spin_lock, spin_unlock
from alloc.jit import helper, inlined, kernel
from alloc.lru import BUDDY_ARGS, try_get
from alloc.migrate import may_move
from alloc.node import row_of
from alloc.page import (
    HOT,
    HOT_NODE_SHIFT,
    W_HOT,
    W_HOT_NEXT,
    W_LRU_LOCK,
    W_MIGRATE,
    W_NODES,
    W_STRIDE,
    Buddy,
)

COUNTER_BITS = 11
COUNTERS_BITS = 48  # of all nodes
COUNTERS_MASK = (1 << COUNTERS_BITS) - 1
MOVES_SHIFT = COUNTERS_BITS
MOVES_MASK = 15
MOVES_MOST = 6
TICK_SHIFT = MOVES_SHIFT + 4
TICK_MASK = (1 << 11) - 1

# what `claim` says beside the folio's node
IN_USE = -1  # it can not move now
NOT_HOT = -2  # the other node does not lead (any more)
BOUNCED = -3  # it has moved a short while ago


@inlined
def _counter_bits(words):
    return min(COUNTER_BITS, COUNTERS_BITS // words[W_NODES])


@helper
def _halved(words, state, bits):
    """Every counter of a folio divided by two."""
    counters = state & COUNTERS_MASK
    half = np.int64(0)
    for node in range(words[W_NODES]):
        half |= (counters >> node * bits & (1 << bits) - 1) >> 1 << node * bits
    return state & ~COUNTERS_MASK | half


@helper
def _lead(words, state, here, node):
    """By how much the counter of a node is above that of the folio's own, and its threshold."""
    bits = _counter_bits(words)
    most = (np.int64(1) << bits) - 1
    moves = state >> MOVES_SHIFT & MOVES_MASK
    need = min(words[W_MIGRATE] << moves, most)
    return (state >> node * bits & most) - (state >> here * bits & most), need


@helper
def _count(words, private, pfn, home):
    bits = _counter_bits(words)
    most = (np.int64(1) << bits) - 1
    before = np.int64(private[pfn])
    state = before
    if state >> home * bits & most == most:
        state = _halved(words, state, bits)
    state += np.int64(1) << home * bits
    if not compare_exchange_acq_rel(private, pfn, before, state):
        return
    row = row_of(words, pfn)
    here = row // words[W_STRIDE]
    lead, need = _lead(words, state, here, home)
    if here != home and lead >= need and lead % need == 0:
        entry = fetch_add(words, row + W_HOT_NEXT, 1) % HOT
        words[row + W_HOT + entry] = pfn << HOT_NODE_SHIFT | home


@inlined
def touch(words, private, pfn, home):
    """A use of a folio by a thread at home on a node. `words` are those of all nodes."""
    if words[W_MIGRATE] != 0:
        _count(words, private, pfn, home)


@kernel("void(i8[::1], u8[::1], i8[::1], i8)")
def touch_all(words, private, pfns, home):
    """See `touch`."""
    for pfn in pfns:
        touch(words, private, pfn, home)


@inlined
def begin(words, private, pfn):
    """A folio enters a file: nobody has touched it yet."""
    if words[W_NODES] > 1:
        private[pfn] = 0


@kernel(f"i8({BUDDY_ARGS}, u8[::1], i8, i8, i8, i8)")
def claim(words, flags, order, refs, lru_next, lru_prev, private, pfn, node, tick, rest):
    """A reference of a folio that shall move to a node; where it is, or a reason why not.

    rest: for how many ticks after a move it is left alone.
    """
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    row = row_of(words, pfn)
    here = row // words[W_STRIDE]
    answer = np.int64(IN_USE)
    spin_lock(words, row + W_LRU_LOCK)
    if may_move(b, pfn):
        state = np.int64(private[pfn])
        lead, need = _lead(words, state, here, node)
        moved = state >> MOVES_SHIFT & MOVES_MASK != 0
        if here == node or lead < need:
            answer = np.int64(NOT_HOT)
        elif moved and (tick - (state >> TICK_SHIFT)) & TICK_MASK < rest:
            answer = np.int64(BOUNCED)
        elif try_get(b, pfn):
            answer = here
    spin_unlock(words, row + W_LRU_LOCK)
    return answer


@kernel("void(u8[::1], i8, i8)")
def note_move(private, pfn, tick):
    """A folio has come to another node: counting begins anew, with a higher threshold."""
    moves = min((np.int64(private[pfn]) >> MOVES_SHIFT & MOVES_MASK) + 1, MOVES_MOST)
    private[pfn] = (tick & TICK_MASK) << TICK_SHIFT | moves << MOVES_SHIFT
