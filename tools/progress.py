"""Progress of long work, on the screen that `fs.screen` chooses: a bar or plain lines.

Loops may call `advance` as often as they like; the screen hears of it a few times a second, so
that an exerciser of 100,000 steps does not spend its time drawing. Everything goes to standard
error, so that results on standard output can be piped.
"""

from __future__ import annotations

import time
from types import TracebackType

from fs.screen import Lines, Silent, Terminal, open_screen

SHOW_EVERY_S = 0.1


class Progress:
    """Context manager that shows how far `title` has come on its way to `total` steps."""

    def __init__(self, title: str, total: int, quiet: bool = False) -> None:
        self.title = title
        self.total = total
        self.done = 0
        self._shown_at = 0.0
        self._screen: Lines | Terminal | Silent = Silent() if quiet else open_screen()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not isinstance(self._screen, Silent):
            self._screen.close()

    def advance(self, steps: int = 1) -> None:
        """Count `steps` as done."""
        self.done += steps
        now = time.monotonic()
        if now - self._shown_at >= SHOW_EVERY_S or self.done >= self.total:
            self._shown_at = now
            self._screen.progress(self.title, self.done, self.total)

    def say(self, text: str) -> None:
        """Print one whole line, above the bar if there is one."""
        self._screen.note(text)
