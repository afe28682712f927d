"""Everything at once for a minute: lanes, truncation, reclaim and unlink, and every byte compared.

NOFAILFS_STRESS_SECONDS makes it longer. Memory is far smaller than the data, so that reclaim and
write-back never rest.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import stress, support
from tests.source import ROOT
from tools.targets import child_environment

SECONDS = float(os.environ.get("NOFAILFS_STRESS_SECONDS", "60"))
ROLES = ("owner", "owner", "owner", "writer", "writer", "reader", "reader", "cutter")


def prepare(directory: Path) -> None:
    with open(directory / stress.SHARED, "wb") as file:
        file.write(bytes(stress.RECORDS * stress.RECORD))
    (directory / stress.CUT).touch()


def run(directory: Path, seconds: float) -> list[str]:
    """All roles at once; their reports. Fails with what a worker read wrongly."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.stress", role, directory, str(seed), str(seconds)],
            cwd=ROOT,
            env=child_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed, role in enumerate(ROLES)
    ]
    ends = [(worker.communicate(timeout=seconds + 300)[0], worker.returncode) for worker in workers]
    wrong = [text for text, status in ends if status]
    assert not wrong, "\n".join(wrong)
    return [text for text, _ in ends]


def check_manifests(reports: list[str]) -> int:
    """Every named file still has the content that its owner left; how many."""
    looked = 0
    for report in reports:
        for line in report.splitlines():
            digest, _, path = line.partition(" ")
            if len(digest) == 64:
                assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest, path
                looked += 1
    return looked


@pytest.mark.slow
@pytest.mark.parametrize("mkfs_args", [(), ("-b", "size=1k")], ids=["default", "1k blocks"])
def test_lanes_truncates_reclaim_and_unlink(scratch: Path, mkfs_args: tuple[str, ...]) -> None:
    everything_at_once(scratch, mkfs_args, SECONDS / 2)


@pytest.mark.slow
@pytest.mark.usefixtures("uring")
def test_the_same_over_io_uring(scratch: Path) -> None:
    everything_at_once(scratch, (), SECONDS / 2)


def everything_at_once(scratch: Path, mkfs_args: tuple[str, ...], seconds: float) -> None:
    image = support.mkfs(scratch, *mkfs_args, size=1 << 30)
    where = scratch / "mnt"
    with support.our_mount(image, where, memory="16M") as mount:
        prepare(mount.path)
        reports = run(mount.path, seconds)
        looked = check_manifests(reports)
        assert looked
        support.assert_small(mount)
    support.assert_clean(image)
    if support.is_root():
        with support.kernel_mount(image, where):
            assert check_manifests(reports) == looked


def test_the_workers_see_a_wrong_byte(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pread

    def pread(fd: int, length: int, offset: int) -> bytes:
        data = bytearray(real(fd, length, offset))
        if len(data) > 100:
            data[96] ^= 1
        return bytes(data)

    prepare(scratch)
    assert stress.main("cutter", str(scratch), "3", "0.5") == 0
    monkeypatch.setattr(stress.os, "pread", pread)
    assert stress.main("owner", str(scratch), "1", "2") == 1
    assert stress.main("reader", str(scratch), "2", "2") == 1
