"""/proc/slabinfo's format, and whom slabs are counted to."""

from __future__ import annotations

import numpy as np

from alloc.arena import Arena
from alloc.gfp import NOWAIT


def test_columns_are_the_kernels(arena: Arena) -> None:
    small = arena.slab("small", np.dtype((np.void, 512)), reclaimable=True)
    large = arena.slab("a-name-of-20-letters", np.dtype((np.void, 4096)))
    held = [small.try_alloc(NOWAIT) for _ in range(9)]
    page = large.try_alloc(NOWAIT)
    version, head, *lines = arena.slabinfo().splitlines()
    assert version == "slabinfo - version: 2.1"
    assert [part.split()[0] for part in head.split(" : ")] == ["#", "tunables", "slabdata"]
    names = [word for word in head.split() if word.startswith("<")]
    figures = [[word for word in line.split()[1:] if word.isdigit()] for line in lines]
    rows = [dict(zip(names, row, strict=True)) for row in figures]
    assert [line.split()[0] for line in lines] == ["small", "a-name-of-20-letters"]
    first, second = rows
    assert (first["<active_objs>"], first["<num_objs>"]) == ("9", "16")
    assert (first["<objsize>"], first["<objperslab>"], first["<pagesperslab>"]) == ("512", "8", "1")
    assert (first["<limit>"], first["<batchcount>"]) == ("14", "7")
    assert (first["<active_slabs>"], first["<num_slabs>"]) == ("2", "2")
    assert (second["<active_objs>"], second["<limit>"]) == ("1", "2")
    for i in held:
        small.free(i or 0)
    large.free(page or 0)


def test_reclaimable_slabs_are_counted_apart(arena: Arena) -> None:
    can = arena.slab("can", np.dtype((np.void, 4096)), reclaimable=True)
    cannot = arena.slab("cannot", np.dtype((np.void, 4096)))
    held = [can.try_alloc(NOWAIT) or 0 for _ in range(3)]
    other = cannot.try_alloc(NOWAIT) or 0
    info = arena.meminfo()
    assert (info["SReclaimable"], info["SUnreclaim"], info["Slab"]) == (12, 4, 16)
    assert arena.vmstat["nr_slab_reclaimable"] == 3
    assert arena.vmstat["nr_slab_unreclaimable"] == 1
    for i in held:
        can.free(i)
    cannot.free(other)
