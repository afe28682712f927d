"""Adding and removing one name in a directory whose blocks are in memory.

`plan_add` and `plan_remove` look the name up and find every block that the change touches, in all
four forms; `add` and `remove` change them with the steps that `fs.xfs.dir` and `fs.xfs.dirtree`
take, in their order. Wherever the directory would change its form, or get, give up, split or join
a block, the plan is a MISS and those do it. So is anything that contradicts itself: they know
what to say.

Locking: the directory's ILOCK, exclusively. No await between a plan and its execution.
XFS format: directories.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.jit import helper, kernel
from fs.cache import resident as R
from fs.cache.resident import MISS, addr_of, log_buf, log_inode, sample
from fs.xfs import danode as N
from fs.xfs import dirblock as B
from fs.xfs import dirdata as D
from fs.xfs import dirleaf as F
from fs.xfs import dirsf as S
from fs.xfs import extents as X
from fs.xfs import layout as L
from fs.xfs import residentino as I
from fs.xfs import residenttree as T
from fs.xfs.danode import hash_bytes

SHORT, BLOCK, LEAF, NODE = range(1, 5)
ABSENT, FOUND = 0, 1
SPACE_LOG = 35  # each of a directory's three spaces spans 32 GiB

# Words of the plan.
P_FORM, P_DATA, P_DB, P_OFFSET, P_LEAF, P_SLOT, P_FREE, P_HASH, P_DEPTH = range(I.END, I.END + 9)
P_NODES = P_DEPTH + 1  # (buffer, index) from the root down
assert P_NODES + 2 * N.DEPTH_MAX <= R.PLAN_WORDS


# -- finding blocks -----------------------------------------------------------------------------


@helper
def dir_size(r):
    return np.int64(1) << r.shape[R.G_DIR_LOG]


@helper
def dir_blocks(r):
    return np.int64(1) << (r.shape[R.G_DIR_LOG] - r.shape[R.G_BLOCK_LOG])


@helper
def block_at(r, dp, block, kind):
    """The buffer of the directory block at a file block, or 0."""
    fsbno = T.map_block(r, dp, block, dir_blocks(r))
    if fsbno < 0:
        return np.int64(0)
    return T.find_fsb(r, fsbno, dir_size(r), kind, np.int64(r.inodes["ino"][dp]))


@helper
def data_at(r, dp, db):
    """The buffer of data block db, which must have no leaf inside; or 0."""
    if db < 0 or db >= np.int64(r.inodes["size"][dp]) >> r.shape[R.G_DIR_LOG]:
        return np.int64(0)
    h = block_at(r, dp, db * dir_blocks(r), R.K_DATA)
    return np.int64(0) if h and D.is_block_form(r.mem, addr_of(r, h)) else h


@helper
def hash_at(r, dp, block):
    """The buffer of a block of the hash tree, or 0."""
    first = np.int64(1) << (SPACE_LOG - r.shape[R.G_BLOCK_LOG])
    if block < first or block >= 2 * first:
        return np.int64(0)
    return block_at(r, dp, block, R.K_LEAF)


@helper
def free_at(r, dp, fb):
    """The buffer of free index block fb, or 0."""
    first = np.int64(2) << (SPACE_LOG - r.shape[R.G_BLOCK_LOG])
    h = block_at(r, dp, first + fb * dir_blocks(r), R.K_FREE)
    if h and F.free_first(r.mem, addr_of(r, h)) != fb * F.free_capacity_of(dir_size(r)):
        return np.int64(0)
    return h


@helper
def fork_of(r, dp):
    """Address and size of the data fork."""
    forkoff = np.int64(r.inodes["forkoff"][dp]) << 3
    return T.image_of(r, dp) + L.LITERAL, forkoff if forkoff else r.shape[R.G_LITERAL]


@helper
def form_of(r, dp):
    """The directory's form, with its root block in the plan; or MISS."""
    size, format_ = np.int64(r.inodes["size"][dp]), r.inodes["format"][dp]
    if format_ == L.FMT_LOCAL:
        addr, room = fork_of(r, dp)
        if size > room or S.verify(r.mem, addr, size, dir_size(r), r.limits):
            return np.int64(MISS)
        return np.int64(SHORT)
    if size & (dir_size(r) - 1) or size <= 0 or size > 1 << SPACE_LOG:
        return np.int64(MISS)
    if size == dir_size(r) and format_ == L.FMT_EXTENTS:
        addr, _ = fork_of(r, dp)
        n = np.int64(r.inodes["nextents"][dp])
        if X.lookup(r.mem, addr, n, dir_blocks(r))[0] < 0:
            h = block_at(r, dp, 0, R.K_DATA)
            r.plan[P_DATA] = h
            good = h != 0 and D.is_block_form(r.mem, addr_of(r, h))
            return np.int64(BLOCK if good else MISS)
    h = hash_at(r, dp, np.int64(1) << (SPACE_LOG - r.shape[R.G_BLOCK_LOG]))
    if h == 0:
        return np.int64(MISS)
    r.plan[P_LEAF] = h
    return np.int64(LEAF if F.is_leaf1(r.mem, addr_of(r, h)) else NODE)


