"""Free blocks of the filesystem: what is free, what is promised, what may be promised.

`free` is the sum over AGs of freeblks + flcount + btreeblks, which is what the superblock's
fdblocks means on disk; it is derived from the AG headers at mount and follows every allocation.
Promises are of two kinds: blocks reserved by running transactions, and blocks reserved for
delayed allocation. A promise is made before anything is changed, so that nothing meets ENOSPC
half-way. All counters live on the trio thread and change without awaiting.

Held back from users (XFS format, counters): what the AGs cannot give to data (free-space tree
blocks, eight blocks an AG for its free list, growth of its trees), which the AG summary knows, and
a pool for transactions that must not fail for lack of space (unwritten conversion, truncation):
the smaller of 5 % and 8192 blocks.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

RESERVE_POOL_MAX = 8192


class Reservation(Protocol):
    """Who holds reserved blocks: a transaction."""

    blocks: int


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, "no space left on the filesystem")


class Space:
    """Free-block accounting of one volume. Units: filesystem blocks.

    `unavailable()` says how many free blocks the AGs cannot give to data at the moment.
    """

    def __init__(self, unavailable: Callable[[], int]) -> None:
        self._unavailable = unavailable
        self.free = 0
        self.reserved = 0  # by running transactions
        self.delalloc = 0  # by dirty data without blocks
        self.pool = 0

    def start(self, free: int, dblocks: int) -> None:
        """Begin with a mount's figures."""
        assert 0 <= free <= dblocks
        self.free = free
        self.pool = min(dblocks // 20, RESERVE_POOL_MAX, free // 20)

    @property
    def unpromised(self) -> int:
        """Free blocks that nobody was promised and the AGs can give."""
        return self.free - self.reserved - self.delalloc - self._unavailable()

    @property
    def available(self) -> int:
        """Blocks that a user can still be promised."""
        return max(0, self.unpromised - self.pool)

    def reserve(self, blocks: int, *, from_pool: bool = False) -> None:
        """Promise blocks to a transaction. Raises OSError(ENOSPC) with nothing changed.

        `from_pool` lets work that must complete reach into what users cannot have.
        """
        assert blocks >= 0
        if blocks > (max(0, self.unpromised) if from_pool else self.available):
            raise _no_space()
        self.reserved += blocks

    def note_alloc(self, holder: Reservation, blocks: int) -> None:
        """Blocks left the free-space trees on account of a reservation."""
        assert 0 <= blocks <= holder.blocks, "allocated more than was reserved"
        holder.blocks -= blocks
        self.reserved -= blocks
        self.free -= blocks

    def note_free(self, blocks: int) -> None:
        """Blocks came back to the free-space trees."""
        assert blocks >= 0
        self.free += blocks

    def release(self, blocks: int) -> None:
        """Give back what a transaction did not use."""
        assert 0 <= blocks <= self.reserved
        self.reserved -= blocks

    def reserve_delalloc(self, blocks: int) -> None:
        """Promise blocks to dirty data. Raises OSError(ENOSPC) with nothing changed."""
        assert blocks >= 0
        if blocks > self.available:
            raise _no_space()
        self.delalloc += blocks

    def release_delalloc(self, blocks: int) -> None:
        """Give back delayed blocks: data dropped, or worst case not needed."""
        assert 0 <= blocks <= self.delalloc
        self.delalloc -= blocks

    def delalloc_to_reserved(self, blocks: int) -> None:
        """A transaction takes over a promise made to dirty data."""
        self.release_delalloc(blocks)
        self.reserved += blocks

    def reserved_to_delalloc(self, holder: Reservation, blocks: int) -> None:
        """What a transaction did not use of such a promise goes back to the dirty data."""
        assert 0 <= blocks <= holder.blocks
        holder.blocks -= blocks
        self.reserved -= blocks
        self.delalloc += blocks
