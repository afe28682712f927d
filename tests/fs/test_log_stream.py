"""The log's writer on a device in memory: records beside a naive twin, room, errors, concurrency.

Whether the kernel replays them is for tests/fs/test_log_written.py.
"""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crc32c
import numpy as np
import pytest
import trio

from alloc import gfp
from alloc.arena import Arena
from fs.device.base import Views
from fs.device.image import Memory
from fs.log import checkpoints, closing, head
from fs.log.head import TORN_BBS, Ends
from fs.log.iclog import Shape
from fs.log.region import Region, lsn_of, place_of
from fs.log.stream import ICLOGS, LogOverrun, Stream
from tests.fs.logwriter import vector
from tests.fs.test_log_record import naive_stamp
from tests.fs.volatile import Volatile

UUID = bytes(range(16))
KIB, BB, BLOCK = 1024, 512, 4096
SHAPES = {  # logbsize, stripe, sector
    "plain": (32 * KIB, 0, 512),
    "large": (256 * KIB, 0, 512),
    "stripe": (32 * KIB, 32 * KIB, 512),
    "small stripe": (64 * KIB, 4 * KIB, 512),
    "large stripe": (32 * KIB, 256 * KIB, 512),
    "odd stripe": (128 * KIB, 96 * KIB, 512),
    "sectors": (32 * KIB, 4 * KIB, 4096),
}
UNITS = {  # bytes of an iclog, BBs of a header, bytes of which records are multiples
    "plain": (32 * KIB, 1, 512),
    "large": (256 * KIB, 8, 512),
    "stripe": (32 * KIB, 1, 32 * KIB),
    "small stripe": (64 * KIB, 2, 4 * KIB),
    "large stripe": (256 * KIB, 8, 256 * KIB),
    "odd stripe": (96 * KIB, 3, 96 * KIB),
    "sectors": (32 * KIB, 1, 4 * KIB),
}
shapes = pytest.mark.parametrize("numbers", SHAPES.values(), ids=SHAPES.keys())


def geometry(blocks: int, stripe: int = 0, sector: int = 512) -> Any:
    """As much of one as the log needs; the log is the whole device."""
    return SimpleNamespace(
        log_start=0, log_blocks=blocks, block_bbs=BLOCK // BB, log_uuid=UUID,
        log_sunit=stripe, log_sector_size=sector, fsb_to_bytes=lambda fsbno: fsbno * BLOCK,
    )  # fmt: skip


class Vectors:
    """Log vectors in the arena, wherever there is room."""

    def __init__(self, arena: Arena, rng: random.Random) -> None:
        self.arena, self.rng = arena, rng
        self._folio = 0

    async def start(self) -> None:
        order = self.arena.order_max
        self._folio = (await self.arena.alloc_folio(order, gfp.KERNEL)) << 12
        self._bytes = 4096 << order

    def put(self, items: Sequence[Sequence[bytes]]) -> np.ndarray[Any, Any]:
        """(n, 3) of these items, each in a vector of its own, in the order in which they come."""
        places, at = [], self._folio
        for item in items:
            raw = vector(item)
            at += 4 * self.rng.randrange(4)
            assert at + len(raw) <= self._folio + self._bytes
            self.arena.mem[at : at + len(raw)] = np.frombuffer(raw, np.uint8)
            places.append((at, len(raw), len(item)))
            at += len(raw)
        return np.array(places, np.int64).reshape(-1, 3)


@asynccontextmanager
async def opened(
    device: Any, geo: Any, ends: Ends, logbsize: int, memory: int = 32 << 20, seed: int = 1
) -> AsyncIterator[tuple[Region, Stream, Vectors]]:
    arena = Arena(memory)
    region = Region(device, geo)
    stream = Stream(region, arena, ends, logbsize)
    await stream.start()
    vectors = Vectors(arena, random.Random(seed))
    await vectors.start()
    yield region, stream, vectors
    del vectors
    arena.close()


