"""Truncation and holes through a mount: a part of a large folio is free memory at once."""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import support
from tests.mount.test_opcodes import LANES, PUNCH, fallocate
from tools import stats

KIB, MIB = 1 << 10, 1 << 20

# What throws away a part of a file of 1 MiB, and where that begins and ends.
Change = tuple[Callable[[Path], object], int, int]
CHANGES: dict[str, Change] = {
    "truncate": (lambda path: os.truncate(path, 300_000), 300_000, MIB),
    "punch": (lambda path: fallocate(path, PUNCH, 200_000, 500_000), 200_000, 700_000),
}


def cached(where: Path) -> dict[str, float]:
    return stats.figures_of((where / ".nofail" / "folios").read_text())


def meminfo(where: Path, name: str) -> float:
    return stats.figures_of((where / ".nofail" / "meminfo").read_text())[name]


@pytest.mark.parametrize("written", [False, True], ids=["dirty", "written"])
@pytest.mark.parametrize("block", [4 * KIB, 64 * KIB])
@pytest.mark.parametrize("what", CHANGES)
def test_memory_comes_back(scratch: Path, what: str, block: int, written: bool) -> None:
    change, start, end = CHANGES[what]
    content = random.Random(block).randbytes(MIB)
    page_aligned = mmap.mmap(-1, MIB)  # so that it is one request
    page_aligned[:] = content
    image = support.mkfs(scratch, "-b", f"size={block}")
    with support.our_mount(image, scratch / "mnt", options=LANES) as mount:
        path = mount.path / "file"
        with path.open("wb", buffering=0) as file:
            assert file.write(page_aligned) == MIB
            if written:
                os.fsync(file.fileno())
        before, held = cached(mount.path), meminfo(mount.path, "Cached")
        assert before["folios.8"] == 1
        assert before["split"] == 0
        change(path)
        expected = content[:start]
        if path.stat().st_size == MIB:
            expected += bytes(end - start) + content[end:]
        after = cached(mount.path)
        gone = end // block * block - -(-start // block) * block
        assert before["cached"] - after["cached"] == gone >> 10
        assert held - meminfo(mount.path, "Cached") == gone >> 10
        assert after["folios.8"] == 0
        assert after["split.8"] == 1
        assert after["split_failed"] == 0
        assert path.read_bytes() == expected
    with support.our_mount(image, scratch / "mnt") as mount:
        assert (mount.path / "file").read_bytes() == expected
    support.assert_clean(image)


def test_free_folios_merge(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", options=LANES) as mount:
        path = mount.path / "file"
        path.write_bytes(bytes(16 * MIB))
        before = cached(mount.path)
        os.truncate(path, 0)
        after = cached(mount.path)
        assert after["merged.9"] > before["merged.9"]
        assert after["cached"] == after["split"] == 0
    support.assert_clean(image)
