"""A run that is cut off: SIGINT, SIGTERM and SIGHUP end the work, not what has to follow it.

The first of them raises KeyboardInterrupt, so that every context manager takes away what it made,
and the lab then reports as far as it came; or, where something must not be interrupted anywhere
(`polled`: a trio run, a load in the middle of a request), it is only noted and the work looks.
Those that come later find the end under way already, and change nothing. Work that looks, but does
not get to it for LATE_S, is stuck; then it is interrupted after all.

Children get sessions of their own, so that the terminal's Ctrl-C is for the lab alone.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDED = "cut off"  # how a load says that it was
LATE_S = 10


class Cut:
    """Which signal has come, if any. `polled`: nothing is raised, the work looks here."""

    def __init__(self, polled: bool = False) -> None:
        self.polled = polled
        self.signal = 0
        self.stuck = False  # the work did not look for LATE_S

    def __bool__(self) -> bool:
        return self.signal != 0

    @property
    def name(self) -> str:
        """As in SIGTERM; nothing while none has come."""
        return signal.Signals(self.signal).name if self.signal else ""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """From here to the end the signals come to this. Main thread only."""
        before = {number: signal.signal(number, self._came) for number in SIGNALS}
        before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._late)
        try:
            yield
        finally:
            signal.alarm(0)
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def polling(self) -> Iterator[None]:
        """A part of the work that looks for itself."""
        before, self.polled = self.polled, True
        try:
            yield
        finally:
            signal.alarm(0)
            self.polled = before

    def _came(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            if not self.polled:
                raise KeyboardInterrupt
            signal.alarm(LATE_S)

    def _late(self, number: int, frame: FrameType | None) -> None:
        self.stuck = True
        signal.alarm(1)  # what tidies up may be stuck, too
        raise KeyboardInterrupt
