"""The page cache's part of an in-core inode: one sub-record, all zeroes when nothing is cached.

The radix root comes first, then what writeback keeps (its STATE), then the space accounting of
dirty blocks and the readahead window. Kernels address it by the index of its first 32-bit word
in the arena, its `root`; Python reads it as a structured view. Counters of dirty blocks change
only on the trio thread, between awaits.
"""

from __future__ import annotations

import numpy as np

from fs.cache.radix import ROOT
from writeback.mapping import STATE

SPACE = np.dtype(
    [
        ("delalloc", "<u4"),  # fs blocks reserved for dirty data that has none of its own yet
        ("pending", "<u4"),  # dirty fs blocks whose write-back changes the extent map
        ("indirect", "<u4"),  # fs blocks reserved for the extent tree that may need them
        ("ra_order", "<u4"),  # readahead: folio order of the last window
        ("ra_start", "<u8"),  # first page of the last window
        ("ra_pages", "<u4"),  # its length
        ("map_seq", "<u4"),  # goes up with every change of the extent map
    ]
)
MAPPING = np.dtype(
    [(name, d[name]) for d in (ROOT, STATE, SPACE) for name in (d.names or ())]
    + [("pad", "u1", (16,))]
)
assert MAPPING.itemsize == 96


def _word(name: str) -> int:
    """Where a field is, in 32-bit words from the start of the mapping."""
    assert MAPPING.fields is not None
    return int(MAPPING.fields[name][1]) // 4


W_NDIRTY = _word("ndirty")
W_NRWRITEBACK = _word("nrwriteback")
