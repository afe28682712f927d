"""Mounts with lanes: all of it through them, and every way in which a mount or a client can end.

What lanes answer is compared byte for byte elsewhere (fsx, mixed runs). Here nothing hangs, nothing
is answered twice, nothing is lost, and buffers that run out slow the readers down and no more.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from fs import file, mount, runfile
from fs import session as sessions
from fs import stat as figures
from fs.front import lanestate as S
from fs.front import options as grammar
from fs.front import queues
from fs.session import Session
from tests import support
from tests.conftest import AllowLogs
from tests.mount.test_handlers import LOG, Ready, away, error_of, hold_writes, served
from tools.targets import OurMount, run

pytestmark = pytest.mark.usefixtures("transport")

LANES = "lanes=2"
CONNECTIONS = Path("/sys/fs/fuse/connections")
WAIT_S = 60.0

# Reads, writes and stats until it is told to stop; what it reads must be what it wrote.
CLIENT = """
import os, random, sys
path, seed = os.path.basename(sys.argv[1]), int(sys.argv[2])
random.seed(seed)
os.chdir(os.path.dirname(sys.argv[1]))  # a lazy umount takes the path away, not the directory
fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
size = 1 << 20
shadow = bytearray(size)
os.pwrite(fd, shadow, 0)
print("ready", flush=True)
while True:
    # Of a transfer in several requests a cut may leave the rest out: stay within one.
    at, length = random.randrange(size), random.randrange(1, 120_000)
    if random.random() < 0.5:
        data = random.randbytes(min(length, size - at))
        os.pwrite(fd, data, at)
        shadow[at:at + len(data)] = data
    elif os.pread(fd, length, at) != shadow[at:at + length]:
        print("DIFFERENT", flush=True)
        sys.exit(9)
    os.stat(path)
    try:
        os.stat(path + ".none")
    except FileNotFoundError:
        pass
