"""The lab: short runs of both parts, and that its eyes see what they should."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from rich.console import Console

from alloc.arena import Arena
from fs import file, mounts, runfile
from fs.mounts import Mount
from tests import support
from tools.lab import endurance, pattern, report, virtual
from tools.lab.cgroup import limited
from tools.lab.cut import Cut
from tools.lab.files import Counted, Ended, Tally
from tools.lab.loads import CELL, LOADS, Sizes, crew, run
from tools.targets import child_environment, program

SMALL = Sizes(writers=2, writer_bytes=8 * CELL, files=40, large_bytes=2 << 20, flood_files=60)


def test_patterns_tell_their_place() -> None:
    data = pattern.words(7, 4096, 8192).tobytes()
    assert pattern.difference(data, 7, 4096, 8192) == ""
    assert data[4096:] == pattern.words(7, 8192, 4096).tobytes()
    assert "8191 of 8192 bytes" in pattern.difference(data[1:], 7, 4096, 8192)
    assert "1024 wrong words, the first at 0" in pattern.difference(data, 7, 0, 8192)
    assert "1024 wrong words" in pattern.difference(data, 8, 4096, 8192)
    wrong = bytearray(data)
    wrong[5000] ^= 1
    assert "1 wrong words, the first at 9096" in pattern.difference(wrong, 7, 4096, 8192)


# -- loads on a file system made of dictionaries -----------------------------------------------


class InMemory:
    """Files in a dictionary. `flip`: names in whose content, when it is read, one bit is wrong.

    Calls named in `errors` fail every seventh time.
    """

    def __init__(self, flip: str = "nothing") -> None:
        self.names: dict[str, bytearray] = {}
        self.flip = flip
        self.errors: dict[str, int] = {}
        self.calls: defaultdict[str, int] = defaultdict(int)

    def _called(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.errors and self.calls[name] % 7 == 0:
            raise OSError(self.errors[name], name)

    async def mkdir(self, name: str) -> bool:
        self._called("mkdir")
        return True

    async def create(self, name: str) -> tuple[str, bytearray]:
        self._called("create")
        assert name not in self.names
        self.names[name] = bytearray()
        return await self.open(name)

    async def open(self, name: str) -> tuple[str, bytearray]:
        return name, self.names[name]

    async def close(self, handle: Any) -> None:
        self._called("close")

    async def write(self, handle: Any, offset: int, data: bytes) -> int:
        self._called("write")
        content = handle[1]
        content.extend(bytes(max(offset + len(data) - len(content), 0)))
        content[offset : offset + len(data)] = data
        return len(data)

    async def read(self, handle: Any, offset: int, length: int) -> bytes:
        name, content = handle
        data = content[offset : offset + length]
        if name.startswith(self.flip):
            data[len(data) // 2] ^= 1
        return bytes(data)

    async def sync(self, handle: Any) -> None:
        self._called("sync")

    async def unlink(self, name: str) -> None:
        del self.names[name]

    async def stat(self, name: str) -> int:
        return len(self.names[name]) + name.startswith(self.flip)

    async def missing(self, name: str) -> bool:
        return name not in self.names and not name.startswith(self.flip)

    async def drop_caches(self) -> None:
        self._called("drop_caches")

    async def pause(self) -> None:
        await trio.sleep(0.01)


async def all_loads(files: InMemory, seconds: float = 20.0) -> dict[str, Tally]:
    found: dict[str, Tally] = {}
    for load, number in [("plant", 0), ("plant", 1), *crew(SMALL)]:
        tally = await run(load, files, number, seconds, SMALL)
        found.setdefault(load, Tally(load)).add(tally)
    return found


async def test_loads_do_what_they_say(autojump_clock: trio.testing.MockClock) -> None:
    files = InMemory()
    found = await all_loads(files)
    assert not any(tally.wrong or tally.failures or tally.ended for tally in found.values())
    assert found["writer"].rounds >= 4, "in order and scattered"
    assert found["writer"].verified == found["writer"].rounds * SMALL.writer_bytes
    assert all(found[load].operations > 100 for load in LOADS)
    assert {name.partition("/")[0] for name in files.names} == {"storm0", "writers", "large"}


@pytest.mark.parametrize(
    ("flip", "load"),
    [("writers/1", "writer"), ("large/1", "large"), ("flood", "flood"), ("storm0/7", "storm")],
)
async def test_a_wrong_bit_is_seen(
    flip: str, load: str, autojump_clock: trio.testing.MockClock
) -> None:
    found = await all_loads(InMemory(flip))
    assert [name for name, tally in found.items() if tally.wrong] == [load]


async def test_failures_are_counted_and_what_failed_is_not_compared(
    autojump_clock: trio.testing.MockClock,
) -> None:
    files = InMemory()
    files.errors["write"] = errno.ENOMEM
    found = await all_loads(files)
    assert not any(tally.wrong for tally in found.values())
    writer = found["writer"]
    assert writer.failures["write ENOMEM"] > 0
    assert writer.verified > 0
    assert writer.unknown > 0
    assert found["large"].unknown > 0
    work = Counted(files, Tally("test"), lambda: False)
    files.errors["write"] = errno.EIO
    with pytest.raises(Ended):
        for _ in range(7):
            await work.write(await files.open("writers/0"), 0, b"x")
    assert work.tally.failures == {"write EIO": 1}


# -- the control group -------------------------------------------------------------------------


def test_a_control_group_holds_to_its_limit() -> None:
    with limited(48 << 20) as group:
        if group is None:
            pytest.skip("no control group can be made here")
        hog = [sys.executable, "-c", "bytearray(b'x') * (96 << 20)"]
        words = [*group.launcher(), *hog]
        assert subprocess.run(words, capture_output=True).returncode != 0
        assert group.oom_kills == 1
        assert 40 << 20 < group.peak <= 48 << 20
        path = group.path
    assert not path.exists()


def fake_hierarchy(where: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 2 at `where`, as far as files go: a new directory is a group and has its files."""
    mkdir = Path.mkdir

    def make_group(path: Path) -> None:
        mkdir(path)
        for name in ("memory.max", "memory.swap.max", "cgroup.procs"):
            (path / name).write_text("max")
        (path / "memory.peak").write_text("4711\n")
        (path / "memory.events").write_text("low 0\noom 3\noom_kill 2\noom_group_kill 1\n")

    (where / "cgroup.controllers").write_text("cpu io memory pids\n")
    (where / "cgroup.subtree_control").write_text("")
    table = [Mount("0:30", str(where), ("rw",), "cgroup2", "cgroup2", ("rw",))]
    monkeypatch.setattr("fs.mounts.table", lambda: table)
    monkeypatch.setattr(Path, "mkdir", make_group)
    monkeypatch.setattr(Path, "rmdir", shutil.rmtree)  # the kernel does not mind a group's files


