"""Busy extents: blocks that were freed by a checkpoint that is not stable yet.

They may be allocated again at once, but nobody's data is written there before the log says that
the file that had them has them no more: whoever writes waits for that checkpoint. Metadata needs
nothing, for it does not go home before its own checkpoint is stable, which is no earlier one.

Trio thread only. The table grows with what the contexts of the CIL hold, which is bounded.
"""

from __future__ import annotations

import numpy as np

ROWS = 256


class Busy:
    """(first block, end, checkpoint) of each extent, in the order in which they were freed."""

    def __init__(self) -> None:
        self._rows = np.zeros((ROWS, 3), np.int64)
        self.count = 0

    def add(self, fsbno: int, n: int, seq: int) -> None:
        """Blocks that checkpoint `seq`, the newest one, frees."""
        if self.count == len(self._rows):
            self._rows = np.concatenate((self._rows, np.zeros_like(self._rows)))
        self._rows[self.count] = fsbno, fsbno + n, seq
        self.count += 1

    def until(self, fsbno: int, n: int) -> int:
        """The last checkpoint that frees any of these blocks; 0: none."""
        first, end, seq = self._rows[: self.count].T
        return int(np.max(seq, where=(first < fsbno + n) & (fsbno < end), initial=0))

    def stable(self, seq: int) -> None:
        """Checkpoints up to `seq` are on the device."""
        kept = self._rows[: self.count][self._rows[: self.count, 2] > seq]
        self._rows[: len(kept)] = kept
        self.count = len(kept)
