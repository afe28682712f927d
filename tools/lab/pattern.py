"""Bytes that tell where they belong: every word of a file is a function of a seed and its place.

So a reader needs no copy of what was written. Data that moved, is stale, or is another file's
differs in nearly every word. Places and lengths are bytes; both are multiples of the word's 8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 8
ODD = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
SHIFT = np.uint64(29)


def words(seed: int, offset: int, length: int) -> NDArray[np.uint64]:
    """The `length` bytes at `offset` of the file that `seed` names, as words."""
    assert offset % WORD == length % WORD == 0, "patterns are made of whole words"
    first = offset // WORD
    place = np.arange(first, first + length // WORD, dtype=np.uint64)
    mixed = (place + np.uint64(seed * ODD & MASK)) * np.uint64(ODD)
    return mixed ^ (mixed >> SHIFT)


def difference(data: Any, seed: int, offset: int, length: int) -> str:
    """What is wrong with bytes that were read there; nothing when they are right."""
    if len(data) != length:
        return f"{len(data)} of {length} bytes at {offset}"
    found = np.frombuffer(data, np.uint64)
    bad = np.flatnonzero(found != words(seed, offset, length))
    if not bad.size:
        return ""
    at = int(bad[0])
    return f"{bad.size} wrong words, the first at {offset + at * WORD}: {int(found[at]):#x}"