def test_a_control_group_of_version_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hierarchy(tmp_path, monkeypatch)
    with limited(48 << 20) as group:
        assert group is not None
        assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
        assert (group.path / "memory.max").read_text() == str(48 << 20)
        assert (group.path / "memory.swap.max").read_text() == "0"
        done = subprocess.run([*group.launcher(), "sh", "-c", "echo $$"], capture_output=True)
        assert (group.path / "cgroup.procs").read_text().encode() == done.stdout
        assert (group.peak, group.oom_kills) == (4711, 2)
        (group.path / "memory.peak").unlink()
        assert group.peak is None
        path = group.path
    assert not path.exists()
    (tmp_path / "cgroup.controllers").write_text("cpu io pids\n")
    with limited(48 << 20) as group:
        assert group is None


# -- the runs ----------------------------------------------------------------------------------

SHORT = endurance.Plan(seconds=2, files=400, times_memory=1.5, writers=2, flood_files=50)


def text_of(outcomes: list[endurance.Outcome], hour: virtual.Hour | None) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    report.show(outcomes, hour, console)
    json.dumps(report.as_json(outcomes, hour))
    return console.export_text()


@pytest.mark.slow
@pytest.mark.mount
@support.needs_fuse
@support.needs_root
def test_a_short_run_under_irix_and_one_with_failures() -> None:
    irix = endurance.run(SHORT, quiet=True)
    assert irix.problems() == []
    assert irix.tallies["writer"].verified >= 2 * SHORT.sizes.writer_bytes
    assert irix.vmstat["pgalloc_normal"] > 4096, "memory was used more than once"
    rule = "inject:p=0.02,seed=3,site=PageCache._new_folio"
    failing = endurance.run(replace(SHORT, policy=rule), quiet=True)
    assert failing.problems() == []
    assert list(failing.failures) == ["reply"]
    assert list(failing.failures["reply"]) == ["order:4 fs.cache.folio:PageCache._new_folio"]
    short = {"write short", "read short"}
    assert failing.requests_failed.keys() <= {"write ENOMEM", "read ENOMEM"} | short
    assert failing.tallies["writer"].verified > 0
    assert failing.exit_status == 0
    shown = text_of([irix, failing], None)
    assert "write ENOMEM" in shown
    assert "reply" in shown
    assert "PROBLEM" not in shown
    irix.clean = False
    assert "PROBLEM xfs_repair" in text_of([irix], None)


@pytest.mark.slow
@pytest.mark.mount
@support.needs_fuse
@support.needs_root
def test_a_shutdown_ends_a_run_and_is_named() -> None:
    ended = endurance.run(replace(SHORT, policy="inject:nth=9,site=_new_record"), quiet=True)
    assert ended.problems() == []
    assert ended.failures.keys() == {"reply", "shutdown"}
    assert "transaction create was cancelled while dirty" in ended.shutdown
    assert ended.exit_status == 2
    assert ended.requests_failed["create ENOMEM"] == 1
    assert "loads" not in ended.seconds
    same = replace(ended, plan=replace(SHORT, policy="irix"))
    assert any("ended: create" in problem for problem in same.problems())
    assert any("requests failed: create ENOMEM" in problem for problem in same.problems())
    assert "shutdown 1" in text_of([ended], None)


