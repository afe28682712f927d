"""Trio's side of the lanes: what the doorbell says is done, and parked requests are finished.

One task waits for the eventfd. Each time it takes all bits of the doorbell at once and acts on
them: entries of the ring (a parked request becomes a task of its own; what gives back is done on
the spot), sleeping locks that lanes released, tasks that wait for memory, kswapd, the flusher.

The end, in this order: no lane reads any more; the ring is empty; every parked request is
answered. If the desk is cancelled, its tasks are, too, and whoever waits for their answers gets
an error from the kernel when the connection is closed. Ring entries are taken until the last lane
is gone, because a lane may wait for room.
"""

from __future__ import annotations

import errno
import logging
import os
import struct
import time

import numpy as np
import trio

from alloc.mempolicy import at_home
from fs.front import lanestate as S
from fs.front import opcodes, opnames, ring, wire
from fs.front.guard import error_of
from fs.front.latency import Latency
from fs.front.park import Front
from fs.front.threads import Threads

SERVED_AT_ONCE = 64  # requests, before the other tasks have their turn
ENTRIES = 256  # of the ring that are taken at a time
TURNS = 4  # times in a row, before the other tasks have their turn; together the whole ring
END_LOOK_S = 0.002
COUNT, FORGET_ONE = struct.Struct("=I"), struct.Struct("=Qq")
ENDED = (errno.ENODEV, errno.ECONNABORTED)  # what a lane reads when the connection is gone


