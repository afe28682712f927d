"""Failures inside request handlers, on a real mount: replies, shutdown, and an orderly end.

The daemon runs in this process: the failures are planted into the modules that the handlers call.
Its clients are threads and child processes, because the loop of this process answers them.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fs import daemon, file, mount, namespace, runfile, tuning, xattr
from fs.front import guard
from fs.front import options as grammar
from fs.session import Session
from fs.xfs import dir as directory
from tests import support
from tests.conftest import AllowLogs

LOG = logging.getLogger("nofailfs")
WAIT_SECONDS = 60.0


class Ready:
    """A reporter that opens a gate when the mount answers."""

    def __init__(self) -> None:
        self.event = trio.Event()

    def progress(self, what: str, done: int, total: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def ready(self) -> None:
        self.event.set()


@asynccontextmanager
async def served(image: Path, where: Path, words: str = "") -> AsyncIterator[Session]:
    """A mount that is served by this process; unmounted at the end."""
    where.mkdir(exist_ok=True)
    options = grammar.resolve(grammar.parse([words, "memory=16M"]), str(image), str(where))
    options = mount.check(options)
    record = runfile.Record(os.getpid(), 0, str(image), f"test-{os.getpid()}", str(where), "")
    keeper = runfile.Keeper(record, LOG)
    ready: Any = Ready()
    device = mount.experiments(mount.open_device(options), options)
    session = Session(options, device, ready, keeper, LOG)
    try:
        with trio.fail_after(WAIT_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(session.run)
                await ready.event.wait()
                yield session
                await away(lambda: subprocess.run(["umount", where], check=True))
    finally:
        runfile.remove(record)


async def away(call: Callable[[], Any]) -> Any:
    """What a client does, off the loop that answers it."""
    return await trio.to_thread.run_sync(call, abandon_on_cancel=True)


async def error_of(call: Callable[[], Any]) -> int:
    """The errno that a client gets; 0 if its call worked."""
    try:
        await away(call)
    except OSError as error:
        return error.errno or 0
    return 0


# Where to plant, and what a client does to get there.
PLACES: dict[str, tuple[Any, str, Callable[[Path], Any]]] = {
    "lookup": (namespace, "lookup", lambda p: os.stat(p / "new")),
    "create": (namespace, "create", lambda p: (p / "new").touch()),
    "mknod": (namespace, "create", lambda p: os.mkfifo(p / "new")),
    "mkdir": (namespace, "mkdir", lambda p: (p / "new").mkdir()),
    "symlink": (namespace, "symlink", lambda p: os.symlink("x", p / "new")),
    "link": (namespace, "link", lambda p: os.link(p / "file", p / "new")),
    "unlink": (namespace, "unlink", lambda p: os.unlink(p / "file")),
    "rmdir": (namespace, "rmdir", lambda p: os.rmdir(p / "dir")),
    "rename": (namespace, "rename", lambda p: os.rename(p / "file", p / "new")),
    "readlink": (namespace, "readlink", lambda p: os.readlink(p / "link")),
    "setattr": (namespace, "setattr", lambda p: os.chmod(p / "file", 0o600)),
    "truncate": (file, "truncate", lambda p: os.truncate(p / "file", 3)),
    "read": (file, "read", lambda p: (p / "file").read_bytes()),
    "write": (file, "write", lambda p: (p / "file").write_bytes(b"y")),
    "readdir": (directory, "read", os.listdir),
    "setxattr": (xattr, "set", lambda p: os.setxattr(p / "file", "user.b", b"1")),
    "getxattr": (xattr, "get", lambda p: os.getxattr(p / "file", "user.a")),
    "listxattr": (xattr, "names", lambda p: os.listxattr(p / "file")),
    "removexattr": (xattr, "remove", lambda p: os.removexattr(p / "file", "user.a")),
}


def furnish(path: Path) -> None:
    """What the clients of PLACES need."""
    (path / "file").write_bytes(b"contents")
    os.setxattr(path / "file", "user.a", b"1")
    (path / "dir").mkdir()
    os.symlink("file", path / "link")


@support.needs_root
@pytest.mark.parametrize("place", PLACES.keys())
async def test_an_exception_becomes_eio_and_a_shutdown(
    place: str, scratch: Path, allow_logs: AllowLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pattern in ("unexpected error in", "Shutting down", "unmounted after a shutdown"):
        allow_logs(pattern)
    image, where = support.mkfs(scratch), scratch / "mnt"
    module, name, client = PLACES[place]

    async def broken(*args: Any, **named: Any) -> None:
        raise ZeroDivisionError(place)

    async with served(image, where, "lanes=0") as session:
        await away(lambda: furnish(where))
        with monkeypatch.context() as planted:
            planted.setattr(module, name, broken)
            assert await error_of(lambda: client(where)) == errno.EIO
        assert await error_of(lambda: os.statvfs(where)) == errno.EIO, "and from then on"
        assert await error_of(lambda: (where / "other").touch()) == errno.EIO
    assert session.status == 2
    assert "ZeroDivisionError" in session.message
    assert not os.path.ismount(where)


@support.needs_root
async def test_a_bug_in_the_background_is_a_shutdown(
    scratch: Path, allow_logs: AllowLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for pattern in ("background task failed", "Shutting down", "unmounted after a shutdown"):
        allow_logs(pattern)
    image, where = support.mkfs(scratch), scratch / "mnt"

    async def broken(*args: Any) -> None:
        raise ZeroDivisionError("planted")

    async with served(image, where) as session:
        await away(lambda: furnish(where))
        monkeypatch.setattr(namespace, "inactivate", broken)
        await away(lambda: (where / "file").unlink())
        assert session._vol is not None
        with trio.fail_after(WAIT_SECONDS):
            while not session._vol.shut_down:
                await trio.sleep(0.01)
        assert await error_of(lambda: os.listdir(where)) == errno.EIO
    assert session.status == 2
    assert not os.path.ismount(where)


@support.needs_root
async def test_ordinary_errors_shut_nothing_down(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, where = support.mkfs(scratch), scratch / "mnt"

    async def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "planted")

    async with served(image, where) as session:
        await away(lambda: furnish(where))
        with monkeypatch.context() as planted:
            planted.setattr(namespace, "mkdir", full)
            assert await error_of(lambda: (where / "new").mkdir()) == errno.ENOSPC
        assert await error_of(lambda: (where / "new").mkdir()) == 0
    assert session.status == 0
    support.assert_clean(image)


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> tuple[trio.Event, list[int]]:
    """From now on writes wait for the event; the list has an item for each that has come."""
    gate, inside = trio.Event(), []
    write = file.write

    async def slow(*args: Any, **named: Any) -> int:
        inside.append(1)
        await gate.wait()
        return await write(*args, **named)

    monkeypatch.setattr(file, "write", slow)
    return gate, inside


@support.needs_root
async def test_many_waiting_requests_do_not_starve_the_others(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two hundred writers that wait, and a stat beside them: pyfuse3 alone stops at 99."""
    if tuning.transport() == "uring":
        pytest.skip("a queue has a few places only (docs/lane.md)")
    image, where, waiting = support.mkfs(scratch), scratch / "mnt", 200
    async with served(image, where):
        await away(lambda: (where / "file").touch())
        gate, inside = hold_writes(monkeypatch)
        limiter = trio.CapacityLimiter(waiting)
        async with trio.open_nursery() as nursery:
            for number in range(waiting):
                target = where / f"file{number}"
                put = target.write_bytes
                nursery.start_soon(
                    lambda put=put: trio.to_thread.run_sync(put, b"x", limiter=limiter)
                )
            while len(inside) < waiting:
                await trio.sleep(0.01)
            assert await error_of(lambda: os.stat(where / "file")) == 0
            gate.set()
        assert len(await away(lambda: os.listdir(where))) == waiting + 1
    support.assert_clean(image)


