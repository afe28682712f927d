"""What the throttle and the device's estimates are at, as text: the kernel's per-device statistics.

The first lines have the names and the format of a device's `stats` in the kernel's debugfs; then
comes what there can only be traced. Counts of pages are shown in KiB, as there. Trio thread only.
"""

from __future__ import annotations

from writeback.flusher import Flusher
from writeback.lists import DIRTY, DIRTY_TIME, IO, MORE_IO
from writeback.position import ONE, pos_ratio
from writeback.throttle import Throttle

PAGE_KIB = 4


def stats_text(throttle: Throttle, flusher: Flusher) -> str:
    """A line for each figure."""
    dirty, bandwidth = throttle.dirty, throttle.bandwidth
    at = dirty.position()
    pages = {
        "BdiWriteback": dirty.nr_writeback,
        "BdiReclaimable": dirty.nr_dirty,
        "BdiDirtyThresh": at.wb_thresh,
        "DirtyThresh": at.thresh,
        "BackgroundThresh": at.background,
        "BdiDirtied": dirty.nr_dirtied,
        "BdiWritten": dirty.nr_written,
        "DirtyFreerun": at.freerun,
        "DirtyLimit": at.hard_limit,
    }
    rates = {
        "BdiWriteBandwidth": bandwidth.write,
        "BdiAvgBandwidth": bandwidth.avg,
        "DirtyRatelimit": bandwidth.ratelimit,
        "BalancedRatelimit": bandwidth.balanced,
    }
    counts = {
        "PosRatio": f"{pos_ratio(at, bandwidth.avg) / ONE:.3f}",
        "b_dirty": flusher.lists.length[DIRTY],
        "b_io": flusher.lists.length[IO],
        "b_more_io": flusher.lists.length[MORE_IO],
        "b_dirty_time": flusher.lists.length[DIRTY_TIME],
        "Pauses": throttle.paused,
        "Pausing": throttle.sleeping,
    }
    times = {"PausedTime": throttle.paused_ms, "LongestPause": throttle.longest_ms}
    shown = [(name, value * PAGE_KIB, " kB") for name, value in pages.items()]
    shown += [(name, value * PAGE_KIB, " kBps") for name, value in rates.items()]
    lines = [f"{name + ':':<19} {value:>10}{unit}\n" for name, value, unit in shown]
    lines += [f"{name + ':':<19} {value:>10} ms\n" for name, value in times.items()]
    lines += [f"{name + ':':<19} {value:>10}\n" for name, value in counts.items()]
    return "".join(lines)
