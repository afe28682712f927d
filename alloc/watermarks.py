"""Watermarks: how much memory stays free, and for whom.

The formulas are the kernel's for a single zone. `min` is what ordinary requests may not touch,
below `low` kswapd is woken, at `high` it stops. Unit: pages.
"""

from __future__ import annotations

from math import isqrt
from typing import NamedTuple

from alloc.page import PAGE_SIZE

MIN_FREE_KBYTES_LEAST = 128
MIN_FREE_KBYTES_MOST = 262144
SCALE_FACTOR = 10  # in 1/10000 of the zone
SCALE_FACTOR_MOST = 3000
KB_PER_PAGE = PAGE_SIZE // 1024


class Watermarks(NamedTuple):
    """Marks of one zone, in pages."""

    min: int
    low: int
    high: int


def min_free_kbytes(zone_pages: int) -> int:
    """isqrt(16 * memory in KiB), at least 128 and at most 262144."""
    assert zone_pages > 0
    wanted = isqrt(16 * zone_pages * KB_PER_PAGE)
    return min(max(wanted, MIN_FREE_KBYTES_LEAST), MIN_FREE_KBYTES_MOST)


def watermarks(
    zone_pages: int, scale_factor: int = SCALE_FACTOR, min_kbytes: int = 0
) -> Watermarks:
    """min, low, high; the gap between them is max(min/4, zone * scale_factor/10000).

    `min` is `min_kbytes`, or what the zone's size makes of it if that is 0.
    """
    assert 1 <= scale_factor <= SCALE_FACTOR_MOST
    least = (min_kbytes or min_free_kbytes(zone_pages)) // KB_PER_PAGE
    gap = max(least // 4, zone_pages * scale_factor // 10000)
    assert least > 0
    return Watermarks(least, least + gap, least + 2 * gap)
