"""A control group with a limit of memory, of version 2 or 1, to hold a daemon to its promise.

What is over the limit and cannot be reclaimed ends in the kernel's OOM killer, and swap is no way
around it, so a run that gets through has shown the bound. The daemon enters the group before it
runs its first instruction. The image's pages are the charge of whoever touched them first, and page
cache of files is reclaimable, so neither counts against the daemon.

Making a group needs root and a hierarchy that can be written; `limited` yields None where there is
none, and the peak resident size is then the only witness.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fs import mounts

REMOVE_S = 5.0  # the kernel needs a moment to see that a group is empty


@dataclass(frozen=True)
class Names:
    """What a version calls its files."""

    limit: str
    peak: str  # version 2 has had it since Linux 5.19
    events: str  # with a line `oom_kill`
    swap: str  # where the kernel counts swap
    swap_of_limit: int  # what goes there, as a multiple of the limit


VERSIONS = {
    "cgroup2": Names("memory.max", "memory.peak", "memory.events", "memory.swap.max", 0),
    "cgroup": Names(
        "memory.limit_in_bytes",
        "memory.max_usage_in_bytes",
        "memory.oom_control",
        "memory.memsw.limit_in_bytes",
        1,
    ),
}


@dataclass
class Cgroup:
    """One group; `limit` is bytes."""

    path: Path
    names: Names
    limit: int

    def launcher(self) -> list[str]:
        """Words before a command line that make it run in the group from its beginning."""
        return ["sh", "-c", f'echo $$ >"{self.path}/cgroup.procs" && exec "$@"', "sh"]

    @property
    def peak(self) -> int | None:
        """The most bytes charged at a time, reclaimable page cache included; None: unknown."""
        path = self.path / self.names.peak
        return int(path.read_text()) if path.exists() else None

    @property
    def oom_kills(self) -> int:
        """Processes that the kernel killed for want of memory."""
        text = (self.path / self.names.events).read_text()
        found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
        return int(found.group(1)) if found else 0


def _hierarchy() -> tuple[Path, Names] | None:
    """Where groups that limit memory can be made."""
    for mount in mounts.table():
        path = Path(mount.mountpoint)
        if mount.fstype == "cgroup" and "memory" in mount.super_words:
            return path, VERSIONS["cgroup"]
        if mount.fstype == "cgroup2" and _controls_memory(path):
            return path, VERSIONS["cgroup2"]
    return None


def _controls_memory(path: Path) -> bool:
    """Whether a group below `path` has a limit of memory; asks the kernel for it."""
    try:
        if "memory" not in (path / "cgroup.controllers").read_text().split():
            return False
        (path / "cgroup.subtree_control").write_text("+memory")
    except OSError:
        return False
    return True


@contextmanager
def limited(limit: int) -> Iterator[Cgroup | None]:
    """A group with a limit of so many bytes, removed at the end; None where none can be made."""
    found = _hierarchy()
    if found is None:
        yield None
        return
    above, names = found
    group = Cgroup(above / f"nofailfs-lab-{os.getpid()}", names, limit)
    try:
        group.path.mkdir()
        (group.path / names.limit).write_text(str(limit))
        if (group.path / names.swap).exists():
            (group.path / names.swap).write_text(str(limit * names.swap_of_limit))
    except OSError:
        _remove(group.path)
        yield None
        return
    try:
        yield group
    finally:
        _remove(group.path)


def _remove(path: Path) -> None:
    deadline = time.monotonic() + REMOVE_S
    while path.exists():
        try:
            path.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
