"""Taking and giving back one inode whose records are in memory.

`plan_take` finds the free inode that `fs.xfs.inobt` would take and checks all that it would check;
`take` changes both trees' records and the AGI's count. `plan_give` and `give` are the reverse, and
`plan_list`, `plan_unlist` and what follows them do the unlinked lists'. A plan that is good can be
carried out without looking again, as long as nobody awaits in between.

Chunks come and go, and tree blocks split and join, in `fs.xfs.inobt` only: those are MISS here.
`flush` takes dirty in-core inodes to their clusters, as long as these are in memory.

Locking: the space lock; `flush` takes none. XFS format: inode chunks, unlinked lists.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import count_trailing_zeros
from alloc.jit import helper, kernel
from alloc.libc import memcpy
from fs.cache import inodetable as table
from fs.cache import resident as R
from fs.cache.incore import S_VALID
from fs.cache.resident import (
    MISS,
    addr_of,
    ag_length,
    clean_inode,
    find_buf,
    log_buf,
    log_inode,
    sample,
)
from fs.cache.thread import chain_find
from fs.log import ail
from fs.xfs import btblock as bt
from fs.xfs import inode
from fs.xfs import layout as L
from fs.xfs import residenttree as T
from fs.xfs.be import get16, get32, get64, put32, put64

CHUNK = 64
NULL32 = L.NULL32
UNLINKED_BUCKETS = 64
AGI_SECTOR = 2
A_ROOT, A_LEVEL = L.off(L.AGI, "root"), L.off(L.AGI, "level")
A_FREE_ROOT, A_FREE_LEVEL = L.off(L.AGI, "free_root"), L.off(L.AGI, "free_level")
A_FREECOUNT, A_UNLINKED = L.off(L.AGI, "freecount"), L.off(L.AGI, "unlinked")
A_NEWINO = L.off(L.AGI, "newino")
REC_HOLES, REC_COUNT, REC_FREECOUNT, REC_MASK = 4, 6, 7, 8

# Words of the plan. Directories have theirs behind these.
P_INO, P_GEN, P_AGI, P_CLUSTER, P_IMAGE, P_BIT, P_FRONT, P_FRONT_IMAGE = range(8)
P_CHUNKS = 8  # way in the inobt
P_FREES = P_CHUNKS + 1 + 3 * T.STEP  # way in the finobt
END = P_FREES + 1 + 3 * T.STEP
LEVELS = 3  # trees higher than that (a million chunks of an AG) are left to the general path
assert END <= 40

@helper
def ones(mask):
    """Bits that are set."""
    x = np.uint64(mask)
    n = np.int64(0)
    while x != np.uint64(0):
        x &= x - np.uint64(1)
        n += 1
    return n


@helper
def hole_bits(holes):
    """One bit an inode from one bit a group of four."""
    bits = np.uint64(0)
    for group in range(16):
        if (holes >> group) & 1:
            bits |= np.uint64(0xF) << np.uint64(4 * group)
    return bits


@helper
def holes_of(r, at):
    """Mask of the inodes that a record's chunk lacks."""
    if not r.shape[R.G_SPARSE]:
        return np.uint64(0)
    holes = get16(r.mem, at + REC_HOLES)
    return hole_bits(holes) if holes else np.uint64(0)


@helper
def sound(r, agno, at):
    """Is the record what `inobt.check` calls a good one?"""
    start = get32(r.mem, at)
    agbno = start >> r.shape[R.G_INOPBLOG]
    align = r.shape[R.G_INODE_ALIGN]
    unit = min(CHUNK, align << r.shape[R.G_INOPBLOG])
    if start % unit or agbno % align or agbno < r.shape[R.G_HEADERS]:
        return False
    if agbno + r.shape[R.G_CHUNK_BLOCKS] > ag_length(r, agno):
        return False
    holes = holes_of(r, at)
    if r.shape[R.G_SPARSE] and np.int64(r.mem[at + REC_COUNT]) != CHUNK - ones(holes):
        return False
    return np.int64(r.mem[at + REC_FREECOUNT]) == ones(get64(r.mem, at + REC_MASK) & ~holes)


