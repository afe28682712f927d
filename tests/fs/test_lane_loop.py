"""The lane's loop on a socket pair: what it forwards, hands to trio, refuses and survives.

The pair stands for /dev/fuse: a message in, a message out, as the device does it. Another one
stands for pyfuse3. The loop runs in a thread of its own, without the GIL, as in a mount.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from alloc.jit import DISABLED, probe
from fs.device.image import ImageFile
from fs.front import buffers, lane, park, pump, ring, wire
from fs.front import lanestate as S
from fs.volume import Volume
from tests import support

HEADER = struct.Struct("=IIQQIIIHH")
REPLY = struct.Struct("=IiQ")
SECONDS = 20.0

needs_jit = pytest.mark.skipif(DISABLED, reason="threads need compiled kernels")


def message(opcode: int, body: bytes = b"", node: int = 1, length: int = -1) -> bytes:
    size = HEADER.size + len(body) if length < 0 else length
    return HEADER.pack(size, opcode, 77, node, 0, 0, 0, 0, 0) + body


class Device:
    """One lane between a client (this test) and the two others, trio and pyfuse3."""

    def __init__(self, front: park.Front) -> None:
        self.front = front
        self.kernel, self._inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.pyfuse3, self._forward = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.kernel, self.pyfuse3):
            end.settimeout(SECONDS)
        self.bell = os.eventfd(0)
        front.control[S.C_BELL_FD] = self.bell
        front.control[S.C_FORWARD_FD] = self._forward.fileno()
        self.lane = front.lanes[0]
        self.lane.me[S.M_FD] = self._inside.fileno()
        self.thread = threading.Thread(target=lane.run, args=(self.lane,))
        self.thread.start()

    def ask(self, text: bytes) -> tuple[int, int, bytes]:
        """Send a message and have its reply: (error, unique, body)."""
        self.kernel.send(text)
        answer = self.kernel.recv(1 << 17)
        size, error, unique = REPLY.unpack_from(answer)
        assert size == len(answer)
        return -error, unique, answer[REPLY.size :]

    def entries(self, count: int) -> list[list[int]]:
        """What the lane handed to trio."""
        out: list[list[int]] = []
        some = np.zeros((8, ring.CELL_WORDS), np.int64)
        while len(out) < count:
            assert select.select([self.bell], [], [], SECONDS)[0], "the lane does not ring"
            os.eventfd_read(self.bell)
            ring.answer_bell(self.front.control)
            n = int(ring.take(self.front.control, self.front.ring, some))
            out += some[:n].tolist()
        return out

    def close(self) -> None:
        self.kernel.close()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()
        for end in (self._inside, self.pyfuse3, self._forward):
            end.close()
        os.close(self.bell)


@asynccontextmanager
async def device(scratch: Path) -> AsyncIterator[Device]:
    image = ImageFile(str(support.mkfs(scratch)))
    async with Volume.open(image, 8 << 20) as vol:
        front = park.Front(vol, 1)
        await front.start()
        made = Device(front)
        try:
            while made.lane.me[S.M_SLOT] < 0 or not made.lane.me[S.M_PAYLOAD]:
                await trio.sleep(0.001)  # from here on the lane waits for a message
            yield made
        finally:
            made.close()
            front.stop()
    image.close()


@needs_jit
async def test_the_loop_ends_with_the_connection(scratch: Path) -> None:
    async with device(scratch) as made:
        pass
    assert made.lane.me[S.M_LEFT] == errno.ENODEV


@needs_jit
async def test_malformed_messages_are_refused_and_counted(scratch: Path) -> None:
    async with device(scratch) as made:
        read, write = b"\0" * 39, b"\0" * 16 + struct.pack("=I", 5000) + b"\0" * 20
        for text in (
            message(wire.READ, b"", length=999),
            message(wire.READ, read),
            message(wire.WRITE, write + b"x" * 4999),
            message(wire.LOOKUP, b""),
            message(wire.LOOKUP, b"no end"),
            message(wire.RELEASE, b"\0" * 8),
            message(wire.BATCH_FORGET, struct.pack("=II", 1000, 0)),
            message(wire.TMPFILE, b"\0" * 9000),
            b"\0" * 80,
            b"x" * 80,
        ):
            error, _, body = made.ask(text)
            assert (error, body) == (errno.EIO, b""), text[:60]
        assert made.ask(message(wire.IOCTL, b"\0" * 9000))[0] == errno.ENOTTY
        for _ in range(2):  # a lane counts a request after its reply and before the next one
            assert made.ask(message(wire.ACCESS, b"\0" * 8))[0] == 0, "and it still serves"
        assert made.lane.counts[:, S.ST_BROKEN].sum() == 11
        assert made.lane.counts[wire.ACCESS, S.ST_ANSWERED] >= 1


@needs_jit
@pytest.mark.parametrize("size", [0, 1, 40, 41, 1000, 8152, 8153, 70_000])
async def test_what_is_forwarded_arrives_as_it_came(scratch: Path, size: int) -> None:
    async with device(scratch) as made:
        text = message(wire.SETXATTR, os.urandom(size))
        made.kernel.send(text)
        assert made.pyfuse3.recv(1 << 17) == text
        made.kernel.send(message(61, b"what is this"))
        assert made.pyfuse3.recv(1 << 17) == message(61, b"what is this")
        made.kernel.send(message(1000, b"or this"))
        assert made.pyfuse3.recv(1 << 17) == message(1000, b"or this")


@needs_jit
async def test_a_listing_is_asked_for_in_pieces_that_fit(scratch: Path) -> None:
    async with device(scratch) as made:
        for asked, sent in ((4096, 4096), (1 << 20, lane.READDIR_MOST)):
            made.kernel.send(message(wire.READDIRPLUS, struct.pack("=QQI20x", 1, 2, asked)))
            got = made.pyfuse3.recv(1 << 17)
            assert struct.unpack_from("=QQI", got, 40) == (1, 2, sent)


@needs_jit
async def test_without_pyfuse3_a_forwarded_request_fails(scratch: Path) -> None:
    async with device(scratch) as made:
        made.pyfuse3.close()
        assert made.ask(message(wire.SYMLINK, b"name\0to\0"))[0] == errno.EIO


@needs_jit
async def test_what_gives_back_goes_to_trio(scratch: Path) -> None:
    async with device(scratch) as made:
        made.front.control[S.C_SHUTDOWN] = 1
        assert made.ask(message(wire.RELEASE, struct.pack("=QIIQ", 555, 0, 0, 0)))[0] == 0
        made.kernel.send(message(wire.FORGET, struct.pack("=Q", 3), node=131))
        batch = struct.pack("=II", 2, 0) + struct.pack("=QQQQ", 132, 1, 133, 4)
        made.kernel.send(message(wire.BATCH_FORGET, batch))
        released, forgot, many = made.entries(3)
        assert released[S.E_KIND : S.E_C] == [S.K_RELEASE, 555, wire.RELEASE]
        assert [forgot[i] for i in (S.E_KIND, S.E_A, S.E_C)] == [S.K_FORGET, 131, 3]
        assert many[S.E_KIND] == S.K_FORGETS
        at = int(made.front.slots[many[S.E_A], S.S_ADDR])
        assert bytes(made.lane.mem[at + 40 : at + 80]) == batch
        buffers.give_slot(made.front.control, made.front.free_slots, many[S.E_A])


@needs_jit
async def test_interrupt_and_flush_are_not_asked_for_again(scratch: Path) -> None:
    async with device(scratch) as made:
        for opcode in (wire.INTERRUPT, wire.FLUSH):
            assert made.ask(message(opcode, b"\0" * 24))[0] == errno.ENOSYS


@needs_jit
async def test_requests_that_come_quickly_are_rung_for(scratch: Path) -> None:
    """Once for each BUSY_TURNS of them, if they took less time than trio named."""
    text = message(wire.INTERRUPT, b"\0" * 8)
    async with device(scratch) as made:
        control = made.front.control
        bits = []
        for limit in (0, 10**15, 1):
            control[S.C_BUSY_NS] = limit
            for _ in range(S.BUSY_TURNS - 1):
                made.ask(text)
            bits.append(int(ring.answer_bell(control)))
            made.ask(text)
            bits.append(int(ring.answer_bell(control)))
        assert bits == [0, 0, 0, S.B_BUSY, 0, 0]
        assert made.lane.me[S.M_TURNS] == 3 * S.BUSY_TURNS


@needs_jit
async def test_a_parked_request_keeps_its_bytes(scratch: Path) -> None:
    """Small ones in the slot, the payload of a large one in its folio; nothing is overwritten."""
    async with device(scratch) as made:
        front = made.front
        front.control[S.C_SHUTDOWN] = 1
        parked = []
        for size in (0, 1, 8112, 8113, 100_000):
            data = os.urandom(size)
            args = struct.pack("=QQIIQII", 1, 2, size, 0, 0, 0, 0)
            made.kernel.send(message(wire.WRITE, args + data))
            (entry,) = made.entries(1)
            parked.append((entry[S.E_A], data))
            if size == 8113:  # there are but two payloads, and the lane wants one in hand
                slot = entry[S.E_A]
                payload = int(front.slots[slot, S.S_PAYLOAD])
                assert bytes(made.lane.mem[payload << 12 : (payload << 12) + size]) == data
                front.give_back(slot)
                parked.pop()
        for slot, data in parked:
            place = front.slots[slot]
            payload = int(place[S.S_PAYLOAD])
            at = payload << 12 if payload else int(place[S.S_ADDR]) + wire.RW_ARGS_END
            assert bytes(made.lane.mem[at : at + len(data)]) == data
            assert place[S.S_LEN] == wire.RW_ARGS_END + len(data)
            assert made.lane.reasons[wire.WRITE, S.R_SHUTDOWN] == 5
            front.give_back(slot)


@needs_jit
async def test_no_slot_means_waiting(scratch: Path) -> None:
    async with device(scratch) as made:
        front, held = made.front, []
        while (slot := int(buffers.take_slot(front.control, front.free_slots))) >= 0:
            held.append(slot)
        for _ in range(2):
            made.kernel.send(message(wire.LSEEK, b"\0" * 24))
        (entry,) = made.entries(1)
        made.kernel.setblocking(False)
        await trio.sleep(0.05)
        assert made.lane.counts[wire.LSEEK, S.ST_PARKED] == 1
        front.give_back(entry[S.E_A])
        (entry,) = made.entries(1)
        assert made.lane.counts[wire.LSEEK, S.ST_PARKED] == 2
        front.give_back(entry[S.E_A])
        for slot in held:
            front.give_back(slot)


# -- the ring, the stacks, the pump ---------------------------------------------------------------


@probe
def post(control: Any, cells: Any, kind: int, a: int, b: int, c: int, time: int) -> None:
    """Post one entry, as a lane does."""
    ring.post(control, cells, kind, a, b, c, time)


@needs_jit
def test_the_ring_loses_nothing_and_keeps_each_producers_order() -> None:
    producers, each = 4, 3000
    control, cells = np.zeros(S.C_WORDS, np.int64), np.zeros((16, ring.CELL_WORDS), np.int64)
    ring.init(control, cells)

    def produce(number: int) -> None:
        for n in range(each):
            post(control, cells, number, n, n * 2, n * 3, n * 4)

    threads = [threading.Thread(target=produce, args=(n,)) for n in range(producers)]
    for thread in threads:
        thread.start()
    seen: list[list[int]] = [[] for _ in range(producers)]
    some = np.zeros((8, ring.CELL_WORDS), np.int64)
    while sum(map(len, seen)) < producers * each:
        for entry in some[: int(ring.take(control, cells, some))].tolist():
            n = entry[S.E_A]
            assert [entry[i] for i in (S.E_B, S.E_C, S.E_TIME)] == [n * 2, n * 3, n * 4]
            seen[entry[S.E_KIND]].append(n)
    for thread in threads:
        thread.join(SECONDS)
    assert seen == [list(range(each))] * producers
    assert not ring.take(control, cells, some)


@pytest.mark.parametrize("lanes", [1, 2, 4])
@pytest.mark.parametrize("memory", [8 << 20, 16 << 20, 64 << 20, 256 << 20, 4 << 30])
def test_buffers_take_a_small_part_of_memory(memory: int, lanes: int) -> None:
    max_write, payloads, slots = buffers.sizes(memory, lanes)
    assert payloads > lanes
    assert slots > lanes
    assert max_write >= buffers.MAX_WRITE_LEAST
    taken = max_write * payloads + slots * S.SLOT_BYTES
    assert taken <= memory // 12 or max_write == buffers.MAX_WRITE_LEAST
    if memory >= 64 << 20 and lanes <= 2:
        assert max_write == 1 << 20
    assert buffers.slots_most(memory, slots) >= slots


@needs_jit
def test_the_pump_copies_and_answers_for_what_is_refused() -> None:
    ours, pyfuse3 = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    fuse, inside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    words, counts = np.zeros(pump.REPLY_MOST // 8, np.int64), np.zeros(pump.P_WORDS, np.int64)
    small = 4608  # the device takes no more than this in one message
    inside.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, small)
    lane_end, relay = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    entries = np.zeros((3, S.N_WORDS), np.int64)
    entries[2, [S.N_UNIQUE, S.N_RELAY]] = 9, relay.fileno()
    args = (ours.fileno(), inside.fileno(), words, counts, entries)
    thread = threading.Thread(target=pump.run, args=args)
    thread.start()
    good = REPLY.pack(20, 0, 5) + b"body"
    pyfuse3.send(good)
    assert fuse.recv(100_000) == good
    queued = REPLY.pack(20, 0, 9) + b"body"
    pyfuse3.send(queued)  # its request came through a queue
    assert lane_end.recv(100_000) == queued
    pyfuse3.send(REPLY.pack(60_016, 0, 6) + bytes(60_000))
    assert fuse.recv(100_000) == REPLY.pack(16, -errno.EIO, 6)
    pyfuse3.close()
    thread.join(SECONDS)
    assert not thread.is_alive()
    assert counts.tolist()[:3] == [2, 0, 1]
    for end in (ours, fuse, inside, lane_end, relay):
        end.close()
