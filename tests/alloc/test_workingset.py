"""Refault distances: which folios come back as active ones, against the rule restated."""

from __future__ import annotations

from random import Random

import pytest

from alloc.arena import Arena
from alloc.gfp import NOWAIT
from alloc.jit import probe
from alloc.lru import inactive_ratio
from alloc.mempolicy import NONE, policy
from alloc.page import ACTIVE, W_NONRESIDENT_AGE, WORKINGSET
from alloc.topology import topology
from alloc.workingset import AGE_MASK, SHADOW_BITS, eviction


@probe
def evicted(words, flags, order, pfn):
    return eviction(words, flags, order, pfn)


def evict(arena: Arena, pfn: int) -> int:
    """Take a folio off its list and give it back; its shadow."""
    shadow = int(evicted(arena.words, arena.pages.flags, arena.pages.order, pfn))
    arena.lru.remove(pfn)
    arena.put_folio(pfn)
    return shadow


def take(arena: Arena, order: int = 0, mempolicy: int = NONE) -> int:
    pfn = arena.try_alloc_folio(order, NOWAIT, mempolicy)
    assert pfn is not None
    return pfn


def comes_back(arena: Arena, shadow: int, order: int = 0) -> int:
    pfn = take(arena, order)
    arena.lru.refault(pfn, shadow)
    arena.lru.add(pfn)
    return pfn


def drop(arena: Arena, *pfns: int) -> None:
    for pfn in pfns:
        arena.put_folio(pfn)


def counts(arena: Arena) -> tuple[int, int, int]:
    names = ("refault", "activate", "restore")
    refaults, activated, restored = (arena.vmstat[f"workingset_{name}_file"] for name in names)
    return refaults, activated, restored


@pytest.mark.parametrize(
    ("gib", "ratio"), [(0, 1), (1, 3), (10, 10), (100, 31), (1024, 101), (10240, 320)]
)
def test_golden_inactive_ratios(gib: int, ratio: int) -> None:
    assert inactive_ratio(gib << 18) == ratio


def test_below_a_gib_there_may_be_as_many_active_pages_as_inactive_ones() -> None:
    assert inactive_ratio((1 << 18) - 1) == 1


def test_a_distance_up_to_the_active_list_activates(arena: Arena) -> None:
    active = [take(arena) for _ in range(10)]
    for pfn in active:
        arena.lru.add(pfn, active=True)
    first = evict(arena, take(arena))
    for _ in range(9):
        evict(arena, take(arena))
    pfn = comes_back(arena, first)  # ten pages were evicted since, itself included
    assert arena.pages.flags[pfn] & (ACTIVE | WORKINGSET) == ACTIVE
    assert counts(arena) == (1, 1, 0)
    assert arena.lru.nr_active == 11
    again = evict(arena, take(arena))
    for _ in range(11):
        evict(arena, take(arena))
    other = comes_back(arena, again)  # twelve
    assert not arena.pages.flags[other] & ACTIVE
    assert counts(arena) == (2, 1, 0)
    drop(arena, pfn, other, *active)


def test_what_was_active_before_its_eviction_is_restored(arena: Arena) -> None:
    pfn = take(arena, 2)
    arena.lru.add(pfn, active=True)
    assert arena.lru.age(1) == 1
    assert arena.pages.flags[pfn] & (ACTIVE | WORKINGSET) == WORKINGSET
    shadow = evict(arena, pfn)
    filler = take(arena, 3)
    arena.lru.add(filler, active=True)
    pfn = comes_back(arena, shadow, 2)
    assert arena.pages.flags[pfn] & (ACTIVE | WORKINGSET) == ACTIVE | WORKINGSET
    assert counts(arena) == (4, 4, 4)
    drop(arena, pfn, filler)


def test_age_goes_on_with_evictions_activations_and_refaults(arena: Arena) -> None:
    ages = [int(arena.words[W_NONRESIDENT_AGE])]

    def aged() -> int:
        ages.append(int(arena.words[W_NONRESIDENT_AGE]))
        return ages[-1] - ages[-2]

    shadow = evict(arena, take(arena, 3))
    assert aged() == 8
    pfn = take(arena, 1)
    arena.lru.add(pfn)
    arena.lru.mark_accessed(pfn)
    assert aged() == 0
    arena.lru.mark_accessed(pfn)
    assert aged() == 2
    cold = comes_back(arena, shadow, 3)
    assert aged() == 0
    arena.lru.activate(cold)
    warm = comes_back(arena, evict(arena, take(arena)))
    assert aged() == 1 + 1
    drop(arena, pfn, cold, warm)


