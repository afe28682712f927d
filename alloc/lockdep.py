"""The lock-order validator: finds a possible deadlock the first time an order is seen.

What counts is the order of lock classes ("iolock", "ilock"), not which object was meant nor whether
anybody waited. Whoever may come to wait for a lock says so before it tries (`wants`), and an edge
is drawn from each class that the task holds. An edge that closes a circle is reported, once, with
the stacks of all orders in it. One quiet run through each path so proves what otherwise only the
right pressure at the right moment would show.

Waiting for memory is a lock, too, the kernel's pseudo-lock fs_reclaim: a request that lets reclaim
enter the filesystem wants it, and whoever reclaim depends upon (shrinkers, kswapd, the flusher, the
metadata writer) works under it. A transaction that lacks its NOFS scope draws ilock -> fs_reclaim
against the flusher's fs_reclaim -> ilock. A lock taken by trying waits for nothing and draws no
edge, but is held afterwards. Several of one class must be wanted by rising rank. Shared and
exclusive count alike: a waiting writer holds back later readers.

`current` is None unless a mount or a test starts the validator; hooks then do no more than look.
All of it runs on the trio thread, between awaits. Kernels that take locks by try and drop them
before they return wait for nothing and say nothing. Cost when on: about 1 us for a lock held.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import trio

from alloc.gfp import MEMALLOC, NOFS

log = logging.getLogger("nofailfs.lockdep")

FS_RECLAIM = "fs_reclaim"
FRAMES = 16  # of a stack, innermost first
TRIO = os.sep + "trio" + os.sep
HERE = os.path.abspath(__file__)

Task = trio.lowlevel.Task


@dataclass(frozen=True)
class Held:
    """A lock that a task holds; `rank` orders locks of the same class."""

    name: str
    key: int
    rank: int

    def __str__(self) -> str:
        return f"{self.name} of {self.rank}" if self.key else self.name


@dataclass(frozen=True)
class Order:
    """`after` was wanted by somebody who held `before`: where that was first seen, or declared."""

    before: str
    after: str
    where: str
    stack: tuple[str, ...]
    declared: bool = False

    def lines(self) -> list[str]:
        head = f" -> {self.before}, then {self.after}: {self.where}"
        return [head, *(f"      {frame}" for frame in self.stack)]


class Lockdep:
    """The orders seen so far, who holds what, and what was wrong."""

    def __init__(self) -> None:
        self.context = ""  # what is running, for reports: a test's name
        self.reports: list[str] = []
        self._orders: dict[str, dict[str, Order]] = {}
        self._reported: set[tuple[str, str]] = set()
        self._held: dict[Task | None, list[Held]] = {}

    # -- hooks ----------------------------------------------------------------------------------

    def wants(self, name: str, key: int = 0, rank: int = 0) -> None:
        """The running task may come to wait for this lock: call it before trying."""
        for held in self._held.get(_running(), ()):
            if held.name != name:
                known = self._orders.get(held.name, {}).get(name)
                if known is None or known.declared:
                    self._learn(held.name, name)
            elif held.rank >= rank and (name, name) not in self._reported:
                self._reported.add((name, name))
                self._report_nesting(held, Held(name, key, rank))

    def took(self, name: str, key: int = 0, rank: int = 0) -> None:
        """The running task holds the lock from now on, whichever way it got it."""
        self._held.setdefault(_running(), []).append(Held(name, key, rank))

    def dropped(self, name: str, key: int = 0) -> None:
        """The lock was given back, by whoever took it or by somebody else for it.

        Nothing happens for a lock that nobody was told of: a lane took it.
        """
        task = _running()
        if not self._drop(task, name, key):
            for other in list(self._held):
                if self._drop(other, name, key):
                    return

    def allocates(self, gfp: int) -> None:
        """The running task may come to wait for memory, with these flags."""
        if not gfp & (NOFS | MEMALLOC):
            self.wants(FS_RECLAIM)

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Take a pseudo-lock for the duration of a block."""
        self.wants(name)
        self.took(name)
        try:
            yield
        finally:
            self.dropped(name)

    def declare(self, *names: str) -> None:
        """The documented order of classes: each may be held when a later one is wanted.

        It serves until somebody is seen to take them so, whose stack says more.
        """
        for i, before in enumerate(names):
            for after in names[i + 1 :]:
                if after not in self._orders.get(before, ()):
                    self._learn(before, after, declared=True)

    # -- questions ------------------------------------------------------------------------------

    def held_by(self, task: Task) -> list[str]:
        """The locks that a task holds, oldest first, for reports."""
        return [str(held) for held in self._held.get(task, ())]

    def orders(self) -> list[tuple[str, str]]:
        """Every order seen, not only declared: (held, wanted)."""
        return [
            (order.before, order.after)
            for found in self._orders.values()
            for order in found.values()
            if not order.declared
        ]

    def forget_tasks(self) -> None:
        """Tasks that ended by an error may have left locks behind; orders stay."""
        self._held.clear()

    # -- inside ---------------------------------------------------------------------------------

    def _drop(self, task: Task | None, name: str, key: int) -> bool:
        found = self._held.get(task, [])
        for i in range(len(found) - 1, -1, -1):
            if found[i].name == name and found[i].key == key:
                del found[i]
                if not found:
                    del self._held[task]
                return True
        return False

    def _learn(self, before: str, after: str, declared: bool = False) -> None:
        """Add an edge, unless it closes a circle: that is reported, and stays out."""
        if (before, after) in self._reported:
            return
        where = "by declaration" if declared else self._where()
        order = Order(before, after, where, _stack(), declared)
        way_back = self._path(after, before)
        if way_back:
            self._reported.add((before, after))
            self._report_circle(order, way_back)
        else:
            self._orders.setdefault(before, {})[after] = order

    def _path(self, start: str, end: str) -> list[Order]:
        """The shortest way along known orders; empty if there is none."""
        came_by: dict[str, Order] = {}
        line = deque([start])
        while line:
            name = line.popleft()
            for after, order in self._orders.get(name, {}).items():
                if after not in came_by:
                    came_by[after] = order
                    line.append(after)
            if end in came_by:
                path = [came_by[end]]
                while path[0].before != start:
                    path.insert(0, came_by[path[0].before])
                return path
        return []

    def _where(self) -> str:
        task = _running()
        words = [f"task {task.name}" if task else "no task"]
        return " in ".join([*words, self.context] if self.context else words)

    def _report_circle(self, order: Order, way_back: list[Order]) -> None:
        lines = ["possible circular locking dependency:", *order.lines()]
        lines.append("against the order seen before:")
        for known in way_back:
            lines += known.lines()
        self._say(lines)

    def _report_nesting(self, held: Held, wanted: Held) -> None:
        lines = [
            f"possible recursive locking: {held} is held and {wanted} is wanted, by {self._where()}"
        ]
        self._say([*lines, *(f"      {frame}" for frame in _stack())])

    def _say(self, lines: list[str]) -> None:
        text = "\n".join(lines)
        self.reports.append(text)
        log.error("%s", text)


