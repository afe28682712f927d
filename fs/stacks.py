"""SIGUSR1: the stacks of all threads, whatever the trio thread is at.

A thread of its own waits for the signal, and takes the GIL to look at the others: what they run
cannot change meanwhile. (faulthandler, in the signal's handler, does not, and a thread that calls
and returns under its eyes has it follow pointers to nowhere.) So all others must have the signal
blocked, which threads inherit; for one that has not there is a handler, which does the same when
the main thread comes to it.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNAL = signal.SIGUSR1


def of_threads() -> list[str]:
    """What each thread runs, outermost call first; its name before it."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    lines = []
    for ident, frame in sys._current_frames().items():
        lines.append(f"thread {names.get(ident, ident)}:")
        stack = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)
        lines += [f"  {f.filename}:{f.lineno} in {f.name}" for f in reversed(stack)]
    return lines


@contextmanager
def heard(tell: Callable[[list[str]], None]) -> Iterator[None]:
    """While the block lasts `tell` is called for each signal, in any thread. Main thread only."""
    ended = threading.Event()

    def listen() -> None:
        while True:
            signal.sigwait({SIGNAL})
            if ended.is_set():
                return
            tell(of_threads())

    handler = signal.signal(SIGNAL, lambda number, frame: tell(of_threads()))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {SIGNAL})
    listener = threading.Thread(target=listen, name="stacks", daemon=True)
    listener.start()
    try:
        yield
    finally:
        ended.set()
        assert listener.ident is not None
        signal.pthread_kill(listener.ident, SIGNAL)
        listener.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(SIGNAL, handler)
