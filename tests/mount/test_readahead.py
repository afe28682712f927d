"""Readahead through a mount: a cold file is read ahead of its reader, whoever answers him."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import support
from tests.mount.test_procdir import numbers

STEP, STEPS = 64 << 10, 256


@pytest.mark.parametrize("options", ["lanes=2", "lanes=0"])
def test_a_cold_stream_seldom_waits(scratch: Path, options: str) -> None:
    image = support.mkfs(scratch)
    data = os.urandom(STEP) * STEPS
    with support.kernel_mount(image, scratch / "kernel") as root:
        (root / "file").write_bytes(data)
    with support.our_mount(image, scratch / "mnt", options=options) as mount:
        proc = mount.path / ".nofail"
        with open(mount.path / "file", "rb", buffering=0) as file:
            for at in range(0, len(data), STEP):
                assert file.read(STEP) == data[at : at + STEP]
        first = numbers(proc / "vmstat")
        tunable = proc / "sys/bdi/read_ahead_kb"
        window = int(tunable.read_text()) << 10
        assert window == 2 << 20, "1/32 of memory"
        assert first["readahead_begun"] >= len(data) // window - 1
        assert first["readahead_waited"] <= STEPS // 8
        assert first["readahead_evicted"] == 0
        (proc / "sys/vm/drop_caches").write_text("1")
        tunable.write_text("0")
        assert (mount.path / "file").read_bytes() == data
        assert numbers(proc / "vmstat")["readahead_begun"] == first["readahead_begun"]
    support.assert_clean(image)
