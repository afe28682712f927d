"""Folios of files that move: content, state and index stay. Threads look them up meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
import trio

from alloc import mempolicy
from alloc.atomic import fetch_add, load_acquire, spin_lock, spin_unlock
from alloc.gfp import MOVABLE, NOWAIT
from alloc.jit import DISABLED, kernel
from alloc.libc import memcmp
from alloc.migrate import MOVED
from alloc.page import DIRTY, LOCKED, W_PGALLOC, WRITEBACK, Buddy
from alloc.pcp import put
from alloc.topology import topology
from fs import file
from fs.cache import radix
from fs.cache.inode import Inode
from fs.cache.radix import R_LOCK, find_entry
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import a_file, opened

SIZE = 4 << 20


async def compact(vol: Volume, ip: Inode) -> int:
    """As /proc/sys/vm/compact_memory; how many folios moved."""
    before = vol.arena.vmstat["pgmigrate_success"]
    for _ in vol.arena.compaction.compact_memory():
        await trio.lowlevel.checkpoint()
    return vol.arena.vmstat["pgmigrate_success"] - before


async def migrate(vol: Volume, ip: Inode) -> int:
    """Every folio of a file that nobody uses goes to the other node; how many."""
    pages, arena = vol.pages, vol.arena
    before = arena.vmstat["pgmigrate_success"]
    pfns = pages.gang(ip.handle, 0, SIZE >> 12)
    sources = np.array([pfn for pfn in pfns if arena.try_get_folio(pfn)])
    targets, verdicts = np.zeros(len(sources), np.int64), np.zeros(len(sources), np.int64)
    for k, pfn in enumerate(sources.tolist()):
        order, other = int(pages.pages.order[pfn]), 1 - arena.node_of(pfn)
        bound = mempolicy.policy("bind", [other])
        targets[k] = arena.try_alloc_folio(order, NOWAIT | MOVABLE, bound) or 0
    there = targets != 0
    moved = verdicts[there]
    pages.move_folios(sources[there], targets[there], moved)
    verdicts[there] = moved
    for source, target, verdict in zip(sources, targets, verdicts, strict=True):
        arena.put_folio(int(source))
        if target and verdict != MOVED:
            arena.put_folio(int(target))
    arena.vmstat.add("pgmigrate_success", int(verdicts.sum()))
    arena.vmstat.add("pgmigrate_fail", int((verdicts != MOVED).sum()))
    await trio.lowlevel.checkpoint()
    return arena.vmstat["pgmigrate_success"] - before


async def split(vol: Volume, ip: Inode) -> int:
    """Read the file anew, into large folios, and split them all over; how many splits."""
    pages, done, rng = vol.pages, 0, random.Random(vol.arena.words[W_PGALLOC].item())
    drop_some(vol, ip, rng, 1.0)
    await file.read(vol, ip, 0, SIZE)
    for edge in rng.sample(range(1, SIZE >> 12), 200):
        pfn = pages.find(ip.handle, edge)
        if pages.pages.index[pfn] != edge:
            done += pages.splits.split(pfn, edge)
    return done


def drop_some(vol: Volume, ip: Inode, rng: random.Random, part: float) -> int:
    """Take a part of a file's clean folios out of the cache; how many."""
    pages, dropped = vol.pages, 0
    for pfn in pages.gang(ip.handle, 0, SIZE >> 12):
        if rng.random() < part and not pages.pages.flags[pfn] & (DIRTY | LOCKED | WRITEBACK):
            pages.remove(pfn)
            dropped += 1
    return dropped


def state_of(vol: Volume, ip: Inode) -> dict[int, tuple[object, ...]]:
    """What is known of each folio of a file, by its index, but where it is."""
    pages, p = vol.pages, vol.pages.pages
    tree = (pages.m4, pages.m8, p.order, pages.root(ip.handle))
    out: dict[int, tuple[object, ...]] = {}
    index = 0
    while pfn := pages.next(ip.handle, index, SIZE >> 12):
        index, pages_in = int(p.index[pfn]), 1 << int(p.order[pfn])
        tags = [int(radix.marked(*tree, index, tag)) for tag in range(3)]
        blocks = p.blocks[pfn : pfn + pages_in].tolist()
        out[index] = (pages_in, int(p.flags[pfn]), int(p.refs[pfn]), blocks, tags)
        index += pages_in
    return out


async def written(vol: Volume, ip: Inode, content: bytes, step: int) -> None:
    for pos in range(0, len(content), step):
        await file.write(vol, ip, pos, content[pos : pos + step])


