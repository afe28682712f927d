"""The buffer cache: one buffer a block, verified before it is seen, written merged, reclaimable."""

from __future__ import annotations

import logging
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from alloc import gfp
from alloc.arena import Arena
from fs.cache.buf import Buf, BufCache, BufOps
from fs.device.base import Views
from fs.errors import Corrupt
from fs.xfs.crc import crc_stamp
from tests.conftest import AllowLogs

CRC = 4
BBS = 8


def _verify(geo: Any, buf: Buf, owner: int | None) -> str:
    if buf.data[0] != 0xAB:
        return "bad magic"
    return "" if owner is None or buf.data[1] == owner else "wrong owner"


OPS = BufOps("test", CRC, _verify)


class Disk:
    """A device in a bytearray that records its writes."""

    def __init__(self, blocks: int) -> None:
        self.name, self.size, self.read_only = "disk", blocks * 4096, False
        self.bytes = bytearray(self.size)
        self.writes: list[tuple[int, int]] = []
        self.gate = trio.Event()
        self.gate.set()

    async def read(self, offset: int, views: Views) -> None:
        await trio.lowlevel.checkpoint()
        for view in views:
            view[:] = self.bytes[offset : offset + len(view)]
            offset += len(view)

    async def write(self, offset: int, views: Views) -> None:
        data = b"".join(bytes(v) for v in views)
        self.writes.append((offset, len(data)))
        await self.gate.wait()
        self.bytes[offset : offset + len(data)] = data

    async def flush(self) -> None:
        pass

    def close(self) -> None:
        pass

    def format(self, block: int, owner: int = 0, fill: int = 0) -> None:
        data = np.full(4096, fill, np.uint8)
        data[0], data[1] = 0xAB, owner
        crc_stamp(data, 0, 4096, CRC)
        self.bytes[block * 4096 : (block + 1) * 4096] = data.tobytes()


async def make(blocks: int = 64) -> tuple[Disk, BufCache, Arena]:
    disk, arena = Disk(blocks), Arena(8 << 20)
    geo: Any = SimpleNamespace()
    bufs = BufCache(arena, disk, geo, logging.getLogger("nofailfs"), paranoid=True)
    await bufs.start()
    return disk, bufs, arena


async def test_read_is_verified_and_shared() -> None:
    disk, bufs, _ = await make()
    disk.format(3, owner=9, fill=7)
    found: list[Buf] = []

    async def reader() -> None:
        found.append(await bufs.read(24, BBS, OPS, 9))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(reader)
    assert len({b.handle for b in found}) == 1
    assert bufs.counts["reads"] == 1
    assert found[0].data[100] == 7
    for buf in found:
        bufs.release(buf.handle)
    assert bufs.scan_objects(10, 0) + bufs.scan_objects(10, 0) == 1


@pytest.mark.parametrize(
    ("damage", "reason"), [("crc", "checksum"), ("magic", "bad magic"), ("owner", "wrong owner")]
)
async def test_corruption_is_refused(damage: str, reason: str, allow_logs: Any) -> None:
    allow_logs("corrupt test at daddr 24")
    disk, bufs, arena = await make()
    disk.format(3, owner=9)
    if damage == "crc":
        disk.bytes[3 * 4096 + 100] ^= 1
    if damage == "magic":
        block = np.zeros(4096, np.uint8)
        crc_stamp(block, 0, 4096, CRC)
        disk.bytes[3 * 4096 : 4 * 4096] = block.tobytes()
    before = arena.free_pages
    with pytest.raises(Corrupt, match=reason):
        await bufs.read(24, BBS, OPS, 8 if damage == "owner" else 9)
    assert bufs.count_objects() == 0
    assert arena.free_pages >= before - 1


async def test_cached_block_is_checked_against_another_owner(allow_logs: Any) -> None:
    allow_logs("wrong owner")
    disk, bufs, _ = await make()
    disk.format(3, owner=9)
    buf = await bufs.read(24, BBS, OPS, 9)
    with pytest.raises(Corrupt, match="wrong owner"):
        await bufs.read(24, BBS, OPS, 8)
    with pytest.raises(Corrupt, match="basic blocks"):
        await bufs.read(24, 1, OPS, 9)
    allow_logs("basic blocks")
    bufs.release(buf.handle)


async def test_read_beyond_the_device(allow_logs: Any) -> None:
    allow_logs("beyond the end")
    _, bufs, _ = await make(4)
    with pytest.raises(Corrupt, match="beyond the end"):
        await bufs.read(32, BBS, OPS)


async def test_neighbours_are_written_together_with_crc() -> None:
    disk, bufs, _ = await make()
    for block in (9, 4, 5, 3, 20):
        buf = await bufs.get(block * 8, BBS, OPS)
        buf.data[0] = 0xAB
        buf.data[50] = block
        bufs.mark_dirty(buf.handle)
        bufs.release(buf.handle)
    assert bufs.dirty_bytes == 5 * 4096
    await bufs.write_dirty()
    assert bufs.dirty_bytes == 0
    assert disk.writes == [(3 * 4096, 3 * 4096), (9 * 4096, 4096), (20 * 4096, 4096)]
    bufs.scan_objects(100, 0)
    bufs.scan_objects(100, 0)
    assert bufs.count_objects() == 0
    buf = await bufs.read(5 * 8, BBS, OPS)  # its CRC is right on the device
    assert buf.data[50] == 5


