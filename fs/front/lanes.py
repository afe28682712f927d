"""The lanes of one mount as its session sees them: made, serving, left, given back.

`start` takes the memory before the mount; `serve` runs beside pyfuse3's loop, from INIT to the last
answer; `leave` ends it from the trio thread; `stop` gives the memory back. pyfuse3's loop ends only
when the lanes have: what they forwarded is handled first.

Threads, descriptors and memory are undone on every way out of `serve`, also when it is cancelled:
a lane never waits for long, so its end needs no patience.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pyfuse3
import trio

from fs import tuning
from fs.front import lanestate as S
from fs.front.desk import Desk
from fs.front.interpose import Interposer
from fs.front.latency import Latency
from fs.front.negotiate import Outcome, Wish
from fs.front.operations import Operations
from fs.front.options import MountOptions
from fs.front.park import Front
from fs.front.threads import Threads
from fs.volume import Volume

ATIME = {"noatime": 0, "relatime": 1, "strictatime": 2}


class Lanes:
    """The lanes of one mount."""

    def __init__(
        self, vol: Volume, ops: Operations, options: MountOptions, log: logging.Logger
    ) -> None:
        self._nr_queues = tuning.possible_processors() if options.transport == "uring" else 0
        lanes = 1 if self._nr_queues else options.lanes
        self.front = Front(vol, lanes, options.max_write, self._nr_queues)
        self.front.ops = ops
        ops.users = self.front.users
        self.latency = Latency(self.front, options.latency, log)
        self._vol = vol
        self._log = log
        self._left = False
        self.failure = ""  # why the mount ended, if a lane failed
        self._desk: Desk | None = None
        shared_mmap, uring = options.cache == "none", self._nr_queues > 0
        self._wish = Wish(self.front.max_write, options.max_background, shared_mmap, uring)
        atime = "noatime" if vol.read_only else options.atime
        control = self.front.control
        control[S.C_ATIME], control[S.C_READ_ONLY] = ATIME[atime], int(vol.read_only)

    async def start(self) -> None:
        """Take the memory."""
        await self.front.start()
        self._vol.on_shutdown = self._shut_down
        self._vol.freezer.on_change = self._freeze
        if self._vol.shut_down:
            self._shut_down()
        if not self._vol.read_only:
            self._vol.space.open_stash()

    def _freeze(self, frozen: bool) -> None:
        """While it is frozen writes are parked, as on a filesystem that is read-only."""
        self.front.control[S.C_READ_ONLY] = int(frozen or self._vol.read_only)

    def _shut_down(self) -> None:
        self.front.control[S.C_SHUTDOWN] = 1

    async def serve(self, session_fd: int, agreed: Callable[[Outcome], None]) -> None:
        """Serve until the mount ends, then end pyfuse3's loop; its session is `session_fd`."""
        place = Interposer(session_fd)
        threads = Threads(self.front, self._log)
        try:
            outcome = await place.negotiate(self._wish)
            if outcome is not None:
                agreed(outcome)
            await self._run(place, threads)
            await place.wait_forwarded()
            pyfuse3.terminate()
            await trio.sleep_forever()  # until pyfuse3's loop has ended and cancels this
        finally:
            place.hang_up()
            threads.join_pump()
            place.close()

    async def _run(self, place: Interposer, threads: Threads) -> None:
        desk = self._desk = Desk(self.front, threads, self.latency, self._log)
        try:
            if not self._left:
                threads.start(place.fuse, place.ours.fileno())
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.latency.run)
                    await desk.run()
                    nursery.cancel_scope.cancel()
        finally:
            self.failure = desk.failure
            self._desk = None
            desk.close()

    def leave(self) -> None:
        """Read no more requests; `serve` ends when those that were read are answered."""
        self._left = True
        if self._desk is not None:
            self._desk.leave()

    def stop(self) -> None:
        """Give the memory back; `serve` has ended."""
        self._vol.on_shutdown = lambda: None
        self._vol.freezer.on_change = lambda frozen: None
        self._vol.space.close_stash()
        self.front.stop()
