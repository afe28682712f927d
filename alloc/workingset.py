"""Refault distances: whether a folio that comes back was evicted too early.

The nonresident age counts the pages that have left the inactive list, by eviction or activation.
What is evicted leaves a shadow in its place: the age at that time, and whether the folio had been
on the active list before (WORKINGSET). When it is read again, the age has gone on by the refault
distance: with so many more inactive pages it would still be there. If the active list is at least
as long, its pages stand in the way of one that is used more often, so the folio becomes active at
once, and competes with them. These are the kernel's rules.

Each node has an age, one word, changed by atomic addition; a folio that comes back is compared with
the node that it left, wherever it is now. A shadow is a number of 30 bits, from above the age, the
node, WORKINGSET; where it is kept is the page cache's business. An age of 25 bits tells distances
of up to 128 GiB apart.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import fetch_add_acq_rel, fetch_or_acq_rel, load_acquire
from alloc.jit import helper, kernel
from alloc.node import row_of
from alloc.page import (
    ACTIVE,
    LRU_PAGES,
    LRU_STRIDE,
    NODES,
    W_LRU,
    W_NONRESIDENT_AGE,
    W_STRIDE,
    WORKINGSET,
)

SHADOW_BITS = 30
AGE_SHIFT = 1 + (NODES - 1).bit_length()
AGE_MASK = (1 << SHADOW_BITS - AGE_SHIFT) - 1

# what `refault` says
COLD = 0  # the distance is too long
ACTIVATED = 1
RESTORED = 2  # activated, and it had been active before


@helper
def activation(words, row, pages):
    """Pages go from a node's inactive list to its active one because they were used twice."""
    fetch_add_acq_rel(words, row + W_NONRESIDENT_AGE, pages)


@helper
def eviction(words, flags, order, pfn):
    """The shadow of a folio that is about to be evicted."""
    row = row_of(words, pfn)
    age = fetch_add_acq_rel(words, row + W_NONRESIDENT_AGE, np.int64(1) << np.int64(order[pfn]))
    node = row // words[W_STRIDE]
    return (age & AGE_MASK) << AGE_SHIFT | node << 1 | np.int64(flags[pfn] & WORKINGSET != 0)


@kernel("i8(i8[::1], u4[::1], u1[::1], i8, i8)")
def refault(words, flags, order, pfn, shadow):
    """A folio that is on no list yet has left this shadow: COLD, ACTIVATED or RESTORED."""
    left = (shadow >> 1 & NODES - 1) * words[W_STRIDE]
    distance = (load_acquire(words, left + W_NONRESIDENT_AGE) - (shadow >> AGE_SHIFT)) & AGE_MASK
    if distance > words[left + W_LRU + LRU_STRIDE + LRU_PAGES]:
        return np.int64(COLD)
    activation(words, row_of(words, pfn), np.int64(1) << np.int64(order[pfn]))
    if shadow & 1 == 0:
        fetch_or_acq_rel(flags, pfn, ACTIVE)
        return np.int64(ACTIVATED)
    fetch_or_acq_rel(flags, pfn, ACTIVE | WORKINGSET)
    return np.int64(RESTORED)
