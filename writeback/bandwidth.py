"""How fast the device writes, and how fast one writer may dirty: two estimates, each 200 ms.

The write bandwidth is what was written since the last look, mixed into the old value over a period
of about four seconds; its average follows more slowly, and only when both point the same way. The
rate limit is what each of the unknown number of writers may dirty a second: if all together
dirtied `dirty_rate` while each was limited to `task_rate`, then at `task_rate * bandwidth /
dirty_rate` they will dirty what the device writes. It moves towards that in small steps, and only
if dirty memory stands on the side that asks for it.

Rates are pages a second, times are milliseconds of the caller's clock, counts only grow. Formulas,
constants and rounding are the kernel's (mm/page-writeback.c), at 1000 ticks a second. The trio
thread's.
"""

from __future__ import annotations

from writeback.position import CALC_SHIFT, Position, pos_ratio

HZ = 1000
INTERVAL_MS = 200
PERIOD_LOG = (3 * HZ - 1).bit_length()  # the next power of two of three seconds
PERIOD_MS = 1 << PERIOD_LOG
START_RATE = 25600  # pages a second: 100 MiB/s
WORD_BITS = 64


class Bandwidth:
    """The estimates of one device."""

    def __init__(self) -> None:
        self.write = START_RATE
        self.avg = START_RATE
        self.ratelimit = START_RATE  # of one writer, before the position's factor
        self.balanced = START_RATE  # what the last look found that it should be
        self.stamp_ms = 0
        self._dirtied = 0
        self._written = 0

    def start(self, now_ms: int, dirtied: int, written: int) -> None:
        """Writing begins after a pause: the pause says nothing about the device."""
        self.stamp_ms, self._dirtied, self._written = now_ms, dirtied, written

    def update(self, now_ms: int, dirtied: int, written: int, at: Position | None) -> None:
        """Look at what was dirtied and written since the last time.

        `at` is where dirty memory stands; None if writers are not held back: then what they do
        says nothing about the rate that they should have.
        """
        elapsed = max(now_ms - self.stamp_ms, 1)
        if at is not None:
            self._update_ratelimit(at, (dirtied - self._dirtied) * HZ // elapsed)
        self._update_write(written - self._written, elapsed)
        self.start(now_ms, dirtied, written)

    def _update_write(self, pages: int, elapsed: int) -> None:
        old, avg, written = self.write, self.avg, pages * HZ
        if elapsed > PERIOD_MS:
            self.write = avg = written // elapsed
        else:
            self.write = new = (written + old * (PERIOD_MS - elapsed)) >> PERIOD_LOG
            if avg > old >= new:
                avg -= (avg - old) >> 3
            if avg < old <= new:
                avg += (old - avg) >> 3
        self.avg = max(avg, 1)

    def _update_ratelimit(self, at: Position, dirty_rate: int) -> None:
        rate = self.ratelimit
        task_rate = (rate * pos_ratio(at, self.avg) >> CALC_SHIFT) + 1
        balanced = min(task_rate * self.avg // (dirty_rate | 1), self.avg)
        step = self._gap(at, task_rate, balanced)
        shift = rate // (2 * step + 1)  # the closer, the smaller the step
        step = -(-(step >> shift) // 8) if shift < WORD_BITS else 0
        rate += step if rate < balanced else -step
        self.ratelimit = max(rate, 1)
        self.balanced = balanced

    def _gap(self, at: Position, task_rate: int, balanced: int) -> int:
        """How far the rate may move: the smallest gap, if all signs point the same way."""
        rates = (self.balanced, balanced, task_rate)
        if at.strict:
            setpoint = (at.wb_thresh + at.wb_background) // 2
        else:
            setpoint = (at.freerun + at.limit) // 2
        if at.dirty < setpoint:
            return max(min(rates) - self.ratelimit, 0)
        return max(self.ratelimit - max(rates), 0)
