"""Metadata that is in memory, as kernels see it: one tuple, and how they find and dirty buffers.

A transaction whose blocks are all in core needs nothing but looking and changing, which kernels do
at once: they look everything up first, note in `plan` what they found, and change nothing unless
all of it is there, sound and has room. Whatever they miss is the business of the general path, so
they have no errors of their own: MISS means "ask the other one".

`shape` holds numbers of the geometry (G_*), and for each kind of buffer the number that the cache
knows its BufOps by. A block that is in several pieces, or was verified as something else, is a
MISS.

Locking: trio thread only, and no await between the kernel that plans and the kernel that acts.
The caller holds the locks that guard the blocks; buffers need no hold, for nobody can reclaim one
meanwhile.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from alloc.buddy import RIGHTS_LOW, WOULD_BLOCK
from alloc.jit import helper
from alloc.magazine import object_alloc, object_free
from alloc.mempolicy import NONE
from alloc.page import Slabs
from alloc.placement import place
from alloc.rows import TRIO
from fs.cache import dentry
from fs.cache import inodetable as table
from fs.cache.buf import (
    BUF,
    F_PIECES,
    F_REFERENCED,
    F_VALID,
    H_WORDS,
    keep_in_log,
    mark_dirty,
)
from fs.cache.dentry import DENTRY
from fs.cache.incore import INODE, S_VALID
from fs.cache.thread import chain_find
from fs.log import ail

if TYPE_CHECKING:
    from fs.cache.buf import BufOps
    from fs.volume import Volume

MISS = -1
TOUCHED = 64  # words of a list of what a kernel changed; the first is their number
NOBODY = 0  # owner of a buffer that was verified without one

# Indices into `shape`.
G_BLOCK_LOG, G_BLOCK_SIZE, G_SECTOR_SIZE, G_AGCOUNT, G_AG_BLOCKS, G_AG_BLOCK_LOG = range(6)
G_LAST_AG, G_HEADERS, G_INODE_LOG, G_INOPBLOG, G_AGINO_LOG, G_CLUSTER_BLOCKS = range(6, 12)
G_CLUSTER_BYTES, G_INODE_ALIGN, G_CHUNK_BLOCKS, G_DIR_LOG, G_FINOBT, G_SPARSE = range(12, 18)
G_LITERAL, G_FLAGS2, G_RECORDS, G_IMAGES, G_DENTRIES, G_OPS = range(18, 24)
# Kinds of buffers: their BufOps numbers are at G_OPS + kind.
K_AGI, K_INO, K_FINO, K_CLUSTER, K_DATA, K_LEAF, K_FREE, K_BMAP, KINDS = range(9)
PLAN_WORDS = 96
RECORD_BYTES = 32


class Resident(NamedTuple):
    """Arrays over the arena and the caches of one volume."""

    mem: Any  # the arena's bytes
    bufs: Any  # BUF records
    head: Any  # the buffer cache's words
    buckets: Any
    inodes: Any  # INODE records
    inode_head: Any
    inode_buckets: Any
    dentries: Any  # DENTRY records
    dentry_head: Any
    dentry_buckets: Any
    slabs: Slabs
    shape: Any
    limits: Any  # of fs.xfs.inode
    uuid: Any
    space_lock: Any  # the word of the volume's space lock
    record: Any  # bytes of one record on its way into a tree
    plan: Any  # what the planning kernel found; each module has its words
    held: ail.Held
    bufs_touched: Any  # handles of what the kernel changed, for the log
    inodes_touched: Any


def sample() -> Resident:
    """Values of the right types, for signatures."""
    words = np.zeros(1, np.int64)
    links = np.zeros(1, np.uint32)
    bits = np.zeros(1, np.uint64)
    pages = np.zeros(1, np.uint8), np.zeros(1, np.int32)
    return Resident(
        np.zeros(1, np.uint8),
        np.zeros(1, BUF),
        np.zeros(H_WORDS, np.int64),
        links,
        np.zeros(1, INODE),
        np.zeros(table.H_WORDS, np.int64),
        links,
        np.zeros(1, DENTRY),
        np.zeros(dentry.H_WORDS, np.int64),
        links,
        Slabs(words, links, *pages, links, links, links, bits, bits),
        words,
        words,
        np.zeros(16, np.uint8),
        links,
        np.zeros(RECORD_BYTES, np.uint8),
        np.zeros(PLAN_WORDS, np.int64),
        ail.sample(),
        words,
        words,
    )


def of_volume(vol: Volume, kinds: tuple[BufOps, ...], limits: Any, flags2: int) -> Resident:
    """The tuple of a started volume; `kinds` in the order of K_*."""
    geo = vol.geo
    shape = np.zeros(G_OPS + KINDS, np.int64)
    shape[:G_OPS] = (
        geo.block_log,
        geo.block_size,
        geo.sector_size,
        geo.agcount,
        geo.ag_blocks,
        geo.ag_block_log,
        geo.ag_length(geo.agcount - 1),
        geo.ag_header_blocks,
        geo.inode_log,
        geo.inopblog,
        geo.agino_log,
        geo.cluster_blocks,
        geo.cluster_bytes,
        geo.inode_align,
        geo.chunk_blocks,
        geo.dir_block_log,
        geo.has_finobt,
        geo.has_sparse,
        geo.literal_size,
        flags2,
        *vol.inodes.slabs,
        vol.dentries.slab,
    )
    shape[G_OPS:] = [vol.bufs.number_of(ops) for ops in kinds]
    return Resident(
        vol.arena.mem,
        *vol.bufs.words,
        *vol.inodes.words,
        *vol.dentries.words,
        vol.arena.slabs,
        shape,
        limits,
        np.frombuffer(geo.uuid, np.uint8).copy(),
        vol.space_lock.words,
        np.zeros(RECORD_BYTES, np.uint8),
        np.zeros(PLAN_WORDS, np.int64),
        vol.bufs.ail.held,
        np.zeros(TOUCHED, np.int64),
        np.zeros(TOUCHED, np.int64),
    )


@helper
def _note(touched, h):
    """Put a handle on a list, once."""
    n = touched[0]
    for i in range(1, n + 1):
        if touched[i] == h:
            return
    touched[n + 1] = h
    touched[0] = n + 1


@helper
def find_buf(r, daddr, size, kind, owner):
    """The valid buffer of a block that was verified as this kind for this owner, or 0."""
    h = chain_find(r.bufs["daddr"], r.bufs["hash_next"], r.buckets, daddr)
    if h == 0:
        return np.int64(0)
    flags = np.int64(r.bufs["flags"][h])
    if flags & (F_VALID | F_PIECES) != F_VALID or np.int64(r.bufs["size"][h]) != size:
        return np.int64(0)
    if np.int64(r.bufs["ops"][h]) != r.shape[G_OPS + kind] or r.bufs["owner"][h] != owner:
        return np.int64(0)
    r.bufs["flags"][h] |= F_REFERENCED
    return h


@helper
def addr_of(r, h):
    """Where a buffer's bytes begin."""
    return np.int64(r.bufs["addr"][h])


