"""The small parts of the front: the guard, access times, file handles, device numbers."""

from __future__ import annotations

import errno
import logging
import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio

from alloc.pressure import Pressure
from fs.errors import Corrupt, ShutDown
from fs.front import attrs, guard, handles
from fs.front.atime import DAY_NS, is_due
from tests.conftest import AllowLogs

LOG = logging.getLogger("nofailfs")


class StubVolume:
    """As much of a volume as the guard looks at."""

    def __init__(self) -> None:
        self.shut_down = False
        self.reason = ""
        self.arena = SimpleNamespace(pressure=Pressure())
        self.freezer = SimpleNamespace(writer=nullcontext)

    def shutdown(self, reason: str) -> None:
        self.shut_down, self.reason = True, reason


def handlers(raises: BaseException | None) -> Any:
    """Guarded handlers that all raise the same thing."""

    class Plain(pyfuse3.Operations):
        gate = guard.Gate(StubVolume(), LOG)  # type: ignore[arg-type]

    async def handler(self: Any, *args: Any) -> str:
        if raises is not None:
            raise raises
        return "answer"

    for name in guard.handler_names():
        setattr(Plain, name, handler)
    return guard.guarded(Plain)()


async def reply(ops: Any, name: str) -> Any:
    """What the kernel would be told: an errno, or the answer."""
    try:
        return await getattr(ops, name)(7)
    except pyfuse3.FUSEError as error:
        return error.errno


@pytest.mark.parametrize("name", guard.handler_names())
async def test_unexpected_exceptions_become_eio_and_a_shutdown(
    name: str, allow_logs: AllowLogs
) -> None:
    allow_logs("unexpected error in")
    ops = handlers(KeyError("oops"))
    assert await reply(ops, name) == (None if name == "forget" else errno.EIO)
    assert ops.gate.vol.shut_down
    assert ops.gate.vol.reason == f"unexpected KeyError in {name}: 'oops'"
    assert not ops.gate.running
    expected = None if name == "forget" else errno.EIO
    assert await reply(ops, name) == expected, "and again, after the shutdown"
    assert len(allow_logs.seen) == 1, "one traceback for each place"


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (FileNotFoundError(errno.ENOENT, "gone"), errno.ENOENT),
        (Corrupt("broken"), errno.EUCLEAN),
        (ShutDown(), errno.EIO),
        (pyfuse3.FUSEError(errno.ENOSYS), errno.ENOSYS),
        (ExceptionGroup("", [ExceptionGroup("", [OSError(errno.EDQUOT, "")])]), errno.EDQUOT),
    ],
)
async def test_ordinary_failures_keep_their_errno(raised: Exception, expected: int) -> None:
    ops = handlers(raised)
    assert await reply(ops, "lookup") == expected
    assert not ops.gate.vol.shut_down


async def test_after_a_shutdown_only_releasing_works() -> None:
    ops = handlers(None)
    ops.gate.vol.shut_down = True
    for name in guard.handler_names():
        expected = "answer" if name in guard.RELEASING else errno.EIO
        assert await reply(ops, name) == expected, name


async def test_cancellation_passes_through() -> None:
    ops = handlers(None)

    async def wait(self: Any, *args: Any) -> None:
        await trio.sleep_forever()

    type(ops).read = guard._guard("read", wait)
    with trio.move_on_after(0) as scope:
        await ops.read(7)
    assert scope.cancelled_caught
    assert not ops.gate.vol.shut_down


async def test_running_requests_are_listed(autojump_clock: trio.testing.MockClock) -> None:
    ops = handlers(None)
    gate = ops.gate
    ticket = gate.enter("read", 131)
    assert gate.waiters()[0].startswith("read of inode 131 runs since")
    assert gate.waiters(least_seconds=3600) == []
    gate.leave(ticket)
    assert gate.waiters() == []


async def test_a_hung_request_is_named_once(
    autojump_clock: trio.testing.MockClock, allow_logs: AllowLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_logs("read of inode 131 runs since")
    monkeypatch.setattr(guard, "HUNG_SECONDS", 0.0)
    gate = handlers(None).gate
    gate.enter("read", 131)
    with trio.move_on_after(10 * guard.WATCH_SECONDS):
        await gate.watch()
    assert len(allow_logs.seen) == 1


@pytest.mark.parametrize(
    ("policy", "atime", "mtime", "ctime", "now", "due"),
    [
        ("relatime", 10, 10, 5, 20, True),
        ("relatime", 10, 5, 10, 20, True),
        ("relatime", 10, 5, 5, 20, False),
        ("relatime", 10, 5, 5, 10 + DAY_NS, True),
        ("strictatime", 10, 5, 5, 11, True),
        ("strictatime", 10, 5, 5, 10, False),
        ("noatime", 10, 20, 20, 30 + DAY_NS, False),
    ],
)
def test_when_an_access_time_moves(
    policy: str, atime: int, mtime: int, ctime: int, now: int, due: bool
) -> None:
    assert is_due(policy, atime, mtime, ctime, now) == due


@pytest.mark.parametrize(
    ("flags", "bits"),
    [
        (os.O_RDONLY, 0),
        (os.O_WRONLY, handles.WRITE),
        (os.O_RDWR | os.O_DSYNC, handles.WRITE | handles.DATA_SYNC),
        (os.O_RDWR | os.O_SYNC, handles.WRITE | handles.FULL_SYNC),
    ],
)
def test_a_file_handle_carries_inode_and_flags(flags: int, bits: int) -> None:
    fh = handles.pack(0xFFFFFFFF, flags)
    assert fh == bits | 0xFFFFFFFF
    assert handles.inode_handle(fh) == 0xFFFFFFFF
    assert handles.pack(7, flags, uid=1) == bits | handles.ORDINARY | 7


@pytest.mark.parametrize("number", [os.makedev(8, 1), os.makedev(259, 70000), 0])
def test_device_numbers_come_back(number: int) -> None:
    assert attrs.rdev_of(attrs.stored_rdev(number)) == number
