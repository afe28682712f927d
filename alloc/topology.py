"""Which nodes an arena has, how far they are from each other, and in which order they are tried.

Distances are the firmware's: 10 is here, 20 twice as slow. A zonelist has all nodes, for the
requests of one: by distance; of nodes that are equally far the next higher number comes first, and
then the one that is first among equals in fewer lists, so that no node gets what falls over from
all others. That is the kernel's order. Pure functions; free of numba, for the parent of the daemon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alloc.page import NODES, ORDER_MAX

LOCAL_DISTANCE = 10
REMOTE_DISTANCE = 20
DISTANCE_MOST = 254
LOAD_MOST = 1 << 10  # no node is first among equals in as many zonelists
NODE_PAGES_LEAST = 2 << ORDER_MAX


@dataclass(frozen=True)
class Topology:
    """How many nodes, and how far each is from each: 10 is here, twice as much twice as slow."""

    distance: tuple[tuple[int, ...], ...] = ((LOCAL_DISTANCE,),)

    @property
    def nr_nodes(self) -> int:
        return len(self.distance)

    def zonelists(self) -> list[list[int]]:
        """For each node all nodes, in the order in which its requests try them."""
        load = [0] * self.nr_nodes
        return [self._zonelist(node, load) for node in range(self.nr_nodes)]

    def _zonelist(self, node: int, load: list[int]) -> list[int]:
        """`load` counts, for each node, the lists in which it was first of its distance."""
        near = self.distance[node]
        found, left = [node], set(range(self.nr_nodes)) - {node}
        while left:
            best = min(left, key=lambda n: ((near[n] + (n < node)) * LOAD_MOST + load[n], n))
            if near[best] != near[found[-1]]:
                load[best] += 1
            found.append(best)
            left.remove(best)
        return found


ONE = Topology()


def topology(nr_nodes: int, distances: Sequence[int] = ()) -> Topology:
    """So many nodes; their distances row by row, or 10 and 20.

    Raises ValueError for a matrix that is none, for a node that is not at 10 from itself, for
    others nearer than 11 or farther than 254, and for too many nodes.
    """
    if not 1 <= nr_nodes <= NODES:
        raise ValueError(f"{nr_nodes} nodes: 1 to {NODES} are possible")
    if not distances:
        distances = [
            LOCAL_DISTANCE if a == b else REMOTE_DISTANCE
            for a in range(nr_nodes)
            for b in range(nr_nodes)
        ]
    if len(distances) != nr_nodes**2:
        raise ValueError(f"{len(distances)} distances: {nr_nodes} nodes have {nr_nodes**2}")
    rows = tuple(tuple(distances[n * nr_nodes : (n + 1) * nr_nodes]) for n in range(nr_nodes))
    for a, row in enumerate(rows):
        if row[a] != LOCAL_DISTANCE:
            raise ValueError(f"node {a} is at {row[a]} from itself: that is {LOCAL_DISTANCE}")
        if any(not LOCAL_DISTANCE < far <= DISTANCE_MOST for b, far in enumerate(row) if a != b):
            raise ValueError(f"distances of node {a}: others are at 11 to {DISTANCE_MOST}")
    return Topology(rows)


def span_pages(nr_pages: int, nr_nodes: int) -> int:
    """Pages of each node but perhaps the last, a multiple of the largest block.

    Raises ValueError when a node would have less than 8 MiB.
    """
    if nr_nodes == 1:
        return nr_pages
    largest = 1 << ORDER_MAX
    span = -(-nr_pages // (nr_nodes * largest)) * largest
    if span < NODE_PAGES_LEAST or nr_pages - (nr_nodes - 1) * span < NODE_PAGES_LEAST:
        raise ValueError(f"{nr_nodes} nodes: each needs {NODE_PAGES_LEAST >> 8} MiB of memory")
    return span


def parse(nodes: str, distance: str = "") -> Topology:
    """The topology of two words, a number and a matrix like `10:20:20:10`. ValueError."""
    numbers = (nodes, *distance.split(":")) if distance else (nodes,)
    for number in numbers:
        if not number.isascii() or not number.isdigit():
            raise ValueError(f"'{number}' is not a number of nodes, or a distance")
    return topology(int(nodes), [int(number) for number in numbers[1:]])
