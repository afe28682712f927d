"""The throttle's experiment: what it judges, and that nothing is left behind beside the kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests import support
from tools.lab import slowed, throttle
from tools.lab.throttle import Phase, Plan

GOOD = Phase(1000, 2.0, written=[1000, 950], times=[0.001] * 999, longest_ms=200)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"written": [1100, 1060]}, "the rate is off"),
        ({"written": [1080, 920]}, "shares differ"),
        ({"over_kib": 129}, "dirty memory was above the limit"),
        ({"longest_ms": 201}, "a pause was too long"),
        ({"times": [0.001] * 998 + [0.3] * 2}, "writes took too long"),
    ],
)
def test_what_does_not_hold(change: dict[str, object], problem: str | None) -> None:
    phase = replace(GOOD, **change)  # type: ignore[arg-type]
    assert phase.problems(128) == ([problem] if problem else [])


@pytest.mark.slow
@pytest.mark.mount
@support.needs_fuse
@support.needs_root
def test_ours_and_the_kernels_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(seconds=1.0, writers=2, slow=0, memory="16M")
    found = throttle.run(plan)
    throttle.show(plan, found)
    said = capsys.readouterr().out
    assert all(sum(phase.written) > 0 for phases in found.values() for phase in phases)
    assert len(found) == (1 if slowed.why_not() else 2)
    if len(found) == 1:
        assert f"not beside it: {slowed.why_not()}" in said
        return
    ours, kernels = found[throttle.OURS][0], found["kernel XFS"][0]
    assert kernels.limit_kib == pytest.approx(ours.limit_kib, rel=0.25)
    assert all(str(plan.bw) not in knob.read_text() for knob in slowed.BLKIO)
