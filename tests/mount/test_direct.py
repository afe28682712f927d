"""What a mount does with direct I/O below its image: by its report, its descriptors, the judges."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests import support
from tools import stats
from tools.targets import OurMount

MIB = 1 << 20
SIZE = 24 * MIB


def report(mount: OurMount) -> dict[str, float]:
    return stats.figures_of((mount.path / ".nofail" / "io").read_text())


def large(found: dict[str, float], title: str) -> float:
    """Of requests of 64 KiB or more."""
    return sum(found[f"{title}.{64 << n}"] for n in range(8))


def synced(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


@pytest.mark.parametrize("mode", ["auto", "on", "off"])
def test_data_passes_the_cache_by(mode: str, tmp_path: Path) -> None:
    """Large transfers do with auto, all whole pages with on; and the kernel reads what we wrote."""
    support.need_direct(tmp_path)
    image = support.mkfs(tmp_path)
    files = {"large": os.urandom(SIZE), "small": os.urandom(4096)}
    for turn in ("write", "read"):  # a mount each: nothing is cached
        with support.our_mount(image, tmp_path / "mnt", options=f"direct={mode}") as mount:
            before = report(mount)  # the log was read, into memory that is not aligned
            assert support.direct_descriptors(mount.process.pid, image.stat()) == (mode != "off")
            for name, content in files.items():
                file = mount.path / name
                if turn == "write":
                    file.write_bytes(content)
                    synced(file)
                else:
                    assert file.read_bytes() == content
            found = {name: value - before[name] for name, value in report(mount).items()}
            if mode == "off":
                assert found[f"direct_{turn}s"] == 0
            else:
                assert large(found, f"direct_{turn}s") == large(found, f"{turn}s") > 0
                small = found[f"direct_{turn}s"] - large(found, f"direct_{turn}s")
                assert (small > 0) == (mode == "on")
    support.assert_clean(image)
    with support.kernel_mount(image, tmp_path / "kernel") as root:
        assert {file.name: file.read_bytes() for file in root.iterdir()} == files


@support.needs_root
@pytest.mark.parametrize("sector", [512, 4096])
def test_a_block_device(sector: int, tmp_path: Path) -> None:
    """Whatever its sectors; one of 4096 bytes has an image of such sectors."""
    image = tmp_path / "image"
    image.write_bytes(b"")
    os.truncate(image, 400 * MIB)
    data = os.urandom(SIZE + 12345)
    with support.loop_device(image, "--sector-size", str(sector)) as device:
        loop = tmp_path / "loop"  # the log of the mount stands beside it
        loop.symlink_to(device)
        support.run("mkfs.xfs", "-q", loop)
        for _ in range(2):
            with support.our_mount(loop, tmp_path / "mnt") as mount:
                file = mount.path / "file"
                if file.exists():
                    assert file.read_bytes() == data
                    assert report(mount)["direct_reads"] > 0
                    continue
                file.write_bytes(data)
                synced(file)
                assert report(mount)["direct_writes"] > 0
        support.assert_clean(loop)
        with support.kernel_mount(loop, tmp_path / "kernel", options="ro") as root:
            assert (root / "file").read_bytes() == data


def test_on_is_refused_where_there_is_none(tmp_path: Path) -> None:
    """An image in memory: what holds it has only its cache."""
    where = tmp_path / "mnt"
    where.mkdir()
    fd = os.memfd_create("image")
    os.truncate(fd, 300 * MIB)
    image = Path(f"/proc/{os.getpid()}/fd/{fd}")
    support.run("mkfs.xfs", "-q", image)
    done = support.nofailfs("mount", "--log", "none", "-o", "direct=on", image, where)
    assert done.returncode == 32, (done.returncode, done.stderr)
    assert "direct=on" in done.stderr
    assert "Traceback" not in done.stderr
    os.close(fd)
    done = support.nofailfs("mount", "--scratch", "1G", "-o", "direct=on", where)
    assert done.returncode == 1, (done.returncode, done.stderr)
    assert "direct=on" in done.stderr
