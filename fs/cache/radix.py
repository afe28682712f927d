"""The radix tree of a mapping: file page index -> folio, with dirty, towrite and writeback tags.

A node is a slab record of 512 bytes with 64 slots. A slot holds the pfn of a folio's first page,
or (bit 31 set) the handle of a node one level down, or (bits 31 and 30 are 0 and 1) the shadow of
an evicted folio, which every lookup takes for nothing; 0 is empty. A folio of order n (at most 11)
covers 2^n indices: all slots of it name it, orders of six and more sit one level up, and its tags
are kept on its first slot. A tag bit in a node says that something below carries the tag. Nodes
are never empty; an empty tree has no node at all.

The root (`ROOT`) lies in the record of the object that owns the mapping; kernels get its word
index in `m4`, the arena viewed as 32-bit words (`m8`: as 64-bit words). Entry points take the
root's spin lock, so that any thread may call them; the helpers expect it held. Nothing here
allocates or waits: `insert` is handed spare nodes and says how many it wants. Nodes with nothing
but shadows are on a list of the trio thread's, who alone erases (fs/cache/shadow.py).
"""

import numpy as np

from alloc.atomic import spin_lock, spin_unlock
from alloc.jit import helper, kernel
from alloc.workingset import SHADOW_BITS

SLOTS = 64
LEVEL_ORDER = 6  # folios of an order below it lie in the lowest nodes
DIRTY, TOWRITE, WRITEBACK = 0, 1, 2
ANY = -1  # instead of a tag: every folio

NODE = np.dtype(
    [
        ("slots", "<u4", SLOTS),
        ("tags", "<u8", 3),  # dirty, towrite, writeback: one bit a slot
        ("parent", "<u4"),  # handle, 0 for the top node
        ("offset", "<u4"),  # slot in the parent
        ("count", "<u4"),  # slots that hold folios or nodes
        ("shadows", "<u4"),  # slots that hold shadows
        ("prev", "<u4"),  # list of nodes with nothing but shadows; some that folios came back to
        ("next", "<u4"),
        ("root", "<u8"),  # of the listed: their tree; 0: a large folio took the place of all of it
        ("listed", "<u4"),
        ("pad", "V196"),
    ]
)
ROOT = np.dtype(
    [
        ("node", "<u4"),  # handle of the top node, 0 = empty
        ("height", "<u4"),  # levels of nodes
        ("nrpages", "<u4"),  # pages of all folios
        ("lock", "<u4"),  # spin lock of tree, tags and folio flags of the mapping
    ]
)
assert NODE.itemsize == 512
NODE_BIT = 1 << 31
SHADOW_BIT = 1 << SHADOW_BITS
WORDS = NODE.itemsize // 4  # of m4 in a node
TAG_AT = 32  # first tag word of a node, in m8 words
PARENT, OFFSET, COUNT, SHADOWS, PREV, NEXT, LISTED = 70, 71, 72, 73, 74, 75, 78
ROOT_AT = 38  # root word of a node, in m8 words
L_FIRST, L_LAST, L_NODES = 0, 1, 2  # the list of nodes with nothing but shadows
R_NODE, R_HEIGHT, R_NRPAGES, R_LOCK = 0, 1, 2, 3
EXISTS = -1000  # insert: some index of the range is taken


@helper
def first_bit(bits):
    """Number of the lowest set bit of a uint64 that is not 0."""
    n = 0
    step = 32
    while step:
        if bits & ((np.uint64(1) << np.uint64(step)) - np.uint64(1)) == np.uint64(0):
            bits >>= np.uint64(step)
            n += step
        step >>= 1
    return n


@helper
def is_shadow(entry):
    """Whether a slot holds the shadow of an evicted folio."""
    return entry >> SHADOW_BITS == 1


