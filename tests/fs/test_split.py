"""Large folios of which a part is thrown away: what is left, and the memory that comes back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from alloc.page import DIRTY, LOCKED, LRU, WRITEBACK
from fs import fallocate, file, truncate
from fs.cache import radix
from fs.cache.blocks import DIRTY_BLOCK
from fs.cache.inode import Inode
from fs.fallocate import KEEP_SIZE, PUNCH_HOLE
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import IMAGES, a_file, opened
from tests.fs.test_relocate import state_of

KIB, MIB = 1 << 10, 1 << 20
LARGEST = 8  # of 64 MiB: a folio of 1 MiB
PAGES = MIB >> 12


def pieces_of(first: int, order: int, edge: int) -> list[tuple[int, int]]:
    """The naive twin: (first page, order) of what a folio with an edge in it is split into."""
    if not first < edge < first + (1 << order):
        return [(first, order)]
    middle = first + (1 << order - 1)
    return pieces_of(first, order - 1, edge) + pieces_of(middle, order - 1, edge)


def pieces(vol: Volume, ip: Inode) -> list[tuple[int, int]]:
    p = vol.pages.pages
    return [(int(p.index[n]), int(p.order[n])) for n in vol.pages.gang(ip.handle, 0, 1 << 30)]


def dirty_pages(vol: Volume, ip: Inode) -> int:
    """By the mapping's count, which has to be everybody's."""
    counted = int(vol.pages.state(ip.handle)["ndirty"])
    p, tagged = vol.pages.pages, vol.pages.gang(ip.handle, 0, 1 << 30, radix.DIRTY)
    assert counted == vol.pages.dirty.nr_dirty == sum(1 << int(p.order[pfn]) for pfn in tagged)
    assert all(p.flags[pfn] & DIRTY for pfn in tagged)
    return counted


@pytest.mark.parametrize("seed", range(5))
async def test_a_split_changes_sizes_and_nothing_else(scratch: Path, seed: int) -> None:
    """Folios with random dirty blocks, split at random pages, against the twin."""
    rng = random.Random(seed)
    content = bytearray(rng.randbytes(MIB))
    image = support.mkfs(scratch, "-b", f"size={rng.choice(['1k', '4k'])}")
    async with opened(image, 64 * MIB) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, bytes(content))
        await file.fsync(vol, ip)
        for _ in range(rng.randrange(4)):
            pos, data = rng.randrange(MIB - 9999), rng.randbytes(rng.randrange(1, 9999))
            content[pos : pos + len(data)] = data
            await file.write(vol, ip, pos, data)
        vol.pages.tag_towrite(ip.handle, 0, PAGES)
        pages, twin = vol.pages, [(0, LARGEST)]
        ((size, flags, refs, blocks, _),) = state_of(vol, ip).values()
        assert (size, refs, pieces(vol, ip)) == (PAGES, 1, twin)
        for _ in range(8):
            edge = rng.randrange(1, PAGES)
            if all(first != edge for first, _ in twin):
                assert pages.splits.split(pages.find(ip.handle, edge), edge)
            twin = [piece for whole in twin for piece in pieces_of(*whole, edge)]
            assert pieces(vol, ip) == twin
        for first, piece in state_of(vol, ip).items():
            own = blocks[first : first + piece[0]]
            dirty = any(bits & DIRTY_BLOCK * 15 for bits in own)
            assert piece[1:4] == (flags & ~DIRTY | DIRTY * dirty, 1, own)
            assert piece[4] == [dirty, dirty, 0]
        dirty_pages(vol, ip)
        assert bytes(await file.read(vol, ip, 0, MIB)) == content
        vol.arena.check()
    async with opened(image) as vol, a_file(vol) as ip:
        assert bytes(await file.read(vol, ip, 0, MIB)) == content
    support.assert_clean(image)


@pytest.mark.parametrize("written", [False, True], ids=["dirty", "clean"])
@pytest.mark.parametrize("form", IMAGES)
async def test_truncation_gives_memory_back(scratch: Path, form: str, written: bool) -> None:
    content = random.Random(form).randbytes(MIB)
    image = support.mkfs(scratch, *IMAGES[form])
    async with opened(image, 64 * MIB) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, content)
        if written:
            await file.fsync(vol, ip)
        grain = 1 << vol.pages.order_min
        expected = content
        for size in (700 * KIB, 300_000, 64 * KIB, 1):
            await truncate.truncate(vol, ip, size)
            expected = expected[:size]
            held = -(-size // (grain << 12)) * grain
            assert vol.pages.state(ip.handle)["nrpages"] == held
            assert vol.arena.lru.nr_active + vol.arena.lru.nr_inactive == held
            assert dirty_pages(vol, ip) <= held
            assert bytes(await file.read(vol, ip, 0, MIB)) == expected
        assert pieces(vol, ip) == [(0, vol.pages.order_min)]
        assert sum(vol.pages.splits.failed) == 0
        vol.arena.check()
        await truncate.truncate(vol, ip, MIB)
        assert bytes(await file.read(vol, ip, 0, MIB)) == expected + bytes(MIB - 1)
    async with opened(image) as vol, a_file(vol) as ip:
        assert bytes(await file.read(vol, ip, 0, MIB)) == expected + bytes(MIB - 1)
    support.assert_clean(image)


@pytest.mark.parametrize("written", [False, True], ids=["dirty", "clean"])
@pytest.mark.parametrize("form", IMAGES)
async def test_a_hole_gives_memory_back(scratch: Path, form: str, written: bool) -> None:
    content = random.Random(form).randbytes(MIB)
    image = support.mkfs(scratch, *IMAGES[form])
    start, length = 200_000, 500_000
    expected = content[:start] + bytes(length) + content[start + length :]
    async with opened(image, 64 * MIB) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, content)
        if written:
            await file.fsync(vol, ip)
        await fallocate.fallocate(vol, ip, start, length, PUNCH_HOLE | KEEP_SIZE)
        grain = max(vol.geo.block_size, 4096)
        first, last = -(-start // grain) * grain >> 12, (start + length) // grain * grain >> 12
        assert vol.pages.state(ip.handle)["nrpages"] == PAGES - (last - first)
        assert not vol.pages.next(ip.handle, first, last - 1)
        assert vol.pages.splits.done[LARGEST] == 1
        assert sum(vol.pages.splits.done) == 2  # where it begins and where it ends
        dirty_pages(vol, ip)
        vol.arena.check()
        assert bytes(await file.read(vol, ip, 0, MIB)) == expected
    async with opened(image) as vol, a_file(vol) as ip:
        assert bytes(await file.read(vol, ip, 0, MIB)) == expected
    support.assert_clean(image)


async def test_what_is_thrown_away_within_a_block_splits_nothing(scratch: Path) -> None:
    image = support.mkfs(scratch, "-b", "size=64k")
    async with opened(image, 64 * MIB) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, bytes(MIB))
        await fallocate.fallocate(vol, ip, 70_000, 50_000, PUNCH_HOLE | KEEP_SIZE)
        assert pieces(vol, ip) == [(0, LARGEST)]
        await truncate.truncate(vol, ip, MIB - 5)
        assert pieces(vol, ip) == [(0, LARGEST)]
        assert sum(vol.pages.splits.done) + sum(vol.pages.splits.failed) == 0


async def test_a_folio_in_use_stays_whole_and_is_cut(scratch: Path) -> None:
    content = random.Random(7).randbytes(MIB)
    async with opened(support.mkfs(scratch), 64 * MIB) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, content)
        (pfn,) = vol.pages.gang(ip.handle, 0, PAGES)
        flags, splits = vol.pages.pages.flags, vol.pages.splits
        for bit in (LOCKED, WRITEBACK):
            flags[pfn] |= bit
            assert not splits.split(pfn, 100)
            flags[pfn] ^= bit
        vol.arena.lru.remove(pfn)
        assert not splits.split(pfn, 100)
        vol.arena.lru.add(pfn)
        assert flags[pfn] & LRU
        vol.arena.get_folio(pfn)
        await truncate.truncate(vol, ip, 5000)
        assert pieces(vol, ip) == [(0, LARGEST)]
        assert (splits.failed[LARGEST], sum(splits.done)) == (4, 0)
        vol.arena.put_folio(pfn)
        assert bytes(await file.read(vol, ip, 0, MIB)) == content[:5000]
        await truncate.truncate(vol, ip, MIB)
        assert bytes(await file.read(vol, ip, 0, MIB)) == content[:5000] + bytes(MIB - 5000)


async def test_a_clean_folio_in_use_goes(scratch: Path) -> None:
    content = random.Random(8).randbytes(MIB)
    async with opened(support.mkfs(scratch), 64 * MIB) as vol, a_file(vol) as ip:
        for size in (8192, MIB):
            await file.write(vol, ip, 0, content)
            await file.fsync(vol, ip)
            (pfn,) = vol.pages.gang(ip.handle, 0, PAGES)
            vol.arena.get_folio(pfn)
            if size < MIB:
                await truncate.truncate(vol, ip, size)
            else:
                await fallocate.fallocate(vol, ip, 8192, MIB, PUNCH_HOLE | KEEP_SIZE)
            assert pieces(vol, ip) == []
            assert vol.arena.put_folio(pfn)
            left = content[:8192] + bytes(size - 8192)
            assert bytes(await file.read(vol, ip, 0, MIB)) == left
            await truncate.truncate(vol, ip, 0)
        assert vol.pages.splits.failed[LARGEST] == 2
        vol.arena.check()


async def test_without_a_node_a_folio_stays_whole(scratch: Path) -> None:
    """But where the pieces are of at least 64 pages none is needed."""
    async with opened(support.mkfs(scratch), 64 * MIB) as vol, a_file(vol) as ip:
        await file.write(vol, ip, 0, bytes(MIB))
        pages, splits = vol.pages, vol.pages.splits
        pfn = pages.find(ip.handle, 0)
        nodes = []
        while node := pages.try_node():
            nodes.append(node)
        assert vol.arena.vmstat["try_alloc_failed"] > 0
        assert not splits.split(pfn, 100)
        assert splits.split(pfn, 128)
        assert pieces(vol, ip) == [(0, 7), (128, 7)]
        for node in nodes:
            pages.give_node(node)
        assert splits.split(pfn, 100)
        assert (splits.failed[8], splits.done[7:9]) == (1, [1, 1])
        vol.arena.check()
