"""The allocator's benchmark: its loops do what they count, its report says what was measured."""

from __future__ import annotations

import ctypes
import ctypes.util
import math

import numpy as np
import pytest

from alloc.arena import Arena
from tools import benchalloc


def test_loops_leave_an_arena_as_it_was() -> None:
    arena = Arena(8 << 20)
    cache = arena.slab("objects", np.dtype((np.void, 64))).number
    for order in (0, 3, 9):
        assert benchalloc.page_pairs(*arena.buddy, 1, order, 100) == 100
    assert benchalloc.object_pairs(*arena.slabs, arena.mem, cache, 1, 100) == 100
    arena.drain_all()
    arena.check()
    assert arena.free_pages == arena.nr_pages - 1
    arena.close()


def test_functions_are_called_by_their_addresses() -> None:
    seen: list[int] = []
    kind = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_ssize_t)
    malloc = kind(lambda size: seen.append(size) or 7)
    free = kind(lambda place: seen.append(place) or 0)
    places = [ctypes.cast(f, ctypes.c_void_p).value for f in (malloc, free)]
    assert benchalloc.malloc_pairs(*places, 64, 3) == 3
    assert seen == [64, 7] * 3


def test_every_measure_is_made_and_judged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchalloc, "RUN_S", 0.0)
    monkeypatch.setattr(benchalloc, "PEERS", ("nosuchmalloc",))
    figures = benchalloc.bench(1)
    assert figures.names == [benchalloc.OURS, benchalloc.LIBC]
    assert set(figures.samples) == {(m, n) for m in benchalloc.MEASURES for n in figures.names}
    assert all(ns > 0 and math.isfinite(ns) for values in figures.samples.values() for ns in values)
    benchalloc.show(figures)
    text = capsys.readouterr().out
    assert "nosuchmalloc: left out: libnosuchmalloc is not installed" in text
    assert text.count("goal:") == len(benchalloc.GOALS_NS) + 1


def test_goals_are_held_against_the_median() -> None:
    figures = benchalloc.Figures()
    for page, pages, rest in ((39.0, 20.0, 10.0), (41.0, 25.0, 900.0), (39.5, 21.0, 11.0)):
        sample = dict.fromkeys(benchalloc.MEASURES, (rest, 1.0))
        sample |= {benchalloc.PAGE: (page, 1.0), benchalloc.PAGES: (pages, 0.99)}
        figures.add(benchalloc.OURS, sample)
    first, *_, last = benchalloc.goals(figures)
    assert first == "  goal: order 0, a page: 39.5 ns, wanted 40: reached"
    assert last == "  goal: two threads to one: 1.88, wanted 1.8: reached"
    for _ in range(4):
        figures.add(benchalloc.OURS, dict.fromkeys(benchalloc.MEASURES, (41.0, 0.5)))
    first, *_, last = benchalloc.goals(figures)
    assert first.endswith("41.0 ns, wanted 40: missed")
    assert last.endswith("not to be judged, other programs used the processors")