@pytest.mark.parametrize("nodes", [1, 2])
async def test_everything_comes_along(scratch: Path, nodes: int) -> None:
    rng = random.Random(1)
    content = rng.randbytes(SIZE)
    image = support.mkfs(scratch)
    async with opened(image, nodes=topology(nodes)) as vol, a_file(vol) as ip:
        vol.arena.set_mempolicy(mempolicy.parse("interleave", nodes))
        await written(vol, ip, content, 4096 * 3)
        await file.fsync(vol, ip)
        assert drop_some(vol, ip, rng, 0.5) > 100
        for pos in range(0, SIZE, 64 << 10):
            await file.write(vol, ip, pos, content[pos : pos + 500])
        before = state_of(vol, ip)
        counts = (vol.pages.dirty.nr_dirty, int(vol.pages.state(ip.handle)["ndirty"]))
        assert counts[0] > 50
        vol.arena.compaction.proactiveness = 0
        assert await compact(vol, ip) > 50
        assert state_of(vol, ip) == before
        assert (vol.pages.dirty.nr_dirty, int(vol.pages.state(ip.handle)["ndirty"])) == counts
        assert bytes(await file.read(vol, ip, 0, SIZE)) == content
        vol.arena.check()
    async with opened(image) as vol, a_file(vol) as ip:
        assert bytes(await file.read(vol, ip, 0, SIZE)) == content
    support.assert_clean(image)


async def test_what_is_in_use_stays(scratch: Path) -> None:
    rng = random.Random(2)
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        await written(vol, ip, rng.randbytes(SIZE), 4096)
        await file.fsync(vol, ip)
        drop_some(vol, ip, rng, 0.5)
        folios = sorted(vol.pages.gang(ip.handle, 0, SIZE >> 12))
        targets = [await vol.arena.alloc_folio(0) for _ in folios]
        flags = vol.pages.pages.flags
        for pfn in folios:
            vol.arena.get_folio(pfn)
        vol.arena.get_folio(folios[0])
        flags[folios[1]] |= LOCKED
        flags[folios[2]] |= WRITEBACK
        verdicts = np.zeros(len(folios), np.int64)
        vol.pages.move_folios(np.array(folios), np.array(targets), verdicts)
        assert verdicts.tolist() == [0, 0, 0] + [1] * (len(folios) - 3)
        flags[folios[1]] &= ~np.uint32(LOCKED)
        flags[folios[2]] &= ~np.uint32(WRITEBACK)
        vol.arena.put_folio(folios[0])
        for pfn in (*folios, *targets[:3]):
            vol.arena.put_folio(pfn)
        assert sorted(vol.pages.gang(ip.handle, 0, SIZE >> 12)) == sorted(folios[:3] + targets[3:])


@kernel(
    "void(i8[::1], u4[::1], u1[::1], i4[::1], u4[::1], u4[::1], i8[::1], u1[::1], u4[::1], i8,"
    " i8, u1[::1], i8, i8[::1])"
)
def look_up_often(
    words, flags, order, refs, lru_next, lru_prev, indices, mem, m4, root, pages, content, seed,
    out,
):  # fmt: skip
    """A lane that reads pages of a file until out[0]; out[1]: found, out[2]: with wrong content."""
    b = Buddy(words, flags, order, refs, lru_next, lru_prev)
    state = np.uint64(seed)
    while load_acquire(out, 0) == 0:
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        index = np.int64(state >> np.uint64(20)) % pages
        spin_lock(m4, root + R_LOCK)
        pfn = find_entry(m4, root, index)
        if pfn != 0 and flags[pfn] & LOCKED != 0:
            pfn = np.int64(0)  # it is being read
        if pfn != 0:
            fetch_add(refs, pfn, 1)
        spin_unlock(m4, root + R_LOCK)
        if pfn == 0:
            continue
        page = pfn + index - indices[pfn]
        if memcmp(mem, page << 12, content, index << 12, 4096) != 0:
            fetch_add(out, 2, 1)
        fetch_add(out, 1, 1)
        put(b, seed, pfn)


@pytest.mark.skipif(DISABLED, reason="needs threads without the GIL")
@pytest.mark.slow
@pytest.mark.parametrize("move", [compact, migrate, split])
async def test_lookups_beside_a_moving_cache(
    scratch: Path, move: Callable[[Volume, Inode], Awaitable[int]]
) -> None:
    rng = random.Random(3)
    content = rng.randbytes(SIZE)
    nodes = topology(2 if move is migrate else 1)
    async with opened(support.mkfs(scratch), nodes=nodes) as vol, a_file(vol) as ip:
        await written(vol, ip, content, 4096 * 5)
        await file.fsync(vol, ip)
        out = np.ones(4, np.int64)
        args = (
            *vol.arena.buddy, vol.pages.pages.index, vol.arena.mem, vol.pages.m4,
            vol.pages.root(ip.handle), SIZE >> 12, np.frombuffer(content, np.uint8).copy(),
        )  # fmt: skip
        look_up_often(*args, 0, out)  # compiled
        out[:] = 0
        threads = [threading.Thread(target=look_up_often, args=(*args, n, out)) for n in (1, 2)]
        for thread in threads:
            thread.start()
        moved = 0
        try:
            with trio.fail_after(60):
                while moved < 20_000 or out[1] < 200_000:
                    drop_some(vol, ip, rng, 0.2)
                    moved += await move(vol, ip)
                    assert bytes(await file.read(vol, ip, 0, SIZE)) == content
        finally:
            out[0] = 1
            for thread in threads:
                thread.join()
        assert out[2] == 0, out
        failed = vol.arena.vmstat["pgmigrate_fail"] + sum(vol.pages.splits.failed)
        assert failed > 0, "no folio was ever met in use"
        vol.arena.check()