@helper
def same_rec(r, a, b):
    """Are two records equal?"""
    return get64(r.mem, a) == get64(r.mem, b) and get64(r.mem, a + 8) == get64(r.mem, b + 8)


@helper
def find_agi(r, agno):
    """The AGI's buffer, or 0."""
    sector = r.shape[R.G_SECTOR_SIZE]
    daddr = ((agno * r.shape[R.G_AG_BLOCKS]) << (r.shape[R.G_BLOCK_LOG] - 9)) + (
        AGI_SECTOR * (sector >> 9)
    )
    return find_buf(r, daddr, sector, R.K_AGI, agno)


@helper
def find_cluster(r, agno, agino):
    """The buffer of an inode's cluster and the address of its image in it, or (0, 0)."""
    agbno = agino >> r.shape[R.G_INOPBLOG]
    first = agbno - agbno % r.shape[R.G_CLUSTER_BLOCKS]
    daddr = R.daddr_of(r, agno, first)
    h = np.int64(0)
    if daddr >= 0:
        h = find_buf(r, daddr, r.shape[R.G_CLUSTER_BYTES], R.K_CLUSTER, R.NOBODY)
    if h == 0:
        return np.int64(0), np.int64(0)
    index = agino & ((np.int64(1) << r.shape[R.G_INOPBLOG]) - 1)
    offset = ((agbno - first) << r.shape[R.G_BLOCK_LOG]) + (index << r.shape[R.G_INODE_LOG])
    return h, addr_of(r, h) + offset


@helper
def walk_chunks(r, agno, agi, agino):
    """Way in the inobt to an agino."""
    levels = get32(r.mem, agi + A_LEVEL)
    if levels > LEVELS:
        return np.int64(MISS)
    root = get32(r.mem, agi + A_ROOT)
    return T.walk(r, P_CHUNKS, bt.INO, R.K_INO, agno, root, levels, agino)


@helper
def walk_frees(r, agno, agi, agino):
    """Way in the finobt to an agino."""
    levels = get32(r.mem, agi + A_FREE_LEVEL)
    if levels > LEVELS or not r.shape[R.G_FINOBT]:
        return np.int64(MISS)
    root = get32(r.mem, agi + A_FREE_ROOT)
    return T.walk(r, P_FREES, bt.FINO, R.K_FINO, agno, root, levels, agino)


# -- taking -----------------------------------------------------------------------------------


@helper
def nearest(r, agno, agi, near):
    """Address of the finobt record nearest to an agino, the way ending there, or MISS."""
    found = walk_frees(r, agno, agi, near)
    if found < 0:
        return np.int64(MISS)
    i, n = r.plan[T.at(P_FREES, 0, T.INDEX)], r.plan[T.at(P_FREES, 0, T.COUNT)]
    before = i if found else i - 1
    behind = before + 1
    if n == 0 or (r.plan[P_FREES] > 1 and (before < 0 or behind >= n)):
        return np.int64(MISS)  # the nearest may be in a neighbouring leaf
    leaf = r.plan[T.at(P_FREES, 0, T.ADDR)]
    best = before if before >= 0 else behind
    if before >= 0 and behind < n:
        left = get32(r.mem, bt.rec_at(leaf, bt.FINO, before))
        right = get32(r.mem, bt.rec_at(leaf, bt.FINO, behind))
        if right - near < near - left:
            best = behind
    r.plan[T.at(P_FREES, 0, T.INDEX)] = best
    return bt.rec_at(leaf, bt.FINO, best)


