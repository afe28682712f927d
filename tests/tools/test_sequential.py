"""The sequential experiment: what it judges, and that no device stays slow or attached."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import support
from tools import fiorun
from tools.lab import sequential, slowed
from tools.lab.sequential import KERNELS, OURS, Outcome, Plan

MIB = 1 << 20


def test_what_is_not_enough() -> None:
    device = {"write": 100.0, "read": 200.0}
    files = {
        f"{OURS} a": {"write": 79.0, "read": 160.0},
        f"{OURS} b": {"write": 80.0, "read": 159.0},
        KERNELS: {"write": 1.0, "read": 1.0},
    }
    found = Outcome(device, files)
    assert found.problems() == [f"{OURS} a: write is below 80%", f"{OURS} b: read is below 80%"]
    assert Outcome({}, files).problems() == []


@pytest.mark.mount
@support.needs_root
@pytest.mark.skipif(bool(slowed.why_not()), reason=slowed.why_not())
def test_fio_gets_what_the_device_has(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(32 * MIB))
    with slowed.image_slowed(image, 32 * MIB) as device:
        for way in sequential.WAYS:
            rate = fiorun.once(way, device.path, 32 * MIB, direct=True).bytes_s
            assert 0.5 < rate / (32 * MIB) < 1.3
    attached = subprocess.run(["losetup", "-j", image], capture_output=True, check=True).stdout
    assert attached == b""
    assert all(str(32 * MIB) not in knob.read_text() for knob in slowed.BLKIO)


@pytest.mark.slow
@pytest.mark.mount
@support.needs_fuse
@support.needs_root
def test_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan(size=32 * MIB, memory="16M")
    found = sequential.run(plan)
    enough = sequential.show(plan, found)
    said = capsys.readouterr().out
    assert enough == (not found.problems())
    assert list(found.files)[:2] == [f"{OURS} cache={cache}" for cache in sequential.CACHES]
    assert (KERNELS in found.files) == bool(found.device) == (not slowed.why_not())
    for name, rates in found.files.items():
        assert name in said
        assert all(0 < rates[way] < 1.5 * plan.bw for way in sequential.WAYS)