HOUR = endurance.Plan(seconds=60, files=300, times_memory=1, flood_files=100)


def test_an_hour_in_short() -> None:
    hour = virtual.hour(HOUR, 30, quiet=True)
    assert hour.problems() == []
    assert hour.checks >= 2
    assert hour.seconds >= 60
    assert hour.tallies["writer"].verified >= 8 * HOUR.sizes.writer_bytes
    assert "waits for memory, the longest" in text_of([], hour)


def test_the_hour_sees_a_wrong_byte_and_a_broken_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    real = file.read

    async def read(*args: Any) -> bytes:
        data = bytearray(await real(*args))
        data[100] ^= 1
        return bytes(data)

    short = endurance.Plan(seconds=1, files=10, times_memory=1, flood_files=20)
    monkeypatch.setattr(file, "read", read)
    assert any("wrong words" in what for what in virtual.hour(short, 5, quiet=True).problems())
    monkeypatch.undo()

    def check(arena: Arena) -> None:
        raise AssertionError("planted")

    monkeypatch.setattr(Arena, "check", check)
    with pytest.raises(BaseException) as caught:
        virtual.hour(short, 5, quiet=True)
    assert "planted" in "".join(map(str, flat(caught.value)))


def flat(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [inner for each in error.exceptions for inner in flat(each)]
    return [error]


# -- cut off ------------------------------------------------------------------------------------


def test_a_signal_raises_once_or_is_noted() -> None:
    before = signal.getsignal(signal.SIGINT)  # whoever runs the tests may ignore it
    cut = Cut()
    with cut.listening():
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert cut.name == "SIGTERM"
    cut = Cut()
    with cut.listening(), cut.polling():
        signal.raise_signal(signal.SIGHUP)
        assert cut
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGALRM)
    assert signal.getsignal(signal.SIGINT) is before


async def test_a_load_leaves_what_it_is_at(autojump_clock: trio.testing.MockClock) -> None:
    cut = Cut(polled=True)
    async with trio.open_nursery() as nursery:

        async def signalled() -> None:
            await trio.sleep(1.005)
            cut.signal = signal.SIGTERM

        nursery.start_soon(signalled)
        tally = await run("writer", InMemory(), 0, 1000, SMALL, cut=cut)
    assert tally.ended == "cut off"
    assert 95 < tally.operations <= 102


def test_the_hour_cut_off_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = Cut(polled=True)
    check, looks = Arena.check, []

    def cut_at_the_second(arena: Arena) -> None:
        check(arena)
        looks.append(trio.current_time())
        if len(looks) == 2:
            cut.signal = signal.SIGTERM

    monkeypatch.setattr(Arena, "check", cut_at_the_second)
    hour = virtual.hour(replace(HOUR, seconds=3600), 60, quiet=True, cut=cut)
    assert hour.problems() == []
    assert hour.seconds < 120
    assert hour.vmstat["alloc_waits"] >= 0
    assert "cut off by SIGTERM" in text_of([], hour)


@pytest.mark.slow
@pytest.mark.mount
@support.needs_fuse
@support.needs_root
@pytest.mark.parametrize("stuck", [False, True])
def test_the_lab_cut_off_leaves_nothing_behind(stuck: bool, tmp_path: Path) -> None:
    """Also with a daemon that does not answer; then it is killed."""
    words = ["lab", "--policy", "irix", "--minutes", "5", "--files", "100", "--times-memory", "1"]
    environment = child_environment() | {"NOFAILFS_SCRATCH": str(tmp_path)}
    lab = subprocess.Popen(
        program(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    )
    assert lab.stderr is not None
    while "irix: loads" not in (line := lab.stderr.readline()):
        assert line, "the lab ended"
    (mnt,) = tmp_path.glob("*/mnt")
    record = runfile.of_mountpoint(str(mnt))
    assert record is not None
    daemon = record.pid
    if stuck:
        os.kill(daemon, signal.SIGSTOP)  # at once: no writer has done anything yet
    else:
        support.wait_until((mnt / "writers/0").exists, "no writer")
    lab.send_signal(signal.SIGTERM)
    out, err = lab.communicate(timeout=60)
    assert lab.returncode == (10 if stuck else 128 + signal.SIGTERM), err
    assert "cut off by SIGTERM" in out
    writes = re.search(r"writer: operations +\S +(\S+) ", out)
    assert writes is not None
    assert (writes.group(1) == "-") is stuck
    assert ("the daemon ended with -9" in out) is stuck
    assert not list(tmp_path.iterdir())
    assert not [each for each in mounts.table() if str(tmp_path) in each.mountpoint]
    assert not list(Path("/sys/fs/cgroup").rglob(f"nofailfs-lab-{lab.pid}"))
    assert not Path(f"/proc/{daemon}").exists()


def test_the_plan_is_the_issue(tmp_path: Path) -> None:
    sizes = endurance.Plan().sizes
    assert sizes.writers * sizes.writer_bytes == 64 * (16 << 20)
    assert endurance.Plan().limit == (16 + 250) << 20
    assert [load for load, _ in crew(sizes)].count("writer") == 8