"""


def client(path: Path, seed: int) -> subprocess.Popen[str]:
    """A program that uses the mount until it is killed or fails."""
    words = [sys.executable, "-c", CLIENT, str(path), str(seed)]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/"
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    return process


@contextmanager
def clients(where: Path, count: int = 3) -> Iterator[list[subprocess.Popen[str]]]:
    """Several of them, each with its own file; killed at the end, and none saw a difference."""
    busy = [client(where / f"client{number}", number) for number in range(count)]
    try:
        yield busy
    finally:
        for process in busy:
            process.kill()
        said = [process.communicate(timeout=WAIT_S)[0] for process in busy]
    assert not any("DIFFERENT" in text for text in said)


def opcodes(mount: OurMount) -> dict[str, Any]:
    found: dict[str, Any] = figures.read(str(mount.path))["opcodes"]
    return found


def test_lanes_answer_what_is_cached(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", options=LANES) as mount:
        path = mount.path / "file"
        data = os.urandom(300_000)
        with open(path, "wb", buffering=0) as file:
            file.write(data[:1000])
            for at in range(1000, len(data), 10_007):
                file.write(data[at : at + 10_007])
        for _ in range(20):
            assert path.read_bytes() == data
            assert os.statvfs(path).f_bsize == 4096
            with pytest.raises(OSError, match="No data"):
                os.getxattr(path, "user.none")
        assert path.stat().st_size == len(data)
        found = opcodes(mount)
        for name, least in (("read", 20), ("write", 20), ("getxattr", 10), ("release", 20)):
            assert found[name].get("answered", 0) >= least, (name, found)
        assert found["release"].get("forwarded", 0) == 0
        assert sum(found["read"]["lane_ns"].values()) == found["read"]["answered"]
        text = support.nofailfs("stat", mount.path).stdout
        assert "read" in text
        assert json.loads(support.nofailfs("stat", "--json", mount.path).stdout)["lanes"] >= 2
        shown = support.nofailfs("info", mount.path).stdout
        assert "parallel_dirops" in shown
        assert "direct_io_allow_mmap" in shown
    support.assert_clean(image)


def test_without_lanes_there_are_figures_too(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", options="lanes=0") as mount:
        (mount.path / "file").write_bytes(b"x")
        found = figures.read(str(mount.path))
        assert found["lanes"] == 0
        assert found["handled"] > 0
        assert "fuse" not in support.nofailfs("info", mount.path).stdout


def test_clients_that_are_killed_leave_nothing_behind(scratch: Path) -> None:
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", "16M", options=LANES) as mount:
        for turn in range(6):
            with clients(mount.path) as busy:
                time.sleep(0.2 + 0.05 * turn)
                assert all(process.poll() is None for process in busy)
        support.wait_until(
            lambda: bool(figures.read(str(mount.path))["running"] <= 1), "requests still run"
        )
        found = figures.read(str(mount.path))
        free, slots = found["slots"]
        assert slots - free <= found["lanes"] + 1
        assert found["refused_replies"] == 0
    support.assert_clean(image)


@support.needs_root
def test_umount_waits_for_nobody_but_is_refused_under_load(scratch: Path) -> None:
    """EBUSY while clients have files open; when they are gone it works and all is written."""
    image = support.mkfs(scratch)
    with support.our_mount(image, scratch / "mnt", "16M", options=LANES) as mount:
        with clients(mount.path):
            time.sleep(0.3)
            done = subprocess.run(["umount", mount.path], capture_output=True, text=True)
            assert done.returncode != 0
            assert "busy" in done.stderr
    support.assert_clean(image)


@contextmanager
def daemon(image: Path, where: Path, *words: str) -> Iterator[int]:
    """A mount in the background; yields the daemon's number, and it must end by itself."""
    where.mkdir(exist_ok=True)
    log = str(image.with_suffix(".log"))
    done = support.nofailfs(
        *("mount", "--memory", "16M", "--log", log, "-o", LANES, *words, image, where)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = runfile.of_mountpoint(str(where))
    assert record is not None
    process = os.pidfd_open(record.pid)
    yield record.pid
    support.wait_for_end(process, WAIT_S * 2)
    assert not os.path.ismount(where)


@support.needs_root
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cuts_busy_clients_off(scratch: Path, number: signal.Signals) -> None:
    image, where = support.mkfs(scratch), scratch / "mnt"
    with daemon(image, where) as pid, clients(where) as busy:
        time.sleep(0.3)
        os.kill(pid, number)
        for process in busy:
            process.wait(WAIT_S)
    support.assert_clean(image)


@support.needs_root
@pytest.mark.parametrize("pause_ms", [0, 2, 5, 10, 30])
def test_a_second_signal_ends_at_once(scratch: Path, pause_ms: int) -> None:
    """Also while the daemon has the kernel sync, which waits for the daemon."""
    image, where = support.mkfs(scratch), scratch / "mnt"
    with daemon(image, where) as pid, clients(where):
        time.sleep(0.3)
        os.kill(pid, signal.SIGTERM)
        time.sleep(pause_ms / 1000)
        with suppress(ProcessLookupError):  # it may have come to its end in order
            os.kill(pid, signal.SIGTERM)
    record = runfile.of_mountpoint(str(where))
    assert record is not None
    assert record.exit_status in (0, 8)


@support.needs_root
def test_a_lazy_umount_ends_with_the_last_client(scratch: Path) -> None:
    image, where = support.mkfs(scratch), scratch / "mnt"
    with daemon(image, where):
        with clients(where) as busy:
            time.sleep(0.2)
            run("umount", "-l", where)
            time.sleep(0.3)
            assert all(process.poll() is None for process in busy)
    support.assert_clean(image)


@contextmanager
def a_session(image: Path, where: Path, ready: Any) -> Iterator[Session]:
    """A mount that this process is to serve."""
    where.mkdir(exist_ok=True)
    options = grammar.resolve(grammar.parse([LANES, "memory=16M"]), str(image), str(where))
    options = mount.check(options)
    record = runfile.Record(os.getpid(), 0, str(image), f"test-{os.getpid()}", str(where), "")
    keeper, device = runfile.Keeper(record, LOG), mount.open_device(options)
    try:
        yield Session(options, device, ready, keeper, LOG)
    finally:
        runfile.remove(record)


@asynccontextmanager
async def serving(image: Path, where: Path, nursery: trio.Nursery) -> AsyncIterator[Session]:
    """A mount that is served by this process and ends as the test has it end."""
    ready: Any = Ready()
    with a_session(image, where, ready) as session:
        nursery.start_soon(session.run)
        await ready.event.wait()
        yield session


@contextmanager
def fusectl(directory: Path) -> Iterator[Path]:
    directory.mkdir()
    run("mount", "-t", "fusectl", "none", directory)
    try:
        yield directory
    finally:
        run("umount", "-l", directory)


@support.needs_root
def test_an_abort_ends_the_daemon_in_order(scratch: Path) -> None:
    """The connection is cut while requests run: clients get errors, the volume is written."""
    image, where = support.mkfs(scratch), scratch / "mnt"
    with fusectl(scratch / "ctl") as control, daemon(image, where):
        minor = os.minor(os.stat(where).st_dev)
        with clients(where) as busy:
            time.sleep(0.3)
            (control / str(minor) / "abort").write_text("1")
            for process in busy:
                process.wait(WAIT_S)
        run("umount", "-l", where)
    support.assert_clean(image)


@support.needs_root
async def test_buffers_that_run_out_slow_and_lose_nothing(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More large writes wait than there are payloads; then they go on, all of them."""
    image, where, waiting = support.mkfs(scratch), scratch / "mnt", 40
    async with served(image, where, LANES) as session:
        assert session._lanes is not None
        front = session._lanes.front
        for number in range(waiting):
            await away((where / f"file{number}").touch)
        gate, inside = hold_writes(monkeypatch)
        limiter = trio.CapacityLimiter(waiting)
        async with trio.open_nursery() as nursery:
            for number in range(waiting):
                data = bytes([number]) * front.max_write
                put = (where / f"file{number}").write_bytes
                nursery.start_soon(
                    lambda put=put, data=data: trio.to_thread.run_sync(put, data, limiter=limiter)
                )
            with trio.fail_after(WAIT_S):
                places = front.queues.places  # of one queue: all writers may be on one processor
                while len(inside) < places if places else front.free_payload_count:
                    await trio.sleep(0.01)
            await trio.sleep(0.1)
            assert 0 < len(inside) < waiting, "what cannot be held stays in the kernel's queue"
            gate.set()
        for number in range(waiting):
            data = await away((where / f"file{number}").read_bytes)
            assert data == bytes([number]) * front.max_write, number
        assert front.free_payload_count >= front.nr_payloads - front.nr_lanes
        assert not front.queues.entries[:, S.N_UNIQUE].any()
    support.assert_clean(image)


@support.needs_root
async def test_a_bug_behind_a_parked_request_is_eio_and_a_shutdown(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, allow_logs: AllowLogs
) -> None:
    """And from then on lanes answer nothing but what gives back."""
    for pattern in ("unexpected error in", "Shutting down", "unmounted after a shutdown"):
        allow_logs(pattern)
    image, where = support.mkfs(scratch), scratch / "mnt"

    async def broken(*args: Any, **named: Any) -> None:
        raise ZeroDivisionError("planted")

    async with served(image, where, LANES) as session:
        path = where / "file"
        await away(lambda: path.write_bytes(b"contents"))
        handle = await away(lambda: os.open(path, os.O_RDWR))
        assert await away(lambda: os.pread(handle, 100, 0)) == b"contents"
        with monkeypatch.context() as planted:
            planted.setattr(file, "write", broken)
            fd = await away(lambda: os.open(path, os.O_RDWR | os.O_DSYNC))
            assert await error_of(lambda: os.pwrite(fd, b"x", 0)) == errno.EIO
        assert await error_of(lambda: os.pread(handle, 100, 0)) == errno.EIO
        assert await error_of(lambda: os.statvfs(where)) == errno.EIO
        await away(lambda: os.close(handle))
        await away(lambda: os.close(fd))
    assert session.status == 2


@support.needs_root
async def test_a_bug_behind_the_ring_is_a_shutdown_and_no_end(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, allow_logs: AllowLogs
) -> None:
    """What lanes hand over and nobody waits for: the others of the same turn are still served."""
    for pattern in ("unexpected error in the ring", "Shutting down", "unmounted after a shutdown"):
        allow_logs(pattern)
    image, where = support.mkfs(scratch), scratch / "mnt"

    def broken(*args: Any) -> None:
        raise ZeroDivisionError("planted")

    async with served(image, where, LANES) as session:
        assert session._lanes is not None
        monkeypatch.setattr(session._lanes.front.ops, "forgotten", broken)
        for number in range(20):
            await away((where / f"file{number}").touch)
        await away(lambda: Path("/proc/sys/vm/drop_caches").write_text("2"))
        with trio.fail_after(WAIT_S):
            while not await error_of(lambda: os.statvfs(where)):
                await trio.sleep(0.01)
        assert await error_of(lambda: os.statvfs(where)) == errno.EIO
    assert session.status == 2


@support.needs_root
async def test_a_parked_request_that_never_ends_is_given_up(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, allow_logs: AllowLogs
) -> None:
    """The end waits for it, then cancels it; its client gets an error."""
    for pattern in ("cut off", "given up: write", "still writing back", "requests run"):
        allow_logs(pattern)
    monkeypatch.setattr(sessions, "DRAIN_SECONDS", 0.5)
    image, where = support.mkfs(scratch), scratch / "mnt"
    inside = trio.Event()

    async def hangs(*args: Any, **named: Any) -> int:
        inside.set()
        await trio.sleep_forever()
        raise AssertionError

    results: list[int] = []
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            async with serving(image, where, nursery) as session:
                handle = await away(lambda: os.open(where / "file", os.O_RDWR | os.O_CREAT))
                monkeypatch.setattr(file, "write", hangs)

                async def write() -> None:
                    results.append(await error_of(lambda: os.pwrite(handle, b"x", 0)))

                nursery.start_soon(write)
                await inside.wait()
                await session._unmount()
    assert results == [errno.ECONNABORTED]
    assert await error_of(lambda: os.close(handle)) in (0, errno.ENOTCONN)
    assert session.status == 0
    support.assert_clean(image)


@support.needs_root
async def test_a_ring_that_cannot_be_opened_ends_the_mount(
    scratch: Path, monkeypatch: pytest.MonkeyPatch, allow_logs: AllowLogs, uring: None
) -> None:
    """The kernel waits for all queues, so nobody would ever be answered."""
    for pattern in ("lane for queue", "could not read requests"):
        allow_logs(pattern)

    def fails(*args: Any) -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(queues.Queues, "open_ring", fails)
    image, where = support.mkfs(scratch), scratch / "mnt"
    with trio.fail_after(WAIT_S), a_session(image, where, Ready()) as session:
        await session.run()
    assert session.status == 2
    assert "Cannot allocate memory" in session.message
    assert not os.path.ismount(where)
    support.assert_clean(image)


def descriptors() -> list[str]:
    """What is open here that a mount with lanes opens, besides the image."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # the listing's own
    kinds = ("socket:" if link.startswith("socket:") else link for link in found)
    ours = ("socket:", "anon_inode:", "/dev/fuse")
    return sorted(kind for kind in kinds if kind.startswith(ours))


@support.needs_root
async def test_threads_and_descriptors_are_gone_afterwards(scratch: Path) -> None:
    image, where = support.mkfs(scratch), scratch / "mnt"
    async with served(image, where, LANES):
        pass
    before = descriptors()
    for _ in range(2):
        async with served(image, where, LANES) as session:
            await away(lambda: (where / "file").write_bytes(b"x"))
        assert session.status == 0
    lanes = [t.name for t in threading.enumerate() if t.name.startswith(("lane", "pump"))]
    assert not lanes
    assert descriptors() == before
    support.assert_clean(image)
