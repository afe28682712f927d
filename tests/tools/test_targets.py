"""The places a workload runs in must leave nothing behind, and fio's numbers must be read right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import support
from tools import fiorun, targets
from tools.compare import Plan, run_jobs, show
from tools.progress import Progress


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("64k", 65536), ("16M", 16 << 20), ("1GiB", 1 << 30)]
)
def test_sizes(text: str, size: int) -> None:
    assert targets.size_of(text) == size


def test_a_wrong_size_says_how_to_write_one() -> None:
    with pytest.raises(targets.TargetError, match="write 4096"):
        targets.size_of("many")


@support.needs_root
def test_a_loop_mount_is_gone_after_an_error(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with pytest.raises(KeyError):
        with support.kernel_mount(image, scratch / "mnt") as where:
            assert targets.fs_type(where) == "xfs"
            raise KeyError
    assert not os.path.ismount(scratch / "mnt")
    support.assert_clean(image)


def test_repair_sees_a_broken_image(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with open(image, "r+b") as file:
        file.seek(512)  # the AGF of the first group
        file.write(bytes(64))
    clean, text = targets.repair(image)
    assert not clean
    assert "agf" in text.lower()


@pytest.mark.parametrize("name", fiorun.names())
def test_job_files_use_the_environment(name: str) -> None:
    text = fiorun.job_file(name).read_text()
    assert "${FIO_DIR}" in text
    assert "${FIO_SIZE}" in text
    assert text.startswith("; ")


def test_fio_output_is_read() -> None:
    latencies = {"percentile": {"50.000000": 99, "99.000000": 1234}}
    side = {"iops": 10.5, "bw_bytes": 4096, "clat_ns": latencies}
    job = {"error": 0, "read": side, "write": {"iops": 1, "bw_bytes": 2}}
    result = fiorun._parse("x", 0, "fio: a note\n" + json.dumps({"jobs": [job, job]}), "")
    assert (result.iops, result.bytes_s, result.p99_ns) == (23.0, 8196.0, 1234.0)
    assert result.p50_ns == 99.0
    assert result.errors == 0


def test_an_error_of_fio_is_reported() -> None:
    result = fiorun._parse("x", 1, "", "fio: verify: bad magic")
    assert result.errors == 1
    assert "bad magic" in result.text


@support.needs_fio
def test_the_table_has_a_row_for_each_job(
    scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan(["verify"], 1, 1 << 20, "64M", "none")
    pair = [targets.Target("nofailfs", scratch / "a"), targets.Target("tmpfs", scratch / "b")]
    for target in pair:
        target.path.mkdir()
    with Progress("test", 2, quiet=True) as bar:
        rows = run_jobs(plan, pair, bar)
    assert [row.errors for row in rows] == [0]
    show(rows)
    assert "ours / tmpfs" in capsys.readouterr().out


def test_progress_tells_the_screen_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work", 1000) as bar:
        bar.say("begins")
        for _ in range(1000):
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("begins")
    assert lines[-1].endswith("1000 of 1000")
    assert len(lines) < 20
