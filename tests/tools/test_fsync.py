"""The fsync experiment: what is dirty stays dirty, beside the kernel where that can be."""

from __future__ import annotations

import pytest

from tests import support
from tools.lab import fsync, slowed
from tools.lab.fsync import Plan


@pytest.mark.slow
@pytest.mark.mount
@support.needs_fuse
@support.needs_root
def test_the_large_file_stays_dirty(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(dirty=64 << 20, files=3)
    found = fsync.run(plan)
    fsync.show(plan, found)
    said = capsys.readouterr().out
    assert len(found) == (1 if slowed.why_not() else 2)
    for name, outcome in found.items():
        assert name in said
        assert len(outcome.times) == 3
    ours = found["nofailfs"]  # the kernel's is written by whoever calls sync(2) meanwhile
    assert ours.before_kib > 0.9 * plan.dirty / 1024
    assert ours.after_kib > 0.9 * ours.before_kib
