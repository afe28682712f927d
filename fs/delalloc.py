"""Delayed allocation: what dirty data has been promised, per inode, and how promises are used up.

A write into a hole (or a shared block) reserves one block for each block of data; blocks are
chosen when the data is written back. Every dirty block whose write-back changes the extent map
(PENDING: holes, unwritten and shared blocks) may also need blocks for the map's tree; for those
the inode holds one reservation, `indirect`, that covers the worst order in which all its pending
blocks can become records.

The three counters are words of the inode's mapping and change under its lock, in one kernel
call each. Order, because lanes promise at any moment: a counter goes up before the block bits
say so and comes down after them, so it is never less than they need. What they add up to is
part of `Space.delalloc`, which only the trio thread changes.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from alloc.atomic import spin_lock, spin_unlock
from alloc.jit import helper, kernel
from fs.cache.blocks import PENDING, RESERVED
from fs.cache.gather import change_cached
from fs.cache.mapping import W_DELALLOC, W_INDIRECT, W_PENDING
from fs.cache.radix import R_LOCK
from fs.space import take_stash
from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume

INLINE_MIN = 3  # records that every data fork in EXTENTS format can hold, whatever its attributes
RECORDS_EACH = 2  # records that mapping one block adds at most: the middle of an extent is cut out

# -- under the mapping's lock ------------------------------------------------------------------


@helper
def worst_tree(format, nextents, pending, levels, records_min):
    """Tree blocks that mapping `pending` more blocks one by one can need, at most.

    Blocks of a B+tree are at least half full, so the tree of all records cannot have more blocks
    than that; nor can each insertion split more than one block a level and add a root.
    """
    records = nextents + RECORDS_EACH * pending
    if pending == 0 or (format == L.FMT_EXTENTS and records <= INLINE_MIN):
        return np.int64(0)
    total = np.int64(1)
    level = records
    while level > 1:
        level = (level + records_min - 1) // records_min
        total += level
    return min(total, pending * RECORDS_EACH * levels)


@helper
def indirect_wanted(m4, root, format, nextents, pending, levels, records_min):
    """Tree blocks that the inode lacks for `pending` more changes of its map."""
    after = np.int64(m4[root + W_PENDING]) + pending
    worst = worst_tree(format, nextents, after, levels, records_min)
    return max(worst - np.int64(m4[root + W_INDIRECT]), 0)


@helper
def add_promise(m4, root, data, pending, indirect):
    """Under the lock: the inode has been promised so much more (or less)."""
    m4[root + W_DELALLOC] = np.int64(m4[root + W_DELALLOC]) + data
    m4[root + W_PENDING] = np.int64(m4[root + W_PENDING]) + pending
    m4[root + W_INDIRECT] = np.int64(m4[root + W_INDIRECT]) + indirect


@helper
def promise_words(m4, root, stash, format, nextents, data, pending, levels, records_min):
    """What `promise` does, for a lane: under the mapping's lock, with blocks from the stash.

    Returns the blocks it took, or -1, with nothing changed, when the stash has too few. `format`
    and `nextents` are the data fork's: the caller holds the ILOCK, shared at least.
    """
    indirect = indirect_wanted(m4, root, format, nextents, pending, levels, records_min)
    if data + indirect > 0 and not take_stash(stash, data + indirect):
        return np.int64(-1)
    add_promise(m4, root, data, pending, indirect)
    return data + indirect


@helper
def forget_words(m4, root, format, nextents, data, pending, levels, records_min):
    """Under the lock: what `forget` does; blocks that nobody is promised any longer, or -1."""
    if data > np.int64(m4[root + W_DELALLOC]) or pending > np.int64(m4[root + W_PENDING]):
        return np.int64(-1)
    after = np.int64(m4[root + W_PENDING]) - pending
    worst = worst_tree(format, nextents, after, levels, records_min)
    surplus = max(np.int64(m4[root + W_INDIRECT]) - worst, 0)
    add_promise(m4, root, -data, -pending, -surplus)
    return data + surplus


# -- kernels -----------------------------------------------------------------------------------


@kernel("i8(i8, i8, i8, i8, i8)")
def _worst_tree(format, nextents, pending, levels, records_min):
    return worst_tree(format, nextents, pending, levels, records_min)


@kernel("i8(u4[::1], i8, i8, i8, i8, i8, i8, i8)")
def _promise(m4, root, format, nextents, data, pending, levels, records_min):
    """Count a promise; the blocks that it needs."""
    spin_lock(m4, root + R_LOCK)
    indirect = indirect_wanted(m4, root, format, nextents, pending, levels, records_min)
    add_promise(m4, root, data, pending, indirect)
    spin_unlock(m4, root + R_LOCK)
    return data + indirect


@kernel("i8(u4[::1], i8, i8, i8, i8, i8, i8, i8)")
def _forget(m4, root, format, nextents, data, pending, levels, records_min):
    """Count a promise less; the blocks that are free of it, or -1 if there was none such."""
    spin_lock(m4, root + R_LOCK)
    blocks = forget_words(m4, root, format, nextents, data, pending, levels, records_min)
    spin_unlock(m4, root + R_LOCK)
    return blocks


@kernel("void(u4[::1], i8, i8, i8, i8)")
def _change(m4, root, data, pending, indirect):
    spin_lock(m4, root + R_LOCK)
    add_promise(m4, root, data, pending, indirect)
    spin_unlock(m4, root + R_LOCK)


@kernel("i8(u4[::1], i8, i8, i8)")
def _take(m4, root, data, indirect):
    """Take `data` and at most `indirect` blocks away from the inode; the latter's number."""
    spin_lock(m4, root + R_LOCK)
    tree = min(np.int64(m4[root + W_INDIRECT]), indirect)
    add_promise(m4, root, -data, 0, -tree)
    spin_unlock(m4, root + R_LOCK)
    return tree


