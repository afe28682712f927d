"""Walking B+trees whose blocks are in memory, root to leaf in one kernel.

`walk` notes the way in the plan: for each level the buffer, the block's address, the index taken
and the number of entries. What it cannot follow (a block that is not resident, or not what its
parent says) is a MISS for the cursor of `fs.xfs.btree`, whose steps inside a block these are.

`can_delete` and `can_insert` say whether a record can go or come without another block having to
change than those on the way; `deleted` and `inserted` do it, with the keys above.

Locking: that of the tree, see `fs.xfs.btree`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.jit import helper
from fs.cache import resident as R
from fs.cache.resident import MISS, addr_of, daddr_of, find_buf, log_buf
from fs.xfs import btblock as bt
from fs.xfs import extents as X
from fs.xfs import layout as L
from fs.xfs.be import get16

LEVELS_MAX = 9
# A way in the plan: the number of levels, then for each level, leaf first, four words.
BUF, ADDR, INDEX, COUNT, STEP = range(5)
WAY_WORDS = 1 + LEVELS_MAX * STEP
ROOT_SHIFT = bt.ROOT_HEADER - L.BMBT_ROOT.itemsize


@helper
def at(way, level, word):
    """Where a level's word of a way is in the plan."""
    return way + 1 + level * STEP + word


@helper
def leaf_rec(r, way, kind):
    """Address of the record that the way ends at."""
    return bt.rec_at(r.plan[at(way, 0, ADDR)], kind, r.plan[at(way, 0, INDEX)])


@helper
def walk(r, way, kind, buf_kind, agno, root, levels, key):
    """Way to the first record of a leaf with at least this key: 1 if it is equal, 0, or MISS."""
    if levels < 1 or levels > LEVELS_MAX:
        return np.int64(MISS)
    block = np.int64(root)
    r.plan[way] = levels
    for level in range(levels - 1, -1, -1):
        daddr = daddr_of(r, agno, block)
        h = find_buf(r, daddr, r.shape[R.G_BLOCK_SIZE], buf_kind, agno) if daddr >= 0 else 0
        if h == 0:
            return np.int64(MISS)
        addr = addr_of(r, h)
        i, found, n = bt.step(r.mem, addr, r.shape[R.G_BLOCK_SIZE], kind, level, key, 0, 0)
        if i < 0:
            return np.int64(MISS)
        r.plan[at(way, level, BUF)] = h
        r.plan[at(way, level, ADDR)] = addr
        r.plan[at(way, level, INDEX)] = i
        r.plan[at(way, level, COUNT)] = n
        block = found
    return np.int64(block)


@helper
def before(r, way, found):
    """Make a way to the first record at or behind a key one to the last at or before it.

    False if that is in another leaf. `found` is what `walk` returned.
    """
    r.plan[at(way, 0, INDEX)] -= 1 - found
    return r.plan[at(way, 0, INDEX)] >= 0


@helper
def can_delete(r, way, kind):
    """May the record at the end of the way go without joining blocks?"""
    least = (r.shape[R.G_BLOCK_SIZE] - bt.header_bytes(kind)) // bt.rec_bytes(kind) // 2
    return r.plan[way] == 1 or r.plan[at(way, 0, COUNT)] > max(least, 1)


@helper
def can_insert(r, way, kind):
    """Has the leaf room for one more?"""
    most = (r.shape[R.G_BLOCK_SIZE] - bt.header_bytes(kind)) // bt.rec_bytes(kind)
    return r.plan[at(way, 0, COUNT)] < most


@helper
def refresh(r, way, kind):
    """The leaf's first record changed: the keys above follow. For trees that do not overlap."""
    if r.plan[at(way, 0, INDEX)] != 0:
        return
    size = r.shape[R.G_BLOCK_SIZE]
    for level in range(1, r.plan[way]):
        node, i = r.plan[at(way, level, ADDR)], r.plan[at(way, level, INDEX)]
        if not bt.refresh_key(r.mem, node, size, kind, i, r.plan[at(way, level - 1, ADDR)], size):
            return
        log_buf(r, r.plan[at(way, level, BUF)])
        if i != 0:
            return


