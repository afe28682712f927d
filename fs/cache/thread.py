"""Hash chains and lists that thread through slab records: helpers for the caches' kernels.

A record names others by index, 0 meaning none. The helpers take the link *fields* of a record
table (`t["lru_next"]`), so one piece of code serves every kind of record. A list's ends are two
consecutive words of its cache's head array: first, last. Buckets are a power of two.

Locking: the trio thread changes all of them, between awaits. Lanes may walk the chains in an RCU
section: a record is whole when its chain names it, and a record taken off a chain keeps its own
link, so a walker that stands on it goes on. Its memory must outlive the grace period.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import numpy as np

from alloc.atomic import store_release
from alloc.jit import helper

SPREAD = 0x9E3779B1  # 2^32 divided by the golden ratio


@helper
def bucket_of(buckets, key):
    """The bucket of an integer key, whose upper half counts too."""
    folded = (key ^ (key >> 31)) & 0x7FFFFFFF
    return ((folded * SPREAD) >> 15) & (buckets.size - 1)


@helper
def chain_find(keys, nexts, buckets, key):
    """The record with this key, or 0."""
    h = np.int64(buckets[bucket_of(buckets, key)])
    while h != 0 and np.int64(keys[h]) != key:
        h = np.int64(nexts[h])
    return h


@helper
def chain_insert(nexts, buckets, slot, h):
    """Put record h, which is complete, into a bucket."""
    nexts[h] = buckets[slot]
    store_release(buckets, slot, h)


@helper
def chain_remove(nexts, buckets, slot, h):
    """Take record h, which is there, out of its bucket."""
    at = np.int64(buckets[slot])
    if at == h:
        store_release(buckets, slot, nexts[h])
        return
    while np.int64(nexts[at]) != h:
        at = np.int64(nexts[at])
    store_release(nexts, at, nexts[h])


@helper
def row_of(head, span, words, h):
    """Where the row of record h's node begins in a head array with a row of `words` for each.

    head[span]: records that a node has room for (Slab.span).
    """
    if h < head[span]:
        return np.int64(0)
    return h // head[span] * words


@helper
def list_append(prevs, nexts, head, ends, h):
    """Put record h at the end of the list whose first and last are head[ends], head[ends + 1]."""
    last = head[ends + 1]
    prevs[h] = last
    nexts[h] = 0
    if last:
        nexts[last] = h
    else:
        head[ends] = h
    head[ends + 1] = h


@helper
def join_list(states, bit, prevs, nexts, head, ends, count, h):
    """Put record h at the end of the list whose members carry `bit`, if it is not on it."""
    if not states[h] & bit:
        states[h] |= bit
        list_append(prevs, nexts, head, ends, h)
        head[count] += 1


@helper
def leave_list(states, bit, prevs, nexts, head, ends, count, h):
    """Take record h off the list whose members carry `bit`, if it is on it."""
    if states[h] & bit:
        states[h] &= ~np.uint32(bit)
        list_remove(prevs, nexts, head, ends, h)
        head[count] -= 1


@helper
def list_remove(prevs, nexts, head, ends, h):
    """Take record h, which is on it, off the list."""
    before, after = np.int64(prevs[h]), np.int64(nexts[h])
    if before:
        nexts[before] = after
    else:
        head[ends] = after
    if after:
        prevs[after] = before
    else:
        head[ends + 1] = before