def random_items(rng: random.Random, regions: int, most: int) -> list[list[bytes]]:
    """Items of one to five regions each."""
    found = []
    while regions > 0:
        count = min(regions, rng.randint(1, 5))
        sizes = [4 * rng.randint(1, rng.choice((4, 64, most // 4))) for _ in range(count)]
        found.append([rng.randbytes(size) for size in sizes])
        regions -= count
    return found


def ends_at(cycle: int, bb: int, last: int = 0) -> Ends:
    return Ends(bb, cycle, lsn_of(cycle, bb), True, last)


# -- the naive twin -------------------------------------------------------------------------------


def naive_cut(regions: Sequence[bytes], tid: int, capacity: int) -> list[tuple[bytes, int]]:
    """(operations, how many) of each record."""
    header = b"NART" + struct.pack("<III", 40, tid, len(regions))
    records, data, ops = [], b"", 0

    def op(payload: bytes, flags: int) -> None:
        nonlocal data, ops
        data += struct.pack(">IIBBH", tid, len(payload), 0x69, flags, 0) + payload
        ops += 1

    def turn() -> None:
        nonlocal data, ops
        if capacity - len(data) < 16:
            records.append((data, ops))
            data, ops = b"", 0

    op(b"", 1)
    op(header, 0)
    for region in regions:
        rest, was = region, 0
        while rest:
            turn()
            part = rest[: capacity - len(data) - 12]
            rest = rest[len(part) :]
            op(part, was | (4 if rest else 0x10 if was else 0))
            was = 8
    turn()
    op(b"", 2)
    return [*records, (data, ops)]


def naive_record(
    data: bytes, ops: int, size: int, unit: int, lsn: int, tail: int, last: int, wrap: int
) -> bytes:
    headers = max(1, size // (32 * KIB)) if size % (32 * KIB) == 0 else size // (32 * KIB) + 1
    whole = -(-(headers * BB + len(data)) // unit) * unit
    length = whole - headers * BB
    header = struct.pack(">IIIIQQ", 0xFEEDBABE, lsn >> 32, 2, length, lsn, tail) + bytes(4)
    header += struct.pack(">II", last, ops) + bytes(256)
    header += struct.pack(">I", 1) + UUID + struct.pack(">II", size, 0)
    raw = (header.ljust(headers * BB, b"\0") + data).ljust(whole, b"\0")
    raw = naive_stamp(raw, headers, length // BB, lsn >> 32, wrap)
    covered = raw[:328]
    for i in range(1, -(-length // (32 * KIB))):
        covered += raw[i * BB : i * BB + 260]
    crc = crc32c.crc32c(covered + raw[headers * BB :])
    return raw[:32] + crc.to_bytes(4, "little") + raw[36:]


def naive_checkpoint(
    ring: bytearray,
    items: Sequence[Sequence[bytes]],
    shape: Shape,
    start: int,
    tail: int,
    last: int,
) -> tuple[int, int]:
    """Write it into a ring of bytes; returns the head's LSN and the last record's BB."""
    cycle, bb = place_of(start)
    bbs = len(ring) // BB
    tid = (cycle * bbs + bb) % 2**32
    regions = [region for item in items for region in item]
    headers = -(-shape.size // (32 * KIB))
    for data, ops in naive_cut(regions, tid, shape.size - headers * BB):
        lsn = lsn_of(cycle, bb)
        raw = naive_record(data, ops, shape.size, shape.unit, lsn, tail, last, bbs - bb)
        for i in range(0, len(raw), BB):
            at = (bb * BB + i) % len(ring)
            ring[at : at + BB] = raw[i : i + BB]
        last, bb = bb, bb + len(raw) // BB
        if bb >= bbs:
            cycle, bb = cycle + 1, bb - bbs
    return lsn_of(cycle, bb), last


def contents(device: Memory) -> bytearray:
    with open(device.path, "rb") as file:
        return bytearray(file.read())


@shapes
async def test_records_are_the_naive_ones(numbers: tuple[int, int, int]) -> None:
    """Byte for byte, from a ring that was never written to one that went round several times."""
    logbsize, stripe, sector = numbers
    rng = random.Random(logbsize + stripe + sector)
    geo = geometry(1000, stripe, sector)
    device = Memory(1000 * BLOCK)
    shape = Shape.of(geo, logbsize)
    ring, start, last = bytearray(device.size), lsn_of(1, 0), 0
    async with opened(device, geo, ends_at(1, 0), logbsize) as (region, stream, vectors):
        assert stream.shape == shape
        straddled = 0
        while place_of(start)[0] < 5:
            items = random_items(rng, rng.choice((1, 3, 30, 100)), rng.choice((600, 40000)))
            here, tail = start, start - rng.choice((0, 0, 8))
            tail = tail if place_of(tail)[0] == place_of(here)[0] else here
            assert await stream.write(vectors.put(items), tail) == here == start
            start, last = naive_checkpoint(ring, items, shape, start, tail, last)
            assert stream.head == start
            crossed = start >> 32 != here >> 32
            straddled += crossed and place_of(start)[1] != 0
            assert contents(device) == ring
            if not crossed or place_of(here)[1] > 8:
                ends = await head.find(region)
                assert (ends.head, ends.cycle, ends.last) == (*place_of(start)[::-1], last)
        assert straddled > 1


@shapes
async def test_what_is_written_is_read_again(numbers: tuple[int, int, int]) -> None:
    logbsize, stripe, sector = numbers
    rng = random.Random(7)
    geo = geometry(2000, stripe, sector)
    async with opened(Memory(2000 * BLOCK), geo, ends_at(1, 0), logbsize) as opening:
        region, stream, vectors = opening
        tail = stream.head
        written = {}
        for regions in (1, 40, 2, 100, 3):
            items = random_items(rng, regions, 30000)
            written[await stream.write(vectors.put(items), tail)] = items
        ends = await head.find(region)
        read = [c async for c in checkpoints.committed(region, ends.tail, ends.head)]
        assert {c.lsn: c.regions[1:] for c in read} == {
            lsn: [region for item in items for region in item] for lsn, items in written.items()
        }
        await stream.unmount(tail)
        ends = await head.find(region)
        assert ends.clean
        assert ends.tail == stream.head


@shapes
async def test_an_operation_needs_four_bytes_behind_it(numbers: tuple[int, int, int]) -> None:
    """All ways in which the end of a record, and of the last region, may lie."""
    logbsize, stripe, sector = numbers
    geo = geometry(1000, stripe, sector)
    device = Memory(1000 * BLOCK)
    shape = Shape.of(geo, logbsize)
    ring, start, last = bytearray(device.size), lsn_of(1, 0), 0
    full = shape.capacity - 40 - 12
    async with opened(device, geo, ends_at(1, 0), logbsize) as (_, stream, vectors):
        for short in range(-24, 52, 4):
            items = [[b"r" * (full - short), b"last"]] if short >= -8 else [[b"r" * (full - short)]]
            assert await stream.write(vectors.put(items), start) == start
            start, last = naive_checkpoint(ring, items, shape, start, start, last)
            assert contents(device) == ring


# -- room -----------------------------------------------------------------------------------------


@shapes
def test_room_for_a_checkpoint(numbers: tuple[int, int, int]) -> None:
    """Never less than what it takes, and not much more: a unit, or a record it might just fill."""
    logbsize, stripe, sector = numbers
    shape = Shape.of(geometry(1, stripe, sector), logbsize)
    rng = random.Random(3)
    exact = 0
    for _ in range(100):
        regions = rng.choice((1, 2, 20, 200))
        sizes = [4 * rng.randint(1, rng.choice((4, 300, 20000))) for _ in range(regions)]
        sizes[-1] = max(4, sizes[-1] - (sum(sizes) + 12 * regions) % shape.capacity)
        cut = naive_cut([bytes(size) for size in sizes], 1, shape.capacity)
        took = sum(shape.bbs(shape.headers * BB + len(data)) for data, _ in cut)
        promised = shape.bbs_for(sum(sizes), regions)
        waste = 12 * len(cut) + shape.unit + shape.headers * BB
        assert took <= promised <= took + -(-waste // BB)
        exact += took == promised
    assert exact > 20


async def test_the_head_never_overtakes_the_tail() -> None:
    geo, device = geometry(100), Memory(100 * BLOCK)
    bbs = 100 * BLOCK // BB
    async with opened(device, geo, ends_at(1, 0), 32 * KIB) as (region, stream, vectors):
        one = vectors.put([[bytes(8000)]])
        while place_of(stream.head)[0] < 4:
            await stream.write(one, stream.head)
        tail = stream.head
        assert stream.bbs_free(tail) == bbs
        need = stream.bbs_for(8000, 1)
        while stream.bbs_free(tail) > need:
            free = stream.bbs_free(tail)
            await stream.write(one, tail)
            assert stream.bbs_free(tail) == free - need
        before, end = contents(device), stream.head
        with pytest.raises(LogOverrun, match="log overrun"):
            await stream.write(one, tail)
        assert (contents(device), stream.head) == (before, end)
        assert stream.dead is None
        while stream.bbs_free(tail) > 2:
            await stream.write(vectors.put([[bytes(4)]]), tail)
        with pytest.raises(LogOverrun, match="log overrun"):
            await stream.unmount(tail)
        for wrong in (stream.head + 1, tail - (1 << 32)):
            with pytest.raises(LogOverrun, match="log overrun"):
                await stream.write(one, wrong)
        ends = await head.find(region)
        assert lsn_of(ends.cycle, ends.head) == stream.head
        assert ends.tail == tail
        await stream.write(one, stream.head)  # all is at home


@pytest.mark.parametrize("broken", ["zero", "odd", "short", "long", "few", "many", "none"])
async def test_vectors_that_are_not_what_they_say(broken: str) -> None:
    device = Memory(100 * BLOCK)
    async with opened(device, geometry(100), ends_at(1, 0), 32 * KIB) as (_, stream, vectors):
        named = vectors.put([[bytes(100), bytes(40)], [bytes(8), bytes(12)]])
        at = int(named[1, 0])
        mem = stream._arena.mem
        if broken in ("zero", "odd"):
            mem[at] = 0 if broken == "zero" else 7
        elif broken in ("short", "long"):
            named[1, 1] += -4 if broken == "short" else 4
        else:
            named[1, 2] = {"few": 1, "many": 3, "none": 0}[broken]
        with pytest.raises(AssertionError, match="log vector 1 is not"):
            await stream.write(named, stream.head)
        assert not any(contents(device))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str) -> None:
    """An iclog holds whole stripes, one at least."""
    logbsize, stripe, sector = SHAPES[name]
    assert Shape.of(geometry(1, stripe, sector), logbsize) == UNITS[name]


def test_sizes_that_no_iclog_has() -> None:
    for size in (16 * KIB, 48 * KIB, 512 * KIB):
        with pytest.raises(ValueError, match=f"iclogs of {size} bytes"):
            Shape.of(geometry(1), size)


# -- the device -----------------------------------------------------------------------------------


class Slow(Memory):
    """Writes take a while, on trio's clock; what is under way is counted, and between flushes."""

    def __init__(self, size: int, seed: int = 1) -> None:
        super().__init__(size)
        self._random = random.Random(seed)
        self.under_way = self.most_under_way = self.writes = 0
        self.unstable = self.most_unstable = self.flushes = 0
        self.fails_at = -1
        self.flush_fails = False

    async def write(self, offset: int, views: Views) -> None:
        self.under_way += 1
        self.most_under_way = max(self.under_way, self.most_under_way)
        self.unstable += sum(map(len, views))
        self.most_unstable = max(self.unstable, self.most_unstable)
        before = [bytes(view) for view in views]
        number, self.writes = self.writes, self.writes + 1
        await trio.sleep(self._random.random())
        assert [bytes(view) for view in views] == before, "the iclog changed under the write"
        self.under_way -= 1
        if number == self.fails_at:
            raise OSError(errno.EIO, "failed, as it was told to")
        await super().write(offset, views)

    async def flush(self) -> None:
        assert not self.under_way
        if self.flush_fails:
            raise OSError(errno.EIO, "failed, as it was told to")
        self.unstable = 0
        self.flushes += 1
        await super().flush()


@pytest.mark.parametrize("logbsize", [32 * KIB, 256 * KIB])
async def test_records_under_way(logbsize: int, autojump_clock: trio.testing.MockClock) -> None:
    """As many as there are iclogs, and never more unstable than whoever recovers looks for."""
    device, rng = Slow(4000 * BLOCK), random.Random(2)
    geo = geometry(4000)
    async with opened(device, geo, ends_at(2, 31000), logbsize, 64 << 20) as opening:
        region, stream, vectors = opening
        items = [[rng.randbytes(4096 * rng.randint(1, 16))] for _ in range(100)]
        flushes, tail = device.flushes, stream.head
        with trio.CancelScope() as scope:
            scope.cancel()  # whoever waits for it may be: the checkpoint is written
            await stream.write(vectors.put(items), tail)
        assert device.most_under_way == ICLOGS
        assert device.most_unstable <= TORN_BBS * BB
        need = stream.bbs_for(sum(len(item[0]) for item in items), 100)
        assert device.flushes - flushes == need // TORN_BBS > 0
        (read,) = [c async for c in checkpoints.committed(region, tail, place_of(stream.head)[1])]
        assert read.regions[1:] == [item[0] for item in items]


@pytest.mark.parametrize(("regions", "at"), [(1, 0), (300, 0), (300, 1), (300, 3)])
async def test_a_write_that_fails(
    regions: int, at: int, autojump_clock: trio.testing.MockClock
) -> None:
    """Nobody writes behind a hole: the log ends before the checkpoint, and so does the writer."""
    device = Slow(1000 * BLOCK)
    async with opened(device, geometry(1000), ends_at(1, 0), 32 * KIB) as (region, stream, vectors):
        good = await stream.write(vectors.put([[bytes(100)]]), lsn_of(1, 0))
        device.fails_at = device.writes + at
        bad = vectors.put([[b"bad!" * 100]] * regions)
        with pytest.raises(OSError, match="told to") as failed:
            await stream.write(bad, good)
        assert stream.dead is failed.value
        writes, before = device.writes, contents(device)
        for call in (lambda: stream.write(bad, good), lambda: stream.unmount(good)):
            with pytest.raises(OSError, match="told to"):
                await call()
        assert (device.writes, contents(device)) == (writes, before)
        ends = await head.find(region)
        read = [c.lsn async for c in checkpoints.committed(region, ends.tail, ends.head)]
        assert read == [good]


async def test_a_flush_that_fails(autojump_clock: trio.testing.MockClock) -> None:
    device = Slow(2000 * BLOCK)
    async with opened(device, geometry(2000), ends_at(1, 0), 256 * KIB) as (_, stream, vectors):
        device.flush_fails = True
        with pytest.raises(OSError, match="told to"):
            await stream.write(vectors.put([[bytes(64 * KIB)]] * 40), stream.head)
        assert stream.dead is not None


# -- cycles ---------------------------------------------------------------------------------------


async def test_no_cycle_looks_like_a_header() -> None:
    """The log goes round from the cycle before the magic number to the one behind it."""
    last = 0xFEEDBABE - 1
    device = Memory(200 * BLOCK)
    bbs = device.size // BB
    old = np.zeros((bbs, BB), np.uint8)
    old[:, :4] = np.frombuffer(last.to_bytes(4, "big"), np.uint8)
    old[bbs - 70 :, 3] -= 1
    await Region(device, geometry(200)).write(0, old)
    rng = random.Random(9)
    async with opened(device, geometry(200), ends_at(last, bbs - 70), 32 * KIB) as opening:
        region, stream, vectors = opening
        tail, written = stream.head, []
        for size in (10000, 50000, 3000):
            item = [rng.randbytes(size)]
            written.append((await stream.write(vectors.put([item]), tail), item))
            ends = await head.find(region)
            assert (ends.tail, lsn_of(ends.cycle, ends.head)) == (tail, stream.head)
            read = [c async for c in checkpoints.committed(region, ends.tail, ends.head)]
            assert [(c.lsn, c.regions[1:]) for c in read] == written
        assert stream.head >> 32 == last + 2
        await stream.unmount(tail)
        assert (await head.find(region)).tail == stream.head


@pytest.mark.parametrize("stale", [False, True])
async def test_what_was_torn_is_cleared_away(stale: bool) -> None:
    """BBs of the cycle to come, ahead of the head, and over the ring's end; else nothing."""
    device = Slow(1000 * BLOCK)
    bbs = device.size // BB
    region = Region(device, geometry(1000))
    old = np.zeros((bbs, BB), np.uint8)
    old[:, 3] = 7
    old[bbs - 50 :, 3] = 6
    for bb in (bbs - 5, 20) if stale else ():
        old[bb, 3] = 7 + (bb < 50)
    with open(device.path, "r+b") as file:
        file.write(old.tobytes())
    ends = Ends(bbs - 50, 7, lsn_of(7, bbs - 60), False, bbs - 60)
    async with opened(device, region.geo, ends, 32 * KIB) as (_, stream, _):
        assert stream.head == lsn_of(7, bbs - 50)
    assert device.writes == (2 if stale else 0)
    stamps = head.cycles(await region.read(0, bbs))
    assert set(stamps[bbs - 50 :]) == {6}
    assert set(stamps[: bbs - 50]) == {7}


# -- power failures -------------------------------------------------------------------------------

Written = tuple[int, list[bytes]]  # LSN, regions


class Power:
    """A log that is written, loses power in the middle of a checkpoint, is read and goes on."""

    def __init__(self, device: Volatile, region: Region, arena: Arena, seed: int) -> None:
        self.device, self.region, self.arena = device, region, arena
        self.rng = random.Random(seed)
        self.log: list[Written] = []  # what recovery must find, from the tail on
        self.cut_off = self.survived = 0

    async def round(self, ends: Ends, logbsize: int, vectors: Vectors) -> Ends:
        rng, region = self.rng, self.region
        stream = Stream(region, self.arena, ends, logbsize)
        await stream.start()
        tail = ends.tail
        for _ in range(rng.randrange(3)):
            tail = self._tail(stream, tail)
            await self._write(stream, vectors, random_items(rng, rng.choice((1, 30)), 10000), tail)
            await region.flush()
        tail = self._tail(stream, tail)
        self.device.left = rng.choice((-1, rng.randrange(1, 80 * 32 * KIB // logbsize)))
        written = list(self.log)
        try:
            await self._write(stream, vectors, random_items(rng, rng.choice((1, 450)), 40000), tail)
        except OSError:
            assert stream.dead is not None
            self.cut_off += 1
        self.device.lose(rng)
        ends = await head.find(region)
        log = checkpoints.committed(region, ends.tail, ends.head)
        read = [] if ends.clean else [(c.lsn, c.regions[1:]) async for c in log]
        self._judge(read, written, tail)
        stream.stop()
        return ends

    def _tail(self, stream: Stream, tail: int) -> int:
        """Some of what was logged came home: all of it, or so much that there is room."""
        later = [lsn for lsn, _ in self.log if lsn >= tail]
        while later and stream.bbs_free(later[0]) < self.region.bbs * 3 // 4:
            later.pop(0)
        return self.rng.choice(later[:2]) if later else stream.head

    async def _write(self, stream: Stream, vectors: Vectors, items: Any, tail: int) -> None:
        lsn = await stream.write(vectors.put(items), tail)
        self.log.append((lsn, [region for item in items for region in item]))

    def _judge(self, read: list[Written], written: list[Written], tail: int) -> None:
        """All that was stable and not at home; with the last one, if that came through."""
        self.survived += len(self.log) > len(written) and read[-1:] == self.log[-1:]
        if read[-1:] != self.log[-1:]:
            self.log = written
        needed = [lsn for lsn, _ in self.log if lsn >= tail]
        assert [lsn for lsn, _ in read][len(read) - len(needed) :] == needed
        assert read == self.log[len(self.log) - len(read) :]


@pytest.mark.parametrize("name", ["plain", "large", "stripe"])
async def test_power_failures(name: str, scratch: Path, seed: int = 1) -> None:
    """Whatever of the unflushed sectors is there: everything stable is read, nothing half-done."""
    logbsize, stripe, sector = SHAPES[name]
    rounds = 60
    (scratch / "log").write_bytes(bytes(2000 * BLOCK))
    device = Volatile(str(scratch / "log"))
    arena = Arena(64 << 20)
    vectors = Vectors(arena, random.Random(seed))
    await vectors.start()
    power = Power(device, Region(device, geometry(2000, stripe, sector)), arena, seed)
    region = power.region
    shape = Shape.of(region.geo, logbsize)
    await region.write(0, closing.unmount_record(region, shape, lsn_of(1, 0), 0))  # as mkfs does
    await region.flush()
    ends = await head.find(power.region)
    for _ in range(rounds):
        ends = await power.round(ends, logbsize, vectors)
    assert ends.cycle > 2
    assert power.cut_off > rounds // 8
    assert power.survived > rounds // 8
    device.close()
    arena.close()
