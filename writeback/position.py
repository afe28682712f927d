"""Where dirty memory stands between free run and the limit, and how much writers slow down for it.

The answer is a ratio in fixed point (ONE is 1): writers go at `ratelimit * pos_ratio`. It is 1 at
the setpoint, half-way between the ceiling of free run and the limit, falls to 0 at the limit and
rises to 2 below. A second, straight line does the same for the device's own share of the
threshold, so that its queue stays where it should be; with strictlimit the device's share is a
limit of its own.

Counts are pages, dirty and under write-back together, `write_bw` is pages a second. The formulas
and their rounding are the kernel's (mm/page-writeback.c). Pure functions.
"""

from __future__ import annotations

from typing import NamedTuple

CALC_SHIFT = 10
ONE = 1 << CALC_SHIFT
SHARE_SHIFT = 16  # the device's share of the threshold, in fixed point
BOOST_MOST = 8  # a device whose queue runs dry is filled at most so many times as fast


class Position(NamedTuple):
    """What is dirty, and the marks it is measured by; `wb_thresh` is the device's share."""

    background: int
    thresh: int
    limit: int  # the smoothed threshold: never below `thresh`
    dirty: int
    wb_thresh: int
    strict: bool = False

    @property
    def wb_background(self) -> int:
        """Above it the flusher has work: with a strict limit the threshold's share."""
        if not self.strict:
            return self.background
        return self.wb_thresh * self.background // self.thresh

    @property
    def freerun(self) -> int:
        """Up to here nobody is held back."""
        if self.strict:
            return freerun_ceiling(self.wb_background, self.wb_thresh)
        return freerun_ceiling(self.background, self.thresh)

    @property
    def exceeded(self) -> bool:
        """Whether the device has more than its share, while there is too much in all."""
        return self.dirty > self.wb_thresh and (self.strict or self.dirty > self.thresh)

    @property
    def hard_limit(self) -> int:
        """From here on the ratio is 0."""
        return min(self.limit, self.wb_thresh) if self.strict else self.limit


def freerun_ceiling(background: int, thresh: int) -> int:
    """Half-way between the thresholds."""
    return (background + thresh) // 2


def polynomial(setpoint: int, dirty: int, limit: int) -> int:
    """1 + x^3, x the distance below the setpoint in units of that from it to the limit."""
    span = (limit - setpoint) | 1
    above = dirty > setpoint
    x = (abs(setpoint - dirty) << CALC_SHIFT) // span
    if above:
        x = -x
    cube = ((x * x) >> CALC_SHIFT) * x >> CALC_SHIFT
    return min(max(ONE + cube, 0), 2 * ONE)


def pos_ratio(at: Position, write_bw: int) -> int:
    """The factor for writers' rate limit, 0 at the limit."""
    if at.dirty >= at.hard_limit:
        return 0
    setpoint = (freerun_ceiling(at.background, at.thresh) + at.limit) // 2
    ratio = polynomial(setpoint, at.dirty, at.limit)
    if at.strict:
        wb_setpoint = at.freerun
        if wb_setpoint in (0, at.wb_thresh):
            return 0
        return min(ratio, polynomial(wb_setpoint, at.dirty, at.wb_thresh))
    return _device_line(at, setpoint, ratio, write_bw)


def _device_line(at: Position, setpoint: int, ratio: int, write_bw: int) -> int:
    """The ratio, corrected for the device's queue: less when it is long, more when it runs dry.

    A share that is near 0 because the device was idle counts as an eighth of what is left.
    """
    wb_thresh = max(min(at.wb_thresh, at.thresh), (at.limit - at.dirty) // 8)
    share = (wb_thresh << SHARE_SHIFT) // (at.thresh | 1)
    wb_setpoint = setpoint * share >> SHARE_SHIFT
    span = (at.thresh - wb_thresh + 8 * write_bw) * share >> SHARE_SHIFT
    intercept = wb_setpoint + span
    if at.dirty < intercept - span // 4:
        ratio = ratio * (intercept - at.dirty) // ((intercept - wb_setpoint) | 1)
    else:
        ratio //= 4
    dry = wb_thresh // 2
    if at.dirty >= dry:
        return ratio
    if at.dirty > dry // BOOST_MOST:
        return ratio * dry // at.dirty
    return ratio * BOOST_MOST