# -- looking a name up ----------------------------------------------------------------------------


@helper
def is_node(r, h):
    return N.magic(r.mem, addr_of(r, h)) == L.MAGIC_DA_NODE


@helper
def last_hash(r, h):
    """Largest hash of a node or leaf; -1 for an empty leaf."""
    if is_node(r, h):
        return N.last_hash(r.mem, addr_of(r, h))
    return F.last_hash(r.mem, addr_of(r, h))


@helper
def seek(r, dp, hash_value):
    """Go from the root in the plan to the first leaf that may hold the hash; 0, or MISS."""
    h = r.plan[P_LEAF]
    depth = np.int64(0)
    level = np.int64(0)
    while is_node(r, h):
        addr = addr_of(r, h)
        below = N.level(r.mem, addr)
        if depth == N.DEPTH_MAX or (depth and below != level - 1):
            return np.int64(MISS)
        level = below
        index = min(N.search(r.mem, addr, hash_value), N.count(r.mem, addr) - 1)
        r.plan[P_NODES + 2 * depth], r.plan[P_NODES + 2 * depth + 1] = h, index
        depth += 1
        child = hash_at(r, dp, N.child_at(r.mem, addr, index))
        if child == 0 or last_hash(r, child) > N.hash_at(r.mem, addr, index):
            return np.int64(MISS)
        h = child
    if (depth and level != 1) or N.magic(r.mem, addr_of(r, h)) != L.MAGIC_DIR_LEAFN:
        return np.int64(MISS)
    r.plan[P_LEAF], r.plan[P_DEPTH] = h, depth
    return np.int64(0)


@helper
def find_in_leaf(r, dp, name):
    """Look for a name among its hash's slots of the leaf in the plan: FOUND, ABSENT or MISS."""
    leaf = addr_of(r, r.plan[P_LEAF])
    index, place = F.find(r.mem, leaf, r.plan[P_HASH])
    while index >= 0:
        db, offset = (place << 3) >> r.shape[R.G_DIR_LOG], (place << 3) & (dir_size(r) - 1)
        h = data_at(r, dp, db)
        if h == 0 or not D.entry_at(r.mem, addr_of(r, h), dir_size(r), offset):
            return np.int64(MISS)
        if D.matches(r.mem, addr_of(r, h), offset, name):
            r.plan[P_DATA], r.plan[P_DB], r.plan[P_OFFSET] = h, db, offset
            r.plan[P_SLOT] = index
            return np.int64(FOUND)
        index, place = F.find_next(r.mem, leaf, index)
    return np.int64(ABSENT)


