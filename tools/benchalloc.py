"""The allocator by itself: a pair of allocate and free in jitted code, beside malloc and free.

Every measure is a loop of pairs in one kernel: a page through its row's list, a block of order 9
from the buddy, an object of a slab cache through its magazine (zeroed, as objects come). malloc is
called by its address from the same kind of loop; it zeroes nothing and nobody touches the memory.
Each peer runs in a process of its own that has its library preloaded, libc's being there anyway:
this module is that program, too.

With two threads each has its row; the figure is what one pair costs of the machine's time, so
perfect scaling halves it. Medians of the rounds; nothing fails because it is slow.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import ctypes
import ctypes.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.table import Table

from alloc.arena import Arena
from alloc.buddy import RIGHTS_MIN
from alloc.jit import kernel
from alloc.libc import call_address
from alloc.lru import BUDDY_ARGS
from alloc.magazine import SLAB_ARGS, object_alloc, object_free
from alloc.page import Buddy, Slabs
from alloc.pcp import put, take

ARENA_BYTES = 256 << 20
RUN_S = 0.05  # a loop takes about this long
TRIES = 10
UNDISTURBED = 0.97  # of the time that passed its threads had a processor: others were idle
PEERS = ("jemalloc", "mimalloc")
OURS, LIBC = "nofailfs", "libc malloc"
# measure: (bytes, threads)
PAGE, PAGES = "order 0, a page", "order 0, two threads"
BLOCK, OBJECTS = "order 9, 2 MiB", "slab of 64 bytes, two threads"
SIZES = {PAGE: (4096, 1), PAGES: (4096, 2), BLOCK: (2 << 20, 1)}
SLABS = {f"slab of {size} bytes": (size, 1) for size in (64, 256, 1024)} | {OBJECTS: (64, 2)}
MEASURES = SIZES | SLABS
GOALS_NS = {PAGE: 40.0, BLOCK: 300.0} | {name: 50.0 for name, (_, n) in SLABS.items() if n == 1}
SCALING_GOAL = 1.8

Loop = Callable[[int, int], object]  # of one thread: its row, and how many pairs
Sample = tuple[float, float]  # ns a pair; the part of the time for which the threads had processors


@kernel(f"i8({BUDDY_ARGS}, i8, i8, i8)")
def page_pairs(words, flags, order, refs, lru_next, lru_prev, row, want, pairs):
    """Take a block and put it, again and again; how many were had."""
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    had = 0
    for _ in range(pairs):
        pfn = abs(take(b, row, want, RIGHTS_MIN))
        had += put(b, row, pfn) > 0
    return had


@kernel(f"i8({SLAB_ARGS}, u1[::1], i8, i8, i8)")
def object_pairs(
    words, flags, order, refs, lru_next, lru_prev, mapping, low, high, mem, cache, row, pairs
):
    """Take an object and free it, again and again; how many were had."""
    s = Slabs(words, flags, order, refs, lru_next, lru_prev, mapping, low, high)
    had = 0
    for _ in range(pairs):
        i = abs(object_alloc(s, mem, cache, RIGHTS_MIN, row))
        had += object_free(s, cache, i, row) > 0
    return had


@kernel("i8(i8, i8, i8, i8)")
def malloc_pairs(malloc, free, nbytes, pairs):
    """malloc and free by their addresses, again and again; how many were had."""
    had = 0
    for _ in range(pairs):
        place = call_address(malloc, nbytes)
        had += place != 0
        call_address(free, place)
    return had


@dataclass
class Figures:
    """Samples by measure and by who was measured; why somebody was not."""

    samples: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    shares: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def add(self, who: str, figures: dict[str, Sample]) -> None:
        for measure, (ns, share) in figures.items():
            self.samples.setdefault((measure, who), []).append(ns)
            self.shares.setdefault((measure, who), []).append(share)

    def median(self, measure: str, who: str) -> float:
        return statistics.median(self.samples[measure, who])

    def disturbed(self, measure: str, who: str) -> bool:
        """Whether others used the processors meanwhile."""
        return statistics.median(self.shares[measure, who]) < UNDISTURBED

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(who for _, who in self.samples))


def _run(loop: Loop, threads: int, pairs: int) -> Sample:
    """ns from when all threads are ready to the end of the last; the part that they had of it."""
    ready = threading.Barrier(threads + 1)

    def work(row: int) -> None:
        ready.wait()
        loop(row, pairs)

    started = [threading.Thread(target=work, args=(1 + n,)) for n in range(threads)]
    for thread in started:
        thread.start()
    ready.wait()
    start, spent = time.perf_counter_ns(), time.process_time_ns()
    for thread in started:
        thread.join()
    took = time.perf_counter_ns() - start
    return took, (time.process_time_ns() - spent) / (took * threads)


def measure(loop: Loop, threads: int) -> Sample:
    """All threads together: of a few runs the one that others disturbed least."""
    loop(1, 1)  # compiles
    pairs = 64
    while (best := _run(loop, threads, pairs))[0] < RUN_S * 1e9:
        pairs *= 2
    for _ in range(TRIES):
        if best[1] > UNDISTURBED:
            break
        best = max(best, _run(loop, threads, pairs), key=lambda run: run[1])
    return best[0] / (pairs * threads), best[1]


def ours() -> dict[str, Sample]:
    """One sample of every measure on an arena of our own."""
    arena = Arena(ARENA_BYTES)
    arena.set_lanes(2)
    caches = {
        size: arena.slab(f"bench-{size}", np.dtype((np.void, size))).number
        for size, _ in SLABS.values()
    }

    def pages(order: int) -> Loop:
        return lambda row, pairs: page_pairs(*arena.buddy, row, order, pairs)

    def objects(size: int) -> Loop:
        return lambda row, pairs: object_pairs(*arena.slabs, arena.mem, caches[size], row, pairs)

    figures = {
        name: measure(pages((size >> 12).bit_length() - 1), threads)
        for name, (size, threads) in SIZES.items()
    }
    figures |= {name: measure(objects(size), threads) for name, (size, threads) in SLABS.items()}
    arena.drain_all()
    arena.check()
    arena.close()
    return figures


def mallocs() -> dict[str, Sample]:
    """One sample of every measure with this process's malloc and free."""
    program = ctypes.CDLL(None)
    places = [ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (program.malloc, program.free)]

    def loop(size: int) -> Loop:
        return lambda row, pairs: malloc_pairs(*places, size, pairs)

    return {name: measure(loop(size), threads) for name, (size, threads) in MEASURES.items()}


