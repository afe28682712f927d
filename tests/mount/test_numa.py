"""Mounts whose memory has nodes: options, reports, and data that survives it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import support

MIB = 1 << 20


@pytest.mark.mount
@pytest.mark.parametrize(
    "options", ["mpol=interleave", "mpol=bind:1,lanes=0", "distance=10:40:40:10"]
)
def test_files_on_several_nodes(scratch: Path, options: str) -> None:
    image = support.mkfs(scratch)
    options = "numa=2," + options
    data = os.urandom(3 * MIB)
    with support.our_mount(image, scratch / "mnt", memory="32M", options=options) as mount:
        for k in range(20):
            (mount.path / f"file{k}").write_bytes(data[k:])
        for k in range(20):
            assert (mount.path / f"file{k}").read_bytes() == data[k:]
        proc = mount.path / ".nofail"
        assert (proc / "buddyinfo").read_text().count("Node 1, zone") == 1
        counts = dict(line.split() for line in (proc / "vmstat").read_text().splitlines())
        assert int(counts["numa_hit"]) > 0
        weight = proc / "sys/vm/weighted_interleave/node1"
        weight.write_text("3\n")
        assert weight.read_text() == "3\n"
        assert ("interleave" in options) == (int(counts["numa_interleave"]) > 0)
    support.assert_clean(image)


@pytest.mark.mount
@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ("numa=9", "each needs 8 MiB"),
        ("numa=2,distance=10:20", "2 distances"),
        ("numa=2,mpol=bind:2", "node 2 of 2"),
    ],
)
def test_nodes_that_can_not_be(scratch: Path, options: str, wrong: str) -> None:
    image = support.mkfs(scratch)
    done = support.nofailfs("mount", "-o", options, "--memory", "64M", image, scratch)
    assert done.returncode == 1
    assert wrong in done.stderr
