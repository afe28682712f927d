"""The page cache: folio orders, what reclaim may take, and the per-block bits against a model."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alloc import gfp
from alloc.page import DIRTY, LOCKED, WRITEBACK
from fs import delalloc, file
from fs.cache import blocks, gather, mapping, radix, window
from fs.cache.folio import ORDER_MAX, write_order
from fs.cache.incore import I4_MAPPING, I8_SIZE, INODE
from fs.cache.mapping import W_DELALLOC, W_FLAGS, W_INDIRECT, W_NDIRTY, W_PENDING
from fs.xfs import layout as L
from tests import support
from tests.fs.imagefiles import a_file, opened
from writeback.dirty import NR_COUNTS
from writeback.mapping import INODE_DIRTY, LISTED, LISTED_TIME

KIB, MIB = 1 << 10, 1 << 20


def orders_of(pos: int, length: int) -> list[int]:
    """The orders that one write asks for, when nothing is cached and memory is plenty."""
    orders, end = [], pos + length
    while pos < end:
        order = write_order(pos, end - pos)
        orders.append(order)
        pos = min(end, (pos >> 12 << 12) + (4096 << order))
    return orders


@pytest.mark.parametrize(
    ("pos", "length", "expected"),
    [
        (0, 64 * KIB, [4]),
        (4 * KIB, 64 * KIB, [0, 1, 2, 3, 0]),
        (0, 100_000, [4, 3, 0]),
        (0, 2 * MIB, [9]),
    ],
)
def test_golden_write_orders(pos: int, length: int, expected: list[int]) -> None:
    assert orders_of(pos, length) == expected


@pytest.mark.parametrize(
    ("pos", "length", "order"),
    [
        (0, 4096, 0),
        (0, 8191, 0),
        (0, 8192, 1),
        (4096, 65536, 0),
        (8192, 65536, 1),
        (65536, 1 << 20, 4),
        (3 * 4096, 1 << 20, 0),
        (0, 1 << 22, 9),
    ],
)
def test_golden_first_orders(pos: int, length: int, order: int) -> None:
    assert write_order(pos, length) == order


def test_orders_respect_the_smallest_and_the_largest() -> None:
    assert write_order(4096, 1, order_min=4) == 4
    assert write_order(0, 1 << 21, order_max=5) == 5
    assert all(order == ORDER_MAX for order in orders_of(0, 8 << 20))


def test_golden_readahead_windows() -> None:
    sizes = [window.first_window(1, 256)]
    while sizes[-1] < 256:
        sizes.append(window.next_window(sizes[-1], 256))
    assert sizes == [4, 16, 32, 64, 128, 256]
    assert window.first_window(1, 32) == 4
    assert window.first_window(8, 32) == 16
    assert window.first_window(9, 32) == 32


# -- on a volume -------------------------------------------------------------------------------


async def test_folios_of_a_write_and_what_stays_of_them(scratch: Path) -> None:
    async with opened(support.mkfs(scratch), 64 << 20) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 4096, bytes(64 * KIB))
        pfns = vol.pages.gang(ip.handle, 0, 100)
        assert [int(vol.arena.pages.order[pfn]) for pfn in pfns] == [0, 1, 2, 3, 0]
        await file.write(vol, ip, 0, bytes(1 * MIB))  # what is there wins
        assert vol.pages.gang(ip.handle, 1, 16) == pfns
        assert vol.pages.state(ip.handle)["nrpages"] == 256
        vol.arena.check()


async def test_large_folios_fall_back_when_memory_is_in_pieces(scratch: Path) -> None:
    async with opened(support.mkfs(scratch), 16 << 20) as vol, a_file(vol) as ip:
        taken = []
        while True:
            pfn = vol.arena.try_alloc_folio(0, gfp.NOWAIT | gfp.MEMALLOC)
            if pfn is None:
                break
            taken.append(pfn)
        for pfn in taken:
            if pfn % 2:
                vol.arena.put_folio(pfn)
        await file.write(vol, ip, 0, bytes(64 * KIB))
        pfns = vol.pages.gang(ip.handle, 0, 100)
        orders = [int(vol.arena.pages.order[pfn]) for pfn in pfns]
        assert max(orders) < 4  # as asked for first
        assert 0 in orders
        assert sum(1 << order for order in orders) == 16
        for pfn in taken:
            if pfn % 2 == 0:
                vol.arena.put_folio(pfn)


async def test_blocks_above_page_size_have_folios_that_hold_them(scratch: Path) -> None:
    image = support.mkfs(scratch, "-b", "size=64k")
    async with opened(image) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 3 * 65536 + 5000, b"x")
        (pfn,) = vol.pages.gang(ip.handle, 0, 1000)
        assert int(vol.arena.pages.order[pfn]) == 4
        assert vol.pages.base(pfn) == 3 * 65536
        bits = vol.arena.pages.blocks[pfn : pfn + 16]
        assert set(bits.tolist()) == {
            blocks.UPTODATE | blocks.DIRTY_BLOCK | blocks.RESERVED | blocks.PENDING
        }


async def test_reclaim_takes_clean_folios_only(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, bytes(4 * KIB))
        await file.fsync(vol, ip)
        await file.write(vol, ip, 4 * KIB, bytes(4 * KIB))
        clean, dirty = vol.pages.find(ip.handle, 0), vol.pages.find(ip.handle, 1)
        vol.arena.get_folio(clean)
        vol.arena.reclaim.shrink_all(0, gfp.NOFS, "direct", 1000)
        assert vol.pages.find(ip.handle, 0) == clean  # in use
        vol.arena.put_folio(clean)
        vol.pages.lock(clean)
        vol.arena.reclaim.shrink_all(0, gfp.NOFS, "direct", 1000)
        assert vol.pages.find(ip.handle, 0) == clean  # locked
        vol.pages.unlock(clean)
        for _ in range(2):
            vol.arena.reclaim.shrink_all(0, gfp.NOFS, "direct", 1000)
        assert vol.pages.find(ip.handle, 0) == 0
        assert vol.pages.find(ip.handle, 1) == dirty
        assert vol.arena.pages.flags[dirty] & (DIRTY | LOCKED | WRITEBACK) == DIRTY


async def test_evict_empties_a_mapping(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, bytes(MIB))
        await file.write(vol, ip, 1 << 33, b"x")
        assert vol.pages.busy(ip.handle)
        await file.fsync(vol, ip)
        assert not vol.pages.busy(ip.handle)
        nodes = vol.pages.nodes.nr_objects
        vol.pages.evict(ip.handle)
        assert vol.pages.state(ip.handle)["nrpages"] == 0
        assert vol.pages.nodes.nr_objects <= nodes
        assert vol.arena.lru.nr_active + vol.arena.lru.nr_inactive == 0
        vol.arena.check()


async def test_folios_end_write_back_with_one_reference(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, bytes(300 * KIB))
        await vol.flusher.sync()
        for pfn in vol.pages.gang(ip.handle, 0, 1000):
            assert vol.arena.pages.refs[pfn] == 1
            assert not vol.arena.pages.flags[pfn] & (DIRTY | WRITEBACK | LOCKED)
        assert vol.pages.next(ip.handle, 0, 1000, radix.DIRTY) == 0
        assert vol.pages.next(ip.handle, 0, 1000, radix.WRITEBACK) == 0


# -- kernels and their naive twins -------------------------------------------------------------


class Cached:
    """One file's folios in a small arena of the test's own, and a model of their blocks."""

    def __init__(self, block_log: int, orders: list[int]) -> None:
        self.block_log = block_log
        smallest = max(0, block_log - 12)
        self.m4 = np.zeros(64 * 128, np.uint32)
        self.m8 = self.m4.view(np.uint64)
        pages = 2048
        self.mem = np.zeros(pages * 4096, np.uint8)
        self.flags = np.zeros(pages, np.uint32)
        self.orders = np.zeros(pages, np.uint8)
        self.indices = np.zeros(pages, np.int64)
        self.blocks = np.zeros(pages, np.uint32)
        self.mapping = np.zeros(pages, np.uint32)
        self.refs = np.ones(pages, np.int32)
        self.counts = np.zeros(NR_COUNTS, np.int64)
        self.out = np.zeros(4, np.int64)
        self.root = I4_MAPPING  # of inode 0
        self.state: dict[int, set[int]] = {}  # block -> bits
        self.bytes = bytearray()
        spare = np.arange(1, 60, dtype=np.uint32)
        left, pfn, index = 59, 16, 0
        self.pfns: list[int] = []
        for wanted in orders:
            order = max(wanted, smallest)
            index = -(-index >> order) << order
            pfn = -(-pfn >> order) << order
            self.orders[pfn] = order
            used = gather.attach(
                self.m4, self.m8, self.flags, self.orders, self.indices, self.blocks,
                self.mapping, self.root, 1, index, order, pfn, spare, left, 0,
                np.zeros(1, np.int64),
            )  # fmt: skip
            assert used >= 0
            left -= used
            self.pfns.append(pfn)
            first = (index << 12) >> block_log
            index += 1 << order
            self.state |= {block: set() for block in range(first, (index << 12) >> block_log)}
            pfn += 1 << order
        self.size = index << 12
        self.bytes = bytearray(self.size)

    def change(self, first: int, last: int, add: int, remove: int, count: int) -> int:
        return int(
            gather.change_range(
                self.m4, self.orders, self.indices, self.blocks, self.root, self.block_log,
                first, last, add, remove, count,
            )  # fmt: skip
        )

    def copy_in(self, pos: int, data: bytes) -> int:
        source = np.frombuffer(data, np.uint8)
        return int(
            blocks.copy_in(
                self.m4, self.m8, self.mem, self.flags, self.orders, self.indices, self.blocks,
                self.counts, self.root, self.block_log, pos, source, 0, len(data), self.out,
            )  # fmt: skip
        )

    def copy_out(self, pos: int, length: int) -> bytes:
        target = np.zeros(length, np.uint8)
        n = blocks.copy_out(
            self.m4, self.mem, self.flags, self.orders, self.indices, self.blocks, self.root,
            self.block_log, pos, target, 0, length, self.out,
        )  # fmt: skip
        return target[:n].tobytes()

    def spans(self, pos: int, end: int) -> list[tuple[int, int, int]]:
        """(block, start, stop) of the blocks that [pos, end) touches."""
        size = 1 << self.block_log
        numbers = range(pos >> self.block_log, ((end - 1) >> self.block_log) + 1)
        return [(b, max(pos, b * size), min(end, (b + 1) * size)) for b in numbers]

    def naive_copy_in(self, pos: int, data: bytes) -> int:
        size = 1 << self.block_log
        claimed = {blocks.DIRTY_BLOCK, blocks.RESERVED, blocks.MAPPED, blocks.PENDING}
        for block, start, stop in self.spans(pos, pos + len(data)):
            bits = self.state.get(block)
            if bits is None or not bits & claimed:
                return start - pos
            if stop - start < size and blocks.UPTODATE not in bits:
                return start - pos
            self.bytes[start:stop] = data[start - pos : stop - pos]
            bits |= {blocks.UPTODATE, blocks.DIRTY_BLOCK}
        return len(data)

    def naive_copy_out(self, pos: int, length: int) -> bytes:
        for block, start, _ in self.spans(pos, pos + length):
            if blocks.UPTODATE not in self.state.get(block, set()):
                return bytes(self.bytes[pos:start])
        return bytes(self.bytes[pos : pos + length])


GROUPS = (blocks.UPTODATE, blocks.DIRTY_BLOCK, blocks.RESERVED, blocks.MAPPED, blocks.PENDING)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([10, 11, 12, 13, 16]),
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.integers(0, 1 << 30),
)
def test_copies_and_bits_equal_the_naive_twin(
    block_log: int, orders: list[int], seed: int
) -> None:
    cache = Cached(block_log, orders)
    rng = random.Random(seed)
    last_block = cache.size >> block_log
    for _ in range(30):
        first = rng.randrange(last_block + 1)
        last = rng.randint(first, last_block)
        add, remove, count = (rng.choice(GROUPS) for _ in range(3))
        remove = 0 if remove == add else remove
        touched = [cache.state[b] for b in range(first, last) if b in cache.state]
        expected = sum(count in bits for bits in touched)
        assert cache.change(first, last, add, remove, count) == expected
        for bits in touched:
            bits.discard(remove)
            bits.add(add)
        pos = rng.randrange(cache.size)
        data = rng.randbytes(rng.randint(1, 3 << block_log))
        assert cache.copy_in(pos, data) == cache.naive_copy_in(pos, data)
        pos = rng.randrange(cache.size)
        length = rng.randint(1, 3 << block_log)
        assert cache.copy_out(pos, length) == cache.naive_copy_out(pos, length)
    dirty_pages = sum(
        1 << int(cache.orders[pfn]) for pfn in cache.pfns if cache.flags[pfn] & DIRTY
    )
    assert cache.counts[0] == dirty_pages


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([10, 12, 16]),
    st.lists(st.integers(0, 5), min_size=1, max_size=6),
    st.integers(0, 1 << 30),
)
def test_gather_takes_every_dirty_block_once(block_log: int, orders: list[int], seed: int) -> None:
    cache = Cached(block_log, orders)
    rng = random.Random(seed)
    numbers = sorted(cache.state)
    dirty = sorted(rng.sample(numbers, rng.randint(1, len(numbers))))
    for block in dirty:
        cache.change(block, block + 1, blocks.RESERVED, 0, 0)
        assert cache.copy_in(block << block_log, b"x" * (1 << block_log)) == 1 << block_log
    room = 32 << 12 >> block_log  # of the largest folio, were each block a run
    folios, runs = np.zeros(32, np.int64), np.zeros((room, 2), np.int64)
    meta, rotate = np.zeros(5, np.int64), np.zeros(64, np.int64)
    cache.m8[I8_SIZE] = seed
    got: list[int] = []
    index = 0
    tagged = (cache.m4, cache.m8, cache.flags, cache.orders, cache.indices)
    while True:
        meta[:] = 0
        code = gather.gather(
            *tagged, cache.blocks, cache.refs, cache.counts, cache.root, block_log, index,
            1 << 40, radix.DIRTY, 0, folios, runs, meta,
        )  # fmt: skip
        assert code == 0
        if not meta[0]:
            break
        index = int(meta[3])
        for first, count in runs[: meta[1]].tolist():
            got += range(first, first + count)
        assert cache.counts[1] == meta[2]  # under write-back
        assert meta[4] == seed  # the size that covers what was taken
        n = gather.finish(*tagged, cache.counts, cache.root, folios, int(meta[0]), rotate)
        assert n == 0
    assert got == dirty
    assert cache.counts.tolist()[:2] == [0, 0]
    assert not (cache.flags & (DIRTY | WRITEBACK)).any()


def test_is_zero() -> None:
    memory = np.zeros(100, np.uint8)
    memory[50] = 1
    assert blocks.is_zero(memory, 0, 50)
    assert not blocks.is_zero(memory, 0, 51)
    assert not blocks.is_zero(memory, 50, 1)
    assert blocks.is_zero(memory, 51, 49)
    assert blocks.is_zero(memory, 50, 0)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([10, 12, 16]),
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.integers(0, 1 << 30),
)
def test_cut_equals_the_naive_twin(block_log: int, orders: list[int], seed: int) -> None:
    cache, rng = Cached(block_log, orders), random.Random(seed)
    numbers = sorted(cache.state)
    for block in rng.sample(numbers, rng.randint(1, len(numbers))):
        bits = {blocks.PENDING} | ({blocks.RESERVED} if rng.random() < 0.5 else set())
        cache.change(block, block + 1, sum(bits), 0, 0)
        cache.state[block] |= bits
        if rng.random() < 0.7:
            data = rng.randbytes(1 << block_log)
            assert cache.copy_in(block << block_log, data) == cache.naive_copy_in(
                block << block_log, data
            )
    cache.m4[cache.root + W_NDIRTY] = cache.counts[0]
    pfn = rng.choice(cache.pfns)
    base = int(cache.indices[pfn]) << 12
    end = base + (4096 << int(cache.orders[pfn]))
    start = rng.randrange(base, end)
    blocks.cut(
        cache.m4, cache.m8, cache.mem, cache.flags, cache.orders, cache.indices, cache.blocks,
        cache.counts, cache.root, pfn, block_log, start, end, cache.out,
    )  # fmt: skip
    inside = range(-(-start >> block_log), end >> block_log)
    assert cache.out[0] == sum(blocks.RESERVED in cache.state[b] for b in inside)
    assert cache.out[1] == sum(blocks.PENDING in cache.state[b] for b in inside)
    cache.bytes[start:end] = bytes(end - start)
    for block in inside:
        cache.state[block] = set()
    here = range(base >> block_log, end >> block_log)
    dirty = any(blocks.DIRTY_BLOCK in cache.state[b] for b in here)
    assert bool(cache.flags[pfn] & DIRTY) == dirty
    pages = sum(1 << int(cache.orders[p]) for p in cache.pfns if cache.flags[p] & DIRTY)
    assert cache.counts[0] == cache.m4[cache.root + W_NDIRTY] == pages
    args = (cache.m4, cache.m8, cache.orders, cache.root)
    assert radix.marked(*args, base >> 12, radix.DIRTY) == dirty
    for block in numbers:
        at = block << block_log
        assert cache.copy_out(at, 1 << block_log) == cache.naive_copy_out(at, 1 << block_log)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([10, 12, 16]),
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.integers(0, 1 << 30),
)
def test_settle_equals_the_naive_twin(block_log: int, orders: list[int], seed: int) -> None:
    cache, rng = Cached(block_log, orders), random.Random(seed)
    numbers = sorted(cache.state)
    for block in numbers:
        bits = {b for b in (blocks.RESERVED, blocks.PENDING) if rng.random() < 0.5}
        cache.change(block, block + 1, sum(bits), 0, 0)
        cache.state[block] |= bits
    runs, at = np.zeros((64, 2), np.int64), 0
    nruns = 0
    while at < len(numbers) and nruns < 60:
        at += rng.randrange(4)
        count = min(rng.randint(1, 5), len(numbers) - at)
        if count > 0:
            runs[nruns] = (numbers[at], count)
            nruns += 1
        at += count
    chosen = [b for first, n in runs[:nruns].tolist() for b in range(first, first + n)]
    data = sum(blocks.RESERVED in cache.state.get(b, ()) for b in chosen)
    pending = sum(blocks.PENDING in cache.state.get(b, ()) for b in chosen)
    cache.m4[cache.root + W_DELALLOC] = data + 3
    cache.m4[cache.root + W_PENDING] = pending
    cache.m4[cache.root + W_INDIRECT] = 9
    mapped = rng.choice((0, blocks.MAPPED))
    freed = delalloc._settle(
        cache.m4, cache.orders, cache.indices, cache.blocks, cache.root, block_log, runs, nruns,
        mapped, L.FMT_EXTENTS, 2, 5, 100,
    )  # fmt: skip
    assert freed == data + 9
    words = [int(cache.m4[cache.root + w]) for w in (W_DELALLOC, W_PENDING, W_INDIRECT)]
    assert words == [3, 0, 0]
    for block in numbers:
        if block in chosen:
            cache.state[block] -= {blocks.RESERVED, blocks.PENDING}
            cache.state[block] |= {mapped} - {0}
        for bit in (blocks.RESERVED, blocks.PENDING, blocks.MAPPED):
            assert cache.change(block, block + 1, 0, 0, bit) == (bit in cache.state[block])


def test_a_write_is_noted_in_the_record() -> None:
    table = np.zeros(4, INODE)
    m4, s8 = table.view(np.uint32), table.view(np.int64)
    handle = 2
    table["size"][handle], table["changecount"][handle] = 5000, 7
    table["mapping"]["flags"][handle] = LISTED
    for end, size in ((0, 5000), (4000, 5000), (6000, 6000)):
        blocks.written(m4, s8, handle, end, 1234 + end)
        assert table["size"][handle] == size
        assert table["mtime"][handle] == table["ctime"][handle] == 1234 + end
    assert table["changecount"][handle] == 10
    assert table["mapping"]["flags"][handle] == LISTED | INODE_DIRTY
    assert not table["mapping"]["lock"].any()
    assert not table["size"][[0, 1, 3]].any()


@pytest.mark.parametrize("listed", [0, LISTED, LISTED_TIME])
@pytest.mark.parametrize("other", [0, INODE_DIRTY])
@pytest.mark.parametrize("ndirty", [0, 3])
def test_only_what_is_clean_leaves_the_list(listed: int, other: int, ndirty: int) -> None:
    m4 = np.zeros(64, np.uint32)
    m4[W_NDIRTY] = ndirty
    assert mapping.change_flags(m4, 0, listed | other, 0) == 0
    leaves = bool(listed and not other and not ndirty)
    assert mapping.unlist(m4, 0) == leaves
    assert m4[W_FLAGS] == (0 if leaves else listed | other)
    assert mapping.change_flags(m4, 0, 0, INODE_DIRTY) == (0 if leaves else listed | other)
    assert m4[W_FLAGS] == (0 if leaves else listed)
    assert not m4[radix.R_LOCK]


@pytest.mark.parametrize("listed", [0, LISTED, LISTED_TIME])
@pytest.mark.parametrize("ndirty", [0, 3])
def test_only_what_has_no_dirty_page_waits_with_its_stamps(listed: int, ndirty: int) -> None:
    m4 = np.zeros(64, np.uint32)
    m4[W_NDIRTY], m4[W_FLAGS] = ndirty, listed | INODE_DIRTY
    waits = bool(listed and not ndirty)
    assert mapping.defer(m4, 0) == waits
    assert m4[W_FLAGS] == (LISTED_TIME if waits else listed) | INODE_DIRTY
    assert not m4[radix.R_LOCK]
