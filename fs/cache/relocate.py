"""Folios that move to other pages, so that large blocks come free (alloc/migrate.py).

Everything that leads to a folio leads through its mapping's tree, under R_LOCK. So it is moved
under that lock, which is only tried, and if it has no references but its mapping's and the
mover's: then nobody looks at it, and whoever comes next finds its new place in the tree. A lane
that is still sending from it, or a task that sleeps while it uses it, has a reference; a folio that
is LOCKED or under write-back is known to its reader or to its ioend by number. A dirty one may
move: bits, tags (they are the tree's) and counts stay true.

Trio thread only, between two awaits. A task's rule that a folio is to be looked up again after an
await, for reclaim may have taken it, is what this relies on, too.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import load_acquire, spin_trylock, spin_unlock
from alloc.jit import kernel
from alloc.migrate import MOVED, STAYS, replace_folio
from alloc.page import LOCKED, WRITEBACK, Pages
from fs.cache.radix import R_LOCK, replace_entry


@kernel(
    "void(i8[::1], u4[::1], u1[::1], i4[::1], u4[::1], i8[::1], u4[::1], u4[::1], u4[::1],"
    " u8[::1], u1[::1], u4[::1], i8, i8, i8[::1], i8[::1], i8[::1])"
)
def relocate(
    words, flags, orders, refs, mapping, indices, blocks, lru_next, lru_prev, private, mem, m4,
    inode_words, first_word, sources, targets, verdicts,
):  # fmt: skip
    """Move folios sources[] to the blocks targets[], of the same orders, where that is possible.

    `inode_words`, `first_word`: where the mapping of an inode handle is in m4. Each source has a
    reference of the caller's. Verdicts are MOVED or STAYS.
    """
    pages = Pages(flags, orders, refs, mapping, indices, blocks, lru_next, lru_prev, private)
    for i in range(sources.size):
        pfn = sources[i]
        verdicts[i] = STAYS
        handle = np.int64(mapping[pfn])
        root = handle * inode_words + first_word
        if handle == 0 or not spin_trylock(m4, root + R_LOCK):
            continue
        unused = flags[pfn] & (LOCKED | WRITEBACK) == 0 and load_acquire(refs, pfn) == 2
        if mapping[pfn] == handle and unused:
            replace_entry(m4, orders, root, indices[pfn], targets[i])
            replace_folio(words, pages, mem, pfn, targets[i])
            verdicts[i] = MOVED
        spin_unlock(m4, root + R_LOCK)
