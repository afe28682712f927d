"""Kernels compiled before anybody waits for them.

Compiling takes seconds and leaves some hundred megabytes of compiler in the process that does it,
so it happens in a process of its own (`python -m fs.warmup`), which fills the cache on disk and
ends; the daemon then only loads. A stamp in the cache directory, named by the hash of the
kernels' sources, says that this was done.

Progress crosses the pipe as lines of JSON. One process compiles at a time: the registry has a
lock for that.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from collections import deque
from pathlib import Path

from fs.screen import Reporter, Silent

ROOMS = ("alloc", "writeback", "fs")
LANES = "fs.front."  # where all that only lanes run is
WHAT = "compiling kernels (first mount only)"
STDERR_LINES_KEPT = 20


def import_kernels() -> None:
    """Import every module that may hold kernels, so that all are in the registry."""
    for room in ROOMS:
        package = importlib.import_module(room)
        for module in pkgutil.walk_packages(package.__path__, f"{room}."):
            if not module.name.endswith(("__main__", ".warmup")):
                importlib.import_module(module.name)


def stamp() -> Path:
    """The file that says that the cache holds all kernels of these sources."""
    from alloc import jit

    return jit.cache_dir() / f"warm-{jit._hash_sources()}"


def compile_here(reporter: Reporter) -> int:
    """Compile every kernel in this process; returns how many there are."""
    from alloc import jit

    import_kernels()
    count = jit.warm(lambda done, total: reporter.progress(WHAT, done, total))
    if not jit.DISABLED:
        stamp().touch()
    return count


def _compile_elsewhere(reporter: Reporter) -> None:
    root = str(Path(__file__).resolve().parent.parent)
    env = dict(os.environ)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (root, env.get("PYTHONPATH", ""))))
    tail: deque[str] = deque(maxlen=STDERR_LINES_KEPT)
    command = [sys.executable, "-m", "fs.warmup"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("{"):
                reporter.progress(*json.loads(line)["progress"])
            else:
                tail.append(line)
    if child.returncode != 0:
        raise RuntimeError(f"the kernels do not compile:\n{''.join(tail)}")


def warm(reporter: Reporter | None = None) -> None:
    """Have every kernel compiled and its module imported.

    Raises RuntimeError if a kernel does not compile: a bug.
    """
    from alloc import jit

    if not jit.DISABLED and not stamp().exists():
        _compile_elsewhere(reporter or Silent())
    import_kernels()


def load(*, lanes: bool) -> int:
    """Load every compiled kernel into this process; returns how many there are.

    Without lanes theirs, the largest of all, would only take memory: they stay on disk.
    Loading is about 5 ms a kernel, and a kernel that is called earlier loads itself. So a mount
    does not wait for this: it runs in a thread when the mount answers already.
    """
    from alloc import jit

    return jit.load(without="" if lanes else LANES)


class _JsonLines:
    """A reporter that writes what `_compile_elsewhere` reads."""

    def progress(self, what: str, done: int, total: int) -> None:
        sys.stdout.write(json.dumps({"progress": [what, done, total]}) + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Nothing: only progress crosses."""


if __name__ == "__main__":
    compile_here(_JsonLines())
