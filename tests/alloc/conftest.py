"""Arenas for the allocator's tests: the smallest size, checked as a whole when a test ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from alloc.arena import Arena

SMALL_BYTES = 8 << 20


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(SMALL_BYTES)
    yield made
    made.check()
    made.close()