@helper
def slot_entry(m4, root, index):
    """What the tree has over `index`: a pfn, a shadow, or 0."""
    node = np.int64(m4[root + R_NODE])
    shift = (np.int64(m4[root + R_HEIGHT]) - 1) * 6
    if node == 0 or index >> (shift + 6) != 0:
        return np.int64(0)
    while True:
        entry = np.int64(m4[node * WORDS + ((index >> shift) & 63)])
        if entry & NODE_BIT == 0:
            return entry
        node = entry ^ NODE_BIT
        shift -= 6


@helper
def find_entry(m4, root, index):
    """pfn of the folio over `index`, or 0."""
    entry = slot_entry(m4, root, index)
    return np.int64(0) if is_shadow(entry) else entry


@helper
def _next_slot(m4, m8, orders, node, shift, offset, tag):
    """First slot >= offset of a node that holds a folio or a node or is tagged, 64 if none."""
    if tag < 0:
        while offset < 64:
            entry = np.int64(m4[node * WORDS + offset])
            if entry != 0 and not is_shadow(entry):
                break
            offset += 1
        return offset
    entry = np.int64(m4[node * WORDS + offset])
    if entry != 0 and entry >> SHADOW_BITS == 0:
        offset &= ~((1 << (np.int64(orders[entry]) - shift)) - 1)
    bits = m8[node * 64 + TAG_AT + tag] >> np.uint64(offset)
    if bits == np.uint64(0):
        return 64
    return offset + first_bit(bits)


@helper
def next_entry(m4, m8, orders, root, index, last, tag):
    """pfn of the first folio with an index in [index, last] (and the tag), or 0."""
    while index <= last:
        node = np.int64(m4[root + R_NODE])
        shift = (np.int64(m4[root + R_HEIGHT]) - 1) * 6
        if node == 0 or index >> (shift + 6) != 0:
            return np.int64(0)
        while True:
            offset = (index >> shift) & 63
            slot = _next_slot(m4, m8, orders, node, shift, offset, tag)
            if slot == 64:
                break
            if slot != offset:
                index = ((index >> (shift + 6)) << (shift + 6)) | (slot << shift)
            entry = np.int64(m4[node * WORDS + slot])
            if entry & NODE_BIT == 0:
                return entry if index <= last else np.int64(0)
            node = entry ^ NODE_BIT
            shift -= 6
        index = ((index >> (shift + 6)) + 1) << (shift + 6)
    return np.int64(0)


@helper
def _levels(index, order):
    """Levels a tree needs for a folio of this order at this index."""
    levels = order // 6 + 1
    last = index + (1 << order) - 1
    while last >> (6 * levels) != 0:
        levels += 1
    return levels


@helper
def _take(m4, node):
    """Clear a spare node."""
    for word in range(node * WORDS, node * WORDS + LISTED + 1):
        m4[word] = 0
    return node


@helper
def _split_shadow(m4, parent, slot, child):
    """A node takes the place of a slot that may hold a shadow: it becomes one for each below."""
    entry = m4[parent * WORDS + slot]
    if entry != 0:
        for word in range(child * WORDS, child * WORDS + SLOTS):
            m4[word] = entry
        m4[child * WORDS + SHADOWS] = SLOTS
        m4[parent * WORDS + SHADOWS] -= 1


@helper
def _clear_slots(m4, m8, node, first, slots):
    """Make room for a folio where shadows are, and nodes of shadows; the last of them, or 0.

    Such a node is on the list, and stays there for who frees it.
    """
    last = np.int64(0)
    for word in range(first, first + slots):
        entry = np.int64(m4[word])
        if entry & NODE_BIT != 0:
            child = entry ^ NODE_BIT
            m8[child * 64 + ROOT_AT] = 0
            m4[node * WORDS + COUNT] -= 1
            for below in range(child * WORDS, child * WORDS + SLOTS):
                if m4[below] != 0:
                    last = np.int64(m4[below])
        elif entry != 0:
            m4[node * WORDS + SHADOWS] -= 1
            last = entry
    return last