@helper
def plan_take(r, parent):
    """Find the inode that a file in directory `parent` gets; 0, or MISS."""
    agno = parent >> r.shape[R.G_AGINO_LOG]
    h = find_agi(r, agno)
    if h == 0:
        return np.int64(MISS)
    agi = addr_of(r, h)
    r.plan[P_AGI] = h
    if get32(r.mem, agi + A_FREECOUNT) == 0:
        return np.int64(MISS)
    near = parent & ((np.int64(1) << r.shape[R.G_AGINO_LOG]) - 1)
    rec = nearest(r, agno, agi, near)
    if rec < 0 or not sound(r, agno, rec):
        return np.int64(MISS)
    usable = get64(r.mem, rec + REC_MASK) & ~holes_of(r, rec)
    start = get32(r.mem, rec)
    if usable == np.uint64(0) or walk_chunks(r, agno, agi, start) != 1:
        return np.int64(MISS)
    if not same_rec(r, rec, T.leaf_rec(r, P_CHUNKS, bt.INO)):
        return np.int64(MISS)
    if r.mem[rec + REC_FREECOUNT] == 1 and not T.can_delete(r, P_FREES, bt.FINO):
        return np.int64(MISS)
    bit = np.int64(count_trailing_zeros(usable))
    ino = (agno << r.shape[R.G_AGINO_LOG]) | (start + bit)
    r.plan[P_BIT], r.plan[P_INO] = bit, ino
    return plan_generation(r, agno, ino)


@helper
def plan_generation(r, agno, ino):
    """Note which generation an inode has that must be free; 0, or MISS.

    One that was freed not long ago is in core, and its cluster may not know it yet.
    """
    i = R.find_inode(r, ino)
    if i != 0:
        r.plan[P_GEN] = np.int64(r.inodes["gen"][i])
        return np.int64(MISS if r.inodes["mode"][i] else 0)
    cluster, image = find_cluster(r, agno, ino & ((np.int64(1) << r.shape[R.G_AGINO_LOG]) - 1))
    if cluster == 0 or get16(r.mem, image + inode.MODE):
        return np.int64(MISS)
    if inode.verify_image(r.mem, image, ino, r.uuid, r.limits):
        return np.int64(MISS)
    r.plan[P_GEN] = get32(r.mem, image + inode.GEN)
    return np.int64(0)


@helper
def change_rec(r, at, bit, free):
    """Mark inode `bit` of the record at `at` free or not."""
    one = np.uint64(1) << np.uint64(bit)
    mask = get64(r.mem, at + REC_MASK)
    put64(r.mem, at + REC_MASK, mask | one if free else mask & ~one)
    r.mem[at + REC_FREECOUNT] += np.uint8(1 if free else 255)


@helper
def count_free(r, delta):
    agi = addr_of(r, r.plan[P_AGI])
    put32(r.mem, agi + A_FREECOUNT, get32(r.mem, agi + A_FREECOUNT) + delta)
    log_buf(r, r.plan[P_AGI])


@helper
def take(r):
    """Carry out `plan_take`."""
    bit = r.plan[P_BIT]
    change_rec(r, T.leaf_rec(r, P_CHUNKS, bt.INO), bit, False)
    log_buf(r, r.plan[T.at(P_CHUNKS, 0, T.BUF)])
    rec = T.leaf_rec(r, P_FREES, bt.FINO)
    if r.mem[rec + REC_FREECOUNT] == 1:
        T.deleted(r, P_FREES, bt.FINO)
    else:
        change_rec(r, rec, bit, False)
        log_buf(r, r.plan[T.at(P_FREES, 0, T.BUF)])
    count_free(r, -1)


# -- giving back ------------------------------------------------------------------------------


@helper
def plan_give(r, ino):
    """Look up all that freeing an inode changes; 0, or MISS."""
    agno = ino >> r.shape[R.G_AGINO_LOG]
    agino = ino & ((np.int64(1) << r.shape[R.G_AGINO_LOG]) - 1)
    h = find_agi(r, agno)
    if h == 0:
        return np.int64(MISS)
    agi = addr_of(r, h)
    r.plan[P_AGI] = h
    found = walk_chunks(r, agno, agi, agino)
    if found < 0 or not T.before(r, P_CHUNKS, found):
        return np.int64(MISS)
    rec = T.leaf_rec(r, P_CHUNKS, bt.INO)
    start = get32(r.mem, rec)
    bit = agino - start
    if bit >= CHUNK:
        return np.int64(MISS)
    mask = get64(r.mem, rec + REC_MASK)
    after = mask | (np.uint64(1) << np.uint64(bit))
    if not sound(r, agno, rec) or after == mask or after == ~np.uint64(0):
        return np.int64(MISS)
    listed = walk_frees(r, agno, agi, start)
    if listed < 0 or listed != (1 if r.mem[rec + REC_FREECOUNT] else 0):
        return np.int64(MISS)
    if listed and not same_rec(r, rec, T.leaf_rec(r, P_FREES, bt.FINO)):
        return np.int64(MISS)
    if not listed and not T.can_insert(r, P_FREES, bt.FINO):
        return np.int64(MISS)
    r.plan[P_BIT] = bit
    return plan_cluster(r, agno, agino)


