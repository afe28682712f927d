"""Several programs at once on one mount: handlers that wait must not starve or confuse others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import support
from tests.source import ROOT
from tools.targets import child_environment, tmpfs

RUNS, OPS, WRITERS = 4, 2500, 60


@pytest.mark.slow
@support.needs_root
def test_four_mixed_runs_at_once(scratch: Path) -> None:
    image = support.mkfs(scratch, size=1 << 30)
    with tmpfs(scratch / "tmpfs") as mirror:
        with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
            runs = [
                subprocess.Popen(
                    [sys.executable, "-m", "tests.mixed", mount.path / str(seed)]
                    + [mirror.path / str(seed), "--seed", str(seed), "--ops", str(OPS)],
                    cwd=ROOT,
                    env=child_environment(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
                for seed in range(RUNS)
            ]
            ends = [(run.communicate(timeout=500)[0], run.returncode) for run in runs]
            assert all(status == 0 for _, status in ends), ends
            support.assert_small(mount)
    support.assert_clean(image)


def test_one_directory_many_threads(scratch: Path) -> None:
    """Creates, renames and unlinks of the same names race; every outcome is a legal one."""
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        names = [str(mount.path / f"name{number}") for number in range(8)]
        faults: list[BaseException] = []

        def work(seed: int) -> None:
            try:
                for step in range(150):
                    name, other = names[(seed + step) % 8], names[(seed * 3 + step * 5) % 8]
                    try:
                        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
                    except FileExistsError:
                        pass
                    try:
                        os.rename(name, other)
                        os.unlink(other)
                    except FileNotFoundError:
                        pass
            except BaseException as fault:
                faults.append(fault)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not faults
        for name in os.listdir(mount.path):
            os.unlink(mount.path / name)
    support.assert_clean(image)


def test_writers_over_the_dirty_limit_do_not_stop_a_stat(scratch: Path) -> None:
    """Sixty programs wait for memory and for the device; a small request still gets its turn."""
    image = support.mkfs(scratch, size=1 << 30)
    with support.our_mount(image, scratch / "mnt", memory="8M") as mount:
        (mount.path / "small").touch()
        stop = threading.Event()
        faults: list[BaseException] = []

        def write(number: int) -> None:
            try:
                with open(mount.path / f"big{number}", "wb", buffering=0) as file:
                    while not stop.is_set() and file.tell() < (8 << 20):
                        file.write(bytes(1 << 20))
            except BaseException as fault:
                faults.append(fault)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(WRITERS)]
        for thread in threads:
            thread.start()
        seen = 0
        while any(thread.is_alive() for thread in threads) and seen < 50:
            os.stat(mount.path / "small")
            os.listdir(mount.path)
            seen += 1
        stop.set()
        for thread in threads:
            thread.join(300)
        assert seen
        assert not faults
        support.assert_small(mount, waiting=WRITERS)
    support.assert_clean(image)
