"""The throttle's formulas against values computed from the kernel's, and what must hold of them."""

from __future__ import annotations

import math

import pytest

from writeback import bandwidth, pause, position
from writeback.bandwidth import INTERVAL_MS, START_RATE, Bandwidth
from writeback.position import ONE, Position, polynomial, pos_ratio

# dirtyable memory of 100000 pages
BACKGROUND, THRESH, FREERUN, SETPOINT = 9985, 19995, 14990, 17492


def at(dirty: int, **other: int) -> Position:
    values = {"limit": THRESH, "wb_thresh": THRESH, "strict": False} | other
    return Position(BACKGROUND, THRESH, dirty=dirty, **values)


def test_golden_marks() -> None:
    assert at(0).freerun == FREERUN
    assert (FREERUN + THRESH) // 2 == SETPOINT


@pytest.mark.parametrize(
    ("dirty", "ratio"),
    [(14990, 1.997), (16241, 1.124), (17492, 1.0), (18743, 0.875), (19994, 0.002)],
)
def test_golden_polynomial(dirty: int, ratio: float) -> None:
    assert polynomial(SETPOINT, dirty, THRESH) / ONE == pytest.approx(ratio, abs=0.0006)


def test_position_falls_to_nothing_at_the_limit() -> None:
    ratios = [pos_ratio(at(dirty), START_RATE) for dirty in range(FREERUN, THRESH + 2)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-3] >= 0
    assert ratios[-2:] == [0, 0]
    assert pos_ratio(at(SETPOINT), START_RATE) == pytest.approx(ONE, abs=2)


def test_smoothed_limit_gives_room_above_the_threshold() -> None:
    assert pos_ratio(at(THRESH), START_RATE) == 0
    assert pos_ratio(at(THRESH, limit=2 * THRESH), START_RATE) > ONE


def test_device_line() -> None:
    """A device with a tenth of the share is held to it, by a line of eight seconds' writing."""
    slow = 100
    dirty = SETPOINT
    small = pos_ratio(at(dirty, wb_thresh=THRESH // 10), slow)
    assert small == ONE // 4, "beyond the last quarter"
    share = THRESH // 10 * 65536 // (THRESH | 1)
    assert pos_ratio(at(FREERUN, wb_thresh=THRESH // 10), slow) < 2 * ONE * 3 // 4
    # at its own setpoint the line is 1, and the ratio the polynomial's
    own = SETPOINT * share >> 16
    assert own < FREERUN
    # an idle device counts with an eighth of what is left
    assert pos_ratio(at(FREERUN, wb_thresh=0), slow) == pos_ratio(
        at(FREERUN, wb_thresh=(THRESH - FREERUN) // 8), slow
    )


def test_a_queue_that_runs_dry_is_filled() -> None:
    low = at(100, wb_thresh=THRESH)
    assert pos_ratio(low, START_RATE) > position.BOOST_MOST * ONE
    half = at(THRESH // 2 - 1000)
    assert pos_ratio(half, 10) > pos_ratio(at(THRESH // 2), 10)


def test_strictlimit_goes_by_the_device_alone() -> None:
    strict = {"strict": True, "wb_thresh": 200}
    assert at(0, **strict).freerun == (200 + 200 * BACKGROUND // THRESH) // 2
    assert pos_ratio(at(200, **strict), START_RATE) == 0
    assert pos_ratio(at(199, **strict), START_RATE) < ONE // 16
    assert pos_ratio(at(at(0, **strict).freerun, **strict), START_RATE) == ONE
    assert at(201, **strict).exceeded
    assert not at(201, wb_thresh=200).exceeded


def test_golden_bandwidth() -> None:
    """A device that drops from 100 to 20 MiB/s."""
    estimate, written, averages = Bandwidth(), 0, {}
    for now in range(INTERVAL_MS, 20_001, INTERVAL_MS):
        written += 5120 * INTERVAL_MS // 1000
        estimate.update(now, 0, written, None)
        averages[now] = estimate.avg
    assert (averages[4000], averages[10_000], averages[20_000]) == (16560, 7848, 5338)


def test_a_long_gap_replaces_the_bandwidth() -> None:
    estimate = Bandwidth()
    estimate.update(bandwidth.PERIOD_MS + 1, 0, 4097, None)
    assert (estimate.write, estimate.avg) == (1000, 1000)
    estimate.start(100_000, 0, 5000)
    estimate.update(100_200, 0, 5200, None)
    assert estimate.write == 1000, "the pause did not count"
    assert estimate.ratelimit == START_RATE, "nobody was held back"


@pytest.mark.parametrize("writers", [1, 8, 100])
def test_rate_limit_finds_the_number_of_writers(writers: int) -> None:
    """All dirty what they may; memory and device follow from that alone."""
    estimate, device = Bandwidth(), 12800
    dirty, dirtied, written = float(FREERUN), 0.0, 0.0
    for now in range(1, 40_000):
        rate = writers * estimate.ratelimit * pos_ratio(at(int(dirty)), estimate.avg) / ONE
        dirtied += rate / 1000
        written += device / 1000
        dirty += (rate - device) / 1000
        assert FREERUN <= dirty < THRESH + writers * START_RATE / 1000
        if now % INTERVAL_MS == 0:
            estimate.update(now, int(dirtied), int(written), at(int(dirty)))
    assert estimate.avg == pytest.approx(device, rel=0.01)
    assert estimate.ratelimit == pytest.approx(device / writers, rel=0.15)


def test_pauses_are_bounded() -> None:
    for dirty in (0, 100, 3000, 100_000):
        for bw in (1, 100, 25600, 1 << 20):
            longest = pause.max_pause(dirty, bw)
            assert 1 <= longest <= pause.PAUSE_MOST_MS
            assert (longest - 1) / 1000 * bw <= max(dirty / 7, 1), "an eighth of the queue"
            for rate in (1, 10, 1000, 25600):
                for task_rate in (0, 1, rate // 2, 2 * rate):
                    shortest, pages = pause.target(longest, bw, rate, task_rate)
                    assert 0 <= shortest <= longest
                    assert 0 <= pages <= max(rate, pause.POLL_PAGES)


def test_golden_pauses() -> None:
    """One writer alone pauses 10 ms at least half; a hundred of them longer, for fewer pages."""
    assert pause.max_pause(17492, 25600) == 17492 // 201 + 1
    assert pause.target(88, 25600, 25600, 25600) == (6, 250)
    assert pause.target(88, 25600, 256, 256) == (88, 22)
    assert pause.target(200, 25600, 3200, 3200) == (20, 121)


def test_poll_interval() -> None:
    for room in (1, 2, 3, 4, 100, 4096, 19995):
        assert pause.poll_interval(0, room) == 2 ** (int(math.log2(room)) // 2)
    assert pause.poll_interval(100, 100) == 1
