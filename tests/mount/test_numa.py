"""Mounts whose memory has nodes: options, reports, and data that survives it."""

from __future__ import annotations

import errno
import os
import re
from functools import partial
from pathlib import Path

import pytest

from tests import support
from tests.mount.test_opcodes import NOBODY, as_nobody

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
        balancing = proc / "sys/kernel/numa_balancing"
        assert balancing.read_text() == "1\n"
        balancing.write_text("0\n")
        assert balancing.read_text() == "0\n"
        threshold = proc / "sys/vm/numa_migr_threshold"
        threshold.write_text("3\n")
        assert threshold.read_text() == "3\n"
        with pytest.raises(OSError, match="Invalid argument"):
            threshold.write_text("0\n")
        assert ("interleave" in options) == (int(counts["numa_interleave"]) > 0)
    support.assert_clean(image)


def free_pages(mount: support.OurMount) -> list[int]:
    """Of each node."""
    text = (mount.path / ".nofail/zoneinfo").read_text()
    return [int(found) for found in re.findall(r"pages free +(\d+)", text)]


@pytest.mark.mount
@pytest.mark.parametrize("options", ["", ",mpol=bind:0,lanes=0"])
def test_a_file_says_where_its_memory_lies(scratch: Path, options: str) -> None:
    image, name = support.mkfs(scratch), "system.nofailfs.mpol"
    options = "numa=2,allow_other" + options
    with support.our_mount(image, scratch / "mnt", memory="64M", options=options) as mount:
        for node in (1, 0):
            with open(mount.path / f"file{node}", "wb") as file:
                with pytest.raises(OSError, match="No data"):
                    os.getxattr(file.fileno(), name)
                os.setxattr(file.fileno(), name, b"bind:%d" % node)
                assert os.getxattr(file.fileno(), name) == b"bind:%d" % node
                before = free_pages(mount)
                file.write(os.urandom(4 * MIB))
                file.flush()
                taken = [b - a for a, b in zip(free_pages(mount), before, strict=True)]
                assert taken[node] >= 1024
                assert taken[1 - node] < 128
                assert name not in os.listxattr(file.fileno())
                os.removexattr(file.fileno(), name)
                with pytest.raises(OSError, match="No data"):
                    os.removexattr(file.fileno(), name)
                for wrong in (b"bind:2", b"bind", b"nearest", b"\xff"):
                    with pytest.raises(OSError, match="Invalid"):
                        os.setxattr(file.fileno(), name, wrong)
        with open(mount.path / "file1") as file:
            fd = file.fileno()
            assert as_nobody(lambda: os.setxattr(fd, name, b"bind:1")) == errno.EPERM
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(mount.path, name, b"bind:1")
    support.assert_clean(image)


@pytest.mark.mount
def test_a_user_says_where_his_memory_lies(scratch: Path) -> None:
    image, name = support.mkfs(scratch), f"system.nofailfs.mpol.{NOBODY}"
    options, data = "numa=2,allow_other,mpol=bind:0,lanes=2", os.urandom(MIB)
    with support.our_mount(image, scratch / "mnt", memory="64M", options=options) as mount:
        os.setxattr(mount.path, name, b"bind:1")
        assert os.getxattr(mount.path, name) == b"bind:1"
        for who, node in (("root", 0), ("nobody", 1)):
            with open(mount.path / who, "wb", buffering=0) as file:
                before, fd = free_pages(mount), file.fileno()
                for _ in range(4):
                    if who == "root":
                        os.write(fd, data)
                    else:
                        assert as_nobody(partial(os.write, fd, data)) == 0
                taken = [b - a for a, b in zip(free_pages(mount), before, strict=True)]
                assert taken[node] >= 1024, who
                assert taken[1 - node] < 128, who
        fd = os.open(mount.path, os.O_RDONLY)
        other = "system.nofailfs.mpol.1000"
        assert as_nobody(lambda: os.setxattr(fd, other, b"bind:1")) == errno.EPERM
        assert as_nobody(lambda: os.removexattr(fd, name)) == 0
        os.close(fd)
        for missing in (name, other):
            with pytest.raises(OSError, match="No data"):
                os.getxattr(mount.path, missing)
        with pytest.raises(OSError, match="not supported"):
            os.setxattr(mount.path / "root", name, b"bind:1")
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
