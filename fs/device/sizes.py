"""How large the requests are that reach a device: a histogram by powers of two.

A request is what is asked of the device in one go, data and metadata alike: the pieces of memory
that it goes to or comes from do not count. Each is in the row of the largest power of two that it
reaches, in KiB; row 0 has those below 1 KiB, the last row those above it, too. Counts are taken
when a request begins, whether or not it succeeds; those of direct ones, which passed the page cache
below by, when they are done. Trio thread only.
"""

from __future__ import annotations

import numpy as np

from fs.device.base import Views

ROWS = 15  # 0, 1, 2, 4, ... 8192 KiB
READ, WRITE = 0, 1


class Sizes:
    """Requests of one device."""

    def __init__(self) -> None:
        self.requests = np.zeros((2, ROWS), np.int64)
        self.nbytes = np.zeros((2, ROWS), np.int64)
        self.direct = np.zeros((2, ROWS), np.int64)  # requests

    def note(self, kind: int, views: Views) -> None:
        """A request, READ or WRITE, begins."""
        nbytes = _length(views)
        row = _row(nbytes)
        self.requests[kind, row] += 1
        self.nbytes[kind, row] += nbytes

    def note_direct(self, kind: int, views: Views) -> None:
        """A request has been direct."""
        self.direct[kind, _row(_length(views))] += 1


def _length(views: Views) -> int:
    return sum(view.nbytes for view in views)


def _row(nbytes: int) -> int:
    return min((nbytes >> 10).bit_length(), ROWS - 1)


def io_text(sizes: Sizes) -> str:
    """A line for each size: how many reads and writes, how much together, how many direct."""
    out = f"{'# size_kB':<10} {'reads':>10} {'read_kB':>12} {'writes':>10} {'written_kB':>12}"
    out += f" {'direct_reads':>12} {'direct_writes':>13}\n"
    for row in range(ROWS):
        out += f"{1 << row >> 1:<10}"
        for kind in (READ, WRITE):
            out += f" {sizes.requests[kind, row]:10d} {sizes.nbytes[kind, row] >> 10:12d}"
        out += f" {sizes.direct[READ, row]:12d} {sizes.direct[WRITE, row]:13d}\n"
    return out
