"""Committing: what a transaction changed is copied into the open context of the CIL, by kernels.

A row is what one item needs: kind, owner, bytes for its vector and bytes of the log at most, and
the memory that it was given. `measure` fills in what objects need, `insert` copies them. Between
the two memory is found, from the stock or by waiting, and the ticket pays; `insert` only copies: no
allocator is within its reach. What was spare is left in the rows, for the caller to free.

`insert_touched` is all of it for a transaction that was one kernel, with memory from the stock. A
row that is `own` is the caller's, who knows its size and writes its vector: bytes, cancels, buffers
in several pieces.

Trio thread only; kernels. Vectors are as in `formats`.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from alloc.jit import helper, kernel
from fs.cache.buf import BUF
from fs.cache.incore import INODE
from fs.log import blocks, formats
from fs.log.changes import BUFFER, INODE_ITEM, ORDERED, POINTERS
from fs.xfs import extents as X
from fs.xfs import layout as L

ITEM = np.dtype(
    [
        ("vector", "i8"),  # address in the arena; 0: the item has none
        ("room", "u4"),  # bytes of memory at it
        ("used", "u4"),
        ("regions", "u4"),
        ("owner", "u4"),  # the object's handle, or 0
        ("next", "u4"),  # in the context
        ("cost", "u4"),  # bytes of the log that it has been counted with
        ("kind", "u1"),
        ("pad", "u1", (31,)),
    ]
)
assert ITEM.itemsize == 64
OPERATION_BYTES = 8  # that a region's operation header has more than the length in the vector
INODE_REGIONS = 4
MISSING = -1  # no memory in stock

# Columns of a row. R_ITEM, R_VECTOR, R_ROOM: an item without owner and memory for its vector.
R_KIND, R_OWNER, R_OWN, R_SIZE, R_COST, R_ITEM, R_VECTOR, R_ROOM, R_LACKS, R_PLACE = range(10)
COLUMNS = 10
# Columns of the stock.
S_ITEM, S_VECTOR, S_ROOM, STOCK = range(4)
# Words of a context.
C_SEQ, C_FIRST, C_LAST, C_COUNT, C_CLUSTER_OPS, C_CLUSTER_BYTES, C_POINTER_BYTES = range(7)
C_POINTER_REGIONS, WORDS = 7, 8


class Context(NamedTuple):
    """The open context and the objects of its volume, as kernels see them."""

    mem: Any  # the arena's bytes
    items: Any  # ITEM records
    bufs: Any  # BUF records
    inodes: Any  # INODE records
    words: Any
    pointers: Any  # chunk map of all unlinked pointers of an inode cluster
    limits: Any  # of fs.xfs.inode
    uuid: Any
    stock: Any  # (n, STOCK), by room; S_ITEM 0: taken
    rows: Any  # of `insert_touched`


def sample() -> Context:
    """Values of the right types, for signatures."""
    return Context(
        np.zeros(1, np.uint8),
        np.zeros(1, ITEM),
        np.zeros(1, BUF),
        np.zeros(1, INODE),
        np.zeros(WORDS, np.int64),
        np.zeros(1, np.uint32),
        np.zeros(X.LIMITS, np.int64),
        np.zeros(16, np.uint8),
        np.zeros((1, STOCK), np.int64),
        np.zeros((1, COLUMNS), np.int64),
    )


# -- what is needed -------------------------------------------------------------------------------


@helper
def _item_of(c, kind, owner):
    """The item that an object has in the open context, or 0."""
    if owner == 0:
        return np.int64(0)
    if kind == INODE_ITEM:
        return np.int64(c.inodes["item"][owner])
    return np.int64(c.bufs["item"][owner])


@helper
def _image_of(c, h):
    """Where an inode's forks are."""
    return np.int64(c.inodes["image"][h]) * c.limits[X.INODE_SIZE]


@helper
def _object_needs(c, kind, owner):
    """(bytes of the vector, operations) of a changed object."""
    if kind == ORDERED:
        return np.int64(0), np.int64(0)
    if kind == POINTERS:
        return c.words[C_POINTER_BYTES], c.words[C_POINTER_REGIONS]
    if kind == BUFFER:
        return np.int64(formats.whole_bytes(np.int64(c.bufs["size"][owner]))), np.int64(2)
    image = _image_of(c, owner)
    return np.int64(formats.inode_bytes(c.mem, c.inodes, owner, image)), np.int64(INODE_REGIONS)


