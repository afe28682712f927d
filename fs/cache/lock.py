"""Sleeping locks of in-core objects, kept only while somebody holds or wants one.

A table maps a handle to its lock state and forgets it at the last release, so the table's size is
bounded by the number of running requests, not by the number of inodes. Shared or exclusive, first
come first served: a waiting writer holds later readers back, so nobody starves. All of it runs on
the trio thread; between awaits it is atomic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio


class _State:
    """Who holds a lock and who waits for it."""

    __slots__ = ("holders", "waiters")

    def __init__(self) -> None:
        self.holders = 0  # readers, or -1 for a writer
        self.waiters: deque[tuple[bool, trio.Event]] = deque()


class LockTable:
    """Reader-writer locks named by an integer handle."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._states: dict[int, _State] = {}

    def held(self, handle: int) -> bool:
        """Does anybody hold the lock of this handle?"""
        return handle in self._states

    def try_acquire(self, handle: int, shared: bool) -> bool:
        """Take the lock if that needs no waiting."""
        state = self._states.get(handle)
        if state is None:
            state = self._states[handle] = _State()
        elif state.waiters or state.holders < 0 or not shared:
            return False
        state.holders = state.holders + 1 if shared else -1
        return True

    async def acquire(self, handle: int, shared: bool) -> None:
        """Take the lock, waiting in line."""
        if self.try_acquire(handle, shared):
            return
        granted = trio.Event()
        state = self._states[handle]
        ticket = (shared, granted)
        state.waiters.append(ticket)
        try:
            await granted.wait()
        except BaseException:
            if granted.is_set():
                self.release(handle)
            else:
                state.waiters.remove(ticket)
                self._grant(handle, state)
            raise

    def release(self, handle: int) -> None:
        """Give the lock back and hand it to whoever is next."""
        state = self._states[handle]
        assert state.holders != 0
        state.holders = 0 if state.holders < 0 else state.holders - 1
        self._grant(handle, state)

    def _grant(self, handle: int, state: _State) -> None:
        while state.waiters:
            shared, granted = state.waiters[0]
            if state.holders < 0 or (state.holders > 0 and not shared):
                break
            state.holders = state.holders + 1 if shared else -1
            state.waiters.popleft()
            granted.set()
        if state.holders == 0 and not state.waiters:
            self._states.pop(handle, None)

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
        return sum(len(state.waiters) for state in self._states.values())
