"""Rows: how much each thread's lists and magazines may hold, and what all of them hold together.

Row 0 is the trio thread's, row 1 + n lane n's; what is in one is said in alloc/pcp.py and
alloc/magazine.py. The formulas are the kernel's for per-cpu lists, a row being a cpu. Unit: pages.
Sums are read without locks: right at no single moment while lanes run.
"""

from __future__ import annotations

from alloc.page import (
    MAGAZINE_MAX,
    MAGAZINE_WORDS,
    P_COUNT,
    P_HIGH,
    P_MAGAZINES,
    P_PGALLOC,
    P_PGFREE,
    PAGE_SIZE,
    ROW_WORDS,
    ROWS,
    W_PCP_BATCH,
    W_PCP_HIGH_MAX,
    W_PCP_HIGH_MIN,
    W_ROWS,
    Z_COUNT,
    Words,
)

TRIO = 0  # the trio thread's row
BATCH_SCALE_MAX = 5  # a refill takes at most 2^5 batches
HIGH_FRACTION = 8  # all rows together never hold more than this part of the arena
MAGAZINE_BYTES = 2 * PAGE_SIZE  # a magazine of large objects holds no more than this


def batch_size(nr_pages: int) -> int:
    """Pages that go to or from the buddy at once: about nr_pages/4096, 2^n - 1, at least 1."""
    quarter = max(min(nr_pages >> 10, (1 << 20) // PAGE_SIZE) // 4, 1)
    below = quarter + quarter // 2
    return max((1 << below.bit_length() - 1) - 1, 1)


def high_bounds(nr_pages: int, low: int, rows: int) -> tuple[int, int]:
    """Least and most pages that one of `rows` rows may hold; `low` is the mark."""
    least = 4 * batch_size(nr_pages)
    return max(low // rows, least), max(nr_pages // HIGH_FRACTION // rows, least)


def configure(words: Words, nr_pages: int, low: int, rows: int) -> None:
    """Sizes for `rows` rows, the trio thread's and one for each lane."""
    assert 1 <= rows <= ROWS, f"{rows} rows: raise ROWS"
    words[W_PCP_BATCH] = batch_size(nr_pages)
    words[[W_PCP_HIGH_MIN, W_PCP_HIGH_MAX]] = high_bounds(nr_pages, low, rows)


def magazine_limit(size: int) -> int:
    """Objects of `size` bytes that a magazine holds at most; even."""
    return min(max(MAGAZINE_BYTES // size, 2), MAGAZINE_MAX)


def nr_pages_listed(words: Words) -> int:
    """Pages on all rows' lists."""
    return _sum(words, P_COUNT)


def pages_handed_out(words: Words) -> int:
    """Pages that left through rows since the beginning."""
    return _sum(words, P_PGALLOC)


def pages_given_back(words: Words) -> int:
    """Pages that came back through rows since the beginning."""
    return _sum(words, P_PGFREE)


def objects_in_magazines(words: Words, cache: int) -> int:
    """Objects of one slab cache in all magazines."""
    return _sum(words, P_MAGAZINES + cache * MAGAZINE_WORDS + Z_COUNT)


def pages_in_rows(words: Words) -> list[tuple[int, int]]:
    """For each row that was ever used: pages on its lists, and how many it may have."""
    at = words[W_ROWS : W_ROWS + ROWS * ROW_WORDS].reshape(ROWS, ROW_WORDS)
    rows: list[list[int]] = at[:, [P_COUNT, P_HIGH, P_PGALLOC, P_PGFREE]].tolist()
    return [(count, high) for count, high, taken, given in rows if taken or given]


def _sum(words: Words, what: int) -> int:
    return int(words[W_ROWS + what : W_ROWS + ROWS * ROW_WORDS : ROW_WORDS].sum())
