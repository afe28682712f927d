"""A lane's queue without the kernel's FUSE: places filled by hand, submissions read as bytes.

The rings are real (io_uring_setup); completions are written where the kernel would write them, and
what the lane submits is looked at instead of being submitted.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import errno
import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from alloc.jit import DISABLED, kernel
from fs import tuning
from fs.device.image import ImageFile
from fs.front import lanequeue, lanereply, park, queues, wire
from fs.front import lanestate as S
from fs.volume import Volume
from tests import support

HEADER = struct.Struct("=IIQQIIIHH")
REPLY = struct.Struct("=IiQ")
UNIQUE = 0x1122334455667788

pytestmark = [
    pytest.mark.skipif(DISABLED, reason="a ring belongs to compiled kernels"),
    pytest.mark.skipif(
        bool(tuning.uring_hindrance()), reason=tuning.uring_hindrance() or "there is io_uring"
    ),
]


@kernel(lambda: (S.sample(),))
def receive(lane):
    return lanequeue.receive(lane)


@kernel(lambda: (S.sample(), 1, 1))
def answer(lane, error, nbytes):
    return lanereply.reply(lane, error, nbytes)


@kernel(lambda: (S.sample(),))
def offer(lane):
    lanequeue.register(lane)


@kernel("i8(i8[:,::1], i8)")
def place_of(entries, unique):
    return lanequeue.entry_of(entries, unique)


class Queue:
    """The second queue of a mount with two, and the kernel's side of it."""

    def __init__(self, front: park.Front) -> None:
        self.front = front
        self.lane = front.lanes[2]
        self.mem = front.vol.pages.view
        self.first = int(self.lane.uring[S.U_FIRST])
        self.fd = front.queues.open_ring(self.lane, 99)
        front.equip(self.lane)

    def place(self, entry: int) -> SimpleNamespace:
        header, payload = self.front.queues.entries[entry, : S.N_PAYLOAD + 1].tolist()
        return SimpleNamespace(header=header, payload=payload << 12)

    def store(self, at: int, data: bytes) -> None:
        self.mem[at : at + len(data)] = data

    def completes(self, user: int, result: int) -> None:
        words = self.lane.uring
        tail = int(self.lane.m4[words[S.U_CQ_TAIL_AT] >> 2])
        at = int(words[S.U_CQES_AT]) + (tail & int(words[S.U_CQ_MASK])) * 16
        self.store(at, struct.pack("=qiI", user, result, 0))
        self.lane.m4[words[S.U_CQ_TAIL_AT] >> 2] = tail + 1

    def arrives(self, entry: int, opcode: int, head: bytes, payload: bytes) -> None:
        """A request as the kernel puts it into a place."""
        place = self.place(entry)
        size = HEADER.size + len(head) + len(payload)
        self.store(place.header, HEADER.pack(size, opcode, UNIQUE, 1, 0, 0, 0, 0, 0))
        self.store(place.header + 128, head)
        self.store(place.header + 256, struct.pack("=QQIIQ", 0, UNIQUE, len(payload), 0, 0))
        self.store(place.payload, payload)
        self.completes(entry, 0)

    def submitted(self) -> list[tuple[int, ...]]:
        """(opcode, fd, command, user_data, commit id, queue) of what was submitted since."""
        words, found = self.lane.uring, []
        tail = int(self.lane.m4[words[S.U_SQ_TAIL_AT] >> 2])
        for number in range(tail - int(words[S.U_PENDING]), tail):
            at = int(words[S.U_SQES_AT]) + (number & int(words[S.U_SQ_MASK])) * 128
            code, fd, command, user = struct.unpack_from("=B3xiI20xq", self.mem, at)
            found.append((code, fd, command, user, *struct.unpack_from("=QH", self.mem, at + 56)))
        words[S.U_PENDING] = 0
        return found

    def replied(self, entry: int) -> tuple[int, int, bytes]:
        """(error, unique, body) that stand in a place."""
        place = self.place(entry)
        size, error, unique = REPLY.unpack_from(self.mem, place.header)
        (nbytes,) = struct.unpack_from("=I", self.mem, place.header + 272)
        assert size == REPLY.size + nbytes
        return -error, unique, bytes(self.mem[place.payload : place.payload + nbytes])


@asynccontextmanager
async def a_queue(scratch: Path) -> AsyncIterator[Queue]:
    image = ImageFile(str(support.mkfs(scratch)))
    async with Volume.open(image, 16 << 20) as vol:
        front = park.Front(vol, 1, queues=2)
        await front.start()
        queue = Queue(front)
        try:
            yield queue
        finally:
            os.close(queue.fd)
            front.stop()
        vol.arena.check()
    image.close()


async def test_every_place_is_offered_and_the_relay_watched(scratch: Path) -> None:
    async with a_queue(scratch) as queue:
        offer(queue.lane)
        *places, relay = queue.submitted()
        assert [place[3] for place in places] == list(range(queue.first, queue.first + len(places)))
        assert {place[:3] + place[5:] for place in places} == {(46, 99, 1, 1)}
        assert relay[:4] == (6, queue.lane.uring[S.U_RELAY], 0, -1)
        iov = queue.place(queue.first).header + 320
        start = queue.lane.mem.ctypes.data
        got = struct.unpack_from("=4Q", queue.mem, iov)
        place = queue.place(queue.first)
        size = queue.front.max_write
        assert got == (start + place.header, 288, start + place.payload, size)


