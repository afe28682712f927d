"""The queues of a mount with FUSE over io_uring: their memory, relays and rings.

There is one queue for each processor that the machine may have, because the kernel uses none
before all of them are registered, and one lane for each queue. A queue has a few places for
requests (`fs/front/lanequeue.py`), each with room for the largest write; while all are taken the
kernel keeps further requests, as when nobody reads /dev/fuse.

A ring belongs to the thread that made it, so a lane's thread opens it (`open_ring`) and closes it
at its end; everything else here is made and closed on the trio thread while no lane runs.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from typing import TYPE_CHECKING

import numpy as np

from alloc.page import PAGE_SHIFT, PAGE_SIZE
from fs import tuning
from fs.front import lanequeue
from fs.front import lanestate as S
from fs.front.buffers import MAX_WRITE, MAX_WRITE_LEAST, SHARE
from fs.front.interpose import message_pair
from fs.front.options import PLACES_LEAST

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

PLACES_WISHED, PLACES_MOST = 4, 16  # of one queue

SQ_ENTRIES = 64
SQE128, NO_MMAP, SINGLE_ISSUER, DEFER_TASKRUN = 1 << 10, 1 << 14, 1 << 12, 1 << 13
# struct io_uring_params
FLAGS_AT, SQ_OFF, CQ_OFF, USER_ADDR = 8, 40, 80, 32
ROOM_ORDER = 2  # submissions, then a page: struct io_rings, 128 completions, 64 indices


def sizes(memory_bytes: int, queues: int, max_write: int = 0) -> tuple[int, int]:
    """Largest write, and places of each queue, for an arena; `max_write` 0 chooses."""
    room = memory_bytes // SHARE
    chosen = max_write or MAX_WRITE
    while not max_write and chosen > MAX_WRITE_LEAST and chosen * queues * PLACES_WISHED > room:
        chosen >>= 1
    return chosen, min(max(room // (chosen * queues), PLACES_LEAST), PLACES_MOST)


def _params(rings: int, sqes: int) -> ctypes.Array[ctypes.c_char]:
    """A struct io_uring_params that names our memory."""
    params = ctypes.create_string_buffer(tuning.URING_PARAMS_BYTES)
    flags = SQE128 | NO_MMAP | SINGLE_ISSUER | DEFER_TASKRUN
    struct.pack_into("=I", params, FLAGS_AT, flags)
    struct.pack_into("=Q", params, SQ_OFF + USER_ADDR, sqes)
    struct.pack_into("=Q", params, CQ_OFF + USER_ADDR, rings)
    return params


class Queues:
    """The queues of one mount; places of queue q are entries[q * places : (q + 1) * places]."""

    def __init__(self, number: int, places: int, order: int) -> None:
        self.number = number
        self.places = places
        self._order = order
        self.entries = np.zeros((max(number * places, 1), S.N_WORDS), np.int64)
        self.words = [np.zeros(S.U_WORDS, np.int64) for _ in range(number)]
        self._relays: list[tuple[socket.socket, socket.socket]] = []

    async def start(self, new_folio: Callable[[int], Awaitable[int]]) -> None:
        """Take the memory: `new_folio(order)` gives zeroed folios that somebody else puts."""
        per_page = PAGE_SIZE // lanequeue.PLACE_BYTES
        for number in range(self.number * self.places):
            if number % per_page == 0:
                header = await new_folio(0) << PAGE_SHIFT
            self.entries[number, S.N_HEADER] = header + number % per_page * lanequeue.PLACE_BYTES
            self.entries[number, S.N_PAYLOAD] = await new_folio(self._order)
        for queue, words in enumerate(self.words):
            words[S.U_FIRST], words[S.U_COUNT] = queue * self.places, self.places
            words[S.U_SQES_AT] = await new_folio(ROOM_ORDER) << PAGE_SHIFT
            ours, theirs = message_pair()
            self._relays.append((ours, theirs))
            words[S.U_RELAY] = ours.fileno()
            own = slice(queue * self.places, (queue + 1) * self.places)
            self.entries[own, S.N_RELAY] = theirs.fileno()

    def relay(self, queue: int) -> int:
        """Where replies to a queue's requests are sent."""
        return self._relays[queue][1].fileno()

    def open_ring(self, lane: S.Lane, fuse: int) -> int:
        """Make a lane's ring, in its own thread; the descriptor. Raises OSError."""
        words = lane.uring
        sqes = int(words[S.U_SQES_AT])
        rings = sqes + SQ_ENTRIES * lanequeue.SQE_BYTES
        params = _params(lane.mem.ctypes.data + rings, lane.mem.ctypes.data + sqes)
        fd = tuning.io_uring_setup(SQ_ENTRIES, params)
        _, tail, mask, _, _, _, array = struct.unpack_from("=7I", params, SQ_OFF)
        words[S.U_FD], words[S.U_FUSE] = fd, fuse
        words[S.U_SQ_TAIL_AT], words[S.U_SQ_ARRAY_AT] = rings + tail, rings + array
        words[S.U_SQ_MASK] = lane.m4[(rings + mask) >> 2]
        head, tail, mask, _, _, cqes = struct.unpack_from("=6I", params, CQ_OFF)
        words[S.U_CQ_HEAD_AT], words[S.U_CQ_TAIL_AT] = rings + head, rings + tail
        words[S.U_CQ_MASK], words[S.U_CQES_AT] = lane.m4[(rings + mask) >> 2], rings + cqes
        return fd

    def close(self) -> None:
        """No lane runs any more and nobody replies."""
        for pair in self._relays:
            for end in pair:
                end.close()
        self._relays.clear()
