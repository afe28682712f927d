"""The directory of reports through a mount: found and not listed, formats, tunables, who may write.

Everything with the lanes of the machine, with pyfuse3 alone, and with a kernel that caches writes.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support
from tools import stats
from tools.targets import scratch_dir

REPORTS = (
    *("meminfo", "vmstat", "buddyinfo", "pagetypeinfo", "zoneinfo", "slabinfo", "shrinkers"),
    "writeback",
    "folios",
    "io",
)
NOBODY = 65534


@pytest.fixture(scope="module", params=["", "lanes=0", "cache=writeback"])
def root(request: pytest.FixtureRequest) -> Iterator[Path]:
    with scratch_dir() as scratch:
        scratch.chmod(0o755)
        image = support.mkfs(scratch)
        options = ",".join(filter(None, [request.param, "allow_other"]))
        with support.our_mount(image, scratch / "mnt", memory="32M", options=options) as mount:
            (mount.path / "file").write_bytes(os.urandom(3 << 20))
            yield mount.path
        support.assert_clean(image)


@pytest.fixture
def proc(root: Path) -> Path:
    return root / ".nofail"


def fails(code: int, call, *words) -> None:
    with pytest.raises(OSError) as caught:
        call(*words)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[code]


def numbers(path: Path) -> dict[str, int]:
    """name value, as in vmstat; `Name: value kB`, as in meminfo."""
    pairs = (line.split()[:2] for line in path.read_text().splitlines())
    return {name.rstrip(":"): int(value) for name, value in pairs}


def test_it_is_found_and_not_listed(root: Path, proc: Path) -> None:
    assert ".nofail" not in os.listdir(root)
    assert stat.S_ISDIR(proc.stat().st_mode)
    assert {*REPORTS, "waiters", "pressure", "sys"} == set(os.listdir(proc))
    assert os.listdir(proc / "pressure") == ["memory"]
    assert sorted(os.listdir(proc / "sys")) == ["bdi", "fs", "rcutree", "vm"]
    status = (proc / "meminfo").stat()
    assert (status.st_size, stat.S_IMODE(status.st_mode)) == (0, 0o444)
    assert stat.S_IMODE((proc / "sys/vm/dirty_ratio").stat().st_mode) == 0o644
    assert status.st_ino > 1 << 56
    assert not list(proc.glob("nothing"))
    inodes = [path.stat().st_ino for path in [proc, *proc.rglob("*")]]
    assert len(inodes) == len(set(inodes)) > 20
    assert os.listxattr(proc / "meminfo") == []


def test_formats_are_those_of_proc(proc: Path) -> None:
    """Each line has the form of the same line of the machine's own /proc, where that has one."""
    own = {name: Path("/proc", name) for name in ("meminfo", "vmstat", "buddyinfo")}
    for name, theirs in own.items():
        shape = re.sub(r"\d+", "1", theirs.read_text().splitlines()[0])
        for line in (proc / name).read_text().splitlines():
            got = re.sub(r"\d+", "1", line)
            assert re.sub(r"[\w()]+", "w", got).split() == re.sub(r"[\w()]+", "w", shape).split()
    first = (proc / "meminfo").read_text().splitlines()[0]
    assert first == "MemTotal:          32768 kB"
    assert len((proc / "buddyinfo").read_text().split()) == 4 + 11
    slabs = (proc / "slabinfo").read_text().splitlines()
    assert slabs[0] == "slabinfo - version: 2.1"
    assert any(line.startswith("xfs_inode ") for line in slabs)
    for line in slabs[2:]:
        name, used, objects, size, per_slab, pages, *rest = line.split()
        assert 0 <= int(used) <= int(objects)
        assert int(size) * int(per_slab) == 4096 * int(pages)
        assert rest[:2] == [":", "tunables"]
    zone = (proc / "zoneinfo").read_text()
    marks = {key: int(value) for key, value in re.findall(r"(\w+) +(\d+)$", zone, re.MULTILINE)}
    assert marks["min"] < marks["low"] < marks["high"] < marks["managed"] < marks["spanned"]
    types = (proc / "pagetypeinfo").read_text()
    assert "Free pages count per migrate type at order" in types
    assert (proc / "shrinkers").read_text().count("\n") >= 5
    assert (proc / "waiters").read_text() == ""
    line = r"avg10=\d+\.\d\d avg60=\d+\.\d\d avg300=\d+\.\d\d total=\d+\n"
    assert re.fullmatch(f"some {line}full {line}", (proc / "pressure/memory").read_text())


