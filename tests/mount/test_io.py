"""How large the writes are in which a file reaches the device, by the mount's own report."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest

from tests import support
from tools import stats

KIB, MIB = 1 << 10, 1 << 20
SIZE = 48 * MIB


@pytest.mark.parametrize("request_bytes", [4 * KIB, MIB])
def test_sequential_writes_are_merged(scratch: Path, request_bytes: int) -> None:
    """What the writer does in pages or in MiB, a device that is slower gets by the MiB."""
    image = support.mkfs(scratch)
    data = mmap.mmap(-1, request_bytes)  # page-aligned: one request each
    data[:] = os.urandom(request_bytes)
    with support.our_mount(image, scratch / "mnt", options="device=bw=50M") as mount:
        with (mount.path / "file").open("wb", buffering=0) as file:
            for _ in range(SIZE // request_bytes):
                assert file.write(data) == request_bytes
            os.fsync(file.fileno())
        found = stats.figures_of((mount.path / ".nofail" / "io").read_text())
        large = sum(found[f"written_kB.{kib}"] for kib in stats.LARGE)
        assert large >= 0.95 * (SIZE >> 10), found
    support.assert_clean(image)