@helper
def look(r, dp, name):
    """Look a name up and note its place, or where it would be: FOUND, ABSENT or MISS."""
    form = form_of(r, dp)
    r.plan[P_FORM] = form
    if form == SHORT:
        addr, _ = fork_of(r, dp)
        r.plan[P_OFFSET] = S.find(r.mem, addr, name)
        return np.int64(FOUND if r.plan[P_OFFSET] else ABSENT)
    if form == BLOCK:
        index, offset = B.find(r.mem, addr_of(r, r.plan[P_DATA]), dir_size(r), name)
        r.plan[P_SLOT], r.plan[P_OFFSET] = index, offset
        return np.int64(FOUND if index >= 0 else ABSENT)
    if form == MISS:
        return form
    r.plan[P_HASH] = hash_bytes(name, 0, len(name))
    r.plan[P_DEPTH] = 0
    if form == NODE and seek(r, dp, r.plan[P_HASH]) < 0:
        return np.int64(MISS)
    found = find_in_leaf(r, dp, name)
    leaf = addr_of(r, r.plan[P_LEAF])
    if found == ABSENT and form == NODE and F.last_hash(r.mem, leaf) == r.plan[P_HASH]:
        return np.int64(MISS)  # names of this hash may go on in the next leaf
    return found


# -- adding ---------------------------------------------------------------------------------------


