"""The AIL: what the log still has to keep, because it is not at home yet.

Checkpoints are numbered as they are begun. One that is stable is held by each object that it
contains and that was neither written home nor logged again since; the first that is held is the
log's tail. Who holds what is a number in the object's record (`held`), and here is only the count
for each checkpoint, so that moving an object along costs two additions and the tail no search:
it only goes forwards. What has to go home for the tail to move are the dirty objects that hold a
checkpoint up to some number; the buffer and inode caches know theirs.

An object changed by a checkpoint that is not stable is pinned: it must not be written.

Trio thread only; kernels that run on it may hold and release.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from alloc.jit import helper, kernel

RING = 1 << 16  # checkpoints from the tail on, at most
EVERYTHING = 1 << 62  # a number behind all checkpoints

# Words.
STABLE, FIRST, FLOOR, OBJECTS, WORDS = range(5)


class Held(NamedTuple):
    """What kernels see: words, and for each number (modulo the ring) count and start LSN."""

    words: Any
    counts: Any
    lsns: Any


def sample() -> Held:
    """Values of the right types, for signatures."""
    return Held(np.zeros(WORDS, np.int64), np.zeros(RING, np.int32), np.zeros(1, np.int64))


@helper
def is_pinned(held, seq):
    """Is the checkpoint not stable yet?"""
    return seq > held.words[STABLE]


@helper
def hold(held, seq):
    """One more object of checkpoint `seq` is not at home."""
    held.counts[seq & (RING - 1)] += np.int32(1)
    held.words[OBJECTS] += 1


@helper
def release(held, seq):
    """One less; 0 is no checkpoint."""
    if seq != 0:
        held.counts[seq & (RING - 1)] -= np.int32(1)
        held.words[OBJECTS] -= 1


@kernel(lambda: (sample(), 1))
def _hold(held, seq):
    hold(held, seq)


@kernel(lambda: (sample(), 1))
def _release(held, seq):
    release(held, seq)


@kernel(lambda: (sample(),))
def _first_held(held):
    """The first stable checkpoint that is held, or the one behind the last stable one."""
    first = held.words[FIRST]
    while first <= held.words[STABLE] and held.counts[first & (RING - 1)] == 0:
        first += 1
    held.words[FIRST] = first
    return first


class Ail:
    """The counts of one volume."""

    def __init__(self) -> None:
        self.held = Held(
            np.zeros(WORDS, np.int64), np.zeros(RING, np.int32), np.zeros(RING, np.int64)
        )
        self.held.words[FIRST] = 1

    @property
    def stable(self) -> int:
        """Number of the newest stable checkpoint; 0: none yet."""
        return int(self.held.words[STABLE])

    @property
    def objects(self) -> int:
        """Objects that are not at home."""
        return int(self.held.words[OBJECTS])

    @property
    def first(self) -> int:
        """Number of the first checkpoint that is held; behind `stable` if none is."""
        return int(_first_held(self.held))

    @property
    def is_crowded(self) -> bool:
        """Are so many checkpoints held that there may soon be no number for a further one?"""
        return self.stable - self.first > RING // 2

    @property
    def floor(self) -> int:
        """An LSN from which on the log is kept in any case; 0: none."""
        return int(self.held.words[FLOOR])

    @floor.setter
    def floor(self, lsn: int) -> None:
        self.held.words[FLOOR] = lsn

    def tail(self) -> int:
        """LSN from which on the log must be kept; 0 if nothing in it is needed."""
        floor, first = self.floor, self.first
        if floor:
            return floor
        return 0 if first > self.stable else int(self.held.lsns[first & (RING - 1)])

    def became_stable(self, seq: int, lsn: int) -> None:
        """Checkpoint `seq`, which began at `lsn`, is on the device; its objects hold it next."""
        assert seq == self.stable + 1
        assert seq - self.first < RING, "more checkpoints are held than can be counted"
        self.held.words[STABLE] = seq
        self.held.lsns[seq & (RING - 1)] = lsn

    def hold(self, seq: int) -> None:
        """An object of checkpoint `seq` is not at home."""
        _hold(self.held, seq)

    def release(self, seq: int) -> None:
        """An object is at home that held checkpoint `seq`; 0: it held none."""
        _release(self.held, seq)
