"""Placement: what a memory policy means for one request, as bits of its rights (alloc/node.py).

Stateless: an interleaving policy is told how many pages it has placed before, which is the page's
offset in its file or a count of the task's. So lanes and the trio thread agree about each page.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import count_trailing_zeros
from alloc.jit import helper, kernel
from alloc.mempolicy import (
    BIND,
    INTERLEAVE,
    MODE_MASK,
    NODES_SHIFT,
    NONE,
    PREFER,
    PREFER_MANY,
    WEIGHTED,
)
from alloc.node import BOUND_SHIFT, HOME_SHIFT, INTERLEAVED, NODE_SHIFT, PLACED, SOFT, nth_node
from alloc.page import W_MEMPOLICY, W_NODES, W_STRIDE, W_WEIGHT


@helper
def _nearest(words, home, nodes):
    """Of some nodes, the one that comes first in the zonelist of a thread's home."""
    for n in range(words[W_NODES]):
        node = nth_node(words, home, n)
        if nodes >> node & 1 != 0:
            return node
    return home


@helper
def _count(nodes):
    count = np.int64(0)
    while nodes != 0:
        nodes &= nodes - 1
        count += 1
    return count


@helper
def _interleaved(words, nodes, offset):
    """The node of the page at `offset`, one after the other."""
    for _ in range(offset % _count(nodes)):
        nodes &= nodes - 1
    return count_trailing_zeros(nodes)


@helper
def _weighted(words, nodes, offset):
    """The node of the page at `offset`, each as often in a row as it weighs."""
    total = np.int64(0)
    for node in range(words[W_NODES]):
        if nodes >> node & 1 != 0:
            total += words[node * words[W_STRIDE] + W_WEIGHT]
    left = offset % total
    for node in range(words[W_NODES]):
        if nodes >> node & 1 != 0:
            left -= words[node * words[W_STRIDE] + W_WEIGHT]
            if left < 0:
                return np.int64(node)
    return np.int64(0)


@helper
def place(words, number, offset, home):
    """The bits above the migratetype for a request by a policy, or by the mount's if it is NONE.

    `offset`: pages before it. 0 where there is one node.
    """
    if words[W_NODES] == 1:
        return np.int64(0)
    if number == NONE:
        number = words[W_MEMPOLICY]
    mode = number & MODE_MASK
    nodes = number >> NODES_SHIFT
    bits = PLACED | home << HOME_SHIFT
    wanted = home
    if mode == PREFER:
        wanted = count_trailing_zeros(nodes)
    elif mode in (BIND, PREFER_MANY):
        wanted = _nearest(words, home, nodes)
        bits |= nodes << BOUND_SHIFT
        if mode == PREFER_MANY:
            bits |= SOFT
    elif mode == INTERLEAVE:
        wanted = _interleaved(words, nodes, offset)
        bits |= INTERLEAVED
    elif mode == WEIGHTED:
        wanted = _weighted(words, nodes, offset)
        bits |= INTERLEAVED
    return bits | wanted << NODE_SHIFT


@kernel("i8(i8[::1], i8, i8, i8)")
def placement(words, number, offset, home):
    """See `place`."""
    return place(words, number, offset, home)
