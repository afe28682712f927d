"""Kernels that choose a free extent inside one leaf of a free-space tree.

Pure functions over (mem, addr) of a leaf; freespace.py walks from leaf to leaf. An extent
*fits* if, from its first aligned block (or from near the wanted one) on, it holds the wanted
length. Units: blocks of the AG.
"""

from __future__ import annotations

import numpy as np

from alloc.jit import helper, kernel
from fs.xfs.be import get32
from fs.xfs.btblock import BNO, CNT, rec_at


@helper
def round_up(block, align):
    return (block + align - 1) // align * align


@helper
def place(start, end, want, near, align):
    """First block of the best place for `want` blocks in a free extent start..end, or -1."""
    first = round_up(max(start, near), align)
    if first < end and first + want <= end:
        return first  # at or behind the wanted block
    if near >= end:
        first = round_up(start, align)  # all of it lies before: leave room to grow behind
    else:
        first = (end - want) // align * align
    if first < start or first + want > end:
        return -1
    return first


@helper
def room(mem, at, align, above, below):
    """Aligned blocks of the extent at `at` between the AG blocks `above` and `below`."""
    start = get32(mem, at)
    end = min(start + get32(mem, at + 4), below)
    return end - round_up(max(start, above), align)


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, i8, i8)")
def nearest(mem, addr, n, want, near, align, above, below):
    """First block of the nearest place for `want` blocks among a bnobt leaf's n extents, or -1.

    Extents behind the wanted block win over those before it at up to twice the distance: files
    grow upwards.
    """
    best, best_cost = np.int64(-1), np.int64(0)
    for i in range(n):
        at = rec_at(addr, BNO, i)
        start = get32(mem, at)
        end = min(start + get32(mem, at + 4), below)
        first = place(max(start, above), end, want, near, align)
        if first < 0:
            continue
        away = first - near
        cost = away if away >= 0 else -2 * away
        if best < 0 or cost < best_cost:
            best, best_cost = np.int64(first), np.int64(cost)
    return best


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, i8)")
def roomy_below(mem, addr, i, want, align, above, below):
    """In a cntbt leaf the last record from index i downwards with room for `want`; or -1."""
    for j in range(i, -1, -1):
        if room(mem, rec_at(addr, CNT, j), align, above, below) >= want:
            return np.int64(j)
    return np.int64(-1)


@kernel("i8(u1[::1], i8, i8, i8, i8, i8, i8, i8)")
def roomy_above(mem, addr, i, n, want, align, above, below):
    """In a cntbt leaf the first record from index i upwards with room for `want`; or -1."""
    for j in range(i, n):
        if room(mem, rec_at(addr, CNT, j), align, above, below) >= want:
            return np.int64(j)
    return np.int64(-1)