@helper
def log_buf(r, h):
    """The buffer was changed, and is to be logged."""
    mark_dirty(r.bufs, r.head, h)
    _note(r.bufs_touched, h)


@helper
def deliver(r, i, h):
    """In-core inode i is in its cluster's buffer, which keeps the log for it from here on."""
    clean_inode(r, i)
    mark_dirty(r.bufs, r.head, h)
    seq = r.inodes["held"][i]
    if seq != 0:
        keep_in_log(r.bufs, r.held, h, seq)
        ail.release(r.held, seq)
        r.inodes["held"][i] = 0


@helper
def log_inode(r, i):
    """The in-core inode was changed, and is to be logged."""
    table.mark_dirty(r.inodes, r.inode_head, i)
    _note(r.inodes_touched, i)


@helper
def clean_inode(r, i):
    """The in-core inode agrees with its cluster."""
    table.mark_clean(r.inodes, r.inode_head, i)


@helper
def first_dirty(r):
    """The inode that has been dirty longest, or 0."""
    return r.inode_head[table.H_DIRTY]


@helper
def remember(r, dp, name, ino, ftype):
    """Have the dentry cache say what a name in a directory is; ino 0: nothing."""
    d = r.inodes[dp]
    parent, gen = np.int64(d.ino), np.int64(d.gen)
    state = r.mem, r.dentries, r.dentry_head, r.dentry_buckets
    dentry.remember(*state, r.slabs, r.shape[G_DENTRIES], parent, gen, name, ino, ftype)


@helper
def find_inode(r, ino):
    """The record of an inode that is in core, in use or freed; 0 if there is none that is valid."""
    i = chain_find(r.inodes["ino"], r.inodes["hash_next"], r.inode_buckets, ino)
    return i if i and r.inodes["state"][i] & S_VALID else np.int64(0)


@helper
def hold_inode(r, i):
    """One more reference."""
    r.inodes["refs"][i] += np.uint32(1)
    if r.inodes["refs"][i] == 1:
        table.lru_remove(r.inodes, r.inode_head, i)


@helper
def new_inode(r, ino, gen):
    """The in-core inode of an ino that is to be allocated, with one reference; 0: no memory now.

    The record of the freed one, with its own gen, if that is still in core.
    """
    i = chain_find(r.inodes["ino"], r.inodes["hash_next"], r.inode_buckets, ino)
    if i:
        if not r.inodes["state"][i] & S_VALID or r.inodes["mode"][i]:
            return np.int64(0)
        hold_inode(r, i)
        table.renew(r.inodes, r.inode_head, r.mem, i, r.shape[G_INODE_LOG])
        return i
    where = place(r.slabs.words, NONE, 0, 0)
    image = object_alloc(r.slabs, r.mem, r.shape[G_IMAGES], RIGHTS_LOW | where, TRIO)
    if image == WOULD_BLOCK:
        return np.int64(0)
    i = object_alloc(r.slabs, r.mem, r.shape[G_RECORDS], RIGHTS_LOW | where, TRIO)
    if i == WOULD_BLOCK:
        object_free(r.slabs, r.shape[G_IMAGES], abs(image), TRIO)
        return np.int64(0)
    table.begin(r.inodes, r.inode_head, r.inode_buckets, abs(i), ino, abs(image), gen)
    return abs(i)


@helper
def ag_length(r, agno):
    """Blocks of an AG."""
    if agno == r.shape[G_AGCOUNT] - 1:
        return r.shape[G_LAST_AG]
    return r.shape[G_AG_BLOCKS]


@helper
def daddr_of(r, agno, agbno):
    """daddr of a block of an AG, MISS if there is no such block."""
    if agno < 0 or agno >= r.shape[G_AGCOUNT]:
        return np.int64(MISS)
    if agbno < r.shape[G_HEADERS] or agbno >= ag_length(r, agno):
        return np.int64(MISS)
    return (agno * r.shape[G_AG_BLOCKS] + agbno) << (r.shape[G_BLOCK_LOG] - 9)