@pytest.mark.parametrize(
    ("opcode", "head", "payload"),
    [
        (wire.STATFS, 0, 0),
        (wire.LOOKUP, 0, 5),
        (wire.READ, 40, 0),
        (wire.WRITE, 40, 70_000),
        (wire.SETXATTR, 8, 20_000),
        (wire.SETATTR, 88, 0),
    ],
)
async def test_a_request_is_put_together(
    scratch: Path, opcode: int, head: int, payload: int
) -> None:
    async with a_queue(scratch) as queue:
        first, rest = os.urandom(head), os.urandom(payload)
        queue.arrives(queue.first, opcode, first, rest)
        lane, me = queue.lane, queue.lane.me
        assert receive(lane) == 40 + head + payload == me[S.M_LEN]
        assert me[S.M_HEAD] == 40 + head
        slot = int(lane.slots[me[S.M_SLOT], S.S_ADDR])
        assert bytes(queue.mem[slot + 40 : slot + 40 + head]) == first
        assert bytes(queue.mem[int(me[S.M_PAYLOAD]) << 12 :][:payload]) == rest
        assert place_of(lane.entries, UNIQUE) == me[S.M_ENTRY] == queue.first


async def test_a_reply_is_submitted_once_and_frees_the_place(scratch: Path) -> None:
    async with a_queue(scratch) as queue:
        queue.arrives(queue.first + 1, wire.STATFS, b"", b"")
        receive(queue.lane)
        queue.lane.out[16:24] = np.frombuffer(b"the body", np.uint8)
        assert answer(queue.lane, 0, 8) == S.ANSWERED
        assert queue.submitted() == [(46, 99, 2, queue.first + 1, UNIQUE, 1)]
        assert queue.replied(queue.first + 1) == (0, UNIQUE, b"the body")
        assert place_of(queue.lane.entries, UNIQUE) == -1
        queue.arrives(queue.first, wire.STATFS, b"", b"")
        receive(queue.lane)
        answer(queue.lane, errno.EIO, 0)
        assert queue.replied(queue.first) == (errno.EIO, UNIQUE, b"")


async def test_other_threads_reply_through_the_relay(scratch: Path) -> None:
    """A whole reply, a header whose body is in place, and one that nobody waits for."""
    async with a_queue(scratch) as queue:
        relay, entry = queue.front.queues.relay(1), queue.first
        body = os.urandom(60_000)
        for in_place in (False, True):
            queue.arrives(entry, wire.READ, b"\0" * 40, b"")
            receive(queue.lane)
            if in_place:
                queue.store(queue.place(entry).payload, body)
            head = REPLY.pack(REPLY.size + len(body), 0, UNIQUE)
            os.write(relay, head if in_place else head + body)
            os.write(relay, REPLY.pack(REPLY.size, 0, UNIQUE + 1))
            queue.completes(-1, 1)
            assert receive(queue.lane) == 0
            committed, watched = queue.submitted()
            assert committed == (46, 99, 2, entry, UNIQUE, 1)
            assert watched[0] == 6
            assert queue.replied(entry) == (0, UNIQUE, body)
            queue.store(queue.place(entry).payload, bytes(len(body)))
        assert queue.lane.me[S.M_UNWANTED] == 2


async def test_sizes_of_an_untrusted_header_are_bounded(scratch: Path) -> None:
    async with a_queue(scratch) as queue:
        place = queue.place(queue.first)
        for size, rest in ((0xFFFFFFFF, 0), (0, 0xFFFFFFFF), (10, 0)):
            queue.arrives(queue.first, wire.LOOKUP, b"", b"")
            queue.store(place.header, struct.pack("=I", size))
            queue.store(place.header + 272, struct.pack("=I", rest))
            assert receive(queue.lane) > 0
            assert 40 <= queue.lane.me[S.M_HEAD] <= 40 + 128


async def test_the_queue_ends_with_its_last_place(scratch: Path) -> None:
    async with a_queue(scratch) as queue:
        for number in range(queue.front.queues.places):
            queue.completes(queue.first + number, -errno.ENOTCONN)
            assert receive(queue.lane) == 0
        assert receive(queue.lane) == -errno.ENODEV
        assert queue.lane.me[S.M_REFUSED] == 0
        queue.completes(queue.first, -errno.EINVAL)
        receive(queue.lane)
        assert queue.lane.me[S.M_REFUSED] == 1, "any other error is a bug to be seen"


async def test_a_parked_request_leaves_the_payload_with_its_place(scratch: Path) -> None:
    async with a_queue(scratch) as queue:
        front, me = queue.front, queue.lane.me
        free = front.free_payload_count
        queue.arrives(queue.first, wire.WRITE, b"\0" * 40, b"x" * 70_000)
        receive(queue.lane)
        slot = int(me[S.M_SLOT])
        place: Any = front.slots[slot]
        place[S.S_PAYLOAD], place[S.S_ENTRY] = me[S.M_PAYLOAD], me[S.M_ENTRY]
        me[S.M_SLOT] = -1
        front.give_back(slot)
        assert front.free_payload_count == free
        assert place[S.S_PAYLOAD] == 0


@pytest.mark.parametrize(("memory", "most"), [(8, 128), (16, 128), (64, 256), (1024, 1024)])
def test_sizes_follow_memory(memory: int, most: int) -> None:
    max_write, places = queues.sizes(memory << 20, 2)
    assert max_write == most << 10
    assert queues.PLACES_LEAST <= places <= queues.PLACES_MOST
    assert memory < 32 or max_write * 2 * places <= memory << 20 >> 4
