"""One wrapper around every request handler: errors, what is running, and shutdown.

pyfuse3 ends the whole mount when a handler raises anything but FUSEError. Here an OSError becomes
its errno, a failed allocation ENOMEM, and whatever nobody expected becomes EIO, one traceback in
the log for each place it comes from, and a shut down filesystem; the daemon lives on and can be
unmounted. After a shutdown every request gives EIO, except those that only give things back.

The gate also knows which requests run, since when and on what, because a wait must be visible:
SIGUSR1 prints the list, and a watchdog names requests that run for long.
"""

from __future__ import annotations

import errno
import functools
import inspect
import itertools
import logging
import time
import traceback
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from os.path import basename
from typing import TYPE_CHECKING, Any, TypeVar

import pyfuse3
import trio

from fs import enomem
from fs.front import procdir

if TYPE_CHECKING:
    from fs.volume import Volume

# Give back what the kernel held; they work on a filesystem that was shut down.
RELEASING = frozenset(("forget", "flush", "release", "releasedir"))
# Wait while the filesystem is frozen. An ioctl knows itself what it is.
WRITING = frozenset(
    (
        *("mknod", "mkdir", "symlink", "link", "unlink", "rmdir", "rename", "create", "tmpfile"),
        *("setattr", "setxattr", "removexattr", "write", "fallocate"),
        *("copy_file_range", "copy_file_range_64"),
    )
)
SILENT = frozenset(("forget",))  # no request waits for an answer
HUNG_SECONDS = 30.0
WATCH_SECONDS = 10.0
FRAMES_SHOWN = 6
PLACES_MAX = 256  # tracebacks remembered, so that a loop of failures cannot fill memory

Handlers = TypeVar("Handlers", bound=type)


class Gate:
    """The requests of one mount that are being handled."""

    def __init__(self, vol: Volume, logger: logging.Logger) -> None:
        self.vol = vol
        self.logger = logger
        self._pressure = vol.arena.pressure
        self.running: dict[int, tuple[str, int, float, Any]] = {}
        self.handled = 0
        self.failed = 0
        self._serial = itertools.count()
        self._places: set[tuple[str, str, int]] = set()
        self._named: set[int] = set()

    def enter(self, name: str, target: int, work: Any = None) -> int:
        """A request begins, handled by the coroutine `work`; returns its ticket."""
        self._pressure.request_begins()
        ticket = next(self._serial)
        self.running[ticket] = (name, target, time.monotonic(), work)
        return ticket

    def leave(self, ticket: int) -> None:
        """The request ends."""
        del self.running[ticket]
        self._pressure.request_ends()
        self._named.discard(ticket)
        self.handled += 1

    def writing(self, name: str, *, apart: bool) -> AbstractAsyncContextManager[None]:
        """Around a request: while the filesystem is frozen, those that change it wait here.

        Reports are `apart`; they change nothing on the image.
        """
        return self.vol.freezer.writer() if name in WRITING and not apart else nullcontext()

    def broken(self, name: str, error: BaseException) -> None:
        """A handler raised what it must not: log it once for each place, shut down."""
        self.failed += 1
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = (name, last.filename, last.lineno or 0)
        if place not in self._places and len(self._places) < PLACES_MAX:
            self._places.add(place)
            self.logger.error("unexpected error in %s", name, exc_info=error)
        if not self.vol.shut_down:
            self.vol.shutdown(f"unexpected {type(error).__name__} in {name}: {error}")

    def waiters(self, least_seconds: float = 0.0) -> list[str]:
        """A line for each request that has been running for so long, oldest first.

        It ends with where the request waits, innermost first.
        """
        now = time.monotonic()
        running = sorted(self.running.values(), key=lambda request: request[2])
        return [
            f"{name} of inode {target} runs since {now - since:.1f} s: {where(work)}"
            for name, target, since, work in running
            if now - since >= least_seconds
        ]

    async def watch(self) -> None:
        """Name every request that hangs, once. Runs until cancelled."""
        while True:
            await trio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            for ticket, (name, target, since, work) in list(self.running.items()):
                if now - since >= HUNG_SECONDS and ticket not in self._named:
                    self._named.add(ticket)
                    self.logger.warning(
                        "%s of inode %d runs since %.0f s: %s",
                        name,
                        target,
                        now - since,
                        where(work),
                    )


def where(work: Any) -> str:
    """Where a suspended coroutine waits: its innermost frames, through everything it awaits."""
    frames = []
    while work is not None:
        frame = getattr(work, "cr_frame", None) or getattr(work, "gi_frame", None)
        if frame is not None:
            code = frame.f_code
            frames.append(f"{code.co_name} ({basename(code.co_filename)}:{frame.f_lineno})")
        work = getattr(work, "cr_await", None) or getattr(work, "gi_yieldfrom", None)
    return " <- ".join(frames[: -FRAMES_SHOWN - 1 : -1]) or "running"


def only_error(error: BaseException) -> BaseException:
    """The error inside groups of one, as nurseries wrap it."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def error_of(gate: Gate, name: str, error: Exception) -> int:
    """The errno that the kernel is told."""
    cause = only_error(error)
    if isinstance(cause, (pyfuse3.FUSEError, OSError)) and cause.errno:
        return int(cause.errno)
    failed = enomem.failed_allocation(error)
    if failed is not None:
        gate.vol.failures.note(enomem.REPLY, failed)
        return enomem.ERRNO
    gate.broken(name, error)
    return errno.EIO


def _guard(
    name: str, handler: Callable[..., Coroutine[Any, Any, Any]]
) -> Callable[..., Coroutine[Any, Any, Any]]:
    @functools.wraps(handler)
    async def guarded(self: Any, *args: Any) -> Any:
        gate: Gate = self.gate
        if gate.vol.shut_down and name not in RELEASING:
            raise pyfuse3.FUSEError(errno.EIO)
        target = args[0] if args and type(args[0]) is int else 0
        work = handler(self, *args)
        ticket = gate.enter(name, target, work)
        try:
            async with gate.writing(name, apart=_is_apart(name, target)):
                return await work
        except Exception as error:
            number = error_of(gate, name, error)
            if name not in SILENT:
                raise pyfuse3.FUSEError(number) from None
        finally:
            work.close()  # if it was never begun
            gate.leave(ticket)

    return guarded


def _is_apart(name: str, target: int) -> bool:
    """Whether a handler's first argument, a file handle or a node, is of a report."""
    return procdir.is_open(target) if name == "write" else procdir.owns(target)


def handler_names() -> list[str]:
    """Every request handler that pyfuse3 may call."""
    members = inspect.getmembers(pyfuse3.Operations, inspect.iscoroutinefunction)
    return [name for name, _ in members]


def guarded(cls: Handlers) -> Handlers:
    """Class decorator: wrap every handler, so that none is forgotten."""
    for name in handler_names():
        setattr(cls, name, _guard(name, getattr(cls, name)))
    return cls