@helper
def _adopt(m4, m8, parent, slot, child):
    """Hang a node under another one, tags included."""
    m4[parent * WORDS + slot] = child | NODE_BIT
    m4[parent * WORDS + COUNT] += 1
    m4[child * WORDS + PARENT] = parent
    m4[child * WORDS + OFFSET] = slot
    for tag in range(3):
        if m8[child * 64 + TAG_AT + tag] != np.uint64(0):
            m8[parent * 64 + TAG_AT + tag] |= np.uint64(1) << np.uint64(slot)


@helper
def insert_entry(m4, m8, orders, root, index, order, pfn, spare, nspare):
    """Put a folio in: spare nodes used (>= 0), -n when n spare nodes are wanted, or EXISTS.

    Spare nodes are taken from the end of spare[:nspare]. Nothing is changed on a negative code.
    Beside it, the shadow that was in the place, with its bit, or 0.
    """
    if next_entry(m4, m8, orders, root, index, index + (1 << order) - 1, ANY) != 0:
        return np.int64(EXISTS), np.int64(0)
    levels = max(_levels(index, order), np.int64(m4[root + R_HEIGHT]))
    want = 2 * levels - np.int64(m4[root + R_HEIGHT])
    if nspare < want:
        return -want, np.int64(0)
    left = nspare
    node = np.int64(m4[root + R_NODE])
    while node == 0 or np.int64(m4[root + R_HEIGHT]) < levels:
        left -= 1
        top = _take(m4, np.int64(spare[left]))
        if node == 0:
            m4[root + R_HEIGHT] = levels
        else:
            _adopt(m4, m8, top, 0, node)
            m4[root + R_HEIGHT] += 1
        m4[root + R_NODE] = top
        node = top
    shift = (levels - 1) * 6
    while shift > (order // 6) * 6:
        slot = (index >> shift) & 63
        entry = np.int64(m4[node * WORDS + slot])
        if entry & NODE_BIT == 0:
            left -= 1
            entry = _take(m4, np.int64(spare[left])) | NODE_BIT
            _split_shadow(m4, node, slot, entry ^ NODE_BIT)
            _adopt(m4, m8, node, slot, entry ^ NODE_BIT)
        node = entry ^ NODE_BIT
        shift -= 6
    slots = 1 << (order - shift)
    first = node * WORDS + ((index >> shift) & 63)
    shadow = _clear_slots(m4, m8, node, first, slots)
    for word in range(first, first + slots):
        m4[word] = pfn
    m4[node * WORDS + COUNT] += slots
    m4[root + R_NRPAGES] += 1 << order
    return nspare - left, shadow


@helper
def _leaf(m4, orders, root, index):
    """(node, first slot, slots) of the folio over `index`; it must be there."""
    node = np.int64(m4[root + R_NODE])
    shift = (np.int64(m4[root + R_HEIGHT]) - 1) * 6
    while True:
        slot = (index >> shift) & 63
        entry = np.int64(m4[node * WORDS + slot])
        if entry & NODE_BIT == 0:
            slots = 1 << (np.int64(orders[entry]) - shift)
            return node, slot & ~(slots - 1), slots
        node = entry ^ NODE_BIT
        shift -= 6


@helper
def replace_entry(m4, orders, root, index, pfn):
    """The folio over `index` is now at `pfn`, as large as it was; its tags stay."""
    node, first, slots = _leaf(m4, orders, root, index)
    for word in range(node * WORDS + first, node * WORDS + first + slots):
        m4[word] = pfn


@helper
def halve_entry(m4, m8, orders, root, index, spare):
    """The upper half of the folio over `index`, large as it still is, gets an entry of its own.

    Both have the tags of the whole. `spare`, a node, is taken where the halves lie a level lower:
    if the folio has one slot.
    """
    node, first, slots = _leaf(m4, orders, root, index)
    pfn = np.int64(m4[node * WORDS + first])
    if slots == 1:
        child = _take(m4, spare)
        for word in range(child * WORDS, child * WORDS + SLOTS):
            m4[word] = pfn
        m4[child * WORDS + COUNT] = SLOTS
        for tag in range(3):
            bits = m8[node * 64 + TAG_AT + tag] >> np.uint64(first)
            m8[child * 64 + TAG_AT + tag] = bits & np.uint64(1)
        m4[node * WORDS + COUNT] -= 1
        _adopt(m4, m8, node, first, child)
        node, first, slots = child, 0, SLOTS
    middle = first + (slots >> 1)
    for word in range(node * WORDS + middle, node * WORDS + first + slots):
        m4[word] = pfn + (1 << np.int64(orders[pfn]) >> 1)
    for tag in range(3):
        word = node * 64 + TAG_AT + tag
        bits = m8[word] >> np.uint64(first) & np.uint64(1)
        m8[word] |= bits << np.uint64(middle)


@helper
def set_tag(m4, m8, orders, root, index, tag):
    """Tag the folio over `index`."""
    node, slot, _ = _leaf(m4, orders, root, index)
    while True:
        bit = np.uint64(1) << np.uint64(slot)
        word = node * 64 + TAG_AT + tag
        if m8[word] & bit != np.uint64(0):
            return
        m8[word] |= bit
        slot = np.int64(m4[node * WORDS + OFFSET])
        node = np.int64(m4[node * WORDS + PARENT])
        if node == 0:
            return


@helper
def _clear_bit(m4, m8, node, slot, tag):
    while node != 0:
        word = node * 64 + TAG_AT + tag
        m8[word] &= ~(np.uint64(1) << np.uint64(slot))
        if m8[word] != np.uint64(0):
            return
        slot = np.int64(m4[node * WORDS + OFFSET])
        node = np.int64(m4[node * WORDS + PARENT])


@helper
def clear_tag(m4, m8, orders, root, index, tag):
    """Take the tag from the folio over `index`."""
    node, slot, _ = _leaf(m4, orders, root, index)
    _clear_bit(m4, m8, node, slot, tag)


@helper
def has_tag(m4, m8, orders, root, index, tag):
    """Whether the folio over `index` carries the tag."""
    node, slot, _ = _leaf(m4, orders, root, index)
    return (m8[node * 64 + TAG_AT + tag] >> np.uint64(slot)) & np.uint64(1) != np.uint64(0)


@helper
def tree_tagged(m4, m8, root, tag):
    """Whether anything in the tree carries the tag."""
    node = np.int64(m4[root + R_NODE])
    return node != 0 and m8[node * 64 + TAG_AT + tag] != np.uint64(0)


@helper
def unlist_node(m4, listed, node):
    """Take a node off the list of those with nothing but shadows, if it is on it."""
    if m4[node * WORDS + LISTED] == 0:
        return
    before = np.int64(m4[node * WORDS + PREV])
    after = np.int64(m4[node * WORDS + NEXT])
    if before != 0:
        m4[before * WORDS + NEXT] = after
    else:
        listed[L_FIRST] = after
    if after != 0:
        m4[after * WORDS + PREV] = before
    else:
        listed[L_LAST] = before
    listed[L_NODES] -= 1
    m4[node * WORDS + LISTED] = 0


@helper
def list_node(m4, m8, listed, root, node):
    """Put a node of this tree at the end of the list, if it is not on it."""
    if m4[node * WORDS + LISTED] != 0:
        return
    last = listed[L_LAST]
    m4[node * WORDS + PREV] = last
    m4[node * WORDS + NEXT] = 0
    m4[node * WORDS + LISTED] = 1
    m8[node * 64 + ROOT_AT] = root
    if last != 0:
        m4[last * WORDS + NEXT] = node
    else:
        listed[L_FIRST] = node
    listed[L_LAST] = node
    listed[L_NODES] += 1


@helper
def prune(m4, m8, listed, root, node, freed, nfreed):
    """Something left a node: nodes no longer used go to freed[nfreed:], count returned.

    One that has nothing but shadows now stays, on the list. At most one node per level is freed.
    """
    while m4[node * WORDS + COUNT] == 0:
        if m4[node * WORDS + SHADOWS] != 0:
            list_node(m4, m8, listed, root, node)
            return nfreed
        parent = np.int64(m4[node * WORDS + PARENT])
        unlist_node(m4, listed, node)
        freed[nfreed] = node
        nfreed += 1
        if parent == 0:
            m4[root + R_NODE] = 0
            m4[root + R_HEIGHT] = 0
            return nfreed
        m4[parent * WORDS + np.int64(m4[node * WORDS + OFFSET])] = 0
        m4[parent * WORDS + COUNT] -= 1
        node = parent
    top = np.int64(m4[root + R_NODE])
    while (
        m4[top * WORDS + COUNT] == 1
        and m4[top * WORDS + SHADOWS] == 0
        and m4[top * WORDS] & NODE_BIT != 0
    ):
        unlist_node(m4, listed, top)
        freed[nfreed] = top
        nfreed += 1
        top = np.int64(m4[top * WORDS]) ^ NODE_BIT
        m4[top * WORDS + PARENT] = 0
        m4[root + R_NODE] = top
        m4[root + R_HEIGHT] -= 1
    return nfreed


@helper
def erase_entry(m4, m8, orders, listed, root, index, shadow, freed, nfreed):
    """Take the folio over `index` out and leave a shadow (with its bit) or nothing (0); `prune`."""
    node, first, slots = _leaf(m4, orders, root, index)
    pfn = np.int64(m4[node * WORDS + first])
    for tag in range(3):
        _clear_bit(m4, m8, node, first, tag)
    for word in range(node * WORDS + first, node * WORDS + first + slots):
        m4[word] = shadow
    m4[node * WORDS + COUNT] -= slots
    if shadow != 0:
        m4[node * WORDS + SHADOWS] += slots
    m4[root + R_NRPAGES] -= 1 << np.int64(orders[pfn])
    return prune(m4, m8, listed, root, node, freed, nfreed)


@kernel("i8(u4[::1], i8, i8)")
def find(m4, root, index):
    """pfn of the folio over `index`, or 0."""
    spin_lock(m4, root + R_LOCK)
    pfn = find_entry(m4, root, index)
    spin_unlock(m4, root + R_LOCK)
    return pfn


@kernel("b1(u4[::1], i8, i8)")
def was_evicted(m4, root, index):
    """Whether the page was cached until reclaim took it."""
    spin_lock(m4, root + R_LOCK)
    entry = slot_entry(m4, root, index)
    spin_unlock(m4, root + R_LOCK)
    return is_shadow(entry)


@kernel("i8(u4[::1], u1[::1], i8[::1], i8, i8, i8, i8)")
def cached_run(m4, orders, indices, root, index, step, most):
    """How many pages from `index` on are cached, up (step 1) or down (-1); `most` at most."""
    n = np.int64(0)
    spin_lock(m4, root + R_LOCK)
    while n < most and index >= 0:
        pfn = find_entry(m4, root, index)
        if pfn == 0:
            break
        first = indices[pfn]
        run = index - first + 1
        if step > 0:
            run = first + (np.int64(1) << np.int64(orders[pfn])) - index
        n += run
        index += step * run
    spin_unlock(m4, root + R_LOCK)
    return min(n, most)


@kernel("i8(u4[::1], u8[::1], u1[::1], i8, i8, i8, i8)")
def find_next(m4, m8, orders, root, index, last, tag):
    """pfn of the first folio with an index in [index, last] and the tag (ANY: all), or 0."""
    spin_lock(m4, root + R_LOCK)
    pfn = next_entry(m4, m8, orders, root, index, last, tag)
    spin_unlock(m4, root + R_LOCK)
    return pfn


@kernel("i8(u4[::1], u8[::1], u1[::1], i8[::1], i8, i8, i8, i8, i8[::1])")
def gang(m4, m8, orders, indices, root, index, last, tag, out):
    """Fill `out` with the pfns of folios that touch [index, last], in order; how many.

    `indices` are the folios' own first indices (the page descriptors' index field).
    """
    n = 0
    spin_lock(m4, root + R_LOCK)
    while n < out.size:
        pfn = next_entry(m4, m8, orders, root, index, last, tag)
        if pfn == 0:
            break
        out[n] = pfn
        n += 1
        index = indices[pfn] + (1 << np.int64(orders[pfn]))
    spin_unlock(m4, root + R_LOCK)
    return n


@kernel("i8(u4[::1], u8[::1], u1[::1], i8, i8, i8, i8, u4[::1], i8)")
def insert(m4, m8, orders, root, index, order, pfn, spare, nspare):
    """Put a folio in; see insert_entry for the code."""
    spin_lock(m4, root + R_LOCK)
    code, _ = insert_entry(m4, m8, orders, root, index, order, pfn, spare, nspare)
    spin_unlock(m4, root + R_LOCK)
    return code


@kernel("i8(u4[::1], u8[::1], u1[::1], i8[::1], i8, i8, i8, u4[::1])")
def erase(m4, m8, orders, listed, root, index, shadow, freed):
    """Take the folio over `index` out; how many nodes were put into `freed`. See erase_entry."""
    spin_lock(m4, root + R_LOCK)
    n = erase_entry(m4, m8, orders, listed, root, index, shadow, freed, 0)
    spin_unlock(m4, root + R_LOCK)
    return n


@kernel("void(u4[::1], u1[::1], i8, i8, i8)")
def replace(m4, orders, root, index, pfn):
    """Put another folio of the same order in the place of the one over `index`."""
    spin_lock(m4, root + R_LOCK)
    replace_entry(m4, orders, root, index, pfn)
    spin_unlock(m4, root + R_LOCK)


@kernel("void(u4[::1], u8[::1], u1[::1], i8, i8, i8, i8)")
def mark(m4, m8, orders, root, index, tag, value):
    """Set (value 1) or clear (0) a tag of the folio over `index`."""
    spin_lock(m4, root + R_LOCK)
    if value != 0:
        set_tag(m4, m8, orders, root, index, tag)
    else:
        clear_tag(m4, m8, orders, root, index, tag)
    spin_unlock(m4, root + R_LOCK)


@kernel("i8(u4[::1], u8[::1], u1[::1], i8, i8, i8)")
def marked(m4, m8, orders, root, index, tag):
    """Whether the folio over `index` carries a tag; index -1: whether any folio does."""
    spin_lock(m4, root + R_LOCK)
    if index < 0:
        answer = tree_tagged(m4, m8, root, tag)
    else:
        answer = has_tag(m4, m8, orders, root, index, tag)
    spin_unlock(m4, root + R_LOCK)
    return np.int64(answer)


@kernel("i8(u4[::1], u8[::1], u1[::1], i8[::1], i8, i8, i8, i8)")
def tag_towrite(m4, m8, orders, indices, root, index, last, batch):
    """Copy dirty to towrite in [index, last] for at most `batch` folios; the next index, or -1.

    Integrity write-back does this first and then writes only what it tagged, so that pages
    dirtied later do not keep it busy for ever.
    """
    following = np.int64(-1)
    spin_lock(m4, root + R_LOCK)
    while True:
        pfn = next_entry(m4, m8, orders, root, index, last, DIRTY)
        if pfn == 0:
            break
        if batch == 0:
            following = indices[pfn]
            break
        set_tag(m4, m8, orders, root, indices[pfn], TOWRITE)
        index = indices[pfn] + (1 << np.int64(orders[pfn]))
        batch -= 1
    spin_unlock(m4, root + R_LOCK)
    return following