current: Lockdep | None = None


def start() -> Lockdep:
    """Validate from now on, in this process; the validator that runs already goes on."""
    global current
    if current is None:
        current = Lockdep()
        log.info("lock-order validator: on")
    return current


@contextmanager
def using(validator: Lockdep | None) -> Iterator[None]:
    """Another validator, or none, for the duration of a block."""
    global current
    before, current = current, validator
    try:
        yield
    finally:
        current = before


@contextmanager
def holding(name: str) -> Iterator[None]:
    """Take a pseudo-lock for the duration of a block, if the validator is on."""
    if current is None:
        yield
    else:
        with current.holding(name):
            yield


def held_by(task: Task) -> list[str]:
    """The locks that a task holds, as far as the validator was told; none while it is off."""
    return current.held_by(task) if current is not None else []


def _running() -> Task | None:
    return trio.lowlevel.current_task() if trio.lowlevel.in_trio_task() else None


def _stack() -> tuple[str, ...]:
    """Where the running task is, from the hook outwards, as far as it is our code."""
    frames: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and len(frames) < FRAMES:
        code = frame.f_code
        if TRIO in code.co_filename and frames:
            break
        if code.co_filename != HERE:
            name = os.path.join(*code.co_filename.split(os.sep)[-2:])
            frames.append(f"{name}:{frame.f_lineno} {code.co_name}")
        frame = frame.f_back
    return tuple(frames)