@helper
def _stays(c, kind, item):
    """Is it a cluster that is ordered, but has its pointers in the log already?"""
    return kind == ORDERED and item != 0 and c.items["kind"][item] == POINTERS


@helper
def _measure(c, rows, n):
    growth = np.int64(0)
    for i in range(n):
        kind, owner = rows[i, R_KIND], rows[i, R_OWNER]
        item = _item_of(c, kind, owner)
        if not rows[i, R_OWN]:
            size, operations = _object_needs(c, kind, owner)
            rows[i, R_SIZE], rows[i, R_COST] = size, size + OPERATION_BYTES * operations
        if _stays(c, kind, item):
            rows[i, R_COST] = np.int64(c.items["cost"][item])
        growth += rows[i, R_COST]
        room = np.int64(0)
        if item != 0:
            growth -= np.int64(c.items["cost"][item])
            room = np.int64(c.items["room"][item])
        enough = rows[i, R_ITEM] != 0 or (item != 0 and room >= rows[i, R_SIZE])
        rows[i, R_LACKS] = 0 if enough else 1
    return growth


@kernel(lambda: (sample(), np.zeros((1, COLUMNS), np.int64)))
def measure(c, rows):
    """Fill in sizes, costs and what lacks memory; bytes that the context grows by."""
    return _measure(c, rows, len(rows))


# -- copying --------------------------------------------------------------------------------------


@helper
def _append(c, item):
    if c.words[C_LAST] != 0:
        c.items["next"][c.words[C_LAST]] = item
    else:
        c.words[C_FIRST] = item
    c.words[C_LAST] = item
    c.words[C_COUNT] += 1


@helper
def _begin(c, item, owner):
    """A new item of the context, without a vector."""
    t = c.items
    t["vector"][item], t["room"][item] = 0, 0
    t["used"][item], t["regions"][item] = 0, 0
    t["owner"][item], t["next"][item] = owner, 0
    t["cost"][item], t["kind"][item] = 0, 0
    _append(c, item)


@helper
def _adopt(c, rows, i):
    """The row's item: with the memory that the row was given, if it had not enough.

    What is not needed any more takes the place of that in the row.
    """
    item, spare = _item_of(c, rows[i, R_KIND], rows[i, R_OWNER]), rows[i, R_ITEM]
    if item == 0:
        item = spare
        rows[i, R_ITEM] = 0
        _begin(c, item, rows[i, R_OWNER])
    elif np.int64(c.items["room"][item]) >= rows[i, R_SIZE]:
        return item
    old, room = np.int64(c.items["vector"][item]), np.int64(c.items["room"][item])
    c.items["vector"][item], c.items["room"][item] = rows[i, R_VECTOR], rows[i, R_ROOM]
    rows[i, R_VECTOR], rows[i, R_ROOM] = old, room
    return item


@helper
def _put_inode(c, at, h):
    """XFS format: the inode's cluster is what its number says."""
    ino, limits = np.int64(c.inodes["ino"][h]), c.limits
    block_log = limits[X.BLOCK_LOG]
    agno = ino >> limits[X.AGINO_LOG]
    agino = ino & ((np.int64(1) << limits[X.AGINO_LOG]) - 1)
    per_block = (np.int64(1) << block_log) // limits[X.INODE_SIZE]
    agbno = agino // per_block
    cluster = max(np.int64(1), c.words[C_CLUSTER_BYTES] >> block_log)
    first = agbno - agbno % cluster
    offset = ((agbno - first) << block_log) + agino % per_block * limits[X.INODE_SIZE]
    daddr = (agno * limits[X.AG_BLOCKS] + first) << (block_log - L.BB_LOG)
    bbs = c.words[C_CLUSTER_BYTES] >> L.BB_LOG
    place, image = (daddr, bbs, offset), _image_of(c, h)
    return np.int64(formats.put_inode_item(c.mem, at, c.inodes, h, image, *place, c.uuid, limits))


