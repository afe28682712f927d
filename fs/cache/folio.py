"""The page cache: folios of files in the arena, found through each inode's radix tree.

A folio in a mapping has one reference for being there; whoever sleeps while using one takes
another. LOCKED means that its content is being read from the device: nobody writes into it, and
readers of blocks that are not up to date wait (`wait`). Folios enter the LRU when they enter a
mapping; reclaim takes those that are clean, unlocked and unused.

Calls without `await` are atomic on the trio thread. An awaiting caller must look its folio up
again afterwards, unless it holds a reference and the folio LOCKED or under write-back. Lanes look
folios up, insert them and dirty them meanwhile, under the mapping's spin lock and the IOLOCK word:
never in a file whose IOLOCK a task holds exclusively, and only to read where a task holds it
shared. Only the trio thread locks, removes and evicts folios and waits for them, and the scratch
arrays here, `hint` and the spare nodes among them, are its own; lanes have others. The class is
also what the flusher sees of the filesystem (`writeback.mapping.Mappings`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import trio
from numpy.typing import NDArray

from alloc import gfp, lockdep
from alloc.page import LOCKED, W_SPAN, WRITEBACK
from alloc.throttle import WRITEBACK as THROTTLED
from fs import writepages
from fs.cache import blocks, gather, mapping, radix, readahead
from fs.cache.evict import Eviction
from fs.cache.inode import INODE, Inode
from fs.cache.lock import FOLIO_LOCKED, FOLIO_WRITEBACK
from fs.cache.pin import Pins
from fs.cache.relocate import relocate
from fs.cache.shadow import ShadowNodes
from fs.cache.split import Splits
from fs.xfs import layout as L
from fs.xfs.extents import REC_BYTES
from fs.xfs.inode import DATA, levels_max
from writeback.dirty import Dirty
from writeback.ioend import FOLIOS_MAX, Ioend, IoendPool
from writeback.mapping import INODE_DIRTY, LISTED, LISTED_TIME
from writeback.throttle import Throttle

if TYPE_CHECKING:
    from fs.volume import Volume

PAGE_LOG = 12
PAGE_SIZE = 1 << PAGE_LOG
ORDER_MAX = 9  # 2 MiB: the largest folio of a file
ORDER_SHARE = 64  # a folio is at most 1/64 of memory
SPARE_NODES = 64
PATH_NODES = 20  # nodes that an insertion may want: twice the height of the highest tree
INODE_WORDS = INODE.itemsize // 4
assert INODE.fields is not None
MAPPING_WORD = INODE.fields["mapping"][1] // 4


def write_order(pos: int, length: int, order_min: int = 0, order_max: int = ORDER_MAX) -> int:
    """Folio order that a write of `length` bytes at `pos` asks for first.

    As Linux: floor(log2(bytes)) - 12, between the mapping's limits, and never more than the
    alignment of the page index.
    """
    assert length > 0
    order = max(length.bit_length() - 1 - PAGE_LOG, 0)
    order = max(min(order, order_max), order_min)
    index = pos >> PAGE_LOG
    if index & ((1 << order) - 1):
        order = max((index & -index).bit_length() - 1, order_min)
    return order


class PageCache:
    """All file folios of one volume."""

    def __init__(self, vol: Volume) -> None:
        arena = vol.arena
        self.vol = vol
        self.arena = arena
        self.block_log = vol.geo.block_log
        self.tree_levels = levels_max(vol.geo, DATA)
        self.tree_records_min = (vol.geo.block_size - L.LONG_BLOCK.itemsize) // REC_BYTES // 2
        self.order_min = max(0, self.block_log - PAGE_LOG)
        largest = max(arena.nr_pages // ORDER_SHARE, 1).bit_length() - 1
        self.order_max = max(min(ORDER_MAX, largest), self.order_min)
        self.m4 = arena.mem.view(np.uint32)
        self.m8 = arena.mem.view(np.uint64)
        self.s8 = arena.mem.view(np.int64)
        self.view = memoryview(arena.mem).cast("B")
        self.pages = arena.pages
        self.maps = vol.inodes.table["mapping"]
        self.columns = {name: self.maps[name] for name in self.maps.dtype.names or ()}
        self.dirty = Dirty(self._dirtyable)
        self.throttle = Throttle(self.dirty, self.columns["credit"])
        self.ioends = IoendPool(arena, 1 << self.order_max)
        self.nodes = arena.slab("radix_tree_node", radix.NODE, reclaimable=True)
        self.shadows = ShadowNodes(self)
        self.eviction = Eviction(self)
        self.hint = np.zeros(4, np.int64)  # what copy kernels tell beside their result
        self.runs = np.zeros((2048, 2), np.int64)
        self._gang = np.zeros(256, np.int64)
        self._rotate = np.zeros(FOLIOS_MAX, np.int64)
        self._verdicts = np.zeros(4096, np.int64)
        self._freed = np.zeros(10 * 4096, np.uint32)
        self._spare = np.zeros(SPARE_NODES, np.uint32)
        self._nr_spare = 0
        self.lost_pages = 0  # pages whose write-back failed
        self._waits: dict[int, trio.Event] = {}
        self.windows = readahead.Windows(self)
        self.pins = Pins(self)
        self.splits = Splits(self)
        p = self.pages
        self._tree = (self.m4, self.m8, p.order)
        self._folios = (p.flags, p.order, p.index, p.blocks)
        self._tagged = (self.m4, self.m8, p.flags, p.order, p.index)

    async def start(self) -> None:
        """Take the memory that must be there before the first page is dirtied."""
        await self._refill(PATH_NODES)
        await self.ioends.pool.fill()
        self.arena.register_by_node(self.eviction)
        for holder in (self.windows, self.pins, self.shadows):
            self.arena.victims.register(holder)
        self.arena.register_shrinker(self.shadows, seeks=0)
        self.arena.vmstat.gauge("workingset_nodes", lambda: self.shadows.nr_nodes)
        self.arena.compaction.register_mover(self)
        # As the kernel counts: huge pages only. Other orders stand in the report of folios.
        done, failed = self.splits.done, self.splits.failed
        self.arena.vmstat.gauge("thp_split_page", lambda: done[ORDER_MAX])
        self.arena.vmstat.gauge("thp_split_page_failed", lambda: failed[ORDER_MAX])
        self.arena.vmstat.gauge("nr_dirty", lambda: self.dirty.nr_dirty)
        self.arena.vmstat.gauge("nr_writeback", lambda: self.dirty.nr_writeback)
        self.arena.vmstat.gauge("nr_dirtied", lambda: self.dirty.nr_dirtied)
        self.arena.vmstat.gauge("nr_written", lambda: self.dirty.nr_written)
        self.arena.vmstat.gauge("nr_dirty_threshold", lambda: self.dirty.thresh)
        self.arena.vmstat.gauge("nr_dirty_background_threshold", lambda: self.dirty.background)

    def _dirtyable(self) -> int:
        lru = self.arena.lru
        return self.arena.free_pages - self.arena.marks.high + lru.nr_inactive + lru.nr_active + 1

    @staticmethod
    def root(handle: int) -> int:
        """Index in m4 of an inode's mapping."""
        return handle * INODE_WORDS + MAPPING_WORD

    @staticmethod
    def handle_of(root: int) -> int:
        """The inode that a mapping belongs to."""
        return (root - MAPPING_WORD) // INODE_WORDS

    # -- finding and adding ---------------------------------------------------------------------

    def find(self, handle: int, index: int) -> int:
        """pfn of the folio over a page index, or 0."""
        return int(radix.find(self.m4, self.root(handle), index))

    def next(self, handle: int, index: int, last: int, tag: int = radix.ANY) -> int:
        """pfn of the first folio (with the tag) that touches [index, last], or 0."""
        return int(radix.find_next(*self._tree, self.root(handle), index, last, tag))

    def was_evicted(self, handle: int, index: int) -> bool:
        """Whether a page was cached until reclaim took it."""
        return bool(radix.was_evicted(self.m4, self.root(handle), index))

    def cached_run(self, handle: int, index: int, step: int, most: int) -> int:
        """How many pages from `index` on, up (1) or down (-1), are cached; `most` at most."""
        p = self.pages
        args = (self.m4, p.order, p.index, self.root(handle), index, step, most)
        return int(radix.cached_run(*args))

    def gang(self, handle: int, index: int, last: int, tag: int = radix.ANY) -> list[int]:
        """Up to 256 folios that touch [index, last], ascending."""
        p = self.pages
        args = (self.m4, self.m8, p.order, p.index, self.root(handle), index, last, tag)
        return [int(pfn) for pfn in self._gang[: radix.gang(*args, self._gang)]]

    def base(self, pfn: int) -> int:
        """File position of a folio's first byte."""
        return int(self.pages.index[pfn]) << PAGE_LOG

    def end(self, pfn: int) -> int:
        """File position behind a folio."""
        return self.base(pfn) + (PAGE_SIZE << int(self.pages.order[pfn]))

    def is_locked(self, pfn: int) -> bool:
        return bool(self.pages.flags[pfn] & LOCKED)

    async def add(
        self, handle: int, index: int, order: int, bits: int = 0
    ) -> tuple[int, bool]:
        """The folio over `index`: the one that is there, or a new one (True) of at most `order`.

        Orders above the mapping's smallest are only tried, one after the other; the smallest is
        asked for with full effort, so there is always a folio in the end. A new one has page
        flags `bits`, and nothing in it is up to date.
        """
        while True:
            order = self._fitting(handle, index, order)
            if order < 0:
                return self.find(handle, index), False
            pfn, order = await self._new_folio(handle, index, order)
            try:
                if await self._attach(handle, index, order, pfn, bits):
                    return pfn, True
            except BaseException:
                self.arena.put_folio(pfn)
                raise
            self.arena.put_folio(pfn)

    def try_add(self, handle: int, index: int, order: int, bits: int = 0) -> int:
        """As `add` for those who can do without: 0 if it would cost more than one light try."""
        order = self._fitting(handle, index, order)
        if order < 0:
            return 0
        while self._nr_spare < PATH_NODES:
            node = self.nodes.try_alloc(gfp.NOWAIT)  # readahead can do without, as below
            if node is None:
                return 0
            self.give_node(node)
        # Readahead: a window that ends early costs nothing but a later read.
        place = self._place(handle, index, order)
        pfn = self.arena.try_alloc_folio(order, gfp.NORETRY | gfp.MOVABLE, *place)
        if pfn is None:
            return 0
        if self._insert(handle, index, order, pfn, bits) < 0:
            self.arena.put_folio(pfn)
            return 0
        return pfn

    def _fitting(self, handle: int, index: int, order: int) -> int:
        """The largest order up to `order` with nothing in its place, -1 if `index` is taken."""
        if self.find(handle, index):
            return -1
        while order > self.order_min:
            first = index >> order << order
            if not self.next(handle, first, first + (1 << order) - 1):
                break
            order -= 1
        return max(order, self.order_min)

    def set_mempolicy(self, handle: int, number: int) -> None:
        """Where new folios of a file lie from now on: a policy of alloc/mempolicy.py, or NONE."""
        self.columns["mempolicy"][handle] = number

    def mempolicy(self, handle: int) -> int:
        """The policy of a file's own, or NONE."""
        return int(self.columns["mempolicy"][handle])

    def _place(self, handle: int, index: int, order: int) -> tuple[int, int]:
        """The mapping's memory policy, and the offset of a folio by which it interleaves.

        The same as lanes have it. The handle makes files begin on different nodes.
        """
        return self.mempolicy(handle), handle + (index >> order)

    async def _new_folio(self, handle: int, index: int, order: int) -> tuple[int, int]:
        """A folio of at most `order`, and its order."""
        while order > self.order_min:
            # A smaller folio does as well, so a large one is worth one light round of reclaim.
            place = self._place(handle, index, order)
            pfn = self.arena.try_alloc_folio(order, gfp.NORETRY | gfp.MOVABLE, *place)
            if pfn is not None:
                return pfn, order
            order -= 1
        order = self.order_min
        place = self._place(handle, index, order)
        return await self.arena.alloc_folio(order, gfp.MOVABLE, *place), order

    async def _attach(self, handle: int, index: int, order: int, pfn: int, bits: int) -> bool:
        """Put a new folio in; False if its place is taken by now."""
        while True:
            code = self._insert(handle, index, order, pfn, bits)
            if code >= 0:
                return True
            if code == radix.EXISTS:
                return False
            await self._refill(-code)

    def _insert(self, handle: int, index: int, order: int, pfn: int, bits: int) -> int:
        p = self.pages
        p.private[pfn] = 0  # nobody has touched it yet (alloc/touches.py)
        code = gather.attach(
            *self._tagged[:3], p.order, p.index, p.blocks, p.mapping, self.root(handle), handle,
            index >> order << order, order, pfn, self._spare, self._nr_spare, bits, self.hint,
        )  # fmt: skip
        if code >= 0:
            self._nr_spare -= code
            if self.hint[0] and bits & LOCKED:  # what is written, not read, shows no working set
                self.arena.lru.refault(pfn, int(self.hint[0]) ^ radix.SHADOW_BIT)
            self.arena.lru.add(pfn)
        return int(code)

    async def _refill(self, wanted: int) -> None:
        """Have at least so many spare nodes, and a few more."""
        while self._nr_spare < wanted + PATH_NODES:
            self.give_node(await self.nodes.alloc())

    def try_node(self) -> int:
        """A spare node of radix trees, or 0: for who can do without; `give_node` takes it back."""
        if self._nr_spare:
            self._nr_spare -= 1
            return int(self._spare[self._nr_spare])
        return self.nodes.try_alloc(gfp.NOWAIT) or 0  # a folio stays larger than it must be

    def give_node(self, node: int) -> None:
        if self._nr_spare < SPARE_NODES:
            self._spare[self._nr_spare] = node
            self._nr_spare += 1
        else:
            self.nodes.free(node)

    def remove(self, pfn: int) -> None:
        """Take a folio, unlocked and not under write-back, out of its mapping and let it go."""
        assert not self.pages.flags[pfn] & (LOCKED | WRITEBACK)
        p = self.pages
        root = self.root(int(p.mapping[pfn]))
        state = (self.dirty.counts, self.shadows.listed)
        args = (*self._tagged, p.mapping, *state, root, pfn, self._freed)
        for node in self._freed[: gather.detach(*args)]:
            self.give_node(int(node))
        self.arena.put_folio(pfn)

    # -- state of folios ------------------------------------------------------------------------

    def lock(self, pfn: int) -> None:
        """Its content is being read; only on a folio that is not locked."""
        assert not self.pages.flags[pfn] & LOCKED
        blocks.set_flags(self.pages.flags, pfn, LOCKED)

    def unlock(self, pfn: int) -> None:
        blocks.clear_flags(self.pages.flags, pfn, LOCKED)
        self._wake(pfn)

    def _wake(self, pfn: int) -> None:
        event = self._waits.pop(pfn, None)
        if event is not None:
            event.set()

    def is_blank(self, pfn: int) -> bool:
        """Whether no block of a folio has any state."""
        order = int(self.pages.order[pfn])
        return not self.pages.blocks[pfn : pfn + (1 << order)].any()

    @staticmethod
    def may_wait(bits: int) -> None:
        """The running task would wait for folios with these bits: say so before looking for any."""
        if lockdep.current is not None:
            for bit, name in ((LOCKED, FOLIO_LOCKED), (WRITEBACK, FOLIO_WRITEBACK)):
                if bits & bit:
                    lockdep.current.wants(name)

    async def wait(self, pfn: int, bits: int) -> None:
        """Wait until a folio is neither LOCKED nor WRITEBACK, whichever is in `bits`."""
        self.may_wait(bits)
        self.arena.get_folio(pfn)
        try:
            while self.pages.flags[pfn] & bits:
                await self._waits.setdefault(pfn, trio.Event()).wait()
        finally:
            self.arena.put_folio(pfn)

    def note_used(self, handle: int, pos: int, length: int) -> None:
        """A copy kernel has used [pos, pos + length) of a file, and left its hint."""
        if self.hint[1]:
            self.arena.lru.mark_accessed(int(self.hint[1]))
        balancer = self.arena.balancer
        if balancer.enabled and length:
            p, first, last = self.pages, pos >> PAGE_LOG, pos + length - 1 >> PAGE_LOG
            args = (self.m4, self.m8, p.order, p.index, self.root(handle), first, last, radix.ANY)
            balancer.touch(self._gang[: radix.gang(*args, self._gang)])

    def change(self, pfn: int, first: int, last: int, add: int, remove: int = 0) -> None:
        """Change the bits of file blocks [first, last), which lie in the folio."""
        root = self.root(int(self.pages.mapping[pfn]))
        args = (self.pages.blocks, root, pfn, self.base(pfn), self.block_log)
        blocks.change(self.m4, *args, first, last, add, remove)

    def change_range(
        self, handle: int, first: int, last: int, *, add: int = 0, remove: int = 0, count: int = 0
    ) -> int:
        """Change the bits of cached blocks [first, last); how many had one of `count` before."""
        p = self.pages
        args = (self.m4, p.order, p.index, p.blocks, self.root(handle), self.block_log)
        return int(gather.change_range(*args, first, last, add, remove, count))

    def reserved_until(self, handle: int, first: int, last: int) -> int:
        """Up to which block, `last` at most, all from `first` on were promised one of their own."""
        p = self.pages
        args = (self.m4, p.order, p.index, p.blocks, self.root(handle), self.block_log)
        return int(gather.reserved_until(*args, first, last))

    def claim(self, pfn: int, first: int, last: int, add: int) -> int:
        """Give bits to the unclaimed blocks of [first, last) in a folio (0: only count them)."""
        root = self.root(int(self.pages.mapping[pfn]))
        args = (self.m4, self.pages.blocks, root, pfn, self.base(pfn), self.block_log)
        return int(blocks.claim(*args, first, last, add))

    def zero_missing(self, pfn: int, first: int, last: int) -> None:
        """Blocks [first, last) of a folio that are not up to date are holes: zero them."""
        root = self.root(int(self.pages.mapping[pfn]))
        args = (self.pages.blocks, root, pfn, self.base(pfn), self.block_log, first, last)
        blocks.zero_missing(self.m4, self.arena.mem, *args)

    def missing(self, pfn: int, first: int, last: int) -> list[tuple[int, int]]:
        """Runs of blocks in [first, last) of a folio that are not up to date."""
        root = self.root(int(self.pages.mapping[pfn]))
        args = (self.m4, self.pages.blocks, root, pfn, self.base(pfn), self.block_log)
        n = blocks.missing(*args, first, last, self.runs)
        return [(int(b), int(c)) for b, c in self.runs[:n]]

    def redirty(self, handle: int, pfn: int, first: int, last: int) -> None:
        """Blocks [first, last) of a folio were changed in place and are claimed."""
        p = self.pages
        args = (*self._tagged, p.blocks, self.dirty.counts, self.root(handle), pfn)
        self.note_dirtied(handle, int(blocks.redirty(*args, self.block_log, first, last)))

    def note_dirtied(self, handle: int, pages: int) -> None:
        """A kernel dirtied and counted pages of a mapping."""
        if pages:
            self.vol.flusher.enlist(handle)
            self.throttle.dirtied(handle, pages)

    def cut(self, pfn: int, start: int, end: int) -> tuple[int, int]:
        """Throw away bytes [start, end) of a folio; RESERVED and PENDING blocks forgotten."""
        p = self.pages
        root = self.root(int(p.mapping[pfn]))
        out = self.hint
        args = (p.flags, p.order, p.index, p.blocks, self.dirty.counts, root, pfn)
        blocks.cut(self.m4, self.m8, self.arena.mem, *args, self.block_log, start, end, out)
        return int(out[0]), int(out[1])

    def memory(self, handle: int, start: int, end: int) -> list[memoryview]:
        """Where bytes [start, end) of a file lie; the folios are there and stay."""
        p = self.pages
        views: list[memoryview] = []
        while start < end:
            args = (self.m4, p.order, p.index, self.root(handle), start, end, self.runs)
            n = gather.pieces(*args)
            assert n > 0
            for addr, length in self.runs[:n].tolist():
                views.append(self.view[addr : addr + length])
                start += length
        return views

    # -- write-back -----------------------------------------------------------------------------

    def gather(self, ioend: Ioend, handle: int, index: int, last: int, tag: int, wait: bool) -> int:
        """Move dirty folios to write-back and into an ioend; a folio to wait for first, or 0."""
        p = self.pages
        ioend.handle = handle
        self.throttle.submitting()
        return int(
            gather.gather(
                *self._tagged, p.blocks, p.refs, self.dirty.counts, self.root(handle),
                self.block_log, index, last, tag, int(wait), ioend.folios, ioend.runs, ioend.meta,
            )  # fmt: skip
        )

    def finish(self, ioend: Ioend) -> None:
        """The folios of an ioend are no longer under write-back."""
        n = ioend.nr_folios
        root = self.root(ioend.handle)
        args = (*self._tagged, self.dirty.counts, root, ioend.folios, n, self._rotate)
        rotated = gather.finish(*args)
        for pfn in self._rotate[:rotated].tolist():
            self.arena.lru.rotate(pfn)
        self._note_written(ioend.folios[:n])
        for pfn in ioend.folios[:n].tolist():
            self._wake(pfn)
            self.arena.put_folio(pfn)
        self.throttle.completed()

    def _note_written(self, pfns: NDArray[np.int64]) -> None:
        """Reclaim may wait for writes on the nodes of these folios."""
        span = int(self.arena.words[W_SPAN])
        for nid, throttle in enumerate(self.arena.reclaim.throttles):
            if throttle.waiting[THROTTLED]:
                here = pfns[pfns // span == nid]
                throttle.written(int((1 << self.pages.order[here].astype(np.int64)).sum()))

    def tag_towrite(self, handle: int, index: int, last: int) -> None:
        """Tag what is dirty now, so that integrity write-back ends."""
        p = self.pages
        args = (self.m4, self.m8, p.order, p.index, self.root(handle))
        while index >= 0:
            index = int(radix.tag_towrite(*args, index, last, 4096))

    def state(self, handle: int) -> Any:
        """The mapping's record of an inode: the flusher's state and the block accounting.

        For reading; `fs/cache/mapping.py` says which of its words are changed in kernels only.
        """
        return self.maps[handle]

    def change_flags(self, handle: int, *, add: int = 0, remove: int = 0) -> int:
        """Change a mapping's flags (LISTED is the flusher's); what they were."""
        return int(mapping.change_flags(self.m4, self.root(handle), add, remove))

    def enlist(self, handle: int) -> bool:
        return not self.change_flags(handle, add=LISTED, remove=LISTED_TIME) & LISTED

    def unlist(self, handle: int) -> bool:
        return bool(mapping.unlist(self.m4, self.root(handle)))

    def defer(self, handle: int) -> bool:
        return bool(mapping.defer(self.m4, self.root(handle)))

    def note_write(self, ip: Inode, now: int) -> None:
        """A file was written: time stamps, and the flusher has to log them."""
        blocks.written(self.m4, self.s8, ip.handle, 0, now)
        self.vol.flusher.enlist(ip.handle)

    def note_access(self, ip: Inode, now: int) -> None:
        """An object was read: the flusher has to log its access time, some day."""
        ip.atime = now
        self.change_flags(ip.handle, add=INODE_DIRTY)
        self.vol.flusher.enlist(ip.handle)

    def hold(self, handle: int) -> None:
        self.vol.inodes.hold(handle)

    def drop(self, handle: int) -> None:
        self.vol.inodes.put(Inode(self.vol.inodes, handle))

    async def write_range(
        self, handle: int, start: int, end: int, *, integrity: bool, budget: int
    ) -> int:
        """Write dirty folios of a file; see `writeback.mapping.Mappings`."""
        return await writepages.write_range(
            self.vol, handle, start, end, integrity=integrity, budget=budget
        )

    async def write_object(self, handle: int) -> None:
        """Log an inode whose time stamps or size changed in memory only."""
        await writepages.log_core(self.vol, handle)

    # -- giving memory back ---------------------------------------------------------------------

    def busy(self, handle: int) -> bool:
        """Whether an inode's record must stay because of its mapping."""
        c = self.columns
        return bool(c["flags"][handle] or c["ndirty"][handle] or c["nrwriteback"][handle])

    def evict(self, handle: int) -> None:
        """Drop all folios of an inode that is not busy; its record goes next.

        Nobody has the file open, so no lane looks at its folios.
        """
        assert not self.busy(handle)
        while pfns := self.gang(handle, 0, 1 << 52):
            for pfn in pfns:
                self.remove(pfn)
        self.shadows.forget(handle, 0, 1 << 52)
        assert not self.maps[handle]["delalloc"]
        assert not self.maps[handle]["node"]

    def policy_of(self, pfn: int) -> int:
        """See `alloc.migrate.Mover`."""
        return int(self.columns["mempolicy"][self.pages.mapping[pfn]])

    def move_folios(
        self, sources: NDArray[np.int64], targets: NDArray[np.int64], verdicts: NDArray[np.int64]
    ) -> None:
        """See `alloc.migrate.Mover`."""
        relocate(
            self.arena.words, *self.pages, self.arena.mem, self.m4, INODE_WORDS, MAPPING_WORD,
            sources, targets, verdicts,
        )  # fmt: skip

    def evict_folio(self, pfn: int) -> bool:
        """Evict a clean folio that nobody but the caller has a reference to, which goes, too."""
        if self.evict_folios([pfn]) != [gather.EVICTED]:
            return False
        self.arena.put_folio(pfn)
        self.arena.put_folio(pfn)
        return True

    def evict_folios(self, pfns: list[int]) -> list[int]:
        """Take isolated folios out of their mappings where nobody minds; the kernel's verdicts."""
        p = self.pages
        batch = np.array(pfns, np.int64)
        nodes = gather.evict(
            *self._tagged, p.mapping, p.refs, self.dirty.counts, self.arena.words,
            self.shadows.listed, INODE_WORDS, MAPPING_WORD, batch, len(pfns), self._freed,
            self._verdicts,
        )  # fmt: skip
        verdicts: list[int] = self._verdicts[: len(pfns)].tolist()
        for node in self._freed[:nodes].tolist():
            self.give_node(node)
        return verdicts
