"""The flusher's lists of mappings, threaded through their state records.

The names are the kernel's. `b_dirty` has what became dirty, oldest first; `b_io` what this pass
writes, in that order; `b_more_io` what used its slice up and comes again with the next pass;
`b_dirty_time` what has nothing but stamps to be written, which may wait (lazytime), in the order in
which it came there. A mapping is on one list at most, and its record says on which (`queue`).
`dirtied_when` ascends along b_dirty and b_dirty_time, and no two mappings have the same: so a pass
over what is dirty now has an end.

Trio thread only, nothing awaits. Every call takes the same time, but `expire` and `splice`, which
move one mapping after the other.
"""

from __future__ import annotations

from typing import Any

import trio

from writeback.mapping import Mappings

NOWHERE, DIRTY, IO, MORE_IO, DIRTY_TIME = range(5)
NR_QUEUES = 5


class Lists:
    """Dirty mappings by what is to happen with them; names of mappings are handles."""

    def __init__(self, mappings: Mappings) -> None:
        self._mappings = mappings
        self._first = [0] * NR_QUEUES
        self._last = [0] * NR_QUEUES
        self._stamp = 0
        self.length = [0] * NR_QUEUES

    def __len__(self) -> int:
        return sum(self.length)

    def first(self, queue: int) -> int:
        """The mapping that is longest on a list, or 0."""
        return self._first[queue]

    def following(self, handle: int) -> int:
        """The next one on its list, or 0."""
        return int(self._mappings.state(handle)["next"])

    def now(self) -> int:
        """A stamp later than every other: trio's clock in ns, or more where that stands still."""
        self._stamp = max(self._stamp + 1, int(trio.current_time() * 1e9))
        return self._stamp

    def dirtied(self, handle: int, queue: int = DIRTY) -> None:
        """To the end of b_dirty, or b_dirty_time, as one that became dirty just now."""
        self._mappings.state(handle)["dirtied_when"] = self.now()
        self.move(handle, queue)

    def redirtied(self, handle: int) -> None:
        """Back to b_dirty for a while: the kernel's redirty_tail.

        It keeps its time where that keeps b_dirty in order, else it is young again.
        """
        youngest = self._last[DIRTY]
        state = self._mappings.state(handle)
        if youngest and state["dirtied_when"] < self._mappings.state(youngest)["dirtied_when"]:
            state["dirtied_when"] = self.now()
        self.move(handle, DIRTY)

    def move(self, handle: int, queue: int) -> None:
        """To the end of a list, from wherever it is; NOWHERE takes it off."""
        state = self._mappings.state(handle)
        if state["queue"]:
            self._unlink(state)
        state["queue"] = queue
        if queue:
            self._link(handle, state, queue)

    def _link(self, handle: int, state: Any, queue: int) -> None:
        before = self._last[queue]
        state["prev"], state["next"] = before, 0
        if before:
            self._mappings.state(before)["next"] = handle
        else:
            self._first[queue] = handle
        self._last[queue] = handle
        self.length[queue] += 1

    def _unlink(self, state: Any) -> None:
        before, after, queue = int(state["prev"]), int(state["next"]), int(state["queue"])
        if before:
            self._mappings.state(before)["next"] = after
        else:
            self._first[queue] = after
        if after:
            self._mappings.state(after)["prev"] = before
        else:
            self._last[queue] = before
        self.length[queue] -= 1

    def expire(self, queue: int, before: int, most: int) -> int:
        """Move a list's oldest, up to a stamp, to b_io; how many, `most` at most."""
        moved = 0
        while moved < most and (handle := self._first[queue]):
            if self._mappings.state(handle)["dirtied_when"] > before:
                break
            self.move(handle, IO)
            moved += 1
        return moved

    def splice(self) -> None:
        """Move b_more_io to the end of b_io."""
        while handle := self._first[MORE_IO]:
            self.move(handle, IO)
