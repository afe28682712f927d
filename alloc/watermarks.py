"""Watermarks: how much memory stays free, and for whom.

The formulas are the kernel's. `min` is what ordinary requests may not touch, below `low` kswapd is
woken, at `high` it stops; `promo` is where Linux's memory tiers stop promoting. Fallbacks between
migratetypes lift `low` and `high` for a while, by up to `boost_max`. Where there are several zones,
each keeps `lowmem_reserve` back from requests that could have used a higher one. Unit: pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import NamedTuple

from alloc.page import PAGE_SIZE

MIN_FREE_KBYTES_LEAST = 128
MIN_FREE_KBYTES_MOST = 262144
SCALE_FACTOR = 10  # in 1/10000 of the zone
SCALE_FACTOR_MOST = 3000
BOOST_FACTOR = 15000  # in 1/10000 of `high`
BOOST_BLOCKS_LEAST = 4  # a zone with fewer pageblocks is not boosted
RESERVE_RATIO_NORMAL = 32
KB_PER_PAGE = PAGE_SIZE // 1024


class Watermarks(NamedTuple):
    """Marks of one zone, in pages."""

    min: int
    low: int
    high: int
    promo: int


def min_free_kbytes(zone_pages: int) -> int:
    """isqrt(16 * memory in KiB), at least 128 and at most 262144."""
    assert zone_pages > 0
    wanted = isqrt(16 * zone_pages * KB_PER_PAGE)
    return min(max(wanted, MIN_FREE_KBYTES_LEAST), MIN_FREE_KBYTES_MOST)


def watermarks(
    zone_pages: int, scale_factor: int = SCALE_FACTOR, min_kbytes: int = 0
) -> Watermarks:
    """min, low, high, promo; the gap between them is max(min/4, zone * scale_factor/10000).

    `min` is `min_kbytes`, or what the zone's size makes of it if that is 0.
    """
    assert 1 <= scale_factor <= SCALE_FACTOR_MOST
    least = (min_kbytes or min_free_kbytes(zone_pages)) // KB_PER_PAGE
    gap = max(least // 4, zone_pages * scale_factor // 10000)
    assert least > 0
    return Watermarks(least, least + gap, least + 2 * gap, least + 3 * gap)


def share(marks: Watermarks, zone_pages: int, nr_pages: int) -> Watermarks:
    """The part of the marks of all zones, `nr_pages`, that falls to one of them."""
    return Watermarks(*(mark * zone_pages // nr_pages for mark in marks))


def boost_max(high: int, zone_pages: int, block_pages: int, factor: int = BOOST_FACTOR) -> int:
    """The most that fallbacks may add: high * factor/10000, a pageblock at least; 0 for none."""
    share = high * factor // 10000
    if share == 0 or zone_pages < BOOST_BLOCKS_LEAST * block_pages:
        return 0
    return max(share, block_pages)


def lowmem_reserve(zones: Sequence[int], ratios: Sequence[int]) -> list[list[int]]:
    """For each zone of so many pages, lowest first: what it keeps from requests for zone j.

    The sum of the zones above it up to j, divided by its ratio; nothing with a ratio of 0.
    """
    assert len(zones) == len(ratios)
    reserves = []
    for i, (pages, ratio) in enumerate(zip(zones, ratios, strict=True)):
        above = [sum(zones[i + 1 : j + 1]) for j in range(len(zones))]
        reserves.append([pages_above // ratio if ratio and pages else 0 for pages_above in above])
    return reserves
