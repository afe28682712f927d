"""Watermarks against the kernel's numbers, and who may go how deep."""

from __future__ import annotations

import pytest

from alloc import buddy
from alloc.arena import Arena
from alloc.page import W_FREE, W_HIGH, W_LOW, W_MIN
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


def test_marks_can_be_moved_as_far_as_memory_allows() -> None:
    assert watermarks(16384, 100, 2048) == (512, 675, 838)  # 1 % of the zone is the wider gap
    arena = Arena(64 << 20)
    arena.set_watermarks(2048, 100)
    assert arena.marks == (512, 675, 838)
    assert (arena.min_free_kbytes, arena.watermark_scale_factor) == (2048, 100)
    assert arena.words[[W_MIN, W_LOW, W_HIGH]].tolist() == [512, 675, 838]
    for kbytes, factor in ((3, 10), (33000, 10), (2048, 3000)):
        with pytest.raises(ValueError, match="min_free_kbytes|high mark"):
            arena.set_watermarks(kbytes, factor)
    assert arena.marks == (512, 675, 838)
    arena.close()


def test_names_and_inodes_own_up_to_their_share() -> None:
    arena = Arena(8 << 20)
    assert [arena.vfs_count(n) for n in (0, 1, 1000)] == [0, 1, 1000]
    arena.vfs_cache_pressure = 1
    assert [arena.vfs_count(n) for n in (0, 1, 1000)] == [0, 1, 10]
    arena.vfs_cache_pressure = 200
    assert arena.vfs_count(1000) == 2000
    arena.close()


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
