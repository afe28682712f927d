"""Going into the background: the parent hears of success, failure and death."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable

import pytest

from fs import daemon, screen
from fs.errors import UserError


class Recorder(screen.Lines):
    """A screen that keeps what it was told."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        super().__init__(self.stream)
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def start(work: Callable[[daemon.Starting], int]) -> Recorder:
    """Start a child that does `work`; the child is reaped by the fixture."""
    seen = Recorder()
    try:
        assert daemon.start(work, seen) == 0
    finally:
        assert seen.is_closed
    return seen


@pytest.fixture(autouse=True)
def _reap():
    """Every child ends within the test."""
    yield
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def test_the_parent_returns_when_the_child_is_ready() -> None:
    gate_in, gate_out = os.pipe()

    def work(reporter: daemon.Starting) -> int:
        reporter.note("hello")
        reporter.progress("steps", 1, 2)
        reporter.ready()
        os.read(gate_in, 1)  # goes on after the parent returned
        return 0

    seen = start(work)
    assert seen.stream.getvalue() == "nofailfs: hello\nnofailfs: steps: 1 of 2\n"
    os.write(gate_out, b"x")
    os.close(gate_in)
    os.close(gate_out)


def test_a_user_error_crosses_with_its_exit_code() -> None:
    def work(reporter: daemon.Starting) -> int:
        raise UserError("no such thing", 32)

    with pytest.raises(UserError, match="no such thing") as failed:
        start(work)
    assert failed.value.exit_code == 32


def test_a_bug_crosses_with_its_traceback() -> None:
    def work(reporter: daemon.Starting) -> int:
        raise KeyError("oops")

    with pytest.raises(UserError, match="(?s)internal error: KeyError.*Traceback") as failed:
        start(work)
    assert failed.value.exit_code == daemon.EXIT_BUG


def test_a_death_is_noticed() -> None:
    def work(reporter: daemon.Starting) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    with pytest.raises(UserError, match="killed by SIGKILL before the mount was ready"):
        start(work)


def test_an_early_end_is_noticed() -> None:
    with pytest.raises(UserError, match="ended with status 3 before the mount was ready"):
        start(lambda reporter: 3)


def test_silence_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "SILENCE_SECONDS", 0.05)

    def work(reporter: daemon.Starting) -> int:
        signal.pause()
        return 0

    with pytest.raises(UserError, match="said nothing"):
        start(work)


def test_plain_lines_are_few() -> None:
    stream = io.StringIO()
    lines = screen.Lines(stream)
    for done in range(1000):
        lines.progress("work", done, 1000)
    assert len(stream.getvalue().splitlines()) == 10
