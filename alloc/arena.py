"""The arena: all memory of the filesystem, and the calls that hand it out.

One mapping: its pages, and vmalloc's window behind them. `alloc_folio` and `Slab.alloc` return what
was asked for; they may wait, in FIFO order, and never fail. The fast path is one jitted call and
does not touch trio; the slow path takes a ticket, wakes kswapd, reclaims on its own behalf, wakes
the cleaners, and sleeps until a free serves it (`alloc/slowpath.py`). Another policy than irix
makes them raise AllocationFailed.

A request that could never be served (an order above 10, a size that is no slab size) is a mistake
in the program and raises ValueError at once. The try_* spellings exist for callers that said with
a gfp flag that they can do with less.

Freeing wakes: every path that gives memory back looks whether somebody waits. Frees on the trio
thread serve at once, frees on other threads post to the loop.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import trio
from numpy.typing import DTypeLike, NDArray

from alloc import buddy, check, hostnodes, lockdep, magazine, mempolicy, pcp, rows, slab, zone
from alloc.balance import Balancer
from alloc.compaction import Compaction
from alloc.gfp import (
    COSTLY_ORDER,
    FAILABLE,
    KERNEL,
    MEMALLOC,
    MT_SHIFT,
    NOFAIL,
    ZERO,
    current_scope,
    effective,
)
from alloc.jit import record_table
from alloc.libc import zero
from alloc.lru import Lru
from alloc.mempool import Mempool
from alloc.node import divide, spanned
from alloc.page import (
    ORDER_MAX,
    PAGE_SHIFT,
    PAGE_SIZE,
    S_LIMIT,
    S_OBJECTS,
    S_RECLAIMABLE,
    S_SHIFT,
    S_SLABS,
    SLAB_CACHES,
    SLAB_WORDS,
    W_FREE,
    W_FREE_HIGHATOMIC,
    W_HIGH,
    W_LOW,
    W_MEMPOLICY,
    W_MIN,
    W_PROMO,
    W_SLAB,
    W_SPAN,
    W_START,
    W_WEIGHT,
    Buddy,
    Slabs,
    make_pages,
    make_words,
)
from alloc.placement import placement
from alloc.policy import IRIX, Injector, Policy
from alloc.pressure import Pressure
from alloc.rcu import Rcu
from alloc.reclaim import Reclaim
from alloc.shrinker import DEFAULT_SEEKS, NO_NODE, SHRINK_BATCH, NodeCache, Share, Shrinker
from alloc.slabinfo import slabinfo
from alloc.slowpath import Request, SlowPath
from alloc.stall import STALL_S, Stalls, no_locks
from alloc.topology import ONE, Topology, span_pages
from alloc.victim import Victims
from alloc.vmalloc import Vmalloc, map_memory
from alloc.vmstat import VmStat, meminfo
from alloc.wait import WHO
from alloc.watermarks import KB_PER_PAGE, SCALE_FACTOR, Watermarks, share, watermarks
from alloc.zoneinfo import buddyinfo, extfrag, pagetypeinfo, zoneinfo

MEMORY_MIN = 8 << 20
REFRESH_S = 1.0
MT_DOWN = MT_SHIFT - buddy.MT_SHIFT  # from where gfp flags have it to the rights
SLAB_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _type(gfp: int) -> int:
    """The migratetype of a request, where rights have it."""
    return gfp >> MT_DOWN & buddy.MT_MASK << buddy.MT_SHIFT


def _nr_pages(memory_bytes: int) -> int:
    if memory_bytes < MEMORY_MIN:
        raise ValueError(f"memory of {memory_bytes} bytes: at least 8 MiB are needed")
    if memory_bytes % PAGE_SIZE:
        raise ValueError(f"memory of {memory_bytes} bytes: not a multiple of {PAGE_SIZE}")
    return memory_bytes >> PAGE_SHIFT


class Arena:
    """`memory_bytes` of memory (a multiple of 4096, from 8 MiB) and everything that manages it."""

    def __init__(self, memory_bytes: int, policy: Policy = IRIX, nodes: Topology = ONE) -> None:
        self.memory_bytes = memory_bytes
        self.nr_pages = _nr_pages(memory_bytes)
        span = span_pages(self.nr_pages, nodes.nr_nodes)
        # page 0 is reserved, so the first block of the largest order is not whole
        self.order_max = min(ORDER_MAX, span.bit_length() - 2)
        self._map = map_memory(memory_bytes)
        self.mem: NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
        self.pages = pages = make_pages(self.nr_pages)
        self.words = make_words(nodes.nr_nodes, zone.room_for_blocks(span))
        self.topology = nodes
        self.nodes = divide(self.words, self.nr_pages, nodes)
        self._several = nodes.nr_nodes > 1
        self._turn = 0  # requests that the mount's policy has placed without an offset
        self._place_nodes()
        self._rows = 1  # the trio thread's, and one for each lane
        for words in self.nodes:
            zone.configure(words)
        self._set_marks(watermarks(self.nr_pages))
        self.watermark_scale_factor = SCALE_FACTOR
        self.vfs_cache_pressure = 100  # percent of names and inodes that reclaim is told of
        self.buddy = Buddy(
            self.words, pages.flags, pages.order, pages.refs, pages.lru_next, pages.lru_prev
        )
        bitmaps = (pages.private, pages.index.view(np.uint64))
        self.slabs = Slabs(*self.buddy, pages.mapping, *bitmaps)
        for words in self.nodes:
            buddy.build_free_lists(*self.buddy._replace(words=words))
        assert self.free_pages == self.nr_pages - 1
        self.vmstat = VmStat(self.nodes)
        self.rcu = Rcu(memory_bytes)
        self.pressure = Pressure()
        self.victims = Victims(self.vmstat)
        self.slow = SlowPath(self)
        self.queue = self.slow.queue
        self.stalls = Stalls(self)
        self.stall_seconds = STALL_S  # a wait that lasts as long is reported
        self.holders: Callable[[trio.lowlevel.Task], list[str]] = no_locks  # by stall reports
        self.lru = Lru(
            self.buddy, self.vmstat, self.put_folio,
            self.slow.wanted_order, lambda: self.reclaim.who,
        )  # fmt: skip
        self.reclaim = Reclaim(self.nodes, self.lru, self.vmstat, self.slow.waiting)
        self.compaction = Compaction(
            self.buddy, self.nodes, self.vmstat, self.drain_all, self.queue.serve_soon
        )
        self.balancer = Balancer(self.compaction, self.nodes, pages, self.queue.serve_soon)
        self.vmstat.gauge("rcu_deferred_bytes", lambda: self.rcu.deferred_bytes)
        self.vmstat.gauge("rcu_expedited", lambda: self.rcu.expedited)
        self.vmstat.gauge("rcu_stalls", lambda: self.rcu.stalls)
        self.register_shrinker(self.rcu)
        self._slab_caches: dict[str, Slab] = {}
        self.mempools: list[Mempool] = []
        self.vmstat.gauge("mempool_waits", lambda: sum(pool.waits for pool in self.mempools))
        self.vmalloc = Vmalloc(self)
        self.set_policy(policy)
        self.closed = False

    def _place_nodes(self) -> None:
        """Where the machine has nodes, each of the arena's lies on one."""
        borders = [(int(words[W_START]), spanned(words)) for words in self.nodes]
        spans = [(first << PAGE_SHIFT, pages << PAGE_SHIFT) for first, pages in borders]
        hostnodes.place(self.mem.ctypes.data, spans)

    def set_policy(self, policy: Policy) -> None:
        """The rule from now on, also for who waits already; inject counts from here."""
        self.policy = policy
        self._injector: Injector | None = None
        if policy.kind == "inject":
            self._injector = Injector(policy, lambda: self.vmstat.add("alloc_failed"))

    # ---------------------------------------------------------------- folios

    async def alloc_folio(
        self, order: int, gfp: int = KERNEL, policy: int = mempolicy.NONE, offset: int = -1
    ) -> int:
        """A folio of 2^order pages with one reference; its pfn. Contents undefined without ZERO.

        policy: the memory policy of what it is for; offset: which folio of that it is.
        """
        gfp |= current_scope()
        if not 0 <= order <= COSTLY_ORDER:
            self.slow.admit_large(order, gfp)
        assert gfp & FAILABLE == 0, "a request that may fail is spelled try_alloc_folio"
        if self._injector is not None:
            self._injector.look(f"order:{order}", order, gfp)
        if lockdep.current is not None:
            lockdep.current.allocates(gfp)
        rights = _type(gfp) | (buddy.RIGHTS_ALL if gfp & MEMALLOC else buddy.RIGHTS_MIN)
        placed = self._place(policy, offset) if self._several else 0
        rights |= placed
        pfn: int = pcp.alloc_block(*self.buddy, rows.TRIO, order, rights)
        if pfn <= 0:
            if pfn:
                self.reclaim.wake_kswapd(placed)
                pfn = -pfn
            else:
                pfn = await self.slow.wait(self._folio_request(order, gfp, placed))
        if gfp & ZERO:
            zero(self.mem, pfn << PAGE_SHIFT, PAGE_SIZE << order)
        return pfn

    async def alloc_pages(self, nr: int, gfp: int = KERNEL) -> list[int]:
        """So many folios of a page, wherever they lie; while they are not all there it has none."""
        gfp |= current_scope()
        assert gfp & (FAILABLE | ZERO) == 0, "pages that are there, content undefined"
        if self._injector is not None:
            self._injector.look("order:0", 0, gfp)
        if lockdep.current is not None:
            lockdep.current.allocates(gfp)
        placed = self._place() if self._several else 0
        got: list[int] = []

        def undo(_: int) -> None:
            for pfn in got:  # as free as before: nobody is to be told
                pcp.put_block(*self.buddy, rows.TRIO, pfn)
            got.clear()

        def attempt(rights: int) -> int:
            kept = self.marks.min if rights & WHO == buddy.RIGHTS_MIN else 0
            while len(got) < nr and self.free_pages - (nr - len(got)) >= kept:
                pfn = self._take_folio(0, rights | _type(gfp))
                if not pfn:
                    break
                got.append(pfn)
            if len(got) < nr:
                undo(0)
            return len(got)

        rights = buddy.RIGHTS_ALL if gfp & MEMALLOC else buddy.RIGHTS_MIN
        if not attempt(rights | placed):
            await self.slow.wait(
                Request(f"pages:{nr}", "pages", nr, 0, gfp, attempt, undo, placed)
            )
        return got

    def try_alloc_folio(
        self, order: int, gfp: int, policy: int = mempolicy.NONE, offset: int = -1
    ) -> int | None:
        """A folio if it can be had without waiting, as far as its flags let it try."""
        if not 0 <= order <= self.order_max:
            raise ValueError(f"a folio of order {order}: orders are 0 to {self.order_max}")
        gfp = effective(gfp)
        assert gfp & FAILABLE, "a request that may fail says how hard to try"
        assert not gfp & NOFAIL, "a request that cannot fail must be allowed to wait"
        rights = buddy.RIGHTS_ALL if gfp & MEMALLOC else buddy.RIGHTS_MIN
        placed = self._place(policy, offset) if self._several else 0
        pfn = self._take_folio(order, rights | _type(gfp) | placed)
        if not pfn:
            pfn = self.slow.try_now(self._folio_request(order, gfp, placed))
        if pfn and gfp & ZERO:
            zero(self.mem, pfn << PAGE_SHIFT, PAGE_SIZE << order)
        return pfn or None

    def get_folio(self, pfn: int) -> None:
        """One more reference to the folio with head page `pfn`."""
        before = buddy.get_page(*self.buddy, pfn)
        assert before > 0, f"page {pfn} is not the head of an allocated folio"

    def try_get_folio(self, pfn: int) -> bool:
        """One more reference unless the last one is gone; for lookups that hold no lock."""
        return bool(buddy.try_get_page(*self.buddy, pfn))

    def put_folio(self, pfn: int) -> bool:
        """Drop a reference; True when it was the last one and the folio was freed."""
        code = pcp.put_block(*self.buddy, rows.TRIO, pfn)
        if code == buddy.STILL_USED:
            return False
        assert code != buddy.NOT_ALLOCATED, f"page {pfn} is not the head of an allocated folio"
        assert code != buddy.FREED_WHILE_BUSY, (
            f"folio {pfn} freed with flags {int(self.pages.flags[pfn]):#x}"
        )
        if code == buddy.FREED_AND_WAITERS:
            self.queue.serve_soon()
        return True

    def folio_head(self, pfn: int) -> int:
        """Head page of the allocated block that `pfn` lies in."""
        return pfn & -(1 << int(self.pages.order[pfn]))

    def _take_folio(self, order: int, rights: int) -> int:
        """The jitted allocator with kswapd's wake-up; 0 when it would block."""
        pfn: int = pcp.alloc_block(*self.buddy, rows.TRIO, order, rights)
        if pfn == 0 and rights & buddy.RIGHTS_QUEUED:
            self.drain_all()
            pfn = pcp.alloc_block(*self.buddy, rows.TRIO, order, rights)
        if pfn < 0:
            self.reclaim.wake_kswapd(rights)
        return abs(pfn)

    def _folio_request(self, order: int, gfp: int, placed: int) -> Request:
        mt = _type(gfp)
        return Request(
            f"order:{order}",
            "folio",
            order,
            order,
            gfp,
            lambda rights: self._take_folio(order, rights | mt),
            self.put_folio,
            placed,
        )

    # ---------------------------------------------------------------- slabs

    def slab(self, name: str, dtype: DTypeLike, reclaimable: bool = False) -> Slab:
        """The cache of objects of this record type; made on first use, one per name.

        reclaimable: a shrinker gives its objects back; its slabs lie among their like.
        """
        kind = np.dtype(dtype)
        known = self._slab_caches.get(name)
        if known is not None:
            assert known.dtype == kind, f"slab {name} has another type"
            return known
        if kind.itemsize not in SLAB_SIZES:
            raise ValueError(f"slab {name}: {kind.itemsize} bytes is not one of {SLAB_SIZES}")
        number = len(self._slab_caches)
        assert number < SLAB_CACHES, "out of slab caches: raise SLAB_CACHES"
        cache = self._slab_caches[name] = Slab(self, name, number, kind)
        for words in self.nodes:
            words[W_SLAB + number * SLAB_WORDS + S_RECLAIMABLE] = reclaimable
        return cache

    @property
    def slab_caches(self) -> tuple[Slab, ...]:
        return tuple(self._slab_caches.values())

    # ---------------------------------------------------------------- nodes

    def set_mempolicy(self, policy: int) -> None:
        """The memory policy of all requests for which neither inode nor task have one."""
        self.words[W_MEMPOLICY] = policy

    def set_weights(self, weights: Sequence[int]) -> None:
        """How many pages in a row each node gets by the policy `weighted`; 1 to 255."""
        mempolicy.set_weights(self.nodes, weights)

    @property
    def weights(self) -> list[int]:
        return [int(words[W_WEIGHT]) for words in self.nodes]

    def node_of(self, pfn: int) -> int:
        """The node that a page lies in."""
        return pfn // int(self.words[W_SPAN])

    def _place(self, policy: int = mempolicy.NONE, offset: int = -1) -> int:
        """Where a request should be served, as rights have it."""
        task = mempolicy.current_task()
        if not policy and task is not None:
            policy = task.number
        if offset < 0 and task is not None and policy == task.number:
            offset = task.turn
            task.turn += 1
        elif offset < 0:
            offset = self._turn
            self._turn += 1
        return placement(self.words, policy, offset, mempolicy.current_home())

    # ---------------------------------------------------------------- rows

    def set_lanes(self, lanes: int) -> None:
        """How many lanes will use rows 1 and up; what is in rows goes back first."""
        self.drain_all()
        self._rows = 1 + lanes
        self._size_rows()

    def drain_all(self) -> None:
        """Every row's free blocks and objects go back to where all can have them."""
        self._drain_rows(wholesale=True)
        self.vmstat.add("drain_all_pages")

    def refresh_rows(self) -> None:
        """Once a second: rows give back what they have not used lately."""
        self._drain_rows(wholesale=False)

    def _drain_rows(self, wholesale: bool) -> None:
        for words in self.nodes:
            code = magazine.drain_rows(*self.slabs._replace(words=words), wholesale)
            assert code == buddy.FREED, "an object that came home from a magazine was free already"

    # ---------------------------------------------------------------- pageblocks

    def release_reserve(self, gfp: int) -> bool:
        """Reclaim has failed: the high-atomic reserve is for everybody. Whether it had memory."""
        mt = gfp >> MT_SHIFT & buddy.MT_MASK
        released = 0
        for words in self.nodes:
            if words[W_FREE_HIGHATOMIC]:
                released += zone.release_reserve(*self.buddy._replace(words=words), mt)
        return released > 0

    # ---------------------------------------------------------------- reclaim

    def register_shrinker(
        self,
        shrinker: Shrinker,
        seeks: int = DEFAULT_SEEKS,
        batch: int = SHRINK_BATCH,
        nid: int = NO_NODE,
    ) -> None:
        """A cache that gives memory back on demand; called in the order of registration.

        nid: the node whose memory it is, of a cache that has one shrinker for each.
        """
        self.reclaim.register_shrinker(shrinker, seeks, batch, nid)

    def register_by_node(self, cache: NodeCache) -> None:
        """A cache whose objects are kept by node: a shrinker for each."""
        for nid in range(len(self.nodes)):
            self.register_shrinker(Share(cache, nid), nid=nid)

    def unregister_shrinker(self, shrinker: Shrinker) -> None:
        self.reclaim.unregister_shrinker(shrinker)

    def register_cleaner(self, wake: Callable[[], None]) -> None:
        """`wake` is called when clean memory runs short; it starts write-back and returns."""
        self.reclaim.register_cleaner(wake)

    async def kswapd(self) -> None:
        """Background reclaim and compaction; run it in the volume's nursery, and cancel it."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._refresh)
            nursery.start_soon(self.rcu.reaper, lambda: bool(self.queue))
            for node in self.compaction.nodes:
                nursery.start_soon(node.kcompactd)
            if self._several:
                nursery.start_soon(self.balancer.run)
            for kswapd in self.reclaim.kswapds:
                nursery.start_soon(kswapd.run)

    async def _refresh(self) -> None:
        while True:
            await trio.sleep(REFRESH_S)
            self.refresh_rows()

    def kick(self) -> None:
        """Something became reclaimable (an I/O ended, a lock was dropped): waiters try again.

        Call it on the trio thread. Costs nothing when nobody waits.
        """
        if self.queue or any(words[W_FREE] < words[W_LOW] for words in self.nodes):
            self.queue.serve()
            self.reclaim.kick()
            self.queue.nudge(everyone=not self.reclaim.running)

    def set_watermarks(self, min_free_kbytes: int, scale_factor: int) -> None:
        """Other marks, from now on.

        Raises ValueError for a `min` below a page, and if `high` would be above half of the arena.
        """
        if min_free_kbytes < KB_PER_PAGE:
            raise ValueError(f"min_free_kbytes of {min_free_kbytes}: at least a page is needed")
        marks = watermarks(self.nr_pages, scale_factor, min_free_kbytes)
        if marks.high > self.nr_pages // 2:
            raise ValueError(f"high mark of {marks.high} pages: the arena has {self.nr_pages}")
        self.watermark_scale_factor = scale_factor
        self._set_marks(marks)
        if self.free_pages < marks.low:
            self.reclaim.wake_kswapd()
        self.kick()

    def _set_marks(self, marks: Watermarks) -> None:
        """The marks, each node's part of them, and the sizes that follow."""
        self.marks = marks
        for words in self.nodes:
            words[[W_MIN, W_LOW, W_HIGH, W_PROMO]] = share(
                marks, spanned(words), self.nr_pages
            )
            zone.limit_boost(words, int(words[W_HIGH]))
        self._size_rows()

    def _size_rows(self) -> None:
        for words in self.nodes:
            rows.configure(words, spanned(words), int(words[W_LOW]), self._rows)

    @property
    def below_min(self) -> bool:
        """Whether only the reserve is left."""
        return self.vmstat["nr_free_pages"] < self.marks.min

    @property
    def min_free_kbytes(self) -> int:
        return self.marks.min * KB_PER_PAGE

    def vfs_count(self, objects: int) -> int:
        """Of so many names or inodes, how many their shrinker owns up to: vfs_cache_pressure."""
        return max(objects * self.vfs_cache_pressure // 100, min(objects, 1))

    # ---------------------------------------------------------------- reports

    @property
    def free_pages(self) -> int:
        """Pages in nobody's hands: the buddy's and those on rows' lists."""
        return sum(int(words[W_FREE]) + rows.nr_pages_listed(words) for words in self.nodes)

    def meminfo(self) -> dict[str, int]:
        """Sizes in KiB under the names of /proc/meminfo."""
        return meminfo(self.nodes, self.vmstat) | self.vmalloc.meminfo()

    def buddyinfo(self) -> str:
        """Free blocks per order, as /proc/buddyinfo prints them."""
        return buddyinfo(self.nodes)

    def waiters(self) -> list[str]:
        """Who waits for memory: a line for each, oldest first. Call it on the trio thread."""
        return self.stalls.waiters()

    def extfrag(self) -> str:
        """Fragmentation by order: extfrag_index and unusable_index, as debugfs prints them."""
        return extfrag(self.nodes)

    def slabinfo(self) -> str:
        """Every slab cache, as /proc/slabinfo prints them."""
        return slabinfo(self.slab_caches)

    def zoneinfo(self) -> str:
        """Marks and counts of each node, as /proc/zoneinfo prints them."""
        hopeless = [kswapd.hopeless for kswapd in self.reclaim.kswapds]
        return zoneinfo(self.nodes, self.vmstat, hopeless)

    def pagetypeinfo(self) -> str:
        """Free blocks and pageblocks by migratetype, as /proc/pagetypeinfo prints them."""
        return pagetypeinfo(self.nodes)

    def check(self) -> None:
        """Validate every structure; AssertionError says what is wrong.

        Cost: about 1 us a page (a quarter second for 1 GiB). No other thread may be allocating.
        """
        check.check(self)

    def close(self) -> None:
        """Release the memory. Views that others still hold read zeros and keep only addresses."""
        if self.closed:
            return
        assert not self.queue, "the arena is closed while tasks wait for memory"
        self.closed = True
        self._map.madvise(mmap.MADV_REMOVE, 0, self.memory_bytes)


class Slab:
    """One slab cache. `table` is the arena as an array of the record type."""

    def __init__(self, arena: Arena, name: str, number: int, dtype: np.dtype[Any]) -> None:
        self.arena = arena
        self.name = name
        self.number = number
        self.dtype = dtype
        self.size = dtype.itemsize
        self.table: NDArray[Any] = record_table(arena.mem.view(dtype))
        self._at = W_SLAB + number * SLAB_WORDS
        for words in arena.nodes:
            words[self._at + S_SHIFT] = self.size.bit_length() - 1
            words[self._at + S_LIMIT] = rows.magazine_limit(self.size)
        assert self.size == 1 << int(arena.words[self._at + S_SHIFT])

    async def alloc(self, gfp: int = KERNEL) -> int:
        """A zeroed object; its index in `table`. Never fails."""
        gfp |= current_scope()
        assert gfp & FAILABLE == 0, "a request that may fail is spelled try_alloc"
        if lockdep.current is not None:
            lockdep.current.allocates(gfp)
        arena = self.arena
        if arena._injector is not None:
            arena._injector.look(f"slab:{self.name}", 0, gfp)
        rights = buddy.RIGHTS_ALL if gfp & MEMALLOC else buddy.RIGHTS_MIN
        placed = arena._place() if arena._several else 0
        rights |= placed
        i: int = magazine.slab_alloc(*arena.slabs, arena.mem, self.number, rights, rows.TRIO)
        if i > 0:
            return i
        if i < 0:
            arena.reclaim.wake_kswapd(placed)
            return -i
        return await arena.slow.wait(self._request(gfp, placed))

    def try_alloc(self, gfp: int) -> int | None:
        """An object if it can be had without waiting, as far as its flags let it try."""
        gfp = effective(gfp)
        assert gfp & FAILABLE, "a request that may fail says how hard to try"
        assert not gfp & NOFAIL, "a request that cannot fail must be allowed to wait"
        rights = buddy.RIGHTS_ALL if gfp & MEMALLOC else buddy.RIGHTS_MIN
        placed = self.arena._place() if self.arena._several else 0
        got = self._take(rights | placed)
        return got or self.arena.slow.try_now(self._request(gfp, placed)) or None

    def _request(self, gfp: int, placed: int) -> Request:
        what = f"slab:{self.name}"
        return Request(what, "slab", self.number, 0, gfp, self._take, self.free, placed)

    def _take(self, rights: int) -> int:
        arena = self.arena
        i: int = magazine.slab_alloc(*arena.slabs, arena.mem, self.number, rights, rows.TRIO)
        if i == 0 and rights & buddy.RIGHTS_QUEUED:
            arena.drain_all()
            i = magazine.slab_alloc(*arena.slabs, arena.mem, self.number, rights, rows.TRIO)
        if i < 0:
            arena.reclaim.wake_kswapd(rights)
        return abs(i)

    def free(self, i: int) -> None:
        """Give object `i` back."""
        code = magazine.slab_free(*self.arena.slabs, self.number, i, rows.TRIO)
        assert code != slab.NOT_OF_THIS_CACHE, f"object {i} is not one of slab {self.name}"
        assert code != slab.FREE_ALREADY, f"object {i} of slab {self.name} is freed twice"
        if code == buddy.FREED_AND_WAITERS:
            self.arena.queue.serve_soon()

    def addr(self, i: int) -> int:
        """Byte offset of object `i` in the arena."""
        return i * self.size

    @property
    def span(self) -> int:
        """Objects that each node has room for: object i lies on node i // span."""
        return int(self.arena.words[W_SPAN]) * (PAGE_SIZE // self.size)

    @property
    def nr_objects(self) -> int:
        """Objects in somebody's hands."""
        return sum(
            int(words[self._at + S_OBJECTS]) - rows.objects_in_magazines(words, self.number)
            for words in self.arena.nodes
        )

    @property
    def nr_slabs(self) -> int:
        return sum(int(words[self._at + S_SLABS]) for words in self.arena.nodes)
