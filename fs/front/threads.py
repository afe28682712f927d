"""The threads of a mount: the lanes and the pump, from their first turn to their join.

A thread of ours hears only the signal that interrupts its read(2): the others are blocked in it,
so that they reach the main thread, where Python handles them. A lane is ended by control[C_STOP]
and that signal, sent again until the thread is gone, because a signal that comes between the look
at the word and the read interrupts nothing. Its handler does nothing, is installed without
SA_RESTART, and stays: a late signal must not end the process.

Starting and stopping belong to the trio thread, which is the main thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import numpy as np

from fs.front import lane, lanestate, pump
from fs.front.park import Front
from fs.front.ring import ring_bell

WAKE = signal.SIGUSR2
# Those that a thread raises itself must reach it.
OWN_SIGNALS = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, WAKE}


# By number, not by pthread_t, which is no longer valid when a thread has just ended.
_tgkill = ctypes.CDLL(None).tgkill


def _nothing(number: int, frame: FrameType | None) -> None:
    """The signal's purpose is EINTR."""


class Threads:
    """The lanes and the pump of one mount."""

    def __init__(self, front: Front, log: logging.Logger) -> None:
        self._front = front
        self._log = log
        self._lanes: list[threading.Thread] = []
        self._pump: threading.Thread | None = None
        self._words = np.zeros(pump.REPLY_MOST // 8, np.int64)
        self.pumped = np.zeros(pump.P_WORDS, np.int64)

    def start(self, fuse: int, forward: int) -> None:
        """Load the kernels, then begin to read `fuse`; what is pyfuse3's goes to `forward`."""
        front = self._front
        signal.signal(WAKE, _nothing)
        front.control[lanestate.C_FORWARD_FD] = forward
        front.control[lanestate.C_STOP] = 1
        lane.run(front.lanes[-1])  # returns at once: this loads it
        front.lanes[-1].me[lanestate.M_LEFT] = 0
        entries = front.queues.entries
        pump.run(-1, -1, self._words, self.pumped, entries)
        front.control[lanestate.C_STOP] = 0
        self._pump = self._begin("pump", pump.run, forward, fuse, self._words, self.pumped, entries)
        for number, own in enumerate(front.lanes[:-1]):
            queue = int(own.me[lanestate.M_QUEUE])
            own.me[lanestate.M_FD] = fuse if queue < 0 else front.queues.relay(queue)
            work = self._run_lane if queue < 0 else self._run_queue
            self._lanes.append(self._begin(f"lane-{number}", work, own, fuse))

    def _begin(self, name: str, work: Any, *args: Any) -> threading.Thread:
        thread = threading.Thread(target=self._work, args=(work, *args), name=name, daemon=True)
        thread.start()
        return thread

    def _work(self, work: Any, *args: Any) -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals() - OWN_SIGNALS)
        work(*args)

    def _run_lane(self, own: lanestate.Lane, fuse: int) -> None:
        try:
            lane.run(own)
        finally:
            if not own.me[lanestate.M_LEFT]:
                own.me[lanestate.M_LEFT] = -1

    def _run_queue(self, own: lanestate.Lane, fuse: int) -> None:
        """A lane whose requests come through a queue; it stays on that queue's processor."""
        with contextlib.suppress(OSError):  # the processor is not ours, or not there
            os.sched_setaffinity(0, {int(own.me[lanestate.M_QUEUE])})
        try:
            ring = self._front.queues.open_ring(own, fuse)
        except OSError as error:
            self._gave_up(own, error)
            return
        try:
            self._run_lane(own, fuse)
        finally:
            os.close(ring)

    def _gave_up(self, own: lanestate.Lane, error: OSError) -> None:
        """A lane that could not begin leaves as one whose reading fails: the mount ends."""
        control = self._front.control
        self._log.error("transport=uring: lane for queue %d: %s", own.me[lanestate.M_QUEUE], error)
        own.me[lanestate.M_LEFT] = error.errno
        ring_bell(control, lanestate.B_LEFT)
        os.eventfd_write(int(control[lanestate.C_BELL_FD]), 1)

    @property
    def lanes_alive(self) -> int:
        """How many lanes have not come to their end."""
        return sum(thread.is_alive() for thread in self._lanes)

    def interrupt(self) -> None:
        """Wake the lanes that sleep in read(2) or write(2); they look at control[C_STOP]."""
        for thread in self._lanes:
            if thread.is_alive():
                _tgkill(os.getpid(), thread.native_id, WAKE)  # the thread may have gone: no matter

    def join_pump(self) -> None:
        """Wait for the pump, whose socket was hung up."""
        if self._pump is not None:
            self._pump.join()