async def test_dirty_and_held_buffers_are_not_reclaimed() -> None:
    _, bufs, _ = await make()
    held = await bufs.get(8, BBS, OPS)
    held.data[0] = 0xAB
    dirty = await bufs.get(16, BBS, OPS)
    dirty.data[0] = 0xAB
    bufs.mark_dirty(dirty.handle)
    bufs.release(dirty.handle)
    for _ in range(3):
        assert bufs.scan_objects(100, 0) == 0
    await bufs.write_dirty()
    assert bufs.scan_objects(100, 0) + bufs.scan_objects(100, 0) == 1
    bufs.release(held.handle)


async def test_modified_while_written_is_written_again() -> None:
    disk, bufs, _ = await make()
    buf = await bufs.get(8, BBS, OPS)
    buf.data[0], buf.data[50] = 0xAB, 1
    bufs.mark_dirty(buf.handle)
    await bufs.write_dirty()
    assert disk.writes == [], "who holds it may have changed half of it"
    bufs.release(buf.handle)
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bufs.write_dirty)
        await trio.testing.wait_all_tasks_blocked()
        buf = await bufs.read(8, BBS, OPS)
        buf.data[50] = 2
        bufs.mark_dirty(buf.handle)
        bufs.release(buf.handle)
        disk.gate.set()
    assert disk.bytes[4096 + 50] == 1
    await bufs.write_dirty()
    assert disk.bytes[4096 + 50] == 2


async def test_invalidated_buffer_is_never_written_again() -> None:
    disk, bufs, arena = await make()
    buf = await bufs.get(8, BBS, OPS)
    buf.data[0] = 0xAB
    bufs.mark_dirty(buf.handle)
    bufs.release(buf.handle)
    disk.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bufs.write_dirty)
        await trio.testing.wait_all_tasks_blocked()
        buf = await bufs.read(8, BBS, OPS)
        bufs.mark_dirty(buf.handle)
        bufs.invalidate(buf.handle)
        waited = trio.Event()

        async def wait() -> None:
            await bufs.wait_written(buf.handle)
            waited.set()

        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        assert not waited.is_set()
        disk.gate.set()
    assert waited.is_set()
    bufs.release(buf.handle)
    assert bufs.dirty_bytes == 0
    assert bufs.count_objects() == 0
    await bufs.write_dirty()
    assert len(disk.writes) == 1
    arena.check()


async def test_device_error_keeps_buffers_dirty() -> None:
    disk, bufs, _ = await make()
    buf = await bufs.get(8, BBS, OPS)
    buf.data[0] = 0xAB
    bufs.mark_dirty(buf.handle)
    bufs.release(buf.handle)

    async def fail(offset: int, views: Views) -> None:
        raise OSError(5, "broken")

    good, disk.write = disk.write, fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="broken"):
        await bufs.write_dirty()
    assert bufs.dirty_bytes == 4096
    disk.write = good  # type: ignore[method-assign]
    await bufs.write_dirty()
    assert bufs.dirty_bytes == 0


async def test_random_traffic_against_a_model_in_little_memory() -> None:
    """More blocks than memory: reads, writes and reclaim agree with a dict of first bytes."""
    disk, bufs, arena = await make(4096)
    for block in range(4096):
        disk.format(block)
    model = dict.fromkeys(range(4096), 0)
    rng = random.Random(5)
    for step in range(6000):
        block = rng.randrange(4096)
        buf = await bufs.read(block * 8, BBS, OPS)
        assert buf.data[60] == model[block]
        if rng.random() < 0.3:
            model[block] = buf.data[60] = rng.randrange(256)
            bufs.mark_dirty(buf.handle)
        bufs.release(buf.handle)
        if step % 400 == 399:
            await bufs.write_dirty()
    await bufs.write_dirty()
    for block, value in model.items():
        assert disk.bytes[block * 4096 + 60] == value
    arena.check()


async def in_pieces(arena: Arena) -> list[int]:
    """Use memory up, then give back pages that have no neighbours; those that are kept."""
    taken = []
    with gfp.memalloc():
        while (pfn := arena.try_alloc_folio(0, gfp.NOWAIT)) is not None:
            taken.append(pfn)
    for pfn in taken:
        if pfn % 2:
            arena.put_folio(pfn)
    return [pfn for pfn in taken if pfn % 2 == 0]


@pytest.mark.parametrize("areas", [True, False])
async def test_large_buffers_when_memory_is_in_pieces(
    areas: bool, autojump_clock: trio.testing.MockClock, allow_logs: AllowLogs
) -> None:
    """They are single pages in a row then; without areas for these it would wait."""
    allow_logs("possible memory allocation deadlock")
    disk, arena = Disk(1024), Arena(8 << 20)
    bufs = BufCache(arena, disk, SimpleNamespace(), logging.getLogger("nofailfs"), paranoid=False)
    least = arena.marks.min
    await bufs.start(65536)
    assert arena.marks.min - least == arena.nr_pages // 8, "the reserve has room for such buffers"
    if not areas:
        arena.vmalloc._free.clear()
    kept = await in_pieces(arena)
    assert arena.free_pages > arena.marks.high, "small requests have plenty"
    bbs = 65536 // 512
    got = []
    for first in 0, 20:
        with trio.move_on_after(60):
            for turn in range(first, first + 20):
                buf = await bufs.get(bbs * turn, bbs, OPS)
                got.append(buf)
                buf.data[:] = turn
        assert len(got) == (20 if areas else 0)
        for turn, buf in enumerate(got, first):
            assert (buf.data == turn).all()
            bufs.release(buf.handle)
        got.clear()
        arena.check()
        while bufs.count_objects():
            bufs.scan_objects(64, 0)
    assert arena.vmalloc.nr_pages == 0
    for pfn in kept:
        arena.put_folio(pfn)
    arena.check()