@helper
def find_room(r, dp, need):
    """Node form: the free index block and the data block that take a name; 0, or MISS."""
    capacity = F.free_capacity_of(dir_size(r))
    blocks = np.int64(r.inodes["size"][dp]) >> r.shape[R.G_DIR_LOG]
    for fb in range((blocks + capacity - 1) // capacity - 1, -1, -1):
        h = free_at(r, dp, fb)
        if h == 0:
            return np.int64(MISS)
        i = F.free_fit(r.mem, addr_of(r, h), need)
        if i >= 0:
            r.plan[P_FREE], r.plan[P_DB] = h, fb * capacity + i
            return np.int64(0)
    return np.int64(MISS)


@helper
def plan_add(r, dp, name, ino):
    """Find room for a name: FOUND if it is there already, ABSENT if it can be added, or MISS."""
    found = look(r, dp, name)
    if found != ABSENT:
        return found
    form, size = r.plan[P_FORM], dir_size(r)
    need = D.entry_size(len(name))
    if form == SHORT:
        addr, room = fork_of(r, dp)
        used = np.int64(r.inodes["size"][dp])
        return np.int64(ABSENT if S.fits(r.mem, addr, used, name, ino, room, size) else MISS)
    if form == BLOCK:
        return np.int64(ABSENT if B.fits(r.mem, addr_of(r, r.plan[P_DATA]), size, name) else MISS)
    leaf = addr_of(r, r.plan[P_LEAF])
    if form == LEAF:
        r.plan[P_DB] = F.best_fit(r.mem, leaf, size, need)
        if r.plan[P_DB] < 0 or not F.fits(r.mem, leaf, size, False):
            return np.int64(MISS)
    else:
        full = F.count_of(r.mem, leaf) >= F.capacity(r.mem, leaf, size)
        if (full and F.stale_of(r.mem, leaf) == 0) or find_room(r, dp, need) < 0:
            return np.int64(MISS)
    r.plan[P_DATA] = data_at(r, dp, r.plan[P_DB])
    if r.plan[P_DATA] == 0 or D.longest(r.mem, addr_of(r, r.plan[P_DATA])) < need:
        return np.int64(MISS)
    return np.int64(ABSENT)


@helper
def set_size(r, dp, size):
    """Both sizes of a directory, which are one."""
    r.inodes["size"][dp] = size
    r.inodes["disk_size"][dp] = size
    log_inode(r, dp)


@helper
def add(r, dp, name, ino, ftype):
    """Carry out `plan_add`."""
    form, size = r.plan[P_FORM], dir_size(r)
    if form == SHORT:
        addr, _ = fork_of(r, dp)
        used = np.int64(r.inodes["size"][dp])
        set_size(r, dp, S.add(r.mem, addr, used, name, ino, ftype, size))
        return
    data = addr_of(r, r.plan[P_DATA])
    log_buf(r, r.plan[P_DATA])
    if form == BLOCK:
        B.add(r.mem, data, size, name, ino, ftype)
        return
    leaf, db = addr_of(r, r.plan[P_LEAF]), r.plan[P_DB]
    offset = D.add(r.mem, data, size, name, ino, ftype)
    note_best(r, D.longest(r.mem, data))
    F.insert(r.mem, leaf, size, r.plan[P_HASH], (db * size + offset) >> 3)
    log_buf(r, r.plan[P_LEAF])
    fix_hashes(r)


@helper
def note_best(r, best):
    """The planned data block's largest unused region has another length."""
    size, db = dir_size(r), r.plan[P_DB]
    if r.plan[P_FORM] == LEAF:
        F.set_best(r.mem, addr_of(r, r.plan[P_LEAF]), size, db, best)
        return
    free = addr_of(r, r.plan[P_FREE])
    F.set_free(r.mem, free, db - F.free_first(r.mem, free), best)
    log_buf(r, r.plan[P_FREE])


@helper
def fix_hashes(r):
    """Carry the leaf's largest hash up the planned nodes."""
    below = r.plan[P_LEAF]
    for depth in range(r.plan[P_DEPTH] - 1, -1, -1):
        h, index = r.plan[P_NODES + 2 * depth], r.plan[P_NODES + 2 * depth + 1]
        node = addr_of(r, h)
        value = last_hash(r, below)
        if N.hash_at(r.mem, node, index) == value:
            return
        N.set_hash(r.mem, node, index, value)
        log_buf(r, h)
        if index + 1 != N.count(r.mem, node):
            return
        below = h


# -- removing -------------------------------------------------------------------------------------


@helper
def stays_block(r, dp, name):
    """Block form: is it certainly too large for shortform once a name is gone?"""
    _, room = fork_of(r, dp)
    size = S.size_of_block(r.mem, addr_of(r, r.plan[P_DATA]), dir_size(r))
    wide = (r.shape[R.G_AGCOUNT] << r.shape[R.G_AGINO_LOG]) > S.SHORT_INO_MAX
    return size < 0 or size - len(name) - 12 - (4 * 256 if wide else 0) > room


@helper
def stays_leaf(r, dp):
    """Leaf form: do its last data block and its number of them keep it from becoming smaller?"""
    leaf, size = addr_of(r, r.plan[P_LEAF]), dir_size(r)
    count = F.bestcount(r.mem, leaf, size)
    if np.int64(r.inodes["size"][dp]) <= size or r.plan[P_DB] >= count:
        return False
    return count < 2 or F.best(r.mem, leaf, size, count - 1) != size - D.HEADER


@helper
def live_count(r, h):
    """Entries of a node, or live ones of a leaf."""
    return N.count(r.mem, addr_of(r, h)) if is_node(r, h) else F.live(r.mem, addr_of(r, h))


@helper
def lonely(r, dp, depth, n):
    """Has the child taken at a node, now with n entries, no neighbour there it would join with?"""
    h, index = r.plan[P_NODES + 2 * depth], r.plan[P_NODES + 2 * depth + 1]
    node = addr_of(r, h)
    header = N.HEADER  # of nodes and leaves alike
    most = (dir_size(r) - header) // N.ENTRY * 3 // 4
    for other in (index + 1, index - 1):
        if other < 0 or other >= N.count(r.mem, node):
            continue
        sibling = hash_at(r, dp, N.child_at(r.mem, node, other))
        if sibling == 0 or n + live_count(r, sibling) <= most:
            return False
    return True


@helper
def stays_tree(r, dp):
    """Node form: does the tree keep all its blocks when the planned slot becomes stale?"""
    depth = r.plan[P_DEPTH]
    if depth == 0 or N.count(r.mem, addr_of(r, r.plan[P_NODES])) < 2:
        return False
    below = r.plan[P_LEAF]
    n = live_count(r, below) - 1
    if n >= (dir_size(r) - F.HEADER) // F.ENTRY // 2:
        return True
    if n == 0:
        return False
    for d in range(depth - 1, -1, -1):
        h, index = r.plan[P_NODES + 2 * d], r.plan[P_NODES + 2 * d + 1]
        if N.hash_at(r.mem, addr_of(r, h), index) != last_hash(r, below) or not lonely(r, dp, d, n):
            return False
        below, n = h, N.count(r.mem, addr_of(r, h))
    return True


@helper
def found_ino(r, dp):
    """The inode number of the entry that `look` found."""
    if r.plan[P_FORM] == SHORT:
        return S.entry_ino(r.mem, fork_of(r, dp)[0], r.plan[P_OFFSET])[0]
    return D.entry_ino(r.mem, addr_of(r, r.plan[P_DATA]), r.plan[P_OFFSET])[0]


@helper
def stays_node(r, dp):
    """Node form: do the free index and the tree keep their blocks? Notes the free index block."""
    capacity = F.free_capacity_of(dir_size(r))
    free = free_at(r, dp, r.plan[P_DB] // capacity)
    r.plan[P_FREE] = free
    if free == 0:
        return False
    if F.free_best(r.mem, addr_of(r, free), r.plan[P_DB] % capacity) == F.NULL_BEST:
        return False
    return stays_tree(r, dp)


@helper
def plan_remove(r, dp, name):
    """Find a name and all that its removal changes; its inode's number, or MISS."""
    if look(r, dp, name) != FOUND:
        return np.int64(MISS)
    form, size = r.plan[P_FORM], dir_size(r)
    stays = True
    if form == BLOCK:
        stays = stays_block(r, dp, name)
    elif form != SHORT:
        data = addr_of(r, r.plan[P_DATA])
        if r.plan[P_DB] > 0 and D.is_alone(r.mem, data, size, r.plan[P_OFFSET]):
            return np.int64(MISS)
        stays = stays_leaf(r, dp) if form == LEAF else stays_node(r, dp)
    return found_ino(r, dp) if stays else np.int64(MISS)


@helper
def remove(r, dp):
    """Carry out `plan_remove`."""
    form, size, offset = r.plan[P_FORM], dir_size(r), r.plan[P_OFFSET]
    if form == SHORT:
        addr, _ = fork_of(r, dp)
        set_size(r, dp, S.remove(r.mem, addr, np.int64(r.inodes["size"][dp]), offset))
        return
    data = addr_of(r, r.plan[P_DATA])
    log_buf(r, r.plan[P_DATA])
    if form == BLOCK:
        B.remove(r.mem, data, size, r.plan[P_SLOT], offset)
        return
    D.remove(r.mem, data, size, offset)
    F.make_stale(r.mem, addr_of(r, r.plan[P_LEAF]), r.plan[P_SLOT])
    log_buf(r, r.plan[P_LEAF])
    note_best(r, D.longest(r.mem, data))


# -- looking, for `fs.xfs.dir` ------------------------------------------------------------------


@kernel(lambda: (sample(), 1, D.NAME))
def lookup(r, dp, name):
    """(FOUND, ino, ftype) of a name other than "." and "..", (ABSENT, 0, 0), or (MISS, 0, 0)."""
    found = look(r, dp, name)
    if found != FOUND:
        return found, np.int64(0), np.int64(0)
    if r.plan[P_FORM] == SHORT:
        ino, ftype = S.entry_ino(r.mem, fork_of(r, dp)[0], r.plan[P_OFFSET])
    else:
        ino, ftype = D.entry_ino(r.mem, addr_of(r, r.plan[P_DATA]), r.plan[P_OFFSET])
    return found, ino, ftype
