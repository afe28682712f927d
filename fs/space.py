"""Free blocks of the filesystem: what is free, what is promised, what may be promised.

`free` is the sum over AGs of freeblks + flcount + btreeblks, which is what the superblock's
fdblocks means on disk; it is derived from the AG headers at mount and follows every allocation.
Promises are of two kinds: blocks reserved by running transactions, and blocks reserved for
delayed allocation. A promise is made before anything is changed, so that nothing meets ENOSPC
half-way. The counters live on the trio thread and change without awaiting.

Lanes promise blocks to dirty data from a *stash*: a word of blocks that `delalloc` already counts
and that nobody was promised yet. A lane that takes some changes nothing but the word, so whatever
else is known here stays true. To users the stash is free space: who would meet ENOSPC gets it.

Held back from users (XFS format, counters): what the AGs cannot give to data (free-space tree
blocks, eight blocks an AG for its free list, growth of its trees), which the AG summary knows, and
a pool for transactions that must not fail for lack of space (unwritten conversion, truncation):
the smaller of 5 % and 8192 blocks.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

import numpy as np

from alloc.atomic import compare_exchange, exchange, fetch_add, load_acquire
from alloc.jit import helper, kernel

RESERVE_POOL_MAX = 8192
STASH_MAX = 4096  # blocks set aside for lanes, and at most
STASH_SHARE = 8  # an eighth of what is available

SP_STASH = 0  # words: blocks that lanes may promise; atomic
SP_WORDS = 8

# totals: what statfs(2) says. Valid until something changes free blocks, inodes or promises.
T_VALID, T_BLOCKS, T_FREE, T_AVAIL, T_FILES, T_FFREE = range(6)
T_WORDS = 8


@helper
def take_stash(words, blocks):
    """Take `blocks` from the stash for a promise; False, and nothing taken, if it has fewer."""
    while True:
        left = load_acquire(words, SP_STASH)
        if left < blocks:
            return False
        if compare_exchange(words, SP_STASH, left, left - blocks):
            return True


@kernel("i8(i8[::1], i8)")
def _add(words, blocks):
    """Put blocks into the stash; what it had before."""
    return fetch_add(words, SP_STASH, blocks)


@kernel("i8(i8[::1])")
def _empty(words):
    """Take all of the stash; how much that was."""
    return exchange(words, SP_STASH, 0)


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
        self.delalloc = 0  # by dirty data without blocks, and the stash
        self.pool = 0
        self.words = np.zeros(SP_WORDS, np.int64)
        self.totals = np.zeros(T_WORDS, np.int64)
        self.changes = 0  # goes up whenever totals become stale
        self._stash_max = 0

    def start(self, free: int, dblocks: int) -> None:
        """Begin with a mount's figures."""
        assert 0 <= free <= dblocks
        self.free = free
        self.pool = min(dblocks // 20, RESERVE_POOL_MAX, free // 20)

    def changed(self) -> None:
        """What statfs says is no longer true."""
        self.changes += 1
        self.totals[T_VALID] = 0

    @property
    def unpromised(self) -> int:
        """Free blocks that nobody was promised, nor lanes may promise, and the AGs can give."""
        return self.free - self.reserved - self.delalloc - self._unavailable()

    @property
    def available(self) -> int:
        """Blocks that a user can still be promised."""
        return max(0, self.unpromised + self.stash - self.pool)

    # -- the stash ------------------------------------------------------------------------------

    @property
    def stash(self) -> int:
        """Blocks that lanes may promise at the moment."""
        return int(self.words[SP_STASH])

    def open_stash(self) -> None:
        """There are lanes: keep blocks for them from now on."""
        self._stash_max = STASH_MAX
        self.refill_stash()

    def close_stash(self) -> None:
        """There are none any longer."""
        self._stash_max = 0
        self.recall_stash()

    def refill_stash(self) -> None:
        """Fill it up when it is below half. Cheap otherwise."""
        stash = self.stash
        if 2 * stash >= self._stash_max:
            return
        wanted = min(self.available // STASH_SHARE, self._stash_max)
        blocks = min(wanted - stash, self.unpromised - self.pool)
        if 2 * stash < wanted and blocks > 0:
            self.delalloc += blocks
            _add(self.words, blocks)

    def recall_stash(self) -> None:
        """Take back what no lane has promised yet."""
        self.delalloc -= int(_empty(self.words))

    def _find(self, blocks: int, kept: int) -> None:
        """Have so many unpromised blocks above `kept`. Raises OSError(ENOSPC)."""
        if blocks > max(0, self.unpromised - kept):
            self.recall_stash()
            if blocks > max(0, self.unpromised - kept):
                raise _no_space()
        self.changed()

    # -- promises -------------------------------------------------------------------------------

    def reserve(self, blocks: int, *, from_pool: bool = False) -> None:
        """Promise blocks to a transaction. Raises OSError(ENOSPC) with nothing changed.

        `from_pool` lets work that must complete reach into what users cannot have.
        """
        assert blocks >= 0
        self._find(blocks, 0 if from_pool else self.pool)
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
        self.changed()

    def release(self, blocks: int) -> None:
        """Give back what a transaction did not use."""
        assert 0 <= blocks <= self.reserved
        self.reserved -= blocks
        self.changed()

    def reserve_delalloc(self, blocks: int) -> None:
        """Promise blocks to dirty data. Raises OSError(ENOSPC) with nothing changed."""
        assert blocks >= 0
        self._find(blocks, self.pool)
        self.delalloc += blocks

    def release_delalloc(self, blocks: int) -> None:
        """Give back delayed blocks: data dropped, or worst case not needed."""
        assert 0 <= blocks <= self.delalloc - self.stash
        self.delalloc -= blocks
        self.changed()

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
