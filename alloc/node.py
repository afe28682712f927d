"""Nodes: parts of the arena that lie nearer to some threads than to others.

Each node has an equal span of pages (the last one perhaps less), a multiple of the largest block
so that no block crosses a border; and a row of `words` with what one zone needs: lists, marks,
locks, each thread's lists, slabs. Kernels that work on a node get its row as their words; those
whom others call (alloc/pcp.py, alloc/magazine.py) get all rows and find the node: that of a page
by its pfn, that of a request by the bits above the migratetype in its rights:

    wanted node, home node of who asks, the nodes it is bound to (none: all), SOFT, INTERLEAVED,
    PLACED

A request that is not PLACED knows of node 0 only, which is right where there is one. Others try the
nodes in the order of the wanted node's zonelist: by distance, equal ones from the next higher
number on, and of those the ones that fewer lists begin with; first for one that stays above `low`,
then for any that the rights let them use. SOFT: the nodes it is bound to come first, not alone.

Counters (numastat's): `hit` served where wanted; `miss` here, wanted elsewhere; `foreign` wanted
here, served elsewhere; `interleave` a hit by interleaving; `local`, `other` served here for who is
at home here, or not. Requests for pages count, not objects or slabs.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alloc.atomic import fetch_add
from alloc.jit import helper, inlined
from alloc.page import (
    NODES,
    W_END,
    W_NODE,
    W_NODES,
    W_NUMA,
    W_SPAN,
    W_START,
    W_STRIDE,
    W_WEIGHT,
    W_ZONELIST,
    Buddy,
    Slabs,
    Words,
)
from alloc.topology import Topology, span_pages

# above the rights and the migratetype of a request
NODE_SHIFT = 10
HOME_SHIFT = 14
NODE_MASK = NODES - 1
PLACED = 1 << 18
SOFT = 1 << 19
INTERLEAVED = 1 << 20
BOUND_SHIFT = 21
BOUND_MASK = (1 << NODES) - 1
BOUND = BOUND_MASK << BOUND_SHIFT
RIGHTS_MASK = (1 << NODE_SHIFT) - 1

NUMA_HIT, NUMA_MISS, NUMA_FOREIGN, NUMA_INTERLEAVE, NUMA_LOCAL, NUMA_OTHER = range(6)
NUMA_EVENTS = ("hit", "miss", "foreign", "interleave", "local", "other")
NUMA_NAMES = tuple(f"numa_{event}" for event in NUMA_EVENTS)


def divide(words: Words, nr_pages: int, nodes: Topology) -> list[Words]:
    """Set up the borders in all rows; the row of each node."""
    span, stride = span_pages(nr_pages, nodes.nr_nodes), words.size // nodes.nr_nodes
    rows = [words[n * stride : (n + 1) * stride] for n in range(nodes.nr_nodes)]
    for node, (row, order) in enumerate(zip(rows, nodes.zonelists(), strict=True)):
        row[[W_NODE, W_NODES, W_SPAN, W_STRIDE]] = node, nodes.nr_nodes, span, stride
        row[W_WEIGHT] = 1
        row[[W_START, W_END]] = node * span, min((node + 1) * span, nr_pages)
        row[W_ZONELIST : W_ZONELIST + nodes.nr_nodes] = order
    return rows


def spanned(words: Words) -> int:
    """Pages of a node, page 0 included."""
    return int(words[W_END] - words[W_START])


def in_reach(nodes: Sequence[Words], placed: int) -> list[int]:
    """The nodes that may serve a request with these bits, in the order in which they are tried."""

    def along(node: int) -> list[int]:
        order: list[int] = nodes[node][W_ZONELIST : W_ZONELIST + len(nodes)].tolist()
        return order

    bound = placed >> BOUND_SHIFT & BOUND_MASK
    near = [n for n in along(placed >> NODE_SHIFT & NODE_MASK) if not bound or bound >> n & 1]
    if not placed & SOFT:
        return near
    return near + [n for n in along(placed >> HOME_SHIFT & NODE_MASK) if n not in near]


def may_serve(placed: int, node: int) -> bool:
    """Whether a request with these bits may at last be served by a node."""
    bound = placed >> BOUND_SHIFT & BOUND_MASK
    return not bound or bool(bound >> node & 1 or placed & SOFT)


# -- in kernels ----------------------------------------------------------------------------------


@helper
def node_of(words, pfn):
    """The node that a page lies in."""
    return pfn // words[W_SPAN]


@helper
def row_of(words, pfn):
    """Index in the words of all nodes of the row that a page belongs to."""
    if pfn < words[W_END]:
        return np.int64(0)
    return node_of(words, pfn) * words[W_STRIDE]


@inlined
def buddy_on(b, node):
    """The page allocator of one node."""
    at = node * b.words[W_STRIDE]
    row = b.words[at : at + b.words[W_STRIDE]]
    return Buddy(row, b.flags, b.order, b.refs, b.lru_next, b.lru_prev)


@inlined
def slabs_on(s, node):
    """The slab caches of one node."""
    at = node * s.words[W_STRIDE]
    row = s.words[at : at + s.words[W_STRIDE]]
    return Slabs(
        row, s.flags, s.order, s.refs, s.lru_next, s.lru_prev, s.mapping, s.free_low, s.free_high
    )


@inlined
def wanted_node(rights):
    """Where a request would best be served."""
    return rights >> NODE_SHIFT & NODE_MASK


@inlined
def may_use(rights, node):
    """Whether a request may be served from a node: it is bound to none, or to this one."""
    bound = rights >> BOUND_SHIFT & BOUND_MASK
    return bound == 0 or bound >> node & 1 != 0


@inlined
def let_go(rights):
    """A SOFT request that its nodes did not serve: anywhere, from the asker's home on."""
    home = rights >> HOME_SHIFT & NODE_MASK
    return rights & ~(SOFT | BOUND | NODE_MASK << NODE_SHIFT) | home << NODE_SHIFT


@inlined
def nth_node(words, wanted, n):
    """Of the zonelist of the wanted node."""
    return words[wanted * words[W_STRIDE] + W_ZONELIST + n]


@helper
def count_numa(words, rights, node):
    """A request was served from this node."""
    wanted = wanted_node(rights)
    here = node * words[W_STRIDE] + W_NUMA
    if node == wanted:
        fetch_add(words, here + NUMA_HIT, 1)
        if rights & INTERLEAVED != 0:
            fetch_add(words, here + NUMA_INTERLEAVE, 1)
    else:
        fetch_add(words, here + NUMA_MISS, 1)
        fetch_add(words, wanted * words[W_STRIDE] + W_NUMA + NUMA_FOREIGN, 1)
    at_home = rights >> HOME_SHIFT & NODE_MASK == node
    fetch_add(words, here + (NUMA_LOCAL if at_home else NUMA_OTHER), 1)
