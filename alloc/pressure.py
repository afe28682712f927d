"""Pressure: how much time is lost to waiting for memory, in the terms of the kernel's PSI.

`some` is the time in which at least one task waits, `full` the part of it in which every task that
runs requests does. Totals are exact. Averages over 10, 60 and 300 seconds are the kernel's: each
period of 2 s its share of stalled time goes into a moving average in fixed point with 11 bits.

The kernel has a worker for that, which sleeps while nobody waits. Here there is none: the state is
constant between two events, so whoever comes next, an event or a reader, first makes up for all
periods that have ended since. The numbers are those of a worker that is never late.

Trio thread only. The clock is trio's, so that a mock clock can drive it.
"""

from __future__ import annotations

from contextvars import ContextVar
from types import TracebackType

import trio

PERIOD_NS = 2_001_000_000  # 2 * HZ + 1 ticks of a millisecond
FIXED_SHIFT = 11
FIXED_1 = 1 << FIXED_SHIFT
DECAY = {"avg10": 1677, "avg60": 1981, "avg300": 2034}  # exp(-2 s / window), in 1/2048
SOME, FULL = 0, 1

# True in tasks that run requests; tasks inherit it from those that start them.
serves_requests: ContextVar[bool] = ContextVar("serves_requests", default=False)


def calc_load(load: int, decay: int, active: int) -> int:
    """One period of the kernel's moving average; `load` and `active` in 1/2048."""
    new = load * decay + active * (FIXED_1 - decay)
    if active >= load:
        new += FIXED_1 - 1
    return new // FIXED_1


def fixed_power(x: int, n: int) -> int:
    """x to the n-th, in 1/2048, rounded as the kernel rounds it."""
    result, half = FIXED_1, FIXED_1 >> 1
    while n:
        if n & 1:
            result = (result * x + half) >> FIXED_SHIFT
        n >>= 1
        x = (x * x + half) >> FIXED_SHIFT
    return result


class _Line:
    """`some` or `full`: a total, and what the averages have seen of it, in nanoseconds."""

    __slots__ = ("averages", "seen", "total")

    def __init__(self) -> None:
        self.total = 0
        self.seen = 0
        self.averages = dict.fromkeys(DECAY, 0)

    def average(self) -> None:
        """A period has ended."""
        sample = min(self.total - self.seen, PERIOD_NS)
        self.seen += sample
        percent = sample * 100 // PERIOD_NS * FIXED_1
        for name, decay in DECAY.items():
            self.averages[name] = calc_load(self.averages[name], decay, percent)

    def decay(self, periods: int) -> None:
        """So many periods have ended in which nobody waited."""
        for name, decay in DECAY.items():
            self.averages[name] = calc_load(self.averages[name], fixed_power(decay, periods), 0)

    def text(self) -> str:
        """The line without its name, as /proc/pressure/memory prints it; total in microseconds."""
        words = [
            f"{name}={load >> FIXED_SHIFT}.{(load % FIXED_1) * 100 >> FIXED_SHIFT:02d}"
            for name, load in self.averages.items()
        ]
        return " ".join([*words, f"total={self.total // 1000}"])


class Pressure:
    """The stall accounting of one arena. `with pressure: ...` is a task that waits for memory."""

    def __init__(self) -> None:
        self.waiting = 0  # tasks
        self.running = 0  # requests, those that wait included
        self._requests_waiting = 0
        self._lines = (_Line(), _Line())
        self._now = 0  # what the totals contain ends here
        self._next = 0  # when the period ends; 0 before the first event

    def __enter__(self) -> None:
        self._advance()
        self.waiting += 1
        self._requests_waiting += serves_requests.get()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._advance()
        self.waiting -= 1
        self._requests_waiting -= serves_requests.get()
        assert 0 <= self._requests_waiting <= self.waiting

    def request_begins(self) -> None:
        """A task begins to run a request. Costs nothing while nobody waits."""
        if self.waiting:
            self._advance()
        self.running += 1

    def request_ends(self) -> None:
        """The request is finished."""
        if self.waiting:
            self._advance()
        self.running -= 1

    def totals_us(self) -> tuple[int, int]:
        """Microseconds of some and of full stalls until now."""
        self._advance()
        return self._lines[SOME].total // 1000, self._lines[FULL].total // 1000

    def text(self) -> str:
        """/proc/pressure/memory."""
        self._advance()
        return f"some {self._lines[SOME].text()}\nfull {self._lines[FULL].text()}\n"

    def _advance(self) -> None:
        """Everything up to now, in the state that was."""
        now = round(trio.current_time() * 1e9)
        if not self._next:
            self._now, self._next = now, now + PERIOD_NS
        while self._next <= now:
            self._count(self._next)
            for line in self._lines:
                line.average()
            self._next += PERIOD_NS
            if not self.waiting and self._next <= now:
                periods = (now - self._next) // PERIOD_NS + 1
                for line in self._lines:
                    line.decay(periods)
                self._next += periods * PERIOD_NS
        self._count(now)

    def _count(self, until: int) -> None:
        stalled, self._now = max(until - self._now, 0), max(until, self._now)
        if self.waiting:
            self._lines[SOME].total += stalled
            if self._requests_waiting >= self.running:
                self._lines[FULL].total += stalled