def test_a_line_about_the_mount(root: Path, proc: Path) -> None:
    header, titles, *rows = list(stats.lines(root, (), 0.05, 2))
    assert len(rows) == 2
    assert all(name in header for name in stats.SECTIONS)
    assert len(rows[1].split()) == len(titles.split())
    assert "-" not in rows[1].split()


def test_counts_follow_what_happens(root: Path, proc: Path) -> None:
    before = numbers(proc / "vmstat")
    (root / "more").write_bytes(bytes(1 << 20))
    after = numbers(proc / "vmstat")
    assert after["pgalloc_normal"] >= before["pgalloc_normal"] + 200
    assert numbers(proc / "meminfo")["Cached"] >= 1024
    os.unlink(root / "more")


def test_folios_by_order(root: Path, proc: Path) -> None:
    """What a file of a known size is cached in, against what meminfo says of all."""
    (root / "folios").write_bytes(b"x" * (3 << 20))
    with (root / "folios").open("rb") as file:
        assert len(file.read()) == 3 << 20
    head, *lines = (proc / "folios").read_text().splitlines()
    titles = "# order size folios cached active dirty writeback split split_failed merged"
    assert head.split() == titles.split()
    rows = [[int(word) for word in line.replace("kB", "").split()] for line in lines]
    assert [row[0] for row in rows] == list(range(len(rows)))
    for order, size, count, cached, active, dirty, busy, *_ in rows:
        assert (size, cached) == (4 << order, count * size)
        assert max(active, dirty, busy) <= count
    cached = int(re.search(r"^Cached: *(\d+) kB", (proc / "meminfo").read_text(), re.M)[1])
    assert 3072 <= sum(row[3] for row in rows) == cached
    assert any(row[2] for row in rows[4:]), "a write of 1 MiB asks for large folios"
    (root / "folios").unlink()


def test_reads_by_offset_are_of_one_moment(root: Path, proc: Path) -> None:
    with open(proc / "vmstat", "rb", buffering=0) as report:
        whole = os.pread(report.fileno(), 1 << 16, 0)
        (root / "other").write_bytes(bytes(1 << 20))
        parts = [os.pread(report.fileno(), 7, at) for at in range(0, len(whole) + 7, 7)]
        assert b"".join(parts) == whole
        assert os.pread(report.fileno(), 100, 1 << 40) == b""
        fails(errno.EINVAL, os.fsync, report.fileno())
    assert (proc / "vmstat").read_bytes() != whole
    os.unlink(root / "other")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vm/min_free_kbytes", 1024),
        ("vm/watermark_scale_factor", 100),
        ("vm/vfs_cache_pressure", 200),
        ("vm/compaction_proactiveness", 50),
        ("vm/extfrag_threshold", 300),
        ("bdi/max_ratio", 50),
        ("bdi/read_ahead_kb", 512),
        ("vm/dirty_ratio", 40),
        ("vm/dirty_background_ratio", 5),
        ("vm/dirty_bytes", 8 << 20),
        ("vm/dirty_background_bytes", 1 << 20),
        ("vm/dirty_writeback_centisecs", 100),
        ("vm/dirty_expire_centisecs", 1000),
        ("vm/dirtytime_expire_seconds", 3600),
        ("fs/xfs/xfssyncd_centisecs", 600),
        ("fs/xfs/speculative_prealloc_lifetime", 60),
        ("rcutree/blimit", 20),
        ("rcutree/qhimark", 300_000),
    ],
)
def test_a_tunable_is_read_and_written(proc: Path, name: str, value: int) -> None:
    path = proc / "sys" / name
    was = path.read_text()
    subprocess.run(["sh", "-c", f"echo {value} > {path}"], check=True)
    assert path.read_text() == f"{value}\n"
    for bad in (b"x", b"-1", b"1 2", b"0x10", b"99999999999999999999", b"9" * 100, b" \n"):
        fails(errno.EINVAL, path.write_bytes, bad)
    assert path.read_text() == f"{value}\n"
    if was == "0\n":  # of bytes: the ratio holds
        path, was = path.with_name(path.name.replace("bytes", "ratio")), "20\n"
    path.write_text(was)
    assert path.read_text() == was


