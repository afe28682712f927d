"""Memory policies: on which node a request would best be served, and which nodes it may use.

A policy is a number: its mode, and above that a bit for each of its nodes. It stands in an inode,
belongs to a task (`with applied(policy)`) or to the mount (W_MEMPOLICY of node 0's row), and wins
in that order; 0 is none. Modes are Linux's:

    local        the node at which the asker is at home, then by distance from there
    prefer       the (lowest) node, then by distance from there
    prefer-many  the nodes, nearest first, then all others
    bind         the nodes, nearest first, and no other; but a request that can not fail and has
                 waited in vain is served from anywhere: the guarantee is worth more
    interleave   page by page over the nodes; of a file by its offset, else in turn
    weighted     the same, as many pages in a row from each node as its weight says (1 to 255)

Where several pages are asked for at once they count as one. Weights are the arena's, as in Linux.
What follows for a request is in alloc/placement.py. Free of numba, for the parent of the daemon.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from alloc.page import NODES, W_WEIGHT, Words

LOCAL, PREFER, PREFER_MANY, BIND, INTERLEAVE, WEIGHTED = range(1, 7)
MODES = {
    "local": LOCAL,
    "prefer": PREFER,
    "prefer-many": PREFER_MANY,
    "bind": BIND,
    "interleave": INTERLEAVE,
    "weighted": WEIGHTED,
}
NAMES = {mode: name for name, mode in MODES.items()}
NODES_SHIFT = 3
MODE_MASK = (1 << NODES_SHIFT) - 1
NONE = 0
WEIGHT_MOST = 255


def policy(mode: str, nodes: Iterable[int] = (), nr_nodes: int = NODES) -> int:
    """The number of a policy. ValueError for a mode that nobody knows, and for nodes that are not.

    local has no nodes; the others have one or more; interleave without any has all.
    """
    if mode not in MODES:
        raise ValueError(f"memory policy {mode}: one of {', '.join(MODES)}")
    wanted = set(nodes)
    if mode in ("interleave", "weighted") and not wanted:
        wanted = set(range(nr_nodes))
    if bool(wanted) == (mode == "local"):
        raise ValueError(f"memory policy {mode} {'has no nodes' if wanted else 'needs nodes'}")
    for node in wanted:
        if not 0 <= node < nr_nodes:
            raise ValueError(f"memory policy {mode}: node {node} of {nr_nodes}")
    return MODES[mode] | sum(1 << node for node in wanted) << NODES_SHIFT


def parse(text: str, nr_nodes: int) -> int:
    """The number of a policy written as `bind:0-1+3`. ValueError says what is wrong with it."""
    mode, _, nodes = text.partition(":")
    wanted: set[int] = set()
    for part in nodes.split("+") if nodes else ():
        first, dash, last = part.partition("-")
        if not first.isdecimal() or not (last if dash else first).isdecimal():
            raise ValueError(f"memory policy {text}: {part} is neither a node nor a range")
        wanted |= set(range(int(first), int(last or first) + 1))
    return policy(mode, wanted, nr_nodes)


def describe(number: int) -> str:
    """A policy as `parse` takes it, each node by itself; "none"."""
    if number == NONE:
        return "none"
    nodes = [str(node) for node in range(NODES) if number >> NODES_SHIFT >> node & 1]
    return NAMES[number & MODE_MASK] + (":" + "+".join(nodes) if nodes else "")


def allows(number: int, node: int) -> bool:
    """Whether memory of a policy may migrate to a node: not where the policy says itself where."""
    mode = number & MODE_MASK
    if mode in (PREFER_MANY, BIND):
        return bool(number >> NODES_SHIFT >> node & 1)
    return mode in (NONE, LOCAL)


class TaskPolicy:
    """A task's policy, and how many requests it has placed by it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.turn = 0


_task: ContextVar[TaskPolicy | None] = ContextVar("mempolicy", default=None)
_home: ContextVar[int] = ContextVar("home_node", default=0)
current_task = _task.get
current_home = _home.get


@contextmanager
def applied(number: int) -> Iterator[None]:
    """This task's policy as long as the block lasts, and that of tasks it starts."""
    token = _task.set(TaskPolicy(number))
    try:
        yield
    finally:
        _task.reset(token)


@contextmanager
def at_home(node: int) -> Iterator[None]:
    """This task works for a thread that is at home on this node."""
    token = _home.set(node)
    try:
        yield
    finally:
        _home.reset(token)


def set_weights(nodes: Iterable[Words], weights: Iterable[int]) -> None:
    """How many pages in a row each node gets by `weighted`. ValueError outside of 1 to 255."""
    for node, (words, weight) in enumerate(zip(nodes, weights, strict=True)):
        if not 1 <= weight <= WEIGHT_MOST:
            raise ValueError(f"weight {weight} of node {node}: 1 to {WEIGHT_MOST}")
        words[W_WEIGHT] = weight
