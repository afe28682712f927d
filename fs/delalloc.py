"""Delayed allocation: what dirty data has been promised, per inode, and how promises are used up.

A write into a hole (or a shared block) reserves one block for each block of data; blocks are
chosen when the data is written back. Every dirty block whose write-back changes the extent map
(PENDING: holes, unwritten and shared blocks) may also need blocks for the map's tree; for those
the inode holds one reservation, `indirect`, that covers the worst order in which all its pending
blocks can become records. The three counters are in the inode's mapping record and change only
between awaits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fs.xfs import layout as L

if TYPE_CHECKING:
    from fs.cache.inode import Inode
    from fs.log.transaction import Transaction
    from fs.volume import Volume

INLINE_MIN = 3  # records that every data fork in EXTENTS format can hold, whatever its attributes
RECORDS_EACH = 2  # records that mapping one block adds at most: the middle of an extent is cut out


def worst_tree_blocks(vol: Volume, ip: Inode, pending: int) -> int:
    """Tree blocks that mapping `pending` more blocks one by one can need, at most.

    Blocks of a B+tree are at least half full, so the tree of all records cannot have more blocks
    than that; nor can each insertion split more than one block a level and add a root.
    """
    records = ip.nextents + RECORDS_EACH * pending
    if not pending or (ip.format == L.FMT_EXTENTS and records <= INLINE_MIN):
        return 0
    total, level = 1, records
    while level > 1:
        level = -(-level // vol.pages.tree_records_min)
        total += level
    return min(total, pending * RECORDS_EACH * vol.pages.tree_levels)


def promise(vol: Volume, ip: Inode, data: int, pending: int) -> None:
    """Reserve for `data` new data blocks and `pending` more changes of the map.

    Raises OSError(ENOSPC) with nothing changed.
    """
    state: Any = vol.pages.state(ip.handle)
    after = int(state["pending"]) + pending
    indirect = max(worst_tree_blocks(vol, ip, after) - int(state["indirect"]), 0)
    if data or indirect:
        vol.space.reserve_delalloc(data + indirect)
    state["delalloc"] += data
    state["pending"] = after
    state["indirect"] += indirect


def forget(vol: Volume, ip: Inode, data: int, pending: int) -> None:
    """Dirty blocks were written or thrown away: give back what they no longer need."""
    state: Any = vol.pages.state(ip.handle)
    assert data <= state["delalloc"]
    assert pending <= state["pending"]
    state["delalloc"] -= data
    state["pending"] -= pending
    needed = worst_tree_blocks(vol, ip, int(state["pending"]))
    surplus = max(int(state["indirect"]) - needed, 0)
    state["indirect"] -= surplus
    if data + surplus:
        vol.space.release_delalloc(data + surplus)


def take(tp: Transaction, ip: Inode, data: int, promised: int, edits: int) -> int:
    """Bring promised blocks into a transaction for `data` blocks and `edits` changes of the map.

    `promised` of the data blocks are reserved; the rest comes from the reserve pool. Returns the
    tree blocks among what was brought in. Raises OSError(ENOSPC) with nothing changed when the
    pool is empty, too.
    """
    vol = tp.vol
    state: Any = vol.pages.state(ip.handle)
    tree = min(int(state["indirect"]), edits * RECORDS_EACH * vol.pages.tree_levels)
    if data > promised:
        tp.take_pool(data - promised)
    state["delalloc"] -= promised
    state["indirect"] -= tree
    tp.take_delalloc(promised + tree)
    return tree


def give_back(tp: Transaction, ip: Inode, data: int, tree_most: int) -> None:
    """Return `data` unused promised blocks to the inode, and the tree blocks that are left."""
    state: Any = tp.vol.pages.state(ip.handle)
    tree = max(min(tree_most, tp.blocks - data), 0)
    tp.vol.space.reserved_to_delalloc(tp, data + tree)
    state["delalloc"] += data
    state["indirect"] += tree


def promised_blocks(vol: Volume, ip: Inode) -> int:
    """Blocks of an inode's delayed data: stat(2) counts them as used."""
    return int(vol.pages.state(ip.handle)["delalloc"])
