"""The latency request of a mount: idle processors stay awake while requests come quickly.

Client and lane sleep in turn, and each wake-up of a processor that halted costs more than the
request. While somebody holds /dev/cpu_dma_latency open with 0 in it (the kernel's
Documentation/power/pm_qos_interface), idle processors poll: wake-ups are quick, and all idle
processors of the machine burn. So the request is held for as long as requests come quickly, and an
idle mount costs nothing: no timer, no word that a lane looks at but once in BUSY_TURNS requests.

A lane that reads BUSY_TURNS requests faster than control[C_BUSY_NS] rings; that word is 0, and no
lane rings, while the request is held or cannot be had. The task then opens the device, looks at
the lanes' counts every LOOK_S, and closes it when fewer came than KEEP a second. Closing is all
there is to give back: a daemon that dies leaves nothing behind.

Runs on the trio thread. Lanes own the counts (M_TURNS); a count read early is looked at again.
"""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from fs.front import lanestate as S

if TYPE_CHECKING:
    from fs.front.park import Front

DEVICE = Path("/dev/cpu_dma_latency")
IDLE_DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")
VIRTUAL_DRIVER = "haltpoll"  # of guests: a halted processor has to be woken through the host
START, KEEP = 2000, 1000  # requests a second, all lanes together
LOOK_S = 0.05
NO_LATENCY = struct.pack("=i", 0)  # microseconds: polling, not even the shallowest sleep


def is_virtual() -> bool:
    """Whether this machine's idle processors halt into a host."""
    try:
        return IDLE_DRIVER.read_text(encoding="ascii").strip() == VIRTUAL_DRIVER
    except (OSError, ValueError):
        return False


class Latency:
    """The request of one mount; `mode` is the mount option's word."""

    def __init__(self, front: Front, mode: str, log: logging.Logger) -> None:
        self._front = front
        self._log = log
        self._quick = trio.Event()
        self._since: float | None = None  # when it was taken, if it is held
        self._seconds = 0.0  # of earlier holds
        self.times = 0
        self.state = "on" if mode == "on" or (mode == "auto" and is_virtual()) else "off"
        if self.state == "on" and (fd := self._take()) is not None:  # to know it from the start
            os.close(fd)

    def _take(self) -> int | None:
        """Make the request; the descriptor that holds it."""
        fd = -1
        try:
            fd = os.open(DEVICE, os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, NO_LATENCY)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            self.state = "unavailable"
            self._log.info("idle processors are left to sleep: %s: %s", DEVICE, error.strerror)
            return None
        return fd

    @property
    def seconds(self) -> float:
        """How long the request was held so far."""
        held = 0.0 if self._since is None else trio.current_time() - self._since
        return self._seconds + held

    def figures(self) -> dict[str, Any]:
        """For statistics."""
        return {"state": self.state, "times": self.times, "seconds": round(self.seconds, 3)}

    def hasten(self) -> None:
        """A lane has rung: requests come quickly."""
        self._quick.set()

    async def run(self) -> None:
        """Hold the request whenever requests come quickly; ends when it cannot be had."""
        control = self._front.control
        while self.state == "on":
            control[S.C_BUSY_NS] = S.BUSY_TURNS * self._front.nr_lanes * 10**9 // START
            try:
                await self._quick.wait()
            finally:
                control[S.C_BUSY_NS] = 0
            if (fd := self._take()) is not None:
                await self._hold(fd)
            self._quick = trio.Event()

    async def _hold(self, fd: int) -> None:
        """Keep the request that `fd` is until calm, then give it up."""
        self.times += 1
        self._since = trio.current_time()
        try:
            seen = self._turns()
            while True:
                await trio.sleep(LOOK_S)
                now = self._turns()
                if now - seen < KEEP * LOOK_S:
                    return
                seen = now
        finally:
            os.close(fd)
            self._seconds, self._since = self.seconds, None

    def _turns(self) -> int:
        return sum(int(lane.me[S.M_TURNS]) for lane in self._front.lanes)