def test_tunables_have_their_effect(proc: Path) -> None:
    vm = proc / "sys/vm"
    (vm / "dirty_background_ratio").write_text("10")
    (vm / "dirty_ratio").write_text("20")
    limit = numbers(proc / "vmstat")["nr_dirty_threshold"]
    (vm / "dirty_bytes").write_text("1048576")
    assert (vm / "dirty_ratio").read_text() == "0\n"
    assert numbers(proc / "vmstat")["nr_dirty_threshold"] == 256
    (vm / "dirty_ratio").write_text("20\n")
    assert (vm / "dirty_bytes").read_text() == "0\n"
    assert abs(numbers(proc / "vmstat")["nr_dirty_threshold"] - limit) < 200
    least = (vm / "min_free_kbytes").read_text()
    (vm / "min_free_kbytes").write_text("2048")
    assert re.search(r"^ +min +512$", (proc / "zoneinfo").read_text(), re.MULTILINE)
    fails(errno.EINVAL, (vm / "min_free_kbytes").write_text, "30000")
    fails(errno.EINVAL, (vm / "min_free_kbytes").write_text, "3")
    (vm / "min_free_kbytes").write_text(least)


def test_caches_are_dropped(root: Path, proc: Path) -> None:
    for number in range(300):
        (root / f"name-{number}").touch()
    data = (root / "file").read_bytes()
    with open(root / "file", "rb") as file:
        os.fsync(file.fileno())
    cached = numbers(proc / "meminfo")["Cached"]
    assert cached >= 3 << 10
    (proc / "sys/vm/drop_caches").write_text("3")
    assert (proc / "sys/vm/drop_caches").read_text() == "3\n"
    assert numbers(proc / "meminfo")["Cached"] < cached // 2
    counts = numbers(proc / "vmstat")
    assert counts["drop_pagecache"] == counts["drop_slab"] == 1
    assert (root / "file").read_bytes() == data
    for number in range(300):
        os.unlink(root / f"name-{number}")


def test_nothing_can_be_made_removed_or_changed(root: Path, proc: Path) -> None:
    fails(errno.EPERM, (proc / "new").write_text, "x")
    fails(errno.EPERM, os.mkdir, proc / "new")
    fails(errno.EPERM, os.symlink, "x", proc / "new")
    fails(errno.EPERM, os.unlink, proc / "meminfo")
    fails(errno.EPERM, os.rmdir, proc / "pressure")
    fails(errno.EPERM, os.rename, proc / "meminfo", proc / "new")
    fails(errno.EPERM, os.rename, root / "file", proc / "new")
    fails(errno.EPERM, os.link, root / "file", proc / "new")
    fails(errno.EPERM, os.chmod, proc / "meminfo", 0o777)
    fails(errno.EPERM, os.chown, proc / "meminfo", 1, 1)
    fails(errno.EPERM, os.setxattr, proc / "meminfo", "user.x", b"1")
    fails(errno.EPERM, (proc / "meminfo").write_text, "x")
    # its name in the root is taken
    fails(errno.EEXIST, os.mkdir, proc)
    fails(errno.EBUSY, os.rmdir, proc)
    fails(errno.EBUSY, os.rename, proc, root / "elsewhere")
    (root / "dir").mkdir()
    fails(errno.EBUSY, os.rename, root / "dir", proc)
    os.rmdir(root / "dir")
    assert (root / "file").stat().st_size == 3 << 20


@support.needs_root
def test_ordinary_users_read_and_do_not_write(proc: Path) -> None:
    program = f"""
import errno, os
os.setgid({NOBODY}); os.setuid({NOBODY})
assert b"MemTotal" in open({str(proc / "meminfo")!r}, "rb").read()
assert open({str(proc / "sys/vm/dirty_ratio")!r}).read() == "20\\n"
try:
    open({str(proc / "sys/vm/dirty_ratio")!r}, "w")
except PermissionError as error:
    assert error.errno == errno.EACCES
else:
    raise SystemExit("written")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_off_named_and_in_the_way(scratch: Path) -> None:
    """No directory; another name; and an image that has the name keeps what is its own."""
    image = support.mkfs(scratch)
    where = scratch / "mnt"
    with support.our_mount(image, where, memory="16M", options="procdir=off") as mount:
        assert not (mount.path / ".nofail").exists()
        (mount.path / ".nofail").write_text("mine")
    with support.our_mount(image, where, memory="16M", options="procdir=x") as mount:
        assert (mount.path / ".nofail").read_text() == "mine"
        assert (mount.path / "x" / "meminfo").read_text().startswith("MemTotal:")
    said = ("has a .nofail of its own",)
    with support.our_mount(image, where, memory="16M", complaints=said) as mount:
        assert (mount.path / ".nofail").read_text() == "mine"
        os.unlink(mount.path / ".nofail")
        assert not (mount.path / ".nofail").exists()
    support.assert_clean(image)
    for bad in ("procdir=", "procdir=a/b", "procdir=.."):
        assert support.nofailfs("mount", image, where, "-o", bad).returncode == 1
