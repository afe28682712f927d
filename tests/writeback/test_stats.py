"""The report of the throttle: the kernel's names and units."""

from __future__ import annotations

import re

import trio.testing

from tests.writeback import counts
from tests.writeback.test_flusher import running
from writeback.stats import stats_text


async def test_lines(autojump_clock: trio.testing.MockClock) -> None:
    async with running() as m:
        m.make_dirty(1, 100)
        counts.start_writeback(m.dirty, 40)
        text = stats_text(m.throttle, m.flusher)
        counts.end_writeback(m.dirty, 40)
        m.states["ndirty"][1] -= 40
    lines = dict(line.split(":") for line in text.splitlines())
    assert all(re.fullmatch(r"\w+: +[0-9.]+( kB| kBps| ms)?", line) for line in text.splitlines())
    assert lines["BdiWriteback"].split() == ["160", "kB"]
    assert lines["BdiReclaimable"].split() == ["240", "kB"]
    assert lines["DirtyThresh"].split() == [str(4 * m.dirty.thresh), "kB"]
    assert lines["BdiWriteBandwidth"].split() == ["102400", "kBps"]
    assert lines["b_dirty"].split() == ["1"]
    assert float(lines["PosRatio"]) > 1
