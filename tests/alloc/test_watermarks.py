"""Watermarks against the kernel's numbers, and who may go how deep."""

from __future__ import annotations

import pytest

from alloc import buddy
from alloc.arena import Arena
from alloc.page import W_FREE, W_FREE_HIGHATOMIC, W_HIGH, W_LOW, W_MIN, W_PROMO, W_WAITERS
from alloc.watermarks import boost_max, lowmem_reserve, min_free_kbytes, watermarks


@pytest.mark.parametrize(
    ("mib", "expected"),
    [
        (16, (128, 160, 192, 224)),
        (64, (256, 320, 384, 448)),
        (256, (512, 640, 768, 896)),
        (1024, (1024, 1286, 1548, 1810)),
    ],
)
def test_golden(mib: int, expected: tuple[int, int, int, int]) -> None:
    assert watermarks(mib * 256) == expected


def test_min_free_is_clamped() -> None:
    assert min_free_kbytes(1) == 128
    assert min_free_kbytes(1 << 40) == 262144


def test_marks_can_be_moved_as_far_as_memory_allows() -> None:
    assert watermarks(16384, 100, 2048) == (512, 675, 838, 1001)  # 1 % of the zone is the wider gap
    arena = Arena(64 << 20)
    arena.set_watermarks(2048, 100)
    assert arena.marks == (512, 675, 838, 1001)
    assert (arena.min_free_kbytes, arena.watermark_scale_factor) == (2048, 100)
    assert arena.words[[W_MIN, W_LOW, W_HIGH, W_PROMO]].tolist() == [512, 675, 838, 1001]
    for kbytes, factor in ((3, 10), (33000, 10), (2048, 3000)):
        with pytest.raises(ValueError, match="min_free_kbytes|high mark"):
            arena.set_watermarks(kbytes, factor)
    assert arena.marks == (512, 675, 838, 1001)
    arena.close()


def test_names_and_inodes_own_up_to_their_share() -> None:
    arena = Arena(8 << 20)
    assert [arena.vfs_count(n) for n in (0, 1, 1000)] == [0, 1, 1000]
    arena.vfs_cache_pressure = 1
    assert [arena.vfs_count(n) for n in (0, 1, 1000)] == [0, 1, 10]
    arena.vfs_cache_pressure = 200
    assert arena.vfs_count(1000) == 2000
    arena.close()


def test_reserve_of_lower_zones() -> None:
    """DMA 16 MiB, DMA32 1 GiB, Normal 3 GiB with Linux's ratios, and a zone without pages."""
    zones, ratios = [4096, 262144, 786432, 0], [256, 256, 32, 0]
    assert lowmem_reserve(zones, ratios) == [
        [0, 1024, 4096, 4096],
        [0, 0, 3072, 3072],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    assert lowmem_reserve([4095], [32]) == [[0]]


@pytest.mark.parametrize(
    ("high", "pages", "block", "factor", "expected"),
    [
        (192, 4096, 32, 15000, 288),
        (192, 4096, 512, 15000, 512),
        (192, 4096, 2048, 15000, 0),  # fewer than four pageblocks
        (192, 4096, 32, 0, 0),
    ],
)
def test_the_most_that_a_boost_adds(
    high: int, pages: int, block: int, factor: int, expected: int
) -> None:
    assert boost_max(high, pages, block, factor) == expected


FLOORS = {
    buddy.RIGHTS_MIN: 256,
    buddy.RIGHTS_HALF: 128,
    buddy.RIGHTS_ATOMIC: 96,
    buddy.RIGHTS_OOM: 128,
    buddy.RIGHTS_HALF | buddy.RIGHTS_OOM: 64,
    buddy.RIGHTS_LOW: 320,
    buddy.RIGHTS_ALL: 0,
}


@pytest.mark.parametrize(("rights", "floor"), FLOORS.items())
def test_floors_with_min_256(rights: int, floor: int) -> None:
    arena = Arena(64 << 20)
    assert arena.marks.min == 256
    for order in (0, 3):
        arena.words[W_FREE] = floor + (1 << order) - 1
        assert buddy.alloc_pages(*arena.buddy, order, rights) == buddy.WOULD_BLOCK
        arena.words[W_FREE] = floor + (1 << order)
        assert buddy.alloc_pages(*arena.buddy, order, rights) != buddy.WOULD_BLOCK
    arena.close()


@pytest.mark.parametrize(("rights", "floor"), FLOORS.items())
def test_the_high_atomic_reserve_counts_only_for_who_may_use_it(rights: int, floor: int) -> None:
    arena = Arena(64 << 20)
    arena.words[W_FREE_HIGHATOMIC] = 40
    kept = 40 if rights in (buddy.RIGHTS_MIN, buddy.RIGHTS_LOW) else 0
    arena.words[W_FREE] = floor + kept
    assert buddy.alloc_pages(*arena.buddy, 0, rights) == buddy.WOULD_BLOCK
    arena.words[W_FREE] = floor + kept + 1
    assert buddy.alloc_pages(*arena.buddy, 0, rights) != buddy.WOULD_BLOCK
    arena.close()


def test_only_those_who_wait_for_nobody_overtake() -> None:
    arena = Arena(8 << 20)
    arena.words[W_WAITERS] = 1
    for rights in FLOORS:
        overtakes = rights in (buddy.RIGHTS_ALL, buddy.RIGHTS_ATOMIC)
        assert bool(buddy.alloc_pages(*arena.buddy, 0, rights)) == overtakes
        assert buddy.alloc_pages(*arena.buddy, 0, rights | buddy.RIGHTS_QUEUED)
    arena.close()