@helper
def plan_cluster(r, agno, agino):
    """Note where the inode's image is; 0, or MISS."""
    cluster, image = find_cluster(r, agno, agino)
    r.plan[P_CLUSTER], r.plan[P_IMAGE] = cluster, image
    return np.int64(0 if cluster else MISS)


@helper
def give(r):
    """Carry out `plan_give`."""
    bit = r.plan[P_BIT]
    rec = T.leaf_rec(r, P_CHUNKS, bt.INO)
    listed = r.mem[rec + REC_FREECOUNT] != 0
    change_rec(r, rec, bit, True)
    log_buf(r, r.plan[T.at(P_CHUNKS, 0, T.BUF)])
    if listed:
        change_rec(r, T.leaf_rec(r, P_FREES, bt.FINO), bit, True)
        log_buf(r, r.plan[T.at(P_FREES, 0, T.BUF)])
    else:
        T.inserted(r, P_FREES, bt.FINO, rec)
    count_free(r, 1)


# -- unlinked lists -----------------------------------------------------------------------------


@helper
def head_at(r, agino):
    """Address of the head of an agino's list in the planned AGI."""
    return addr_of(r, r.plan[P_AGI]) + A_UNLINKED + 4 * (agino % UNLINKED_BUCKETS)


@helper
def plan_list(r, ino):
    """Look up what putting an inode on its unlinked list changes; 0, or MISS."""
    agno = ino >> r.shape[R.G_AGINO_LOG]
    agino = ino & ((np.int64(1) << r.shape[R.G_AGINO_LOG]) - 1)
    r.plan[P_AGI] = find_agi(r, agno)
    if r.plan[P_AGI] == 0 or get32(r.mem, head_at(r, agino)) == agino:
        return np.int64(MISS)
    return plan_cluster(r, agno, agino)


@helper
def enlist(r, i):
    """Carry out `plan_list` for in-core inode i."""
    ino = np.int64(r.inodes["ino"][i])
    agino = ino & ((np.int64(1) << r.shape[R.G_AGINO_LOG]) - 1)
    at = head_at(r, agino)
    head = get32(r.mem, at)
    set_next(r, r.plan[P_CLUSTER], r.plan[P_IMAGE], head)
    put32(r.mem, at, agino)
    log_buf(r, r.plan[P_AGI])
    r.inodes["unlinked_prev"][i] = 0
    remember(r, ino - agino, head, agino)


@helper
def set_next(r, cluster, image, agino):
    """Change an image's link unless it says so already."""
    if inode.next_unlinked(r.mem, image) != agino:
        inode.set_next_unlinked(r.mem, image, agino, np.int64(1) << r.shape[R.G_INODE_LOG])
        log_buf(r, cluster)


@helper
def remember(r, base, agino, before):
    """Tell the in-core inode `agino`, if there is one in use, who is in front of it now."""
    if agino == NULL32:
        return
    i = chain_find(r.inodes["ino"], r.inodes["hash_next"], r.inode_buckets, base + agino)
    if i and r.inodes["state"][i] & S_VALID and r.inodes["mode"][i]:
        r.inodes["unlinked_prev"][i] = before


@helper
def plan_unlist(r, i):
    """Behind `plan_give`: find who points at the inode on its list; 0, or MISS."""
    ino = np.int64(r.inodes["ino"][i])
    agino = ino & ((np.int64(1) << r.shape[R.G_AGINO_LOG]) - 1)
    r.plan[P_FRONT] = 0
    if get32(r.mem, head_at(r, agino)) == agino:
        return np.int64(0)
    front, image = find_cluster(
        r, ino >> r.shape[R.G_AGINO_LOG], np.int64(r.inodes["unlinked_prev"][i])
    )
    if front == 0 or not r.inodes["unlinked_prev"][i]:
        return np.int64(MISS)
    if inode.next_unlinked(r.mem, image) != agino:
        return np.int64(MISS)
    r.plan[P_FRONT], r.plan[P_FRONT_IMAGE] = front, image
    return np.int64(0)