@support.needs_root
async def test_lookup_counts_come_back_to_nothing(scratch: Path) -> None:
    """What the kernel forgets is forgotten here; what it keeps is dropped at the end."""
    image, where = support.mkfs(scratch), scratch / "mnt"
    names = [f"file{number}" for number in range(300)]
    async with served(image, where) as session:
        assert session._vol is not None
        inodes = session._vol.inodes

        def known() -> int:
            return sum(int(inodes.fields["nlookup"][h]) for h in inodes.handles())

        def use() -> None:
            for name in names:
                (where / name).touch()
            assert len([entry.stat() for entry in os.scandir(where)]) == len(names)
            assert len(os.listdir(where)) == len(names)

        await away(use)
        assert known() >= len(names)
        Path("/proc/sys/vm/drop_caches").write_text("2\n")
        with trio.fail_after(WAIT_SECONDS):
            while known():
                await trio.sleep(0.01)
        assert await error_of(lambda: (where / names[0]).unlink()) == 0
        await away(use)
    support.assert_clean(image)


def test_every_handler_is_covered() -> None:
    """The places above, and the handlers that tests/fs/test_front.py breaks without a mount."""
    indirect = {"access", "flush", "forget", "fsync", "fsyncdir", "getattr", "open", "opendir"}
    indirect |= {"poll", "release", "releasedir", "statfs"}
    assert set(guard.handler_names()) == (set(PLACES) - {"truncate"}) | indirect
    assert daemon.EXIT_BUG == 4
