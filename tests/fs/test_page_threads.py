"""Threads without the GIL dirty folios while trio flushes, settles, truncates, reclaims, compacts.

The threads do what a lane's write does: IOLOCK word by try, copy kernel, size and stamps in one
section of the mapping's lock, only in mappings that are LISTED. Under the IOLOCK each write also
goes to a shadow of the file, so at any moment the file must equal its shadow, and in the end the
image must, too. Who holds the IOLOCK zeroes in the shadow what a truncation cut off.
"""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from alloc import gfp
from alloc.atomic import fetch_add, load_acquire, spin_lock, spin_unlock
from alloc.jit import DISABLED, helper, kernel
from alloc.libc import memcpy, memset, usleep
from fs import file
from fs.cache.blocks import copy_ready, note_write
from fs.cache.incore import I4_IOLOCK, I4_MAPPING, I8_SIZE, INODE_LONGS, INODE_WORDS
from fs.cache.inode import Inode
from fs.cache.lock import try_lock, unlock
from fs.cache.mapping import W_FLAGS, W_NDIRTY
from fs.cache.radix import R_LOCK
from fs.volume import Volume
from tests import support
from tests.fs.imagefiles import a_file, opened
from writeback.mapping import INODE_DIRTY, LISTED

pytestmark = [
    pytest.mark.skipif(DISABLED, reason="needs threads without the GIL"),
    pytest.mark.slow,
]

FILES = 2
MOST = 1 << 20  # bytes of a file
STOP, WROTE, EXTENDED, NOT_READY, NOT_LISTED, BUSY = range(6)  # words of `out`
STEPS = 400  # of tasks


@helper
def write_step(
    m4, m8, s8, mem, flags, orders, indices, blocks, counts, block_log, handle, shadow, first,
    pos, end, data, start, out, hint,
):  # fmt: skip
    """One write of a lane, with the IOLOCK held; its shadow begins at shadow[first]."""
    root = handle * INODE_WORDS + I4_MAPPING
    size = s8[handle * INODE_LONGS + I8_SIZE]
    spin_lock(m4, root + R_LOCK)
    if m4[root + W_FLAGS] & LISTED == 0:
        spin_unlock(m4, root + R_LOCK)
        fetch_add(out, NOT_LISTED, 1)
        return
    at = copy_ready(
        m4, m8, mem, flags, orders, indices, blocks, counts, root, block_log, pos, end, data,
        start, hint,
    )  # fmt: skip
    if at > pos:
        note_write(m4, s8, handle, at, 1 << 60)
    spin_unlock(m4, root + R_LOCK)
    if at > pos:
        memcpy(shadow, first + pos, data, start, at - pos)
        fetch_add(out, WROTE, 1)
        fetch_add(out, EXTENDED, 1 if at > size else 0)
    else:
        fetch_add(out, NOT_READY, 1)