@helper
def _put_buffer(c, at, h, pointers):
    """Regions of a buffer's vector; 0 if there is something in it that must not be logged."""
    addr, size = np.int64(c.bufs["addr"][h]), np.int64(c.bufs["size"][h])
    daddr = np.int64(c.bufs["daddr"][h])
    if pointers:
        inode_size = c.limits[X.INODE_SIZE]
        return np.int64(
            formats.put_unlinked(c.mem, at, daddr, addr, size, inode_size, c.pointers, 0)
        )
    kind = np.int64(blocks.content_type(c.mem, addr))
    if kind == 0:
        return np.int64(0)
    return np.int64(formats.put_whole(c.mem, at, kind, daddr, addr, size))


@helper
def _put(c, rows, i, item):
    """Copy an object into its item; False if it cannot be logged: a bug."""
    kind, h = rows[i, R_KIND], rows[i, R_OWNER]
    at, regions = np.int64(c.items["vector"][item]), np.int64(0)
    if kind == INODE_ITEM:
        c.inodes["item"][h], c.inodes["seq"][h] = item, c.words[C_SEQ]
    elif h != 0:
        c.bufs["item"][h], c.bufs["seq"][h] = item, c.words[C_SEQ]
    stays = _stays(c, kind, item)
    c.items["cost"][item] = rows[i, R_COST]
    if rows[i, R_OWN] or stays:
        return True
    if kind == INODE_ITEM:
        regions = _put_inode(c, at, h)
    elif kind != ORDERED:
        regions = _put_buffer(c, at, h, kind == POINTERS)
    c.items["kind"][item], c.items["used"][item] = kind, rows[i, R_SIZE]
    c.items["regions"][item] = regions
    return regions != 0 or kind == ORDERED


@helper
def _insert(c, rows, n):
    """Copy all; returns the number of rows, or the first that cannot be logged."""
    for i in range(n):
        item = _adopt(c, rows, i)
        rows[i, R_PLACE] = item
        if not _put(c, rows, i, item):
            return i
    return n


@kernel(lambda: (sample(), np.zeros((1, COLUMNS), np.int64)))
def insert(c, rows):
    """Put what rows stand for into the context; their items are in R_PLACE.

    Returns the number of rows, or the first that cannot be logged: a bug.
    """
    return _insert(c, rows, len(rows))


# -- transactions that are one kernel --------------------------------------------------------------


@helper
def _begin_row(rows, n, kind, owner):
    for k in range(COLUMNS):
        rows[n, k] = 0
    rows[n, R_KIND], rows[n, R_OWNER] = kind, owner
    return n + 1


@helper
def _from_stock(c, rows, i):
    """Give a row the smallest vector in stock that is large enough."""
    stock = c.stock
    for k in range(len(stock)):
        if stock[k, S_ITEM] != 0 and stock[k, S_ROOM] >= rows[i, R_SIZE]:
            rows[i, R_ITEM], rows[i, R_VECTOR] = stock[k, S_ITEM], stock[k, S_VECTOR]
            rows[i, R_ROOM] = stock[k, S_ROOM]
            stock[k, S_ITEM] = 0
            return True
    return False


@kernel(lambda: (sample(), np.zeros(1, np.int64), np.zeros(1, np.int64)))
def insert_touched(c, bufs_touched, inodes_touched):
    """What the lists of `fs.cache.resident` name, which are empty then.

    Returns (rows, bytes that the context grew by, vectors taken from stock, rows that have spare
    memory now); rows are MISSING if there was none, or one could not be logged: a bug.
    """
    rows, n, taken = c.rows, np.int64(0), np.int64(0)
    for i in range(1, bufs_touched[0] + 1):
        h = bufs_touched[i]
        is_cluster = np.int64(c.bufs["ops"][h]) == c.words[C_CLUSTER_OPS]
        n = _begin_row(rows, n, POINTERS if is_cluster else BUFFER, h)
    for i in range(1, inodes_touched[0] + 1):
        n = _begin_row(rows, n, INODE_ITEM, inodes_touched[i])
    bufs_touched[0], inodes_touched[0] = 0, 0
    growth = _measure(c, rows, n)
    for i in range(n):
        if rows[i, R_LACKS]:
            if not _from_stock(c, rows, i):
                return np.int64(MISSING), growth, taken, np.int64(0)
            taken += 1
    if _insert(c, rows, n) != n:
        return np.int64(MISSING), growth, taken, np.int64(0)
    spare = np.int64(0)
    for i in range(n):
        if rows[i, R_ITEM] != 0 or rows[i, R_VECTOR] != 0:
            spare += 1
    return n, growth, taken, spare
