"""kill -9: a mount's daemon is killed under writers, and what they were promised is looked for.

Each writer appends records to files of its own: a record is written, fsynced, and then noted, in
this process, which the daemon's end does not touch. Now and then a file is renamed to a name of
the same worker, or begun anew. After the kill the image is recovered, in turn by the kernel and by
our next mount; every noted record must be there, whole, and what follows it be the record that was
on its way, or nothing. xfs_repair -n must find nothing.

A kill loses no write that the device has: what is shown is that nobody is promised what only the
daemon's memory has. Lost writes are the business of `campaign`.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tools import targets
from tools.crash import judge
from tools.crash.model import pattern

WRITERS = 4
MOST_S = 0.6  # of work before the kill
SIZE = 300 << 20


@dataclass(frozen=True)
class Plan:
    """What is run."""

    rounds: int
    seed: int = 1
    memory: str = "64M"
    keep: Path | None = None


@dataclass
class File:
    """A file of a writer: records of known lengths, of which the first ones were promised."""

    ident: int
    names: list[str] = field(default_factory=list)  # it has one of these
    lengths: list[int] = field(default_factory=list)
    promised: int = 0  # records
    named: int = 0  # the name is this one or a later one


class Writer(threading.Thread):
    """Works until the mount is gone."""

    def __init__(self, root: Path, number: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.root, self.number = root, number
        self.rng = random.Random(f"{seed} {number}")
        self.files: list[File] = []

    def run(self) -> None:
        try:
            while True:
                self._one_file()
        except OSError:
            return  # the daemon is dead

    def _one_file(self) -> None:
        file = File(self.number * 1000 + len(self.files) + 1)
        self.files.append(file)
        file.names.append(f"{self.number}-{len(self.files)}")
        fd = os.open(self.root / file.names[0], os.O_RDWR | os.O_CREAT, 0o644)
        try:
            for _ in range(self.rng.randrange(2, 12)):
                self._record(file, fd)
            if self.rng.random() < 0.5:
                file.names.append(file.names[0] + "-renamed")
                os.rename(self.root / file.names[0], self.root / file.names[1])
                os.fsync(fd)
                file.named = 1
        finally:
            os.close(fd)

    def _record(self, file: File, fd: int) -> None:
        at, number = sum(file.lengths), len(file.lengths) + 1
        length = self.rng.choice((16, 500, 4096, 5000, 70_000))
        file.lengths.append(length)
        os.pwrite(fd, pattern(file.ident, number, at, length), at)
        os.fsync(fd)
        file.promised = number


def _lost(root: Path, file: File) -> str:
    """What of a file is not as it must be; nothing if all is well."""
    data = None
    for name in file.names[file.named :]:
        if (root / name).exists():
            data = (root / name).read_bytes()
    if data is None:
        return f"{file.names} is gone" if file.promised else ""
    at, promised = 0, sum(file.lengths[: file.promised])
    if not promised <= len(data) <= sum(file.lengths):
        return f"{file.names} has {len(data)} bytes, {promised} were promised"
    for number, length in enumerate(file.lengths, 1):
        have = data[at : at + length]
        if number <= file.promised and have != pattern(file.ident, number, at, length):
            return f"{file.names}: record {number} of {file.promised} promised ones is damaged"
        at += length
    return ""


def one_round(plan: Plan, number: int, image: Path, where: Path) -> tuple[list[str], int]:
    """Mount, work, kill, recover, look. Returns what is wrong, and how many records were promised.

    Even rounds are recovered by the kernel, odd ones by our next mount.
    """
    rng = random.Random(f"{plan.seed} {number}")
    with targets.killed(image, where, plan.memory):
        writers = [Writer(where, n, rng.randrange(1 << 30)) for n in range(WRITERS)]
        for writer in writers:
            writer.start()
        time.sleep(rng.uniform(0.02, MOST_S))
    for writer in writers:
        writer.join()
    if number % 2:
        with targets.ours(image, where, plan.memory):
            pass
    wrong: list[str] = []
    with targets.kernel_xfs(image, where) as target:
        for writer in writers:
            wrong += filter(None, (_lost(target.path, file) for file in writer.files))
    wrong += judge.faults(image, thorough=True)
    return wrong, sum(file.promised for writer in writers for file in writer.files)


def run(plan: Plan, say: Callable[[str], None]) -> int:
    """All rounds; returns how many failed."""
    failed = promised = 0
    with targets.scratch_dir() as scratch:
        for number in range(plan.rounds):
            image = scratch / "image"
            targets.make_image(image, SIZE)
            wrong, records = one_round(plan, number, image, scratch / "mnt")
            promised += records
            if wrong:
                failed += 1
                how = "our mount" if number % 2 else "the kernel"
                say(f"FAILED round {number} of seed {plan.seed}, recovered by {how}:")
                for line in wrong:
                    say(f"  {line}")
                if plan.keep:
                    judge.keep(image, plan.keep, f"killed-{plan.seed}-{number}")
        say(f"{plan.rounds} rounds, {promised} records promised, {failed} rounds failed")
    return failed
