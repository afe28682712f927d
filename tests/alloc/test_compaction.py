"""Compaction: scanners against naive twins, moves that change only the place, when it runs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import trio
import trio.testing

from alloc import compactnode, gfp, mempolicy, scanner
from alloc.arena import Arena
from alloc.compactnode import (
    ASYNC,
    COMPLETE,
    DEFERRED,
    SKIPPED,
    SUCCESS,
    SYNC_FULL,
    SYNC_LIGHT,
    Deferral,
    NodeCompaction,
)
from alloc.page import (
    ACTIVE,
    LOCKED,
    LRU_STRIDE,
    MOVABLE,
    ORDER_MAX,
    REFERENCED,
    W_BLOCK_ORDER,
    W_FREE,
    W_LRU,
    WRITEBACK,
)
from alloc.placement import placement
from alloc.topology import topology
from tests.alloc.movable import best_target, lru_order, scatter, units


def first(arena: Arena) -> NodeCompaction:
    return arena.compaction.nodes[0]


def compact(arena: Arena, order: int, priority: str = SYNC_FULL) -> str:
    """A run that ends when there is a block of the order; how it ended."""
    *_, result = arena.compaction.direct(
        order, MOVABLE, 0, priority, lambda: first(arena).has_block(order)
    )
    return result


def fresh_state(arena: Arena) -> np.ndarray:
    state = np.zeros(scanner.STATE_WORDS, np.int64)
    block = 1 << int(arena.words[W_BLOCK_ORDER])
    state[scanner.C_FREE] = (arena.nr_pages - 1) // block * block
    state[scanner.C_LIMIT] = ORDER_MAX + 1
    return state


@pytest.mark.parametrize("order", [1, 2, 4, 5, 6])
@pytest.mark.parametrize("seed", range(3))
def test_find_unit_as_its_twin(arena: Arena, order: int, seed: int) -> None:
    rng = random.Random(seed)
    cache = scatter(arena, rng, [0, 0, 1, 2], 0.4)
    for pfn in rng.sample(sorted(cache.folios), 60):
        cache.pin(pfn)
    flagged = rng.sample(sorted(cache.folios.keys() - cache.pinned), 30)
    for pfn in flagged:
        arena.pages.flags[pfn] |= rng.choice((LOCKED, WRITEBACK))
    for mt in (None, MOVABLE):
        state, found = fresh_state(arena), []
        skip = np.full(arena.nr_pages, scanner.NO_SKIP, np.uint8)
        args = (skip, state, order, scanner.ANY_TYPE if mt is None else mt)
        while unit := scanner.find_unit(*arena.buddy, *args, False):
            found.append(int(unit))
        assert found == units(arena, order, int(state[scanner.C_FREE]), mt)
        state[scanner.C_MIGRATE] = 0
        again = []
        while unit := scanner.find_unit(*arena.buddy, *args, False):
            again.append(int(unit))
        assert again == found, "hints hide nothing that is there"
    for pfn in flagged:
        arena.pages.flags[pfn] &= ~np.uint32(LOCKED | WRITEBACK)
    cache.drop()


@pytest.mark.parametrize("seed", range(3))
def test_take_targets_as_its_twin(arena: Arena, seed: int) -> None:
    rng = random.Random(seed)
    cache = scatter(arena, rng, [0, 0, 1, 2, 3], 0.5)
    state, wanted, taken = fresh_state(arena), 4, []
    one, out = np.zeros(1, np.int64), np.zeros(1, np.int64)
    for source in rng.sample(sorted(cache.folios), 200):
        unit, want = source >> wanted << wanted, int(arena.pages.order[source])
        one[0] = source
        bottom = unit + (1 << wanted)
        expected = best_target(arena, bottom, want, wanted)
        found = scanner.take_targets(*arena.buddy, state, unit, wanted, one, out, 1)
        assert (int(out[0]), found) == (expected, int(expected != 0))
        if found:
            taken.append(int(out[0]))
        else:
            assert state[scanner.C_LIMIT] == want
    assert len(taken) > 50
    for pfn in taken:
        arena.put_folio(pfn)
    cache.drop()


@pytest.mark.parametrize("order", [2, 4, 6, 8])
def test_a_run_makes_a_block_and_changes_nothing_else(arena: Arena, order: int) -> None:
    rng = random.Random(order)
    cache = scatter(arena, rng, [0, 0, 0, 1, 2], 0.45)
    for pfn in rng.sample(sorted(cache.folios), 400):
        rng.choice((arena.lru.activate, arena.lru.mark_accessed))(pfn)
    for pfn in rng.sample(sorted(cache.folios), 8):
        cache.pin(pfn)
    # what is left is single pages and pairs
    blocks = []
    while (pfn := arena.try_alloc_folio(order, gfp.NOWAIT)) is not None:
        blocks.append(pfn)
    seeds = [
        [cache.seeds[pfn] for pfn in lru_order(arena, int(arena.words[at]))]
        for at in (W_LRU, W_LRU + LRU_STRIDE)
    ]
    state = {
        seed: int(arena.pages.flags[pfn]) & (ACTIVE | REFERENCED)
        for pfn, seed in cache.seeds.items()
        if pfn in cache.folios
    }
    free = int(arena.words[W_FREE])
    assert compact(arena, order) == SUCCESS
    assert arena.words[W_FREE] == free
    assert cache.moves
    assert not {source for source, _ in cache.moves} & cache.pinned
    cache.verify()
    assert seeds == [
        [cache.seeds[pfn] for pfn in lru_order(arena, int(arena.words[at]))]
        for at in (W_LRU, W_LRU + LRU_STRIDE)
    ], "the order of the LRU lists"
    assert all(
        int(arena.pages.flags[pfn]) & (ACTIVE | REFERENCED) == state[cache.seeds[pfn]]
        for pfn in cache.folios
    )
    assert arena.vmstat["pgmigrate_success"] == len(cache.moves)
    assert arena.vmstat["compact_isolated"] >= 2 * len(cache.moves)
    for pfn in blocks:
        arena.put_folio(pfn)
    cache.drop()


def test_runs_until_nothing_is_left_to_gain(arena: Arena) -> None:
    cache = scatter(arena, random.Random(5), [0], 0.5)
    low = sorted(cache.folios)  # at the ends of the list are folios that move
    arena.lru.rotate(low[10])
    arena.lru.deactivate(low[20])
    before = first(arena).score
    for _ in arena.compaction.compact_memory():
        pass
    assert before > 90
    assert first(arena).score < 10
    cache.verify()
    moves = len(cache.moves)
    for _ in arena.compaction.compact_memory():
        pass
    assert len(cache.moves) - moves < moves / 10
    cache.drop()


def test_what_stays_is_never_moved(arena: Arena) -> None:
    cache = scatter(arena, random.Random(6), [0], 0.3)
    for pfn in list(cache.folios)[::8]:
        cache.pin(pfn)
    kept = set(cache.pinned)
    assert compact(arena, 6) == COMPLETE
    assert first(arena).deferral.order_failed == 6
    assert kept <= cache.folios.keys()
    cache.verify()
    cache.drop()


def test_a_refused_folio_leaves_everything_as_it_was(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = scatter(arena, random.Random(7), [0, 1], 0.4)
    monkeypatch.setattr(cache, "move_folios", lambda *_: None)
    free = arena.free_pages
    while (pfn := arena.try_alloc_folio(4, gfp.NOWAIT)) is not None:
        cache.insert(pfn, dirty=True)
        free -= 16
    assert compact(arena, 4) == COMPLETE
    assert arena.free_pages == free
    assert arena.vmstat["pgmigrate_fail"] > 0
    assert arena.vmstat["pgmigrate_success"] == 0
    cache.verify()
    cache.drop()


async def served_within_5_s(arena: Arena, order: int) -> bool:
    with trio.move_on_after(5):
        arena.put_folio(await arena.alloc_folio(order, gfp.MOVABLE))
        return True
    return False


@pytest.mark.parametrize("order", [4, 6])
@pytest.mark.parametrize("dirty", [0, 1])
async def test_what_it_is_good_for(
    autojump_clock: object, allow_logs, order: int, dirty: int
) -> None:
    """Dirty folios can not be evicted, clean ones had better not; a sixth of memory is objects."""
    allow_logs("possible memory allocation deadlock")
    outcomes = []
    for moves in (False, True):
        arena = Arena(16 << 20)
        objects = [await arena.alloc_folio(0) for _ in range(arena.nr_pages // 6)]
        cache = scatter(arena, random.Random(order), [0, 0, 2], 0.25, dirty)
        while (pfn := arena.try_alloc_folio(order, gfp.NOWAIT | gfp.MOVABLE)) is not None:
            cache.insert(pfn, dirty=bool(dirty))
        if not moves:
            arena.compaction.mover = None
        folios = len(cache.folios)
        served = await served_within_5_s(arena, order)
        outcomes.append((served, len(cache.folios) == folios))
        cache.verify()
        cache.drop()
        for pfn in objects:
            arena.put_folio(pfn)
        arena.close()
    assert outcomes == [(not dirty, bool(dirty)), (True, True)], "(served, nothing evicted)"


# -- when it runs ------------------------------------------------------------------------------


def test_deferral_doubles_up_to_64() -> None:
    deferral = Deferral()
    assert not deferral.deferred(4)
    for tries in (2, 4, 8, 16, 32, 64, 64):
        deferral.defer(4)
        assert not deferral.deferred(3), "smaller orders are not concerned"
        answers = [deferral.deferred(5) for _ in range(tries)]
        assert answers == [True] * (tries - 1) + [False]
    deferral.reset(5, served=True)
    assert not deferral.deferred(5)
    assert deferral.order_failed == 6


def test_too_little_memory_and_too_little_fragmentation_are_no_reason(arena: Arena) -> None:
    cache = scatter(arena, random.Random(1), [0], 0.5)
    assert first(arena).suitable(4)
    while arena.words[W_FREE] > arena.marks.low + (2 << 4):
        cache.insert(arena.try_alloc_folio(0, gfp.NOWAIT) or 0, dirty=True)
    assert arena.words[W_FREE] == arena.marks.low + (2 << 4)
    assert first(arena).suitable(4)
    assert not first(arena).suitable(5)
    assert first(arena).suitable(3)  # it goes by `min`
    arena.compaction.extfrag_threshold = 1000
    assert not first(arena).suitable(4)
    assert first(arena).suitable(3)
    arena.compaction.mover = None
    assert compact(arena, 3) == SKIPPED
    cache.drop()


def test_who_fails_is_deferred_and_full_priority_is_not(arena: Arena) -> None:
    cache = scatter(arena, random.Random(2), [0], 0.5)
    for pfn in cache.folios:
        arena.pages.flags[pfn] |= LOCKED
    results = [compact(arena, 6, SYNC_LIGHT) for _ in range(4)]
    assert results == ["complete", DEFERRED, "complete", DEFERRED]
    assert compact(arena, 6, ASYNC) == DEFERRED
    assert compact(arena, 6, SYNC_FULL) == COMPLETE
    assert (arena.vmstat["compact_stall"], arena.vmstat["compact_fail"]) == (3, 3)
    for pfn in cache.folios:
        arena.pages.flags[pfn] &= ~np.uint32(LOCKED)
    assert compact(arena, 6, SYNC_FULL) == SUCCESS
    assert arena.vmstat["compact_success"] == 1
    assert first(arena).deferral.shift == 0
    cache.drop()


async def test_kcompactd_makes_what_was_asked_for(arena: Arena, autojump_clock: object) -> None:
    cache = scatter(arena, random.Random(3), [0], 0.5)
    arena.compaction.proactiveness = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        await trio.sleep(2)
        assert not cache.moves
        arena.compaction.wake(7, 0)
        await trio.sleep(0.1)
        assert first(arena).has_block(7)
        assert arena.vmstat["compact_daemon_wake"] == 1
        assert arena.vmstat["compact_daemon_migrate_scanned"] > 0
        nursery.cancel_scope.cancel()
    assert len(cache.moves) < 200
    cache.verify()
    cache.drop()


async def test_the_score_is_kept_below_its_mark(arena: Arena, autojump_clock: object) -> None:
    cache = scatter(arena, random.Random(4), [0], 0.5)
    assert arena.compaction.score_marks == (80, 90)
    assert first(arena).score > 90
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        await trio.sleep(1)
        assert 60 < first(arena).score <= 80
        arena.compaction.proactiveness = 100
        assert arena.compaction.score_marks == (5, 15)
        await trio.sleep(1)
        assert first(arena).score <= 5
        nursery.cancel_scope.cancel()
    cache.verify()
    cache.drop()


async def test_a_run_in_vain_is_not_repeated_at_once(
    arena: Arena, autojump_clock: object
) -> None:
    cache = scatter(arena, random.Random(8), [0], 0.5)
    for pfn in cache.folios:
        arena.pages.flags[pfn] |= LOCKED
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        await trio.sleep(1)
        scanned = arena.vmstat["compact_migrate_scanned"]
        assert scanned > 0
        await trio.sleep(compactnode.PROACTIVE_S * 60)
        assert arena.vmstat["compact_migrate_scanned"] == scanned
        await trio.sleep(compactnode.PROACTIVE_S * 8)
        assert arena.vmstat["compact_migrate_scanned"] > scanned
        nursery.cancel_scope.cancel()
    for pfn in cache.folios:
        arena.pages.flags[pfn] &= ~np.uint32(LOCKED)
    cache.drop()


# -- several nodes -----------------------------------------------------------------------------


def bound_to(arena: Arena, *nodes: int) -> int:
    """The bits of a request that may be served by these nodes only."""
    return int(placement(arena.words, mempolicy.policy("bind", nodes), 0, 0))


def nodes_of(arena: Arena, moves: list[tuple[int, int]]) -> set[tuple[int, int]]:
    return {(arena.node_of(source), arena.node_of(target)) for source, target in moves}


@pytest.mark.parametrize("node", range(3))
def test_folios_move_within_their_node(node: int) -> None:
    arena = Arena(24 << 20, nodes=topology(3))
    rng = random.Random(node)
    cache = scatter(arena, rng, [0, 0, 1, 2], 0.45)
    for pfn in rng.sample(sorted(cache.folios), 12):
        cache.pin(pfn)
    there = arena.compaction.nodes[node]
    free = [int(words[W_FREE]) for words in arena.nodes]
    assert not there.has_block(7)
    direct = arena.compaction.direct
    *_, result = direct(
        7, MOVABLE, bound_to(arena, node), SYNC_FULL, lambda: there.has_block(7)
    )
    assert result == SUCCESS
    assert nodes_of(arena, cache.moves) == {(node, node)}
    assert free == [int(words[W_FREE]) for words in arena.nodes]
    cache.verify()
    for _ in arena.compaction.compact_memory():
        pass
    assert nodes_of(arena, cache.moves) == {(0, 0), (1, 1), (2, 2)}
    assert all(each.score < 20 for each in arena.compaction.nodes)
    cache.verify()
    cache.drop()
    arena.close()


def test_what_is_refused_goes_back_to_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(16 << 20, nodes=topology(2))
    cache = scatter(arena, random.Random(9), [0], 0.4)
    monkeypatch.setattr(cache, "move_folios", lambda *_: None)
    free = [int(words[W_FREE]) for words in arena.nodes]
    direct = arena.compaction.direct
    *_, result = direct(6, MOVABLE, bound_to(arena, 1), SYNC_FULL, lambda: False)
    assert result == COMPLETE
    assert arena.vmstat["pgmigrate_fail"] > 0
    assert free == [int(words[W_FREE]) for words in arena.nodes]
    assert arena.compaction.nodes[0].deferral.shift == 0
    assert arena.compaction.nodes[1].deferral.shift == 1
    cache.verify()
    cache.drop()
    arena.close()


async def test_who_is_bound_has_his_node_compacted(autojump_clock: object) -> None:
    """Not the others, for he would not be served there; and nothing is evicted."""
    arena = Arena(16 << 20, nodes=topology(2))
    cache = scatter(arena, random.Random(10), [0], 0.4, dirty=0)
    number = mempolicy.policy("bind", [1])
    while (pfn := arena.try_alloc_folio(6, gfp.NOWAIT | gfp.MOVABLE, number)) is not None:
        cache.insert(pfn, dirty=False)
    folios = len(cache.folios)
    pfn = await arena.alloc_folio(6, gfp.MOVABLE, number)
    assert arena.node_of(pfn) == 1
    assert nodes_of(arena, cache.moves) == {(1, 1)}
    assert len(cache.folios) == folios
    arena.put_folio(pfn)
    nodes = arena.compaction.nodes
    for _ in nodes[0].direct(8, MOVABLE, SYNC_FULL, lambda: nodes[0].has_block(8)):
        pass
    assert [node.has_block(8) for node in nodes] == [True, False]
    pfn = arena.try_alloc_folio(8, gfp.RETRY_MAYFAIL | gfp.MOVABLE, number) or 0
    assert arena.node_of(pfn) == 1
    assert nodes[0].has_block(8)
    assert len(cache.folios) == folios
    arena.put_folio(pfn)
    cache.verify()
    cache.drop()
    arena.close()


async def test_each_node_has_a_kcompactd(autojump_clock: object) -> None:
    arena = Arena(16 << 20, nodes=topology(2))
    cache = scatter(arena, random.Random(11), [0], 0.5)
    arena.compaction.proactiveness = 0
    async with trio.open_nursery() as nursery:
        nursery.start_soon(arena.kswapd)
        await trio.sleep(1)
        arena.compaction.wake(7, bound_to(arena, 1))
        await trio.sleep(0.1)
        assert nodes_of(arena, cache.moves) == {(1, 1)}
        assert arena.compaction.nodes[1].has_block(7)
        assert arena.vmstat["compact_daemon_wake"] == 1
        arena.compaction.proactiveness = 20
        await trio.sleep(2)
        assert nodes_of(arena, cache.moves) == {(0, 0), (1, 1)}
        nursery.cancel_scope.cancel()
    assert all(each.score <= 90 for each in arena.compaction.nodes)
    cache.verify()
    cache.drop()
    arena.close()