@helper
def deleted(r, way, kind):
    """Take the record at the end of the way out."""
    leaf = r.plan[at(way, 0, ADDR)]
    bt.delete_rec(r.mem, leaf, kind, r.plan[at(way, 0, INDEX)])
    log_buf(r, r.plan[at(way, 0, BUF)])
    if r.plan[at(way, 0, COUNT)] > 1:
        refresh(r, way, kind)


@helper
def inserted(r, way, kind, source):
    """Put a copy of the record at address `source` in where the way ends."""
    leaf = r.plan[at(way, 0, ADDR)]
    for i in range(bt.rec_bytes(kind)):
        r.record[i] = r.mem[source + i]
    bt.insert_rec(r.mem, leaf, kind, r.plan[at(way, 0, INDEX)], r.record)
    log_buf(r, r.plan[at(way, 0, BUF)])
    refresh(r, way, kind)


# -- extent maps ----------------------------------------------------------------------------------


@helper
def image_of(r, i):
    """Address of an in-core inode's image."""
    return np.int64(r.inodes["image"][i]) << r.shape[R.G_INODE_LOG]


@helper
def _map_leaf(r, i, block):
    """Address of the record of a tree-format data fork that starts at or before a block; MISS."""
    forkoff = np.int64(r.inodes["forkoff"][i]) << 3
    addr = image_of(r, i) + L.LITERAL - ROOT_SHIFT
    size = (forkoff if forkoff else r.shape[R.G_LITERAL]) + ROOT_SHIFT
    kind = np.int64(bt.BMAP_ROOT)
    level = get16(r.mem, addr + bt.LEVEL)
    if level < 1 or level > LEVELS_MAX:
        return np.int64(MISS)
    for depth in range(level, -1, -1):
        index, found, _ = bt.step(r.mem, addr, size, kind, depth, block, 0, 0)
        if index < 0:
            return np.int64(MISS)
        if depth == 0:
            index -= 1 - found
            return bt.rec_at(addr, kind, index) if index >= 0 else np.int64(MISS)
        h = find_fsb(r, found, r.shape[R.G_BLOCK_SIZE], R.K_BMAP, np.int64(r.inodes["ino"][i]))
        if h == 0:
            return np.int64(MISS)
        addr, size, kind = addr_of(r, h), r.shape[R.G_BLOCK_SIZE], np.int64(bt.BMAP)
    return np.int64(MISS)


@helper
def find_fsb(r, fsbno, size, kind, owner):
    """The buffer at a filesystem block, or 0."""
    agno = fsbno >> r.shape[R.G_AG_BLOCK_LOG]
    agbno = fsbno & ((np.int64(1) << r.shape[R.G_AG_BLOCK_LOG]) - 1)
    daddr = daddr_of(r, agno, agbno)
    return find_buf(r, daddr, size, kind, owner) if daddr >= 0 else np.int64(0)


@helper
def map_block(r, i, block, count):
    """fsbno of `count` file blocks in one written piece, or MISS."""
    form = r.inodes["format"][i]
    if form == L.FMT_EXTENTS:
        n = np.int64(r.inodes["nextents"][i])
        addr = image_of(r, i) + L.LITERAL
        index = X.search(r.mem, addr, n, block)
        rec = addr + index * X.REC_BYTES if index >= 0 else np.int64(MISS)
    elif form == L.FMT_BTREE:
        rec = _map_leaf(r, i, block)
    else:
        return np.int64(MISS)
    if rec < 0 or X.rec_unwritten(r.mem, rec):
        return np.int64(MISS)
    first = X.rec_offset(r.mem, rec)
    if block + count > first + X.rec_count(r.mem, rec):
        return np.int64(MISS)
    return X.rec_fsbno(r.mem, rec) + block - first
