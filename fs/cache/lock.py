"""Sleeping locks of in-core objects: the state in a word that lanes share, the queue in Python.

The word: 0 free, n shared holders, EXCLUSIVE, and WAITED besides while trio tasks stand in line.
Lanes only try, and fail while the line is not empty; so tasks are served first come, first served,
and a waiting writer holds back later readers of either kind. Who holds a lock is not recorded: a
lane may take it and a task release it. Queues exist only while somebody waits.

No wake-up is lost. Only the trio thread changes WAITED. A task joins the line, then one atomic
step (`grant`) either takes the lock or leaves WAITED in a word that is held. The holder's release
comes after that step in the word's order of changes, so it sees WAITED: a task's release serves
the line itself, a lane's (`unlock`) tells the lane to ring B_LOCKS, and the bell calls `grant_all`.
A release that leaves other shared holders need not tell: the first in line then wants the lock
exclusively, or it had been granted. Whoever leaves the line by cancellation serves the rest.

A lane holds a lock for the time of one request and nobody can wait for it on the trio thread
without leaving the loop, so a task looks at a held word for about a microsecond before it queues.

alloc/lockdep.py is told what tasks want, take and drop, each table being a class of locks; `rank`
says in which order several of a table are taken.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import TracebackType

import numpy as np
import trio
from numpy.typing import NDArray

from alloc import lockdep
from alloc.atomic import compare_exchange, fetch_add, fetch_and, load_acquire
from alloc.jit import helper, kernel

EXCLUSIVE = 0x40000000
WAITED = 0x80000000
SPINS = 400
FOLIO_LOCKED, FOLIO_WRITEBACK = "folio", "writeback"  # to the validator: bits that tasks wait for
PRIVATE_WORDS = 64  # of a table that no record backs


@helper
def try_lock(m4, word, shared):
    """Take the lock at m4[word] if it is free, or held shared and wanted shared."""
    while True:
        held = np.int64(load_acquire(m4, word))
        if held >= EXCLUSIVE or (held != 0 and not shared):
            return False
        if compare_exchange(m4, word, held, held + 1 if shared else EXCLUSIVE):
            return True


@helper
def unlock(m4, word, shared):
    """Release a lock that is held; True if it is free now and tasks wait: ring B_LOCKS."""
    part = np.int64(1 if shared else EXCLUSIVE)
    return np.int64(fetch_add(m4, word, -part)) - part == WAITED


@kernel("b1(u4[::1], i8, b1)")
def acquire_word(words, i, shared):
    """try_lock for tasks."""
    return try_lock(words, i, shared)


@kernel("b1(u4[::1], i8, b1)")
def spin_word(words, i, shared):
    """Try for a while: a lane may be about to let go."""
    spins = 0
    while spins < SPINS and not try_lock(words, i, shared):
        spins += 1
    return spins < SPINS


@kernel("b1(u4[::1], i8, b1, b1)")
def grant_word(words, i, shared, more):
    """Take the lock for the first in line; WAITED stays if that fails or `more` are behind it."""
    while True:
        word = np.int64(load_acquire(words, i))
        held = word & (WAITED - 1)
        got = held < EXCLUSIVE if shared else held == 0
        if got:
            after = (held + 1 if shared else EXCLUSIVE) | (WAITED if more else 0)
        else:
            after = word | WAITED
        if after == word or compare_exchange(words, i, word, after):
            return got


@kernel("i8(u4[::1], i8)")
def release_word(words, i):
    """Take one holder off the word, whichever kind it is; what is left, or -1 if none was there."""
    while True:
        word = np.int64(load_acquire(words, i))
        held = word & (WAITED - 1)
        if held == 0:
            return np.int64(-1)
        after = word - (EXCLUSIVE if held == EXCLUSIVE else 1)
        if compare_exchange(words, i, word, after):
            return after


@kernel("void(u4[::1], i8)")
def clear_waited(words, i):
    """Nobody is in line any more."""
    fetch_and(words, i, WAITED - 1)


Ticket = tuple[bool, trio.Event]


class LockTable:
    """Reader-writer locks named by an integer handle, in words[handle * stride + offset]."""

    def __init__(
        self,
        name: str,
        words: NDArray[np.uint32] | None = None,
        stride: int = 1,
        offset: int = 0,
        rank: Callable[[int], int] = int,
    ) -> None:
        self.name = name
        self._rank = rank
        self.words = np.zeros(PRIVATE_WORDS, np.uint32) if words is None else words
        self._stride = stride
        self._offset = offset
        self._queues: dict[int, deque[Ticket]] = {}

    def held(self, handle: int) -> bool:
        """Does anybody hold the lock of this handle?"""
        return bool(int(self.words[handle * self._stride + self._offset]) & (WAITED - 1))

    def try_acquire(self, handle: int, shared: bool) -> bool:
        """Take the lock if that needs no waiting; the caller can do without."""
        got = bool(acquire_word(self.words, handle * self._stride + self._offset, shared))
        if got and lockdep.current is not None:
            lockdep.current.took(self.name, handle, self._rank(handle))
        return got

    def acquire_now(self, handle: int, shared: bool) -> bool:
        """The quick half of `acquire`: who gets False here awaits that."""
        if lockdep.current is not None:
            lockdep.current.wants(self.name, handle, self._rank(handle))
        return self.try_acquire(handle, shared)

    def adopt(self, handle: int) -> None:
        """The running task goes on under a lock that a lane took and left held."""
        assert self.held(handle)
        if lockdep.current is not None:
            lockdep.current.took(self.name, handle, self._rank(handle))

    async def acquire(self, handle: int, shared: bool) -> None:
        """Take the lock, waiting in line."""
        validator = lockdep.current
        if validator is None:
            return await self._acquire(handle, shared)
        rank = self._rank(handle)
        validator.wants(self.name, handle, rank)
        await self._acquire(handle, shared)
        validator.took(self.name, handle, rank)

    async def _acquire(self, handle: int, shared: bool) -> None:
        i = handle * self._stride + self._offset
        if acquire_word(self.words, i, shared):
            return
        queue = self._queues.get(handle)
        if queue is None:
            if spin_word(self.words, i, shared):
                return
            queue = self._queues[handle] = deque()
        ticket = (shared, trio.Event())
        queue.append(ticket)
        self._serve(handle, queue)
        try:
            await ticket[1].wait()
        except BaseException:
            if ticket[1].is_set():
                self._release(handle)
            else:
                queue.remove(ticket)
                if not queue:
                    clear_waited(self.words, i)
                self._serve(handle, queue)
            raise

    def release(self, handle: int) -> None:
        """Give the lock back, held either way, and hand it to whoever is next."""
        if lockdep.current is not None:
            lockdep.current.dropped(self.name, handle)
        self._release(handle)

    def _release(self, handle: int) -> None:
        left = release_word(self.words, handle * self._stride + self._offset)
        assert left >= 0, f"{self.name} of {handle} is not held"
        if left == WAITED:
            self._serve(handle, self._queues[handle])

    def grant_all(self) -> None:
        """Serve every line: lanes have released locks."""
        for handle, queue in list(self._queues.items()):
            self._serve(handle, queue)

    def _serve(self, handle: int, queue: deque[Ticket]) -> None:
        """Grant to the head of a line as far as the lock goes."""
        i = handle * self._stride + self._offset
        while queue:
            shared, granted = queue[0]
            if not grant_word(self.words, i, shared, len(queue) > 1):
                return
            queue.popleft()
            granted.set()
        del self._queues[handle]

    @asynccontextmanager
    async def locked(self, handle: int, shared: bool) -> AsyncIterator[None]:
        """Hold the lock for the duration of a block."""
        await self.acquire(handle, shared)
        try:
            yield
        finally:
            self.release(handle)

    def waiting(self) -> int:
        """Number of tasks in line, for reports."""
        return sum(len(queue) for queue in self._queues.values())


class Mutex:
    """`async with mutex:`: a trio.Lock that the validator knows by name."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._lock = trio.Lock()

    async def __aenter__(self) -> None:
        if lockdep.current is not None:
            lockdep.current.wants(self.name)
        await self._lock.acquire()
        if lockdep.current is not None:
            lockdep.current.took(self.name)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if lockdep.current is not None:
            lockdep.current.dropped(self.name)
        self._lock.release()
