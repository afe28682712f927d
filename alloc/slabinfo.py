"""/proc/slabinfo of one arena: the slab caches, what they hold and what it costs.

The format is version 2.1 of the kernel's. Objects in magazines count as objects that are there, not
as active ones; `limit` is how many a magazine holds and `batchcount` how many move at once.
Read without locks: each number is right at some moment.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from alloc.page import PAGE_SIZE
from alloc.rows import magazine_limit

if TYPE_CHECKING:
    from alloc.arena import Slab

HEADER = """slabinfo - version: 2.1
# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab> \
: tunables <limit> <batchcount> <sharedfactor> \
: slabdata <active_slabs> <num_slabs> <sharedavail>
"""


def _line(slab: Slab) -> str:
    per_slab = PAGE_SIZE // slab.size
    limit = magazine_limit(slab.size)
    there = slab.nr_slabs * per_slab
    objects = f"{slab.nr_objects:6d} {there:6d} {slab.size:6d} {per_slab:4d} {1:4d}"
    slabs = f"{slab.nr_slabs:6d} {slab.nr_slabs:6d} {0:6d}"
    tunables = f"{limit:4d} {limit // 2:4d} {0:4d}"
    return f"{slab.name:<17} {objects} : tunables {tunables} : slabdata {slabs}\n"


def slabinfo(slabs: Iterable[Slab]) -> str:
    """Two lines of headings and one for each cache."""
    return HEADER + "".join(map(_line, slabs))