@kernel(
    "i8(u4[::1], u1[::1], i8[::1], u4[::1], i8, i8, i8[:, ::1], i8, i8, i8, i8, i8, i8)"
)
def _settle(
    m4, orders, indices, blocks, root, block_log, runs, nruns, mapped, format, nextents, levels,
    records_min,
):  # fmt: skip
    """End what blocks of runs[:nruns] were promised; the blocks that are free of it, or -1."""
    data = np.int64(0)
    pending = np.int64(0)
    spin_lock(m4, root + R_LOCK)
    for i in range(nruns):
        first, last = runs[i, 0], runs[i, 0] + runs[i, 1]
        reserved, changed = change_cached(
            m4, orders, indices, blocks, root, block_log, first, last, mapped,
            RESERVED | PENDING, RESERVED, PENDING,
        )  # fmt: skip
        data += reserved
        pending += changed
    free = forget_words(m4, root, format, nextents, data, pending, levels, records_min)
    spin_unlock(m4, root + R_LOCK)
    return free


# -- the trio thread ---------------------------------------------------------------------------


def worst_tree_blocks(vol: Volume, ip: Inode, pending: int) -> int:
    """Tree blocks that mapping `pending` more blocks one by one can need, at most."""
    pages = vol.pages
    args = (ip.format, ip.nextents, pending, pages.tree_levels, pages.tree_records_min)
    return int(_worst_tree(*args))


def promise(vol: Volume, ip: Inode, data: int, pending: int) -> None:
    """Reserve for `data` new data blocks and `pending` more changes of the map.

    Raises OSError(ENOSPC) with nothing changed.
    """
    pages = vol.pages
    root = pages.root(ip.handle)
    args = (ip.format, ip.nextents, data, pending, pages.tree_levels, pages.tree_records_min)
    blocks = int(_promise(pages.m4, root, *args))
    try:
        vol.space.reserve_delalloc(blocks)
    except OSError:
        _change(pages.m4, root, -data, -pending, data - blocks)
        raise
    vol.space.refill_stash()


def forget(vol: Volume, ip: Inode, data: int, pending: int) -> None:
    """Dirty blocks were written or thrown away: give back what they no longer need."""
    pages = vol.pages
    args = (ip.format, ip.nextents, data, pending, pages.tree_levels, pages.tree_records_min)
    blocks = int(_forget(pages.m4, pages.root(ip.handle), *args))
    assert blocks >= 0, "blocks are given back that were never promised"
    if blocks:
        vol.space.release_delalloc(blocks)


def settle(vol: Volume, ip: Inode, runs: Any, nruns: int, mapped: int) -> None:
    """Dirty blocks, in runs, were written (or have failed); written ones get the bit `mapped`."""
    pages = vol.pages
    p = pages.pages
    args = (pages.m4, p.order, p.index, p.blocks, pages.root(ip.handle), pages.block_log)
    shape = (ip.format, ip.nextents, pages.tree_levels, pages.tree_records_min)
    blocks = int(_settle(*args, runs, nruns, mapped, *shape))
    assert blocks >= 0, "blocks are settled that were never promised"
    if blocks:
        vol.space.release_delalloc(blocks)


def take(tp: Transaction, ip: Inode, data: int, promised: int, edits: int) -> int:
    """Bring promised blocks into a transaction for `data` blocks and `edits` changes of the map.

    `promised` of the data blocks are reserved; the rest comes from the reserve pool, and so does
    what the inode lacks for its tree, because that grew or shrank since. Returns the tree blocks
    among what was brought in. Raises OSError(ENOSPC) with nothing changed when the pool is empty.
    """
    pages = tp.vol.pages
    if data > promised:
        tp.take_pool(data - promised)
    most = edits * RECORDS_EACH * pages.tree_levels
    tree = int(_take(pages.m4, pages.root(ip.handle), promised, most))
    tp.take_delalloc(promised + tree)
    worst = worst_tree_blocks(tp.vol, ip, int(pages.columns["pending"][ip.handle]))
    lacking = min(worst, most) - tree
    if 0 < lacking <= tp.vol.space.unpromised:
        tp.take_pool(lacking)
        tree += lacking
    return tree


def give_back(tp: Transaction, ip: Inode, data: int, tree_most: int) -> None:
    """Return `data` unused promised blocks to the inode, and the tree blocks that are left."""
    pages = tp.vol.pages
    tree = max(min(tree_most, tp.blocks - data), 0)
    tp.vol.space.reserved_to_delalloc(tp, data + tree)
    _change(pages.m4, pages.root(ip.handle), data, 0, tree)


def promised_blocks(vol: Volume, ip: Inode) -> int:
    """Blocks of an inode's delayed data: stat(2) counts them as used."""
    return int(vol.pages.columns["delalloc"][ip.handle])
