"""A busy mount keeps idle processors awake, an idle one does not: what /proc says of the daemon."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fs import stat as figures
from fs.front.latency import DEVICE
from tests import support
from tools.targets import OurMount

pytestmark = [
    pytest.mark.mount,
    support.needs_root,
    support.needs_fuse,
    pytest.mark.skipif(not DEVICE.exists(), reason=f"{DEVICE} is missing"),
]

READS = 20_000  # where none of them shall have it held
SECONDS = 60.0


def holds(mounted: OurMount) -> bool:
    """Whether the daemon has the device open."""
    place = f"/proc/{mounted.process.pid}/fd"
    for name in os.listdir(place):
        try:
            if os.readlink(f"{place}/{name}") == str(DEVICE):
                return True
        except FileNotFoundError:
            pass  # closed meanwhile
    return False


def read_quickly(mounted: OurMount, reads: int = 1 << 30) -> bool:
    """Read the file again and again until the request is held: whether it was in the end."""
    fd = os.open(mounted.path / "file", os.O_RDONLY)
    deadline = time.monotonic() + SECONDS
    try:
        for number in range(reads):
            os.pread(fd, 4096, 0)
            if number % 500 == 499 and (holds(mounted) or time.monotonic() > deadline):
                break
    finally:
        os.close(fd)
    return holds(mounted)


def test_held_while_busy_only(scratch: Path) -> None:
    image = support.mkfs(scratch)
    options = "lanes=2,latency=on"
    with support.our_mount(image, scratch / "mnt", options=options) as mounted:
        (mounted.path / "file").write_bytes(bytes(4096))
        for _ in range(2):
            assert read_quickly(mounted)
            support.wait_until(lambda: not holds(mounted), "an idle mount holds the request")
        found = figures.read(str(mounted.path))["latency"]
        assert found["state"] == "on"
        assert found["times"] >= 2
        assert found["seconds"] > 0
        assert "latency=on" in support.nofailfs("info", mounted.path).stdout
        assert "latency on, held" in support.nofailfs("stat", mounted.path).stdout
        read_quickly(mounted)  # the daemon's end is no calm end of the request


def test_off_is_off(scratch: Path) -> None:
    image = support.mkfs(scratch)
    options = "lanes=2,latency=off"
    with support.our_mount(image, scratch / "mnt", options=options) as mounted:
        (mounted.path / "file").write_bytes(bytes(4096))
        assert not read_quickly(mounted, READS)
        found = figures.read(str(mounted.path))["latency"]
        assert found == {"state": "off", "times": 0, "seconds": 0}
