"""What a person sees while a program works: progress and notes on standard error.

On a terminal a rich progress line, elsewhere plain lines, at most one for each tenth of the work,
so that a log of a build stays readable. Results go to standard output and not through here.

`Reporter` is what working code is given. It knows nothing of terminals, so that the daemon can
be given one that writes to a pipe instead. Must stay importable without numba.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol, TextIO


class Reporter(Protocol):
    """Where working code tells how far it is."""

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total` steps of `what` are finished."""

    def note(self, text: str) -> None:
        """One line worth knowing."""


class Silent:
    """A reporter that says nothing."""

    def progress(self, what: str, done: int, total: int) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""


class Lines:
    """A reporter for pipes and files: plain lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown: tuple[str, int] = ("", -1)

    def progress(self, what: str, done: int, total: int) -> None:
        tenth = done * 10 // max(1, total)
        if (what, tenth) != self._shown:
            self._shown = (what, tenth)
            self.note(f"{what}: {done} of {total}")

    def note(self, text: str) -> None:
        self._stream.write(f"nofailfs: {text}\n")
        self._stream.flush()

    def close(self) -> None:
        """Nothing to take away."""


class Terminal:
    """A reporter for a terminal: one line that rewrites itself."""

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console

        self._console = Console(file=stream, highlight=False)
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def progress(self, what: str, done: int, total: int) -> None:
        if self._bar is None:
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
            )

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.start()
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=total)
        self._bar.update(self._tasks[what], completed=done, total=total)

    def note(self, text: str) -> None:
        self._console.print(f"nofailfs: {text}", markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the progress line away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar, self._tasks = None, {}


def open_screen(stream: TextIO | None = None) -> Lines | Terminal:
    """The reporter that suits standard error."""
    stream = stream or sys.stderr
    return Terminal(stream) if stream.isatty() else Lines(stream)
