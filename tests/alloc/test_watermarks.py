"""Watermarks against the kernel's numbers, and who may go how deep."""

from __future__ import annotations

import pytest

from alloc import buddy
from alloc.arena import Arena
from alloc.page import W_FREE
from alloc.watermarks import min_free_kbytes, watermarks


@pytest.mark.parametrize(
    ("mib", "expected"),
    [
        (16, (128, 160, 192)),
        (64, (256, 320, 384)),
        (256, (512, 640, 768)),
        (1024, (1024, 1286, 1548)),
    ],
)
def test_golden(mib: int, expected: tuple[int, int, int]) -> None:
    assert watermarks(mib * 256) == expected


def test_min_free_is_clamped() -> None:
    assert min_free_kbytes(1) == 128
    assert min_free_kbytes(1 << 40) == 262144


def test_floors_with_min_256() -> None:
    """Ordinary requests stop at min, transactional waits at half of it, MEMALLOC at nothing."""
    arena = Arena(64 << 20)
    assert arena.marks.min == 256
    floors = {buddy.RIGHTS_MIN: 256, buddy.RIGHTS_HALF: 128, buddy.RIGHTS_LOW: 320}
    for rights, floor in floors.items():
        arena.words[W_FREE] = floor
        assert buddy.alloc_pages(*arena.buddy, 0, rights) == buddy.WOULD_BLOCK
        arena.words[W_FREE] = floor + 1
        assert buddy.alloc_pages(*arena.buddy, 0, rights) != buddy.WOULD_BLOCK
        arena.words[W_FREE] = floor + 7
        assert buddy.alloc_pages(*arena.buddy, 3, rights) == buddy.WOULD_BLOCK
        arena.words[W_FREE] = floor + 8
        assert buddy.alloc_pages(*arena.buddy, 3, rights) != buddy.WOULD_BLOCK
    arena.words[W_FREE] = 1
    assert buddy.alloc_pages(*arena.buddy, 0, buddy.RIGHTS_ALL) != buddy.WOULD_BLOCK
    arena.close()
