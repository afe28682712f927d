"""The exerciser on our mount in every cache mode, and the tools as a person starts them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests import support
from tools import fsx

BY_THE_CLIENT = {"collapse", "insert"}  # Linux's FUSE client refuses these without asking


def with_lanes() -> bool:
    return os.environ.get("NOFAILFS_LANES") != "0"


@pytest.mark.parametrize("cache", ["none", "writethrough", "writeback"])
def test_fsx_in_every_cache_mode(scratch: Path, cache: str) -> None:
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", memory="16M", cache=cache) as mount:
        options = fsx.Options(seed=21, ops=2000, quiet=True)
        result = fsx.exercise(mount.path / "file", options)
        assert result.problem == "", "\n".join(fsx.report(mount.path, options, result))
        if with_lanes():
            assert result.refused <= BY_THE_CLIENT
        else:
            assert ("mapwrite" in result.refused) == (cache == "none")
    support.assert_clean(image)


@pytest.mark.parametrize("mkfs_args", [("-b", "size=1k"), ("-b", "size=64k")], ids=["1k", "64k"])
def test_fsx_on_other_block_sizes(scratch: Path, mkfs_args: tuple[str, ...]) -> None:
    image = support.mkfs(scratch, *mkfs_args)
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        options = fsx.Options(seed=22, ops=2000, quiet=True)
        result = fsx.exercise(mount.path / "file", options)
        assert result.problem == "", "\n".join(fsx.report(mount.path, options, result))
    support.assert_clean(image)


@pytest.mark.usefixtures("uring")
def test_fsx_over_io_uring(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", memory="16M") as mount:
        options = fsx.Options(seed=23, ops=5000, quiet=True)
        result = fsx.exercise(mount.path / "file", options)
        assert result.problem == "", "\n".join(fsx.report(mount.path, options, result))
        assert result.refused <= BY_THE_CLIENT
    support.assert_clean(image)


@support.needs_fio
def test_compare_prints_json(scratch: Path) -> None:
    words = ("--job", "verify", "--size", "1M", "--runtime", "1", "--memory", "16M", "--json")
    done = support.nofailfs("compare", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    targets = said["jobs"][0]["targets"]
    assert {"nofailfs", "tmpfs"} <= targets.keys()
    assert "cache=none" in targets["nofailfs"]["note"]
    assert all(target["errors"] == 0 for target in targets.values())


@pytest.mark.slow
@support.needs_fio
def test_the_demo_ends_well() -> None:
    done = support.nofailfs("demo", "--size", "512M", "--memory", "16M", "--runtime", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "xfs_repair -n: clean" in done.stdout
    assert "verify=crc32c: no error" in done.stdout


@pytest.mark.slow
@support.needs_fio
def test_the_benchmarks_print_a_table() -> None:
    words = ("--rounds", "1", "--files", "200", "--runtime", "1", "--memory", "32M", "--json")
    done = support.nofailfs("bench", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    measures = {row["measure"] for row in json.loads(done.stdout)["measures"]}
    wanted = {"mount, warm start", "create and close", "stat, warm", "unlink", "randread-4k"}
    assert wanted <= measures