@pytest.mark.parametrize(
    ("age", "node", "was_active", "golden"),
    [(0, 0, 0, 0), (5, 3, 1, 167), ((1 << 25) + 2, 15, 0, 94)],
)
def test_golden_shadows(age: int, node: int, was_active: int, golden: int) -> None:
    """The kernel's packing: age, node, WORKINGSET, from the upper end."""
    arena = Arena(128 << 20, nodes=topology(16))
    pfn = node * (arena.nr_pages // 16) + 64
    arena.nodes[node][W_NONRESIDENT_AGE] = age
    arena.pages.flags[pfn], arena.pages.order[pfn] = WORKINGSET * was_active, 0
    assert evicted(arena.words, arena.pages.flags, arena.pages.order, pfn) == golden
    assert arena.nodes[node][W_NONRESIDENT_AGE] == age + 1
    arena.close()


def test_a_folio_is_compared_with_the_node_that_it_left() -> None:
    """And makes the one that it comes back to a page older."""
    arena = Arena(16 << 20, nodes=topology(2))
    first, second = policy("bind", [0]), policy("bind", [1])
    active = [take(arena, 0, second) for _ in range(4)]
    for pfn in active:
        arena.lru.add(pfn, active=True)
    here, there = (evict(arena, take(arena, 0, node)) for node in (first, second))
    ages = [int(words[W_NONRESIDENT_AGE]) for words in arena.nodes]
    pfns = [take(arena, 0, first), take(arena, 0, first)]
    arena.lru.refault(pfns[0], here)
    assert counts(arena) == (1, 0, 0)  # nothing is active on the first node
    arena.lru.refault(pfns[1], there)
    assert counts(arena) == (2, 1, 0)
    assert [int(words[W_NONRESIDENT_AGE]) for words in arena.nodes] == [ages[0] + 1, ages[1]]
    drop(arena, *pfns, *active)
    arena.check()
    arena.close()


def test_the_age_may_wrap_around(arena: Arena) -> None:
    filler = take(arena, 4)
    arena.lru.add(filler, active=True)
    arena.words[W_NONRESIDENT_AGE] = AGE_MASK - 2
    shadow = evict(arena, take(arena, 3))
    assert shadow >> SHADOW_BITS == 0
    assert arena.words[W_NONRESIDENT_AGE] > AGE_MASK
    pfn = comes_back(arena, shadow)
    assert counts(arena) == (1, 1, 0)
    drop(arena, pfn, filler)


@pytest.mark.parametrize("seed", range(3))
def test_refaults_equal_the_rule(arena: Arena, seed: int) -> None:
    """distance = pages evicted or activated since; active if not more than nr_active."""
    random = Random(seed)
    resident: dict[int, bool] = {}  # pfn: has been active
    shadows: list[tuple[int, int, bool]] = []  # shadow, age, has been active
    age, expected = 0, [0, 0, 0]
    for _ in range(400):
        if len(shadows) > 5 and random.random() < 0.4:
            shadow, then, was = shadows.pop(random.randrange(len(shadows)))
            order = random.randrange(3)
            nr_active = arena.lru.nr_active
            pfn = comes_back(arena, shadow, order)
            expected[0] += 1 << order
            active = age - then <= nr_active
            if active:
                age += 1 << order
                expected[1] += 1 << order
                expected[2] += was << order
            assert bool(arena.pages.flags[pfn] & ACTIVE) == active
            resident[pfn] = active and was
        elif resident and random.random() < 0.6:
            pfn = random.choice(list(resident))
            pages = 1 << int(arena.pages.order[pfn])
            shadows.append((evict(arena, pfn), age, resident.pop(pfn)))
            age += pages
        elif random.random() < 0.2:
            for pfn in resident:
                resident[pfn] |= bool(arena.pages.flags[pfn] & ACTIVE)
            arena.lru.age(100)
        else:
            pfn = take(arena, random.randrange(3))
            arena.lru.add(pfn, active=random.random() < 0.5)
            resident[pfn] = False
    assert tuple(expected) == counts(arena)
    assert expected[1] > 0
    assert expected[2] > 0
    drop(arena, *resident)
