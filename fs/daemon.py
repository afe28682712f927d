"""Going into the background, in the only order that can report every failure.

Fork *first*, while there is one thread: compiled kernels, trio's workers and libfuse do not
survive a fork. The child does all the work and tells the parent through a pipe how far it is, in
lines of JSON; the parent shows that, and returns when the mount answers, or with the child's
error. The pipe's end without a verdict means that the child died.

The child keeps the terminal's standard error until it is ready, so that nothing said early is
lost, and lets go of it afterwards. Must stay importable without numba.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from fs.errors import UserError
from fs.screen import Reporter

EXIT_BUG = 4
EXIT_INTERRUPTED = 8
EXIT_FAILED = 32
SILENCE_SECONDS = 300.0  # longest step without a word: mkfs or recovery of a slow device
REAP_SECONDS = 10.0


class Starting(Reporter, Protocol):
    """What a service reports while it starts."""

    def ready(self) -> None:
        """The service answers."""


class PipeReporter:
    """The child's end of the pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def _send(self, message: dict[str, Any]) -> None:
        if self._fd < 0:
            return
        line = json.dumps(message).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._fd, line) :]
        except BrokenPipeError:
            self._close()  # the parent gave up waiting; the daemon goes on

    def _close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def progress(self, what: str, done: int, total: int) -> None:
        self._send({"progress": [what, done, total]})

    def note(self, text: str) -> None:
        self._send({"note": text})

    def failed(self, message: str, exit_code: int) -> None:
        """The service did not start, and why."""
        self._send({"failed": [message, exit_code]})

    def ready(self) -> None:
        """The service answers: the parent may go, and the terminal is let go of."""
        self._send({"ready": True})
        if self._fd >= 0:
            self._close()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (1, 2):
            os.dup2(null, fd)
        os.close(null)


class ForegroundReporter:
    """The same for a service that stays in the foreground."""

    def __init__(self, screen: Any) -> None:
        self._screen = screen

    def progress(self, what: str, done: int, total: int) -> None:
        self._screen.progress(what, done, total)

    def note(self, text: str) -> None:
        self._screen.note(text)

    def ready(self) -> None:
        """Nobody waits; the progress line is taken away."""
        self._screen.close()


def _child(work: Callable[[Starting], int], fd: int) -> int:
    """Everything the child does; returns its exit status."""
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    reporter = PipeReporter(fd)
    try:
        return work(reporter)
    except UserError as error:
        reporter.failed(str(error), error.exit_code)
        return error.exit_code
    except BaseException as error:  # the parent must hear of every end
        reporter.failed(f"internal error: {error!r}\n{traceback.format_exc()}", EXIT_BUG)
        return EXIT_BUG


def start(work: Callable[[Starting], int], screen: Any) -> int:
    """Run `work` in a child process; return 0 when it reported ready.

    Raises UserError with the child's message and exit code if it did not start.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        status = EXIT_BUG
        try:
            os.close(reading)
            status = _child(work, writing)
        finally:
            os._exit(status)
    os.close(writing)
    try:
        _listen(reading, pid, screen)
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        raise UserError("interrupted before the mount was ready", EXIT_INTERRUPTED) from None
    finally:
        screen.close()
        os.close(reading)
    return 0


def _listen(reading: int, pid: int, screen: Any) -> None:
    """Show what the child says until its verdict. Raises UserError if that is bad or missing."""
    pending = b""
    while True:
        readable, _, _ = select.select([reading], [], [], SILENCE_SECONDS)
        if not readable:
            os.kill(pid, signal.SIGKILL)
            raise UserError(
                f"the daemon said nothing for {SILENCE_SECONDS:g} s and was killed; its log may "
                "say more, or run again with -f",
                EXIT_FAILED,
            )
        data = os.read(reading, 65536)
        if not data:
            raise UserError(_obituary(pid), EXIT_FAILED)
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            if _hear(json.loads(line), screen):
                return


def _hear(message: dict[str, Any], screen: Any) -> bool:
    """Act on one message; True when the child is ready."""
    if "progress" in message:
        screen.progress(*message["progress"])
    elif "note" in message:
        screen.note(message["note"])
    elif "failed" in message:
        text, exit_code = message["failed"]
        raise UserError(text, exit_code)
    return "ready" in message


def _obituary(pid: int) -> str:
    """How the child ended that closed its pipe without a word."""
    process = os.pidfd_open(pid)
    try:
        select.select([process], [], [], REAP_SECONDS)
        done, status = os.waitpid(pid, os.WNOHANG)
    finally:
        os.close(process)
    if done and os.WIFSIGNALED(status):
        name = signal.Signals(os.WTERMSIG(status)).name
        return f"the daemon was killed by {name} before the mount was ready; run again with -f"
    code = os.waitstatus_to_exitcode(status) if done else "unknown"
    return f"the daemon ended with status {code} before the mount was ready; run again with -f"