def _in_a_process(library: str | None) -> dict[str, Sample]:
    """`mallocs` with a library preloaded."""
    environment = os.environ | ({"LD_PRELOAD": library} if library else {})
    command = [sys.executable, "-m", "tools.benchalloc"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(
        command, env=environment, cwd=root, check=True, stdout=subprocess.PIPE, text=True
    )
    return {name: (ns, share) for name, (ns, share) in json.loads(done.stdout).items()}


def bench(rounds: int) -> Figures:
    """All rounds, each with everybody in turn."""
    figures = Figures()
    libraries: dict[str, str | None] = {LIBC: None}
    for peer in PEERS:
        library = ctypes.util.find_library(peer)
        if library:
            libraries[peer] = library
        else:
            figures.missing[peer] = f"lib{peer} is not installed"
    for _ in range(rounds):
        figures.add(OURS, ours())
        for name, library in libraries.items():
            figures.add(name, _in_a_process(library))
    return figures


def goals(figures: Figures) -> list[str]:
    """A line for each goal: what was wanted and what was measured."""
    lines = []
    for name, most in GOALS_NS.items():
        got = figures.median(name, OURS)
        verdict = "reached" if got <= most else "missed"
        lines.append(f"  goal: {name}: {got:.1f} ns, wanted {most:.0f}: {verdict}")
    one, two = figures.samples[PAGE, OURS], figures.samples[PAGES, OURS]
    scaling = statistics.median(a / b for a, b in zip(one, two, strict=True))
    verdict = "reached" if scaling >= SCALING_GOAL else "missed"
    if figures.disturbed(PAGES, OURS):
        verdict = "not to be judged, other programs used the processors"
    lines.append(f"  goal: two threads to one: {scaling:.2f}, wanted {SCALING_GOAL}: {verdict}")
    return lines


def _cell(figures: Figures, name: str, who: str) -> str:
    mark = "~" if figures.disturbed(name, who) else ""
    return f"{mark}{figures.median(name, who):,.1f}"


def show(figures: Figures) -> None:
    """Print medians and goals."""
    console = Console(width=None if Console().is_terminal else 160)
    table = Table(title="ns for a pair of allocate and free in jitted code, medians")
    table.add_column("measure", no_wrap=True)
    for name in figures.names:
        table.add_column(name, justify="right")
    for name in MEASURES:
        table.add_row(name, *(_cell(figures, name, who) for who in figures.names))
    console.print(table)
    console.print("  ~: other programs used the processors meanwhile", highlight=False)
    for name, reason in figures.missing.items():
        console.print(f"  {name}: left out: {reason}", highlight=False)
    for line in goals(figures):
        console.print(line, highlight=False)


def as_json(figures: Figures) -> dict[str, object]:
    """Every sample, for programs."""
    return {
        "left out": figures.missing,
        "goals": goals(figures),
        "measures": [
            {
                "measure": measure,
                "unit": "ns",
                "target": who,
                "samples": values,
                "shares": figures.shares[measure, who],
            }
            for (measure, who), values in figures.samples.items()
        ],
    }


if __name__ == "__main__":
    print(json.dumps(mallocs()))