@helper
def unlist(r, i):
    """Carry out `plan_unlist`."""
    ino = np.int64(r.inodes["ino"][i])
    agino = ino & ((np.int64(1) << r.shape[R.G_AGINO_LOG]) - 1)
    behind = inode.next_unlinked(r.mem, r.plan[P_IMAGE])
    before = np.int64(0)
    if r.plan[P_FRONT]:
        before = np.int64(r.inodes["unlinked_prev"][i])
        set_next(r, r.plan[P_FRONT], r.plan[P_FRONT_IMAGE], behind)
    else:
        put32(r.mem, head_at(r, agino), behind)
        log_buf(r, r.plan[P_AGI])
    set_next(r, r.plan[P_CLUSTER], r.plan[P_IMAGE], NULL32)
    r.inodes["unlinked_prev"][i] = 0
    remember(r, ino - agino, behind, before)


@helper
def set_free(r, i):
    """The in-core inode is free, of the next generation."""
    t = r.inodes[i]
    t.mode = t.nlink = 0
    t.size = t.disk_size = t.nblocks = t.nextents = t.anextents = 0
    t.forkoff = t.flags = 0
    t.format = t.aformat = L.FMT_EXTENTS
    t.flags2 = r.shape[R.G_FLAGS2]
    t.gen = (np.int64(t.gen) + 1) & NULL32
    log_inode(r, i)


@helper
def free_inode(r, i):
    """Take an inode off its unlinked list and free it, as `inobt.free` does; 0, or MISS."""
    ino = np.int64(r.inodes["ino"][i])
    if plan_give(r, ino) < 0 or plan_unlist(r, i) < 0:
        return np.int64(MISS)
    unlist(r, i)
    give(r)
    set_free(r, i)
    return np.int64(0)


# -- to the clusters --------------------------------------------------------------------------


@helper
def _may_go(r, i, most):
    """Is all of a dirty inode in the log, by a checkpoint up to `most`, and nobody at it?"""
    if r.inodes["ilock"][i] != 0 or r.inodes["held"][i] > most:
        return False
    return not ail.is_pinned(r.held, r.inodes["seq"][i])


@helper
def _deliver(r, i, cluster, image):
    size = np.int64(1) << r.shape[R.G_INODE_LOG]
    forks = T.image_of(r, i) + L.LITERAL
    memcpy(r.mem, image + L.LITERAL, r.mem, forks, size - L.LITERAL)
    inode.pack_core(r.mem, image, r.inodes, i, r.uuid, r.limits)
    R.deliver(r, i, cluster)


@kernel(lambda: (sample(), 1, 1))
def flush(r, looks, most):
    """Copy dirty inodes into their clusters, those that are dirty longest first.

    Looks at `looks` of them, and passes by those that may not go or hold a checkpoint behind
    `most`. Returns the handle of one whose cluster has to be read first, else 0.
    """
    for _ in range(looks):
        i = R.first_dirty(r)
        if i == 0:
            break
        if not _may_go(r, i, most):
            clean_inode(r, i)
            table.mark_dirty(r.inodes, r.inode_head, i)  # the last one now
            continue
        ino = np.int64(r.inodes["ino"][i])
        agno = ino >> r.shape[R.G_AGINO_LOG]
        agino = ino & ((np.int64(1) << r.shape[R.G_AGINO_LOG]) - 1)
        cluster, image = find_cluster(r, agno, agino)
        if cluster == 0:
            return i
        _deliver(r, i, cluster, image)
    return np.int64(0)


@kernel(lambda: (sample(), 1, 1, 1))
def flush_one(r, i, cluster, image):
    """The same for an inode whose cluster had to be read; it may have changed since."""
    if _may_go(r, i, ail.EVERYTHING):
        _deliver(r, i, cluster, image)

