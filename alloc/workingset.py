"""Refault distances: whether a folio that comes back was evicted too early.

The nonresident age counts the pages that have left the inactive list, by eviction or activation.
What is evicted leaves a shadow in its place: the age at that time, and whether the folio had been
on the active list before (WORKINGSET). When it is read again, the age has gone on by the refault
distance: with so many more inactive pages it would still be there. If the active list is at least
as long, its pages stand in the way of one that is used more often, so the folio becomes active at
once, and competes with them. These are the kernel's rules.

A shadow is a number of 30 bits; where it is kept is the page cache's business. An age of 29 bits
tells distances of up to 2 TiB apart. The age is one word, changed by atomic addition.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import fetch_add_acq_rel, fetch_or_acq_rel, load_acquire
from alloc.jit import helper, kernel
from alloc.page import ACTIVE, LRU_PAGES, LRU_STRIDE, W_LRU, W_NONRESIDENT_AGE, WORKINGSET

SHADOW_BITS = 30
AGE_MASK = (1 << SHADOW_BITS - 1) - 1

# what `refault` says
COLD = 0  # the distance is too long
ACTIVATED = 1
RESTORED = 2  # activated, and it had been active before


@helper
def activation(words, pages):
    """Pages go from the inactive list to the active one because they were used twice."""
    fetch_add_acq_rel(words, W_NONRESIDENT_AGE, pages)


@helper
def eviction(words, flags, order, pfn):
    """The shadow of a folio that is about to be evicted."""
    age = fetch_add_acq_rel(words, W_NONRESIDENT_AGE, np.int64(1) << np.int64(order[pfn]))
    return ((age & AGE_MASK) << 1) | np.int64(flags[pfn] & WORKINGSET != 0)


@kernel("i8(i8[::1], u4[::1], u1[::1], i8, i8)")
def refault(words, flags, order, pfn, shadow):
    """A folio that is on no list yet has left this shadow: COLD, ACTIVATED or RESTORED."""
    distance = (load_acquire(words, W_NONRESIDENT_AGE) - (shadow >> 1)) & AGE_MASK
    if distance > words[W_LRU + LRU_STRIDE + LRU_PAGES]:
        return np.int64(COLD)
    activation(words, np.int64(1) << np.int64(order[pfn]))
    if shadow & 1 == 0:
        fetch_or_acq_rel(flags, pfn, ACTIVE)
        return np.int64(ACTIVATED)
    fetch_or_acq_rel(flags, pfn, ACTIVE | WORKINGSET)
    return np.int64(RESTORED)