@kernel(
    "void(u4[::1], u8[::1], i8[::1], u1[::1], u4[::1], u1[::1], i8[::1], u4[::1], i8[::1], i8,"
    " i8[::1], u1[::1], i8[::1], u1[::1], i8[::1], i8, i8[::1])"
)
def write_often(
    m4, m8, s8, mem, flags, orders, indices, blocks, counts, block_log, handles, shadow, known,
    data, out, seed, hint,
):  # fmt: skip
    """A lane that writes here and there until it is told to stop."""
    state = np.uint64(seed)
    while load_acquire(out, STOP) == 0:
        state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
        dice = np.int64(state >> np.uint64(20))
        f = dice % FILES
        handle = handles[f]
        lock = handle * INODE_WORDS + I4_IOLOCK
        if not try_lock(m4, lock, False):
            fetch_add(out, BUSY, 1)
            usleep(50)
            continue
        size = s8[handle * INODE_LONGS + I8_SIZE]
        if size < known[f]:
            memset(shadow, f * MOST + size, 0, known[f] - size)
        length = 1 + (dice >> 8) % 9000
        pos = size - min(size, length // 2) if dice & 4 else (dice >> 12) % (size + 1)
        end = min(pos + length, MOST)
        if end > pos:
            write_step(
                m4, m8, s8, mem, flags, orders, indices, blocks, counts, block_log, handle,
                shadow, f * MOST, pos, end, data, dice % 4096, out, hint,
            )  # fmt: skip
        known[f] = s8[handle * INODE_LONGS + I8_SIZE]
        unlock(m4, lock, False)
        if dice & 0x10 == 0:
            usleep(20)  # or tasks hardly get the processor


# -- single steps: flags and counters ----------------------------------------------------------


@kernel("void(u4[::1], i8, i8, i8[::1])")
def dirty_and_clean(m4, root, mine, out):
    """A lane that dirties what is LISTED, and cleans it; out[1]: what was wrong in between.

    Beside its page it keeps a flag, `mine`, which nobody else changes.
    """
    n = 0
    while load_acquire(out, STOP) == 0:
        n += 1
        if n % 16 == 0:
            usleep(20)  # or the tasks hardly get the processor
        spin_lock(m4, root + R_LOCK)
        dirty = m4[root + W_FLAGS] & LISTED != 0
        if dirty:
            m4[root + W_NDIRTY] += 1
            m4[root + W_FLAGS] |= np.uint32(mine)
        spin_unlock(m4, root + R_LOCK)
        if not dirty:
            fetch_add(out, 2, 1)
            continue
        fetch_add(out, 3, 1)
        for _ in range(n % 100):
            load_acquire(m4, root + R_LOCK)  # time passes
        spin_lock(m4, root + R_LOCK)
        if m4[root + W_FLAGS] & (LISTED | mine) != LISTED | mine:
            fetch_add(out, 1, 1)
        m4[root + W_NDIRTY] -= 1
        m4[root + W_FLAGS] &= np.uint32(0xFFFFFFFF ^ mine)
        spin_unlock(m4, root + R_LOCK)


async def test_nothing_dirty_leaves_the_list(scratch: Path) -> None:
    async with opened(support.mkfs(scratch)) as vol, a_file(vol) as ip:
        args = (vol.pages.m4, vol.pages.root(ip.handle))
        out = np.zeros(8, np.int64)
        await vol.flusher.sync()
        threads = [
            threading.Thread(target=dirty_and_clean, args=(*args, 1 << n, out)) for n in (8, 9)
        ]
        for thread in threads:
            thread.start()
        settled = 0
        while out[3] < 500_000:
            vol.flusher.enlist(ip.handle)
            vol.pages.change_flags(ip.handle, add=INODE_DIRTY)
            vol.pages.change_flags(ip.handle, remove=INODE_DIRTY)
            vol.flusher.settle(ip.handle)
            settled += not vol.flusher.nr_listed
        out[STOP] = 1
        for thread in threads:
            thread.join()
        assert out[1] == 0
        assert min(out[2], settled) > 100
        vol.flusher.settle(ip.handle)
        assert vol.pages.state(ip.handle)["flags"] == 0


# -- whole files -------------------------------------------------------------------------------


class Stress:
    """Some files, their shadows, the threads that write them, and what tasks do meanwhile."""

    def __init__(self, vol: Volume, ips: list[Inode], seed: int) -> None:
        self.vol, self.ips = vol, ips
        self.rng = random.Random(seed)
        self.shadow = np.zeros(FILES * MOST, np.uint8)
        self.known = np.zeros(FILES, np.int64)
        self.data = np.frombuffer(self.rng.randbytes(1 << 20), np.uint8)
        self.out = np.zeros(8, np.int64)
        self.flushes = 0
        names = ("write", "truncate", "fsync", "sync", "reclaim", "compact", "check")
        self.done = dict.fromkeys(names, 0)
        pages, p = vol.pages, vol.pages.pages
        handles = np.array([ip.handle for ip in ips], np.int64)
        args = (
            pages.m4, pages.m8, pages.s8, vol.arena.mem, p.flags, p.order, p.index, p.blocks,
            pages.dirty.counts, pages.block_log, handles, self.shadow, self.known,
            self.data.copy(), self.out,
        )  # fmt: skip
        self.out[STOP] = 1
        hints = np.zeros((3, 4), np.int64)
        write_often(*args, 0, hints[0])  # compiled
        self.out[STOP] = 0
        self.threads = [
            threading.Thread(target=write_often, args=(*args, n, hints[n])) for n in (1, 2)
        ]

    def of(self, f: int) -> Any:
        """A file's shadow; the IOLOCK is held, either way."""
        size = self.ips[f].size
        part = self.shadow[f * MOST : (f + 1) * MOST]
        if size < self.known[f]:
            part[size : self.known[f]] = 0
        self.known[f] = size
        return part

    async def write(self, f: int) -> None:
        ip = self.ips[f]
        async with self.vol.iolock(ip):
            shadow = self.of(f)
            pos = self.rng.randint(0, ip.size) if self.rng.random() < 0.5 else ip.size
            n = min(self.rng.randint(1, 300_000), MOST - pos)
            if n:
                start = self.rng.randrange(500_000)
                piece = self.data[start : start + n]
                assert await file.write_held(self.vol, ip, pos, piece) == n
                shadow[pos : pos + n] = piece
            self.known[f] = ip.size

    async def truncate(self, f: int) -> None:
        size = self.ips[f].size
        low = size // 2 if self.rng.random() < 0.8 else 0
        await file.truncate(self.vol, self.ips[f], min(self.rng.randint(low, size), size))

    async def fsync(self, f: int) -> None:
        await file.fsync(self.vol, self.ips[f])

    async def sync(self, f: int) -> None:
        await self.vol.flusher.sync()

    async def reclaim(self, f: int) -> None:
        self.vol.arena.reclaim.shrink_all(0, gfp.KERNEL, "direct", 1 << 20)

    async def compact(self, f: int) -> None:
        for _ in self.vol.arena.compaction.compact_memory():
            await trio.lowlevel.checkpoint()

    async def check(self, f: int) -> None:
        ip = self.ips[f]
        async with self.vol.iolock(ip, shared=True):
            shadow = self.of(f)
            if ip.size:
                got = await file.read_slowly(self.vol, ip, 0, ip.size)
                assert got == shadow[: ip.size].tobytes()

    async def ring(self) -> None:
        """What the doorbell does, and parked writes that ask for the list."""
        while True:
            self.vol.iolocks.grant_all()
            self.vol.pages.dirty.poke()
            for ip in self.ips:
                self.vol.flusher.enlist(ip.handle)
                self.vol.flusher.settle(ip.handle)
                if self.rng.random() < 0.7:
                    self.vol.flusher.enlist(ip.handle)
            await trio.sleep(0.001)

    async def flush(self) -> None:
        """An eager flusher: folios leave the dirty state as fast as they enter it."""
        while True:
            for ip in self.ips:
                await self.vol.flusher.clean(ip.handle)
                self.flushes += 1
            await trio.sleep(0)

    async def tasks(self) -> None:
        names, weights = list(self.done), (30, 8, 15, 5, 8, 12, 15)
        for _ in range(STEPS):
            name = self.rng.choices(names, weights)[0]
            await getattr(self, name)(self.rng.randrange(FILES))
            self.done[name] += 1
            await trio.sleep(self.rng.random() * 0.004)

    async def run(self) -> None:
        for thread in self.threads:
            thread.start()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.ring)
                nursery.start_soon(self.flush)
                await self.tasks()
                nursery.cancel_scope.cancel()
        finally:
            self.out[STOP] = 1
            for thread in self.threads:
                thread.join()

    def assert_settled(self) -> None:
        """Everything is written: no count is left of what was dirty."""
        vol = self.vol
        assert (vol.pages.dirty.nr_dirty, vol.pages.dirty.nr_writeback) == (0, 0)
        assert vol.space.delalloc == 0
        for ip in self.ips:
            state = vol.pages.state(ip.handle)
            for name in ("ndirty", "nrwriteback", "delalloc", "pending", "indirect", "flags"):
                assert state[name] == 0, name
            assert ip.disk_size == ip.size
            assert state["error"] == 0


@pytest.mark.parametrize("args", [(), ("-b", "size=1k")], ids=["4k", "1k"])
async def test_writers_without_the_gil(scratch: Path, args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *args)
    async with (
        opened(image, 16 << 20, seed=1, pause_s=0.0002) as vol,
        a_file(vol, b"a") as a,
        a_file(vol, b"b") as b,
    ):
        stress = Stress(vol, [a, b], seed=11)
        await stress.run()
        print(stress.done, stress.flushes, stress.out.tolist())
        assert min(stress.done.values()) > 5
        assert vol.arena.vmstat["pgmigrate_success"] > 20
        assert stress.out[WROTE] > 1000
        assert min(stress.out[[EXTENDED, NOT_LISTED, NOT_READY]]) > 5
        for f in range(FILES):
            await stress.check(f)
        await vol.flusher.sync()
        stress.assert_settled()
        vol.arena.check()
        contents = [stress.of(f)[: stress.ips[f].size].tobytes() for f in range(FILES)]
    async with opened(image) as vol, a_file(vol, b"a") as a, a_file(vol, b"b") as b:
        for ip, content in zip((a, b), contents, strict=True):
            assert bytes(await file.read(vol, ip, 0, MOST)) == content
    support.assert_clean(image)
