"""A lane without a thread and without /dev/fuse: READ and WRITE go in by hand, one at a time.

A message is put where a lane's loop reads it, the lane's own function serves it, and what it parks
is finished as trio does it, after the same handing over. Replies go to a file in memory and are
taken apart again. Bells are answered as the mount answers them.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from alloc import jit
from alloc.atomic import exchange
from alloc.jit import kernel
from fs.cache.inode import Inode
from fs.front import handles, laneslow, park
from fs.front import lanestate as S
from fs.front.laneread import serve_read
from fs.front.lanewrite import serve_write
from fs.front.operations import Operations
from fs.front.options import MountOptions
from fs.front.wire import READ, RW_ARGS_END, WRITE
from fs.volume import Volume

HEADER = struct.Struct("=IIQQIIIHH")
ARGS = struct.Struct("=QqIIQII")
REPLY = struct.Struct("=IiQ")
UNIQUE = 0x1122334455667788
SMALL = S.SLOT_BYTES - RW_ARGS_END


@kernel(lambda: (S.sample(),))
def try_read(lane):
    return serve_read(lane)


@kernel(lambda: (S.sample(),))
def try_write(lane):
    return serve_write(lane)


@kernel("i8(i8[::1])")
def take_bells(control):
    return exchange(control, S.C_BELL, 0)


def compile_kernels() -> None:
    """Compile what is above; one process at a time, as numba writes its cache."""
    if not jit.DISABLED:
        with jit._one_warmer():
            for entry, signature in jit.registry:
                if entry.__module__ == __name__:
                    entry.compile(jit._argument_types(signature))


class Desk(park.Front):
    """The front of a mount with two lanes; requests are made here, for the first one."""

    def __init__(self, vol: Volume, max_write: int, atime: str) -> None:
        super().__init__(vol, 2, max_write)
        self.ops = Operations(vol, MountOptions(atime=atime))
        self.fd = os.memfd_create("replies")
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.control[S.C_BELL_FD] = self.bell
        self.control[S.C_ATIME] = ("noatime", "relatime", "strictatime").index(atime)
        self.control[S.C_READ_ONLY] = vol.read_only
        self.codes: Counter[str] = Counter()
        self.bells: Counter[int] = Counter()

    @property
    def lane(self) -> S.Lane:
        return self.lanes[0]

    @property
    def reason(self) -> str:
        return S.REASONS[int(self.lane.me[S.M_REASON])]

    async def start(self) -> None:
        await super().start()
        for lane in self.lanes[:2]:
            self.equip(lane)
            lane.me[S.M_FD] = self.fd
        if not self.vol.read_only:
            self.vol.space.open_stash()

    def stop(self) -> None:
        self.vol.space.close_stash()
        super().stop()
        os.close(self.fd)
        os.close(self.bell)

    # -- requests -------------------------------------------------------------------------------

    def put(self, op: int, fh: int, offset: int, size: int, flags: int, payload: bytes) -> None:
        """A message as `readv` leaves it: 80 bytes in the slot, the rest in the payload folio."""
        lane, me = self.lane, self.lane.me
        at = int(lane.slots[me[S.M_SLOT], S.S_ADDR])
        me[S.M_LEN] = RW_ARGS_END + len(payload)
        self.store(at, self.message(op, fh, offset, size, flags, len(payload)))
        self.store(int(me[S.M_PAYLOAD]) << 12, payload)

    def message(self, op: int, fh: int, offset: int, size: int, flags: int, payload: int) -> bytes:
        """A request without its payload."""
        head = HEADER.pack(RW_ARGS_END + payload, op, UNIQUE, 0, 0, 0, 0, 0, 0)
        return head + ARGS.pack(fh, offset, size, flags, 0, 0, 0)

    def store(self, at: int, data: bytes) -> None:
        self.vol.pages.view[at : at + len(data)] = data

    def answer_bells(self) -> None:
        """What the mount does when it is rung."""
        bits = int(take_bells(self.control))
        if bits:
            self.bells.update(bit for bit in (1, 2, 4, 8, 16) if bits & bit)
        if bits & S.B_LOCKS:
            self.vol.iolocks.grant_all()
            self.vol.ilocks.grant_all()
        if bits & S.B_MEMORY:
            self.vol.arena.queue.serve_soon()
        if bits & S.B_KSWAPD:
            self.vol.arena.reclaim.wake_kswapd()
        if bits & S.B_FLUSHER:
            self.vol.pages.dirty.poke()

    def hand_over(self, lane: S.Lane) -> int:
        """What a lane does with a request that it parks; its slot."""
        me = lane.me
        slot, payload = int(me[S.M_SLOT]), int(me[S.M_LEN]) - RW_ARGS_END
        place = lane.slots[slot]
        place[S.S_LEN], place[S.S_FD], place[S.S_PAYLOAD] = me[S.M_LEN], self.fd, 0
        place[S.S_DONE], place[S.S_LOCKED] = me[S.M_DONE], me[S.M_LOCKED]
        source = int(me[S.M_PAYLOAD]) << 12
        if payload > SMALL:
            place[S.S_PAYLOAD] = me[S.M_PAYLOAD]
        else:
            data = bytes(self.vol.pages.view[source : source + payload])
            self.store(int(place[S.S_ADDR]) + RW_ARGS_END, data)
        return slot

    def reply(self) -> bytes:
        """The one reply that was sent."""
        size = os.fstat(self.fd).st_size
        whole = os.pread(self.fd, size, 0)
        os.ftruncate(self.fd, 0)
        os.lseek(self.fd, 0, os.SEEK_SET)
        length, error, unique = REPLY.unpack_from(whole)
        assert (length, error, unique) == (size, 0, UNIQUE)
        return whole[REPLY.size :]

    def attempt(self, op: int) -> int:
        """Serve the message in the lane; the code."""
        code = int(try_read(self.lane) if op == READ else try_write(self.lane))
        self.codes["answered" if code == S.ANSWERED else self.reason] += 1
        if op == READ and self.lane.me[S.M_MARKED]:
            marked = self.lane.me[[S.M_MARKED_INO, S.M_MARKED]].tolist()
            self.vol.ahead.hit_in(marked[0], marked[1] - 1, 1)
        self.answer_bells()
        return code

    async def finish(self, op: int, lane: S.Lane | None = None) -> bytes:
        """Finish the parked message on the trio thread."""
        slot = self.hand_over(lane or self.lane)
        msg = self.vol.pages.view[int(self.slots[slot, S.S_ADDR]) :][: S.SLOT_BYTES]
        body = await (laneslow.read if op == READ else laneslow.write)(self, msg, slot)
        self.answer_bells()
        return self.reply() if body is None else bytes(body)

    async def read(self, ip: Inode, offset: int, size: int) -> bytes:
        """A READ, in the lane if it can be."""
        self.put(READ, handles.pack(ip.handle, os.O_RDONLY), offset, size, 0, b"")
        if self.attempt(READ) == S.ANSWERED:
            return self.reply()
        return await self.finish(READ)

    async def write(
        self, ip: Inode, offset: int, data: bytes, *, how: int = os.O_RDWR, flags: int = 0
    ) -> int:
        """A WRITE, in the lane if it can be; bytes written."""
        self.put(WRITE, handles.pack(ip.handle, how), offset, len(data), flags, data)
        if self.attempt(WRITE) == S.ANSWERED:
            return int(struct.unpack("=I4x", self.reply())[0])
        return int(struct.unpack("=I4x", await self.finish(WRITE))[0])


@asynccontextmanager
async def a_desk(vol: Volume, max_write: int = 0, atime: str = "relatime") -> AsyncIterator[Desk]:
    """Lanes over a volume."""
    compile_kernels()
    desk = Desk(vol, max_write, atime)
    await desk.start()
    try:
        yield desk
        assert not vol.arena.mem[:4096].any(), "page 0 is what holes are read from"
    finally:
        desk.stop()
