"""Fragmentation against golden values, and reports in the formats of /proc."""

from __future__ import annotations

import re

import pytest

from alloc import buddy
from alloc.arena import Arena
from alloc.gfp import MOVABLE, NOWAIT
from alloc.page import ORDERS
from alloc.zoneinfo import all_free_blocks, fragmentation_index, unusable_index


@pytest.mark.parametrize(
    ("free", "order", "expected"),
    [
        ({0: 1000}, 4, 937),
        ({3: 8}, 4, 375),
        ({3: 1}, 4, -500),
        ({0: 1}, 9, -1),
        ({0: 5, 4: 1}, 4, -1000),
        ({}, 4, 0),
    ],
)
def test_golden_fragmentation_index(free: dict[int, int], order: int, expected: int) -> None:
    blocks = [free.get(o, 0) for o in range(ORDERS)]
    assert fragmentation_index(blocks, order) == expected


def test_unusable_index() -> None:
    assert unusable_index([4, 0, 1, 0, 1], 0) == 0
    assert unusable_index([4, 0, 1, 0, 1], 1) == 166
    assert unusable_index([4, 0, 1, 0, 1], 4) == 333
    assert unusable_index([4, 0, 1, 0, 1], 5) == 1000
    assert unusable_index([0, 0], 0) == 1000


def test_pagetypeinfo(arena: Arena) -> None:
    pfns = [abs(buddy.alloc_pages(*arena.buddy, 0, mt << buddy.MT_SHIFT)) for mt in range(3)]
    assert arena.pagetypeinfo().splitlines() == [
        "Page block order: 4",
        "Pages per block:  16",
        "",
        "Free pages count per migrate type at order       0      1      2      3      4      5"
        "      6      7      8      9     10 ",
        "Node    0, zone   Normal, type    Unmovable      1      1      1      1      0      0"
        "      0      0      0      0      0 ",
        "Node    0, zone   Normal, type      Movable      0      1      1      1      3      3"
        "      3      3      3      1      0 ",
        "Node    0, zone   Normal, type  Reclaimable      1      1      1      1      0      0"
        "      0      0      0      0      0 ",
        "Node    0, zone   Normal, type   HighAtomic      0      0      0      0      0      0"
        "      0      0      0      0      0 ",
        "",
        "Number of blocks type     Unmovable      Movable  Reclaimable   HighAtomic ",
        "Node 0, zone   Normal            1          126            1            0 ",
    ]
    assert sum(n << o for o, n in enumerate(all_free_blocks(arena.words))) == arena.free_pages
    for pfn in pfns:
        buddy.put_page(*arena.buddy, pfn)


def test_zoneinfo(arena: Arena) -> None:
    pfn = arena.try_alloc_folio(0, NOWAIT | MOVABLE)
    assert pfn is not None
    text = arena.zoneinfo()
    assert text.startswith("Node 0, zone   Normal\n  per-node stats\n")
    for name in ("free", "boost", "min", "low", "high", "promo", "spanned", "managed"):
        assert re.search(rf"^  (pages|     ) {name} +\d+$", text, re.MULTILINE), name
    marks = [re.findall(rf"^ +{name} +(\d+)$", text, re.MULTILINE) for name in arena.marks._fields]
    assert marks == [[str(mark)] for mark in arena.marks]
    assert "\n        protection: (0)\n" in text
    held = arena.vmstat["nr_pcp_pages"]
    assert f"  pagesets\n    cpu: 0\n              count: {held}\n" in text
    assert text.count("cpu:") == 1
    arena.put_folio(pfn)


def test_extfrag(arena: Arena) -> None:
    pfns = []
    while pfn := abs(buddy.alloc_pages(*arena.buddy, 0, buddy.RIGHTS_ALL)):
        pfns.append(pfn)
    for pfn in pfns[::2]:
        buddy.put_page(*arena.buddy, pfn)
    index, unusable = arena.extfrag().splitlines()
    assert index.split()[4:7] == ["-1.000", "0.500", "0.750"]
    assert unusable.split()[4:7] == ["0.000", "1.000", "1.000"]
    for pfn in pfns[1::2]:
        buddy.put_page(*arena.buddy, pfn)
