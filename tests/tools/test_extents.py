"""The extents experiment: its counts are those of the images, and no pattern is left out."""

from __future__ import annotations

import pytest

from tests import support
from tools.lab import extents, slowed
from tools.lab.extents import Plan

MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.mount
@support.needs_fuse
@support.needs_root
def test_a_line_for_each_pattern(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(large=64 * MIB, shared=8 * MIB, writers=3, scattered=4 * MIB, memory="16M")
    found = extents.measure(plan)
    extents.show(plan, found)
    said = capsys.readouterr().out
    assert [name in said for name in found] == [True] * 3
    for counts in found.values():
        assert len(counts) == (1 if slowed.why_not() else 2)
    one, several, scattered = (counts["nofailfs"] for counts in found.values())
    assert 1 <= one[0] <= 4
    assert len(several) == 3
    assert all(1 <= n <= 16 for n in several)
    assert 4 < scattered[0] <= plan.scattered // extents.PIECE