class Desk:
    """Serves what the lanes of one mount hand over; made and run on the trio thread."""

    def __init__(
        self, front: Front, threads: Threads, latency: Latency, log: logging.Logger
    ) -> None:
        self._front = front
        self._threads = threads
        self._latency = latency
        self._log = log
        self._vol = front.vol
        self._entries = np.zeros((ENTRIES, ring.CELL_WORDS), np.int64)
        self._leave = False
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        front.control[S.C_BELL_FD] = self._bell
        self.parked = 0  # requests that trio finishes now
        self.failure = ""  # why a lane left that should not have

    def leave(self) -> None:
        """Have the lanes end; `run` returns when everything that they took is answered."""
        self._leave = True
        os.eventfd_write(self._bell, 1)

    async def run(self) -> None:
        """Serve until the connection ends or `leave` is called."""
        async with trio.open_nursery() as nursery:
            try:
                while not self._leave and not self._all_left():
                    await trio.lowlevel.wait_readable(self._bell)
                    self._heed(nursery)
            except BaseException:
                self._front.control[S.C_STOP] = S.GIVE_UP
                raise
            finally:
                await self._end_lanes(nursery)
        self._name_reasons()

    def close(self) -> None:
        """The lanes are gone and nothing is parked."""
        os.close(self._bell)

    def _all_left(self) -> bool:
        """Every lane is at its end, or one of them is where it should not be."""
        left = [int(lane.me[S.M_LEFT]) for lane in self._front.lanes[:-1]]
        return all(left) or any(code > 0 and code not in ENDED for code in left)

    async def _end_lanes(self, nursery: trio.Nursery) -> None:
        """Those that serve queues answer what they have taken, unless that is cancelled."""
        control = self._front.control
        control[S.C_STOP] = max(int(control[S.C_STOP]), 1)
        try:
            await self._wait_for_lanes(nursery)
        except BaseException:
            control[S.C_STOP] = S.GIVE_UP
            with trio.CancelScope(shield=True):
                await self._wait_for_lanes(nursery)
            raise

    async def _wait_for_lanes(self, nursery: trio.Nursery) -> None:
        while self._threads.lanes_alive:
            self._threads.interrupt()
            await trio.sleep(END_LOOK_S)
            self._heed(nursery)
        self._heed(nursery, S.B_RING)

    def _name_reasons(self) -> None:
        """A lane that left for another reason than the mount's end has met a bug."""
        for lane in self._front.lanes[:-1]:
            left = int(lane.me[S.M_LEFT])
            if left > 0 and left not in ENDED:
                self.failure = f"a lane could not read requests: {os.strerror(left)}"
                self._log.error("%s", self.failure)

    # -- the doorbell ---------------------------------------------------------------------------

    def _heed(self, nursery: trio.Nursery, bits: int = 0) -> None:
        """Do everything that was rung for."""
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            pass
        bits |= int(ring.answer_bell(self._front.control))
        try:
            self._act(nursery, bits)
        except Exception as error:
            self._front.ops.gate.broken("the doorbell", error)

    def _act(self, nursery: trio.Nursery, bits: int) -> None:
        vol = self._vol
        if bits & S.B_RING:
            self._drain(nursery)
        if bits & S.B_SLOTS and not self._front.free_slot_count:
            self._front.grow()
        if bits & S.B_SLOTS and not self._front.free_payload_count:
            self._front.grow_payloads()
        if bits & S.B_LOCKS:
            vol.iolocks.grant_all()
            vol.ilocks.grant_all()
        if bits & S.B_FLUSHER:
            vol.pages.dirty.poke()
        if bits & S.B_KSWAPD:
            vol.arena.reclaim.wake_kswapd()
        if bits & S.B_MEMORY:
            vol.arena.kick()
        if bits & S.B_BUSY:
            self._latency.hasten()

    def _drain(self, nursery: trio.Nursery) -> None:
        """Take what is in the ring, but let other tasks have a turn if it fills all the time."""
        left, turns = SERVED_AT_ONCE, 0
        while n := int(ring.take(self._front.control, self._front.ring, self._entries)):
            for entry in self._entries[:n].tolist():
                try:
                    left -= self._take(nursery, entry, left > 0)
                except Exception as error:
                    self._front.ops.gate.broken("the ring", error)
            turns += 1
            if turns == TURNS:
                self._ring_again()
                return

    def _ring_again(self) -> None:
        """There is more in the ring: as if a lane had rung."""
        ring.ring_bell(self._front.control, S.B_RING)
        os.eventfd_write(self._bell, 1)

    def _take(self, nursery: trio.Nursery, entry: list[int], at_once: bool) -> bool:
        """Do what one entry of the ring asks for; whether it was a request, served at once."""
        kind, a = entry[S.E_KIND], entry[S.E_A]
        if kind == S.K_PARKED:
            self.parked += 1
            if at_once and opnames.serve_now(self._front, a):
                self._finished(a)
                return True
            nursery.start_soon(self._finish, a)
        elif kind == S.K_RELEASE:
            self._release(a, entry[S.E_B])
        elif kind == S.K_FORGET:
            self._front.ops.forgotten(a, entry[S.E_C])
        elif kind == S.K_MARKER:
            self._vol.ahead.hit_in(a, entry[S.E_B], entry[S.E_C])
        else:
            self._forget_many(a)
        return False

    def _release(self, fh: int, opcode: int) -> None:
        """Drop a closed file's reference; its request is answered already."""
        ops = self._front.ops
        try:
            ops.closed(fh)
        except Exception as error:
            error_of(ops.gate, wire.NAMES[opcode], error)

    def _forget_many(self, slot: int) -> None:
        place, at = self._front.slots[slot], wire.BODY
        addr = int(place[S.S_ADDR])
        msg = memoryview(self._vol.arena.mem)[addr : addr + int(place[S.S_LEN])]
        for number in range(COUNT.unpack_from(msg, at)[0]):
            node, count = FORGET_ONE.unpack_from(msg, at + 8 + number * FORGET_ONE.size)
            self._front.ops.forgotten(node, count)
        self._front.give_back(slot)

    # -- parked requests ------------------------------------------------------------------------

    async def _finish(self, slot: int) -> None:
        """Finish one parked request and give its buffers back."""
        try:
            front, addr = self._front, int(self._front.slots[slot, S.S_ADDR])
            uid = int(front.lanes[-1].m4[(addr + wire.H_UID) >> 2])
            with at_home(int(front.slots[slot, S.S_NODE])), front.users.applied(uid):
                await opcodes.answer(self._front, slot)
        finally:
            self._finished(slot)

    def _finished(self, slot: int) -> None:
        """A parked request is answered: count it and give its buffers back."""
        front = self._front
        addr, begun = int(front.slots[slot, S.S_ADDR]), int(front.slots[slot, S.S_TIME])
        opcode = int(front.lanes[-1].m4[(addr + wire.H_OPCODE) >> 2])
        self.parked -= 1
        took = max(time.monotonic_ns() - begun, 1)
        bucket = min(took.bit_length() - 1, S.HIST_BUCKETS - 1)
        front.lanes[-1].hist[opcode, 1, bucket] += 1
        front.give_back(slot)
