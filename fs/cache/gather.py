"""Kernels that put folios into and take them out of a mapping, and collect them for write-back.

`gather` moves a batch of dirty folios to write-back in one step: tags, flags, block bits, counters
and a reference each change together, under the mapping's lock and before anything is awaited, so
a truncation sees a folio either dirty (and may drop it) or under write-back (and waits). With the
dirty blocks it takes the file's size: what was written below it is in them. `finish` is the way
back. `evict` is reclaim's: it takes only folios that nobody uses or needs.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import numpy as np

from alloc.atomic import (
    fetch_add,
    fetch_and,
    fetch_or,
    load_acquire,
    spin_lock,
    spin_trylock,
    spin_unlock,
)
from alloc.jit import helper, kernel
from alloc.page import DIRTY, LOCKED, RECLAIM, WRITEBACK
from alloc.workingset import eviction
from fs.cache import radix
from fs.cache.blocks import DIRTY_BLOCK, RESERVED, block_bits, change_bits
from fs.cache.incore import I4_MAPPING, I8_SIZE
from fs.cache.mapping import W_NDIRTY, W_NRWRITEBACK
from fs.cache.radix import (
    R_LOCK,
    SHADOW_BIT,
    clear_tag,
    erase_entry,
    find_entry,
    insert_entry,
    next_entry,
    set_tag,
)
from writeback.dirty import NR_DIRTY, NR_WRITEBACK, NR_WRITTEN

# what evict says about a folio; IS_CONGESTED: under write-back, and met by reclaim before
EVICTED, IS_DIRTY, IS_WRITEBACK, IS_CONGESTED, IN_USE = range(5)


@kernel(
    "i8(u4[::1], u8[::1], u4[::1], u1[::1], i8[::1], u4[::1], u4[::1], i8, i8, i8, i8, i8,"
    " u4[::1], i8, i8, i8[::1])"
)
def attach(
    m4, m8, flags, orders, indices, blocks, mapping, root, handle, index, order, pfn,
    spare, nspare, bits, out,
):  # fmt: skip
    """Put a fresh folio into a mapping with page flags `bits`; codes of radix.insert_entry.

    out[0]: the shadow that was in its place, with SHADOW_BIT, or 0.
    """
    spin_lock(m4, root + R_LOCK)
    code, out[0] = insert_entry(m4, m8, orders, root, index, order, pfn, spare, nspare)
    if code >= 0:
        mapping[pfn] = handle
        indices[pfn] = index
        for page in range(pfn, pfn + (1 << order)):
            blocks[page] = 0
        fetch_or(flags, pfn, bits)
    spin_unlock(m4, root + R_LOCK)
    return code


@helper
def detach_folio(
    m4, m8, flags, orders, indices, mapping, counts, listed, root, pfn, shadow, freed, nfreed
):
    """Under the lock: take a folio out of its mapping, dirty or not; new count of freed nodes."""
    pages = np.int64(1) << np.int64(orders[pfn])
    if flags[pfn] & DIRTY != 0:
        m4[root + W_NDIRTY] -= pages
        fetch_add(counts, NR_DIRTY, -pages)
        fetch_and(flags, pfn, 0xFFFFFFFF ^ DIRTY)
    nfreed = erase_entry(m4, m8, orders, listed, root, indices[pfn], shadow, freed, nfreed)
    mapping[pfn] = 0
    return nfreed


@kernel(
    "i8(u4[::1], u8[::1], u4[::1], u1[::1], i8[::1], u4[::1], i8[::1], i8[::1], i8, i8, u4[::1])"
)
def detach(m4, m8, flags, orders, indices, mapping, counts, listed, root, pfn, freed):
    """Take a folio out of its mapping; how many nodes are in `freed`. The reference stays."""
    spin_lock(m4, root + R_LOCK)
    n = detach_folio(
        m4, m8, flags, orders, indices, mapping, counts, listed, root, pfn, 0, freed, 0
    )
    spin_unlock(m4, root + R_LOCK)
    return n


@helper
def _dirty_runs(orders, indices, blocks, pfn, block_log, runs, nruns):
    """Append the dirty runs of a folio and clear their bits; the new number of runs."""
    base = indices[pfn] << 12
    block = base >> block_log
    end = block + ((4096 << np.int64(orders[pfn])) >> block_log)
    while block < end:
        if block_bits(blocks, pfn, base, block_log, block) & DIRTY_BLOCK != 0:
            change_bits(blocks, pfn, base, block_log, block, block + 1, 0, DIRTY_BLOCK)
            if nruns > 0 and runs[nruns - 1, 0] + runs[nruns - 1, 1] == block:
                runs[nruns - 1, 1] += 1
            else:
                runs[nruns, 0] = block
                runs[nruns, 1] = 1
                nruns += 1
        block += 1
    return nruns


@helper
def _start_writeback(m4, m8, flags, orders, indices, refs, counts, root, pfn):
    """Under the lock: dirty -> write-back, with a reference."""
    index = indices[pfn]
    pages = np.int64(1) << np.int64(orders[pfn])
    fetch_add(refs, pfn, 1)
    fetch_and(flags, pfn, 0xFFFFFFFF ^ DIRTY)
    fetch_or(flags, pfn, WRITEBACK)
    clear_tag(m4, m8, orders, root, index, radix.DIRTY)
    clear_tag(m4, m8, orders, root, index, radix.TOWRITE)
    set_tag(m4, m8, orders, root, index, radix.WRITEBACK)
    m4[root + W_NDIRTY] -= pages
    m4[root + W_NRWRITEBACK] += pages
    fetch_add(counts, NR_DIRTY, -pages)
    fetch_add(counts, NR_WRITEBACK, pages)
    return pages


@kernel(
    "i8(u4[::1], u8[::1], u4[::1], u1[::1], i8[::1], u4[::1], i4[::1], i8[::1], i8, i8, i8, i8,"
    " i8, i8, i8[::1], i8[:, ::1], i8[::1])"
)
def gather(
    m4, m8, flags, orders, indices, blocks, refs, counts, root, block_log, index, last, tag,
    wait, folios, runs, meta,
):  # fmt: skip
    """Move tagged folios from [index, last] to write-back until the batch is full.

    A batch has at most `folios.size` pages, and an empty one has room for any folio. meta, zeroed:
    folios, runs, pages, next index, the file's size that goes with the content. Returns 0, or, with
    `wait`, a folio already under write-back that has to end first (nothing was gathered then).
    Without `wait` such folios are passed over.
    """
    meta[3] = index
    answer = np.int64(0)
    spin_lock(m4, root + R_LOCK)
    meta[4] = np.int64(m8[((root - I4_MAPPING) >> 1) + I8_SIZE])
    while meta[2] < folios.size:
        pfn = next_entry(m4, m8, orders, root, meta[3], last, tag)
        if pfn == 0:
            meta[3] = last + 1
            break
        pages = np.int64(1) << np.int64(orders[pfn])
        if flags[pfn] & WRITEBACK != 0:
            if wait != 0:
                if meta[0] == 0:
                    answer = pfn
                break
            meta[3] = indices[pfn] + pages
            continue
        if meta[2] + pages > folios.size or meta[1] + (pages << 12 >> block_log) > runs.shape[0]:
            break
        _start_writeback(m4, m8, flags, orders, indices, refs, counts, root, pfn)
        meta[1] = _dirty_runs(orders, indices, blocks, pfn, block_log, runs, meta[1])
        folios[meta[0]] = pfn
        meta[0] += 1
        meta[2] += pages
        meta[3] = indices[pfn] + pages
    spin_unlock(m4, root + R_LOCK)
    return answer


@kernel(
    "i8(u4[::1], u8[::1], u4[::1], u1[::1], i8[::1], i8[::1], i8, i8[::1], i8, i8[::1])"
)
def finish(m4, m8, flags, orders, indices, counts, root, folios, n, rotate):
    """End write-back of folios[:n]; fills `rotate` with those that reclaim waits for, how many."""
    nrotate = 0
    spin_lock(m4, root + R_LOCK)
    for i in range(n):
        pfn = folios[i]
        pages = np.int64(1) << np.int64(orders[pfn])
        clear_tag(m4, m8, orders, root, indices[pfn], radix.WRITEBACK)
        before = fetch_and(flags, pfn, 0xFFFFFFFF ^ (WRITEBACK | RECLAIM))
        m4[root + W_NRWRITEBACK] -= pages
        fetch_add(counts, NR_WRITEBACK, -pages)
        fetch_add(counts, NR_WRITTEN, pages)
        if before & RECLAIM != 0 and before & DIRTY == 0:
            rotate[nrotate] = pfn
            nrotate += 1
    spin_unlock(m4, root + R_LOCK)
    return nrotate


@helper
def change_cached(
    m4, orders, indices, blocks, root, block_log, first, last, add, remove, one, other
):
    """Under the lock: change the bits of cached blocks [first, last).

    Returns how many had a bit of `one` before, and how many one of `other`.
    """
    n = np.int64(0)
    more = np.int64(0)
    block = first
    while block < last:
        pfn = find_entry(m4, root, (block << block_log) >> 12)
        if pfn == 0:
            block += 1
            continue
        base = indices[pfn] << 12
        end = min(last, (base + (4096 << np.int64(orders[pfn]))) >> block_log)
        while block < end:
            bits = block_bits(blocks, pfn, base, block_log, block)
            n += 1 if bits & one != 0 else 0
            more += 1 if bits & other != 0 else 0
            change_bits(blocks, pfn, base, block_log, block, block + 1, add, remove)
            block += 1
    return n, more


@kernel(
    "i8(u4[::1], u1[::1], i8[::1], u4[::1], i8, i8, i8, i8, i8, i8, i8)"
)
def change_range(m4, orders, indices, blocks, root, block_log, first, last, add, remove, count):
    """Change the bits of cached blocks [first, last); how many had a bit of `count` before."""
    spin_lock(m4, root + R_LOCK)
    n, _ = change_cached(
        m4, orders, indices, blocks, root, block_log, first, last, add, remove, count, 0
    )
    spin_unlock(m4, root + R_LOCK)
    return n


@kernel("i8(u4[::1], u1[::1], i8[::1], u4[::1], i8, i8, i8, i8)")
def reserved_until(m4, orders, indices, blocks, root, block_log, first, last):
    """Up to which block, `last` at most, all from `first` on are RESERVED."""
    block = first
    found = True
    spin_lock(m4, root + R_LOCK)
    while found and block < last:
        pfn = find_entry(m4, root, (block << block_log) >> 12)
        if pfn == 0:
            break
        base = indices[pfn] << 12
        end = min(last, (base + (4096 << np.int64(orders[pfn]))) >> block_log)
        while block < end and found:
            found = block_bits(blocks, pfn, base, block_log, block) & RESERVED != 0
            block += found
    spin_unlock(m4, root + R_LOCK)
    return block


@kernel("i8(u4[::1], u1[::1], i8[::1], i8, i8, i8, i8[:, ::1])")
def pieces(m4, orders, indices, root, start, end, out):
    """Where bytes [start, end) of a file lie in memory: (address, bytes) each; how many.

    All folios are there; those adjacent in memory too are one piece. Stops when `out` is full.
    """
    n = 0
    spin_lock(m4, root + R_LOCK)
    while start < end:
        pfn = find_entry(m4, root, start >> 12)
        if pfn == 0:
            break
        base = indices[pfn] << 12
        stop = min(end, base + (4096 << np.int64(orders[pfn])))
        addr = (pfn << 12) + start - base
        if n > 0 and out[n - 1, 0] + out[n - 1, 1] == addr:
            out[n - 1, 1] += stop - start
        elif n < out.shape[0]:
            out[n, 0] = addr
            out[n, 1] = stop - start
            n += 1
        else:
            break
        start = stop
    spin_unlock(m4, root + R_LOCK)
    return n


@kernel(
    "i8(u4[::1], u8[::1], u4[::1], u1[::1], i8[::1], u4[::1], i4[::1], i8[::1], i8[::1], i8[::1],"
    " i8, i8, i8[::1], i8, u4[::1], i8[::1])"
)
def evict(
    m4, m8, flags, orders, indices, mapping, refs, counts, words, listed, inode_words, first_word,
    pfns, n, freed, verdicts,
):  # fmt: skip
    """Take isolated folios pfns[:n] out of their mappings where that needs nobody's leave.

    Each leaves a shadow. `inode_words`, `first_word`: where the mapping of an inode handle is in
    m4; `words` are the arena's. Returns how many nodes are in `freed` (room for 10 a folio). A
    folio here has two references: its mapping's and that of who isolated it.
    """
    nfreed = 0
    for i in range(n):
        pfn = pfns[i]
        verdicts[i] = IN_USE
        handle = np.int64(mapping[pfn])
        root = handle * inode_words + first_word
        if handle == 0 or not spin_trylock(m4, root + R_LOCK):
            continue
        state = load_acquire(flags, pfn)
        if mapping[pfn] != handle or state & LOCKED != 0:
            verdicts[i] = IN_USE
        elif state & WRITEBACK != 0:
            marked = fetch_or(flags, pfn, RECLAIM) & RECLAIM != 0
            verdicts[i] = IS_CONGESTED if marked else IS_WRITEBACK
        elif state & DIRTY != 0:
            fetch_or(flags, pfn, RECLAIM)
            verdicts[i] = IS_DIRTY
        elif load_acquire(refs, pfn) == 2:
            shadow = eviction(words, flags, orders, pfn) | SHADOW_BIT
            nfreed = detach_folio(
                m4, m8, flags, orders, indices, mapping, counts, listed, root, pfn, shadow, freed,
                nfreed,
            )  # fmt: skip
            verdicts[i] = EVICTED
        spin_unlock(m4, root + R_LOCK)
    return nfreed
